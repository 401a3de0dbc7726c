"""Zipper: pre-trained decoders of single modalities, fused by gated cross-attention
(arXiv:2405.18669).

The public names are loaded when they are first used, so that `import zipper` and `zipper --help`
answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipper.audio.sound import Audio
    from zipper.errors import ZipperError
    from zipper.link import LinkConfig
    from zipper.model import Zipper, ZipperConfig
    from zipper.pipeline import Pipeline
    from zipper.sampling import Sampling
    from zipper.strand import Segment
    from zipper.tasks import Task
    from zipper.tower import Strand, Tower
    from zipper.training.loop import TrainConfig

__version__ = "0.1.0"

_HOME = {
    "Audio": "audio",
    "LinkConfig": "link",
    "Pipeline": "pipeline",
    "Sampling": "sampling",
    "Segment": "sequence",
    "Strand": "tower",
    "Task": "tasks",
    "Tower": "tower",
    "TrainConfig": "training",
    "Zipper": "model",
    "ZipperConfig": "model",
    "ZipperError": "errors",
}

__all__ = [
    "Audio",
    "LinkConfig",
    "Pipeline",
    "Sampling",
    "Segment",
    "Strand",
    "Task",
    "Tower",
    "TrainConfig",
    "Zipper",
    "ZipperConfig",
    "ZipperError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zipper' has no attribute {name!r}")
    return getattr(import_module(f"zipper.{_HOME[name]}"), name)
