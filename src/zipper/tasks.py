"""Tasks: which segments of a row are given and which are produced, in which order.

The same object drives training weights, decoding order and evaluation (paper, sec. 3.2: the order
of output modalities is given). A task knows names of fields and towers; it knows nothing of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.strand import Segment, Target

__getattr__ = names_of(__name__, ("zipper.pipeline",))


@dataclass(frozen=True)
class Task:
    """`given` then `produced`: each item is a tower's name, or "field:tower" where a row has
    several fields for one tower.

    train_given: loss weight of given segments (0 = loss on produced segments only, the default).
    """

    given: tuple[str, ...]
    produced: tuple[str, ...]
    train_given: float = 0.0

    def __post_init__(self) -> None:
        if not self.produced:
            raise ZipperError("A task must produce at least one segment; its `produced` is empty.")

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
        return tuple(dict.fromkeys(tower_of(item) for item in self.given + self.produced))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The towers that produce, in order (what `generate(outputs=...)` wants)."""
        return tuple(tower_of(item) for item in self.produced)

    def segments(self, row: Mapping[str, Sequence[int]]) -> list[Segment]:
        """The training sample of one row: {field: ids} -> segments, targets
        where they have a loss."""
        given = self.prompt(row)
        if self.train_given:
            given = [Target(part.tower, part.content, self.train_given) for part in given]
        return [*given, *(Target(tower_of(item), _field(row, item)) for item in self.produced)]

    def prompt(self, row: Mapping[str, Sequence[int]]) -> list[Segment]:
        """The given segments of one row, to generate from."""
        return [Segment(tower_of(item), _field(row, item)) for item in self.given]


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
