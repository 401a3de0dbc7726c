"""The text tower of the shipped model: 0.8M parameters on 60,000 spoken commands, as text only."""

from pathlib import Path

from zipper.data import manifests as data
from zipper.modality.text import Text
from zipper.training import TrainConfig
from zipper_lab.corpora import commands as corpus
from zipper_lab.demo import TEXT_TOWER

FOLDER = Path("runs/data")


def prepare() -> None:
    """Sentences of the unpaired text part, and a tokenizer trained on them."""
    if (FOLDER / "text.jsonl").exists():
        return
    rows = {
        part: [{"id": u.id, "text": u.text} for u in corpus.sentences(part, n)]
        for part, n in {"text": 60_000, "dev": 400}.items()
    }
    Text.train([row["text"] for row in rows["text"]], merges=150).save(FOLDER / "text")
    data.write(FOLDER / "text_dev.jsonl", rows["dev"])
    data.write(FOLDER / "text.jsonl", rows["text"])


def config() -> TrainConfig:
    """One epoch and a bit; it does not overfit (docs/log.md)."""
    return TrainConfig(
        output="runs/text-tower",
        towers={"text": TEXT_TOWER},
        modalities={"text": str(FOLDER / "text")},
        data=str(FOLDER / "text.jsonl"),
        dev=str(FOLDER / "text_dev.jsonl"),
        tasks={"-> text": 1.0},
        steps=2400,
        batch=32,
        lr_tower=2e-3,
        eval_every=200,
        save_dtype="float16",
    )
