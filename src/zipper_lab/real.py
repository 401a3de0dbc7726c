"""Six zips of real data: pictures, motion, actions, molecules, proteins, and digits in three
modalities.

A set names the originals' reader, the modalities, the towers and the tasks. `run` does all of one:
manifests, modalities, a tower for each modality alone, the zip on pairs, and what it can do on rows
that nothing was trained on. Sizes are for two cores and minutes; none was tuned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

from zipper import measurement, modality
from zipper.data import fitting, manifests
from zipper.errors import ZipperError
from zipper.junctions import Directed
from zipper.link import LinkConfig
from zipper.measurement import Measured
from zipper.modality import Modality
from zipper.modality.symbols import Symbols
from zipper.modality.text import Text
from zipper.pipeline import Pipeline
from zipper.saving.files import read_json, write_json
from zipper.tasks import Task
from zipper.training import TrainConfig, train
from zipper.training.building import Build, build
from zipper.training.resume import finished
from zipper_lab import real_judges
from zipper_lab.baseline import Extend
from zipper_lab.corpora import (
    babyai,
    commands,
    digits,
    emoji,
    molecules,
    motion,
    prose,
    proteins,
)
from zipper_lab.demo import SPEECH_TOWER, TEXT_TOWER

T = TypeVar("T")

TEXT = "text"
LAST = "texts.jsonl"  # what every corpus writes behind all else
ZIP, TRAINED, EXPANDED = ARMS = "zip", "trained", "expanded"
#: 0.8 M and 1.8 M parameters beside the embeddings.
SMALL = TEXT_TOWER
LARGER = SPEECH_TOWER | {"max_position_embeddings": 512}


#: How links are born and learn, here as in `zipper_lab.people`.
ALIGNED: dict[str, Any] = {
    "link": LinkConfig(gate_init=1.2, dropout=0.1),
    "calibrate": 500,
    "input_projection": "none",
    "lr_new": 2e-3,
    "lr_gate": 3e-4,
    "lr_tower": 5e-4,
    "loss_weight": {TEXT: 2.0},
}


@dataclass(frozen=True)
class Niche:
    """A modality beside text, and the tower that is pre-trained on it alone.

    kind, settings: see `zipper fit`. alone: its manifest, of unpaired data. tasks: of the
    pre-training.
    """

    kind: str
    settings: Mapping[str, Any]
    tasks: Mapping[str, float]
    alone: str = "unpaired.jsonl"
    shape: Mapping[str, Any] = field(default_factory=lambda: LARGER)
    steps: int = 1200


@dataclass(frozen=True)
class DataSet:
    """One zip.

    about: what it is, of which original. write: makes the manifests. tasks: of the zip, with their
    shares. also: tasks that are measured and were not trained. beside: what the text tower reads
    beside the set's own texts, where these are too few to be a language: "prose" (novels),
    "commands" or nothing. tests: manifests that are measured. merges: of the tokenizer.
    """

    about: str
    write: Callable[[Path, Path, int], None]
    niches: Mapping[str, Niche]
    tasks: Mapping[str, float]
    also: tuple[str, ...] = ()
    beside: str = ""
    tests: tuple[str, ...] = ("test",)
    merges: int = 300
    text: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    text_steps: int = 800
    steps: int = 1500


SETS: dict[str, DataSet] = {
    "images": DataSet(
        "Emoji and their names (emoji-datasource, Apache-2.0 and CC BY 4.0): 24 x 24 pixels "
        "as 36 patches; split by name; `known`: names trained in one style, the other style's "
        "picture held back.",
        emoji.write,
        {"image": Niche("image", {"codes": 256, "patch": 4, "size": (24, 24)}, {"-> image": 1.0})},
        {"image -> text": 0.45, "styled:text -> image": 0.55},
        beside="prose",
        tests=("test", "known"),
        merges=500,
    ),
    "motion": DataSet(
        "Accelerometer and gyroscope of phones and watches on 19 people (sp-sw-har, CC BY 4.0): "
        "3.2 s at 50 Hz, patches of 8 steps of 6 channels; four people are in the test alone.",
        motion.write,
        {"motion": Niche("signal", {"codes": 256, "patch": 8}, {"-> motion": 1.0})},
        {"motion -> text": 0.4, "text -> motion": 0.6},
        merges=100,
        text_steps=400,
    ),
    "actions": DataSet(
        "BabyAI missions (minigrid, Apache-2.0): what is seen and what is done, as words; "
        "judged by success in the simulator; starts of the test, and a third of its missions, "
        "are in no other part.",
        partial(babyai.write, more=16_000),  # 100 s of the bot
        {
            "actions": Niche(
                "symbols",
                {"split": "words"},
                {"seen:actions -> actions": 0.8, "-> seen:actions": 0.2},
            )
        },
        {"text, seen:actions -> actions": 0.7, "seen:actions, actions -> text": 0.3},
        merges=60,
        text_steps=300,
    ),
    "molecules": DataSet(
        "ChEBI-20 (CC BY 4.0): SMILES and a sentence or two about it; split by scaffold.",
        molecules.write,
        {
            "molecule": Niche(
                "symbols", {"split": "smiles", "unknown": "?"}, {"-> molecule": 1.0}, steps=1600
            )
        },
        {"molecule -> text": 0.4, "text -> molecule": 0.6},
        merges=800,
        text=LARGER,
        text_steps=1200,
    ),
    "proteins": DataSet(
        "UniProtKB (CC BY 4.0): what a protein of at most 256 residues is and of which species; "
        "split by homology; `known`: proteins held back that have kin where they are trained on.",
        proteins.write,
        {"protein": Niche("symbols", {"unknown": "X"}, {"-> protein": 1.0}, steps=1600)},
        {"protein -> text": 0.4, "text -> protein": 0.6},
        tests=("test", "known"),
        merges=800,
        text=LARGER,  # 3.19 nats a token after 800 steps, SMALL 3.47
        text_steps=1200,
    ),
    "digits": DataSet(
        "People saying digits (free-spoken-digit-dataset, CC BY-SA 4.0) and writing them "
        "(scikit-learn's, BSD), and the words: three towers, pairs with text alone; speech "
        "and pictures meet through words. One speaker is in the test alone; `known`: new "
        "takes of those trained on.",
        digits.write,
        {
            "speech": Niche(
                "speech", {"codes": 128}, {"-> speech": 1.0}, "unpaired_speech.jsonl", steps=600
            ),
            "image": Niche(
                "image",
                {"codes": 64, "patch": 2, "size": (8, 8), "channels": 1},
                {"-> image": 1.0},
                "unpaired_image.jsonl",
                steps=600,
            ),
        },
        {
            "speech -> text": 0.2,
            "image -> text": 0.2,
            "text -> speech": 0.3,
            "text -> image": 0.3,
        },
        also=("speech -> text, image", "image -> text, speech"),
        beside="commands",
        tests=("test", "known"),
        merges=150,
    ),
}


#: Of the steps of a set that a demo takes, and the rows of each test that it measures.
SHARES = {
    "images": 0.4,
    "motion": 0.3,
    "actions": 0.3,
    "molecules": 0.2,
    "proteins": 0.15,
    "digits": 0.4,
}
DEMO_ROWS = 100


def named(name: str) -> DataSet:
    """A set by its name. Raises ZipperError for unknown ones."""
    if name not in SETS:
        raise ZipperError(f"There is no set {name!r} of real data. Take one of {', '.join(SETS)}.")
    return SETS[name]


def prepare(name: str, data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests and modalities of a set, in `folder`; what is there stays.

    data: the folder with the originals. Raises ZipperError if one of them is missing.
    """
    chosen = named(name)
    if not (folder / LAST).is_file():
        chosen.write(data, folder, seed)
    if chosen.beside and not (folder / f"{chosen.beside}.jsonl").is_file():
        texts = _beside(chosen.beside)
        manifests.write(folder / f"{chosen.beside}.jsonl", [{"text": text} for text in texts])
    for tower, niche in chosen.niches.items():
        if not (place := folder / "modalities" / tower).exists():
            modality.save(_fitted(tower, niche, folder), place)
    if not (place := folder / "modalities" / TEXT).exists():
        rows = chain.from_iterable(map(manifests.manifest, _texts(chosen, folder)))
        Text.train([row["text"] for row in rows], chosen.merges).save(place)


def runs(name: str, folder: Path, output: Path, share: float = 1.0) -> dict[str, TrainConfig]:
    """The recipes of a set in their order: the towers, by name, then "zip"; see `prepare`.

    share: of the steps, for a short try. Data files need not be there yet.
    """
    chosen = named(name)
    common: dict[str, Any] = {"dev": str(folder / "dev.jsonl"), "lr_tower": 2e-3}
    found = {
        TEXT: TrainConfig(
            output=str(output / TEXT),
            towers={TEXT: chosen.text},
            modalities={TEXT: str(folder / "modalities" / TEXT)},
            data={str(file): 1.0 for file in _texts(chosen, folder)},
            tasks={"-> text": 1.0},
            steps=max(1, round(chosen.text_steps * share)),
            **common,
        )
    }
    for tower, niche in chosen.niches.items():
        found[tower] = TrainConfig(
            output=str(output / tower),
            towers={tower: niche.shape},
            modalities={tower: str(folder / "modalities" / tower)},
            data=str(folder / niche.alone),
            tasks=niche.tasks,
            steps=max(1, round(niche.steps * share)),
            corrupt={tower: 0.05},
            **common,
        )
    towers = [TEXT, *chosen.niches]
    tasks = [Task.parse(task) for task in chosen.tasks]
    made = {lane.tower for lane in chain.from_iterable(one.segments_produced for one in tasks)}
    found[ZIP] = TrainConfig(
        output=str(output / ZIP),
        towers={tower: str(output / tower / "model" / "towers" / tower) for tower in towers},
        modalities={tower: str(folder / "modalities" / tower) for tower in towers},
        data=str(folder / "train.jsonl"),
        dev=str(folder / "dev.jsonl"),
        tasks=chosen.tasks,
        train=tuple(chosen.niches),
        links=links([*chosen.niches]),
        **ALIGNED,
        corrupt={tower: 0.05 for tower in chosen.niches if tower in made},
        steps=max(1, round(chosen.steps * share)),
        eval_rows=200,
    )
    return found


def arms(zipped: TrainConfig) -> dict[str, TrainConfig]:
    """The recipe of a zip, with its text tower frozen, and of what it is compared with: "trained",
    all of it learns; "expanded", one decoder with all ids in its vocabulary (`expansion`)."""
    folder = Path(zipped.output).parent
    plain: dict[str, Any] = {"links": None, "calibrate": 0, "train": (), "lr_tower": 1e-3}
    return {
        ZIP: zipped,
        TRAINED: replace(zipped, output=str(folder / TRAINED), train=tuple(zipped.towers)),
        EXPANDED: replace(zipped, output=str(folder / EXPANDED), **plain),
    }


def expansion(zipped: TrainConfig) -> Extend:
    """What makes the decoder of "expanded": the text tower with rows that start from the others'
    and as many parameters as the saved zip of this recipe."""
    model = Pipeline.from_pretrained(Path(zipped.output) / "model").model
    others = tuple(tower for tower in zipped.towers if tower != TEXT)
    return Extend(TEXT, others, sum(p.numel() for p in model.parameters()))


def maker(arm: str, recipes: Mapping[str, TrainConfig]) -> Build:
    """What makes the model of an arm: beside its zip the expanded decoder, else a zip or tower."""
    return expansion(recipes[ZIP]) if arm == EXPANDED else build


def trained(config: TrainConfig, build: Build = build) -> Path:
    """The model of a run: of one at its end as it lies there, else after training, which goes on
    where it was killed. A model alone says nothing: the best so far is saved all along."""
    folder = Path(config.output)
    if not finished(config) or not (folder / "model").exists():
        print(f"-- {folder.name}, {config.steps} steps", flush=True)
        train(config, resume=True, build=build)
    return folder / "model"


def links(niches: Sequence[str]) -> list[Directed]:
    """Text and every other modality, in both directions, where the demo has them: text shows its
    embeddings, the others a block further than they are fused. No link lies between two others:
    without pairs of them it would learn nothing, and what it says would disturb. One becomes the
    other by the words that the model writes between them."""
    found = list[Directed]()
    for tower, block in product(niches, (1, 2, 3)):
        found += [(TEXT, 0, tower, block), (tower, block + 1, TEXT, block)]
    return found


def judges(name: str, folder: Path) -> dict[str, dict[str, real_judges.Judge]]:
    """What judges a set: {tower: {name of the judge: it}}; those that are trained are trained on
    the manifests in `folder`."""
    named(name)
    if name == "images":
        return {
            "image": {"eye": real_judges.Pictures.trained(folder)},
            TEXT: {"names": real_judges.Names()},
        }
    if name == "motion":
        return {
            "motion": {"ear": real_judges.Motion.trained(folder)},
            TEXT: {"told": real_judges.Told()},
        }
    if name == "actions":
        return {
            "actions": {"simulator": real_judges.Simulator()},
            TEXT: {"simulator": real_judges.Missions()},
        }
    if name == "molecules":
        return {
            "molecule": {"rdkit": real_judges.Chemistry()},
            TEXT: {"words": real_judges.Words()},
        }
    if name == "proteins":
        return {
            "protein": {"kin": real_judges.Proteins.trained(folder)},
            TEXT: {"called": real_judges.Called()},
        }
    digit = real_judges.Digits.trained(folder)
    return {tower: {"digit": digit} for tower in ("speech", "image", TEXT)}


def scored(name: str, folder: Path) -> dict[str, dict[str, real_judges.Scored]]:
    """`judges` as `measurement.measure` wants them. Raises MissingExtra where one cannot judge."""
    found = {
        tower: {each: real_judges.Scored(judge) for each, judge in some.items()}
        for tower, some in judges(name, folder).items()
    }
    for judge in chain.from_iterable(some.values() for some in found.values()):
        measurement.check_needs(judge)
    return found


def measured(
    name: str,
    folder: Path,
    pipeline: Pipeline,
    by: Mapping[str, Mapping[str, real_judges.Scored]],
    limit: int | None = 300,
) -> dict[str, list[Measured]]:
    """What a zip of a set can do, by the set's judges, on each of its tests: model, oracle (what
    the modality keeps of real data) and floor (the answer to another row).

    by: see `scored`. limit: rows of each test, spread over all of it.
    """
    chosen = named(name)
    found = {}
    for test in chosen.tests:
        samples = evenly([*manifests.samples(folder / f"{test}.jsonl")], limit)
        tasks = [*chosen.tasks, *chosen.also]
        found[test] = measurement.measure(pipeline, samples, tasks, judges=by)
    return found


def evenly(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most so many rows, evenly over all: manifests are in the order of classes and people."""
    most = len(rows) if limit is None else min(limit, len(rows))
    return [rows[number * len(rows) // most] for number in range(most)]


def run(
    name: str,
    data: Path,
    output: Path,
    share: float = 1.0,
    limit: int | None = 300,
    which: Sequence[str] = (ZIP,),
) -> dict[str, dict[str, Any]]:
    """All of one set, from the originals to a page: output/data, output/text ... output/zip,
    measured.json and a page for each test. What is done is not done again; a run that was killed
    goes on.

    data: the folder with the originals. share: of all steps. limit: see `measured`. which: of
    `arms`, the zip among them. Returns {arm: {test: [`Measured` as JSON]}}. Raises ZipperError if
    an original is missing, MissingExtra for a package.
    """
    prepare(name, data, output / "data")
    by = scored(name, output / "data")  # before hours of training: one may lack a package
    *towers, zipped = runs(name, output / "data", output, share).values()
    recipes = {Path(config.output).name: config for config in towers}
    recipes |= {arm: config for arm, config in arms(zipped).items() if arm in which}
    place = output / "measured.json"
    told: dict[str, dict[str, Any]] = read_json(place) if place.is_file() else {}
    for part, config in recipes.items():
        model = trained(config, maker(part, recipes))
        if part not in which:
            continue
        pipeline = Pipeline.from_pretrained(model)
        for test, some in measured(name, output / "data", pipeline, by, limit).items():
            told.setdefault(part, {})[test] = [one.to_json() for one in some]
            page = output / f"{test}.html" if part == ZIP else output / f"{part}_{test}.html"
            measurement.write(page, some, f"{name}: {part}, {test}")
            print(f"-- {name}: {part}, {test}\n{measurement.text(some)}", flush=True)
        write_json(place, told)
    return told


def demo(name: str, data: Path | None, output: Path) -> dict[str, dict[str, Any]]:
    """`run` with `SHARES` of the steps, for minutes.

    data: the folder with the originals; None says the digits by the built-in synthesiser and draws
    those of scikit-learn. Raises ZipperError for another set without data.
    """
    if data is None and name != "digits":
        raise ZipperError(
            f"{name} wants --data FOLDER, where its original lies (docs/modalities.md says which). "
            "Give it, or try digits, which come with zipper."
        )
    named(name)
    if data is None and not (output / "data" / LAST).is_file():
        digits.say(output / "said")
    return run(name, data or output / "said", output, SHARES[name], DEMO_ROWS)


def markdown(results: Mapping[str, Any]) -> str:
    """docs/modalities.md, from what `run` wrote. results: by set, its measured.json and "about"."""
    lines = [(Path(__file__).parent / "templates" / "modalities.md").read_text(encoding="utf-8")]
    for name, found in results["sets"].items():
        used = [arm for arm in ARMS if arm in found]
        head = ["test", "task", "metric", *used, "oracle", "floor"]
        lines += [f"### {name}", "", results["about"].get(name, ""), ""]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for test, place in chain.from_iterable(
            product([test], range(len(some))) for test, some in found[ZIP].items()
        ):
            each = {arm: found[arm][test][place] for arm in used}
            one = each[ZIP]
            for metric, systems in one["metrics"].items():
                said = [_said(each[arm]["metrics"].get(metric, {}).get("model")) for arm in used]
                said += [_said(systems.get(system)) for system in ("oracle", "floor")]
                about = [f"{test}, {one['rows']} rows", one["task"], metric]
                lines.append(f"| {' | '.join(about + said)} |")
            nats = [f"{each[arm]['nats']:.3f}" for arm in used]
            lines.append(f"| {test} | {one['task']} | nats a token | {' | '.join(nats)} | | |")
        lines.append("")
    return "\n".join(lines)


def summary(name: str, output: Path) -> str:
    """A set in a sentence or two: the original, rows, steps and sizes of what was run."""
    chosen, folder = named(name), output / "data"
    parts = ["train", "dev", *chosen.tests]
    rows = {part: len(manifests.manifest(folder / f"{part}.jsonl")) for part in parts}
    counted = ", ".join(f"{count:,} of {part}" for part, count in rows.items())
    sizes = []
    for arm in ARMS:
        if (output / arm / "model").exists():
            model = Pipeline.from_pretrained(output / arm / "model").model
            steps = read_json(output / arm / "config.json")["steps"]
            size = sum(p.numel() for p in model.parameters())
            sizes.append(f"{arm} {size / 1e6:.2f} M parameters, {steps:,} steps")
    return f"{chosen.about} Pairs: {counted}. {'; '.join(sizes)}."


def _said(number: Mapping[str, float] | None) -> str:
    if number is None:  # none of the answers has one
        return "none"
    return f"{number['value']:.3g} ({number['low']:.3g} to {number['high']:.3g})"


def _fitted(tower: str, niche: Niche, folder: Path) -> Modality:
    if tower == "actions":  # what a test may hold is known, and not all of it is in the data
        return Symbols(babyai.vocabulary(), "words")
    kind = modality.of_kind(niche.kind)
    return fitting.fit(kind, [folder / niche.alone], tower, niche.settings)


def _texts(chosen: DataSet, folder: Path) -> list[Path]:
    """The manifests that the text tower reads."""
    return [folder / f"{name}.jsonl" for name in ("texts", chosen.beside) if name]


def _beside(name: str) -> list[str]:
    if name == "prose":
        return [text for _, text in prose.lines("text")]
    return [utterance.text for utterance in commands.sentences("text", 20_000)]
