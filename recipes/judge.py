"""The second judge of text to speech: an ASR of our own, trained on true units only, with another
seed than the shipped model.

It never sees a produced utterance. Its towers are those of recipes/spoken_commands.py.
"""

import dataclasses
import runpy
from pathlib import Path

from zipper.training import TrainConfig

ALIGNED = runpy.run_path(str(Path(__file__).parent / "spoken_commands.py"))
prepare = ALIGNED["prepare"]


def config() -> TrainConfig:
    """The shipped recipe with one task and fewer steps."""
    return dataclasses.replace(
        ALIGNED["config"](),
        output="runs/judge",
        tasks={"heard:speech -> said:text": 1.0},
        steps=1200,
        corrupt={},
        eval_every=200,
        seed=1,
    )
