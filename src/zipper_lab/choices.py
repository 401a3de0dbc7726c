"""Does a zip answer in the modality that it was asked for? On digits.

A request, read or heard, wants a digit written, said or drawn (`corpora.requests`). Behind it the
model chooses which of three towers answers, and when it is over. What it then answers is held
against the same request under a plan that names the tower.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zipper import measurement
from zipper.data import manifests
from zipper.data.manifests import Sample
from zipper.generation import NoRoom, Request
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving.files import read_json, write_json
from zipper.statistics import bootstrap, share
from zipper.tasks import Task
from zipper.training import TrainConfig
from zipper_lab import pairwise, real, real_judges
from zipper_lab.corpora import requests

SEEDS = (0, 1, 2)
ANSWER = "|".join(requests.WORDINGS)
READ, HEARD = CHOICES = f"asked:text -> {ANSWER}", f"heard:speech -> {ANSWER}"
#: What is learnt: both, and to write down what is heard.
TASKS = {READ: 0.35, HEARD: 0.45, "heard:speech -> asked:text": 0.2}
#: What the text tower learns alone, as one does that follows instructions: frozen, it can answer a
#: text by a text no better than before.
ALONE = {"-> text": 0.5, "asked:text -> reply:text": 0.5}
LIMIT = 300  # requests that are tested
SAMPLING = Sampling(temperature=0.7)
ROWS = 16  # side by side


def recipes(folder: Path, output: Path, seed: int, share: float = 1.0) -> dict[str, TrainConfig]:
    """The towers, which all seeds share, and the zip: those of digits, with links between speech
    and pictures too."""
    dev, texts = str(folder / requests.NUMBERS / "dev.jsonl"), str(folder / real.LAST)
    text, *towers, zipped = real.runs("digits", folder, output, share).values()
    found = {real.TEXT: replace(text, tasks=ALONE, dev=texts)}
    found |= {Path(tower.output).name: replace(tower, dev=dev) for tower in towers}
    found[real.ZIP] = replace(
        zipped,
        output=str(output / f"{real.ZIP}-{seed}"),
        tasks=TASKS,
        links=[*(zipped.links or ()), *pairwise.across()],
        seed=seed,
        trackers=(),
    )
    return found


def run(data: Path, output: Path, share: float = 1.0, limit: int = LIMIT) -> dict[str, Any]:
    """All of it; measured.json as it grows, and returned. What is done is not done again.

    data: the folder with the originals of real.SETS["digits"].
    """
    folder = output / "data"
    if not (folder / real.LAST).is_file():
        requests.write(data, folder)
    real.prepare("digits", data, folder)
    judge = real_judges.Digits.trained(folder / requests.NUMBERS)
    place = output / "measured.json"
    told: dict[str, Any] = read_json(place) if place.is_file() else {}
    for seed in SEEDS:
        *towers, zipped = recipes(folder, output, seed, share).values()
        if (name := Path(zipped.output).name) in told:
            continue
        for tower in towers:
            real.trained(tower)
        pipeline = Pipeline.from_pretrained(real.trained(zipped))
        told[name] = tested(pipeline, manifests.good(folder / "test.jsonl", limit), judge)
        write_json(place, told)
        print(f"-- {name}: {told[name]}", flush=True)
    return told


def tested(
    pipeline: Pipeline, samples: Sequence[Sample], judge: real_judges.Digits
) -> dict[str, Any]:
    """By task, shares with their 95 % intervals: of all choices behind true segments those whose
    likeliest is right ("likeliest"; "confusion": what was taken for what); of answers that are
    drawn, choices too, those of one segment of the tower that was asked for ("chosen") and those
    whose digit is right as well ("free"); and of the digits under plans that name the tower
    ("forced"). The last three also by tower ("by")."""
    ways = [sample.row["way"] for sample in samples]
    rows = [manifests.encode(s.row, pipeline.modalities, s.folder, s.where) for s in samples]
    found: dict[str, Any] = {}
    for name in CHOICES:
        task = Task.parse(name)
        prompts = [task.prompt(row) for row in rows]
        forced = _made(pipeline, [(prompt, way) for prompt, way in zip(prompts, ways, strict=True)])
        free = _made(pipeline, [(prompt, ANSWER) for prompt in prompts])
        chosen = [[tower for tower, _ in one] == [way] for one, way in zip(free, ways, strict=True)]
        right = {
            "chosen": chosen,
            "forced": [_right(judge, one, s) for one, s in zip(forced, samples, strict=True)],
            "free": [_right(judge, one, s) for one, s in zip(free, samples, strict=True)],
        }
        (measured,) = measurement.measure(pipeline, samples, [task])
        every = np.array(ways)
        by = {
            way: {which: float(np.mean(np.array(right[which])[every == way])) for which in right}
            for way in requests.WORDINGS
        }
        shares = {which: _share(hits) for which, hits in right.items()}
        shares["likeliest"] = vars(measured.metrics["right choice"]["model"])
        found[name] = {"by": by, "confusion": measured.confusion, **shares}
    return found


def _made(pipeline: Pipeline, asked: Sequence[tuple[Any, str]]) -> list[list[tuple[str, Any]]]:
    """What a model makes of each prompt under a plan of one item: (tower, raw content) of each
    segment, as many as there was room for."""
    wanted = [
        Request(prompt, [item], replace(SAMPLING, seed=number))
        for number, (prompt, item) in enumerate(asked)
    ]
    made = []
    for answer in pipeline.engine(ROWS).run(wanted):
        if answer.error is not None and not isinstance(answer.error, NoRoom):
            raise answer.error
        written = [part.segment for part in answer.written]
        made.append([(s.tower, pipeline.modalities[s.tower].decode(s.content)) for s in written])
    return made


def _right(judge: real_judges.Digits, made: Sequence[tuple[str, Any]], sample: Sample) -> bool:
    """Whether it is one answer of the tower that was asked for, and of its digit."""
    if [tower for tower, _ in made] != [sample.row["way"]]:
        return False
    return judge.digit(made[0][1]) == sample.row["digit"]


def _share(hits: Sequence[bool]) -> dict[str, float]:
    found = np.array(hits, np.float64)
    low, high = bootstrap(share, found, np.ones_like(found))
    return {"value": float(found.mean()), "low": low, "high": high}


def markdown(told: dict[str, Any]) -> str:
    """What `run` measured."""
    lines = ["| | asked in text | asked by voice |", "|---|---|---|"]
    shown: dict[str, tuple[str, ...]] = {
        "the likeliest choice is right: who answers, and that it is over": ("likeliest",),
        "drawn at temperature 0.7: the tower that was asked for, and then over": ("chosen",),
        "and its digit is right": ("free",),
        "the digit, by a plan that names the tower": ("forced",),
    }
    for way in requests.WORDINGS:
        shown[f"{way}: free"] = ("by", way, "free")
        shown[f"{way}: forced"] = ("by", way, "forced")
    for said, keys in shown.items():
        cells = [_over([_at(told[name][task], keys) for name in sorted(told)]) for task in CHOICES]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found[key]
    return found


def _over(numbers: Sequence[Any]) -> str:
    """The mean over seeds, and the least and most; of one run its interval."""
    values = [100 * (one["value"] if isinstance(one, dict) else one) for one in numbers]
    if len(values) > 1:
        return f"{np.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f})"
    (one,) = numbers
    span = f" ({100 * one['low']:.1f} to {100 * one['high']:.1f})" if isinstance(one, dict) else ""
    return f"{values[0]:.1f} %{span}"
