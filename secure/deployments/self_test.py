"""The self-test of a compiled model: its fixed-point answers against those of the module from which it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secure.deployments.compiled import Compiled, plain_reference
from secure.errors import InvalidInput, OutOfRange
from secure.tasks.task import Loaded, stacked

ACCEPT = 0.999
"""The lowest cosine to the original at which a compiled model is accepted, by default."""


def self_test(compiled: Compiled, loaded: Loaded, accept: float = ACCEPT) -> Compiled:
    """Compare the answers of a compiled model with its module's, in the clear, and say how close they come.

    It runs on inputs that calibrated nothing, one at the full length of each size and the others at the greatest, with
    the deployment's own plain arithmetic. The compiled model comes back with a line about the lowest cosine. Models
    without such inputs, and deployments without such arithmetic, come back as they are. Raises InvalidInput below
    ``accept``, for answers that are not finite, and if more inputs leave the ranges of calibration than do not; of
    fewer, the line tells.
    """
    if loaded.held_out is None:
        return compiled
    lowest, tested, left = 1.0, 0, list[OutOfRange]()
    smallest = min(int(size.program.labels.get("batch", 1)) for size in compiled.sizes)
    for size in compiled.sizes:
        length, batch = (int(size.program.labels.get(name, least)) for name, least in (("length", 0), ("batch", 1)))
        if batch > smallest:
            continue  # the same arithmetic on more of the same
        given = list(loaded.held_out(length)) if size is compiled else list(loaded.held_out(length))[:1]
        for chosen in (given[i : i + batch] for i in range(0, len(given), batch)):
            inputs = stacked([*chosen, *[chosen[0]] * (batch - len(chosen))])
            try:
                found = plain_reference(size, inputs)
            except InvalidInput:
                continue  # no plain arithmetic, or an input that clients refuse, which is no wrong answer
            except OutOfRange as error:
                left += [error] * len(chosen)
                continue
            lowest, tested = min(lowest, _cosine(found, loaded.module, inputs)), tested + len(chosen)
            if not lowest >= accept:
                raise InvalidInput(
                    f"the compiled model gives other answers than {loaded.name or 'the original'}: lowest cosine "
                    f"{lowest:.6f} at {length} tokens, {accept:g} is accepted",
                    "more fraction bits (--fraction-bits), or texts of your own in --calibration; "
                    "--accept-cosine lowers the bar",
                )
    said = (
        f"{len(left)} of {len(left) + tested} inputs left the ranges of calibration: {str(left[0]).partition(',')[0]}"
        if left
        else ""
    )
    if len(left) > tested:
        raise InvalidInput(
            f"the self-test: {said}", "texts of your own in --calibration, or inputs like those of clients"
        )
    if not tested:
        return compiled
    line = f"self-test: lowest cosine to the original {lowest:.7f}, on {tested} texts, one at the full length of each"
    about = "; ".join(filter(None, (compiled.about, line, said and f"{said}; for such, clients get an error")))
    return replace(compiled, about=about, others=tuple(replace(other, about=about) for other in compiled.others))


def _cosine(found: Any, module: Any, inputs: Mapping[str, Tensor]) -> float:
    """Return the lowest cosine of a model's outputs to the module's, of each row alone; NaN counts as -1."""
    with torch.no_grad():
        wanted: Any = module(**inputs)
    ours, theirs = _outputs(found), _outputs(wanted)
    pairs = zip(ours, theirs, strict=True)
    cosines = [torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1), dim=-1).min() for a, b in pairs]
    return float(torch.stack(cosines).min().nan_to_num(-1.0))


def _outputs(result: Any) -> Sequence[Tensor]:
    return list(result.values()) if isinstance(result, Mapping) else [result]
