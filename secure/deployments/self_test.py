"""The self-test of a compiled model: its fixed-point answers against those of the module from which it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secure.deployments.compiled import Compiled, plain_reference
from secure.deployments.deployment import Deployment
from secure.errors import Error, InvalidInput, OutOfRange
from secure.tasks.closeness import Closeness, Compared
from secure.tasks.task import Loaded, stacked


@dataclass(frozen=True)
class Accept:
    """The bars of the self-test, by what answers are compared by; None stands for that measure's default.

    cosine: the lowest of embeddings, see ``Cosine``. error: the largest of scores and of what is chosen by them, see
    ``ScoreError``. Raises InvalidInput for one that is no number or out of bounds.
    """

    cosine: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.cosine is not None and not 0 <= self.cosine <= 1:
            raise InvalidInput(f"a lowest cosine of {self.cosine:g} to the original", "0 to 1")
        if self.error is not None and not 0 < self.error <= 1:
            raise InvalidInput(f"a largest error of {self.error:g} of the spread of scores", "above 0, up to 1")

    def of(self, closeness: Closeness) -> float:
        """Return the bar of a measure. Raises InvalidInput if that of another one was given, which means nothing."""
        own = {"cosine": self.cosine, "error": self.error}
        for name, given in own.items():
            if given is not None and name != closeness.name:
                said = "are no vectors" if name == "cosine" else "are vectors"
                raise InvalidInput(
                    f"--accept-{name} {given:g} means nothing for a model whose answers {said}",
                    f"--accept-{closeness.name}",
                )
        bar = own[closeness.name]
        return closeness.default if bar is None else bar


def self_test(compiled: Compiled, loaded: Loaded, accept: Accept | None = None) -> Compiled:
    """Compare the answers of a compiled model with its module's, in the clear, and say how close they come.

    It runs on inputs that calibrated nothing, one at the full length of each size and the others at the greatest, with
    the deployment's own plain arithmetic. All answers are judged together, by the measure of the task. The compiled
    model comes back with a line about it: how close they come, or why nothing was compared (there are no such inputs,
    or no such arithmetic).

    Raises InvalidInput for answers that are not accepted, for a bar that means nothing for the model, and if more
    inputs are refused, as out of range or as no input, than are answered; of fewer, the line tells.
    """
    bar = (accept or Accept()).of(loaded.closeness)
    if type(compiled.deployment).reference is Deployment.reference:
        return _with(compiled, f"self-test: not run ({compiled.deployment.name} has no plain arithmetic)")
    held_out = loaded.held_out or (lambda _: ())
    answered, tested, refused = list[Compared](), 0, list[Error]()
    smallest = min(int(size.program.labels.get("batch", 1)) for size in compiled.sizes)
    for size in compiled.sizes:
        length, batch = (int(size.program.labels.get(name, least)) for name, least in (("length", 0), ("batch", 1)))
        if batch > smallest:
            continue  # the same arithmetic on more of the same
        given = list(held_out(length))[: None if size is compiled else 1]
        for chosen in (given[i : i + batch] for i in range(0, len(given), batch)):
            filled = stacked([*chosen, *[chosen[0]] * (batch - len(chosen))])
            try:
                answered.append(Compared(stacked(chosen), _first(plain_reference(size, filled), len(chosen)), length))
                tested += len(chosen)
            except (InvalidInput, OutOfRange) as error:  # as clients would get it
                refused += [error] * len(chosen)
    said = _refusals(refused, tested)
    if len(refused) > tested:
        raise InvalidInput(
            f"the self-test: {said}", "texts of your own in --calibration, or inputs like those of clients"
        )
    if not answered:
        return _with(compiled, "self-test: not run (there are no inputs but those that calibrated the model)")
    judged = loaded.closeness.judge(loaded.module, answered, bar)
    if not judged.accepted:
        where = f" at {judged.length} tokens" if judged.length else ""
        raise InvalidInput(
            f"the compiled model gives other answers than {loaded.name or 'the original'}: {judged.words}{where}; "
            f"{bar:g} is accepted",
            "more fraction bits (--fraction-bits), or texts of your own in --calibration; "
            f"--accept-{loaded.closeness.name} {loaded.closeness.moves}",
        )
    on = f"{tested} texts, one at the full length of each" if loaded.length else f"{tested} inputs"
    return _with(compiled, f"self-test: {judged.words}, on {on}", said and f"{said}, for which clients get an error")


def _first(found: Any, rows: int) -> Any:
    """Return the first rows of a result."""
    return {name: each[:rows] for name, each in found.items()} if isinstance(found, Mapping) else found[:rows]


def _refusals(refused: list[Error], tested: int) -> str:
    """Say how many inputs were refused, and why the first was; "" if none was."""
    if not refused:
        return ""
    left = all(isinstance(error, OutOfRange) for error in refused)
    what = "left the ranges of calibration" if left else "were refused"
    why = str(refused[0]).splitlines()[0].partition(",")[0]
    return f"{len(refused)} of {len(refused) + tested} inputs {what}: {why}"


def _with(compiled: Compiled, *lines: str) -> Compiled:
    """Return a compiled model with more lines about it."""
    about = "; ".join(filter(None, (compiled.about, *lines)))
    return replace(compiled, about=about, others=tuple(replace(other, about=about) for other in compiled.others))
