"""What zipper stands on, on this machine, and a self-check of some seconds: is it there, was it
tried, does it work?

A missing extra, compiler or GPU is no fault; what is installed and does not work is. torch and
transformers are imported only where they are examined, since they may be what is broken.
"""

import dataclasses
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import Any, Literal, final

from zipper import environment
from zipper.environment import (
    BrokenExtra,
    MissingExtra,
    extra,
    importable,
    installed,
    numbers,
    tried,
)
from zipper.former import names_of

__getattr__ = names_of(__name__, ())

SENTENCE = "send forty two oranges to vienna"  # what the shipped model has to say, and to hear


@final
@dataclass(frozen=True)
class Finding:
    """One thing: what of it was found, and what to do. versions: of its packages, None where one is
    not there."""

    name: str
    state: Literal["ok", "missing", "untried", "broken"]
    said: str
    todo: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)


def examine() -> list[Finding]:
    """Everything, in the order in which it is printed."""
    ground = [_ground(name) for name in tried()]
    there = [_extra(name, packages) for name, packages in environment.extras().items()]
    if any(finding.state == "broken" for finding in ground):
        return [*ground, *there]
    checks = {
        "compiler": _compiler,
        "cuda": _cuda,
        "tiny zip": _tiny_zip,
        "shipped model": _shipped,
    }
    return [*ground, *there, *(_checked(name, check) for name, check in checks.items())]


def works(findings: Sequence[Finding]) -> bool:
    """Whether nothing that is installed is broken."""
    return all(finding.state != "broken" for finding in findings)


def record(findings: Sequence[Finding]) -> dict[str, Any]:
    """For a program: {"works": ..., "findings": {name: ...}}."""
    found = {
        finding.name: {
            key: value for key, value in dataclasses.asdict(finding).items() if key != "name"
        }
        for finding in findings
    }
    return {"works": works(findings), "findings": found}


def text(findings: Sequence[Finding]) -> str:
    """A line for each, for a terminal."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.name:14} {finding.said}")
        if finding.todo:
            lines.append(f"{'':23} {finding.todo}")
    return "\n".join(lines)


def _ground(name: str) -> Finding:
    """python, torch or transformers."""
    here = python_version() if name == "python" else installed(name)
    if here is None:
        return Finding(name, "broken", "not installed", environment.known_ground(), {name: None})
    if name != "python":
        try:
            extra(name)
        except MissingExtra as error:
            return Finding(
                name,
                "broken",
                f"{here}: {error.__cause__}",
                environment.known_ground(),
                {name: here},
            )
    known, versions = ", ".join(tried()[name]), {name: here}
    same = [
        version
        for version in tried()[name]
        if numbers(here)[: len(numbers(version))] == numbers(version)
    ]
    if same:
        return Finding(name, "ok", f"{here}, tried", "", versions)
    if environment.newer(name, here):
        todo = (
            f"Where it does not work: {environment.known_ground()}"
            if name in environment.MOVING
            else ""
        )
        return Finding(
            name, "untried", f"{here} is newer than any that was tried ({known})", todo, versions
        )
    return Finding(
        name, "untried", f"{here} is none of those that were tried ({known})", "", versions
    )


def _extra(name: str, packages: Sequence[str]) -> Finding:
    """What of it is installed, and whether that can be imported."""
    versions = {package: installed(package) for package in packages}
    absent, broken = [], []
    for package in packages:
        try:
            extra(importable(package))
        except Exception as error:  # whatever it does when it is imported
            if isinstance(error, MissingExtra) and not isinstance(error, BrokenExtra):
                absent.append(package)
            else:
                broken.append(f"{package}: {error.__cause__ or error}")
    named, todo = f"extra {name}", f"For it: {environment.install(name)}"
    versions |= dict.fromkeys(absent)
    if broken:
        return Finding(named, "broken", f"does not load: {'; '.join(broken)}", todo, versions)
    if absent:
        return Finding(named, "missing", f"without {', '.join(absent)}", todo, versions)
    return Finding(
        named,
        "ok",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        "",
        versions,
    )


def _checked(name: str, check: Callable[[], tuple[str, str, str]]) -> Finding:
    """A check that fails in any way has found something broken."""
    try:
        state, said, todo = check()
    except Exception as error:
        state, said = "broken", " ".join(f"{type(error).__name__}: {error}".split())
        todo = (
            environment.known_ground()
            if environment.untried()
            else "ZIPPER_DEBUG=1 zipper show says where, if it is the model."
        )
    return Finding(name, state, said, todo)  # type: ignore[arg-type]


def _compiler() -> tuple[str, str, str]:
    """Whether the step that decoding takes on a CPU is compiled."""
    from zipper.fast import native

    try:
        name = native.compiler()[0]
    except ValueError as error:
        return "broken", f"CXX cannot be read: {error}", "Mend it, or leave it out."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        library = native.library()
    if library is not None:
        return "ok", f"{shutil.which(name) or name}, the step of decoding is compiled", ""
    if os.environ.get("ZIPPER_NATIVE") == "0":
        return "ok", "not wanted (ZIPPER_NATIVE=0): decoding goes by torch's kernels", ""
    if shutil.which(name) is None:
        todo = "Install g++ or clang++ with OpenMP, or name yours in CXX."
        return (
            "missing",
            f"there is no {name}: decoding goes by torch's kernels and takes about twice as long",
            todo,
        )
    why = " ".join(str(said[-1].message).split()) if said else f"{name} does not build the step"
    return "broken", why, ""


def _cuda() -> tuple[str, str, str]:
    """Whether there is a GPU that computes."""
    import torch

    built = (
        f"torch is built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "torch is built for the CPU"
    )
    if not torch.cuda.is_available():
        return "missing", f"{built}, no GPU is seen: everything runs on the CPU", ""
    found = []
    for index in range(torch.cuda.device_count()):
        square = torch.eye(64, device=f"cuda:{index}")
        if not torch.equal(square @ square, square):
            return "broken", f"{built}, the GPU {index} computes wrongly", ""
        found.append(torch.cuda.get_device_name(index))
    return "ok", f"{built}: {', '.join(found)}", ""


def _tiny_zip() -> tuple[str, str, str]:
    """A random zip of two families: forward, cached, packed and generated, against one another."""
    from zipper.model import Zipper
    from zipper.strand import Ends, Segment
    from zipper.towers import families
    from zipper.verify import verify

    ends = {"one": Ends(0, 1), "two": Ends(0, 1)}
    towers = {"one": families.tiny("gpt2"), "two": families.tiny("llama")}
    model = Zipper.from_towers(towers, every={"one": 2, "two": 2}, ends=ends)
    checks = verify(model)
    if broken := [f"{check.promise} ({check.measured})" for check in checks if not check.held]:
        return "broken", "; ".join(broken), environment.moved()
    said = model.generate(
        [Segment("one", [5, 6, 7])], outputs=["two", "one"], limits={"one": 4, "two": 4}
    )
    written = ", ".join(f"{len(segment.content)} of {segment.tower}" for segment in said)
    return (
        "ok",
        f"{len(checks)} promises hold (no leaks, cached = full, packed = separate); generates "
        f"{written}",
        "",
    )


def _shipped() -> tuple[str, str, str]:
    """The model that comes with the package says something and understands it, by way of a file
    where one can be written."""
    from zipper.audio import sound as audio
    from zipper.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained()
    sound = pipeline.speak(SENTENCE)
    try:
        extra("soundfile")
    except MissingExtra:  # that is said elsewhere
        way = "without a file"
    else:
        way = "by way of a file"
        with tempfile.TemporaryDirectory() as folder:
            audio.write(Path(folder) / "said.wav", sound)
            sound = audio.read(Path(folder) / "said.wav")
    heard = pipeline.transcribe(sound)
    said = f"says '{SENTENCE}' in {sound.seconds:.1f} s of sound and hears '{heard}', {way}"
    state = "ok" if heard == SENTENCE else "broken"
    return state, said, ""
