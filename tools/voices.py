"""How well units say what was said, by judges that nobody here trained.

    python tools/voices.py say FOLDER --wordnet FOLDER         # the voice: 500 sentences to learn from, 24 to test
    python tools/voices.py measure FOLDER/test.jsonl -o FOUND.json \\
        --judge WHISPER --judge distillmos --units NAME=FOLDER --units NAME=FOLDER

`measure` makes sound of the units of every sound, by each modality of sound that is given (`zipper
fit`), and of the mels alone by each of their HiFi-GANs; beside them stand the sounds themselves (the
oracle) and another sentence, or noise (the floor). One thread. What FOUND.json holds already is not
done again. It prints the table of docs/voices.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zipper import modality
from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.evaluation import error_rate, floor_random
from zipper.modality.renderer import Voice, log_mels
from zipper_lab import recognisers
from zipper_lab.corpora import english
from zipper_lab.recognisers import Opinion, Rated

LEARNT, BEFORE = 500, 4_000  # sentences of the part "train", and how far from its end they begin


def say(folder: Path, wordnet: str, count: int) -> None:
    """Sounds to fit to, of sentences of the part "train", and those to test, of unseen chapters."""
    known = english.sentences("train", wordnet)
    heard = [each for each in english.sentences("test", wordnet) if each.source == "novels"]
    for name, some in {"train": known[-BEFORE:][:LEARNT], "test": heard[:count]}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for each in some:
            audio.write(folder / name / f"{each.id}.wav", english.synthesize(each.text))
            rows.append({"id": each.id, "text": each.text, "speech": f"{name}/{each.id}.wav"})
        manifests.write(folder / f"{name}.jsonl", rows)


Made = tuple[list[Audio], float, float]  # sounds; units and seconds of a thread a second of sound


def systems(
    given: dict[str, Path], sounds: Sequence[Audio]
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Each with its name, and what makes its sounds; nothing is made before it is asked for."""
    seen = set[str]()
    yield "the sounds themselves (oracle)", lambda: ([*sounds], 0.0, 0.0)
    for name, folder in given.items():
        yield name, lambda folder=folder: _units(folder, sounds)
        drawn = folder / "vocoder.json"
        if (folder / f"{Voice.FILE}.json").is_file() and drawn.read_text() not in seen:
            seen.add(drawn.read_text())
            yield f"mels alone, the HiFi-GAN of {name}", lambda folder=folder: _mels(folder, sounds)


def _units(folder: Path, sounds: Sequence[Audio]) -> Made:
    kind: Any = modality.load(folder)
    ids = [kind.encode(sound) for sound in sounds]
    started = time.thread_time()
    made = [kind.decode(each) for each in ids]
    seconds = sum(sound.seconds for sound in sounds)
    return made, sum(map(len, ids)) / seconds, (time.thread_time() - started) / seconds


def _mels(folder: Path, sounds: Sequence[Audio]) -> Made:
    kind: Any = modality.load(folder)
    network, rate_hz = kind.vocoder.hifigan.model, kind.vocoder.rate_hz
    started = time.thread_time()
    with torch.no_grad():
        mels = [torch.from_numpy(log_mels(sound, network.config)) for sound in sounds]
        made = [Audio(network(each).numpy(), rate_hz) for each in mels]
    seconds = sum(sound.seconds for sound in sounds)
    return made, 0.0, (time.thread_time() - started) / seconds


def _sizes(folder: Path | None) -> dict[str, float]:
    """Megabytes of what makes units, and of what makes sound of them."""
    if folder is None:
        return {}
    files = {path.name: path.stat().st_size / 1e6 for path in folder.iterdir()}
    heard = sum(size for name, size in files.items() if name.startswith("encoder"))
    return {"hears_mb": heard, "says_mb": sum(files.values()) - heard}


def measure(
    rows: Path, given: dict[str, Path], judges: Sequence[str], found: Path
) -> dict[str, Any]:
    """Every system by every judge; kept after each."""
    torch.set_num_threads(1)
    lines = manifests.manifest(rows)
    texts = [row["text"] for row in lines]
    sounds = [audio.read(rows.parent / row["speech"]) for row in lines]
    kept: dict[str, Any] = json.loads(found.read_text()) if found.is_file() else {}
    ears = recognisers.all_named(judges)
    for name, told in kept.items():
        if missing := {ear.name for ear in ears} - {*told["by"]}:
            raise ZipperError(f"{found} has {name!r} not by {min(missing)}. Give another file.")
    for name, make in systems(given, sounds):
        if name in kept:
            continue
        made, rate, real_time = make()
        about = {"units_per_s": rate, "real_time": real_time} | _sizes(given.get(name))
        kept[name] = about | _judged(name, made, texts, ears)
        found.write_text(json.dumps(kept, indent=1))
        print(name, json.dumps(kept[name]), flush=True)
    if "floor" not in kept:
        other = floor_random(texts)
        by = {
            ear.name: _rate(texts, other, ear.normaliser)
            for ear in ears
            if not isinstance(ear, Opinion)
        }
        noise = recognisers.noise(sounds)
        by |= {
            ear.name: asdict(Rated.of("floor", ear, noise))
            for ear in ears
            if isinstance(ear, Opinion)
        }
        kept["floor"] = {"by": by}
        found.write_text(json.dumps(kept, indent=1))
    return kept


def _judged(
    name: str, made: Sequence[Audio], texts: Sequence[str], ears: Sequence[Any]
) -> dict[str, Any]:
    by: dict[str, Any] = {}
    for ear in ears:
        if isinstance(ear, Opinion):
            by[ear.name] = asdict(Rated.of(name, ear, made))
        else:
            heard = [ear.transcribe(sound) for sound in made]
            by[ear.name] = _rate(texts, heard, ear.normaliser) | {"heard": heard}
    return {"by": by}


def _rate(texts: Sequence[str], heard: Sequence[str], normaliser: str) -> dict[str, Any]:
    return asdict(error_rate(texts, heard, normaliser=normaliser))


def table(kept: dict[str, Any]) -> str:
    """As Markdown."""
    judges = [*dict.fromkeys(judge for one in kept.values() for judge in one["by"])]
    lines = [
        f"| | {' | '.join(judges)} | units/s | MB to hear, to say | seconds a second |",
        "|---" * (len(judges) + 4) + "|",
    ]
    for name, one in kept.items():
        cells = [_cell(one["by"].get(judge)) for judge in judges]
        sizes = f"{one['hears_mb']:.1f}, {one['says_mb']:.1f}" if "says_mb" in one else ""
        rate, real = (
            f"{one.get(key) or 0:.{n}f}" for key, n in (("units_per_s", 1), ("real_time", 2))
        )
        rest = [rate if float(rate) else "", sizes, real if float(real) else ""]
        lines.append(f"| {' | '.join([name, *cells, *rest])} |")
    return "\n".join(lines)


def _cell(by: Any) -> str:
    if by is None:
        return ""
    if "mos" in by:
        return f"{by['mos']:.2f} ({by['low']:.2f} to {by['high']:.2f})"
    return f"{by['wer']:.1%} ({by['low']:.1%} to {by['high']:.1%}), characters {by['cer']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    todo = parser.add_subparsers(dest="todo", required=True)
    one = todo.add_parser("say")
    one.add_argument("folder", type=Path)
    one.add_argument(
        "--wordnet", required=True, help="a folder with WordNet's data.noun and others"
    )
    one.add_argument("--count", type=int, default=24, help="sentences to test")
    two = todo.add_parser("measure")
    two.add_argument("rows", type=Path, help="manifest of text and speech, a sound file")
    two.add_argument("--units", action="append", default=[], metavar="NAME=FOLDER")
    two.add_argument("--judge", action="append", default=[], help="as of zipper evaluate --judge")
    two.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    if given.todo == "say":
        say(given.folder, given.wordnet, given.count)
        return
    named = {
        name: Path(folder) for name, _, folder in (each.partition("=") for each in given.units)
    }
    print(table(measure(given.rows, named, given.judge, given.output)))


if __name__ == "__main__":
    main()
