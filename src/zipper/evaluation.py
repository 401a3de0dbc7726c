"""Evaluation: how far texts lie from their references, and an independent ear that turns sound into
text.

Rates, intervals, floors and significance are functions of texts alone: whether a model, a judge or
an oracle wrote them is the caller's business. It knows no model, no units and no corpus.
"""

import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.normaliser import NORMALISER, spaceless, words
from zipper.normaliser import normalise as normalise
from zipper.workers import spread

RESAMPLES = 2_000
JUDGE_NORMALISER = "lower-ascii-words"  # CMUdict's words
JUDGE_RATE_HZ = 16_000  # of pocketsphinx's US English model
# root mean square of loud frames after levelling, so that noise lies equally far under every
# utterance
LOUD = 0.1
NOISE = 30 / 32_768  # 41 dB under them; see Judge
CHUNK = 8  # utterances handed to a process at once


# --- rates ---


@dataclass(frozen=True)
class ErrorRate:
    """Errors over a corpus, as fractions: total edits by total reference words (`wer`) or
    characters (`cer`).

    low, high: 95 % interval of `wer`, by bootstrap over utterances; without any error it is 0 to 0,
    which says nothing about how rare errors are. exact: share of utterances without a word error.
    normaliser: the one of both texts. counted: what `wer` calls a
    word: in scripts that write no spaces (Chinese, Japanese, Thai) a character, so that it is a
    character error rate there.
    """

    wer: float
    low: float
    high: float
    cer: float
    exact: float
    words: int
    utterances: int
    normaliser: str = NORMALISER
    counted: str = "words"


@dataclass(frozen=True)
class Line:
    """One utterance: both raw texts, and the edits between them once normalised."""

    reference: str
    hypothesis: str
    word_edits: int
    words: int
    character_edits: int
    characters: int


def lines(
    references: Sequence[str], hypotheses: Sequence[str], normaliser: str = NORMALISER
) -> list[Line]:
    """The least edits (substitutions, deletions, insertions) from each reference to its hypothesis.

    A reference without a letter or digit says that nobody speaks: every word heard there is an
    insertion. Raises ZipperError if there is nothing to compare, the numbers differ, no reference
    has a word, or the normaliser takes all of one away.
    """
    jiwer = extra("jiwer")
    if not references or len(references) != len(hypotheses):
        raise ZipperError(
            f"{len(references)} references and {len(hypotheses)} hypotheses were given. Give as "
            "many of each, and at least one."
        )
    found = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted, got = normalise(reference, normaliser), normalise(hypothesis, normaliser)
        if not wanted and any(map(str.isalnum, reference)):
            raise ZipperError(
                f"The reference {reference!r} has no words after normalising ({normaliser}). Take "
                "another normaliser."
            )
        by = (words(wanted), words(got)), (wanted, got)
        edits = [
            _edits(jiwer.process_words(" ".join(by[0][0]), " ".join(by[0][1]))),
            _edits(jiwer.process_characters(*by[1])),
        ]
        found.append(Line(reference, hypothesis, edits[0], len(by[0][0]), edits[1], len(wanted)))
    if not any(line.words for line in found):
        raise ZipperError(
            f"None of the references has a word, e.g. {references[0]!r}. Give at least one that "
            "has."
        )
    return found


def _edits(compared: Any) -> int:
    return int(compared.substitutions + compared.deletions + compared.insertions)


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    seed: int = 0,
    normaliser: str = NORMALISER,
) -> ErrorRate:
    """Word and character error rate of a corpus; `asdict` of it is ready for JSON. Errors: those of
    `lines`."""
    compared = lines(references, hypotheses, normaliser)
    edits, words = _edits_and_words(compared)
    low, high = np.quantile(_resampled(edits, words, seed), (0.025, 0.975))
    return ErrorRate(
        wer=float(edits.sum() / words.sum()),
        low=float(low),
        high=float(high),
        cer=sum(line.character_edits for line in compared)
        / sum(line.characters for line in compared),
        exact=float((edits == 0).mean()),
        words=int(words.sum()),
        utterances=len(compared),
        normaliser=normaliser,
        counted=_counted(references, normaliser),
    )


def _counted(references: Sequence[str], normaliser: str) -> str:
    """What the words of these texts are."""
    single = [
        spaceless(word[0]) for text in references for word in words(normalise(text, normaliser))
    ]
    return "characters" if all(single) else "words and characters" if any(single) else "words"


def by_voice(
    references: Sequence[str], hypotheses: Sequence[str], voices: Sequence[str], seed: int = 0
) -> dict[str, ErrorRate]:
    """`error_rate` of each voice alone, in the order in which they first appear."""
    mine = {
        voice: [i for i, other in enumerate(voices) if other == voice]
        for voice in dict.fromkeys(voices)
    }
    return {
        voice: error_rate([references[i] for i in rows], [hypotheses[i] for i in rows], seed)
        for voice, rows in mine.items()
    }


@dataclass(frozen=True)
class Difference:
    """Word error rate of a second system minus that of a first, as fractions; negative = the second
    is better.

    low, high: 95 % interval by bootstrap over the same utterances for both. p: two-sided Wilcoxon
    signed-rank test over the utterances' own error rates, as in the paper (sec. 4.1).
    """

    wer: float
    low: float
    high: float
    p: float


def difference(
    references: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int = 0
) -> Difference:
    """How two systems differ on the same utterances. Errors: those of `lines`."""
    stats = extra("scipy.stats")
    (edits_first, words), (edits_second, _) = (
        _edits_and_words(lines(references, texts)) for texts in (first, second)
    )
    edits = edits_second - edits_first
    low, high = np.quantile(_resampled(edits, words, seed), (0.025, 0.975))
    rates = np.round(edits / np.maximum(words, 1), 12)  # 2/3 - 1/3 and 1/3 are a tie
    p = float(stats.wilcoxon(rates).pvalue) if rates.any() else 1.0
    return Difference(float(edits.sum() / words.sum()), float(low), float(high), p)


def _edits_and_words(
    compared: Sequence[Line],
) -> tuple[Int64[np.ndarray, " utterances"], Int64[np.ndarray, " utterances"]]:
    return np.array([line.word_edits for line in compared]), np.array(
        [line.words for line in compared]
    )


def _resampled(
    edits: Int64[np.ndarray, " utterances"], words: Int64[np.ndarray, " utterances"], seed: int
) -> Float64[np.ndarray, " resamples"]:
    """Edits by words of as many utterances again, drawn with replacement."""
    count = len(edits)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return (drawn @ edits) / np.maximum(
        drawn @ words, 1
    )  # a draw of silent utterances alone has none


# --- floors: what a system gets that does not listen ---


def floor_random(references: Sequence[str], seed: int = 0) -> list[str]:
    """For each sentence another one, drawn from all. Raises ZipperError if all are the same."""
    chance = random.Random(seed)
    return [_another(text, references, chance) for text in references]


def floor_template(references: Sequence[str], templates: Sequence[int], seed: int = 0) -> list[str]:
    """For each sentence another one of its template: the best that knowing the kind of sentence
    alone can do.

    A sentence that is the only one of its template gets one drawn from all. Raises ZipperError if
    all sentences are the same.
    """
    chance = random.Random(seed)
    siblings = defaultdict(list)
    for text, template in zip(references, templates, strict=True):
        siblings[template].append(text)
    return [
        _another(
            text, siblings[template] if len(set(siblings[template])) > 1 else references, chance
        )
        for text, template in zip(references, templates, strict=True)
    ]


def _another(text: str, candidates: Sequence[str], chance: random.Random) -> str:
    others = [other for other in candidates if other != text]
    if not others:
        raise ZipperError(
            f"A floor needs two different sentences, but there is only {text!r}. Evaluate on more "
            "utterances."
        )
    return chance.choice(others)


# --- the judge ---


@dataclass(frozen=True)
class Judge:
    """pocketsphinx with its US English acoustic model, a language model of the domain and the
    domain's words only.

    It shares nothing with our models, and never heard a voice of ours unless it was adapted to
    them. It only speaks for sentences
    of its domain: a word outside cannot be heard. Report its rate on true audio beside every
    result.

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
        words = {word for line in sentences for word in normalise(line, JUDGE_NORMALISER).split()}
        return cls(arpa(sentences, order), pronunciations(words), str(acoustic_model))

    def transcribe(self, audio: Audio) -> str:
        """The words heard, "" for none. Any rate and loudness."""
        heard_pulses = pulses(audio)
        decoder = self._decoder()
        decoder.start_utt()
        if heard_pulses:
            decoder.process_raw(heard_pulses, full_utt=True)
        decoder.end_utt()
        heard = decoder.hyp()
        return heard.hypstr if heard else ""

    def _decoder(self):  # type: ignore[no-untyped-def]  # a class of the extra `speech`
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


def pulses(audio: Audio) -> bytes:
    """What pocketsphinx gets to hear: 16 bits at its rate, levelled, with the noise that Judge
    speaks of."""
    samples = (
        audio.resample(JUDGE_RATE_HZ).level(LOUD).samples if len(audio.samples) else audio.samples
    )
    noise = np.random.default_rng(0).standard_normal(len(samples)) * NOISE
    return (np.clip(samples + noise, -1, 1) * 32_767).astype(np.int16).tobytes()


def judge_audio(judge: Judge, audios: Sequence[Audio], workers: int = 2) -> list[str]:
    """What the judge hears in each, in order, by `workers` processes with a progress bar; a few are
    done in this process."""
    # Processes, because pocketsphinx holds the interpreter's lock.
    with closing(spread(judge.transcribe, audios, workers, CHUNK)) as heard:
        return list(
            tqdm(
                heard,
                desc=f"{judge.name} listens",
                total=len(audios),
                unit="utterance",
                disable=None,
            )
        )


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
    rows = [
        ("<s>", *words, "</s>")
        for words in (normalise(sentence, JUDGE_NORMALISER).split() for sentence in sentences)
        if words
    ]
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
    text = "\\data\\\n" + "".join(
        f"ngram {n}={len(grams)}\n" for n, grams in enumerate(sections, start=1)
    )
    for n, grams in enumerate(sections, start=1):
        text += f"\n\\{n}-grams:\n"
        for gram, p in grams.items():
            weight = f"\t{math.log10(back_off(gram)):.6f}" if n < order else ""
            text += f"{math.log10(p):.6f}\t{' '.join(gram)}{weight}\n"
    return text + "\n\\end\\\n"
