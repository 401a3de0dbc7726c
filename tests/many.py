"""A zip of five kinds of modality, random and tiny: what a page or a server does with each."""

import numpy as np
import torch
from tiny import text, tower, units

from zipper.link import LinkConfig
from zipper.modality.image import Image
from zipper.modality.signal import Signal
from zipper.modality.symbols import Symbols
from zipper.model import Zipper
from zipper.pipeline import Pipeline


def pictures(n: int = 12) -> list[np.ndarray]:
    """Squares on a ground, grey, of 16x16 pixels."""
    chance = np.random.default_rng(0)
    found = []
    for _ in range(n):
        picture = np.full((16, 16), chance.integers(0, 80), np.uint8)
        row, column = chance.integers(0, 10, 2)
        picture[row : row + 6, column : column + 6] = chance.integers(150, 255)
        found.append(picture)
    return found


def waves(n: int = 8) -> list[dict[str, object]]:
    """Two seconds of two channels that swing."""
    time = np.arange(100) / 50
    return [
        {
            "values": np.stack([np.sin(time * (3 + k)), np.cos(time * (5 + k))], 1).tolist(),
            "rate_hz": 50,
            "channels": ["ax", "ay"],
        }
        for k in range(n)
    ]


def pipe() -> Pipeline:
    """Text, speech, pictures, motion and letters of a protein, zipped at random."""
    kinds = {
        "text": text(),
        "speech": units(),
        "picture": Image.fitted(pictures(), codes=12, patch=4, size=(16, 16), channels=1),
        "motion": Signal.fitted(waves(), codes=12),
        "protein": Symbols.fitted(["MKTAYIAKQR", "GAVLIPFYWS"]),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Zipper.from_towers(
            {name: tower(kind) for name, kind in kinds.items()},
            train=("speech",),
            link=LinkConfig(head_width=16, gate_init=0.6),
            tokens=dict.fromkeys(kinds, 12.0),
        )
    return Pipeline(model, kinds)
