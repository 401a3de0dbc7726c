"""Tasks: which segments of a row are given and which are produced, in which order.

The same object drives training weights, decoding order and evaluation (paper, sec. 3.2: the order
of output modalities is given). A task knows names of fields and towers; it knows nothing of tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.strand import Segment, Target, groups

__getattr__ = names_of(__name__, ("zipper.pipeline",))


class Lane(NamedTuple):
    """One segment of a plan. item: as it is named; the rest: see `Segment`."""

    item: str
    beside: bool = False
    stride: int = 1
    delay: int = 0

    @property
    def tower(self) -> str:
        """Which tower."""
        return tower_of(self.item)

    def segment(self, content: Any) -> Segment:
        """A segment in this lane."""
        return Segment(
            self.tower, content, beside=self.beside, stride=self.stride, delay=self.delay
        )

    def target(self, content: Any, weight: float = 1.0) -> Target:
        """A segment in this lane that is learnt."""
        return Target(
            self.tower, content, weight, beside=self.beside, stride=self.stride, delay=self.delay
        )

    def __str__(self) -> str:
        pace = f"@{self.stride}" + f"/{self.delay}" * bool(self.delay)
        return self.item + pace * ((self.stride, self.delay) != (1, 0))


def lanes(items: Iterable[str]) -> tuple[Lane, ...]:
    """The segments of a plan. "text + speech" are two lanes of one group, made in the same steps;
    "text@4 + speech": text takes a step in four; "text@4/12": and begins twelve steps later. Raises
    a ZipperError for an item that is none."""
    found = []
    for number, said in chain.from_iterable(enumerate(item.split("+")) for item in items):
        lane = re.fullmatch(r"([^@\s]+)(?:\s*@\s*([1-9]\d{0,3})(?:/(\d{1,4}))?)?", said.strip())
        if lane is None:
            raise ZipperError(
                f"{said.strip()!r} is no segment of a plan. Write a tower's name, with others of "
                "the same steps behind a plus, such as 'text + speech' or 'text@4/12 + speech'."
            )
        stride, delay = int(lane[2] or 1), int(lane[3] or 0)
        found.append(Lane(lane[1], number > 0, stride, delay))
    groups([lane.segment([]) for lane in found])
    return tuple(found)


@dataclass(frozen=True)
class Task:
    """`given` then `produced`: each item is a tower's name, "field:tower" where a row has several
    fields for one tower, or several of these in one group (`lanes`).

    train_given: loss weight of given segments (0 = loss on produced segments only, the default).
    """

    given: tuple[str, ...]
    produced: tuple[str, ...]
    train_given: float = 0.0

    def __post_init__(self) -> None:
        if not self.produced:
            raise ZipperError("A task must produce at least one segment; its `produced` is empty.")
        lanes(self.given), lanes(self.produced)

    @classmethod
    def parse(cls, text: str) -> "Task":
        """Read "speech -> text", "text -> speech", "-> text" or "speech -> text, speech"."""
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ZipperError(
                f"{text!r} is not a task. Write it as 'given, ... -> produced, ...', e.g. 'speech "
                "-> text'."
            )
        given, produced = (
            tuple(item.strip() for item in side.split(",") if item.strip())
            for side in (left, right)
        )
        return cls(given, produced)

    def __str__(self) -> str:
        return f"{', '.join(self.given)} -> {', '.join(self.produced)}".strip()

    @property
    def towers(self) -> tuple[str, ...]:
        """Every tower that the task names, once, in order."""
        return tuple(dict.fromkeys(lane.tower for lane in lanes(self.given + self.produced)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `generate(outputs=...)` wants: towers in order, those of one group in one item."""
        each = [[lane._replace(item=lane.tower) for lane in lanes([i])] for i in self.produced]
        return tuple(" + ".join(map(str, group)) for group in each)

    @property
    def segments_produced(self) -> tuple[Lane, ...]:
        """Each segment that is produced."""
        return lanes(self.produced)

    def segments(self, row: Mapping[str, Sequence[int]]) -> list[Segment]:
        """The training sample of one row: {field: ids} -> segments, targets
        where they have a loss."""
        given = self.prompt(row)
        if self.train_given:
            learnt = lanes(self.given)
            given = [lane.target(_field(row, lane.item), self.train_given) for lane in learnt]
        return [*given, *(lane.target(_field(row, lane.item)) for lane in lanes(self.produced))]

    def prompt(self, row: Mapping[str, Sequence[int]]) -> list[Segment]:
        """The given segments of one row, to generate from."""
        return [lane.segment(_field(row, lane.item)) for lane in lanes(self.given)]


def tower_of(item: str) -> str:
    """ "question:speech" -> "speech"; "speech" -> "speech"."""
    return item.rpartition(":")[2]


def _field(row: Mapping[str, Sequence[int]], item: str) -> Sequence[int]:
    field = item.partition(":")[0]
    if field not in row:
        raise ZipperError(
            f"The task wants a field {field!r}, the row has {sorted(row)}. Add the field or "
            "change the task."
        )
    return row[field]
