"""The shipped model's second stage: what follows an answer. Pairs alone never show what comes
behind two segments (docs/log.md); here two samples of five go on to a third."""

import dataclasses
import runpy
from pathlib import Path

from zipper.data import manifests as data
from zipper.modality.speech import SpeechUnits
from zipper.training import TrainConfig
from zipper_lab.corpora import commands as corpus

FIRST = runpy.run_path(str(Path(__file__).parent / "spoken_commands.py"))
ROWS: Path = FIRST["FOLDER"] / "chains.jsonl"


def prepare() -> None:
    """Sentences that the first stage has not seen (recipes/spoken_commands.py comes first)."""
    if not ROWS.exists():
        units = SpeechUnits.load(FIRST["FOLDER"] / "speech")
        data.write(ROWS, corpus.rows("pairs", 8_000, units, seed=1, takes=1))


def config() -> TrainConfig:
    """The first stage's recipe from where it ended, at a third of its rates."""
    first: TrainConfig = FIRST["config"]()
    return dataclasses.replace(
        first,
        output="runs/spoken-chains",
        start="runs/spoken-commands/model",
        data=str(ROWS),
        tasks={
            "heard:speech -> said:text": 0.3,
            "text -> voice~speech": 0.3,
            "speech -> text, voice~speech": 0.2,
            "text -> voice~speech, text": 0.2,
        },
        calibrate=0,
        steps=800,
        lr_new=6e-4,
        lr_gate=1e-4,
        lr_tower=3e-4,
        eval_every=200,
    )
