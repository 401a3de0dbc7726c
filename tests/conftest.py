"""What every test stands on: shapes checked at run time, one thread, no hub, the same random
examples every time.

The shapes in the signatures of zipper are checked here and nowhere else; users do not pay for it.
This file must not
import zipper: the import hook only reaches modules that are imported after it.
"""

import os

# Before torch is imported: one thread a process, and sleeping rather than spinning while another
# process works.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What a test finds does not depend on what another, or somebody, has loaded before.
os.environ["ZIPPER_PROOFS"] = "0"

# The training loop takes a GPU where there is one; tests do so when they ask for it.
os.environ["ACCELERATE_USE_CPU"] = "true"

import importlib.util
from collections.abc import Iterator
from typing import Any

import pretend
import pytest
import shapes
import torch

# A GPU machine may lack it: then shapes go unchecked there.
if importlib.util.find_spec("beartype"):
    shapes.check(["zipper", "zipper_lab"])
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("zipper", deadline=None, derandomize=True)
    settings.load_profile("zipper")
torch.set_num_threads(1)

#: Files whose tests are about proofs of towers.
ABOUT_PROOFS = {"test_tower", "test_families", "test_proofs", "test_fused", "test_environment"}
FOUND: dict[object, tuple[Any, str, Any]] = {}
PROVED: set[object] = set()


@pytest.fixture(scope="module", autouse=True)
def proved_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Towers that are alike but for their weights are proved once a process: zips of tiny towers
    are born hundreds of times, and most of that is proof."""
    if request.module.__name__ in ABOUT_PROOFS:
        yield
        return
    from zipper.towers.proof import Proof

    find, prove = Proof.find, Proof.prove

    def alike(proof: Proof) -> object:
        model = proof.tower.model
        parts = [(type(part), "forward" in vars(part)) for part in model.modules()]
        kinds = tuple((tensor.dtype, tensor.requires_grad) for tensor in model.parameters())
        return str(model.config), model.config._attn_implementation, str(parts), kinds

    def found(proof: Proof, seed: int = 0) -> None:
        key, tower = alike(proof), proof.tower
        if key in FOUND:
            way, path, tower.rows = FOUND[key]
            tower.way = way(tower.model, path)
        else:
            find(proof, seed)
            FOUND[key] = type(tower.way), tower.way.path, tower.rows

    def proved(proof: Proof, ids: torch.Tensor) -> None:
        key = (type(proof.tower.way), proof.tower.rows, alike(proof), ids.shape)
        if key not in PROVED:
            prove(proof, ids)
            PROVED.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Proof, "find", found)
        patch.setattr(Proof, "prove", proved)
        yield


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A GPU; where there is none, the pretended one: for tests of where tensors lie, and of what a
    graph is."""
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    elif pretend.possible():
        with pretend.cuda() as device:
            yield device
    else:
        pytest.skip("there is no GPU, and no C++ compiler to pretend one")


@pytest.fixture
def gpu() -> torch.device:
    """A GPU that is there: for tests of kernels."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda", 0)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there."""
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use a GPU have the mark `cuda`, which tools/gpu.py asks for."""
    for item in items:
        assert isinstance(item, pytest.Function)
        params = item.callspec.params.values() if "callspec" in vars(item) else ()
        if {"cuda", "gpu"} & {*item.fixturenames} or any(
            value == "cuda" for value in params if isinstance(value, str)
        ):
            item.add_marker("cuda")
