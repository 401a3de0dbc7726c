"""The command line. Every command is a few lines over the library; exit codes are 0 done, 1 failed,
2 wrong usage or input.

Heavy imports stand inside the commands, so that `zipper --help` answers at once.
"""

import argparse
import json
import logging
import math
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from zipper import environment
from zipper.environment import extra
from zipper.errors import ZipperError

Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Waiting threads that spin for long starve each other on small machines, those that never spin
    # are woken late: 3,000 rounds are some microseconds (docs/log.md). Must be set before torch is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    given = parser().parse_args(arguments)
    _expand(given)
    try:
        with _one_voice():
            return given.command(given) or 0
    except ZipperError as error:
        return _say(given, 2, str(error))
    except KeyboardInterrupt:
        return _say(given, 1, "interrupted")
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get("ZIPPER_DEBUG"):
            raise
        if isinstance(error, ModuleNotFoundError) and environment.home(
            error.name or ""
        ):  # imported by a recipe, or by a library
            return _say(given, 2, str(environment.lacking(str(error.name), error)))
        return _say(
            given, 1, f"failed by {type(error).__name__}: {error} (ZIPPER_DEBUG=1 shows where)"
        )


def _expand(given: argparse.Namespace) -> None:
    """`~` in every path: shells leave it where it stands behind a sign."""
    from zipper.saving.files import place

    for name, value in vars(given).items():
        if isinstance(value, Path):
            setattr(given, name, place(value))
        elif isinstance(value, list) and any(isinstance(item, Path) for item in value):
            setattr(given, name, [place(item) for item in value])


@contextmanager
def _one_voice() -> Iterator[None]:
    """Other libraries draw no bars and give no advice; they are heard where they fail. A warning of
    ours, or of CUDA, is one line.

    Only here, and only while a command runs: who imports zipper keeps his settings, and those of
    the environment and of -W hold.
    """
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if logging.lastResort:  # what has no handler of its own
        logging.lastResort.setLevel(logging.ERROR)
    for action, module in (
        ("default", r"zipper(\.|$)"),
        ("default", r"torch\.cuda(\.|$)"),
        ("ignore", ""),
    ):
        warnings.filterwarnings(action, module=module, append=True)  # type: ignore[arg-type]
    told = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"zipper: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = told


def _say(given: argparse.Namespace, code: int, message: str) -> int:
    print(
        f"zipper {given.name}:", *message.split(), file=sys.stderr
    )  # one line, whatever was quoted in it
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line as argparse knows it."""
    top = argparse.ArgumentParser(
        prog="zipper", description="Zip decoders that were pre-trained alone into one model."
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Command, about: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command, name=name)
        return sub

    p = add(
        "demo",
        demo,
        "Align a new zip on spoken commands, evaluate it, write a report.",
        "zipper demo",
    )
    p.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder of the run (default runs/demo)",
    )
    p.add_argument(
        "--from-scratch",
        action="store_true",
        help="pre-train both towers too, instead of taking the shipped ones",
    )
    p.add_argument(
        "--pairs",
        type=_count,
        default=8000,
        help="aligned pairs to render and train on (default 8000)",
    )
    p.add_argument(
        "--steps",
        type=_count,
        default=960,
        help="alignment steps (default 960: what fits ten minutes on two cores)",
    )
    p.add_argument("--test", type=_count, default=200, help="test utterances (default 200)")
    p.add_argument("--json", action="store_true", help="print report.json at the end")

    p = add("transcribe", transcribe, "Speech to text.", "zipper transcribe hello.wav")
    p.add_argument("audio", nargs="+", type=Path, help="sound files (wav, flac, ogg, mp3)")
    _model_option(p)
    p.add_argument(
        "--least",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="no words where it is less sure, 0 to 1 (default 0)",
    )
    p.add_argument(
        "--json", action="store_true", help="one JSON object per file: file, text, confidence"
    )

    p = add(
        "speak",
        speak,
        "Text to speech.",
        'zipper speak "send forty two oranges to vienna" -o out.wav',
    )
    p.add_argument("text", help="what to say")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="sound file to write; its ending gives the format",
    )
    p.add_argument(
        "--voice", help="one of the model's voices (see zipper show); default: the model chooses"
    )
    _sampling_options(p)
    _model_option(p)
    p.add_argument("--json", action="store_true", help="print what was written as JSON")

    p = add(
        "run",
        run,
        "Any order of modalities in and out.",
        "zipper run --given speech=hello.wav --outputs text,speech -o out",
    )
    p.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=CONTENT",
        help="a segment: text, or the path of a sound file; in order",
    )
    p.add_argument(
        "--outputs", required=True, metavar="NAME,NAME", help="modalities to produce, in order"
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder for produced sound (needed if any speech is produced)",
    )
    _sampling_options(p)
    _model_option(p)
    p.add_argument("--json", action="store_true", help="one JSON object per segment")

    p = add(
        "units",
        units,
        "A corpus to units on all cores, for training; goes on where it was stopped. Sound files "
        "become a manifest, other "
        "sources a folder of unit files.",
        "zipper units librispeech:data/LibriSpeech --split train-clean-100 -o units/clean100",
    )
    p.add_argument(
        "source",
        nargs="+",
        help="sound files or folders of them; or one manifest (.jsonl), or KIND:PLACE, the kind "
        "one of librispeech, libritts, "
        "librilight, sounds, parquet, arrow, audiofolder, jsonl; behind it, where columns have "
        "other names, #text=COLUMN,...",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="manifest (JSONL) or, of a corpus, folder to write",
    )
    p.add_argument("--units", type=Path, help="codebook folder (default: the shipped one)")
    p.add_argument(
        "--text",
        type=Path,
        help="tokenizer folder, for the texts of a corpus (default: the shipped one)",
    )
    p.add_argument(
        "--fit",
        type=_count,
        metavar="CODES",
        help="fit a new codebook of so many codes on this audio, saved at --units",
    )
    p.add_argument("--split", help="only this part of a corpus, e.g. train-clean-100")
    p.add_argument("--limit", type=_count, help="only its first so many samples")
    p.add_argument(
        "--takes",
        type=_count,
        default=0,
        metavar="N",
        help="N rows a sample, each with a disturbed take of its sound",
    )
    p.add_argument(
        "--bad",
        choices=["error", "warn", "skip"],
        default="error",
        help="what becomes of bad samples (default: error)",
    )
    p.add_argument(
        "--most-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="refuse a corpus with more (default 0.01)",
    )
    p.add_argument("--workers", type=_count, help="processes (default: one a core)")
    p.add_argument(
        "--ray",
        action="store_true",
        help="work on the Ray cluster at hand instead, or on a local one",
    )
    p.add_argument("--json", action="store_true", help="print the counts as JSON")

    for name, about in {
        "pretrain": "Train one tower alone by next-token prediction.",
        "train": "Align towers on pairs.",
    }.items():
        p = add(
            name,
            train,
            about,
            f"zipper {name} recipes/{'text_tower' if name == 'pretrain' else 'spoken_commands'}.py",
        )
        p.add_argument(
            "recipe",
            type=Path,
            help="a Python file with config() -> TrainConfig and, where it needs data, prepare()",
        )
        p.add_argument(
            "--resume", action="store_true", help="go on from the newest whole checkpoint"
        )
        p.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=JSON",
            help="change a field of the recipe, e.g. steps=100",
        )
        p.add_argument(
            "--plan",
            action="store_true",
            help="train nothing: print what trains, FLOPs, memory and time, once the data are "
            "there",
        )
        p.add_argument("--json", action="store_true", help="print the plan as JSON")

    p = add(
        "evaluate",
        evaluate,
        "Word error rates of ASR and TTS with oracle and floor.",
        "zipper evaluate --test 300 --json",
    )
    p.add_argument(
        "--test",
        type=_count,
        default=300,
        help="utterances of the built-in test part (default 300)",
    )
    p.add_argument("--task", choices=["asr", "tts", "both"], default="both")
    p.add_argument(
        "--judge", type=Path, help="a second judge for TTS: a saved pipeline that transcribes units"
    )
    p.add_argument(
        "--robust",
        action="store_true",
        help="ASR also of disturbed sound: later, in noise, faster ...",
    )
    _model_option(p)
    p.add_argument(
        "--output", type=Path, help="write the results with every raw text to this JSON file"
    )
    p.add_argument("--json", action="store_true", help="print the results as JSON")

    p = add(
        "show",
        show,
        "Of a model: towers, junctions, what trains, gates, size on disk. Of a run's folder: its "
        "curves as a page, how it went.",
        "zipper show runs/demo/model",
    )
    p.add_argument(
        "model",
        nargs="?",
        help="a saved model: folder or hub id (default: the shipped one), or the folder of a run",
    )
    p.add_argument(
        "-o", "--output", type=Path, help="page to write of a run (default: run.html in its folder)"
    )
    _loading_options(p)
    p.add_argument("--json", action="store_true", help="print as JSON")

    p = add(
        "verify",
        verify,
        "Try a model's promises: frozen towers unharmed, no leaks, packed and cached as one; 1 if "
        "one is broken.",
        "zipper verify",
    )
    p.add_argument(
        "model", nargs="?", help="a saved model: folder or hub id (default: the shipped one)"
    )
    _loading_options(p)
    p.add_argument("--json", action="store_true", help="print as JSON")

    p = add(
        "doctor",
        doctor,
        "What zipper stands on here, and whether it works; 1 if something installed does not.",
        "zipper doctor",
    )
    p.add_argument("--json", action="store_true", help="print as JSON")

    p = add(
        "swap",
        swap,
        "Put another tower in a saved model: what still fits is kept, the rest is born again with "
        "closed gates.",
        "zipper swap runs/demo/model text=runs/larger --modality text=runs/larger -o runs/swapped",
    )
    p.add_argument("model", type=Path, help="a saved model")
    p.add_argument(
        "tower", nargs="+", metavar="NAME=SOURCE", help="the new tower: a folder or hub id"
    )
    p.add_argument("-o", "--output", type=Path, required=True, help="new folder for the model")
    p.add_argument(
        "--train",
        action="append",
        default=[],
        metavar="NAME",
        help="a new tower that learns (default: it is frozen)",
    )
    p.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="its tokenizer or codebook, where that is another",
    )
    p.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="NAME=MEAN",
        help="its mean tokens per segment (default: as before)",
    )
    _tower_option(p)
    p.add_argument("--json", action="store_true", help="print the report as JSON")

    p = add(
        "prune",
        prune,
        "Take idle links out of a saved model, and say what they added and what it costs to be "
        "without them.",
        "zipper prune runs/demo/model --below 0.02 -o runs/pruned",
    )
    p.add_argument("model", type=Path, help="a saved model")
    p.add_argument("-o", "--output", type=Path, required=True, help="new folder for the model")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--below",
        type=_number,
        metavar="SHARE",
        help="links that add less than this share of their target's states",
    )
    which.add_argument(
        "--links", nargs="+", metavar="LINK", help="these links, e.g. '0:text>speech'"
    )
    p.add_argument(
        "--data",
        type=Path,
        help="measure on this manifest (JSONL) instead of the built-in dev part",
    )
    p.add_argument("--rows", type=_count, default=60, help="rows to measure on (default 60)")
    _tower_option(p)
    p.add_argument("--json", action="store_true", help="print what was found as JSON")
    p = add(
        "reproduce",
        reproduce,
        "The paper's experiments: every table, each cell once; goes on where it was stopped. 1 if "
        "a cell failed.",
        "zipper reproduce --preset cpu --quick",
    )
    p.add_argument(
        "--preset",
        choices=["cpu", "gpu", "quick"],
        default="cpu",
        help="how much is done (default cpu)",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="every table of the preset with a few steps, to see that all works",
    )
    p.add_argument(
        "--output",
        type=Path,
        default=Path("runs/reproduce"),
        help="folder of the results (default runs/reproduce)",
    )
    p.add_argument(
        "--only", default="", metavar="TABLE,TABLE", help="only these tables, e.g. table1,figure3"
    )
    p.add_argument(
        "--workers", type=_count, default=2, help="cells side by side, a thread each (default 2)"
    )
    p.add_argument(
        "--judge",
        type=Path,
        help="a pipeline as second judge on the commands (default: the shipped one)",
    )
    p.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="run nothing: write results.md and results.html of this results.json to OUTPUT",
    )
    p.add_argument(
        "--json", action="store_true", help="print results.json at the end; the tables go to stderr"
    )
    p = add(
        "push",
        push,
        "Upload a saved model to the hub, in one commit.",
        "zipper push runs/demo/model me/my-zip --private",
    )
    p.add_argument("model", type=Path, help="a saved model")
    p.add_argument("repo", help="hub repository; made if there is none")
    p.add_argument(
        "--private", action="store_true", help="if the repository is new, only its owner sees it"
    )
    p.add_argument(
        "--revision", help="branch to commit to, made from main if there is none (default main)"
    )
    p.add_argument("--message", default="Upload a zip", help="of the commit")
    p.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="NAME",
        help="a frozen tower to upload too: others lack its folder",
    )
    _tower_option(p)

    p = add(
        "bench",
        bench_all,
        "Measure this machine, everything in short beside what was recorded (five minutes on two "
        "cores), or WHAT in full.",
        "zipper bench decode --size 30m",
    )
    _bench_options(p)
    what = p.add_subparsers(metavar="WHAT")
    about = "Training steps of zips, of the decoder with an extended vocabulary and of the bare tower, in turn; medians of ratios."
    p = what.add_parser("train", help=about, description=about)
    p.set_defaults(command=bench_train, name="bench train")
    p.add_argument(
        "--size",
        default="30m",
        help="tiny, 30m (text) + 10m (speech), 0.5b or 1.5b + 138m (default 30m)",
    )
    p.add_argument(
        "--rounds", type=_count, default=15, help="turns of each arm that count (default 15)"
    )
    p.add_argument("--warm", type=_count, default=2, help="turns before them (default 2)")
    p.add_argument(
        "--arms", default="", metavar="ARM,ARM", help="only these (default all that the device has)"
    )
    p.add_argument("--pairs", type=_count, default=16, help="pairs in a step (default 16)")
    p.add_argument(
        "--room", type=_count, default=1024, help="tokens of speech in a packed row (default 1024)"
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument(
        "--precision",
        choices=["float32", "bf16"],
        default="float32",
        help="bf16: autocast, frozen towers in bfloat16",
    )
    p.add_argument(
        "--attention",
        choices=["sdpa", "flex"],
        default="sdpa",
        help="of the links; flex is for cuda (default sdpa)",
    )
    p.add_argument(
        "--threads", type=_threads, default=0, help="of every arm (default: as many as torch takes)"
    )
    _bench_options(p)

    about = "Tokens of a zip, of its tower alone, of stock transformers and of other designs, in turn; medians of ratios."
    p = what.add_parser("decode", help=about, description=about)
    p.set_defaults(command=bench_decode, name="bench decode")
    p.add_argument(
        "--size",
        default="30m",
        help="tiny, 30m, 120m, 0.5b, 1.5b or 8b: the text tower (default 30m)",
    )
    p.add_argument(
        "--rounds", type=_count, default=15, help="turns of each arm that count (default 15)"
    )
    p.add_argument("--warm", type=_count, default=2, help="turns before them (default 2)")
    p.add_argument(
        "--arms", default="", metavar="ARM,ARM", help="only these (default all that the device has)"
    )
    p.add_argument(
        "--source", type=_count, default=128, help="tokens of speech that are visible (default 128)"
    )
    p.add_argument(
        "--batch", type=_count, default=1, help="sequences side by side, in every arm (default 1)"
    )
    p.add_argument(
        "--tokens", type=_count, default=32, help="tokens of text in a turn (default 32)"
    )
    p.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of weights and states (default float32)",
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    p.add_argument(
        "--threads", type=_threads, default=0, help="of every arm (default: as many as torch takes)"
    )
    _bench_options(p)

    about = "A model of text and speech against real time: recordings and sentences, one and eight at a time, and the first sound."
    p = what.add_parser("speech", help=about, description=about)
    p.set_defaults(command=bench_speech, name="bench speech")
    p.add_argument(
        "--rounds", type=_count, default=5, help="turns of each arm that count (default 5)"
    )
    p.add_argument("--utterances", type=_count, default=16, help="in a turn (default 16)")
    p.add_argument("--model", default="", help="a saved pipeline (default: the shipped one)")
    _tower_option(p)
    p.add_argument(
        "--threads", type=_threads, default=0, help="of every arm (default: as many as torch takes)"
    )
    _bench_options(p)

    about = "Whole processes: a bare import of torch, --help, show, transcribe, speak, in turn; CPU seconds, medians of ratios."
    p = what.add_parser("start", help=about, description=about)
    p.set_defaults(command=bench_start, name="bench start")
    p.add_argument("--rounds", type=_count, default=9, help="turns of each that count (default 9)")
    p.add_argument("--model", default="", help="a saved pipeline (default: the shipped one)")
    p.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another zipper that takes its turns too: a name, and PYTHONPATH for it",
    )
    _bench_options(p)

    p = add(
        "towers",
        towers,
        "Which decoders of the installed transformers can be towers, tried on tiny random models.",
        "zipper towers llama bloom",
    )
    p.add_argument(
        "family", nargs="*", help="names of transformers' causal-LM mapping (default: all)"
    )
    p.add_argument("--json", action="store_true", help="print as JSON")
    return top


def markdown() -> str:
    """docs/cli.md, made from the parser."""
    os.environ["COLUMNS"] = "100"
    top = parser()
    parts = ["# Command line\n\nMade by `make docs` from the parser; do not edit.\n"]
    parts += [
        f"## {sub.prog}\n\n```text\n{sub.format_help().rstrip()}\n```\n" for sub in _commands(top)
    ]
    return "\n".join(parts)


def _commands(above: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands below one, each before those below it."""
    for action in above._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield sub
                yield from _commands(sub)


def _count(text: str) -> int:
    if not (
        text.isdecimal() and len(text) < 16 and int(text)
    ):  # more is no count, and no size either
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _threads(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _model_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        help="a saved model: folder or hub id (default: the one that comes with the package)",
    )
    _loading_options(p)


def _tower_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tower",
        action="append",
        default=[],
        dest="towers",
        metavar="NAME=PATH",
        help="where a frozen tower of the model lies now: folder or hub id",
    )


def _loading_options(p: argparse.ArgumentParser) -> None:
    _tower_option(p)
    p.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="load it on another base, tokenizer or codebook than it was made with",
    )


def _bench_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--hardware", default="", help="what to call this machine")
    p.add_argument("-o", "--output", type=Path, help="write OUTPUT.json and OUTPUT.md too")
    p.add_argument("--json", action="store_true", help="print the results as JSON")


def _sampling_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    p.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (0 = all)")
    p.add_argument(
        "--top-p", type=float, default=1.0, help="keep the smallest set of this probability"
    )
    p.add_argument("--seed", type=int, default=0, help="of what is drawn")
    p.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="beyond what the tower would say alone: 1 = off (default), try 2 for speech",
    )


def _sampling(given: argparse.Namespace) -> Any:
    from zipper.sampling import Sampling

    for name, plain in {"top-k": 0, "top-p": 1.0, "seed": 0}.items():
        if not given.temperature and getattr(given, name.replace("-", "_")) != plain:
            raise ZipperError(
                f"--{name} says how tokens are drawn, and at temperature 0 none are. Pass "
                "--temperature, e.g. 0.8."
            )
    return Sampling(given.temperature, given.top_k, given.top_p, given.seed, given.guidance)


def _pipeline(given: argparse.Namespace) -> Any:
    from zipper.pipeline import Pipeline

    return Pipeline.from_pretrained(
        given.model, _named("--tower", given.towers), allow_mismatch=given.allow_mismatch
    )


def _folder(given: argparse.Namespace) -> Path:
    """Where the files of the given model are."""
    from zipper.pipeline import SHIPPED
    from zipper.saving import hub

    return hub.fetch(given.model).folder if given.model else SHIPPED


def _writable(path: Path) -> None:
    """Raise ZipperError unless a file can be written there, folders made where they are missing:
    before the work, not after it."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ZipperError(f"{path} is a folder, a file was wanted.")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ZipperError(
            f"{path} cannot be written: {above} is no folder that you may write in. Choose "
            "another place."
        )


def demo(given: argparse.Namespace) -> None:
    """zipper demo"""
    from zipper.saving.files import held
    from zipper_lab.demo import demo as run_demo

    _writable(given.output / "report.json")
    with held(given.output):
        report = run_demo(given.output, given.from_scratch, given.pairs, given.steps, given.test)
    if given.json:
        print(json.dumps(report, indent=1))


def transcribe(given: argparse.Namespace) -> None:
    """zipper transcribe"""
    from zipper.audio import sound as audio

    if not 0 <= given.least <= 1:
        raise ZipperError(f"--least is {given.least}; confidence goes from 0 to 1.")
    heard = [
        audio.read(path) for path in given.audio
    ]  # all inputs are checked before the model is loaded
    pipeline = _pipeline(given)
    for path, sound in zip(given.audio, heard, strict=True):
        said = pipeline.hear(sound)
        text = said.text if said.confidence >= given.least else ""
        found = {"file": str(path), "text": text, "confidence": round(said.confidence, 4)}
        print(json.dumps(found) if given.json else text)


def speak(given: argparse.Namespace) -> None:
    """zipper speak"""
    from zipper.audio import sound as audio
    from zipper.strand import Segment

    audio.check_writable(given.output)
    pipeline = _pipeline(given)
    said = pipeline.run(
        [Segment("text", given.text)],
        outputs=[pipeline.voice(given.voice)],
        sampling=_sampling(given),
    )[0]
    audio.write(given.output, said.content)
    seconds = round(len(said.content.samples) / said.content.rate_hz, 2)
    if given.json:
        print(json.dumps({"file": str(given.output), "seconds": seconds, "ended": said.ended}))
    else:
        print(
            f"{given.output}: {seconds} s"
            + ("" if said.ended else ", cut off at the cap: the model did not end by itself")
        )


def run(given: argparse.Namespace) -> None:
    """zipper run"""
    from zipper.audio import sound as audio
    from zipper.audio.sound import Audio
    from zipper.modality.speech import SpeechUnits
    from zipper.strand import Segment

    segments = []
    for item in given.given:
        name, equals, content = item.partition("=")
        if not equals:
            raise ZipperError(
                f"--given {item!r} is not NAME=CONTENT. Write e.g. --given text='call anna' or "
                "--given speech=hello.wav."
            )
        segments.append(Segment(name, content))
    outputs = [name.strip() for name in given.outputs.split(",") if name.strip()]
    if given.guidance != 1 and len({*outputs, *(segment.tower for segment in segments)}) < 2:
        raise ZipperError(
            "--guidance leads away from what a tower would say alone, and this plan names no "
            "other. Leave it out."
        )
    pipeline = _pipeline(given)
    if any(isinstance(pipeline.modalities.get(name), SpeechUnits) for name in outputs):
        if given.output is None:
            raise ZipperError(
                "This plan produces speech. Pass -o FOLDER to say where the sound goes."
            )
        _writable(given.output / "0-speech.wav")
    for number, segment in enumerate(pipeline.run(segments, outputs, sampling=_sampling(given))):
        content = segment.content
        if isinstance(content, Audio):
            given.output.mkdir(parents=True, exist_ok=True)
            path = given.output / f"{number}-{segment.tower}.wav"
            if len(
                content.samples
            ):  # a model may say nothing, and a file of that could not be read
                audio.write(path, content)
            content = str(path) if len(content.samples) else ""
        print(
            json.dumps({segment.tower: content, "ended": segment.ended})
            if given.json
            else f"{segment.tower}: {content}"
        )


def units(given: argparse.Namespace) -> None:
    """zipper units"""
    import shutil

    from zipper.data import extraction, layouts, rows
    from zipper.data import manifests as data
    from zipper.modality import load
    from zipper.modality.speech import SpeechUnits
    from zipper.pipeline import SHIPPED

    corpus = len(given.source) == 1 and layouts.names(given.source[0])
    source: layouts.Source = given.source[0] if corpus else [Path(path) for path in given.source]
    policy, speed = extraction.Policy(given.bad, given.most_bad), [0.0]

    if given.takes and not corpus:
        raise ZipperError(
            "--takes wants sound with its texts. Give a corpus, or a manifest of both."
        )
    if not corpus:
        _writable(given.output)
    if given.fit:
        if corpus:
            raise ZipperError(
                "--fit wants sound files. Fit a codebook on some of this corpus first, then pass "
                "it as --units."
            )
        if given.units is None:
            raise ZipperError(
                "--fit makes a new codebook. Pass --units FOLDER to say where it goes."
            )
        if (given.units / SpeechUnits.CONFIG).exists():
            raise ZipperError(
                f"{given.units} holds a codebook already. Leave out --fit to use it, or choose "
                "another folder."
            )
        _writable(given.units / SpeechUnits.CONFIG)
        _fitted(source, given.fit, policy).save(given.units)
    modalities = {"speech": load(given.units or SHIPPED / "modalities" / "speech")}
    beside = given.output.with_name(f".{given.output.name}.parts")  # what a killed run goes on from
    folder = given.output if corpus else beside
    if corpus:
        modalities["text"] = load(given.text or SHIPPED / "modalities" / "text")
    spread = extraction.on_ray if given.ray else extraction.processes(given.workers)
    try:
        found = extraction.extract(
            source,
            folder,
            modalities,
            policy,
            given.split,
            given.limit,
            spread=spread,
            report=lambda s: speed.append(s["real_time"]),
            takes=given.takes,
        )
    except ZipperError:
        if not corpus and len(list(beside.glob("units-*"))) < 2:  # nothing worth keeping
            shutil.rmtree(beside, ignore_errors=True)
        raise
    told = {
        key: rows.provenance(folder)[key]
        for key in ("samples", "bad", "passed", "rows", "seconds", "fields")
    }
    if not corpus:
        each = zip(range(len(found)), found, found.seconds.tolist(), strict=True)
        if told["bad"]:
            data.write(given.output.with_suffix(".bad.jsonl"), data.manifest(folder / rows.BAD))
        data.write(
            given.output,
            [
                {"id": found.name(n), "speech": row["speech"], "duration": round(s, 3)}
                for n, row, s in each
            ],
        )
        shutil.rmtree(beside)
    bad = folder / rows.BAD if corpus else given.output.with_suffix(".bad.jsonl")
    if given.json:
        print(
            json.dumps(
                told
                | {"real_time": round(speed[-1], 1), "bad_list": str(bad) if told["bad"] else None}
            )
        )
    else:
        ids = ", ".join(f"{count['ids']} of {name}" for name, count in told["fields"].items())
        left = f"{told['bad']} bad ones left out" + f", see {bad}" * bool(told["bad"])
        made = (
            f"{told['rows']} {'samples' if corpus else 'files'} ({left}), {told['seconds']:.0f} s"
        )
        print(
            f"{given.output}: {made}, ids: {ids}; {speed[-1]:.0f} x real time. "
            f"{extraction.told(told['passed'])}".strip()
        )


def _fitted(source: Any, codes: int, policy: Any) -> Any:
    """A codebook of so many codes for the sound of a source; what cannot be read is left out where
    the policy says so."""
    from tqdm import tqdm

    from zipper.audio import sound as audio
    from zipper.data import layouts
    from zipper.modality.speech import SpeechUnits, UnitsConfig

    paths = [sample.folder / sample.row["speech"] for sample in layouts.samples(source)]
    config = UnitsConfig(fitted_on=f"{len(paths)} sound files")
    mels = []
    for path in tqdm(paths, desc="log-mel", unit="file", disable=None):
        try:
            mels.append(config.mel.picture(audio.read(path)))
        except ZipperError:
            if policy.bad == "error":
                raise
    return SpeechUnits.fit(mels, codes, config)


def train(given: argparse.Namespace) -> None:
    """zipper pretrain, zipper train"""
    import dataclasses

    from zipper.saving.files import place
    from zipper.training import loop as training

    if not given.recipe.is_file():
        raise ZipperError(
            f"The recipe {given.recipe} does not exist. Give a Python file such as "
            "recipes/spoken_commands.py."
        )
    recipe = runpy.run_path(str(given.recipe))
    if "config" not in recipe:
        raise ZipperError(
            f"{given.recipe} has no function config(). A recipe is a Python file with config() -> "
            "TrainConfig."
        )
    config = recipe["config"]()
    for item in given.set:
        config = _changed(config, item)
    if given.name == "pretrain" and len(config.towers) != 1:
        raise ZipperError(
            f"{given.recipe} has the towers {sorted(config.towers)}; pretrain wants one. Use "
            "`zipper train` for several."
        )
    config = dataclasses.replace(config, output=str(place(config.output)))
    if not given.plan:
        _writable(Path(config.output) / "config.json")
    if "prepare" in recipe:
        with extra("accelerate").PartialState().main_process_first():
            recipe["prepare"]()
    if given.plan:
        _plan(config, given.json)
        return
    training.train(config, resume=given.resume)
    print(
        f"{config.output}/model: the best by dev loss. See it with: zipper show "
        f"{config.output}/model"
    )


def _plan(config: Any, as_json: bool) -> None:
    """What a recipe will cost; builds its model and reads its data as training does."""
    import torch

    from zipper import modality
    from zipper.data import extraction
    from zipper.training import cost as plan
    from zipper.training import loop as training

    modalities = {name: modality.load(Path(path)) for name, path in config.modalities.items()}
    most = min(config.rows or plan.SAMPLE, plan.SAMPLE)
    sources = [config.data] if isinstance(config.data, str) else [*config.data]
    rows = [
        row
        for source in sources
        for row in extraction.load(
            source, modalities, most, extraction.Policy(config.bad, config.most_bad)
        )
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = training.build(config, modalities, rows)
    if config.frozen_dtype:
        for weight in model.towers.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(getattr(torch, config.frozen_dtype))
    how = (config.mixed_precision, config.accumulate, config.recompute, device)
    found = plan.plan(model, rows, config.tasks, config.batch, config.steps, *how)
    print(json.dumps(found, indent=1) if as_json else plan.table(found))


def _changed(config: Any, item: str) -> Any:
    """A TrainConfig with one field changed as --set says."""
    import dataclasses

    from zipper.link import LinkConfig

    field, _, text = item.partition("=")
    if field not in {f.name for f in dataclasses.fields(config)}:
        raise ZipperError(
            f"--set {item}: TrainConfig has no field {field!r}. Its fields stand in "
            "zipper.training.loop.TrainConfig."
        )
    old = getattr(config, field)
    try:
        new = json.loads(text)
        new = (
            dataclasses.replace(old, **new)
            if isinstance(old, LinkConfig)
            else tuple(new)
            if isinstance(old, tuple)
            else new
        )
    except json.JSONDecodeError:
        raise ZipperError(
            f"--set {item}: {text!r} is not JSON. Write e.g. steps=100 or output='\"runs/x\"'."
        ) from None
    except TypeError as error:
        raise ZipperError(f"--set {item}: {error}. It is {old!r} in the recipe.") from error
    if isinstance(old, float) and isinstance(new, int):
        new = float(new)
    if old is not None and not isinstance(new, type(old)):
        raise ZipperError(
            f"--set {item}: {field} is a {type(new).__name__} here; in the recipe it is {old!r}."
        )
    return dataclasses.replace(config, **{field: new})


def evaluate(given: argparse.Namespace) -> None:
    """zipper evaluate"""
    from zipper.pipeline import Pipeline
    from zipper.saving import checkpoint
    from zipper_lab import demo, report
    from zipper_lab.corpora import commands as corpus

    environment.need("speech")
    if given.output:
        _writable(given.output)
    pipeline, second = (
        _pipeline(given),
        Pipeline.from_pretrained(given.judge) if given.judge else None,
    )
    tasks = ["asr", "tts"] if given.task == "both" else [given.task]
    found = demo.evaluate(
        pipeline, corpus.rows("test", given.test, pipeline.units), tasks, second, given.robust
    )
    scores = {task: report.summary(found.scores[task]) for task in tasks}
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(
            given.output, {"model": str(given.model or "shipped"), **scores, "words": found.words}
        )
    print(
        json.dumps(scores, indent=1)
        if given.json
        else report.text_table([s for task in tasks for s in found.scores[task]])
    )


def show(given: argparse.Namespace) -> None:
    """zipper show"""
    from zipper.inspection import describe, table
    from zipper.training import history

    if given.model and (Path(given.model) / history.METRICS).is_file():
        run, page = (
            history.History.read(Path(given.model)),
            given.output or Path(given.model) / "run.html",
        )
        _writable(page)
        page.parent.mkdir(parents=True, exist_ok=True)
        history.write(page, run)
        said = run.summary() | {"page": str(page)}
        print(
            json.dumps(said, indent=1)
            if given.json
            else f"{history.text(said)}\npage        {page}"
        )
        return
    if given.output:
        raise ZipperError(
            f"-o is for the page of a run; {given.model or 'the shipped model'} is a model. Leave "
            "it out."
        )
    found = describe(_pipeline(given), _folder(given))
    print(json.dumps(found, indent=1) if given.json else table(found))


def verify(given: argparse.Namespace) -> int:
    """zipper verify"""
    import dataclasses

    import torch

    from zipper.model import Zipper
    from zipper.pipeline import PINS
    from zipper.verify import verify as run_verification

    folder = _folder(given)
    if (folder / PINS).is_file():
        model = _pipeline(given).zip
    else:  # a model that was saved without modalities has promises too
        model = Zipper.from_pretrained(
            folder, _named("--tower", given.towers), torch.float32, given.allow_mismatch
        )
    checks = run_verification(model)
    if given.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        print(
            "\n".join(
                f"{'ok    ' if check.held else 'BROKEN'}  {check.promise}: {check.measured}"
                for check in checks
            )
        )
    return int(not all(check.held for check in checks))


def doctor(given: argparse.Namespace) -> int:
    """zipper doctor"""
    from zipper import doctor as ward

    found = ward.examine()
    print(json.dumps(ward.record(found), indent=1) if given.json else ward.table(found))
    return int(not ward.works(found))


def swap(given: argparse.Namespace) -> None:
    """zipper swap"""
    import dataclasses

    from zipper import modality, surgery
    from zipper.pipeline import Pipeline
    from zipper.saving import checkpoint

    towers, tokens = _named("swap", given.tower), _named("--tokens", given.tokens)
    try:
        means = {name: float(mean) for name, mean in tokens.items()}
    except ValueError as error:
        raise ZipperError(
            f"--tokens {given.tokens}: {error}. Write e.g. --tokens text=15.9."
        ) from None
    _absent(given.output)
    modalities = {
        name: modality.load(folder) for name, folder in _named("--modality", given.modality).items()
    }
    record = checkpoint.load(given.model)[1]
    old = Pipeline.from_pretrained(given.model, _named("--tower", given.towers), dtype=None)
    new, report = surgery.swap_pipeline(old, towers, modalities, given.train, means)
    new.save_pretrained(
        given.output,
        surgery.inside(new.zip, given.model),
        record | {"swap": dataclasses.asdict(report)},
    )
    print(
        json.dumps(dataclasses.asdict(report), indent=1)
        if given.json
        else f"{report.table()}\n{given.output}: saved"
    )


def prune(given: argparse.Namespace) -> None:
    """zipper prune"""
    import dataclasses

    from zipper import surgery
    from zipper.data import manifests as data
    from zipper.pipeline import Pipeline
    from zipper.saving import checkpoint
    from zipper_lab.corpora import commands as corpus

    _absent(given.output)
    record = checkpoint.load(given.model)[1]
    bases = _named("--tower", given.towers)
    whole = Pipeline.from_pretrained(given.model, bases)
    raw = [] if given.data else corpus.rows("dev", given.rows, whole.units)
    rows: Sequence[Any] = (
        data.read(given.data, whole.modalities, given.rows)
        if given.data
        else [
            data.encode(row, whole.modalities, Path(), f"dev, row {n}") for n, row in enumerate(raw)
        ]
    )
    samples = surgery.batches(whole.zip, rows)
    found = surgery.activity(whole.zip, [batch for some in samples.values() for batch in some])
    links = given.links or surgery.idle(found, given.below)
    if not links:
        raise ZipperError(
            f"No link adds less than {given.below}: the least is "
            f"{min(link.share for link in found.values()):.4f}."
        )
    stored = Pipeline.from_pretrained(
        given.model, bases, dtype=None
    )  # so that what stays keeps its bits on the disk too
    pruned = Pipeline(surgery.prune(stored.zip, links), stored.modalities)
    costs = surgery.costs(whole.zip, samples)
    sizes = [
        sum(p.numel() for p in model.new_parameters().values())
        for model in (stored.model, pruned.model)
    ]
    before = _rates(whole, raw, rows, given.data is None)
    result: dict[str, Any] = {
        "links": {
            name: dataclasses.asdict(link) | {"cost": costs[name], "dropped": name in links}
            for name, link in found.items()
        },
        "new_parameters": dict(zip(("before", "after"), sizes, strict=True)),
        "rows": len(rows),
    }
    pruned.save_pretrained(
        given.output, surgery.inside(pruned.zip, given.model), record | {"pruned": result}
    )
    loaded = Pipeline.from_pretrained(given.output, bases)
    after = _rates(loaded, raw, rows, given.data is None)
    losses = [surgery.losses(pipeline.zip, samples) for pipeline in (whole, loaded)]
    result["nats_per_token"] = {
        task: {"before": loss, "after": losses[1][task]} for task, loss in losses[0].items()
    }
    result["wer"] = {task: {"before": rate, "after": after[task]} for task, rate in before.items()}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    print(surgery.table(found, costs, links))
    print(f"new parameters: {sizes[0]:,} -> {sizes[1]:,}")
    for task, loss in result["nats_per_token"].items():
        print(f"{task}: {loss['before']:.3f} -> {loss['after']:.3f} nats per token")
    for task, rate in result["wer"].items():
        print(f"WER of {task}: {rate['before']:.1%} -> {rate['after']:.1%} ({len(rows)} rows)")
    print(f"{given.output}: saved")


def _rates(
    pipeline: Any, raw: Sequence[Any], rows: Sequence[Any], built_in: bool
) -> dict[str, float]:
    """Word error rates: of both tasks on the built-in corpus; elsewhere of what speech says, if the
    rows have text and speech."""
    from zipper.evaluation import error_rate
    from zipper_lab import demo

    if built_in:
        return {
            task: scores[0].rate.wer for task, scores in demo.evaluate(pipeline, raw).scores.items()
        }
    if not all({"text", "speech"} <= row.keys() for row in rows):
        return {}
    texts = [pipeline.modalities["text"].decode(row["text"]) for row in rows]
    if not any(map(str.isalnum, "".join(texts))):  # nobody speaks: there is no rate
        return {}
    return {
        "asr": error_rate(
            texts, [s.content for s in demo.transcribe(pipeline, [row["speech"] for row in rows])]
        ).wer
    }


def _absent(path: Path) -> None:
    """Raise ZipperError unless this is a new folder that can be made."""
    if path.exists():
        raise ZipperError(f"{path} exists. Choose a new folder.")
    _writable(path)


def _named(option: str, items: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE items as a dict."""
    found = dict(item.partition("=")[::2] for item in items)
    if wrong := [item for item in items if not all(item.partition("="))]:
        raise ZipperError(f"{option} {wrong[0]!r} is not NAME=VALUE. Write e.g. text=runs/tower.")
    if len(found) < len(items):
        raise ZipperError(
            f"{option} says of one name two things: {', '.join(items)}. Leave one out."
        )
    return found


def reproduce(given: argparse.Namespace) -> int:
    """zipper reproduce"""
    from contextlib import nullcontext, redirect_stdout

    from zipper.saving.files import held, read_json
    from zipper_lab import experiments, results

    if given.report:
        results.write(read_json(given.report), given.output)
        return 0
    _writable(given.output / "results.json")
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    said = [
        f"--preset {given.preset}",
        "--quick" * given.quick,
        f"--only {given.only}" * bool(only),
    ]
    said.append(f"--judge {given.judge}" * bool(given.judge))
    with held(given.output), redirect_stdout(sys.stderr) if given.json else nullcontext():
        found, failed = experiments.reproduce(
            given.preset,
            given.output,
            given.quick,
            only,
            given.workers,
            str(given.judge.absolute()) if given.judge else "",
            " ".join(["zipper reproduce", *filter(None, said)]),
        )
    if given.json:
        print(json.dumps(found, indent=1))
    for name, why in failed.items():
        print(f"zipper reproduce: {name} failed: {why}", file=sys.stderr)
    return int(bool(failed))


def push(given: argparse.Namespace) -> None:
    """zipper push"""
    import tempfile

    from zipper.model import Zipper
    from zipper.pipeline import PINS, Pipeline
    from zipper.saving import checkpoint, hub

    with tempfile.TemporaryDirectory() as place:
        folder = given.model
        if given.include or given.towers:
            kind = Pipeline if (given.model / PINS).is_file() else Zipper
            record = checkpoint.load(given.model)[1]
            model = kind.from_pretrained(given.model, _named("--tower", given.towers), dtype=None)
            folder = Path(place) / "zip"
            model.save_pretrained(folder, [*given.include, *model.inside(given.model)], record)
        print(
            hub.push(
                folder,
                given.repo,
                private=given.private,
                revision=given.revision,
                message=given.message,
            )
        )


def bench_all(given: argparse.Namespace) -> None:
    """zipper bench"""
    from zipper_lab.bench import summary

    _benchmark(given, lambda: summary.bench(hardware=given.hardware), summary.table)


def bench_train(given: argparse.Namespace) -> None:
    """zipper bench train"""
    from zipper_lab.bench import train as benchmark

    _benchmark(
        given,
        lambda: benchmark.bench(
            given.size,
            given.rounds,
            given.warm,
            given.arms.split(",") if given.arms else (),
            given.pairs,
            given.room,
            given.device,
            given.precision,
            given.attention,
            given.threads,
            given.hardware,
        ),
        benchmark.table,
    )


def bench_decode(given: argparse.Namespace) -> None:
    """zipper bench decode"""
    from zipper_lab.bench import decode as benchmark

    _benchmark(
        given,
        lambda: benchmark.bench(
            given.size,
            given.rounds,
            given.warm,
            given.arms.split(",") if given.arms else (),
            given.source,
            given.tokens,
            given.precision,
            given.device,
            given.threads,
            given.hardware,
            given.batch,
        ),
        benchmark.table,
    )


def bench_speech(given: argparse.Namespace) -> None:
    """zipper bench speech"""
    from zipper_lab.bench import speech as benchmark

    bases = _named("--tower", given.towers)
    measured = partial(
        benchmark.bench,
        given.rounds,
        1,
        given.model,
        given.utterances,
        given.threads,
        given.hardware,
        bases,
    )
    _benchmark(given, measured, benchmark.table)


def bench_start(given: argparse.Namespace) -> None:
    """zipper bench start"""
    from zipper_lab.bench import start as benchmark

    beside = _named("--beside", given.beside)
    _benchmark(
        given,
        lambda: benchmark.bench(given.rounds, 1, given.model, beside, given.hardware),
        benchmark.table,
    )


def _benchmark(
    given: argparse.Namespace,
    measure: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measure, write where it was asked for, print."""
    from zipper_lab import bench

    if given.output:
        _writable(given.output.with_suffix(".json"))
    found = measure()
    lines = table(found)
    bench.write(given.output, found, lines)
    print(json.dumps(found, indent=1) if given.json else lines)


def towers(given: argparse.Namespace) -> None:
    """zipper towers"""
    import dataclasses

    from tqdm import tqdm

    from zipper.towers import families

    chosen = given.family or families.names()
    found = [
        families.tried(name) for name in tqdm(chosen, desc="towers", unit="family", disable=None)
    ]
    print(
        json.dumps([dataclasses.asdict(family) for family in found], indent=1)
        if given.json
        else families.table(found)
    )
