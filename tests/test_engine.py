"""The engine against `generate`: what a request gets among others, whenever they come and go, is
what it gets alone."""

import itertools
import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws import LLAMAS, SMALL, draw, is_the_greedy_answer, read_one, unchecked, zipped
from test_fused import truth
from test_generation import assert_same
from torch._subclasses import FakeTensorMode

from zipper import generation as engines
from zipper.errors import ZipperError
from zipper.fast import engine as Engine
from zipper.fast import fastest, session
from zipper.fast.reader import Fused
from zipper.generation import Request, generate
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.reading import Reader, Stepwise
from zipper.sampling import Rules, Sampling, Search, one_of
from zipper.strand import Segment, collate
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.towers import families

THREE = {"text": "llama", "speech": "qwen3", "image": "llama"}
ALL = {"text": 5, "speech": 4, "image": 6}
LIMITS = {"text": 5, "speech": 4}
PLANS: list[tuple[list[str], list[str | Segment]]] = [
    (["speech"], ["text"]),
    (["text"], ["speech"]),
    (["speech"], ["text", "speech"]),
    (["text", "speech"], ["text", "speech", "text"]),
    ([], ["text", Segment("speech", [3, 4])]),
    (["text"], ["text"]),
    (["text", "image", "speech"], ["speech", "image", "image", "text"]),
]


@pytest.fixture(autouse=True)
def memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written is NaN, so that reading it shows."""
    monkeypatch.setattr(session, "empty", lambda shape, like: like.new_full(shape, torch.nan))


@pytest.fixture(
    params=["fused", "static", "stepwise", *(["cuda"] if torch.cuda.is_available() else [])]
)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reader(model: Zipper, way: str) -> Reader:
    if way == "cuda":
        return Fused(model.to("cuda"))
    return Stepwise(model) if way == "stepwise" else Fused(model, static=way == "static")


def prompt(towers: Sequence[str], seed: int) -> list[Segment]:
    dice = random.Random(seed)
    return [Segment(t, [i for _, i in draw(dice, [t], 1, 6)]) for t in towers]


def requests(n: int, temperature: float = 0.0) -> list[Request]:
    """All plans in turn, each request with a seed of its own."""
    found = []
    for seed, (given, outputs) in zip(range(n), itertools.cycle(PLANS)):
        limits = ALL if "image" in given else LIMITS
        found.append(
            Request(prompt(given, seed), outputs, Sampling(temperature, seed=seed), limits)
        )
    return found


def alone(model: Zipper, request: Request) -> list[Segment]:
    (segments,) = generate(
        model, [request.segments], request.outputs, request.sampling, request.limits
    )
    return segments


# Batches.


def test_requests_of_all_plans_side_by_side_get_their_own_greedy_answers(way: str) -> None:
    model = zipped(THREE, {"text": 2})
    wanted = requests(7)
    for request, answer in zip(
        wanted, Engine(model, 4, reader(model, way)).run(wanted), strict=True
    ):
        is_the_greedy_answer(model, request.segments, request.outputs, ALL, answer.segments())


@pytest.mark.slow  # `make gpu` runs it, on a real one
def test_requests_on_a_gpu_get_their_own_greedy_answers(cuda: torch.device) -> None:
    model, there = (zipped(LLAMAS, {"text": 2}) for _ in range(2))
    there.to(cuda)
    wanted = [replace(request, limits={"text": 3, "speech": 3}) for request in requests(4)[2:]]
    for request, answer in zip(wanted, Engine(there, 2, Fused(there)).run(wanted), strict=True):
        is_the_greedy_answer(
            model, request.segments, request.outputs, request.limits or {}, answer.segments()
        )
    chosen, limits = Sampling(4.0, top_k=3, top_p=0.9, guidance=2.0), {"text": 2, "speech": 2}
    prompts = [prompt(["speech"], seed) for seed in range(2)]
    found, here = (
        generate(some, prompts, ["text", "speech"], chosen, limits) for some in (there, model)
    )
    for mine, theirs in zip(found, here, strict=True):
        assert_same(mine, theirs)


def test_requests_that_draw_get_what_they_draw_alone(way: str) -> None:
    model = zipped(THREE, {"text": 2})
    wanted = requests(7, temperature=8.0)
    answers = Engine(model, 4, reader(model, way)).run(wanted)
    for request, answer in zip(wanted, answers, strict=True):
        assert_same(answer.segments(), alone(model, request))
    assert len({len(written.ids) for answer in answers for written in answer.written}) > 3


@torch.no_grad()
def test_guidance_leads_away_from_what_the_tower_says_alone(way: str) -> None:
    """By its definition, token by token, from the logits of the whole and of the tower without the
    others."""
    model, scale = zipped(LLAMAS, {"text": 2}), 3.0
    given, plan = (
        [Segment("speech", [5, 6]), Segment("text", [3, 9, 4]), Segment("speech", [2])],
        ["text", "speech", "text"],
    )
    request = Request(given, plan, Sampling(guidance=scale), LIMITS)
    (answer,) = Engine(model, 1, reader(model, way)).run([request])
    said: list[tuple[str, int]] = []
    for segment in given:
        begin, end = model.ends()[segment.tower]
        said += [(segment.tower, i) for i in (begin, *segment.content, end)]
    changed = 0
    for tower, segment in zip(plan, answer.segments(), strict=True):
        begin, end = model.ends()[tower]
        said.append((tower, begin))
        for wanted in [*segment.content, *([end] if segment.ended else [])]:
            own = [word for word in said if word[0] == tower]
            seeing, blind = (
                truth(model, said, list(LLAMAS))[len(said) - 1],
                truth(model, own, [tower])[len(own) - 1],
            )
            seeing[begin] = -torch.inf
            guided = blind.log_softmax(-1) * (1 - scale) + seeing.log_softmax(-1) * scale
            guided[begin] = -torch.inf
            assert int(guided.argmax()) == wanted
            changed += int(seeing.argmax()) != wanted
            said.append((tower, wanted))
        if not segment.ended:
            said.append((tower, end))
    assert changed, "without guidance other tokens are chosen"


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(6.0, seed=3),
    "guided": Sampling(4.0, guidance=2.0),
}


@pytest.mark.parametrize(
    ("plan", "sampling"),
    [  # every plan once, each sampling twice at least; the rest is slow
        pytest.param(
            plan,
            sampling,
            id=f"{name}-plan{n}",
            marks=() if n % len(SAMPLINGS) == k else pytest.mark.slow,
        )
        for (n, plan), (k, (name, sampling)) in itertools.product(
            enumerate(PLANS), enumerate(SAMPLINGS.items())
        )
    ],
)
def test_a_batch_of_one_plan_is_what_generate_makes_of_it(
    plan: tuple[list[str], list[str | Segment]], sampling: Sampling, way: str
) -> None:
    model, (given, outputs) = zipped(THREE, {"text": 2}), plan
    prompts = [prompt(given, seed) for seed in range(5)]
    wanted = generate(model, prompts, outputs, sampling, ALL)
    for row, segments in enumerate(
        Engine(model, 2, reader(model, way)).generate(prompts, outputs, sampling, ALL)
    ):
        assert_same(segments, wanted[row])


def test_rows_without_room_end_early_as_in_generate_and_other_errors_are_raised(way: str) -> None:
    model = Zipper.from_towers(
        {name: tiny_tower("llama", width=16, layers=2, positions=16) for name in LLAMAS}, link=SMALL
    )
    running, outputs = Engine(model, 3, reader(model, way)), ["text", "speech", "text"]
    prompts = [[Segment("text", [3] * n)] for n in (2, 10, 2)]
    limits = {"text": 3, "speech": 2}
    found, wanted = (
        running.generate(prompts, outputs, Sampling(), limits),
        generate(model, prompts, outputs, Sampling(), limits),
    )
    assert (
        [len(segments) for segments in found] == [3, 3, 3]
        and not found[1][2].ended
        and not found[1][2].content
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same(mine, theirs)
    for batch, wrong, given in [
        (prompts[1:2], "no room for another segment", limits),
        ([], "needs at least one of each", limits),
        (prompts, "no tower 'txt'", {"txt": 3}),
    ]:
        with pytest.raises(ZipperError, match=wrong):
            running.generate(batch, outputs, Sampling(), given)


def test_guided_requests_side_by_side_get_what_generate_gives_them(way: str) -> None:
    model = zipped(THREE, {"text": 2})
    for temperature in (0.0, 4.0):
        wanted = [
            replace(r, sampling=replace(r.sampling, guidance=2.0)) for r in requests(7, temperature)
        ]
        answers = Engine(model, 4, reader(model, way)).run(wanted)
        for request, answer in zip(wanted, answers, strict=True):
            assert_same(answer.segments(), alone(model, request))
    unguided = [replace(r, sampling=replace(r.sampling, guidance=1.0)) for r in wanted]
    assert [alone(model, r) for r in wanted] != [alone(model, r) for r in unguided]


def test_a_guided_batch_is_its_rows() -> None:
    model, plan, sampling = (
        zipped(LLAMAS, {"text": 2}),
        ["text", "speech", "text"],
        Sampling(guidance=2.5),
    )
    prompts = [prompt(["speech", "text"], seed) for seed in range(5)]
    together = generate(model, prompts, plan, sampling, LIMITS)
    for row, segments in zip(prompts, together, strict=True):
        assert_same(segments, generate(model, [row], plan, sampling, LIMITS)[0])


def test_requests_come_and_go_at_any_step() -> None:
    model = zipped(LLAMAS, {"text": 2})
    dice, running, answers = random.Random(0), Engine(model, 3), []
    todo = [request for request in requests(20, temperature=8.0) if request.limits is LIMITS]
    cancelled = set()
    while len(answers) < len(todo) or running.step():
        while len(answers) < len(todo) and dice.random() < 0.4:
            answers.append(running.submit(todo[len(answers)]))
        running.step()
        if len(answers) % 5 == 4 and not answers[-1].done:
            answers[-1].cancel()
            cancelled.add(len(answers) - 1)
    assert 2 <= len(cancelled) < len(todo) and running.load == (0, 0)
    for number, (request, answer) in enumerate(zip(todo, answers, strict=True)):
        assert answer.done
        if number not in cancelled:
            assert_same(answer.segments(), alone(model, request))


def test_no_more_requests_run_than_there_are_rows() -> None:
    model = zipped(LLAMAS)
    running = Engine(model, 2)
    for seed in range(5):
        running.submit(Request(prompt(["text"], seed), ["speech"], limits=LIMITS))
    assert running.load == (0, 5)
    running.step()
    assert running.load == (2, 3)


def test_other_neighbours_of_the_same_shape_change_no_bit() -> None:
    model = zipped(LLAMAS, {"text": 2})
    mine = Request(
        [Segment("speech", [3, 4, 5])], ["text", "speech"], Sampling(1.0, seed=3), LIMITS
    )
    scores = []
    for other in (6, 9):
        theirs = Request(
            [Segment("speech", [other, 8, 2])],
            [Segment("text", []), "speech"],
            Sampling(1.0, seed=other),
            LIMITS,
        )
        answer = Engine(model, 3).run([theirs, mine, theirs])[1]
        scores.append([written.logprobs[:3] for written in answer.written[:1]])
    assert scores[0] == scores[1]


def test_what_goes_wrong_in_one_request_is_its_own_affair(way: str) -> None:
    towers = {name: tiny_tower("llama", width=16, layers=2, positions=16) for name in LLAMAS}
    model = Zipper.from_towers(towers, link=SMALL)

    def fails(ids: Sequence[int]) -> None:
        raise KeyError("their own code")

    wanted = [
        # No room for the last one.
        Request([Segment("text", [3] * 10)], ["text", "speech", "text"]),
        Request([Segment("text", [3, 4])], ["speech"]),
        Request([Segment("text", [3, 4])], ["speech"], rules={"speech": Rules(fails)}),
    ]
    full, well, broken = Engine(model, 3, reader(model, way)).run(wanted)
    with pytest.raises(ZipperError, match="no room for another segment"):
        full.segments()
    assert [written.tower for written in full.written] == ["text", "speech"]
    with pytest.raises(KeyError):
        broken.segments()
    assert_same(well.segments(), alone(model, wanted[1]))


def test_a_batch_of_generate_survives_a_row_without_room() -> None:
    model = Zipper.from_towers(
        {name: tiny_tower("llama", width=16, layers=2, positions=16) for name in LLAMAS}, link=SMALL
    )
    batch = [[Segment("text", [3] * 12)], [Segment("text", [5])]]
    outputs: list[str | Segment] = ["speech", "text", "speech"]
    limits = {"text": 2, "speech": 1}
    full, well = generate(model, batch, outputs, Sampling(), limits)
    assert_same(well, generate(model, batch[1:], outputs, Sampling(), limits)[0])
    assert_same(full[:1], generate(model, batch[:1], outputs[:1], Sampling(), limits)[0])
    assert [(s.content, s.ended, s.score) for s in full[1:]] == [([], False, 0.0)] * 2


def test_a_long_prompt_is_read_in_pieces(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zipped(LLAMAS)
    request = Request(
        [Segment("speech", [3, 4, 5, 6, 7, 8]), Segment("text", [9, 2])], ["text"], limits=LIMITS
    )
    monkeypatch.setattr(engines, "CHUNK", 3)
    running = Engine(model, 1, reader(model, way))
    answer = running.submit(request)
    steps = 0
    while not answer.written:
        running.step()
        steps += 1
    assert steps == 3 + 2
    running.run([])
    while running.step():
        pass
    assert_same(answer.segments(), alone(model, request))


# Streams.


def test_tokens_come_as_they_are_produced(way: str) -> None:
    model = zipped(LLAMAS, {"text": 2})
    request = Request(
        prompt(["speech"], 1), ["text", Segment("speech", [5])], Sampling(3.0, seed=1), LIMITS
    )
    running = Engine(model, 2, reader(model, way))
    answer, other = running.submit(request), running.submit(requests(1)[0])
    first = next(tokens := running.stream(answer))
    assert not answer.done and first.tower == "text"
    found = [first, *tokens]
    assert answer.done
    for number, segment in enumerate(alone(model, request)):
        mine = [token for token in found if token.segment == number]
        # The second one has a forced id.
        assert [token.id for token in mine] == segment.content[number:]
        assert {token.tower for token in mine} <= {segment.tower}
    list(running.stream(other))
    assert_same(other.segments(), alone(model, requests(1)[0]))


def test_what_is_given_may_come_bit_by_bit(way: str) -> None:
    model = zipped(LLAMAS, {"text": 2})
    whole = Request(
        [Segment("text", [4]), Segment("speech", [3, 4, 5, 6, 7])], ["text"], limits=LIMITS
    )
    running = Engine(model, 2, reader(model, way))
    answer = running.submit(
        Request([Segment("text", [4]), Segment("speech", [3])], ["text"], limits=LIMITS, more=True)
    )
    assert list(running.stream(answer)) == [] and not answer.done, "it waits"
    answer.feed([4, 5])
    other = running.submit(requests(2)[1])
    assert list(running.stream(answer)) == [] and not answer.written
    answer.feed([6])
    running.step()
    answer.feed([7])
    answer.finish()
    tokens = list(running.stream(answer))
    assert_same(answer.segments(), alone(model, whole))
    assert [token.id for token in tokens] == answer.written[0].ids
    assert_same(other.segments(), alone(model, requests(2)[1]))


def test_what_is_fed_is_checked() -> None:
    model = zipped(LLAMAS)
    running = Engine(model, 1)
    answer = running.submit(Request([Segment("speech", [3])], ["text"], more=True))
    for ids, message in ([23], "id 23"), ([3] * 254, "at most 256"):
        with pytest.raises(ZipperError, match=message):
            answer.feed(ids)
    answer.feed([4])
    answer.finish()
    with pytest.raises(ZipperError, match="is complete"):
        answer.feed([4])
    with pytest.raises(ZipperError, match="still running"):
        answer.segments()


@pytest.mark.parametrize(
    "parts",
    [
        [np.array([5]), np.array([6, 7])],
        [torch.tensor([5]), torch.tensor([6, 7])],
        [(5,), range(6, 8)],
        [iter([5]), (i for i in (6, 7))],
        [[np.int64(5)], np.array([6, 7], np.uint8)],
        [[], np.array([], np.int64), [5, 6, 7]],
    ],
    ids=["numpy", "torch", "tuple", "iterators", "numbers", "nothing"],
)
def test_whatever_is_fed_is_read_number_by_number(parts: list[Sequence[int]]) -> None:
    model = zipped(LLAMAS, {"text": 2})
    for together in (True, False):  # fed before the first step, or a part a step
        running = Engine(model, 1)
        answer = running.submit(
            Request([Segment("speech", [3])], ["text"], limits=LIMITS, more=True)
        )
        for part in map(list, parts) if together else parts:
            answer.feed(part)
            assert together or running.step()
        assert [*answer.fed] == ([5, 6, 7] if together else [])
        answer.finish()
        list(running.stream(answer))
        assert_same(
            answer.segments(),
            alone(model, Request([Segment("speech", [3, 5, 6, 7])], ["text"], limits=LIMITS)),
        )
        parts = [[5], [6, 7]]  # iterators are spent


def test_what_a_caller_does_to_its_own_lists_later_changes_no_request() -> None:
    """Buffers that are used again, as those of a microphone are."""
    model = zipped(LLAMAS, {"text": 2})
    buffer, forced, limits = np.array([3, 4, 5]), [5], {"text": 3, "speech": 2}
    rules = {"text": Rules()}
    running = Engine(model, 1)
    request = Request(
        [Segment("speech", buffer)], [Segment("text", forced), "speech"], limits=limits, rules=rules
    )
    wanted = Request(
        [Segment("speech", [3, 4, 5])], [Segment("text", [5]), "speech"], limits=dict(limits)
    )
    answer = running.submit(request)
    buffer[:], limits["text"], rules["text"] = 9, 1, Rules(one_of([[7]], 19))
    forced.append(8)
    list(running.stream(answer))
    assert_same(answer.segments(), alone(model, wanted))
    fed = running.submit(Request([Segment("speech", buffer)], ["text"], limits=LIMITS, more=True))
    part = np.array([4, 5])
    fed.feed(part)
    buffer[:], part[:] = 3, 3
    fed.finish()
    list(running.stream(fed))
    assert_same(
        fed.segments(),
        alone(model, Request([Segment("speech", [9, 9, 9, 4, 5])], ["text"], limits=LIMITS)),
    )


def test_whoever_says_what_is_allowed_cannot_change_what_was_said() -> None:
    model = zipped(LLAMAS)
    seen: list[Sequence[int]] = []
    request = Request(
        TALK, ["text"], limits=LIMITS, rules={"text": Rules(lambda ids: seen.append(ids))}
    )  # type: ignore[func-returns-value]
    (answer,) = Engine(model, 1).run([request])
    assert seen and all(list(ids) == answer.written[0].ids[: len(ids)] for ids in seen)
    assert {*map(type, seen)} == {tuple}


# Requests that wait.


def waiting(seed: int) -> Request:
    return Request([Segment("speech", [3 + seed])], ["text"], limits=LIMITS, more=True)


def test_requests_that_wait_to_be_fed_hold_no_row(way: str) -> None:
    model = zipped(LLAMAS, {"text": 2})
    running = Engine(model, 2, reader(model, way))
    idle = [running.submit(waiting(seed)) for seed in range(3)]
    mine = running.submit(requests(1)[0])
    while running.step():
        pass
    assert mine.done and not any(answer.done for answer in idle) and running.load == (0, 3)
    assert_same(mine.segments(), alone(model, requests(1)[0]))
    for answer in idle:
        answer.feed([5, 6])
        answer.finish()
    while running.step():
        pass
    for number, answer in enumerate(idle):
        assert_same(
            answer.segments(),
            alone(model, Request([Segment("speech", [3 + number, 5, 6])], ["text"], limits=LIMITS)),
        )
    assert running.load == (0, 0)


def test_a_request_that_is_fed_goes_before_those_that_came_after_it() -> None:
    model = zipped(LLAMAS, {"text": 2})
    running = Engine(model, 1)
    first = running.submit(waiting(0))
    while running.step():
        pass
    others = [running.submit(request) for request in requests(2)]
    running.step()
    assert running.load == (1, 2)
    first.feed([5])
    first.finish()
    order = []
    while running.step():
        order += [answer for answer in (first, *others) if answer.done and answer not in order]
    assert order == [others[0], first, others[1]]


def test_a_request_that_waits_and_is_given_up_is_forgotten() -> None:
    model = zipped(LLAMAS)
    running = Engine(model, 1)
    idle = [running.submit(waiting(seed)) for seed in range(3)]
    while running.step():
        pass
    idle[1].cancel()
    assert not running.step() and running.load == (0, 2)
    with pytest.raises(ZipperError, match="This request is done"):
        idle[1].feed([5])


def test_requests_are_parked_and_fed_at_any_step_and_get_what_they_get_alone(way: str) -> None:
    model, dice = zipped(LLAMAS, {"text": 2}), random.Random(1)
    running = Engine(model, 2, reader(model, way))
    contents = [[i for _, i in draw(dice, ["speech"], 1, 12)] for _ in range(8)]
    answers = [
        running.submit(Request([Segment("speech", [])], ["text"], limits=LIMITS, more=True))
        for _ in contents
    ]
    left = [list(ids) for ids in contents]
    while running.step() or not all(answer.done for answer in answers):
        for number, answer in enumerate(answers):
            if left[number] and dice.random() < 0.5:
                answer.feed([left[number].pop(0)])
            elif not left[number]:
                answer.finish()
    for ids, answer in zip(contents, answers, strict=True):
        assert_same(
            answer.segments(),
            alone(model, Request([Segment("speech", ids)], ["text"], limits=LIMITS)),
        )


# Search.


@torch.inference_mode()
def every_way(
    model: Zipper, given: Sequence[Segment], tower: str, cap: int, power: float
) -> list[tuple[float, list[int], bool]]:
    """All segments of up to `cap` tokens with their scores, token by token, best first: (score,
    ids, ended)."""
    found = []
    begin, end = model.ends()[tower]
    vocabulary = [i for i in range(model.config.towers[tower].vocabulary) if i not in (begin, end)]
    for n in range(cap + 1):
        for ids in itertools.product(vocabulary, repeat=n):
            for ended in (True, False) if n == cap else (True,):
                logprobs = []
                scored = Stepwise(model)
                session = scored.open([*{s.tower for s in given}, tower], [tower])
                for segment in given:
                    a, b = model.ends()[segment.tower]
                    read_one(scored, segment.tower, [(session, [a, *segment.content, b])])
                for read, said in zip([begin, *ids], [*ids, end][: n + ended], strict=False):
                    (logits,) = read_one(scored, tower, [(session, [read])])
                    assert logits is not None
                    logits[begin] = -torch.inf
                    logprobs.append(float(logits.log_softmax(-1)[said]))
                found.append((sum(logprobs) / ((5 + len(logprobs)) / 6) ** power, list(ids), ended))
    return sorted(found, reverse=True, key=lambda each: each[0])


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all_segments(
    power: float, way: str
) -> None:
    towers = {"text": tiny_tower("llama", 1, 16, 2, 6), "speech": tiny_tower("llama", 2, 16, 2, 5)}
    model = Zipper.from_towers(towers, link=LinkConfig(head_width=8, gate_init=0.7))
    given = [Segment("speech", [3, 2])]
    ranked = every_way(model, given, "text", 2, power)
    request = Request(given, ["text"], limits={"text": 2}, search=Search(64, 5, power))
    (answer,) = Engine(model, 1, reader(model, way)).run([request])
    (written,) = answer.written
    assert [(list(h.ids), h.ended) for h in written.best] == [
        (ids, ended) for _, ids, ended in ranked[:5]
    ]
    assert [h.score for h in written.best] == pytest.approx(
        [score for score, _, _ in ranked[:5]], abs=1e-4
    )
    assert written.ids == ranked[0][1] and written.segment.score == pytest.approx(
        sum(written.best[0].logprobs)
    )


def test_a_beam_of_one_is_greedy_and_what_follows_sees_the_winner(way: str) -> None:
    model = zipped(LLAMAS, {"text": 2})
    for given, outputs in PLANS[:4]:
        request = Request(prompt(given, 2), outputs, limits=LIMITS, search=Search(1))
        (answer,) = Engine(model, 1, reader(model, way)).run([request])
        is_the_greedy_answer(model, request.segments, outputs, LIMITS, answer.segments())


def test_a_wider_beam_scores_no_less_and_runs_beside_others(way: str) -> None:
    model = zipped(LLAMAS, {"text": 2})
    wanted = [
        Request(prompt(["speech"], 3), ["text"], limits=LIMITS, search=Search(w, w, 0.0))
        for w in (1, 4)
    ]
    narrow, wide, other = Engine(model, 3, reader(model, way)).run([*wanted, requests(1)[0]])
    assert wide.written[0].best[0].score >= narrow.written[0].best[0].score - 1e-5
    assert len({h.ids for h in wide.written[0].best}) == len(wide.written[0].best) == 4
    assert_same(other.segments(), alone(model, requests(1)[0]))


# Rules.


@pytest.mark.parametrize("search", [None, Search(3)])
def test_only_what_is_allowed_is_said(search: Search | None) -> None:
    model = zipped(LLAMAS)
    end = model.ends()["text"].end
    choices = [[3, 4, 5], [3, 6], [7]]
    for seed in range(4):
        request = Request(
            prompt(["speech"], seed),
            ["text"],
            rules={"text": Rules(one_of(choices, end))},
            search=search,
        )
        (segment,) = Engine(model, 1).run([request])[0].segments()
        assert segment.content in choices and segment.ended


def test_of_what_is_allowed_the_beam_finds_the_likeliest() -> None:
    model = zipped(LLAMAS)
    end, given = model.ends()["text"].end, prompt(["speech"], 5)
    choices = [[3, 4, 5], [3, 6], [7], [8, 8]]
    scores = {}
    for ids in choices:
        rules = {"text": Rules(one_of([ids], end))}
        scores[tuple(ids)] = (
            Engine(model, 1).run([Request(given, ["text"], rules=rules)])[0].segments()[0].score
        )
    search = Search(8, 4, 0.0)
    (answer,) = Engine(model, 1).run(
        [Request(given, ["text"], rules={"text": Rules(one_of(choices, end))}, search=search)]
    )
    assert {h.ids: h.score for h in answer.written[0].best} == pytest.approx(scores, abs=1e-4)
    assert tuple(answer.written[0].ids) == max(scores, key=lambda ids: scores[ids])


def test_a_search_in_towers_that_read_no_padding_is_that_of_each_segment() -> None:
    towers = {"text": Tower(families.tiny("bigbird_pegasus")), "speech": tiny_tower("llama")}
    model = Zipper.from_towers(towers, link=SMALL, ends={"text": (1, 2), "speech": (0, 1)})
    search, limits = Search(3, 3), {"text": 4, "speech": 4}
    request = Request([], ["text", "speech"], limits=limits, search=search)
    both, alone = (engines.Engine(model, Stepwise(model), 4).run([request] * n) for n in (3, 1))
    for answer in both:
        assert [one.ids for one in answer.written] == [one.ids for one in alone[0].written]
        assert answer.error is None and len(answer.written) == 2


def test_where_only_the_end_may_follow_at_the_cap_a_segment_has_ended() -> None:
    rules, search = {"text": Rules(one_of([[9, 8]], 3))}, Search(2, 2)
    model = Zipper.from_towers({"text": tiny_tower("llama", 1, 16, 2, 12)}, ends={"text": (1, 3)})
    for how in None, search:
        request = Request([], ["text"], limits={"text": 2}, rules=rules, search=how)
        (answer,) = Engine(model, 1).run([request])
        (written,) = answer.written
        assert written.stop == "end" and written.ids == [9, 8]
        assert [(h.ids, h.ended) for h in written.best] == ([((9, 8), True)] if how else [])


def test_nothing_allowed_is_an_error_of_that_request() -> None:
    model = zipped(LLAMAS)
    (answer,) = Engine(model, 1).run([Request([], ["text"], rules={"text": Rules(lambda ids: [])})])
    with pytest.raises(ZipperError, match="no id is allowed"):
        answer.segments()


def says_one_thing(model: Zipper) -> Zipper:
    text = model.tower("text")
    with torch.no_grad():  # says the token 3 and nothing else, for ever
        text.lm_head.weight.zero_()
        text.lm_head.weight[3] = 1e3 * text.model.norm.weight
    return model


@pytest.mark.parametrize("search", [None, Search(2)])
def test_a_loop_is_closed_and_says_so(search: Search | None) -> None:
    model = says_one_thing(zipped(LLAMAS))
    rules = {"text": Rules(period=3, repeats=4)}
    request = Request(
        [Segment("speech", [3])],
        ["text", "speech"],
        limits={"text": 50, "speech": 2},
        rules=rules,
        search=search,
    )
    (answer,) = Engine(model, 1).run([request])
    assert answer.written[0].ids == [3] * 4 and answer.written[0].stop == "loop"
    looped = [*request.segments, Segment("text", [3] * 4)]
    assert (
        answer.segments()[1].content
        == generate(model, [looped], ["speech"], Sampling(), {"speech": 2})[0][0].content
    )


def test_a_loop_is_any_short_period_that_repeats() -> None:
    rules = Rules(period=3, repeats=3)
    assert (
        rules.loops([9, 1, 1, 1])
        and rules.loops([1, 2, 1, 2, 1, 2])
        and rules.loops([5, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    )
    assert (
        not rules.loops([1, 1])
        and not rules.loops([1, 1, 1, 2])
        and not rules.loops([1, 2, 3, 4] * 3)
    )
    assert not Rules().loops([1] * 99)


def test_what_was_said_is_less_likely_to_be_said_again() -> None:
    logprobs = torch.tensor([0.5, 0.3, 0.2]).log()
    weighed = Rules(repetition=2.0).weigh(logprobs, [0, 0, 2])
    torch.testing.assert_close(weighed, torch.tensor([0.25, 0.3, 0.04]).log())
    torch.testing.assert_close(Rules().weigh(logprobs, [0]), logprobs)


# What an engine is asked.


def test_the_fast_path_is_taken_where_it_is_known() -> None:
    assert isinstance(fastest(zipped(LLAMAS)), Fused)
    other = zipped({"text": "gpt2", "speech": "llama"})
    assert isinstance(fastest(other), Stepwise)
    request = Request(prompt(["speech"], 1), ["text", "speech"], limits=LIMITS)
    assert_same(Engine(other).run([request])[0].segments(), alone(other, request))


TALK = [Segment("speech", [3, 4])]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(TALK, []), "without outputs"),
        (Request(TALK, ["txt"]), "no tower 'txt'"),
        (Request([Segment("speech", [23])], ["text"]), "id 23"),
        (
            Request([Segment("speech", [0, 3, 14])], ["text"]),
            "the id 0, with which its segments begin",
        ),
        (Request(TALK, [Segment("text", [5, 19])]), "the id 19, with which its segments end"),
        (
            Request(TALK, ["text"], Sampling(temperature=1.0), search=Search()),
            "a search and with temperature",
        ),
        (Request(TALK, ["text"], limits={"txt": 3}), "no tower 'txt'"),
        (Request(TALK, ["text"], limits={"text": 0}), "at least 1"),
        (Request(TALK, ["text"], rules={"txt": Rules()}), "no tower 'txt'"),
        (Request([], ["text"], more=True), "no given segment to feed"),
        (
            Request(TALK, ["text"], Sampling(guidance=2.0), search=Search()),
            "a search and with guidance",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(request_: Request, message: str) -> None:
    with pytest.raises(ZipperError, match=message):
        Engine(zipped(LLAMAS)).submit(request_)


def test_settings_that_mean_nothing_are_refused() -> None:
    running = Engine(zipped(LLAMAS))
    for make in (
        lambda: running.submit(Request(TALK, ["text"], limits={"text": 2.5})),  # type: ignore[dict-item]
        lambda: running.submit(Request(TALK, ["text"], limits={"text": True})),
        lambda: running.generate([TALK], ["text"], Sampling(), {"text": math.nan}),  # type: ignore[dict-item]
        lambda: Search(2, 3),
        lambda: Search(0, 0),
        lambda: Search(length_power=-1.0),
        lambda: Rules(repetition=0.5),
        lambda: Rules(repeats=1),
        lambda: Search(length_power=math.nan),
        lambda: Rules(repetition=math.nan),
        lambda: Engine(zipped(LLAMAS), rows=0),
        lambda: Engine(zipped(LLAMAS), rows=math.nan),  # type: ignore[arg-type]
    ):
        with unchecked(), pytest.raises(ZipperError):
            make()


def test_logits_of_a_gpu_come_to_the_cpu_and_rows_without_any_stay_so() -> None:
    with FakeTensorMode():  # shapes and devices alone: no GPU is needed
        rows = [torch.empty(5, device="cuda"), None, torch.empty(5, device="cuda")]
        found = engines._here(rows)
    assert [row if row is None else (row.shape, row.device.type) for row in found] == [
        ((5,), "cpu"),
        None,
        ((5,), "cpu"),
    ]
    assert engines._here([None]) == [None]


def test_a_beginning_beyond_a_towers_room_is_its_own_requests_error() -> None:
    towers = {"text": tiny_tower("gpt2", positions=64), "speech": tiny_tower("gpt2", positions=64)}
    model = Zipper.from_towers(towers, link=SMALL)
    plan: list[str | Segment] = ["text", Segment("text", [5] * 55)]
    long = Request([Segment("speech", [3, 4])], plan, limits={"text": 20}, least=0)
    other = Request([Segment("speech", [3, 4])], ["text"], limits={"text": 20})
    alone, beside = Engine(model, rows=2).run([other])[0], Engine(model, rows=2).run([long, other])
    assert isinstance(beside[0].error, engines.NoRoom)
    assert_same(beside[1].segments(), alone.segments())


def test_an_engine_goes_on_after_a_read_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zipped(LLAMAS)
    engine = Engine(model, rows=2)
    asked = [Segment("speech", [3, 4])]
    wanted = engine.generate([asked], ["text"], Sampling(), LIMITS)

    def fail(*_: object) -> None:
        raise IndexError("a row too far")

    lost = engine.submit(Request(asked, ["text"]))
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.reader), "read", fail)
        with pytest.raises(IndexError, match="a row too far"):
            engine.step()
    assert lost.done and isinstance(lost.error, IndexError) and engine.load == (0, 0)
    assert engine.generate([asked], ["text"], Sampling(), LIMITS) == wanted


def test_engines_of_several_threads_share_one_reader() -> None:
    model = zipped(LLAMAS)
    shared = fastest(model)
    prompts = [[Segment("speech", [n, n + 1, n + 2])] for n in range(2, 10)]
    plan: list[str | Segment] = ["text", "speech"]
    wanted = engines.Engine(model, shared).generate(prompts, plan, Sampling(), LIMITS)

    def work(_: int) -> list[bool]:
        return [
            engines.Engine(model, shared, 2).generate(prompts, plan, Sampling(), LIMITS) == wanted
            for _ in range(8)
        ]

    with ThreadPoolExecutor(3) as pool:
        assert all(itertools.chain.from_iterable(pool.map(work, range(3))))


def test_an_id_that_is_allowed_and_unknown_is_named() -> None:
    model = zipped(LLAMAS)
    for strange in (-1, 99):
        rules = {"text": Rules(allowed=lambda _, strange=strange: [strange])}
        (answer,) = Engine(model).run([Request([Segment("speech", [3])], ["text"], rules=rules)])
        assert f"names the id {strange}" in str(answer.error)
    once = {"text": Rules(allowed=lambda _: iter([5]))}  # what is allowed is looked at once
    request = Request([Segment("speech", [3])], ["text"], rules=once, limits={"text": 3})
    assert Engine(model).run([request])[0].segments()[0].content == [5, 5, 5]


def test_what_was_interrupted_is_not_taken_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(zipped(LLAMAS), rows=2)
    answer = engine.submit(Request([Segment("speech", [3, 4])], ["text"]))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(engine.reader), "read", stop)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(ZipperError, match="interrupted"):
        answer.segments()


@torch.inference_mode()
def test_logprobs_are_the_models_own_whatever_was_chosen_by() -> None:
    model, given = zipped(LLAMAS, {"text": 2}), [Segment("speech", [5, 6])]
    rarer = {"text": Rules(lambda _: [3], repetition=3.0)}
    ways: list[dict[str, Any]] = [
        {"sampling": Sampling(guidance=3.0)},
        {"rules": rarer},
        {"rules": rarer, "search": Search(2)},
    ]
    begin, end = model.ends()["text"]
    for options in ways:
        request = Request(given, [Segment("text", [3, 3])], limits={"text": 8}, **options)
        (written,) = Engine(model, 1).run([request])[0].written
        logits = model(collate([[*given, Segment("text", written.ids)]], model.ends()).strands)
        logits["text"][..., begin] = -torch.inf
        wanted = logits["text"][0].log_softmax(-1)
        said = [*enumerate([*written.ids, end])][2 : 2 + len(written.logprobs)]
        assert len(said) > 2
        assert written.logprobs == pytest.approx([float(wanted[n, i]) for n, i in said], abs=1e-4)


def test_what_is_fed_is_measured_with_all_that_was_given_before_it() -> None:
    given = [Segment("speech", [3] * 200), Segment("text", [4]), Segment("speech", [3])]
    answer = Engine(zipped(LLAMAS), 1).submit(Request(given, ["text"], more=True))
    with pytest.raises(ZipperError, match=r"'speech' would read 257 tokens, .* at most 256"):
        answer.feed([3] * 52)
    answer.feed([3] * 51)


def test_begin_and_end_of_what_was_written_take_room() -> None:
    towers = {"text": tiny_tower("llama", positions=16), "speech": tiny_tower("llama", 1)}
    model, endless = Zipper.from_towers(towers, link=SMALL), {"text": Rules(lambda _: [3])}
    request = Request([], ["text", "text"], limits={"text": 7}, rules=endless)
    (answer,) = Engine(model, 1).run([request])
    assert [len(written.ids) for written in answer.written] == [7, 16 - 9 - 2]


def test_of_several_requests_all_are_taken_or_none() -> None:
    engine = Engine(zipped(LLAMAS), 2)
    with pytest.raises(ZipperError, match="no tower 'txt'"):
        engine.run([Request(TALK, ["text"]), Request(TALK, ["txt"])])
    assert engine.load == (0, 0)
