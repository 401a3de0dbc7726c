"""What a produced segment was read from: pictures of the cross-attention, and the times of words
that follow from them. Knows nothing of the web.
"""

import base64
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zipper.generation import Request, Written
from zipper.inspection import attention
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.strand import Segment, collate
from zipper.words import Word, align, places, words

MOST_CELLS = 1 << 22  # of one picture: 16 MB a head; of more none is made


class Clock(NamedTuple):
    """When the ids of a segment are heard: the first at start_s, each after step_s more."""

    start_s: float
    step_s: float

    def at(self, number: int) -> float:
        """When an id begins, in seconds, never before the sound does."""
        return max(0.0, self.start_s + number * self.step_s)


def clock(kind: Any, raw: Any, ids: int) -> Clock | None:
    """The clock of a segment that was given as `raw`; None where it has no time."""
    if isinstance(kind, SpeechUnits):
        return Clock(kind.start_s(raw), 1 / kind.config.units_per_s)
    seconds = kind.seconds(raw)
    return Clock(0.0, seconds / ids) if seconds and ids else None


@dataclass(frozen=True)
class Look:
    """How much each id of a produced segment looked at each of one before it: mean over heads and
    junctions.

    source, target: which segment, of all given and then all produced ones.
    """

    source: int
    target: int
    weights: Float[Tensor, "target source"]

    @property
    def packed(self) -> dict[str, Any]:
        """As JSON: rows of two bytes each (little-endian, of 65,535) in base64."""
        counted = (self.weights.clamp(0, 1) * 65_535).round().to(torch.int32)
        content = counted.numpy().astype("<u2").tobytes()
        return {
            "source": self.source,
            "target": self.target,
            "shape": list(self.weights.shape),
            "weights": base64.b64encode(content).decode(),
        }


def looks(model: Any, request: Request, written: Sequence[Written]) -> list[Look]:
    """A picture for every produced segment and every segment of another tower that a link let it
    see; none of a model without links, nor of more than MOST_CELLS."""
    if not isinstance(model, Zipper):
        return []
    produced = [
        Segment(one.tower, one.ids, beside=one.beside, stride=one.stride, delay=one.delay)
        for one in written
    ]
    segments = [*request.segments, *produced]
    linked = {(key.source, key.target) for key in model.config.links}
    group = [*accumulate(int(not one.beside) for one in segments)]
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for target in range(len(request.segments), len(segments)):
        for source in range(bisect_right(group, group[target])):
            pair = segments[source].tower, segments[target].tower
            sizes = len(segments[source].content), len(segments[target].content)
            if pair in linked and all(sizes):
                pairs.setdefault(pair, []).append((source, target))
    lengths = {tower: _length(segments, tower) for tower in {one.tower for one in segments}}
    found = []
    strands = collate([segments], model.ends()).strands if pairs else {}
    for (source_tower, target_tower), numbers in pairs.items():
        if lengths[source_tower] * lengths[target_tower] > MOST_CELLS:
            continue
        seen = attention(model, strands, source_tower, target_tower).float().cpu()
        for source, target in numbers:
            rows, columns = _place(segments, target), _place(segments, source)
            # the token before an id saw what it was said from; begin and end are no content
            part = seen[rows.start - 1 : rows.stop - 1, columns]
            found.append(Look(source, target, part))
    return sorted(found, key=lambda look: (look.target, look.source))


def timed(
    kind: Text, written: Written, found: Sequence[Look], target: int, clocks: Sequence[Clock | None]
) -> list[dict[str, Any]]:
    """The words of a produced text as JSON: word, confidence and, where one of these looks is at
    something with a clock, start and end in seconds. target: see `Look`."""
    heard = [
        look
        for look in found
        if look.target == target and look.source < len(clocks) and clocks[look.source]
    ]
    read = clocks[heard[0].source] if heard else None
    spans = align(heard[0].weights, places(kind, written.ids)) if heard else None
    said: list[Word] = words(kind, written, spans) if written.ids else []
    told: list[dict[str, Any]] = [
        {"word": word.text, "confidence": word.confidence} for word in said
    ]
    for one, word in zip(told, said, strict=True):
        if read is not None and word.start is not None and word.stop is not None:
            one |= {"start": round(read.at(word.start), 3), "end": round(read.at(word.stop), 3)}
    return told


def _length(segments: Sequence[Segment], tower: str) -> int:
    return sum(len(one.content) + 2 for one in segments if one.tower == tower)


def _place(segments: Sequence[Segment], number: int) -> slice:
    """Where the content of a segment stands in the strand of its tower."""
    begin = _length(segments[:number], segments[number].tower) + 1
    return slice(begin, begin + len(segments[number].content))
