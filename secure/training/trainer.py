"""Distil a model into its polynomial form in two stages; a killed run resumes from its checkpoint.

1. *Swap*: Power-Softmax replaces softmax from the first step; divisions, norms and activations stay exact. The student
   follows the teacher's hidden states and embeddings, and a range loss of growing weight draws arguments together.
2. *Substitute*: ranges are frozen on the arguments seen. Activations and inverse powers gradually become polynomials on
   these ranges (over ``blend_steps``), and training continues.

The state after a step depends on the seed and the step alone: batches are drawn from (seed, epoch), and there is no
dropout. A checkpoint is one file of the weights, the optimizer's moments and, as JSON in its header, the step, the
recipe and the history of the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from approximations.power_blocks import power_sums
from secure.errors import Diverged, InvalidInput, RangeLost
from secure.polynomial.forms import (
    SAMPLES,
    Form,
    PolynomialActivation,
    PolynomialNorm,
    PowerAttention,
    described,
    forms,
)
from secure.polynomial.recipe import CHECKPOINT, Recipe
from secure.training.checkpoint import read_about, read_state, write_checkpoint

FRESH = 2  # batches from which scales of queries and centres are taken
FITTING = 12  # batches on which coefficients are fitted
EXACT = 0.1  # share of the last steps that run in float32 whatever the setting
POOL = 16  # batches whose items are sorted by size
FREEZING = 48  # batches whose ranges are frozen


@dataclass(frozen=True)
class Settings:
    """The settings of a training run. Raises InvalidInput for values out of range.

    steps: the steps of all stages. narrow: the share of steps over which the range loss grows to its full weight.
    substitute: the share of steps after which ranges are frozen and polynomials take over.
    patience: the run ends after so many checks on held-out data without a better loss, all in the last stage; with 0 it
    never ends early.
    """

    steps: int = 4500
    batch: int = 48
    rate: float = 1.5e-4
    seed: int = 0
    warm_up: int = 50
    narrow: float = 0.3
    substitute: float = 0.45
    blend_steps: int = 300  # over which polynomials take over from exact divisions
    range_weight: float = 0.01
    bfloat16: bool = False  # products in bfloat16 except in the last steps: twice as fast if the processor has it
    check_every: int = 100  # steps from one check on held-out data to the next
    patience: int = 0
    checkpoint_seconds: float = 180.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise InvalidInput(f"{self.steps} steps of {self.batch} texts", "steps from 1, of 2 texts or more")
        if not 0 < self.narrow <= self.substitute < 1:
            raise InvalidInput(
                f"ranges narrow over {self.narrow:g} of the steps, and polynomials come after {self.substitute:g}",
                "0 < narrow <= substitute < 1",
            )


@dataclass
class TrainingProgress:
    """The progress of a run, reported after every step."""

    step: int
    steps: int
    loss: float
    parts: dict[str, float]
    stage: str
    seconds: float


Batch = Mapping[str, Tensor]
Loss = Callable[[Batch], tuple[Tensor, dict[str, float]]]


@dataclass
class Trainer:
    """A training run.

    student: the model in polynomial form, trained in place. loss: of one batch, without the range loss; returns the
    loss and its parts by name. collate: makes a batch of items of ``data``. directory: for checkpoints; None keeps
    none.
    """

    student: nn.Module
    recipe: Recipe
    loss: Loss
    data: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    settings: Settings
    directory: Path | None = None
    forward: Callable[[Batch], object] | None = None  # runs the student alone; by default with the batch as keywords
    held_out: Sequence[Any] = ()  # data for checks only
    about: str = ""  # a digest of data and teacher, with which alone a run may continue
    size: Callable[[Any], int] | None = None  # the size of an item; batches then have items of about one size
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.device = next(self.student.parameters()).device
        self.parameters = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        decay = [p for p in self.parameters.values() if p.dim() > 1]
        rest = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.rate)
        self._saved = time.monotonic()
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            if (self.directory / CHECKPOINT).is_file():
                self._resume(self.directory / CHECKPOINT)

    # data

    def batch(self, step: int) -> Batch:
        size, count = self.settings.batch, len(self.data)
        epoch, place = divmod(step, max(1, count // size))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        if self.size is not None:  # sort the items of a pool of batches by size, and shuffle those batches
            pool, within = divmod(place, POOL)
            order = order[pool * POOL * size : (pool + 1) * POOL * size]
            sizes = torch.tensor([self.size(self.data[i]) for i in order.tolist()])
            order = order[sizes.argsort(stable=True)]
            place = int(torch.randperm(len(order) // size, generator=generator)[within])
        chosen = order[place * size : (place + 1) * size]
        return {k: v.to(self.device) for k, v in self.collate([self.data[i] for i in chosen.tolist()]).items()}

    # stages

    def run(self, told: Callable[[TrainingProgress], None] | None = None, until: int | None = None) -> Recipe:
        """Train to the last step (or ``until``) and return the recipe with ranges and coefficients.

        Raises Diverged if the loss is not finite, and RangeLost if training could not hold a range.
        """
        s, began = self.settings, time.monotonic()
        freezing = round(s.steps * s.substitute)
        if self.step == 0 and not self._started:
            self._prepare()
        self._watch(True)
        while self.step < min(s.steps, until or s.steps) and not self._stalled():
            if self.step == freezing and not self._frozen:
                self._freeze()
            for _, form in forms(self.student):
                form.blend = min(1.0, (self.step - freezing + 1) / s.blend_steps) if self._frozen else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = s.rate * self._schedule(self.step)
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=s.bfloat16 and self.step < s.steps * (1 - EXACT)
            ):
                loss, parts = self.loss(self.batch(self.step))
            ranges = self._range_loss()
            total = loss + self._range_weight() * ranges
            if not bool(torch.isfinite(total)):
                raise Diverged(
                    f"the loss is not finite at step {self.step}"
                    + (f"; the checkpoint in {self.directory} is from before" if self.directory else "")
                    + "\nhint: a lower rate, or a smaller spread in the recipe"
                )
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self._watch(True)  # forget the arguments seen
            self.step += 1
            parts = {**parts, "range": ranges.item()}
            self.history.append({"step": self.step, "loss": loss.item(), **parts})
            if self.held_out and (self.step % s.check_every == 0 or self.step == s.steps):
                self.history[-1]["held_out"] = self._held_out_loss()
            if self.directory is not None and time.monotonic() - self._saved > s.checkpoint_seconds:
                self.save()
            if told is not None:
                stage = "substitute" if self._frozen else "swap"
                told(TrainingProgress(self.step, s.steps, loss.item(), parts, stage, time.monotonic() - began))
        self._watch(False)
        for _, form in forms(self.student):
            form.blend = 1.0
        if self.directory is not None:
            self.save()
        return described(self.student, self.recipe)

    @property
    def _started(self) -> bool:
        return any(form.found for _, form in forms(self.student))

    @property
    def _frozen(self) -> bool:
        return any(form.frozen for _, form in forms(self.student))

    def _held_out_loss(self) -> float:
        self._watch(False)
        size, losses = self.settings.batch, []
        for start in range(0, len(self.held_out), size):
            if len(chosen := self.held_out[start : start + size]) > 1:  # a loss of similarities needs two
                losses.append(self._loss(self.collate(chosen)))
        self._watch(True)
        return sum(losses) / len(losses)

    def _loss(self, batch: Batch) -> float:
        with torch.no_grad():
            return float(self.loss({k: v.to(self.device) for k, v in batch.items()})[0])

    def _stalled(self) -> bool:
        s = self.settings
        begun = s.steps * s.substitute + s.blend_steps
        checks = [h["held_out"] for h in self.history if "held_out" in h and h["step"] > begun]
        return 0 < s.patience < len(checks) and min(checks[: -s.patience]) <= min(checks[-s.patience :])

    def _watch(self, on: bool) -> None:
        for _, form in forms(self.student):
            form.watching = form.guarded = on
            form.range_loss = None
            form.seen.clear()

    def _range_loss(self) -> Tensor:
        losses = [form.range_loss for _, form in forms(self.student) if form.range_loss is not None]
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _range_weight(self) -> float:
        """Return the weight of the range loss. It grows at first, as it would drown all others on a fresh student."""
        s = self.settings
        return s.range_weight * min(1.0, self.step / (s.steps * s.narrow))

    def _schedule(self, step: int) -> float:
        s = self.settings
        if step < s.warm_up:
            return (step + 1) / s.warm_up
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - s.warm_up) / max(1, s.steps - s.warm_up)))

    def _forward(self, batch: Batch) -> None:
        with torch.no_grad():
            self.forward(batch) if self.forward is not None else self.student(**batch)

    def _prepare(self) -> None:
        """Set the scales of queries, then the centres of the norms.

        Attentions go one by one in the order of the computation, as each changes the arguments of the next.
        """
        batches = [self.batch(i) for i in range(FRESH)]
        order = _in_order(self.student, lambda: self._forward(batches[0]))
        norms: list[Form] = [form for form in order if form.kind == "norm"]
        groups: list[list[Form]] = [[form] for form in order if isinstance(form, PowerAttention)]
        for group in [*groups, norms]:
            for form, arguments in self._met(group, batches).items():
                _start(form, arguments)

    def _met(self, group: Sequence[Form], batches: Sequence[Batch]) -> dict[Form, list[Tensor]]:
        with _arguments(group) as captured:
            for batch in batches:
                self._forward(batch)
        return captured

    def _freeze(self) -> None:
        self._watch(True)
        batches = [self.batch(self.settings.steps + i) for i in range(FREEZING)]
        for batch in batches:
            self._forward(batch)
        activations: list[Form] = [form for _, form in forms(self.student) if isinstance(form, PolynomialActivation)]
        for activation, met in self._met(activations, batches[:FITTING]).items():
            if met:  # the model may have modules that it never calls
                samples = torch.cat([x.reshape(-1) for x in met])
                cast(PolynomialActivation, activation).fit(samples[:: max(1, samples.numel() // SAMPLES)])
        for path, form in forms(self.student):
            if not form.seen:
                continue
            low, high = form.range_seen()
            try:
                form.freeze()
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise RangeLost(
                    f"{path}: arguments from {low:.3g} to {high:.3g}: {reason}\n"
                    f"hint: {self.step} of {self.settings.steps} steps were to narrow the ranges; give more steps"
                ) from None
            form.seen.clear()
        if self.directory is not None:
            self.save()

    # checkpoints

    def save(self) -> None:
        """Write a checkpoint to the run's directory, whole or not at all."""
        assert self.directory is not None
        about = {
            "step": self.step,
            "about": self.about,
            "settings": asdict(self.settings),
            "recipe": described(self.student, self.recipe).model_dump(),
            "history": self.history,
        }
        write_checkpoint(self.directory / CHECKPOINT, self.parameters, self.optimizer, about)
        self._saved = time.monotonic()

    def _resume(self, path: Path) -> None:
        """Resume from a checkpoint. Raises InvalidInput if it is not one of this run."""
        try:
            about = read_about(path)
            recipe = Recipe.model_validate(about["recipe"])
            step, history = int(about["step"]), list(about["history"])
            if not 0 <= step <= self.settings.steps or len(history) != step:
                raise InvalidInput(f"step {step}, of {self.settings.steps}")
        except (KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InvalidInput(f"{path} is no checkpoint: {reason}\nhint: delete it to begin anew") from None
        wanted = {
            "settings": (asdict(self.settings), about.get("settings")),
            "recipe": (self.recipe.model_dump(exclude={"layers"}), recipe.model_dump(exclude={"layers"})),
            "text, samples or length of rows, or of another model": (self.about, about.get("about")),
        }
        for what, (ours, theirs) in wanted.items():
            if theirs != ours:
                raise InvalidInput(
                    f"{path} is a run with other {what}{_apart(theirs, ours)}",
                    "give the same to go on, or another directory",
                )
        try:
            values, states = read_state(path, self.parameters)
        except (SafetensorError, ValueError) as error:
            raise InvalidInput(
                f"{path} is no checkpoint of this model: {error}\nhint: delete it to begin anew"
            ) from None
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])
                if states[name]:
                    self.optimizer.state[p] = states[name]
        for path_, form in forms(self.student):
            form.found = dict(recipe.layers.get(path_, {}))
        self.step, self.history = step, history


def _apart(theirs: Any, ours: Any) -> str:
    """Say in which fields two documents differ; nothing of what are none, as digests."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return ""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ": " + ", ".join(f"{name} {theirs.get(name)!r:.80}, not {ours.get(name)!r:.80}" for name in names)


def _in_order(model: nn.Module, run: Callable[[], None]) -> list[Form]:
    order: list[Form] = []
    hooks = [form.register_forward_pre_hook(lambda m, _: order.append(m)) for _, form in forms(model)]
    run()
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


@contextmanager
def _arguments(group: Sequence[Form]) -> Iterator[dict[Form, list[Tensor]]]:
    """Capture the first four arguments of these modules, one call after the other."""
    captured: dict[Form, list[Tensor]] = {form: [] for form in group}
    hooks = [form.register_forward_pre_hook(lambda m, args: captured[m].extend(args[:4])) for form in group]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _start(form: Form, captured: list[Tensor]) -> None:
    """Set a module's scale and centre before the first step, from its own arguments."""
    if isinstance(form, PowerAttention):
        r, totals = form.recipe, list[list[Tensor]]()
        for query, key, value, weights in zip(*(captured[i::4] for i in range(4)), strict=True):
            sums = power_sums(query, key, value, weights, r.exponent, r.offset, query.shape[-1] ** -0.5)
            totals.append([head.reshape(-1) for head in sums.total.unbind(1)])
        medians = torch.stack([torch.cat(head).median() for head in zip(*totals, strict=True)])
        if r.offset or form.scale_queries is None:
            form.found = {"centre": float(medians.log().mean().exp())}
        else:
            form.scale_queries(medians ** (-1 / r.exponent))
            form.found = {"centre": 1.0}
    else:
        variance = torch.cat([_spread(form, x).reshape(-1) for x in captured])
        form.found = {"centre": float(variance.log().mean().exp())}


def _spread(norm: Form, x: Tensor) -> Tensor:
    """Return the argument of a norm's root, without eps."""
    return x.var(-1, unbiased=False) if isinstance(norm, PolynomialNorm) else x.square().mean(-1)
