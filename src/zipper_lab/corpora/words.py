"""Words that people say one at a time: ten digits by five people and eight words by thirty; and the
same words said by a synthesiser in many voices.

The public originals are free-spoken-digit-dataset of GitHub Jakobovski, commit 26eb9aa (CC BY-SA
4.0), and DSPSpeech-20 of GitHub zhongyuchen, commit 8165959 (MIT), its English words with their
ends trimmed, beside a manifest.jsonl of id, speaker, text and audio. Knows no model.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath

from zipper.audio import sound
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper_lab.corpora import commands, digits
from zipper_lab.corpora.originals import contents, original

HOME = "https://github.com/zhongyuchen/DSPSpeech-20, English words as files beside a manifest.jsonl"
PLACES = ("*dspspeech*",)
DIGITS, WORDS = "digits", "words"
#: Speakers that are in a part alone, by set; one in ten takes of the others is in dev.
TEST = {DIGITS: 2, WORDS: 7}
DEV = 0.1
#: Of the built-in synthesiser.
VOICES = tuple(f"en-us+{kind}" for kind in "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5".split())
PITCHES, PACES = (25, 40, 55, 70), (120, 145, 170, 200)


@dataclass(frozen=True)
class Spoken:
    """A word that was said.

    part: "train", "dev" or "test", which share no speaker with the test. source: DIGITS or WORDS.
    content: of a sound file.
    """

    id: str
    text: str
    speaker: str
    source: str
    part: str
    content: bytes

    @property
    def audio(self) -> Audio:
        """The sound."""
        return sound.read(self.content)


def people(data: Path, seed: int = 0) -> list[Spoken]:
    """What people said, of both originals. data: the folder that holds them. Raises ZipperError if
    one is missing."""
    found = []
    for source, read in ((DIGITS, _digits), (WORDS, _words)):
        said = [*read(data)]
        speakers = sorted({speaker for _, _, speaker, _ in said})
        if len(speakers) <= TEST[source]:
            raise ZipperError(
                f"The {source} in {data} are said by {len(speakers)} people; more than "
                f"{TEST[source]} are wanted, who are in the test alone. Take the whole original."
            )
        random.Random(f"{source} {seed}").shuffle(speakers)
        held = {*speakers[: TEST[source]]}
        for name, text, speaker, content in said:
            dev = random.Random(f"{name} {seed}").random() < DEV
            part = "test" if speaker in held else "dev" if dev else "train"
            found.append(Spoken(name, text, speaker, source, part, content))
    return found


def vocabulary(data: Path) -> list[str]:
    """The words that are said."""
    return [*digits.WORDS, *sorted({text for _, text, _, _ in _words(data)})]


def synthesized(words: list[str]) -> Iterator[tuple[str, str, Audio]]:
    """Id, word and sound of each word in every voice, at every pitch and pace. Raises MissingExtra
    without the synthesiser."""
    for word, voice, pitch, pace in product(words, VOICES, PITCHES, PACES):
        name = f"{word}-{voice.partition('+')[2]}-{pitch}-{pace}"
        yield name, word, commands.say(word, voice, pitch, pace)


def _digits(data: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for name, content in contents(original(data, digits.PLACES, digits.HOME), ".wav"):
        if said := re.fullmatch(r"(\d)_(\w+)_(\d+)", PurePosixPath(name).stem):
            yield said[0], digits.WORDS[int(said[1])], said[2], content


def _words(data: Path) -> Iterator[tuple[str, str, str, bytes]]:
    place = original(data, PLACES, HOME)
    sounds = dict(contents(place))
    listed = next((name for name in sounds if name.endswith("manifest.jsonl")), "")
    if not listed:
        raise ZipperError(f"{place} has no manifest.jsonl. It comes from {HOME}.")
    folder = PurePosixPath(listed).parent
    for line in sounds[listed].decode().splitlines():
        row = json.loads(line)
        content = sounds.get((folder / row["audio"]).as_posix())
        if content is None:
            raise ZipperError(f"{place} lacks {row['audio']}, which its manifest names.")
        yield row["id"], row["text"], row["speaker"], content
