"""Inspection: what `show` says is what is there; an attention map is what the links do."""

from pathlib import Path

import pytest
import tiny
import torch
from tiny import World

from zipper.inspection import attention, describe, table
from zipper.link import Link
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sequence import Segment, collate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> Pipeline:
    return Pipeline.from_pretrained(world.zip)


def test_a_model_is_described_as_it_is(world: World, pipe: Pipeline) -> None:
    found = describe(pipe, world.zip)
    counts = {name: sum(p.numel() for p in pipe.model.tower(name).parameters()) for name in ("text", "speech")}
    added = sum(p.numel() for name, p in pipe.model.named_parameters() if not name.startswith("towers."))
    assert found["parameters"] == counts["text"] + counts["speech"] + added
    assert found["new_parameters"] == added
    assert found["trained_parameters"] == counts["speech"] + added
    assert found["bytes_on_disk"] == sum(len(path.read_bytes()) for path in world.zip.rglob("*") if path.is_file())
    assert found["junctions"] == [{"text": 1, "speech": 1}]
    gate = round(float(torch.tanh(torch.tensor(0.6))), 4)
    both = {"attention": gate, "feedforward": gate}
    assert found["links"] == {"0:text>speech": both, "0:speech>text": both}
    text, speech = found["towers"]["text"], found["towers"]["speech"]
    assert text["parameters"] == counts["text"]
    assert (text["trained"], speech["trained"]) == (False, True)
    assert (text["vocabulary"], speech["vocabulary"]) == (42, 28)
    assert (text["voices"], speech["voices"]) == ([], ["low", "high"])
    assert (text["family"], text["blocks"], text["width"]) == ("llama", 2, 32)
    assert text["source"] == str(world.folder / "text" / "tower")


def test_the_table_says_the_same(world: World, pipe: Pipeline) -> None:
    found = describe(pipe, world.zip)
    said = table(found)
    for part in (
        str(world.zip),
        f"{found['parameters']:,} parameters",
        f"{found['bytes_on_disk'] / 1e6:.1f} MB",
        "frozen",
        "trained",
        "voices: low, high",
        f"{found['new_parameters']:,} new parameters",
        "0: text after block 1, speech after block 1",
        "text -> speech",
        "attention +0.537, feed-forward +0.537",
        found["towers"]["text"]["digest"][:12],
    ):
        assert part in said


def test_an_attention_map_is_the_mean_over_heads_and_junctions(pipe: Pipeline, tmp_path: Path) -> None:
    towers = {name: tiny.tower(modality, layers=4) for name, modality in pipe.modalities.items()}
    model = Zipper.from_towers(towers, every={"text": 1, "speech": 1}, link=tiny.LinkConfig(head_width=16, gate_init=0.6))
    strands = collate([[Segment("text", [3, 4, 5]), Segment("speech", [7, 8, 9, 10]), Segment("text", [6])]], model.ends()).strands
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
    # The six speech tokens come after the first five of text and before the last three: they see five each.
    assert speech.shape == (6, 8)
    assert (speech[:, :5] > 0).all()
    assert (speech[:, 5:] == 0).all()
    torch.testing.assert_close(speech.sum(1), torch.ones(6))
    text = attention(model, strands, source="speech", target="text")
    assert text.shape == (8, 6)
    assert (text[:5] == 0).all()  # nothing was said before
    torch.testing.assert_close(text[5:].sum(1), torch.ones(3))
