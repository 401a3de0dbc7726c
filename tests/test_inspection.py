"""Inspection: what `show` says is what is there; an attention map is what the links do."""

import copy
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import World

from zipper.audio.sound import Audio
from zipper.data.manifests import encode
from zipper.errors import ZipperError
from zipper.inspection import (
    activity,
    attention,
    describe,
    gradient_norms,
    log_samples,
    parts,
    samples,
)
from zipper.inspection import text as as_text
from zipper.link import Link, LinkConfig
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.strand import Segment, Target, collate
from zipper.tasks import ASR, Task
from zipper.training import Objective


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> Pipeline:
    return Pipeline.from_pretrained(world.zip)


def test_a_model_is_described_as_it_is(world: World, pipe: Pipeline) -> None:
    found = describe(pipe, world.zip)
    counts = {
        name: sum(p.numel() for p in pipe.model.tower(name).parameters())
        for name in ("text", "speech")
    }
    added = sum(
        p.numel() for name, p in pipe.model.named_parameters() if not name.startswith("towers.")
    )
    assert found["parameters"] == counts["text"] + counts["speech"] + added
    assert found["new_parameters"] == added
    assert found["trained_parameters"] == counts["speech"] + added
    assert found["bytes_on_disk"] == sum(
        len(path.read_bytes()) for path in world.zip.rglob("*") if path.is_file()
    )
    assert found["junctions"] == [{"text": 1, "speech": 1}]
    gate = round(float(torch.tanh(torch.tensor(0.6))), 4)
    both = {"shown": 1, "fused": 1, "attention": gate, "feedforward": gate}
    assert found["links"] == {"0:text>speech": both, "0:speech>text": both}
    text, speech = found["towers"]["text"], found["towers"]["speech"]
    assert text["parameters"] == counts["text"]
    assert (text["trained"], speech["trained"]) == (False, True)
    assert (text["vocabulary"], speech["vocabulary"]) == (42, 28)
    assert (text["voices"], speech["voices"]) == ([], ["low", "high"])
    assert (text["family"], text["blocks"], text["width"]) == ("llama", 2, 32)
    assert text["source"] == str(world.folder / "text" / "tower")


def test_the_text_says_the_same(world: World, pipe: Pipeline) -> None:
    found = describe(pipe, world.zip)
    said = as_text(found)
    for part in (
        str(world.zip),
        f"{found['parameters']:,} parameters",
        f"{found['bytes_on_disk'] / 1e6:.1f} MB",
        "frozen",
        "trained",
        "voices low, high",
        f"{found['new_parameters']:,} new parameters",
        "0: text after block 1, speech after block 1",
        "text -> speech",
        "attention +0.537, feed-forward +0.537",
        found["towers"]["text"]["digest"][:12],
    ):
        assert part in said


def test_an_attention_map_is_the_mean_over_heads_and_junctions(
    pipe: Pipeline, tmp_path: Path
) -> None:
    towers = {name: tiny.tower(modality, layers=4) for name, modality in pipe.modalities.items()}
    model = Zipper.from_towers(
        towers, every={"text": 1, "speech": 1}, link=tiny.LinkConfig(head_width=16, gate_init=0.6)
    )
    strands = collate(
        [[Segment("text", [3, 4, 5]), Segment("speech", [7, 8, 9, 10]), Segment("text", [6])]],
        model.ends(),
    ).strands
    seen: dict[str, list[torch.Tensor]] = {}
    original = Link.attention

    def watched(self: Link, *given: torch.Tensor) -> torch.Tensor:
        found = original(self, *given)
        seen.setdefault("weights", []).append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "attention", watched)
        speech = attention(model, strands, source="text", target="speech")
    assert len(seen["weights"]) == 3  # junctions
    torch.testing.assert_close(speech, sum(seen["weights"]) / 3)
    # The six speech tokens come after the first five of text and before the last three: they see
    # five each.
    assert speech.shape == (6, 8)
    assert (speech[:, :5] > 0).all()
    assert (speech[:, 5:] == 0).all()
    torch.testing.assert_close(speech.sum(1), torch.ones(6))
    text = attention(model, strands, source="speech", target="text")
    assert text.shape == (8, 6)
    assert (text[:5] == 0).all()  # nothing was said before
    torch.testing.assert_close(text[5:].sum(1), torch.ones(3))
    with pytest.raises(ZipperError, match="'text' reads 'text' by no link"):
        attention(model, strands, source="text", target="text")


def test_parts_hold_every_parameter_that_trains_once(pipe: Pipeline) -> None:
    found = parts(pipe.zip)
    assert set(found) == {
        "tower speech",
        "links text>speech",
        "links speech>text",
        "gates",
        "input text",
        "input speech",
    }
    listed = [p for some in found.values() for p in some]
    assert len(listed) == len({*map(id, listed)})
    assert {*map(id, listed)} == {id(p) for p in pipe.zip.parameters() if p.requires_grad}
    assert sum(p.numel() for p in found["gates"]) == 4  # two links, attention and feed-forward


def test_what_chooses_is_a_part(pipe: Pipeline) -> None:
    model = copy.deepcopy(pipe.zip)
    before = parts(model)
    model.choose(["speech", "text"])
    added = {name: some for name, some in parts(model).items() if name not in before}
    assert set(added) == {"chooser speech", "chooser text"}
    assert {*map(id, chain(*added.values()))} == {*map(id, model.choosers.parameters())}


def test_an_adapter_is_a_part() -> None:
    towers = {
        name: tiny.tower(modality)
        for name, modality in (("text", tiny.text()), ("speech", tiny.units()))
    }
    lora = {"text": {"r": 2, "target_modules": ["q_proj"]}}
    model = Zipper.from_towers(
        towers, lora=lora, link=LinkConfig(head_width=16), input_projection="none"
    )
    found = parts(model)
    assert set(found) == {"adapter text", "links text>speech", "links speech>text", "gates"}
    assert sum(p.numel() for p in found["adapter text"]) == 2 * 2 * (32 + 32)


def test_gradient_norms_are_those_of_the_parts_and_add_up_to_the_whole(
    pipe: Pipeline, world: World
) -> None:
    model = pipe.zip
    batch = collate([[Segment("speech", [7, 8, 9]), Target("text", [3, 4, 5], 1.0)]], model.ends())
    assert set(gradient_norms(model).values()) == {0.0}  # no backward yet
    sum(Objective(model)([batch]).values()).backward()
    found = gradient_norms(model)
    by_hand = {
        part: math.sqrt(sum(float(p.grad.square().sum()) for p in some if p.grad is not None))
        for part, some in parts(model).items()
    }
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert found["links text>speech"] == 0.0  # speech came first and saw nothing
    assert found["tower speech"] > 0
    whole = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(
        float(whole), rel=1e-5
    )
    model.zero_grad()


def test_activity_is_what_a_link_adds_as_a_share_of_the_stream(pipe: Pipeline) -> None:
    model = pipe.zip
    batch = collate([[Segment("speech", [7, 8, 9]), Target("text", [3, 4, 5], 1.0)]], model.ends())
    added: dict[str, torch.Tensor] = {}
    original = Link.forward

    def watched(self: Link, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        out = original(self, x, *given)
        added["share"] = (out.norm(dim=-1) / x.norm(dim=-1)).mean()
        return out

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Link, "forward", watched)
        model.hidden(batch.strands)
    found = activity(model, [batch])
    assert found["0:speech>text"].share == pytest.approx(float(added["share"]), rel=1e-5)
    assert (found["0:speech>text"].seen, found["0:text>speech"].seen) == (5, 0)
    assert found["0:speech>text"].attention == pytest.approx(math.tanh(0.6))


class Page:
    """A tracker, and its writer, that keep what they are given."""

    def __init__(self, name: str) -> None:
        self.name, self.writer = name, self
        self.texts: dict[str, str] = {}
        self.sounds: dict[str, tuple[int, int]] = {}

    def log(self, values: dict[str, str], step: int) -> None:
        self.texts |= values

    def add_audio(self, tag: str, heard: torch.Tensor, step: int, sample_rate: int) -> None:
        assert heard.ndim == 2
        assert abs(heard).max() <= 1
        self.sounds[tag] = (step, sample_rate)


def test_samples_say_what_was_given_wanted_and_made(pipe: Pipeline, world: World) -> None:
    raw = tiny.pairs(2, seed=3)
    rows = [encode(row, pipe.modalities, world.folder, "here") for row in raw]
    tts = Task.parse("text -> voice~speech")
    found = samples(pipe, [ASR, tts], rows)
    assert len(found) == 2 * 2 * 3
    assert found["speech -> text/1/wanted text"] == raw[1]["text"]
    assert found["text -> voice~speech/0/given text"] == raw[0]["text"]
    assert (
        found["speech -> text/0/made text"]
        == pipe.run([Segment("speech", rows[0]["speech"])], ["text"])[0].content
    )
    given = found["speech -> text/0/given speech"]
    assert isinstance(given, Audio)
    np.testing.assert_array_equal(given.samples, pipe.units.decode(raw[0]["speech"]).samples)
    pages = [Page("tensorboard"), Page("another")]
    log_samples(pages, found, step=7, modalities=pipe.modalities)
    texts = {f"sample/{name}" for name in found}
    assert pages[0].texts["sample/speech -> text/0/given speech"].endswith(" s of sound")
    assert [{*page.texts} for page in pages] == [texts, texts]
    assert pages[0].sounds["sample/speech -> text/0/given speech"] == (7, given.rate_hz)
    assert not pages[1].sounds
