"""Pipeline: model and modalities, raw in, raw out. The only object that most users, the command
line, the server and the evaluation touch."""

import math
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from zipper.audio.sound import Audio
from zipper.errors import Mismatch, ZipperError
from zipper.fast import fastest
from zipper.fast import recall as proofs
from zipper.generation import Engine, Limits, Request, planned
from zipper.loss import scores
from zipper.modality import Modality, is_ids, register, whole
from zipper.modality import load as load_modality
from zipper.modality import save as save_modality
from zipper.modality.speech import SpeechUnits
from zipper.model import Zipper
from zipper.reading import Reader, Stepwise
from zipper.sampling import Sampling
from zipper.saving import checkpoint, hub
from zipper.saving.card import Told, card
from zipper.saving.files import place
from zipper.saving.zips import TowerSource
from zipper.strand import Produced, Segment, Target
from zipper.tasks import Task, among
from zipper.tower import precision

PINS = checkpoint.PINS
FAST_BYTES = 4 << 30  # of weights, up to which they are laid out for speed without being asked for
ROWS = 16  # requests that run at once: as many as a compiled step takes

#: The paper's two tasks; any other order of segments is one more `Task`.
ASR = Task(given=("speech",), produced=("text",))
TTS = Task(given=("text",), produced=("speech",))

#: The model that comes with the package: spoken commands, text <-> speech.
SHIPPED = Path(__file__).parent / "shipped" / "spoken_commands"


@dataclass(frozen=True)
class Transcript:
    """What was said in a sound, "" where nothing was.

    confidence: the probability that the model gave to the tokens of the text and to its end, in the
    geometric mean; 1 where the sound alone tells that nobody speaks (`Kind.says_nothing`).
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
            raise ZipperError(
                f"{self.folder} holds another model than when it was loaded, or none. Load the "
                "pipeline anew."
            )
        return Zipper.from_pretrained(self.folder, None, self.dtype, self.allow_mismatch)


class Pipeline:
    """A zipped model with the modalities of its towers (same names).

    held: the model, to look at. Where its towers were proved before, they are weights alone
    (`plain.Proved`) until `model` is asked for.
    """

    def __init__(self, model: Any, modalities: Mapping[str, Modality]) -> None:
        if set(modalities) != set(model.towers):
            raise ZipperError(
                f"The model has the towers {sorted(model.towers)}, the modalities given are "
                f"{sorted(modalities)}."
            )
        for name, modality in modalities.items():
            known = model.config.towers[name].vocabulary
            if modality.vocabulary > known:
                raise ZipperError(
                    f"The modality {name!r} makes {modality.vocabulary} ids, its tower knows "
                    f"{known}."
                )
            if (modality.begin, modality.end) != (ends := model.ends()[name]):
                raise ZipperError(
                    f"A segment of the modality {name!r} begins and ends with {modality.begin} and "
                    f"{modality.end}, one of its tower with {ends.begin} and {ends.end}. Give the "
                    "modality of this tower, or zip with the right ends=..."
                )
        for modality in modalities.values():
            register(type(modality))  # what is saved here can be loaded here
        self.held = model
        self.modalities = dict(modalities)
        kinds = {name: whole(modality) for name, modality in modalities.items()}
        self._lengths = {name: kind.length for name, kind in kinds.items() if kind.length}
        self._later: Later | None = None
        self._reader: Reader | None = None
        self._weights: list[tuple[int, int, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the reader, which points into this process's
        memory."""
        return {
            **self.__dict__,
            "held": self.model,
            "_later": None,
            "_reader": None,
            "_weights": [],
        }

    def inside(self, folder: Path) -> list[str]:
        """Frozen towers that lie in a folder; see `Zipper.inside`."""
        return self.model.inside(folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        towers: Mapping[str, TowerSource] | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        allow_mismatch: bool = False,
        revision: str | None = None,
    ) -> "Pipeline":
        """Load what `save_pretrained` wrote, from a folder or a repository of the hub (revision: a
        branch, tag or commit of it); None loads the model that comes with the package.

        towers: where a base lies now. dtype: of the weights in memory; None = as saved. Raises
        ZipperError for a damaged file, a foreign base, tokenizer or codebook; allow_mismatch makes
        a foreign one a warning.
        """
        dtype = precision(dtype)
        local = hub.fetch(SHIPPED if source is None else source, revision)
        folder, recalled, quick = local.folder, None, not towers and proofs.wanted()
        model: Any
        if kind := _kind(folder):
            if towers:
                raise ZipperError(
                    f"{folder} is a {kind}: it holds all its weights, so it takes no "
                    f"towers={sorted(towers)}."
                )
            model = _other(kind, folder, dtype)
        elif (recalled := proofs.recall(local, dtype) if quick else None) is not None:
            model = recalled.model
        else:
            # The snapshot in the hub's cache is a folder too.
            model = Zipper.from_pretrained(folder, towers, dtype, allow_mismatch)
            if quick and sum(p.nbytes for p in model.parameters()) <= FAST_BYTES:
                proofs.remember(local, model, dtype)
        if not (folder / PINS).is_file():
            raise ZipperError(
                f"{folder} holds a model without modalities. Load it with Zipper.from_pretrained, "
                "or add them and save."
            )
        modalities = _modalities(folder, allow_mismatch)
        try:
            pipeline = cls(model, modalities)
        except ZipperError as error:
            raise ZipperError(
                f"{folder / checkpoint.CONFIG} does not fit the modalities beside it. {error}"
            ) from error
        if recalled is not None:
            pipeline._reader = recalled.reader
            pipeline._later = Later(folder.absolute(), recalled.manifest, dtype, allow_mismatch)
        return pipeline

    @property
    def model(self) -> Any:
        """The model, to run, change and train; where it was recalled, its towers are loaded and
        proved when this is first asked for."""
        with _LOADING:
            if self._later is not None:
                self.held = self._later.load()
                self._later, self._reader = None, None
        return self.held

    def save_pretrained(
        self,
        folder: str | Path,
        include: Sequence[str] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Save model and modalities in one folder, such as can be loaded, whole or not at all; see
        `Zipper.save_pretrained`."""
        with checkpoint.whole(place(folder), self.prove) as temporary:
            self._write(temporary, {*include, *self.model.inside(place(folder))}, record)

    def rehearse(self, folder: str | Path, record: Mapping[str, Any] | None = None) -> None:
        """Raises what `save_pretrained` would, for a disk that is full or files that could not be
        loaded, and leaves nothing."""
        with checkpoint.rehearsal(place(folder), self.prove) as temporary:
            self._write(temporary, self.model.inside(place(folder)), record)

    def prove(self, folder: Path) -> None:
        """Raises the ZipperError in which loading what was written would end; takes no memory for
        the model's tensors."""
        self.model.prove(folder)
        _modalities(folder)

    def push_to_hub(
        self,
        repo: str,
        private: bool = False,
        revision: str | None = None,
        include: Sequence[str] = (),
    ) -> str:
        """Save model and modalities and upload them to a repository of the hub, in one commit;
        returns the commit's URL."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "zip", include)
            return hub.push(Path(folder) / "zip", repo, private, revision)

    def run(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        takes: int = 1,
    ) -> list[Produced]:
        """Read raw segments (what `Kind.read` of their modality takes: text as str; sound as
        Audio, path or the bytes of a file), produce one raw segment per item of `outputs`, in that
        order.

        A produced segment with ended=False hit its cap. limits: {tower: most tokens}; default
        derived from the input. takes: so many are drawn, each with a seed of its own, and the one
        is kept behind which what was given is likeliest: where a model has learnt both ways, it
        hears what it has said. Raises a ZipperError for several takes without a temperature, which
        are all alike.
        """
        how = sampling or Sampling()
        if takes < 1 or (takes > 1 and not how.temperature):
            raise ZipperError(
                f"{takes} takes were asked for. Give 1 or more, and a temperature for several: "
                "the likeliest tokens are the same each time."
            )
        prompt = self._prompt(segments) if takes > 1 else None
        if prompt is None:
            return self.run_batch([segments], outputs, how, limits)[0]
        made = self.generate([prompt] * takes, self._plan(outputs), how, limits)
        again = [[*one, *map(_wanted, prompt)] for one in made]
        told = [sum(each) for each in scores(self.model, again, ROWS)]
        return self._decoded(made[told.index(max(told))])

    def run_batch(
        self,
        batch: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[list[Produced]]:
        """`run` for many inputs. Contents that are lists of ids are taken as they are.

        Where all that is given is sound in which nothing is said, what comes out is empty.

        On a CPU a zip of up to `FAST_BYTES` of weights is laid out for speed, which holds them
        twice more.
        """
        prompts = [self._prompt(segments) for segments in batch]
        plan, how = self._plan(outputs), sampling or Sampling()
        spoken = {row: prompt for row, prompt in enumerate(prompts) if prompt is not None}
        made = self.generate([*spoken.values()], plan, how, limits, [*spoken]) if spoken else ()
        produced = iter(made)
        fixed = [segment.tower for segment in planned(plan) if not among(segment.tower)]
        nothing = [Produced(tower, []) for tower in fixed]
        return [self._decoded(nothing if prompt is None else next(produced)) for prompt in prompts]

    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling,
        limits: Limits | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Produced]]:
        """`Engine.generate` with this model, ids in and ids out, by the fastest way that knows
        it."""
        limits = self._limits(limits)
        return self.engine(ROWS).generate(prompts, outputs, sampling, limits, numbers)

    def score(
        self, given: Sequence[Segment], answers: Sequence[Segment | Sequence[Segment]]
    ) -> list[float]:
        """How likely each answer is behind what is given: the log-probabilities (nats) of its ids
        and its end, summed, as `Produced.score` of one that was produced to its end. So the model
        tells which of some words a picture shows, or which of some takes says a sentence best.

        given, answers: as for `run`; an answer is a segment, or several in order. Long answers are
        less likely than short ones: divide by the number of ids where that should not count.
        Raises a ZipperError for what the model cannot read.
        """

        def ids(segment: Segment) -> Segment:
            return self._encoded(self._read(segment))

        before, samples = [*map(ids, given)], list[list[Segment]]()
        for answer in answers:
            parts = map(ids, [answer] if isinstance(answer, Segment) else answer)
            samples.append([*before, *(_wanted(part) for part in parts)])
            self.model.check(samples[-1])
        return [sum(each) for each in scores(self.model, samples, ROWS)]

    def asked(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> Request | None:
        """What `run` would have an engine do, for whoever steps one: all contents are ids. None
        where nothing is said in what is given, so that nothing is to be produced."""
        prompt = self._prompt(segments)
        plan = self._plan(outputs)
        if prompt is None:
            return None
        return Request(prompt, plan, sampling or Sampling(), self._limits(limits))

    def engine(self, rows: int = 8) -> Engine:
        """Runs many requests at once, `rows` of them side by side, with the weights as they are
        now; contents are ids. All engines of a pipeline share one set of laid-out weights."""
        # In this order: who loads the model in between leaves a reader that is whole.
        reader = self._current_reader()
        return Engine(self.held, reader, rows)

    def transcribe(self, speech: Audio | str | Path | bytes) -> str:
        """Speech to text: an Audio, the path of a sound file or its content -> its words, "" where
        nothing is said. Raises ZipperError for what is no sound, of no length, or not of one
        channel; see `Audio` and `audio.read`.
        """
        return self.hear(speech).text

    def hear(self, speech: Audio | str | Path | bytes) -> Transcript:
        """`transcribe`, and how sure the model is of it."""
        prompt, text = self._prompt([Segment("speech", speech)]), self._modality("text")
        if prompt is None:
            return Transcript("", 1.0)
        ((written,),) = self.generate([prompt], ["text"], Sampling())
        produced = max(1, len(written.content) + written.ended)
        return Transcript(text.decode(written.content), math.exp(written.score / produced))

    def speak(
        self,
        text: str,
        voice: str | None = None,
        sampling: Sampling | None = None,
        takes: int = 1,
    ) -> Audio:
        """Text to speech. voice: one of `modalities["speech"].voices`; None lets the model choose.
        takes: see `run`. Raises a ZipperError for a text in which there is nothing to say."""
        outputs = [self.voice(voice)]
        speech = self.run([self.to_say(text)], outputs, sampling, takes=takes)[0].content
        assert isinstance(speech, Audio)
        return speech

    def to_say(self, text: str) -> Segment:
        """A text that is to be spoken, as a given segment. Raises a ZipperError where there is
        nothing in it to say."""
        segment = Segment("text", text)
        if self._says_nothing(segment):
            raise ZipperError(f"There is nothing to say in {text!r:.80}. Give words.")
        return segment

    def voice(self, name: str | None) -> str | Segment:
        """The output item for speech in a voice: its id is forced as the first token."""
        return Segment("speech", [self.units.voice_id(name)]) if name else "speech"

    @property
    def zip(self) -> Zipper:
        """The model, where it is a zip; a ZipperError where it is a single decoder, which has no
        links and no towers of its own."""
        model = self.model
        if not isinstance(model, Zipper):
            raise ZipperError(
                "This model is a single decoder, the baseline: it has no towers and links. Give a "
                "zip."
            )
        return model

    @property
    def units(self) -> SpeechUnits:
        """The modality "speech"; a ZipperError where this model has none."""
        speech = self._modality("speech")
        if not isinstance(speech, SpeechUnits):
            raise ZipperError(
                "The modality 'speech' of this model is not made of units; there are no voices "
                "and no sound."
            )
        return speech

    def told(self) -> dict[str, Told]:
        """What a card says of the modalities."""
        kinds = {name: whole(modality) for name, modality in self.modalities.items()}
        lines = {
            name: ", ".join(f"{key} {value}" for key, value in kind.about().items())
            for name, kind in kinds.items()
        }
        return {name: Told(kind.name, lines[name], kind.like) for name, kind in kinds.items()}

    def _write(
        self, folder: Path, include: Collection[str], record: Mapping[str, Any] | None
    ) -> None:
        self.model.write(folder, include, record)
        for name, modality in self.modalities.items():
            save_modality(modality, folder / "modalities" / name)
        checkpoint.write_json(
            folder / PINS, {name: m.fingerprint for name, m in self.modalities.items()}
        )
        if isinstance(self.model, Zipper):
            (folder / checkpoint.CARD).write_text(
                card(folder, self.model.sizes(), self.told()), encoding="utf-8"
            )

    def _current_reader(self) -> Reader:
        """A reader with the weights as they are now."""
        with _LOADING:
            # Nobody was given the model to change it.
            if self._later is not None and self._reader is not None:
                return self._reader
        parameters = list(self.model.parameters())
        small = sum(p.nbytes for p in parameters) <= FAST_BYTES
        if not small or any(p.device.type != "cpu" or p.is_inference() for p in parameters):
            return Stepwise(self.model)
        weights = [(p.data_ptr(), p._version, _sum_of_bits(p)) for p in parameters]
        if self._reader is None or weights != self._weights:
            self._reader, self._weights = fastest(self.model), weights
        return self._reader

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            raise ZipperError(
                f"This model has no modality {name!r}; it has {sorted(self.modalities)}."
            )
        return self.modalities[name]

    def _limits(self, limits: Limits | None) -> Limits | None:
        """What is asked for, and the length where a modality has no other end."""
        return {**self._lengths, **(limits or {})} or None

    def _plan(self, outputs: Sequence[str | Segment]) -> list[str | Segment]:
        """What is to be produced, forced beginnings as ids."""
        return [
            self._encoded(self._read(item)) if isinstance(item, Segment) else item
            for item in outputs
        ]

    def _prompt(self, segments: Sequence[Segment]) -> list[Segment] | None:
        """Raw segments as ids; None where in none of them anything is said."""
        raw = [self._read(segment) for segment in segments]
        if raw and all(self._says_nothing(segment) for segment in raw):
            return None
        return [self._encoded(segment) for segment in raw]

    def _read(self, segment: Segment) -> Segment:
        """With raw data in place of its file."""
        modality = whole(self._modality(segment.tower))
        if is_ids(segment.content):
            return segment
        return replace(segment, content=modality.read(segment.content))

    def _says_nothing(self, segment: Segment) -> bool:
        modality = whole(self._modality(segment.tower))
        return not is_ids(segment.content) and modality.says_nothing(segment.content)

    def _encoded(self, segment: Segment) -> Segment:
        if is_ids(segment.content):
            return segment
        ids = self._modality(segment.tower).encode(segment.content)
        return replace(segment, content=ids)

    def _decoded(self, produced: Sequence[Produced]) -> list[Produced]:
        return [
            replace(part, content=self._modality(part.tower).decode(part.content))
            for part in produced
        ]


def _wanted(part: Segment) -> Target:
    return Target(
        part.tower, part.content, beside=part.beside, stride=part.stride, delay=part.delay
    )


def check_pinned(name: str, source: str | Path, modality: Modality) -> None:
    """A tower inside a saved pipeline was trained with one modality; another would give its ids
    other meanings: a ZipperError."""
    tower = Path(source)
    pipeline, own = tower.parent.parent, modality.fingerprint
    pins = pipeline / PINS
    if pins.is_file() and checkpoint.read_json(pins).get(tower.name, own) != own:
        raise ZipperError(
            f"The tower {name!r} from {source} was trained with another tokenizer or codebook than "
            f"the one given. Give {pipeline / 'modalities' / tower.name}."
        )


def _modalities(folder: Path, allow_mismatch: bool = False) -> dict[str, Modality]:
    """The modalities of a saved pipeline. Raises a ZipperError where one is not what its model was
    trained with."""
    modalities = {}
    for name, pin in checkpoint.read_json(folder / PINS).items():
        modality = load_modality(folder / "modalities" / name)
        if modality.fingerprint != pin:
            mismatch = (
                f"{folder / 'modalities' / name} is not what this model was trained with: its hash "
                f"is {modality.fingerprint[:16]}, the model wants {pin[:16]}."
            )
            if not allow_mismatch:
                raise Mismatch(
                    f"{mismatch} Put the original back, or allow the mismatch (allow_mismatch, "
                    "--allow-mismatch)."
                )
            warnings.warn(
                f"{mismatch} It was allowed: its ids may mean something else to the model.",
                stacklevel=3,
            )
        modalities[name] = modality
    return modalities


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """Tells weights that were changed behind torch's back (`p.data`), which their version does not
    know, for no more than a token costs; not those that only changed places there."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(whole).sum())


def _kind(folder: Path) -> str:
    """What kind of model a folder says it holds, "" for a zip; whoever loads it checks the file."""
    try:
        config = checkpoint.read_json(folder / checkpoint.CONFIG).get("config")
    except ZipperError:
        return ""
    kind = config.get("kind", "") if isinstance(config, dict) else ""
    return kind if isinstance(kind, str) else ""


def _other(kind: str, folder: Path, dtype: torch.dtype | None) -> Any:
    """A model of a kind that another package brings, by its entry point in the group
    `zipper.models`; a folder names no code. Raises a ZipperError where no package has it."""
    for entry in entry_points(group="zipper.models", name=kind):
        return entry.load().from_pretrained(folder, dtype)
    raise ZipperError(
        f"{folder} holds a model of the kind {kind!a:.40}, which nothing installed here can load. "
        "Install the package that made it (it declares the entry point group zipper.models)."
    )
