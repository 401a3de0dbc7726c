"""The shipped model, second half: goes on from recipes/spoken_commands.py with calibrated links.

The first half learned everything but which digit was meant: a frozen text tower keeps digits close
together, and along such directions a link learns slowly. Calibration changes how fast, not what,
the links compute (docs/log.md).
"""

import dataclasses
import runpy
from pathlib import Path

from zipper.training import TrainConfig

FIRST = runpy.run_path(str(Path(__file__).parent / "spoken_commands.py"))
prepare = FIRST["prepare"]


def config() -> TrainConfig:
    """The first recipe with links calibrated on 1,000 pairs and a second, lower, cosine."""
    return dataclasses.replace(
        FIRST["config"](),
        output="runs/spoken-commands-2",
        start="runs/spoken-commands/model",
        calibrate=1000,
        tasks={"heard:speech -> said:text": 0.25, "text -> voiced:speech": 0.75},
        steps=2200,
        warmup=60,
        lr_new=1.5e-3,
        lr_tower=4e-4,
        eval_every=220,
        seed=2,
    )
