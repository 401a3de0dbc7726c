"""What is trained once is used again: what that is worth, and what it saves. On digits.

One pre-trained speech tower beside two text towers of other families; the text tower of a zip
swapped for a better one, and for one of the other family, and recovered with a hundredth and a
tenth of the steps; three zips of one frozen text tower composed into four modalities. Beside each
what it is instead of: the same trained from nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from zipper import measurement
from zipper.composition import compose_pipelines
from zipper.data import manifests
from zipper.pipeline import Pipeline
from zipper.saving.files import read_json, write_json
from zipper.surgery import swap_pipeline
from zipper.training import TrainConfig, train
from zipper_lab import real, real_judges
from zipper_lab.corpora import digits

SPEECH, IMAGE, MACHINE = NICHES = "speech", "image", "machine"
#: Another family than the text tower's Llama, of its size: GPT-NeoX (LayerNorm, biases, attention
#: and feed-forward side by side, a quarter of the rotary dimensions).
NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LONGER = 3  # times the steps, of the better text tower
SHARES = (0.0, 0.01, 0.1)  # of a zip's steps, that a swapped one learns on
ALL = "all"
EVERY_DEV = "every_dev.jsonl"  # rows with all modalities
#: Text towers beside the first, and the zips of them with speech.
OTHERS = ("neox", "longer")
LIMIT = 150  # rows of each test
Told = dict[str, Any]


class Row(NamedTuple):
    """Of the table: what it is, by which name it was measured, the runs that it wants beside those
    that were there, the runs that it would want if there were none, and the share of a zip's steps
    that it recovers on."""

    said: str
    name: str
    own: Sequence[str]
    nothing: Sequence[str]
    part: float = 0.0


def prepare(data: Path, folder: Path) -> None:
    """Manifests and modalities of `real.SETS["digits"]`, and in folder/machine those of digits that
    the built-in synthesiser says, its sounds under "machine" too. data: the originals."""
    real.prepare("digits", data, folder)
    place = folder / MACHINE
    if not (folder / EVERY_DEV).is_file():  # written last
        digits.say(place / "said")
        digits.write(place / "said", place)
        for file in place.glob("*.jsonl"):
            rows = manifests.manifest(file)
            manifests.write(file, [{**r, MACHINE: r[SPEECH]} if SPEECH in r else r for r in rows])
        said = {row["digit"]: row[MACHINE] for row in manifests.manifest(place / "dev.jsonl")}
        people = manifests.manifest(folder / "dev.jsonl")
        beside = [{**row, MACHINE: f"{MACHINE}/{said[row['digit']]}"} for row in people]
        manifests.write(folder / EVERY_DEV, beside)


def recipes(folder: Path, output: Path, share: float = 1.0) -> dict[str, TrainConfig]:
    """By name, in their order: the towers, a zip of text and each other modality, the zips of the
    other text towers, and all modalities at once."""
    runs = real.runs("digits", folder, output, share)
    zipped, machine = runs.pop(real.ZIP), folder / MACHINE
    runs[MACHINE] = replace(
        runs[SPEECH],
        output=str(output / MACHINE),
        towers={MACHINE: runs[SPEECH].towers[SPEECH]},
        modalities={MACHINE: str(folder / "modalities" / SPEECH)},
        data=str(machine / "unpaired_speech.jsonl"),
        dev=str(machine / "dev.jsonl"),
        tasks={f"-> {MACHINE}": 1.0},
        seed=1,  # of the same sounds it would be the same tower, and count as shared
        corrupt={MACHINE: 0.05},
    )
    text = runs[real.TEXT]
    runs["neox"] = replace(text, output=str(output / "neox"), towers={real.TEXT: NEOX})
    steps = LONGER * text.steps
    runs["longer"] = replace(text, output=str(output / "longer"), steps=steps)
    found = dict[str, TrainConfig](runs)
    pairs = [(niche, real.TEXT, (niche,)) for niche in NICHES]
    pairs += [(f"{other} {SPEECH}", other, (SPEECH,)) for other in OTHERS]
    for name, base, niches in [*pairs, (ALL, real.TEXT, NICHES)]:
        found[f"zip {name}"] = _zip(zipped, folder, output, f"zip {name}", base, niches)
    return found


def _zip(
    zipped: TrainConfig, folder: Path, output: Path, name: str, base: str, niches: Sequence[str]
) -> TrainConfig:
    """A zip of the text tower of the run `base` with others. Text stays as it is."""
    of = {real.TEXT: base} | {niche: niche for niche in niches}
    towers = {tower: str(output / run / "model" / "towers" / tower) for tower, run in of.items()}
    kinds = {tower: SPEECH if tower == MACHINE else tower for tower in towers}
    each = 1 / len(niches)
    tasks = {f"{niche} -> {real.TEXT}": 0.4 * each for niche in niches}
    tasks |= {f"{real.TEXT} -> {niche}": 0.6 * each for niche in niches}
    files = [folder / MACHINE if niche == MACHINE else folder for niche in niches]
    return replace(
        zipped,
        output=str(output / name.replace(" ", "-")),
        towers=towers,
        modalities={tower: str(folder / "modalities" / kind) for tower, kind in kinds.items()},
        data={str(file / "train.jsonl"): float(files.count(file)) for file in files},
        dev=str(files[0] / "dev.jsonl" if len(niches) == 1 else folder / EVERY_DEV),
        tasks=tasks,
        train=tuple(niches),
        links=real.links(niches),
        corrupt=dict.fromkeys(niches, 0.05),
    )


def swapped(plans: Mapping[str, TrainConfig], other: str, part: float) -> Pipeline:
    """The zip of text and speech with the text tower of the run `other` in the place of its own,
    and a part of its steps to recover."""
    before = plans[f"zip {SPEECH}"]
    tower = plans[f"zip {other} {SPEECH}"].towers[real.TEXT]
    output = Path(before.output).with_name(f"swap-{other}")
    old = Pipeline.from_pretrained(Path(before.output) / "model")
    new, _ = swap_pipeline(old, {real.TEXT: tower}, gate=before.link.gate_init)
    if not part:
        return new
    if not (output / "start").exists():
        new.save_pretrained(output / "start")
    steps = max(1, round(before.steps * part))
    after = replace(
        before,
        output=str(output / f"{part:g}"),
        start=str(output / "start"),
        towers={**before.towers, real.TEXT: tower},
        links=None,
        steps=steps,
        eval_every=max(1, steps // 4),
        warmup=min(before.warmup, steps // 5),
    )
    return train(after, resume=True)


def composed(plans: Mapping[str, TrainConfig]) -> Pipeline:
    """The zips of text and each other modality as one."""
    made, *others = (
        Pipeline.from_pretrained(Path(plans[f"zip {niche}"].output) / "model") for niche in NICHES
    )
    for other in others:
        made = compose_pipelines(made, other)
    return made


def tested(pipeline: Pipeline, folder: Path, judges: Mapping[str, Any], limit: int) -> Told:
    """By task, of the modalities that a pipeline has: the share of digits that are right on new
    takes, by classifiers of real ones, its floor and oracle, and nats a token; where there are
    several, from each to each by the word written between them too."""
    niches = [niche for niche in NICHES if niche in pipeline.modalities]
    found: Told = {}
    for niche in niches:
        place = folder / MACHINE if niche == MACHINE else folder
        samples = [*manifests.samples(place / "known.jsonl")]
        tasks = [f"{niche} -> {real.TEXT}", f"{real.TEXT} -> {niche}"]
        others = {SPEECH: IMAGE, IMAGE: SPEECH, MACHINE: IMAGE}
        if others[niche] in niches:
            tasks.append(f"{niche} -> {real.TEXT}, {others[niche]}")
        by = {tower: {"digit": real_judges.Scored(judges[tower])} for tower in (*niches, real.TEXT)}
        for one in measurement.measure(pipeline, real.evenly(samples, limit), tasks, judges=by):
            if one.tower == one.task.split()[-1]:  # what is made last
                rates = {name: vars(rate) for name, rate in one.metrics["digit: digit"].items()}
                found[one.task] = rates | {"nats": one.nats}
    return found


def run(data: Path, output: Path, share: float = 1.0, limit: int = LIMIT) -> Told:
    """All of it; measured.json as it grows, and returned. What is done is not done again.

    data: the folder with the originals of real.SETS["digits"].
    """
    folder, place = output / "data", output / "measured.json"
    prepare(data, folder)
    plans = recipes(folder, output, share)
    digit = real_judges.Digits.trained(folder)
    judges: dict[str, Any] = dict.fromkeys((real.TEXT, SPEECH, IMAGE), digit)
    judges[MACHINE] = real_judges.Digits.trained(folder / MACHINE)
    told: Told = read_json(place) if place.is_file() else {}

    def measured(name: str, pipeline: Pipeline) -> None:
        told[name] = tested(pipeline, folder, judges, limit)
        write_json(place, told)
        print(f"-- {name}: {told[name]}", flush=True)

    for name, plan in plans.items():
        model = real.trained(plan)
        if name.startswith("zip") and name not in told:
            measured(name, Pipeline.from_pretrained(model))
    for other, part in product(OTHERS, SHARES):
        if (name := f"swap {other} {part:g}") not in told:
            measured(name, swapped(plans, other, part))
    if "composed" not in told:
        measured("composed", composed(plans))
    told["steps"] = {name: plan.steps for name, plan in plans.items()}
    write_json(place, told)
    return told


def rows() -> list[Row]:
    """Of the table, in its order."""
    first = (real.TEXT, SPEECH, f"zip {SPEECH}")
    found = [Row("text and speech", first[-1], first, first)]
    for other, said in (("neox", "another family"), ("longer", f"{LONGER} times the steps")):
        zipped = f"zip {other} {SPEECH}"
        nothing = (other, SPEECH, zipped)
        found.append(
            Row(f"a text tower of {said}, the same speech tower", zipped, (other, zipped), nothing)
        )
        for part in SHARES:
            of = f"it in the place of the first, {part:.0%} of the steps"
            found.append(Row(of, f"swap {other} {part:g}", (other,), nothing, part))
    for niche in NICHES[1:]:
        pair = f"zip {niche}"
        found.append(Row(f"text and {niche}", pair, (niche, pair), (real.TEXT, niche, pair)))
    everything = (real.TEXT, *NICHES, f"zip {ALL}")
    found.append(Row("the three zips of the first text tower composed", "composed", (), everything))
    found.append(Row("all of these at once", f"zip {ALL}", everything, everything))
    return found


def same(told: Told) -> bool:
    """Whether the composed zip does what its parents do: answers and nats a token, to the bit."""
    parents = [told[f"zip {niche}"] for niche in NICHES]
    cells = chain.from_iterable(parent.items() for parent in parents)
    return all(told["composed"][task] == cell for task, cell in cells)


def markdown(told: Told) -> str:
    """What `run` measured. steps: of the runs that a row wants beside those that were there."""
    everything, steps = told["composed"], told["steps"]
    pairs = [task for task in everything if "," not in task]
    lines = [f"| | steps | from nothing | {' | '.join(pairs)} |", f"|{'---|' * (len(pairs) + 3)}"]
    for row in rows():
        own = sum(steps[run] for run in row.own) + round(row.part * steps[f"zip {SPEECH}"])
        nothing = sum(steps[run] for run in row.nothing)
        cells = [_cell(told[row.name], task, "model") for task in pairs]
        lines.append(f"| {row.said} | {own:,} | {nothing:,} | {' | '.join(cells)} |")
    for bound in ("oracle", "floor"):
        cells = [_cell(everything, task, bound) for task in pairs]
        lines.append(f"| {bound} | | | {' | '.join(cells)} |")
    found = "the same, to the bit" if same(told) else "NOT the same"
    lines += ["", f"What the composed zip answers and what its parents do is {found}.", ""]
    across = [task for task in everything if "," in task]
    lines += [f"| by the word between | {' | '.join(across)} |", f"|{'---|' * (len(across) + 1)}"]
    for said, name in (("composed", "composed"), ("at once", f"zip {ALL}")):
        cells = [_cell(told[name], task, "model") for task in across]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Told, task: str, of: str) -> str:
    return f"{found[task][of]['value']:.0%}" if task in found else ""
