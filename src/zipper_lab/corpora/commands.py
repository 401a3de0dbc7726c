"""The built-in corpus: spoken commands, written by a small grammar and said by eSpeak NG.

A toy domain with honest edges: every sentence belongs to exactly one part by its own hash, so no
test is ever trained on. eSpeak NG is GPL and optional: it is loaded only when something has to be
said.
"""

import _ctypes
import ctypes
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from zipper.audio import disturbance
from zipper.audio.sound import Audio
from zipper.data import manifests as data
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper.workers import spread

T = TypeVar("T")

# Two pitches (0 .. 99) of the voice that an independent recogniser heard best among those that say
# the same bits twice: WER 2.0 and 2.6 %, the women's voices 8 % and more. Voices with breath (f2,
# f3, f5) read memory that nothing has written.
ESPEAK_VOICE, PITCH = "en-us+m6", {"low": 50, "high": 95}
VOICES = tuple(PITCH)
TRIMMED_S = 0.02  # of silence that `Audio.trim` leaves
CHUNK = 32  # utterances handed to a process at once
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
CITIES = (
    "vienna london paris berlin madrid boston chicago dallas denver toronto sydney lisbon munich "
    "dublin houston geneva"
).split()
ITEMS = (
    "oranges apples bottles boxes chairs tickets books letters lamps candles flowers shirts "
    "pencils baskets blankets carpets mirrors bananas"
).split()
NAMES = (
    "anna peter maria david emma robert laura oliver susan thomas julia martin sarah kevin daniel "
    "helen victor alice"
).split()
COLOURS = "red blue green yellow white purple black brown".split()
ROOMS = "kitchen bedroom bathroom garden garage office hallway cellar".split()
DEVICES = "lights heating music radio camera television fan oven".split()
SIGNS = "plus minus times".split()
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n: int) -> str:
    """0 .. 9999 in English words, as they are said: 5878 is "five thousand eight hundred and
    seventy eight"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return f"{TENS[n // 10 - 2]} {ONES[n % 10] if n % 10 else ''}".rstrip()
    size, word = 100, "hundred"
    if n >= 1000:
        size, word = 1000, "thousand"

    said, rest = f"{number(n // size)} {word}", n % size
    if not rest:
        return said
    return f"{said} and {number(rest)}" if rest < 100 else f"{said} {number(rest)}"


RANGES = [(1, 10), (10, 100), (100, 1000), (1000, 10_000)]
# What may stand in a template's braces. Each draws from many values, so that no part of the corpus
# exhausts a template.
SLOTS: dict[str, Callable[[random.Random], str]] = {
    "thousands": lambda r: number(r.randrange(*r.choices(RANGES, [1, 6, 6, 5])[0])),
    "hundreds": lambda r: number(r.randrange(*r.choice([(1, 100), (100, 1000)]))),
    "tens": lambda r: number(r.randrange(1, 100)),
    "seats": lambda r: number(r.randrange(2, 21)),
    "degrees": lambda r: number(r.randrange(5, 36)),
    "digits": lambda r: " ".join(ONES[r.randrange(10)] for _ in range(5)),
    "time": lambda r: f"{number(r.randrange(1, 13))} {number(r.randrange(10, 60))}",
    "where": lambda r: f" in the {r.choice(ROOMS)}" if r.random() < 0.75 else "",
    "day": lambda r: r.choice(DAYS),
    "city": lambda r: r.choice(CITIES),
    "item": lambda r: r.choice(ITEMS),
    "name": lambda r: r.choice(NAMES),
    "colour": lambda r: r.choice(COLOURS),
    "room": lambda r: r.choice(ROOMS),
    "device": lambda r: r.choice(DEVICES),
    "sign": lambda r: r.choice(SIGNS),
    "switch": lambda r: r.choice(["on", "off"]),
}
TEMPLATES = (
    "send {thousands} {item} to {city}",
    "set an alarm for {time} on {day}{where}",
    "call {name} on {digits}",
    "turn {switch} the {room} {device} at {time}",
    "book {seats} seats in {city} at {time}",
    "buy {tens} {colour} {item} from {city}",
    "what is {hundreds} {sign} {tens}",
    "pay {name} {hundreds} dollars for {item}",
    "heat the {room} to {degrees} at {time}",
    "meet {name} at {time} on {day}",
    "train {tens} leaves {city} at {time}",
    "move {tens} {colour} {item} to the {room}",
)

# The share of all sentences that a part owns, in hundredths.
PARTS = {"text": 36, "speech": 25, "pairs": 31, "dev": 3, "test": 5}
# Raise it when SLOTS, number() or what happens to sound change: it names the cached files.
GRAMMAR_VERSION = 2
_WORDS = (DAYS, CITIES, ITEMS, NAMES, COLOURS, ROOMS, DEVICES, SIGNS)
GRAMMAR = repr((GRAMMAR_VERSION, TEMPLATES, *_WORDS, PARTS, ESPEAK_VOICE, PITCH))


@dataclass(frozen=True)
class Utterance:
    """One sentence and the voice that says it. `template` is its index in `TEMPLATES`."""

    id: str
    text: str
    template: int
    voice: str


def part_of(text: str) -> str:
    """The one part that owns this sentence: by its hash, so parts never share a sentence whatever
    the seed."""
    hundredth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
    for part, share in PARTS.items():
        hundredth -= share
        if hundredth < 0:
            return part
    raise AssertionError("the shares add up to 100")


def sentences(part: str, n: int, seed: int = 0) -> list[Utterance]:
    """The first `n` utterances of a part, all different, voices in turn; a longer list begins with
    a shorter one."""
    if part not in PARTS:
        raise ZipperError(
            f"no part {part!r} in the built-in corpus. Take one of {', '.join(PARTS)}."
        )
    return list(islice(_drawn(part, seed), n))


def _drawn(part: str, seed: int) -> Iterator[Utterance]:
    chance, seen = random.Random(f"{part} {seed}"), set[str]()
    while True:
        template = chance.randrange(len(TEMPLATES))
        text = re.sub(r"\{(\w+)\}", lambda slot: SLOTS[slot[1]](chance), TEMPLATES[template])
        if part_of(text) == part and text not in seen:
            name, voice = f"{part}-{seed}-{len(seen):06d}", VOICES[len(seen) % len(VOICES)]
            yield Utterance(name, text, template, voice)
            seen.add(text)


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_WORD = 1  # the type of an event: a word begins


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; type 0 ends a list of them. audio_position: in ms."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_ONE_AT_A_TIME = threading.Lock()  # the library keeps its state in globals


def synthesize(utterance: Utterance) -> Audio:
    """The utterance as `say` says it. Raises ZipperError if eSpeak NG is not installed or the voice
    is none of VOICES."""
    if utterance.voice not in VOICES:
        raise ZipperError(
            f"no voice {utterance.voice!r} in the built-in corpus. Take one of {', '.join(VOICES)}."
        )
    return say(utterance.text, ESPEAK_VOICE, PITCH[utterance.voice])


def say(text: str, voice: str, pitch: int, rate_wpm: int = 175) -> Audio:
    """A text said by eSpeak NG, without silence at the ends; the same bits whatever was said
    before. Takes 5 ms.

    voice: eSpeak's name. pitch: 0 .. 99. rate_wpm: words a minute by eSpeak's own count, pauses
    included; 175 is its default. The library keeps state between utterances that no call resets
    (neither a random seed nor initialising again does), so it is unloaded after each. Raises
    ZipperError if it is not installed or has no such voice.
    """
    return _spoken(text, voice, pitch, rate_wpm)[0].trim()


def timed(utterance: Utterance) -> tuple[Audio, list[float]]:
    """The utterance as `synthesize` says it, and when each word begins in it, in seconds, as eSpeak
    NG knows it."""
    whole, starts = _spoken(utterance.text, ESPEAK_VOICE, PITCH[utterance.voice])
    audio = whole.trim()
    cut = whole.ends()[0] / whole.rate_hz - TRIMMED_S
    return audio, [max(0.0, start - cut) for start in starts]  # some begin before they are heard


def _spoken(text: str, voice: str, pitch: int, rate_wpm: int = 175) -> tuple[Audio, list[float]]:
    """As it comes, and the starts of its words in seconds."""
    loader = extra("espeakng_loader")
    said, starts_ms = list[bytes](), list[int]()

    def hear(samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            said.append(ctypes.string_at(samples, 2 * count))
        while events and (event := _Event.from_address(events)).type:
            if event.type == _WORD:
                starts_ms.append(event.audio_position)
            events += ctypes.sizeof(_Event)
        return 0

    with _ONE_AT_A_TIME:
        library = ctypes.CDLL(loader.get_library_path())
        try:
            synchronous, utf8, rate, pitched = 2, 1, 1, 3  # speak_lib.h
            place = loader.get_data_path()
            rate_hz = library.espeak_Initialize(synchronous, 0, str(place).encode(), 0)
            callback = _CALLBACK(hear)
            library.espeak_SetSynthCallback(callback)
            # An unknown variant is ignored in silence.
            known = Path(place, "voices", "!v", voice.partition("+")[2]).exists()
            if rate_hz <= 0 or not known or library.espeak_SetVoiceByName(voice.encode()):
                raise ZipperError(
                    f"eSpeak NG has no voice {voice}. Take another, or complete the installation: "
                    "pip install -U espeakng-loader."
                )
            library.espeak_SetParameter(rate, rate_wpm, 0)
            library.espeak_SetParameter(pitched, pitch, 0)

            encoded = text.encode() + b"\0"
            library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, utf8, None, None)
            library.espeak_Synchronize()
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)
    samples = np.frombuffer(b"".join(said), np.int16).astype(np.float32) / 32768
    return Audio(samples, rate_hz), [ms / 1000 for ms in starts_ms]


def fit_units(n: int = 600, codes: int = 256, seed: int = 0) -> SpeechUnits:
    """Units fitted on the first `n` utterances of the part "speech", in all voices; 10 s."""
    config = UnitsConfig(
        voices=VOICES, fitted_on=f"{n} utterances of the built-in corpus, part speech, seed {seed}"
    )
    said = tqdm(sentences("speech", n, seed), desc="say", unit="utterance", disable=None)
    pictures = [config.mel.picture(synthesize(utterance)) for utterance in said]
    return SpeechUnits.fit(pictures, codes, config, seed)


def rows(
    part: str,
    n: int,
    units: SpeechUnits,
    seed: int = 0,
    workers: int = 2,
    cache: str | Path = ".cache/corpus",
    takes: int = 0,
) -> list[dict[str, Any]]:
    """The first `n` utterances of a part with their codes: dicts of id, text, speech, voice,
    template. Takes 15 core-ms each, once.

    takes: so many rows of each utterance, each with another disturbed take of it: its codes are
    "heard:speech", what is said in it "said:text" (`disturbance.take`). What is to be understood is
    learnt from these, what is to be said from the clean one, which stays "speech". Kept as JSONL in
    `cache` under a name made of all that decides the content; a shorter file there is continued, a
    longer one cut. workers: processes of one thread each; 1 works in this process.
    """
    wanted = list(product(sentences(part, n, seed), range(max(1, takes))))
    n = len(wanted)
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{GRAMMAR} {seed} {units.fingerprint} {takes}".encode()).hexdigest()[:16]
    kept = {int(file.stem.rsplit("-", 1)[1]): file for file in folder.glob(f"{part}-{key}-*.jsonl")}
    best = min((size for size in kept if size >= n), default=max(kept, default=0))
    done: list[dict[str, Any]] = []
    if best:
        with kept[best].open() as lines:
            done = [json.loads(line) for line in islice(lines, n)]
    if len(done) == n:
        return done

    left, work = wanted[len(done) :], partial(_row, units, takes > 0)
    with closing(spread(work, left, workers, CHUNK)) as fresh:
        done += watched(fresh, part, len(left))
    data.write(folder / f"{part}-{key}-{n}.jsonl", done)
    return done


def watched(rows: Iterable[T], part: str, total: int) -> Iterable[T]:
    """With a progress bar that does not jump: chunks come in all at once."""
    said, smooth = f"say {part}", {"smoothing": 0.01, "mininterval": 1}
    shown: Iterable[T] = tqdm(rows, said, total, unit="utterance", disable=None, **smooth)
    return shown


def _row(units: SpeechUnits, disturbed: bool, wanted: tuple[Utterance, int]) -> dict[str, Any]:
    utterance, number = wanted
    sound = synthesize(utterance)
    row = {
        "id": utterance.id,
        "text": utterance.text,
        "speech": units.encode(sound),
        "voice": utterance.voice,
        "template": utterance.template,
    }
    if disturbed:
        heard, said = disturbance.take(sound, f"{utterance.id} {number}")
        row |= {"heard:speech": units.encode(heard), "said:text": utterance.text if said else ""}
    return row
