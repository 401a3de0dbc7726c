"""The shipped model: text frozen, speech trained, on 50,000 pairs of spoken commands, both
directions."""

from pathlib import Path

from zipper.data import manifests as data
from zipper.link import LinkConfig
from zipper.modality.speech import SpeechUnits
from zipper.training import TrainConfig
from zipper_lab.corpora import commands as corpus

FOLDER = Path("runs/data")


def prepare() -> None:
    """Pairs in the units of the speech tower (recipes/speech_tower.py comes first)."""
    if (FOLDER / "pairs.jsonl").exists():
        return
    units = SpeechUnits.load(FOLDER / "speech")
    for name, part, n in [("pairs_dev", "dev", 400), ("pairs", "pairs", 50_000)]:
        data.write(FOLDER / f"{name}.jsonl", corpus.rows(part, n, units, takes=1))


def config() -> TrainConfig:
    """A link after every block; gates start open because that learns faster (SPIKE,
    docs/log.md)."""
    return TrainConfig(
        output="runs/spoken-commands",
        towers={
            "text": "runs/text-tower/model/towers/text",
            "speech": "runs/speech-tower/model/towers/speech",
        },
        modalities={"text": str(FOLDER / "text"), "speech": str(FOLDER / "speech")},
        data=str(FOLDER / "pairs.jsonl"),
        dev=str(FOLDER / "pairs_dev.jsonl"),
        tasks={"heard:speech -> said:text": 0.3, "text -> voiced:speech": 0.7},
        train=("speech",),
        every={"text": 1, "speech": 1},
        link=LinkConfig(gate_init=0.6, dropout=0.1),
        input_projection="none",
        steps=6400,
        batch=32,
        lr_new=2e-3,
        lr_gate=3e-4,
        lr_tower=1e-3,
        corrupt={"speech": 0.05},
        eval_every=400,
        save_dtype="float16",
    )
