"""Digits in three modalities: the word, the sound of somebody saying it, and a picture of somebody
writing it.

The public originals are free-spoken-digit-dataset of GitHub Jakobovski, commit 26eb9aa (CC BY-SA
4.0): WAV of 8 kHz, "7_george_12.wav"; and the 1,797 pictures of 8 by 8 pixels that come with
scikit-learn (UCI, BSD). Nobody said and wrote the same digit: any sound of a 7 goes with any
picture of a 7. Knows no model.
"""

import random
import re
from collections import defaultdict
from itertools import chain, product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from zipper.audio import sound
from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper_lab.corpora import commands
from zipper_lab.corpora.originals import contents, original, part

HOME = "https://github.com/Jakobovski/free-spoken-digit-dataset, its folder recordings"
PLACES = ("*fsdd*", "*free-spoken-digit*", "recordings")
WORDS = "zero one two three four five six seven eight nine".split()
SHARES = {"test": 0.2, "dev": 0.1}  # of the pictures
KNOWN = 5  # takes of each digit by a speaker, held back
#: Of the built-in synthesiser: its voice, and the lowest pitch.
SPEAKERS = {
    "one": ("en-us+m3", 35),
    "two": ("en-us+f2", 40),
    "three": ("en-us+m7", 45),
    "four": ("en-us+f4", 35),
    "five": ("en-us+m1", 30),
    "six": ("en-us+f1", 45),
}
TAKES = 24  # of each digit by each of these
ROUNDS = 3  # rows of a recording that is trained on, each with another picture


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests, sounds and pictures: train.jsonl, dev.jsonl, test.jsonl, known.jsonl,
    unpaired_speech.jsonl, unpaired_image.jsonl and texts.jsonl.

    Rows hold "text" (a word), "speech" (a WAV), "image" (a PNG of 8 by 8 pixels), and for judges
    "digit" and "speaker". One speaker is in the test, one in dev, and so are a fifth and a tenth of
    the pictures. known.jsonl: the first five takes of each digit by the speakers that are trained
    on, as the original's own test, with pictures of the test; train.jsonl lacks them. data: the
    folder that holds the recordings. Raises ZipperError if there are none, MissingExtra without
    scikit-learn.
    """
    takes = _recordings(data, folder)
    speakers = sorted({row["speaker"] for row in takes})
    if len(speakers) < 3:
        raise ZipperError(
            f"The recordings in {data} are of {len(speakers)} speakers; at least 3 are wanted: one "
            f"for the test, one for dev. Take all of {HOME}."
        )
    random.Random(f"digits {seed}").shuffle(speakers)
    owner = {speakers[0]: "test", speakers[1]: "dev"}

    def part_of(take: dict[str, Any]) -> str:
        return owner.get(take["speaker"], "known" if take["take"] < KNOWN else "train")

    pictures = _pictures(folder, seed)
    rows: dict[str, list[dict[str, Any]]] = {
        "train": [],
        "dev": [],
        "test": [],
        "known": [],
    }
    chance = random.Random(f"pictures {seed}")
    for take in takes:
        held = part_of(take)
        some = pictures["test" if held == "known" else held, take["digit"]]
        for turn, image in enumerate(chance.sample(some, ROUNDS if held == "train" else 1)):
            name = f"{take['id']}-{turn}"
            rows[held].append(take | {"id": name, "text": WORDS[take["digit"]], "image": image})
    for held, found in rows.items():
        manifests.write(folder / f"{held}.jsonl", found)
    heard = [
        {"id": take["id"], "speech": take["speech"]} for take in takes if part_of(take) == "train"
    ]
    manifests.write(folder / "unpaired_speech.jsonl", heard)
    shown = [some for (held, _), some in pictures.items() if held == "train"]
    drawn = chain.from_iterable(shown)
    alone = [{"id": PurePosixPath(image).stem, "image": image} for image in drawn]
    manifests.write(folder / "unpaired_image.jsonl", alone)
    manifests.write(folder / "texts.jsonl", [{"text": word} for word in WORDS])


def say(folder: Path) -> None:
    """Digits said by the built-in synthesiser in `SPEAKERS`, as recordings are named: for those who
    have no originals. Pitch and pace differ from take to take. Raises MissingExtra without it."""
    place = folder / "recordings"
    place.mkdir(parents=True, exist_ok=True)
    for name, (voice, pitch) in SPEAKERS.items():
        for digit, take in product(range(len(WORDS)), range(TAKES)):
            higher, slower = take % 6, take // 6
            said = commands.say(WORDS[digit], voice, pitch + 3 * higher, 190 - 15 * slower)
            sound.write(place / f"{digit}_{name}_{take}.wav", said)


def _recordings(data: Path, folder: Path) -> list[dict[str, Any]]:
    """What was said, copied into the folder."""
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    found = []
    for name, content in contents(original(data, PLACES, HOME), ".wav"):
        stem = PurePosixPath(name).stem
        if said := re.fullmatch(r"(\d)_(\w+)_(\d+)", stem):
            digit, speaker, take = said.groups()
            (folder / "sounds" / f"{stem}.wav").write_bytes(content)
            sound = f"sounds/{stem}.wav"
            row = {"id": stem, "speech": sound, "digit": int(digit), "speaker": speaker}
            found.append(row | {"take": int(take)})
    return found


def _pictures(folder: Path, seed: int) -> dict[tuple[str, int], list[str]]:
    """Files of pictures by part and digit, white on black."""
    images = extra("PIL.Image")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    drawn = extra("sklearn.datasets").load_digits()
    found = defaultdict[tuple[str, int], list[str]](list)
    for number, (picture, digit) in enumerate(zip(drawn.images, drawn.target, strict=True)):
        name = f"pictures/{digit}-{number:04d}.png"
        bright = (np.asarray(picture) * 255 / 16).round().astype(np.uint8)
        images.fromarray(np.repeat(bright[:, :, None], 3, axis=2)).save(folder / name)
        found[part(f"{seed} {number}", SHARES), int(digit)].append(name)
    return dict(found)
