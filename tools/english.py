"""The zip that ships, from nothing: a text tower and a speech tower on open English, then the zip.

    python tools/english.py prepare FOLDER --wordnet FOLDER --encoder FOLDER|ID    # two cores, an hour
    python tools/english.py train FOLDER -o FOLDER --seconds 480                   # of a GPU

`prepare` says the corpus (`zipper_lab.corpora.english`) and leaves it as ids, some 20 MB, with both
modalities: all that a machine needs that cannot speak. `train` measures how fast it is here, and
takes as many steps as the seconds allow, both towers at once: models so small wait for the next
kernel most of the time. Both commands go on where an earlier call was killed.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zipper import modality
from zipper.data import manifests
from zipper.link import LinkConfig
from zipper.modality.encoder import EncoderUnits
from zipper.modality.text import Text
from zipper.saving.files import write_json
from zipper.training import TrainConfig, train
from zipper_lab import demo
from zipper_lab.corpora import english

LAYER, CODES = 5, 1024  # docs/log.md: words of unseen people are told apart best in blocks 4 and 5
FITTED = 1200  # utterances that the codebook is made of, two thirds of them disturbed
MERGES = 2000
TEXT_TOWER = demo.TEXT_TOWER | {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
}
SPEECH_TOWER = demo.SPEECH_TOWER | {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
#: Share of the samples: those with a disturbed take, and those without.
PAIRS = {"pairs_taken": 0.4, "pairs_clean": 0.6}
#: Share of the seconds, samples of a step. The towers, which come first, are trained at once.
STAGES = {"text": (0.2, 1024), "speech": (0.2, 512), "zip": (0.8, 512)}
TOWERS = ("text", "speech")
PROBE = 36  # steps by which a machine's pace is measured; the middle third counts
LEAST = 20  # steps of a stage, whatever its share
WORKERS = 4  # processes that make batches, of each stage


def prepare(folder: Path, wordnet: str, encoder: str, taken: int, clean: int, workers: int) -> None:
    """The modalities, and every manifest as ids."""
    train_set = english.sentences("train", wordnet)
    if not (folder / "speech" / "modality.json").is_file():
        behind = train_set[-FITTED:]
        sounds = [english.synthesize(each.text, each.pace) for each in behind[: FITTED // 3]]
        sounds += [english.take(each)[0] for each in behind[FITTED // 3 :]]
        fitted = EncoderUnits.fitted(sounds, encoder, LAYER, CODES, merged=True)
        modality.save(fitted, folder / "speech")
    units = modality.load(folder / "speech")
    texts = [each.text for each in train_set] + english.definitions(wordnet)
    text = Text.train([each.text for each in train_set], MERGES)
    modality.save(text, folder / "text")
    manifests.write(folder / "text.jsonl", ({"text": text.encode(line)} for line in texts))
    held = {part: english.sentences(part, wordnet) for part in ("dev", "test")}
    parts = {
        "dev": (held["dev"][:240], True),
        "test": (
            [*_first(held["test"], "novels", 300), *_first(held["test"], "wordnet", 300)],
            True,
        ),
        "pairs_taken": (train_set[:taken], True),
        "pairs_clean": (train_set[taken : taken + clean], False),
    }
    for name, (utterances, again) in parts.items():
        said = english.rows(utterances, units, again, workers, folder / "cache")
        manifests.write(folder / f"{name}.jsonl", (_ids(row, text) for row in said))
    pairs = [row for name in PAIRS for row in manifests.manifest(folder / f"{name}.jsonl")]
    heard = [row["heard:speech"] for row in pairs if row["heard:speech"] != row["speech"]]
    alone = [*(row["speech"] for row in pairs), *heard]
    manifests.write(folder / "speech.jsonl", ({"speech": ids} for ids in alone))


def _first(utterances: Any, source: str, count: int) -> list[Any]:
    return [each for each in utterances if each.source == source][:count]


def _ids(row: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """As ids; what was not disturbed is heard as it was said."""
    heard, said = row.get("heard:speech", row["speech"]), row.get("said:text", row["text"])
    return {
        "id": row["id"],
        "text": text.encode(row["text"]),
        "speech": row["speech"],
        "heard:speech": heard,
        "said:text": text.encode(said) if said else [],
    }


def configs(folder: Path, output: Path) -> Iterator[tuple[str, TrainConfig]]:
    """Each stage's recipe, one step long."""
    pairs = {str(folder / f"{name}.jsonl"): share for name, share in PAIRS.items()}
    dev = str(folder / "dev.jsonl")
    shapes = {"text": TEXT_TOWER, "speech": SPEECH_TOWER}
    common: dict[str, Any] = {
        "dev": dev,
        "steps": 1,
        "mixed_precision": "bf16",
        "save_dtype": "float16",
        "trackers": (),
        "warmup": 100,
        "keep": 1,
        "eval_rows": 240,
        "workers": WORKERS,
    }
    for name, shape in shapes.items():
        yield (
            name,
            TrainConfig(
                output=str(output / name),
                towers={name: shape},
                modalities={name: str(folder / name)},
                data=str(folder / f"{name}.jsonl"),
                tasks={f"-> {name}": 1.0},
                corrupt={name: 0.05},
                lr_tower=2e-3,
                batch=STAGES[name][1],
                **common,
            ),
        )
    yield (
        "zip",
        TrainConfig(
            output=str(output / "zip"),
            towers={name: str(output / name / "model" / "towers" / name) for name in shapes},
            modalities={name: str(folder / name) for name in shapes},
            data=pairs,
            tasks={"heard:speech -> said:text": 0.55, "text -> speech": 0.45},
            loss_weight={"text": 2.0},
            train=TOWERS,
            together=True,
            every={"text": 1, "speech": 1},
            shows={"text": 0, "speech": [2, 3, 4, 5, 6]},
            link=LinkConfig(gate_init=1.2, dropout=0.05),
            calibrate=500,
            input_projection="none",
            lr_gate=3e-4,
            lr_new=2e-3,
            lr_tower=1e-3,
            corrupt={"speech": 0.05, "text": 0.05},
            batch=STAGES["zip"][1],
            **common,
        ),
    )


def pace(config: TrainConfig) -> float:
    """Seconds that a step takes here: without the first ones, which are slow, and without the
    evaluation and the save behind the last."""
    seen: dict[int, float] = {}
    output = Path(f"{config.output}-probe")
    if output.exists():  # of a call that was killed
        shutil.rmtree(output)
    probe = replace(
        config,
        output=str(output),
        steps=PROBE,
        warmup=1,
        eval_every=PROBE,
        eval_rows=1,
        save_every=PROBE,
        log_every=PROBE // 3,
    )
    train(probe, report=lambda row: seen.setdefault(row["step"], time.monotonic()))
    first, second = sorted(seen)[:2]
    return (seen[second] - seen[first]) / (second - first)


def run(folder: Path, output: Path, seconds: float) -> None:
    """All stages, and told.json beside them."""
    own = [sys.executable, __file__, "train", str(folder), "-o", str(output)]
    own += ["--seconds", str(seconds), "--stage"]
    running: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
    for stages in (TOWERS, ("zip",)):
        running[:] = [subprocess.Popen([*own, name]) for name in stages]
        if any([process.wait() for process in running]):
            sys.exit(f"{' or '.join(stages)} failed; what was saved is in {output}.")
    found = {name: json.loads((output / f"{name}.json").read_text()) for name in STAGES}
    (output / "told.json").write_text(json.dumps(found, indent=1))


def stage(name: str, folder: Path, output: Path, seconds: float) -> None:
    """One stage, as many steps as its share of the seconds allows; its curve in NAME.json."""
    config = dict(configs(folder, output))[name]
    began, kept = time.monotonic(), output / f"{name}.json"
    if not kept.is_file():
        each = pace(config)
        left = seconds * STAGES[name][0] - (time.monotonic() - began)
        steps = max(LEAST, int(0.94 * left / each))
        write_json(kept, {"steps": steps, "seconds_a_step": each, "rows": []})
    plan = json.loads(kept.read_text())
    steps, every = plan["steps"], max(1, plan["steps"] // 8)

    def told(row: dict[str, Any]) -> None:
        short = {k: v for k, v in row.items() if not k.startswith(("grad/", "gate/", "branch/"))}
        # A run that goes on tells again what its checkpoint had not seen.
        plan["rows"] = [one for one in plan["rows"] if one["step"] < row["step"]] + [short]
        write_json(kept, plan | {"seconds": round(time.monotonic() - began, 1)})

    log_every = max(1, steps // 40)
    config = replace(config, steps=steps, eval_every=every, save_every=every, log_every=log_every)
    train(config, resume=True, report=told)
    print(name, steps, f"{time.monotonic() - began:.0f} s", plan["rows"][-1:], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    todo = parser.add_subparsers(dest="todo", required=True)
    one = todo.add_parser("prepare")
    one.add_argument("folder", type=Path)
    one.add_argument(
        "--wordnet", required=True, help="a folder with WordNet's data.noun and others"
    )
    one.add_argument("--encoder", required=True, help="MoonshineModel, by hub id or folder")
    one.add_argument("--taken", type=int, default=10_000, help="pairs with a disturbed take too")
    one.add_argument("--clean", type=int, default=22_000, help="pairs without one")
    one.add_argument("--workers", type=int, default=2)
    two = todo.add_parser("train")
    two.add_argument("folder", type=Path)
    two.add_argument("-o", "--output", type=Path, required=True)
    two.add_argument("--seconds", type=float, default=480.0, help="of this machine, for all stages")
    two.add_argument("--stage", choices=[*STAGES], help="only this one")
    given = parser.parse_args()
    if given.todo == "prepare":
        prepare(given.folder, given.wordnet, given.encoder, given.taken, given.clean, given.workers)
    else:
        given.output.mkdir(parents=True, exist_ok=True)
        if given.stage:
            stage(given.stage, given.folder, given.output, given.seconds)
        else:
            run(given.folder, given.output, given.seconds)


if __name__ == "__main__":
    main()
