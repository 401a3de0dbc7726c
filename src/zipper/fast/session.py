"""What a sequence has read: keys and values of its towers and links, with room to grow, and what
links have not read yet."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from zipper.config import LinkKey
from zipper.fast.graphs import Row, Shape


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for keys and values, uninitialised; tests fill it with NaN."""
    return like.new_empty(shape)


@final
class Cache:
    """Keys and values of what one sequence has read in one tower, or through one link, with room
    to grow: explicit lengths instead of joined tensors."""

    def __init__(self, shape: Shape) -> None:
        self.length = 0
        self._shared = False
        nothing = shape.layers, 2, shape.heads, 0, shape.head_width
        self.held: Float[Tensor, "layers 2 heads room head_width"] = shape.like.new_empty(nothing)
        self._layers: list[tuple[Tensor, Tensor]] = []  # as views

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return self._layers[index]

    def reserve(self, tokens: int) -> None:
        """Makes room for so many more; grows by half at least, so that a long segment is seldom
        copied."""
        wanted, room = self.length + tokens, self.held.shape[3]
        if wanted > room or self._shared:
            self._move(max(wanted, room + room // 2, 64))

    def fork(self) -> "Cache":
        """A copy that goes on by itself."""
        twin = copy.copy(self)
        twin._move(self.length + 32)
        return twin

    def share(self) -> "Cache":
        """The same for what may never grow again: memory is copied once one of both does."""
        self._shared = True
        return copy.copy(self)

    def _move(self, room: int) -> None:
        """To other memory, with room for so many tokens."""
        moved = empty((*self.held.shape[:3], room, self.held.shape[4]), self.held)
        moved[:, :, :, : self.length] = self.held[:, :, :, : self.length]
        self.held, self._shared = moved, False
        self._layers = [(layer[0], layer[1]) for layer in moved]


#: Names of input projections; None on the unimodal path.
Entry = tuple[str, ...] | None


@dataclass
class Session:
    """One sequence: what it has read.

    towers: those of its plan. outputs: those that will produce, the others run no further than
    their last halt.
    entries: by tower the input projections that its embeddings go through; None on the unimodal
    path, on which there are no links either.
    memory: what links between its towers have read, one layer each.
    states: of its last token in each tower that speaks, in a zip that chooses.
    unread: {(source, target): states of the source that links into the target have not read yet}.
    row: in the pool, if there is one.
    """

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    entries: dict[str, Entry]
    caches: dict[str, Cache | Row] = field(default_factory=dict)
    memory: dict[LinkKey, Cache | Row] = field(default_factory=dict)
    unread: dict[tuple[str, str], list["Shown"]] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    row: int = -1


class Shown(NamedTuple):
    """States of a session that others may read: rows start .. stop - 1, of each halt of its
    tower."""

    kept: Sequence[Float[Tensor, "tokens width"]] | Float[Tensor, "halts tokens width"]
    start: int
    stop: int

    @classmethod
    def joined(cls, parts: "Sequence[Shown]") -> "Shown":
        """These behind each other, in memory of their own: a part holds on to the states of all
        who were read in its step."""
        kept = [
            torch.cat([part.kept[halt][part.start : part.stop] for part in parts])
            for halt in range(len(parts[0].kept))
        ]
        return cls(kept, 0, sum(part.stop - part.start for part in parts))


class Place(NamedTuple):
    """Where the tokens of one session stand in a ragged matrix: rows start .. stop - 1."""

    session: Session
    cache: Cache | Row
    start: int
    stop: int
