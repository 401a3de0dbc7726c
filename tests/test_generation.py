"""Generation against its definition: the tokens that one whole forward, without cache and padding,
finds the likeliest."""

import dataclasses
import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from laws import (
    LLAMAS,
    SMALL,
    by_token,
    draw,
    is_the_greedy_answer,
    lay,
    number,
    steps_are_the_whole,
    zipped,
)

from zipper.config import default_limit
from zipper.errors import ZipperError
from zipper.generation import generate
from zipper.model import Zipper
from zipper.sampling import Sampling
from zipper.strand import Segment
from zipper.testing import tiny_tower

THREE = {"text": "llama", "speech": "gpt2", "image": "gemma3"}
GREEDY = Sampling()
PLANS: list[tuple[list[str], list[str]]] = [
    (["speech"], ["text"]),
    (["text"], ["speech"]),
    (["speech"], ["text", "speech"]),
    (["text", "speech"], ["text", "speech", "text"]),
    ([], ["text", "speech", "text"]),
    (["text", "text"], ["text"]),
    (["text", "image", "speech"], ["speech", "image", "image", "text"]),
]
every_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: f"{','.join(plan[0])}-{','.join(plan[1])}"
)
every_kernel = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def prompts(given: Sequence[str], rows: int, seed: int = 0) -> list[list[Segment]]:
    dice = random.Random(seed)
    return [[Segment(t, [i for _, i in draw(dice, [t], 1, 6)]) for t in given] for _ in range(rows)]


def assert_same(found: Sequence[Segment], wanted: Sequence[Segment]) -> None:
    """The same tokens and ends, and scores to 1e-4."""
    assert [dataclasses.replace(s, score=0.0) for s in found] == [
        dataclasses.replace(s, score=0.0) for s in wanted
    ]
    assert [s.score for s in found] == pytest.approx([s.score for s in wanted], abs=1e-4)


# The cache.


@every_kernel
@pytest.mark.parametrize("size", [1, 7, 100])
def test_reading_in_steps_is_reading_the_whole(size: int, attention: str) -> None:
    for families in (LLAMAS, THREE):
        model = zipped(families, {"text": 2}, attention=attention)
        for seed in range(2):
            dice = random.Random(seed)
            rows = [draw(dice, list(families), dice.randint(2, 6)) for _ in range(4)]
            steps_are_the_whole(model, rows, size, left=bool(seed))


@every_kernel
def test_rows_can_be_chosen_again_and_reordered_between_steps(attention: str) -> None:
    model = zipped(THREE, attention=attention)
    for seed in range(3):
        rows = [draw(random.Random(f"{seed} {row}"), list(THREE), 6) for row in range(3)]
        steps_are_the_whole(model, rows, 3, left=bool(seed % 2), shuffle=seed + 1)


@pytest.mark.slow
def test_reading_in_steps_is_reading_the_whole_in_200_interleavings() -> None:
    model = zipped(THREE)
    for seed in range(200):
        dice = random.Random(seed)
        rows = [draw(dice, list(THREE), dice.randint(2, 8)) for _ in range(dice.randint(1, 4))]
        steps_are_the_whole(
            model,
            rows,
            dice.choice([1, 2, 7, 100]),
            left=dice.random() < 0.5,
            shuffle=dice.randint(1, 9),
        )


@torch.no_grad()
def test_a_source_token_becomes_keys_and_values_once() -> None:
    model, read = zipped(LLAMAS), []
    for name, link in model.links.items():
        link.key.register_forward_hook(
            lambda module, given, out, name=name: read.append((name, out.shape[1]))
        )
    row = number(
        [
            ("speech", 2),
            ("speech", 3),
            ("speech", 4),
            ("text", 5),
            ("text", 6),
            ("speech", 7),
            ("text", 8),
        ]
    )
    state = model.start(["speech", "text"], ["text"])
    for token in row:
        _, state = model.step(lay([[token]]), state)
    last = len(model.config.junctions) - 1
    for n in range(last + 1):
        assert [tokens for name, tokens in read if name == f"{n}:speech>text"] == [3, 1]
        # Speech is silent: what it would read behind where it is last shown is of use to nobody.
        wanted = [] if n == last else [2]
        assert [tokens for name, tokens in read if name == f"{n}:text>speech"] == wanted


# Whole segments.


@every_plan
@every_kernel
def test_a_ragged_batch_gives_every_row_its_own_greedy_answer(
    plan: tuple[list[str], list[str]], attention: str
) -> None:
    given, outputs = plan
    model = zipped(THREE, {"text": 2}, attention=attention)
    limits = {"text": 5, "speech": 4, "image": 6}
    batch = prompts(given, 4)
    found = generate(model, batch, outputs, GREEDY, limits)
    for row, prompt in enumerate(batch):
        is_the_greedy_answer(model, prompt, outputs, limits, found[row])


def test_prompts_of_several_orders_share_steps_and_get_their_own_answers() -> None:
    """Rows that read other towers than their neighbours, or nothing, go on side by side."""
    model, limits = zipped(THREE, {"text": 2}), {"text": 5, "speech": 4, "image": 6}
    orders: list[list[str]] = [["speech"], [], ["text"], ["image", "speech"], ["speech", "text"]]
    batch = [prompts(given, 1, seed)[0] for seed, given in enumerate(orders * 2)]
    for outputs in (["text"], ["speech", "text", "speech"]):
        found = generate(model, batch, outputs, GREEDY, limits)
        for row, prompt in enumerate(batch):
            is_the_greedy_answer(model, prompt, outputs, limits, found[row])


def test_these_cases_hold_segments_that_ended_and_segments_that_did_not() -> None:
    """Greedy decoding of random towers may loop for ever: the tests above must see both ends of a
    segment."""
    model, ends = zipped(THREE, {"text": 2}), []
    for given, outputs in PLANS:
        for segments in generate(
            model, prompts(given, 8), outputs, GREEDY, {"text": 5, "speech": 4, "image": 6}
        ):
            ends += [segment.ended for segment in segments]
    assert 5 < sum(ends) < len(ends) - 5


def test_a_row_draws_the_same_in_a_batch_as_alone() -> None:
    model, limits = zipped(THREE, {"text": 2}), {"text": 8, "speech": 8, "image": 8}
    lengths = []
    for given, outputs in PLANS[2:4]:
        batch = prompts(given, 4)
        found = generate(
            model, batch, outputs, Sampling(temperature=8.0, top_k=30, top_p=0.999, seed=40), limits
        )
        for row, prompt in enumerate(batch):
            alone = generate(
                model,
                [prompt],
                outputs,
                Sampling(temperature=8.0, top_k=30, top_p=0.999, seed=40 + row),
                limits,
            )
            assert_same(found[row], alone[0])
        lengths.append(len({len(segments[0].content) for segments in found}))
    assert max(lengths) > 1, "in both batches all rows are as long: nothing is ragged here"


def test_a_seed_gives_the_same_segments_and_another_seed_others() -> None:
    model = zipped(LLAMAS)

    def drawn(seed: int) -> list[Segment]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return model.generate(
            prompts(["text"], 1)[0], ["speech", "text"], sampling, {"speech": 6, "text": 6}
        )

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_a_forced_beginning_is_read_and_returned() -> None:
    model = zipped(THREE)
    for forced in ([], [3], [3, 4, 5]):
        outputs: list[str | Segment] = [Segment("speech", forced), "text"]
        batch = prompts(["text"], 3)
        found = generate(model, batch, outputs, GREEDY, {"speech": 6, "text": 3})
        for row, prompt in enumerate(batch):
            assert found[row][0].content[: len(forced)] == forced
            is_the_greedy_answer(model, prompt, outputs, {"speech": 6, "text": 3}, found[row])


def test_a_segment_that_hits_its_limit_is_closed_and_says_so() -> None:
    model = zipped(LLAMAS)
    text = model.tower("text")
    with torch.no_grad():  # says the token 3 and nothing else, for ever
        text.lm_head.weight.zero_()
        text.lm_head.weight[3] = 1e3 * text.model.norm.weight
    prompt, limits = [Segment("speech", [3])], {"text": 4, "speech": 2}
    first, second = model.generate(prompt, ["text", "speech"], limits=limits)
    assert not first.ended and first.content == [3] * 4
    is_the_greedy_answer(model, prompt, ["text", "speech"], limits, [first, second])


def test_the_default_limit_follows_the_input() -> None:
    # Three times as many tokens as the usual rate makes of the input, and 16.
    assert default_limit(own=4.0, given={"speech": (30, 10.0)}, room=1000) == 3 * 12 + 16
    assert (
        default_limit(own=10.0, given={"text": (6, 4.0), "image": (1, 3.0)}, room=1000)
        == 3 * 15 + 16
    )
    # Rate unknown: as many.
    assert default_limit(own=0.0, given={"text": (6, 4.0)}, room=1000) == 3 * 6 + 16
    assert default_limit(own=0.0, given={}, room=1000) == 3 * 64 + 16
    assert default_limit(own=10.0, given={"text": (600, 4.0)}, room=100) == 100
    model = zipped(LLAMAS)  # text 4 tokens, speech 10; 256 positions
    assert model.limit("text", {"speech": 20, "text": 5}) == 3 * 8 + 16
    assert model.limit("speech", {"text": 200}) == 256 - 2


def test_what_takes_no_part_is_not_run() -> None:
    model = zipped(THREE)

    def fail(*given: object) -> None:
        raise AssertionError("this tower takes no part")

    for module in model.towers["image"].modules():
        module.register_forward_pre_hook(fail)
    for name, link in model.links.items():
        if "image" in name:
            link.key.register_forward_pre_hook(fail)
    model.inputs["image"].register_forward_pre_hook(fail)
    model.generate([Segment("speech", [3])], ["text", "speech"], limits={"text": 3, "speech": 3})
    with pytest.raises(AssertionError, match="takes no part"):
        model.generate([Segment("speech", [3])], ["image"], limits={"image": 3})


def test_what_is_only_given_runs_no_further_than_its_last_junction() -> None:
    # Speech has junctions after its blocks 1 and 2.
    model = zipped({"text": "llama", "speech": "llama"}, {"text": 2})
    ran = []
    for index, block in enumerate(model.towers["speech"].blocks):
        block.register_forward_pre_hook(lambda module, given, index=index: ran.append(index))
    model.generate([Segment("speech", [3, 4])], ["text"], limits={"text": 3})
    assert ran == [0, 1]


def test_a_tower_alone_generates_what_it_generates_outside_the_zip() -> None:
    model = zipped({"text": "gpt2", "speech": "llama"})
    begin, end = model.ends()["text"]
    ids, outside = torch.tensor([[begin, 5, 6, end, begin]]), []
    for _ in range(6):
        logits = model.tower("text")(ids).logits[0, -1]
        logits[begin] = -torch.inf  # a segment begins once
        outside.append(int(logits.argmax()))
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    wanted = outside[: outside.index(end)] if end in outside else outside
    assert (
        model.generate([Segment("text", [5, 6])], ["text"], limits={"text": 6})[0].content == wanted
    )


def test_begin_and_end_may_be_one_token_and_begin_never_comes_twice() -> None:
    model = Zipper.from_towers(
        {name: tiny_tower("llama") for name in LLAMAS}, ends={"text": (1, 1)}
    )
    with torch.no_grad():
        model.tower("speech").lm_head.weight[1:] = 0.0  # would say begin, 0, for ever
    for segment in model.generate(
        [Segment("text", [5])], ["speech", "text"], limits={"speech": 4, "text": 4}
    ):
        begin, end = model.ends()[segment.tower]
        assert begin not in segment.content and end not in segment.content


def test_logits_of_unequal_rows_are_those_of_one_forward() -> None:
    """The first step of generation over left-padded prompts, against each prompt alone."""
    model = zipped(THREE)
    rows = [draw(random.Random(seed), list(THREE), 4) for seed in range(4)]
    strands = lay([number(row) for row in rows], left=True)
    hidden, _ = model.step(strands, model.start(list(strands), list(strands)))
    found = by_token(strands, {name: model.unembed(name, h) for name, h in hidden.items()})
    for index, row in enumerate(rows):
        alone = lay([number(row)])
        for (_, document, time), value in by_token(alone, model(alone)).items():
            torch.testing.assert_close(found[index, document, time], value, atol=1e-5, rtol=0)


# What cannot be generated.

TALK = [Segment("speech", [3, 4])]


@pytest.mark.parametrize(
    ("batch", "outputs", "limits", "message"),
    [
        ([TALK], ["txt"], {}, "no tower 'txt'"),
        ([[Segment("sound", [3])]], ["text"], {}, "no tower 'sound'"),
        (
            [[Segment("speech", [3, 23])]],
            ["text"],
            {},
            "'speech' holds the id 23; its ids go from 0 to 22",
        ),
        (
            [[Segment("speech", [-1])]],
            ["text"],
            {},
            "'speech' holds the id -1; its ids go from 0 to 22",
        ),
        ([TALK], [Segment("text", [31])], {}, "'text' holds the id 31; its ids go from 0 to 30"),
        (
            [[Segment("speech", [3] * 255)]],
            ["text"],
            {},
            "'speech' would read 257 tokens, .* at most 256",
        ),
        (
            [[Segment("speech", [3] * 150)] * 2],
            ["text"],
            {},
            "'speech' would read 304 tokens, .* at most 256",
        ),
        (
            [[Segment("text", [3] * 250)]],
            [Segment("text", [3] * 9)],
            {},
            "'text' would read 263 tokens, .* at most 256",
        ),
        ([TALK], [], {}, "needs at least one of each"),
        ([], ["text"], {}, "needs at least one of each"),
        ([TALK], ["text"], {"txt": 3}, "no tower 'txt'"),
        ([TALK], ["text"], {"text": 0}, "a limit is a number of tokens, at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_sentence(
    batch: list[list[Segment]],
    outputs: list[str | Segment],
    limits: Mapping[str, int],
    message: str,
) -> None:
    for families in (
        LLAMAS,
        {"text": "gpt2", "speech": "gpt2"},
    ):  # a table of positions fails by itself, rotary ones do not
        with pytest.raises(ZipperError, match=message):
            generate(zipped(families), batch, outputs, GREEDY, limits)


def test_a_tower_never_reads_beyond_its_positions() -> None:
    towers = {
        name: tiny_tower("gpt2", width=16, layers=2, positions=16) for name in LLAMAS
    }  # a table of 16 positions
    model = Zipper.from_towers(towers, link=SMALL)
    for limits in ({"text": 1000}, None):
        (segment,) = model.generate([Segment("text", [3] * 10)], ["text"], limits=limits)
        assert len(segment.content) <= 2
        with pytest.raises(
            ZipperError, match=r"'text' has read 1. of its 16 tokens: no room for another segment"
        ):
            model.generate([Segment("text", [3] * 10)], ["text", "speech", "text"], limits=limits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_generates_what_it_generates_on_a_cpu() -> None:
    model, batch, limits = zipped(THREE), prompts(["speech"], 3), {"text": 5, "speech": 5}
    wanted = generate(model, batch, ["text", "speech"], GREEDY, limits)
    for row, segments in enumerate(
        generate(model.to("cuda"), batch, ["text", "speech"], GREEDY, limits)
    ):
        assert_same(segments, wanted[row])


def test_a_step_of_a_tower_outside_the_plan_is_refused() -> None:
    model = zipped(THREE)
    with pytest.raises(ZipperError, match=r"\['image'\] are not in this plan"):
        model.step(lay([number([("image", 3)])]), model.start(["text"], ["text"]))


@torch.no_grad()
def test_a_step_keeps_what_links_of_the_plan_will_read_and_leaves_the_state_before_its_own() -> (
    None
):
    model = zipped(THREE)
    _, before = model.step(
        lay([number([("speech", 2), ("speech", 3)])]), model.start(["speech", "text"], ["text"])
    )
    waits = {*before.unread}
    assert waits and {key.target for key in waits} == {"text"}  # no link into 'image'
    _, after = model.step(lay([number([("speech", 2), ("speech", 3), ("text", 5)])[2:]]), before)
    assert after.memory and not before.memory
    assert {*before.unread} == waits and not waits & after.unread.keys()
