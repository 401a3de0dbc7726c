"""Does a zip answer in the modality that it was asked for? On digits.

A request, read or heard, wants a digit written, said or drawn (`corpora.asked`). Behind it the
model chooses which of three towers answers, and when it is over. What it then answers is held
against the same request under a plan that names the tower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
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
from zipper.tasks import Task
from zipper.training import TrainConfig
from zipper_lab import pairwise, people, real, real_judges
from zipper_lab.corpora import asked

SEEDS = (0, 1, 2)
ANSWER = "|".join(asked.WORDINGS)
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
    dev, texts = str(folder / asked.NUMBERS / "dev.jsonl"), str(folder / real.LAST)
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
        asked.write(data, folder)
    real.prepare("digits", data, folder)
    judge = real_judges.Digits.trained(folder / asked.NUMBERS)
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
    ("forced"). The last three also by the tower that was asked for ("text: free")."""
    ways = [sample.row["way"] for sample in samples]
    rows = [manifests.encode(s.row, pipeline.modalities, s.folder, s.where) for s in samples]
    found: dict[str, Any] = {}
    for name in CHOICES:
        task = Task.parse(name)
        prompts = [task.prompt(row) for row in rows]
        forced = _made(pipeline, [*zip(prompts, ways, strict=True)])
        free = _made(pipeline, [(prompt, ANSWER) for prompt in prompts])
        hits = {
            "chosen": [[t for t, _ in one] == [way] for one, way in zip(free, ways, strict=True)],
            "free": [_right(judge, one, s) for one, s in zip(free, samples, strict=True)],
            "forced": [_right(judge, one, s) for one, s in zip(forced, samples, strict=True)],
        }
        every = {which: np.array(some, np.float64) for which, some in hits.items()}
        (measured,) = measurement.measure(pipeline, samples, [task])
        likeliest = vars(measured.metrics["right choice"]["model"])
        found[name] = {"confusion": measured.confusion, "likeliest": likeliest}
        found[name] |= {which: people.rate(some) for which, some in every.items()}
        for way in asked.WORDINGS:
            mine = np.array(ways) == way
            found[name] |= {f"{way}: {w}": people.rate(some[mine]) for w, some in every.items()}
    return found


def _made(pipeline: Pipeline, plans: Sequence[tuple[Any, str]]) -> list[list[tuple[str, Any]]]:
    """What a model makes of each prompt under a plan of one item: (tower, raw content) of each
    segment, as many as there was room for."""
    wanted = [
        Request(prompt, [item], replace(SAMPLING, seed=number))
        for number, (prompt, item) in enumerate(plans)
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


def markdown(told: Mapping[str, Any]) -> str:
    """What `run` measured."""
    lines = ["| | asked in text | asked by voice |", "|---|---|---|"]
    shown = {
        "likeliest": "the likeliest choice is right: who answers, and that it is over",
        "chosen": "drawn at temperature 0.7: the tower that was asked for, and then over",
        "free": "and its digit is right",
        "forced": "the digit, by a plan that names the tower",
    }
    each = (f"{way}: {which}" for way, which in product(asked.WORDINGS, ("free", "forced")))
    for key, said in [*shown.items(), *((one, one) for one in each)]:
        cells = [people.over([found[task][key] for found in told.values()]) for task in CHOICES]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)
