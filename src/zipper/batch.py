"""Offline work: a task on every row of a manifest, as many rows at once as the engine runs, each
answer a line of a file.

A run that was stopped goes on where it was: a line is there whole or it is cut off and done again.
What a row gets depends on the row and its number alone, so parts of a manifest that are done on
several machines are, together, what one machine would have made. It knows nothing of servers.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zipper.data import manifests
from zipper.data.layouts import about
from zipper.data.manifests import Sample
from zipper.errors import ZipperError
from zipper.generation import Answer, Limits, Request
from zipper.modality import is_ids, whole
from zipper.modality.pinned import content_hash
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving.files import as_json, held_file, read_json, saving, write_json
from zipper.strand import Produced, Segment
from zipper.tasks import Task, content, fields_of, lanes


@dataclass(frozen=True)
class Counts:
    """Rows of a manifest, or of a part of one: all of them, those with an answer, those that could
    not be answered, and how many of both were there before."""

    rows: int
    done: int
    refused: int
    before: int


def run_batch(
    pipeline: Pipeline,
    data: Path,
    task: Task | str,
    output: Path,
    rows: int = 8,
    part: tuple[int, int] = (1, 1),
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    told: Callable[[Counts], None] | None = None,
    ids: bool = False,
    least: float = 0.0,
) -> Counts:
    """Does a task on the rows of a manifest (see zipper.data.manifests) and writes a line for each
    into `output`: {"row": its number from 0, "id": if it has one, "made": [{"tower", "content",
    "ended", "score"}]} or, in place of what was made, "error". Lines come in the order in which
    rows are done. Files (sound, pictures) are written into OUTPUT.files, and their names told.

    rows: that run at once. part: (2, 8) does every eighth row, from the second. told: called after
    each row. ids: what is made is told as ids, as a model reads them but without the prefix of a
    segment (its voice), and no files are written; the source "made:OUTPUT" is then what a recipe
    learns from (back-translation, Sennrich et al. 2016). least: what was made less surely has no
    answer: the geometric mean of the probabilities of its tokens, over all that was made; above 0 a
    segment must have ended by itself too. Raises a ZipperError for a manifest that cannot be read,
    and where `output` is of another task, model or manifest, or cannot be written.
    """
    task = Task.parse(task) if isinstance(task, str) else task
    first, parts = part
    if not 0 <= least < 1:
        raise ZipperError(f"least is {least}: a probability from 0 to below 1.")
    if not 1 <= first <= parts:
        raise ZipperError(f"Part {first} of {parts} is none. Give 1 of 1, or 2 of 8.")
    for name in task.towers:
        if name not in pipeline.modalities:
            raise ZipperError(
                f"The task names {name!r}; this model has {sorted(pipeline.modalities)}."
            )
    sampling = sampling or Sampling()
    data, output = data.expanduser(), output.expanduser()
    with held_file(output):
        own = {"ids": ids, "least": least}
        _same(pipeline, data, task, output, part, sampling, limits, own)
        there = _there(output)
        mine = [
            (number, sample)
            for number, sample in enumerate(manifests.samples(data))
            if number % parts == first - 1
        ]
        before = {number for number, _ in mine} & there.keys()
        refused = sum(there[number] for number in before)
        counts = Counts(len(mine), len(before) - refused, refused, len(before))
        left = ((number, sample) for number, sample in mine if number not in before)
        for number, sample, found in _answers(pipeline, left, task, rows, sampling, limits):
            if least and not isinstance(found, ZipperError):
                found = _sure(found, least)
            with _writing(output):
                line = _line(pipeline, number, sample, found, None if ids else output)
                with output.open("a", encoding="utf-8") as file:
                    file.write(as_json(line) + "\n")
            wrong = "error" in line
            counts = replace(counts, done=counts.done + (not wrong), refused=counts.refused + wrong)
            if told is not None:
                told(counts)
        return counts


Found = list[Produced] | ZipperError


def _answers(
    pipeline: Pipeline,
    left: Iterator[tuple[int, Sample]],
    task: Task,
    rows: int,
    sampling: Sampling,
    limits: Limits | None,
) -> Iterator[tuple[int, Sample, Found]]:
    """What becomes of each row, as it is done; rows join as others leave."""
    engine = pipeline.engine(rows)
    running: list[tuple[int, Sample, Answer]] = []
    more = True
    while more or running:
        while more and len(running) < rows:
            number, sample = next(left, (-1, None))
            if sample is None:
                more = False
                break
            try:
                request = _asked(pipeline, sample, task, sampling.of_row(number), limits)
                if request is None:  # nothing is said in it
                    fixed = [lane.tower for lane in task.segments_produced if not lane.among]
                    yield number, sample, [Produced(tower, []) for tower in fixed]
                else:
                    running.append((number, sample, engine.submit(request)))
            except ZipperError as error:
                yield number, sample, error
        engine.step()
        for one in [one for one in running if one[2].done]:
            running.remove(one)
            number, sample, answer = one
            if answer.error is not None and not isinstance(answer.error, ZipperError):
                raise answer.error
            yield number, sample, answer.error or answer.segments()


def _asked(
    pipeline: Pipeline, sample: Sample, task: Task, sampling: Sampling, limits: Limits | None
) -> Request | None:
    """The request of a row. Raises a ZipperError for a row that lacks a field or cannot be read."""
    if sample.problem:
        raise ZipperError(f"it {sample.problem}")
    settled = manifests.settle(sample.row, pipeline.modalities)
    fields = {}
    for key, value in settled.items():
        field, _, name = key.rpartition(":")
        fields[field or name] = value
    given = []
    for lane in lanes(task.given):
        *front, field = fields_of(lane.item)
        if field not in fields:
            raise ZipperError(f"it has no field {field!r}, only {sorted(fields)}.")
        raw = fields[field]
        if front:  # ids behind those of other fields: of these alone, whatever else the row has
            named = {
                key: v for key, v in settled.items() if key.partition(":")[0] in {*front, field}
            }
            ids = manifests.encode(named, pipeline.modalities, sample.folder, sample.where)
            raw = content(ids, lane.item)
        if not is_ids(raw):
            raw = whole(pipeline.modalities[lane.tower]).read(raw, sample.folder)
        given.append(lane.segment(raw))
    outputs: list[str | Segment] = list(task.outputs)
    return pipeline.asked(given, outputs, sampling, limits)


def _sure(made: list[Produced], least: float) -> Found:
    """What was made, or that it is not sure enough."""
    tokens = sum(len(segment.content) + segment.ended for segment in made)
    sure = math.exp(sum(segment.score for segment in made) / max(1, tokens))
    if not all(segment.ended for segment in made):
        return ZipperError("it did not end by itself.")
    if sure < least:
        return ZipperError(f"it was made with a probability of {sure:.3f} a token, below {least}.")
    return made


def _line(
    pipeline: Pipeline, number: int, sample: Sample, found: Found, output: Path | None
) -> dict[str, Any]:
    """What is told of a row. output: beside which files are written; None: of ids."""
    line: dict[str, Any] = {"row": number}
    if "id" in sample.row:
        line["id"] = sample.row["id"]
    if isinstance(found, ZipperError):
        return {**line, "error": str(found)}
    made = []
    for place, segment in enumerate(found):
        kind = whole(pipeline.modalities[segment.tower])
        content: Any = None
        if output is None:
            first = next(iter(segment.content), None)
            content = segment.content[first in kind.prefixes.values() :]
        elif not kind.suffix:
            content = kind.told(kind.decode(segment.content))
        elif kind.there(raw := kind.decode(segment.content)):
            folder = output.with_name(f"{output.name}.files")
            folder.mkdir(exist_ok=True)
            path = folder / f"{number}-{place}-{segment.tower}{kind.suffix}"
            kind.write(raw, path)
            content = f"{folder.name}/{path.name}"
        one = {"tower": segment.tower, "content": content}
        made.append({**one, "ended": segment.ended, "score": segment.score})
    return {**line, "made": made}


def _writing(output: Path) -> AbstractContextManager[None]:
    return saving(output, "Rows that are in it stay.", "written")


def _there(output: Path) -> dict[int, bool]:
    """Which rows have a line, and whether that is an error; a line that was cut off is taken
    away."""
    if not output.exists():
        return {}
    content = output.read_bytes()
    whole_lines = content[: content.rfind(b"\n") + 1]
    if len(whole_lines) < len(content):
        with output.open("r+b") as file:
            file.truncate(len(whole_lines))
    found: dict[int, bool] = {}
    for line in whole_lines.splitlines():
        try:
            told = json.loads(line)
            found[told["row"]] = "error" in told
        except (ValueError, KeyError, TypeError) as error:
            raise ZipperError(
                f"{output} holds a line that no run wrote: {line[:80]!r}. Take another output."
            ) from error
    return found


def _added(model: Any) -> str:
    """SHA-256 of what a zip adds to its towers, and of where; "" of another model."""
    if not isinstance(model, Zipper):
        return ""
    shape = model.config
    where = repr((shape.junctions, shape.shows, shape.link, shape.shapes))
    added = {name: p.detach().cpu() for name, p in model.new_parameters().items()}
    return content_hash({"where": where}, added)


def _same(
    pipeline: Pipeline,
    data: Path,
    task: Task,
    output: Path,
    part: tuple[int, int],
    sampling: Sampling,
    limits: Limits | None,
    own: dict[str, Any],
) -> None:
    """Notes beside an output what it is of; raises a ZipperError where it is of something else."""
    beside = about(output)
    try:
        content = hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise ZipperError(
            f"The manifest {data} cannot be read: {error.strerror}. Give a JSONL file."
        ) from error
    towers = pipeline.held.config.towers
    own |= {
        "manifest": content,
        "task": str(task),
        "part": list(part),
        "model": {name: towers[name].digest for name in sorted(towers)},
        "zip": _added(pipeline.held),
        "modalities": {name: one.fingerprint for name, one in pipeline.modalities.items()},
        "sampling": repr(sampling),
        "limits": dict(limits or {}),
    }
    if output.exists():
        before = read_json(beside) if beside.exists() else {}
        # Of versions that had none of these.
        before = {"ids": False, "least": 0.0, "zip": own["zip"]} | before
        differ = [name for name in own if before.get(name) != own[name]]
        if differ:
            raise ZipperError(
                f"{output} is of another {differ[0]}. Take another output, or remove it and "
                f"{beside.name} to begin anew."
            )
    else:
        with _writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, own | {"data": os.path.relpath(data, output.parent)})
            output.touch()
