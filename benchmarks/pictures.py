"""Pictures of the approximations and their errors for ``docs/approximations.md``.

pip install matplotlib
python -m benchmarks.pictures
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approximations import gelu, power_scores, reciprocal, rsqrt, sigmoid, silu, tanh
from approximations.activations import GELU_FORMS
from approximations.fits import least_squares
from approximations.powers import power

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


def sheet(name: str, titles: list[str], draw: Callable[[Any], None]) -> None:
    """Two rows of three panels as one SVG file, the same bytes every time."""
    import matplotlib as mpl  # type: ignore[import-not-found,import-untyped,unused-ignore]

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "unseen"
    from matplotlib import pyplot  # type: ignore[import-not-found,import-untyped,unused-ignore]

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.2), layout="constrained", sharex="col")
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
    pair(axes[:, 0], wide, torch.reciprocal, {"comparisons": partial(reciprocal, low=0.05, high=200.0)}, relative=True)
    steps = {f"{s} corrections": partial(inverse, -1.0, s) for s in (0, 1, 2)}
    pair(axes[:, 1], narrow, torch.reciprocal, steps, relative=True)
    roots: dict[str, Function] = {f"{s} corrections": partial(inverse, -0.5, s) for s in (0, 1)}
    roots["comparisons"] = partial(rsqrt, low=0.1, high=10.0)
    pair(axes[:, 2], narrow, torch.rsqrt, roots, relative=True)
    for column in range(3):
        axes[0, column].set_xscale("log")
        axes[0, column].set_yscale("log")


def main() -> None:
    where = "GeLU, least squares where MiniLM's arguments lie"
    sheet("activations", ["GeLU, with comparisons", where, "SiLU"], activations)
    sheet("exponentials", ["tanh", "sigmoid", "e^x in attention: powers with a shift"], exponentials)
    sheet("inverses", ["1/x, with comparisons", "1/x, polynomials for [0.1, 10]", "1/sqrt(x) on [0.1, 10]"], inverses)


if __name__ == "__main__":
    main()
