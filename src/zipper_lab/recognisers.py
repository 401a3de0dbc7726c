"""Judges that nobody here trained: any recogniser of transformers or of faster-whisper, which turns
sound into words, and DistillMOS, which says how good it sounds.

They hear every word of their language, where pocketsphinx (`judges`) hears a domain's. None is
shipped: they come by hub id or folder. Nothing here knows our models, units or corpora.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.evaluation import lines
from zipper.modality import Scores
from zipper.saving import hub
from zipper.statistics import bootstrap, share

RATE_HZ = 16_000  # of all of them
MOST, LEAST = 30 * RATE_HZ, RATE_HZ // 10  # samples that one of transformers hears at once
TOKENS = 8  # that people say in a second, at most; Moonshine's authors have 6.5
NORMALISER = "whisper-digits"  # they write "42" or "forty two" as they like
MOS = "distillmos"
LOUD = 0.1  # root mean square of the noise that is the floor of a MOS
SAID = ("said:text", "text")  # of a row: what is said in its sound

Samples = Float32[np.ndarray, " samples"]


@dataclass(frozen=True)
class Recogniser:
    """Hears any words. name: as tables have it. listen: from samples at RATE_HZ to a text."""

    name: str
    listen: Callable[[Samples], str]
    normaliser: str = NORMALISER

    def transcribe(self, audio: Audio) -> str:
        """The words heard, "" for none. Any rate."""
        samples = audio.resample(RATE_HZ).samples.astype(np.float32)
        return self.listen(samples).strip() if len(samples) else ""

    def __call__(
        self, wanted: Sequence[Any], made: Sequence[Any], rows: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """As a judge of `zipper.measurement`: word errors and words of what the rows say in "text"
        (or "said:text"). Raises ZipperError for a row without it."""
        texts = [next((row[key] for key in SAID if key in row), None) for row in rows]
        if None in texts:
            raise ZipperError(
                f"{self.name} is to judge what is said, and a row has none of the fields "
                f"{', '.join(SAID)}. Add what is said in its sound."
            )
        heard = [self.transcribe(sound) for sound in tqdm(made, self.name, disable=None)]
        compared = lines([str(text) for text in texts], heard, self.normaliser)
        return {"wer": [(line.word_edits, line.words) for line in compared]}


@dataclass(frozen=True)
class Opinion:
    """Says how good a sound is, as people would on a scale of 1 to 5 (mean opinion score). rate:
    from samples at RATE_HZ."""

    name: str
    rate: Callable[[Samples], float]

    def scores(self, audios: Sequence[Audio]) -> list[float]:
        """Of each; of one without samples 1, the worst. Any rate."""
        found = []
        for audio in tqdm(audios, f"{self.name} rates", unit="utterance", disable=None):
            samples = audio.resample(RATE_HZ).samples.astype(np.float32)
            found.append(self.rate(samples) if len(samples) else 1.0)
        return found

    def __call__(
        self, wanted: Sequence[Any], made: Sequence[Any], rows: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """As a judge of `zipper.measurement`."""
        return {"mos": [(score, 1) for score in self.scores(made)]}


@dataclass(frozen=True)
class Rated:
    """A mean of opinions, with its 95 % interval by bootstrap over utterances."""

    system: str
    judge: str
    mos: float
    low: float
    high: float
    utterances: int

    @classmethod
    def of(cls, system: str, opinion: Opinion, audios: Sequence[Audio], seed: int = 0) -> "Rated":
        """Of sounds, of which there must be one at least."""
        found = np.array(opinion.scores(audios))
        low, high = bootstrap(share, found, np.ones(len(found)), seed=seed)
        return cls(system, opinion.name, float(found.mean()), low, high, len(found))


def noise(audios: Sequence[Audio], seed: int = 0) -> list[Audio]:
    """The floor of an opinion: white noise as long as each of these."""
    chance = np.random.default_rng(seed)
    return [
        Audio((chance.standard_normal(len(a.samples)) * LOUD).astype(np.float32), a.rate_hz)
        for a in audios
    ]


def named(source: str | Path) -> Recogniser | Opinion:
    """A judge: "distillmos", the folder of a CTranslate2 model (for faster-whisper), or any ASR of
    transformers (Whisper, Moonshine, wav2vec 2.0 with CTC ...) by folder or hub id.

    Raises ZipperError for none of these, and MissingExtra where a package is missing.
    """
    if str(source) == MOS:
        return Opinion(MOS, _distillmos())
    folder = hub.as_folder(source)
    if folder is None:
        return Recogniser(str(source), _transformers(str(source)))
    if not (folder / "config.json").is_file():
        raise ZipperError(
            f"There is no recogniser in {folder}: it has no config.json. Give the folder of one of "
            f"transformers or CTranslate2, a hub id, or {MOS}."
        )
    if (folder / "model.bin").is_file():
        return Recogniser(f"faster-whisper {folder.name}", _faster_whisper(folder))
    return Recogniser(folder.name, _transformers(str(folder)))


def all_named(sources: Iterable[str | Path]) -> list[Recogniser | Opinion]:
    """`named` of each. Raises ZipperError for two judges of one name, of which a table would have
    one column."""
    found = [named(source) for source in sources]
    names = [judge.name for judge in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ZipperError(
            f"Two judges have the name {twice[0]!r}, that of their folders. Rename one of them."
        )
    return found


def _transformers(source: str) -> Callable[[Samples], str]:
    """In fp32, greedy; more than MOST in pieces. A Whisper of many languages hears English."""
    import transformers  # seconds

    asked: dict[str, Any] = {"trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **asked)
        writes = type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
        kind = transformers.AutoModelForSpeechSeq2Seq if writes else transformers.AutoModelForCTC
        front: Any = transformers.AutoProcessor.from_pretrained(source, **asked)
        asked |= {"use_safetensors": True, "dtype": torch.float32}
        model: Any = kind.from_pretrained(source, **asked).eval()
    except Exception as error:  # whatever a stranger's files lead transformers to
        raise ZipperError(
            f"No recogniser of transformers can be loaded from {source}: {error!s:.500} Give one "
            "that writes (Whisper, Moonshine) or has CTC, with its processor and in safetensors."
        ) from error
    many = writes and getattr(model.generation_config, "is_multilingual", False)
    spoken = {"language": "en", "task": "transcribe"} if many else {}

    def listen(samples: Samples) -> str:
        said = [hear(samples[at : at + MOST]) for at in range(0, len(samples), MOST)]
        return " ".join(said)

    @torch.no_grad()
    def hear(samples: Samples) -> str:
        samples = np.pad(samples, (0, max(0, LEAST - len(samples))))
        given = front(samples, sampling_rate=RATE_HZ, return_tensors="pt")
        if writes:
            most = TOKENS + round(TOKENS * len(samples) / RATE_HZ)
            ids = model.generate(**given, **spoken, max_new_tokens=most)
        else:
            ids = model(**given).logits.argmax(-1)
        return str(front.batch_decode(ids, skip_special_tokens=True)[0]).strip()

    return listen


def _faster_whisper(folder: Path) -> Callable[[Samples], str]:
    """In int8; English, beams of five, each sentence by itself, as long as it is certain."""
    kind = extra("faster_whisper").WhisperModel
    try:
        model = kind(
            str(folder),
            device="cpu",
            compute_type="int8",
            cpu_threads=torch.get_num_threads(),
            local_files_only=True,
        )
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        raise ZipperError(
            f"faster-whisper cannot load {folder}: {error!s:.300} Give a folder that "
            "ct2-transformers-converter wrote, with tokenizer.json."
        ) from error

    def listen(samples: Samples) -> str:
        parts, _ = model.transcribe(
            samples, language="en", beam_size=5, condition_on_previous_text=False
        )
        return " ".join(part.text.strip() for part in parts)

    return listen


@cache
def _distillmos() -> Callable[[Samples], float]:
    """Stahl and Gamper 2025 (arXiv:2502.05356); MIT. Its torchaudio is for reading files, which
    nobody asks of it here, and one that does not load would break transformers."""
    stands = "torchaudio" not in sys.modules
    if stands:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        model = extra("distillmos").ConvTransformerSQAModel().eval()
    finally:
        if stands:
            del sys.modules["torchaudio"]

    def rate(samples: Samples) -> float:
        with torch.no_grad():
            return float(model(torch.from_numpy(samples)[None]))

    return rate
