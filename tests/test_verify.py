"""`verify` holds a sound model to its promises, and calls out each fault that is put into one.

Every fault is put into a model that was saved and loaded and whose gates are closed, as at birth:
nothing of it shows until verify forces them open. Its two towers are of one shape, so that no
mix-up is an error of shapes.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from test_mutants import mutated
from transformers import AutoConfig, AutoModelForCausalLM

from zipper import generation, link, lockstep, model, reading, tower, writing
from zipper.errors import ZipperError
from zipper.link import Link, LinkConfig
from zipper.model import Zipper
from zipper.testing import tiny_tower
from zipper.tower import Tower
from zipper.verify import Check, verify
from zipper.writing import Lane

FAMILIES = {"text": "llama", "speech": "gpt2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of two towers of one shape, as it is born; the frozen one lies inside."""
    towers = {
        name: tiny_tower("llama", seed, 16, 3, ids)
        for name, seed, ids in (("text", 1, 31), ("speech", 2, 23))
    }
    folder = tmp_path_factory.mktemp("verify") / "zip"
    Zipper.from_towers(towers, train=["speech"], link=LinkConfig(head_width=8)).save_pretrained(
        folder, include=["text"]
    )
    return folder


def tried(zipped: Zipper, bases: Mapping[str, Any] | None = None, only: str = "") -> list[Check]:
    with laws.unchecked():  # twice as fast
        return verify(zipped, bases=bases, only=only)


def broken(zipped: Zipper, only: str = "") -> list[str]:
    return [check.promise for check in tried(zipped, only=only) if not check.held]


# --- sound models keep every promise


def test_a_sound_model_keeps_every_promise_at_birth_and_awake(saved: Path) -> None:
    checks = verify(Zipper.from_pretrained(saved))
    assert all(check.held for check in checks)
    assert all(
        isinstance(value, str | bool) for check in checks for value in dataclasses.astuple(check)
    )
    assert broken(laws.zipped(FAMILIES, train=("speech",))) == []
    assert (
        broken(laws.zipped(FAMILIES, preset="paper", link=replace(link.PAPER_LINK, head_width=8)))
        == []
    )


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_a_sound_model_keeps_them_in_16_bits(saved: Path, dtype: torch.dtype) -> None:
    assert broken(laws.zipped({"text": "gemma3", "speech": "gpt2"}, dtype=dtype)) == []
    assert broken(Zipper.from_pretrained(saved, dtype=dtype)) == []


@pytest.mark.slow
def test_three_towers_are_tried_in_every_order() -> None:
    checks = tried(laws.zipped({"text": "llama", "speech": "gpt2", "image": "llama"}))
    assert all(check.held for check in checks)
    assert sum(check.promise.startswith("no leak, order") for check in checks) == 6
    assert {check.promise for check in checks} > {
        f"{target} sees {source}, order text speech image"
        for source in ("text", "speech", "image")
        for target in {"text", "speech", "image"} - {source}
    }


def test_some_promises_are_tried_and_unknown_ones_are_refused(saved: Path) -> None:
    zipped = Zipper.from_pretrained(saved)
    whole = [check for check in tried(zipped) if check.promise.startswith("no leak")]
    assert len(whole) > 1
    assert tried(zipped, only="no leak") == whole
    with pytest.raises(
        ZipperError, match=r"no promise that begins with 'no leaks': .* 'no leak, or"
    ):
        verify(zipped, only="no leaks")


def test_one_tower_is_tried_on_what_one_tower_promises() -> None:
    zipped = Zipper.from_towers({"text": tiny_tower("gpt2")})
    assert [check.promise for check in tried(zipped) if check.held] == [
        "unimodal text is the bare tower",
        "unimodal text is the bare tower, left-padded",
        "text alone writes what the bare tower writes",
        "buffers of text are those of its configuration",
        "frozen text is its base",
        "every produced segment is closed, order text",
    ]


def test_towers_that_read_nine_tokens_or_begin_with_their_end_are_tried_too() -> None:
    towers = {name: tiny_tower("gpt2", positions=9) for name in FAMILIES}
    assert (
        broken(Zipper.from_towers(towers, link=laws.SMALL, ends={"text": (1, 1), "speech": (0, 0)}))
        == []
    )
    with pytest.raises(ZipperError, match="a tower must be able to read 9"):
        verify(
            Zipper.from_towers(towers | {"image": tiny_tower("gpt2", positions=8)}, link=laws.SMALL)
        )


def test_what_no_link_reads_need_not_be_seen(saved: Path) -> None:
    whole = Zipper.from_pretrained(saved)
    dropped = ("0:speech>text", "1:speech>text")
    pruned = Zipper(dict(whole.towers), replace(whole.config, dropped=dropped))  # type: ignore[arg-type]
    checks = {check.promise: check.held for check in tried(pruned)}
    assert all(checks.values())
    assert "speech sees text, order text speech" in checks
    assert "text sees speech, order text speech" not in checks


def test_an_adapted_tower_is_tried_with_its_adapter() -> None:
    pytest.importorskip("peft")
    towers = {name: tiny_tower(family) for name, family in FAMILIES.items()}
    zipped = Zipper.from_towers(
        towers, link=laws.SMALL, lora={"text": {"r": 2, "target_modules": ["q_proj"]}}
    )
    for name, parameter in zipped.tower("text").named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert broken(zipped) == []


def test_experts_may_round_by_what_others_ask_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    ids = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 64}
    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **sizes, **ids)
    ).eval()
    zipped = Zipper.from_towers({"text": experts, "speech": tiny_tower("gpt2")}, link=laws.SMALL)
    assert broken(zipped) == []
    monkeypatch.setattr(
        lockstep, "visible", mutated(lockstep, "visible", ":] < target.time", ":] > target.time")
    )
    assert broken(zipped, "no leak")


def test_verifying_changes_nothing(saved: Path) -> None:
    zipped = Zipper.from_pretrained(saved)
    zipped.train()
    before = copy.deepcopy(zipped.state_dict())
    modes = [module.training for module in zipped.modules()]
    chance = torch.get_rng_state()
    tried(zipped)
    assert all(torch.equal(before[name], tensor) for name, tensor in zipped.state_dict().items())
    assert modes == [module.training for module in zipped.modules()]
    assert torch.equal(chance, torch.get_rng_state())


# --- faults in what is stored


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of the first number."""
    tensor.data.view(torch.int32).view(-1)[0] ^= 1


def test_one_bit_of_a_frozen_weight_is_called_out_and_named_where_the_base_is_at_hand(
    saved: Path,
) -> None:
    zipped = Zipper.from_pretrained(saved)
    flip(zipped.tower("text").get_parameter("model.layers.1.mlp.up_proj.weight"))
    assert broken(zipped) == ["frozen text is its base"]
    (found,) = [
        check for check in tried(zipped, {"text": saved / "towers" / "text"}) if not check.held
    ]
    assert (
        "1 of 30 tensors differ from the base given: model.layers.1.mlp.up_proj.weight"
        in found.measured
    )


def test_a_tower_in_fewer_bits_is_held_against_its_base(saved: Path) -> None:
    half = Zipper.from_pretrained(saved, dtype=torch.float16)
    base = saved / "towers" / "text"
    assert [
        check.held
        for check in tried(half, {"text": base})
        if check.promise == "frozen text is its base"
    ] == [True]
    other = tiny_tower("llama", 9, 16, 3, 31)
    assert [check.promise for check in tried(half, {"text": other}) if not check.held] == [
        "frozen text is its base"
    ]


def test_one_bit_of_a_buffer_that_no_checkpoint_holds_is_called_out(saved: Path) -> None:
    zipped = Zipper.from_pretrained(saved)
    flip(zipped.tower("text").get_buffer("model.rotary_emb.inv_freq"))
    assert broken(zipped) == ["buffers of text are those of its configuration"]


# --- faults in the code: (where, function, its source, what stands there instead), and the promise
# that breaks

Place = tuple[Any, str, str, str]
READ = "state.past.get(name) if cached else None"

FAULTS: dict[str, tuple[list[Place], str]] = {
    "a token sees the one after it": (
        [(lockstep, "visible", ":] < target.time", ":] < 2 + target.time")],
        "no leak, order",
    ),
    "a token does not see the one before it": (
        [(lockstep, "visible", ":] < target.time", ":] < -1 + target.time")],
        "rows of a batch are",
    ),
    "the mask is dropped": (
        [
            (
                lockstep,
                "visible",
                "same & (source.time[:, None, :] < target.time[:, :, None])",
                "same",
            )
        ],
        "no leak, order",
    ),
    "the link does not use the mask": (
        [(Link, "forward", "(mask | ~visible)[:, None]", "None")],
        "no leak, order",
    ),
    "documents are ignored": (
        [(lockstep, "visible", "== source.document[:, None, :]", ">= 0")],
        "packed neighbours",
    ),
    "a link reads fused states": (
        [
            (
                lockstep,
                "_exchange",
                "unread = state.unread.pop(key, ())",
                "unread = (new[key.source],) if key.source in strands else state.unread.pop(key, ())",
            )
        ],
        "rows of a batch are",
    ),
    "who sees something is asked per batch": (
        [(Link, "forward", "mask.any(-1, keepdim=True)", "mask.any().view(1, 1, 1)")],
        "rows of a batch are",
    ),
    "a unimodal plan is projected": (
        [
            (lockstep, "_shared", "torch.zeros_like", "torch.ones_like"),
            (lockstep, "_projected", "if there", "if partners"),
        ],
        "unimodal text is the bare tower",
    ),
    "a link works on the unimodal path": (
        [
            (
                lockstep,
                "_exchange",
                "new = dict(hidden)",
                "new = {name: h * 1.001 for name, h in hidden.items()}",
            ),
            (model, "advance", "parts.route.halts if fused else ()", "parts.route.halts"),
        ],
        "unimodal text is the bare tower",
    ),
    "a tower gets the cache of another": (
        [(model, "advance", READ, "next(iter(state.past.values()), None) if cached else None")],
        "cached is full",
    ),
    "the cache is cut at the wrong end": (
        [(tower.Past, "compact", "self.length - width :", ": width")],
        "cached is full",
    ),
    "what was read is read again": (
        [(lockstep, "_exchange", "state.unread.pop(", "state.unread.get(")],
        "cached is full",
    ),
    "an end is not read": (
        [(Lane, "go_on", "else [token]", "else [0 if self.writing.written.stop else token]")],
        "every produced",
    ),
    "the end of a segment that was cut is not read": (
        [
            (
                Lane,
                "go_on",
                "else [token]",
                "else [0 if self.writing.written.stop == 'limit' else token]",
            )
        ],
        "every produced",
    ),
    "positions start again with each segment": (
        [(reading.Stepwise, "_strand", "at = walk.position.get(tower, 0)", "at = 0")],
        "every produced",
    ),
    "the mask is inverted": (
        [(lockstep, "visible", ":] < target.time", ":] > target.time")],
        "no leak, order",
    ),
    "ranks are compared, not times": (
        [(lockstep, "visible", ".time[", ".position[")],
        "no leak, order",
    ),
    "nothing is seen": (
        [(lockstep, "visible", "same & (", "same & False & (")],
        "speech sees text, order",
    ),
    "padding is seen": (
        [(lockstep, "visible", "& (source.document >= 0)", "| (source.document < 0)")],
        "no leak, order",
    ),
    "rows of a batch see each other": (
        [(Link, "forward", "added = torch", "added = 1e-3 * x.mean(0) + torch")],
        "no leak, order",
    ),
    "one direction is missing": (
        [
            (
                lockstep,
                "_exchange",
                "if pair in sight.masks",
                "if pair in sight.masks and key.source < key.target",
            )
        ],
        "speech sees text",
    ),
    "a link replaces the state": (
        [(lockstep, "_exchange", "new[key.target] + link", "link")],
        "rows of a batch are",
    ),
    "the exchange comes before the block": (
        [
            (
                model,
                "advance",
                "layer), passes[name])\n            done[name] = layer",
                "layer - 1), passes[name])\n            done[name] = layer - 1",
            )
        ],
        "rows of a batch are",
    ),
    "rotary positions are times": (
        [(lockstep, "_exchange", "strand.position", "strand.time")],
        "rows of a batch are",
    ),
    "a token that sees nothing is changed": (
        [(Link, "forward", "torch.where(visible, added, torch.zeros_like(added))", "added")],
        "rows of a batch are",
    ),
    "a unimodal plan is projected when it generates": (
        [(lockstep, "_projected", "if there", "if partners")],
        "text alone writes",
    ),
    "a unimodal row is projected": (
        [(lockstep, "_shared", "torch.zeros_like", "torch.ones_like")],
        "rows of a batch are",
    ),
    "the memory of a link starts anew": (
        [(lockstep, "_memory", "if memory is None", "if True")],
        "cached is full",
    ),
    "the memory of a link is not extended": (
        [(lockstep, "_memory", "memory.keys, fresh.keys", "memory.keys, memory.keys")],
        "cached is full",
    ),
    "a link counts positions from the start again": (
        [(lockstep, "_memory", "read.position.shape[1] - states.shape[1] :", ": states.shape[1]")],
        "cached is full",
    ),
    "a segment has no begin": (
        [(Lane, "__init__", "[begin, *segment.content]", "[*segment.content] or [self.end]")],
        "every produced",
    ),
    "a given segment has no end": (
        [(generation, "_given", "ids.append(end)", "pass")],
        "every produced",
    ),
    "the clock stands still": (
        [(reading.Stepwise, "_step", "walk.time += max", "walk.time += 0 * max")],
        "every produced",
    ),
    "positions go on for rows that have ended": (
        [
            (
                reading.Stepwise,
                "_step",
                "walk.position.get(tower, 0) + len(ids)",
                "walk.position.get(tower, 0) + 1",
            )
        ],
        "every produced",
    ),
    "a segment is longer than its cap": (
        [(writing, "_drawn", "len(written.ids) >= cap", "len(written.ids) > cap")],
        "every produced",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_called_out(fault: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped = Zipper.from_pretrained(saved)
    places, promise = FAULTS[fault]
    for owner, name, old, new in places:
        monkeypatch.setattr(owner, name, mutated(owner, name, old, new))
    assert broken(zipped, promise)


def sees_neighbours(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, strand, h, past=None: right(
        self, replace(strand, document=strand.document.clamp(max=0)), h, past
    )


def looks_ahead(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, h, layers, run: (
        (h := right(self, h, layers, run)) + 1e-3 * h.roll(-1, dims=1)
    )


def scales(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, h: right(self, h) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "fault", "promise"),
    [
        ("start", sees_neighbours, "packed neighbours do not see each other"),
        ("run", looks_ahead, "no leak, order"),
        ("unembed", scales, "unimodal text is the bare tower"),
    ],
)
def test_a_tower_that_is_run_otherwise_is_called_out(
    name: str, fault: Callable[..., Any], promise: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = Zipper.from_pretrained(saved)
    with laws.unchecked():
        monkeypatch.setattr(Tower, name, fault(getattr(Tower, name)))
        assert broken(zipped, promise)


# --- towers that read less


@pytest.mark.parametrize("rows", ["padded", "unpadded"])
def test_towers_that_read_no_packed_or_no_left_padded_rows_are_tried_on_what_they_read(
    saved: Path, rows: Any
) -> None:
    zipped = Zipper.from_pretrained(saved)
    for name in FAMILIES:
        zipped._tower(name).rows = rows
    checks = {check.promise: check.held for check in tried(zipped)}
    assert all(checks.values())
    assert not any("packed" in promise for promise in checks)
    assert ("unimodal text is the bare tower, left-padded" in checks) == (rows == "padded")
