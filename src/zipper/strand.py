"""Strands: what towers read, made from segments, and the one mask rule between them.

A segment begins with its tower's begin token and ends with its end token. Segments of one sample
follow each other in one linear sequence; every token's rank in it is its time. Nothing here knows
what the ids mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zipper.errors import ZipperError

PADDING = -1  # the document of a padding slot
NO_CHOICE = -1  # where nothing was to be chosen


@dataclass(frozen=True)
class Segment:
    """A piece of one modality.

    tower: the tower that reads or writes it.
    content: token ids without begin and end (model), or raw data such as a string, an `Audio` or a
    path (`Pipeline`).

    beside: it runs in the same steps as the segment before it: they are lanes of one group, tokens
    of one step do not see each other, later ones see all before, and what follows the group begins
    when the last of them has ended. stride: it reads a token every so many steps of its group.
    delay: steps of the group before its first token.
    """

    tower: str
    content: Any
    beside: bool = field(default=False, kw_only=True)
    stride: int = field(default=1, kw_only=True)
    delay: int = field(default=0, kw_only=True)


@final
@dataclass(frozen=True)
class Target(Segment):
    """A segment that a model learns to produce. weight: of the loss of each of its tokens (0 = it
    is given). chosen: that it comes next, and what comes behind it, was a choice, which is learnt
    too."""

    weight: float = 1.0
    chosen: bool = field(default=False, kw_only=True)


@final
@dataclass(frozen=True)
class Produced(Segment):
    """A segment that a model has produced.

    ended: False where it hit its cap instead of producing its end token.
    score: sum of the log-probabilities (nats) of the produced tokens.
    """

    ended: bool = True
    score: float = 0.0


S = TypeVar("S", bound=Segment)


class Ends(NamedTuple):
    """The ids that begin and end a segment of one tower."""

    begin: int
    end: int


def groups(segments: Iterable[S]) -> list[list[S]]:
    """Segments by the group whose lanes they are; most are alone in theirs. Raises a ZipperError
    for a tower that is twice in one, a first segment beside nothing, and a pace that is none."""
    found: list[list[S]] = []
    for segment in segments:
        pace = (segment.stride, segment.delay)
        if not all(isinstance(n, int) for n in pace) or pace[0] < 1 or pace[1] < 0:
            raise ZipperError(
                f"A segment of {segment.tower!r} has a stride of {pace[0]!r} and a delay of "
                f"{pace[1]!r}; both are whole numbers, a stride at least 1, a delay at least 0."
            )
        if not segment.beside:
            found.append([segment])
            continue
        if not found or segment.tower in [lane.tower for lane in found[-1]]:
            raise ZipperError(
                f"A segment of {segment.tower!r} runs beside "
                + ("another of it" if found else "nothing")
                + ". A group has each tower once."
            )
        found[-1].append(segment)
    return found


def decisions(segments: Sequence[Segment]) -> dict[int, str]:
    """Behind which segments there was a choice, by number, and what came: a tower, "" where it was
    over. Raises a ZipperError where nothing stands before a choice, whose end is what it goes
    by."""
    found: dict[int, str] = {}
    for number, segment in enumerate(segments):
        if isinstance(segment, Target) and segment.chosen:
            if not number:
                raise ZipperError("A choice has nothing before it. Give a segment first.")
            found[number - 1] = segment.tower
            found[number] = ""
    return found


def read_ids(content: Any, tower: str, ends: Ends, vocabulary: int) -> list[int]:
    """The content of a segment, a sequence or array of ids, as a list of its own. Raises a
    ZipperError for what is none: numbers that are not whole, ids that the tower does not know, and
    its begin and end, which the model itself puts around a segment.
    """
    if isinstance(content, str | bytes) or not isinstance(content, Sequence | np.ndarray | Tensor):
        raise ZipperError(
            f"A segment of {tower!r} holds a {type(content).__name__}; a list of ids was wanted."
        )
    try:
        ids = np.asarray(content)
    except (TypeError, ValueError) as error:  # rows of several lengths, tensors of another device
        raise ZipperError(f"A segment of {tower!r} holds no list of ids: {error}.") from error
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ZipperError(
            f"A segment of {tower!r} holds {ids.dtype} of shape {ids.shape}; one row of whole "
            "numbers was wanted."
        )
    if len(wrong := ids[(ids < 0) | (ids >= vocabulary)]):
        raise ZipperError(
            f"A segment of {tower!r} holds the id {wrong[0]}; its ids go from 0 to "
            f"{vocabulary - 1}."
        )
    if len(wrong := ids[(ids == ends.begin) | (ids == ends.end)]):
        raise ZipperError(
            f"A segment of {tower!r} holds the id {wrong[0]}, with which its segments "
            f"{'begin' if wrong[0] == ends.begin else 'end'}: the model puts begin and end around "
            "a segment. Give the ids between them (with a tokenizer of Hugging Face: "
            "add_special_tokens=False)."
        )
    found: list[int] = ids.tolist()
    return found


@final
@dataclass(frozen=True)
class Strand:
    """What one tower reads. Slots (columns) of document -1 are padding, their other values mean
    nothing.

    ids: tokens, within the vocabulary also in padding. position: rank among this tower's own tokens
    of the document, its rotary or learned position. time: rank in the document's interleaved
    sequence of all towers. document: which sample of a packed row. Within a tower a slot reads
    itself and those before it of the same document.
    """

    ids: Int[Tensor, "batch length"]
    position: Int[Tensor, "batch length"]
    time: Int[Tensor, "batch length"]
    document: Int[Tensor, "batch length"]

    @classmethod
    def alone(
        cls, ids: Int[Tensor, "batch length"], document: Int[Tensor, "batch length"] | None = None
    ) -> "Strand":
        """A strand of unimodal documents: time is position. Without `document` each row is one,
        without padding."""
        if document is None:
            document = torch.zeros_like(ids)
        slot = torch.arange(ids.shape[1], device=ids.device)
        earlier = (document[:, :, None] == document[:, None, :]) & (slot[None, :] < slot[:, None])
        rank = torch.where(document >= 0, earlier.sum(-1), 0)
        return cls(ids, rank, rank, document)

    def to(self, device: torch.device | str) -> "Strand":
        """The same strand on another device."""
        return Strand(*(column.to(device) for column in self.columns))

    def select(self, rows: Int[Tensor, " chosen"]) -> "Strand":
        """These rows, in this order."""
        return Strand(*(column[rows] for column in self.columns))

    def narrowed(self) -> "Strand":
        """Without the slots that are padding in all rows, unless all are."""
        read = (self.document >= 0).any(0)
        return Strand(*(column[:, read] for column in self.columns)) if read.any() else self

    def followed(self, later: "Strand") -> "Strand":
        """This strand and behind it another of as many rows."""
        pairs = zip(self.columns, later.columns, strict=True)
        return Strand(*(torch.cat(pair, dim=1) for pair in pairs))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its four tensors, in order."""
        return self.ids, self.position, self.time, self.document


def visible(target: Strand, source: Strand) -> Bool[Tensor, "batch target source"]:
    """The one mask rule (paper, sec. 3.1): source.time < target.time and same document. Padding
    (document -1) sees and shows nothing."""
    same = (target.document[:, :, None] == source.document[:, None, :]) & (source.document >= 0)[
        :, None, :
    ]
    return same & (source.time[:, None, :] < target.time[:, :, None])


@dataclass(frozen=True)
class Batch:
    """A padded batch. Per tower that takes part: what it reads, the id to predict at each position,
    and the weight of that loss (0 where there is nothing to predict).

    choices: behind an end token where there was a choice, what came: the number of a tower among
    the names of all of the model, sorted, or how many these are where it was over; NO_CHOICE
    elsewhere. Below that, -2 - n for n: it is looked at, and does not count. company: where there
    was a choice, all towers of the plan, as they are named to `hidden`.
    """

    strands: dict[str, Strand]
    targets: dict[str, Int[Tensor, "batch length"]]
    weights: dict[str, Float[Tensor, "batch length"]]
    choices: dict[str, Int[Tensor, "batch length"]] = field(default_factory=dict)
    company: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            {name: strand.to(device) for name, strand in self.strands.items()},
            {name: t.to(device) for name, t in self.targets.items()},
            {name: t.to(device) for name, t in self.weights.items()},
            {name: t.to(device) for name, t in self.choices.items()},
            self.company,
        )


def collate(
    samples: Sequence[Sequence[Segment]],
    ends: Mapping[str, Ends],
    *,
    left: bool = False,
    packed: Sequence[Sequence[int]] | None = None,
    company: Sequence[str] = (),
) -> Batch:
    """Lay samples out as one padded batch, one strand per tower that any sample names.

    left: pad on the left (generation) instead of the right. packed: rows as lists of sample
    indices, several samples (documents) in one row; default one sample per row. company: all
    towers of the plan where something is chosen. Position and time count from 0 in every document.
    """
    rows = [[i] for i in range(len(samples))] if packed is None else [list(r) for r in packed]
    names = list(dict.fromkeys(segment.tower for segment in chain(*samples)))
    length = {name: [0] * len(rows) for name in names}
    for number, row in enumerate(rows):
        for segment in chain(*(samples[index] for index in row)):
            length[segment.tower][number] += len(segment.content) + 2
    # Ids, position, time, document, targets; arrays are several times faster to fill than lists.
    columns = {name: np.zeros((5, len(rows), max(length[name])), np.int64) for name in names}
    weights = {name: np.zeros(columns[name].shape[1:], np.float32) for name in names}
    choices = {name: np.full(columns[name].shape[1:], NO_CHOICE) for name in names}
    came = {name: number for number, name in enumerate([*sorted(ends), ""])}
    for name in names:
        columns[name][3] = PADDING
    for r, row in enumerate(rows):
        slot = {name: columns[name].shape[2] - length[name][r] if left else 0 for name in names}
        for document, index in enumerate(row):
            time = 0
            position = dict.fromkeys(names, 0)
            begun = 0  # of the group, in time
            decided = decisions(samples[index])
            for number, segment in enumerate(chain(*groups(samples[index]))):
                begun = begun if segment.beside else time
                name, n = segment.tower, len(segment.content) + 2
                start, p = slot[name], position[name]
                part = columns[name][:, r, start : start + n]
                part[0, 0], part[0, -1] = _ends(ends, name)
                part[0, 1:-1] = segment.content
                part[1] = np.arange(p, p + n)
                part[2] = begun + segment.delay + segment.stride * np.arange(n)
                part[3] = document
                part[4, :-1] = part[0, 1:]
                if isinstance(segment, Target):
                    weights[name][r, start : start + n - 1] = segment.weight
                if number in decided:
                    choices[name][r, start + n - 1] = came[decided[number]]
                slot[name] += n
                position[name] += n
                time = max(time, int(part[2, -1]) + 1)
    parts = {name: [torch.from_numpy(column) for column in columns[name]] for name in names}
    return Batch(
        {name: Strand(*part[:4]) for name, part in parts.items()},
        {name: part[4] for name, part in parts.items()},
        {name: torch.from_numpy(weight) for name, weight in weights.items()},
        {n: torch.from_numpy(c) for n, c in choices.items() if (c != NO_CHOICE).any()},
        tuple(company),
    )


def _ends(ends: Mapping[str, Ends], tower: str) -> Ends:
    if tower not in ends:
        raise ZipperError(f"A segment names the tower {tower!r}; this model has {sorted(ends)}.")
    return ends[tower]
