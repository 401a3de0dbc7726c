"""English with an open vocabulary, said by a natural voice: sentences of Jane Austen's novels (see
`prose`), the examples of WordNet 3.0, and numbers in words.

WordNet's examples are modern and of all subjects; its licence lets everyone use and share them.
They are read from the folder of WordNet's own files (data.noun and others, Debian's wordnet-base),
which is not shipped. The voice is that of hibari-tts 0.2.1 (Apache-2.0), which no extra brings.
Splits are by chapter for the novels, and by a hash of the sentence for the others; no sentence is
in two parts. Knows no model but the units that the rows are written in.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

from zipper.audio import disturbance
from zipper.audio.sound import Audio
from zipper.data import manifests as data
from zipper.errors import MissingExtra, ZipperError
from zipper.modality import Modality
from zipper.workers import spread
from zipper_lab.corpora import commands as corpus
from zipper_lab.corpora import prose

VOICE_RATE_HZ = 24_000
#: Of the novels' parts, those whose sentences are trained on, dev's and test's.
PARTS = {"train": ("pairs", "speech", "text"), "dev": ("dev",), "test": ("test",)}
#: Of 100 sentences that are no novel's, how many are dev's and test's.
HELD_OUT = {"dev": 2, "test": 3}
WORDS = (3, 24)  # of a sentence
EXAMPLE = re.compile(r'"([^"]+)"')
#: How much higher and smaller than the voice a speaker of a disturbed take is.
SPEAKERS = (0.8, 0.86, 0.92, 1.0, 1.0, 1.08, 1.16, 1.25)
PACES = (0.8, 1.25)  # of the voice's own
BLOCK = 200  # rows of a file of the cache: what a kill can lose
VERSION = 1  # raise it when an utterance's sound changes: it names the cached files

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@dataclass(frozen=True)
class Utterance:
    """One sentence; how fast it is said, as a share of the voice's own pace; from where it is."""

    id: str
    text: str
    source: str
    pace: float = 1.0


def examples(folder: str | Path) -> list[str]:
    """WordNet's example sentences, in the words of the novels' text: lower case, letters and
    apostrophes. Those with digits or other letters are left out. Raises ZipperError for a folder
    without its files."""
    return _plain(chain.from_iterable(map(EXAMPLE.findall, _glosses(folder))))


def definitions(folder: str | Path) -> list[str]:
    """What WordNet says of its words, as text to learn English from; as `examples` else."""
    return _plain(gloss.partition('"')[0] for gloss in _glosses(folder))


def _glosses(folder: str | Path) -> list[str]:
    files = sorted(Path(folder).rglob("data.*"))
    if not files:
        raise ZipperError(
            f"There are no files of WordNet (data.noun, data.verb ...) in {folder}. Unpack "
            "Debian's wordnet-base, or WordNet 3.0 itself, and give its folder."
        )
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return [line.partition("|")[2] for line in text.splitlines()]


def _plain(texts: Iterable[str]) -> list[str]:
    """Each once, in small letters without punctuation; those that are made of more than letters,
    and the too short and too long ones, are left out."""
    found = dict[str, None]()
    for text in texts:
        bare = re.sub(r"[.,;:!?()\-]+", " ", text.lower().replace("`", "'"))
        text = " ".join(word.strip("'") for word in bare.split())
        if re.fullmatch(r"[a-z' ]+", text) and _long_enough(text):
            found[text] = None
    return [*found]


def in_words(number: int) -> str:
    """0 to 999,999 as it is said: "two hundred and five"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f" {ONES[one]}" if one else "")
    big, name, joined = (100, "hundred", " and ") if number < 1000 else (1000, "thousand", " ")
    many, rest = divmod(number, big)
    return f"{in_words(many)} {name}" + (f"{joined}{in_words(rest)}" if rest else "")


def numbers(count: int, seed: int) -> list[str]:
    """Numbers, digits one by one, prices and times, in words."""
    chance, made = random.Random(f"numbers {seed}"), list[str]()
    for _ in range(count):
        many = chance.choice((10, 100, 1000, 10_000, 1_000_000))
        digits = [ONES[chance.randrange(10)] for _ in range(chance.randint(3, 8))]
        hour, minute = chance.randint(1, 12), chance.randint(10, 59)
        made.append(
            chance.choice(
                (
                    " ".join(digits),
                    f"{in_words(chance.randrange(many))} and {in_words(chance.randrange(many))}",
                    f"it costs {in_words(chance.randrange(2, many))} dollars",
                    f"at {in_words(hour)} {in_words(minute)} in the morning",
                    f"there were {in_words(chance.randrange(2, many))} of them",
                )
            )
        )
    return [*dict.fromkeys(made)]


def sentences(part: str, wordnet: str | Path, seed: int = 0) -> list[Utterance]:
    """All sentences of a part (train, dev, test), shuffled; the same for the same seed."""
    if part not in PARTS:
        raise ZipperError(f"There is no part {part!r}. Take one of {', '.join(PARTS)}.")
    found = {
        "novels": [text for _, text in chain.from_iterable(map(prose.lines, PARTS[part]))],
        "wordnet": [text for text in examples(wordnet) if _part(text) == part],
        "numbers": [text for text in numbers(4000, 0) if _part(text) == part],
    }
    chance, made = random.Random(f"{part} {seed}"), dict[str, Utterance]()
    for source, texts in found.items():
        for text in texts:
            if _long_enough(text) and text not in made:
                pace = round(chance.uniform(*PACES), 3) if part == "train" else 1.0
                key = hashlib.sha256(text.encode()).hexdigest()[:12]
                made[text] = Utterance(f"{source}-{key}", text, source, pace)
    shuffled = [*made.values()]
    chance.shuffle(shuffled)
    return shuffled


def synthesize(text: str, pace: float = 1.0) -> Audio:
    """A sentence in the voice; 30 ms. The same bits every time. Raises ZipperError where the voice
    is not installed."""
    samples = _voice()(text, speed=pace, seed=0)
    return Audio(np.asarray(samples, np.float32), VOICE_RATE_HZ)


def take(utterance: Utterance) -> tuple[Audio, bool]:
    """The sentence as another speaker says it and some microphone takes it, and whether it is in
    it (`disturbance.take`)."""
    chance = random.Random(f"take {utterance.id}")
    higher, pace = chance.choice(SPEAKERS), chance.uniform(*PACES)
    said = synthesize(utterance.text, pace / higher).samples
    other = resample_poly(said, 100, round(100 * higher)).astype(np.float32)
    return disturbance.take(Audio(other, VOICE_RATE_HZ), utterance.id)


def rows(
    utterances: Sequence[Utterance],
    units: Modality,
    taken: bool,
    workers: int = 2,
    cache: str | Path = ".cache/english",
) -> Iterator[dict[str, Any]]:
    """Manifest rows of id, text, source and speech (ids); where they are taken also heard:speech
    (ids of a disturbed take) and said:text (the text, or nothing where the take lost it).

    Kept in `cache` in files of BLOCK rows, named by all that decides them: what a killed run had
    finished is not done again.
    """
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = units.fingerprint
    work = partial(_block, units=units, taken=taken)
    wanted = [[*utterances[at : at + BLOCK]] for at in range(0, len(utterances), BLOCK)]
    named = {}
    for block in wanted:
        made_of = repr((VERSION, fingerprint, taken, block))
        name = hashlib.sha256(made_of.encode()).hexdigest()[:20]
        named[folder / f"english-{name}.jsonl"] = block
    missing = {file: block for file, block in named.items() if not file.exists()}
    with closing(spread(work, missing.values(), workers)) as made:
        for file, content in zip(missing, corpus.watched(made, "say", len(missing)), strict=True):
            data.write(file, content)
    for file in named:
        yield from data.manifest(file)


def _block(block: Sequence[Utterance], units: Modality, taken: bool) -> list[dict[str, Any]]:
    made = []
    for utterance in block:
        row: dict[str, Any] = {"id": utterance.id, "text": utterance.text}
        row["source"] = utterance.source
        row["speech"] = units.encode(synthesize(utterance.text, utterance.pace))
        if taken:
            sound, said = take(utterance)
            row |= {
                "heard:speech": units.encode(sound),
                "said:text": utterance.text if said else "",
            }
        made.append(row)
    return made


def _part(text: str) -> str:
    """By its hash, so that it stays where it is when sentences come or go."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    if place < HELD_OUT["dev"]:
        return "dev"
    return "test" if place < HELD_OUT["dev"] + HELD_OUT["test"] else "train"


def _long_enough(text: str) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1]


@cache
def _voice() -> Any:
    try:
        hibari = import_module("hibari")
    except ImportError as error:
        raise MissingExtra(
            "This needs a voice that is not installed. Do: pip install hibari-tts==0.2.1"
        ) from error
    return hibari.Hibari()
