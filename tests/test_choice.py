"""Choice: a zip says which segment comes next, or that it is over; until it has learnt to, nothing
of it is seen."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import LLAMAS, draw, lay, number, zipped
from test_mutants import mutated
from tiny import World

from zipper import generation, model, strand
from zipper.config import ZipperConfig
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.fast.reader import Fused
from zipper.generation import Engine, Request
from zipper.growth import add
from zipper.loss import CHOICE, batch_losses, per_token
from zipper.measurement import _choices, measure
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.reading import Reader, Stepwise
from zipper.sampling import Sampling, Search
from zipper.strand import Segment, Target, collate
from zipper.tasks import Task, among, lanes
from zipper.testing import tiny_tower
from zipper.training import train
from zipper.training.batches import Part, Steps, silent
from zipper.verify import verify

BOTH = ("speech", "text")
READERS = [Stepwise, Fused]


def chooser(seed: int = 0, families: Any = LLAMAS, **options: Any) -> Zipper:
    """A zip that chooses, by heads drawn at random."""
    found = zipped(families, **options)
    found.choose(sorted(families))
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(found.choosers.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    return found


def greedy(model: Zipper, done: list[Segment], name: str, company: tuple[str, ...]) -> list[int]:
    """At most four ids, by the whole pass for each. What comes next is open, so that all towers of
    the choice take part, also where one alone has spoken so far."""
    ends, ids = model.ends()[name], list[int]()
    while len(ids) < 4:
        batch = collate([[*done, Segment(name, ids)]], model.ends())
        with torch.inference_mode():
            hidden = model.hidden(batch.strands, [name], company)[name][:, -2:-1]
            logits = model.unembed(name, hidden)[0, 0].tolist()
        logits[ends.begin] = -math.inf
        if (token := logits.index(max(logits))) == ends.end:
            break
        ids.append(token)
    return ids


def by_hand(model: Zipper, given: list[Segment], options: tuple[str, ...], most: int) -> Any:
    """What it chooses and writes, by the whole pass over all so far, anew for each decision."""
    done, chosen = [*given], list[str]()
    company = tuple(dict.fromkeys([*(s.tower for s in given), *options]))
    names = [*sorted(model.towers), ""]
    for _ in range(most):
        batch = collate([done], model.ends())
        last = done[-1].tower
        with torch.inference_mode():
            hidden = model.hidden(batch.strands, [last], company)[last][0, -1]
            logits = model.choice(last, hidden).tolist()
        open_to = [n for n, name in enumerate(names) if name in (*options, "")]
        chosen.append(names[max(open_to, key=logits.__getitem__)])
        if not chosen[-1]:
            break
        done.append(Segment(chosen[-1], greedy(model, done, chosen[-1], company)))
    return chosen, [(s.tower, list(s.content)) for s in done[len(given) :]]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seeds", [(0, 1, 19), pytest.param(range(2, 302), marks=pytest.mark.slow)])
def test_it_writes_what_its_heads_say_of_all_before(
    seeds: Sequence[int], reader: Callable[[Zipper], Reader]
) -> None:
    for seed in seeds:
        dice = random.Random(seed)
        zip_ = chooser(seed, input_projection=dice.choice(["none", "residual", "paper"]))
        first = dice.choice(BOTH)
        given = [Segment(first, [i for _, i in draw(dice, [first], 1)])]
        limits = dict.fromkeys(BOTH, 4)
        (answer,) = Engine(zip_, reader(zip_)).run([Request(given, ["*"], limits=limits, most=3)])
        made = [(w.tower, w.ids) for w in answer.written]
        said = [one.tower for one in answer.chosen]
        assert (said, made) == by_hand(zip_, given, BOTH, 3)
        assert [one.segment for one in answer.chosen] == [*range(len(said))]


@pytest.mark.parametrize("reader", READERS)
def test_without_heads_and_with_untrained_ones_nothing_else_changes(reader: Any) -> None:
    old, new = zipped(LLAMAS), zipped(LLAMAS)
    new.choose(BOTH)
    strands = lay([number(draw(random.Random(0), BOTH, 4))])
    assert all(torch.equal(a, new(strands)[name]) for name, a in old(strands).items())
    given, limits = [Segment("text", [3, 4])], {"speech": 5}
    plan = ["speech"], Sampling(), limits
    one, other = (Engine(zip_, reader(zip_)).generate([given], *plan) for zip_ in (old, new))
    assert one == other
    assert not [name for name in old.state_dict() if "choos" in name]
    assert ZipperConfig.from_dict(old.config.to_dict()).chooses == ()
    names = new.state_dict().keys() - old.state_dict().keys()
    assert names
    assert all(name.startswith("choosers.") for name in names)


def test_what_is_forced_forbidden_and_how_many() -> None:
    zip_ = chooser(3)
    given, engine = [Segment("text", [3, 4])], Engine(zip_, Stepwise(zip_))
    limits = dict.fromkeys(BOTH, 3)

    def said(plan: list[Any], **options: Any) -> Any:
        (answer,) = engine.run([Request(given, plan, limits=limits, **options)])
        assert answer.error is None
        return [one.tower for one in answer.written], [one.tower for one in answer.chosen]

    for names in ["text|speech"], ["speech | text"]:
        assert said(names, least=2, most=2)[0] == said(["*"], least=2, most=2)[0]
    assert said(["speech", "*"], most=1)[0][0] == "speech"
    assert len(said(["*"], least=3, most=3)[0]) == 3
    with torch.no_grad():
        for head in zip_.choosers.values():
            head.out.weight.zero_()
            head.out.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))  # speech, text, over
    assert said(["*"]) == ([], [""])
    assert said(["*"], least=1) == (["text"], ["text", ""])
    assert said(["*", "speech"]) == (["speech"], [""])
    assert said(["*"], search=Search(width=2), least=1)[0] == ["text"]


def test_a_prompt_without_room_gets_the_named_segments_alone() -> None:
    towers = {"text": tiny_tower("gpt2", positions=16), "speech": tiny_tower("llama", 1)}
    model = Zipper.from_towers(towers)
    model.choose(["speech", "text"])
    prompts = [[Segment("text", [5] * 12)], [Segment("text", [5])]]
    limits = {"text": 2, "speech": 2}
    full, other = generation.generate(model, prompts, ["text", "text|speech"], Sampling(), limits)
    assert [(one.tower, one.ended) for one in full] == [("text", False)]
    assert other[0].tower == "text" and {one.tower for one in other} <= {"text", "speech"}


def test_what_cannot_be_chosen_is_refused() -> None:
    zip_, plain = chooser(), zipped(LLAMAS)
    given = [Segment("text", [3])]
    for made, plan, options, reason in (
        (plain, ["*"], {}, "not learnt to choose"),
        (zip_, ["text|image"], {}, "chooses among speech, text"),
        (zip_, ["text|speech + text"], {}, "stands in a group"),
        (zip_, ["*", "*"], {}, "goes on until"),
        (zip_, ["text|text"], {}, "is no choice"),
        (zip_, ["text|"], {}, "is no choice"),
        (zip_, ["*"], {"least": 3, "most": 2}, "least <= most"),
    ):
        with pytest.raises(ZipperError, match=reason):
            Engine(made, Stepwise(made)).submit(Request(given, plan, **options))
    with pytest.raises(ZipperError, match="begins with a choice"):
        Engine(zip_, Stepwise(zip_)).submit(Request([], ["*"]))
    for task in "text -> *", "text|speech -> text":
        with pytest.raises(ZipperError, match=r"Write them|not chosen"):
            Task.parse(task)


def test_a_task_of_a_choice_takes_the_fields_that_a_row_has() -> None:
    task = Task.parse("question:text -> text|answer:speech")
    assert task.towers == ("text", "speech")
    assert task.chosen == ("text", "speech")
    assert task.outputs == ("text|speech",)
    assert among("text|speech") == ("text", "speech")
    assert lanes(["text | answer:speech"])[0].tower == "text|speech"
    spoken = task.segments({"question": [5], "answer": [6, 7]})
    assert spoken[1:] == [Target("speech", [6, 7], chosen=True)]
    assert strand.decisions(spoken) == {0: "speech", 1: ""}
    both = task.segments({"question": [5], "answer": [6], "text": [8]})
    assert strand.decisions(both) == {0: "text", 1: "speech", 2: ""}
    with pytest.raises(ZipperError, match="the row has"):
        task.segments({"question": [5]})


@torch.no_grad()
def test_its_loss_is_the_cross_entropy_at_the_ends() -> None:
    zip_ = chooser(1)
    task = Task.parse("text -> answer:text|speech")
    rows = [{"text": [3, 4], "speech": [5]}, {"text": [6], "answer": [7, 8, 9]}]
    samples = [task.segments(row) for row in rows]
    whole = batch_losses(zip_, collate(samples, zip_.ends(), company=task.company))[CHOICE]
    total = 0.0
    for sample in samples:
        for at, came in strand.decisions(sample).items():
            batch = collate([sample[: at + 1]], zip_.ends())
            last = sample[at].tower
            state = zip_.hidden(batch.strands, [last], task.company)[last][0, -1]
            names = [*sorted(zip_.towers), ""]
            total -= float(zip_.choice(last, state).log_softmax(-1)[names.index(came)])
    assert float(whole) == pytest.approx(total, rel=1e-4)
    packed = collate(samples, zip_.ends(), packed=[[0, 1]], company=task.company)
    assert float(batch_losses(zip_, packed)[CHOICE]) == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_verify_covers_it_and_a_grown_zip_keeps_it(tmp_path: Path) -> None:
    zip_ = chooser(2)
    checks = verify(zip_)
    assert all(check.held for check in checks)
    assert sum("chosen by what came before" in check.promise for check in checks) == 2
    zip_.save_pretrained(tmp_path / "zip", include=BOTH)
    again = Zipper.from_pretrained(tmp_path / "zip")
    grown = add(again, "image", tiny_tower("llama", 5), ends=(0, 1))
    given, limits = [Segment("text", [3, 4])], dict.fromkeys(BOTH, 3)
    request = Request(given, ["text|speech"], limits=limits)
    answers = [Engine(z, Stepwise(z)).run([request])[0] for z in (zip_, again, grown)]
    assert [answer.chosen for answer in answers] == [answers[0].chosen] * 3


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "the end before is forgotten": (strand, "decisions", "found[number - 1] = segment.tower", ""),
    "it is never over": (strand, "decisions", 'found[number] = ""', ""),
    "the begin is looked at": (strand, "collate", "start + n - 1] = came", "start] = came"),
    "the state of another tower": (generation, "_course", "behind = tower", "pass"),
    "what is forbidden is chosen": (
        generation,
        "_decided",
        "{*model.choices(towers)}",
        "{*model.ends()}",
    ),
    "it may be over too early": (generation, "_decided", "done >= request.least", "True"),
    "heads have another order": (
        model.Zipper,
        "choice",
        "sorted(self.config.towers)",
        "sorted(self.config.towers)[::-1]",
    ),
    "it goes on behind its most": (generation, "_course", "range(request.most)", "range(9)"),
    "an end is not read": (
        generation,
        "_course",
        "Segment(tower, [])], False",
        "Segment(tower, [])], True",
    ),
    "it is drawn where it should be likeliest": (
        generation,
        "_decided",
        "logprobs.masked_fill",
        "(-logprobs).masked_fill",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_in_it_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, old, new = MUTANTS[fault]
    monkeypatch.setattr(owner, name, mutated(owner, name, old, new))
    with pytest.raises((AssertionError, KeyError, ValueError, RuntimeError)):
        test_a_task_of_a_choice_takes_the_fields_that_a_row_has()
        test_its_loss_is_the_cross_entropy_at_the_ends()
        test_what_is_forced_forbidden_and_how_many()
        test_it_writes_what_its_heads_say_of_all_before(range(8), Stepwise)


# --- learnt


def asked(n: int, seed: int) -> list[dict[str, Any]]:
    """Requests for a spoken or a written answer: one word of them, anywhere, says which is
    wanted."""
    chance, found = random.Random(seed), []
    for row in tiny.pairs(n, seed):
        spoken, words = chance.random() < 0.5, [w for w in row["text"].split() if w not in HOW]
        words.insert(chance.randrange(len(words) + 1), HOW[0] if spoken else HOW[1])
        answer = {"voiced:speech": row["speech"]} if spoken else {"answer:text": row["text"]}
        found.append({"id": row["id"], "question:text": " ".join(words), **answer})
    return found


HOW = ("lamp", "oven")  # said, written
ASKED = "question:text -> answer:text|voiced:speech"


def learnt(world: World, folder: Path, steps: int) -> Pipeline:
    """A zip of fresh towers that was trained on such requests."""
    manifests.write(folder / "asked.jsonl", asked(1500, 0))
    manifests.write(folder / "dev.jsonl", asked(40, 1))
    recipe = world.config(
        folder / "run",
        towers=dict.fromkeys(("text", "speech"), tiny.shape()),
        train=("text", "speech"),
        data=str(folder / "asked.jsonl"),
        dev=str(folder / "dev.jsonl"),
        tasks={ASKED: 1.0},
        steps=steps,
        batch=16,
        lr_tower=3e-3,
        lr_new=3e-3,
        warmup=20,
        log_every=50,
        eval_every=steps,
        save_every=steps,
        eval_rows=40,
    )
    return train(recipe)


def test_a_recipe_with_a_choice_gives_the_zip_its_heads(tmp_path: Path) -> None:
    found = learnt(tiny.world(tmp_path), tmp_path, 2)
    assert found.zip.config.chooses == ("speech", "text")
    assert all(head.out.weight.any() for head in found.zip.choosers.values())
    (measured,) = measure(found, tmp_path / "dev.jsonl", [ASKED])
    assert set(measured.confusion) == {"speech", "text", ""}
    assert sum(map(sum, (row.values() for row in measured.confusion.values()))) == 80
    assert measured.metrics["right choice"]["oracle"].value == 1
    said = found.run([Segment("text", "call anna")], ["text|speech"])
    assert len(said) <= 8
    assert {segment.tower for segment in said} <= {"text", "speech"}
    assert measured.to_json()["confusion"] == measured.confusion


@pytest.mark.slow
def test_requests_for_a_spoken_or_a_written_answer_are_told_apart(tmp_path: Path) -> None:
    found = learnt(tiny.world(tmp_path), tmp_path, 400)
    manifests.write(tmp_path / "test.jsonl", asked(300, 2))
    (measured,) = measure(found, tmp_path / "test.jsonl", [ASKED])
    print(measured.to_json())
    assert measured.metrics["right choice"]["model"].value >= 0.98
    assert measured.metrics["right choice"]["floor"].value <= 0.6
    engine, text = found.engine(16), found.modalities["text"]
    rows = asked(100, 2)
    given = [[Segment("text", text.encode(row["question:text"]))] for row in rows]
    free = engine.run([Request(one, ["*"], most=1) for one in given])
    wanted = ["speech" if "voiced:speech" in row else "text" for row in rows]
    right = [answer.chosen[0].tower == name for answer, name in zip(free, wanted, strict=True)]
    assert sum(right) >= 98
    forced = engine.run([Request(one, [name]) for one, name in zip(given, wanted, strict=True)])
    same = [a.written[0].ids == b.written[0].ids for a, b in zip(free, forced, strict=True)]
    assert all(equal for equal, hit in zip(same, right, strict=True) if hit)


def test_what_is_told_of_a_choice_is_its_share_among_all_choices() -> None:
    zip_, told = chooser(3), torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1).tolist()
    with torch.no_grad():
        for head in zip_.choosers.values():
            head.out.weight.zero_()
            head.out.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))  # speech, text, over
    request = Request([Segment("text", [3])], ["*"], limits=dict.fromkeys(BOTH, 3), least=1)
    (answer,) = Engine(zip_, Stepwise(zip_)).run([request])
    assert [one.tower for one in answer.chosen] == ["text", ""]  # the first could not be over
    assert [one.logprob for one in answer.chosen] == pytest.approx([told[1], told[2]], abs=1e-5)


def test_a_tower_that_a_task_does_not_choose_among_is_never_taken() -> None:
    zip_ = chooser(3, LLAMAS | {"image": "llama"})
    with torch.no_grad():
        for head in zip_.choosers.values():
            head.out.weight.zero_()
            head.out.bias.copy_(torch.tensor([9.0, 0.0, 1.0, 0.5]))  # image, speech, text, over
    rows = [{"text": [3], "speech": [5]}, {"text": [4, 6], "speech": [7]}]
    found = _choices(zip_, Task.parse("text -> speech|text"), rows, 0)
    assert {taken for row in found.confusion.values() for taken in row} == {"text"}
    assert found.nats < 2  # of the three that were open


def test_every_choice_of_a_step_counts_and_stands_in_its_own_company(tmp_path: Path) -> None:
    chosen, plain = "question:text -> answer:text|speech", "speech -> answer:text"
    rows = [{"question": [3], "answer": [5], "speech": [n % 9 + 2]} for n in range(20)]
    config = tiny.world(tmp_path).config(
        tmp_path / "run", tasks={chosen: 0.5, plain: 0.5}, batch=16, together=True
    )
    tasks = {name: Task.parse(name) for name in config.tasks}
    steps = Steps([Part("", rows, 1.0)], tasks, config, zipped(LLAMAS).ends())
    (drawn,), counts = steps[0]
    assert {batch.company for batch in drawn} == {(), ("text", "speech")}
    (one,) = [batch for batch in drawn if batch.company]
    (other,) = [batch for batch in drawn if not batch.company]
    made = len(one.strands["text"].ids)
    assert counts[CHOICE] == 3 * made and made + len(other.strands["text"].ids) == 16
    assert one.choices and not other.choices


@torch.no_grad()
def test_a_silent_batch_is_looked_at_and_counts_nothing() -> None:
    zip_, task = chooser(1), Task.parse("text -> answer:text|speech")
    rows = [{"text": [3, 4], "speech": [5]}, {"text": [6], "answer": [7, 8, 9]}]
    samples = [task.segments(row) for row in rows]
    batch = collate(samples, zip_.ends(), company=task.company)
    loud, quiet = batch_losses(zip_, batch), batch_losses(zip_, silent(batch))
    assert loud.keys() == quiet.keys() == {"text", "speech", CHOICE}
    assert all(loud.values()) and not any(quiet.values())


@torch.no_grad()
def test_a_choice_counts_as_a_token_where_nats_are_told_of_each() -> None:
    zip_, task = chooser(1), Task.parse("text -> answer:text|speech")
    rows = [{"text": [3, 4], "speech": [5]}, {"text": [6], "answer": [7, 8, 9]}]
    samples = [task.segments(row) for row in rows]
    batch = collate(samples, zip_.ends(), company=task.company)
    total = sum(float(loss) for loss in batch_losses(zip_, batch).values())
    each = per_token(lambda batch: batch_losses(zip_, batch), [batch])
    # One token and its end, three and theirs; twice what comes and that it is over.
    assert each == pytest.approx(total / (2 + 4 + 2 * 2))


def test_all_and_one_by_name_is_no_choice() -> None:
    for wrong in "text|*", "*|speech":
        with pytest.raises(ZipperError, match="is no choice"):
            lanes([wrong])
