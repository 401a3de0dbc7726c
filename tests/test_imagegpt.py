"""ImageGPT zipped: a tower whose head cannot say where a picture ends, and the colours it reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from zipper import loss, modality
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.generation import Engine, Request
from zipper.link import LinkConfig
from zipper.modality.image import Image, ImageConfig
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.reading import Stepwise
from zipper.sampling import Sampling, Search
from zipper.strand import Ends, Segment, collate
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.towers.families import drawn
from zipper.training import TrainConfig, train
from zipper.verify import verify

COLOURS, SIDE = 12, 4
SMALL = LinkConfig(head_width=8)
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TEXT = Text.train(["a red one", "a blue one"], merges=10)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as openai/imagegpt-small is one: the model, and the colours of its processor."""
    folder = tmp_path_factory.mktemp("imagegpt")
    config = ImageGPTConfig(vocab_size=COLOURS + 1, n_positions=40, n_embd=16, n_layer=2, n_head=2)
    drawn(lambda: ImageGPTForCausalImageModeling(config), 0).save_pretrained(folder)
    clusters = np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3))
    settings = {"clusters": clusters.tolist(), "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def pipeline(hub: Path) -> Pipeline:
    towers = {"text": tiny_tower("llama", vocabulary=TEXT.vocabulary), "image": str(hub)}
    model = Zipper.from_towers(
        towers, ends={"text": (TEXT.begin, TEXT.end)}, train=["image"], link=SMALL
    )
    return Pipeline(model, {"text": TEXT, "image": Image.from_imagegpt(hub)})


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_every_promise_is_kept_whatever_the_head_cannot_say(pipeline: Pipeline) -> None:
    model = pipeline.model
    assert model.ends()["image"] == Ends(COLOURS, COLOURS)  # sos begins and, where read, ends
    checks = verify(model)
    assert [check.promise for check in checks if not check.held] == []
    tower = model.towers["image"]
    assert isinstance(tower, Tower) and tower.vocabulary == COLOURS + 1
    strands = collate([[Segment("image", [1, 2])]], model.ends()).strands
    assert model(strands)["image"].shape[-1] == COLOURS


def test_a_picture_made_is_whole_and_its_end_is_its_length(pipeline: Pipeline) -> None:
    segment = Segment("text", "a red one")
    ((made,), (drawn_one,)) = (
        pipeline.run([segment], ["image"], Sampling(temperature=heat, guidance=guidance))
        for heat, guidance in ((0.0, 1.0), (1.0, 1.5))
    )
    assert made.ended and drawn_one.ended and made.content.size == (SIDE, SIDE)
    written, _ = pipeline.run([segment], ["image", "text"])  # text reads the whole picture
    assert written.ended
    prompt = [Segment("text", TEXT.encode("a red one"))]
    ((whole,),) = pipeline.generate([prompt], ["image"], Sampling())
    request = pipeline.asked([segment], ["image"])
    assert len(whole.content) == SIDE**2 and request.limits == {"image": SIDE**2}
    ((five,),) = pipeline.generate([prompt], ["image"], Sampling(), {"image": 5})
    assert len(five.content) == 5
    engine = Engine(pipeline.model, Stepwise(pipeline.model), 1)
    searched = engine.submit(Request(prompt, ["image"], limits={"image": 5}, search=Search(3)))
    while engine.step():
        pass
    assert len(searched.segments()[0].content) == 5 and searched.segments()[0].ended


def test_what_no_head_can_say_costs_nothing_and_moves_nothing() -> None:
    head, states = torch.nn.Linear(4, COLOURS), torch.randn(3, 4, requires_grad=True)
    each = loss.nll(head, states, torch.tensor([1, COLOURS, 2]), COLOURS + 1)
    each.sum().backward()
    assert each[1] == 0 and not states.grad[1].any() and (each[[0, 2]] > 0).all()


def test_a_saved_zip_and_its_colours_load_again(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "zip", include=["text"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    given = [Segment("image", picture(0))]
    for each in again.model.parameters():  # of a file: on some CPUs the last bit of a product
        each.data = each.data.clone()  # hangs on where weights lie
    assert again.run(given, ["text"]) == pipeline.run(given, ["text"])
    kept = modality.load(tmp_path / "zip" / "modalities" / "image")
    assert kept.fingerprint == pipeline.modalities["image"].fingerprint


def test_a_fresh_one_is_pretrained_and_a_saved_one_zipped_by_recipes(
    hub: Path, tmp_path: Path
) -> None:
    colours = Image.fitted(
        [picture(seed) for seed in range(8)], COLOURS, size=(SIDE, SIDE), method="colours"
    )
    assert (colours.begin, colours.end, colours.vocabulary) == (COLOURS, COLOURS, COLOURS + 1)
    assert colours.codebook.shape == (COLOURS, 3) and colours.length == SIDE**2
    modality.save(colours, tmp_path / "colours")
    TEXT.save(tmp_path / "text")
    rows = [{"text": "a red one", "image": colours.encode(picture(seed))} for seed in range(8)]
    manifests.write(tmp_path / "rows.jsonl", rows)
    shape = {"model_type": "imagegpt", "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}
    common: dict[str, Any] = {"data": str(tmp_path / "rows.jsonl"), "steps": 2, "batch": 4}
    common |= {"warmup": 1, "trackers": (), "dev": str(tmp_path / "rows.jsonl")}
    places = {"image": str(tmp_path / "colours")}
    alone = {"towers": {"image": shape}, "tasks": {"-> image": 1.0}, "modalities": dict(places)}
    train(TrainConfig(output=str(tmp_path / "alone"), **alone, **common))
    tower = tmp_path / "alone" / "model" / "towers" / "image"
    both = {"image": str(tower), "text": {"model_type": "llama", **LLAMA}}
    places |= {"text": str(tmp_path / "text")}
    tasks = {"text -> image": 0.5, "image -> text": 0.5}
    beside = {
        "towers": both,
        "tasks": tasks,
        "modalities": places,
        "link": SMALL,
        "train": ("text",),
    }
    train(TrainConfig(output=str(tmp_path / "zip"), **beside, **common))
    zipped = Pipeline.from_pretrained(tmp_path / "zip" / "model")
    (made,) = zipped.run([Segment("text", "a blue one")], ["image"])
    assert made.ended and made.content.size == (SIDE, SIDE)


def test_a_row_less_makes_room_for_begin_and_end(hub: Path) -> None:
    image = Image.from_imagegpt(hub, size=(SIDE - 1, SIDE))
    assert image.config.grid == (SIDE - 1, SIDE) and image.length == 12
    with pytest.raises(ZipperError, match="a colour is that of one"):
        ImageConfig(4, 4, method="colours", patch=2)
