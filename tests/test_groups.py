"""Several outputs at once: segments of one group are read and written in the same steps.

The naive statement: in a group a token sees what came before its step, of its own tower and of
others, and nothing of others in its step. A sample is laid out once as a whole (`collate`), and
everything that reads step by step must say the same.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from laws import unchecked

from zipper.errors import ZipperError
from zipper.fast import fastest
from zipper.generation import Engine, Request, generate
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.reading import Stepwise
from zipper.sampling import Rules, Sampling, Search
from zipper.strand import Ends, Segment, Target, collate, groups
from zipper.tasks import Task, lanes
from zipper.testing import tiny_tower
from zipper.writing import Lane

IDS = 24
NAMES = ("text", "speech", "image")


@pytest.fixture(scope="module")
def model() -> Zipper:
    torch.manual_seed(0)
    zipped = Zipper.from_towers(
        {name: tiny_tower("llama", vocabulary=IDS, seed=n) for n, name in enumerate(NAMES)},
        ends={name: Ends(0, 1) for name in NAMES},
        link=LinkConfig(head_width=16, gate_init=0.9),
        shows={"text": 0},
    )
    with torch.no_grad():
        for link in zipped.links.values():
            for parameter in link.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return zipped.eval()


def sample(chance: random.Random) -> list[Segment]:
    """Segments, some of them in groups of two or three lanes with strides and delays."""
    found: list[Segment] = []
    for _ in range(chance.randint(1, 3)):
        some = chance.sample(NAMES, chance.randint(1, 3))
        for number, tower in enumerate(some):
            content = [chance.randrange(2, IDS) for _ in range(chance.randint(0, 5))]
            pace = {"stride": chance.randint(1, 3), "delay": chance.randint(0, 4)}
            found.append(
                Target(tower, content, beside=number > 0, **(pace if len(some) > 1 else {}))
            )
    return found


def logits(model: Zipper, segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    batch = collate([segments], model.ends())
    with torch.inference_mode():
        return {name: found[0] for name, found in model(batch.strands).items()}


def times(segments: Sequence[Segment]) -> list[tuple[int, str, int]]:
    """(time, tower, id) of every token, as the words of `Segment` say."""
    found, time = [], 0
    for group in groups(segments):
        last = time
        for lane in group:
            for number, token in enumerate([0, *lane.content, 1]):
                at = time + lane.delay + lane.stride * number
                found.append((at, lane.tower, token))
                last = max(last, at + 1)
        time = last
    return found


FEW = range(2)
MANY = pytest.param(range(2, 302), marks=pytest.mark.slow)


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_samples_are_laid_out_as_their_words_say(seeds: range) -> None:
    for seed in seeds:
        segments = sample(random.Random(seed))
        batch = collate([segments], {name: Ends(0, 1) for name in NAMES})
        laid = [
            (int(time), name, int(token))
            for name, strand in batch.strands.items()
            for time, token in zip(strand.time[0], strand.ids[0], strict=True)
        ]
        assert sorted(laid) == sorted(times(segments))


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_a_token_changes_nothing_of_its_own_step_and_something_later(
    model: Zipper, seeds: range
) -> None:
    for seed in seeds:
        check_what_a_token_changes(model, random.Random(seed))


def check_what_a_token_changes(model: Zipper, chance: random.Random) -> None:
    segments = sample(chance)
    filled = [n for n, segment in enumerate(segments) if segment.content]
    if not filled:
        return
    which = chance.choice(filled)
    place = chance.randrange(len(segments[which].content))
    content = [*segments[which].content]
    content[place] = 2 + (content[place] - 1) % (IDS - 2)
    changed = [*segments]
    changed[which] = Target(
        segments[which].tower,
        content,
        beside=segments[which].beside,
        stride=segments[which].stride,
        delay=segments[which].delay,
    )
    batch = collate([segments], model.ends())
    before, after = logits(model, segments), logits(model, changed)
    moved = (
        batch.strands[segments[which].tower].ids
        != collate([changed], model.ends()).strands[segments[which].tower].ids
    )[0]
    at = int(batch.strands[segments[which].tower].time[0][moved][0])
    for name, strand in batch.strands.items():
        if name == segments[which].tower:
            own = torch.arange(strand.ids.shape[1]) < int(moved.nonzero()[0])
            assert torch.equal(before[name][own], after[name][own])
        else:
            blind = strand.time[0] <= at
            assert torch.equal(before[name][blind], after[name][blind])
            if not bool(blind.all()):
                assert not torch.equal(before[name][~blind], after[name][~blind])


def greedy(model: Zipper, given: Sequence[Segment], plan: Sequence[Segment], most: int) -> Any:
    """By the whole forward pass, anew for every step: what the engine must say."""
    done = list(given)
    for group in groups(plan):
        made: list[list[int]] = [[] for _ in group]
        ended = [False] * len(group)
        for step in range(200):
            for number, lane in enumerate(group):
                since = step - lane.delay
                if ended[number] or since < 0 or since % lane.stride:
                    continue
                so_far = [
                    Target(
                        each.tower, said, beside=each.beside, stride=each.stride, delay=each.delay
                    )
                    for each, said in zip(group, made, strict=True)
                ]
                # Of other lanes only what stands before this step is laid out: later tokens are
                # not there, and an end that was not said would be seen.
                batch = collate([[*done, *so_far]], model.ends())
                begun = collate([done], model.ends()).strands if done else {}
                strands, row = {}, -1
                start = max((int(s.time.max()) + 1 for s in begun.values()), default=0)
                for name, strand in batch.strands.items():
                    said = {each.tower: n for n, each in enumerate(group)}
                    keep = strand.time[0] < start + step + (name == lane.tower)
                    if name in said and name != lane.tower and not ended[said[name]]:
                        last = strand.ids.shape[1] - 1
                        keep = keep & (torch.arange(last + 1) < last)
                    strands[name] = strand.select(torch.tensor([0]))
                    columns = [column[:, keep] for column in strand.columns]
                    strands[name] = type(strand)(*columns)
                    row = int(keep.sum()) - 1 if name == lane.tower else row
                strands = {name: strand for name, strand in strands.items() if strand.ids.numel()}
                with torch.inference_mode():
                    scores = model(strands)[lane.tower][0, row].tolist()
                scores[0] = -float("inf")
                token = scores.index(max(scores))
                lane_over = token == 1 or len(made[number]) >= most
                if lane_over:
                    ended[number] = True
                else:
                    made[number].append(token)
            if all(ended):
                break
        done += [
            Target(each.tower, said, beside=each.beside, stride=each.stride, delay=each.delay)
            for each, said in zip(group, made, strict=True)
        ]
    return [segment.content for segment in done[len(given) :]]


def plan_of(chance: random.Random) -> list[Segment]:
    return [
        Segment(s.tower, [], beside=s.beside, stride=s.stride, delay=s.delay)
        for s in sample(chance)
    ]


@pytest.mark.parametrize("reader", [Stepwise, fastest])
@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_the_engine_writes_what_the_whole_pass_says(
    model: Zipper, seeds: range, reader: Any
) -> None:
    engine, most = Engine(model, reader(model), rows=4), 4
    limits = dict.fromkeys(NAMES, most)
    for seed in seeds:
        chance = random.Random(seed)
        given, plan = sample(chance), plan_of(chance)
        answers = engine.run([Request(given, plan, limits=limits)] * 2)
        for answer in answers:
            assert [part.content for part in answer.segments()] == greedy(model, given, plan, most)


def test_the_order_of_lanes_changes_nothing(model: Zipper) -> None:
    given, limits = [Segment("text", [3, 4, 5])], {"speech": 5, "image": 5}
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        one = model.generate([*given], ["speech + image"], sampling=sampling, limits=limits)
        other = model.generate([*given], ["image + speech"], sampling=sampling, limits=limits)
        assert {s.tower: s.content for s in one} == {s.tower: s.content for s in other}


def test_a_group_of_one_is_a_plain_segment(model: Zipper) -> None:
    plain, paced = Segment("text", [3, 4]), Segment("text", [3, 4], stride=3, delay=2)
    order = collate([[plain, Segment("speech", [5])]], model.ends()).strands
    slow = collate([[paced, Segment("speech", [5])]], model.ends()).strands
    with torch.inference_mode():
        for name, found in model(order).items():
            assert torch.equal(found, model(slow)[name])


def test_lanes_are_streamed_as_they_are_made(model: Zipper) -> None:
    engine = Engine(model, Stepwise(model), rows=1)
    limits = {"speech": 6, "image": 6}
    answer = engine.submit(Request([Segment("text", [3])], ["speech + image@2/1"], limits=limits))
    came = [(token.tower, token.segment) for token in engine.stream(answer)]
    first = {tower: came.index((tower, number)) for number, tower in enumerate(("speech", "image"))}
    assert abs(first["speech"] - first["image"]) <= 2
    assert next(token for token in answer.tokens if token.segment == 0).tower == "speech"


def test_what_is_no_group_is_refused(model: Zipper) -> None:
    for said in ("text + text", "text@0", "text@2/x", "+ text", "text + ", "a b", "@2"):
        with pytest.raises(ZipperError):
            lanes([said])
    for pace in ({"stride": 0}, {"stride": -1}, {"delay": -1}, {"stride": 1.5}, {"delay": "1"}):
        with unchecked(), pytest.raises(ZipperError, match="a stride at least 1"):
            model.generate([Segment("text", [3], **pace)], ["speech"])
    with pytest.raises(ZipperError, match="runs beside nothing"):
        model.generate([Segment("text", [3])], [Segment("speech", [], beside=True)])
    with pytest.raises(ZipperError, match="runs beside nothing"):
        groups([Segment("text", [], beside=True)])
    engine = Engine(model, Stepwise(model))
    with pytest.raises(ZipperError, match="with a search or to be fed"):
        engine.submit(Request([Segment("text", [3])], ["text + speech"], search=Search(width=2)))


def test_a_task_of_a_group_is_learnt_and_written_alike() -> None:
    task = Task.parse("question:speech -> text@2 + voice~speech, image")
    assert str(Task.parse(str(task))) == str(task)
    assert task.outputs == ("text@2 + speech", "image")
    assert task.towers == ("speech", "text", "image")
    row = {"question": [9], "text": [3], "voice": [4], "speech": [5], "image": [6]}
    segments = task.segments(row)
    assert [(s.tower, s.content, s.beside, s.stride) for s in segments] == [
        ("speech", [9], False, 1),
        ("text", [3], False, 2),
        ("speech", [4, 5], True, 1),
        ("image", [6], False, 1),
    ]
    assert [isinstance(s, Target) for s in segments] == [False, True, True, True]


@pytest.mark.parametrize("reader", [Stepwise, fastest])
@pytest.mark.parametrize(
    "rules", [{}, {"speech": Rules(period=2, repeats=2)}], ids=["at its limit", "in a loop"]
)
def test_what_follows_a_group_has_read_it_as_if_it_was_given(
    model: Zipper, reader: Any, rules: dict[str, Rules]
) -> None:
    engine, limits = Engine(model, reader(model)), {"speech": 9, "image": 5, "text": 6}
    given = [Segment("text", [3, 4])]
    (answer,) = engine.run(
        [Request(given, ["speech + image@2", "text"], limits=limits, rules=rules)]
    )
    speech, image, text = answer.written
    assert not rules or speech.stop == "loop"
    read = [
        *given,
        Segment("speech", speech.ids),
        Segment("image", image.ids, beside=True, stride=2),
    ]
    (again,) = engine.run([Request(read, ["text"], limits=limits)])
    assert again.written[0].ids == text.ids
    assert again.written[0].logprobs == pytest.approx(text.logprobs, abs=1e-4)


def test_lanes_are_guided_away_from_what_their_tower_says_alone(model: Zipper) -> None:
    given, limits = [Segment("text", [3, 4, 5])], {"speech": 5, "image": 5}
    plan, guided = ["speech + image@2"], Sampling(guidance=2.5)
    found = []
    for reader in (Stepwise, fastest):
        engine = Engine(model, reader(model))
        answers = engine.run([Request(given, plan, how, limits) for how in (guided, Sampling())])
        found.append([[written.ids for written in answer.written] for answer in answers])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    first = model.generate(given, ["speech"], sampling=guided, limits=limits)[0].content[:1]
    assert found[0][0][0][:1] == first  # in the first step there is nothing else to see


def test_a_slow_lane_makes_no_step_of_its_own(
    model: Zipper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the tokens of lanes that read seldom nothing is done."""
    asked, due = [], Lane.due

    def counted(lane: Lane, step: int) -> int:
        asked.append(step)
        return due(lane, step)

    monkeypatch.setattr(Lane, "due", counted)
    plan = "text@9999/9999 + speech@9999"
    (made,) = generate(
        model, [[Segment("text", [3])]], [plan], Sampling(), {"text": 3, "speech": 3}
    )
    assert [segment.tower for segment in made] == ["text", "speech"]
    assert len(asked) < 100


def test_a_given_group_takes_room_like_any_other_segment(model: Zipper) -> None:
    given = [Segment("text", [3] * 250), Segment("speech", [5], beside=True)]
    endless = {"text": Rules(lambda _: [3])}
    request = Request(given, ["text"], limits={"text": 50}, rules=endless)
    (answer,) = Engine(model, Stepwise(model)).run([request])
    assert answer.written[0].ids == [3] * (256 - 252 - 2)
