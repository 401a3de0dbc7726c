"""Which samples share a row, so that little of a batch is padding. It counts tokens; what they are,
and that documents of a row do not see one another, is the business of `strand` and of the
masks.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Int

from zipper.errors import ZipperError
from zipper.strand import Segment


def lengths(sample: Sequence[Segment]) -> dict[str, int]:
    """Tokens that each tower reads of a sample, begin and end of segments included."""
    found: dict[str, int] = {}
    for segment in sample:
        found[segment.tower] = found.get(segment.tower, 0) + len(segment.content) + 2
    return found


def pack(samples: Sequence[Mapping[str, int]], room: Mapping[str, int]) -> list[list[int]]:
    """Rows of sample indices for `collate(..., packed=...)`: as few as there is room for, and of
    like length in every tower.

    samples: for each, {tower: tokens}. room: {tower: most tokens in a row}; towers that it does not
    name may be of any length. Longest first, each sample into the row that stays shortest (Graham
    1969), then exchanges while they shorten the fullest row; a row more where that leaves no room.
    A batch is as long as its longest row, so level rows are worth more than full ones. The same
    input gives the same rows. Raises ZipperError for a sample that is longer than the room.
    """
    for number, sample in enumerate(samples):
        for tower, most in room.items():
            if sample.get(tower, 0) > most:
                raise ZipperError(
                    f"Sample {number} has {sample[tower]} tokens of {tower!r}, a row has room for "
                    f"{most}. Give more room, or leave out samples so long."
                )
    if not samples:
        return []
    towers = sorted(set(chain.from_iterable(samples)))
    tokens = np.array([[sample.get(tower, 0) for tower in towers] for sample in samples], np.int64)
    limit = np.array([room.get(tower, np.iinfo(np.int64).max) for tower in towers])
    count = int((-(-tokens.sum(0) // limit)).max(initial=1))
    while True:
        place = _level(tokens, min(count, len(samples)))
        rows = [np.flatnonzero(place == row).tolist() for row in range(min(count, len(samples)))]
        if all((tokens[row].sum(0) <= limit).all() for row in rows):
            return rows
        count += 1


def _level(tokens: Int[np.ndarray, "samples towers"], rows: int) -> Int[np.ndarray, " samples"]:
    """The row of each sample, so that the fullest row is as short as a greedy start and then
    exchanges make it."""
    n = len(tokens)
    # In shares of the whole batch: so towers are level alike, whatever their rates. One sample of
    # nothing per row, for a sample that moves is one that changes places with nothing.
    share = np.zeros((n + rows, tokens.shape[1]))
    share[:n] = tokens / np.maximum(1, tokens.sum(0))
    place = np.r_[np.zeros(n, np.int64), np.arange(rows)]
    filled = np.zeros((rows, tokens.shape[1]))
    for i in np.argsort(-share[:n].max(1), kind="stable"):
        after = filled + share[i]
        place[i] = np.lexsort((after.sum(1), after.max(1)))[0]
        filled[place[i]] = after[place[i]]
    while True:
        worst = filled.max(1).argmax()
        mine, others = np.flatnonzero(place == worst), np.flatnonzero(place != worst)
        change = share[mine][:, None] - share[others]
        after = np.maximum(
            (filled[worst] - change).max(-1), (filled[place[others]] + change).max(-1)
        )
        if after.min(initial=np.inf) > filled[worst].max() - 1e-9:
            return place[:n]
        x, y = np.unravel_index(after.argmin(), after.shape)
        filled[worst] -= change[x, y]
        filled[place[others[y]]] += change[x, y]
        place[mine[x]], place[others[y]] = place[others[y]], worst
