"""Training: one loop for a tower alone and for a zip; what it costs, how it is resumed, what it
left behind.

The names are loaded when they are first used: a run is looked at without what trains it.
"""

from typing import TYPE_CHECKING

from zipper.former import names_of

if TYPE_CHECKING:
    from zipper.training.building import build as build
    from zipper.training.config import TrainConfig as TrainConfig
    from zipper.training.loop import CLOCK as CLOCK
    from zipper.training.loop import Objective as Objective
    from zipper.training.loop import Stopped as Stopped
    from zipper.training.loop import gates as gates
    from zipper.training.loop import train as train
else:
    _FILES = ("config", "building", "loop", "batches", "resume")
    __getattr__ = names_of(__name__, tuple(f"{__name__}.{file}" for file in _FILES))
