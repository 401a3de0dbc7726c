"""Proofs remembered: a record is believed only where all is as it was, and changes no bit of
logits."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import read_one
from safetensors.torch import load_file, save_file
from tiny import World
from torch import Tensor

from zipper import pipeline as pipelines
from zipper.errors import ZipperError
from zipper.fast import native
from zipper.fast import recall as proofs
from zipper.fast.plain import Proved
from zipper.fast.reader import Fused
from zipper.generation import Request
from zipper.inspection import describe
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving import checkpoint, files, hub
from zipper.strand import Segment
from zipper.testing import tiny_tower
from zipper.tower import Tower

native.library()  # before the cache is elsewhere: it is built once for all tests
IMPORTED = proofs._imported
PLAN = [Segment("speech", [5, 6, 7])], ["text", "speech"]


@dataclass(frozen=True)
class Place:
    """A world of its own, and a cache of its own."""

    world: World
    cache: Path

    @property
    def zip(self) -> Path:
        """The saved pipeline: its text tower lies elsewhere, its speech tower inside."""
        return self.world.zip

    @property
    def text(self) -> Path:
        """The folder of the text tower."""
        return self.world.folder / "text" / "tower"

    @property
    def records(self) -> list[Path]:
        """What is remembered."""
        return sorted(self.cache.glob("proof-*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def place(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Nothing is remembered yet."""
    monkeypatch.delenv("ZIPPER_PROOFS")
    monkeypatch.setattr(proofs, "_imported", lambda: False)  # as in a process that has not
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(made.folder, tmp_path / "world")
    world = World(tmp_path / "world")
    resaved(
        world.zip,
        lambda config: config["towers"]["text"].update(source=str(world.folder / "text" / "tower")),
    )
    yield Place(world, tmp_path / "cache" / "zipper")


def resaved(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A zip's configuration changed, and its manifest made anew: a whole zip, another one."""
    data = json.loads((folder / checkpoint.CONFIG).read_text())
    change(data["config"])
    checkpoint.write_json(folder / checkpoint.CONFIG, data)
    checkpoint.seal(folder)


def recalled(pipe: Pipeline) -> bool:
    """Whether its towers were taken from a record."""
    return all(isinstance(tower, Proved) for tower in pipe.held.towers.values())


def said(pipe: Pipeline) -> list[Segment]:
    """Two segments with their scores, drawn at random."""
    (found,) = pipe.generate([PLAN[0]], PLAN[1], Sampling(2.0, seed=3), {"text": 6, "speech": 6})
    return found


def logits(reader: Fused) -> Tensor:
    """Behind pieces of both towers, which read each other."""
    session = reader.open(("text", "speech"), ("text", "speech"))
    pieces = [
        ("speech", [5, 6, 7]),
        ("text", [1]),
        ("text", [2, 3, 4]),
        ("speech", [8]),
        ("text", [5]),
    ]
    found = [read_one(reader, tower, [(session, ids)])[0] for tower, ids in pieces]
    return torch.cat([row for row in found if row is not None])


# --- with and without, all is the same


def test_the_second_loading_takes_the_record_and_says_the_same_to_the_bit(place: Place) -> None:
    first = Pipeline.from_pretrained(place.zip)
    assert not recalled(first) and len(place.records) == 1
    second = Pipeline.from_pretrained(place.zip)
    assert recalled(second)
    assert isinstance(first.model, Zipper) and isinstance(second._reader, Fused)
    assert torch.equal(logits(second._reader), logits(Fused(first.model)))
    assert said(second) == said(first) and recalled(second), "no model was needed"
    assert describe(second, place.zip) == describe(first, place.zip)


def test_the_model_comes_when_it_is_asked_for(place: Place) -> None:
    whole = Pipeline.from_pretrained(place.zip).model
    pipe = Pipeline.from_pretrained(place.zip)
    before = said(pipe)
    assert recalled(pipe)
    model = pipe.model
    assert model is pipe.model is pipe.zip and isinstance(model, Zipper) and not recalled(pipe)
    assert all(isinstance(tower, Tower) for tower in model.towers.values())
    assert model.config == whole.config
    wanted = whole.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert said(pipe) == before
    with torch.no_grad():
        for parameter in model.towers["text"].parameters():
            parameter.add_(torch.randn_like(parameter))
    assert said(pipe) != before, "it runs with the weights as they are now"


def test_an_engine_a_copy_and_a_saved_folder_of_it_are_those_of_the_model(
    place: Place, tmp_path: Path
) -> None:
    first = Pipeline.from_pretrained(place.zip)
    answers = []
    for pipe in (first, Pipeline.from_pretrained(place.zip)):
        engine = pipe.engine(2)
        assert isinstance(engine.reader, Fused)
        answers.append(engine.run([Request(*PLAN, limits={"text": 6, "speech": 6})])[0].segments())
    assert answers[0] == answers[1]
    twin = copy.deepcopy(Pipeline.from_pretrained(place.zip))
    assert not recalled(twin) and said(twin) == said(first)
    Pipeline.from_pretrained(place.zip).save_pretrained(tmp_path / "saved")
    assert said(Pipeline.from_pretrained(tmp_path / "saved")) == said(first)


def test_the_shipped_model_is_remembered_in_both_precisions(place: Place) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, second = Pipeline.from_pretrained(dtype=dtype), Pipeline.from_pretrained(dtype=dtype)
        assert not recalled(first) and recalled(second) and isinstance(first.model, Zipper)
        assert second._reader is not None
        assert torch.equal(logits(second._reader), logits(Fused(first.model)))


def test_a_tower_on_the_hub_is_remembered_at_its_commit(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, commit = tmp_path / "hub" / "models--me--text", "1" * 40
    shutil.copytree(place.text, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    resaved(place.zip, lambda config: config["towers"]["text"].update(source="me/text"))
    first, second = Pipeline.from_pretrained(place.zip), Pipeline.from_pretrained(place.zip)
    assert recalled(second) and second.held.config == first.held.config
    assert second.held.config.towers["text"].revision == commit


# --- whatever is another, the proof is run


def other_weights(place: Place) -> None:
    path = place.zip / "towers" / "speech" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, path, {"format": "pt"})
    digest = Tower.load(path.parent).pin()
    resaved(place.zip, lambda config: config["towers"]["speech"].update(digest=digest))


def other_epsilon(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"rms_norm_eps": 0.1}))


def other_epsilon_inside(place: Place) -> None:
    other_epsilon(place.zip / "towers" / "speech")
    checkpoint.seal(place.zip)


def other_attention(place: Place) -> None:
    described = json.loads((place.text / "config.json").read_text())
    (place.text / "config.json").write_text(
        json.dumps(described | {"_attn_implementation": "eager"})
    )


def other_code(patch: pytest.MonkeyPatch, changed: str) -> None:
    """As if this file had been edited."""
    true = files.sha256
    patch.setattr(
        files, "sha256", lambda path: "0" * 64 if str(path).endswith(changed) else true(path)
    )


CHANGES: dict[str, Callable[[Place, pytest.MonkeyPatch], object]] = {
    "torch": lambda _, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "build of torch": lambda _, patch: patch.setattr(torch.version, "git_version", "another"),
    "transformers": lambda _, patch: patch.setattr(proofs, "version", lambda package: "5.99.0"),
    "Python": lambda _, patch: patch.setattr(sys, "version", "3.99"),
    "processor": lambda _, patch: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "another"
    ),
    "the driver's code": lambda _, patch: other_code(patch, "zipper/towers/driver.py"),
    "the fast way's code": lambda _, patch: other_code(patch, "zipper/fast/reader.py"),
    "the model's code": lambda _, patch: other_code(patch, "models/llama/modeling_llama.py"),
    "the masks' code": lambda _, patch: other_code(patch, "transformers/masking_utils.py"),
    "attention's code": lambda _, patch: other_code(patch, "integrations/sdpa_attention.py"),
    "weights inside": lambda place, _: other_weights(place),
    "configuration inside": lambda place, _: other_epsilon_inside(place),
    "configuration elsewhere": lambda place, _: other_epsilon(place.text),
    "attention elsewhere": lambda place, _: other_attention(place),
    "links": lambda place, _: resaved(
        place.zip, lambda config: config["towers"]["text"].update(tokens=9.0)
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_where_anything_is_another_the_towers_are_proved(
    place: Place, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    Pipeline.from_pretrained(place.zip)
    assert recalled(Pipeline.from_pretrained(place.zip))
    CHANGES[what](place, monkeypatch)
    pipe = Pipeline.from_pretrained(place.zip)
    assert not recalled(pipe) and all(
        isinstance(tower, Tower) for tower in pipe.held.towers.values()
    )
    assert recalled(again := Pipeline.from_pretrained(place.zip)), "the new proof is remembered"
    assert said(again) == said(pipe)


def test_a_record_is_of_one_precision(place: Place) -> None:
    for dtype in (torch.float32, torch.bfloat16, None):
        assert not recalled(Pipeline.from_pretrained(place.zip, dtype=dtype))
    for dtype in (torch.float32, torch.bfloat16, None):
        pipe = Pipeline.from_pretrained(place.zip, dtype=dtype)
        assert recalled(pipe) and next(pipe.held.parameters()).dtype == (dtype or torch.float32)


def test_under_other_defaults_nothing_is_recalled_or_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where transformers was imported: whoever did may have changed how it computes."""

    def goes_by_records() -> bool:
        return proofs.wanted() and proofs.recall(hub.fetch(place.zip), torch.float32) is not None

    with monkeypatch.context() as patch:
        patch.setattr(proofs, "_imported", IMPORTED)
        assert (
            "transformers" in sys.modules
            and not recalled(Pipeline.from_pretrained(place.zip))
            and not place.records
        )
    Pipeline.from_pretrained(place.zip)
    assert goes_by_records()
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "_imported", IMPORTED)
        assert not goes_by_records() and not recalled(Pipeline.from_pretrained(place.zip))
    with torch.inference_mode():
        assert not goes_by_records()
    with torch.device("meta"):
        assert not goes_by_records()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert not goes_by_records()
    finally:
        torch.set_default_dtype(torch.float32)
    assert goes_by_records()


def test_towers_that_are_given_are_proved(place: Place) -> None:
    Pipeline.from_pretrained(place.zip)
    eager = Tower.load(place.text).model
    eager.set_attn_implementation("eager")
    for given in (place.text, eager):
        assert not recalled(Pipeline.from_pretrained(place.zip, towers={"text": given}))
    assert recalled(Pipeline.from_pretrained(place.zip, towers={}))


def test_another_base_and_a_damaged_file_are_refused_as_ever(place: Place) -> None:
    Pipeline.from_pretrained(place.zip)
    weights = load_file(place.text / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, place.text / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZipperError, match="is not the one this zip was trained on"):
        Pipeline.from_pretrained(place.zip)
    path = place.zip / checkpoint.TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ZipperError, match="is damaged"):
        Pipeline.from_pretrained(place.zip)


def test_a_zip_that_was_replaced_gives_no_other_model_than_the_one_it_was(place: Place) -> None:
    Pipeline.from_pretrained(place.zip)
    replaced, gone = Pipeline.from_pretrained(place.zip), Pipeline.from_pretrained(place.zip)
    before = said(replaced)
    other_weights(place)
    with pytest.raises(ZipperError, match="holds another model than when it was loaded"):
        replaced.model  # noqa: B018
    assert said(replaced) == before
    shutil.rmtree(place.zip)
    with pytest.raises(ZipperError, match="Load the pipeline anew"):
        gone.zip  # noqa: B018


# --- records that lie, are damaged, or are somebody else's


def test_a_damaged_record_is_ignored_and_written_anew(place: Place) -> None:
    wanted = said(Pipeline.from_pretrained(place.zip))
    (record,) = place.records
    whole, dice = record.read_bytes(), random.Random(0)
    damaged = [b"", whole[:64], whole[:-1], whole + b"\0", *(bytearray(whole) for _ in range(2))]
    for content in damaged[4:]:
        assert isinstance(content, bytearray)
        content[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    for content in damaged:
        record.write_bytes(content)
        pipe = Pipeline.from_pretrained(place.zip)
        assert not recalled(pipe) and said(pipe) == wanted
        assert record.read_bytes() == whole


def test_a_record_of_another_zip_is_ignored(place: Place) -> None:
    Pipeline.from_pretrained(place.zip)
    (own,) = place.records
    Pipeline.from_pretrained()
    (other,) = {*place.records} - {own}
    shutil.copy(other, own)
    assert not recalled(Pipeline.from_pretrained(place.zip))
    assert recalled(Pipeline.from_pretrained(place.zip))


def swapped(known: proofs.Known) -> proofs.Known:
    """Queries for keys in the second block."""
    first, second = known.outline.blocks
    second = replace(second, query=second.key, key=second.query)
    return replace(known, outline=replace(known.outline, blocks=(first, second)))


LIES: dict[str, Callable[[proofs.Known], proofs.Known]] = {
    "another tensor": lambda known: replace(
        known,
        stored=known.stored
        | {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"},
    ),
    "a tensor that is not there": lambda known: replace(
        known, stored=known.stored | {"model.norm.weight": "model.form.weight"}
    ),
    "queries for keys": swapped,
    "another epsilon": lambda known: replace(
        known, outline=replace(known.outline, norm=replace(known.outline.norm, eps=0.5))
    ),
    "another scale": lambda known: replace(
        known,
        outline=replace(
            known.outline, blocks=tuple(replace(block, scale=0.9) for block in known.outline.blocks)
        ),
    ),
    "other heads": lambda known: replace(
        known,
        outline=replace(
            known.outline,
            blocks=tuple(replace(block, head_width=8) for block in known.outline.blocks),
        ),
    ),
    "a head too wide": lambda known: replace(
        known,
        outline=replace(
            known.outline,
            blocks=tuple(replace(block, head_width=1 << 40) for block in known.outline.blocks),
        ),
    ),
    "a block less": lambda known: replace(
        known, outline=replace(known.outline, blocks=known.outline.blocks[:1])
    ),
    "another rate": lambda known: replace(known, factor=0.7),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_lies_is_seen_through(place: Place, lie: str) -> None:
    """One that is whole and in its place, made by somebody who wants a tower to run wrongly."""
    wanted = said(Pipeline.from_pretrained(place.zip))
    (path,) = place.records
    record, tensors = proofs._read(path)
    proofs._write(
        path.name,
        replace(record, towers=record.towers | {"speech": LIES[lie](record.towers["speech"])}),
        tensors,
    )
    pipe = Pipeline.from_pretrained(place.zip)
    assert not recalled(pipe) and said(pipe) == wanted


@pytest.mark.parametrize("tower", ["text", "speech"])
@pytest.mark.parametrize("what", ["truth", "inverse"])
def test_a_record_with_other_logits_or_frequencies_is_seen_through(
    place: Place, tower: str, what: str
) -> None:
    Pipeline.from_pretrained(place.zip)
    (path,) = place.records
    record, tensors = proofs._read(path)
    proofs._write(
        path.name, record, tensors | {f"{tower}.{what}": tensors[f"{tower}.{what}"] * 1.3 + 0.1}
    )
    assert not recalled(Pipeline.from_pretrained(place.zip))


@pytest.mark.skipif(os.name != "posix", reason="there are no such rights")
def test_a_record_that_others_could_have_written_is_ignored(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline.from_pretrained(place.zip)
    (record,) = place.records
    for path, mode in ((record, 0o666), (record, 0o620), (place.cache, 0o777)):
        path.chmod(mode)
        assert not recalled(Pipeline.from_pretrained(place.zip))
        assert recalled(Pipeline.from_pretrained(place.zip)), "it was replaced, its folder closed"
    user = os.geteuid()
    if user == 0:
        os.chown(record, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert files.cached(record.name) is None


def test_without_a_place_for_records_all_is_proved(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a home nor a folder for temporary files that can be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    for _ in range(2):
        assert not recalled(Pipeline.from_pretrained(place.zip))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not recalled(Pipeline.from_pretrained(place.zip))
    assert recalled(Pipeline.from_pretrained(place.zip)), "temporary files will do"
    assert not place.cache.exists()


def test_the_oldest_records_go(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "KEPT", 2)
    for age, tokens in enumerate((9.0, 10.0, 11.0)):
        resaved(
            place.zip, lambda config, tokens=tokens: config["towers"]["text"].update(tokens=tokens)
        )
        before = {*place.records}
        Pipeline.from_pretrained(place.zip)
        (new,) = {*place.records} - before
        os.utime(new, (age, age))
    assert recalled(Pipeline.from_pretrained(place.zip)) and len(place.records) == 2


def test_what_cannot_be_remembered_is_loaded_as_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towers that are not like Llama, adapters, models too large for the fast way, and where it is
    not wanted."""
    for families in ({"text": "gpt2", "speech": "llama"}, {"text": "llama", "speech": "llama"}):
        towers = {}
        for name, modality in {"text": tiny.text(), "speech": tiny.units()}.items():
            towers[name] = place.world.folder / f"{name}-{families[name]}"
            tiny_tower(families[name], 1, 16, 2, modality.vocabulary).save_pretrained(towers[name])
        ends = {"text": (0, 1), "speech": (tiny.CODES, tiny.CODES + 1)}
        lora = (
            {"text": {"r": 2, "target_modules": ["q_proj"]}}
            if families["text"] == "llama"
            else None
        )
        model = Zipper.from_towers(towers, link=tiny.LinkConfig(head_width=8), ends=ends, lora=lora)
        Pipeline(model, {"text": tiny.text(), "speech": tiny.units()}).save_pretrained(
            place.world.folder / "other"
        )
        for _ in range(2):
            assert not recalled(Pipeline.from_pretrained(place.world.folder / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "FAST_BYTES", 1)
        for _ in range(2):
            assert not recalled(Pipeline.from_pretrained(place.zip))
    monkeypatch.setenv("ZIPPER_PROOFS", "0")
    for _ in range(2):
        assert not recalled(Pipeline.from_pretrained(place.zip))
    assert not place.records


# --- what a short command does without


WITHOUT = [
    "transformers",
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
    "scipy",
    "huggingface_hub",
    "accelerate",
    "datasets",
]
COMMANDS = f"""
import sys
from zipper.cli import main

path = sys.argv[1] + "/said.wav"
for command in (["speak", "send forty two oranges to vienna", "-o", path], ["transcribe", path], ["show"]):
    assert main(command) == 0
    print(command[0], [name for name in {WITHOUT} if name in sys.modules])
"""


def test_a_short_command_imports_little_when_it_is_given_for_the_second_time(
    place: Place, tmp_path: Path
) -> None:
    """Processes of their own, with the shipped model."""
    pytest.importorskip("soundfile")
    for proved in (False, True):
        ended = subprocess.run(
            [sys.executable, "-c", COMMANDS, str(tmp_path)],
            env=os.environ
            | {"ZIPPER_NATIVE": "0"},  # it would be built anew, for the cache is elsewhere
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        lines = ended.stdout.splitlines()
        assert "send forty two oranges to vienna" in lines
        little = [line for line in lines if line.endswith("[]")]
        assert little == (["speak []", "transcribe []", "show []"] if proved else []), ended.stdout


def test_a_record_that_cannot_be_written_harms_no_loading(place: Place) -> None:
    """Of a kind of numbers that the header's reader does not know."""
    file = place.world.folder / "text" / "tower" / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    head["model.extra"] = {"dtype": "U16", "shape": [2]}
    head["model.extra"]["data_offsets"] = [len(tensors), len(tensors) + 4]
    told = json.dumps(head).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + tensors + bytes(4))
    for _ in range(2):
        assert not recalled(Pipeline.from_pretrained(place.zip))
