"""Zipper: pre-trained decoders of single modalities, fused by gated cross-attention
(arXiv:2405.18669).

The public names are loaded when they are first used, so that `import zipper` and `zipper --help`
answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zipper.former import install

if TYPE_CHECKING:
    from zipper.audio.sound import Audio
    from zipper.composition import compose
    from zipper.config import ZipperConfig
    from zipper.errors import ZipperError
    from zipper.link import LinkConfig
    from zipper.model import Zipper
    from zipper.pipeline import Pipeline
    from zipper.sampling import Sampling
    from zipper.strand import Produced, Segment, Strand
    from zipper.tasks import Task
    from zipper.tower import Tower
    from zipper.training.config import TrainConfig

__version__ = "0.1.0"

install()

_HOME = {
    "Audio": "audio",
    "LinkConfig": "link",
    "Pipeline": "pipeline",
    "Produced": "strand",
    "Sampling": "sampling",
    "Segment": "strand",
    "Strand": "strand",
    "Task": "tasks",
    "Tower": "tower",
    "TrainConfig": "training",
    "Zipper": "model",
    "ZipperConfig": "config",
    "ZipperError": "errors",
    "compose": "composition",
}

__all__ = [
    "Audio",
    "LinkConfig",
    "Pipeline",
    "Produced",
    "Sampling",
    "Segment",
    "Strand",
    "Task",
    "Tower",
    "TrainConfig",
    "Zipper",
    "ZipperConfig",
    "ZipperError",
    "compose",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zipper' has no attribute {name!r}")
    return getattr(import_module(f"zipper.{_HOME[name]}"), name)
