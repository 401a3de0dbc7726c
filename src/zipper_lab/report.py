"""Report: what a run achieved and how, as one HTML file that opens offline and says the same things
as report.json.

It draws, escapes and embeds what it is given. It knows no model, runs nothing and asks the network
for nothing; the page itself is web/report.html. matplotlib, jiwer and soundfile are imported only
when a picture, a difference or a sound is made.
"""

import base64
import io
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from zipper.audio.sound import Audio, Mel
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.evaluation import ErrorRate
from zipper.normaliser import normalise, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).parent / "web" / "report.html"
TITLE = "Two decoders, zipped"
ABOUT = (
    "A text decoder and a speech-unit decoder, each pre-trained alone, were zipped by gated "
    "cross-attention and aligned on spoken "
    "pairs, as the Zipper paper (arXiv:2405.18669) proposes. The one model that came of it writes "
    "down speech it never heard and "
    "speaks sentences it never read; here is how well."
)
NOTES = {
    "model": "what was trained",
    "oracle": "the true units through the same chain",
    "floor": "another sentence of the same template",
}
LEGEND = "<p class=quiet>Words that should not be there are <ins>marked</ins>, words that are missing are <del>struck out</del>.</p>"
PICTURE = Mel(bins=80, high_hz=8_000.0)  # finer than what units are made of: this one is for eyes
PALETTE = (
    "#3f83c8",
    "#d8792f",
    "#2f9e83",
    "#b4578f",
    "#8571c9",
    "#8a8f98",
)  # readable on white and on near-black
# stands for `currentColor`, which matplotlib does not know: the page decides what colour text has
INK = "#010203"
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a token may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.linewidth": 1.6,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color"),
    INK,
)


@dataclass(frozen=True)
class Score:
    """One system under one judge. system: "model", "oracle", "floor" or any other name; judge: who
    turned the output into words;
    voice: "" = all voices together; unended: share of produced segments that hit their cap, None
    where nothing was produced.
    disturbed: by what the sound was, a name of `disturbance.TABLE`; "" = as it is.
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
                f"target and {len(self.source)} source "
                "labels. Give one label per row and one per column."
            )


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    asr, tts: scores; in each the first judge is the one quoted. seconds: of the whole run; phases:
    of its parts.
    corpus: utterances per part. recipe: the configuration, nested as it is. environment: see
    `environment`. command: what does it again. metrics: the rows that training wrote.
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

    def to_json(self) -> dict[str, Any]:
        """The content of report.json: `{"asr": {"wer", "floor", ...}, "tts": {"wer", "oracle",
        "floor", ...}, "seconds", ...}`.

        Rates are fractions; `wer` is the model's by the first judge over all voices, every other
        system stands under its own name, and `scores` holds all there is. Sounds and pictures stay
        out.
        """
        return {
            "asr": summary(self.asr),
            "tts": summary(self.tts),
            "seconds": self.seconds,
            "phases": dict(self.phases),
            "corpus": dict(self.corpus),
            "recipe": dict(self.recipe),
            "environment": dict(self.environment),
            "command": self.command,
            "samples": [
                {"id": s.id, "text": s.text, "voice": s.voice, "transcript": s.transcript}
                | {f"{name}_heard": dict(sound.heard) for name, sound in _sounds(s).items()}
                for s in self.samples
            ],
        }


def environment() -> dict[str, str]:
    """What this run stands on: versions of the packages that matter, Python, machine and number of
    cores."""
    found = {
        "zipper": "zipper-lm",
        "torch": "torch",
        "transformers": "transformers",
        "numpy": "numpy",
    }
    return {name: _version(package) for name, package in found.items()} | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def commit() -> str:
    """The commit that this source stands at; "" where it is no checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(path: Path, report: Report) -> None:
    """Write the page, whole or not at all. Raises ZipperError where matplotlib is missing."""
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        about=escape(report.about),
        cards=_card("Speech to text", report.asr) + _card("Text to speech", report.tts),
        scores=_table("Speech to text", report.asr) + _table("Text to speech", report.tts),
        curves=_section(
            "Training", f"<figure>{curves(report.metrics)}</figure>" if report.metrics else ""
        ),
        attention=_section("Who looked where", "".join(map(_attention, report.attention))),
        samples=_section(
            "Listen", LEGEND * bool(report.samples) + "".join(map(_sample, report.samples))
        ),
        making=_making(report),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Losses and gates over steps as one SVG, from the rows of metrics.jsonl.

    The keys that count are `loss/TOWER`, `dev/TASK` (nats per token) and
    `gate/JUNCTION:SOURCE>TARGET` (|tanh|). Text and axes have the colour of the text around them.
    Raises ZipperError where there is nothing to draw or no matplotlib.
    """
    panels = {
        "training loss, nats per token": series(metrics, "loss/"),
        "dev loss, nats per token": series(metrics, "dev/"),
    }
    for link, line in series(metrics, "gate/").items():
        junction, _, direction = link.partition(":")
        source, _, target = direction.partition(">")
        panels.setdefault(f"gate |tanh|, {target} reads {source}", {})[f"junction {junction}"] = (
            line
        )
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise ZipperError(
            f"There is nothing to draw in {len(metrics)} metrics rows: no loss/..., dev/... or "
            "gate/... in any."
        )

    def draw(figure: "Figure") -> None:
        from cycler import cycler

        grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
        for axes in list(grid)[len(panels) :]:
            axes.remove()
        for axes, (title, lines) in zip(figure.axes, panels.items(), strict=True):
            axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=PALETTE))
            for name, (steps, values) in lines.items():
                axes.plot(
                    steps, values, label=_cut(name, 40), marker="." if len(steps) < 25 else None
                )
            axes.set(title=_cut(title, 60), xlabel="step", xlim=(0, None), ylim=(0, None))
            axes.grid()
            axes.legend(ncols=1 + (len(lines) > 4))

    ends = [
        f"{title}: {name} {values[-1]:.3f}"
        for title, lines in panels.items()
        for name, (_, values) in lines.items()
    ]
    return svg(
        draw, (9.6, 2.7 * -(-len(panels) // 2)), "Curves over steps; at the end " + "; ".join(ends)
    )


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Scores of one task as plain data: `wer` of the model and of each other system by the first
    judge, `robust`, the model's by disturbance, where that was tried, and all `scores`."""
    quoted = {
        "wer" if name == "model" else name: score.rate.wer
        for name, score in _quoted(scores).items()
    }
    unended = [score.unended for score in _quoted(scores).values() if score.unended is not None]
    judge: dict[str, Any] = {"judge": scores[0].judge} if scores else {}
    if robust := {score.disturbed: score.rate.wer for score in scores if score.disturbed}:
        judge["robust"] = robust
    return (
        quoted
        | judge
        | ({"unended": unended[0]} if unended else {})
        | {"scores": [asdict(score) for score in scores]}
    )


def text_table(scores: Sequence[Score]) -> str:
    """Scores as a table for a terminal."""
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
            f"{s.rate.wer:7.1%} "
            f"{s.rate.low:8.1%} {s.rate.high:8.1%} {s.rate.cer:7.1%} {s.rate.exact:7.1%} "
            f"{unended:>8} {s.rate.utterances:5d}"
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


def installed() -> str:
    """The version of zipper that is installed; "not installed" where the source is run as it
    lies."""
    return _version("zipper-lm")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- the parts of the page ---


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _card(title: str, scores: Sequence[Score]) -> str:
    quoted = _quoted(scores)
    if "model" not in quoted:
        return ""
    rate = quoted["model"].rate
    beside = [
        f"{escape(NOTES.get(name, name))}: {_percent(s.rate.wer)}"
        for name, s in quoted.items()
        if name != "model"
    ]
    return (
        f"<div class=card><h2>{title}</h2><p class=number>{_percent(rate.wer)}</p><p>of "
        f"{rate.words:,} words wrong "
        f"(95\u00a0% interval {_interval(rate)}), by {escape(scores[0].judge)}</p><p "
        f"class=quiet>{'<br>'.join(beside)}</p></div>"
    )


def _interval(rate: ErrorRate) -> str:
    return f"{100 * rate.low:.1f} to {_percent(rate.high)}"


def _table(title: str, scores: Sequence[Score]) -> str:
    """Systems and voices down, judges across."""
    if not scores:
        return ""
    judges = list(dict.fromkeys(score.judge for score in scores))
    rows: dict[tuple[str, str, str], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.system, score.voice, score.disturbed), {})[score.judge] = score
    most = max(score.rate.high for score in scores)
    across = "".join(
        f"<th colspan=3 scope=colgroup class=judge>{escape(judge)}</th>" for judge in judges
    )
    measures = "<th scope=col class=judge>words wrong (WER)<th scope=col>characters wrong<th scope=col>sentences right"
    body = ""
    for (system, voice, disturbed), by in rows.items():
        name = f"{escape(system)}<small>{escape(NOTES.get(system, ''))}</small>"
        if part := disturbed or (voice and f"voice {voice}"):
            name = escape(part)
        one = next(iter(by.values()))
        unended = next(
            (_percent(score.unended) for score in by.values() if score.unended is not None), ""
        )
        body += (
            f"<tr class={'voice' if part else 'all'}><th scope=row>{name}</th>"
            + "".join(
                _rate(by[judge].rate, most) if judge in by else "<td colspan=3 class=judge>"
                for judge in judges
            )
            + f"<td>{unended}<td>{one.rate.utterances:,}<small>{one.rate.words:,} "
            "words</small></tr>"
        )
    return (
        f"<div class=wide tabindex=0><table><caption>{title}</caption><thead><tr><td "
        f"rowspan=2>{across}"
        f"<th rowspan=2 scope=col>never ended<th rowspan=2 scope=col>utterances</tr>"
        f"<tr>{measures * len(judges)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _rate(rate: ErrorRate, most: float) -> str:
    """Three cells; under the first a strip on which the interval lies, so that rows compare at a
    glance."""
    low, at, high = (
        100 * value / most if most else 0.0 for value in (rate.low, rate.wer, rate.high)
    )
    strip = f'<i class=strip aria-hidden=true style="--low:{low:.1f}%;--at:{at:.1f}%;--high:{high:.1f}%"></i>'
    return (
        f"<td class=judge><b>{_percent(rate.wer)}</b><small>{_interval(rate)}</small>{strip}"
        f"<td>{_percent(rate.cer)}<td>{_percent(rate.exact)}"
    )


def _attention(seen: AttentionMap) -> str:
    """The longer side runs across, so that speech always reads from left to right."""
    sides = [
        (f"{_cut(seen.reader)} (looks)", seen.target),
        (f"{_cut(seen.read)} (is looked at)", seen.source),
    ]
    weights = seen.weights
    if len(seen.target) > len(seen.source):
        weights, sides = weights.T, sides[::-1]
    (down, rows), (across, columns) = [(title, [*map(_cut, labels)]) for title, labels in sides]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        clear = extra("matplotlib.colors").LinearSegmentedColormap.from_list(
            "clear", [f"{PALETTE[0]}00", PALETTE[0]]
        )
        axes.imshow(weights, cmap=clear, aspect="auto", interpolation="none", vmin=0)
        axes.set_yticks(range(len(rows)), rows)
        every = -(-len(columns) // 32)
        axes.set_xticks(range(0, len(columns), every), columns[::every], rotation=90)
        axes.set(xlabel=across, ylabel=down)

    label = f"Cross-attention: {seen.reader} reads {seen.read}"
    inches = (9.6, 0.7 + 0.16 * len(rows) + 0.1 * max(map(len, columns)))
    picture = svg(draw, inches, f"{label}, {len(seen.target)} by {len(seen.source)} tokens")
    strongest = f"the strongest is {seen.weights.max(initial=0.0):.2f}"
    return f"<figure><figcaption>{escape(label)}. The deeper the colour, the more weight; {strongest}.</figcaption>{picture}</figure>"


def _sample(sample: Sample) -> str:
    titles = {
        "recorded": "the utterance",
        "rebuilt": "its true units, as sound",
        "spoken": "the model, from the text",
    }
    sounds = _sounds(sample)
    longest = max(sound.audio.seconds for sound in sounds.values())
    return (
        f"<article><h3>{escape(sample.text)}</h3><p class=quiet>{escape(sample.id)}, voice "
        f"{escape(sample.voice)}</p>"
        "<p><span class=quiet>The model wrote, on hearing it:</span> "
        f"{_difference(sample.text, sample.transcript)}</p>"
        "<div class=sounds>"
        + "".join(
            _sound(titles[name], sound, sample.text, longest) for name, sound in sounds.items()
        )
        + "</div></article>"
    )


def _sound(title: str, sound: Sound, text: str, longest_s: float) -> str:
    audio = sound.audio
    length = f"{audio.seconds:.2f}\u00a0s"
    player = "<p>No sound came out.</p>"
    if len(audio.samples):
        player = (
            f'<div class=time><img alt="Spectrogram, {length}" '
            f'style="width:{100 * audio.seconds / longest_s:.1f}%" '
            f'src="{_data("image/png", _spectrogram(audio))}"></div>'
            f'<audio controls preload=metadata aria-label="{escape(title)}" '
            f'src="{_data("audio/flac", _flac(audio))}"></audio>'
        )
    heard = "".join(
        f"<dt>{escape(judge)} heard<dd>{_difference(text, said)}"
        for judge, said in sound.heard.items()
    )
    return f"<figure><figcaption>{escape(title)} <span class=quiet>{length}</span></figcaption>{player}<dl>{heard}</dl></figure>"


def _difference(reference: str, hypothesis: str) -> str:
    """The hypothesis in normalised words: what is missing struck out, what should not be there
    marked, as WER counts them."""
    aligned = extra("jiwer").process_words(
        *(" ".join(words(normalise(text))) for text in (reference, hypothesis))
    )
    marked = []
    for chunk in aligned.alignments[0]:
        wanted = escape(" ".join(aligned.references[0][chunk.ref_start_idx : chunk.ref_end_idx]))
        got = escape(" ".join(aligned.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]))
        if chunk.type == "equal":
            marked.append(got)
        else:
            marked += [f"<del>{wanted}</del>"] * bool(wanted) + [f"<ins>{got}</ins>"] * bool(got)
    return " ".join(marked)


def _making(report: Report) -> str:
    tables = {
        "Seconds": {
            name: f"{seconds:,.1f}"
            for name, seconds in (dict(report.phases) | {"in all": report.seconds}).items()
        },
        "Utterances": {part: f"{n:,}" for part, n in report.corpus.items()},
        "Made with": report.environment,
    }
    body = f"<p>This does it again:</p><pre><code>{escape(report.command)}</code></pre>"
    body += (
        "<div class=facts>"
        + "".join(_facts(title, rows.items()) for title, rows in tables.items())
        + "</div>"
    )
    return (
        body + "<details><summary>The recipe, in "
        f"full</summary>{_facts('', _flat(report.recipe))}</details>"
    )


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> str:
    caption = f"<caption>{title}</caption>" if title else ""
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table class=facts>{caption}<tbody>{body}</tbody></table>" if body else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted names and JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                value if isinstance(value, str) else json.dumps(value, default=str),
            )


# --- pictures and sound as text ---


def series(
    metrics: Sequence[Mapping[str, Any]], prefix: str
) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every key that begins with `prefix`, without it; rows that lack a key are
    skipped for that key."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in metrics:
        for key, value in row.items():
            if key.startswith(prefix):
                steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found


def _cut(label: str, most: int = 16) -> str:
    """A label so long that it would leave no room for what it labels is cut."""
    return label if len(label) <= most else label[: most - 1] + "…"


def svg(draw: Callable[["Figure"], None], inches: tuple[float, float], label: str) -> str:
    """A figure as SVG for inside a page: no header, no metadata, no ids that a second figure would
    repeat.

    matplotlib makes the remaining ids from what they name and a salt: the label keeps them apart,
    and the same from run to run.
    """
    with extra("matplotlib").rc_context(STYLE | {"svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # the browser has a font for it, and draws the text
        figure = extra("matplotlib.figure").Figure(figsize=inches, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", out.getvalue()[out.getvalue().index("<svg") :])
    return svg.replace(INK, "currentColor").replace(
        "<svg", f'<svg role="img" aria-label="{escape(label)}"', 1
    )


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


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
