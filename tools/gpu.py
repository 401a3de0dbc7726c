"""Ten minutes of a GPU: `python tools/gpu.py`, or `make gpu`. Sections in order of worth, each in a
process with a cap of its own.

Needs torch with CUDA and transformers; what a section needs beyond that it names, and it is left
out where that is missing. What is
found is written as it comes: gpu_<hardware>_<yyyymm>.json and .md in --output (the variable OUT, or
benchmarks/results), whole at every moment. A section that fails leaves its traceback there, one
that goes on too long is ended, and the next one begins. With --size tiny all of it runs on a CPU,
so that the first real run finds no typing errors.

The last section goes on where an earlier call left it, if its folder (--state, runs/gpu) is still
there.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, Any]
Tell = Callable[[Found], None]  # takes what a section has found so far

ENDING_S = 10.0  # between being asked to end and being killed: training saves a checkpoint in it
EVERY_S = 0.5  # how often the runner looks
LEAST_S = 15.0  # less is not worth a start


@dataclass(frozen=True)
class Size:
    """How much is done. models: of the benchmarks. steps: of each tower and of alignment, as a
    share of the preset's."""

    device: str
    precision: str
    models: tuple[str, ...]
    batches: tuple[int, ...]
    rounds: int
    warm: int
    tokens: int
    source: int
    pairs: Mapping[str, int]
    tests: tuple[str, ...]
    share: float
    limit_s: float


#: Test files, the most telling first; of each the tests that use the device.
TESTS = ("graphs", "fused", "packing", "link", "engine", "training", "bench_decode")
#: The vocabulary of 152 thousand decides how many pairs there is room for: stock transformers makes
#: logits of all tokens at once.
SIZES = {
    "gpu": Size(
        "cuda",
        "bfloat16",
        ("0.5b", "1.5b"),
        (1, 8, 64),
        30,
        3,
        16,
        128,
        {"0.5b": 32, "1.5b": 16},
        TESTS,
        0.2,
        540.0,
    ),
    "tiny": Size(
        "cpu", "float32", ("tiny",), (1, 3), 2, 1, 3, 12, {"tiny": 2}, ("link",), 0.0, 540.0
    ),
}
PEERS = ("zip", "bare", "stock", "expanded", "mllama", "int8", "blind")
STEPS = ("bare", "frozen", "trained", "expanded", "padded", "packed", "flex")


@dataclass(frozen=True)
class Section:
    """A part of the run. cap_s: its most seconds; the last one gets what is left. needs:
    packages."""

    name: str
    cap_s: float
    run: Callable[["Told"], Found]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """What a section's process knows. seconds: until it will be ended."""

    size: Size
    seconds: float
    state: Path
    tell: Tell
    model: str = ""


# --- sections ---


def limits(told: Told) -> Found:
    """The device's name, its peaks by name and as measured."""
    from zipper_lab import bench

    return {"limits": bench.limits(told.size.device)}


def tests(told: Told) -> Found:
    """The tests that use the device, a process a file, all at once: they are small, and wait for
    their kernels to be launched."""
    folder = told.state / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    for name in told.size.tests:
        said = folder / f"{name}.json"
        said.unlink(missing_ok=True)
        code = "import sys; sys.path.insert(0, 'tools'); import gpu; gpu.test_file(*sys.argv[1:])"
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code, name, str(said)], cwd=ROOT, stdout=log, stderr=log
            )
        running[name] = process, said
    while True:
        over = all(process.poll() is not None for process, _ in running.values())
        found = {
            name: _read(said) | {"code": process.returncode}
            for name, (process, said) in running.items()
        }
        for name, file in found.items():
            if file["code"] not in (None, 0) and not file.get("failed"):
                file["said"] = (folder / f"{name}.log").read_text(errors="replace")[-4000:]
        told.tell({"tests": found})
        if over:
            return {"tests": found}
        time.sleep(EVERY_S)


def test_file(name: str, output: str) -> None:
    """One file of tests, by pytest; its counts and failures are written after each test."""
    import pytest

    found: Found = {"passed": 0, "skipped": 0, "failed": {}}

    class Listener:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                found["failed"][report.nodeid] = str(report.longrepr)[-6000:]
            elif report.skipped:
                found["skipped"] += 1
            elif report.when == "call":
                found["passed"] += 1
            _write(Path(output), found)

    options = ["-q", "-m", "cuda", "-o", "minversion=7", "-p", "no:cacheprovider"]
    (path,) = (ROOT / "tests").rglob(f"test_{name}.py")  # the laboratory's lie in a folder
    sys.exit(pytest.main([*options, str(path)], plugins=[Listener()]))


def decode(told: Told) -> Found:
    """Decoding by a zip and its peers, at every batch."""
    from zipper_lab import bench
    from zipper_lab.bench import decode as benchmark

    size, found = told.size, dict[str, Any]()
    until = time.monotonic() + told.seconds - 8
    for number, batch in enumerate(size.batches):
        share = (until - time.monotonic()) / (len(size.batches) - number)
        tell = partial(_nested, told.tell, found, f"batch {batch}", benchmark.markdown)
        given = {
            "source": size.source,
            "tokens": size.tokens,
            "precision": size.precision,
            "device": size.device,
            "batch": batch,
        }
        here = bench.Here(seconds=share, told=tell)
        tell(
            benchmark.bench(
                told.model, size.rounds, size.warm, PEERS, hardware=hardware(), here=here, **given
            )
        )
    return found


def compiled(told: Told) -> Found:
    """Decoding where torch.compile makes the step, ours and stock transformers'."""
    if told.size.device == "cpu":
        # A compiler of C++ would take the minutes that tiny has not.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    from zipper_lab import bench
    from zipper_lab.bench import decode as benchmark

    size, found = told.size, dict[str, Any]()
    arms = ("zip", "stock", "static", *(["whole"] if size.device == "cuda" else []))
    tell = partial(_nested, told.tell, found, "batch 1", benchmark.markdown)
    given = {
        "source": size.source,
        "tokens": size.tokens,
        "precision": size.precision,
        "device": size.device,
    }
    here = bench.Here(seconds=told.seconds - 8, told=tell)
    tell(
        benchmark.bench(
            size.models[0], size.rounds, size.warm, arms, hardware=hardware(), here=here, **given
        )
    )
    return found


def steps(told: Told) -> Found:
    """Training steps."""
    from zipper_lab import bench
    from zipper_lab.bench import train as benchmark

    size, found = told.size, dict[str, Any]()
    arms = [arm for arm in STEPS if size.device.startswith(benchmark.ONLY.get(arm, ""))]
    tell = partial(_nested, told.tell, found, "steps", benchmark.markdown)
    here = bench.Here(apart=True, seconds=told.seconds - 8, told=tell)
    given = {"pairs": size.pairs[told.model], "device": size.device, "precision": "bf16"}
    tell(
        benchmark.bench(
            told.model, size.rounds, size.warm, arms, hardware=hardware(), here=here, **given
        )
    )
    return found


def align(told: Told) -> Found:
    """Both towers of the preset `gpu` pre-trained, zipped, aligned and tried: a share of the
    preset's steps, resumable."""
    from zipper.training.loop import Stopped, train
    from zipper_lab import experiments

    size, budget = told.size, experiments.BUDGETS["gpu"]
    tiny = size.share == 0
    shapes = {name: budget.shapes[name] for name in ("text-S", "speech")}
    if tiny:
        small = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        shapes = {name: shape | small for name, shape in shapes.items()}
    ground = corpus(
        told.state / "data",
        *((200, 200, 20) if tiny else (budget.pairs, budget.unpaired, budget.dev)),
    )
    tower_steps, zip_steps = (
        (4, 4) if tiny else (round(size.share * n) for n in (budget.tower_steps, budget.steps))
    )
    common = {
        "batch": 4 if tiny else budget.batch,
        "mixed_precision": budget.mixed_precision,
        "dev": budget.dev,
    }
    found: Found = {"data": ground["about"], "share": size.share}

    def stage(name: str, config: Any) -> Path:
        """One run, from where it stands."""
        folder, began = Path(config.output), time.monotonic()

        def tell(row: Mapping[str, Any]) -> None:
            kept = {
                key: value
                for key, value in row.items()
                if not key.startswith(("grad/", "gate/", "branch/"))
            }
            found[name] = {
                "steps": config.steps,
                "last": kept,
                "rows": [*found.get(name, {}).get("rows", []), kept][-40:],
            }
            told.tell(found)

        if not _done(folder, config.steps):
            train(config, resume=True, report=tell)
        found[name] = found.get(name, {}) | {
            "done": True,
            "seconds_now": time.monotonic() - began,
            "best": _best(folder),
        }
        told.tell(found)
        return folder / "model"

    try:
        towers = {}
        for name, shape in shapes.items():
            spec = {"tower": name, "shape": shape, "steps": tower_steps, **common}
            config = experiments.tower_recipe(
                spec, {"corpus": ground["ground"]}, told.state / f"{name}-{tower_steps}"
            )
            towers[name] = str(stage(f"tower {name}", config) / "towers" / name.partition("-")[0])
        cell = experiments.Cell(
            "", (), experiments.ZIP, "S", "prose", budget.pairs, 0, {"steps": zip_steps}
        )
        spec = {"cell": asdict(cell), **common}
        needs, rates = (
            {"corpus": ground["ground"], "tower": towers},
            experiments.TRIED[experiments.ZIP][0],
        )
        config = experiments.configure(
            spec, needs, told.state / f"zip-{zip_steps}-of-{tower_steps}", rates
        )
        model = stage("zip", config)
        found["asr"] = recognised(model, ground, size.device, 8 if tiny else 200)
    except Stopped:
        found["stopped"] = "saved; the next call goes on from here"
    return found


def recognised(model: Path, ground: Found, device: str, most: int) -> Found:
    """Word errors of speech to text on test sentences, greedy, beside those of another sentence of
    the test."""
    from zipper.data import manifests as data
    from zipper.pipeline import Pipeline
    from zipper_lab.demo import transcribe

    pipeline = Pipeline.from_pretrained(model)
    pipeline.model.to(device)
    rows = data.manifest(Path(ground["ground"]["tests"]["clean"]), most)
    texts = [row["text"] for row in rows]
    heard = [segment.content for segment in transcribe(pipeline, [row["speech"] for row in rows])]
    words = sum(len(text.split()) for text in texts)

    def rate(said: Sequence[str]) -> float:
        return (
            sum(
                _edits(text.split(), other.split()) for text, other in zip(texts, said, strict=True)
            )
            / words
        )

    return {
        "wer": rate(heard),
        "floor": rate(texts[1:] + texts[:1]),
        "sentences": len(texts),
        "examples": [*zip(texts, heard, strict=True)][:5],
    }


def _edits(wanted: Sequence[str], got: Sequence[str]) -> int:
    """The least words to change, add or leave out (Levenshtein 1966)."""
    row = list(range(len(got) + 1))
    for n, word in enumerate(wanted, 1):
        last, row[0] = row[0], n
        for k, other in enumerate(got, 1):
            last, row[k] = row[k], min(row[k] + 1, row[k - 1] + 1, last + (word != other))
    return row[-1]


PARTS = ("text", "speech", "pairs", "dev")


def corpus(folder: Path, pairs: int, unpaired: int, tests: int) -> Found:
    """What the towers and the zip are trained on: what `--prepare` has left in the folder, or else
    sentences of the novels in units by a rule, for nothing here can speak. Made once."""
    from zipper_lab.corpora import prose

    if not (folder / "about.json").is_file():
        _synthetic(folder, pairs, unpaired, tests)
    at = {
        name: str(folder / name if (folder / name).is_dir() else folder / f"{name}.jsonl")
        for name in (*PARTS, "test_clean")
    }
    ground = {
        "modalities": {name: str(folder / "modalities" / name) for name in ("text", "speech")},
        "towers": {},
        "data": at["pairs"],
        "dev": at["dev"],
        "tests": {"clean": at["test_clean"]},
        "alone": {name: [at[name], at["dev"]] for name in ("text", "speech")},
        "sentences": at["text"],
        "judge": None,
    }
    return {
        "about": json.loads((folder / "about.json").read_text()) | {"voices": list(prose.VOICES)},
        "ground": ground,
    }


def _synthetic(folder: Path, pairs: int, unpaired: int, tests: int) -> None:
    """The sentences, parts and voices of `zipper_lab.corpora.prose`; every letter is one to three
    units by itself, its neighbour and the voice, a twentieth of them at random."""
    import numpy as np

    from zipper.data import manifests as data
    from zipper.modality.speech import SpeechUnits, UnitsConfig
    from zipper.modality.text import Text
    from zipper_lab.corpora import prose

    codes, settings = (
        512,
        UnitsConfig(voices=tuple(prose.VOICES), fitted_on="nothing: units by a rule"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    width = settings.stack * settings.mel.bins
    SpeechUnits(
        np.random.default_rng(0).normal(-4, 2, (codes, width)).astype(np.float32), settings
    ).save(folder / "modalities" / "speech")

    @cache
    def rule(letter: str, then: str, voice: str) -> list[int]:
        dice = random.Random(f"{letter} {then} {voice}")
        return [dice.randrange(codes) for _ in range(3)]

    def row(utterance: Any) -> Found:
        dice, units = random.Random(f"{utterance.id} {utterance.text}"), list[int]()
        for letter, then in zip(utterance.text, utterance.text[1:] + " ", strict=True):
            near = rule(
                letter,
                then if dice.random() < 0.5 else "",
                utterance.voice if dice.random() < 0.3 else "",
            )
            units += [
                dice.randrange(codes) if dice.random() < 0.05 else near[n]
                for n in range(dice.randint(1, 3))
            ]
        return {
            "id": utterance.id,
            "text": utterance.text,
            "voice": utterance.voice,
            "speech": units,
        }

    lines = prose.sentences("text", None if unpaired > 1000 else unpaired)
    Text.train([line.text for line in lines], 1000 if unpaired > 1000 else 40).save(
        folder / "modalities" / "text"
    )
    data.write(folder / "text.jsonl", [{"id": line.id, "text": line.text} for line in lines])
    for name, part, n in (
        ("speech", "speech", unpaired),
        ("pairs", "pairs", pairs),
        ("dev", "dev", tests),
        ("test_clean", "test", tests),
    ):
        made = [row(utterance) for utterance in prose.sentences(part, n)]
        data.write(
            folder / f"{name}.jsonl",
            [{k: r[k] for k in r if name != "speech" or k != "text"} for r in made],
        )
    _write(
        folder / "about.json",
        {
            "kind": "synthetic: units of letters by a rule, no sound",
            "pairs": pairs,
            "speech": unpaired,
        },
    )


def prepare(folder: Path, pairs: int, speech: int, tests: int, **more: int) -> None:
    """The corpus of the preset `gpu`, said by eSpeak NG, as unit files: for a machine that cannot
    speak. Half an hour of a core."""
    from zipper.data.extraction import extract
    from zipper.modality import load
    from zipper_lab.corpora import prose

    said = folder.parent / "said"
    prose.prepare(said, pairs=pairs, speech=speech, dev=tests, test=tests, **more)
    for name in ("text", "speech"):
        shutil.copytree(said / name, folder / "modalities" / name, dirs_exist_ok=True)
    modalities = {name: load(said / name) for name in ("text", "speech")}
    for name in PARTS:
        fields = {name: modalities[name]} if name in modalities else modalities
        extract(str(said / f"{name}.jsonl"), folder / name, fields, shard=1 << 14)
    shutil.copy(said / "test_clean.jsonl", folder / "test_clean.jsonl")
    about = {
        "kind": "the prose corpus, said by eSpeak NG, in fitted units",
        "pairs": pairs,
        "speech": speech,
    }
    _write(folder / "about.json", about)


SECTIONS = (
    Section("limits", 20, limits),
    Section("tests", 70, tests, ("pytest", "hypothesis")),
    Section("decode", 95, decode),
    Section("steps", 80, steps, ("accelerate",)),
    Section("compiled", 60, compiled),
    Section("align", math.inf, align, ("accelerate",)),
)


def planned(size: Size, sections: Sequence[Section] = SECTIONS) -> list[tuple[str, str, Section]]:
    """(name, model, section): those with a model once for each; the shorter models first."""
    found = []
    for section in sections:
        for model in size.models if section.name in ("decode", "steps") else ("",):
            found.append((f"{section.name} {model}".strip(), model, section))
    return found


# --- the runner ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections; 0 where all that were not left out came to their end, by themselves or at
    their cap."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--size",
        choices=[*SIZES],
        default=os.environ.get("SIZE") or "gpu",
        help="gpu, or tiny on a CPU",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "runs" / "gpu",
        help="where the last section keeps its runs",
    )
    parser.add_argument(
        "--only",
        default=os.environ.get("ONLY") or "",
        help="sections, separated by commas (default all)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=float(os.environ.get("LIMIT") or 0),
        help="seconds in all, 540 at most",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="say the corpus of the last section with eSpeak NG, and end",
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    sys.path[:0] = [
        path for path in (str(ROOT / "src"), str(ROOT / "tests")) if path not in sys.path
    ]
    size = SIZES[given.size]
    state = given.state.absolute() / given.size
    if given.prepare:
        if given.size == "tiny":
            prepare(state / "data", 40, 40, 8, codes=32, merges=40, fitted=20, adapted=4)
        else:
            prepare(state / "data", 40_000, 60_000, 300, workers=os.cpu_count() or 1)
        return 0
    if given.section:
        return _section(given.section, size, state, given.limit)
    if size.device == "cuda" and not _cuda():
        print(
            "There is no torch with a CUDA device in this Python. Give another (PYTHON=python3 "
            "make gpu), or SIZE=tiny.",
            file=sys.stderr,
        )
        return 2
    limit = min(given.limit or size.limit_s, 540.0)
    only = [name for name in given.only.split(",") if name]
    wanted = [part for part in planned(size) if not only or part[0] in only or part[2].name in only]
    if unknown := {*only} - {name for part in wanted for name in (part[0], part[2].name)}:
        parser.error(
            f"there is no section {sorted(unknown)[0]!r}; there are "
            f"{', '.join(section.name for section in SECTIONS)}"
        )
    command = [
        sys.executable,
        str(Path(__file__)),
        "--size",
        given.size,
        "--state",
        str(given.state.absolute()),
    ]
    if given.size == "tiny":  # a busy machine may take its time, but for the limit
        wanted = [
            (name, model, replace(section, cap_s=8 * section.cap_s))
            for name, model, section in wanted
        ]
    # Which ends the section that runs, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found = Run(given.output.absolute(), state, given.size, limit, command).run(wanted)
    return int(any(section["how"] == "failed" for section in found["sections"].values()))


def _section(name: str, size: Size, state: Path, seconds: float) -> int:
    """In a section's process: what it finds goes into its file, at the latest with its
    traceback."""
    (model, section) = next(
        (model, section) for known, model, section in planned(size) if known == name
    )
    file, latest = state / "sections" / f"{name}.json", dict[str, Any]()

    def tell(found: Found) -> None:
        latest.update(found)
        _write(file, latest)

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        found = section.run(Told(size, seconds, state, tell, model))
        tell(found | {"complete": "stopped" not in found})
    except Exception:
        tell({"traceback": traceback.format_exc()})
        raise
    return 0


def _end_with(parent: int) -> None:
    """A section whose runner was killed must not write beside the next runner's: all of its group
    is asked to end."""
    while os.getppid() == parent:
        time.sleep(EVERY_S)
    os.killpg(0, signal.SIGTERM)
    time.sleep(ENDING_S)
    os.killpg(0, signal.SIGKILL)


class Run:
    """The sections one after the other, and what they found in one file."""

    def __init__(
        self, output: Path, state: Path, size: str, limit: float, command: Sequence[str]
    ) -> None:
        self.state, self.command = state, list(command)
        self.began, self.until = time.monotonic(), time.monotonic() + limit
        month = time.strftime("%Y%m")
        self.path = output / f"gpu_{_plain(hardware())}{'_tiny' * (size == 'tiny')}_{month}"
        self.found: Found = {"size": size, "limit_s": limit, "machine": machine(), "sections": {}}

    def run(self, wanted: Sequence[tuple[str, str, Section]]) -> Found:
        """All of them; what they found."""
        self.write()
        for number, (name, _, section) in enumerate(wanted):
            left = self.until - time.monotonic()
            cap = min(section.cap_s, left - ENDING_S if number == len(wanted) - 1 else left)
            self.found["sections"][name] = entry = {
                "how": "running",
                "cap_s": round(cap, 1),
                "found": {},
            }
            if missing := [
                package
                for package in ("torch", "jaxtyping", "transformers", *section.needs)
                if not _there(package)
            ]:
                entry |= {
                    "how": "left out",
                    "why": f"it needs {', '.join(missing)}. Install them: pip install "
                    f"{' '.join(missing)}",
                }
            elif cap < LEAST_S:
                entry |= {"how": "left out", "why": "no time was left for it"}
            else:
                self.write()
                self.one(name, cap, entry)
            print(
                f"{name}: {entry['how']}{', ' * ('why' in entry)}{entry.get('why', '')}", flush=True
            )
            self.write()
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        self.write()
        return self.found

    def one(self, name: str, cap: float, entry: Found) -> None:
        """A section in a process group of its own; at its cap it is asked to end, and soon after
        that it is ended."""
        file = self.state / "sections" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        began, asked, code = time.monotonic(), False, None
        grace = min(ENDING_S, cap / 4)
        command = [*self.command, "--section", name, "--limit", str(cap - grace)]
        with (self.state / "sections" / f"{name}.log").open("wb+") as log:
            calm = {
                "OMP_WAIT_POLICY": "PASSIVE",
                "GOMP_SPINCOUNT": "3000",
                "HF_HUB_OFFLINE": "1",
            } | os.environ  # as in the Makefile
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=calm
            )
            try:
                while (code := process.poll()) is None:
                    past = time.monotonic() - began
                    if past > cap - grace and not asked:
                        asked = True
                        _signal(process, signal.SIGTERM)
                    if past > cap:
                        break
                    if (found := _read(file)) != entry["found"]:
                        entry |= {"found": found, "seconds": round(past, 1)}
                        self.write()
                    time.sleep(EVERY_S)
            finally:
                _signal(process, signal.SIGKILL)  # the children that it has left, too
                process.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")
        entry |= {"found": _read(file), "seconds": round(time.monotonic() - began, 1)}
        if entry["found"].pop("complete", False):
            entry["how"] = "done"
        elif asked:
            entry |= {"how": "ended at its cap", "why": f"{cap:.0f} s were over"}
        else:
            lines = entry["found"].get("traceback", said).strip().splitlines()
            entry |= {
                "how": "failed",
                "why": f"code {code}: {lines[-1] if lines else ''}",
                "said": said[-4000:],
            }

    def write(self) -> None:
        """Both files, each whole at every moment."""
        _write(self.path.with_suffix(".json"), self.found)
        _replace(self.path.with_suffix(".md"), table(self.found))


def table(found: Found) -> str:
    """The results in markdown."""
    about = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# Ten minutes of {about['device']}",
        "",
        f"`make gpu`, size {found['size']}. {versions}. Commit {about['commit']},",
    ]
    lines += [
        f"sources {about['source'][:12]}.",
        "",
        "| section | | s | of at most |",
        "|---|---|---|---|",
    ]
    for name, part in found["sections"].items():
        why = f": {part['why']}" if "why" in part else ""
        lines.append(
            f"| {name} | {part['how']}{why.replace('|', '/')} | {part.get('seconds', '')} | "
            f"{part['cap_s']} |"
        )
    for name, part in found["sections"].items():
        lines += ["", f"## {name}", ""] if part["found"] else []
        for key, value in part["found"].items():
            if key.endswith("in markdown"):
                lines += [str(value).replace("\n# ", "\n### ").replace("# ", "### ", 1), ""]
            elif f"{key} in markdown" not in part["found"]:
                lines += [f"* {key}: {_short(value)}"]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and {"passed", "failed"} <= value.keys():
        failed = "".join(
            f"; FAILED {test}: {why.strip().splitlines()[-1]}"
            for test, why in value["failed"].items()
        )
        return f"{value['passed']} passed, {value['skipped']} skipped, {len(value['failed'])} failed{failed}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_short(item)}" for key, item in value.items() if key != "rows")
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).strip().splitlines()[-1] if str(value).strip() else ""


def machine() -> Found:
    """What this is run on. source: SHA-256 of the package's files, for a copy that is no
    checkout."""
    content = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        content.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version()}
    for name in (
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "peft",
        "jaxtyping",
        "beartype",
        "pytest",
        "hypothesis",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    device = hardware()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "commit": commit or "unknown",
        "source": content.hexdigest(),
        "versions": versions,
    }


@cache
def hardware() -> str:
    """The GPU's name, as the driver says it; else how many cores there are. Asked in a process of
    its own, which leaves the GPU alone again when it ends."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or f"{os.cpu_count()} cores"


def _cuda() -> bool:
    return not hardware().endswith(" cores")


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower().removeprefix("nvidia ")).strip(
        "-"
    )


def _nested(tell: Tell, found: Found, name: str, shown: Callable[[Found], str], one: Found) -> None:
    found |= {name: one, f"{name} in markdown": shown(one)}
    tell(found)


def _done(folder: Path, steps: int) -> bool:
    """Whether a run came to its end."""
    rows = folder / "metrics.jsonl"
    return (
        (folder / "model").is_dir()
        and rows.is_file()
        and json.loads(rows.read_text().splitlines()[-1])["step"] >= steps
    )


def _best(folder: Path) -> Found:
    """The dev losses of every evaluation, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        str(row["step"]): {k: v for k, v in row.items() if k.startswith("dev/")}
        for row in rows
        if any(k.startswith("dev/") for k in row)
    }


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _read(path: Path) -> Found:
    """What is in a file that a section writes; nothing where there is none yet."""
    try:
        found: Found = json.loads(path.read_text())
        return found
    except (OSError, json.JSONDecodeError):
        return {}


def _write(path: Path, content: Any) -> None:
    _replace(path, json.dumps(content, indent=1, default=str) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
