"""Pipeline: model and modalities, raw in, raw out. The only object that most users, the command line, the server and the evaluation
touch."""

import math
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zipper import checkpoint, hub, proofs
from zipper.audio import Audio, read
from zipper.baseline import KIND, Baseline
from zipper.card import card
from zipper.engine import Engine
from zipper.errors import ZipperError
from zipper.fused import Fused
from zipper.generation import Limits, generate
from zipper.modality import Modality
from zipper.modality import load as load_modality
from zipper.modality.speech import SpeechUnits
from zipper.model import TowerSource, Zipper
from zipper.sampling import Sampling
from zipper.sequence import Segment
from zipper.tower import UnsupportedTower

PINS = "modalities.json"
FAST_BYTES = 4 << 30  # of weights, up to which they are laid out for speed without being asked for
ROWS = 16  # requests that run at once: as many as a compiled step takes

#: The model that comes with the package: spoken commands, text <-> speech.
SHIPPED = Path(__file__).parent / "shipped" / "spoken_commands"


@dataclass(frozen=True)
class Transcript:
    """What was said in a sound, "" where nothing was.

    confidence: the probability that the model gave to the tokens of the text and to its end, in the
    geometric mean; 1 where the sound alone tells that nobody speaks (`SpeechUnits.says_nothing`).
    """

    text: str
    confidence: float


#: So that two threads that ask a pipeline for its model are given the same.
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Later:
    """A zip that was recalled, and is loaded when it is needed. manifest: its hash."""

    folder: Path
    manifest: str
    dtype: torch.dtype | None
    allow_mismatch: bool

    def load(self) -> Zipper:
        """The zip. Raises a ZipperError where its files are others by now."""
        try:
            same = checkpoint.sha256(self.folder / checkpoint.MANIFEST) == self.manifest
        except OSError:
            same = False
        if not same:
            raise ZipperError(f"{self.folder} holds another model than when it was loaded, or none. Load the pipeline anew.")
        return Zipper.from_pretrained(self.folder, None, self.dtype, self.allow_mismatch)


class Pipeline:
    """A zipped model with the modalities of its towers (same names).

    held: the model, to look at. Where its towers were proved before, they are weights alone
    (`plain.Proved`) until `model` is asked for.
    """

    def __init__(self, model: Zipper | Baseline, modalities: Mapping[str, Modality]) -> None:
        if set(modalities) != set(model.towers):
            raise ZipperError(f"The model has the towers {sorted(model.towers)}, the modalities given are {sorted(modalities)}.")
        for name, modality in modalities.items():
            known = model.config.towers[name].vocabulary
            if modality.vocabulary > known:
                raise ZipperError(f"The modality {name!r} makes {modality.vocabulary} ids, its tower knows {known}.")
            if (modality.begin, modality.end) != (ends := model.ends()[name]):
                raise ZipperError(
                    f"A segment of the modality {name!r} begins and ends with {modality.begin} and {modality.end}, one of its "
                    f"tower with {ends.begin} and {ends.end}. Give the modality of this tower, or zip with the right ends=..."
                )
        self.held = model
        self.modalities = dict(modalities)
        self._later: Later | None = None
        self._reader: Fused | None = None
        self._weights: list[tuple[int, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the reader, which points into this process's memory."""
        return {**self.__dict__, "held": self.model, "_later": None, "_reader": None, "_weights": []}

    def inside(self, folder: Path) -> list[str]:
        """Frozen towers that lie in a folder; see `Zipper.inside`."""
        return self.model.inside(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        towers: Mapping[str, TowerSource] | None = None,
        dtype: torch.dtype | None = torch.float32,
        allow_mismatch: bool = False,
        revision: str | None = None,
    ) -> "Pipeline":
        """Load what `save_pretrained` wrote, from a folder or a repository of the hub (revision: a branch, tag or commit of it);
        None loads the model that comes with the package.

        towers: where a base lies now. dtype: of the weights in memory; None = as saved. Raises ZipperError for a damaged file, a
        foreign base, tokenizer or codebook; allow_mismatch makes a foreign one a warning.
        """
        local = hub.fetch(SHIPPED if source is None else source, revision)
        folder, recalled, quick = local.folder, None, not towers and proofs.wanted()
        model: Zipper | Baseline
        if _is_baseline(folder):
            if towers:
                raise ZipperError(f"{folder} is a baseline: it holds all its weights, so it takes no towers={sorted(towers)}.")
            model = Baseline.from_pretrained(folder, dtype)
        elif (recalled := proofs.recall(local, dtype) if quick else None) is not None:
            model = recalled.model
        else:
            model = Zipper.from_pretrained(folder, towers, dtype, allow_mismatch)  # the snapshot in the hub's cache is a folder too
            if quick and sum(p.nbytes for p in model.parameters()) <= FAST_BYTES:
                proofs.remember(local, model, dtype)
        if not (folder / PINS).is_file():
            raise ZipperError(
                f"{folder} holds a model without modalities. Load it with Zipper.from_pretrained, or add them and save."
            )
        modalities = _modalities(folder, allow_mismatch)
        try:
            pipeline = cls(model, modalities)
        except ZipperError as error:
            raise ZipperError(f"{folder / checkpoint.CONFIG} does not fit the modalities beside it. {error}") from error
        if recalled is not None:
            pipeline._reader = recalled.reader
            pipeline._later = Later(folder.absolute(), recalled.manifest, dtype, allow_mismatch)
        return pipeline

    @property
    def model(self) -> Zipper | Baseline:
        """The model, to run, change and train; where it was recalled, its towers are loaded and
        proved when this is first asked for."""
        with _LOADING:
            if self._later is not None:
                self.held = self._later.load()
                self._later, self._reader = None, None
        return self.held

    def save_pretrained(self, folder: str | Path, include: Sequence[str] = (), record: Mapping[str, Any] | None = None) -> None:
        """Save model and modalities in one folder, such as can be loaded, whole or not at all; see `Zipper.save_pretrained`."""
        with checkpoint.whole(Path(folder), self.prove) as temporary:
            self._write(temporary, {*include, *self.model.inside(Path(folder))}, record)

    def rehearse(self, folder: str | Path, record: Mapping[str, Any] | None = None) -> None:
        """Raises what `save_pretrained` would, for a disk that is full or files that could not be loaded, and leaves nothing."""
        with checkpoint.rehearsal(Path(folder), self.prove) as temporary:
            self._write(temporary, self.model.inside(Path(folder)), record)

    def prove(self, folder: Path) -> None:
        """Raises the ZipperError in which loading what was written would end; takes no memory for the model's tensors."""
        self.model.prove(folder)
        _modalities(folder)

    def _write(self, folder: Path, include: Collection[str], record: Mapping[str, Any] | None) -> None:
        self.model.write(folder, include, record)
        for name, modality in self.modalities.items():
            modality.save(folder / "modalities" / name)
        checkpoint.write_json(folder / PINS, {name: m.fingerprint for name, m in self.modalities.items()})
        if isinstance(self.model, Zipper):
            (folder / checkpoint.CARD).write_text(card(folder, self.model.sizes()), encoding="utf-8")

    def push_to_hub(self, repo: str, private: bool = False, revision: str | None = None, include: Sequence[str] = ()) -> str:
        """Save model and modalities and upload them to a repository of the hub, in one commit; returns the commit's URL."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "zip", include)
            return hub.push(Path(folder) / "zip", repo, private, revision)

    def run(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[Segment]:
        """Read raw segments (text as str; speech as Audio, path or the bytes of a file), produce one raw segment per item of
        `outputs`, in that order.

        A produced segment with ended=False hit its cap. limits: {tower: most tokens}; default derived from the input.
        """
        return self.run_batch([segments], outputs, sampling, limits)[0]

    def run_batch(
        self,
        batch: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[list[Segment]]:
        """`run` for many inputs of one plan at once. Contents that are lists of ids are taken as they are.

        Where all that is given is sound in which nothing is said, what comes out is empty.

        On a CPU a zip of up to `FAST_BYTES` of weights goes by the engine, which holds them twice more, laid out for speed.
        """
        batch = [[self._read(segment) for segment in segments] for segments in batch]
        silent = [bool(segments) and all(map(self._says_nothing, segments)) for segments in batch]
        prompts = [[self._encode(segment) for segment in segments] for segments, no in zip(batch, silent, strict=True) if not no]
        plan = [self._encode(item) if isinstance(item, Segment) else item for item in outputs]
        produced = iter(self.generate(prompts, plan, sampling or Sampling(), limits) if prompts else ())
        nothing = [Segment(item.tower if isinstance(item, Segment) else item, []) for item in plan]
        rows = [nothing if no else next(produced) for no in silent]
        return [[replace(s, content=self._modality(s.tower).decode(s.content)) for s in row] for row in rows]

    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling,
        limits: Limits | None = None,
    ) -> list[list[Segment]]:
        """`generation.generate` with this model, ids in and ids out, by the fastest way that knows it."""
        reader = self._fast()
        if reader is None:
            return generate(self.model, prompts, outputs, sampling, limits)
        return Engine(self.held, ROWS, reader).generate(prompts, outputs, sampling, limits)

    def _fast(self) -> Fused | None:
        """A reader with the weights as they are now; None for what is not a zip of known towers on a CPU."""
        if self._later is not None:  # nobody was given the model to change it
            return self._reader
        parameters = list(self.model.parameters())
        if any(p.device.type != "cpu" or p.is_inference() for p in parameters) or not isinstance(self.model, Zipper):
            return None
        if sum(p.nbytes for p in parameters) > FAST_BYTES:
            return None
        weights = [(p.data_ptr(), p._version) for p in parameters]  # a change in place raises the version
        if weights != self._weights:
            try:
                self._reader = Fused(self.model)
            except UnsupportedTower:
                self._reader = None
            self._weights = weights
        return self._reader

    def engine(self, rows: int = 8) -> Engine:
        """Runs many requests at once, `rows` of them side by side, with the weights as they are now; contents are ids."""
        return Engine(self.held, rows)

    def transcribe(self, speech: Audio | str | Path | bytes) -> str:
        """Speech to text: an Audio, the path of a sound file or its content -> its words, "" where nothing is said. Raises
        ZipperError for what is no sound, of no length, or not of one channel; see `Audio` and `audio.read`."""
        return self.hear(speech).text

    def hear(self, speech: Audio | str | Path | bytes) -> Transcript:
        """`transcribe`, and how sure the model is of it."""
        given, text = self._read(Segment("speech", speech)), self._modality("text")
        if self._says_nothing(given):
            return Transcript("", 1.0)
        written = self.generate([[self._encode(given)]], ["text"], Sampling())[0][0]
        return Transcript(text.decode(written.content), math.exp(written.score / max(1, len(written.content) + written.ended)))

    def speak(self, text: str, voice: str | None = None, sampling: Sampling | None = None) -> Audio:
        """Text to speech. voice: one of `modalities["speech"].voices`; None lets the model choose."""
        speech = self.run([Segment("text", text)], outputs=[self.voice(voice)], sampling=sampling)[0].content
        assert isinstance(speech, Audio)
        return speech

    def voice(self, name: str | None) -> str | Segment:
        """The output item for speech in a voice: its id is forced as the first token."""
        return Segment("speech", [self.units.voice_id(name)]) if name else "speech"

    @property
    def zip(self) -> Zipper:
        """The model, where it is a zip; a ZipperError where it is a single decoder, which has no links and no towers of its own."""
        model = self.model
        if not isinstance(model, Zipper):
            raise ZipperError("This model is a single decoder, the baseline: it has no towers and links. Give a zip.")
        return model

    @property
    def units(self) -> SpeechUnits:
        """The modality "speech"; a ZipperError where this model has none."""
        speech = self._modality("speech")
        if not isinstance(speech, SpeechUnits):
            raise ZipperError("The modality 'speech' of this model is not made of units; there are no voices and no sound.")
        return speech

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            raise ZipperError(f"This model has no modality {name!r}; it has {sorted(self.modalities)}.")
        return self.modalities[name]

    def _read(self, segment: Segment) -> Segment:
        """With the sound in place of its file; a sound without samples is an error."""
        content = segment.content
        if isinstance(self._modality(segment.tower), SpeechUnits) and isinstance(content, str | Path | bytes):
            return replace(segment, content=read(content))
        if isinstance(content, Audio) and not len(content.samples):
            raise ZipperError("The sound given has no samples. Give one with something in it.")
        return segment

    def _says_nothing(self, segment: Segment) -> bool:
        return isinstance(segment.content, Audio) and SpeechUnits.says_nothing(segment.content)

    def _encode(self, segment: Segment) -> Segment:
        modality, content = self._modality(segment.tower), segment.content
        return segment if isinstance(content, list) else replace(segment, content=modality.encode(content))


def _modalities(folder: Path, allow_mismatch: bool = False) -> dict[str, Modality]:
    """The modalities of a saved pipeline. Raises a ZipperError where one is not what its model was trained with."""
    modalities = {}
    for name, pin in checkpoint.read_json(folder / PINS).items():
        modality = load_modality(folder / "modalities" / name)
        if modality.fingerprint != pin:
            mismatch = (
                f"{folder / 'modalities' / name} is not what this model was trained with: its hash is "
                f"{modality.fingerprint[:16]}, the model wants {pin[:16]}."
            )
            if not allow_mismatch:
                raise ZipperError(f"{mismatch} Put the original back, or allow the mismatch (allow_mismatch, --allow-mismatch).")
            warnings.warn(f"{mismatch} It was allowed: its ids may mean something else to the model.", stacklevel=3)
        modalities[name] = modality
    return modalities


def _is_baseline(folder: Path) -> bool:
    """What its configuration says it is; whoever loads it checks the file."""
    try:
        config = checkpoint.read_json(folder / checkpoint.CONFIG).get("config")
    except ZipperError:
        return False
    return isinstance(config, dict) and config.get("kind") == KIND
