"""Surgery: what is kept is kept to the bit, what is born again is silent, and what comes out keeps
every promise of a zip."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import ENDS, LAYERS, SEED, VOCABULARY, WIDTH, lay, number, zipped
from tiny import World
from torch import nn

from zipper import cli
from zipper.config import LinkKey
from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.growth import add
from zipper.link import LinkConfig
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.strand import Segment, Target, collate, visible
from zipper.surgery import (
    Fate,
    SwapReport,
    activity,
    batches,
    costs,
    idle,
    inside,
    kinship,
    losses,
    prune,
    swap,
    swap_pipeline,
)
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.training import Objective
from zipper.verify import verify

TWO = {"text": "llama", "speech": "llama"}
THREE = {**TWO, "image": "gpt2"}
PARTS = {"source_norm", "projection", "norm", "query", "key", "value", "out", "feedforward"}
STRANGER = "is another tower"


def bits(module: nn.Module) -> dict[str, bytes]:
    """Everything that a module holds, as bytes."""
    return {
        name: t.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, t in module.state_dict().items()
    }


def fates(report: SwapReport) -> dict[str, Fate]:
    """By their old names."""
    return {fate.was: fate for fate in report.fates}


def keeps_its_promises(model: Zipper) -> bool:
    """Whether `zipper verify` finds nothing."""
    checks = verify(model)
    assert len(checks) > 5
    return [check for check in checks if not check.held] == []


def relative(name: str) -> Tower:
    """The tower of tests/laws.py, trained on: every matrix has moved a little."""
    model = tiny_tower("llama", SEED[name], WIDTH[name], LAYERS[name], VOCABULARY[name])
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=numbers)
    return Tower(model)


# --- swap: what is kept


def test_the_same_base_leaves_everything_as_it_was() -> None:
    old = zipped(TWO, train=["speech"])
    same = tiny_tower("llama", SEED["text"], WIDTH["text"], LAYERS["text"], VOCABULARY["text"])
    new, report = swap(old, {"text": same})
    assert bits(new) == bits(old)
    assert new.config.junctions == old.config.junctions
    assert new.ends() == old.ends()
    assert report.towers["text"].kinship == pytest.approx(1.0)
    assert not any(fate.reborn for fate in report.fates)


def test_a_tower_that_was_trained_on_is_a_relative_and_every_link_stays() -> None:
    old = zipped(TWO)
    new, report = swap(old, {"text": relative("text")})
    assert 0.9 < report.towers["text"].kinship < 1
    assert bits(new.links) == bits(old.links)
    assert bits(new.inputs) == bits(old.inputs)
    assert bits(new.towers["text"]) != bits(old.towers["text"])


def test_towers_trained_apart_are_strangers_however_alike_their_shapes() -> None:
    one, other = (Tower(tiny_tower("llama", seed, width=64)) for seed in (1, 2))
    assert abs(kinship(one, other)) < 0.05
    assert kinship(one, Tower(tiny_tower("llama", 1, width=64, layers=5))) == 0
    assert kinship(one, Tower(tiny_tower("gpt2", 1, width=64))) == 0


def test_of_a_stranger_of_the_same_shape_the_other_side_of_each_link_is_kept() -> None:
    old = zipped(TWO)
    stranger = tiny_tower("llama", 99, WIDTH["text"], LAYERS["text"], VOCABULARY["text"])
    new, report = swap(old, {"text": stranger}, ends={"text": ENDS["text"]})
    for n in range(len(old.config.junctions)):
        reads_it, is_read = fates(report)[f"{n}:text>speech"], fates(report)[f"{n}:speech>text"]
        assert set(reads_it.reborn) == {"source_norm", "projection"}
        assert set(is_read.reborn) == {"norm", "query", "out", "feedforward"}
        assert all(STRANGER in why for why in (*reads_it.reborn.values(), *is_read.reborn.values()))
        for fate in (reads_it, is_read):
            before, after = bits(old.links[fate.was]), bits(new.links[fate.name])
            same = {key.partition(".")[0] for key in before if before[key] == after[key]}
            assert set(fate.kept) | set(fate.reborn) == PARTS
            assert set(fate.kept) <= same
            assert not {"gate", "feedforward_gate", "projection", "query"} & set(fate.reborn) & same
    assert set(fates(report)["inputs.text"].reborn) == {"mlp"}
    assert bits(new.inputs["speech"]) == bits(old.inputs["speech"])


def test_of_a_wider_tower_what_its_width_shapes_is_born_again() -> None:
    old = zipped(TWO)
    new, report = swap(old, {"text": tiny_tower("gpt2", 5, width=40, layers=5, vocabulary=50)})
    for fate in report.fates:
        if fate.was.endswith("text>speech"):
            assert set(fate.kept) == PARTS - {"source_norm", "projection"}
        elif fate.was.endswith("speech>text"):
            assert set(fate.kept) == {"source_norm"}
            assert "shape" in fate.reborn["projection"]
    assert (
        new.config.towers["text"].width
        == new.link(0, "speech", "text").norm.normalized_shape[0]
        == 40
    )
    assert new.config.towers["text"].vocabulary == 50
    assert new.config.link == old.config.link


def test_without_a_projection_keys_and_values_face_the_source() -> None:
    old = zipped(TWO, link=LinkConfig(head_width=8, projection_depth=0))
    _, report = swap(
        old, {"text": tiny_tower("llama", 99, WIDTH["text"], LAYERS["text"], VOCABULARY["text"])}
    )
    assert set(fates(report)["0:text>speech"].reborn) == {"source_norm", "key", "value"}


def test_between_two_strangers_nothing_is_kept() -> None:
    old = zipped(TWO, link=LinkConfig(head_width=8, whiten=True))
    strangers = {
        n: tiny_tower("llama", 50 + i, WIDTH[n], LAYERS[n], VOCABULARY[n])
        for i, n in enumerate(TWO)
    }
    new, report = swap(old, strangers)
    assert all(not fate.kept for fate in report.fates)
    assert set(fates(report)["0:text>speech"].reborn) == PARTS | {"whiten"}
    assert torch.equal(
        new.link(0, "text", "speech").state_dict()["whiten.weight"], torch.eye(WIDTH["text"])
    )


def test_links_of_towers_that_stay_keep_their_bits() -> None:
    old = zipped(THREE, train=["speech"])
    new, report = swap(old, {"image": tiny_tower("llama", 8, width=16, layers=3, vocabulary=20)})
    for key in new.config.links:
        (_, source, target), name = key, str(key)
        assert (name in fates(report)) == ("image" in (source, target))
        assert (bits(new.links[name]) == bits(old.links[name])) == ("image" not in (source, target))
    for name in ("text", "speech"):
        assert bits(new.towers[name]) == bits(old.towers[name])


def test_the_old_zip_is_not_changed_and_shares_only_what_is_frozen() -> None:
    old = zipped(TWO, train=["speech"])
    old.attention = "flex"
    before, learns = bits(old), {name: p.requires_grad for name, p in old.named_parameters()}
    config = copy.deepcopy(old.config)
    swapped, _ = swap(old, {"text": tiny_tower("opt", 3, width=24, layers=6)}, train=["text"])
    pruned = prune(old, ["0:text>speech"])
    for new in (swapped, pruned):
        assert new.attention == "flex"
        assert new.towers["speech"] is not old.towers["speech"]
        with torch.no_grad():
            for parameter in new.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    assert pruned.towers["text"] is old.towers["text"]
    assert bits(old) == before
    assert {name: p.requires_grad for name, p in old.named_parameters()} == learns
    assert old.config == config


# --- swap: what is silent


def test_links_born_again_are_silent_and_a_new_tower_says_what_it_says_alone() -> None:
    old = zipped(TWO, input_projection="none")
    new, _ = swap(old, {"text": tiny_tower("llama", 7, width=24, layers=7, vocabulary=31)})
    row = [("speech", 3), ("text", 4), ("speech", 5), ("text", 6)]
    strands = lay([number(row)])
    with torch.no_grad():
        said, alone = (
            new(strands),
            {name: new.tower(name)(strands[name].ids).logits for name in TWO},
        )
    for name in TWO:
        assert torch.allclose(said[name], alone[name], atol=1e-5)
    gates = {p.item() for name, p in new.named_parameters() if name.endswith("gate")}
    assert gates == {0.0}


def test_a_gate_may_be_asked_for() -> None:
    new, report = swap(zipped(TWO), {"text": tiny_tower("gpt2")}, gate=0.5)
    assert all(fate.reborn for fate in report.fates)
    assert {round(p.item(), 6) for name, p in new.named_parameters() if name.endswith("gate")} == {
        0.5
    }


def test_a_closed_link_learns() -> None:
    new, _ = swap(zipped(TWO), {"text": tiny_tower("llama", 7, width=24)})
    new(lay([number([("speech", 3), ("text", 4)])]))["text"].sum().backward()
    assert new.link(0, "speech", "text").gate.grad.abs() > 0


# --- swap: junctions


@pytest.mark.parametrize(
    ("layers", "junctions", "places"),
    [
        (5, [1, 2, 3, 4], [1, 2, 3, 4]),
        (10, [1, 2, 3, 4], [2, 4, 6, 8]),
        (24, [1, 4], [5, 19]),
        (4, [1, 4], [1, 3]),
        (4, [3, 4], [2, 3]),
        (3, [1, 2, 3, 4], [1, None, None, 2]),
        (2, [2, 4], [1, None]),
    ],
)
def test_junctions_keep_their_share_of_the_depth(
    layers: int, junctions: list[int], places: list[int | None]
) -> None:
    old = zipped({"text": "llama", "image": "gpt2", "speech": "llama"}, junctions=_three(junctions))
    new, report = swap(old, {"text": tiny_tower("llama", 3, layers=layers)})
    assert [after.get("text") if after else None for _, after in report.junctions] == places
    assert all(
        before["text"] == block
        for (before, _), block in zip(report.junctions, junctions, strict=True)
    )
    assert list(new.config.junctions) == [after for _, after in report.junctions if after]
    others = [
        {name: block for name, block in before.items() if name != "text"}
        for before, _ in report.junctions
    ]
    assert all(
        after is None or others[n].items() <= after.items()
        for n, (_, after) in enumerate(report.junctions)
    )


def _three(blocks: list[int]) -> list[dict[str, int]]:
    """Junctions of text with speech, as many as asked for, speech as deep as it goes."""
    return [{"text": block, "speech": n + 1} for n, block in enumerate(blocks[:3])] + [
        {"text": block, "image": 2} for block in blocks[3:]
    ]


def test_what_a_shallow_tower_has_no_place_for_is_dropped_and_told() -> None:
    old = zipped(
        TWO,
        junctions=[{"text": 1, "speech": 1}, {"text": 2, "speech": 2}, {"text": 4, "speech": 3}],
    )
    old = prune(old, ["2:text>speech", "1:text>speech"])
    new, report = swap(
        old, {"text": tiny_tower("llama", 3, layers=3, width=WIDTH["text"])}, tokens={"text": 2.0}
    )
    assert new.config.junctions == ({"text": 1, "speech": 1}, {"text": 2, "speech": 3})
    assert new.config.dropped == ("1:text>speech",)
    assert (fates(report)["1:speech>text"].name, fates(report)["2:speech>text"].name) == (
        "",
        "1:speech>text",
    )
    assert set(new.links) == {"0:text>speech", "0:speech>text", "1:speech>text"}
    assert new.link(0, "text", "speech").position_scale == pytest.approx(2.0 / 10.0)
    said = report.text()
    assert "gone" in said
    assert "1:speech>text -> gone" in said
    assert "2:speech>text -> 1:speech>text" in said


def test_a_tower_of_one_block_is_refused() -> None:
    with pytest.raises(ZipperError, match="at least 2 blocks"):
        swap(zipped(TWO), {"text": tiny_tower("llama", 3, layers=1)})


@pytest.mark.parametrize(
    "given",
    [
        {"towers": {"texd": None}},
        {"towers": {}, "train": ["text"]},
        {"towers": {}, "ends": {"text": (0, 1)}},
        {"towers": {}, "tokens": {"speech": 1.0}},
    ],
)
def test_unknown_names_are_refused(given: dict[str, Any]) -> None:
    given["towers"] = {name: tiny_tower("gpt2") for name in given["towers"]}
    with pytest.raises(ZipperError, match=r"names the tower '(texd|text|speech)'"):
        swap(zipped(TWO), **given)


# --- both keep the promises, freeze sets survive the disk


def operated(train: tuple[str, ...] = ("speech",)) -> dict[str, Zipper]:
    """One zip before and after each operation."""
    born = zipped(TWO, train=train)
    swapped, _ = swap(born, {"text": tiny_tower("gpt_neox", 4, width=24, layers=3, vocabulary=29)})
    learning, _ = swap(
        born, {"speech": tiny_tower("llama", 4, width=16, layers=6)}, train=["speech"]
    )
    return {
        "born": born,
        "swapped": swapped,
        "learning": learning,
        "pruned": prune(born, ["1:text>speech", "0:speech>text"]),
    }


@pytest.mark.parametrize("name", ["swapped", "learning", "pruned"])
def test_what_comes_out_keeps_every_promise(name: str) -> None:
    assert keeps_its_promises(operated()[name])


@pytest.mark.parametrize("train", [(), ("speech",), ("text", "speech")])
def test_freeze_sets_survive_the_disk(tmp_path: Path, train: tuple[str, ...]) -> None:
    for name, model in operated(train).items():
        model.save_pretrained(tmp_path / name, include=list(model.towers))
        loaded = Zipper.from_pretrained(tmp_path / name)
        learns = {key: p.requires_grad for key, p in model.named_parameters()}
        assert {key: p.requires_grad for key, p in loaded.named_parameters()} == learns
        for tower, config in loaded.config.towers.items():
            assert config.train == model.config.towers[tower].train
            assert {learns[key] for key in learns if key.startswith(f"towers.{tower}.")} == {
                config.train
            }
            loaded.train()
            assert all(part.training == config.train for part in loaded.towers[tower].modules())
        assert bits(loaded) == bits(model)


def test_after_the_disk_trained_towers_learn_and_frozen_ones_do_not(tmp_path: Path) -> None:
    for name, model in operated().items():
        model.save_pretrained(tmp_path / name, include=["text"])
        loaded = Zipper.from_pretrained(tmp_path / name).train()
        before = {tower: bits(loaded.towers[tower]) for tower in TWO}
        optimizer = torch.optim.AdamW(
            [p for p in loaded.parameters() if p.requires_grad], 1e-2, weight_decay=0.1
        )
        sample = [
            Target("speech", [3, 4], 1.0),
            Target("text", [5, 6], 1.0),
            Target("speech", [7], 1.0),
        ]
        sum(Objective(loaded)([collate([sample], loaded.ends())]).values()).backward()
        optimizer.step()
        assert bits(loaded.towers["text"]) == before["text"]
        assert bits(loaded.towers["speech"]) != before["speech"]


# --- prune


def test_a_pruned_zip_is_the_whole_one_with_those_gates_closed() -> None:
    old = zipped(THREE)
    links = ["0:text>speech", "1:speech>text", "0:image>text"]
    closed = copy.deepcopy(old)
    with torch.no_grad():
        for name in links:
            closed.links[name].gate.zero_()
            closed.links[name].feedforward_gate.zero_()
    new = prune(old, links)
    strands = lay(
        [
            number(
                [("text", 3), ("speech", 4), ("image", 5), ("text", 6), ("speech", 7), ("text", 8)]
            )
        ]
    )
    with torch.no_grad():
        wanted, found = closed(strands), new(strands)
    for name in THREE:
        assert torch.equal(found[name], wanted[name])
    assert set(old.links) - set(new.links) == set(links)
    assert {name: value for name, value in bits(old).items() if name in bits(new)} == bits(new)


def test_a_junction_without_links_leaves_parameters_to_none(tmp_path: Path) -> None:
    old = zipped(TWO)
    new = prune(prune(old, ["1:text>speech"]), ["1:speech>text"])
    assert new.config.dropped == ("1:speech>text", "1:text>speech")
    assert not any(name.startswith("links.1:") for name in new.new_parameters())
    new.save_pretrained(tmp_path / "zip", include=["text", "speech"])
    assert bits(Zipper.from_pretrained(tmp_path / "zip")) == bits(new)


@pytest.mark.parametrize("names", [["7:text>speech"], ["0:text>speech", "0:text>text"]])
def test_a_link_that_is_not_there_cannot_be_pruned(names: list[str]) -> None:
    with pytest.raises(ZipperError, match=r"no link '[70]:text>.*it has 0:"):
        prune(zipped(TWO), names)


# --- activity


@torch.no_grad()
def test_activity_is_what_links_add_relative_to_the_stream() -> None:
    model = zipped(TWO)
    sample = [Segment("text", [3, 4, 5]), Segment("speech", [6, 7])]
    batch = collate([sample, sample[:1]], model.ends())
    found = activity(model, [batch, batch])
    strands = batch.strands
    tap = model.taps(strands)[LinkKey(0, "text", "speech")]
    link, mask = model.link(0, "text", "speech"), visible(strands["speech"], strands["text"])
    memory = link.read(tap.source, strands["text"].position)
    added = link(tap.target, memory, mask, strands["speech"].position)
    # The other row has no speech.
    shares = [float(added[0, i].norm() / tap.target[0, i].norm()) for i in range(4)]
    assert found["0:text>speech"].share == pytest.approx(sum(shares) / 4)
    assert found["0:text>speech"].seen == 8
    assert found["0:text>speech"].attention == pytest.approx(float(link.gate.tanh()))
    assert found["0:text>speech"].feedforward == pytest.approx(float(link.feedforward_gate.tanh()))
    assert found["0:speech>text"].seen == 0


def test_idle_is_what_was_seen_to_add_little() -> None:
    model = zipped(TWO)
    with torch.no_grad():
        model.link(1, "text", "speech").gate.zero_()
        model.link(1, "text", "speech").feedforward_gate.zero_()
    found = activity(
        model, [collate([[Segment("text", [3]), Segment("speech", [4])]], model.ends())]
    )
    assert found["1:text>speech"].share == 0
    assert idle(found, 1e-6) == ["1:text>speech"]
    assert idle(found, 0.0) == []
    assert sorted(idle(found, 1e6)) == [name for name in sorted(found) if name.endswith(">speech")]


def test_losses_and_costs_are_those_of_the_training_objective() -> None:
    model = zipped(TWO)
    rows = [
        {"text": [3, 4], "speech": [5, 6, 7]},
        {"text": [8], "speech": [9]},
        {"text": [2, 3], "speech": [4]},
    ]
    samples = batches(model, rows, size=2)
    assert sorted(samples) == ["speech -> text", "text -> speech"]

    def loss(model: Zipper, task: str) -> float:
        parts = [Objective(model)([batch]) for batch in samples[task]]
        return float(sum(sum(part.values()) for part in parts)) / sum(
            len(row[task.split()[-1]]) + 1 for row in rows
        )

    with torch.no_grad():
        assert losses(model, samples) == pytest.approx(
            {task: loss(model, task) for task in samples}, rel=1e-5
        )
        without = prune(model, ["0:text>speech"])
        worth = sum(loss(without, task) - loss(model, task) for task in samples)
    assert costs(model, samples)["0:text>speech"] == pytest.approx(worth, abs=1e-5)
    assert model.config.dropped == ()


def test_rows_without_pairs_are_refused() -> None:
    with pytest.raises(ZipperError, match="in common"):
        batches(zipped(TWO), [{"text": [3]}, {"speech": [3], "text": [4]}])


# --- pipelines and the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower with another vocabulary, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = tiny.text(merges=30)
    assert tokenizer.vocabulary != tiny.text().vocabulary
    tokenizer.save(folder)
    tiny.tower(tokenizer, layers=3).model.save_pretrained(folder)
    return folder


@pytest.fixture
def zipper(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command: exit code, what it printed, what it complained of."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_swap_saves_another_tower_with_its_tokenizer(
    zipper: Callable[..., tuple[int, str, str]], world: World, other_text: Path, tmp_path: Path
) -> None:
    tower, out = f"text={other_text}", tmp_path / "out"
    code, said, _ = zipper(
        "swap",
        world.zip,
        tower,
        "--modality",
        f"text={other_text}",
        "--tokens",
        "text=6",
        "-o",
        out,
    )
    assert (code, "text: 2 blocks of width 32" in said) == (0, True)
    pipe = Pipeline.from_pretrained(out)
    assert pipe.model.config.towers["text"].source == str(other_text)
    assert pipe.model.config.towers["text"].tokens == 6
    assert pipe.modalities["text"].fingerprint == Text.load(other_text).fingerprint
    assert keeps_its_promises(pipe.model)
    assert isinstance(
        pipe.run([Segment("speech", [1, 2, 3])], ["text"], limits={"text": 4})[0].content, str
    )
    code, said, _ = zipper("swap", out, f"text={world.folder / 'text' / 'tower'}", "--modality", f"text={world.folder / 'text'}",
                           "--train", "text", "--json", "-o", tmp_path / "back")  # fmt: skip
    assert code == 0
    assert json.loads(said)["towers"]["text"]["after"]["train"] is True
    assert Pipeline.from_pretrained(tmp_path / "back").model.config.towers["text"].train


def test_swap_refuses_what_does_not_fit(
    zipper: Callable[..., tuple[int, str, str]], world: World, other_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wrong: Mapping[str, tuple[object, ...]] = {
        "the old modality would give them other meanings": (f"text={other_text}",),
        "is not NAME=VALUE": ("text",),
        "names the tower 'image'": (f"image={other_text}",),
        "that tower stays": (
            f"text={other_text}",
            "--modality",
            f"text={other_text}",
            "--modality",
            f"speech={other_text}",
        ),
        "holds no modality": (f"text={other_text}", "--modality", f"text={world.folder}"),
        "--tokens": (f"text={other_text}", "--tokens", "text=many"),
        "has no config.json": (f"text={world.folder}",),
        "train names the tower 'speech'": (f"text={other_text}", "--train", "speech"),
        "its tower knows": (
            f"text={world.folder / 'text' / 'tower'}",
            "--modality",
            f"text={other_text}",
        ),
    }
    for why, arguments in wrong.items():
        code, said, complaint = zipper("swap", world.zip, *arguments, "-o", out)
        assert (code, said) == (2, "")
        assert why in complaint
        assert not out.exists()
    code, _, complaint = zipper("swap", world.zip, f"text={other_text}", "-o", world.zip)
    assert (code, "exists" in complaint) == (2, True)


def test_a_tower_from_a_pipeline_brings_the_pin_of_its_modality(
    world: World, tmp_path: Path
) -> None:
    modalities = {"text": tiny.text(), "speech": tiny.units(seed=1)}
    other = Pipeline(Pipeline.from_pretrained(world.zip).model, modalities)
    other.save_pretrained(tmp_path / "other")
    tower = tmp_path / "other" / "towers" / "speech"
    pipe = Pipeline.from_pretrained(world.zip)
    with pytest.raises(ZipperError, match="another tokenizer or codebook"):
        swap_pipeline(pipe, {"speech": tower})
    new, report = swap_pipeline(pipe, {"speech": tower}, {"speech": modalities["speech"]})
    assert new.modalities["speech"] is modalities["speech"]
    assert report.towers["speech"].related


def test_prune_saves_a_smaller_model_that_is_the_same_but_for_those_links(
    zipper: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path
) -> None:
    dev, out = world.folder / "dev.jsonl", tmp_path / "out"
    code, said, _ = zipper(
        "prune",
        world.zip,
        "--links",
        "0:text>speech",
        "--data",
        dev,
        "--rows",
        6,
        "-o",
        out,
        "--json",
    )
    assert code == 0
    found = json.loads(said)
    before, after = Pipeline.from_pretrained(world.zip), Pipeline.from_pretrained(out)
    assert after.model.config.dropped == ("0:text>speech",)
    assert found["links"]["0:text>speech"]["dropped"] is True
    for pipe, when in ((before, "before"), (after, "after")):
        assert found["new_parameters"][when] == sum(
            p.numel() for p in pipe.model.new_parameters().values()
        )
        samples = batches(pipe.model, data.read(dev, pipe.modalities, limit=6))
        assert {
            task: loss[when] for task, loss in found["nats_per_token"].items()
        } == pytest.approx(losses(pipe.model, samples))
    assert (
        found["nats_per_token"]["speech -> text"]["before"]
        == found["nats_per_token"]["speech -> text"]["after"]
    )
    assert found["wer"]["asr"]["before"] == found["wer"]["asr"]["after"]
    held = bits(before.model)
    assert all(held[name] == value for name, value in bits(after.model).items())


def test_prune_prints_what_links_add_and_refuses_what_is_not_there(
    zipper: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path
) -> None:
    measured = ("--data", world.folder / "dev.jsonl", "--rows", 4)
    code, said, _ = zipper("prune", world.zip, "--below", 1e6, *measured, "-o", tmp_path / "none")
    assert code == 0
    assert said.count("dropped") == 2
    assert "new parameters: " in said
    assert " -> 0\n" not in said  # input projections stay
    assert not Pipeline.from_pretrained(tmp_path / "none").model.links
    for why, given in {
        "No link adds less than": ("--below", 1e-9),
        "no link '5:a>b'": ("--links", "5:a>b"),
    }.items():
        code, said, complaint = zipper(
            "prune", world.zip, *given, *measured, "-o", tmp_path / "out"
        )
        assert (code, said, why in complaint) == (2, "", True)
        assert not (tmp_path / "out").exists()


def test_frozen_towers_inside_the_old_folder_go_with_the_new_one(
    world: World, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(world.zip)
    pipe.save_pretrained(tmp_path / "one", include=["text"])
    pipe = Pipeline.from_pretrained(tmp_path / "one")
    assert inside(pipe.model, tmp_path / "one") == ["text"]
    assert inside(pipe.model, world.zip) == []
    assert inside(Pipeline.from_pretrained(world.zip).model, world.zip) == []


def test_what_is_born_again_beside_a_new_tower_learns_though_it_was_frozen() -> None:
    grown = add(zipped(TWO), "image", tiny_tower("llama", 8, 16, 3, 20), ends=(0, 1))
    frozen = {str(key) for key in grown.config.links if "image" not in key[1:]}
    assert {*grown.config.frozen_links} == frozen and grown.config.kept == ("speech", "text")
    new, _ = swap(grown, {"text": tiny_tower("llama", 7, width=24, layers=LAYERS["text"])})
    assert new.config.frozen_links == () and new.config.kept == ("speech",)
    assert all(link.gate.requires_grad for link in new.links.values())
    learns = {name for name, part in new.inputs.items() if part.mlp[0].weight.requires_grad}
    assert learns == {"text", "image"}


def test_what_is_born_again_is_drawn_from_the_seed() -> None:
    old = zipped(TWO)
    with pytest.raises(ZipperError, match=r"seed is 0.5"):
        swap(old, {"text": tiny_tower("llama", 7, width=24)}, seed=0.5)
    made = [swap(old, {"text": tiny_tower("llama", 7, width=24)}, seed=n)[0] for n in (3, 3, 4)]
    one, again, other = (model.link(0, "speech", "text").query.weight for model in made)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_junctions_of_a_grown_zip_move_with_the_depths_at_which_they_stand() -> None:
    """They are listed behind those of the old zip, so their depths do not rise along the list."""
    grown = add(zipped(TWO), "image", tiny_tower("llama", 8, 16, 3, 20), ends=(0, 1))
    old = grown.config
    for layers in (6, 12, 24):
        tower = tiny_tower("llama", 7, width=24, layers=layers)
        new = swap(grown, {"text": tower})[0].config
        assert [str(key) for key in new.links] == [str(key) for key in old.links]
        for key, was in zip(new.links, old.links, strict=True):
            if key.target == "text":
                assert new.fused(key) == round(old.fused(was) / LAYERS["text"] * layers)
            if key.source == "text":
                assert new.shown(key) == round(old.shown(was) / LAYERS["text"] * layers)


def test_a_tower_stays_fused_in_front_of_its_first_block() -> None:
    links = [("speech", 2, "text", 0), ("speech", 3, "text", 1), ("text", 0, "speech", 1)]
    with pytest.warns(UserWarning, match="before the first block"):
        old = zipped(TWO, links=links)
        same = tiny_tower("llama", SEED["text"], WIDTH["text"], LAYERS["text"], VOCABULARY["text"])
        new, _ = swap(old, {"text": same})
        deeper, _ = swap(old, {"text": tiny_tower("llama", 7, layers=10)})
        flat, _ = swap(old, {"text": tiny_tower("llama", 7, layers=1)})
    assert new.config.junctions == old.config.junctions and bits(new) == bits(old)
    assert [junction.get("text") for junction in deeper.config.junctions] == [0, 2, None]
    assert [junction.get("text") for junction in flat.config.junctions] == [0, None]


def test_where_a_tower_is_shown_keeps_its_share_of_the_depth() -> None:
    old = zipped(TWO, links=[("text", 1, "speech", 1), ("text", 5, "speech", 2)])
    for layers, shown in ((10, [2, 10]), (2, [1, 2])):
        new, _ = swap(old, {"text": tiny_tower("llama", 7, layers=layers)})
        assert new.config.shows is not None
        assert [where["text"] for where in new.config.shows] == shown


def test_links_of_their_own_shape_keep_it_when_a_tower_is_swapped() -> None:
    narrow = LinkConfig(head_width=4)
    grown = add(zipped(TWO), "image", tiny_tower("llama", 8, 16, 3, 20), ends=(0, 1), link=narrow)
    new, report = swap(grown, {"text": tiny_tower("llama", 7, width=24, layers=3)})
    assert {fate.name for fate in report.fates} > {""}
    named = {str(key): key for key in new.config.links}
    shaped = {name for name, key in named.items() if "image" in key[1:]}
    assert new.config.shapes == dict.fromkeys(shaped, grown.config.shapes.popitem()[1])


def test_the_ends_of_a_segment_stay_only_for_a_relative_with_as_many_ids() -> None:
    old, own = zipped(TWO), (0, 1)
    assert ENDS["text"] != own
    stranger = tiny_tower("llama", 99, WIDTH["text"], LAYERS["text"], VOCABULARY["text"])
    more = tiny_tower("llama", SEED["text"], WIDTH["text"], LAYERS["text"], VOCABULARY["text"])
    more.resize_token_embeddings(VOCABULARY["text"] + 3, mean_resizing=False)
    for tower, ends in ((relative("text"), ENDS["text"]), (stranger, own), (more, own)):
        new, report = swap(old, {"text": tower})
        assert report.towers["text"].related is (tower is not stranger)
        assert new.ends()["text"] == ends


def test_a_report_says_what_the_new_tower_cannot_take_over() -> None:
    said = "mean tokens per segment were counted with the old vocabulary"
    tower = tiny_tower("llama", 7, vocabulary=29)
    assert said in swap(zipped(TWO), {"text": tower})[1].text()
    assert said not in swap(zipped(TWO), {"text": tower}, tokens={"text": 2.0})[1].text()
    report = swap(zipped(TWO), {"text": relative("text")})[1]
    assert said not in report.text() and "adapter" not in report.text()
    change = report.towers["text"]
    adapted = dataclasses.replace(change, before=dataclasses.replace(change.before, lora={"r": 4}))
    report = dataclasses.replace(report, towers={"text": adapted})
    assert "the adapter of the old tower is gone with it" in report.text()


def test_what_is_born_again_has_the_precision_of_what_was_there() -> None:
    old = zipped(TWO)
    for parts in (old.links, old.inputs):
        parts.to(torch.bfloat16)
    new, _ = swap(old, {"text": tiny_tower("llama", 7)})
    for parts in (new.links, new.inputs):
        assert {p.dtype for p in parts.parameters()} == {torch.bfloat16}


def test_what_comes_out_is_in_the_mode_of_what_went_in() -> None:
    for mode in True, False:
        old = zipped(TWO).train(mode)
        for new in (swap(old, {"text": relative("text")})[0], prune(old, ["0:text>speech"])):
            assert new.training is mode and new.links["0:speech>text"].training is mode


def test_a_new_tower_is_named_by_where_it_lay_when_it_was_given(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    new, _ = swap(Zipper.from_pretrained(world.zip), {"text": "text/tower"})
    assert new.config.towers["text"].source == str(world.folder / "text" / "tower")


def test_links_of_a_pruned_zip_are_worth_what_they_are_worth_there() -> None:
    model = prune(zipped(TWO), ["1:text>speech"])
    samples = batches(model, [{"text": [3, 4], "speech": [5, 6, 7]}])
    without = losses(prune(model, ["0:text>speech"]), samples)
    worth = sum(without.values()) - sum(losses(model, samples).values())
    assert costs(model, samples)["0:text>speech"] == pytest.approx(worth, abs=1e-5)
