"""`zipper bench speech`: the shipped model on recordings and sentences, one at a time and eight at
a time, against real time.

Everything counts: sound to units, units to text, text to units, units to sound. The recordings are
test utterances of the built-in corpus, whose sentences the model never saw.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zipper.errors import ZipperError
from zipper.generation import Request
from zipper.pipeline import Pipeline
from zipper.strand import Segment
from zipper_lab.bench import Turn, head, machine, serve, take_turns
from zipper_lab.corpora import commands as corpus

ARMS = {
    "asr": "speech to text, one after the other",
    "asr, 8 streams": "speech to text, eight side by side",
    "tts": "text to speech as a stream, one after the other",
    "tts, 8 streams": "text to speech, eight side by side",
}
STREAMS = 8
FIRST = 5  # units in the parts of a stream of sound: 0.2 s


@dataclass(frozen=True)
class Settings:
    """What an arm is told. model: a folder, "" = the shipped one. threads: 0 = as many as torch
    takes. towers: where its frozen towers lie now."""

    arm: str
    model: str = ""
    utterances: int = 16
    threads: int = 0
    towers: Mapping[str, str] = field(default_factory=dict)


def bench(
    rounds: int,
    warm: int = 1,
    model: str = "",
    utterances: int = 16,
    threads: int = 0,
    hardware: str = "",
    towers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it."""
    settings = {
        arm: asdict(Settings(arm, model, utterances, threads, towers or {})) for arm in ARMS
    }
    turns = take_turns("zipper_lab.bench.speech", settings, rounds, warm)
    return {
        **machine(hardware),
        "rounds": rounds,
        "settings": {
            "model": Path(model).name or "shipped",
            "utterances": utterances,
            "threads": threads or torch.get_num_threads(),
        },
        "arms": {arm: _summary(said) for arm, said in turns.items()},
    }


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    medians["real_time"] = statistics.median(turn["seconds"] / turn["audio_s"] for turn in turns)
    return {**medians, "turns": list(turns)}


def markdown(found: Mapping[str, Any]) -> str:
    """The results, for people."""
    lines = head("Speech in real time", "zipper bench speech", found)
    lines += [
        "| arm | seconds of work a second of sound | of it units <-> sound | first sound after, "
        "ms |",
        "|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        first = f"{1000 * arm['first_s']:.0f}" if arm["first_s"] else "-"
        share = arm["sound_s"] / arm["audio_s"]
        lines.append(f"| {name}: {ARMS[name]} | {arm['real_time']:.3f} | {share:.3f} | {first} |")
    lines += ["", f"First sound: the first {FIRST} units as sound, mean over utterances."]
    return "\n".join(lines) + "\n"


def heard(pipeline: Pipeline, utterances: Sequence[corpus.Utterance], streams: int) -> Turn:
    """A turn of speech to text."""
    recordings = [corpus.synthesize(utterance) for utterance in utterances]
    engine, began = pipeline.engine(streams), time.perf_counter()
    units = [pipeline.units.encode(recording) for recording in recordings]
    encoded = time.perf_counter()
    answers = engine.run([Request([Segment("speech", ids)], ["text"]) for ids in units])
    words = [pipeline.modalities["text"].decode(answer.segments()[0].content) for answer in answers]
    ended = time.perf_counter()
    right = statistics.fmean(
        said == utterance.text for said, utterance in zip(words, utterances, strict=True)
    )
    audio_s = sum(recording.seconds for recording in recordings)
    return {
        "seconds": ended - began,
        "sound_s": encoded - began,
        "audio_s": audio_s,
        "first_s": 0.0,
        "right": right,
    }


def said(pipeline: Pipeline, utterances: Sequence[corpus.Utterance], streams: int) -> Turn:
    """A turn of text to speech."""
    engine, units, first = pipeline.engine(streams), pipeline.units, list[float]()
    requests = [
        Request(
            [Segment("text", pipeline.modalities["text"].encode(u.text))], [pipeline.voice(u.voice)]
        )
        for u in utterances
    ]
    began, sound_s, audio_s = time.perf_counter(), 0.0, 0.0
    if streams > 1:
        produced = [answer.segments()[0].content for answer in engine.run(requests)]
        made = time.perf_counter()
        audio_s = sum(units.decode(list(ids)).seconds for ids in produced)
        sound_s = time.perf_counter() - made
    else:
        for request in requests:
            started = time.perf_counter()
            tokens = (token.id for token in engine.stream(engine.submit(request)))
            waited = Stopwatch(tokens)
            parts = units.stream(waited, FIRST)
            head = next(parts)
            first.append(time.perf_counter() - started)
            audio_s += head.seconds + sum(part.seconds for part in parts)
            sound_s += time.perf_counter() - started - waited.seconds
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "sound_s": sound_s,
        "audio_s": audio_s,
        "first_s": statistics.fmean(first) if first else 0.0,
    }


class Stopwatch:
    """An iterator, and the seconds that it took."""

    def __init__(self, items: Iterator[int]) -> None:
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> "Stopwatch":
        return self

    def __next__(self) -> int:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


def main() -> None:
    """An arm's process."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pipeline = Pipeline.from_pretrained(settings.model or None, settings.towers)
    utterances = corpus.sentences("test", settings.utterances)
    if settings.arm not in ARMS:
        raise ZipperError(f"There is no arm {settings.arm!r}; there are {', '.join(ARMS)}.")
    task = heard if settings.arm.startswith("asr") else said
    streams = STREAMS if "8" in settings.arm else 1
    serve(partial(task, pipeline, utterances, streams))


if __name__ == "__main__":
    main()
