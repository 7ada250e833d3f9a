"""A sequence whose items are made where they are asked for: what a batch plan or a data set larger than memory is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

from numpy.typing import NDArray

T = TypeVar("T", covariant=True)


class Lazy(Sequence[T]):
    """Item n is `make(places[n])`, made anew each time; a slice is lazy, too."""

    def __init__(self, make: Callable[[int], T], places: range | NDArray[Any]) -> None:
        self.make = make
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Lazy[T]: ...
    def __getitem__(self, place: int | slice) -> T | Lazy[T]:
        if isinstance(place, slice):
            return Lazy(self.make, self.places[place])
        return self.make(int(self.places[place]))

    def __iter__(self) -> Iterator[T]:
        for place in self.places:
            yield self.make(int(place))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
