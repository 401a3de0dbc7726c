"""Which rows a step reads, as which tasks: a function of the recipe, the seed and the step
alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import Dataset

from zipper.data.rows import Row, Rows, draws, mixed_seed
from zipper.errors import ZipperError
from zipper.loss import CHOICE
from zipper.strand import Batch, Ends, Target, collate, decisions
from zipper.tasks import Task
from zipper.training.config import TrainConfig
from zipper.training.packing import lengths, pack


@dataclass(frozen=True)
class Part:
    """The rows of one source, how many ids each has over all fields, and the weight of the source
    in the mixture."""

    source: str
    rows: Sequence[Row]
    weight: float
    numbers: Sequence[int] | None = None  # of these rows in the source, where some were left out
    lengths: Int64[np.ndarray, " rows"] = field(init=False)

    def __post_init__(self) -> None:
        found = (
            self.rows.lengths
            if isinstance(self.rows, Rows)
            else np.array([sum(map(len, row.values())) for row in self.rows])
        )
        object.__setattr__(self, "lengths", found)

    def within(self, least: int, most: int | None) -> "Part":
        """Without the rows that have fewer or more ids."""
        kept = np.flatnonzero(
            (self.lengths >= least) & (self.lengths <= (most or self.lengths.max(initial=0)))
        )
        if len(kept) == len(self.lengths):
            return self
        if not len(kept):
            raise ZipperError(
                f"No row of {self.source} has {least} ids at least"
                + (f" and {most} at most" if most else "")
                + f"; they have {self.lengths.min()} to {self.lengths.max()}."
            )
        rows = (
            self.rows.select(kept)
            if isinstance(self.rows, Rows)
            else [self.rows[i] for i in kept.tolist()]
        )
        return Part(self.source, rows, self.weight, kept.tolist())


FIRST = 1000  # rows of each source that are looked at before the first step
# batches whose rows are sorted by length together, so that rows of a batch are of like length
POOL = 16


def order(parts: Sequence[Part], batch: int, step: int, seed: int) -> list[Row]:
    """The rows of one step, a function of (seed, step): epochs are permutations; pools of batches
    are sorted by length and cut."""
    pool, within = divmod(step, POOL)
    which = range(pool * POOL * batch, (pool + 1) * POOL * batch)
    picked = draws(which, seed, [len(part.rows) for part in parts], [part.weight for part in parts])
    picked.sort(key=lambda at: parts[at[0]].lengths[at[1]])
    cut = np.random.default_rng(mixed_seed(seed, pool, 1)).permutation(POOL)[within]
    return [parts[part].rows[row] for part, row in picked[cut * batch : (cut + 1) * batch]]


#: Micro-batches of a step, and the global number of target tokens per tower.
Drawn = tuple[list[list[Batch]], dict[str, float]]


@dataclass(frozen=True)
class Steps(Dataset[Drawn]):
    """What one of several processes reads in each step, on the CPU: `steps[n]` is a function of the
    recipe, the seed and n alone, so any number of workers may make them ahead of time.

    ends: of each tower. process: which of `processes` it is.
    """

    parts: Sequence[Part]
    tasks: Mapping[str, Task]
    config: TrainConfig
    ends: Mapping[str, Ends]
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Drawn:
        """A micro-batch is one batch per task, so that what a task cannot see costs nothing, or one
        for all of them (`together`).

        A sharded model wants the same tasks of every process: one without a sample of its own runs
        another's for nothing.
        """
        config, tasks = self.config, self.tasks
        random = np.random.default_rng(mixed_seed(config.seed, step, 3))
        names = list(tasks)
        shares = np.array([config.tasks[name] for name in names])
        chosen = random.choice(len(names), size=config.batch, p=shares / shares.sum())
        other = np.random.default_rng(mixed_seed(config.seed, step, 4))
        mine: list[dict[str, list[Any]]] = [{} for _ in range(config.accumulate)]
        first: list[dict[str, Any]] = [{} for _ in range(config.accumulate)]
        company: dict[str, tuple[str, ...]] = {}
        counts: dict[str, float] = {}
        for k, row in enumerate(order(self.parts, config.batch, step, config.seed)):
            name = names[chosen[k]]
            if self._mixed and not tasks[name].fits(row):
                name = self._instead(name, row, other)
            task = tasks[name]
            key = ",".join(task.company) if config.together else name
            company[key] = task.company
            segments = task.segments(row)
            for segment in segments:
                if isinstance(segment, Target):
                    tokens = segment.weight * (len(segment.content) + 1)
                    counts[segment.tower] = counts.get(segment.tower, 0.0) + tokens
            if choices := len(decisions(segments)):
                counts[CHOICE] = counts.get(CHOICE, 0.0) + choices
            place, process = divmod(k, self.processes)
            here = len(range(process, config.batch, self.processes))
            turn = place * config.accumulate // here
            first[turn].setdefault(key, segments)
            if process == self.process:
                mine[turn].setdefault(key, []).append(segments)
        turns: list[list[Batch]] = [[] for _ in mine]
        for turn, samples in enumerate(mine):
            for key, sample in first[turn].items():
                if key in samples or config.shard:
                    batch = self._collated(samples.get(key, [sample]), company[key])
                    turns[turn].append(batch if key in samples else silent(batch))
        return turns, counts

    @cached_property
    def _mixed(self) -> bool:
        """Whether some source is not for all tasks."""
        firsts = [part.rows[0] for part in self.parts if len(part.rows)]
        return not all(task.fits(row) for task, row in product(self.tasks.values(), firsts))

    def _instead(self, name: str, row: Row, random: np.random.Generator) -> str:
        """Another task, of those that the row is for, by their shares; this one if there is
        none."""
        fit = [n for n, task in self.tasks.items() if self.config.tasks[n] and task.fits(row)]
        shares = np.array([self.config.tasks[n] for n in fit])
        return fit[random.choice(len(fit), p=shares / shares.sum())] if fit else name

    def _collated(self, samples: Sequence[Any], company: Sequence[str]) -> Batch:
        room = self.config.pack
        packed = pack([lengths(sample) for sample in samples], room) if room else None
        return collate(samples, self.ends, packed=packed, company=company)


def silent(batch: Batch) -> Batch:
    """The same batch, to be run and not to count."""
    return dataclasses.replace(
        batch,
        weights={name: -weight for name, weight in batch.weights.items()},
        choices={n: torch.where(c < 0, c, -2 - c) for n, c in batch.choices.items()},
    )


def tokens_read(batch: Batch) -> int:
    """Tokens that a batch reads, if it counts."""
    counts = any((weight > 0).any() for weight in batch.weights.values())
    return (
        sum(int((strand.document >= 0).sum()) for strand in batch.strands.values()) if counts else 0
    )


def corrupted(batch: Batch, config: TrainConfig, model: Any) -> Batch:
    """Some ids that carry a loss are read as random ones (never a begin token); targets stay."""
    strands = dict(batch.strands)
    for name, chance in config.corrupt.items():
        if name in strands and chance:
            ids = strands[name].ids
            hit = (
                (torch.rand(ids.shape, device=ids.device) < chance)
                & (batch.weights[name] > 0)
                & (ids != model.ends()[name].begin)
            )
            noise = torch.randint(
                model.config.towers[name].vocabulary, ids.shape, device=ids.device
            )
            strands[name] = dataclasses.replace(strands[name], ids=torch.where(hit, noise, ids))
    return dataclasses.replace(batch, strands=strands)
