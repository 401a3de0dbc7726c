"""Raw data that nobody should give, to every kind of modality, in a process of its own: what each
says, and how far memory rises beyond the data. Prints a line of JSON for each.

Started by tests/test_adversarial.py.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as Pillow

from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.modality.codec import Codec
from zipper.modality.encoder import EncoderUnits
from zipper.modality.image import Image
from zipper.modality.signal import Signal
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper.modality.symbols import Symbols
from zipper.modality.text import Text

MANY = 100_000_000


def kinds() -> dict[str, Any]:
    """One of each, tiny."""
    chance = np.random.default_rng(0)
    book = chance.normal(-4, 2, (8, 160)).astype(np.float32)
    config = transformers.DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_hidden_size=16,
        n_codebooks=3,
        codebook_size=32,
    )
    hubert = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    noise = [Audio(chance.normal(0, 0.1, 8_000).astype(np.float32), 16_000) for _ in range(3)]
    walk = {"values": chance.normal(0, 1, (400, 2)), "rate_hz": 50, "channels": ["ax", "ay"]}
    pictures = [chance.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(4)]
    torch.manual_seed(0)
    return {
        "text": Text.train(["a red lamp", "a blue lamp"], 5),
        "symbols": Symbols.dna(),
        "speech": SpeechUnits(book, UnitsConfig(fitted_on="nothing")),
        "codec": Codec.from_pretrained(transformers.DacModel(config)),
        "units": EncoderUnits.fitted(noise, transformers.HubertModel(hubert), 1, 6),
        "image": Image.fitted(pictures, 16, size=(16, 16)),
        "signal": Signal.fitted([walk], codes=8),
    }


def sounds(folder: Path) -> Iterator[tuple[str, Any]]:
    """For the kinds that are made of sound."""
    yield "a number", 3.5
    yield "no samples", Audio(np.zeros(0, np.float32), 16_000)
    yield "one sample", Audio(np.ones(1, np.float32), 16_000)
    yield "many samples", Audio(np.zeros(MANY, np.float32), 16_000)
    for name, samples in {
        "NaN": np.full(4_000, np.nan, np.float32),
        "infinity": np.full(4_000, np.inf, np.float32),
        "two channels": np.zeros((4_000, 2), np.float32),
    }.items():
        yield name, lambda samples=samples: Audio(samples, 16_000)
    path, rate = folder / "many.wav", (16_000).to_bytes(4, "little")
    size = 2 * MANY
    head = b"RIFF" + (36 + size).to_bytes(4, "little") + b"WAVEfmt \x10\0\0\0\1\0\1\0" + rate
    head += (32_000).to_bytes(4, "little") + b"\2\0\x10\0data" + size.to_bytes(4, "little")
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + size)  # zeros that take no room on the disk
    yield "a file of many samples", path


def pictures(folder: Path) -> Iterator[tuple[str, Any]]:
    """For pictures."""
    chance = np.random.default_rng(0)
    small = Pillow.fromarray(chance.integers(0, 256, (16, 16, 3), np.uint8))
    yield "one pixel", np.zeros((1, 1), np.uint8)
    yield "CMYK", small.convert("CMYK")
    yield "NaN", np.full((8, 8), np.nan)
    yield "two channels", np.zeros((8, 8, 2), np.uint8)
    yield "no pixels", np.zeros((0, 8, 3), np.uint8)
    yield "many pixels", np.zeros((10_000, 10_000), np.uint8)
    small.save(folder / "moves.gif", save_all=True, append_images=[small.rotate(90)])
    yield "animated", folder / "moves.gif"
    Pillow.new("1", (30_000, 20_000)).save(folder / "huge.png")
    yield "huge in a small file", folder / "huge.png"
    Pillow.new("L", (9_000, 60_000)).save(folder / "huge.jpg", quality=1)
    yield "huge JPEG in a small file", folder / "huge.jpg"


def series(folder: Path) -> Iterator[tuple[str, Any]]:
    """For signals."""
    row = {"rate_hz": 50, "channels": ["ax", "ay"]}
    yield "NaN", {**row, "values": [[0.0, float("nan")]] * 20}
    yield "wrong channels", {"rate_hz": 50, "channels": ["ax", "az"], "values": [[0.0, 1.0]] * 20}
    yield "three channels", {**row, "values": [[0.0, 1.0, 2.0]] * 20}
    yield "no rate", {"channels": ["ax", "ay"], "values": [[0.0, 1.0]] * 20}
    yield "no steps", {**row, "values": []}
    yield "one step", {**row, "values": [[0.0, 1.0]]}
    yield "many steps", np.zeros((MANY // 2, 2), np.float32)
    np.lib.format.open_memmap(folder / "many.npy", "w+", np.float32, (MANY // 2, 2))
    (folder / "many.json").write_text(json.dumps(row))
    yield "a file of many steps", folder / "many.npy"


def strings(letters: str) -> Iterator[tuple[str, Any]]:
    """For text and symbols."""
    yield "a number", float("nan")
    yield "nothing", ""
    yield "bytes", b"\xff\xfe"
    yield "half a letter", "\ud800"
    yield "strangers", "\u2603" * 100
    yield "many", letters * (MANY // len(letters))


def rise(kind: Any, raw: Any) -> dict[str, Any]:
    """What it says of one, and by how many MB memory rose meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _memory("VmRSS")
    try:
        given = raw() if callable(raw) else raw
        said = f"{len(kind.encode(kind.read(given)))} ids"
    except ZipperError as error:
        said = f"refused: {error}"
    return {"said": said, "rise_mb": _memory("VmHWM") - before}


def _memory(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) >> 10


def main() -> None:
    """Every kind, every value."""
    folder = Path(sys.argv[1])
    given: Mapping[str, Any] = {
        "text": lambda: strings("a red lamp "),
        "symbols": lambda: strings("ACGT"),
        "image": lambda: pictures(folder),
        "signal": lambda: series(folder),
    }
    for name, kind in kinds().items():
        for what, raw in given.get(name, lambda: sounds(folder))():
            print(json.dumps({"kind": name, "what": what, **rise(kind, raw)}), flush=True)


if __name__ == "__main__":
    main()
