"""Saved zips: what is in the folder, that it comes back bit for bit, and that nothing damaged or foreign gets in."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import World

from zipper import checkpoint
from zipper.errors import ZipperError
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sequence import Segment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Path:
    """A copy of the saved pipeline, to do harm to."""
    return Path(shutil.copytree(world.zip, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is in it


def test_a_zip_comes_back_bit_for_bit(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    model.save_pretrained(tmp_path / "again", record={"why": "to see"})
    again = Zipper.from_pretrained(tmp_path / "again")
    assert again.config.junctions == model.config.junctions
    assert again.config.link == model.config.link
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert checkpoint.load(tmp_path / "again")[1] == {"why": "to see"}
    prompt = [Segment("text", tiny.text().encode("call anna"))]
    assert model.generate(prompt, ["speech", "text"]) == again.generate(prompt, ["speech", "text"])


def test_the_folder_holds_what_was_trained_and_names_what_was_not(world: World) -> None:
    found = files(world.zip)
    assert {name for name in found if name.endswith(".safetensors")} == {
        "zip.safetensors",
        "towers/speech/model.safetensors",
        "modalities/speech/codebook.safetensors",
    }
    assert not any(name.startswith("towers/text") for name in found)
    model = Zipper.from_pretrained(world.zip)
    added = {name for name, _ in model.named_parameters() if not name.startswith("towers.")}
    assert set(load_file(world.zip / "zip.safetensors")) == added
    pin = json.loads(found["zipper.json"])["config"]["towers"]["text"]
    assert Path(pin["source"]) == world.folder / "text" / "tower"
    assert len(pin["digest"]) == 64


def test_a_frozen_tower_may_be_taken_along(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    model.save_pretrained(tmp_path / "whole", include=["text"])
    moved = tmp_path / "elsewhere"
    (tmp_path / "whole").rename(moved)
    assert (moved / "towers" / "text" / "model.safetensors").is_file()
    again = Zipper.from_pretrained(moved)
    assert torch.equal(again.tower("text").get_input_embeddings().weight, model.tower("text").get_input_embeddings().weight)
    with pytest.raises(ZipperError, match="include names the tower 'video'"):
        model.save_pretrained(tmp_path / "more", include=["video"])


def test_every_file_is_listed_with_its_hash(world: World) -> None:
    listed = json.loads((world.zip / "manifest.json").read_text())["files"]
    assert listed.keys() == files(world.zip).keys() - {"manifest.json", "README.md"}


def test_nothing_is_pickled_or_unpickled(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "dump"), (pickle, "dumps")]:
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    Pipeline.from_pretrained(world.zip).save_pretrained(tmp_path / "again")
    for name, content in files(tmp_path / "again").items():
        assert name.endswith((".json", ".safetensors")) or name == "README.md", name
        assert not content.startswith((b"\x80", b"PK")), name


# --- where a base lies


def test_a_moved_base_is_said_where(world: World, saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "zipper.json").read_text())
    config["config"]["towers"]["text"]["source"] = str(tmp_path / "gone")
    (saved / "zipper.json").write_text(json.dumps(config))
    checkpoint.seal(saved)  # what somebody would do who changes a file on purpose
    with pytest.raises(ZipperError, match=r"gone does not exist"):
        Zipper.from_pretrained(saved)
    base = world.folder / "text" / "tower"
    for place in (base, str(base), Zipper.from_pretrained(world.zip).tower("text")):
        assert Zipper.from_pretrained(saved, towers={"text": place}).tower("text") is not None
    with pytest.raises(ZipperError, match="towers names the tower 'video'"):
        Zipper.from_pretrained(saved, towers={"video": base})


def test_a_foreign_base_is_refused_by_both_hashes(world: World, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    tiny.tower(tiny.text()).model.save_pretrained(tmp_path / "foreign")
    pin = json.loads((saved / "zipper.json").read_text())["config"]["towers"]["text"]["digest"]
    with pytest.raises(ZipperError, match=rf"'text' from .*foreign is not the one .* hash is \w{{16}}, the zip wants {pin[:16]}"):
        Zipper.from_pretrained(saved, towers={"text": tmp_path / "foreign"})


# --- what is damaged


def listed(folder: Path) -> Iterator[Path]:
    """The files that a model is made of; people may edit its card."""
    yield from (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md")


def test_one_wrong_bit_anywhere_is_found_and_the_file_named(saved: Path) -> None:
    for path in listed(saved):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            if path.name != "manifest.json":
                with pytest.raises(ZipperError, match=rf"{path} is damaged.*Copy the folder again"):
                    Pipeline.from_pretrained(saved)
        path.write_bytes(content)
    Pipeline.from_pretrained(saved)


def test_a_missing_file_is_named(saved: Path) -> None:
    for path in [*listed(saved)]:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ZipperError, match=r"has no manifest.json" if path.name == "manifest.json" else rf"{path} is missing"):
            Pipeline.from_pretrained(saved)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zip.safetensors", b"", r"zip.safetensors is damaged or not a safetensors file: it has 0 bytes"),
        ("zip.safetensors", b"\xff" * 64, r"zip.safetensors is damaged or not a safetensors file: it has 64 bytes, fewer than"),
        ("zipper.json", b"{", r"zipper.json is not readable JSON"),
        ("zipper.json", b"[1]", r"zipper.json should hold a JSON object; it holds a list"),
        ("zipper.json", b"\xff\xfe", r"zipper.json is not readable JSON"),
        ("zipper.json", b'{"format": 2, "config": {}}', r"has format 2; this version of zipper reads format 1"),
        ("zipper.json", b'{"format": 1, "config": {}}', r"not the configuration of a zip"),
        ("zipper.json", b'{"format": 1, "config": []}', r"reads format 1"),
        ("modalities/text/tokenizer.json", b"{}", r"not the definition of a fast tokenizer"),
        ("modalities/speech/units.json", b"{}", r"holds no speech units"),
        ("modalities.json", b"{}", r"modalities.json should hold one hash for each of \['speech', 'text'\]; it is about \[\]"),
        (
            "towers/speech/config.json",
            b"{}",
            r"towers/speech/config.json describes no causal language model that transformers knows",
        ),
    ],
)
def test_nonsense_with_a_right_hash_is_refused_as_well(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    checkpoint.seal(saved)
    with pytest.raises(ZipperError, match=message):
        Pipeline.from_pretrained(saved)


def test_a_cut_file_with_a_right_hash_is_refused(saved: Path) -> None:
    path = saved / "zip.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    checkpoint.seal(saved)
    with pytest.raises(ZipperError, match=r"zip.safetensors is damaged or not a safetensors file: it has \d+ bytes, its header"):
        Zipper.from_pretrained(saved)


def test_other_tensors_than_the_configuration_asks_for_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "zip.safetensors")
    gate = "links.0:text>speech.gate"
    for changed, message in [
        ({**tensors, "links.9.gate": tensors[gate].clone()}, r"tensors are not those .* \(differs in \['links.9.gate'\]\)"),
        ({name: t for name, t in tensors.items() if name != gate}, r"tensors are not those that .*zipper.json asks for"),
        ({**tensors, gate: torch.zeros(3)}, r"text>speech.gate has shape \(3,\), .*zipper.json wants"),
    ]:
        save_file(changed, saved / "zip.safetensors")
        checkpoint.seal(saved)
        with pytest.raises(ZipperError, match=message):
            Zipper.from_pretrained(saved)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "towers/../../outside.json"])
def test_a_manifest_that_reaches_outside_its_folder_is_refused(saved: Path, name: str) -> None:
    (saved.parent / "outside.json").write_text("{}")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = checkpoint.sha256(saved.parent / "outside.json")
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(ZipperError, match=r"lies outside its folder. Do not use this file"):
        Zipper.from_pretrained(saved)


def test_a_folder_of_links_as_the_hub_keeps_it_is_fine_where_the_links_may_lead(world: World, tmp_path: Path) -> None:
    for path in listed(world.zip):
        link = tmp_path / "snapshot" / path.relative_to(world.zip)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert checkpoint.load(tmp_path / "snapshot", root=world.folder) == checkpoint.load(world.zip)
    with pytest.raises(ZipperError, match=r"manifest.json is a link to .*zip/manifest.json, which lies outside its folder"):
        checkpoint.load(tmp_path / "snapshot")


def test_what_people_put_beside_a_model_is_left_alone(saved: Path) -> None:
    for name in ("README.md", ".gitattributes", "plots/loss.png", ".git/config.json"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("for people")
        Pipeline.from_pretrained(saved)
    checkpoint.seal(saved)
    (saved / "README.md").write_text("edited on the hub")
    Pipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", ["more.json", "pytorch_model.bin", "towers/speech/adapter_config.json", "modalities/x/units.json"])
def test_a_file_that_did_not_come_with_the_model_is_refused_where_it_would_be_read(saved: Path, name: str) -> None:
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("{}")
    if name == "pytorch_model.bin":  # nobody reads it here
        Pipeline.from_pretrained(saved)
    else:
        with pytest.raises(ZipperError, match=rf"{saved / name} is not in manifest.json: it did not come with this model"):
            Pipeline.from_pretrained(saved)


def test_what_is_no_saved_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match=r"nowhere does not exist. Give the folder that save_pretrained"):
        Zipper.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ZipperError, match=r"has no manifest.json, so it is not a saved model or was only half copied"):
        Zipper.from_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ZipperError, match=r"manifest.json is damaged"):
        Zipper.from_pretrained(tmp_path)


# --- writing


def test_a_failure_while_writing_leaves_the_old_folder_as_it_was(
    world: World, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved)
    pipeline = Pipeline.from_pretrained(saved)

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    for name in ("save_file", "flush", "sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, fail)
            with pytest.raises(
                ZipperError, match=r"copy could not be saved: No space left on device. What was saved before is as it"
            ):
                pipeline.save_pretrained(saved)
        assert files(saved) == before
        assert [path.name for path in saved.parent.iterdir()] == ["copy"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    world: World, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, seen = files(saved), checkpoint.os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        seen.append(b)
        if len(seen) == 2:
            raise OSError("a moment of bad luck")
        rename(a, b)

    pipeline = Pipeline.from_pretrained(saved)
    monkeypatch.setattr(checkpoint, "_exchange", lambda *_: False)  # a system that cannot
    monkeypatch.setattr(checkpoint.os, "rename", second_fails)
    with pytest.raises(ZipperError, match=r"bad luck. What was saved before is as it was"):
        pipeline.save_pretrained(saved)
    assert files(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["copy"]
    pipeline.save_pretrained(saved, record={"try": 2})  # the renames after the third work
    assert checkpoint.load(saved)[1] == {"try": 2}
    assert [path.name for path in saved.parent.iterdir()] == ["copy"]


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert checkpoint._exchange(tmp_path / "a", tmp_path / "b")
    assert files(tmp_path) == {"a/file": b"b", "b/file": b"a"}
    assert not checkpoint._exchange(tmp_path / "a", tmp_path / "gone")
    assert files(tmp_path) == {"a/file": b"b", "b/file": b"a"}


@pytest.mark.skipif(sys.platform != "linux", reason="folders change places in one step on Linux only")
def test_killed_at_any_moment_a_save_leaves_a_whole_folder(tmp_path: Path) -> None:
    folder, chance, seen = tmp_path / "model", random.Random(0), set()

    def write(number: int) -> None:
        with checkpoint.whole(folder) as temporary:
            for name in ("zipper.json", "other.json"):
                checkpoint.write_json(temporary / name, {"number": number})

    write(0)
    for start in range(1_000, 13_000, 1_000):
        writer = os.fork()
        if not writer:
            for number in range(start, start + 1_000):
                write(number)
            os._exit(0)
        until = time.monotonic() + 300
        while checkpoint.read_json(folder / "zipper.json")["number"] < start and time.monotonic() < until:
            time.sleep(0.001)  # the first one of this writer is there
        time.sleep(chance.uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        checkpoint.check(folder)
        numbers = {checkpoint.read_json(folder / name)["number"] for name in ("zipper.json", "other.json")}
        assert len(numbers) == 1
        seen |= numbers
    assert len(seen) == 12  # every writer came to write


def test_the_manifest_is_flushed_last_and_before_the_folder_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: order.append("place" if path == tmp_path else path.name[:9]))
    with checkpoint.whole(tmp_path / "model") as temporary:
        checkpoint.write_json(temporary / "zipper.json", {})
        assert temporary.name.startswith(".model.")
    assert order[0] == "zipper.js"
    assert order[1:] == ["manifest.", temporary.name[:9], "place"]


def test_saving_again_replaces_every_file_and_leaves_nothing_beside_it(world: World, saved: Path) -> None:
    pipeline = Pipeline.from_pretrained(saved)
    with torch.no_grad():
        for p in pipeline.model.links.parameters():
            p += 1
    (saved / "notes.txt").write_text("of the old one")
    pipeline.save_pretrained(saved)
    again = Pipeline.from_pretrained(saved).model.state_dict()
    assert all(torch.equal(again[name], p) for name, p in pipeline.model.state_dict().items())
    assert not (saved / "notes.txt").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["copy"]


def test_a_foreign_folder_or_file_is_never_replaced(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(ZipperError, match=rf"{name} exists and holds something else than a saved model"):
            model.save_pretrained(tmp_path / name)
    assert files(tmp_path) == {"thesis/chapter.tex": b"years of work", "file": b"a file"}
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    checkpoint.check(tmp_path / "empty")


# --- which of several is taken


def test_the_newest_whole_one_is_taken_and_each_that_is_passed_over_is_named(saved: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(saved, tmp_path / f"step-{n}")) for n in range(4)]
    assert checkpoint.newest(folders) == folders[3]
    (folders[3] / "manifest.json").unlink()
    (folders[2] / "zip.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="Skipping a checkpoint that is not whole.*step-") as warned:
        assert checkpoint.newest(folders) == folders[1]
    assert [next(n for n in "0123" if f"step-{n}" in str(w.message)) for w in warned] == ["3", "2"]
    with pytest.warns(UserWarning):
        assert checkpoint.newest(folders[2:]) is None
    assert checkpoint.newest([]) is None


@pytest.mark.parametrize("name", ["read_json", "header", "sha256"])
def test_none_is_taken_instead_of_one_that_cannot_be_read(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    older = Path(shutil.copytree(saved, saved.parent / "older"))

    def fail(path: Path) -> None:
        if path.is_relative_to(saved):
            error = OSError(5, "Input/output error")
            raise error if name == "sha256" else ZipperError(f"{path} is not readable") from error

    monkeypatch.setattr(checkpoint, name, fail)
    with pytest.raises(ZipperError, match=rf"{saved} cannot be read: .*Input/output error. It may be whole, so none before it"):
        checkpoint.newest([older, saved])


def test_a_model_that_is_removed_is_gone_with_one_rename(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", fail)
        with pytest.raises(ZipperError, match=r"copy could not be removed: Read-only file system"):
            checkpoint.remove(saved)
    checkpoint.check(saved)
    assert os.listdir(saved.parent) == ["copy"]
    checkpoint.remove(saved)
    checkpoint.remove(saved)  # there is none: nothing to do
    assert os.listdir(saved.parent) == []
