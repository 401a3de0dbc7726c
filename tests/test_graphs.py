"""Steps of fixed shapes: few of them, whole for torch.compile, and rows of a pool that leave each
other alone."""

import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType

import pretend
import pytest
import torch
from laws import LLAMAS, read_one, zipped
from torch import Tensor

from zipper.errors import ZipperError
from zipper.fast import native, weights
from zipper.fast import reader as fused
from zipper.fast.graphs import Pool, Replay, Shape, above
from zipper.fast.reader import Fused
from zipper.fast.session import Session

NAMES = ["speech", "text"]
#: Kernels that a GPU has, and nobody pretends.
MORE = [(torch.bfloat16, False), (torch.float32, True)] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as on CUDA, by torch."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(weights, "PACKED", set())


def said(fast: Fused, sessions: list[Session]) -> Tensor:
    """Logits of a few steps in which sessions see different things and do not always take part."""
    a, b, c = sessions
    found = []
    read_one(fast, "speech", [(a, [3, 4, 5]), (b, [3])])
    for i in range(4):
        found += read_one(fast, "text", [(a, [5 + i]), (b, [7]), (c, [2])])
    read_one(fast, "speech", [(c, [3])])
    found += read_one(fast, "text", [(c, [7]), (a, [2])])
    return torch.stack([row for row in found if row is not None])


def three(fast: Fused) -> list[Session]:
    return [fast.open(NAMES, ["text"]) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_is_whole_for_torch_compile_and_says_the_same(backend: str) -> None:
    """In a process of its own: what checks types in tests cannot be compiled."""
    subprocess.run([sys.executable, __file__, backend], check=True)


def compiled(backend: str) -> None:
    native.library, weights.PACKED, real, steps = lambda: None, set(), torch.compile, []

    def traced(step: Callable[..., object], **options: object) -> object:
        assert options == {"fullgraph": True, "dynamic": False}
        steps.append(step)
        return real(step, backend=backend, **options)

    torch.compile = traced
    model = zipped(LLAMAS, {"text": 2})
    fast, plain = Fused(model, static=True, compiled=True), Fused(model, static=False)
    torch.testing.assert_close(
        said(fast, three(fast)), said(plain, three(plain)), atol=1e-5, rtol=0
    )
    assert len(steps) > 3, "of the proof, of silent and of speaking plans"


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, True), *MORE])
def test_a_graph_says_the_same(dtype: torch.dtype, int8: bool, cuda: torch.device) -> None:
    model = zipped(LLAMAS, {"text": 2})
    model.cast(dtype)
    model.to(cuda)
    fast, plain = Fused(model, int8), Fused(model, int8, static=False)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        said(fast, three(fast)).cpu(), said(plain, three(plain)).cpu(), atol=tolerance, rtol=0
    )
    assert fast._replays and all(replay._graph is not None for replay in fast._replays.values()), (
        "none was refused"
    )


def test_a_step_that_asks_the_device_is_not_captured_and_says_the_same(cuda: torch.device) -> None:
    def step(given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return given * int(given.sum()), None

    assert isinstance(step, FunctionType)
    replay, before = Replay(step, (1, 2), cuda, compiled=False), torch.cuda.current_stream()
    with torch.inference_mode(), pytest.warns(UserWarning, match="could not be captured"):
        first, _ = replay(torch.tensor([[1, 2]]))
    assert torch.cuda.current_stream() == before, (
        "a capture that fails leaves no stream of its own behind"
    )
    assert first is not None and first.tolist() == [[3, 6]]
    with torch.inference_mode():
        second, _ = replay(torch.tensor([[2, 2]]))
    assert second is not None and second.tolist() == [[8, 8]]


def test_the_pretended_device_meets_no_tensor_of_the_cpu_and_its_graphs_are_frozen_kernels() -> (
    None
):
    if not pretend.possible():
        pytest.skip("there is no C++ compiler to pretend a GPU")
    with pretend.cuda() as device, torch.inference_mode():
        here, there = torch.ones(2), torch.ones(2, device=device)
        with pytest.raises(RuntimeError, match="met a tensor of the CPU"):
            there + here
        graph, factor = torch.cuda.CUDAGraph(), 3
        with torch.cuda.graph(graph):
            found = there * factor
        factor = 5  # too late
        there.fill_(2)
        graph.replay()
        assert found.tolist() == [6, 6]
        with (
            pytest.raises(RuntimeError, match="when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            float(there[0])
    assert there.device.type == "cuda" and here.device.type == "cpu"


def test_compiled_steps_want_fixed_shapes() -> None:
    with pytest.raises(ZipperError, match=r"compiled=True is for steps of fixed shapes.* on cpu"):
        Fused(zipped(LLAMAS), compiled=True)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def pretended(monkeypatch: pytest.MonkeyPatch, steps: list[Tensor]) -> Replay:
    """A replay that believes to be on CUDA: its graph, when it is replayed, runs the step and
    writes over what the capture said."""

    def step(given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        steps.append(given.clone())
        return given.float() * 2, None

    class Graph:
        def replay(self) -> None:
            assert replay._said[0] is not None
            replay._said[0].copy_(step(replay._given)[0])

    for name, fake in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    assert isinstance(step, FunctionType)
    replay = Replay(step, (1, 2), torch.device("cpu"), compiled=False)
    replay._graphed = True
    return replay


def test_a_step_is_warmed_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    replay = pretended(monkeypatch, steps)
    for n, runs in ((1, 3 + 1 + 1), (2, 1), (3, 1)):
        steps.clear()
        logits, _ = replay(torch.tensor([[n, 0]]))
        assert logits is not None and logits.tolist() == [[2 * n, 0]]
        assert len(steps) == runs and all(given.tolist() == [[n, 0]] for given in steps)


def test_what_cannot_be_captured_goes_on_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    replay = pretended(monkeypatch, steps)

    def refused() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refused)
    with pytest.warns(UserWarning, match="could not be captured .* not permitted"):
        first, _ = replay(torch.tensor([[1, 0]]))
    second, _ = replay(torch.tensor([[2, 0]]))
    assert (
        first is not None
        and second is not None
        and (first.tolist(), second.tolist()) == ([[2, 0]], [[4, 0]])
    )


def test_shapes_are_few_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    real = fused.Replay
    monkeypatch.setattr(
        fused, "Replay", lambda step, shape, *given: made.append(shape) or real(step, shape, *given)
    )
    fast = Fused(zipped(LLAMAS), static=True)
    session = fast.open(["text"], ["text"])
    made.clear()
    for i in range(140):
        read_one(fast, "text", [(session, [i % 30])])
    assert made == [(3, 1)] * 3, "looking at 64, 128 and 256 tokens"


def test_a_row_that_does_not_take_part_is_left_as_it_is() -> None:
    fast = Fused(zipped(LLAMAS), static=True)
    mine, other = fast.open(NAMES, NAMES), fast.open(NAMES, NAMES)
    read_one(fast, "speech", [(mine, [3, 4]), (other, [5])])
    read_one(fast, "text", [(mine, [3]), (other, [5])])
    before = mine.caches["text"].held[..., : mine.caches["text"].length, :].clone()
    for i in range(3):
        read_one(fast, "text", [(other, [i])])
    assert (
        torch.equal(mine.caches["text"].held[..., :1, :], before)
        and mine.caches["text"].length == 1
    )


def test_rows_are_taken_again_and_what_was_in_them_is_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = Fused(zipped(LLAMAS), static=True)
    assert fast._pool is not None
    first = said(fast, three(fast))
    gc.collect()
    rows, pool = fast._pool.rows, fast._pool
    with torch.inference_mode():
        for held in pool.held.values():
            held.fill_(torch.nan)  # what the first three left behind
    again = said(fast, three(fast))
    assert torch.equal(first, again) and pool.rows == rows == 4


def test_a_pool_grows_and_keeps_what_it_holds() -> None:
    grown: list[int] = []
    pool = Pool({"text": Shape(2, 1, 4, torch.zeros(1))}, lambda: grown.append(1))
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    pool.reserve("text", 5)
    pool.held["text"][1, :, :, :, :5] = 7.0
    count = len(grown)
    pool.reserve("text", 64)
    assert len(grown) == count, "64 tokens fit"
    pool.reserve("text", 65)
    assert pool.held["text"].shape == (4, 2, 2, 1, 129, 4) and len(grown) == count + 1
    assert (pool.held["text"][1, :, :, :, :5] == 7.0).all() and pool.held[
        "text"
    ].sum() == 7.0 * 2 * 2 * 5 * 4
    pool.free(1)
    pool.free(0)
    assert pool.take() == 0 and pool.take() == 1 and pool.take() == 3


def test_powers_of_two() -> None:
    assert [above(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert [above(n, least=1) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


if __name__ == "__main__":
    compiled(sys.argv[1])
