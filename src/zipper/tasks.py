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
from zipper.former import BEHIND, names_of
from zipper.strand import Segment, Target, groups

__getattr__ = names_of(__name__, ("zipper.pipeline",))


class Lane(NamedTuple):
    """One segment of a plan, or a choice. item: as it is named; the rest: see `Segment`."""

    item: str
    beside: bool = False
    stride: int = 1
    delay: int = 0

    @property
    def tower(self) -> str:
        """Which tower; of a choice those among which it is, with a bar between them."""
        return "|".join(map(tower_of, self.among)) if self.among else tower_of(self.item)

    @property
    def among(self) -> tuple[str, ...]:
        """Of a choice, its items; "*" stands for all towers. () of a segment that is fixed."""
        return tuple(self.item.split("|")) if among(self.item) else ()

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
    "text@4 + speech": text takes a step in four; "text@4/12": and begins twelve steps later.
    "text|speech" is a choice: the model says which of them comes next, and when it is over; "*" is
    one among all. Raises a ZipperError for an item that is none."""
    found = []
    items = [re.sub(r"\s*\|\s*", "|", item) for item in items]
    for number, said in chain.from_iterable(enumerate(item.split("+")) for item in items):
        lane = re.fullmatch(r"([^@\s]+)(?:\s*@\s*([1-9]\d{0,3})(?:/(\d{1,4}))?)?", said.strip())
        if lane is None:
            raise ZipperError(
                f"{said.strip()!r} is no segment of a plan. Write a tower's name, with others of "
                "the same steps behind a plus, such as 'text + speech' or 'text@4/12 + speech'."
            )
        stride, delay = int(lane[2] or 1), int(lane[3] or 0)
        found.append(Lane(lane[1], number > 0, stride, delay))
    check_choices([lane.segment([]) for lane in found])
    return tuple(found)


def among(tower: str) -> tuple[str, ...]:
    """The towers of a choice ("*": all); () for a tower's name."""
    return tuple(tower.split("|")) if "|" in tower or tower == "*" else ()


def check_choices(plan: Sequence[Segment]) -> None:
    """Raises a ZipperError for choices that are none: in a group, one behind another, of something
    without a name or of one twice."""
    before: tuple[str, ...] = ()
    for group in groups(plan):
        here = [among(lane.tower) for lane in group]
        if any(here) and len(group) > 1:
            raise ZipperError("A choice stands in a group. It is one segment after another.")
        if here[0] and before:
            raise ZipperError(
                f"{'|'.join(before)} is followed by {'|'.join(here[0])}; a choice goes on until "
                "it is over. Write one of both."
            )
        before = here[0]
        if "" in before or ("*" in before and len(before) > 1) or len({*before}) < len(before):
            raise ZipperError(
                f"{'|'.join(before)!r} is no choice. Write towers, each once, such as "
                "'text|speech', or '*' for all."
            )


@dataclass(frozen=True)
class Task:
    """`given` then `produced`: each item is a tower's name, "field:tower" where a row has several
    fields for one tower, "voice~speech" for ids behind those of another field (the voice of a
    segment), or several of these in one group (`lanes`).

    train_given: loss weight of given segments (0 = loss on produced segments only, the default).
    """

    given: tuple[str, ...]
    produced: tuple[str, ...]
    train_given: float = 0.0

    def __post_init__(self) -> None:
        if not self.produced:
            raise ZipperError("A task must produce at least one segment; its `produced` is empty.")
        if any(lane.among for lane in lanes(self.given)):
            raise ZipperError(f"{self}: what is given is not chosen. Name its towers.")
        if any(lane.among == ("*",) for lane in lanes(self.produced)):
            raise ZipperError(f"{self}: which fields? Write them, such as 'text|answer:speech'.")

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
        items = lanes(self.given + self.produced)
        each = chain.from_iterable(lane.among or (lane.item,) for lane in items)
        return tuple(dict.fromkeys(map(tower_of, each)))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The towers among which it chooses, once, in order."""
        each = chain.from_iterable(lane.among for lane in self.segments_produced)
        return tuple(dict.fromkeys(map(tower_of, each)))

    @property
    def company(self) -> tuple[str, ...]:
        """All its towers where it chooses: which of them a sample has is then not known before."""
        return self.towers if self.chosen else ()

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
        """The training sample of one row: {field: ids} -> segments, targets where they have a
        loss."""
        given = self.prompt(row)
        if self.train_given:
            learnt = lanes(self.given)
            given = [lane.target(content(row, lane.item), self.train_given) for lane in learnt]
        for lane in lanes(self.produced):
            if not lane.among:
                given.append(lane.target(content(row, lane.item)))
                continue
            there = [item for item in lane.among if has(row, item)]
            if not there:
                content(row, lane.among[0])
            given += [Target(tower_of(i), content(row, i), chosen=True) for i in there]
        return given

    def fits(self, row: Mapping[str, Sequence[int]]) -> bool:
        """Whether a row has what the task wants: of a choice, one of its fields."""
        each = (lane.among or (lane.item,) for lane in lanes(self.given + self.produced))
        return all(any(has(row, item) for item in items) for items in each)

    def prompt(self, row: Mapping[str, Sequence[int]]) -> list[Segment]:
        """The given segments of one row, to generate from."""
        return [lane.segment(content(row, lane.item)) for lane in lanes(self.given)]


def tower_of(item: str) -> str:
    """ "question:speech", "voice~speech" and "speech" -> "speech"."""
    return re.split("[:~]", item)[-1]


def fields_of(item: str) -> list[str]:
    """The fields of a row whose ids, one after the other, are the segment: "question:speech" ->
    ["question"], "voice~speech" -> ["voice", "speech"]."""
    return item.partition(":")[0].split("~")


def has(row: Mapping[str, Sequence[int]], item: str) -> bool:
    """Whether a row has what an item names."""
    return all(field in row for field in _fields(row, item))


def content(row: Mapping[str, Sequence[int]], item: str) -> list[int]:
    """The ids that an item names, of a row {field: ids}. Raises a ZipperError where a field is not
    there."""
    fields = _fields(row, item)
    for field in fields:
        if field not in row:
            raise ZipperError(
                f"The task wants a field {field!r}, the row has {sorted(row)}. Add the field or "
                "change the task."
            )
    return [*chain.from_iterable(row[field] for field in fields)]


def _fields(row: Mapping[str, Sequence[int]], item: str) -> list[str]:
    named = fields_of(item)
    first, *rest = named
    if first in row or rest or first not in BEHIND:
        return named
    return [BEHIND[first], tower_of(item)]
