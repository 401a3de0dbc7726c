"""Hostile files: whatever is wrong in a saved zip is a ZipperError that names the file, soon and
cheaply.

Two kinds of corruption. As found: the manifest is as it was, and some byte of some file is not.
Resealed: somebody changed a file on purpose and wrote a manifest that fits, so that only what the
files ask for and hold can give them away.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint

SLOWEST_S, MOST_MEMORY = 5.0, 200 << 20
CORRUPTIONS = 1_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TEXT, SPEECH = "towers/text", "towers/speech"  # the first in several shards

Chance = random.Random
# Does harm to a folder; returns the files of which one must be named.
Corruption = Callable[[Path, Chance], list[str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with all its towers, one of them in shards."""
    torch.manual_seed(0)
    world = tiny.world(tmp_path_factory.mktemp("world"))
    pipe, folder = Pipeline.from_pretrained(world.zip), world.folder / "whole"
    pipe.save_pretrained(folder, include=["text"], record={"steps": 3})
    (folder / TEXT / "model.safetensors").unlink()
    pipe.model.tower("text").save_pretrained(folder / TEXT, max_shard_size="12KB")
    assert len([*(folder / TEXT).glob("model-*-of-*.safetensors")]) > 2
    checkpoint.seal(folder)
    return folder


# --- as found


def files(folder: Path, suffix: str = "") -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob(f"*{suffix}")
        if path.is_file() and path.name != "README.md"
    )


def one(folder: Path, chance: Chance, suffix: str = "") -> tuple[str, bytes]:
    name = chance.choice(files(folder, suffix))
    return name, (folder / name).read_bytes()


def flip(folder: Path, chance: Chance) -> list[str]:
    name, content = one(folder, chance)
    at = chance.randrange(len(content))
    (folder / name).write_bytes(
        content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    )
    return [name]


def flip_manifest(folder: Path, chance: Chance) -> list[str]:
    """The name of the file may be what was hit."""
    content = (folder / "manifest.json").read_bytes()
    at = chance.randrange(len(content))
    (folder / "manifest.json").write_bytes(
        content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    )
    return files(folder) if b"{" in content else []


def flip_header(folder: Path, chance: Chance) -> list[str]:
    name, content = one(folder, chance, ".safetensors")
    at = chance.randrange(8 + int.from_bytes(content[:8], "little"))
    (folder / name).write_bytes(
        content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    )
    return [name]


def cut(folder: Path, chance: Chance) -> list[str]:
    name, content = one(folder, chance)
    (folder / name).write_bytes(
        content[: chance.choice([0, 1, len(content) - 1, chance.randrange(len(content))])]
    )
    return [name]


def more_bytes(folder: Path, chance: Chance) -> list[str]:
    name, content = one(folder, chance)
    (folder / name).write_bytes(
        content + chance.choice([b"\n", b" ", b"\0", chance.randbytes(1_000)])
    )
    return [name]


def gone(folder: Path, chance: Chance) -> list[str]:
    name, _ = one(folder, chance)
    (folder / name).unlink()
    return [name]


def noise(folder: Path, chance: Chance) -> list[str]:
    name, content = one(folder, chance)
    at = chance.randrange(len(content))
    (folder / name).write_bytes(content[:at] + chance.randbytes(64) + content[at + 64 :])
    return [name]


def swapped(folder: Path, chance: Chance) -> list[str]:
    """Not the manifest, which may be written anew, and not what nobody reads."""
    read = [
        n
        for n in files(folder, chance.choice([".json", ".safetensors"]))
        if not n.endswith(("manifest.json", "generation_config.json"))
    ]
    a, b = chance.sample(read, 2)
    first, second = (folder / a).read_bytes(), (folder / b).read_bytes()
    (folder / a).write_bytes(second)
    (folder / b).write_bytes(first)
    return [a, b]


def planted(folder: Path, chance: Chance) -> list[str]:
    place = chance.choice([TEXT, SPEECH, "towers/other"])
    name = f"{place}/{chance.choice(['adapter_config.json', 'modeling_llama.py', 'pytorch_model.bin', 'x.safetensors'])}"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    return [name]


def linked(folder: Path, chance: Chance) -> list[str]:
    """The right content, in the wrong place."""
    name, content = one(folder, chance)
    outside = folder.parent / f"outside{chance.random()}"
    outside.write_bytes(content)
    (folder / name).unlink()
    (folder / name).symlink_to(
        chance.choice([outside, os.path.relpath(outside, (folder / name).parent)])
    )
    return [name]


def listed_elsewhere(folder: Path, chance: Chance) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    name = chance.choice(
        [
            "../x.json",
            "/etc/hostname",
            "towers/../../x",
            "a//b",
            "a\\b",
            "./x",
            "",
            "a\0b",
            "\ud800",
            "~/x",
        ]
    )
    manifest["files"][name] = chance.choice(["0" * 64, None, 3, []])
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return ["manifest.json"]


AS_FOUND: list[Corruption] = [
    *[flip] * 8,
    *[flip_manifest] * 2,
    *[flip_header] * 3,
    *[cut, more_bytes, gone, noise, swapped, planted, linked, listed_elsewhere] * 2,
]

# --- resealed: JSON

HUGE, DEEP = 10**9, b"[" * 100_000 + b"]" * 100_000
NOT_COUNTS: list[Any] = [-1, 0, HUGE, 2**63, 10**400, 1.5, "8", None, True, [], {}]


def put(data: Any, path: str, value: Any) -> None:
    *way, last = path.split("/")
    for key in way:
        data = data[int(key) if isinstance(data, list) else key]
    data[int(last) if isinstance(data, list) else last] = value


def json_edit(name: str, edits: list[tuple[str, list[Any]]]) -> Corruption:
    def edit(folder: Path, chance: Chance) -> list[str]:
        data = json.loads((folder / name).read_text())
        path, values = chance.choice(edits)
        put(data, path, chance.choice(values))
        (folder / name).write_text(json.dumps(data))
        return [name]

    return edit


ZIPPER_JSON: list[tuple[str, list[Any]]] = [
    *(
        (f"config/towers/{tower}/{size}", NOT_COUNTS)
        for tower in ("text", "speech")
        for size in ("width", "layers", "vocabulary")
    ),
    *(
        (f"config/towers/{tower}/{size}", [1, 7, 33])
        for tower in ("text", "speech")
        for size in ("width", "layers", "vocabulary")
    ),
    ("config/towers/speech/begin", [-1, HUGE, "1", None, 1.0, 5]),
    ("config/towers/speech/train", ["yes", 1, None]),
    ("config/towers/speech/tokens", [-1, 1e300, float("nan"), float("inf"), "8"]),
    ("config/towers/speech/input_projection", ["other", None, 3]),
    ("config/towers/speech/input_projection", ["none"]),  # not the tensors of the file
    ("config/towers/speech/dtype", ["load", "hub", "int8", "float8_e4m3fn", "__class__", None, 3]),
    ("config/towers/speech/digest", ["0" * 64, "", None, 3]),
    (
        "config/towers/speech/source",
        [
            "towers/../..",
            "towers/text",
            "../outside",
            "towers/speech/../../x",
            "a\nb",
            None,
            3,
            ["x"],
        ],
    ),
    ("config/towers/speech/source", ["/nowhere/at/all", "./nowhere"]),
    ("config/towers/speech/colour", ["red"]),
    ("config/towers/speech/revision", [3, None]),
    (
        "config/towers/text/lora",
        [{"r": HUGE}, {"megatron_config": {}}, {"r": 8, "loftq_config": {}}, "x", 3],
    ),
    *(
        ("config/towers/" + name, [{"source": "x"}, None, 3])
        for name in ("..", "Text", "", "a.b", "video")
    ),
    ("config/towers", [{}, [], None, "towers", {"text": {}}, {"x/y": {"source": "towers/x/y"}}]),
    (
        "config/junctions",
        [
            {},
            None,
            "x",
            [3],
            [{"text": 1}],
            [{"text": 1, "video": 1}],
            [{"text": 1, "speech": 1}] * 2,
            [],
        ],
    ),
    ("config/junctions/0/text", [0, -1, 2, HUGE, 1.0, "1", None]),
    ("config/junctions", [[{"text": i, "speech": i} for i in range(1, 5_000)]]),
    ("config/link/width", [-32, 0, HUGE, 10**15, 33, "32", 64]),
    ("config/link/head_width", [-1, 0, 7, HUGE, 1.0]),
    ("config/link/feedforward", [-1.0, 1e9, 4.0, 0.0, float("nan"), "1"]),
    ("config/link/projection_depth", [-1, HUGE, 10**6, 2, 0, 1.0]),
    ("config/link/projection_relu", [3, "no"]),
    ("config/link/gate_init", [float("nan"), float("inf"), 1e9, None, "0"]),
    ("config/link/dropout", [-0.1, 1.0, 1e9, None]),
    ("config/link/whiten", [True, 3]),
    ("config/link", [None, 3, [], {"colour": "red"}]),
    ("config/dropped", ["x", ["0:text>speech"], ["0:text>video"], [3], None]),
    ("config/colour", ["red"]),
    ("config", [None, 3, [], "x", {}]),
    ("format", [0, 2, "1", None, 10**30, [1]]),
    ("record", ["x" * 5_000_000, [1], "x", 3]),
]

CONFIG_JSON: list[tuple[str, list[Any]]] = [
    *(
        (size, [*NOT_COUNTS, 1, 7, 31])
        for size in ("hidden_size", "num_hidden_layers", "vocab_size")
    ),
    *((size, [-1, 0, HUGE, 2**63, "8", [], {}, 47]) for size in ("intermediate_size",)),
    ("num_attention_heads", [-1, 0, HUGE, "8", {}]),
    ("head_dim", [-1, HUGE, 10**12, "8"]),
    ("max_position_embeddings", ["x", [], {}]),
    ("model_type", ["gpt2", "bert", "t5", "other", "../llama", "", None, 3, [], {}, "vit"]),
    (
        "auto_map",
        [{"AutoModelForCausalLM": "modeling_evil.Evil"}, {"AutoConfig": "me/repo--evil.Evil"}],
    ),
    ("quantization_config", [{"quant_method": "bitsandbytes"}, {}]),
    ("transformers_weights", ["../../zip.safetensors", "/etc/passwd"]),
    ("attn_implementation", ["me/kernel", "flash_attention_2"]),
    ("_attn_implementation", ["me/kernel"]),
    ("dtype", ["load", "hub.load", 3, "int8"]),
    ("tie_word_embeddings", [False]),
    ("attention_bias", [True]),
    ("rope_parameters", [{"rope_type": "evil"}, 3, "x"]),
    ("rms_norm_eps", [float("nan"), float("inf")]),
    ("layer_types", [["full_attention"], ["x"] * 2]),
    ("text_config", [{"auto_map": {"AutoConfig": "x.Y"}}]),
]

UNITS_JSON: list[tuple[str, list[Any]]] = [
    ("codes", [0, -1, HUGE, 23, "24", None]),
    ("stack", [*NOT_COUNTS, 3]),
    ("voices", [None, "low", [3], [None], {"low": 1}, ["low"] * 100]),
    ("mel/bins", [*NOT_COUNTS, 41]),
    ("mel/fft", NOT_COUNTS),
    ("mel/rate_hz", NOT_COUNTS),
    ("mel/low_hz", [float("nan"), -1.0, 9_000.0, "60"]),
    ("mel/floor", [0.0, float("nan"), None]),
    ("mel", [None, [], 3]),
    ("codebook_sha256", ["0" * 64, None, 3]),
    ("fitted_on", [None, 3, "something else"]),
    ("colour", ["red"]),
]


def no_json(folder: Path, chance: Chance) -> list[str]:
    name = chance.choice([name for name in files(folder, ".json") if name != "manifest.json"])
    content = (folder / name).read_bytes()
    begun = chance.choice(
        [
            lambda: b'{"a": NaN, ',
            lambda: b'{"a": 1e999, ',
            lambda: b'{"a": ' + b"9" * 10_000 + b", ",
            lambda: b'{"a": 1, "a": 2, ',
            lambda: b'{"' + b"a" * 70_000_000 + b'": 1, ',
        ]
    )
    whole = [
        b"",
        b"{",
        b"[1]",
        b"3",
        b"null",
        b"\xff\xfe{}",
        b"{}",
        DEEP,
        b'{"a":' * 100_000,
        content[:-3],
    ]
    whole += [content.decode().encode("utf-16"), b"\xef\xbb\xbf" + content]
    (folder / name).write_bytes(
        content.replace(b"{", begun(), 1) if chance.random() < 0.4 else chance.choice(whole)
    )
    return [name]


def huge_record(folder: Path, chance: Chance) -> list[str]:
    data = (folder / "zipper.json").read_bytes()
    (folder / "zipper.json").write_bytes(
        data.replace(b'"steps": 3', b'"steps": [' + b"[]," * (33 << 20) + b"3]")
    )
    return ["zipper.json"]


def foreign_modalities(folder: Path, chance: Chance) -> list[str]:
    pins = json.loads((folder / "modalities.json").read_text())
    name, pin = chance.choice([*pins.items()])
    other = chance.choice(["../../x", "video", "", "text/../speech", "/etc", "."])
    changes = [
        {other: pin},
        {**pins, other: pin},
        {other if n == name else n: p for n, p in pins.items()},
    ]
    changes += [{**pins, name: value} for value in ("0" * 64, None, 3, [pin], pin.upper())]
    (folder / "modalities.json").write_text(json.dumps(chance.choice(changes)))
    return ["modalities.json", f"modalities/{name}/x"]


def foreign_index(folder: Path, chance: Chance) -> list[str]:
    path = folder / TEXT / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weights = index["weight_map"]
    tensor = chance.choice([*weights])
    other = chance.choice(
        [
            "../speech/model.safetensors",
            "/etc/passwd",
            "model-00099-of-00099.safetensors",
            "zip.safetensors",
            3,
            None,
        ]
    )
    index["weight_map"] = chance.choice(
        [
            {**weights, tensor: other},
            {**weights, "more": weights[tensor]},
            {name: file for name, file in weights.items() if name != tensor},
            {**weights, tensor: next(file for file in weights.values() if file != weights[tensor])},
            {},
            [],
            None,
        ]
    )
    path.write_text(json.dumps(index))
    return [f"{TEXT}/model.safetensors.index.json"]


def foreign_tokenizer(folder: Path, chance: Chance) -> list[str]:
    name = "modalities/text/tokenizer.json"
    data = json.loads((folder / name).read_text())
    path, value = chance.choice(
        [
            ("model", None),
            ("model", {}),
            ("model/type", "Evil"),
            ("model/vocab", {"a": -1}),
            ("model/vocab", {"a": 2**40}),
            ("model/vocab", [["a", 1.0]]),
            ("model/merges", [["a"]]),
            ("model/merges", [["nowhere", "there"]]),
            ("model/unk_token", 3),
            ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
            (
                "pre_tokenizer",
                {
                    "type": "Split",
                    "pattern": {"Regex": "(?<"},
                    "behavior": "Isolated",
                    "invert": False,
                },
            ),
            ("decoder", {"type": "Evil"}),
            ("added_tokens", [{"id": HUGE, "content": "<s>"}]),
            ("version", "9.0"),
            ("junk", [[]] * 2_000_000),
        ]
    )
    put(data, path, value)
    (folder / name).write_text(json.dumps(data))
    return [name]


def foreign_tokens(folder: Path, chance: Chance) -> list[str]:
    name = "modalities/text/tokenizer_config.json"
    data = json.loads((folder / name).read_text())
    data[chance.choice(["bos_token", "eos_token"])] = chance.choice(
        [None, 3, [], {}, {"content": 3}, "nowhere", "a"]
    )
    if data["bos_token"] is None and data["eos_token"] == "</s>":
        data["eos_token"] = None
    (folder / name).write_text(json.dumps(data))
    return [name]


# --- resealed: tensors


def weights(folder: Path, chance: Chance) -> tuple[str, dict[str, torch.Tensor]]:
    """Of the zip or of a tower; not of the codebook, for which a hash stands in units.json."""
    name = chance.choice([name for name in files(folder, ".safetensors") if "codebook" not in name])
    return name, load_file(folder / name)


def other_tensors(folder: Path, chance: Chance) -> list[str]:
    name, tensors = weights(folder, chance)
    which = chance.choice([*tensors])
    tensor = tensors.pop(which)
    for key, value in chance.choice(
        [
            [],
            [(which + "x", tensor)],
            [("../" + which, tensor)],
            [(which, tensor), ("more", tensor.clone())],
            [(which, tensor.flatten()[:-1])],
            [(which, tensor[None])],
            [(which, torch.zeros(*tensor.shape, 2))],
            [(which, torch.zeros(0))],
            [(which, tensor.double())],
            [(which, tensor.to(torch.int64))],
            [(which, tensor.to(torch.int32))],
            [(which, tensor > 0)],
            [(which, tensor.to(torch.float8_e4m3fn))],
            [(which, tensor.to(torch.complex64))],
        ]
    ):
        tensors[key] = value
    save_file(tensors, folder / name)
    return [name] if TEXT not in name else [name, f"{TEXT}/model.safetensors.index.json"]


def not_finite(folder: Path, chance: Chance) -> list[str]:
    name, tensors = weights(folder, chance)
    tensor = tensors[chance.choice([*tensors])]
    tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice(
        [torch.nan, torch.inf, -torch.inf]
    )
    save_file(tensors, folder / name)
    return [name]


def trained_on(folder: Path, chance: Chance) -> list[str]:
    """One bit of a tower, whose hash stands in zipper.json."""
    name = chance.choice(
        [name for name in files(folder, ".safetensors") if name.startswith("towers/")]
    )
    content = (folder / name).read_bytes()
    at = chance.randrange(8 + int.from_bytes(content[:8], "little"), len(content))
    (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return [name]


def other_codebook(folder: Path, chance: Chance) -> list[str]:
    name = "modalities/speech/codebook.safetensors"
    codebook = load_file(folder / name)["codebook"]
    changed = chance.choice(
        [
            codebook[:-1],
            codebook[:, :-1],
            codebook.half(),
            codebook.flip(0),
            codebook / 0,
            codebook.T,
            codebook[None],
        ]
    )
    key = chance.choice(["codebook", "codebook", "codebook", "book"])
    save_file({key: changed.contiguous()}, folder / name)
    return [name]


def header_edit(folder: Path, chance: Chance) -> list[str]:
    """What safetensors files say of themselves."""
    name, content = one(folder, chance, ".safetensors")
    length = int.from_bytes(content[:8], "little")
    text, payload = content[8 : 8 + length], content[8 + length :]
    entries = json.loads(text)
    which = chance.choice([key for key in entries if key != "__metadata__"])
    start, stop = entries[which]["data_offsets"]

    def changed(**values: Any) -> bytes:
        return json.dumps({**entries, which: {**entries[which], **values}}).encode()

    def many(number: int, **others: Any) -> bytes:
        return json.dumps(
            {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}
            | others
        ).encode()

    edits: list[Callable[[], bytes]] = [
        lambda: chance.choice([DEEP, b"[]", b"{}", b"\xff" * 64]),
        lambda: changed(
            shape=chance.choice([[HUGE, HUGE], [-1], [2**62, 4], [1.5], None, [1] * 100_000])
        ),
        lambda: changed(dtype=chance.choice(["F4", ["F32"], None, "F64", "C64", "F8_E4M3"])),
        lambda: changed(
            data_offsets=chance.choice(
                [[start, stop + 4], [stop, start], [0, 2**63], [start], [start + 4, stop + 4]]
            )
        ),
        lambda: changed(more=1),
        lambda: text.replace(
            b"{", b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2, 1
        ),
        lambda: many(100_000),
        lambda: many(10_000, **entries),
        lambda: text.replace(b"{", b'{"' + b"a" * 60_000_000 + b'": {}, ', 1),
    ]
    text = chance.choice(edits)()
    size = chance.choice(
        [len(text)] * 9 + [2**63, 2**64 - 1, len(text) + len(payload) + 1, 0, HUGE]
    )
    (folder / name).write_bytes(size.to_bytes(8, "little") + text + payload)
    return [name] if TEXT not in name else [name, f"{TEXT}/model.safetensors.index.json"]


def resealed(harm: Corruption) -> Corruption:
    def sealed(folder: Path, chance: Chance) -> list[str]:
        names = harm(folder, chance)
        checkpoint.seal(folder)
        return names

    sealed.__name__ = f"resealed {harm.__name__}"
    return sealed


def left_out(folder: Path, chance: Chance) -> list[str]:
    """Gone from the folder and from the manifest."""
    name = chance.choice(
        [n for n in files(folder) if n not in ("manifest.json", f"{TEXT}/generation_config.json")]
    )
    while name.endswith("generation_config.json"):
        name = chance.choice(files(folder))
    (folder / name).unlink()
    checkpoint.seal(folder)
    return [name, "modalities/speech/x", f"{TEXT}/x", f"{SPEECH}/x", "manifest.json", "zipper.json"]


RESEALED = [
    resealed(harm)
    for harm in (
        *[json_edit("zipper.json", ZIPPER_JSON)] * 8,
        *[json_edit(f"{tower}/config.json", CONFIG_JSON) for tower in (TEXT, SPEECH)] * 3,
        *[json_edit("modalities/speech/units.json", UNITS_JSON)] * 3,
        *[no_json, foreign_modalities, foreign_index, foreign_tokenizer, foreign_tokens] * 2,
        *[other_tensors, not_finite, header_edit] * 4,
        *[trained_on, other_codebook, planted, swapped],
        huge_record,
    )
] + [left_out]


# --- the laws


@dataclass(frozen=True)
class Refusal:
    """What was done, the processor's time that the refusal took, and the most memory beyond what
    the process had before."""

    what: str
    seconds: float
    more_bytes: int


def memory(which: str) -> int:
    """VmRSS (now) or VmHWM (at most, since it was last forgotten) of this process."""
    return (
        int(
            re.search(
                rf"{which}:\s+(\d+) "
                r"kB",
                Path("/proc/self/status").read_text(),
            )[1]
        )
        << 10
    )  # type: ignore[index]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def refused(whole: Path, place: Path, seed: int) -> Refusal:
    """Do harm by `seed`, try to load. An AssertionError if that was not refused as it should be."""
    chance = random.Random(seed)
    folder = Path(shutil.copytree(whole, place / str(seed)))
    harm = chance.choice(AS_FOUND if seed % 2 else RESEALED)
    names = harm(folder, chance)
    what = f"seed {seed}, {harm.__name__} of {names[:2]}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    forget_peak()
    before, start = memory("VmRSS"), time.process_time()
    try:
        Pipeline.from_pretrained(folder)
    except ZipperError as error:
        found, message = (
            Refusal(what, time.process_time() - start, memory("VmHWM") - before),
            str(error),
        )
    except BaseException as error:
        raise AssertionError(
            f"{what}: {type(error).__name__} is no ZipperError: {error!s:.300}"
        ) from error
    else:
        raise AssertionError(f"{what}: was loaded")
    finally:
        shutil.rmtree(folder)
    # A tower or modality is one thing: its folder may be named in place of the file. The top folder
    # alone says nothing. A wrong line of the manifest is found at the file that it is about.
    places = [str(folder / name) for name in names] + [
        str((folder / name).parent) for name in names if "/" in name
    ]
    places += ["manifest.json"] if "manifest.json" in names else []
    assert any(place in message for place in places) and str(folder) in message, (
        f"{what}: not named in {message:.300}"
    )
    assert len(message) < 2_000, f"{what}: {message:.300}"
    assert found.seconds < SLOWEST_S, f"{what}: {found.seconds:.1f} s"
    assert found.more_bytes < size + MOST_MEMORY, f"{what}: {found.more_bytes >> 20} MiB more"
    return found


def sweep(whole: Path, place: Path, seeds: range) -> None:
    Pipeline.from_pretrained(whole)  # imports are no cost of a refusal
    found, failed = [], []
    for seed in seeds:
        try:
            found.append(refused(whole, place, seed))
        except AssertionError as error:
            failed.append(str(error))
    slowest, largest = (
        max(found, key=lambda case: case.seconds),
        max(found, key=lambda case: case.more_bytes),
    )
    print(f"{len(found)} of {len(seeds)} refused in {sum(case.seconds for case in found):.0f} s")
    print(
        f"slowest {slowest.seconds:.2f} s ({slowest.what}), most memory "
        f"{largest.more_bytes >> 20} MiB ({largest.what})"
    )
    assert not failed, "\n".join(
        [f"{len(failed)} of {len(seeds)} were not refused as they should be", *failed[:30]]
    )


def test_the_folder_that_all_this_is_done_to_loads_when_nothing_was_done(
    whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    assert Pipeline.from_pretrained(folder).model.config.towers.keys() == {"text", "speech"}
    checkpoint.seal(folder)
    (folder / "README.md").write_text("# A card\n\nthat people edit")
    Pipeline.from_pretrained(folder)


@LINUX
def test_memory_that_was_taken_and_given_back_is_heard_of() -> None:
    forget_peak()
    before = memory("VmRSS")
    assert np.ones(64 << 20, np.uint8).all()
    assert 60 << 20 < memory("VmHWM") - before < 80 << 20
    forget_peak()
    assert memory("VmHWM") - before < 20 << 20


@LINUX
def test_some_corruptions_are_refused_soon_and_the_file_is_named(
    whole: Path, tmp_path: Path
) -> None:
    sweep(whole, tmp_path, range(60))


@LINUX
@pytest.mark.slow
def test_a_thousand_corruptions_are_refused_soon_and_the_file_is_named(
    whole: Path, tmp_path: Path
) -> None:
    sweep(whole, tmp_path, range(1_000, 1_000 + CORRUPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits",
    [
        ("zipper.json", ZIPPER_JSON),
        (f"{SPEECH}/config.json", CONFIG_JSON),
        (f"{TEXT}/config.json", CONFIG_JSON),
    ],
)
def test_every_absurd_setting_is_refused(
    whole: Path, tmp_path: Path, edits: tuple[str, list[tuple[str, list[Any]]]]
) -> None:
    name, cases = edits
    content, loaded = json.loads((whole / name).read_text()), []
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for path, values in cases:
        for value in values:
            data = json.loads(json.dumps(content))
            put(data, path, value)
            (folder / name).write_text(json.dumps(data))
            checkpoint.seal(folder)
            try:
                Pipeline.from_pretrained(folder)
                loaded.append((path, repr(value)[:80]))
            except ZipperError as error:
                assert str(folder) in str(error)
    assert not loaded


def test_nothing_is_unpickled_no_code_runs_and_no_file_is_opened_elsewhere(
    whole: Path, tmp_path: Path
) -> None:
    """An audit hook hears of everything that Python opens, imports and unpickles while a zip is
    loaded."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    program = """
import json, sys, sysconfig
from pathlib import Path
from zipper.pipeline import Pipeline
folder, seen = sys.argv[1], []
EVENTS = "pickle.find_class exec compile import open subprocess.Popen os.system socket.connect marshal.loads".split()
Pipeline.from_pretrained()  # what libraries do once: imports, caches
def hook(event, arguments):
    if event in EVENTS:
        seen.append((event, str(arguments[0])))
sys.addaudithook(hook)
Pipeline.from_pretrained(folder)
open(sys.argv[2]).close()  # a control: the hook hears
heard, seen[:] = [*seen], []
print(json.dumps({"heard": heard, "libraries": [*sysconfig.get_paths().values(), *(str(Path(p)) for p in sys.path if p)]}))
"""
    (tmp_path / "control").touch()
    run = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "control"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert run.returncode == 0, run.stderr[-2_000:]
    found = json.loads(run.stdout.splitlines()[-1])
    events = [(event, what) for event, what in found["heard"] if what != str(tmp_path / "control")]
    assert len(events) == len(found["heard"]) - 1
    opened = [what for event, what in events if event == "open"]
    assert any(what == str(folder / "zipper.json") for what in opened)
    elsewhere = [
        w
        for w in opened
        if not w.startswith((str(folder), "/proc/", "/sys/", *found["libraries"]))
        and not w.isdigit()
    ]
    assert not elsewhere
    assert not [
        (event, what)
        for event, what in events
        if event not in ("open", "import", "compile", "exec", "marshal.loads")
    ]
    assert not [(event, what) for event, what in events if event != "open" and str(folder) in what]


def test_the_reader_of_headers_agrees_with_safetensors_on_files_that_are_whole(whole: Path) -> None:
    from zipper.saving.files import header

    for name in files(whole, ".safetensors"):
        content, held = (whole / name).read_bytes(), load_file(whole / name)
        entries = header(whole / name)
        assert {n: entry.shape for n, entry in entries.items()} == {
            n: tuple(t.shape) for n, t in held.items()
        }
        for n, entry in entries.items():
            assert entry.dtype == "F32"
            np.testing.assert_array_equal(
                np.frombuffer(content[entry.start : entry.stop], np.float32),
                held[n].numpy().ravel(),
            )
