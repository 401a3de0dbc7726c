"""Proof: is a model run part way exactly as it runs itself?

Its logits, run block by block, are compared with those of its own forward: bit for bit where the
matrices have the same shapes, up to rounding where they have not. What cannot be run so is refused,
never guessed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zipper.errors import ZipperError
from zipper.strand import Strand
from zipper.towers.driver import (
    FAILURES,
    Attributes,
    Recorded,
    UnsupportedTower,
    block_lists,
    refusal,
)

WINDOWS = ("sliding_window", "attention_chunk_size")
OTHER_WINDOWS = ("window_size", "sliding_window_size", "attention_window_size")  # inside the blocks
# Tokens; check() reads past windows of up to this, so that it stays cheap for real models.
LONGEST_CHECKED_WINDOW = 256
CASES = {
    "unpadded rows": 0,
    "left-padded rows": 3,
}  # what is compared bit by bit, tokens of padding

# What a tower can read, each with what stands before it: one document from the first slot on (there
# may be padding on its right), padding on the left, several documents in a row or padding inside
# one.
Rows = Literal["unpadded", "padded", "packed"]
ROWS: tuple[Rows, ...] = ("unpadded", "padded", "packed")


@final
class Proof:
    """The proof of one tower. It sets nothing but how the tower is run (`find`), and that only
    where it holds."""

    def __init__(self, tower: Any) -> None:
        """tower: a `zipper.tower.Tower`, also one that does not know yet how it is run."""
        self.tower = tower

    def find(self, seed: int = 0) -> None:
        """Sets `way` and `rows` to the first way that repeats the model's own logits on a few ids,
        and to what it can read that way."""
        tower, ids = self.tower, self.sample(seed)
        reason = self.refusal(f"it has no list of {tower.layers} blocks")
        for path in block_lists(tower.model, tower.layers):
            for way in (Attributes, Recorded):
                tower.rows = "packed"
                try:
                    with self.refusing("its own forward fails"):
                        tower.way = way(tower.model, path)
                    for case, padding in CASES.items():
                        self._compare(case, self._padded(ids, padding), (ids.shape[1],))
                    tower.rows = self._readable(ids)
                    if isinstance(tower.way, Recorded):  # the unusual ones pay for a closer look
                        self.prove(ids)
                    return
                except UnsupportedTower as error:
                    reason = error
        raise reason

    def sample(self, seed: int) -> Int[Tensor, "batch length"]:
        """Two rows of random ids, longer than the window if that is no longer than
        LONGEST_CHECKED_WINDOW."""
        windows = [self._size(name) for name in (*WINDOWS, *OTHER_WINDOWS)]
        window = max((size for size in windows if size <= LONGEST_CHECKED_WINDOW), default=0)
        length = min(window + 13, self._size("max_position_embeddings") or window + 13)
        return torch.randint(
            self.tower.vocabulary, (2, length), generator=torch.Generator().manual_seed(seed)
        ).to(self.tower.device)

    def prove(self, ids: Int[Tensor, "batch length"]) -> None:
        """What `check` says, on these ids."""
        for case, padding in CASES.items():
            strand, length = self._padded(ids, padding), ids.shape[1]
            (whole,) = self._compare(case, strand, (length,))
            steps = torch.cat(
                self._compare(
                    f"{case} in steps", strand, (length - 3, 1, 2), self.tower.new_past()
                ),
                1,
            )
            valid = strand.document >= 0
            if not self._close(steps[:, :-3][valid[:, :-3]], whole[:, :-3][valid[:, :-3]]):
                raise self.refusal(f"on {case} a token sees what comes after it")
            if not self._close(steps[:, -3:].flatten(0, 1), whole[:, -3:].flatten(0, 1)):
                raise self.refusal(
                    f"on {case} in steps a token does not see all that came before it"
                )
        for rows in ROWS:
            if not self._reads(rows, ids):
                raise self.refusal(f"the documents in {rows} rows are not read as alone")
            if rows == self.tower.rows:
                break

    @contextmanager
    def refusing(self, what: str) -> Iterator[None]:
        """Turns what goes wrong in transformers' code into UnsupportedTower."""
        try:
            yield
        except ZipperError:
            raise
        except FAILURES as error:
            raise self.refusal(
                f"{what}: {type(error).__name__}: {str(error).strip().rstrip('.')}"
            ) from error

    def refusal(self, reason: str) -> UnsupportedTower:
        """The error that says why this model cannot be a tower."""
        return refusal(f"{type(self.tower.model).__name__} cannot be a tower: {reason}.")

    def _size(self, name: str) -> int:
        """A number of the configuration, 0 where there is none."""
        size = getattr(self.tower.config, name, None)
        return size if isinstance(size, int) and size > 0 else 0

    def _padded(self, ids: Int[Tensor, "batch length"], padding: int) -> Strand:
        """Rows, the last one with so much padding on the left; positions as the model itself would
        count them there."""
        document = torch.zeros_like(ids)
        document[-1, :padding] = -1
        if self.tower.rows != "unpadded" and "position_ids" in self.tower.way.takes:
            return Strand.alone(ids, document)
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return Strand(ids, slots, slots, document)

    def _own(self, ids: Tensor, valid: Tensor, position: Tensor, cache: Any) -> Tensor:
        """The model's own logits; without padding they are asked for as simply as possible."""
        given = {self.tower.way.cache_argument: cache, "use_cache": cache is not None}
        if not valid.all():
            given |= {
                "attention_mask": valid.long(),
                "position_ids": position + self.tower.way.offset,
            }
        model: Any = self.tower.model
        logits: Tensor = model(
            ids, **{name: value for name, value in given.items() if name in self.tower.way.takes}
        ).logits
        return logits

    def _compare(
        self, case: str, strand: Strand, steps: tuple[int, ...], past: Any = None
    ) -> list[Tensor]:
        """Logits of a strand read in steps of so many tokens. Raises UnsupportedTower where the
        model's own are others."""
        from transformers import DynamicCache

        cache = None if past is None else DynamicCache()
        found, stop = [], 0
        for length in steps:
            start, stop = stop, stop + length
            part = Strand(*(getattr(strand, field.name)[:, start:stop] for field in fields(Strand)))
            valid = strand.document[:, :stop] >= 0
            with self.refusing(f"on {case} its own forward fails"):
                own = self._own(part.ids, valid, part.position, cache)
            with self.refusing(f"on {case} its blocks fail"):
                found.append(self.tower(part, past))
            here = valid[:, start:]
            if found[-1].shape != own.shape or not torch.equal(found[-1][here], own[here]):
                gap = (
                    f"{(found[-1] - own)[here].abs().max():.3g}"
                    if found[-1].shape == own.shape
                    else "their shape"
                )
                raise self.refusal(
                    f"on {case} its own logits differ by {gap} from those of its parts run one by "
                    "one"
                )
            if past is not None and _lengths(past.cache) != _lengths(cache):
                raise self.refusal(
                    f"on {case} its blocks write other keys and values to the cache than in its "
                    "own forward"
                )
        return found

    def _readable(self, ids: Int[Tensor, "batch length"]) -> Rows:
        """The most that it can read of ROWS."""
        # In half precision the error of a model that counts positions or windows by itself may be
        # as small as rounding.
        sure = self.tower.model.dtype == torch.float32 or (
            self.tower.way.told and not any(map(self._size, OTHER_WINDOWS))
        )
        for rows in reversed(ROWS if sure else ROWS[:1]):
            if self._reads(rows, ids):
                return rows
        raise self.refusal("a row with padding on its right is not read as without")

    def _reads(self, rows: Rows, ids: Int[Tensor, "batch length"]) -> bool:
        """Whether the documents in such rows have the logits that the model gives them alone, up to
        rounding."""
        padding, document = [-1] * 3, [1] * (ids.shape[1] - 3)
        layouts: dict[Rows, list[list[int]]] = {
            "unpadded": [document + padding],
            "padded": [padding + document],
            "packed": [[0] * 3 + document, document[:2] + padding + document[2:]],
        }
        layout = torch.tensor(layouts[rows], device=ids.device)
        strand = Strand.alone(ids[: len(layout)], layout)
        try:
            logits = self.tower(strand)
        except FAILURES:
            return False
        alone = strand.ids[layout == 1].view(len(layout), -1)
        own = self._own(alone, torch.ones_like(alone, dtype=torch.bool), alone, None)
        return bool(logits.isfinite().all()) and self._close(logits[layout == 1], own.flatten(0, 1))

    def _close(
        self, found: Float[Tensor, "tokens vocabulary"], truth: Float[Tensor, "tokens vocabulary"]
    ) -> bool:
        """Whether logits are the same up to rounding: relative to their spread, which the softmax
        sees, 1e-3 for every token.

        In half precision 0.1 for most: rounding adds up over the blocks, and a token may go to
        another expert.
        """
        truth = truth.float()
        error = (found.float() - truth).norm(dim=-1) / (truth - truth.mean(-1, keepdim=True)).norm(
            dim=-1
        )
        if self.tower.model.dtype == torch.float32:
            return bool((error <= 1e-3).all())
        return bool(error.median() <= 0.1)


def _lengths(cache: Any) -> list[int]:
    """Slots that each layer of a cache holds."""
    return [layer.get_seq_length() for layer in cache.layers]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module has its own mode back (a half-frozen tower has
    both)."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
