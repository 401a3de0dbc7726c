"""A tower is never harmed: what a plan of one modality runs is the bare tower, and training leaves
no trace in a frozen one."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import laws
import pytest
import tiny
import torch
from tiny import World
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import SHIPPED, Pipeline
from zipper.strand import Segment, collate
from zipper.testing import FAMILIES, tiny_tower
from zipper.tower import Strand, Tower
from zipper.training import build, train
from zipper_lab.corpora import commands as corpus

DTYPES = (torch.float32, torch.bfloat16)
MOST = 12  # tokens that are generated


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def continued(tower: Any, prompt: list[int], begin: int, end: int) -> list[int]:
    """What transformers' own greedy generation writes after a given segment, up to its end; a
    segment begins once."""
    ids = torch.tensor([[begin, *prompt, end, begin]])
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": MOST,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    found = tower.generate(
        ids, attention_mask=torch.ones_like(ids), suppress_tokens=[begin], **settings
    )[0].tolist()
    written = found[ids.shape[1] :]
    return written[: written.index(end)] if end in written else written


def assert_continued(tower: Any, prompt: list[int], written: list[int]) -> None:
    """That transformers writes the same. In bfloat16 its kernel for one token rounds otherwise than
    ours on some CPUs; then each token must be the likeliest by the bare model's own full pass, or
    within a step of bfloat16 of it."""
    wanted = continued(tower, prompt, 0, 1)
    if written == wanted or tower.dtype == torch.float32:
        assert written == wanted
        return
    said = written if len(written) == MOST else [*written, 1]
    logits = tower(torch.tensor([[0, *prompt, 1, 0, *said[:-1]]]), use_cache=False).logits
    logits = logits[0, -len(said) :].float()
    logits[:, 0] = -torch.inf  # a segment begins once
    best = logits.max(-1).values
    assert (best - logits[range(len(said)), said] <= 2**-7 * best.abs()).all(), (written, wanted)


# --- the unimodal path


class Untouchable(nn.Module):
    """Stands where nothing may run."""

    def forward(self, *_: object) -> None:
        """Says that it did."""
        raise AssertionError("something ran beside the tower")


def alone(family: str, dtype: torch.dtype) -> Zipper:
    """A zip whose links, projections and second tower cannot run."""
    towers = {
        "text": tiny_tower(family, dtype=dtype, vocabulary=31),
        "speech": tiny_tower("gpt2", 1, dtype=dtype),
    }
    zipped = Zipper.from_towers(
        towers, train=["speech"], link=LinkConfig(head_width=8, gate_init=1.0)
    )
    zipped.towers["speech"] = Untouchable()
    for modules in (zipped.links, zipped.inputs):
        for name in modules:
            modules[name] = Untouchable()
    return zipped


@contextmanager
def running() -> Iterator[Counter[nn.Module]]:
    """Inside, every module that has no parts and runs is counted."""
    ran: Counter[nn.Module] = Counter()
    handle = register_module_forward_hook(
        lambda module, *_: ran.update([] if list(module.children()) else [module])
    )
    try:
        yield ran
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_one_modality_is_the_bare_tower_and_nothing_else_runs(
    family: str, dtype: torch.dtype
) -> None:
    zipped = alone(family, dtype)
    ids = torch.randint(2, 31, (3, 20), generator=torch.Generator().manual_seed(0))
    document = torch.zeros_like(ids)
    document[1, :4] = document[2, :9] = -1
    padded = Strand.alone(ids, document)
    with torch.inference_mode():
        with running() as bare:
            wanted = zipped.tower("text")(ids, use_cache=False).logits
        with running() as zip_ran:
            found = zipped({"text": Strand.alone(ids)})["text"]
        assert torch.equal(found, wanted)
        for module in [m for m in bare if "Rotary" in type(m).__name__]:
            # transformers 5.5 makes Gemma's angles twice over, which are needed once.
            assert 0 < zip_ran.pop(module, 0) <= bare.pop(module)
        assert zip_ran == bare and len(bare) > 10
        wanted = zipped.tower("text")(
            ids, attention_mask=(document >= 0).long(), position_ids=padded.position
        ).logits
        assert torch.equal(zipped({"text": padded})["text"][document >= 0], wanted[document >= 0])
        for row in ids.tolist():
            prompt = row[: 3 + row[0] % 9]
            (segment,) = zipped.generate([Segment("text", prompt)], ["text"], limits={"text": MOST})
            assert_continued(zipped.tower("text"), prompt, segment.content)


# --- training


def trained(world: World, folder: Path, steps: int) -> tuple[Zipper, Zipper]:
    """The very model that was in the loop, with everything on that might creep into a tower, and a
    copy from before the first step.

    The pipeline that `train` returns would prove nothing: it has loaded its frozen tower from the
    base again.
    """
    models: list[Zipper] = []

    class Kept:
        course: Mapping[str, Any] = {}

        def __call__(self, *given: Any) -> Zipper:
            models.extend([model := build(*given), copy.deepcopy(model)])
            return models[0]

    config = world.config(
        folder,
        steps=steps,
        eval_every=steps // 2,
        save_every=steps,
        link=LinkConfig(head_width=16, gate_init=0.6, dropout=0.2),
        input_projection="residual",
        weight_decay=0.1,
        corrupt={"text": 0.1, "speech": 0.1},
    )
    train(config, build=Kept())
    model, before = models
    return model, before


@pytest.mark.parametrize("steps", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_training_leaves_no_trace_in_a_frozen_tower(
    world: World, tmp_path: Path, steps: int
) -> None:
    model, before = trained(world, tmp_path / "run", steps)
    text, original = tower_of(model, "text"), Tower.load(world.folder / "text" / "tower")
    assert text.digest() == tower_of(before, "text").digest() == original.digest()
    prompts = [tiny.text().encode(row["text"]) for row in tiny.pairs(20, seed=5)]
    assert written(model, "text", prompts) == [
        continued(original.model, p, *model.ends()["text"]) for p in prompts
    ]
    # The control: all that may learn has learned.
    assert tower_of(model, "speech").digest() != tower_of(before, "speech").digest()
    old = before.new_parameters()
    assert not any(
        torch.equal(parameter, old[name]) for name, parameter in model.new_parameters().items()
    )


def tower_of(model: Zipper, name: str) -> Tower:
    tower = model.towers[name]
    assert isinstance(tower, Tower)
    return tower


def written(model: Zipper, name: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations by a plan of one tower."""
    return [
        model.generate([Segment(name, prompt)], [name], limits={name: MOST})[0].content
        for prompt in prompts
    ]


# --- the shipped model


def test_the_shipped_text_tower_is_the_one_that_was_pre_trained() -> None:
    pipeline = Pipeline.from_pretrained()
    model, original = pipeline.zip, Tower.load(SHIPPED / "towers" / "text").model.float()
    prompts = [
        pipeline.modalities["text"].encode(utterance.text)
        for utterance in corpus.sentences("test", 20)
    ]
    begin, end = model.ends()["text"]
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([[begin, *prompt, end]])
            assert torch.equal(
                model({"text": Strand.alone(ids)})["text"], original(ids, use_cache=False).logits
            )
    assert written(model, "text", prompts) == [
        continued(original, prompt, begin, end) for prompt in prompts
    ]


@torch.inference_mode()
def agreement(
    pipeline: Pipeline, utterances: list[corpus.Utterance], reads: bool = True
) -> tuple[int, int]:
    """How often the likeliest token of cached decoding is that of one full forward, and of how
    many; both ways, speech and text.

    reads: or else the cached way is not told what the other tower read, and must fail.
    """
    model, same, total = pipeline.zip, 0, 0
    for utterance in utterances:
        said = {
            "text": pipeline.modalities["text"].encode(utterance.text),
            "speech": pipeline.units.encode(corpus.synthesize(utterance)),
        }
        for given, produced in (("text", "speech"), ("speech", "text")):
            strands = collate(
                [[Segment(name, said[name]) for name in (given, produced)]], model.ends()
            ).strands
            full = model(strands)[produced][0].argmax(-1).tolist()
            state = model.start((given, produced), (produced,))
            if reads:
                _, state = model.step({given: strands[given]}, state)
            for slot, wanted in enumerate(full):
                one = Strand(
                    *(
                        getattr(strands[produced], f.name)[:, slot : slot + 1]
                        for f in dataclasses.fields(Strand)
                    )
                )
                hidden, state = model.step({produced: one}, state)
                same += int(model.unembed(produced, hidden[produced]).argmax()) == wanted
            total += len(full)
    return same, total


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_cached_decoding_in_16_bits_says_what_one_forward_says(dtype: torch.dtype) -> None:
    pipeline, utterances = Pipeline.from_pretrained(dtype=dtype), corpus.sentences("test", 7)
    with laws.unchecked():  # twice as fast
        same, total = agreement(pipeline, utterances)
        deaf, fewer = agreement(pipeline, utterances[:2], reads=False)
    assert total >= 500 and same >= 0.99 * total
    assert deaf < 0.9 * fewer
