"""The paper's experiments: which cells there are, how one is run, and running them all, for `zipper
reproduce`.

A cell is one joint training on both tasks and its evaluation. Everything is a job: preparing a
corpus, pre-training a tower, searching a learning rate, a cell. A job is one process with one
thread that writes one JSON file, named after the hash of all that decides its content; a job whose
file is there is not run again. What the numbers mean is none of this file's business.
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zipper.audio.disturbance import Disturbance
from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.evaluation import floor_random, floor_template, lines
from zipper.link import LinkConfig
from zipper.modality import load as load_modality
from zipper.model import Zipper
from zipper.pipeline import SHIPPED, Pipeline
from zipper.saving.checkpoint import load
from zipper.saving.files import write_json
from zipper.strand import Segment, collate
from zipper.tasks import Task
from zipper.tower import Tower
from zipper.training import TrainConfig, build, gates, train
from zipper.training.building import Build
from zipper_lab import demo, report
from zipper_lab.baseline import Extend
from zipper_lab.corpora import commands, prose
from zipper_lab.judges import Judge
from zipper_lab.results import (
    BOTH,
    FROZEN,
    JUNCTIONS,
    MATCHED,
    PLAIN,
    ROWS,
    TITLES,
    ZIP,
    plain,
    write,
)

# Raise it when a change of the code changes what a job finds: it is in every file's name.
VERSION = 2

TABLES = tuple(TITLES)
HEADLINE = ("table1", "table2", "figure2", "figure3", "towers")
VARIED = ("figure4a", "figure4b", "shows", "gate", "positions", "depth", "lora")
# Tables of sound: vocoder and judge, the dear part of an evaluation.
HEARD = {"table2", "figure2"}
SILENT = {"table1", "towers"}  # tables that need no produced speech

LORA = "zip, LoRA on text"
#: What each arm has that others have not: fields of TrainConfig.
ARMS: dict[str, dict[str, Any]] = {
    ZIP: {"train": ("speech",)},
    FROZEN: {"train": ()},
    BOTH: {"train": ("text", "speech")},
    JUNCTIONS: {"train": ("speech",), "shows": None},
    LORA: {
        "train": (),
        "lora": {
            "text": {
                "r": 8,
                "lora_alpha": 16,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            }
        },
    },
    PLAIN: {},
    MATCHED: {},
    ROWS: {},
}
BASELINES = (PLAIN, MATCHED, ROWS)
#: What the search of learning rates tries, as many for every arm. A scale on all rates of a zip is
#: no search: new parameters want more than a trained tower bears (docs/log.md). Gates keep 3e-4.
TRIED: dict[str, tuple[dict[str, float], ...]] = {
    FROZEN: tuple({"lr_new": rate} for rate in (1e-3, 2.5e-3, 5e-3, 1e-2)),
    ZIP: tuple(
        {"lr_new": new, "lr_tower": tower} for new, tower in product((2e-3, 5e-3), (2e-4, 5e-4))
    ),
    PLAIN: tuple({"lr_tower": rate} for rate in (1e-3, 2.5e-3, 5e-3, 1e-2)),
}
TRIED |= {
    BOTH: TRIED[ZIP],
    JUNCTIONS: TRIED[ZIP],
    LORA: TRIED[FROZEN],
    MATCHED: TRIED[PLAIN],
    ROWS: TRIED[PLAIN],
}
# Of choices this near to the least dev loss the lowest is taken: what leads in a short run may not
# bear a long one.
NEAR = 0.01
LR_GATE = 3e-4
LINK = {"gate_init": 1.2, "dropout": 0.1}
# Of the noisy test set: without a front the shipped model had 0.3 % at 40 dB, 28 % at 20 dB.
NOISE_DB = 25.0
# Speech reads the text tower's embeddings and, by links of their own, the states of its depth.
_TWICE = [["speech", n, "text", n] for n in (1, 2, 3)]
_TWICE += [
    ["text", shown, "speech", n] for n, shown in product((1, 2, 3), (0, 1, 2, 3)) if shown in (0, n)
]
#: Where towers are read, instead of at text's embeddings and where speech is fused (None: where
#: both are fused, the paper); by all seeds, then by one.
SHOWN: tuple[dict[str, Any] | None, ...] = (
    None,
    {"text": 0, "speech": [2, 3, 4]},
    {"text": "before"},
)
SHOWN_ONCE: tuple[dict[str, Any], ...] = (
    {"shows": {"text": 0, "speech": [4, 4, 4]}},
    {"every": None, "shows": None, "links": _TWICE},
)
TASKS = {"speech -> text": 1.0, "text -> voiced:speech": 1.26}  # the paper's shares (A.3)


# --- what is run and what is found (the schema of results.json) ---


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    name: unique. tables: those it is a part of (`TABLES`). size: "S" or "L", of the text tower.
    changes: fields of TrainConfig that differ from the arm's own; "link" holds fields of
    LinkConfig.
    """

    name: str
    tables: tuple[str, ...]
    arm: str
    size: str
    corpus: str
    pairs: int
    seed: int
    changes: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One task on one test set by one judge. edits; words and characters of the reference: per
    sentence. unended: share of segments that were cut at their cap."""

    task: str
    test: str
    judge: str
    edits: list[int]
    words: list[int]
    characters: list[int]
    unended: float


@dataclass(frozen=True)
class Result:
    """What a cell gave.

    parameters: total, trained, new. rates: learning rates, chosen on dev. dev: nats per token of
    each task at the best step. perplexity: per tower "before", "after" (alone), "zip" (the pair's
    other modality in front), "unrelated" (another pair's), and for text "identical" (1 = logits
    equal to the bit). core_s: of the process that ended it.
    """

    cell: Cell
    parameters: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    best_step: int = 0
    core_s: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    dev: dict[str, float] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    continuations: dict[str, list[str]] = field(default_factory=dict)
    gates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Result":
        """The inverse of `asdict`."""
        cell = Cell(**{**found["cell"], "tables": tuple(found["cell"]["tables"])})
        return cls(
            **{**found, "cell": cell, "scores": [Score(**score) for score in found["scores"]]}
        )


# --- the plan ---


@dataclass(frozen=True)
class Budget:
    """How much a preset does.

    seeds: of the headline cells on the first corpus; all else has one. pairs: all there are. steps:
    of a cell with all of them, few: with less, ablation: that varies one thing, large: of size L,
    prose: on prose. search: steps of each short run of the search. sweep: numbers of pairs beside
    all, the first two with all seeds. shapes: of towers that are pre-trained here, for tower_steps
    steps, on so many `unpaired` utterances of prose. arms, values: how many at most in side tables
    and ablations.
    """

    name: str
    corpora: tuple[str, ...]
    seeds: int
    pairs: int
    steps: int
    few: int
    ablation: int
    large: int
    prose: int
    search: int
    sweep: tuple[int, ...]
    test: int
    dev: int
    tower_steps: int
    shapes: dict[str, dict[str, Any]]
    unpaired: int
    arms: int = 6
    values: int = 3
    batch: int = 32
    mixed_precision: str = "no"


LARGE = demo.TEXT_TOWER | {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8}
SHAPES = {"text-S": demo.TEXT_TOWER, "text-L": LARGE, "speech": demo.SPEECH_TOWER}
CPU = Budget(
    name="cpu",
    corpora=("commands", "prose"),
    seeds=3,
    pairs=8000,
    steps=600,
    few=200,
    ablation=250,
    large=400,
    prose=400,
    search=80,
    sweep=(800, 80, 2400, 400, 240, 24, 8),
    test=300,
    dev=100,
    tower_steps=1200,
    shapes=SHAPES,
    unpaired=20_000,
)
QUICK = replace(
    CPU,
    name="quick",
    seeds=1,
    pairs=400,
    # No two alike: what differs in nothing else would be one row of the tables.
    steps=20,
    few=19,
    ablation=21,
    large=22,
    prose=20,
    search=4,
    sweep=(40,),
    test=24,
    dev=16,
    tower_steps=40,
    unpaired=400,
    arms=2,
    values=1,
)
_WIDE = demo.TEXT_TOWER | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
_WIDER = _WIDE | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
GPU = replace(
    CPU,
    name="gpu",
    corpora=("prose",),
    pairs=40_000,
    steps=3000,
    few=800,
    ablation=1000,
    large=3000,
    prose=3000,
    search=300,
    sweep=(4000, 400, 12_000, 1200, 120, 40),
    test=600,
    dev=300,
    tower_steps=10_000,
    shapes={"text-S": _WIDE, "text-L": _WIDER, "speech": _WIDE},
    unpaired=60_000,
    batch=64,
    mixed_precision="bf16",
)
BUDGETS = {"quick": QUICK, "cpu": CPU, "gpu": GPU}


def budget(preset: str, quick: bool = False) -> Budget:
    """The budget of a preset. quick: a few steps for every table, on the preset's corpora. Raises
    ZipperError for unknown ones."""
    if preset not in BUDGETS:
        raise ZipperError(f"There is no preset {preset!r}. Take one of {', '.join(BUDGETS)}.")
    return replace(QUICK, corpora=BUDGETS[preset].corpora) if quick else BUDGETS[preset]


def plan(preset: str, quick: bool = False) -> list[Cell]:
    """The cells of a preset, the most important first: a run that is stopped early has the
    headlines."""
    return cells(budget(preset, quick))


def cells(spend: Budget) -> list[Cell]:
    """All cells of a budget, see `plan`."""
    first, *others = spend.corpora
    found: dict[str, Cell] = {}

    def add(
        arm: str,
        tables: Sequence[str],
        seed: int = 0,
        pairs: int = spend.pairs,
        where: str = first,
        size: str = "S",
        **changes: Any,
    ) -> None:
        steps = spend.steps
        if pairs < spend.pairs:
            steps = spend.few
        elif size == "L":
            steps = spend.large
        elif where == "prose":
            steps = spend.prose

        said = [f"{key}={json.dumps(value, sort_keys=True)}" for key, value in changes.items()]
        name = "/".join([where, size, arm, f"pairs={pairs}", *said, f"seed={seed}"])
        found[name] = Cell(
            name, tuple(tables), arm, size, where, pairs, seed, {"steps": steps} | changes
        )

    main = (ZIP, MATCHED, FROZEN, PLAIN)
    for seed in range(spend.seeds):
        for arm in main:
            add(arm, HEADLINE, seed)
        for pairs, arm in product(spend.sweep[:2], main):
            add(arm, ("figure3",), seed, pairs)
    add(ROWS, HEADLINE)
    for seed, arm in product(range(spend.seeds), (JUNCTIONS, BOTH)):
        add(arm, HEADLINE, seed)
    for where, arm in product(others, main[: spend.arms]):
        add(arm, HEADLINE, where=where)
    for arm in main[:2]:
        add(arm, ("schedule",), steps=2 * spend.steps)
        add(arm, ("schedule",), pairs=spend.sweep[0], steps=spend.steps)
    for pairs, arm in product(spend.sweep[2:], main[:2]):
        add(arm, ("figure3",), 0, pairs)

    # Both towers frozen: what differs is the links, and it learns fastest.
    short: dict[str, Any] = {"steps": spend.ablation}
    for seed in range(spend.seeds):
        add(FROZEN, ("shows",) if seed else VARIED, seed, **short)
    for kind in ("paper", "residual")[: spend.values]:
        add(FROZEN, ("figure4a",), input_projection=kind, **short)
    for blocks in ((2,), (1, 3))[: spend.values]:
        junctions = [{"text": n, "speech": n} for n in blocks]
        add(FROZEN, ("figure4b",), every=None, junctions=junctions, **short)
    for shows, seed in product(SHOWN[: spend.values], range(spend.seeds)):
        add(FROZEN, ("shows",), seed, shows=shows, **short)
    for changes in SHOWN_ONCE[: spend.values]:
        add(FROZEN, ("shows",), **changes, **short)
    for gate in (0.0, 0.6)[: spend.values]:
        add(FROZEN, ("gate",), link={"gate_init": gate}, **short)
    add(FROZEN, ("positions",), link={"rotary": False}, **short)
    for depth in (1, 0, 3)[: spend.values]:  # a link without a projection cannot be calibrated
        add(FROZEN, ("depth",), calibrate=0, link={"projection_depth": depth}, **short)
    add(LORA, ("lora",), **short)

    for arm in main[: min(3, spend.arms)]:
        add(arm, HEADLINE, size="L")
    return list(found.values())


# --- jobs ---


@dataclass(frozen=True)
class Job:
    """A process to be.

    kind: the function in `KINDS` that does it. spec: all that decides what it finds, beside its
    needs, the jobs that must be done before.
    """

    kind: str
    name: str
    spec: dict[str, Any]
    needs: tuple["Job", ...] = ()

    @property
    def key(self) -> str:
        """Hash of what decides the result."""
        said = json.dumps(
            [VERSION, self.kind, self.name, self.spec, [need.key for need in self.needs]],
            sort_keys=True,
        )
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    @property
    def readable(self) -> str:
        """A name for files."""
        plain = "".join(c if c.isalnum() or c in ".=-" else "_" for c in self.name)
        return f"{plain[:120]}-{self.key}"

    def path(self, output: Path) -> Path:
        """Its file; it exists only once the job is done."""
        return output / f"{self.kind}s" / f"{self.readable}.json"


def jobs(some: Sequence[Cell], spend: Budget, judge: str = "") -> list[Job]:
    """What these cells need and the cells, in an order in which they can be run one after the
    other; each once. judge: see `reproduce`."""
    found: dict[str, Job] = {}

    def once(job: Job) -> Job:
        return found.setdefault(job.key, job)

    common = {
        "dev": spend.dev,
        "test": spend.test,
        "batch": spend.batch,
        "mixed_precision": spend.mixed_precision,
    }

    def stands_on(name: str, size: str) -> tuple[Job, ...]:
        """The corpus and the towers that it lacks."""
        rows: dict[str, Any] = {"pairs": spend.pairs, "dev": spend.dev, "test": spend.test}
        if name == "prose":
            rows["unpaired"], fresh = spend.unpaired, [f"text-{size}", "speech"]
        else:
            rows |= {"unpaired": 0, "judge": judge}
            fresh = [f"text-{size}"] * (size != "S")
        corpus = once(Job("corpus", name, {"corpus": name} | rows))

        training = {
            "steps": spend.tower_steps,
            "batch": spend.batch,
            "mixed_precision": spend.mixed_precision,
        }
        specs = [{"tower": tower, "shape": spend.shapes[tower]} | training for tower in fresh]
        towers = [Job("tower", f"{name}-{spec['tower']}", spec, (corpus,)) for spec in specs]
        return corpus, *map(once, towers)

    for cell in some:
        # One search an arm, at size S with all pairs of the first corpus: with 400 pairs it found
        # the same (docs/log.md).
        where = spend.corpora[0]
        probe = Cell("", (), cell.arm, "S", where, spend.pairs, 0, {"steps": spend.search})
        tried = {"cell": asdict(probe), "tried": TRIED[cell.arm], "near": NEAR, **common}
        search = once(Job("rate", f"{where}/{cell.arm}", tried, stands_on(where, "S")))
        stands = stands_on(cell.corpus, cell.size)
        once(Job("reference", cell.corpus, {}, stands[:1]))
        once(Job("cell", cell.name, {"cell": asdict(cell), **common}, (*stands, search)))
    return list(found.values())


# --- what a job does, in a process of its own ---


@dataclass(frozen=True)
class Corpus:
    """What the cells of a corpus stand on, as paths.

    modalities, towers: folders by name; towers are called text-S, text-L, speech. alone: per
    modality the manifests to pre-train on and its dev part. tests: manifests by test set.
    sentences: the first `known` of them make the judge's language model, of n-grams to `order`;
    ear: its acoustic model, "" for its own. judge: a pipeline that is the second judge, by units;
    None where there is none.
    """

    modalities: dict[str, str]
    towers: dict[str, str]
    data: str
    dev: str
    tests: dict[str, str]
    alone: dict[str, list[str]]
    sentences: str
    judge: str | None
    known: int = demo.DOMAIN
    order: int = 2
    ear: str = ""


#: What the needed jobs found: "corpus", "tower" (all of them as one dict) and "rate".
Needs = Mapping[str, Any]


def work(path: str) -> None:
    """Do the job that a file describes and write what it found, whole or not at all; what the
    runner starts."""
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    job = json.loads(Path(path).read_text())
    needs: dict[str, Any] = {}
    for need in job["needs"]:
        done = json.loads(Path(need).read_text())
        needs[done["kind"]] = needs.get(done["kind"], {}) | done["found"]
    found = KINDS[job["kind"]](job["spec"], needs, Path(job["folder"]))
    whole = {
        "kind": job["kind"],
        "name": job["name"],
        "core_s": round(time.process_time(), 1),
        "found": found,
    }
    _write(Path(job["result"]), whole)


def _end_with(parent: int) -> None:
    """A worker whose runner was killed must not write beside the next runner's."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def prepare_corpus(spec: Mapping[str, Any], needs: Needs, folder: Path) -> dict[str, Any]:
    """Manifests, modalities and given towers of a corpus."""
    return asdict({"commands": _commands, "prose": _prose}[spec["corpus"]](spec, folder))


def _commands(spec: Mapping[str, Any], folder: Path) -> Corpus:
    """The built-in corpus in the shipped units; its towers of size S are the shipped ones."""
    pipeline = Pipeline.from_pretrained()
    for name, part, n in (
        ("pairs", "pairs", spec["pairs"]),
        ("dev", "dev", spec["dev"]),
        ("test", "test", spec["test"]),
    ):
        data.write(folder / f"{name}.jsonl", commands.rows(part, n, pipeline.units, workers=1))
    said = data.manifest(folder / "test.jsonl")
    heard = zip(said, demo.recordings(said), strict=True)
    noise = Disturbance(snr_db=NOISE_DB)
    noisy = [
        row | {"speech": pipeline.units.encode(noise.apply(audio, n))}
        for n, (row, audio) in enumerate(heard)
    ]
    data.write(folder / "test_noisy.jsonl", noisy)
    for name, part, n in (("text", "text", 60_000), ("text_dev", "dev", spec["dev"])):
        data.write(
            folder / f"{name}.jsonl", [{"text": u.text} for u in commands.sentences(part, n)]
        )
    return Corpus(
        modalities={name: str(SHIPPED / "modalities" / name) for name in ("text", "speech")},
        towers={"text-S": str(demo.TOWERS["text"]), "speech": str(demo.TOWERS["speech"])},
        data=str(folder / "pairs.jsonl"),
        dev=str(folder / "dev.jsonl"),
        tests={
            "commands": str(folder / "test.jsonl"),
            "commands-noisy": str(folder / "test_noisy.jsonl"),
        },
        alone={"text": [str(folder / "text.jsonl"), str(folder / "text_dev.jsonl")]},
        sentences=str(folder / "text.jsonl"),
        judge=spec["judge"] or str(SHIPPED),
    )


def _prose(spec: Mapping[str, Any], folder: Path) -> Corpus:
    """Open vocabulary; both towers are pre-trained here, and no second judge knows its units."""
    names = {
        "pairs": spec["pairs"],
        "dev": spec["dev"],
        "test": spec["test"],
        "speech": spec["unpaired"],
    }
    prose.prepare(folder, **names, workers=1)
    known = prose.domain()
    data.write(folder / "sentences.jsonl", [{"text": line} for line in known])
    at = {name: str(folder / f"{name}.jsonl") for name in (*prose.MANIFESTS, "sentences")}
    return Corpus(
        modalities={name: str(folder / name) for name in ("text", "speech")},
        towers={},
        data=at["pairs"],
        dev=at["dev"],
        tests={"prose-clean": at["test_clean"], "prose-noisy": at["test_noisy"]},
        alone={name: [at[name], at["dev"]] for name in ("text", "speech")},
        sentences=at["sentences"],
        judge=None,
        known=len(known),
        order=3,
        ear=str(folder / "judge"),
    )


def pretrain(spec: Mapping[str, Any], needs: Needs, folder: Path) -> dict[str, Any]:
    """One tower alone; returns its folder by its name."""
    train(tower_recipe(spec, needs, folder), resume=True)
    return {spec["tower"]: str(folder / "model" / "towers" / spec["tower"].partition("-")[0])}


def tower_recipe(spec: Mapping[str, Any], needs: Needs, folder: Path) -> TrainConfig:
    """The recipe by which a tower is pre-trained."""
    corpus, steps = Corpus(**needs["corpus"]), spec["steps"]
    modality = spec["tower"].partition("-")[0]
    tasks = {"-> text": 1.0}
    if modality == "speech":
        tasks = {"-> speech": 0.5, "-> voiced:speech": 0.5}
    return TrainConfig(
        output=str(folder),
        towers={modality: spec["shape"]},
        modalities={modality: corpus.modalities[modality]},
        data=corpus.alone[modality][0],
        dev=corpus.alone[modality][1],
        tasks=tasks,
        steps=steps,
        batch=spec["batch"],
        # 5e-4 is the paper's for its large ones (A.3).
        lr_tower=2e-3 if spec["shape"]["hidden_size"] < 512 else 5e-4,
        mixed_precision=spec["mixed_precision"],
        corrupt={"speech": 0.05} if modality == "speech" else {},
        warmup=min(40, 1 + steps // 8) if steps < 2000 else 200,
        eval_every=max(1, steps // 8),
        patience=3,
        save_every=max(1, steps // 8),
        trackers=(),
    )


def search_rates(spec: Mapping[str, Any], needs: Needs, folder: Path) -> dict[str, Any]:
    """A short run with each choice of learning rates that is tried, the lowest first: the first is
    taken whose dev loss is within `near` of the least."""
    losses = []
    for n, rates in enumerate(spec["tried"]):
        config = configure(spec, needs, folder / str(n), rates)
        train(config, resume=True, build=builder(spec, needs, folder))
        found = _record(config)["dev"].values()
        losses.append(statistics.fmean(found) if found else float("inf"))
        shutil.rmtree(config.output)
    taken = next(n for n, loss in enumerate(losses) if loss <= (1 + spec["near"]) * min(losses))
    return {"rates": spec["tried"][taken], "tried": spec["tried"], "dev": losses}


def run_cell(spec: Mapping[str, Any], needs: Needs, folder: Path) -> dict[str, Any]:
    """Train a cell and evaluate its best model by dev loss: a `Result` as plain data."""
    cell, corpus = _cell(spec), Corpus(**needs["corpus"])
    config = configure(spec, needs, folder, needs["rate"]["rates"])
    pipeline = train(config, resume=True, build=builder(spec, needs, folder))
    pipeline.model.to("cuda" if torch.cuda.is_available() else "cpu")
    record, model = _record(config), pipeline.model
    sizes = {"total": model.parameters(), "new": model.new_parameters().values()}
    sizes["trained"] = (p for p in model.parameters() if p.requires_grad)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = Result(
        cell,
        parameters={name: sum(p.numel() for p in some) for name, some in sizes.items()},
        steps=metrics[-1]["step"],
        best_step=record["step"],
        rates=dict(needs["rate"]["rates"]),
        dev=record["dev"],
        scores=scores(pipeline, corpus, cell.tables),
        gates=gates(model),
    )
    if "towers" in cell.tables:
        texts = [row["text"] for row in data.manifest(Path(corpus.dev), 3)]
        perplexity, continuations = harm(
            pipeline, _towers(cell, needs), Path(corpus.dev), spec["dev"], texts
        )
        result = replace(result, perplexity=perplexity, continuations=continuations)
    shutil.rmtree(folder / "checkpoints")
    return asdict(replace(result, core_s=round(time.process_time(), 1)))


def references(spec: Mapping[str, Any], needs: Needs, folder: Path) -> dict[str, Any]:
    """Oracle (true units through the judges) and floor (another sentence of the same kind) of every
    test set."""
    corpus = Corpus(**needs["corpus"])
    judges, found = Judges(corpus), {"oracle": list[Score](), "floor": list[Score]()}
    for test, path in corpus.tests.items():
        rows = data.manifest(Path(path))
        texts = [row["text"] for row in rows]
        templates = [row["template"] for row in rows if "template" in row]
        other = floor_random(texts)
        if len(templates) == len(texts):
            other = floor_template(texts, templates)
        found["floor"].append(_score("asr", test, demo.EXACT, texts, other))
        if not _noisy(test):
            heard_by = judges.hear([row["speech"] for row in rows], aloud=True)
            for judge, heard in heard_by.items():
                found["oracle"].append(_score("tts", test, judge, texts, heard))
                found["floor"].append(_score("tts", test, judge, texts, other))

    where, results = Path(corpus.data).parent.name.partition("-")[0], {}
    for arm, by in found.items():
        cell = Cell(f"{where}/{arm}", TABLES, arm, "S", where, 0, 0, {})
        results[arm] = asdict(Result(cell, scores=by))
    return results


KINDS: dict[str, Callable[[Mapping[str, Any], Needs, Path], dict[str, Any]]] = {
    "corpus": prepare_corpus,
    "tower": pretrain,
    "rate": search_rates,
    "reference": references,
    "cell": run_cell,
}


def configure(
    spec: Mapping[str, Any], needs: Needs, folder: Path, rates: Mapping[str, float]
) -> TrainConfig:
    """The recipe of a cell: what all have in common, the arm's own, the cell's changes."""
    cell, corpus = _cell(spec), Corpus(**needs["corpus"])
    changes = dict(cell.changes)
    steps = changes["steps"]
    fields: dict[str, Any] = {
        "output": str(folder),
        "towers": _towers(cell, needs),
        "modalities": corpus.modalities,
        "data": corpus.data,
        "dev": corpus.dev,
        "tasks": TASKS,
        "rows": cell.pairs,
        "batch": spec["batch"],
        "corrupt": {"speech": 0.05},
        "warmup": min(40, 1 + steps // 8) if steps < 2000 else 200,
        "eval_every": max(5, steps // 10),
        "eval_rows": spec["dev"],
        # The best by dev is kept, but no run is cut: with few pairs the loss on dev rises before it
        # falls (docs/log.md).
        "patience": 0,
        "save_every": max(1, steps // 4),
        "mixed_precision": spec["mixed_precision"],
        "trackers": (),
        "seed": cell.seed,
    }
    if cell.arm not in BASELINES:
        link = LinkConfig(**(LINK | changes.pop("link", {})))
        rows = 500 if steps > 50 else 50  # 500 take 15 core-s, as long as so few steps do
        fields |= {
            "link": link,
            "every": {"text": 1, "speech": 1},
            "calibrate": rows,
            "input_projection": "none",
            "lr_gate": LR_GATE,
        }
    return TrainConfig(**(fields | ARMS[cell.arm] | dict(rates) | changes))


def builder(spec: Mapping[str, Any], needs: Needs, folder: Path) -> Build:
    """What makes the model of a cell's recipe."""
    cell = _cell(spec)
    if cell.arm not in BASELINES:
        return build
    if cell.arm != MATCHED:
        return Extend("text", ("speech",) if cell.arm == ROWS else ())
    like = configure({**spec, "cell": asdict(replace(cell, arm=ZIP))}, needs, folder, {})
    calibrated = replace(like, link=replace(like.link, whiten=True))
    return Extend("text", parameters=_size(calibrated))


def scores(pipeline: Pipeline, corpus: Corpus, tables: Sequence[str]) -> list[Score]:
    """What the tables ask for: speech to text on every test set; text to speech on the clean ones,
    if any table needs it."""
    judges, found = Judges(corpus), []
    for test, path in corpus.tests.items():
        rows = data.manifest(Path(path))
        texts = [row["text"] for row in rows]
        written = demo.transcribe(pipeline, [row["speech"] for row in rows])
        wrote, ended = [s.content for s in written], [s.ended for s in written]
        found.append(_score("asr", test, demo.EXACT, texts, wrote, ended))
        if {*tables} <= SILENT or _noisy(test):
            continue

        said = demo.speak(pipeline, texts, [row["voice"] for row in rows])
        units, ended = [s.content for s in said], [s.ended for s in said]
        for judge, heard in judges.hear(units, aloud=bool(HEARD & {*tables})).items():
            found.append(_score("tts", test, judge, texts, heard, ended))
    return found


class Judges:
    """Who judges produced speech on a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.units = load_modality(Path(corpus.modalities["speech"]))

    def hear(self, units: Sequence[Sequence[int]], aloud: bool) -> dict[str, list[str]]:
        """What each judge understands. aloud: as sound too, 0.15 core-s an utterance; always so
        where no judge reads units."""
        heard = {}
        if self.corpus.judge is not None:
            second = Pipeline.from_pretrained(self.corpus.judge)
            heard[demo.SECOND] = [s.content for s in demo.transcribe(second, units)]
        if aloud or not heard:
            known = data.manifest(Path(self.corpus.sentences), self.corpus.known)
            sentences = [row["text"] for row in known]
            judge = Judge.from_sentences(sentences, self.corpus.order, self.corpus.ear)
            heard[judge.name] = [judge.transcribe(self.units.decode(list(ids))) for ids in units]
        return heard


def _score(
    task: str,
    test: str,
    judge: str,
    texts: Sequence[str],
    heard: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> Score:
    compared = lines(texts, heard)
    unended = 1 - statistics.fmean(ended) if ended else 0.0
    edits, words = [line.word_edits for line in compared], [line.words for line in compared]
    return Score(task, test, judge, edits, words, [line.characters for line in compared], unended)


def _noisy(test: str) -> bool:
    """A noisy test set has the sentences of a clean one: there is nothing more to say aloud."""
    return test.endswith("noisy")


@torch.inference_mode()
def harm(
    pipeline: Pipeline, towers: Mapping[str, str], dev: Path, limit: int, texts: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Perplexity of every tower on dev rows before and after (see `Result`), and how the text tower
    goes on after three words."""
    rows = data.read(dev, pipeline.modalities, limit)
    device = next(pipeline.model.parameters()).device
    found: dict[str, dict[str, float]] = {}
    for name, other, produced in (("text", "speech", "text"), ("speech", "text", "voiced:speech")):
        bare = Tower.load(towers[name], dtype=torch.float32).to(device)
        alone, paired = Task.parse(f"-> {produced}"), Task.parse(f"{other} -> {produced}")
        turned = [{**row, other: rows[i - 1][other]} for i, row in enumerate(rows)]
        before, wanted = _nats(bare, pipeline, name, alone, rows)
        after, got = _nats(None, pipeline, name, alone, rows)
        losses = {
            "before": before,
            "after": after,
            "zip": _nats(None, pipeline, name, paired, rows)[0],
            "unrelated": _nats(None, pipeline, name, paired, turned)[0],
        }
        same = all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        found[name] = {when: math.exp(loss) for when, loss in losses.items()}
        found[name]["identical"] = float(same)
    return found, _continuations(pipeline, towers["text"], texts)


def _nats(
    bare: Tower | None, pipeline: Pipeline, name: str, task: Task, rows: Sequence[data.Row]
) -> tuple[float, list[Tensor]]:
    """Nats per token of one modality, by a bare tower or else by the whole model, and all
    logits."""
    model, total, count, seen = pipeline.model, 0.0, 0, []
    device = next(model.parameters()).device
    for start in range(0, len(rows), 32):
        some = [task.segments(row) for row in rows[start : start + 32]]
        batch = collate(some, model.ends()).to(device)
        logits = bare(batch.strands[name]) if bare else model(batch.strands, outputs=(name,))[name]

        where = batch.weights[name] > 0
        targets = batch.targets[name][where]
        total += float(F.cross_entropy(logits[where].float(), targets, reduction="sum"))
        count += int(where.sum())
        seen.append(logits)
    return total / count, seen


def _continuations(pipeline: Pipeline, tower: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """How the text tower alone and the model, given text only, go on after the first three
    words."""
    text, model = pipeline.modalities["text"], pipeline.model
    begins = [" ".join(line.split()[:3]) for line in texts]
    base = Zipper.from_towers(
        {"text": Tower.load(tower, dtype=torch.float32)}, ends={"text": model.ends()["text"]}
    )
    base.to(next(model.parameters()).device)

    def goes_on(some: Any, begin: str) -> str:
        plan = [Segment("text", text.encode(begin))]
        (said,) = some.generate([], plan, limits={"text": 24})
        return str(text.decode(said.content))

    return {
        "before": [goes_on(base, begin) for begin in begins],
        "after": [goes_on(model, begin) for begin in begins],
    }


def _cell(spec: Mapping[str, Any]) -> Cell:
    return Cell(**{**spec["cell"], "tables": tuple(spec["cell"]["tables"])})


def _towers(cell: Cell, needs: Needs) -> dict[str, str]:
    folders = needs["corpus"]["towers"] | needs.get("tower", {})
    return {"text": folders[f"text-{cell.size}"], "speech": folders["speech"]}


def _size(config: TrainConfig) -> int:
    """Parameters of the model that a recipe begins with."""
    modalities = {name: load_modality(Path(folder)) for name, folder in config.modalities.items()}
    return sum(p.numel() for p in build(config, modalities, [{}]).parameters())


def _record(config: TrainConfig) -> dict[str, Any]:
    """Step and dev losses of the best model of a run."""
    return load(Path(config.output) / "model")[1]


# --- running them ---


def cost(job: Job) -> float:
    """Core-seconds that a job takes, about: measured on two cores of 2026 without a GPU, for towers
    of size S and batches of 32."""
    spec, start = job.spec, 6.0
    if job.kind == "corpus":
        return start + 0.012 * (spec["pairs"] + spec["unpaired"])
    if job.kind == "reference":
        return start + 120
    if job.kind == "tower":
        return start + spec["steps"] * 0.25
    cell = _cell(spec)
    step = {FROZEN: 0.35, MATCHED: 0.95, PLAIN: 0.26, ROWS: 0.26}.get(cell.arm, 0.52)
    start += 6.0 if cell.arm in BASELINES else 15.0
    step *= spec["batch"] / 32
    if cell.size == "L":
        step *= 1.6
    if cell.corpus == "prose":
        step *= 1.6
    if job.kind == "rate":
        return start + len(spec["tried"]) * (3 + 1.1 * cell.changes["steps"] * step)
    heard = 0.15 if HEARD & {*cell.tables} else 0.0
    said = 0.0 if {*cell.tables} <= SILENT else 0.1
    return start + 1.1 * cell.changes["steps"] * step + job.spec["test"] * (0.03 + said + heard)


Start = Callable[[Path, Path], subprocess.Popen[bytes]]


def start_worker(told: Path, log: Path) -> subprocess.Popen[bytes]:
    """A process with one thread that does the job described in a file."""
    one = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TQDM_DISABLE": "1",
    }
    code = "import sys; from zipper_lab.experiments import work; work(sys.argv[1])"
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(told)], env=os.environ | one, stdout=file, stderr=file
        )


def execute(
    queue: Sequence[Job],
    output: Path,
    workers: int,
    done: Callable[[Job], None],
    start: Start = start_worker,
) -> dict[str, str]:
    """Run every job whose file is not there, as many side by side as workers, each when its needs
    are done. done: called after each.

    Returns {name of a job: why it has no result}; the others go on.
    """
    waiting = [job for job in queue if not job.path(output).exists()]
    total, failed, lost = len(waiting), dict[str, str](), set[str]()
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    guessed_s = measured_s = 0.0
    try:
        while waiting or running:
            for job in [job for job in waiting if any(need.key in lost for need in job.needs)]:
                lacking = next(need for need in job.needs if need.key in lost)
                failed[job.name] = f"{lacking.kind} {lacking.name} has no result"
                lost.add(job.key)
                waiting.remove(job)

            ready = [
                job for job in waiting if all(need.path(output).exists() for need in job.needs)
            ]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                process = start(_told(job, output), _log(job, output))
                running[job.key] = job, process, time.monotonic()

            for key, (job, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                guessed_s += cost(job)
                measured_s += time.monotonic() - began
                if job.path(output).exists():
                    done(job)
                else:
                    failed[job.name] = _why(job, output, process.returncode)
                    lost.add(key)

                left = sum(map(cost, [*waiting, *(other for other, _, _ in running.values())]))
                minutes = left * measured_s / guessed_s / workers / 60
                over = total - len(waiting) - len(running)
                print(
                    f"-- {over} of {total} jobs done, about {minutes:.0f} minutes left", flush=True
                )
            time.sleep(0.2)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.wait()
    return failed


def _log(job: Job, output: Path) -> Path:
    """Where a worker leaves what it says."""
    return output / "logs" / f"{job.readable}.log"


def _why(job: Job, output: Path, code: int) -> str:
    """Why a job has no result, as its worker said it; it is printed."""
    said = _log(job, output).read_text(errors="replace").strip().splitlines()
    why = said[-1] if said else f"exit code {code}"
    print(f"FAILED {job.kind} {job.name}: {why}", file=sys.stderr, flush=True)
    return why


def _told(job: Job, output: Path) -> Path:
    """The file that tells a worker what to do."""
    path = output / "told" / f"{job.readable}.json"
    (output / "logs").mkdir(parents=True, exist_ok=True)
    content = {
        "kind": job.kind,
        "name": job.name,
        "spec": job.spec,
        "needs": [str(need.path(output).absolute()) for need in job.needs],
        "folder": str((output / "work" / job.readable).absolute()),
        "result": str(job.path(output).absolute()),
    }
    _write(path, content)
    return path


def reproduce(
    preset: str,
    output: Path,
    quick: bool = False,
    only: Sequence[str] = (),
    workers: int = 2,
    judge: str = "",
    command: str = "",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the experiments of a preset; go on where an earlier run stopped. Prints a table after
    each cell and rewrites results.json. only: of `TABLES`. judge: a pipeline as second judge on the
    commands, instead of the shipped one.

    Returns the content of results.json, and {job: why it has no result}.
    """
    if unknown := sorted({*only} - {*TABLES}):
        raise ZipperError(f"There is no table {unknown[0]!r}. Take some of {', '.join(TABLES)}.")
    spend = budget(preset, quick)
    wanted = [cell for cell in cells(spend) if not only or {*cell.tables} & {*only}]
    queue = jobs(wanted, spend, judge)
    minutes = sum(cost(job) for job in queue if not job.path(output).exists()) / workers / 60
    print(
        f"{len(queue)} jobs, {sum(job.kind == 'cell' for job in queue)} of them cells; about "
        f"{minutes:.0f} minutes",
        flush=True,
    )

    def gather() -> dict[str, Any]:
        found = [
            json.loads(job.path(output).read_text()) for job in queue if job.path(output).exists()
        ]
        results = [one["found"] for one in found if one["kind"] == "cell"]
        for one in (one for one in found if one["kind"] == "reference"):
            results += one["found"].values()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        content = {
            "preset": spend.name,
            "commit": report.commit(),
            "command": command,
            "versions": report.environment(),
            "machine": f"{os.cpu_count()} cores, {gpu}",
            "core_hours": round(sum(one["core_s"] for one in found) / 3600, 3),
            "results": results,
        }
        _write(output / "results.json", content)
        return content

    def done(job: Job) -> None:
        if job.kind != "cell":
            return
        if shown := [name for name in job.spec["cell"]["tables"] if name in (only or TABLES)]:
            print(f"\n{plain(gather(), shown)}", flush=True)

    failed = execute(queue, output, workers, done)
    content = gather()
    print(f"\n{plain(content, only)}", flush=True)
    if content["results"]:
        write(content, output)
    return content, failed
