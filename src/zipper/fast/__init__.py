"""Decoding at the limit of the machine: weights laid out, compiled steps, CUDA graphs, proofs
remembered."""

from zipper.fast.reader import Fused
from zipper.generation import Engine
from zipper.model import Zipper
from zipper.reading import Model, Reader, Stepwise
from zipper.tower import UnsupportedTower


def fastest(model: Model) -> Reader:
    """The fast reader for a zip whose towers are all of a known kind, else one by the model's own
    steps. It takes the weights as they are now."""
    if isinstance(model, Zipper):
        try:
            return Fused(model)
        except UnsupportedTower:
            pass
    return Stepwise(model)


def engine(model: Model, rows: int = 8, reader: Reader | None = None) -> Engine:
    """An engine for many requests at once, `rows` of them side by side. reader: default
    `fastest`."""
    return Engine(model, fastest(model) if reader is None else reader, rows)
