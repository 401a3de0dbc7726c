"""The shipped model: text frozen, speech trained, on 25,000 pairs of spoken commands, both
directions; what is heard is disturbed as microphones do it."""

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
    for name, part, n in [("pairs_dev", "dev", 400), ("pairs", "pairs", 25_000)]:
        data.write(FOLDER / f"{name}.jsonl", corpus.rows(part, n, units, takes=1))


def config() -> TrainConfig:
    """The demo's links, learning longer: speech reads the text tower's embeddings, where a frozen
    tower's words differ most, and shows itself a block further than it is fused (docs/log.md)."""
    return TrainConfig(
        output="runs/spoken-commands",
        towers={
            "text": "runs/text-tower/model/towers/text",
            "speech": "runs/speech-tower/model/towers/speech",
        },
        modalities={"text": str(FOLDER / "text"), "speech": str(FOLDER / "speech")},
        data=str(FOLDER / "pairs.jsonl"),
        dev=str(FOLDER / "pairs_dev.jsonl"),
        tasks={"heard:speech -> said:text": 0.5, "text -> voice~speech": 0.5},
        loss_weight={"text": 2.0},
        train=("speech",),
        every={"text": 1, "speech": 1},
        shows={"text": 0, "speech": [2, 3, 4]},
        link=LinkConfig(gate_init=1.2, dropout=0.0),
        calibrate=1000,
        input_projection="none",
        steps=4000,
        batch=32,
        lr_new=2e-3,
        lr_gate=3e-4,
        lr_tower=1e-3,
        corrupt={"speech": 0.05},
        eval_every=400,
        eval_rows=200,
        save_dtype="float16",
    )
