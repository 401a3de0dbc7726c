"""Model cards: every fact in one is a fact of the zip, the hub can read it, and its code runs."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import World

from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import SHIPPED, Pipeline
from zipper.saving import checkpoint
from zipper.saving.card import card
from zipper.tasks import Task, lanes


@pytest.fixture(scope="module")
def shipped() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def counted(model: Zipper) -> dict[str, int]:
    return {name: sum(p.numel() for p in model.tower(name).parameters()) for name in model.towers}


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of the table under each heading, without its head."""
    found = {}
    for part in text.split("\n## ")[1:]:
        rows = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in part.splitlines()
            if line.startswith("| ")
        ]
        found[part.partition("\n")[0]] = rows[2:]
    return found


def code(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def altered(folder: Path, copy: Path, towers: Mapping[str, Any] = {}, **changes: Any) -> Path:
    """A zip's files with other words in zipper.json."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    saved = json.loads((folder / "zipper.json").read_text())
    saved["config"]["towers"]["text"] |= towers
    saved["config"] |= changes
    (copy / "zipper.json").unlink()
    (copy / "zipper.json").write_text(json.dumps(saved))
    return copy


def test_the_card_of_the_shipped_model_says_what_the_model_is(shipped: Pipeline) -> None:
    model, record = shipped.model, checkpoint.load(SHIPPED)[1]
    text = card(SHIPPED, counted(model), shipped.told())
    found = tables(text)
    config = model.config
    for row, (name, tower) in zip(found["Towers"], config.towers.items(), strict=True):
        state = "trained" if tower.train else "frozen"
        shape = [
            str(tower.layers),
            str(tower.width),
            str(tower.vocabulary),
            f"{counted(model)[name]:,}",
            tower.dtype,
        ]
        assert row == [name, "this zip", "", state, *shape, f"`{tower.digest[:16]}`"]
    assert config.shows is not None
    assert found["Links"] == [
        [str(n), *(str(j[name]) for j in where for name in config.towers)]
        for n, where in enumerate(zip(config.junctions, config.shows, strict=True))
    ]
    new = sum(t.numel() for t in load_file(SHIPPED / "zip.safetensors").values())
    assert (
        f"{len(model.links)} links at {len(config.junctions)} junctions. With input projections "
        f"and adapters {new:,} new" in text
    )
    settings = re.search(r"Settings of a link: `(\{.*?\})`", text)
    assert settings is not None
    assert LinkConfig(**json.loads(settings[1])) == config.link
    assert found["Modalities"] == [
        [name, name, told.about, f"`{shipped.modalities[name].fingerprint[:16]}`"]
        for name, told in shipped.told().items()
    ]
    assert "codes 256" in found["Modalities"][1][2]
    training = dict(found["Training"])
    assert training["steps"] == f"{record['step']} of {record['recipe']['steps']}"
    assert json.loads(training["tasks"].strip("`")) == record["recipe"]["tasks"]
    assert {float(v) for k, v in training.items() if k.startswith("dev loss")} == {
        round(x, 4) for x in record["dev"].values()
    }
    megabytes = sum(p.stat().st_size for p in SHIPPED.glob("*/**/*") if p.is_file()) / 1e6
    megabytes += (SHIPPED / "zip.safetensors").stat().st_size / 1e6
    assert sum(float(size) for _, size in found["Files"]) == pytest.approx(megabytes, abs=0.02)
    versions = json.loads((SHIPPED / "zipper.json").read_text())["versions"]
    assert all(f"{package} {version}" in text for package, version in versions.items())


def test_the_code_of_the_card_runs(
    shipped: Pipeline, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = card(SHIPPED, counted(shipped.model), shipped.told())
    (tmp_path / "zip").symlink_to(SHIPPED)
    monkeypatch.chdir(tmp_path / "zip")
    sound = tiny.sound(tmp_path / "hello.wav")
    program = code(text).replace("hello.wav", str(sound)).replace('"..."', '"call anna"')
    namespace: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), namespace)
    tasks = [Task.parse(task) for task in checkpoint.load(SHIPPED)[1]["recipe"]["tasks"]]
    assert [segment.tower for segment in namespace["segments"]] == [
        lane.tower for lane in lanes(tasks[-1].produced)
    ]
    assert program.count("pipe.run(") == len(tasks) == 4


def test_a_saved_zip_has_its_card_which_people_may_edit(world: World, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(world.zip)
    pipeline.save_pretrained(tmp_path / "zip", include=["text"])
    written = (tmp_path / "zip" / "README.md").read_text()
    assert written == card(tmp_path / "zip", counted(pipeline.model), pipeline.told())
    assert tables(written)["Towers"][0][1] == "this zip"
    (tmp_path / "zip" / "README.md").write_text(written + "\nOur data came from a choir.\n")
    Pipeline.from_pretrained(tmp_path / "zip")


def test_the_hub_reads_its_head(world: World, tmp_path: Path) -> None:
    pinned = altered(world.zip, tmp_path / "zip", {"source": "me/on", "revision": "4f3c" * 10})
    text = card(pinned, {"text": 1, "speech": 2})
    head = ModelCard(text).data.to_dict()
    assert head == {
        "library_name": "zipper",
        "tags": ["zipper", "text", "speech"],
        "base_model": ["me/on"],
    }
    assert tables(text)["Towers"][0][:4] == ["text", "me/on", "4f3c" * 10, "frozen"]


def test_names_that_yaml_takes_for_truth_values_stay_names(world: World, tmp_path: Path) -> None:
    saved = json.loads((world.zip / "zipper.json").read_text())["config"]
    towers = {"on": saved["towers"]["text"], "no": saved["towers"]["speech"]}
    folder = altered(world.zip, tmp_path / "zip")
    (folder / "zipper.json").write_text(
        json.dumps(
            {
                "config": saved | {"towers": towers, "junctions": [{"on": 1, "no": 1}]},
                "versions": {"torch": "2"},
                "record": {},
            }
        )
    )
    assert ModelCard(card(folder, {"on": 1, "no": 2})).data.tags == ["zipper", "on", "no"]


def test_a_base_in_a_folder_is_asked_for_and_its_path_kept_back(world: World) -> None:
    text = card(world.zip, counted(Zipper.from_pretrained(world.zip)))
    assert str(world.folder) not in text
    assert tables(text)["Towers"][0][1] == "a folder elsewhere"
    program = code(text).replace('"."', repr(str(world.zip)))
    assert 'towers={"text": "where/text/lies"}' in program
    exec(program.replace("where/text/lies", str(world.folder / "text" / "tower")), {})
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "Training" not in tables(text)


def test_a_model_without_modalities_is_loaded_as_one(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    model.save_pretrained(tmp_path / "zip", include=["text"], record={"recipe": "my own words"})
    text = card(tmp_path / "zip", counted(model))
    assert "Modalities" not in tables(text)
    program = code(text).replace('"."', repr(str(tmp_path / "zip")))
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    assert isinstance(namespace["model"], Zipper)


def test_what_was_pruned_or_adapted_is_said(world: World, tmp_path: Path) -> None:
    pruned = altered(world.zip, tmp_path / "zip", {"lora": {"r": 8}}, dropped=["0:text>speech"])
    text = card(pruned, {"text": 1, "speech": 2})
    assert "1 links at 1 junctions" in text
    assert "Pruned: `0:text>speech`." in text
    assert tables(text)["Towers"][0][3] == "frozen, with a trained adapter"


def test_what_a_run_says_stays_in_its_cell(world: World, tmp_path: Path) -> None:
    model, task = Zipper.from_pretrained(world.zip), "text -> text|speech"
    run = {"recipe": {"steps": 3, "tasks": {task: 1.0}}, "step": 2, "dev": {task: 0.5}}
    model.save_pretrained(tmp_path / "zip", record=run)
    rows = (tmp_path / "zip" / "README.md").read_text().splitlines()
    (row,) = (row for row in rows if row.startswith("| dev loss"))
    assert row == "| dev loss, text -> text\\|speech | 0.5000 |"


def test_a_record_that_is_only_half_that_of_a_run_is_none(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    model.save_pretrained(tmp_path / "zip", record={"recipe": {"steps": 3}, "step": 2})
    assert "Training" not in tables((tmp_path / "zip" / "README.md").read_text())


def test_a_loss_that_is_no_number_is_told_as_none(world: World, tmp_path: Path) -> None:
    run = {"recipe": {"steps": 3}, "step": 2, "dev": {"text -> speech": math.inf}}
    Zipper.from_pretrained(world.zip).save_pretrained(tmp_path / "zip", record=run)
    training = dict(tables((tmp_path / "zip" / "README.md").read_text())["Training"])
    assert training["dev loss, text -> speech"] == "not finite"


def test_a_folder_without_a_zip_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match=r"zipper.json is not readable"):
        card(tmp_path, {})
