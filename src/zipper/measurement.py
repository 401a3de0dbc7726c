"""Measurement: how well a model does a task on rows of data, whatever their modalities are.

Beside every number stand two others, by the same metric on the same rows: the oracle's, what the
wanted ids themselves become when they are decoded, and the floor's, the answer to another row.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from itertools import chain, permutations
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zipper import pages
from zipper.data import manifests
from zipper.data.manifests import Sample
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.generation import Request
from zipper.junctions import known
from zipper.loss import scores
from zipper.modality import Kind, Scores, is_ids, whole
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving.files import place
from zipper.statistics import bootstrap
from zipper.strand import Segment, collate
from zipper.tasks import Task, content, lanes, tower_of

SYSTEMS = ("model", "oracle", "floor")
SHOWN = 12  # samples on a page
BATCH = 16  # rows whose loss is computed at once
MOST_LABELS = 30  # of a confusion table that people can still read
ANOTHER = "(something else)"  # an answer that is none of the right ones

#: Compares what is wanted with what was made by means of its own; rows are the raw ones.
Judge = Callable[[Sequence[Any], Sequence[Any], Sequence[Mapping[str, Any]]], Scores]

#: How often what was right (first) was taken for what (second).
Table = Mapping[str, Mapping[str, int]]


@runtime_checkable
class Labelling(Protocol):
    """A judge that also says what it takes answers for: digits, activities, categories."""

    def labels(
        self, made: Sequence[Any], rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[tuple[str, str]]:
        """What is right and what was found, of every answer or of every part of it."""


@dataclass(frozen=True)
class Number:
    """A metric of one system: the value over all rows, its 95 % interval by bootstrap over
    them."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Shown:
    """A row as people look at it: what was given, and each system's answer, as markup that loads
    nothing."""

    id: str
    given: Mapping[str, str]
    made: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What was measured of one produced segment of a task.

    metrics: name -> system -> number; a system of whose answers none has one is left out.
    nats: -log p of the wanted ids and their end, a token, given all before. ended: the share of
    segments that ended by themselves. confusion: of a choice, how often which tower ("" = it was
    over) was right, and which was chosen; its nats are those of a choice, its floor is the
    commonest. tables: the model's answers where there are few right ones
    ("answers"), and what judges that label took them for, by their names.
    """

    task: str
    tower: str
    rows: int
    metrics: Mapping[str, Mapping[str, Number]]
    nats: float
    ended: float
    samples: Sequence[Shown] = field(default=(), repr=False)
    confusion: Table = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For a results file; pictures and sounds stay out."""
        told = {
            name: {system: vars(number) for system, number in systems.items()}
            for name, systems in self.metrics.items()
        }
        kept = ("task", "tower", "rows", "nats", "ended")
        found = {name: getattr(self, name) for name in kept} | {"metrics": told}
        more = {"confusion": self.confusion, "tables": self.tables}
        return found | {name: table for name, table in more.items() if table}


def measure(
    pipeline: Pipeline,
    data: str | Path | Sequence[Sample],
    tasks: Sequence[Task | str] = (),
    limit: int | None = None,
    sampling: Sampling | None = None,
    judges: Mapping[str, Mapping[str, Judge]] | None = None,
    seed: int = 0,
) -> list[Measured]:
    """How well a model does tasks on the rows of a manifest (see zipper.data.manifests).

    tasks: by default every ordered pair of towers that all rows have fields for. limit: only the
    first so many rows. judges: {tower: {name: judge}}, beside the metrics of its modality. seed: of
    what another row is, and of the intervals. Raises a ZipperError for rows that are bad or lack a
    field, and for fewer than two.
    """
    samples = _samples(data, limit)
    modalities = pipeline.modalities
    known("judges", judges or (), modalities)
    rows = [manifests.encode(s.row, modalities, s.folder, s.where) for s in samples]
    samples = [s._replace(row=manifests.settle(s.row, modalities)) for s in samples]
    if len(rows) < 2:
        raise ZipperError(f"{len(rows)} rows were given; a floor wants two at least. Give more.")
    wanted = [Task.parse(t) if isinstance(t, str) else t for t in tasks] or _pairs(modalities, rows)
    found: list[Measured] = []
    for task in wanted:
        if task.chosen:
            found.append(_choices(pipeline.model, task, rows, seed))
        else:
            found += _measured(pipeline, task, samples, rows, sampling, judges or {}, seed)
    return found


def judge(name: str) -> Judge:
    """A judge by its name, from the entry point group `zipper.judges` of an installed package.
    Raises a ZipperError that names those that there are, and MissingExtra at once for a judge that
    `needs` modules which are not installed."""
    known = {entry.name: entry for entry in entry_points(group="zipper.judges")}
    if name not in known:
        raise ZipperError(
            f"There is no judge {name!r}; there are {sorted(known)}. Packages bring others by the "
            "entry point group zipper.judges."
        )
    found: Judge = known[name].load()
    check_needs(found)
    return found


def check_needs(judge: Any) -> None:
    """Raises MissingExtra where a module that a judge names in `needs` is not installed."""
    for module in getattr(judge, "needs", ()):
        extra(module)


def _samples(data: str | Path | Sequence[Sample], limit: int | None) -> list[Sample]:
    if not isinstance(data, str | Path):
        return list(data)[:limit]
    return manifests.good(place(data), limit)


def _pairs(modalities: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Tasks of one tower to another that all rows have."""
    there = [name for name in modalities if all(name in row for row in rows)]
    found = [Task((one,), (other,)) for one, other in permutations(there, 2)]
    if not found:
        raise ZipperError(
            f"The rows have no two of the fields {sorted(modalities)} in common, so no task is "
            "plain. Give rows of pairs, or say which task."
        )
    return found


def _choices(
    model: Any, task: Task, rows: Sequence[Mapping[str, Sequence[int]]], seed: int
) -> Measured:
    """How well a model chooses what comes next, all before it as it was. What is then written is
    measured by tasks that name it."""
    model.eval()
    names, logits, right = [*sorted(model.ends()), ""], list[Tensor](), list[Tensor]()
    open_to = {"", *task.chosen}
    shut = torch.tensor([name not in open_to for name in names])
    for start in range(0, len(rows), BATCH):
        parts = [task.segments(row) for row in rows[start : start + BATCH]]
        batch = collate(parts, model.ends(), company=task.company)
        batch = batch.to(next(model.parameters()).device)
        with torch.inference_mode():
            hidden = model.hidden(batch.strands, tuple(batch.choices), task.company)
            for name, came in batch.choices.items():
                where = came.to(hidden[name].device) >= 0
                said = model.choice(name, hidden[name][where]).cpu()
                logits.append(said.masked_fill(shut, -torch.inf))
                right.append(came.cpu()[came.cpu() >= 0])
    true, scores = torch.cat(right), torch.cat(logits)
    made, commonest = scores.argmax(-1), true.mode().values
    chosen = zip(true.tolist(), made.tolist(), strict=True)
    confusion = _table((names[one], names[other]) for one, other in chosen)
    hits = {"model": made == true, "oracle": true == true, "floor": true == commonest}
    numbers = {
        system: _number([(int(hit), 1) for hit in found.tolist()], seed)
        for system, found in hits.items()
    }
    nats = float(torch.nn.functional.cross_entropy(scores, true))
    what = " or ".join(lane.tower for lane in task.segments_produced if lane.among)
    metrics = {"right choice": numbers}
    return Measured(str(task), what, len(rows), metrics, nats, 1.0, confusion=confusion)


def _measured(
    pipeline: Pipeline,
    task: Task,
    samples: Sequence[Sample],
    rows: Sequence[Mapping[str, Sequence[int]]],
    sampling: Sampling | None,
    judges: Mapping[str, Mapping[str, Judge]],
    seed: int,
) -> list[Measured]:
    """One task: a measurement for each segment that it produces."""
    nats = _nats(pipeline.model, task, rows)
    answers = _answers(pipeline, task, rows, sampling or Sampling())
    raw = [sample.row for sample in samples]
    found = []
    for number, (item, *_) in enumerate(task.segments_produced):
        kind = whole(pipeline.modalities[tower_of(item)])
        true = [_raw(kind, item, s, row) for s, row in zip(samples, rows, strict=True)]
        made = {
            "model": [kind.decode(answer[number].content) for answer in answers],
            "oracle": [kind.decode(content(row, item)) for row in rows],
            "floor": _others(kind, true, seed),
        }
        names = judges.get(tower_of(item), {})
        metrics: dict[str, dict[str, Number]] = {}
        for system in SYSTEMS:
            scores = dict(kind.scores(true, made[system]))
            for name, judge in names.items():
                said = judge(true, made[system], raw)
                scores |= {f"{name}: {metric}": pairs for metric, pairs in said.items()}
            for metric, pairs in scores.items():
                if any(below for _, below in pairs):
                    metrics.setdefault(metric, {})[system] = _number(pairs, seed)
        shown = [
            Shown(
                str(samples[n].row.get("id", n)),
                _given(pipeline, task, samples[n], rows[n]),
                {"wanted": kind.html(true[n])}
                | {system: kind.html(made[system][n]) for system in SYSTEMS},
            )
            for n in range(min(SHOWN, len(rows)))
        ]
        ended = float(np.mean([answer[number].ended for answer in answers]))
        tables = _tables(kind, true, made["model"], names, raw)
        found.append(
            Measured(str(task), item, len(rows), metrics, nats[number], ended, shown, tables=tables)
        )
    return found


def _tables(
    kind: Kind,
    true: Sequence[Any],
    made: Sequence[Any],
    judges: Mapping[str, Judge],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Table]:
    """What was taken for what, where that is a table that people can read."""
    found = {}
    right, said = ([kind.told(one) for one in some] for some in (true, made))
    if all(isinstance(one, str) for one in right):
        known = {*right}
        pairs = zip(right, said, strict=True)
        found["answers"] = _table((one, o if o in known else ANOTHER) for one, o in pairs)
    for name, judge in judges.items():
        by: Any = judge
        if isinstance(by, Labelling):
            found[name] = _table(by.labels(made, rows))
    # Of labels that come once or twice a table says nothing.
    return {
        name: table
        for name, table in found.items()
        if 2 <= len(table) <= min(MOST_LABELS, len(rows) // 2)
    }


def _table(pairs: Iterable[tuple[str, str]]) -> Table:
    found: dict[str, dict[str, int]] = {}
    for (right, taken), count in sorted(Counter(pairs).items()):
        found.setdefault(right, {})[taken] = count
    return found


def _answers(
    pipeline: Pipeline,
    task: Task,
    rows: Sequence[Mapping[str, Sequence[int]]],
    sampling: Sampling,
) -> list[list[Any]]:
    """What the model produces for each row; where what is wanted begins with a named prefix (a
    voice), that is asked for."""
    requests = []
    for n, row in enumerate(rows):
        plan: list[str | Segment] = []
        for lane in task.segments_produced:
            named = {*whole(pipeline.modalities[lane.tower]).prefixes.values()}
            first = [i for i in content(row, lane.item)[:1] if i in named]
            plan.append(lane.segment(first))
        own = replace(sampling, seed=sampling.seed + n)
        requests.append(Request(task.prompt(row), plan, own))
    answers = pipeline.engine(BATCH).run(requests)
    return [answer.segments() for answer in answers]


def _nats(model: Any, task: Task, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[float]:
    """-log p of the ids of each produced segment and its end, a token, all before it given."""
    samples, many = [*map(task.segments, rows)], len(task.segments_produced)
    said = np.array([each[-many:] for each in scores(model, samples, BATCH)])
    read = np.array([[len(s.content) + 1 for s in sample[-many:]] for sample in samples])
    found: list[float] = (-said.sum(0) / read.sum(0)).tolist()
    return found


def _raw(kind: Kind, item: str, sample: Sample, row: Mapping[str, Sequence[int]]) -> Any:
    """What is wanted, as the manifest has it; of ids, what they decode to."""
    own = item.rpartition("~")[2]
    key = own if own in sample.row else tower_of(item)
    value = sample.row.get(key)
    if value is None or is_ids(value) or not kind.accepts(value):
        return kind.decode(content(row, item))
    return kind.read(value, sample.folder)


def _others(kind: Kind, wanted: Sequence[Any], seed: int) -> list[Any]:
    """For each row what is wanted of another one, and of one that wants something else where there
    is any."""
    chance = random.Random(seed)
    told = [kind.told(raw) for raw in wanted]
    found = []
    for n in range(len(wanted)):
        drawn = [chance.randrange(len(wanted)) for _ in range(64)]
        another = [k for k in drawn if k != n] or [(n + 1) % len(wanted)]
        found.append(wanted[next((k for k in another if told[k] != told[n]), another[0])])
    return found


def _number(pairs: Sequence[tuple[float | int, float | int]], seed: int) -> Number:
    above, below = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    low, high = bootstrap(_ratio, above, below, seed=seed)
    return Number(float(_ratio(above, below)), low, high)


def _ratio(
    above: Float[np.ndarray, "*resamples rows"], below: Float[np.ndarray, "*resamples rows"]
) -> Float[np.ndarray, "*resamples"]:
    """Like `statistics.share`, of what is no count."""
    whole = below.sum(axis=-1)
    return np.asarray(above.sum(axis=-1) / np.where(whole > 0, whole, 1))


def _given(
    pipeline: Pipeline, task: Task, sample: Sample, row: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    found = {}
    for item in [lane.item for lane in lanes(task.given)]:
        kind = whole(pipeline.modalities[tower_of(item)])
        found[item] = kind.html(_raw(kind, item, sample, row))
    return found


def text(found: Sequence[Measured]) -> str:
    """As a table for a screen."""
    lines = []
    for one in found:
        head = f"{one.task}: {one.rows} rows, {one.nats:.3f} nats a token, {one.ended:.1%} ended"
        lines += [head, f"  {'':26}" + "".join(f"{system:>30}" for system in SYSTEMS)]
        for name, systems in one.metrics.items():
            cells = [_cell(systems.get(system)) for system in SYSTEMS]
            lines.append(f"  {name:26}" + "".join(f"{cell:>30}" for cell in cells))
        for wanted, chosen in one.confusion.items():
            said = ", ".join(f"{name or 'over'} {count}" for name, count in chosen.items())
            lines.append(f"  {wanted or 'over'} was right, chosen were: {said}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(number: Number | None) -> str:
    if number is None:
        return "none has one"
    return f"{number.value:.4g} ({number.low:.4g} to {number.high:.4g})"


def write(path: Path, found: Sequence[Measured], title: str, about: str = "") -> None:
    """As a page with pictures, traces and players; it loads nothing from elsewhere."""
    here = Path(__file__).parent / "pages" / "measurement.html"
    cells = [
        {
            "one": one,
            "rows": [
                (name, [_cell(systems.get(system)) for system in SYSTEMS])
                for name, systems in one.metrics.items()
            ],
            "tables": [
                (name, sorted({*chain.from_iterable(table.values())}), table)
                for name, table in [("choice", one.confusion), *one.tables.items()]
                if table
            ],
        }
        for one in found
    ]
    pages.write(path, here, title=title, about=about, measured=cells, systems=SYSTEMS)
