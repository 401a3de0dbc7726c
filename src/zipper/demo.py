"""The main job, end to end on the built-in corpus: towers -> zip -> alignment on pairs -> speech to text and text to speech ->
evaluation -> report. Also the evaluation of any saved model on that corpus, for `zipper evaluate`."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from zipper import checkpoint, corpus, data, report
from zipper.audio import Audio
from zipper.errors import ZipperError
from zipper.evaluation import Judge, error_rate, floor_template, judge_audio
from zipper.inspection import attention
from zipper.link import LinkConfig
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text
from zipper.pipeline import SHIPPED, Pipeline
from zipper.report import AttentionMap, Report, Sample, Score, Sound
from zipper.sequence import Segment, collate
from zipper.training import TrainConfig, train

CHUNK = 100  # utterances that are generated together
JUDGE = "pocketsphinx"
DOMAIN = 20_000  # sentences of the unpaired text part that the judge's language model is made of
SHOWN = 6  # utterances to listen to in the report

#: The pre-trained towers that come with the package, before any alignment.
TOWERS = {"text": SHIPPED / "towers" / "text", "speech": SHIPPED.parent / "shipped_towers" / "speech"}

Row = dict[str, Any]


class Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and say that it began."""
        print(f"-- {name}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def demo(output: Path, from_scratch: bool = False, pairs: int = 6000, steps: int = 800, test: int = 200) -> dict[str, Any]:
    """Align a new zip on rendered pairs, evaluate it on test utterances, write report.json and report.html into `output`.

    Takes the shipped pre-trained towers, or pre-trains both (from_scratch). Returns the content of report.json.
    """
    if (output / "run").exists():
        checkpoint.discard(output / "run")
    clock = Clock()
    with clock.phase("towers"):
        towers, modalities = _pretrain(output) if from_scratch else _shipped()
    units = SpeechUnits.load(modalities["speech"])
    with clock.phase(f"render {pairs} pairs"):
        for name, part, n in [("pairs", "pairs", pairs), ("dev", "dev", 200)]:
            data.write(output / f"{name}.jsonl", corpus.rows(part, n, units))
        tests = corpus.rows("test", test, units)
    config = TrainConfig(
        output=str(output / "run"),
        towers=towers,
        modalities=modalities,
        data=str(output / "pairs.jsonl"),
        dev=str(output / "dev.jsonl"),
        tasks={"speech -> text": 0.3, "text -> voiced:speech": 0.7},
        train=("speech",),
        every={"text": 1, "speech": 1},
        link=LinkConfig(gate_init=0.6, dropout=0.1),
        input_projection="none",
        steps=steps,
        corrupt={"speech": 0.05},
        eval_every=max(1, steps // 8),
        eval_rows=100,
        save_every=steps,
    )
    with clock.phase("align"):
        pipeline = train(config)
    second = None if from_scratch else Pipeline.from_pretrained()
    with clock.phase(f"evaluate on {test} utterances"):
        scores, samples = evaluate(pipeline, tests, second=second)
    seconds = round(sum(clock.seconds.values()), 1)
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    made = Report(
        asr=scores["asr"],
        tts=scores["tts"],
        seconds=seconds,
        phases=clock.seconds,
        corpus={"pairs": pairs, "dev": 200, "test": test},
        recipe=dataclasses.asdict(config),
        environment=report.environment(),
        command="make demo",
        metrics=metrics,
        attention=[_map(pipeline, tests[0], given, produced) for given, produced in (("speech", "text"), ("text", "speech"))],
        samples=samples,
    )
    found = made.to_json()
    checkpoint.write_json(output / "report.json", found)
    report.write(output / "report.html", made)
    asr, tts = found["asr"], found["tts"]
    print(f"ASR WER {asr['wer']:.1%} (floor {asr['floor']:.1%})")
    print(f"TTS WER {tts['wer']:.1%} by {JUDGE} (oracle {tts['oracle']:.1%}, floor {tts['floor']:.1%})")
    print(f"{output / 'report.html'} after {seconds:.0f} s")
    return found


def evaluate(
    pipeline: Pipeline, rows: Sequence[Row], tasks: Sequence[Literal["asr", "tts"]] = ("asr", "tts"), second: Pipeline | None = None
) -> tuple[dict[str, list[Score]], list[Sample]]:
    """Scores of a model on rows of the built-in corpus, in all voices and in each, beside oracle and floor; and samples to hear.

    rows: of `corpus.rows`. second: a pipeline whose ASR is the second judge of produced speech, on its units.
    """
    texts, voices = [row["text"] for row in rows], [row["voice"] for row in rows]
    scores: dict[str, list[Score]] = {"asr": [], "tts": []}

    def add(task: str, system: str, judge: str, heard: Sequence[str], ended: Sequence[bool] | None = None) -> None:
        for voice in ("", *dict.fromkeys(voices)):
            mine = [i for i, v in enumerate(voices) if voice in ("", v)]
            unended = None if ended is None else sum(not ended[i] for i in mine) / len(mine)
            rate = error_rate([texts[i] for i in mine], [heard[i] for i in mine])
            scores[task].append(Score(system, judge, rate, voice, unended))

    other = [floor_text for floor_text in floor_template(texts, [row["template"] for row in rows])]
    written: list[str] = []
    if "asr" in tasks:
        transcripts = transcribe(pipeline, [row["speech"] for row in rows])
        written = [s.content for s in transcripts]
        add("asr", "model", "text", written, [s.ended for s in transcripts])
        add("asr", "floor", "text", other)
    samples: list[Sample] = []
    if "tts" in tasks:
        said = speak(pipeline, texts, voices)
        produced = [s.content for s in said]
        true = [row["speech"] for row in rows]
        units = pipeline.modalities["speech"]
        judge = Judge.from_sentences([u.text for u in corpus.sentences("text", DOMAIN)])
        sounds = {"model": vocode(units, produced), "oracle": vocode(units, true)}
        heard = {name: {JUDGE: judge_audio(judge, audios)} for name, audios in sounds.items()}
        if second is not None:
            for name, ids in {"model": produced, "oracle": true}.items():
                heard[name]["second"] = [s.content for s in transcribe(second, ids)]
        for judge_name in heard["model"]:
            add("tts", "model", judge_name, heard["model"][judge_name], [s.ended for s in said])
            add("tts", "oracle", judge_name, heard["oracle"][judge_name])
            add("tts", "floor", judge_name, other)
    return scores, samples
