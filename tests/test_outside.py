"""A modality from a package outside of this repository: every command works with it, and a machine
that lacks the package is told so in one sentence.

The package is the template that users copy, docs/template/dice.py. Here it is laid out as pip
leaves it; the slow test builds it and installs it into an environment of its own.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
from test_hub import StandIn
from test_hub import standin as standin
from test_install import ROOT, clean, made, pip
from test_install import core as core
from test_install import wheel as wheel

from zipper import modality
from zipper.cli import main

#: The words behind `zipper` -> exit code, stdout, stderr.
Zipper = Callable[[Sequence[str]], tuple[int, str, str]]
TEMPLATE = ROOT / "docs" / "template" / "dice.py"
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "zipper-dice"
version = "1.0"

[project.entry-points."zipper.modalities"]
dice = "dice:Dice"

[tool.hatch.build.targets.wheel]
include = ["dice.py"]
"""
TOWER = """
from zipper import TrainConfig

SHAPE = {shape!r}

def config():
    return TrainConfig(
        output="{name}", towers={{"{name}": SHAPE}}, modalities={{"{name}": "{name}-modality"}},
        data="{data}", dev="{data}", tasks={{"-> {name}": 1.0}}, train=("{name}",), steps=2, batch=4,
        eval_every=2, save_every=2, trackers=(),
    )
"""
ZIP = """
from zipper import LinkConfig, TrainConfig

def config():
    return TrainConfig(
        output="zip",
        towers={"text": "text/model/towers/text", "dice": "dice/model/towers/dice"},
        modalities={"text": "text-modality", "dice": "dice-modality"},
        data="units", dev="units", tasks={"dice -> text": 0.5, "text -> dice": 0.5}, steps=2, batch=4,
        link=LinkConfig(head_width=16), eval_every=2, save_every=2,
    )
"""
#: What a user does, in order, and a word of what each says.
STEPS = [
    ("fit dice --example example", "zipper fit dice"),
    ("fit dice example/manifest.jsonl -o dice-modality --set sides=6", "dice of 8 ids"),
    ("fit text example/manifest.jsonl -o text-modality --set merges=4", "text of"),
    (
        "units jsonl:example/manifest.jsonl -o units --modality dice=dice-modality --text text-modality",
        "4 samples",
    ),
    ("pretrain dice.recipe.py", "dice/model"),
    ("pretrain text.recipe.py", "text/model"),
    ("train zip.recipe.py", "zip/model"),
    ("evaluate zip/model example/manifest.jsonl -o found.json", "dice -> text: 4 rows"),
    ("run --model zip/model --given dice=3146 --outputs text,dice", "dice:"),
    ("verify zip/model", "ok"),
    ("show zip/model", "dice"),
    (
        "swap zip/model dice=dice/model/towers/dice --modality dice=dice-modality -o swapped",
        "swapped",
    ),
    ("push zip/model me/dice --include text --include dice", "me/dice"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder: recipes, and nothing else."""
    shape = tiny.shape()
    for name, data in (("dice", "units"), ("text", "units")):
        recipe = TOWER.format(shape=shape, name=name, data=data)
        (tmp_path / f"{name}.recipe.py").write_text(recipe)
    (tmp_path / "zip.recipe.py").write_text(ZIP)
    return tmp_path


def works(zipper: Zipper, place: Path) -> None:
    for line, said in STEPS:
        code, out, err = zipper(shlex.split(line))
        assert code == 0, f"zipper {line}: {err}"
        assert said in out, f"zipper {line}: {out}"
    measured = json.loads((place / "found.json").read_text())["measured"]
    assert {one["task"] for one in measured} == {"text -> dice", "dice -> text"}
    assert "| dice | dice |" in (place / "zip" / "model" / "README.md").read_text()


def test_every_command_works_with_it(
    place: Path,
    tmp_path: Path,
    standin: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = tmp_path / "site"
    about = site / "zipper_dice-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "dice.py").write_text(TEMPLATE.read_text())
    (about / "METADATA").write_text("Name: zipper-dice\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[zipper.modalities]\ndice = dice:Dice\n")
    monkeypatch.setattr(modality, "_registered", {})
    monkeypatch.chdir(place)

    def zipper(words: Sequence[str]) -> tuple[int, str, str]:
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    with monkeypatch.context() as there:
        there.syspath_prepend(site)
        works(zipper, place)
    sys.modules.pop("dice", None)
    modality._registered.clear()  # a process that ran with a modality knows it
    for line in ("show zip/model", "fit dice x -o y", "train zip.recipe.py --resume"):
        code, _, said = zipper(shlex.split(line))
        assert code == 2
        assert len(said.strip().splitlines()) == 1
        assert "'dice'" in said and "nstall the package that brings it" in said


@pytest.mark.slow
def test_it_is_built_and_installed_into_an_environment_of_its_own(
    place: Path, tmp_path: Path, core: Path, wheel: Path, standin: StandIn
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "dice.py").write_text(TEMPLATE.read_text())
    (package / "pyproject.toml").write_text(PROJECT)
    home = made(tmp_path / "home", f"{wheel}[train,speech]", below=core)
    pip(home / "bin" / "python", "install", package)
    hub = {"HF_ENDPOINT": standin.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def zipper(words: Sequence[str]) -> tuple[int, str, str]:
        command = [str(home / "bin" / "python"), "-m", "zipper", *words]
        there = {"capture_output": True, "text": True, "cwd": place, "env": clean() | hub}
        done = subprocess.run(command, **there)  # type: ignore[call-overload]
        return done.returncode, done.stdout, done.stderr

    works(zipper, place)
