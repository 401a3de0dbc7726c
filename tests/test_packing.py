"""Packed rows: full, level, the same every time, and to the model the same as its samples one by
one."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from laws import ENDS, LLAMAS, SMALL, VOCABULARY, draw, lay, number, zipped
from torch import Tensor

from zipper import lockstep
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.strand import Batch, Ends, Segment, Target, collate
from zipper.training import Objective
from zipper.training.packing import lengths, pack

Sample = list[Segment]


def librispeech(n: int, seed: int) -> list[dict[str, int]]:
    """Utterances with the shape of its training parts, as 50 units and about 3.3 tokens of text a
    second: most between 11 and 17 seconds, the others anywhere below."""
    dice = random.Random(seed)
    seconds = [
        dice.triangular(10, 16.7, 15) if dice.random() < 0.7 else dice.uniform(1.5, 11)
        for _ in range(n)
    ]
    return [
        {"speech": round(50 * s) + 2, "text": round(3.3 * s * dice.gauss(1, 0.12)) + 2}
        for s in seconds
    ]


def padding(
    samples: Sequence[Mapping[str, int]], rows: Sequence[Sequence[int]], tower: str
) -> float:
    """The share of a tower's slots that hold nothing, every row being as long as the longest."""
    used = [sum(samples[i][tower] for i in row) for row in rows]
    return 1 - sum(used) / (max(used) * len(used))


@pytest.mark.parametrize("room", [{"speech": 4096}, {"speech": 2048, "text": 240}], ids=str)
def test_less_than_5_percent_of_librispeech_is_padding_where_a_fifth_was(
    room: dict[str, int],
) -> None:
    for seed in range(20):
        samples = librispeech(64, seed)
        rows = pack(samples, room)
        assert sorted(i for row in rows for i in row) == list(range(64))
        for tower in ("speech", "text"):
            assert (
                padding(samples, rows, tower)
                < 0.05
                < 0.15
                < padding(samples, [[i] for i in range(64)], tower)
            )
            assert max(sum(samples[i][tower] for i in row) for row in rows) <= room.get(
                tower, 1 << 30
            )


def test_rows_are_as_few_as_can_be_and_the_same_whatever_the_order_of_the_towers() -> None:
    samples = [{"speech": n} for n in (5, 4, 4, 3, 3, 3, 2)]
    assert sorted(
        sum(samples[i]["speech"] for i in row) for row in pack(samples, {"speech": 12})
    ) == [12, 12]
    mixed = librispeech(40, 0)
    turned = [dict(reversed(sample.items())) for sample in mixed]
    room = {"speech": 2048, "text": 250}
    assert pack(mixed, room) == pack(turned, dict(reversed(room.items())))


@pytest.mark.parametrize(
    ("tokens", "room"),
    [
        # By their order alone they would fill four rows.
        ([(8, 1), (2, 1), (2, 3), (8, 6)], 9),
        # Of two rows that would be as full, the one with less in both towers.
        ([(7, 2), (3, 9), (4, 6), (6, 7), (9, 9)], 10),
        # One moves, in exchange for nothing.
        ([(1, 3), (5, 2), (8, 9), (9, 4)], 15),
    ],
)
def test_a_few_samples_lie_as_well_as_the_best_of_all_ways(
    tokens: list[tuple[int, int]], room: int
) -> None:
    samples = [{"speech": speech, "text": text} for speech, text in tokens]
    counts = np.array(tokens)

    def shares(place: Sequence[int], rows: int) -> Any:
        """Of every row and tower, in shares of all."""
        return np.eye(rows)[list(place)].T @ counts / counts.sum(0)

    rows = pack(samples, {"speech": room})
    assert len(rows) == -(-counts[:, 0].sum() // room)  # there cannot be fewer
    ways = product(range(len(rows)), repeat=len(samples))
    fullest = [shares(way, len(rows)).max() for way in ways]
    found = max((counts[row].sum(0) / counts.sum(0)).max() for row in rows)
    assert found == pytest.approx(min(fullest))


def test_a_tower_of_which_nothing_is_read_takes_no_room() -> None:
    room = {"speech": 5, "text": 1}
    assert pack([{"speech": 5, "text": 0}] * 2, room) == [[0], [1]]
    assert pack([{"speech": 5}, {"text": 1}], room) == [[0, 1]]


def test_a_tower_with_little_room_makes_more_rows() -> None:
    samples = [{"speech": 10, "text": 4}] * 6
    assert [len(row) for row in pack(samples, {"speech": 60})] == [6]
    assert [len(row) for row in pack(samples, {"speech": 60, "text": 8})] == [2, 2, 2]
    assert [len(row) for row in pack(samples, {"speech": 30, "text": 8})] == [2, 2, 2]
    assert pack([], {"speech": 60}) == []


def test_a_sample_without_room_is_named() -> None:
    with pytest.raises(
        ZipperError, match=r"Sample 1 has 9 tokens of 'text', a row has room for 8\."
    ):
        pack([{"text": 8}, {"text": 9}], {"text": 8})


def test_lengths_count_the_begin_and_the_end_of_every_segment() -> None:
    sample = [Segment("speech", [1, 2]), Target("text", [3], 1.0), Segment("speech", [])]
    batch = collate([sample], {name: Ends(0, 1) for name in ("speech", "text")})
    assert (
        lengths(sample)
        == {name: strand.ids.shape[1] for name, strand in batch.strands.items()}
        == {"speech": 6, "text": 3}
    )


def samples_of(dice: random.Random, towers: Sequence[str], n: int) -> list[Sample]:
    """Samples of one to four segments, some of which carry a loss."""
    made = []
    for _ in range(n):
        sample: Sample = []
        for tower, i in draw(dice, towers, dice.randint(1, 4)):
            if sample and sample[-1].tower == tower and dice.random() < 0.8:
                sample[-1] = dataclasses.replace(sample[-1], content=[*sample[-1].content, i])
            else:
                sample.append(Target(tower, [i], dice.choice([0.0, 1.0, 0.5])))
        made.append(sample)
    return made


def losses(model: Zipper, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per tower the summed loss, and the gradient of their sum by every parameter that learns."""
    found = Objective(model)(batches)
    learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([*found.values()]).sum()
    if not total.requires_grad:  # samples of frozen towers alone
        return found, {name: torch.zeros_like(p) for name, p in learn.items()}
    gradients = torch.autograd.grad(
        total, [*learn.values()], allow_unused=True, materialize_grads=True
    )
    return found, dict(zip(learn, gradients, strict=True))


def packed_is_one_by_one(seed: int) -> None:
    """The same losses and gradients, and no bit of a document hangs on its neighbours."""
    dice = random.Random(seed)
    three = seed % 2
    model = zipped(
        dict.fromkeys(["text", "speech", "image"][: 2 + three], "llama")
        if seed % 3
        else {"text": "gpt2", "speech": "llama"},
        train=[[], ["text"], ["text", "speech"]][seed % 3],
        input_projection=["residual", "none", "paper"][seed % 3],
        link=SMALL,
    )
    towers = list(model.config.towers)
    ends = {name: Ends(*ENDS[name]) for name in towers}
    samples = samples_of(dice, towers, dice.randint(2, 6))
    samples.append([Target(towers[0], [3], 1.0)])  # something to predict in every case
    rows = pack(
        [lengths(sample) for sample in samples], dict.fromkeys(towers, dice.randint(30, 60))
    )
    batch = collate(samples, ends, packed=rows)

    found, gradients = losses(model, [batch])
    wanted, true = losses(model, [collate([sample], ends) for sample in samples])
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert abs(value - wanted[name]) <= 2e-6 * abs(wanted[name]), (
            f"the loss of {name!r} is {value}, not {wanted[name]}"
        )
    scale = max(float(gradient.abs().max()) for gradient in true.values())
    for name, gradient in gradients.items():
        assert (gradient - true[name]).abs().max() <= 1e-5 * scale, (
            f"the gradient by {name} is another one"
        )

    row = max(range(len(rows)), key=lambda r: len(rows[r]))
    kept = dice.randrange(len(rows[row]))
    other = {}
    for name, strand in batch.strands.items():
        mine = (strand.document == kept) & (torch.arange(len(rows)) == row)[:, None]
        other[name] = dataclasses.replace(
            strand, ids=torch.where(mine, strand.ids, (strand.ids + 5) % VOCABULARY[name])
        )
    with torch.no_grad():
        before, after = model(batch.strands), model(other)
    for name, strand in batch.strands.items():
        assert torch.equal(
            before[name][row][strand.document[row] == kept],
            after[name][row][strand.document[row] == kept],
        )


@pytest.mark.parametrize("seed", range(18))
def test_packed_is_separate(seed: int) -> None:
    packed_is_one_by_one(seed)


@pytest.mark.slow
def test_packed_is_separate_300_times() -> None:
    for seed in range(300):
        packed_is_one_by_one(seed)


@torch.no_grad()
def test_flexattention_says_what_the_dense_mask_says() -> None:
    """Forward only: on a CPU it has no backward."""
    dice = random.Random(0)
    model = zipped(LLAMAS)
    samples = samples_of(dice, ["text", "speech"], 7)
    ends = {name: Ends(*ENDS[name]) for name in LLAMAS}
    for rows in ([[0, 1, 2], [3, 4, 5, 6]], None):
        batch = collate(samples, ends, packed=rows)
        model.attention = "sdpa"
        dense = model(batch.strands)
        model.attention = "flex"
        for name, logits in model(batch.strands).items():
            valid = batch.strands[name].document >= 0
            assert (logits[valid] - dense[name][valid]).abs().max() < 2e-6 * dense[name][
                valid
            ].abs().max()


@torch.no_grad()
def test_flexattention_is_not_asked_where_something_is_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zipped(LLAMAS)
    model.attention = "flex"
    monkeypatch.setattr(lockstep, "block_mask", lambda mask: pytest.fail("a mask of blocks"))
    strands = lay([number([("speech", 3), ("speech", 4), ("text", 5)])])
    state = model.start(["speech", "text"], ["text"])
    for name in ("speech", "text"):
        said, state = model.step({name: strands[name]}, state)
    assert said["text"].isfinite().all()


@pytest.mark.slow  # `make gpu` runs it, on a real one
@torch.no_grad()
def test_losses_on_a_gpu_are_those_of_the_cpu(cuda: torch.device) -> None:
    model, there = (zipped(LLAMAS, train=["speech"]) for _ in range(2))
    there.to(cuda)
    samples, ends = (
        samples_of(random.Random(0), ["text", "speech"], 6),
        {name: Ends(*ENDS[name]) for name in LLAMAS},
    )
    for rows in (None, pack([lengths(sample) for sample in samples], {"text": 40, "speech": 40})):
        batch = collate(samples, ends, packed=rows)
        wanted, found = Objective(model)([batch]), Objective(there)([batch.to(cuda)])
        assert {name: float(loss) for name, loss in found.items()} == pytest.approx(
            {name: float(loss) for name, loss in wanted.items()}, rel=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flexattention_learns_what_the_dense_mask_learns(
    dtype: torch.dtype, gpu: torch.device
) -> None:
    """Forwards and backwards, rows that see nothing among them; heads of 16, the least that its
    kernel takes."""
    model = zipped(LLAMAS, train=["text", "speech"], link=LinkConfig(width=32, head_width=16)).to(
        gpu
    )
    samples, ends = (
        samples_of(random.Random(0), ["text", "speech"], 7),
        {name: Ends(*ENDS[name]) for name in LLAMAS},
    )
    for rows in ([[0, 1, 2], [3, 4, 5, 6]], [[0, 1, 2, 3, 4], [5, 6]], None):
        batch = collate(samples, ends, packed=rows).to(gpu)
        found = []
        for attention in ("sdpa", "flex"):
            model.attention = attention
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                found.append(losses(model, [batch]))
        (dense, truth), (flexed, gradients) = found
        near = 1e-4 if dtype == torch.float32 else 0.02
        for name, loss in dense.items():
            assert float(flexed[name]) == pytest.approx(float(loss), rel=near)
        scale = max(float(gradient.abs().max()) for gradient in truth.values())
        for name, gradient in gradients.items():
            assert (
                gradient.isfinite().all()
                and (gradient - truth[name]).abs().max() <= 5 * near * scale
            ), name
