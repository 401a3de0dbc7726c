"""From segments to what towers read: strands, targets and loss weights.

A segment begins with its tower's begin token and ends with its end token. Segments of one sample follow each other in one
linear sequence; every token's rank in it is its time. Nothing here knows what the ids mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zipper.errors import ZipperError
from zipper.tower import Strand

PADDING = -1  # the document of a padding slot


@dataclass(frozen=True)
class Segment:
    """A piece of one modality.

    tower: the tower that reads or writes it. content: token ids without begin and end (model), or raw data such as a string, an
    `Audio` or a path (`Pipeline`). weight: loss weight of its tokens in training (0 = given). ended: a produced segment that is
    False here hit its cap instead of producing its end token. score: sum of the log-probabilities (nats) of the produced tokens.
    """

    tower: str
    content: Any
    weight: float = 0.0
    ended: bool = True
    score: float = 0.0


class Ends(NamedTuple):
    """The ids that begin and end a segment of one tower."""

    begin: int
    end: int


@dataclass(frozen=True)
class Batch:
    """A padded batch. Per tower that takes part: what it reads, the id to predict at each position, and the weight of that loss
    (0 where there is nothing to predict)."""

    strands: dict[str, Strand]
    targets: dict[str, Int[Tensor, "batch length"]]
    weights: dict[str, Float[Tensor, "batch length"]]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            {name: strand.to(device) for name, strand in self.strands.items()},
            {name: t.to(device) for name, t in self.targets.items()},
            {name: t.to(device) for name, t in self.weights.items()},
        )


def collate(
    samples: Sequence[Sequence[Segment]],
    ends: Mapping[str, Ends],
    *,
    left: bool = False,
    packed: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Lay samples out as one padded batch, one strand per tower that any sample names.

    left: pad on the left (generation) instead of the right. packed: rows as lists of sample indices, several samples (documents)
    in one row; default one sample per row. Position and time count from 0 in every document.
    """
    rows = [[i] for i in range(len(samples))] if packed is None else [list(r) for r in packed]
    names = list(dict.fromkeys(segment.tower for sample in samples for segment in sample))
    columns: dict[str, list[list[list[float]]]] = {name: [[[] for _ in range(6)] for _ in rows] for name in names}
    for r, row in enumerate(rows):
        for document, index in enumerate(row):
            time = 0
            position = dict.fromkeys(names, 0)
            for segment in samples[index]:
                begin, end = _ends(ends, segment.tower)
                ids = [begin, *segment.content, end]
                n, p = len(ids), position[segment.tower]
                parts: tuple[Iterable[float], ...] = (
                    ids,
                    range(p, p + n),
                    range(time, time + n),
                    [document] * n,
                    [*ids[1:], 0],
                    [segment.weight] * (n - 1) + [0.0],
                )
                for column, part in zip(columns[segment.tower][r], parts, strict=True):
                    column.extend(part)
                position[segment.tower] += n
                time += n
    strands, targets, weights = {}, {}, {}
    for name, per_row in columns.items():
        length = max(len(row[0]) for row in per_row)
        fill = (0, 0, 0, PADDING, 0, 0.0)

        def lay(k: int, dtype: torch.dtype, per_row: Any = per_row, length: int = length, fill: Any = fill) -> Tensor:
            pad = [[fill[k]] * (length - len(row[k])) for row in per_row]
            return torch.tensor([p + row[k] if left else row[k] + p for row, p in zip(per_row, pad, strict=True)], dtype=dtype)

        strands[name] = Strand(*(lay(k, torch.long) for k in range(4)))
        targets[name] = lay(4, torch.long)
        weights[name] = lay(5, torch.float32)
    return Batch(strands, targets, weights)


def _ends(ends: Mapping[str, Ends], tower: str) -> Ends:
    if tower not in ends:
        raise ZipperError(f"A segment names the tower {tower!r}; this model has {sorted(ends)}.")
    return ends[tower]
