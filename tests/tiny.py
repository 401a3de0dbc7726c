"""A world so small that a run takes seconds: a tokenizer, a codebook, two towers, and pairs that
follow a rule.

Its "speech" is no recording of its text: every token of text is two codes, by a rule that a zip can
learn.
"""

import dataclasses
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from zipper.data import manifests as data
from zipper.link import LinkConfig
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.tower import Tower
from zipper.training import TrainConfig

logging.disable_progress_bar()

WORDS = "send call turn pay anna peter red blue two five lamp oven".split()
CODES = 24
BOTH = {"speech -> text": 0.5, "text -> voice~speech": 0.5}


#: Of MoonshineConfig, an encoder of three blocks.
MOONSHINE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "encoder_num_hidden_layers": 3,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 2,
    "decoder_num_key_value_heads": 2,
    "vocab_size": 40,
}


@cache
def text(merges: int = 12) -> Text:
    """A tokenizer of some 40 ids."""
    return Text.train([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], merges)


@cache
def units(seed: int = 0) -> SpeechUnits:
    """24 codes that mean nothing, and two voices."""
    codebook = np.random.default_rng(seed).normal(-4, 2, (CODES, 160)).astype(np.float32)
    return SpeechUnits(codebook, UnitsConfig(voices=("low", "high"), fitted_on="nothing"))


def shape(layers: int = 2) -> dict[str, Any]:
    """A fresh tower as a recipe names it."""
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }


def tower(modality: Text | SpeechUnits, layers: int = 2) -> Tower:
    """A random tower with the ids of a modality."""
    ids = {
        "vocab_size": modality.vocabulary,
        "bos_token_id": modality.begin,
        "eos_token_id": modality.end,
    }
    return Tower(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape(layers), **ids)))


def pairs(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a manifest: a sentence of two to four words, its codes by the rule, a voice."""
    chance = random.Random(seed)
    rows = []
    for number in range(n):
        said = " ".join(chance.choices(WORDS, k=chance.randrange(2, 5)))
        codes = [code for t in text().encode(said) for code in (7 * t % CODES, (5 * t + 1) % CODES)]
        rows.append(
            {"id": str(number), "text": said, "speech": codes, "voice": ("low", "high")[number % 2]}
        )
    return rows


def sound(path: Path, seconds: float = 1.0, rate_hz: int = 16_000, seed: int = 0) -> Path:
    """A sound file of noise that swells and falls four times a second, as speech does."""
    import soundfile  # a GPU machine may lack it

    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate_hz))
    swell_db = 15 * np.sin(2 * np.pi * 4 * np.arange(len(noise)) / rate_hz)
    soundfile.write(path, (noise * 10 ** ((swell_db - 15) / 20)).astype(np.float32), rate_hz)
    return path


@dataclass(frozen=True)
class World:
    """A folder with everything a run needs, and a saved zip with its gates open: text frozen,
    speech trained."""

    folder: Path

    @property
    def zip(self) -> Path:
        """The saved pipeline."""
        return self.folder / "zip"

    def config(self, output: Path, **changes: Any) -> TrainConfig:
        """A recipe of a few steps."""
        config = TrainConfig(
            output=str(output),
            towers={name: str(self.folder / name / "tower") for name in ("text", "speech")},
            modalities={name: str(self.folder / name) for name in ("text", "speech")},
            data=str(self.folder / "pairs.jsonl"),
            dev=str(self.folder / "dev.jsonl"),
            tasks=BOTH,
            train=("speech",),
            link=LinkConfig(head_width=16, gate_init=0.6),
            input_projection="none",
            steps=6,
            batch=4,
            warmup=2,
            log_every=2,
            eval_every=3,
            eval_rows=8,
            save_every=4,
            trackers=(),
        )
        return dataclasses.replace(config, **changes)


def world(folder: Path) -> World:
    """Make one."""
    modalities = {"text": text(), "speech": units()}
    for name, modality in modalities.items():
        modality.save(folder / name)
        tower(modality).model.save_pretrained(folder / name / "tower")
    data.write(folder / "pairs.jsonl", pairs(80))
    data.write(folder / "dev.jsonl", pairs(12, seed=1))
    model = Zipper.from_towers(
        {name: folder / name / "tower" for name in modalities},
        train=("speech",),
        link=LinkConfig(head_width=16, gate_init=0.6),
        tokens={"text": 8.0, "speech": 14.0},
    )
    Pipeline(model, modalities).save_pretrained(folder / "zip")
    return World(folder)


def notes(world: World) -> Path:
    """A saved zip of the world's text and other text, beside its own."""
    other = text(3)
    other.save(world.folder / "other")
    tower(other).model.save_pretrained(world.folder / "other" / "tower")
    model = Zipper.from_towers(
        {"text": world.folder / "text" / "tower", "notes": world.folder / "other" / "tower"},
        train=("notes",),
        link=LinkConfig(head_width=8, gate_init=0.6),
        tokens={"text": 9.0, "notes": 11.0},
    )
    texts = {"text": Text.load(world.folder / "text"), "notes": other}
    Pipeline(model, texts).save_pretrained(world.folder / "notes")
    return world.folder / "notes"
