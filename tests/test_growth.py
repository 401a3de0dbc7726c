"""Growth: what was there stays to the bit, what is new is silent, and only what is named learns."""

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import ENDS, LAYERS, SEED, VOCABULARY, WIDTH, draw, lay, number, wake, zipped
from tiny import World

from zipper import cli
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.fast.reader import Fused
from zipper.generation import Engine
from zipper.growth import add, add_pipeline
from zipper.link import LinkConfig
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving import checkpoint
from zipper.strand import Segment
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.training import train

OLD = {"text": "llama", "speech": "llama"}
NARROW = LinkConfig(head_width=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A saved pipeline and all that it is made of."""
    return tiny.world(tmp_path_factory.mktemp("world"))


def image() -> Tower:
    """The new tower."""
    shape = WIDTH["image"], LAYERS["image"], VOCABULARY["image"]
    return Tower(tiny_tower("llama", SEED["image"], *shape))


def grown(seed: int) -> tuple[Zipper, Zipper]:
    """A zip drawn at random, its gates open, and the same with one tower more."""
    dice = random.Random(seed)
    shows = dice.choice([None, {"text": 0}, {"speech": "before"}])
    old = zipped(OLD, dice.choice([None, {"text": 2}]), shows=shows, train=["speech"])
    options = {"link": dice.choice([None, NARROW]), "seed": seed}
    partners = dice.choice([None, ["text"], ["speech"]])
    return old, add(old, "image", image(), partners=partners, ends=ENDS["image"], **options)


def keeps_old_answers(old: Zipper, new: Zipper, seed: int) -> None:
    """Logits and greedy tokens, by both readers, where the new tower takes no part."""
    dice = random.Random(seed)
    strands = lay([number(draw(dice, [*OLD], 3)) for _ in range(2)])
    before, after = old(strands), new(strands)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for source, target in (("text", "speech"), ("speech", "text")):
        given = [Segment(source, [i for _, i in draw(dice, [source], 2)])]
        assert old.generate(given, [target]) == new.generate(given, [target])
        said = [
            Engine(model, Fused(model)).generate([given], [target], Sampling())
            for model in (old, new)
        ]
        assert said[0] == said[1]


@pytest.mark.parametrize("seed", range(6))
def test_old_answers_stay_to_the_bit(seed: int) -> None:
    keeps_old_answers(*grown(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 306))
def test_old_answers_stay_to_the_bit_in_many(seed: int) -> None:
    keeps_old_answers(*grown(seed), seed)


@pytest.mark.parametrize("seed", range(3))
def test_new_links_add_nothing_at_birth_and_something_once_open(seed: int) -> None:
    old, new = grown(seed)
    sequence = draw(random.Random(seed), [*OLD], 4)
    both = lay([number(sequence)])
    three = lay([number([("image", 5), *sequence])])
    assert all(torch.equal(new(three)[name], old(both)[name]) for name in both)
    fresh = {*map(str, new.config.links)} - {*map(str, old.config.links)}
    assert fresh
    assert not any(new.links[name].gate.any() for name in fresh)
    wake(new)
    assert any(not torch.equal(new(three)[name], new(both)[name]) for name in both)


def test_only_what_is_new_learns() -> None:
    old, new = grown(0)
    learns = {name for name, p in new.named_parameters() if p.requires_grad}
    fresh = {f"links.{key}" for key in new.config.links[len(old.config.links) :]}
    assert not learns & {name for name, _ in old.named_parameters()}
    assert any(name.startswith(tuple(fresh)) for name in learns)
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], 0.1)
    new(lay([number([("image", 5), ("text", 4), ("image", 3)])]))["text"].logsumexp(
        -1
    ).sum().backward()
    optimizer.step()
    changed = {name for name, p in new.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= learns


def test_a_name_that_is_taken_and_links_elsewhere_are_refused() -> None:
    old = zipped(OLD)
    with pytest.raises(ZipperError, match="already"):
        add(old, "text", image())
    with pytest.raises(ZipperError, match="does not touch"):
        add(old, "image", image(), ends=ENDS["image"], links=[("text", 1, "speech", 1)])


def test_the_command_keeps_files_and_tensors(world: World, tmp_path: Path) -> None:
    out, text = tmp_path / "grown", world.folder / "text"
    named = f"second={text / 'tower'}"
    wanted = ["--modality", f"second={text}", "-o", str(out)]
    assert cli.main(["add", str(world.zip), named, *wanted]) == 0
    shard = "towers/speech/model.safetensors"
    assert checkpoint.sha256(out / shard) == checkpoint.sha256(world.zip / shard)
    old, new = (Pipeline.from_pretrained(f).model for f in (world.zip, out))
    held = new.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in old.state_dict().items())
    assert new.config.frozen_links
    assert not any(p.requires_grad for n, p in new.named_parameters() if n.startswith("towers."))


def test_the_command_takes_each_link_by_itself(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = world.folder / "text"
    asked = ["add", str(world.zip), f"second={text / 'tower'}", "--modality", f"second={text}"]
    chosen = ["--link", "speech:0>second:1", "--link", "second:1>speech:1"]
    assert cli.main([*asked, *chosen, "-o", str(tmp_path / "grown")]) == 0
    config = Pipeline.from_pretrained(tmp_path / "grown").zip.config
    new = [key for key in config.links if "second" in (key.source, key.target)]
    depths = {(k.source, config.shown(k), k.target, config.fused(k)) for k in new}
    assert depths == {("speech", 0, "second", 1), ("second", 1, "speech", 1)}
    for wrong, said in (
        (["--link", "speech>second"], "SOURCE:DEPTH>TARGET:DEPTH"),
        ([*chosen, "--partner", "text"], "Give one"),
    ):
        assert cli.main([*asked, *wrong, "-o", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_grown_zip_is_trained_by_the_loop_and_only_what_is_new_learns(
    world: World, tmp_path: Path
) -> None:
    old = Pipeline.from_pretrained(world.zip)
    text = Text.load(world.folder / "text")
    source = str(world.folder / "text" / "tower")
    grown = add_pipeline(old, "second", source, text, train=True, link=NARROW)
    new = [key for key in grown.zip.config.links if "second" in (key.source, key.target)]
    assert {(key.source, grown.zip.config.shown(key)) for key in new} == {
        ("text", 0),  # as text does
        ("second", 0),
        ("speech", 1),
    }
    grown.save_pretrained(tmp_path / "grown")
    saved = Pipeline.from_pretrained(tmp_path / "grown").zip
    assert saved.config.shapes == grown.zip.config.shapes != {}
    assert all(
        torch.equal(a, b)
        for a, b in zip(saved.state_dict().values(), grown.zip.state_dict().values(), strict=True)
    )
    rows = [
        row | {"second": row["text"]} for row in manifests.manifest(world.folder / "pairs.jsonl")
    ]
    manifests.write(tmp_path / "three.jsonl", rows)
    recipe = world.config(
        tmp_path / "run",
        start=str(tmp_path / "grown"),
        towers={
            "text": source,
            "speech": str(tmp_path / "grown" / "towers" / "speech"),
            "second": source,
        },
        modalities={name: str(tmp_path / "grown" / "modalities" / name) for name in saved.towers},
        data=str(tmp_path / "three.jsonl"),
        dev=str(tmp_path / "three.jsonl"),
        tasks={"second -> text": 0.5, "text -> second": 0.5},
        train=(),
    )
    trained = train(recipe).zip
    before, moved = saved.state_dict(), set()
    for name, tensor in trained.state_dict().items():
        if not torch.equal(tensor, before[name]):
            moved.add(name)
    assert moved
    assert all("second" in name for name in moved), moved
    assert trained.config.frozen_links == saved.config.frozen_links


def test_new_links_are_born_closed_whatever_their_config_says() -> None:
    old = zipped(OLD)
    open_gates = LinkConfig(head_width=4, gate_init=0.7)
    new = add(old, "image", image(), ends=ENDS["image"], link=open_gates)
    fresh = {*map(str, new.config.links)} - {*map(str, old.config.links)}
    assert fresh
    for name in fresh:
        assert not new.links[name].gate.any() and not new.links[name].feedforward_gate.any()


def test_new_parameters_are_drawn_from_the_seed_alone() -> None:
    old, made = zipped(OLD), []
    for seed, before in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(before)
        made.append(add(old, "image", image(), ends=ENDS["image"], seed=seed))
    name = str(made[0].config.links[-1])
    one, again, other = (model.links[name].query.weight for model in made)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_where_nothing_is_frozen_all_that_learned_goes_on_learning() -> None:
    old = zipped(OLD, train=["speech"])
    new = add(old, "image", image(), ends=ENDS["image"], freeze=False)
    learns = {name: p.requires_grad for name, p in new.named_parameters()}
    was = {name: p.requires_grad for name, p in old.named_parameters()}
    assert {name: learns[name] for name in was} == was
    assert new.config.frozen_links == new.config.kept == ()
    assert new.config.towers["speech"].train


def test_partners_and_the_interval_say_where_the_new_tower_exchanges() -> None:
    old = zipped(OLD)

    def depths(**options: Any) -> set[tuple[str, int, str, int]]:
        config = add(old, "image", image(), ends=ENDS["image"], **options).config
        new = [key for key in config.links if "image" in (key.source, key.target)]
        return {(k.source, config.shown(k), k.target, config.fused(k)) for k in new}

    there = {("image", 2, "text", 1), ("text", 1, "image", 2)}
    assert depths(partners=["text"], every=2) == there
    assert depths(partners=["text"]) > {("image", 1, "text", 1), ("image", 2, "text", 2)}
    both = depths(every=2)
    assert both == there | {("image", 2, "speech", 1), ("speech", 1, "image", 2)}


def test_a_grown_zip_is_in_the_mode_of_the_old_one() -> None:
    for mode in True, False:
        old = zipped(OLD).train(mode)
        assert add(old, "image", image(), ends=ENDS["image"]).training is mode


def test_the_new_tower_has_the_usual_length_and_the_projection_that_were_given() -> None:
    options = {"tokens": 7.5, "input_projection": "none"}
    new = add(zipped(OLD), "image", image(), ends=ENDS["image"], **options)
    assert new.config.towers["image"].tokens == 7.5
    assert new.config.inputs["image"] == {} and {*new.inputs} == {"text", "speech"}
    key = next(key for key in new.config.links if key[1:] == ("image", "text"))
    assert new.link(*key).position_scale == 7.5 / new.config.towers["text"].tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shows": {"text": 0}, "links": [("image", 1, "text", 1)]}, "Give one"),
        ({"every": 0}, "every is 0; an interval is a number of blocks, at least 1"),
        ({"every": 9}, "of 3 blocks has no junction with an old one at every=9"),
        ({"partners": ["video"]}, "partners names the tower 'video'"),
        ({"shows": {"video": 0}}, "shows names the tower 'video'"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_what_does_not_fit_a_new_tower_is_refused_in_a_sentence(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ZipperError, match=said):
        add(zipped(OLD), "image", image(), ends=ENDS["image"], **options)


def test_a_zip_that_grows_twice_keeps_what_was_frozen_and_what_had_its_own_shape() -> None:
    once = add(zipped(OLD), "image", image(), ends=ENDS["image"], link=NARROW)
    other = Tower(tiny_tower("llama", 9, 16, 3, 20))
    twice = add(once, "second", other, ends=(0, 1), freeze=False)
    assert twice.config.frozen_links == once.config.frozen_links != ()
    assert twice.config.kept == once.config.kept == ("speech", "text")
    assert once.config.shapes.items() <= twice.config.shapes.items() and once.config.shapes
    held = twice.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in once.state_dict().items())


def test_a_new_tower_is_named_by_where_it_lay_when_it_was_given(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    new = add(Zipper.from_pretrained(world.zip), "second", "text/tower")
    assert new.config.towers["second"].source == str(world.folder / "text" / "tower")


def test_a_new_tower_with_another_codebook_than_it_was_trained_with_is_refused(
    world: World, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(world.zip)
    tower = world.zip / "towers" / "speech"
    with pytest.raises(ZipperError, match="another tokenizer or codebook"):
        add_pipeline(pipe, "second", tower, tiny.units(seed=1))
    assert add_pipeline(pipe, "second", tower, tiny.units()).modalities.keys() == {
        "text",
        "speech",
        "second",
    }


def test_growing_draws_nothing_from_the_numbers_of_the_program() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    add(zipped(OLD), "image", image(), ends=ENDS["image"])
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_that_choose_go_along_to_the_bit() -> None:
    old, numbers = zipped(OLD), torch.Generator().manual_seed(0)
    old.choose(["speech", "text"])
    with torch.no_grad():
        for parameter in old.choosers.parameters():
            parameter.normal_(generator=numbers)
    held = add(old, "image", image(), ends=ENDS["image"]).choosers.state_dict()
    own = old.choosers.state_dict()
    assert own and all(torch.equal(tensor, held[name]) for name, tensor in own.items())
