"""Are the laws sharp? Each mutant is a plausible fault, written into the source for a moment; some
law must break.

A mutant is a piece of source text and what stands there instead. If it is not found, the code was
rewritten: write it anew.
"""

import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from laws import (
    LLAMAS,
    SMALL,
    draw,
    first_segment_is_bare,
    is_the_greedy_answer,
    is_the_reference,
    lay,
    nothing_leaks,
    number,
    packed_is_separate,
    steps_are_the_whole,
    unimodal_is_bare,
    wake,
    zipped,
)

from zipper import link, lockstep, model, reading, writing
from zipper.generation import generate
from zipper.model import Zipper
from zipper.sampling import Sampling
from zipper.strand import Segment, Strand
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.towers import families

TALK: list[tuple[str, int]] = [
    ("text", 3),
    ("speech", 4),
    ("speech", 5),
    ("text", 6),
    ("text", 7),
    ("speech", 8),
]
LLAMAS_3 = dict.fromkeys(("text", "speech", "image"), "llama")


@cache
def zips() -> dict[str, Zipper]:
    """Built before anything is mutated: what is mutated is how they run."""
    return {
        "two": zipped(LLAMAS, {"text": 2}),
        "three": zipped(LLAMAS_3),
        "plain": zipped(LLAMAS, input_projection="none"),
        "paper": zipped(LLAMAS, preset="paper", link=replace(link.PAPER_LINK, head_width=8)),
        "padded": padded(),
    }


def padded() -> Zipper:
    """Its text tower reads padding on the left of a row, but none inside."""
    towers = {"text": Tower(families.tiny("mpt")), "speech": tiny_tower("llama")}
    assert towers["text"].rows == "padded"
    model = Zipper.from_towers(towers, link=SMALL, ends={name: (1, 2) for name in towers})
    wake(model)
    return model


def it_is_the_picture() -> None:
    def strand(time: list[int], document: list[int]) -> Strand:
        return Strand(
            *(torch.tensor([x]) for x in ([0] * len(time), list(range(len(time))), time, document))
        )

    seen = lockstep.visible(
        strand([0, 2, 4, 1, 9], [0, 0, 0, 1, -1]),
        strand([0, 0, 1, 2, 3, 0, 5], [-1, 0, 0, 0, 0, 1, 1]),
    )
    assert seen[0].int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def it_is_the_reference() -> None:
    is_the_reference(zips()["two"], TALK, gradients=False)
    is_the_reference(zips()["paper"], TALK, gradients=False)
    is_the_reference(zips()["three"], [("image", 3), *TALK, ("image", 4)], gradients=False)


def it_does_not_leak() -> None:
    rows = [number(TALK) + number(TALK[1:], document=1), number(TALK[2:])]
    for time in (2, 4):
        control = nothing_leaks(zips()["two"], lay(rows), 0, 0, time)
        assert control is not None and control > 1e-4


def nothing_changes_where_nothing_is_seen() -> None:
    first_segment_is_bare(zips()["plain"])
    unimodal_is_bare(zips()["two"])


def packed_ragged_and_alone_are_the_same() -> None:
    packed_is_separate(zips()["three"], [TALK, [("image", 4), *TALK[3:]], TALK[2:4]])


def steps_equal_the_whole() -> None:
    for size in (1, 3):
        steps_are_the_whole(
            zips()["three"], [TALK, [("image", 4), *TALK[1:]], TALK[2:]], size, shuffle=2
        )


def greedy_is_greedy_in_every_row() -> None:
    dice = random.Random(0)
    batch = [[Segment("speech", [i for _, i in draw(dice, ["speech"], 1, 6)])] for _ in range(4)]
    limits = {"text": 4, "speech": 3}
    for row, found in enumerate(
        generate(zips()["two"], batch, ["text", "speech"], Sampling(), limits)
    ):
        is_the_greedy_answer(zips()["two"], batch[row], ["text", "speech"], limits, found)


def a_row_draws_the_same_alone() -> None:
    """Almost evenly, so that rows are of unequal length; what the model thinks of the tokens shows
    in the scores."""
    batch = [[Segment("text", [i])] for i in range(1, 6)]
    limits, outputs = {"text": 6, "speech": 8}, ["speech", "text", "speech"]
    found = generate(zips()["two"], batch, outputs, Sampling(temperature=9.0), limits)
    assert len({len(segments[0].content) for segments in found}) > 1
    for row, prompt in enumerate(batch):
        (alone,) = generate(
            zips()["two"], [prompt], outputs, Sampling(temperature=9.0, seed=row), limits
        )
        for one, other in zip(alone, found[row], strict=True):
            assert one.content == other.content and abs(one.score - other.score) < 1e-4


def rows_wait_and_go_on() -> None:
    """Many rows that end in turn, in a plan that comes back to a tower; one tower reads no gaps."""
    batch = [[Segment("text", [5 + n] * (1 + n % 3))] for n in range(6)]
    limits, outputs = {"text": 6, "speech": 7}, ["speech", "text", "speech", "text"]
    model, sampling = zips()["padded"], Sampling(temperature=9.0)
    found = generate(model, batch, outputs, sampling, limits)
    for row, prompt in enumerate(batch):
        (alone,) = generate(model, [prompt], outputs, replace(sampling, seed=row), limits)
        for one, other in zip(alone, found[row], strict=True):
            assert one.content == other.content and abs(one.score - other.score) < 1e-4


LAWS: tuple[Callable[[], None], ...] = (
    it_is_the_picture,
    nothing_changes_where_nothing_is_seen,
    it_does_not_leak,
    it_is_the_reference,
    packed_ragged_and_alone_are_the_same,
    steps_equal_the_whole,
    greedy_is_greedy_in_every_row,
    a_row_draws_the_same_alone,
    rows_wait_and_go_on,
)

MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    # The mask rule.
    "a token sees its own time": (lockstep, "visible", ":] < target.time", ":] <= target.time"),
    "a token sees what comes after it": (
        lockstep,
        "visible",
        ":] < target.time",
        ":] > target.time",
    ),
    "a token sees all times": (
        lockstep,
        "visible",
        "same & (source.time[:, None, :] < target.time[:, :, None])",
        "same",
    ),
    "ranks are compared, not times": (lockstep, "visible", ".time[", ".position["),
    "documents are ignored": (lockstep, "visible", "== source.document[:, None, :]", ">= 0"),
    "padding is seen": (lockstep, "visible", "& (source.document >= 0)", "| (source.document < 0)"),
    # The exchange.
    "the second direction reads what the first has written": (
        lockstep,
        "_exchange",
        "unread = state.unread.pop(key, ())",
        "unread = (new[key.source],) if key.source in strands else state.unread.pop(key, ())",
    ),
    "one direction is missing": (
        lockstep,
        "_exchange",
        "if pair in sight.masks",
        "if pair in sight.masks and key.source < key.target",
    ),
    "of several sources the last one wins": (
        lockstep,
        "_exchange",
        "new[key.target] + link",
        "hidden[key.target] + link",
    ),
    "a link replaces the state": (lockstep, "_exchange", "new[key.target] + link", "link"),
    "rotary positions are times": (lockstep, "_exchange", "strand.position", "strand.time"),
    "the exchange comes before the block": (
        model,
        "advance",
        "layer), passes[name])\n            done[name] = layer",
        "layer - 1), passes[name])\n            done[name] = layer - 1",
    ),
    "the mask is inverted": (
        lockstep,
        "_exchange",
        "sight.masks[pair]",
        "~sight.masks[pair]",
    ),
    # Input projections.
    "an input projection is left out": (
        lockstep,
        "_projected",
        "project(h, used)",
        "h",
    ),
    "a unimodal row is projected": (lockstep, "_shared", "torch.zeros_like", "torch.ones_like"),
    "a unimodal plan is projected": (
        lockstep,
        "_projected",
        "if there",
        "if partners",
    ),
    # The link.
    "an empty row attends uniformly": (
        link.Link,
        "forward",
        "torch.where(visible, added, torch.zeros_like(added))",
        "added",
    ),
    "an empty row passes the feed-forward": (
        link.Link,
        "forward",
        "self._drop(self.out(attended.transpose(1, 2).flatten(2)))",
        "self.out(attended.transpose(1, 2).flatten(2)) * visible; visible = "
        "torch.ones_like(visible)",
    ),
    "the mask is not passed on": (link.Link, "forward", "(mask | ~visible)[:, None]", "None"),
    "the gate is applied twice": (
        link.Link,
        "forward",
        "torch.tanh(self.gate)",
        "torch.tanh(self.gate) ** 2",
    ),
    "the gate has no tanh": (link.Link, "forward", "torch.tanh(self.gate)", "self.gate"),
    "the feed-forward has no gate": (
        link.Link,
        "forward",
        "torch.tanh(self.feedforward_gate) * ",
        "",
    ),
    "the feed-forward does not see what was read": (link.Link, "forward", "x_in + added", "x_in"),
    "queries are not normalised": (link.Link, "_query", "self.norm(x)", "x"),
    "positions are not scaled to the rate of the source": (
        link.Link,
        "_query",
        " * self.position_scale",
        "",
    ),
    "the paper's ReLU is missing": (link.Link, "read", "F.relu(h)", "h"),
    # The state.
    "a link's memory is not extended": (
        lockstep,
        "_memory",
        "memory.keys, fresh.keys",
        "memory.keys, memory.keys",
    ),
    "a link's memory starts anew": (
        lockstep,
        "_memory",
        "if memory is None",
        "if True",
    ),
    "later source tokens are placed at the beginning": (
        lockstep,
        "_memory",
        "read.position.shape[1] - states.shape[1] :",
        ": states.shape[1]",
    ),
    "what was read is read again": (
        lockstep,
        "_exchange",
        "state.unread.pop(",
        "state.unread.get(",
    ),
    "a link's memory is not reordered": (
        lockstep.State,
        "select",
        "m.keys[rows], m.values[rows]",
        "m.keys, m.values",
    ),
    "what waits to be read is not reordered": (
        lockstep.State,
        "select",
        "h[rows] for h in parts",
        "h for h in parts",
    ),
    # Reading.
    "positions go on for rows that were silent": (
        reading.Stepwise,
        "_step",
        "for walk, pieces in wanted.items():\n        walk.time",
        "for walk in filter(None, (found() for found in group.walks)):\n        pieces = "
        "next(iter(wanted.values()))\n        walk.time",
    ),
    "time stands still": (reading.Stepwise, "_step", "walk.time += max", "walk.time += 0 * max"),
    "a row is given the logits of its neighbour": (
        reading.Stepwise,
        "_step",
        "[walk.row for walk in speaking]",
        "[walk.row for walk in reversed(speaking)]",
    ),
    "padding stands inside a row": (
        reading.Stepwise,
        "_strand",
        "slots, n = slice(shape[1] - len(given), None), len(given)",
        "slots, n = slice(0, len(given)), len(given)",
    ),
    "gaps are not closed": (
        reading.Stepwise,
        "_strand",
        "if behind & {walk.row for walk in reading}",
        "if False",
    ),
    "rows that are gone take their neighbours along": (
        reading._Group,
        "thin",
        "self.select([row for row, _ in alive])",
        "self.select(list(range(len(alive))))",
    ),
    # Generation.
    "an end token is not read": (
        writing.Lane,
        "go_on",
        "else [token]",
        "else [self.writing.written.ids[-1] if self.writing.written.stop else token]",
    ),
    "a segment goes on beyond its cap": (
        writing,
        "_drawn",
        "len(written.ids) >= cap",
        "len(written.ids) > cap",
    ),
}


def mutated(owner: Any, name: str, old: str, new: str) -> Callable[..., Any]:
    """The function of this name with another source."""
    function = inspect.unwrap(inspect.getattr_static(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, f"{old!r} does not stand in {name} (any more)"
    namespace = dict(function.__globals__)
    exec(compile(source.replace(old, new), f"<mutant of {name}>", "exec"), namespace)
    return namespace[name]


def broken(owner: Any) -> str | None:
    """The first law that does not hold; those of generation first where that is what changed."""
    reads = owner in (reading._Group, reading.Stepwise)
    for law in reversed(LAWS) if reads else LAWS:
        try:
            law()
        except Exception:
            return law.__name__
    return None


def test_all_laws_hold_without_a_mutant() -> None:
    for law in LAWS:
        law()


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_law_breaks_for_the_mutant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zips()
    owner, name, _, _ = MUTANTS[fault]
    monkeypatch.setattr(owner, name, mutated(*MUTANTS[fault]))
    assert broken(owner), "nobody noticed"
