"""`verify` holds a sound model to its promises, and calls out each fault that is put into one."""

import dataclasses
from collections.abc import Callable

import laws
import pytest
import torch

import zipper.model
from zipper.link import Link
from zipper.model import Zipper
from zipper.tower import Strand, Tower
from zipper.verify import verify


def broken(model: Zipper) -> list[str]:
    return [check.promise for check in verify(model) if not check.held]


def fresh() -> Zipper:
    return laws.zipped({"text": "llama", "speech": "gpt2"}, train=("speech",))


def test_a_sound_model_keeps_every_promise_at_birth_and_awake() -> None:
    assert broken(laws.zipped({"text": "llama", "speech": "gpt2"}, awake=False)) == []
    assert broken(fresh()) == []


def test_three_towers_are_tried_in_every_order() -> None:
    model = laws.zipped({"text": "llama", "speech": "gpt2", "image": "llama"})
    checks = verify(model)
    assert all(check.held for check in checks)
    assert sum(check.promise.startswith("no leak, order") for check in checks) == 6


def test_verifying_changes_nothing() -> None:
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verify(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def sees_itself(target: Strand, source: Strand) -> torch.Tensor:
    return (source.time[:, None, :] <= target.time[:, :, None] + 1) & (target.document[:, :, None] == source.document[:, None, :])


def sees_neighbours(target: Strand, source: Strand) -> torch.Tensor:
    return (source.time[:, None, :] < target.time[:, :, None]) & (source.document >= 0)[:, None, :]


def sees_everything(target: Strand, source: Strand) -> torch.Tensor:
    return torch.ones(target.ids.shape[0], target.ids.shape[1], source.ids.shape[1], dtype=torch.bool)


def sees_nothing(target: Strand, source: Strand) -> torch.Tensor:
    return torch.zeros(target.ids.shape[0], target.ids.shape[1], source.ids.shape[1], dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "promise"),
    [(sees_itself, "no leak"), (sees_everything, "no leak"), (sees_neighbours, "packed"), (sees_nothing, "sees")],
)
def test_a_wrong_mask_is_called_out(monkeypatch: pytest.MonkeyPatch, mask: Callable[..., torch.Tensor], promise: str) -> None:
    model = fresh()
    monkeypatch.setattr(zipper.model, "visible", mask)
    assert any(promise in name for name in broken(model))


def test_one_bit_of_a_frozen_weight_is_called_out() -> None:
    model = fresh()
    weight = next(model.tower("text").parameters())
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert "frozen text is its base" in broken(model)


def test_a_cache_that_counts_positions_from_the_start_again_is_called_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    right = Link.read
    monkeypatch.setattr(Link, "read", lambda link, source, position: right(link, source, position - position[:, :1]))
    assert broken(model) == ["cached is full"]


def test_anything_added_on_the_unimodal_path_is_called_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    right = Tower.run

    def shifted(self: Tower, h: torch.Tensor, layers: range, run: object) -> torch.Tensor:
        return right(self, h, layers, run) + (1e-3 if layers.stop == self.layers else 0)  # type: ignore[arg-type]

    monkeypatch.setattr(Tower, "run", shifted)
    assert "unimodal text is the bare tower" in broken(model)


def test_a_check_is_plain_data() -> None:
    assert all(isinstance(value, str | bool) for check in verify(fresh()) for value in dataclasses.astuple(check))
