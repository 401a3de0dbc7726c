"""The speech tower of the shipped model: 1.8M parameters on 20,000 utterances of unpaired speech,
two voices."""

from pathlib import Path

from zipper.data import manifests as data
from zipper.modality.speech import SpeechUnits
from zipper.training import TrainConfig
from zipper_lab.corpora import commands as corpus
from zipper_lab.demo import SPEECH_TOWER

FOLDER = Path("runs/data")


def prepare() -> None:
    """A codebook fitted on 600 unpaired utterances, and the units of 20,000."""
    if (FOLDER / "speech.jsonl").exists():
        return
    corpus.fit_units(600).save(FOLDER / "speech")
    units = SpeechUnits.load(FOLDER / "speech")
    for name, part, n in [("speech_dev", "dev", 400), ("speech", "speech", 20_000)]:
        rows = corpus.rows(part, n, units)
        data.write(
            FOLDER / f"{name}.jsonl",
            [{k: row[k] for k in ("id", "speech", "voice")} for row in rows],
        )


def config() -> TrainConfig:
    """Half of the samples begin with the id of their voice, so that the tower also speaks in a
    chosen voice."""
    return TrainConfig(
        output="runs/speech-tower",
        towers={"speech": SPEECH_TOWER},
        modalities={"speech": str(FOLDER / "speech")},
        data=str(FOLDER / "speech.jsonl"),
        dev=str(FOLDER / "speech_dev.jsonl"),
        tasks={"-> speech": 0.5, "-> voice~speech": 0.5},
        steps=2400,
        batch=32,
        lr_tower=2e-3,
        corrupt={"speech": 0.05},
        eval_every=200,
        save_dtype="float16",
    )
