"""The main job, end to end on the built-in corpus: towers, zip, alignment on pairs, evaluation of
speech to text and text to speech, report.

Also the evaluation of any saved model on that corpus, for `zipper evaluate`.
"""

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zipper.audio import disturbance
from zipper.audio.sound import Audio
from zipper.data import manifests as data
from zipper.environment import need
from zipper.errors import ZipperError
from zipper.evaluation import error_rate, floor_template
from zipper.inspection import attention
from zipper.link import LinkConfig
from zipper.modality.speech import SpeechUnits
from zipper.modality.text import Text
from zipper.normaliser import NORMALISER
from zipper.pipeline import SHIPPED, Pipeline
from zipper.sampling import Sampling
from zipper.saving import checkpoint
from zipper.strand import Produced, Segment, collate
from zipper.training import TrainConfig, train
from zipper.training.resume import is_run
from zipper.workers import spread
from zipper_lab import report
from zipper_lab.corpora import commands as corpus
from zipper_lab.judges import Ear, Judge, judge_audio
from zipper_lab.recognisers import Opinion, Rated, Recogniser, noise
from zipper_lab.report import AttentionMap, Report, Sample, Score, Sound

CHUNK = 100  # utterances that are generated together
JUDGE, SECOND, EXACT = Judge.name, "own recogniser", "exact comparison"
DOMAIN = 20_000  # sentences of the unpaired text part that the judge's language model is made of
SHOWN = 6  # utterances to listen to in the report
#: Of what the demo says, chosen on dev (docs/log.md): beyond what the speech tower would say alone.
GUIDANCE = 1.5

#: The pre-trained towers that come with the package, before any alignment.
TOWERS = {"text": SHIPPED / "towers" / "text", "speech": SHIPPED.parent / "speech_tower"}

TEXT_TOWER = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SPEECH_TOWER = TEXT_TOWER | {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "max_position_embeddings": 2048,
}

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


def demo(
    output: Path,
    from_scratch: bool = False,
    pairs: int = 8000,
    steps: int = 900,
    test: int = 200,
    judges: Sequence[Recogniser | Opinion] = (),
) -> dict[str, Any]:
    """Align a new zip on rendered pairs, evaluate it on test utterances, write report.json and
    report.html into `output`.

    Takes the shipped pre-trained towers, or pre-trains both (from_scratch). judges: more of what is
    said, see `evaluate`. Returns the content of report.json.
    """
    need("speech", "train")  # what is needed at the end should not be missed there
    for rows in (output / "pairs.jsonl", output / "dev.jsonl"):
        if rows.exists() and "template" not in data.manifest(rows, 1)[0]:
            raise ZipperError(f"{rows} is of no demo. Choose another --output, or move it.")
    _clear(output / "run")

    clock = Clock()
    with clock.phase("towers"):
        towers, modalities = _pretrain(output) if from_scratch else _shipped()
    units = SpeechUnits.load(modalities["speech"])
    with clock.phase(f"render {pairs} pairs"):
        for name, count in (("pairs", pairs), ("dev", 200)):
            data.write(output / f"{name}.jsonl", corpus.rows(name, count, units, takes=1))
        tests = corpus.rows("test", test, units)
    config = _recipe(output, towers, modalities, steps)
    with clock.phase("align"):
        pipeline = train(config)
    second = None if from_scratch else Pipeline.from_pretrained()
    with clock.phase(f"evaluate on {test} utterances"):
        result = evaluate(
            pipeline, tests, second=second, robust=True, guidance=GUIDANCE, judges=judges
        )

    metrics = (output / "run" / "metrics.jsonl").read_text().splitlines()
    directions = (("speech", "text"), ("text", "speech"))
    made = Report(
        asr=result.scores["asr"],
        tts=result.scores["tts"],
        seconds=round(sum(clock.seconds.values()), 1),
        phases=clock.seconds,
        corpus={"pairs": pairs, "dev": 200, "test": test},
        recipe=dataclasses.asdict(config) | {"guidance": GUIDANCE},
        environment=report.environment(),
        command="make demo",
        metrics=[json.loads(line) for line in metrics],
        attention=[_map(pipeline, tests[0], given, said) for given, said in directions],
        samples=result.samples,
        rated=result.rated,
    )
    found = made.to_json()
    checkpoint.write_json(output / "report.json", found)
    report.write(output / "report.html", made)

    print(_summary(found))
    print(f"{output / 'report.html'} after {made.seconds:.0f} s")
    return found


def _recipe(
    output: Path, towers: dict[str, str], modalities: dict[str, str], steps: int
) -> TrainConfig:
    """How the zip is aligned."""
    return TrainConfig(
        output=str(output / "run"),
        towers=towers,
        modalities=modalities,
        data=str(output / "pairs.jsonl"),
        dev=str(output / "dev.jsonl"),
        tasks={"heard:speech -> said:text": 0.55, "text -> voice~speech": 0.45},
        loss_weight={"text": 2.0},
        train=("speech",),
        every={"text": 1, "speech": 1},
        # Text shows its embeddings, where a frozen LM's words differ most; speech a block further
        # than it is fused (docs/log.md).
        shows={"text": 0, "speech": [2, 3, 4]},
        link=LinkConfig(gate_init=1.2, dropout=0.0),
        calibrate=500,
        input_projection="none",
        lr_gate=3e-4,
        lr_new=2e-3,
        lr_tower=5e-4,
        steps=steps,
        corrupt={"speech": 0.05},
        eval_every=max(1, steps // 4),
        eval_rows=100,
        save_every=steps,
    )


def _summary(found: dict[str, Any]) -> str:
    """The rates of report.json in two lines."""
    asr, tts = found["asr"], found["tts"]
    hardest = max(asr["robust"], key=asr["robust"].get)
    return (
        f"ASR WER {asr['wer']:.1%} (floor {asr['floor']:.1%}; {hardest}: "
        f"{asr['robust'][hardest]:.1%})\n"
        f"TTS WER {tts['wer']:.1%} by {JUDGE} (oracle {tts['oracle']:.1%}, floor "
        f"{tts['floor']:.1%})"
    )


@dataclass(frozen=True)
class Evaluation:
    """scores: by task, each first by the judge that is quoted. samples: to listen to. words: every
    raw text, by what it is. rated: how good what is said sounds."""

    scores: dict[str, list[Score]]
    samples: list[Sample]
    words: dict[str, list[str]]
    rated: Sequence[Rated] = ()


def evaluate(
    pipeline: Pipeline,
    rows: Sequence[Row],
    tasks: Sequence[str] = ("asr", "tts"),
    second: Pipeline | None = None,
    robust: bool = False,
    guidance: float = 1.0,
    judges: Sequence[Recogniser | Opinion] = (),
) -> Evaluation:
    """Scores of a model on rows of the built-in corpus, in all voices and in each, beside oracle
    and floor; and samples to hear.

    rows: of `corpus.rows`. second: a pipeline whose ASR is the second judge of produced speech, by
    its units. robust: ASR also under everything in `disturbance.TABLE`. guidance: of what is said.
    judges: who else hears it, or says how good it sounds; pocketsphinx is quoted.
    """
    texts, voices = [row["text"] for row in rows], [row["voice"] for row in rows]
    floor = floor_template(texts, [row["template"] for row in rows])
    written = transcribe(pipeline, [row["speech"] for row in rows])
    wrote = [segment.content for segment in written]
    scores: dict[str, list[Score]] = {"asr": [], "tts": []}

    if "asr" in tasks:
        scores["asr"] += _by_voice("model", EXACT, texts, wrote, voices, written)
        scores["asr"] += _by_voice("floor", EXACT, texts, floor, voices)
    if "asr" in tasks and robust:
        for name, ids in disturbed(pipeline.units, rows).items():
            heard = [segment.content for segment in transcribe(pipeline, ids)]
            rate = error_rate(texts, heard)
            scores["asr"].append(Score("model", EXACT, rate, disturbed=name))
    words = {"reference": texts, "transcript": wrote}
    if "tts" not in tasks:
        return Evaluation(scores, [], words)

    said = speak(pipeline, texts, voices, guidance)
    units = {
        "model": [segment.content for segment in said],
        "oracle": [row["speech"] for row in rows],
    }
    sounds = {name: vocode(pipeline, ids) for name, ids in units.items()}
    judge = Judge.from_sentences([u.text for u in corpus.sentences("text", DOMAIN)])
    heard_by = {name: {JUDGE: judge_audio(judge, some)} for name, some in sounds.items()}
    if second is not None:
        for name, ids in units.items():
            heard_by[name][SECOND] = [segment.content for segment in transcribe(second, ids)]
    ears = {each.name: each for each in judges if isinstance(each, Recogniser)}
    for name, some in sounds.items():
        heard_by[name] |= {by: judge_audio(ear, some, workers=1) for by, ear in ears.items()}
    for by in heard_by["model"]:
        how = ears[by].normaliser if by in ears else NORMALISER
        for system, produced in (("model", said), ("oracle", [])):
            heard = heard_by[system][by]
            scores["tts"] += _by_voice(system, by, texts, heard, voices, produced, how)
        scores["tts"] += _by_voice("floor", by, texts, floor, voices, normaliser=how)
    rated = list[Rated]()
    for name, some in {**sounds, "floor": noise(sounds["oracle"])}.items():
        rated += [Rated.of(name, each, some) for each in judges if isinstance(each, Opinion)]

    samples, all_ears = [], dict[str, Ear]({JUDGE: judge, **ears})
    for i, recorded in enumerate(recordings(rows[:SHOWN])):
        rebuilt, spoken = (
            Sound(sounds[name][i], {by: heard[i] for by, heard in heard_by[name].items()})
            for name in ("oracle", "model")
        )
        heard_true = {by: ear.transcribe(recorded) for by, ear in all_ears.items()}
        true = Sound(recorded, heard_true)
        name = rows[i]["id"]
        samples.append(Sample(name, texts[i], voices[i], wrote[i], true, rebuilt, spoken))
    for name, by_whom in heard_by.items():
        words |= {f"{name} by {by}": list(heard) for by, heard in by_whom.items()}
    return Evaluation(scores, samples, words, rated)


def _by_voice(
    system: str,
    judge: str,
    texts: Sequence[str],
    heard: Sequence[str],
    voices: Sequence[str],
    produced: Sequence[Produced] = (),
    normaliser: str = NORMALISER,
) -> list[Score]:
    """The score in all voices and in each. produced: the segments behind what was heard."""
    found = []
    for voice in ("", *dict.fromkeys(voices)):
        mine = [i for i, v in enumerate(voices) if voice in ("", v)]
        wanted, got = [texts[i] for i in mine], [heard[i] for i in mine]
        rate = error_rate(wanted, got, normaliser=normaliser)
        unended = None
        if produced:
            unended = sum(not produced[i].ended for i in mine) / len(mine)
        found.append(Score(system, judge, rate, voice, unended))
    return found


def transcribe(pipeline: Pipeline, units: Sequence[Sequence[int]]) -> list[Produced]:
    """Speech to text for many lists of units, in batches of like length."""
    prompts = [[Segment("speech", list(ids))] for ids in units]
    return _in_chunks(
        [len(ids) for ids in units],
        lambda some: pipeline.run_batch([prompts[i] for i in some], ["text"]),
    )


def speak(
    pipeline: Pipeline, texts: Sequence[str], voices: Sequence[str], guidance: float = 1.0
) -> list[Produced]:
    """Text to units, each in its voice, greedy; contents are ids."""
    text = pipeline.modalities["text"]
    found: dict[int, Produced] = {}
    for voice in dict.fromkeys(voices):
        mine = [i for i, v in enumerate(voices) if v == voice]
        prompts = [[Segment("text", text.encode(texts[i]))] for i in mine]
        lengths = [len(texts[i]) for i in mine]
        produced = _in_chunks(lengths, partial(_say, pipeline, prompts, voice, guidance))
        found |= dict(zip(mine, produced, strict=True))
    return [found[i] for i in range(len(texts))]


def _say(
    pipeline: Pipeline,
    prompts: Sequence[Sequence[Segment]],
    voice: str,
    guidance: float,
    some: Sequence[int],
) -> list[list[Produced]]:
    how = Sampling(guidance=guidance)
    return pipeline.generate([prompts[i] for i in some], [pipeline.voice(voice)], how)


def vocode(pipeline: Pipeline, units: Sequence[Sequence[int]], workers: int = 2) -> list[Audio]:
    """Units to sound, in `workers` processes."""
    with closing(spread(pipeline.units.decode, map(list, units), workers, corpus.CHUNK)) as sounds:
        return list(tqdm(sounds, desc="vocode", total=len(units), unit="utterance", disable=None))


def disturbed(
    units: SpeechUnits, rows: Sequence[Row], workers: int = 2
) -> dict[str, list[list[int]]]:
    """Codes of the utterances behind rows, said again and disturbed by each of `disturbance.TABLE`,
    in `workers` processes."""
    with closing(spread(partial(_disturbed, units), rows, workers, corpus.CHUNK)) as heard:
        found = list(tqdm(heard, desc="disturb", total=len(rows), unit="utterance", disable=None))
    return {name: [codes[name] for codes in found] for name in disturbance.TABLE}


def _disturbed(units: SpeechUnits, row: Row) -> dict[str, list[int]]:
    (sound,) = recordings([row])
    return {
        name: units.encode(one.apply(sound, zlib.crc32(row["id"].encode())))
        for name, one in disturbance.TABLE.items()
    }


def recordings(rows: Sequence[Row]) -> list[Audio]:
    """The utterances behind rows of the corpus, said again."""
    said = (corpus.Utterance(row["id"], row["text"], row["template"], row["voice"]) for row in rows)
    return [corpus.synthesize(utterance) for utterance in said]


def _in_chunks(
    lengths: Sequence[int], produce: Callable[[list[int]], list[list[Produced]]]
) -> list[Produced]:
    """The one segment that `produce` makes for each index, asked for in chunks of like length; in
    the order of the indices."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found: dict[int, Produced] = {}
    for start in range(0, len(order), CHUNK):
        some = order[start : start + CHUNK]
        found |= {i: segments[0] for i, segments in zip(some, produce(some), strict=True)}
    return [found[i] for i in range(len(lengths))]


def _map(pipeline: Pipeline, row: Row, given: str, produced: str) -> AttentionMap:
    """Where the produced segment of a true pair looks in the given one."""
    ids = {"text": pipeline.modalities["text"].encode(row["text"]), "speech": row["speech"]}
    sample = [Segment(name, ids[name]) for name in (given, produced)]
    strands = collate([sample], pipeline.model.ends()).strands
    weights = attention(pipeline.zip, strands, given, produced).numpy()
    labels = {
        name: [_label(pipeline, name, i) for i in strand.ids[0].tolist()]
        for name, strand in strands.items()
    }
    return AttentionMap(produced, given, weights, labels[produced], labels[given])


def _clear(run: Path) -> None:
    """Takes away the run of an earlier demo. Raises a ZipperError for what is no run."""
    if not run.exists():
        return
    if not is_run(run) and any(run.iterdir()):
        raise ZipperError(f"{run} is there and is no run. Choose another --output, or move it.")
    shutil.rmtree(run)


def _label(pipeline: Pipeline, name: str, token: int) -> str:
    begin, end = pipeline.model.ends()[name]
    text = pipeline.modalities[name].decode([token]) if name == "text" else str(token)
    return {begin: "begin", end: "end"}.get(token, text)


def _shipped() -> tuple[dict[str, str], dict[str, str]]:
    """Folders of the pre-trained towers and of their modalities, as the package brings them."""
    towers = {name: str(path) for name, path in TOWERS.items()}
    return towers, {name: str(SHIPPED / "modalities" / name) for name in TOWERS}


def _pretrain(output: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The same from scratch: modalities fitted, each tower trained alone on the unpaired parts;
    smaller runs than the recipes'."""
    folder = {name: output / name for name in TOWERS}
    corpus.fit_units().save(folder["speech"])
    units = SpeechUnits.load(folder["speech"])
    lines = [u.text for u in corpus.sentences("text", 30_000)]
    Text.train(lines).save(folder["text"])
    data.write(output / "text.jsonl", [{"text": line} for line in lines])
    data.write(output / "text_dev.jsonl", [{"text": u.text} for u in corpus.sentences("dev", 200)])
    data.write(output / "speech.jsonl", corpus.rows("speech", 10_000, units))
    data.write(output / "speech_dev.jsonl", corpus.rows("dev", 200, units))
    towers = {}
    for name, shape, tasks, steps in (
        ("text", TEXT_TOWER, {"-> text": 1.0}, 1200),
        ("speech", SPEECH_TOWER, {"-> speech": 0.5, "-> voice~speech": 0.5}, 1000),
    ):
        run = output / f"{name}-tower"
        _clear(run)
        config = TrainConfig(
            output=str(run),
            towers={name: shape},
            modalities={name: str(folder[name])},
            data=str(output / f"{name}.jsonl"),
            dev=str(output / f"{name}_dev.jsonl"),
            tasks=tasks,
            steps=steps,
            lr_tower=2e-3,
            corrupt={"speech": 0.05} if name == "speech" else {},
        )
        train(config)
        towers[name] = str(run / "model" / "towers" / name)
    return towers, {name: str(path) for name, path in folder.items()}
