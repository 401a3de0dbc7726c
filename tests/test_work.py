"""Only the work that matters is done: no graph where nothing learns, no logits that nobody asked
for, and never many at once."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws import ENDS, LLAMAS, VOCABULARY, WIDTH, zipped
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from zipper import loss
from zipper.config import LinkKey
from zipper.lockstep import Tap
from zipper.model import Zipper
from zipper.strand import Batch, Ends, Segment, Target, collate
from zipper.testing import tiny_tower
from zipper.training import Objective
from zipper_lab.baseline import Baseline

JUNCTIONS = [{"text": 2, "speech": 1}, {"text": 3, "speech": 2}]
IDS = {name: Ends(*ENDS[name]) for name in LLAMAS}
ASR = [Segment("speech", [3, 4, 5, 6, 7, 8]), Target("text", [5, 6, 7], 1.0)]
TTS = [Segment("text", [5, 6]), Target("speech", [3, 4, 5, 6], 1.0)]


def zip_of(train: tuple[str, ...] = (), projection: str = "none") -> Zipper:
    """A zip in training mode whose every link is awake."""
    return zipped(LLAMAS, junctions=JUNCTIONS, train=train, input_projection=projection).train()  # type: ignore[arg-type]


def saved(batch: Batch, model: Zipper) -> int:
    """Numbers that autograd keeps for the backward of a batch, parameters left out."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        found = Objective(model)([batch])  # noqa: F841 - what it saved lives as long as it does
    return sum(kept.values())


class Largest(TorchDispatchMode):
    """The largest tensor of so many columns that was made."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        made = isinstance(output, Tensor) and output.ndim > 1 and output.shape[-1] == self.columns
        if made and not function.is_view:
            self.rows = max(self.rows, output.numel() // self.columns)
        return output


@contextmanager
def most(logits: int) -> Iterator[None]:
    """Inside, losses are made of so many logits at once."""
    before, loss.MOST = loss.MOST, logits
    try:
        yield
    finally:
        loss.MOST = before


def graphs(taps: Mapping[LinkKey, Tap], source: str) -> list[bool]:
    """Whether what links are shown of a tower has a gradient, junction by junction."""
    return [tap.source.requires_grad for key, tap in taps.items() if key.source == source]


def test_a_frozen_source_has_no_graph_also_where_links_into_it_learn() -> None:
    taps = zip_of().taps(collate([ASR, ASR[:1]], IDS).strands)
    assert graphs(taps, "speech") == [False, False]
    assert graphs(taps, "text") == [False, True]  # nothing learns below the first junction


def test_a_source_has_a_graph_where_something_upstream_learns() -> None:
    strands = collate([ASR], IDS).strands
    for model in (zip_of(train=("speech",)), zip_of(projection="residual")):
        assert all(graphs(model.taps(strands), "speech"))
    # Speech comes back after the text: it reads, and is read.
    both = collate([[*ASR, *TTS[1:]]], IDS).strands
    assert graphs(zip_of().taps(both), "speech") == [False, True]


def test_what_is_kept_for_the_backward_does_not_grow_with_a_frozen_source_but_by_what_links_read() -> (
    None
):
    """Twice the speech: a frozen source keeps what its links keep; one that learns keeps all of its
    blocks as well."""
    short, long = ([Segment("speech", [3] * n), ASR[1]] for n in (38, 78))
    grows = {}
    for train in ((), ("speech",)):
        model = zip_of(train)
        grows[train] = saved(collate([long], IDS), model) - saved(collate([short], IDS), model)
    assert 0 < grows[()] < grows["speech",] / 3


def test_another_task_in_the_same_step_adds_its_own_work_and_no_more() -> None:
    """The gradients of links that a task cannot use are not even made."""
    model = zip_of()
    batches = {"asr": collate([ASR], IDS), "tts": collate([TTS], IDS)}
    found = {name: Objective(model)([batch]) for name, batch in batches.items()}
    assert {name: list(losses) for name, losses in found.items()} == {
        "asr": ["text"],
        "tts": ["speech"],
    }
    found["asr"]["text"].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {
        name for name, _ in model.named_parameters() if name.startswith("links") and ">text" in name
    }
    both = Objective(model)([*batches.values()])
    assert (
        both["text"].item() == found["asr"]["text"].item()
        and both["speech"].item() == found["tts"]["speech"].item()
    )


def test_what_comes_after_the_last_junction_of_a_given_tower_is_not_run() -> None:
    model = zip_of()
    before = Objective(model)([collate([ASR], IDS)])["text"]
    with torch.no_grad():
        for part in (
            *model._tower("speech").blocks[2:],
            model.tower("speech").get_output_embeddings(),
        ):
            for p in part.parameters():
                p.fill_(torch.nan)
    assert Objective(model)([collate([ASR], IDS)])["text"].item() == before.item()


def test_logits_are_made_only_where_there_is_something_to_predict() -> None:
    with Largest(VOCABULARY["text"]) as seen:
        Objective(zip_of())([collate([ASR, [*ASR[:1], Target("text", [9], 1.0)]], IDS)])
    assert seen.rows == 4 + 2


def pieces(
    model: Any, name: str, hidden: Tensor, targets: Tensor, logits: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Losses made of so many logits at once, the gradients of a weighted sum of them, and the most
    rows of logits in one tensor."""
    leaf = hidden.clone().requires_grad_()
    learn = {"hidden": leaf, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    with (
        most(logits),
        Largest(model._tower(name).vocabulary if isinstance(model, Zipper) else 31 + 23) as seen,
    ):
        found = model.nll(name, leaf, targets)
        weights = torch.linspace(-1, 2, targets.numel()).view_as(targets)
        gradients = torch.autograd.grad(
            (found * weights).sum(), [*learn.values()], allow_unused=True, materialize_grads=True
        )
    return found, dict(zip(learn, gradients, strict=True)), seen.rows


def baseline() -> Baseline:
    tower = tiny_tower("llama", 1, 16, 3, 31)
    return Baseline.from_tower(
        {"text": tower}, {"speech": 23}, {"text": (0, 19), "speech": (0, 14)}
    )


@pytest.mark.parametrize(
    "made",
    [zip_of, lambda: zip_of(train=("text",)), baseline],
    ids="frozen trained baseline".split(),
)
def test_a_loss_in_pieces_is_the_loss_and_never_has_more_logits_than_a_piece(
    made: Callable[[], Any],
) -> None:
    model = made()
    numbers = torch.Generator().manual_seed(0)
    hidden, targets = (
        torch.randn(3, 11, 16, generator=numbers),
        torch.randint(23, (3, 11), generator=numbers),
    )
    wanted, true, rows = pieces(model, "text", hidden, targets, loss.MOST)
    assert rows == 33
    for piece in (1, 4, 32):
        columns = 31 if isinstance(model, Zipper) else 31 + 23
        found, gradients, rows = pieces(model, "text", hidden, targets, piece * columns)
        assert rows == piece
        assert (found - wanted).abs().max() < 1e-6
        for name, gradient in gradients.items():
            assert (gradient - true[name]).abs().max() < 1e-6 * max(
                1.0, float(true[name].abs().max())
            ), name
        with torch.no_grad(), most(piece * columns):
            assert (model.nll("text", hidden, targets) - wanted).abs().max() < 1e-6


def test_of_a_vocabulary_beyond_a_piece_one_token_is_made_at_a_time() -> None:
    hidden, targets = torch.randn(2, 3, 16), torch.randint(23, (2, 3))
    wanted, true, _ = pieces(zip_of(), "text", hidden, targets, loss.MOST)
    found, gradients, rows = pieces(zip_of(), "text", hidden, targets, 5)
    assert rows == 1
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients["hidden"], true["hidden"])


@torch.no_grad()
def test_a_weight_below_0_counts_as_0_and_its_loss_is_looked_at() -> None:
    batch = collate([ASR, [*TTS[:1], Target("text", [9], -2.0)]], IDS)
    model = zip_of()
    with Largest(VOCABULARY["text"]) as seen:
        both = loss.batch_losses(model, batch)
    assert seen.rows == 4 + 2
    alone = loss.batch_losses(model, collate([ASR], IDS))
    assert both.keys() == {"text"} and float(both["text"]) == pytest.approx(float(alone["text"]))
    each = loss.per_token(lambda batch: loss.batch_losses(model, batch), [batch])
    assert each == pytest.approx(float(alone["text"]) / 4)


def test_of_a_large_vocabulary_nothing_is_kept_for_the_backward() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[-1] == VOCABULARY["text"]:
            kept.append(weakref.ref(tensor))
        return tensor

    for train in ((), ("text",)):
        model = zip_of(train)
        for logits, alive in {1 << 20: True, 4 * VOCABULARY["text"]: False}.items():
            kept.clear()
            with most(logits), saved_tensors_hooks(note, lambda tensor: tensor):
                found = model.nll(
                    "text",
                    torch.randn(2, 20, WIDTH["text"], requires_grad=True),
                    torch.zeros(2, 20, dtype=torch.long),
                )
            assert found.requires_grad
            assert any(reference() is not None for reference in kept) == alive
