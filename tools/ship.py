"""Puts the trained model into the package: `python tools/ship.py` after the recipes of
README.md have run.

The zip goes in half precision with its frozen text tower; beside it the speech tower as it was
before alignment, for `zipper demo` to start from.
"""

import shutil
from pathlib import Path

import torch

from zipper.pipeline import SHIPPED, Pipeline
from zipper.saving import checkpoint
from zipper_lab.demo import TOWERS

RUN = Path("runs/spoken-chains/model")
SPEECH = Path("runs/speech-tower/model/towers/speech")


def main() -> None:
    """Write SHIPPED and the pre-trained speech tower; print their size."""
    record = checkpoint.load(RUN)[1]
    pipeline = Pipeline.from_pretrained(RUN)
    pipeline.model.cast(torch.float16)
    pipeline.save_pretrained(SHIPPED, include=["text"], record=record)
    shutil.rmtree(TOWERS["speech"], ignore_errors=True)
    shutil.copytree(SPEECH, TOWERS["speech"])
    size = sum(f.stat().st_size for f in SHIPPED.parent.rglob("*") if f.is_file())
    print(f"{SHIPPED.parent.name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
