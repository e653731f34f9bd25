"""A small vision transformer in polynomial form for scikit-learn's digits (8x8 images of 0..9), trained from scratch.

It has 16 tokens of 2x2 pixels, width 64, Power-Softmax, a square as the activation, and BatchNorm before each block,
which is an affine map in evaluation mode. The only step that is no polynomial is one division per attention row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.errors import MissingPackage
from secure.polynomial.forms import Form, PowerAttention, forms
from secure.polynomial.recipe import Recipe

SIDE, PATCH, CLASSES = 8, 2, 10
EPOCHS, BATCH, RANGE_WEIGHT = 60, 64, 0.3
MOVED, NOISE = 0.4, 0.04  # share of training images that are moved, and the noise on all
TOKENS, PIXELS = (SIDE // PATCH) ** 2, PATCH * PATCH


class _Square(nn.Module):
    """x + x^2 / 4: a square with a slope, so that deep models train."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.25 * x * x


class _Norm(nn.Module):
    """BatchNorm over the features of every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, recipe: Recipe) -> None:
        super().__init__()
        self.heads, self.scaling = heads, (width // heads) ** -0.5
        self.first, self.second = _Norm(width), _Norm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation, self.polynomial = _Square(), PowerAttention(recipe)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        y = self.first(x)
        q, k, v = (
            layer(y).reshape(b, t, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = self.polynomial(q, k, v, None, self.scaling).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(attended)
        out: Tensor = x + self.down(self.activation(self.up(self.second(x))))
        return out


class DigitsModel(nn.Module):
    """A vision transformer that maps images (batch, 64) in [0, 1] to logits (batch, 10)."""

    def __init__(self, layers: int = 1, width: int = 64, heads: int = 4, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.embed = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(torch.empty(TOKENS, width).normal_(0.0, 0.1))
        self.blocks = nn.ModuleList(_Block(width, heads, self.recipe) for _ in range(layers))
        self.norm, self.head = _Norm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(2, 3)
        x = self.embed(patches.reshape(-1, TOKENS, PIXELS)) + self.positions
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


@dataclass(frozen=True, eq=False)
class DigitsData:
    """The data set, split into training and test images with their labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int = 0, held_out: int = 360) -> DigitsData:
    """Load scikit-learn's 1,797 images as numbers in [0, 1], shuffled with a seed.

    Raises MissingPackage without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingPackage("scikit-learn is not installed\nhint: pip install 'unseen[demo]'") from None
    raw = datasets.load_digits()
    images = torch.as_tensor(raw.data, dtype=torch.float32) / 16
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    return DigitsData((images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out]))


def train_digits(
    layers: int = 1,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    recipe: Recipe | None = None,
    told: Callable[[int, float], None] | None = None,
) -> tuple[DigitsModel, float]:
    """Train a model; return it in evaluation mode with frozen ranges, and its accuracy on the test images.

    The last quarter of the epochs runs on the polynomials. ``told`` is called with each epoch and its mean loss.
    """
    torch.manual_seed(seed)
    data, model = load_digits(), DigitsModel(layers, recipe=recipe)
    images, labels = data.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * per_epoch)
    found = [form for _, form in forms(model)]
    _watch(found, True)
    for epoch in range(epochs):
        model.train()
        if epoch == 1:
            _centre(model, found, images)
        if epoch == epochs - epochs // 4:
            _freeze(model, found, images)
        losses = []
        for chosen in torch.randperm(len(images)).split(BATCH)[:per_epoch]:
            loss = F.cross_entropy(model(_augmented(images[chosen])), labels[chosen], label_smoothing=0.05)
            ranges = [form.range_loss for form in found if form.range_loss is not None]
            total = loss + RANGE_WEIGHT * torch.stack(ranges).sum() if ranges else loss
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        if told is not None:
            told(epoch + 1, sum(losses) / len(losses))
    _watch(found, False)
    model.eval()
    return model, accuracy(model, *data.test)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is the label's."""
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


def _augmented(images: Tensor) -> Tensor:
    """Move some of the images by a pixel, and add noise to all."""
    n, places = len(images), torch.arange(SIDE)
    square = F.pad(images.reshape(-1, SIDE, SIDE), (1, 1, 1, 1))
    down, right = (torch.where(_uniform(n) < MOVED, torch.randint(0, 3, (n,)), 1) for _ in range(2))
    rows, columns = (down[:, None] + places)[:, :, None], (right[:, None] + places)[:, None, :]
    shifted = square[torch.arange(n)[:, None, None], rows, columns].reshape(n, -1)
    return (shifted + NOISE * torch.randn_like(shifted)).clamp(0, 1)


def _uniform(n: int) -> Tensor:
    return torch.empty(n).uniform_()  # for training; nothing here is a secret


def _watch(found: list[Form], on: bool) -> None:
    for form in found:
        form.watching = form.guarded = on
        form.range_loss = None
        form.seen.clear()


def _see(model: nn.Module, found: list[Form], images: Tensor) -> None:
    for form in found:
        form.seen.clear()
    with torch.no_grad():
        for _ in range(4):
            model(_augmented(images))
        model(images)


def _centre(model: nn.Module, found: list[Form], images: Tensor) -> None:
    _see(model, found, images)
    for form in found:
        low, high = form.range_seen()
        form.found = {"centre": (low * high) ** 0.5}


def _freeze(model: nn.Module, found: list[Form], images: Tensor) -> None:
    model.eval()
    _see(model, found, images)
    for form in found:
        form.freeze()
    model.train()
