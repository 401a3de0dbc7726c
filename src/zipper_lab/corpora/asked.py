"""Requests that name a digit and how it is wanted: written, said or drawn.

A request is a text, and the same said by the built-in synthesiser. Its answer is the word, somebody
saying it, or a picture of somebody writing it (`corpora.digits`, whose originals are wanted). Knows
no model.
"""

import random
from itertools import product
from pathlib import Path
from typing import Any

from zipper.audio import sound
from zipper.data import manifests
from zipper_lab.corpora import commands, digits, words

#: How it is asked for, by the tower that answers; {} is the digit.
WORDINGS = {
    "text": ("write {}", "spell {}", "note {}", "put {} down", "write the word {}"),
    "speech": ("say {}", "read {} out", "pronounce {}", "tell me {}", "say the word {}"),
    "image": ("draw {}", "paint {}", "sketch {}", "make a picture of {}", "draw the number {}"),
}
#: What a text tower that follows instructions says behind a request, alone.
REPLIES = {"text": "{}", "speech": "you hear {}", "image": "here is a picture of {}"}
UNHEARD = 2  # voices of the synthesiser that are in the test alone
ROUNDS = {"train": 1, "dev": 1, "test": 2}  # requests for each recording
NUMBERS = "digits"  # the folder of what `digits.write` makes


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests train.jsonl, dev.jsonl, test.jsonl, unpaired_speech.jsonl, unpaired_image.jsonl and
    texts.jsonl, and the sounds and pictures that they name.

    texts.jsonl holds "text", a request, the same as "asked:text", and "reply:text". Other rows hold
    a request as "asked:text" and "heard:speech", its answer under the tower that was asked for and
    no other, and for judges "way", that tower, and "digit". In the test no wording was trained on
    beside that digit, nor was the voice that asks; the recordings that answer are new takes of
    known people. data: the folder that holds the recordings. Raises as `digits.write` does, and
    MissingExtra without the synthesiser.
    """
    digits.write(data, folder / NUMBERS, seed)
    chance = random.Random(f"requests {seed}")
    voices = chance.sample(words.VOICES, len(words.VOICES))
    for held, source in (("train", "train"), ("dev", "dev"), ("test", "known")):
        heard = voices[:UNHEARD] if held == "test" else voices[UNHEARD:]
        takes = manifests.manifest(folder / NUMBERS / f"{source}.jsonl")
        rows = [
            _row(folder, take, f"{take['id']}-{turn}", wordings(held, seed), heard, chance)
            for turn, take in product(range(ROUNDS[held]), takes)
        ]
        manifests.write(folder / f"{held}.jsonl", rows)
    asked = [row["heard:speech"] for row in manifests.manifest(folder / "train.jsonl")]
    alone = {"speech": [{"id": name, "speech": name} for name in dict.fromkeys(asked)], "image": []}
    for tower, more in alone.items():
        rows = manifests.manifest(folder / NUMBERS / f"unpaired_{tower}.jsonl")
        there = [row | {tower: f"{NUMBERS}/{row[tower]}"} for row in rows]
        manifests.write(folder / f"unpaired_{tower}.jsonl", there + more)
    texts = list[dict[str, str]]()
    for (way, number), some in wordings("train", seed).items():
        reply = REPLIES[way].format(digits.WORDS[number])
        texts += [{"text": said, "asked:text": said, "reply:text": reply} for said in some]
    manifests.write(folder / "texts.jsonl", texts)


def wordings(held: str, seed: int = 0) -> dict[tuple[str, int], list[str]]:
    """The requests of a part, by the tower that is to answer and the digit: in the test one wording
    of each, in the others the rest."""
    found = {}
    for (way, said), number in product(WORDINGS.items(), range(len(digits.WORDS))):
        kept = random.Random(f"{way} {number} {seed}").choice(said)
        some = [wording for wording in said if (wording == kept) == (held == "test")]
        found[way, number] = [wording.format(digits.WORDS[number]) for wording in some]
    return found


def _row(
    folder: Path,
    take: dict[str, Any],
    name: str,
    some: dict[tuple[str, int], list[str]],
    voices: list[str],
    chance: random.Random,
) -> dict[str, Any]:
    """A request that a recording, the picture beside it or their word answers."""
    way = chance.choice([*WORDINGS])
    asked = chance.choice(some[way, take["digit"]])
    voice, pitch = chance.choice(voices), chance.choice(words.PITCHES)
    pace = chance.choice(words.PACES)
    heard = f"requests/{asked.replace(' ', '_')}-{voice.partition('+')[2]}-{pitch}-{pace}.wav"
    if not (folder / heard).is_file():
        (folder / heard).parent.mkdir(exist_ok=True)
        sound.write(folder / heard, commands.say(asked, voice, pitch, pace))
    answer = take[way] if way == "text" else f"{NUMBERS}/{take[way]}"
    told = {"id": name, "way": way, "digit": take["digit"]}
    return told | {"asked:text": asked, "heard:speech": heard, way: answer}
