"""Report: what a run achieved and how, as one HTML file that opens offline and says the same things
as report.json.

It draws and embeds what it is given. It knows no model, runs nothing and asks the network for
nothing; the page itself is templates/report.html. matplotlib, jiwer and soundfile are imported
only when a picture, a difference or a sound is made.
"""

import base64
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from zipper import pages
from zipper.audio.sound import Audio, Mel
from zipper.environment import extra
from zipper.environment import installed as version
from zipper.errors import ZipperError
from zipper.evaluation import ErrorRate
from zipper.normaliser import normalise, words
from zipper.pages import cut, percent
from zipper.training import history
from zipper_lab.recognisers import Rated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).parent / "templates" / "report.html"
TITLE = "Two decoders, zipped"
ABOUT = (
    "A text decoder and a speech-unit decoder, each pre-trained alone, were zipped by gated "
    "cross-attention and aligned on spoken pairs, as the Zipper paper (arXiv:2405.18669) proposes. "
    "The one model that came of it writes down speech it never heard and speaks sentences it never "
    "read; here is how well."
)
NOTES = {
    "model": "what was trained",
    "oracle": "the true units through the same chain",
    "floor": "another sentence of the same template",
}
PICTURE = Mel(bins=80, high_hz=8_000.0)  # finer than what units are made of: this one is for eyes


@dataclass(frozen=True)
class Score:
    """One system under one judge.

    system: "model", "oracle", "floor" or any other name. judge: who turned the output into words.
    voice: "" = all voices together. unended: share of produced segments that hit their cap, None
    where nothing was produced. disturbed: by what the sound was, a name of `disturbance.TABLE`;
    "" = as it is.
    """

    system: str
    judge: str
    rate: ErrorRate
    voice: str = ""
    unended: float | None = None
    disturbed: str = ""


@dataclass(frozen=True)
class Sound:
    """Something to listen to, and what each judge heard in it."""

    audio: Audio
    heard: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """One test utterance: its text, what the model wrote on hearing it, and three sounds.

    recorded: the utterance itself. rebuilt: its true units turned back to sound. spoken: the model,
    given the text.
    """

    id: str
    text: str
    voice: str
    transcript: str
    recorded: Sound
    rebuilt: Sound
    spoken: Sound


@dataclass(frozen=True)
class AttentionMap:
    """How strongly each token of the tower `reader` (rows) looked at each token of the tower `read`
    (columns), in one utterance."""

    reader: str
    read: str
    weights: Float[np.ndarray, "target source"]
    target: Sequence[str]
    source: Sequence[str]

    def __post_init__(self) -> None:
        if self.weights.shape != (len(self.target), len(self.source)):
            raise ZipperError(
                f"An attention map of shape {self.weights.shape} came with {len(self.target)} "
                f"target and {len(self.source)} source labels. Give one label per row and one per "
                "column."
            )


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    asr, tts: scores; in each the first judge is the one quoted. seconds: of the whole run; phases:
    of its parts. corpus: utterances per part. recipe: the configuration, nested as it is.
    environment: see `environment`. command: what does it again. metrics: the rows that training
    wrote. rated: how good what is said sounds.
    """

    asr: Sequence[Score]
    tts: Sequence[Score]
    seconds: float
    phases: Mapping[str, float]
    corpus: Mapping[str, int]
    recipe: Mapping[str, Any]
    environment: Mapping[str, str]
    command: str
    metrics: Sequence[Mapping[str, Any]] = ()
    attention: Sequence[AttentionMap] = ()
    samples: Sequence[Sample] = ()
    title: str = TITLE
    about: str = ABOUT
    rated: Sequence[Rated] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of report.json: `{"asr": {"wer", "floor", ...}, "tts": {"wer", "oracle",
        "floor", ...}, "seconds", ...}`.

        Rates are fractions; `wer` is the model's by the first judge over all voices, every other
        system stands under its own name, and `scores` holds all there is. Sounds and pictures stay
        out.
        """
        samples = []
        for one in self.samples:
            said = {"id": one.id, "text": one.text, "voice": one.voice}
            heard = {f"{name}_heard": dict(sound.heard) for name, sound in _sounds(one).items()}
            samples.append(said | {"transcript": one.transcript} | heard)

        return {
            "asr": summary(self.asr),
            "tts": summary(self.tts) | rated(self.rated),
            "seconds": self.seconds,
            "phases": dict(self.phases),
            "corpus": dict(self.corpus),
            "recipe": dict(self.recipe),
            "environment": dict(self.environment),
            "command": self.command,
            "samples": samples,
        }


def environment() -> dict[str, str]:
    """What this run stands on: versions of the packages that matter, Python, machine and number of
    cores."""
    found = {"zipper": installed()}
    found |= {name: _version(name) for name in ("torch", "transformers", "numpy")}
    return found | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def installed() -> str:
    """The version of zipper that is installed; "not installed" where the source is run as it
    lies."""
    return _version("zipper-lm")


def _version(package: str) -> str:
    return version(package) or "not installed"


def commit() -> str:
    """The commit that this source stands at; "" where it is no checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(path: Path, report: Report) -> None:
    """Write the page, whole or not at all. Raises ZipperError where matplotlib or jinja2 is
    missing."""
    tasks = {"Speech to text": report.asr, "Text to speech": report.tts}
    phases = dict(report.phases) | {"in all": report.seconds}
    pages.write(
        path,
        PAGE,
        title=report.title,
        about=report.about,
        cards=[
            _card(title, scores) for title, scores in tasks.items() if "model" in _quoted(scores)
        ],
        rated=report.rated,
        tables={title: _compared(scores) for title, scores in tasks.items() if scores},
        curves=curves(report.metrics) if report.metrics else "",
        attention=[_drawn(seen) for seen in report.attention],
        samples=[_shown(sample) for sample in report.samples],
        command=report.command,
        facts={
            "Seconds": {name: f"{seconds:,.1f}" for name, seconds in phases.items()},
            "Utterances": {part: f"{count:,}" for part, count in report.corpus.items()},
            "Made with": report.environment,
        },
        recipe=dict(_flat(report.recipe)),
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Losses and gates over steps as one SVG, from the rows of metrics.jsonl.

    The keys that count are `loss/TOWER`, `dev/TASK` (nats per token) and
    `gate/JUNCTION:SOURCE>TARGET` (|tanh|). Raises ZipperError where there is nothing to draw or no
    matplotlib.
    """
    panels = {
        "training loss, nats per token": history.series(metrics, "loss/"),
        "dev loss, nats per token": history.series(metrics, "dev/"),
    }
    panels |= history.directions(metrics, "gate/", "gate |tanh|")
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise ZipperError(
            f"There is nothing to draw in {len(metrics)} metrics rows: no loss/..., dev/... or "
            "gate/... in any."
        )
    return pages.curves(panels)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Scores of one task as plain data: `wer` of the model and of each other system by the first
    judge, `robust`, the model's by disturbance, where that was tried, and all `scores`."""
    quoted = _quoted(scores)
    found: dict[str, Any] = {
        "wer" if name == "model" else name: score.rate.wer for name, score in quoted.items()
    }
    if scores:
        found["judge"] = scores[0].judge

    if robust := {score.disturbed: score.rate.wer for score in scores if score.disturbed}:
        found["robust"] = robust
    if unended := [score.unended for score in quoted.values() if score.unended is not None]:
        found["unended"] = unended[0]
    return found | {"scores": [asdict(score) for score in scores]}


def rated(found: Sequence[Rated]) -> dict[str, Any]:
    """How good it sounds, as plain data, beside a `summary`: nothing where nobody said it."""
    return {"rated": [asdict(one) for one in found]} if found else {}


def text_table(scores: Sequence[Score], found: Sequence[Rated] = ()) -> str:
    """Scores, and how good it sounds, as a table for a terminal."""
    width = max([8, *(len(s.disturbed or s.voice) for s in scores)])
    title = f"{'of':{width}}"
    lines = [
        f"{'system':8} {'judge':18} {title} {'WER':>7} {'95 % interval':>17} {'CER':>7} "
        f"{'exact':>7} {'unended':>8} {'n':>5}"
    ]
    for s in scores:
        unended = "" if s.unended is None else f"{s.unended:.1%}"
        lines.append(
            f"{s.system:8} {s.judge:18} {s.disturbed or s.voice or 'all':{width}} "
            f"{s.rate.wer:7.1%} {s.rate.low:8.1%} {s.rate.high:8.1%} {s.rate.cer:7.1%} "
            f"{s.rate.exact:7.1%} {unended:>8} {s.rate.utterances:5d}"
        )
    for one in found:
        lines.append(
            f"{one.system:8} {one.judge:18} MOS {one.mos:.2f} ({one.low:.2f} to {one.high:.2f}), "
            f"{one.utterances} utterances"
        )
    return "\n".join(lines)


def _quoted(scores: Sequence[Score]) -> dict[str, Score]:
    """Each system's score by the first judge over all voices."""
    return {
        score.system: score
        for score in scores
        if score.judge == scores[0].judge and not score.voice + score.disturbed
    }


def _sounds(sample: Sample) -> dict[str, Sound]:
    return {"recorded": sample.recorded, "rebuilt": sample.rebuilt, "spoken": sample.spoken}


# --- the parts of the page ---


class Row(NamedTuple):
    """A line of the table of scores: a rate a judge, None where one did not judge it. part: voice
    or disturbance, "" = all; note: what kind of system it is."""

    system: str
    note: str
    part: str
    rates: Sequence[ErrorRate | None]
    unended: float | None

    @property
    def first(self) -> ErrorRate:
        """By the first judge that there is."""
        return next(rate for rate in self.rates if rate)


class Compared(NamedTuple):
    """Systems and voices down, judges across. scale: from a rate to a place in per cent, so that
    all intervals fit beside each other."""

    judges: Sequence[str]
    rows: Sequence[Row]
    scale: float


def _compared(scores: Sequence[Score]) -> Compared:
    judges = list(dict.fromkeys(score.judge for score in scores))
    together: dict[tuple[str, str, str], dict[str, Score]] = {}
    for score in scores:
        together.setdefault((score.system, score.voice, score.disturbed), {})[score.judge] = score

    rows = []
    for (system, voice, disturbed), by in together.items():
        part = disturbed or (voice and f"voice {voice}")
        rates = [by[judge].rate if judge in by else None for judge in judges]
        unended = [score.unended for score in by.values() if score.unended is not None]
        rows.append(Row(system, NOTES.get(system, ""), part, rates, next(iter(unended), None)))

    most = max(score.rate.high for score in scores)
    return Compared(judges, rows, 100 / most if most else 0.0)


def _card(title: str, scores: Sequence[Score]) -> pages.Card:
    quoted = _quoted(scores)
    rate = quoted.pop("model").rate
    about = (
        f"of {rate.words:,} words wrong (95\u00a0% interval {100 * rate.low:.1f} to "
        f"{percent(rate.high)}), by {scores[0].judge}"
    )
    beside = [f"{NOTES.get(name, name)}: {percent(s.rate.wer)}" for name, s in quoted.items()]
    return pages.Card(title, percent(rate.wer), about, beside)


class Drawn(NamedTuple):
    """An attention map as a picture. strongest: the largest weight."""

    label: str
    strongest: float
    picture: str


def _drawn(seen: AttentionMap) -> Drawn:
    """The longer side runs across, so that speech always reads from left to right."""
    sides = [
        (f"{cut(seen.reader)} (looks)", [*map(cut, seen.target)]),
        (f"{cut(seen.read)} (is looked at)", [*map(cut, seen.source)]),
    ]
    weights = seen.weights
    if len(seen.target) > len(seen.source):
        weights, sides = weights.T, sides[::-1]
    (down, rows), (across, columns) = sides

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        colours = extra("matplotlib.colors").LinearSegmentedColormap
        clear = colours.from_list("clear", [f"{pages.PALETTE[0]}00", pages.PALETTE[0]])
        axes.imshow(weights, cmap=clear, aspect="auto", interpolation="none", vmin=0)
        axes.set_yticks(range(len(rows)), rows)
        every = -(-len(columns) // 32)
        axes.set_xticks(range(0, len(columns), every), columns[::every], rotation=90)
        axes.set(xlabel=across, ylabel=down)

    label = f"Cross-attention: {seen.reader} reads {seen.read}"
    inches = (9.6, 0.7 + 0.16 * len(rows) + 0.1 * max(map(len, columns)))
    said = f"{label}, {len(seen.target)} by {len(seen.source)} tokens"
    return Drawn(label, float(seen.weights.max(initial=0.0)), pages.svg(draw, inches, said))


#: Words in a row and what happened to them: "" = right, "del" = missing, "ins" = should not be.
Marked = Sequence[tuple[str, str]]


class Played(NamedTuple):
    """A sound on the page. width: of its spectrogram, beside the longest sound. flac, spectrogram:
    as they are embedded, "" where no sound came out."""

    title: str
    length: str
    width: str
    spectrogram: str
    flac: str
    heard: Mapping[str, Marked]


class Shown(NamedTuple):
    """A sample on the page. wrote: what the model wrote on hearing it."""

    sample: Sample
    wrote: Marked
    sounds: Sequence[Played]


def _shown(sample: Sample) -> Shown:
    titles = {
        "recorded": "the utterance",
        "rebuilt": "its true units, as sound",
        "spoken": "the model, from the text",
    }
    sounds = _sounds(sample)
    longest_s = max(sound.audio.seconds for sound in sounds.values())
    played = [
        _played(titles[name], sound, sample.text, longest_s) for name, sound in sounds.items()
    ]
    return Shown(sample, marked(sample.text, sample.transcript), played)


def _played(title: str, sound: Sound, text: str, longest_s: float) -> Played:
    audio, spectrogram, flac, width = sound.audio, "", "", ""
    if len(audio.samples):
        width = f"{100 * audio.seconds / longest_s:.1f}%"
        spectrogram = _embedded("image/png", _spectrogram(audio))
        flac = _embedded("audio/flac", _flac(audio))
    heard = {judge: marked(text, said) for judge, said in sound.heard.items()}
    return Played(title, f"{audio.seconds:.2f}\u00a0s", width, spectrogram, flac, heard)


def marked(reference: str, hypothesis: str) -> Marked:
    """The hypothesis in normalised words and what is missing of the reference, as WER counts
    them."""
    texts = [" ".join(words(normalise(text))) for text in (reference, hypothesis)]
    aligned = extra("jiwer").process_words(*texts)
    found = []
    for chunk in aligned.alignments[0]:
        wanted = aligned.references[0][chunk.ref_start_idx : chunk.ref_end_idx]
        got = aligned.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            found.append(("", " ".join(got)))
            continue
        found += [("del", " ".join(wanted))] * bool(wanted)
        found += [("ins", " ".join(got))] * bool(got)
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted names and JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


# --- pictures and sound as text ---


def _spectrogram(audio: Audio) -> bytes:
    """A PNG, low frequencies at the bottom, 10 ms per pixel; the darkest is 60 dB under the
    loudest."""
    picture = PICTURE.picture(audio.resample(PICTURE.rate_hz)).T
    out = io.BytesIO()
    extra("matplotlib.image").imsave(
        out, picture, vmin=picture.max() - np.log(1e6), cmap="magma", origin="lower", format="png"
    )
    return out.getvalue()


def _flac(audio: Audio) -> bytes:
    """16 bits, lossless, half of a WAV, and played by every browser since 2017; Safari learned OGG
    only in 2025."""
    out = io.BytesIO()
    extra("soundfile").write(out, audio.samples, audio.rate_hz, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _embedded(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
