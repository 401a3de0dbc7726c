"""Commands that use a model: raw in, raw out. Each is a few lines over `zipper.pipeline`."""

import json
import re
import sys
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

import typer

from zipper.cli.options import (
    USE,
    AllowMismatch,
    Bases,
    Json,
    Model,
    SavedModel,
    command,
    count,
    pipeline,
    threads,
    writable,
)
from zipper.errors import ZipperError

app = typer.Typer()

Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
TopK = Annotated[int, typer.Option(help="keep the k likeliest tokens; 0 keeps all")]
TopP = Annotated[float, typer.Option(help="keep the smallest set of this probability")]
Seed = Annotated[int, typer.Option(help="of what is drawn")]
Takes = Annotated[
    int,
    typer.Option(help="draw so many, keep the one that tells best what was given (--temperature)"),
]
Guidance = Annotated[
    float,
    typer.Option(
        help="beyond what the tower would say alone; 1 is off, 2 is worth a try for speech"
    ),
]


@command(app, USE, "zipper transcribe hello.wav")
def transcribe(
    audio: Annotated[
        list[Path], typer.Argument(metavar="AUDIO", help="sound files (wav, flac, ogg, mp3)")
    ],
    model: Model = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    least: Annotated[
        float, typer.Option(metavar="SHARE", help="no words where it is less sure, 0 to 1")
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object per file: file, text, confidence")
    ] = False,
) -> None:
    """Speech to text."""
    from zipper.audio import sound
    from zipper.modality.text import Text

    if not 0 <= least <= 1:
        raise ZipperError(f"--least is {least}; confidence goes from 0 to 1.")
    heard = [sound.read(path) for path in audio]  # all are checked before the model is loaded
    pipe = pipeline(model, towers, allow_mismatch)
    for path, clip in zip(audio, heard, strict=True):
        said = pipe.hear(clip)
        text = said.text if said.confidence >= least else ""
        found = {"file": str(path), Text.name: text, "confidence": round(said.confidence, 4)}
        print(json.dumps(found) if as_json else text)


@command(app, USE, 'zipper speak "send forty two oranges to vienna" -o out.wav')
def speak(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="what to say")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="sound file to write; its ending is its format")
    ],
    voice: Annotated[
        str | None,
        typer.Option(
            help="one of the model's voices (see zipper show)", show_default="the model chooses"
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    guidance: Guidance = 1.0,
    takes: Takes = 1,
    model: Model = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    as_json: Json = False,
) -> None:
    """Text to speech."""
    from zipper.audio import sound

    sound.check_writable(output)
    pipe = pipeline(model, towers, allow_mismatch)
    how = _sampling(temperature, top_k, top_p, seed, guidance)
    said = pipe.run([pipe.to_say(text)], [pipe.voice(voice)], how, takes=takes)[0]
    sound.write(output, said.content)
    seconds = round(len(said.content.samples) / said.content.rate_hz, 2)
    if as_json:
        print(json.dumps({"file": str(output), "seconds": seconds, "ended": said.ended}))
    else:
        cut = "" if said.ended else ", cut off at the cap: the model did not end by itself"
        print(f"{output}: {seconds} s{cut}")


@command(app, USE, "zipper run --given speech=hello.wav --outputs text,speech -o out")
def run(
    outputs: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="modalities to produce, in order")
    ],
    given: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CONTENT", help="a segment: text, or the path of a file; in order"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="folder for what is produced as files: sound, pictures, tables"
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    guidance: Guidance = 1.0,
    takes: Takes = 1,
    model: Model = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per segment")] = False,
) -> None:
    """Any order of modalities in and out."""
    from zipper.generation import Request, planned
    from zipper.modality import whole
    from zipper.tasks import among

    segments = _segments(given or ())
    names = [name.strip() for name in outputs.split(",") if name.strip()]
    produced = [segment.tower for segment in planned(names)]
    chosen = any(among(name) for name in produced)
    if guidance != 1 and not chosen and len({*produced, *(s.tower for s in segments)}) < 2:
        raise ZipperError(
            "--guidance leads away from what a tower would say alone, and this plan names no "
            "other. Leave it out."
        )
    pipe = pipeline(model, towers, allow_mismatch)
    kinds = {name: whole(modality) for name, modality in pipe.modalities.items()}
    each = chain.from_iterable(among(name) or (name,) for name in produced)
    each = chain.from_iterable(kinds if name == "*" else (name,) for name in each)
    if filed := [name for name in each if name in kinds and kinds[name].suffix]:
        if output is None:
            raise ZipperError(
                f"This plan produces {filed[0]}. Pass -o FOLDER to say where its files go."
            )
        read = [s.content for s in segments if s.tower in kinds and kinds[s.tower].suffix]
        most = range(len(produced) + Request.most)  # a choice may be several segments
        for number, name in product(most, {*filed}) if chosen else enumerate(produced):
            if name in filed:
                writable(output / f"{number}-{name}{kinds[name].suffix}", read)
    how = _sampling(temperature, top_k, top_p, seed, guidance)
    for number, segment in enumerate(pipe.run(segments, names, how, takes=takes)):
        content = _written(segment, kinds[segment.tower], number, output)
        if as_json:
            print(json.dumps({segment.tower: content, "ended": segment.ended}))
        else:
            print(f"{segment.tower}: {content}")


@command(app, USE, 'zipper run-batch rows.jsonl --task "speech -> text" -o out.jsonl', "run-batch")
def run_batch(
    data: Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help="a manifest")],
    task: Annotated[str, typer.Option(metavar="TASK", help='such as "speech -> text"')],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="a line for each row; files go beside it")
    ],
    rows: Annotated[int, typer.Option(parser=count, metavar="N", help="run at once")] = 8,
    part: Annotated[
        str, typer.Option(metavar="K/N", help="every N-th row from the K-th, for N machines")
    ] = "1/1",
    ids: Annotated[
        bool, typer.Option("--ids", help="as ids, for zipper train to learn from as made:OUT.jsonl")
    ] = False,
    least: Annotated[
        float,
        typer.Option(metavar="P", help="no answer below this mean probability of a token"),
    ] = 0.0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    guidance: Guidance = 1.0,
    model: Model = None,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
    as_json: Json = False,
) -> None:
    """A task on every row of a manifest; a run that was stopped goes on where it was."""
    from dataclasses import asdict

    from tqdm import tqdm

    from zipper import batch

    which = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if which is None:
        raise ZipperError(f"--part {part!r} is none. Write the second of eight as 2/8.")
    how = _sampling(temperature, top_k, top_p, seed, guidance)
    writable(output, [data])
    pipe = pipeline(model, towers, allow_mismatch)
    of = int(which[1]), int(which[2])
    with tqdm(desc="rows", unit="row", disable=None) as bar:

        def told(counts: batch.Counts) -> None:
            bar.total = counts.rows
            bar.update(counts.done + counts.refused - bar.n)

        counts = batch.run_batch(
            pipe, data, task, output, rows, of, how, told=told, ids=ids, least=least
        )
    if as_json:
        print(json.dumps(asdict(counts)))
    else:
        print(
            f"{output}: {counts.rows} rows, {counts.done} done, {counts.refused} refused, "
            f"{counts.before} of them before"
        )


@command(app, USE, "zipper serve --port 8000")
def serve(
    model: SavedModel = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="to listen on", min=1, max=65535)] = 8000,
    api_key: Annotated[
        str,
        typer.Option(
            envvar="ZIPPER_API_KEY",
            help="closes every route but /health to whoever has it not",
            show_default="none",
        ),
    ] = "",
    rows: Annotated[int, typer.Option(parser=count, metavar="N", help="run at once")] = 8,
    queue: Annotated[
        int, typer.Option(parser=threads, metavar="N", help="wait at most; more get a 429")
    ] = 64,
    check: Annotated[
        bool, typer.Option("--check", help="load the model, say what would be served, and end")
    ] = False,
    towers: Bases = None,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Serve a model to many clients, in the shapes that clients of speech services know."""
    from zipper import environment

    environment.need("serve")
    pipe = pipeline(model, towers, allow_mismatch)
    from zipper.serving import app, process

    if not api_key and host not in ("127.0.0.1", "::1", "localhost"):
        print(f"zipper: {host} is open to others, and no --api-key was given", file=sys.stderr)
    name = (Path(model).absolute().name if model else "") or "zipper"
    served = app.serve(pipe, rows, queue, api_key, name=name)
    print(f"{name} on http://{host}:{port}: {', '.join(pipe.modalities)}", flush=True)
    if not check:
        process.server(served, host, port).run()
    served.service.worker.stop()
    served.service.worker.join()


def _segments(items: Sequence[str]) -> list[Any]:
    """NAME=CONTENT items as segments."""
    from zipper.strand import Segment

    segments = []
    for item in items:
        name, equals, content = item.partition("=")
        if not equals:
            raise ZipperError(
                f"--given {item!r} is not NAME=CONTENT. Write e.g. --given text='call anna' or "
                "--given speech=hello.wav."
            )
        segments.append(Segment(name, content))
    return segments


def _written(segment: Any, kind: Any, number: int, output: Path | None) -> Any:
    """What is told of a segment: what goes into a file is told by its path."""
    if not kind.suffix:
        return kind.told(segment.content)
    assert output is not None
    output.mkdir(parents=True, exist_ok=True)
    if not kind.there(segment.content):  # a model may say nothing, and a file of that is none
        return ""
    path = output / f"{number}-{segment.tower}{kind.suffix}"
    kind.write(segment.content, path)
    return str(path)


def _sampling(temperature: float, top_k: int, top_p: float, seed: int, guidance: float) -> Any:
    """How tokens are drawn; options that would do nothing are refused."""
    from zipper.sampling import Sampling

    said = {"top-k": (top_k, 0), "top-p": (top_p, 1.0), "seed": (seed, 0)}
    for name, (value, plain) in said.items():
        if not temperature and value != plain:
            raise ZipperError(
                f"--{name} says how tokens are drawn, and at temperature 0 none are. Pass "
                "--temperature, e.g. 0.8."
            )
    return Sampling(temperature, top_k, top_p, seed, guidance)
