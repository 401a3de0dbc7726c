"""Plan: the formulas count what torch counts when a step is taken, and the memory that a step
takes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import zipped
from tiny import World
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from zipper import cli
from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.link import PAPER_LINK, LinkConfig
from zipper.model import Zipper
from zipper.strand import Batch, Segment, Target, collate
from zipper.tasks import Task
from zipper.testing import tiny_tower
from zipper.training import Objective
from zipper.training.cost import Cost, Load, cost, matmul_rate, memory, plan, text
from zipper_lab.baseline import Baseline

SMALL = LinkConfig(head_width=8)
FAMILIES = {"text": "gpt2", "speech": "llama"}
SAMPLES = 3
ASR = (("speech", 17, 0.0), ("text", 6, 1.0))
TTS = (("text", 6, 0.0), ("speech", 17, 1.0))
TURNS = (("text", 4, 0.0), ("speech", 9, 0.0), ("text", 5, 1.0), ("speech", 6, 1.0))
ALONE = (("speech", 12, 1.0),)


def batch_of(
    model: Zipper | Baseline, segments: Sequence[tuple[str, int, float]], samples: int = SAMPLES
) -> Batch:
    """Samples of one layout: (tower, tokens with begin and end, loss weight)."""
    sample = [Target(tower, [2] * (tokens - 2), weight) for tower, tokens, weight in segments]
    return collate([sample] * samples, model.ends())


def step(model: Zipper | Baseline, batch: Batch) -> None:
    """Forward and backward as training does them."""
    sum(Objective(model).train()([batch]).values()).backward()


def counted(model: Zipper | Baseline, batch: Batch) -> tuple[float, float]:
    """Operations that torch counts in a step: in products of matrices, and in attention, which runs
    as products of batches."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, batch)
    counts = counter.get_flop_counts()
    found = {str(name).removeprefix("aten."): float(n) for name, n in counts["Global"].items()}
    assert found.keys() <= {"mm", "addmm", "bmm", "baddbmm"}
    # Older transformers make the angles of rotary positions by a product of vectors.
    angles = sum(sum(n.values()) for part, n in counts.items() if part.endswith("rotary_emb"))
    attention = found["bmm"] + found.get("baddbmm", 0.0) - angles
    return found["mm"] + found.get("addmm", 0.0), attention


def planned(found: Cost) -> tuple[float, float]:
    """The same by the formulas."""
    attention = sum(work.both for part, work in found.work.items() if part.endswith("attention"))
    return found.flops - attention, attention


def dense(model: Zipper | Baseline, load: Load) -> Load:
    """The load of kernels that multiply every token with every other one of its row, seen or not. A
    zip skips a tower of which nothing is seen; a baseline has but one stream."""
    each = {name: count / SAMPLES for name, count in load.tokens.items()}
    own = {name: SAMPLES * n * n for name, n in each.items()}
    pairs = [pair for pair, seen in load.seen.items() if seen or isinstance(model, Baseline)]
    return dataclasses.replace(
        load, own=own, seen={(a, b): SAMPLES * each[a] * each[b] for a, b in pairs}
    )


def baseline() -> Baseline:
    return Baseline.from_tower(
        {"text": tiny_tower("llama", width=32)},
        {"speech": 23},
        {"text": (0, 1), "speech": (0, 1)},
        positions=128,
    )


def zip_of(**options: Any) -> Callable[[], Zipper]:
    return lambda: zipped(FAMILIES, {"text": 2, "speech": 1}, **options)


MODELS: dict[str, Callable[[], Zipper | Baseline]] = {
    "all trained": zip_of(train=("text", "speech"), input_projection="none"),
    "speech trained": zip_of(train=("speech",), input_projection="none"),
    "text trained": zip_of(train=("text",), input_projection="none"),
    "all frozen": zip_of(input_projection="none"),
    "all frozen, projected inputs": zip_of(),
    "as the paper": zip_of(
        preset="paper", link=dataclasses.replace(PAPER_LINK, head_width=8), train=("speech",)
    ),
    "a projected input": lambda: zipped(
        {"text": "llama", "speech": "llama"}, input_projection={"text": "residual"}
    ),
    "bare links": zip_of(
        link=LinkConfig(head_width=8, projection_depth=0, feedforward=0.0, width=24),
        input_projection="none",
    ),
    "baseline": baseline,
}
LEARNS_ALONE = (
    "all trained",
    "speech trained",
    "as the paper",
    "baseline",
)  # there is something to train in the speech tower
CASES = [(name, segments) for name in MODELS for segments in (ASR, TTS, TURNS)] + [
    (name, ALONE) for name in LEARNS_ALONE
]


@pytest.mark.parametrize(("name", "segments"), CASES)
def test_the_formulas_count_what_torch_counts(
    name: str, segments: Sequence[tuple[str, int, float]]
) -> None:
    # Torch counts products as kernels compute them: attention of every token with every other one,
    # where the formulas count what is read. Given the load of such kernels they agree to the last
    # operation.
    model = MODELS[name]()
    batch = batch_of(model, segments)
    load = Load.of([batch])
    products, attention = counted(model, batch)
    assert planned(cost(model, dense(model, load))) == pytest.approx(
        (products, attention), rel=1e-9
    )
    assert planned(cost(model, load))[0] == pytest.approx(products, rel=1e-9)
    assert planned(cost(model, load))[1] < attention


def test_an_adapter_costs_its_own_products_and_the_way_back() -> None:
    lora = {"speech": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    model = Zipper.from_towers(
        {name: tiny_tower("llama", n) for n, name in enumerate(FAMILIES)},
        lora=lora,
        link=SMALL,
        input_projection="none",
    )
    for segments in (ASR, TTS):
        batch = batch_of(model, segments)
        products, _ = counted(model, batch)
        assert planned(cost(model, Load.of([batch])))[0] == pytest.approx(products, rel=0.03)


@pytest.mark.parametrize(
    ("options", "segments", "blocks"),
    [
        # gpt2 reads at junctions after blocks 2 and 4 of 5, llama after 1 and 2 of 4.
        (
            {"train": ("speech",)},
            TTS,
            {"text": (4, 0), "speech": (4, 4)},
        ),  # a frozen source keeps no graph and stops early
        (
            {"train": ("speech",)},
            ASR,
            {"speech": (2, 2), "text": (5, 3)},
        ),  # a frozen target: none below its first junction
        ({"train": ("text",)}, ASR, {"speech": (2, 0), "text": (5, 5)}),
        ({}, TTS, {"text": (4, 0), "speech": (4, 3)}),
        (
            {"input_projection": "residual"},
            TTS,
            {"text": (4, 4), "speech": (4, 4)},
        ),  # something trains under every block
    ],
)
def test_blocks_that_see_nothing_trainable_build_no_graph(
    options: dict[str, Any],
    segments: Sequence[tuple[str, int, float]],
    blocks: dict[str, tuple[int, int]],
) -> None:
    model = zip_of(**{"input_projection": "none"} | options)()
    assert cost(model, Load.of([batch_of(model, segments)])).blocks == blocks


def test_a_load_counts_tokens_and_what_they_see_packed_or_not() -> None:
    model = zip_of()()
    some = [
        [Segment("speech", [2] * 5), Target("text", [2] * 2, 1.0)],
        [Segment("text", [2] * 7), Target("speech", [2] * 3, 1.0), Target("text", [2], 1.0)],
    ]
    apart = Load.of([collate(some, model.ends())])
    # The first: 7 speech tokens, 4 of text that see them all. The second: 9 of text, 5 of speech, 3
    # of text.
    assert apart.samples == 2
    assert apart.tokens == {"speech": 7 + 5, "text": 4 + 9 + 3}
    assert apart.targets == {"speech": 4, "text": 3 + 2}
    assert apart.own == {"speech": 7 * 8 / 2 + 5 * 6 / 2, "text": 4 * 5 / 2 + 12 * 13 / 2}
    assert apart.seen == {("speech", "text"): 4 * 7 + 3 * 5, ("text", "speech"): 5 * 9}
    assert Load.of([collate(some, model.ends(), packed=[[1, 0]])]) == apart
    assert Load.of(collate([sample], model.ends()) for sample in some) == apart
    assert (apart * 2.0).seen == {("speech", "text"): 2 * 43, ("text", "speech"): 2 * 45}


def test_weights_gradients_and_optimizer_are_counted_to_the_byte() -> None:
    model = zip_of(train=("speech",))()
    batch = batch_of(model, TTS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, batch_of(model, ASR))
    step(model, batch)  # so that every part has a gradient
    optimizer.step()
    found = memory(model, cost(model, Load.of([batch])))
    held = [*model.parameters(), *model.buffers()]
    assert found["weights"] == sum(t.numel() * t.element_size() for t in held)
    assert found["gradients"] == sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )
    assert found["optimizer"] == sum(
        t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values()
    )
    assert found["copies"] == 0
    assert found["total"] == sum(size for part, size in found.items() if part != "total")


def kept(model: Zipper, batch: Batch) -> int:
    """Bytes that autograd holds between forward and backward, weights apart."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            # Alive, so that no other tensor comes to lie there.
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(hold, lambda tensor: tensor):
        losses = Objective(model).train()([batch])
    assert losses
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


# GPT-2: dropout masks, a GELU of many products.
@pytest.mark.parametrize(("family", "factor"), [("llama", 1.2), ("gpt2", 2.0)])
@pytest.mark.parametrize("train", [(), ("text",), ("speech",), ("text", "speech")])
def test_activations_are_estimated_within_a_factor(
    family: str, factor: float, train: tuple[str, ...]
) -> None:
    towers = {"text": tiny_tower(family, 1, width=64), "speech": tiny_tower(family, 2, width=128)}
    model = Zipper.from_towers(
        towers, train=train, link=LinkConfig(head_width=16, gate_init=0.5), input_projection="none"
    )
    for segments in (
        [("speech", 92, 0.0), ("text", 26, 1.0)],
        [("text", 26, 0.0), ("speech", 92, 1.0)],
    ):
        batch = batch_of(model, segments)
        found = memory(model, cost(model, Load.of([batch])))
        assert 1 / factor < (found["activations"] + found["logits"]) / kept(model, batch) < factor


def test_half_precision_halves_activations_and_adds_copies_of_matrices() -> None:
    model = zip_of(train=("speech",))()
    found = cost(model, Load.of([batch_of(model, TTS)]))
    whole, half = memory(model, found), memory(model, found, "bf16")
    assert half["activations"] == whole["activations"] / 2
    assert half["copies"] == 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert half["weights"] == whole["weights"]
    model.cast(torch.bfloat16)
    assert memory(model, found, "bf16")["copies"] == 0


def test_recomputed_blocks_keep_what_they_are_given_and_one_of_them_the_rest() -> None:
    model = zip_of(train=("speech",), input_projection="none")()
    load = Load.of([batch_of(model, TTS)])
    whole, again = cost(model, load), cost(model, load, recompute=True)
    # Llama blocks of width 24 train: what they keep is the same in all four, and counts once
    # instead of four times.
    assert whole.kept - again.kept == pytest.approx(
        4 * again.again - 4 * 24 * load.tokens["speech"]
    )
    assert memory(model, again)["activations"] < memory(model, whole)["activations"]
    assert (again.work, again.blocks) == (whole.work, whole.blocks)


class Work(TorchFunctionMode):
    """Tells the time by the operations of products: `rate` a second, ten times as long where other
    work comes between."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.seconds, self.products, self.largest = rate, 0.0, 0, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.matmul:
            operations = 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
            self.products, self.largest = self.products + 1, max(self.largest, operations)
            self.seconds += operations / self.rate * (10 if self.products % 2 else 1)
        return function(*args, **kwargs or {})


def test_the_matmul_rate_is_the_best_of_products_and_takes_no_longer_than_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_rng_state()
    with Work(1e12) as clock:
        monkeypatch.setattr("zipper.training.cost.time.perf_counter", lambda: clock.seconds)
        assert matmul_rate(256, 256, 256, seconds=0.1) == pytest.approx(1e12)
    assert torch.equal(torch.get_rng_state(), before), "it is measured in the middle of a run"
    assert clock.largest == 2 * 256**3
    with Work(1e9) as slow:
        monkeypatch.setattr("zipper.training.cost.time.perf_counter", lambda: slow.seconds)
        assert matmul_rate(1 << 20, 64, 64, torch.bfloat16, seconds=0.05) == pytest.approx(1e9)
    assert slow.seconds < 0.5 < 2 * 2**20 * 64**2 / 1e9  # fewer rows, where so many would take long


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


def test_a_plan_is_the_mean_over_the_shares_of_the_tasks(world: World) -> None:
    model = Zipper.from_pretrained(world.zip)
    rows = data.read(world.folder / "pairs.jsonl", {"text": tiny.text(), "speech": tiny.units()})
    found = plan(
        model, rows, {"speech -> text": 3.0, "text -> voice~speech": 1.0}, batch=8, steps=100
    )
    asr, tts = found["tasks"].values()
    assert (asr["share"], tts["share"]) == (0.75, 0.25)
    # Two tokens around each segment; the voiced segment has a voice in front.
    mean = {
        name: sum(len(row[name]) + 2 for row in rows) / len(rows) * 8 for name in ("text", "speech")
    }
    mean["voiced"] = mean["speech"] + sum(len(row["voice"]) for row in rows) / len(rows) * 8
    assert asr["tokens"] == pytest.approx({"speech": mean["speech"], "text": mean["text"]})
    assert tts["tokens"] == pytest.approx({"speech": mean["voiced"], "text": mean["text"]})
    assert asr["targets"] == pytest.approx({"speech": 0, "text": mean["text"] - 8})
    every = [
        Load.of([collate([Task.parse("speech -> text").segments(row)], model.ends())])
        for row in rows
    ]
    assert asr["forward"] + asr["backward"] == pytest.approx(
        sum(cost(model, load).flops for load in every) / len(rows) * 8
    )
    assert found["step"]["flops"] == pytest.approx(
        sum(task["share"] * (task["forward"] + task["backward"]) for task in (asr, tts))
    )
    assert found["step"]["tokens"] == pytest.approx(
        0.75 * sum(asr["tokens"].values()) + 0.25 * sum(tts["tokens"].values())
    )
    pace = found["time"]
    assert pace["seconds"] == pytest.approx(
        100 * found["step"]["flops"] / (pace["matmul_rate"] * pace["efficiency"])
    )
    assert found["parameters"]["trained"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    said = text(found)
    for part in (
        "frozen",
        "trained",
        f"{found['parameters']['trained']:,} trained",
        "100 steps",
        "GFLOP/s",
    ):
        assert part in said
    with pytest.raises(ZipperError, match="no rows to plan with"):
        plan(model, [], {"speech -> text": 1.0}, batch=8, steps=100)


def test_train_plan_prints_the_plan_and_trains_nothing(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"tiny.World(Path({str(world.folder)!r})).config(Path('run'))"
    (tmp_path / "recipe.py").write_text(
        f"import tiny\nfrom pathlib import Path\ndef config():\n    return {config}\n"
    )
    assert cli.main(["train", "recipe.py", "--plan", "--json", "--set", "steps=7"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["time"]["steps"], found["step"]["samples"]) == (7, 4)
    # Speech reads the embeddings of text, which is silent: none of its blocks runs.
    assert [*found["tasks"]["text -> voice~speech"]["blocks"]] == ["speech"]
    assert cli.main(["train", "recipe.py", "--plan", "--json", "--set", "shows=null"]) == 0
    paper = json.loads(capsys.readouterr().out)
    assert paper["tasks"]["text -> voice~speech"]["blocks"]["text"] == {"run": 1, "graph": 0}
    assert cli.main(["train", "recipe.py", "--plan", "--set", "shows=null"]) == 0
    said = capsys.readouterr().out
    assert "6 steps" in said
    assert "text       1 blocks run, no graph" in said
    assert not (tmp_path / "run").exists()
