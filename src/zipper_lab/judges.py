"""Judges: an independent ear that turns sound into the words of a domain.

A judge shares nothing with our models. It knows no model, no units and no corpus; whose voice it
may know already is `adaptation`'s business.
"""

import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.normaliser import normalise
from zipper.workers import spread

JUDGE_NORMALISER = "lower-ascii-words"  # CMUdict's words
JUDGE_RATE_HZ = 16_000  # of pocketsphinx's US English model
# Root mean square of loud frames after levelling, so that noise lies equally far under every
# utterance.
LOUD = 0.1
NOISE = 30 / 32_768  # 41 dB under them; see Judge
CHUNK = 8  # utterances handed to a process at once


@dataclass(frozen=True)
class Judge:
    """pocketsphinx with its US English acoustic model, a language model of the domain and the
    domain's words only.

    It shares nothing with our models, and never heard a voice of ours unless it was adapted to
    them. It only speaks for sentences of its domain: a word outside cannot be heard. Report its
    rate on true audio beside every result.

    language_model: ARPA. dictionary: lines of word and phones. acoustic_model: a folder that
    adaptation.adapt wrote, "" for pocketsphinx's own.

    White noise 41 dB under the speech is what makes it hear: a synthetic voice pauses in exact
    zeros, which the acoustic model never met. A decoder lives for one utterance, because one that
    is used again carries statistics over even when they are reset: the same sound gives the same
    text whatever came before.
    """

    language_model: str
    dictionary: str
    acoustic_model: str = ""
    name: ClassVar[str] = "pocketsphinx"

    @classmethod
    def from_sentences(
        cls, sentences: Sequence[str], order: int = 2, acoustic_model: str | Path = ""
    ) -> "Judge":
        """A judge for a domain that looks like these sentences (never those it will judge).

        Raises ZipperError naming the words without a pronunciation, or if pocketsphinx is missing.
        """
        words = normalise(" ".join(sentences), JUDGE_NORMALISER).split()
        return cls(arpa(sentences, order), pronunciations({*words}), str(acoustic_model))

    def transcribe(self, audio: Audio) -> str:
        """The words heard, "" for none. Any rate and loudness."""
        sound, decoder = pcm(audio), self._decoder()
        decoder.start_utt()
        if sound:
            decoder.process_raw(sound, full_utt=True)
        decoder.end_utt()

        heard = decoder.hyp()
        return heard.hypstr if heard else ""

    def _decoder(self) -> Any:
        pocketsphinx = extra("pocketsphinx")
        with tempfile.TemporaryDirectory() as folder:
            model, dictionary = Path(folder, "domain.arpa"), Path(folder, "domain.dict")
            model.write_text(self.language_model, encoding="utf-8")
            dictionary.write_text(self.dictionary, encoding="utf-8")
            return pocketsphinx.Decoder(
                hmm=self.acoustic_model or pocketsphinx.get_model_path("en-us/en-us"),
                lm=str(model),
                dict=str(dictionary),
                fwdflat=False,  # second passes over the first one's lattice: slower, no better
                bestpath=False,
                loglevel="FATAL",
            )


def pcm(audio: Audio) -> bytes:
    """What pocketsphinx gets to hear: 16 bits at its rate, levelled, with the noise that Judge
    speaks of."""
    samples = audio.samples
    if len(samples):
        samples = audio.resample(JUDGE_RATE_HZ).level(LOUD).samples

    noise = np.random.default_rng(0).standard_normal(len(samples)) * NOISE
    return (np.clip(samples + noise, -1, 1) * 32_767).astype(np.int16).tobytes()


@runtime_checkable
class Ear(Protocol):
    """Whatever turns sound into words, and how tables name it."""

    @property
    def name(self) -> str:
        """As tables have it."""

    def transcribe(self, audio: Audio) -> str:
        """The words heard, "" for none. Any rate and loudness."""


def judge_audio(judge: Ear, audios: Sequence[Audio], workers: int = 2) -> list[str]:
    """What the judge hears in each, in order, by `workers` processes with a progress bar; a few are
    done in this process."""
    # Processes, because pocketsphinx holds the interpreter's lock.
    with closing(spread(judge.transcribe, audios, workers, CHUNK)) as heard:
        said = f"{judge.name} listens"
        return list(tqdm(heard, said, len(audios), unit="utterance", disable=None))


def pronunciations(words: set[str]) -> str:
    """The lines of pocketsphinx's dictionary (CMUdict) for these words, all variants.

    Raises ZipperError naming the words that it lacks.
    """
    path = Path(extra("pocketsphinx").get_model_path("en-us/cmudict-en-us.dict"))
    with path.open(encoding="utf-8") as file:
        known = [(re.sub(r"\(\d+\)$", "", line.split(maxsplit=1)[0]), line) for line in file]
    if missing := words - {word for word, _ in known}:
        raise ZipperError(
            f"The judge's dictionary has no pronunciation of {', '.join(sorted(missing))}. Spell "
            "the words as CMUdict does."
        )
    return "".join(line for word, line in known if word in words)


def arpa(sentences: Sequence[str], order: int = 2) -> str:
    """A back-off n-gram model of normalised sentences in ARPA format; `order` 2 = bigrams.

    Witten-Bell (Witten and Bell 1991), interpolated: after a history seen C times with T different
    successors, p(w) = (c(w) + T q(w)) / (C + T), where q is the model one word shorter; the
    back-off weight is T / (C + T), so each history's probabilities add up to 1. Raises ZipperError
    if no sentence has a word.
    """
    said = [normalise(sentence, JUDGE_NORMALISER).split() for sentence in sentences]
    rows = [("<s>", *words, "</s>") for words in said if words]
    if not rows:
        raise ZipperError(
            f"No words in {len(sentences)} sentences: a language model needs sentences of the "
            "domain."
        )
    after: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for end in range(1, len(row)):
            for start in range(max(0, end - order + 1), end + 1):
                after[row[start:end]][row[end]] += 1
    vocabulary = len(after[()])

    def probability(history: tuple[str, ...], word: str) -> float:
        shorter = probability(history[1:], word) if history else 1 / vocabulary
        seen = after[history]
        return (seen[word] + len(seen) * shorter) / (seen.total() + len(seen))

    def back_off(gram: tuple[str, ...]) -> float:
        seen = after.get(gram)
        return len(seen) / (seen.total() + len(seen)) if seen else 1.0

    sections: list[dict[tuple[str, ...], float]] = [{} for _ in range(order)]
    sections[0]["<s>",] = 1e-99  # never predicted
    for history in sorted(after):
        sections[len(history)] |= {
            (*history, word): probability(history, word) for word in sorted(after[history])
        }

    sizes = [f"ngram {n}={len(grams)}\n" for n, grams in enumerate(sections, start=1)]
    text = "\\data\\\n" + "".join(sizes)
    for n, grams in enumerate(sections, start=1):
        text += f"\n\\{n}-grams:\n"
        for gram, p in grams.items():
            weight = f"\t{math.log10(back_off(gram)):.6f}" if n < order else ""
            text += f"{math.log10(p):.6f}\t{' '.join(gram)}{weight}\n"
    return text + "\n\\end\\\n"
