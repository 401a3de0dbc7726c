"""Directed links: where a tower shows itself and where it is fused, drawn at random.

Every set of links without a circle obeys the laws that a zip of the paper's junctions obeys, by
every way to run it, and is the naive reference, which knows no schedule.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from laws import (
    LAYERS,
    draw,
    first_segment_is_bare,
    is_the_greedy_answer,
    is_the_reference,
    lay,
    nothing_leaks,
    number,
    packed_is_separate,
    steps_are_the_whole,
    unchecked,
    zipped,
)
from test_mutants import mutated

from zipper import config, lockstep
from zipper.config import Route, ZipperConfig
from zipper.errors import ZipperError
from zipper.fast import native, reader
from zipper.fast.reader import Fused
from zipper.generation import Engine, generate
from zipper.junctions import shape
from zipper.model import Zipper
from zipper.reading import Stepwise
from zipper.sampling import Sampling
from zipper.strand import Segment
from zipper.verify import verify

NAMES = ("text", "speech", "image", "motion")
Directed = tuple[str, int, str, int]


def links_of(dice: random.Random, names: Sequence[str], most: int = 7) -> list[Directed]:
    """Links at random, of which none closes a circle: a link is kept if a schedule is left."""
    kept: list[Directed] = []
    for _ in range(dice.randint(1, most)):
        source, target = dice.sample(names, 2)
        link = (
            source,
            dice.choice([0, dice.randint(0, LAYERS[source]), LAYERS[source]]),
            target,
            dice.randint(1, LAYERS[target] - 1),
        )
        if link in kept:
            continue
        try:
            born({name: "llama" for name in names}, links=[*kept, link])
        except ZipperError as error:
            assert "close a circle" in str(error)
            continue
        kept.append(link)
    return kept


def born(families: dict[str, str], **options: Any) -> Zipper:
    return zipped(families, **options)


def a_case(seed: int) -> tuple[random.Random, list[str], Zipper]:
    dice = random.Random(seed)
    names = list(NAMES[: dice.choice([2, 3, 4])])
    kind = dice.choice(["residual", "none"])
    links = links_of(dice, names)
    return dice, names, zipped({n: "llama" for n in names}, links=links, input_projection=kind)


def obeys_the_laws(seed: int) -> None:
    dice, names, model = a_case(seed)
    rows = [draw(dice, names, dice.randint(2, 5)) for _ in range(3)]
    steps_are_the_whole(model, rows, dice.choice([1, 2, 100]), left=dice.random() < 0.5)
    strands = lay([number(row) for row in rows])
    nothing_leaks(model, strands, dice.randrange(3), 0, dice.randint(1, len(rows[0]) - 1))
    packed_is_separate(model, rows)


def by_every_way(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice, names, model = a_case(seed)
    limits = dict.fromkeys(names, 4)
    prompts = []
    for _ in range(3):
        given = dice.choices(names, k=dice.randint(0, 2))
        prompts.append([Segment(n, [i for _, i in draw(dice, [n], 1, 4)]) for n in given])
    outputs = dice.choices(names, k=dice.randint(1, 3))
    found = generate(model, prompts, outputs, Sampling(), limits)
    for prompt, segments in zip(prompts, found, strict=True):
        is_the_greedy_answer(model, prompt, outputs, limits, segments)
    readers = [Stepwise(model), Fused(model), Fused(model, static=True)]
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        readers.append(Fused(model))
    for way in readers:
        said = Engine(model, way, 2).generate(prompts, outputs, Sampling(), limits)
        assert [[s.content for s in row] for row in said] == [
            [s.content for s in row] for row in found
        ]


@pytest.mark.parametrize("seed", range(4))
def test_random_links_obey_the_laws(seed: int) -> None:
    obeys_the_laws(seed)


@pytest.mark.parametrize(
    "seed", [100, 101, *(pytest.param(n, marks=pytest.mark.slow) for n in (102, 103))]
)
def test_random_links_are_one_by_every_way(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_every_way(seed, monkeypatch)


@pytest.mark.parametrize("seed", range(200, 203))
def test_random_links_are_the_naive_reference(seed: int) -> None:
    dice = random.Random(seed)
    model = zipped({n: "llama" for n in NAMES}, links=links_of(dice, NAMES))
    is_the_reference(model, draw(dice, NAMES, 5))


@pytest.mark.slow
def test_500_random_links_obey_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000, 1500):
        obeys_the_laws(seed)
        by_every_way(seed, monkeypatch)


# --- shows


TWO = {"text": "llama", "speech": "llama"}
LAYERS_OF = {"text": 5, "speech": 4}


@pytest.mark.parametrize(
    ("shows", "wanted"),
    [
        (
            {"text": "same"},
            [{"text": 1, "speech": 1}, {"text": 2, "speech": 2}, {"text": 3, "speech": 3}],
        ),
        (
            {"text": "before"},
            [{"text": 0, "speech": 1}, {"text": 1, "speech": 2}, {"text": 2, "speech": 3}],
        ),
        ({"text": 0, "speech": 4}, [{"text": 0, "speech": 4}] * 3),
        (
            {"speech": [2, 3, 4], "text": 0},
            [{"text": 0, "speech": 2}, {"text": 0, "speech": 3}, {"text": 0, "speech": 4}],
        ),
    ],
)
def test_where_towers_are_shown_may_be_said_in_a_word(
    shows: Any, wanted: list[dict[str, int]]
) -> None:
    fused, shown = shape(LAYERS_OF, shows=shows)
    assert fused == tuple({"text": n, "speech": n} for n in (1, 2, 3))
    assert shown == tuple(wanted)


def test_the_papers_junctions_are_the_special_case() -> None:
    """Shown where they are fused, said or not, towers halt in the same places and give the same
    bits."""
    plain, said = zipped(TWO), zipped(TWO, shows={"text": "same", "speech": [1, 2, 3]})
    assert plain.config.shows is None and said.config.shows == plain.config.junctions
    assert plain.config.route == said.config.route
    assert [[(stop.tower, stop.layer) for stop in halt] for halt in plain.config.route.halts] == [
        [("speech", n), ("text", n)] for n in (1, 2, 3)
    ]
    strands = lay([number(draw(random.Random(0), list(TWO), 4))])
    with torch.no_grad():
        one, other = plain(strands), said(strands)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tower_may_run_ahead_of_one_that_waits() -> None:
    """Speech is shown behind its last block, text at its embeddings: no circle."""
    model = zipped(TWO, shows={"text": 0, "speech": 4})
    for halt in model.config.route.halts:
        for stop in halt:
            assert stop.tower == "speech" or stop.layer in (0, 1, 2, 3)
    first_segment_is_bare(zipped(TWO, shows={"text": 0, "speech": 4}, input_projection="none"))
    assert all(check.held for check in verify(model))


@pytest.mark.parametrize("link", [("text", 2, "speech"), "text>speech", (), 3])
def test_what_is_no_link_is_refused(link: Any) -> None:
    with unchecked(), pytest.raises(ZipperError, match=r"A link is .*; four were wanted"):
        zipped(TWO, links=[link])


def test_a_circle_is_refused_with_the_links_that_close_it() -> None:
    with pytest.raises(ZipperError, match=re.escape("0:text>speech, 1:speech>text close a circle")):
        zipped(TWO, links=[("text", 3, "speech", 1), ("speech", 3, "text", 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shows": {"txt": 0}}, "shows names the tower 'txt'"),
        ({"shows": {"text": 6}}, "'text' is shown behind block 6; it has 5 blocks"),
        ({"shows": {"text": [0, 1]}}, "a list of 3, one for each junction"),
        ({"shows": {"text": "after"}}, "must be 'same', 'before', one depth, or a list of 3"),
        ({"links": [("text", 0, "speech", 4)]}, "must come before block 4, the last"),
        ({"links": [("text", 0, "speech", 1)] * 2}, "is there twice"),
        ({"links": [("text", 0, "text", 1)]}, "reads no other tower"),
        ({"links": [("text", 0, "speech", 1)], "shows": {"text": 0}}, "leave shows=... out"),
        ({"links": [("text", 0, "speech", 1)], "every": {"text": 1}}, "not several"),
    ],
)
def test_links_that_do_not_fit_are_refused_in_a_sentence(options: Any, message: str) -> None:
    with unchecked(), pytest.raises(ZipperError, match=re.escape(message)):
        shape(LAYERS_OF, **options)


def test_a_link_in_front_of_the_first_block_is_let_be_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="before the first block of 'speech'"):
        zipped(TWO, links=[("text", 2, "speech", 0)])


def test_what_is_saved_is_loaded_as_it_was(tmp_path: Any) -> None:
    model = zipped(TWO, shows={"text": 0, "speech": [2, 3, 4]})
    model.save_pretrained(tmp_path / "zip", include=list(TWO))
    again = Zipper.from_pretrained(tmp_path / "zip")
    assert again.config.shows == model.config.shows and again.config.route == model.config.route
    strands = lay([number(draw(random.Random(0), list(TWO), 4))])
    with torch.no_grad():
        assert all(torch.equal(again(strands)[n], h) for n, h in model(strands).items())


def test_a_configuration_without_shows_is_that_of_an_older_zip() -> None:
    config = zipped(TWO).config
    data = config.to_dict()
    del data["shows"]
    assert ZipperConfig.from_dict(data) == config


def test_embeddings_that_are_shown_cost_a_silent_tower_no_block() -> None:
    model = zipped(TWO, shows={"text": 0})
    ran: list[int] = []
    for index, block in enumerate(model.towers["text"].blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model.generate([Segment("text", [3, 4])], ["speech"], limits={"speech": 3})
    assert not ran
    assert Route.of(model.config).last_shown("text", ["speech"]) == 0


# --- are the laws sharp?


ZIPS: list[dict[str, Any]] = [
    {"shows": {"text": 0, "speech": 4}},
    {"shows": {"text": "before", "speech": [2, 3, 4]}},
    {"links": [("text", 0, "speech", 1), ("text", 2, "speech", 1), ("speech", 3, "text", 4)]},
    {"links": [("image", 3, "text", 1), ("text", 4, "speech", 1), ("speech", 2, "text", 4)]},
    {"links": [("text", 2, "image", 1), ("image", 1, "speech", 2), ("speech", 1, "text", 2)]},
]


def directed(options: dict[str, Any]) -> Zipper:
    """A zip of three towers whose schedule is made anew."""
    families = dict.fromkeys(NAMES if "links" in options else NAMES[:2], "llama")
    model = zipped(families, **options)
    model.config = dataclasses.replace(model.config)
    return model


def all_laws() -> None:
    for options in ZIPS:
        model = directed(options)
        names = list(model.config.towers)
        talk = [(name, 3 + n) for n, name in enumerate(names * 3)]
        is_the_reference(model, talk, gradients=False)
        steps_are_the_whole(model, [talk, talk[1:]], 2)
        given = [Segment(names[0], [3, 4])]
        for outputs in (["speech"], ["text", "speech"]):
            limits = dict.fromkeys(names, 3)
            is_the_greedy_answer(
                model, given, outputs, limits, model.generate(given, outputs, limits=limits)
            )
            (said,) = Engine(model, Fused(model)).generate([given], outputs, Sampling(), limits)
            is_the_greedy_answer(model, given, outputs, limits, said)
    with pytest.raises(ZipperError, match="circle"):
        directed({"links": [("text", 3, "speech", 1), ("speech", 3, "text", 1)]})


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "a tower is shown a block too early": (
        config,
        "_stops",
        "config.shown(key)",
        "max(config.shown(key) - 1, 0)",
    ),
    "a tower is fused a block too early": (
        config,
        "_stops",
        "config.fused(key)",
        "max(config.fused(key) - 1, 0)",
    ),
    "a tower is shown where it is fused": (
        config,
        "_stops",
        "config.shown(key)",
        "config.junctions[key.junction].get(tower, config.shown(key))",
    ),
    "a circle is let through": (config, "_halts", "shown.issuperset(stop.reads)", "True"),
    "a tower that waits is not shown": (config, "_halts", "elif stop.shows:", "elif False:"),
    "a tower that waited is shown twice": (
        config,
        "_halts",
        "(stop._replace(shows=()), *waiting",
        "(stop, *waiting",
    ),
    "a tower that waits forgets to read": (
        config,
        "_halts",
        "waiting[name] = (stop._replace(shows=()), *waiting[name][1:])",
        "waiting[name] = waiting[name][1:]",
    ),
    "a link reads its source as it is now": (
        lockstep,
        "_exchange",
        "unread = state.unread.pop(key, ())",
        "unread = (new[key.source],) if key.source in strands else state.unread.pop(key, ())",
    ),
    "of two links at one depth the last one wins": (
        lockstep,
        "_exchange",
        "new[key.target] + link(",
        "hidden[key.target] + link(",
    ),
    "a silent tower stops where it is first shown": (
        config.Route,
        "last_shown",
        "max(layers",
        "min(layers",
    ),
    "a silent tower stops before it is shown": (
        Fused,
        "_halts",
        "stop.layer <= end",
        "stop.layer < end",
    ),
    "all links read what was shown first": (reader, "_between", "(number, key)", "(0, key)"),
}


def test_all_laws_hold_without_a_mutant() -> None:
    all_laws()


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_law_breaks_for_the_mutant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ZIPS:
        directed(options)  # born before anything is mutated
    owner, name, _, _ = MUTANTS[fault]
    monkeypatch.setattr(owner, name, mutated(*MUTANTS[fault]))
    with pytest.raises(Exception) as broken:
        all_laws()
    assert not isinstance(broken.value, NameError), "the fault is no code"


def test_as_many_are_shown_as_are_fused() -> None:
    whole = zipped(TWO).config
    with pytest.raises(ZipperError, match="There are 3 junctions, but 2 are shown"):
        dataclasses.replace(whole, shows=whole.junctions[:2])
