"""Tensors that are made when they are read, so that a model of any size is compiled in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from protocols.narrow import same
from secure.errors import InvalidInput

KEPT = 2 << 30
"""Bytes of tensors that are kept although they can be made again: those of models of some hundred million weights."""

Key = TypeVar("Key", bound=Hashable)


class Room:
    """A bound of bytes for what several ``Made`` keep. Those that come first are kept."""

    def __init__(self, most: int | None = None) -> None:
        self._left = KEPT if most is None else most

    def take(self, value: Tensor) -> bool:
        """Take the bytes of a tensor; False if there are not so many."""
        size = value.numel() * value.element_size()
        if size > self._left:
            return False
        self._left -= size
        return True


class Made(Mapping[Key, Tensor], Generic[Key]):
    """A mapping whose tensors are made at every reading, but for those that are kept because there is room."""

    def __init__(self, room: Room | None = None, recipes: Mapping[Key, Callable[[], Tensor]] | None = None) -> None:
        self._room = Room() if room is None else room
        self._recipes: MutableMapping[Key, Callable[[], Tensor] | None] = dict(recipes or {})
        self._kept: dict[Key, Tensor] = {}

    def add(self, key: Key, recipe: Callable[[], Tensor]) -> None:
        self._recipes[key] = recipe

    def __getitem__(self, key: Key) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        recipe = self._recipes[key]
        assert recipe is not None  # it would be kept
        value = recipe()
        if self._room.take(value):
            self._kept[key], self._recipes[key] = value, None  # what it was made of need not stay
        return value

    def __iter__(self) -> Iterator[Key]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __contains__(self, key: object) -> bool:
        return key in self._recipes

    def filled(self) -> Made[Key]:
        """Make tensors now, in their order, as long as there is room for them, and return the mapping."""
        for key in self:
            value = self[key]
            if key not in self._kept:
                break
            del value
        return self


class Chosen(Mapping[str, Tensor]):
    """Some of the tensors of several mappings. places: for each name the one that has it, under the same name."""

    def __init__(self, places: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


def alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> bool:
    """True if two mappings have the same tensor, which is not made to see that where both have it from one place."""
    if isinstance(a, Chosen) and isinstance(b, Chosen) and a.places[name] is b.places[name]:
        return True
    return same(a[name], b[name])


def unchanged(name: str, value: Tensor, make: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Return a recipe that makes a tensor of a model's weight, whenever it is used.

    It raises InvalidInput if the weight was changed in place meanwhile: some of the model would be the old one.
    """
    return partial(_made, name, value, value._version, make)


def _made(name: str, value: Tensor, version: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    if value._version != version:
        raise InvalidInput(f"the weight {name!r} was changed after the model was compiled", "compile it again")
    return make(value)
