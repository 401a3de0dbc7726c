"""Every install is a first install: without an extra a command works, or says in one sentence which
one it needs.

An extra is hidden from the importer here; the slow test builds the wheel and installs it into empty
environments.
"""

import dataclasses
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import World

from zipper import cli, environment
from zipper.pipeline import SHIPPED

ROOT = Path(__file__).parents[1]
EXTRAS = [name for name in environment.extras() if name != "dev"]
RECIPE = """
from zipper import LinkConfig, TrainConfig

def prepare():
    pass

def config():
    settings = {settings!r}
    return TrainConfig(**settings | {{"link": LinkConfig(**settings["link"])}})
"""
#: Runs commands in this process, modules of extras hidden, and prints what each said.
PROGRAM = """
import contextlib, importlib.machinery, io, json, sys
hidden, calls = json.loads(sys.argv[1]), json.loads(sys.argv[2])
find = importlib.machinery.PathFinder.find_spec

def spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(spec)
from zipper import *
from zipper.cli import main
said = {}
for name, arguments in calls.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    said[name] = [code, err.getvalue(), out.getvalue()]
print(json.dumps(said))
"""
#: What asks for which extra first where only the core is installed; everything else works.
CORE = {
    "demo": "speech",
    "transcribe": "speech",
    "speak": "speech",
    "run": "speech",
    "units": "speech",
    "units parquet": "data",
    "units ray": "ray",
    "pretrain": "train",
    "train": "train",
    "train plan": "train",
    "train foreign": "speech",
    "train lora": "train",
    "evaluate": "speech",
    "bench speech": "speech",
    "fit codebook": "speech",
    "fit image": "image",
    "evaluate rows": "speech",
    "show run": "train",
    "prune": "speech",
    "reproduce": "speech",
    "serve": "serve",
    "run-batch": "speech",
    "bench serve": "serve",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def commands(world: World, place: Path) -> dict[str, list[str]]:
    """Every command on a tiny world, some in several ways; the first word of a name is the
    command."""
    clip, zip_, units = (
        str(tiny.sound(place / "clip.wav", 0.4)),
        str(world.zip),
        str(world.folder / "speech"),
    )
    text = str(world.folder / "text")
    recipes: dict[str, dict[str, Any]] = {
        "alone": {
            "towers": {"text": f"{text}/tower"},
            "modalities": {"text": text},
            "tasks": {"-> text": 1.0},
            "train": (),
        },
        "pairs": {"trackers": ("tensorboard",)},
        "adapted": {"lora": {"text": {"r": 2, "target_modules": ["q_proj"]}}},
        "foreign": {},
    }
    for name, changes in recipes.items():
        settings = dataclasses.asdict(world.config(place / name, steps=1, **changes))
        (place / f"{name}.py").write_text(
            "import soundfile\n" * (name == "foreign") + RECIPE.format(settings=settings)
        )
    (place / "batch.jsonl").write_text('{"text": "call"}\n')
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss/text": 1.0, "lr": 0.1}) + "\n"
    )
    data = ["--data", str(world.folder / "dev.jsonl"), "--rows", "2"]
    recorded = str(next((ROOT / "benchmarks" / "results").glob("reproduce_cpu_*.json")))
    given: dict[str, Sequence[Any]] = {
        "demo": ["--pairs", 4, "--steps", 1, "--test", 1, "--output", place / "demo"],
        "transcribe": [clip, "--model", zip_],
        "speak": ["call anna", "-o", place / "said.wav", "--model", zip_],
        "run": [
            "--given",
            "text=call",
            "--outputs",
            "speech",
            "-o",
            place / "made",
            "--model",
            zip_,
        ],
        "fit": ["symbols", world.folder / "dev.jsonl", "--field", "text", "-o", place / "symbols"],
        "fit signal": ["signal", "--example", place / "walks"],
        "fit codebook": ["speech", clip, "-o", place / "codebook", "--set", "codes=4"],
        "fit image": ["image", "--example", place / "pictures"],
        "evaluate rows": [zip_, world.folder / "dev.jsonl", "--of", "text -> speech"],
        "serve": [zip_, "--check"],
        "run-batch": [
            place / "batch.jsonl",
            *("--task", "text -> speech", "-o", place / "done.jsonl", "--model", zip_),
        ],
        "run text": ["--given", "text=call", "--outputs", "text", "--model", zip_],
        "units": [clip, "-o", place / "units.jsonl", "--units", units],
        "units parquet": [f"parquet:{place / 'none.parquet'}", "-o", place / "corpus"],
        "units ray": [clip, "-o", place / "ray.jsonl", "--units", units, "--ray"],
        "pretrain": [place / "alone.py"],
        "train": [place / "pairs.py"],
        "train plan": [place / "pairs.py", "--plan"],
        "train foreign": [place / "foreign.py"],
        "train lora": [place / "adapted.py"],
        "evaluate": ["--test", 2, "--model", zip_],
        "show": [zip_],
        "show run": [place / "run"],
        "verify": [zip_],
        "doctor": [],
        "add": [zip_, f"more={text}/tower", "--modality", f"more={text}", "-o", place / "grown"],
        "compose": [zip_, tiny.notes(world), "-o", place / "three"],
        "swap": [zip_, f"text={text}/tower", "-o", place / "swapped"],
        "prune": [zip_, "--links", "0:text>speech", "-o", place / "pruned", *data],
        "reproduce": ["--report", recorded, "--output", place / "told"],
        "push": [SHIPPED, "me/mine"],
        "bench": [],
        "bench train": [
            "--size",
            "tiny",
            "--rounds",
            1,
            "--warm",
            0,
            "--pairs",
            2,
            "--threads",
            1,
            "--arms",
            "bare,frozen",
        ],
        "bench decode": [
            "--size",
            "tiny",
            "--rounds",
            1,
            "--warm",
            0,
            "--threads",
            1,
            "--tokens",
            4,
            "--arms",
            "bare,zip",
        ],
        "bench serve": ["--rounds", 1, "--seconds", 0.5, "--arms", "zipper"],
        "bench speech": ["--rounds", 1, "--utterances", 1, "--threads", 1],
        "towers": ["llama"],
    }
    words = {name: name.split() for name in given}
    subs = {name: words[name][: 2 if words[name][0] == "bench" else 1] for name in given}
    return {name: [*subs[name], *map(str, arguments)] for name, arguments in given.items()}


def said_without(
    hidden: Sequence[str], calls: Mapping[str, Sequence[str]], place: Path
) -> dict[str, tuple[int, str, str]]:
    """What commands say where these extras are hidden."""
    modules = [
        environment.importable(package) for name in hidden for package in environment.extras()[name]
    ]
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, "-c", PROGRAM, json.dumps(modules), json.dumps(calls)]
    done = subprocess.run(
        program, capture_output=True, text=True, cwd=place, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    return {
        name: tuple(answer) for name, answer in json.loads(done.stdout.splitlines()[-1]).items()
    }


def needed(answer: tuple[int, str, str], name: str) -> str | None:
    """The extra that a command asked for; None where it worked. An AssertionError if it did
    neither."""
    code, err, _ = answer
    if code == 0:
        return None
    assert code == 2 and err.count("\n") == 1, f"{name}: {code}, {err}"
    if name == "push" and "HF_HUB_OFFLINE" in err:
        return None  # it came as far as the network
    if "none.parquet" in err:
        return None  # it came as far as the file
    for extra in EXTRAS:
        if err.rstrip().endswith(f"which is not installed. Do: {environment.install(extra)}"):
            return extra
    raise AssertionError(f"{name}: {err}")


def test_the_core_alone_can_do_all_but_what_its_extras_are_for(
    world: World, tmp_path: Path
) -> None:
    calls = commands(world, tmp_path)
    assert {name.split()[0] for name in calls} == {name.split()[1] for name in _programs()}
    del (
        calls["bench"],
        calls["bench speech"],
        calls["bench train"],
        calls["bench decode"],
    )  # minutes, in processes of their own
    asked = {
        name: needed(answer, name) for name, answer in said_without(EXTRAS, calls, tmp_path).items()
    }
    assert {name: extra for name, extra in asked.items() if extra} == {
        name: extra for name, extra in CORE.items() if name in calls
    }


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        pytest.param("data", "units parquet", marks=pytest.mark.slow),
        pytest.param("lora", "train lora", marks=pytest.mark.slow),
        pytest.param("ray", "units ray", marks=pytest.mark.slow),
        ("speech", "speak"),
        ("train", "train"),
    ],
)
def test_an_extra_that_is_missing_is_named_and_others_are_not_touched(
    world: World, tmp_path: Path, extra: str, name: str
) -> None:
    calls = commands(world, tmp_path)
    said = said_without([extra], {key: calls[key] for key in (name, "run text", "show")}, tmp_path)
    assert {key: needed(answer, key) for key, answer in said.items()} == {
        name: extra,
        "run text": None,
        "show": None,
    }
    assert not (tmp_path / "said.wav").exists()


def _programs() -> list[str]:
    return [context.command_path for context in cli.commands()]


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("zipper_lm-*.whl")
    return built


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel and what it wants, nothing else."""
    return made(tmp_path_factory.mktemp("core"), wheel)


def made(home: Path, wanted: str | Path, below: Path | None = None) -> Path:
    """An environment; below: one whose packages it sees too."""
    venv.create(home, with_pip=True)
    (site,) = home.glob("lib/python*/site-packages")
    if below is not None:
        (lower,) = below.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(f"{lower}\n")
    pip(home / "bin" / "python", "install", wanted, "-c", ROOT / "constraints.txt")
    return home


def pip(python: str | Path, *arguments: str | Path) -> None:
    command = [
        str(python),
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, arguments),
    ]
    subprocess.run(command, check=True, env=clean())


def clean() -> dict[str, str]:
    """The environment in which nothing leads back to this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def ran(home: Path, calls: Mapping[str, Sequence[str]], place: Path) -> dict[str, str | None]:
    """Which extra each command asked for there."""
    found = {}
    for name, arguments in calls.items():
        program = [str(home / "bin" / "python"), "-m", "zipper", *arguments]
        done = subprocess.run(program, capture_output=True, text=True, cwd=place, env=clean())
        found[name] = needed((done.returncode, done.stderr, done.stdout), name)
    return found


@pytest.mark.slow
def test_the_wheel_alone_in_an_empty_environment(world: World, tmp_path: Path, core: Path) -> None:
    found = ran(
        core,
        {name: call for name, call in commands(world, tmp_path).items() if name != "bench"},
        tmp_path,
    )
    assert {name: extra for name, extra in found.items() if extra} == CORE
    front = [
        str(core / "bin" / "python"),
        "-c",
        "from zipper import *; print(Pipeline.from_pretrained().zip.config.towers.keys())",
    ]
    done = subprocess.run(front, capture_output=True, text=True, cwd=tmp_path, env=clean())
    assert done.stdout == "dict_keys(['text', 'speech'])\n" and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_wheel_with_one_extra(
    world: World, tmp_path: Path, core: Path, wheel: Path, extra: str
) -> None:
    home = made(tmp_path / "home", f"{wheel}[{extra}]", below=core)
    place = tmp_path / "place"
    place.mkdir()
    calls = commands(world, place)
    freed = [
        name for name in calls if name == "show" or (CORE.get(name) == extra and name != "demo")
    ]
    asked = ran(home, {name: calls[name] for name in freed}, place)
    assert extra not in asked.values() and asked["show"] is None
