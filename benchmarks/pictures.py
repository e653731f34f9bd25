"""Pictures for the documents: approximations and their errors, a step's costs, the scores of the bias study.

pip install matplotlib
python -m benchmarks.pictures
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approximations import gelu, power_scores, reciprocal, sigmoid, silu, tanh
from approximations.activations import GELU_FORMS
from approximations.fits import least_squares
from approximations.powers import power
from benchmarks.bias import FARTHER, TASKS
from benchmarks.common import RESULTS
from protocols import ring
from protocols.ring import WORD
from protocols.two_party import intervals
from protocols.two_party.tabulated import _PRECISION, PUBLIC, Tabulated
from secure.mpc.powers import ROUNDING, divided

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
POINTS = 400
Function = Callable[[Tensor], Any]


def pair(axes: Any, x: Tensor, exact: Function, forms: Mapping[str, Function], *, relative: bool = False) -> None:
    """The functions in the upper panel, their errors on a logarithmic axis in the lower one."""
    upper, lower = axes
    wanted = exact(x)
    upper.plot(x, wanted, color="black", linewidth=2, label="exact")
    for name, form in forms.items():
        found = torch.as_tensor(form(x))
        upper.plot(x, found, linewidth=1, label=name)
        error = (found - wanted).abs() / (wanted.abs() if relative else 1.0)
        lower.plot(x, error.clamp_min(1e-9), linewidth=0.8, label=name)
    lower.set_yscale("log")
    lower.set_ylabel("relative error" if relative else "error")
    upper.legend(fontsize=7)
    lower.grid(alpha=0.3)
    upper.grid(alpha=0.3)


def least(function: Function, x: Tensor, degree: int) -> Function:
    piece, _ = least_squares(function, x, degree)
    return piece


def piecewise_gelu(form: str, x: Tensor) -> Tensor:
    return torch.as_tensor(gelu(x, form))


def limit(p: int, x: Tensor) -> Tensor:
    """(1 + x/p)^p."""
    return torch.as_tensor(power_scores(x, p, p))


def inverse(exponent: float, steps: int, x: Tensor) -> Tensor:
    """On [0.1, 10], by polynomials alone."""
    return torch.as_tensor(power(x, exponent, 0.1, 10.0, 3, steps))


def tables(root: int, low: float, high: float, x: Tensor) -> Tensor:
    """x^(-1/root) from dealt tables on [low, high], as the protocol looks it up, but for the rounding of the result.

    Every argument has a mask of its own, and reads the finest table that holds its coarse digit.
    """
    fraction = ROUNDING - math.floor(math.log2(low))
    lowest, highest = math.floor(low * 2.0**fraction), math.ceil(high * 2.0**fraction)
    found = divided(root, lowest, highest, 0)
    assert found is not None
    _, bands = found
    places = (x * 2.0**fraction).round().to(torch.int64).clamp(lowest, highest)
    masks = torch.randint(1 << 52, places.shape, generator=torch.Generator().manual_seed(0))  # no secrets here
    out = torch.zeros_like(x)
    for band in bands:  # from coarse to fine
        here = torch.ones_like(places, dtype=torch.bool)
        if band.count:
            here = ring.right(places, band.digit) < band.count
        scale = 2.0 ** (24 + fraction / root)
        form = (band.ring, band.shift, band.degree, root, band.low, band.high, scale, PUBLIC, WORD)
        table, mask = Tabulated((int(here.sum()),), *form), ring.reduce(masks[here], band.ring)
        z = ring.reduce(places[here] + mask, band.ring)
        row = table.rows_for(mask)[torch.arange(len(z)), ring.right(z, band.shift)]
        basis = intervals.chebyshev(z & ring.low_mask(band.shift), band.shift, band.degree, _PRECISION, PUBLIC)
        out[here] = (row.double() * basis.double()).sum(-1) / 2.0 ** (24 + PUBLIC)
    return out


def sheet(name: str, titles: list[str], draw: Callable[[Any], None], rows: int = 2) -> None:
    """Rows of panels, a title each column, as one SVG file, the same bytes every time."""
    import matplotlib as mpl  # type: ignore[import-not-found,import-untyped,unused-ignore]

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "unseen"
    from matplotlib import pyplot  # type: ignore[import-not-found,import-untyped,unused-ignore]

    size = (3.7 * len(titles), 2.6 * rows)
    figure, axes = pyplot.subplots(rows, len(titles), figsize=size, layout="constrained", sharex="col", squeeze=False)
    draw(axes)
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=10)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


X = torch.linspace(-6, 6, POINTS, dtype=torch.float64)


def activations(axes: Any) -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    met = 1.1 * normal.icdf(torch.linspace(0.0005, 0.9995, 20001, dtype=torch.float64)) - 0.6  # as in all-MiniLM-L6-v2
    pair(axes[:, 0], X, F.gelu, {form: partial(piecewise_gelu, form) for form in GELU_FORMS})
    pair(axes[:, 1], X.clamp(-5, 5), F.gelu, {f"degree {d}": least(F.gelu, met, d) for d in (2, 3, 4)})
    pair(axes[:, 2], X, F.silu, {"silu": silu})


def exponentials(axes: Any) -> None:
    scores = torch.linspace(-6, 4, POINTS, dtype=torch.float64)
    pair(axes[:, 0], X, torch.tanh, {"tanh": tanh})
    pair(axes[:, 1], X, torch.sigmoid, {"sigmoid": sigmoid})
    pair(axes[:, 2], scores, torch.exp, {f"(1 + x/{p})^{p}": partial(limit, p) for p in (2, 4, 6, 8)})
    axes[0, 2].set_yscale("log")
    axes[0, 2].set_ylim(1e-4, 1e2)


def inverses(axes: Any) -> None:
    wide = torch.logspace(-1.3, 2.3, POINTS, dtype=torch.float64)
    narrow = torch.logspace(-1, 1, POINTS, dtype=torch.float64)
    reduced = partial(reciprocal, low=0.05, high=2000.0)  # too wide for tables
    forms = {"tables for [0.05, 200]": partial(tables, 1, 0.05, 200.0), "comparisons for [0.05, 2000]": reduced}
    pair(axes[:, 0], wide, torch.reciprocal, forms, relative=True)
    steps = {f"{s} corrections": partial(inverse, -1.0, s) for s in (0, 1, 2)}
    pair(axes[:, 1], narrow, torch.reciprocal, steps, relative=True)
    roots: dict[str, Function] = {f"{s} corrections": partial(inverse, -0.5, s) for s in (0, 1)}
    roots["tables"] = partial(tables, 2, 0.1, 10.0)
    pair(axes[:, 2], narrow, torch.rsqrt, roots, relative=True)
    for column in range(3):
        axes[0, column].set_xscale("log")
        axes[0, column].set_yscale("log")


def steps(axes: Any) -> None:
    """Costs of a step by the rows that it reads, from benchmarks/results/steps.json."""
    for name, report in json.loads((RESULTS / "steps.json").read_text()).items():
        found = report["steps"]
        capacities = [step["capacity"] for step in found]
        for panel, (what, unit) in zip(
            axes[0], (("online bytes", 1e6), ("dealt bytes", 1e6), ("rounds", 1)), strict=True
        ):
            panel.plot(
                capacities, [step[what] / unit for step in found], marker="o", linewidth=1, label=f"{name}, counted"
            )
        first = found[0]
        predicted = [first["online bytes"] + first["bytes a row"] * (c - first["capacity"]) for c in capacities]
        axes[0, 0].plot(
            capacities, [b / 1e6 for b in predicted], linestyle=":", color="black", label="predicted from the first"
        )
    for panel in axes[0]:
        panel.set_ylim(bottom=0)
        panel.set_xlabel("rows")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)


def bias(axes: Any) -> None:
    """What small transformers miss by length, from benchmarks/results/bias.json: the mean and the spread over seeds."""
    report = json.loads((RESULTS / "bias.json").read_text())
    lengths = [report["length"] * factor for factor in FARTHER]
    for panel, task in zip(axes[0], TASKS, strict=True):
        for form, scores in report[task].items():
            missed = [[max(1 - score, 1e-4) for score in scores[f"x{factor}"]] for factor in FARTHER]
            mean, high, low = zip(*missed, strict=True)
            style = "-" if form == "softmax" else ":" if form.startswith("shifted") else "--"
            (line,) = panel.plot(lengths, mean, linestyle=style, marker=".", linewidth=1, label=form)
            panel.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_yscale("log")
        panel.set_xlabel("length; trained up to the first")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("1 - score")
    axes[0, 0].set_ylim(bottom=1e-5)
    axes[0, 0].legend(fontsize=6, loc="lower right", ncols=2)


def main() -> None:
    where = "GeLU, least squares where MiniLM's arguments lie"
    sheet("activations", ["GeLU, with comparisons", where, "SiLU"], activations)
    sheet("exponentials", ["tanh", "sigmoid", "e^x in attention: powers with a shift"], exponentials)
    sheet("steps", ["online MB of a step", "dealt MB of a step", "rounds of a step"], steps, rows=1)
    sheet("bias", [*TASKS], bias, rows=1)
    sheet("inverses", ["1/x, exact path", "1/x, polynomials for [0.1, 10]", "1/sqrt(x) on [0.1, 10]"], inverses)


if __name__ == "__main__":
    main()
