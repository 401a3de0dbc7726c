"""Can more than two modalities be fused from pairs alone? The paper's open question, on digits.

Text, people's voices and pictures in one zip that has only ever seen text beside speech and text
beside pictures. What it can do from speech to picture and back: at once; through the word it writes
between them; through a text tower that is read but stays silent; and at once after it met 1, 10,
100 or all triples. Beside it one decoder with every id in its vocabulary, of the same pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from zipper import measurement
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.junctions import Directed
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.saving.files import read_json, write_json
from zipper.training import TrainConfig
from zipper_lab import real, real_judges
from zipper_lab.people import few

SEEDS = (0, 1, 2)
TRIPLES = (1, 10, 100, 0)  # that speech meets pictures in; 0 = all
STEPS = 300  # after pairs
SPEECH, IMAGE = "speech", "image"
ZIP, DEEP, EXPANDED = ARMS = "zip", "deep", "expanded"
AT_ONCE = ("speech -> image", "image -> speech")
WRITTEN = ("speech -> text, image", "image -> text, speech")
SILENT = ("speech, silent:text -> image", "image, silent:text -> speech")
LIMIT = 150  # rows of each test


def recipes(folder: Path, output: Path, seed: int, share: float = 1.0) -> dict[str, TrainConfig]:
    """The towers, which all seeds share, and what learns from pairs: ZIP reads the text tower's
    embeddings, DEEP what the tower made of them, so that it can be read without a word."""
    *towers, zipped = real.runs("digits", folder, output, share).values()
    found = {Path(config.output).name: config for config in towers}
    plans = {
        ZIP: replace(zipped, links=[*(zipped.links or ()), *across()]),
        DEEP: replace(zipped, links=[*_deep(), *across()]),
        EXPANDED: real.arms(zipped)[real.EXPANDED],
    }
    for arm, plan in plans.items():
        found[arm] = replace(plan, output=str(output / f"{arm}-{seed}"), seed=seed, trackers=())
    return found


def across() -> list[Directed]:
    """Links between speech and pictures, each shown where it is fused: further on would close a
    circle. No pair lets them learn or act; in a triple they do."""
    found = list[Directed]()
    for one, other in ((SPEECH, IMAGE), (IMAGE, SPEECH)):
        found += [(one, block, other, block) for block in (1, 2, 3)]
    return found


def _deep() -> list[Directed]:
    """Text and the others, each shown where it is fused (the paper)."""
    found = list[Directed]()
    for tower, block in product((SPEECH, IMAGE), (1, 2, 3)):
        found += [(real.TEXT, block, tower, block), (tower, block, real.TEXT, block)]
    return found


def met(plan: TrainConfig, folder: Path, output: Path, triples: int, share: float) -> TrainConfig:
    """The recipe that shows so many triples to what has learnt from pairs."""
    some = folder / "triples" / f"{triples}-{plan.seed}.jsonl"
    if not some.is_file():
        rows = few(manifests.manifest(folder / "train.jsonl"), triples, plan.seed)
        beside = [row | {f: f"../{row[f]}" for f in (SPEECH, IMAGE)} for row in map(dict, rows)]
        manifests.write(some, beside)
    direct = {task: 0.5 for task in AT_ONCE}
    return replace(
        plan,
        output=str(output / f"{Path(plan.output).name}-{triples}"),
        start=str(Path(plan.output) / "model"),
        data={str(some): 0.5, str(folder / "train.jsonl"): 0.5},
        tasks={**plan.tasks, **direct},
        calibrate=0,
        lr_new=plan.lr_new / 2,
        lr_tower=plan.lr_tower / 2,
        steps=max(1, round(STEPS * share)),
        eval_every=50,
    )


def closed(model: Zipper) -> None:
    """Shuts the links between speech and pictures, which nothing has taught, in place."""
    for name, parameter in model.links.named_parameters():
        if "gate" in name and real.TEXT not in name:
            parameter.data.zero_()


def tested(
    pipeline: Pipeline, folder: Path, tasks: Sequence[str], judge: real_judges.Judge, limit: int
) -> dict[str, dict[str, Any]]:
    """By test and task: the share of digits that are right in what is made last, by a classifier of
    real ones ("model"), beside "oracle" and "floor", and nats a token."""
    by = {tower: {"digit": real_judges.Scored(judge)} for tower in (SPEECH, IMAGE, real.TEXT)}
    found: dict[str, dict[str, Any]] = {}
    for test in ("test", "known"):
        samples = real.evenly([*manifests.samples(folder / f"{test}.jsonl")], limit)
        some = [s._replace(row={**s.row, "silent:text": ""}) for s in samples]
        for one in measurement.measure(pipeline, some, tasks, judges=by):
            if one.tower != real.TEXT:
                rates = {name: vars(rate) for name, rate in one.metrics["digit: digit"].items()}
                found.setdefault(test, {})[one.task] = rates | {"nats": one.nats}
    return found


def run(data: Path, output: Path, share: float = 1.0, limit: int = LIMIT) -> dict[str, Any]:
    """All of it; measured.json as it grows, and returned. What is done is not done again.

    data: the folder with the originals of real.SETS["digits"].
    """
    folder = output / "data"
    real.prepare("digits", data, folder)
    judge = real_judges.Digits.trained(folder)
    place = output / "measured.json"
    told: dict[str, Any] = read_json(place) if place.is_file() else {}
    for seed in SEEDS:
        plans = recipes(folder, output, seed, share)
        for name, plan in plans.items():
            real.trained(plan, real.maker(name, plans))
        for arm, triples in product(ARMS, (None, *TRIPLES)):
            if arm == DEEP and triples is not None:
                continue
            after = plans[arm]
            if triples is not None:
                after = met(after, folder, output, triples, share)
            if (name := Path(after.output).name) in told:
                continue
            pipeline = Pipeline.from_pretrained(real.trained(after, real.maker(arm, plans)))
            if triples is None and arm != EXPANDED:
                closed(pipeline.zip)
            tasks = AT_ONCE if triples is not None else AT_ONCE + WRITTEN + SILENT
            told[name] = tested(pipeline, folder, tasks, judge, limit)
            write_json(place, told)
            print(f"-- {name}: {told[name]}", flush=True)
    return told


def markdown(told: Mapping[str, Any]) -> str:
    """What `run` measured: the mean over seeds, and the least and most."""
    if not any(name.startswith(ZIP) for name in told):
        raise ZipperError("Nothing was measured yet: no zip is there.")
    lines = []
    for test, place in product(("known", "test"), (0, 1)):
        task = AT_ONCE[place]
        lines += [
            f"**{task}**, {'new takes of known people' if test == 'known' else 'a new person'}"
        ]
        lines += ["", "| | zip | zip, text read deep | expanded |", "|---|---|---|---|"]
        shown = [("at once", "", AT_ONCE), ("the word written between", "", WRITTEN)]
        shown.append(("the text tower read, silent", "", SILENT))
        shown += [(f"at once, {n or 'all'} triples", f"-{n}", AT_ONCE) for n in TRIPLES]
        for said, ending, tasks in shown:
            cells = [_over(told, arm, ending, test, tasks[place], "model") for arm in ARMS]
            lines.append(f"| {said} | {' | '.join(cells)} |")
        bounds = [_over(told, ZIP, "", test, task, bound) for bound in ("floor", "oracle")]
        lines += [f"| floor, oracle | {bounds[0]}, {bounds[1]} | | |", ""]
    return "\n".join(lines)


def _over(told: Mapping[str, Any], arm: str, ending: str, test: str, task: str, of: str) -> str:
    runs = [told.get(f"{arm}-{seed}{ending}", {}).get(test, {}).get(task) for seed in SEEDS]
    values = [100 * one[of]["value"] for one in runs if one]
    if not values:
        return ""
    span = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
    return f"{float(np.mean(values)):.0f} %{span}"
