"""Composition: each pair answers as before to the bit, parts lie once, and what cannot be joined is
refused with the reason."""

import dataclasses
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import ENDS, LAYERS, SEED, VOCABULARY, WIDTH, draw, lay, number
from test_mutants import mutated
from tiny import World

from zipper import cli, composition
from zipper.composition import compose, compose_pipelines
from zipper.errors import LostTower, Mismatch, ZipperError
from zipper.fast.reader import Fused
from zipper.generation import Engine
from zipper.growth import add
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.reading import Stepwise
from zipper.sampling import Sampling
from zipper.strand import Segment
from zipper.surgery import prune
from zipper.testing import tiny_tower
from zipper.verify import verify

TEXT = ("text", "speech")
PICTURES = ("text", "image")


def pair(towers: tuple[str, str], seed: int, **options: Any) -> Zipper:
    """A zip of two towers with everything new drawn at random, its gates open."""
    made = {
        name: tiny_tower("llama", SEED[name], WIDTH[name], LAYERS[name], VOCABULARY[name])
        for name in towers
    }
    ends = {name: ENDS[name] for name in towers}
    settings = {"link": LinkConfig(head_width=8), "ends": ends, "seed": seed} | options
    model = Zipper.from_towers(made, **settings)
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.new_parameters().items()):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=numbers))
    return model


def parents(seed: int) -> tuple[Zipper, Zipper]:
    """Two zips that share their text tower, of shapes drawn at random."""
    dice = random.Random(seed)
    found = []
    for other in "speech", "image":
        kind = dice.choice(["residual", "paper"]) if seed % 2 else "residual"
        kind = kind if not found or "none" in kinds else kinds[0]
        kinds = [dice.choice([kind, kind, "none"])]
        usual = {"text": dice.choice([0.0, 7.0, 15.9]), other: dice.choice([0.0, 3.0, 11.3])}
        link = LinkConfig(head_width=dice.choice([4, 8]), projection_relu=dice.random() < 0.3)
        options = {"every": {"text": dice.choice([1, 2])}, "train": dice.choice([(), (other,)])}
        options |= {"shows": dice.choice([None, {"text": 0}]), "input_projection": kinds[0]}
        found.append(pair(("text", other), seed + len(found), link=link, tokens=usual, **options))
    return found[0], found[1]


def keeps_answers(old: Zipper, new: Zipper, seed: int) -> None:
    """Logits and greedy tokens, by both readers, where the other parent's tower takes no part."""
    dice = random.Random(seed)
    strands = lay([number(draw(dice, [*old.towers], 3)) for _ in range(2)])
    before, after = old(strands), new(strands)
    assert before.keys() == after.keys()
    known = all(tower.tokens for tower in [*old.config.towers.values(), new.config.towers["text"]])
    for one, other in ([*old.towers], [*old.towers][::-1]) if known else ():
        for count in 5, 13:
            assert old.limit(one, {other: count}) == new.limit(one, {other: count})
    assert all(torch.equal(before[name], after[name]) for name in before)
    for source, target in ([*old.towers], [*old.towers][::-1]):
        given = [Segment(source, [i for _, i in draw(dice, [source], 2)])]
        plan = [target], Sampling(), {target: 4}
        for reader in Stepwise, Fused:
            before, after = (Engine(zip_, reader(zip_)) for zip_ in (old, new))
            assert before.generate([given], *plan) == after.generate([given], *plan)


def composes(seed: int) -> None:
    first, second = parents(seed)
    for new in compose(first, second), compose(second, first):
        keeps_answers(first, new, seed)
        keeps_answers(second, new, seed)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 302), marks=pytest.mark.slow)])
def test_each_pair_answers_as_before_to_the_bit(seeds: range) -> None:
    for seed in seeds:
        composes(seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["residual", "paper"])
def test_a_composed_zip_keeps_every_promise(kind: Any) -> None:
    made = [pair(towers, n, input_projection=kind) for n, towers in enumerate((TEXT, PICTURES))]
    assert all(check.held for check in verify(compose(*made)))


@pytest.mark.parametrize("kind", ["residual", "paper"])
def test_in_the_company_of_both_every_reader_says_the_same(kind: Any) -> None:
    made = [pair(towers, n, input_projection=kind) for n, towers in enumerate((TEXT, PICTURES))]
    new = compose(*made)
    assert [*new.config.inputs["text"]] == ["text:speech", "text:image"]
    names, dice = ["text", "speech", "image"], random.Random(0)
    words = draw(dice, names, 6)
    whole = new(lay([number(words)]))
    for reader in Stepwise(new), Fused(new):
        session, ranks = reader.open(names, names), dict.fromkeys(names, 0)
        for name, i in words:
            (logits,) = reader.read({name: [(session, [i])]})[name]
            torch.testing.assert_close(logits, whole[name][0, ranks[name]], atol=1e-4, rtol=0)
            ranks[name] += 1


def test_what_both_have_alike_is_there_once() -> None:
    first, second = pair(TEXT, 0), pair(PICTURES, 1)
    second.inputs["text"].load_state_dict(first.inputs["text"].state_dict())
    new = compose(first, second)
    assert [*new.config.inputs["text"]] == ["text"]
    assert [*new.config.inputs["speech"]] == ["speech:text"]
    assert new.towers["text"] is first.towers["text"]
    assert not any(p.requires_grad for p in new.towers.parameters())
    keeps_answers(first, new, 0)


def test_a_composed_zip_is_composed_and_grown_again() -> None:
    first, second = pair(TEXT, 0), pair(PICTURES, 1)
    ring = pair(("image", "speech"), 2)
    third = compose(second, ring, {"speech": "sound"})
    new = compose(first, third)
    assert {*new.towers} == {"text", "speech", "image"}
    for old in first, second, ring:
        keeps_answers(old, new, 0)
    old, tower = compose(first, second), tiny_tower("llama", 9, 16, 3, 20)
    keeps_answers(first, add(old, "motion", tower, ends=(0, 1)), 0)


def apart(*towers: str, train: tuple[str, ...] = ()) -> Zipper:
    """A zip whose speech tower is another one."""
    made = {name: tiny_tower("llama", 77, WIDTH[name], 3, VOCABULARY[name]) for name in towers}
    if "text" in towers:
        made["text"] = pair(TEXT, 0).tower("text")
    ends, link = {name: ENDS[name] for name in towers}, LinkConfig(head_width=8)
    return Zipper.from_towers(made, train=train, ends=ends, link=link)


REFUSED: dict[str, tuple[Callable[[], Zipper], str]] = {
    "nothing shared": (lambda: apart("speech", "image"), "share no tower"),
    "one name": (lambda: apart("text", "speech", train=("speech",)), "the second trained its own"),
    "ends": (lambda: pair(PICTURES, 1, ends={"text": (1, 2), "image": (0, 1)}), "begin and end"),
    "one pair": (lambda: pair(TEXT, 1), "Both zips link"),
    "kinds": (lambda: pair(PICTURES, 1, input_projection="paper"), "of two kinds"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_joined_is_refused_with_the_reason(which: str) -> None:
    second, reason = REFUSED[which]
    with pytest.raises(ZipperError, match=reason):
        compose(pair(TEXT, 0), second())


def test_a_name_for_the_second_gives_way_and_an_unknown_one_is_refused() -> None:
    first, second = pair(TEXT, 0), apart("text", "speech")
    assert {*compose(first, second, {"speech": "voice"}).towers} == {"text", "speech", "voice"}
    with pytest.raises(ZipperError, match="names names the tower 'sound'"):
        compose(first, second, {"sound": "voice"})
    for name in ("Voice", "my.voice", "", "a>b"):
        with pytest.raises(ZipperError, match="cannot name a tower"):
            compose(first, second, {"speech": name})


def test_a_tower_that_changed_since_it_was_loaded_is_refused() -> None:
    first, second = pair(TEXT, 0), pair(PICTURES, 1)
    with torch.no_grad():
        next(second.towers["text"].parameters()).add_(1)
    with pytest.raises(Mismatch, match="no longer what its zip pinned"):
        compose(first, second)


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "rates follow the first": (composition, "_joined", "rate=None if same else was", "rate=None"),
    "usual lengths are not in proportion": (composition, "_joined", "* own / other", ""),
    "the first's input projection serves all": (
        composition,
        "_company",
        "held, module)]",
        "held, held)]",
    ),
    "the second's shapes are forgotten": (composition, "_joined", "fitted != a.link", "False"),
    "the second's links stand where the first's do": (
        composition,
        "_joined",
        "_called(junction, named) for junction in b.shows or b.junctions",
        "_called(junction, named) for junction in b.junctions",
    ),
    "the first's shows are forgotten": (
        composition,
        "_joined",
        "a.shows or a.junctions",
        "a.junctions",
    ),
    "links are numbered from the first's": (
        composition,
        "compose",
        "second.links[str(key)]",
        "second.links[str(b.links[0])]",
    ),
    "the second's input projection is the first's": (
        composition,
        "_company",
        "mine[who] = module",
        "mine[who] = first.inputs[part] if part in first.inputs else module",
    ),
    "content is not compared": (composition, "_content", "pin.digest, pin.dtype", "'', ''"),
    "junctions are not moved": (composition, "_moved", "len(a.junctions) + key", "key"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_fault_in_it_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [parents(seed) for seed in range(5)]
    made.append((pair(TEXT, 0), pair(PICTURES, 1, tokens={"text": 7.0, "image": 3.0})))
    owner, function, old, new = MUTANTS[mutant]
    monkeypatch.setattr(owner, function, mutated(owner, function, old, new))
    with pytest.raises((AssertionError, ZipperError, KeyError, RuntimeError)):
        for seed, (first, second) in enumerate(made):
            new_zip = composition.compose(first, second)
            keeps_answers(first, new_zip, seed)
            keeps_answers(second, new_zip, seed)


def test_what_the_page_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "growing.md").read_text("utf-8")
    namespace: dict[str, Any] = {}
    for shown in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(shown, "docs/growing.md", "exec"), namespace)
    assert "speech" in capsys.readouterr().out


# --- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """A saved zip of text and speech, and one of the same text and other text."""
    world = tiny.world(tmp_path_factory.mktemp("world"))
    return world, tiny.notes(world)


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("towers/**/*.safetensors"))


def test_the_command_names_towers_of_its_parents_and_copies_none(
    saved: tuple[World, Path], tmp_path: Path
) -> None:
    world, notes = saved
    before = {path: path.read_bytes() for path in notes.rglob("*") if path.is_file()}
    home = tmp_path / "home"
    shutil.copytree(world.folder, home)
    out = home / "three"
    assert cli.main(["compose", str(home / "zip"), str(home / "notes"), "-o", str(out)]) == 0
    assert weights(out) == 0 < weights(notes)
    assert {path: path.read_bytes() for path in before} == before
    new = Pipeline.from_pretrained(out, dtype=None)
    assert {*new.modalities} == {"text", "speech", "notes"}
    for parent in "zip", "notes":
        old = Pipeline.from_pretrained(home / parent, dtype=None)
        (other,) = {*old.zip.towers} - {"text"}
        strands = lay([number([("text", 5), (other, 6), ("text", 7), (other, 8)])])
        before, after = old.zip(strands), new.zip(strands)
        assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.move(home, tmp_path / "moved")  # parents and what was composed of them
    Pipeline.from_pretrained(tmp_path / "moved" / "three")
    shutil.rmtree(tmp_path / "moved" / "zip")
    with pytest.raises(LostTower, match=r"'speech'.*--tower speech=PATH"):
        Pipeline.from_pretrained(tmp_path / "moved" / "three")


def test_a_copy_needs_no_parent_and_a_parent_that_learned_on_is_refused(
    saved: tuple[World, Path], tmp_path: Path
) -> None:
    world, _ = saved
    home = tmp_path / "home"
    shutil.copytree(world.folder, home)
    both = [str(home / "zip"), str(home / "notes")]
    assert cli.main(["compose", *both, "-o", str(tmp_path / "whole"), "--copy"]) == 0
    assert cli.main(["compose", *both, "-o", str(tmp_path / "named")]) == 0
    old = Pipeline.from_pretrained(home / "notes", dtype=None)
    with torch.no_grad():
        next(old.zip.towers["notes"].parameters()).add_(1)
    old.save_pretrained(home / "notes")
    with pytest.raises(Mismatch, match=r"'notes'.*not the one this zip was trained on"):
        Pipeline.from_pretrained(tmp_path / "named")
    shutil.rmtree(home)
    assert {*Pipeline.from_pretrained(tmp_path / "whole").zip.towers} == {"text", "speech", "notes"}


def test_another_tokenizer_is_refused(saved: tuple[World, Path]) -> None:
    world, notes = saved
    one, two = (Pipeline.from_pretrained(folder, dtype=None) for folder in (world.zip, notes))
    two.modalities["text"] = tiny.text(11)
    with pytest.raises(Mismatch, match="tokenizers or codebooks differ"):
        compose_pipelines(one, two)


def test_a_parent_goes_on_learning_and_what_it_learns_is_its_own() -> None:
    first, second = pair(TEXT, 1, train=["speech"]), pair(PICTURES, 2)
    first.train()
    made = compose(first, second)
    speech = first.towers["speech"]
    assert speech.training and all(p.requires_grad for p in speech.parameters())
    assert made.towers["speech"] is not speech and made.towers["text"] is first.towers["text"]
    assert not any(p.requires_grad for p in made.towers["speech"].parameters())


def test_links_that_a_parent_lacks_stay_away() -> None:
    first = prune(pair(TEXT, 0), ["0:text>speech"])
    second = prune(pair(PICTURES, 1), ["0:image>text"])
    new, behind = compose(first, second), len(first.config.junctions)
    assert new.config.dropped == ("0:text>speech", f"{behind}:image>text")
    for old in first, second:
        keeps_answers(old, new, 0)


def test_what_no_longer_learned_in_a_parent_does_not_learn_in_the_composed_zip() -> None:
    first, old = pair(TEXT, 0), pair(PICTURES, 1)
    second = add(old, "motion", tiny_tower("llama", 9, 16, 3, 20), ends=(0, 1))
    new, behind = compose(first, second), len(first.config.junctions)
    kept = [f"{behind + key.junction}:{key.source}>{key.target}" for key in old.config.links]
    assert {*new.config.frozen_links} == {*kept} and {*new.config.kept} == {"text", "image"}
    learns = {name for name, link in new.links.items() if link.gate.requires_grad}
    assert learns == {*new.links} - {*kept}


def test_two_towers_of_the_second_with_one_name_are_refused() -> None:
    second = compose(pair(TEXT, 0), pair(PICTURES, 1))
    with pytest.raises(ZipperError, match="gives two towers of the second zip one name"):
        compose(apart("text", "motion"), second, {"speech": "other", "image": "other"})


def test_an_adapter_of_other_numbers_is_refused_and_the_same_one_is_shared() -> None:
    lora = {"text": {"r": 2, "target_modules": ["q_proj"]}}
    first, second = pair(TEXT, 0, lora=lora), pair(PICTURES, 1, lora=lora)
    with pytest.raises(ZipperError, match="has an adapter that is not the same in both"):
        compose(first, second)
    held = composition._adapter(first, "text")
    with torch.no_grad():
        for name, parameter in composition._adapter(second, "text").items():
            parameter.copy_(held[name])
    strands = lay([number([("text", 5), ("image", 6), ("text", 7)])])
    said, new = second(strands), compose(first, second)(strands)
    assert all(torch.equal(said[name], new[name]) for name in said)


def test_a_composed_zip_attends_as_the_first() -> None:
    first = pair(TEXT, 0)
    first.attention = "flex"
    assert compose(first, pair(PICTURES, 1)).attention == "flex"


@pytest.mark.parametrize(
    "parts", [(("speech",), ("speech",)), (("speech", "speech"),), ((),), (("text",),)]
)
def test_company_that_is_none_is_refused(parts: tuple[tuple[str, ...], ...]) -> None:
    config = pair(TEXT, 0).config
    with pytest.raises(ZipperError, match=r"company of 'text' is .*named once"):
        dataclasses.replace(config, company={"text": parts})
