"""Reading: sequences that models read piece by piece, many of them side by side.

A `Reader` is what generation goes by. `Stepwise` is the one for every model: it goes by the model's
own steps, the sequences being rows of one batch. `zipper.fast` has a faster one for the towers that
it knows. Nothing here knows how a model works inside, nor what is read.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from zipper.strand import PADDING, Ends, Segment, Strand

#: A sequence, whatever the reader makes of one, and the tokens of a tower that it reads next.
Piece = tuple[Any, Sequence[int]]
#: Logits behind the last token of each piece; None where the plan of its sequence wants none.
Logits = list[Float[Tensor, " vocabulary"] | None]


@runtime_checkable
class Model(Protocol):
    """What reading and generation need of a model."""

    def start(self, towers: Sequence[str], outputs: Sequence[str]) -> Any:
        """An empty state for a plan. It offers `compact(tower)` and `select(rows)`."""

    def step(self, strands: Mapping[str, Strand], state: Any) -> tuple[dict[str, Tensor], Any]:
        """Read tokens: states before the head, and the new state."""

    def unembed(self, tower: str, hidden: Tensor) -> Tensor:
        """Logits."""

    def ends(self) -> Mapping[str, Ends]:
        """Begin and end ids of each tower."""

    def limit(self, tower: str, given: Mapping[str, int], wanted: int | None = None) -> int:
        """Most tokens of a segment of `tower`, from the number of tokens of each tower so far and
        what the user wants."""

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise a ZipperError for unknown towers, ids out of range, or more than a tower can
        read."""

    def pads(self, tower: str) -> bool:
        """Whether rows of a batch may have padding on their left."""

    def choices(self, among: Sequence[str]) -> tuple[str, ...]:
        """The towers of a choice ("*": all). Raise a ZipperError where it does not choose what
        comes next among these."""

    def choice(self, tower: str, state: Tensor) -> Tensor:
        """From the state of an end token, logits of what comes next: all towers, sorted by name,
        and that it is over."""


@runtime_checkable
class Reader(Protocol):
    """How sequences are read."""

    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Any:
        """An empty sequence for a plan that reads and writes `towers`; only `outputs` will be asked
        for logits."""

    def fork(self, session: Any) -> Any:
        """A copy that goes on by itself."""

    def read(self, pieces: Mapping[str, Sequence[Piece]]) -> dict[str, Logits]:
        """One step: every sequence reads a piece, of one tower or of several.

        The tokens are later than all that the sequence has read before, so they see all of it.
        Where it reads several towers in one step, their tokens stand at the same times and do not
        see each other (`strand.visible`).
        """

    def state(self, session: Any, tower: str) -> Float[Tensor, " width"]:
        """Of the last token that a sequence has read in a tower of its outputs, behind the last
        block; for `Model.choice`."""


@dataclass(eq=False)
class Walk:
    """One sequence that is read step by step.

    time: of its next token. position: of the next token of each tower. group: where its state is;
    row: which row of it. states: of its last token in each tower that speaks.
    """

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    group: "_Group"
    row: int = 0
    time: int = 0
    position: dict[str, int] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Group:
    """Sequences of one plan whose states are the rows of one state.

    walks: by row; a row whose walk is gone goes on as padding. behind: by tower, rows that end in
    padding there.
    """

    state: Any
    walks: list["weakref.ref[Walk]"] = field(default_factory=list)
    behind: dict[str, set[int]] = field(default_factory=dict)

    def add(self, walk: Walk) -> None:
        """One more row."""
        walk.group, walk.row = self, len(self.walks)
        self.walks.append(weakref.ref(walk))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the state in this order."""
        self.state = self.state.select(torch.tensor(rows))
        for tower, behind in self.behind.items():
            self.behind[tower] = {new for new, old in enumerate(rows) if old in behind}

    def thin(self) -> None:
        """Without the rows that nobody reads any more, once these are the half."""
        alive = [
            (row, walk) for row, found in enumerate(self.walks) if (walk := found()) is not None
        ]
        if 2 * len(alive) > len(self.walks):
            return
        self.select([row for row, _ in alive])
        self.walks = []
        for _, walk in alive:
            self.add(walk)


class Stepwise:
    """Reads by the model's own `step`: for every model, and what faster readers are compared with.

    Sequences of one plan that are first read together share a state, whose rows they are, and go on
    in common steps.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Walk:
        """An empty sequence for a plan."""
        state = self.model.start(towers, outputs)
        walk = Walk(tuple(towers), tuple(outputs), _Group(state))
        walk.group.add(walk)
        return walk

    def fork(self, session: Walk) -> Walk:
        """A copy that goes on by itself."""
        group = session.group
        twin = Walk(
            session.towers,
            session.outputs,
            group,
            time=session.time,
            position=dict(session.position),
            states=dict(session.states),
        )
        if all(map(self.model.pads, session.towers)):
            group.select([*range(len(group.walks)), session.row])
        else:  # a row that waits for the others would be padded
            group = _Group(copy.deepcopy(group.state))
            group.select([session.row])
        group.add(twin)
        return twin

    def state(self, session: Walk, tower: str) -> Float[Tensor, " width"]:
        """See `Reader`."""
        return session.states[tower]

    @torch.inference_mode()
    def read(self, pieces: Mapping[str, Sequence[Piece]]) -> dict[str, Logits]:
        """See `Reader`."""
        found: dict[str, Logits] = {tower: [None] * len(group) for tower, group in pieces.items()}
        wanted: dict[Walk, dict[str, tuple[int, Sequence[int]]]] = {}
        for tower, given in pieces.items():
            for index, (walk, ids) in enumerate(given):
                wanted.setdefault(walk, {})[tower] = index, ids
        self._assemble(wanted)
        for step in self._steps(wanted):
            for walk, tower, logits in self._step({walk: wanted[walk] for walk in step}):
                found[tower][wanted[walk][tower][0]] = logits
        return found

    def _assemble(self, walks: Iterable[Walk]) -> None:
        """New sequences of one plan become the rows of one state, where their towers can be
        padded."""
        fresh: dict[tuple[Any, ...], list[Walk]] = {}
        for walk in walks:
            if (
                not walk.time
                and len(walk.group.walks) == 1
                and all(map(self.model.pads, walk.towers))
            ):
                fresh.setdefault((walk.towers, walk.outputs), []).append(walk)
        for same in fresh.values():
            first, *others = same
            for walk in others:
                first.group.add(walk)

    def _steps(
        self, wanted: Mapping[Walk, Mapping[str, tuple[int, Sequence[int]]]]
    ) -> list[list[Walk]]:
        """Who can be read in one step of the model: rows of one state, all of them by as many
        tokens.

        Only where a tower has read nothing yet may the numbers differ: a row is padded on its left,
        never inside.
        """
        steps: dict[tuple[Any, ...], list[Walk]] = {}
        for walk, towers in wanted.items():
            lengths = []
            for tower, (_, ids) in towers.items():
                started = any(
                    (other := found()) and other.position.get(tower) for found in walk.group.walks
                )
                lengths.append((tower, len(ids) if started else 0))
            steps.setdefault((id(walk.group), *lengths), []).append(walk)
        return list(steps.values())

    def _step(
        self, wanted: Mapping[Walk, Mapping[str, tuple[int, Sequence[int]]]]
    ) -> list[tuple[Walk, str, Tensor]]:
        """One step of the model: these rows of a state read, its others wait. Logits where a plan
        wants them."""
        group = next(iter(wanted)).group
        if len(group.walks) > 1:
            group.thin()
        towers = dict.fromkeys(chain(*wanted.values()))
        strands = {}
        for tower in towers:
            reading = {walk: pieces[tower][1] for walk, pieces in wanted.items() if tower in pieces}
            strands[tower] = self._strand(group, tower, reading)
        hidden, group.state = self.model.step(strands, group.state)
        for walk, pieces in wanted.items():
            walk.time += max(len(ids) for _, ids in pieces.values())
            for tower, (_, ids) in pieces.items():
                walk.position[tower] = walk.position.get(tower, 0) + len(ids)
        found = []
        for tower, states in hidden.items():
            speaking = [
                walk for walk, pieces in wanted.items() if tower in pieces and tower in walk.outputs
            ]
            if speaking:
                rows = torch.tensor([walk.row for walk in speaking], device=states.device)
                last = states[rows, -1:]
                logits = self.model.unembed(tower, last)[:, 0]
                for walk, state in zip(speaking, last[:, 0], strict=True):
                    walk.states[tower] = state
                found += [(walk, tower, row) for walk, row in zip(speaking, logits, strict=True)]
        return found

    def _strand(self, group: _Group, tower: str, reading: Mapping[Walk, Sequence[int]]) -> Strand:
        """The next tokens of a tower in some rows, padding in the others and on the left of shorter
        ones."""
        behind = group.behind.setdefault(tower, set())
        if behind & {walk.row for walk in reading}:  # padding would stand inside a row
            group.state = group.state.compact(tower)
            behind.clear()
        shape = len(group.walks), max(map(len, reading.values()))
        ids, position, time = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        document = torch.full(shape, PADDING)
        for walk, given in reading.items():
            slots, n = slice(shape[1] - len(given), None), len(given)
            ids[walk.row, slots] = torch.tensor(list(given))
            at = walk.position.get(tower, 0)
            position[walk.row, slots] = torch.arange(at, at + n)
            time[walk.row, slots] = torch.arange(walk.time, walk.time + n)
            document[walk.row, slots] = 0
        silent = {*range(shape[0])} - {walk.row for walk in reading}
        behind |= {
            row for row in silent if (walk := group.walks[row]()) and walk.position.get(tower)
        }
        return Strand(ids, position, time, document)
