"""Loading the weights of a model directory, so that what is served is the model that was saved, or nothing.

transformers initializes at random what a checkpoint lacks, and drops what it does not know, both with a warning. Here
all of it is refused by name, as are weights that are no numbers, quantized ones, and adapters, which are no models.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocols.narrow import is_finite
from secure.capture.tensor_files import map_file, map_tensors
from secure.errors import Error, InvalidInput, MissingPackage, ModelNotFound, printable
from secure.lowering.made import KEPT
from secure.models.hollow import hollow
from secure.models.onnx_weights import ONNX, check_graph, read_onnx

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *ONNX,
)
"""The names of weights in a directory; the first that is there counts, as in transformers."""

WRAPPERS = ("module.", "_orig_mod.", "0.auto_model.", "auto_model.", "model.")
"""Prefixes of all names in a checkpoint that was saved from a wrapped model."""

SAFE, GENERATION = ".safetensors", "generation_config.json"
MAPPED = 1 << 29  # bytes of weights that are read into memory; more are mapped
MAXIMUM_HEADER = 1 << 26  # bytes of the header of one mapped file
PARTS, FLOATS = 2, 4  # of KEPT, floats and integers; of the largest weight, copies in float64 at one moment
OTHER_FORMATS = (".onnx", ".gguf", ".h5", ".msgpack", ".pt")
LFS = b"version https://git-lfs"  # begins a file that stands for another one, which was not downloaded
NAMED = 8  # names in a message
_CONSTANTS = re.compile(r"(^|\.)position_ids$")  # 0, 1, 2, ..., which old versions saved
_POOLER = re.compile(r"(^|\.)pooler\.")

Hear = Callable[[str], None]


def unheard(line: str) -> None:
    """Drop a line."""


def load_checkpoint(
    directory: Path, kind: str = "AutoModel", *, optional: Collection[str] = (), told: Hear = unheard
) -> nn.Module:
    """Load ``transformers.<kind>`` from a directory, in float32, in evaluation mode, with its own attention.

    Safetensors of more than MAPPED bytes are mapped and stay in their own precision: parameters are views of the files,
    which must stay as they are, and take no memory of the process.
    The weights are those of ``WEIGHTS``, in any precision and number of files; pickled ones are read with
    ``weights_only``, and no code of the directory runs. Prefixes of a wrapped model are taken off all names.
    optional: prefixes of names that the checkpoint may lack, because the caller does not read what they compute. Heads
    of another task than ``kind`` are left out. told: hears a line about each of these liberties.

    Raises MissingPackage, ModelNotFound, and InvalidInput for a checkpoint that would give another model: weights that
    are missing, unexpected, of other shapes, not finite or quantized, each named; an adapter; a file that git-lfs did
    not download.
    """
    directory = Path(directory)
    _check_files(directory)
    with quiet_transformers():
        try:
            import transformers
        except ImportError:
            raise MissingPackage("transformers is not installed\nhint: pip install 'unseen[models]'") from None
        factory = getattr(transformers, kind)
        dtypes = _read(directory, lambda: _dtypes(directory))
        _check_dtypes(directory, dtypes)
        model: Any = None
        info: Any = None
        if _is_large(directory):
            model, info = _read(directory, lambda: _mapped(factory, directory))
        if info is None or _differs(info, optional):  # transformers knows more names
            model, info = _read(directory, lambda: _load(factory, directory))
        concrete = type(model)
        for prefix in _wrappers(dtypes) if _differs(info, optional) else ():
            unwrapped, other = _read(directory, lambda: _load(concrete, directory, prefix))  # noqa: B023 - called here
            if len(_differs(other, optional)) < len(_differs(info, optional)):
                model, info, dtypes = unwrapped, other, {name.removeprefix(prefix): "" for name in dtypes}
                told(f"{directory.name}: the prefix {prefix!r} of a wrapped model is taken off all names of weights")
                break
    _check_names(directory, model, info, dtypes, optional, told)
    _check_finite(directory, model.state_dict())
    loaded: nn.Module = model.eval()
    if (path := weight_files(directory)[0]).suffix == ".onnx":
        check_graph(path, loaded)
        told(f"{directory.name}: the weights are those of {path.name}, with whose graph the model agrees")
    return loaded


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers and torch from the terminal, within a ``with`` block.

    Everything that they say about a model is checked by the callers.
    """
    try:
        from transformers.utils import logging as theirs
    except ImportError:
        yield
        return
    shown, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if shown:
            theirs.enable_progress_bar()


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a directory that hold its weights. Raises ModelNotFound and InvalidInput."""
    found = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        others = sorted(
            p.name for p in directory.rglob("*") if p.suffix in (".onnx", ".gguf", ".h5", ".msgpack", ".pt")
        )
        there = f"; there is {', '.join(others[:NAMED])}" if others else ""
        raise ModelNotFound(
            f"{directory} has no weights: none of {', '.join(WEIGHTS)}{there}",
            "save the model with save_pretrained of transformers",
        )
    if found.suffix != ".json":
        return [found]
    try:
        table = json.loads(found.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted({str(name) for name in table.values()})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InvalidInput(f"{found} is no index of weights", "save the model again with save_pretrained") from None
    if strange := [name for name in names if Path(name).name != name]:
        raise InvalidInput(f"{found} names {printable(strange[0])!r}, which is not in its directory", "save it again")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ModelNotFound(
            f"{directory} lacks {_named(missing)}, which {found.name} lists", "download or copy all parts of the model"
        )
    return [directory / name for name in names]


def check_pointer(path: Path) -> None:
    """Raise InvalidInput for a file that git-lfs did not download."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise InvalidInput(
                f"{path} is a pointer of git-lfs, not the file itself", "git lfs pull in its directory downloads it"
            )


def _check_files(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise InvalidInput(
            f"{directory} holds an adapter (adapter_config.json), which changes another model's weights",
            "merge them: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(NEW DIRECTORY), with the "
            "tokenizer's files beside it",
        )
    settings = directory / "config.json"
    if not settings.is_file():
        raise ModelNotFound(f"{directory} has no config.json", "give the directory of a saved model")
    for path in (settings, *weight_files(directory)):
        check_pointer(path)
    try:
        found = json.loads(settings.read_text(encoding="utf-8-sig"))
        quantized = found.get("quantization_config")
    except (ValueError, AttributeError):
        raise InvalidInput(f"{settings} is no configuration: not a JSON object", "save the model again") from None
    if quantized is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise InvalidInput(
            f"the weights in {directory} are quantized (quant_method {printable(str(method))[:40]!r})",
            "use the checkpoint from which they were made, or save model.dequantize() with save_pretrained",
        )


def _read(directory: Path, reading: Callable[[], Any]) -> Any:
    try:
        return reading()
    except Error:
        raise
    except ImportError as error:
        raise MissingPackage(f"{directory} cannot be loaded: {(str(error).splitlines() or [''])[0][:300]}") from None
    except Exception as error:  # every format of weights raises errors of its own
        reason = printable((str(error).strip().splitlines() or [""])[0])
        raise InvalidInput(f"{directory} cannot be loaded: {type(error).__name__}: {reason[:300]}") from None


def _dtypes(directory: Path) -> dict[str, str]:
    """Return the precision of each weight, without reading the weights themselves where the format allows."""
    from safetensors import safe_open

    found = dict[str, str]()
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
        else:
            found |= {name: str(value.dtype) for name, value in read_weights(path).items()}
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name. Raises InvalidInput for a pickled file that holds other things."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".onnx":
        return read_onnx(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:
        raise InvalidInput(
            f"{path} is not read: it holds other things than tensors, or is damaged ({type(error).__name__})",
            "save the model again with save_pretrained, which writes model.safetensors",
        ) from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise InvalidInput(f"{path} holds no table of weights", "save model.state_dict(), or use save_pretrained")
    return {str(name): value for name, value in values.items()}


_FLOATS = frozenset({"F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"})


def _check_dtypes(directory: Path, dtypes: Mapping[str, str]) -> None:
    strange = [name for name, dtype in dtypes.items() if name.endswith("weight") and dtype not in _FLOATS]
    if strange:
        raise InvalidInput(
            f"the weights in {directory} are quantized: {_named(strange)}, in {dtypes[strange[0]]}",
            "use the checkpoint from which they were made",
        )


def _load(factory: Any, directory: Path, prefix: str = "") -> tuple[Any, Mapping[str, Any]]:
    """Load a model, and return it with what transformers tells about its names; ``prefix`` is taken off them."""
    from transformers import AutoConfig

    given: dict[str, Any] = {"local_files_only": True}
    graph = weight_files(directory)[0].suffix == ".onnx"
    if prefix or graph:
        given["config"] = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        given["state_dict"] = {name.removeprefix(prefix): value for name, value in _weights(directory)}
    if graph and hasattr(factory, "from_config"):  # of several classes, the one that the configuration names
        with torch.device("meta"):
            factory = type(factory.from_config(given["config"]))
    model, info = factory.from_pretrained(
        None if prefix or graph else str(directory),
        trust_remote_code=False,
        weights_only=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
        **given,
    )
    return model, info


def _is_large(directory: Path) -> bool:
    return large_bytes(directory)[1] > 0


def large_bytes(directory: Path) -> tuple[int, int]:
    """Return about the most bytes of memory that compiling a mapped checkpoint takes, and the bytes that are mapped.

    Both are 0 if the checkpoint is none, as its weights are too few or in files of another kind.
    """
    from safetensors import safe_open

    files, largest = weight_files(directory), 0
    mapped = sum(path.stat().st_size for path in files)
    if mapped <= MAPPED or any(path.suffix != SAFE for path in files):
        return 0, 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            largest = max([largest, *(math.prod(file.get_slice(n).get_shape()) for n in file.keys())])  # noqa: SIM118
    return PARTS * KEPT + FLOATS * 8 * largest, mapped


def _mapped(factory: Any, directory: Path) -> tuple[Any, Mapping[str, Any]]:
    """Make a model whose parameters are those of mapped files; return it with what ``_load`` tells about names."""
    from transformers import AutoConfig, GenerationConfig

    local: dict[str, Any] = {"local_files_only": True}
    configuration = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, **local)
    model: Any = hollow(lambda: factory.from_config(configuration, trust_remote_code=False, dtype=torch.float32))
    if (directory / GENERATION).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(str(directory), **local)
    found = dict[str, Tensor]()
    for path in weight_files(directory):
        with path.open("rb") as file:
            found |= map_tensors(map_file(file), most=MAXIMUM_HEADER)
    known = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = [(name, tuple(v.shape), known[name]) for name, v in found.items() if known.get(name, v.shape) != v.shape]
    given = {name: value for name, value in found.items() if known.get(name) == tuple(value.shape)}
    model.load_state_dict(given, assign=True, strict=False)
    model.tie_weights()
    held = {value.data_ptr() for value in given.values()}
    missing = [name for name, value in model.state_dict().items() if value.data_ptr() not in held]
    return model, {
        "missing_keys": [name for name in missing if name not in found],
        "unexpected_keys": [name for name in found if name not in known],
        "mismatched_keys": shapes,
        "error_msgs": [],
    }


def _weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(directory):
        yield from read_weights(path).items()


def _wrappers(names: Iterable[str]) -> list[str]:
    """Return the prefixes of WRAPPERS, one or two after the other, that all names begin with."""
    names, found = list(names), list[str]()
    for first in WRAPPERS:
        found += [prefix for prefix in (first, *(first + second for second in WRAPPERS)) if _all(names, prefix)]
    return found


def _all(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _differs(info: Mapping[str, Any], optional: Collection[str]) -> list[str]:
    """Return the names in which a checkpoint and a model differ."""
    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(optional))]
    return [*missing, *info["unexpected_keys"], *(entry[0] for entry in info["mismatched_keys"])]


def _check_names(
    directory: Path,
    model: Any,
    info: Mapping[str, Any],
    names: Collection[str],
    optional: Collection[str],
    told: Hear,
) -> None:
    """Refuse a checkpoint whose names or shapes are not those of the model, but for what nobody reads."""
    if shapes := sorted(info["mismatched_keys"]):
        name, there, here = shapes[0]
        raise InvalidInput(
            f"{directory} has {name} of shape {tuple(there)}, config.json makes it {tuple(here)}"
            + (f"; {len(shapes)} differ" if len(shapes) > 1 else ""),
            "the weights are of another configuration: copy both from one place",
        )
    kind, prefix = type(model).__name__, f"{getattr(model, 'base_model_prefix', '')}."
    heads = prefix != "." and any(name.startswith(prefix) for name in names) and model.base_model is model
    left = [
        name
        for name in sorted(info["unexpected_keys"])
        if _POOLER.search(name) or _CONSTANTS.search(name) or (heads and not name.startswith(prefix))
    ]
    unexpected = sorted(set(info["unexpected_keys"]) - set(left))
    lacking = [name for name in sorted(info["missing_keys"]) if name.startswith(tuple(optional))]
    missing = sorted(set(info["missing_keys"]) - set(lacking))
    if missing or unexpected or info["error_msgs"]:
        parts = [f"lacks {_named(missing)}"] if missing else []
        parts += [f"has {_named(unexpected)}, which {kind} has not"] if unexpected else []
        parts += [printable(str(message))[:200] for message in info["error_msgs"][:1]]
        raise InvalidInput(
            f"the weights in {directory} are not those of its config.json ({kind}): it {', and '.join(parts)}",
            "save the whole model with save_pretrained of its own class; what is missing would be random",
        )
    if left := [name for name in left if not _CONSTANTS.search(name)]:
        told(f"{directory.name}: left out, as {kind} does not read them: {_named(left)}")
    if lacking:
        told(f"{directory.name}: not in the checkpoint, and not read: {_named(lacking)}")


def _check_finite(directory: Path, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not is_finite(value):
            count = int((~value.isfinite()).sum())
            raise InvalidInput(
                f"{directory} has {count} values in {name} that are NaN or infinite", "the checkpoint is damaged"
            )


def _named(names: Collection[str]) -> str:
    """Return names for a message: some of them, and how many there are."""
    shown = ", ".join(printable(name)[:120] for name in list(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
