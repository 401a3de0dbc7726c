"""Words of a transcript: how sure the model was of each, and when it was said.

Times come from the cross-attention: the path through it that both modalities walk forwards, as
Whisper's word times (arXiv:2212.04356) do. Nothing here knows how ids become sound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zipper.errors import ZipperError
from zipper.generation import Written
from zipper.inspection import attention
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.strand import Segment, collate

#: What a target that is a tenth of the sound away from where it is expected loses, by the square:
#: one spread of the looks. Chosen on 150 sentences that are no test (docs/log.md).
EVEN = 100.0


@dataclass(frozen=True)
class Word:
    """A word. confidence: the probability that the model gave to its tokens together, given what
    came before. start, stop: tokens of the source between which it was said, None where nobody
    asked.
    """

    text: str
    confidence: float
    start: int | None = None
    stop: int | None = None


def words(
    modality: Text, written: Written, source: Sequence[tuple[int, int]] | None = None
) -> list[Word]:
    """The words of a produced segment of text. A forced token counts as sure. source: what `spans`
    found for the same segment."""
    sure = [0.0] * written.forced + list(written.logprobs)
    groups: list[tuple[str, list[int]]] = []  # a word as it is written, and its tokens
    before = ""
    for index in range(len(written.ids)):
        so_far = modality.decode(written.ids[: index + 1])
        if index + 1 < len(written.ids):  # a character of several tokens stands where it is whole
            so_far = so_far.rstrip("\ufffd")
        piece, before, behind = so_far[len(before) :], so_far, before[-1:]
        if not groups or (groups[-1][0].strip() and (piece[:1].isspace() or behind.isspace())):
            groups.append(("", []))
        groups[-1] = (groups[-1][0] + piece, [*groups[-1][1], index])
    found = []
    for text, tokens in groups:
        confidence = math.exp(sum(sure[index] for index in tokens))
        start: int | None = None
        stop: int | None = None
        if source is not None:
            start, stop = source[tokens[0]][0], source[tokens[-1]][1]
        if text.strip():  # what is left at the end may be space alone
            found.append(Word(text.strip(), confidence, start, stop))
    return found


@torch.inference_mode()
def spans(model: Zipper, given: Segment, produced: Segment) -> list[tuple[int, int]]:
    """For every id of `produced` the ids start .. stop - 1 of `given` that it was read from, by the
    links of the zip.

    Raises a ZipperError where no link leads from one to the other, or one of them is empty.
    """
    if not given.content or not produced.content:
        raise ZipperError(
            "Words have times where there is sound and text; one of the two segments is empty."
        )
    pair = given.tower, produced.tower
    if pair not in {(key.source, key.target) for key in model.config.links}:
        raise ZipperError(
            f"No link leads from {given.tower!r} to {produced.tower!r} in this zip, so there are "
            "no times."
        )
    strands = collate([[given, produced]], model.ends()).strands
    looks = attention(model, strands, given.tower, produced.tower).float().cpu()
    # Row i is what the token before id i saw when it said it; begin and end of the source are no
    # sound.
    return align(looks[: len(produced.content), 1:-1])


def places(modality: Text, ids: Sequence[int]) -> list[float]:
    """Where in a text each id stands, 0 to 1, by letters: about where in the sound it is said."""
    ends = [len(modality.decode(list(ids[: n + 1]))) for n in range(len(ids))]
    middles = [(before + end) / 2 for before, end in zip([0, *ends], ends, strict=False)]
    return [middle / max(1, ends[-1]) for middle in middles]


def align(
    looks: Float[Tensor, "target source"], expected: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Dynamic time warping: the forward path on which the targets look most; per target the sources
    [start, stop) on it.

    A source that all targets look at (a pause, the end) says nothing, so that each is measured by
    its own mean and spread. expected: where each target is looked for (`places`), so that one that
    looks nowhere does not pull the others along.
    """
    gain = np.asarray(
        (looks - looks.mean(0)) / (looks.std(0, correction=0) + 1e-6), dtype=np.float64
    )
    targets, sources = gain.shape
    if expected is not None:
        middles = (np.arange(sources) + 0.5) / sources
        gain -= EVEN * np.square(np.asarray(expected)[:, None] - middles)
    best = np.full((targets + 1, sources + 1), -np.inf)
    best[0, 0] = 0.0
    for t in range(1, targets + 1):
        # A row at once: its best path enters it at some source, from above, and goes on along it.
        enters = np.maximum(best[t - 1, :-1], best[t - 1, 1:])
        along = np.cumsum(gain[t - 1])
        best[t, 1:] = along + np.maximum.accumulate(enters - along + gain[t - 1])
    found = [(sources, 0)] * targets
    t, s = targets, sources
    while t and s:
        start, stop = found[t - 1]
        found[t - 1] = (min(start, s - 1), max(stop, s))
        steps = ((1, 1), (0, 1), (1, 0))  # both go on, the source alone, the target alone
        i, j = max(steps, key=lambda step: best[t - step[0], s - step[1]])
        t, s = t - i, s - j
    return found
