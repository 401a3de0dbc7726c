"""The prose corpus: the sentences of Jane Austen's six novels, said by eSpeak NG in several voices,
also in noise.

Open vocabulary, few pairs, much unpaired text and speech: what the paper's experiments need
(LibriSpeech, Libri-Light) in small. Whole chapters belong to one part, and no sentence is in two
parts, not even with one word changed. The novels are in the public domain
(shipped/prose/LICENSE.txt); tools/prose.py made the text. Knows no model.
"""

import functools
import gzip
import hashlib
import importlib.metadata
import json
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.data import manifests as data
from zipper.errors import ZipperError
from zipper.modality.speech import SpeechUnits, UnitsConfig
from zipper.modality.text import Text
from zipper.saving.files import write_json
from zipper.workers import spread
from zipper_lab import adaptation
from zipper_lab.corpora import commands as corpus

TEXT = Path(__file__).parents[1] / "shipped" / "prose" / "austen.txt.gz"
PARTS = ("text", "speech", "pairs", "dev", "test")

# A voice is eSpeak's variant of en-us, its pitch and its words a minute. Of thirty variants tried,
# the judge as it comes heard these three best (docs/log.md). OTHER_VOICES are never trained on.
VOICES = (
    "klatt3-35-170",
    "klatt4-30-180",
    "klatt5-45-190",
    "klatt3-60-185",
    "klatt4-55-175",
    "klatt5-20-200",
)
OTHER_VOICES = ("adam-45-180", "klatt2-50-170", "klatt5-75-160")
NOISES = ("white", "babble")
SNR_DB = (5, 10, 15)
SPEAKERS_OF_BABBLE = 4
BLOCK = 200  # utterances in one file of the cache: what a kill can lose
VERSION = 1  # raise it when an utterance's sound or codes change: it names the cached files


@dataclass(frozen=True)
class Utterance:
    """One sentence, its chapter ("emma 12"), its voice, and what it is said in: "" or one of
    NOISES, `snr_db` under the speech."""

    id: str
    text: str
    chapter: str
    voice: str
    noise: str = ""
    snr_db: int = 0


def lines(part: str) -> list[tuple[str, str]]:
    """All sentences of a part in the order of the books, each behind its chapter: ("emma 12", "it
    was a delightful visit")."""
    if part not in PARTS:
        raise ZipperError(f"no part {part!r} in the prose corpus. Take one of {', '.join(PARTS)}.")
    found, here, chapter = [], False, ""
    for line in _content().splitlines():
        if line.startswith("# "):
            owner, _, chapter = line.removeprefix("# ").partition(" ")
            here = owner == part
        elif here:
            found.append((chapter, line))
    return found


def words() -> list[str]:
    """The words that may be said: those of pocketsphinx's dictionary that stand at least three
    times in the part "text"."""
    return _content().partition("# words\n")[2].split()


def domain() -> list[str]:
    """Sentences of the part "text" made of `words` alone: what a judge's language model is made
    of."""
    known = set(words())
    return [text for _, text in lines("text") if known.issuperset(text.split())]


@functools.cache
def _content() -> str:
    return gzip.decompress(TEXT.read_bytes()).decode()


def _fingerprint() -> str:
    return hashlib.sha256(_content().encode()).hexdigest()


def sentences(
    part: str,
    n: int | None = None,
    seed: int = 0,
    voices: Sequence[str] = VOICES,
    noisy: bool = False,
) -> list[Utterance]:
    """The first `n` utterances of a part (None: every sentence once), shuffled by `seed`, voices in
    turn.

    A longer list begins with a shorter one. Behind the last sentence it begins again, each sentence
    in its next voice. noisy: the same sentences, each in a noise and at a loudness that its id
    decides. Raises ZipperError for more than sentences x voices.
    """
    all_lines = lines(part)
    random.Random(f"{part} {seed}").shuffle(all_lines)
    n = len(all_lines) if n is None else n
    if not 0 <= n <= len(all_lines) * len(voices):
        limit = f"it has {len(all_lines)} sentences in {len(voices)} voices"
        raise ZipperError(
            f"{n} utterances of the part {part!r} were wanted; {limit}. Ask for fewer."
        )
    drawn = []
    for i in range(n):
        turn, place = divmod(i, len(all_lines))
        chapter, text = all_lines[place]
        voice = voices[(place + turn) % len(voices)]
        utterance = Utterance(f"{part}-{seed}-{i:06d}", text, chapter, voice)
        if noisy:
            chance = random.Random(f"noise {utterance.id}")
            noise, snr_db = chance.choice(NOISES), chance.choice(SNR_DB)
            utterance = replace(utterance, noise=noise, snr_db=snr_db)
        drawn.append(utterance)
    return drawn


def synthesize(utterance: Utterance) -> Audio:
    """The utterance's sound, the same bits every time; 8 ms, in babble 50. Errors: those of
    `corpus.say`."""
    clean = _say(utterance.text, utterance.voice)
    if not utterance.noise:
        return clean
    noise = (_white if utterance.noise == "white" else _babble)(utterance.id, len(clean.samples))
    power, unwanted = (float(np.square(samples).mean()) for samples in (clean.samples, noise))
    loudness = np.float32((power / max(unwanted, 1e-12) / 10 ** (utterance.snr_db / 10)) ** 0.5)
    mixed = clean.samples + loudness * noise
    return Audio(mixed / max(np.float32(1), np.abs(mixed).max(initial=0)), clean.rate_hz)


def _say(text: str, voice: str) -> Audio:
    variant, *numbers = voice.split("-")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ZipperError(
            f"no voice {voice!r} in the prose corpus. Write variant-pitch-words_a_minute, such as "
            f"{VOICES[0]}."
        )
    return corpus.say(text, f"en-us+{variant}", int(numbers[0]), int(numbers[1]))


def _white(seed: str, samples: int) -> np.ndarray:
    digest = hashlib.sha256(seed.encode()).digest()
    chance = np.random.default_rng(int.from_bytes(digest[:8]))
    return chance.standard_normal(samples, dtype=np.float32)


def _babble(seed: str, samples: int) -> np.ndarray:
    """Other voices at once, equally loud, saying sentences of the part "speech" over and over."""
    chance = random.Random(f"babble {seed}")
    said = [
        _say(text, chance.choice(VOICES)).level(0.1)
        for _, text in chance.sample(lines("speech"), SPEAKERS_OF_BABBLE)
    ]
    begun = (np.roll(voice.samples, chance.randrange(len(voice.samples))) for voice in said)
    return np.sum([np.resize(voice, samples) for voice in begun], axis=0)


def fit_units(
    n: int = 1200, codes: int = 512, seed: int = 0, voices: Sequence[str] = VOICES
) -> SpeechUnits:
    """Units fitted on the first `n` utterances of the part "speech", voices in turn; 30 s."""
    config = UnitsConfig(
        voices=tuple(voices),
        fitted_on=f"{n} utterances of the prose corpus, part speech, seed {seed}",
    )
    said = tqdm(sentences("speech", n, seed, voices), desc="say", unit="utterance", disable=None)
    pictures = [config.mel.picture(synthesize(utterance)) for utterance in said]
    return SpeechUnits.fit(pictures, codes, config, seed)


def adapt_judge(folder: str | Path, n: int = 400, voices: Sequence[str] = VOICES) -> None:
    """An acoustic model for the judge that knows the voices (adaptation.py), from `n` utterances of
    the part "speech"; 50 s."""
    said = sentences("speech", n, seed=1, voices=voices)
    adaptation.adapt([(utterance.text, synthesize(utterance)) for utterance in said], folder)


def rows(
    part: str,
    n: int | None,
    units: SpeechUnits,
    seed: int = 0,
    voices: Sequence[str] = VOICES,
    noisy: bool = False,
    workers: int = 2,
    cache: str | Path = ".cache/corpus",
) -> list[dict[str, Any]]:
    """The first `n` utterances of a part with their codes: dicts of id, text, chapter, voice,
    noise, snr_db and speech.

    Kept in `cache` as JSONL of BLOCK utterances each, under names made of all that decides the
    content: text, voices, synthesiser, units; what a killed run had finished is not done again.
    workers: processes of one thread each; 1 works in this process.
    """
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    # The list of each wanted file is whole, so that a longer run shares the files of a shorter one.
    total = len(lines(part)) * len(voices)
    wanted = sentences(part, n, seed, voices, noisy)
    filled = sentences(part, min(total, -(-len(wanted) // BLOCK) * BLOCK), seed, voices, noisy)

    made_of = (VERSION, _fingerprint(), importlib.metadata.version("espeakng-loader"))
    said = repr((made_of, seed, tuple(voices), noisy, units.fingerprint))
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    files = {
        folder / f"prose-{part}-{key}-{i // BLOCK:04d}.jsonl": filled[i : i + BLOCK]
        for i in range(0, len(filled), BLOCK)
    }

    missing = {file: block for file, block in files.items() if not file.exists()}
    left = list(chain.from_iterable(missing.values()))
    with closing(spread(partial(_row, units), left, workers, corpus.CHUNK)) as made:
        fresh = iter(corpus.watched(made, part, len(left)))
        for file, block in missing.items():
            data.write(file, list(islice(fresh, len(block))))
    return list(chain.from_iterable(map(data.manifest, files)))[: len(wanted)]


def _row(units: SpeechUnits, utterance: Utterance) -> dict[str, Any]:
    return asdict(utterance) | {"speech": units.encode(synthesize(utterance))}


#: What `prepare` writes, beside the folders text/ (tokenizer), speech/ (units) and judge/ (acoustic
#: model).
MANIFESTS = ("text", "speech", "pairs", "dev", "test_clean", "test_noisy")


def prepare(
    folder: str | Path,
    pairs: int | None = None,
    text: int | None = None,
    speech: int = 20_000,
    dev: int = 400,
    test: int = 800,
    voices: Sequence[str] = VOICES,
    codes: int = 512,
    merges: int = 1000,
    fitted: int = 1200,
    adapted: int = 400,
    workers: int = 2,
    cache: str | Path = ".cache/corpus",
) -> None:
    """All that the experiments train and test on, written once: MANIFESTS, the tokenizer text/, the
    units speech/, judge/.

    pairs, text, speech, dev, test: how many utterances of each (None: every sentence once). fitted,
    adapted: on how many the units are fitted and the judge's ear is adapted. Rows of text have no
    sound, rows of speech no text. test_noisy has the sentences of test_clean in OTHER_VOICES and
    noise. A complete folder is left as it is, one that was killed goes on, one made with other
    numbers is a ZipperError.
    """
    folder = Path(folder)
    settings: dict[str, Any] = {
        "pairs": pairs,
        "text": text,
        "speech": speech,
        "dev": dev,
        "test": test,
        "voices": list(voices),
        "codes": codes,
        "merges": merges,
        "fitted": fitted,
        "adapted": adapted,
        "version": VERSION,
        "content": _fingerprint(),
    }
    made = folder / "prose.json"
    if made.exists():
        if (before := json.loads(made.read_text())) != settings:
            raise ZipperError(
                f"{folder} was made with {before}, now {settings} were given. Choose another "
                "folder, or remove it."
            )
        if all((folder / f"{name}.jsonl").exists() for name in MANIFESTS):
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(made, settings)

    unpaired = [{"id": u.id, "text": u.text} for u in sentences("text", text)]
    Text.train([row["text"] for row in unpaired], merges).save(folder / "text")
    fit_units(fitted, codes, voices=voices).save(folder / "speech")
    units = SpeechUnits.load(folder / "speech")
    adapt_judge(folder / "judge", adapted, voices)

    say = partial(rows, units=units, workers=workers, cache=cache)
    data.write(folder / "text.jsonl", unpaired)
    said = say("speech", speech, voices=voices)
    alone = [{key: row[key] for key in ("id", "speech", "voice")} for row in said]
    data.write(folder / "speech.jsonl", alone)
    data.write(folder / "pairs.jsonl", say("pairs", pairs, voices=voices))
    data.write(folder / "dev.jsonl", say("dev", dev, voices=voices))
    data.write(folder / "test_clean.jsonl", say("test", test, voices=voices))
    data.write(folder / "test_noisy.jsonl", say("test", test, voices=OTHER_VOICES, noisy=True))
