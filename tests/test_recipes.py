"""Every recipe in recipes/ makes a run whose parts fit, and takes a step with its towers and its
data replaced by tiny ones."""

import dataclasses
import json
import re
import runpy
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import World

from zipper.cli import main
from zipper.data import manifests as data
from zipper.tasks import Task
from zipper.training import TrainConfig, train

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    made = tiny.world(tmp_path_factory.mktemp("world"))
    for name in ("pairs", "dev"):
        path = made.folder / f"{name}.jsonl"
        data.write(
            path,
            [
                row | {"heard:speech": row["speech"][1:], "said:text": row["text"]}
                for row in data.manifest(path)
            ],
        )
    return made


def shrunk(world: World, config: TrainConfig, output: Path) -> TrainConfig:
    """The same run on the tiny world: every number of the recipe that does not cost time stays."""
    towers: dict[str, Any] = {
        name: tiny.shape() if isinstance(source, Mapping) else str(world.folder / name / "tower")
        for name, source in config.towers.items()
    }
    shows = {  # tiny towers have one junction
        name: depths if isinstance(depths, int | str) else depths[:1]
        for name, depths in (config.shows.items() if isinstance(config.shows, Mapping) else ())
    }
    return dataclasses.replace(
        config,
        shows=shows or config.shows,
        output=str(output),
        towers=towers,
        modalities={name: str(world.folder / name) for name in config.modalities},
        data=str(world.folder / "pairs.jsonl"),
        dev=str(world.folder / "dev.jsonl"),
        start=None,
        calibrate=min(config.calibrate, 20),
        steps=1,
        eval_rows=4,
        trackers=(),
    )


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "text_tower",
        "speech_tower",
        "spoken_commands",
        "spoken_chains",
        "judge",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_and_takes_a_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # config() neither needs nor makes any file
    recipe = runpy.run_path(str(path))
    config = recipe["config"]()
    assert isinstance(config, TrainConfig)
    assert recipe["config"]() == config
    assert callable(recipe["prepare"])
    assert not list(tmp_path.iterdir())
    assert recipe["__doc__"]
    for task in config.tasks:
        assert set(Task.parse(task).towers) <= set(config.towers)
    assert config.output.startswith("runs/")
    small = shrunk(world, config, tmp_path / "run")
    if config.start is not None:  # from a zip of its own links
        first = dataclasses.replace(small, output=str(tmp_path / "first"))
        train(first)
        small = dataclasses.replace(small, start=str(tmp_path / "first" / "model"))
    pipeline = train(small)
    assert set(pipeline.modalities) == set(config.towers)
    learns = {name for name, tower in pipeline.model.config.towers.items() if tower.train}
    assert learns == (set(config.train) if len(config.towers) > 1 else set(config.towers))


def test_recipes_write_into_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = [runpy.run_path(str(path))["config"]().output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


def test_the_page_about_files_of_ones_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for shown in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        (tmp_path / shown.split()[1]).write_text(shown)
    (tmp_path / "clips").mkdir()
    pairs = []
    for n, row in enumerate(tiny.pairs(12)):
        name = f"clips/a{n}.wav"
        tiny.sound(tmp_path / name, seconds=0.4, seed=n)
        pairs.append({"id": f"a{n}", "text": row["text"], "speech": name})
    for name, fields in {"texts": ["text"], "sounds": ["speech"], "pairs": [], "dev": []}.items():
        rows = [{field: row[field] for field in fields or row} for row in pairs]
        data.write(tmp_path / f"{name}.jsonl", rows)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in commands.splitlines():
        said = shlex.split(line.replace("merges=300", "merges=5").replace("codes=256", "codes=8"))
        few = ["--set", "steps=2"] if said[1] in ("pretrain", "train") else []
        assert main([*said[1:], *few]) == 0, line
    assert json.loads((tmp_path / "runs/zip/config.json").read_text())["steps"] == 2
    assert "ok      frozen text is its base" in capsys.readouterr().out
