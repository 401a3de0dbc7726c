"""One token for each of some sequences, in shapes that do not change: what CUDA replays as a graph.

Run on an H200 (benchmarks/results/gpu_h200_202611.md) and, pretended, on CPUs (tests/pretend.py).

A step of one token is some twenty kernels a block, each of a few microseconds: launched one by one
they leave a GPU idle. So keys and values of all sequences stand in one pool, a row each; a step
takes the first so many rows whether they want to read or not, and those that do not write where
nobody looks. How far it looks is rounded up to a power of two, so that few shapes are captured.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

Said = tuple[Tensor | None, Tensor | None]  # logits, and states at the junctions


class Shape(NamedTuple):
    """Of what a row holds for a tower or a link; a link is one layer."""

    layers: int
    heads: int
    head_width: int
    like: Tensor  # its dtype and device


@final
class Pool:
    """Keys and values of sequences, of every tower and every link in one tensor each, with room to
    grow. grown: called after one of them was replaced; views of it are stale."""

    def __init__(self, shapes: Mapping[Hashable, Shape], grown: Callable[[], None]) -> None:
        self._shapes, self._grown = shapes, grown
        self._free: list[int] = []
        self.rows = 0
        self.held: dict[Hashable, Float[Tensor, "rows layers 2 heads room head_width"]] = {
            name: self._zeros(shape, 0, 0) for name, shape in shapes.items()
        }

    def take(self) -> int:
        """A row that nobody has, the lowest. It is empty: what is masked is multiplied by zero,
        which does not help against NaN."""
        if not self._free:
            self._free = list(range(self.rows, max(1, 2 * self.rows)))
            self.rows = self._free[-1] + 1
            for name, held in self.held.items():
                self._replace(name, self.rows, held.shape[4])
        self._free.sort()
        row = self._free.pop(0)
        for held in self.held.values():
            held[row] = 0
        return row

    def free(self, row: int) -> None:
        """Gives a row back."""
        self._free.append(row)

    def reserve(self, name: Hashable, tokens: int) -> None:
        """Room for so many tokens in every row of a tower or a link, and for one that nobody will
        read."""
        if tokens >= self.held[name].shape[4]:
            self._replace(name, self.rows, above(tokens) + 1)

    def copy(self, name: Hashable, row: int, twin: int, tokens: int) -> None:
        """The first tokens of a row to another."""
        held = self.held[name]
        held[twin, :, :, :, :tokens] = held[row, :, :, :, :tokens]

    @staticmethod
    def _zeros(shape: Shape, rows: int, room: int) -> Tensor:
        return shape.like.new_zeros((rows, shape.layers, 2, shape.heads, room, shape.head_width))

    def _replace(self, name: Hashable, rows: int, room: int) -> None:
        old, new = self.held[name], self._zeros(self._shapes[name], rows, room)
        new[: old.shape[0], :, :, :, : old.shape[4]] = old
        self.held[name] = new
        self._grown()


@final
class Row:
    """A `fused.Cache` that stands in a pool."""

    def __init__(self, pool: Pool, name: Hashable, row: int, length: int = 0) -> None:
        self.pool, self.name, self.row, self.length = pool, name, row, length

    @property
    def held(self) -> Float[Tensor, "layers 2 heads room head_width"]:
        """Where its keys and values stand now."""
        return self.pool.held[self.name][self.row]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        keys, values = self.held[index]
        return keys, values

    def copy(self, row: int) -> "Row":
        """The same in another row, which goes on by itself."""
        self.pool.copy(self.name, self.row, row, self.length)
        return Row(self.pool, self.name, row, self.length)

    def reserve(self, tokens: int) -> None:
        """Makes room for so many more."""
        self.pool.reserve(self.name, self.length + tokens)


def above(number: int, least: int = 64) -> int:
    """The power of two that is not below it, nor below `least`."""
    return max(least, 1 << (number - 1).bit_length())


@final
class Replay:
    """A step with its inputs and outputs in places of its own; on CUDA captured once and replayed,
    elsewhere called."""

    def __init__(
        self, step: FunctionType, shape: tuple[int, int], device: torch.device, compiled: bool
    ) -> None:
        """compiled: by torch.compile, whole; a step that it cannot take whole raises its error."""
        self._step: Callable[[Tensor], Said] = step
        # Its code copied: of one piece of code torch.compile makes eight versions and no more.
        if compiled:
            own = FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
            self._step = torch.compile(own, fullgraph=True, dynamic=False)
        self._given = torch.zeros(shape, dtype=torch.long, device=device)
        self._graphed = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._said: Said = None, None

    def __call__(self, given: Int[Tensor, "numbers rows"]) -> Said:
        """What the step returns, in memory that the next call writes over. A step must come to the
        same if it is run again."""
        self._given.copy_(given)
        if self._graphed and self._graph is None:
            self._capture()
        if self._graph is None:
            return self._step(self._given)
        self._graph.replay()
        return self._said

    def _capture(self) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        # What is compiled, chosen or allocated at first use must not be captured.
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._step(self._given)
        torch.cuda.current_stream().wait_stream(beside)
        try:
            graph = torch.cuda.CUDAGraph()
            # The outer one brings the stream back: a capture that fails leaves its own as the
            # current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._said = self._step(self._given)
            self._graph = graph
        except RuntimeError as error:
            self._graphed = False
            warnings.warn(
                "A step could not be captured as a CUDA graph, its kernels are launched singly: "
                f"{error}",
                stacklevel=3,
            )
