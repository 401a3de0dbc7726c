"""Commands of the laboratory: the main job on the built-in corpus, the paper's tables, benchmarks.

`commands` is what pyproject.toml names as an entry point, by which the command line finds it; from
a checkout, `python -m zipper_lab` has it too. `prune` is one of them because it measures on the
built-in corpus where it gets no other.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zipper import environment
from zipper.cli.options import (
    LABORATORY,
    MAKE,
    AllowMismatch,
    Bases,
    Json,
    Model,
    Panels,
    absent,
    command,
    count,
    named,
    number,
    pipeline,
    threads,
    writable,
)
from zipper.errors import ZipperError

commands = typer.Typer()
DEMO = Path("runs/demo")


Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="JUDGE",
        help="who else judges what is said: an ASR of transformers by folder or hub id, the folder "
        "of one for faster-whisper, distillmos, or a saved pipeline that transcribes units",
    ),
]


#: Of the demo: pairs, steps, utterances of its test; utterances that `evaluate` takes of its own.
PAIRS, STEPS, TEST, EVALUATED = 8000, 900, 200, 300


def _judges(sources: Sequence[str] | None) -> tuple[Any, list[Any]]:
    """The pipeline that judges by units, where one was named, and those that hear sound."""
    from zipper.pipeline import Pipeline
    from zipper.saving import checkpoint, hub
    from zipper_lab import recognisers

    second, others = None, list[str]()
    for source in sources or ():
        folder = hub.as_folder(source)
        if folder is not None and (folder / checkpoint.CONFIG).is_file():
            if second is not None:
                raise ZipperError("Two pipelines were given as judges by units. Leave one out.")
            second = Pipeline.from_pretrained(folder)
        else:
            others.append(source)
    return second, recognisers.all_named(others)


@command(commands, LABORATORY, "zipper demo")
def demo(
    output: Annotated[Path, typer.Option(help="folder of the run")] = DEMO,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="pre-train both towers too, instead of taking the shipped ones"
        ),
    ] = False,
    pairs: Annotated[
        int, typer.Option(parser=count, help="aligned pairs to render and train on")
    ] = PAIRS,
    steps: Annotated[
        int,
        typer.Option(parser=count, help="alignment steps; 900 fit ten minutes on two cores"),
    ] = STEPS,
    test: Annotated[int, typer.Option(parser=count, help="test utterances")] = TEST,
    modality: Annotated[
        Literal["images", "motion", "actions", "molecules", "proteins", "digits"] | None,
        typer.Option(help="zip real data instead: towers, zip and pages, in minutes"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="of --modality: where its original lies; digits need none"
        ),
    ] = None,
    judge: Judges = None,
    as_json: Annotated[bool, typer.Option("--json", help="print report.json at the end")] = False,
) -> None:
    """Align a new zip on spoken commands, evaluate it, write a report."""
    from zipper.saving.files import held
    from zipper_lab.demo import demo as run_demo

    spoken = from_scratch or as_json or judge or (pairs, steps, test) != (PAIRS, STEPS, TEST)
    if modality and spoken:
        raise ZipperError(
            "--from-scratch, --pairs, --steps, --test, --judge and --json are for spoken commands, "
            f"and --modality {modality} was given. Leave them out."
        )
    if data and not modality:
        raise ZipperError("--data is for --modality, and none was given. Name one.")
    if modality:
        _real(modality, data, output if output != DEMO else DEMO.with_name(f"demo-{modality}"))
        return
    writable(output / "report.json")
    second, others = _judges(judge)
    if second is not None:
        raise ZipperError(
            "A pipeline was given as judge; the demo has one of its own units. Give an ASR."
        )
    with held(output):
        report = run_demo(output, from_scratch, pairs, steps, test, others)
    if as_json:
        print(json.dumps(report, indent=1))


def _real(modality: str, data: Path | None, output: Path) -> None:
    """A zip of real data, from its original to pages."""
    from zipper.saving.files import held
    from zipper_lab import real

    writable(output / "measured.json")
    with held(output):
        found = real.demo(modality, data, output)
    for test in found[real.ZIP]:
        print(output / f"{test}.html")


Source = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="a saved model: folder or hub id", show_default="the shipped one"
    ),
]
Rows = Annotated[
    Path | None,
    typer.Argument(
        metavar="DATA",
        help="manifest of pairs (JSONL) to measure any task on",
        show_default="the built-in test part",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--of",
        metavar="TASK",
        help="of DATA: a task, e.g. 'text -> image'",
        show_default="every pair of modalities",
    ),
]
By = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=JUDGE",
        help="of DATA: what else judges a modality, by its name (entry point group zipper.judges)",
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="write the results to this JSON file; of DATA with a page beside it, of the built-in "
        "part with every raw text",
    ),
]


@command(
    commands, LABORATORY, "zipper evaluate runs/demo/run/model pairs.jsonl --of 'text -> image'"
)
def evaluate(
    source: Source = None,
    data: Rows = None,
    tasks: Tasks = None,
    limit: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="only the first N rows of DATA")
    ] = None,
    by: By = None,
    seed: Annotated[int, typer.Option(help="of DATA's floor and intervals")] = 0,
    test: Annotated[
        int, typer.Option(parser=count, help="utterances of the built-in test part")
    ] = EVALUATED,
    task: Annotated[
        Literal["asr", "tts", "both"], typer.Option(help="speech to text, text to speech")
    ] = "both",
    judge: Judges = None,
    robust: Annotated[
        bool,
        typer.Option(
            "--robust", help="ASR also of sound that is later, in noise, faster and so on"
        ),
    ] = False,
    model: Model = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    output: Results = None,
    as_json: Json = False,
) -> None:
    """Measure a model on rows of DATA, or word error rates on the built-in corpus, with oracle and
    floor."""
    if source and model:
        raise ZipperError(f"Two models were given, {source} and {model}. Leave one out.")
    if output:
        if output.suffix.lower() in (".html", ".htm"):
            raise ZipperError(
                f"{output} was given for the results as JSON; the page lies beside them. Let the "
                "name end in .json."
            )
        for written in output, _page(output):
            writable(written, [data] if data else [])
    named_model = model or source
    _check_options(
        data, bool(tasks or by or limit or seed), robust or test != EVALUATED or task != "both"
    )
    if data:
        pipe = pipeline(named_model, towers, allow_mismatch)
        _measure(pipe, data, tasks, limit, by, judge, seed, output, as_json)
        return
    environment.need("speech")
    pipe = pipeline(named_model, towers, allow_mismatch)
    which = ["asr", "tts"] if task == "both" else [task]
    _built_in(pipe, named_model or "shipped", which, test, judge, robust, output, as_json)


def _page(results: Path) -> Path:
    """Where the page lies beside results: a name that ends in .json ends in .html, any other goes
    on with it."""
    name = results.stem if results.suffix.lower() == ".json" else results.name
    return results.with_name(f"{name}.html")


def _check_options(
    data: Path | None,
    of_data: bool,
    built_in: bool,
) -> None:
    """Raises a ZipperError for options that would say nothing: those of DATA without it, those of
    the built-in corpus with it."""
    if data and built_in:
        raise ZipperError(
            "--robust, --test and --task are for the built-in corpus, and DATA was given. Leave "
            "them out."
        )
    if data is None and of_data:
        raise ZipperError(
            "--of, --by, --limit and --seed are for rows of DATA. Give some, or leave them out."
        )


def _built_in(
    pipe: Any,
    model: str,
    tasks: Sequence[str],
    test: int,
    judge: Sequence[str] | None,
    robust: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Both directions on the built-in test part."""
    from zipper.saving import checkpoint
    from zipper_lab import demo, report
    from zipper_lab.corpora import commands as corpus

    second, others = _judges(judge)
    rows = corpus.rows("test", test, pipe.units)
    found = demo.evaluate(pipe, rows, tasks, second, robust, judges=others)
    scores = {task: report.summary(found.scores[task]) for task in tasks}
    if "tts" in tasks:
        scores["tts"] |= report.rated(found.rated)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(output, {"model": model, **scores, "words": found.words})
    if as_json:
        print(json.dumps(scores, indent=1))
        return
    lines: list[Any] = []
    for name in tasks:
        lines += found.scores[name]
    print(report.text_table(lines, found.rated))


def _measure(
    pipe: Any,
    data: Path,
    tasks: list[str] | None,
    limit: int | None,
    by: list[str] | None,
    judge: list[str] | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Any task of any model on the rows of a manifest."""
    from zipper import measurement
    from zipper.modality.sound import Sound
    from zipper.saving import checkpoint

    judges = {name: {one: measurement.judge(one)} for name, one in named("--by", by).items()}
    second, others = _judges(judge)
    if second is not None:
        raise ZipperError(
            "A pipeline was given as judge of DATA, whose units it need not know. Give an ASR."
        )
    sounds = [name for name, each in pipe.modalities.items() if isinstance(each, Sound)]
    if others and not sounds:
        raise ZipperError(f"{others[0].name} hears sound, and this model makes none.")
    for name in sounds:
        judges[name] = judges.get(name, {}) | {other.name: other for other in others}
    found = measurement.measure(pipe, data, tasks or (), limit, judges=judges, seed=seed)
    told = [one.to_json() for one in found]
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(output, {"data": str(data), "measured": told})
        measurement.write(_page(output), found, data.name)
    print(json.dumps(told, indent=1) if as_json else measurement.text(found))


@command(commands, LABORATORY, "zipper reproduce --preset cpu --quick")
def reproduce(
    preset: Annotated[
        Literal["cpu", "gpu", "quick"], typer.Option(help="how much is done")
    ] = "cpu",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="every table of the preset with a few steps, to see that all works"
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/reproduce"),
    only: Annotated[
        str, typer.Option(metavar="TABLE,TABLE", help="only these tables, e.g. table1,figure3")
    ] = "",
    workers: Annotated[
        int, typer.Option(parser=count, help="cells side by side, a thread each")
    ] = 2,
    judge: Annotated[
        Path | None,
        typer.Option(
            help="a pipeline as second judge on the commands", show_default="the shipped one"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="run nothing: write results.md and results.html of this results.json to --output",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print results.json at the end; the tables go to stderr"),
    ] = False,
) -> int:
    """Run the paper's experiments: every table, each cell once; 1 if a cell failed.

    It goes on where it was stopped.
    """
    from contextlib import nullcontext, redirect_stdout

    from zipper.saving.files import held, read_json
    from zipper_lab import experiments, results

    if report:
        results.write(read_json(report), output)
        return 0
    writable(output / "results.json")
    tables = [name.strip() for name in only.split(",") if name.strip()]
    said = f"zipper reproduce --preset {preset}" + " --quick" * quick
    said += f" --only {only}" * bool(tables) + f" --judge {judge}" * bool(judge)
    second = str(judge.absolute()) if judge else ""
    with held(output), redirect_stdout(sys.stderr) if as_json else nullcontext():
        found, failed = experiments.reproduce(preset, output, quick, tables, workers, second, said)
    if as_json:
        print(json.dumps(found, indent=1))
    for name, why in failed.items():
        print(f"zipper reproduce: {name} failed: {why}", file=sys.stderr)
    return int(bool(failed))


# --- prune


@command(commands, MAKE, "zipper prune runs/demo/model --below 0.02 -o runs/pruned")
def prune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a saved model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder for the model")],
    below: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="SHARE",
            help="links that add less than this share of their target's states",
        ),
    ] = None,
    links: Annotated[
        list[str] | None,
        typer.Option(metavar="LINK ...", help="or these links, e.g. '0:text>speech'"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="measure on this manifest (JSONL)", show_default="the built-in dev part"),
    ] = None,
    rows: Annotated[int, typer.Option(parser=count, help="rows to measure on")] = 60,
    towers: Bases = None,
    as_json: Json = False,
) -> None:
    """Take idle links out of a saved model, and say what they added and what it costs to be without
    them."""
    from zipper import surgery
    from zipper.pipeline import Pipeline
    from zipper.saving import hub

    if (below is None) == (not links):
        raise typer.BadParameter("give one of --below and --links")
    absent(output)
    record = hub.record(model)
    bases = named("--tower", towers)
    whole = Pipeline.from_pretrained(model, bases)
    raw, measured = _rows(whole, data, rows)
    samples = surgery.batches(whole.zip, measured)
    batches: list[Any] = []
    for some in samples.values():
        batches += some
    found = surgery.activity(whole.zip, batches)
    idle = links or [] if below is None else surgery.idle(found, below)
    if not idle:
        least = min(link.share for link in found.values())
        raise ZipperError(f"No link adds less than {below}: the least is {least:.4f}.")
    # As it is stored, so that what stays keeps its bits on the disk too.
    stored = Pipeline.from_pretrained(model, bases, dtype=None)
    pruned = Pipeline(surgery.prune(stored.zip, idle), stored.modalities)
    costs = surgery.costs(whole.zip, samples)
    result: dict[str, Any] = {
        "links": {
            name: dataclasses.asdict(link) | {"cost": costs[name], "dropped": name in idle}
            for name, link in found.items()
        },
        "new_parameters": {"before": _size(stored), "after": _size(pruned)},
        "rows": len(measured),
    }
    before = _measured(whole, samples, raw, measured)
    inside = surgery.inside(pruned.zip, model)
    pruned.save_pretrained(output, inside, record | {"pruned": result})
    after = _measured(Pipeline.from_pretrained(output, bases), samples, raw, measured)
    for what, tasks in before.items():
        result[what] = {
            task: {"before": value, "after": after[what][task]} for task, value in tasks.items()
        }
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print(_told(surgery.text(found, costs, idle), result), f"{output}: saved", sep="\n")


def _rows(pipe: Any, data: Path | None, most: int) -> tuple[Sequence[Any] | None, Sequence[Any]]:
    """The rows to measure on; those of the built-in corpus also as they are, with their texts."""
    from zipper.data import manifests
    from zipper_lab.corpora import commands as corpus

    if data:
        return None, manifests.read(data, pipe.modalities, most)
    raw = corpus.rows("dev", most, pipe.units)
    encoded = [
        manifests.encode(row, pipe.modalities, Path(), f"dev, row {n}") for n, row in enumerate(raw)
    ]
    return raw, encoded


def _size(pipe: Any) -> int:
    """Parameters that are the zip's own."""
    return sum(parameter.numel() for parameter in pipe.model.new_parameters().values())


def _measured(
    pipe: Any, samples: Mapping[str, Any], raw: Sequence[Any] | None, rows: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Losses and word error rates, by task."""
    from zipper import surgery

    losses = surgery.losses(pipe.zip, samples)
    return {"nats_per_token": dict(losses), "wer": _rates(pipe, raw, rows)}


def _rates(pipe: Any, raw: Sequence[Any] | None, rows: Sequence[Any]) -> dict[str, float]:
    """Word error rates: of both tasks on the built-in corpus (raw); elsewhere of what speech says,
    if the rows have text and speech."""
    from zipper.evaluation import error_rate
    from zipper_lab import demo

    if raw is not None:
        scores = demo.evaluate(pipe, raw).scores
        return {task: of_task[0].rate.wer for task, of_task in scores.items()}
    if not all({"text", "speech"} <= row.keys() for row in rows):
        return {}
    texts = [pipe.modalities["text"].decode(row["text"]) for row in rows]
    if not any(map(str.isalnum, "".join(texts))):  # nobody speaks: there is no rate
        return {}
    said = demo.transcribe(pipe, [row["speech"] for row in rows])
    return {"asr": error_rate(texts, [segment.content for segment in said]).wer}


def _told(links: str, result: Mapping[str, Any]) -> str:
    """What pruning did, as text. links: their table."""
    sizes = result["new_parameters"]
    lines = [links, f"new parameters: {sizes['before']:,} -> {sizes['after']:,}"]
    lines += [
        f"{task}: {loss['before']:.3f} -> {loss['after']:.3f} nats per token"
        for task, loss in result["nats_per_token"].items()
    ]
    lines += [
        f"WER of {task}: {rate['before']:.1%} -> {rate['after']:.1%} ({result['rows']} rows)"
        for task, rate in result["wer"].items()
    ]
    return "\n".join(lines)


# --- bench

Rounds = Annotated[int, typer.Option(parser=count, help="turns of each arm that count")]
Warm = Annotated[int, typer.Option(parser=threads, help="turns before them")]
Arms = Annotated[
    str,
    typer.Option(metavar="ARM,ARM", help="only these", show_default="all that the device has"),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Threads = Annotated[
    int,
    typer.Option(parser=threads, help="of every arm", show_default="as many as torch takes"),
]
Pipe = Annotated[str, typer.Option(help="a saved pipeline", show_default="the shipped one")]
Hardware = Annotated[str, typer.Option(help="what to call this machine")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="write OUTPUT.json and OUTPUT.md too")
]

bench = typer.Typer(cls=Panels, subcommand_metavar="[WHAT ...]")
commands.add_typer(
    bench,
    name="bench",
    rich_help_panel=LABORATORY,
    invoke_without_command=True,
    epilog="\b\nexample: zipper bench decode --size 30m",
)


@bench.callback()
def bench_all(
    context: typer.Context, hardware: Hardware = "", output: Output = None, as_json: Json = False
) -> None:
    """Measure this machine: all in short, beside what was recorded, or WHAT in full.

    All in short takes five minutes on two cores.
    """
    if what := context.invoked_subcommand:
        if hardware or output or as_json:
            raise typer.BadParameter(f"options of {what} stand behind it")
        return

    from zipper_lab.bench import summary

    _benchmark(partial(summary.bench, hardware=hardware), summary.markdown, output, as_json)


@command(bench, "What", "zipper bench train --size tiny", "train")
def bench_train(
    size: Annotated[
        str, typer.Option(help="tiny, 30m (text) + 10m (speech), 0.5b or 1.5b + 138m")
    ] = "30m",
    rounds: Rounds = 15,
    warm: Warm = 2,
    arms: Arms = "",
    pairs: Annotated[int, typer.Option(parser=count, help="pairs in a step")] = 16,
    room: Annotated[
        int, typer.Option(parser=count, help="tokens of speech in a packed row")
    ] = 1024,
    device: Device = "cpu",
    precision: Annotated[
        Literal["float32", "bf16"],
        typer.Option(help="bf16: autocast, frozen towers in bfloat16"),
    ] = "float32",
    attention: Annotated[
        Literal["sdpa", "flex"], typer.Option(help="of the links; flex is for cuda")
    ] = "sdpa",
    threads: Threads = 0,
    hardware: Hardware = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Training steps of zips, of the decoder with an extended vocabulary and of the bare tower, in
    turn; medians of ratios."""
    from zipper_lab.bench import train as benchmark

    measure = partial(
        benchmark.bench,
        size,
        rounds,
        warm,
        arms.split(",") if arms else (),
        pairs,
        room,
        device,
        precision,
        attention,
        threads,
        hardware,
    )
    _benchmark(measure, benchmark.markdown, output, as_json)


@command(bench, "What", "zipper bench decode --size 120m --device cuda", "decode")
def bench_decode(
    size: Annotated[
        str, typer.Option(help="tiny, 30m, 120m, 0.5b, 1.5b or 8b: the text tower")
    ] = "30m",
    rounds: Rounds = 15,
    warm: Warm = 2,
    arms: Arms = "",
    source: Annotated[
        int, typer.Option(parser=count, help="tokens of speech that are visible")
    ] = 128,
    batch: Annotated[
        int, typer.Option(parser=count, help="sequences side by side, in every arm")
    ] = 1,
    tokens: Annotated[int, typer.Option(parser=count, help="tokens of text in a turn")] = 32,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="of weights and states")
    ] = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
    hardware: Hardware = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Tokens of a zip, of its tower alone, of stock transformers and of other designs, in turn;
    medians of ratios."""
    from zipper_lab.bench import decode as benchmark

    measure = partial(
        benchmark.bench,
        size,
        rounds,
        warm,
        arms.split(",") if arms else (),
        source,
        tokens,
        precision,
        device,
        threads,
        hardware,
        batch,
    )
    _benchmark(measure, benchmark.markdown, output, as_json)


@command(bench, "What", "zipper bench speech --utterances 8", "speech")
def bench_speech(
    rounds: Rounds = 5,
    utterances: Annotated[int, typer.Option(parser=count, help="in a turn")] = 16,
    model: Pipe = "",
    towers: Bases = None,
    threads: Threads = 0,
    hardware: Hardware = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A model of text and speech against real time: recordings and sentences, one and eight at a
    time, and the first sound."""
    from zipper_lab.bench import speech as benchmark

    environment.need("speech")

    bases = named("--tower", towers)
    how = (rounds, 1, model, utterances, threads, hardware, bases)
    _benchmark(partial(benchmark.bench, *how), benchmark.markdown, output, as_json)


@command(bench, "What", "zipper bench start -o start", "start")
def bench_start(
    rounds: Rounds = 9,
    model: Pipe = "",
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="another zipper that takes its turns too: a name, and PYTHONPATH for it",
        ),
    ] = None,
    hardware: Hardware = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Whole processes: a bare import of torch, --help, show, transcribe, speak, in turn; CPU
    seconds, medians of ratios."""
    from zipper_lab.bench import start as benchmark

    others = named("--beside", beside)
    measure = partial(benchmark.bench, rounds, 1, model, others, hardware)
    _benchmark(measure, benchmark.markdown, output, as_json)


@command(bench, "What", "zipper bench serve --rounds 1", "serve")
def bench_serve(
    rounds: Rounds = 3,
    seconds: Annotated[float, typer.Option(help="of a turn, and of each level of load")] = 6.0,
    clients: Annotated[int, typer.Option(parser=count, help="that ask at once")] = 8,
    arms: Arms = "",
    model: Pipe = "",
    hardware: Hardware = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A server under load, up to ten times what it can do, beside the engine alone, one request at
    a time and stock transformers."""
    environment.need("serve")
    environment.need("speech")

    from zipper_lab.bench import serving as benchmark

    if not seconds > 0:
        raise ZipperError(f"--seconds is {seconds:g}; give more than 0.")
    chosen = [arm.strip() for arm in arms.split(",")] if arms else benchmark.ARMS
    how = (rounds, 1, model, seconds, clients, chosen, benchmark.LEVELS, hardware)
    _benchmark(partial(benchmark.bench, *how), benchmark.markdown, output, as_json)


def _benchmark(
    measure: Callable[[], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure, write where it was asked for, print."""
    from zipper_lab import bench as benches

    if output:
        for place in benches.written(output):
            writable(place)
    found = measure()
    lines = markdown(found)
    benches.write(output, found, lines)
    print(json.dumps(found, indent=1) if as_json else lines)
