"""The baseline: one decoder, one stream, from outside like a zip. Held against transformers' own
forward on a stream that is built here token by token, and to the laws of a zip that do not speak of
links.
"""

import copy
import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import (
    ENDS,
    LAYERS,
    SEED,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Row,
    assert_close,
    by_token,
    draw,
    is_the_greedy_answer,
    lay,
    number,
    packed_is_separate,
    steps_are_the_whole,
    unchecked,
    zipped,
)
from torch import Tensor

from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.generation import generate
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.strand import Segment, collate
from zipper.tasks import ASR, TTS
from zipper.testing import FAMILIES, tiny_tower
from zipper.tower import Strand, Tower
from zipper.training import train
from zipper_lab.baseline import Baseline, BaselineConfig, Extend

ADDED = ("speech", "image")
SHIFT = {
    "text": 0,
    "speech": 31,
    "image": 31 + 23,
}  # the blocks of ids, by hand from laws.VOCABULARY
# Untied; learned positions, tied; windows, tied.
few_families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])


def text_tower(family: str = "llama") -> Any:
    return tiny_tower(family, SEED["text"], WIDTH["text"], LAYERS["text"], VOCABULARY["text"])


def speech_tower(width: int = WIDTH["speech"], family: str = "llama") -> Any:
    return tiny_tower(family, SEED["speech"], width, LAYERS["speech"], VOCABULARY["speech"])


def extended(family: str = "llama", added: Sequence[str] = ADDED, **options: Any) -> Baseline:
    """A baseline of one's own; those without options are copies of one that was built before."""
    if not options:
        return copy.deepcopy(_plain(family, tuple(added)))
    return _built(family, added, options)


@cache
def _plain(family: str, added: tuple[str, ...]) -> Baseline:
    return _built(family, added, {})


def _built(family: str, added: Sequence[str], options: dict[str, Any]) -> Baseline:
    names = {"text", *added}
    return Baseline.from_tower(
        {"text": text_tower(family)},
        {name: VOCABULARY[name] for name in added},
        ends={name: ENDS[name] for name in names},
        tokens={name: TOKENS[name] for name in names},
        **options,
    )


def rows(
    seed: int, n: int = 4, towers: Sequence[str] = ("text", *ADDED)
) -> list[list[tuple[str, int]]]:
    dice = random.Random(seed)
    return [draw(dice, towers, dice.randint(2, 6)) for _ in range(n)]


def said_of_one_stream(model: Baseline, row: Row) -> dict[tuple[int, int, int], Tensor]:
    """What transformers' own forward says of each token of one document, when all of them stand in
    one list."""
    ids = torch.tensor(
        [[SHIFT[token.tower] + token.id for token in sorted(row, key=lambda token: token.time)]]
    )
    logits = model.tower("text")(ids).logits[0]
    return {
        (0, 0, token.time): logits[token.time, SHIFT[token.tower] :][: VOCABULARY[token.tower]]
        for token in row
    }


# At birth.


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_birth_the_old_ids_are_untouched_and_a_tied_head_stays_tied(family: str) -> None:
    bare, model = text_tower(family), extended(family, positions=400)
    ids = torch.randint(VOCABULARY["text"], (2, 20), generator=torch.Generator().manual_seed(0))
    # A longer head may be summed in another order.
    assert torch.allclose(
        model({"text": Strand.alone(ids)})["text"], bare(ids).logits, rtol=0, atol=1e-5
    )
    grown, n = model.tower("text"), VOCABULARY["text"]
    embedding, head = grown.get_input_embeddings().weight, grown.get_output_embeddings().weight
    assert torch.equal(embedding[:n], bare.get_input_embeddings().weight)
    assert torch.equal(head[:n], bare.get_output_embeddings().weight)
    assert len(embedding) == len(head) == sum(VOCABULARY[name] for name in ("text", *ADDED))
    assert (head is embedding) == (
        bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    )
    assert (head is embedding) or not torch.equal(head[n:], embedding[n:])
    assert model.tower("speech") is grown


def test_new_rows_are_drawn_with_the_mean_and_the_spread_of_the_old_ones() -> None:
    tower = text_tower()
    with torch.no_grad():
        tower.get_input_embeddings().weight.mul_(torch.linspace(0.1, 3, WIDTH["text"])).add_(
            torch.linspace(-5, 5, WIDTH["text"])
        )
    model = Baseline.from_tower({"text": tower}, {"sound": 20_000}, ends={"sound": (0, 1)})
    old, new = tower.get_input_embeddings().weight, model.new_parameters()["embedding"]
    assert torch.allclose(new.mean(0), old.mean(0), atol=0.1)
    assert torch.allclose(new.std(0), old.std(0), rtol=0.05)


@pytest.mark.parametrize("width", [8, 16])
def test_rows_from_a_tower_keep_their_distances_where_there_is_room(width: int) -> None:
    speech = speech_tower(width)
    model = extended(rows={"speech": speech})
    start, stop = SHIFT["speech"], SHIFT["image"]
    for part in ("get_input_embeddings", "get_output_embeddings"):
        theirs = getattr(speech, part)().weight
        table = getattr(model.tower("text"), part)().weight
        old, new = table[:start], table[start:stop]
        ratio = torch.pdist(new) / torch.pdist(theirs)
        assert torch.allclose(ratio, ratio.mean(), rtol=1e-3)
        assert torch.allclose(new.mean(0), old.mean(0), atol=1e-4)
        assert torch.allclose(
            (new - new.mean(0)).square().mean(), (old - old.mean(0)).square().mean(), rtol=1e-3
        )
    assert not torch.equal(
        extended().new_parameters()["embedding"], model.new_parameters()["embedding"]
    )


def test_rows_from_a_wider_tower_keep_what_the_best_lower_rank_keeps() -> None:
    speech = speech_tower(width=24)
    new = extended(rows={"speech": speech}).new_parameters()["embedding"][: VOCABULARY["speech"]]
    theirs = speech.get_input_embeddings().weight
    ours, wanted = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (new, theirs))
    values, vectors = torch.linalg.eigh(wanted)
    best = (vectors[:, -WIDTH["text"] :] * values[-WIDTH["text"] :]) @ vectors[
        :, -WIDTH["text"] :
    ].T
    assert torch.allclose(ours / ours.trace(), best / best.trace(), atol=1e-5)


@few_families
def test_a_baseline_of_the_size_of_a_zip_has_its_parameters_and_the_function_of_its_tower(
    family: str,
) -> None:
    zip_ = zipped({"text": family, "speech": "llama"})
    wanted = sum(p.numel() for p in zip_.parameters())
    model = extended(family, ["speech"], parameters=wanted)
    found = sum(p.numel() for p in model.parameters())
    assert abs(found - wanted) <= 0.02 * wanted
    assert found > 1.2 * sum(p.numel() for p in extended(family, ["speech"]).parameters()), (
        "there was nothing to add"
    )
    ids = torch.randint(VOCABULARY["text"], (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = text_tower(family)(ids).logits
        assert torch.allclose(model({"text": Strand.alone(ids)})["text"], logits, rtol=0, atol=1e-4)


def test_neurons_that_were_added_learn() -> None:
    model = extended(added=["speech"], parameters=60_000).train()
    strands = lay([number(row) for row in rows(0, towers=("text", "speech"))])
    model.hidden(strands)["text"].sum().backward()
    gate = model.tower("text").model.layers[0].mlp
    assert gate.down_proj.weight.grad[:, 2 * WIDTH["text"] :].abs().min() > 0


# One stream.


@few_families
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_its_logits_are_those_of_one_stream(family: str, left: bool) -> None:
    model = extended(family)
    batch = [number(row) for row in rows(1)]
    strands = lay(batch, left)
    wanted = {
        (r, 0, t): v
        for r, row in enumerate(batch)
        for (_, _, t), v in said_of_one_stream(model, row).items()
    }
    assert_close(by_token(strands, model(strands)), wanted, 1e-5)
    backwards = dict(reversed(strands.items()))
    assert_close(by_token(strands, model(backwards)), wanted, 1e-5)


@few_families
def test_packed_rows_and_padding_change_nothing(family: str) -> None:
    packed_is_separate(extended(family), rows(2))


def test_what_stands_in_padding_is_never_read() -> None:
    model = extended("gpt2")
    strands = lay([number(row) for row in rows(3)])
    other = {
        name: Strand(
            *(
                torch.where(s.document >= 0, x, fill)
                for x, fill in ((s.ids, 2), (s.position, 999), (s.time, 999))
            ),
            s.document,
        )
        for name, s in strands.items()
    }
    assert_close(by_token(other, model(other)), by_token(strands, model(strands)), 1e-5)


@few_families
@pytest.mark.parametrize("size", [1, 7])
def test_reading_in_steps_is_reading_the_whole(family: str, size: int) -> None:
    model = extended(family)
    steps_are_the_whole(model, rows(4), size)
    steps_are_the_whole(model, rows(5), size, left=True, shuffle=1)


@torch.no_grad()
def test_a_compact_cache_has_no_gaps() -> None:
    model = extended()
    state = model.start(["text", "speech"], ["text"])
    for row in ([("text", 3)] * 4, [("speech", 2)] * 2):
        _, state = model.step(lay([number(row), number(row[:1])]), state)
    assert state.past.length == 6
    other = model.step(lay([number([("text", 3)] * 3), number([("text", 3)])]), state)[1].compact(
        "speech"
    )
    assert (
        other.past.length == 9 and other.select(torch.tensor([1])).compact("text").past.length == 3
    )


@torch.no_grad()
def test_nothing_later_and_no_other_document_is_seen() -> None:
    model = extended()
    strands = lay(
        [[token for document, row in enumerate(rows(6, 2)) for token in number(row, document)]]
    )
    before = by_token(strands, model(strands))
    times = sorted(time for _, document, time in before if document == 0)
    for time in times:
        changed = {}
        for name, s in strands.items():
            hidden = (s.document != 0) | (s.time > time)
            changed[name] = dataclasses.replace(
                s, ids=torch.where(hidden, (s.ids + 1) % VOCABULARY[name], s.ids)
            )
        after = by_token(strands, model(changed))
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert not {key for key in moved if key[1] == 0 and key[2] <= time}
        # The control: a token that changed changes what is said of it.
        assert time == times[-1] or (0, 0, time + 1) in moved


# One softmax, and logits of one modality.


def test_the_loss_is_of_one_softmax_over_all_ids() -> None:
    model = extended()
    row = number(rows(7, 1)[0])
    strands = lay([row])
    hidden = model.hidden(strands)
    ids = torch.tensor([[SHIFT[token.tower] + token.id for token in row]])
    whole = model.tower("text")(ids).logits[0].log_softmax(-1)
    for name, h in hidden.items():
        targets = torch.randint(
            VOCABULARY[name], strands[name].ids.shape, generator=torch.Generator().manual_seed(1)
        )
        found = model.nll(name, h, targets)
        wanted = -whole[strands[name].time[0], SHIFT[name] + targets[0]]
        assert torch.allclose(found[0], wanted, atol=1e-5)
        own = model.unembed(name, h).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        assert (found > -own).all(), "the ids of other modalities have no share in the softmax"


def test_only_what_is_asked_for_comes_back_and_nothing_else_may_be_asked_for() -> None:
    model = extended()
    strands = lay([number([("text", 1), ("speech", 2), ("text", 3)])])
    assert list(model.hidden(strands, ["text"])) == ["text"]
    with pytest.raises(ZipperError, match=r"outputs \['image'\] read nothing"):
        model(strands, ["image"])
    with pytest.raises(ZipperError, match=r"\['image'\] are not in this plan"):
        model.step({"image": strands["text"]}, model.start(["text"], ["text"]))


# Generation.


@pytest.mark.parametrize(
    "plan",
    [
        (["speech"], ["text"]),
        (["text", "speech"], ["speech", "text", "image"]),
        ([], ["speech", "text"]),
    ],
)
def test_it_produces_the_greedy_answer_alone_and_in_a_batch(
    plan: tuple[list[str], list[str]],
) -> None:
    given, outputs = plan
    model, dice, limits = extended("gpt2"), random.Random(0), dict.fromkeys(("text", *ADDED), 9)
    prompts = [[Segment(t, [i for _, i in draw(dice, [t], 1, 6)]) for t in given] for _ in range(4)]
    together = generate(model, prompts, outputs, Sampling(), limits)
    for prompt, found in zip(prompts, together, strict=True):
        is_the_greedy_answer(model, prompt, outputs, limits, found)
        alone = model.generate(prompt, outputs, limits=limits)
        assert [s.content for s in alone] == [s.content for s in found]


def test_a_segment_holds_ids_of_its_modality_only() -> None:
    model = extended()
    with torch.no_grad():
        model.tower("text").lm_head.weight[: SHIFT["speech"]] *= 100  # would rather say text
    prompts = [[Segment("text", [3, 4])]] * 8
    said = [
        segment.content
        for (segment,) in generate(
            model, prompts, ["speech"], Sampling(temperature=2.0), {"speech": 20}
        )
    ]
    ids = {i for content in said for i in content}
    assert len(ids) > 5 and ids <= {*range(VOCABULARY["speech"])} - {*ENDS["speech"]}


def test_all_modalities_share_the_positions() -> None:
    tower = {"text": tiny_tower("gpt2", width=16, layers=1, positions=16)}
    small, large = (
        Baseline.from_tower(tower, {"speech": 9}, {"speech": (0, 1)}, positions=p) for p in (0, 24)
    )
    prompt = [Segment("text", [5] * 6), Segment("speech", [5] * 4)]
    with pytest.raises(ZipperError, match="can read at most 16"):
        small.check([*prompt, Segment("speech", [5])])
    with pytest.raises(ZipperError, match="14 of 16 tokens are read: no room"):
        small.limit("speech", {"text": 8, "speech": 6})
    assert large.limit("speech", {"text": 8, "speech": 6}, 100) == 8
    (said,) = large.generate(prompt, ["speech"], limits={"speech": 100})
    assert len(said.content) <= 8
    with torch.no_grad():
        table, old = (
            m.get_parameter("transformer.wpe.weight") for m in (large.tower("text"), tower["text"])
        )
    assert torch.equal(table[:16], old)


# Learning.


def test_it_learns_pairs_that_follow_a_rule() -> None:
    torch.manual_seed(0)
    text, units = tiny.text(), tiny.units()
    model = Baseline.from_tower(
        {"text": tiny.tower(text)},
        {"speech": units.vocabulary},
        ends={"speech": (units.begin, units.end)},
    ).train()
    samples = [
        [
            task.segments({"text": text.encode(row["text"]), "speech": row["speech"]})
            for row in tiny.pairs(24)
        ]
        for task in (ASR, TTS)
    ]
    batches = [collate(some, model.ends()) for some in samples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss() -> Tensor:
        each = []
        for batch, name in zip(batches, ("text", "speech"), strict=True):
            hidden = model.hidden(batch.strands, [name])[name]
            each.append(
                (model.nll(name, hidden, batch.targets[name]) * batch.weights[name]).sum()
                / batch.weights[name].sum()
            )
        return sum(each) / 2

    before = float(loss().detach())
    for _ in range(30):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss().detach()) < 0.5 * before
    assert model.tower("text").lm_head.weight is model.tower("text").model.embed_tokens.weight


def test_it_is_trained_resumed_and_used_like_a_zip(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Killed

    torch.manual_seed(0)
    world = tiny.world(tmp_path / "world")
    extend = Extend("text", rows=("speech",), parameters=40_000)
    options = {
        "steps": 4,
        "eval_every": 4,
        "save_every": 2,
        "log_every": 1,
        "corrupt": {"speech": 0.1},
    }
    whole, cut = (world.config(tmp_path / name, **options) for name in ("whole", "cut"))
    pipe = train(whole, build=extend)
    with pytest.raises(Killed):
        train(cut, report=kill, build=extend)
    wanted = pipe.model.state_dict()
    found = train(cut, resume=True, build=extend).model.state_dict()
    assert wanted.keys() == found.keys() and all(
        torch.equal(wanted[name], found[name]) for name in wanted
    )
    assert isinstance(Pipeline.from_pretrained(tmp_path / "whole" / "model").model, Baseline)
    assert abs(sum(p.numel() for p in pipe.model.parameters()) - 40_000) < 200
    (said,) = pipe.run([Segment("text", "call anna")], [pipe.voice("low")], limits={"speech": 5})
    assert isinstance(said.content, Audio)
    with pytest.raises(ZipperError, match="single decoder"):
        _ = pipe.zip

    still = {"start": str(tmp_path / "whole" / "model"), "steps": 1, "lr_tower": 0.0}
    on = train(world.config(tmp_path / "on", **still), build=extend).model.state_dict()
    assert all(torch.equal(wanted[name], on[name]) for name in wanted)
    with pytest.raises(ZipperError, match=r"extends 'text' by .*, this recipe 'speech' by"):
        train(world.config(tmp_path / "other", **still), build=Extend("speech"))


# On disk.


@few_families
def test_a_saved_one_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    model = extended(family, parameters=80_000, rows={"speech": speech_tower()}, positions=300)
    model.save_pretrained(tmp_path / "model", record={"step": 3})
    again = Baseline.from_pretrained(tmp_path / "model")
    strands = lay([number(row) for row in rows(8)])
    with torch.no_grad():
        wanted, found = by_token(strands, model(strands)), by_token(strands, again(strands))
    assert_close(found, wanted, 0.0)
    assert again.ends() == model.ends() and again.limit("text", {"speech": 9}) == model.limit(
        "text", {"speech": 9}
    )
    assert [*again.config.towers] == ["text", "speech", "image"] and not again.training
    again.save_pretrained(tmp_path / "again")
    assert (
        Baseline.from_pretrained(tmp_path / "again", torch.bfloat16).tower("text").dtype
        == torch.bfloat16
    )


def test_a_zip_is_no_baseline_and_a_baseline_no_zip(tmp_path: Path) -> None:
    extended().save_pretrained(tmp_path / "baseline")
    zipped({"text": "llama", "speech": "llama"}, train=("text", "speech")).save_pretrained(
        tmp_path / "zip"
    )
    with pytest.raises(ZipperError, match="not the configuration of a zip"):
        Zipper.from_pretrained(tmp_path / "baseline")
    with pytest.raises(ZipperError, match="not the configuration of a baseline"):
        Baseline.from_pretrained(tmp_path / "zip")


def test_a_damaged_one_is_refused_and_so_is_a_decoder_of_other_ids(tmp_path: Path) -> None:
    model = extended()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "zipper.json"
    path.write_text(path.read_text().replace('"vocabulary": 23', '"vocabulary": 22'))
    with pytest.raises(ZipperError, match="damaged"):
        Baseline.from_pretrained(tmp_path / "model")
    fewer = {name: tower for name, tower in model.config.towers.items() if name != "image"}
    with pytest.raises(
        ZipperError, match=r"knows 71 ids, its modalities \['speech', 'text'\] have 54"
    ):
        Baseline(Tower(model.tower("text")), BaselineConfig(fewer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"added": {"text": 5}}, "one tower by other modalities"),
        ({"ends": {}}, r"No begin and end token is known for \['speech'\]"),
        ({"ends": {"speech": (0, 23)}}, "23 that begins or ends 'speech' is outside its 23 ids"),
        ({"tokens": {"sound": 3.0}}, r"tokens names \['sound'\]"),
        ({"rows": {"speech": tiny_tower("llama", vocabulary=17)}}, "has 17 ids, not 23"),
        (
            {"rows": {"text": tiny_tower("llama")}},
            r"rows names \['text'\]; it can name \['speech'\] here",
        ),
        ({"parameters": 100}, "has 1[0-9]+ already"),
        (
            {"added": {"speech": 23, "Speech": 4}, "ends": {"speech": (0, 1), "Speech": (0, 1)}},
            "'Speech' cannot name",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"added": {"speech": 23}, "ends": {"speech": (0, 14)}} | options
    with pytest.raises(ZipperError, match=message):
        Baseline.from_tower({"text": text_tower()}, **given)


def test_a_tower_whose_feed_forward_cannot_be_widened_is_refused() -> None:
    with pytest.raises(
        ZipperError, match=r"Phi3ForCausalLM cannot be extended: .* Leave out parameters"
    ):
        extended("phi3", parameters=80_000)  # its two halves of one matrix do not stand in a corner


def test_ids_out_of_range_and_unknown_modalities_are_refused() -> None:
    model = extended()
    with pytest.raises(ZipperError, match="holds the id 23; its ids go from 0 to 22"):
        model.check([Segment("speech", [3, 23])])
    with unchecked(), pytest.raises(ZipperError, match="no tower 'sound'"):
        model.check([Segment("sound", [3])])
