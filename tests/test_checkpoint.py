"""Saved zips: what is in the folder, that it comes back bit for bit, and that nothing damaged or
foreign gets in."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import World
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zipper.config import TowerConfig
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint, zips
from zipper.strand import Segment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Path:
    """A copy of the saved pipeline, to do harm to."""
    return Path(shutil.copytree(world.zip, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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
    assert torch.equal(
        again.tower("text").get_input_embeddings().weight,
        model.tower("text").get_input_embeddings().weight,
    )
    with pytest.raises(ZipperError, match="include names the tower 'video'"):
        model.save_pretrained(tmp_path / "more", include=["video"])


def test_every_file_is_listed_with_its_hash(world: World) -> None:
    listed = json.loads((world.zip / "manifest.json").read_text())["files"]
    assert listed.keys() == files(world.zip).keys() - {"manifest.json", "README.md"}


def test_nothing_is_pickled_or_unpickled(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in [
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (pickle, "dump"),
        (pickle, "dumps"),
    ]:
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


def test_a_foreign_base_is_refused_by_both_hashes(
    world: World, saved: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    tiny.tower(tiny.text()).model.save_pretrained(tmp_path / "foreign")
    pin = json.loads((saved / "zipper.json").read_text())["config"]["towers"]["text"]["digest"]
    with pytest.raises(
        ZipperError,
        match=rf"'text' from .*foreign is not the one .* hash is \w{{16}}, the zip wants "
        rf"{pin[:16]}",
    ):
        Zipper.from_pretrained(saved, towers={"text": tmp_path / "foreign"})


def project(world: World, place: Path) -> Path:
    """A project that its owner may move: the frozen tower, and a zip that names it."""
    shutil.copytree(world.folder / "text" / "tower", place / "towers" / "text")
    model = Zipper.from_pretrained(world.zip, towers={"text": place / "towers" / "text"})
    model.save_pretrained(place / "runs" / "a" / "zip")
    return place


def source(folder: Path) -> Path:
    """Where the frozen tower of a loaded zip was found."""
    return Path(Zipper.from_pretrained(folder).config.towers["text"].source)


@pytest.mark.parametrize(
    "how", ["renamed", "copied", "deeper", "by a link", "alone", "to a folder of its own name"]
)
def test_a_zip_finds_its_base_whoever_of_them_moved(world: World, tmp_path: Path, how: str) -> None:
    place = project(world, tmp_path / "project")
    pin = json.loads((place / "runs" / "a" / "zip" / "zipper.json").read_text())["config"][
        "towers"
    ]["text"]
    assert (pin["source"], pin["relative"]) == (
        str(place / "towers" / "text"),
        "../../../towers/text",
    )
    if how == "renamed":
        moved = place.rename(tmp_path / "other")
    elif how == "copied":  # the copy stands on its own
        moved = Path(shutil.copytree(place, tmp_path / "copy"))
    elif how == "deeper":
        (tmp_path / "a" / "b" / "c").mkdir(parents=True)
        moved = place.rename(tmp_path / "a" / "b" / "c" / "project")
    elif how == "by a link":
        moved = tmp_path / "link"
        moved.symlink_to(place.rename(tmp_path / "hidden"))
    else:  # the tower stays: its absolute place holds
        name = "runs" if how == "to a folder of its own name" else "zip"
        (place / "runs" / "a" / "zip").rename(tmp_path / name)
        assert source(tmp_path / name) == place / "towers" / "text"
        return
    assert source(moved / "runs" / "a" / "zip") == (moved / "towers" / "text").resolve()
    again = Zipper.from_pretrained(moved / "runs" / "a" / "zip")
    assert all(
        torch.equal(p, again.state_dict()[name])
        for name, p in Zipper.from_pretrained(world.zip).state_dict().items()
    )


def test_a_folder_in_which_no_model_lies_any_more_is_passed_over(tmp_path: Path) -> None:
    for name in ("near", "far", "zip"):
        (tmp_path / name).mkdir()
    pin = TowerConfig(str(tmp_path / "far"), 8, 1, 9, 0, 1, relative="../near")
    for name in ("far", "near"):  # where it was, and what came with the zip, which goes first
        (tmp_path / name / "config.json").touch()
        assert zips.base(tmp_path / "zip", "text", pin) == tmp_path / name


def test_a_base_that_is_nowhere_is_named_with_all_that_helps(world: World, tmp_path: Path) -> None:
    place = project(world, tmp_path / "project")
    (place / "towers").rename(tmp_path / "gone")
    here = place / "runs" / "a" / "zip"
    message = rf"frozen tower 'text' of {here} was not found: {place}/towers/text does not exist. .*--tower text=PATH, .*towers="
    with pytest.raises(ZipperError, match=message):
        Zipper.from_pretrained(here)
    (place / "towers" / "text").mkdir(parents=True)
    with pytest.raises(ZipperError, match=r"towers/text has no config.json"):
        Zipper.from_pretrained(here)
    shutil.copytree(
        world.folder / "speech" / "tower", place / "towers" / "text", dirs_exist_ok=True
    )
    with pytest.raises(
        ZipperError,
        match=r"'text' from .* is not the one .* Say where the right one lies now: --tower "
        r"text=PATH",
    ):
        Zipper.from_pretrained(here)
    zips.repin(here, {"text": tmp_path / "gone" / "text"})
    assert source(here) == tmp_path / "gone" / "text"
    before, after = files(project(world, tmp_path / "fresh") / "runs" / "a" / "zip"), files(here)
    assert {name for name in before if before[name] != after[name]} == {
        "zipper.json",
        "manifest.json",
        "README.md",
    } - ({"README.md"} if before["README.md"] == after["README.md"] else set())


def test_a_base_that_was_pinned_anew_is_found_when_both_are_moved(
    world: World, tmp_path: Path
) -> None:
    place = project(world, tmp_path / "project")
    (place / "towers").rename(place / "bases")
    zips.repin(place / "runs" / "a" / "zip", {"text": place / "bases" / "text"})
    moved = place.rename(tmp_path / "moved")
    assert source(moved / "runs" / "a" / "zip") == moved / "bases" / "text"


def test_a_base_is_loaded_in_the_precision_in_which_it_was_pinned(tmp_path: Path) -> None:
    model = tiny.tower(tiny.text()).model.bfloat16()
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    towers = {"text": tmp_path / "half", "speech": tiny.tower(tiny.units())}
    born = Zipper.from_towers(towers, train=("speech",), link=LinkConfig(head_width=16))
    born.save_pretrained(tmp_path / "zip")
    again = Zipper.from_pretrained(tmp_path / "zip", towers={"text": tmp_path / "whole"})
    assert again.tower("text").dtype == torch.bfloat16


def test_what_is_taken_along_is_pinned_in_the_precision_that_it_has(
    world: World, tmp_path: Path
) -> None:
    model = Zipper.from_pretrained(world.zip, dtype="bfloat16")
    model.save_pretrained(tmp_path / "zip", include=["text"])
    assert Zipper.from_pretrained(tmp_path / "zip").tower("text").dtype == torch.bfloat16


def test_a_model_in_memory_keeps_its_precision_whatever_the_zip_is_loaded_in(world: World) -> None:
    given = Zipper.from_pretrained(world.zip).tower("text")
    again = Zipper.from_pretrained(world.zip, towers={"text": given}, dtype="bfloat16")
    assert given.dtype == torch.float32 and again.tower("text") is given
    assert again.tower("speech").dtype == torch.bfloat16


def test_pins_of_older_zips_hold(world: World, saved: Path) -> None:
    config = json.loads((saved / "zipper.json").read_text())
    assert config["config"]["towers"]["text"].pop("relative")
    (saved / "zipper.json").write_text(json.dumps(config))
    checkpoint.seal(saved)
    assert source(saved) == world.folder / "text" / "tower"


def test_a_source_is_meant_from_where_it_was_given(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from where the process happens to be when it saves, or loads."""
    monkeypatch.chdir(world.folder)
    model = Zipper.from_towers(
        {"text": "text/tower", "speech": "./speech/tower"}, train=("speech",), tokens={"text": 3.0}
    )
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("zip")
    monkeypatch.chdir("/")
    assert source(tmp_path / "zip") == world.folder / "text" / "tower"
    monkeypatch.setenv("HOME", str(world.folder))
    model = Zipper.from_towers(
        {"text": "~/text/tower", "speech": world.folder / "speech" / "tower"}, train=("speech",)
    )
    assert model.config.towers["text"].source == str(world.folder / "text" / "tower")


def test_a_base_that_lies_in_the_zip_is_not_lost_when_the_zip_is_saved_over(
    world: World, tmp_path: Path
) -> None:
    Pipeline.from_pretrained(world.zip).save_pretrained(tmp_path / "zip", include=["text"])
    for loaded in (
        Pipeline.from_pretrained(tmp_path / "zip"),
        Zipper.from_pretrained(tmp_path / "zip"),
    ):
        loaded.save_pretrained(tmp_path / "zip")
        assert (tmp_path / "zip" / "towers" / "text" / "model.safetensors").is_file()
        Zipper.from_pretrained(tmp_path / "zip")


# --- what is saved can be loaded


def trained(change: Any = None, dtype: torch.dtype = torch.float32) -> Zipper:
    """A zip of two towers that learn, one with an odd configuration."""
    odd, plain = (tiny.tower(modality).model.to(dtype) for modality in (tiny.text(), tiny.units()))
    if change is not None:
        change(odd)
    return Zipper.from_towers(
        {"text": odd, "speech": plain}, train=("text", "speech"), link=LinkConfig(head_width=16)
    )


ODD = {
    "code beside an official class": lambda m: setattr(
        m.config, "auto_map", {"AutoModelForCausalLM": "x.Y"}
    ),
    "code for generation": lambda m: setattr(m.config, "custom_generate", "x"),
    "a kernel by name": lambda m: setattr(m.config, "experts_implementation", "x"),
    "sampling without sampling": lambda m: setattr(m.generation_config, "temperature", 0.5),
    "many beams without beams": lambda m: setattr(m.generation_config, "length_penalty", 0.5),
    "several ends": lambda m: setattr(m.config, "eos_token_id", [m.config.eos_token_id, 5]),
}


@pytest.mark.parametrize("change", [None, *ODD.values()], ids=["nothing", *ODD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_tower_with_odd_settings_is_saved_without_them_and_loaded(
    tmp_path: Path, change: Any, dtype: torch.dtype
) -> None:
    model = trained(change, dtype)
    model.save_pretrained(tmp_path / "zip")
    again = Zipper.from_pretrained(tmp_path / "zip")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert again.tower("text").dtype == dtype
    written = (tmp_path / "zip" / "towers" / "text" / "config.json").read_text()
    assert not any(
        key in written for key in ("auto_map", "custom_generate", "experts_implementation")
    )


def test_one_tower_of_several_may_be_in_double_precision(tmp_path: Path) -> None:
    model = trained(lambda m: m.double())
    model.save_pretrained(tmp_path / "zip")
    again = Zipper.from_pretrained(tmp_path / "zip")
    assert again.tower("text").dtype == torch.float64 != again.tower("speech").dtype
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_a_save_leaves_a_model_its_own_settings_of_generation(tmp_path: Path) -> None:
    model = trained(ODD["sampling without sampling"])
    own = model.tower("text").generation_config
    model.save_pretrained(tmp_path / "zip")
    assert model.tower("text").generation_config is own and own.temperature == 0.5


def test_parameters_whose_numbers_do_not_lie_in_a_row_are_saved_as_well(
    world: World, tmp_path: Path
) -> None:
    model = Zipper.from_pretrained(world.zip)
    weight = model.links["0:text>speech"].query.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path / "zip")
    again = Zipper.from_pretrained(tmp_path / "zip")
    assert torch.equal(again.links["0:text>speech"].query.weight, weight)


class Own(LlamaForCausalLM):
    """A class that only its writer's program knows."""

    class config_class(LlamaConfig):
        model_type = "somebodys_own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(m.config, "quantization_config", {"bits": 4}),
            "'quantization_config', by which",
        ),
        (
            lambda m: setattr(m.config, "num_layers_to_skip", 20_000),
            "'num_layers_to_skip' to 20000, which no model has",
        ),
        (
            lambda m: setattr(m.config, "scale", 2**60),
            "'scale' to 1152921504606846976, which no model has",
        ),
    ],
)
def test_a_tower_that_would_not_be_loaded_again_cannot_learn(change: Any, message: str) -> None:
    with pytest.raises(
        ZipperError,
        match=r"LlamaForCausalLM could be trained and saved, but not loaded again: its "
        rf"config.json .*{message}",
    ):
        trained(change)


def test_a_class_that_only_a_program_knows_can_be_frozen_and_cannot_learn() -> None:
    config = Own.config_class(
        **{**tiny.shape(), "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 1}
    )
    towers = {"text": Own(config).eval(), "speech": tiny.tower(tiny.units())}
    Zipper.from_towers(towers, link=LinkConfig(head_width=16))
    with pytest.raises(
        ZipperError,
        match=r"Own could be trained and saved, but not loaded again: its config.json describes "
        r"no causal",
    ):
        Zipper.from_towers(towers, train=("text",), link=LinkConfig(head_width=16))


def fill(model: Zipper, value: float) -> None:
    with torch.no_grad():
        model.tower("speech").lm_head.weight[3, 4] = value


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda m: fill(m, torch.nan),
            r"/copy was not saved, for it could not be .*/copy/towers/speech/model.safetensors: "
            r"the tensor .* holds NaN",
        ),
        (
            lambda m: m.links["0:text>speech"].gate.data.fill_(torch.inf),
            "zip.safetensors: the tensor links.0:text>speech.gate holds NaN",
        ),
        (
            lambda m: m.links.double(),
            "zip.safetensors: .* is of type F64, but no tower of .*zipper.json is in float64",
        ),
        (
            lambda m: m.links.to(torch.float8_e4m3fn),
            "zip.safetensors is damaged or not .*'F8_E4M3'",
        ),
        (
            lambda m: setattr(m.tower("speech").config, "quantization_config", {}),
            "sets 'quantization_config'",
        ),
        (
            lambda m: m.links["0:text>speech"].register_buffer("more", torch.zeros(3)),
            "tensors are not those .*more",
        ),
    ],
)
def test_what_could_not_be_loaded_does_not_take_the_place_of_what_can(
    world: World, saved: Path, harm: Any, message: str
) -> None:
    before, pipeline = files(saved), Pipeline.from_pretrained(saved)
    harm(pipeline.zip)
    for save in (pipeline.save_pretrained, pipeline.rehearse):
        with pytest.raises(ZipperError, match=message):
            save(saved)
        assert files(saved) == before and os.listdir(saved.parent) == ["copy"]


def test_a_rehearsal_raises_what_a_save_would_and_leaves_nothing(
    world: World, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pipeline = files(saved), Pipeline.from_pretrained(saved)
    pipeline.rehearse(saved, {"step": 3})
    pipeline.rehearse(saved.parent / "new" / "place")
    assert files(saved) == before and not [*(saved.parent / "new").iterdir()]

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(
        ZipperError,
        match=r"copy could not be saved: No space left on device. Nothing was changed. Make room",
    ):
        pipeline.rehearse(saved)
    assert files(saved) == before and not [
        path for path in saved.parent.iterdir() if path.name.startswith(".")
    ]


# --- what is damaged


def listed(folder: Path) -> Iterator[Path]:
    """The files that a model is made of; people may edit its card."""
    yield from (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md"
    )


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
        with pytest.raises(
            ZipperError,
            match=r"has no manifest.json"
            if path.name == "manifest.json"
            else rf"{path} is missing",
        ):
            Pipeline.from_pretrained(saved)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "zip.safetensors",
            b"",
            r"zip.safetensors is damaged or not a safetensors file: it has 0 bytes",
        ),
        (
            "zip.safetensors",
            b"\xff" * 64,
            r"zip.safetensors is damaged or not a safetensors file: it has 64 bytes, fewer than",
        ),
        ("zipper.json", b"{", r"zipper.json is not readable JSON"),
        ("zipper.json", b"[1]", r"zipper.json should hold a JSON object; it holds a list"),
        ("zipper.json", b"\xff\xfe", r"zipper.json is not readable JSON"),
        (
            "zipper.json",
            b'{"format": 2, "config": {}}',
            r"has format 2; this version of zipper reads format 1",
        ),
        ("zipper.json", b'{"format": 1, "config": {}}', r"not the configuration of a zip"),
        ("zipper.json", b'{"format": 1, "config": []}', r"reads format 1"),
        ("modalities/text/tokenizer.json", b"{}", r"not the definition of a fast tokenizer"),
        ("modalities/speech/units.json", b"{}", r"holds no speech units"),
        (
            "modalities.json",
            b"{}",
            r"modalities.json should hold one hash for each of \['speech', 'text'\]; it is about "
            r"\[\]",
        ),
        (
            "towers/speech/config.json",
            b"{}",
            r"towers/speech/config.json describes no causal language model that transformers knows",
        ),
    ],
)
def test_nonsense_with_a_right_hash_is_refused_as_well(
    saved: Path, name: str, content: bytes, message: str
) -> None:
    (saved / name).write_bytes(content)
    checkpoint.seal(saved)
    with pytest.raises(ZipperError, match=message):
        Pipeline.from_pretrained(saved)


def test_a_cut_file_with_a_right_hash_is_refused(saved: Path) -> None:
    path = saved / "zip.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    checkpoint.seal(saved)
    with pytest.raises(
        ZipperError,
        match=r"zip.safetensors is damaged or not a safetensors file: it has \d+ bytes, its header",
    ):
        Zipper.from_pretrained(saved)


def test_other_tensors_than_the_configuration_asks_for_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "zip.safetensors")
    gate = "links.0:text>speech.gate"
    for changed, message in [
        (
            {**tensors, "links.9.gate": tensors[gate].clone()},
            r"tensors are not those .* \(differs in \['links.9.gate'\]\)",
        ),
        (
            {name: t for name, t in tensors.items() if name != gate},
            r"tensors are not those that .*zipper.json asks for",
        ),
        (
            {**tensors, gate: torch.zeros(3)},
            r"text>speech.gate has shape \(3,\), .*zipper.json wants",
        ),
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


def test_a_folder_of_links_as_the_hub_keeps_it_is_fine_where_the_links_may_lead(
    world: World, tmp_path: Path
) -> None:
    for path in listed(world.zip):
        link = tmp_path / "snapshot" / path.relative_to(world.zip)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert checkpoint.load(tmp_path / "snapshot", root=world.folder) == checkpoint.load(world.zip)
    with pytest.raises(
        ZipperError,
        match=r"manifest.json is a link to .*zip/manifest.json, which lies outside its folder",
    ):
        checkpoint.load(tmp_path / "snapshot")


def test_what_goes_away_while_it_is_looked_at_stops_no_other_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".a.zipper-new.x1y2z3w4"
    left.mkdir()
    real = os.open

    def gone(path: Any, *options: Any, **more: Any) -> int:
        if Path(path) == left and left.exists():
            left.rmdir()  # its writer has just put it into its place
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", gone)
    checkpoint.clean(tmp_path)
    assert not left.exists()


def test_what_people_put_beside_a_model_is_left_alone(saved: Path) -> None:
    for name in ("README.md", ".gitattributes", "plots/loss.png", ".git/config.json"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("for people")
        Pipeline.from_pretrained(saved)
    checkpoint.seal(saved)
    (saved / "README.md").write_text("edited on the hub")
    Pipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    "name",
    [
        "more.json",
        "pytorch_model.bin",
        "towers/speech/adapter_config.json",
        "modalities/x/units.json",
    ],
)
def test_a_file_that_did_not_come_with_the_model_is_refused_where_it_would_be_read(
    saved: Path, name: str
) -> None:
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("{}")
    if name == "pytorch_model.bin":  # nobody reads it here
        Pipeline.from_pretrained(saved)
    else:
        with pytest.raises(
            ZipperError,
            match=rf"{saved / name} is not in manifest.json: it did not come with this model",
        ):
            Pipeline.from_pretrained(saved)


def test_what_is_no_saved_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ZipperError, match=r"nowhere does not exist. Give the folder that save_pretrained"
    ):
        Zipper.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        ZipperError,
        match=r"has no manifest.json, so it is not a saved model or was only half copied",
    ):
        Zipper.from_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ZipperError, match=r"manifest.json is damaged"):
        Zipper.from_pretrained(tmp_path)


def described(folder: Path, name: str, **changes: Any) -> None:
    """Change what a JSON file of a folder says, on purpose: with a manifest that fits."""
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(data | changes))
    checkpoint.seal(folder)


@pytest.mark.parametrize(
    "key",
    [
        "auto_map",
        "custom_generate",
        "transformers_weights",
        "attn_implementation",
        "_experts_implementation",
        "quantization_config",
        "compression_config",
    ],
)
def test_a_setting_by_which_code_or_files_come_in_is_refused_wherever_it_stands(
    saved: Path, key: str
) -> None:
    described(saved, "towers/speech/config.json", more=[{"deep": {key: "x"}}])
    with pytest.raises(ZipperError, match=rf"sets '{key}', by which other code or files come in"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", -20_000), ("max_depth", 10_001), ("size", -(2**60))]
)
def test_a_number_that_no_model_has_is_refused(saved: Path, key: str, value: int) -> None:
    described(saved, "towers/speech/config.json", **{key: value})
    with pytest.raises(ZipperError, match=rf"sets '{key}' to {value}, which no model has"):
        checkpoint.load(saved)


@pytest.mark.parametrize("source", ["../outside", "towers/../..", "a\nb", "towers/text", None])
def test_a_tower_that_comes_from_where_none_may_is_refused(saved: Path, source: Any) -> None:
    config = json.loads((saved / "zipper.json").read_text())["config"]
    config["towers"]["speech"]["source"] = source
    described(saved, "zipper.json", config=config)
    with pytest.raises(ZipperError, match=r"the tower 'speech' (comes from|lies in)"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("zipper.json", {"record": [1]}, "reads format 1"),
        ("modalities.json", {"text": "0" * 63}, "should hold one hash for each"),
        ("modalities.json", {"text": None}, "should hold one hash for each"),
    ],
)
def test_a_record_and_pins_are_what_they_should_be(
    saved: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    described(saved, name, **changes)
    with pytest.raises(ZipperError, match=message):
        checkpoint.load(saved)


def test_a_tokenizer_may_say_so_much_of_each_token_and_no_more(saved: Path) -> None:
    path, most = saved / "modalities/text/tokenizer.json", 1_000_000 + 500 * tiny.text().vocabulary
    content = path.read_bytes()
    path.write_bytes(content.ljust(most))
    checkpoint.seal(saved)
    checkpoint.load(saved)
    path.write_bytes(content.ljust(most + 1))
    checkpoint.seal(saved)
    with pytest.raises(ZipperError, match=rf"tokenizer.json has more than {most} bytes"):
        checkpoint.load(saved)


def test_other_tensors_than_those_of_a_tower_are_refused(saved: Path) -> None:
    path = saved / "towers/speech/model.safetensors"
    tensors, name = load_file(path), "model.norm.weight"
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "differs in"),
        (tensors | {name: tensors[name].long()}, "norm.weight is of type I64, .* wants torch"),
    ):
        save_file(changed, path, {"format": "pt"})
        checkpoint.seal(saved)
        with pytest.raises(ZipperError, match=message):
            checkpoint.load(saved)


def test_a_tensor_that_lies_in_two_files_is_refused(tmp_path: Path) -> None:
    entry = checkpoint.Entry("F32", (1,), 0, 4)
    shards = {"model-00001-of-00002.safetensors": {"x": entry}}
    index = tmp_path / checkpoint.INDEX
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys("x", "model-00002-of-00002.safetensors")})
    )
    with pytest.raises(ZipperError, match="does not say which file holds which tensor"):
        checkpoint._held(tmp_path, shards | {"model-00002-of-00002.safetensors": {"x": entry}})


def test_a_file_that_is_a_link_to_elsewhere_and_a_folder_that_is_one_are_refused(
    saved: Path,
) -> None:
    outside = saved.rename(saved.with_name("outside"))
    shutil.copytree(outside, saved)
    (saved / "zip.safetensors").unlink()
    (saved / "zip.safetensors").symlink_to(outside / "zip.safetensors")
    with pytest.raises(ZipperError, match=r"zip.safetensors is a link to .* outside its folder"):
        checkpoint.load(saved)
    (outside / "towers" / "speech").rename(outside / "stuff")
    (outside / "towers" / "speech").symlink_to("../stuff")
    with pytest.raises(ZipperError, match=r"towers/speech is not in manifest.json"):
        checkpoint.load(outside)


def test_a_tower_that_wants_large_tables_which_no_file_holds_cannot_learn() -> None:
    config = AutoConfig.for_model(
        "gpt_neo",
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        attention_types=[[["global"], 1]],
        vocab_size=20,
        max_position_embeddings=16_384,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ZipperError, match=r"asks for \d+ bytes of tables that no file holds"):
        checkpoint.check_tower(model, model.state_dict())


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
                ZipperError,
                match=r"copy could not be saved: No space left on device. What was saved before "
                r"is as it",
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


@pytest.mark.skipif(
    sys.platform != "linux", reason="folders change places in one step on Linux only"
)
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
        while (
            checkpoint.read_json(folder / "zipper.json")["number"] < start
            and time.monotonic() < until
        ):
            time.sleep(0.001)  # the first one of this writer is there
        time.sleep(chance.uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        checkpoint.check(folder)
        numbers = {
            checkpoint.read_json(folder / name)["number"] for name in ("zipper.json", "other.json")
        }
        assert len(numbers) == 1
        seen |= numbers
    assert len(seen) == 12  # every writer came to write


def test_the_manifest_is_flushed_last_and_before_the_folder_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        checkpoint,
        "flush",
        lambda path: order.append("place" if path == tmp_path else path.name[:9]),
    )
    with checkpoint.whole(tmp_path / "model") as temporary:
        checkpoint.write_json(temporary / "zipper.json", {})
        assert temporary.name.startswith(".model.")
    assert order[0] == "zipper.js"
    assert order[1:] == ["manifest.", temporary.name[:9], "place"]


def test_saving_again_replaces_its_own_files_and_leaves_those_of_others(
    world: World, saved: Path
) -> None:
    pipeline = Pipeline.from_pretrained(saved)
    with torch.no_grad():
        for p in pipeline.model.links.parameters():
            p += 1
    listed = checkpoint.read_json(saved / checkpoint.MANIFEST)["files"]
    mine = ["notes.txt", ".git/HEAD"]
    for name in mine:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("mine")
    (saved / "link").symlink_to("notes.txt")
    pipeline.save_pretrained(saved)
    assert checkpoint.read_json(saved / checkpoint.MANIFEST)["files"].keys() == listed.keys()
    assert (saved / "link").is_symlink() and all(
        (saved / name).read_text() == "mine" for name in mine
    )
    again = Pipeline.from_pretrained(saved).model.state_dict()
    assert all(torch.equal(again[name], p) for name, p in pipeline.model.state_dict().items())
    assert [path.name for path in saved.parent.iterdir()] == ["copy"]


def test_a_foreign_folder_or_file_is_never_replaced(world: World, tmp_path: Path) -> None:
    model = Zipper.from_pretrained(world.zip)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "web app").mkdir()
    (tmp_path / "web app" / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "manifest.json").write_text('{"files": {"index.html": {}}}')
    for name in ("thesis", "file", "web app", "files"):
        with pytest.raises(
            ZipperError, match=rf"{name} exists and holds something else than a saved model"
        ):
            model.save_pretrained(tmp_path / name)
    assert files(tmp_path) == {
        "thesis/chapter.tex": b"years of work",
        "file": b"a file",
        "web app/manifest.json": b'{"name": "my web app"}',
        "files/manifest.json": b'{"files": {"index.html": {}}}',
    }
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    checkpoint.check(tmp_path / "empty")


@pytest.mark.parametrize("lost", ["manifest.json", "zipper.json"])
def test_a_damaged_model_may_be_saved_over_and_nothing_of_it_stays(saved: Path, lost: str) -> None:
    pipeline = Pipeline.from_pretrained(saved)
    (saved / "notes.txt").write_text("mine")
    if lost == "manifest.json":
        (saved / lost).write_text("{")
    else:
        (saved / lost).unlink()
    pipeline.zip.save_pretrained(saved)
    Zipper.from_pretrained(saved)
    assert not (saved / "modalities").exists() and not (saved / "modalities.json").exists()
    assert (saved / "notes.txt").read_text() == "mine"


def test_links_beside_a_model_stay_links_and_nothing_beside_it_becomes_a_part_of_it(
    world: World, saved: Path
) -> None:
    pipeline, base = Pipeline.from_pretrained(saved), world.folder / "text" / "tower"
    listed = checkpoint.read_json(saved / checkpoint.MANIFEST)["files"].keys()
    (saved / "plots").mkdir()
    (saved / "notes.txt").write_text("mine")
    links = {saved / "last": "notes.txt", saved / "plots" / "gone": "nowhere"}
    for link, target in links.items():
        link.symlink_to(target)
    for again in (
        lambda: pipeline.save_pretrained(saved),
        lambda: zips.repin(saved, {"text": base}),
    ):
        again()
        assert {link: os.readlink(link) for link in links} == links
        assert checkpoint.read_json(saved / checkpoint.MANIFEST)["files"].keys() == listed
    (saved / "notes.txt").write_text("edited")
    Pipeline.from_pretrained(saved)


def test_what_people_put_beside_a_model_is_flushed_before_the_old_folder_goes(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, flushed = Pipeline.from_pretrained(saved), set()
    (saved / "plots").mkdir()
    (saved / "plots" / "loss.png").write_text("mine")
    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.add(path.name))
    pipeline.save_pretrained(saved)
    assert {"plots", "loss.png"} <= flushed


def test_who_may_read_the_place_may_read_what_is_saved_there(tmp_path: Path) -> None:
    with checkpoint.whole(tmp_path / "model") as temporary:
        checkpoint.write_json(temporary / checkpoint.CONFIG, {})
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_a_file_that_was_not_written_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    message = r"model was not saved, for it could not be loaded again: .*/model/zipper.json is not"
    with (
        pytest.raises(ZipperError, match=message),
        checkpoint.whole(tmp_path / "model", checkpoint.examine) as temporary,
    ):
        checkpoint.write_json(temporary / "other.json", {})


def test_a_rehearsal_for_a_foreign_folder_is_refused_as_the_save_would_be(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ZipperError, match=r"thesis exists and holds something else"):
        Pipeline.from_pretrained(saved).rehearse(tmp_path / "thesis")
    assert files(tmp_path / "thesis") == {"chapter.tex": b"years of work"}


def test_a_model_whose_removal_was_killed_does_not_come_back(saved: Path) -> None:
    gone = saved.with_name(".copy.zipper-gone.x1y2z3w4")
    gone.mkdir()
    saved.rename(gone / saved.name)
    checkpoint.clean(gone.parent)
    assert os.listdir(gone.parent) == []


def test_nothing_is_deleted_before_the_disk_knows_what_is_in_its_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, order = saved.with_name(".copy.zipper-old.x1y2z3w4"), []
    old.mkdir()
    saved.rename(old / saved.name)

    def noted(name: str, real: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            order.append(name)
            return real(*given, **more)

        return call

    for module, name in ((checkpoint, "flush"), (os, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    checkpoint.clean(saved.parent)
    assert order == ["flush", "rename", "flush", "rmtree"]
    assert os.listdir(saved.parent) == ["copy"]


def test_folders_that_a_save_makes_are_flushed_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(checkpoint, "flush", flushed.append)
    with checkpoint.whole(tmp_path / "runs" / "a" / "model") as temporary:
        checkpoint.write_json(temporary / checkpoint.CONFIG, {})
    assert flushed[:2] == [tmp_path, tmp_path / "runs"]


def test_what_somebody_elses_save_left_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, real = tmp_path / ".a.zipper-new.x1y2z3w4", os.open
    theirs.mkdir()

    def closed(path: Any, *options: Any, **more: Any) -> int:
        if path == theirs:
            raise PermissionError(13, "Permission denied")
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", closed)
    with checkpoint.whole(tmp_path / "model") as temporary:
        checkpoint.write_json(temporary / checkpoint.CONFIG, {})
    assert {*os.listdir(tmp_path)} == {theirs.name, "model"}


def test_a_folder_that_cannot_be_listed_is_an_error(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def closed(path: Any) -> Any:
        if path == os.fspath(saved / "towers"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError):
        [*checkpoint.inside(saved)]


# --- which of several is taken


def test_the_newest_whole_one_is_taken_and_each_that_is_passed_over_is_named(
    saved: Path, tmp_path: Path
) -> None:
    folders = [Path(shutil.copytree(saved, tmp_path / f"step-{n}")) for n in range(4)]
    assert checkpoint.newest(folders) == folders[3]
    (folders[3] / "manifest.json").unlink()
    (folders[2] / "zip.safetensors").write_bytes(b"half")
    with pytest.warns(
        UserWarning, match="Skipping a checkpoint that is not whole.*step-"
    ) as warned:
        assert checkpoint.newest(folders) == folders[1]
    assert [next(n for n in "0123" if f"step-{n}" in str(w.message)) for w in warned] == ["3", "2"]
    with pytest.warns(UserWarning):
        assert checkpoint.newest(folders[2:]) is None
    assert checkpoint.newest([]) is None


@pytest.mark.parametrize("name", ["read_json", "header", "sha256"])
def test_none_is_taken_instead_of_one_that_cannot_be_read(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Path(shutil.copytree(saved, saved.parent / "older"))

    def fail(path: Path) -> None:
        if path.is_relative_to(saved):
            error = OSError(5, "Input/output error")
            raise error if name == "sha256" else ZipperError(f"{path} is not readable") from error

    monkeypatch.setattr(checkpoint, name, fail)
    with pytest.raises(
        ZipperError,
        match=rf"{saved} cannot be read: .*Input/output error. It may be whole, so none before it",
    ):
        checkpoint.newest([older, saved])


def test_one_that_goes_away_while_it_is_read_is_passed_over(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Path(shutil.copytree(saved, saved.parent / "older"))
    real = checkpoint.sha256

    def gone(path: Path) -> str:
        if path.is_relative_to(saved):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", gone)
    with pytest.warns(UserWarning, match="Skipping a checkpoint that is not whole"):
        assert checkpoint.newest([older, saved]) == older


def test_a_model_that_is_removed_is_gone_with_one_rename(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_save_that_another_takes_for_a_dead_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the folder and its lock somebody else cleans up."""
    made, calls = tempfile.mkdtemp, []

    def lost(**where: Any) -> str:
        place = made(**where)
        calls.append(place)
        if len(calls) == 1:
            checkpoint.clean(tmp_path)
            assert not os.path.exists(place)
        return place

    monkeypatch.setattr(tempfile, "mkdtemp", lost)
    with checkpoint.whole(tmp_path / "model") as temporary:
        checkpoint.write_json(temporary / checkpoint.CONFIG, {})
    assert len(calls) == 2 and (tmp_path / "model" / checkpoint.CONFIG).is_file()


@pytest.mark.parametrize("name", ["my vocabulary.txt", "a+b", "part/.hidden"])
def test_a_file_that_no_load_would_bear_is_refused_when_it_is_saved(
    tmp_path: Path, name: str
) -> None:
    with (
        pytest.raises(ZipperError, match="cannot hold the file"),
        checkpoint.whole(tmp_path / "model") as temporary,
    ):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).touch()
    assert not (tmp_path / "model").exists()
