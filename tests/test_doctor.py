"""The doctor says what is here, what is missing and what does not work, and only the last is a
failure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zipper import cli, doctor, environment
from zipper.doctor import Finding
from zipper.fast import native
from zipper.verify import Check

#: An environment in which nothing is broken: a transformers that nobody tried, no compiler, no
#: soundfile.
DOCTORED = """
import sys, transformers
sys.modules["soundfile"] = None
sys.modules["transformers"].__version__ = "5.99.0"
from zipper.cli import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_a_doctored_environment_is_described_and_works(tmp_path: Path) -> None:
    given = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    given = {name: value for name, value in given.items() if name not in ("CXX", "ZIPPER_NATIVE")}
    done = subprocess.run(
        [sys.executable, "-c", DOCTORED, "--json"], env=given, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["works"]
    by = found["findings"]
    assert {
        name: finding["state"] for name, finding in by.items() if not name.startswith("extra")
    } == {
        "python": "ok"
        if environment.installed("python") in environment.tried()["python"]
        else "untried",
        "torch": by["torch"]["state"],
        "transformers": "untried",
        "compiler": "missing",
        "cuda": "ok" if torch.cuda.is_available() else "missing",
        "tiny zip": "ok",
        "shipped model": "ok",
    }
    newest = environment.tried()["transformers"][-1]
    assert (
        "5.99.0 is newer than any that was tried" in by["transformers"]["said"]
        and newest in by["transformers"]["todo"]
    )
    assert (
        by["extra speech"]["state"] == "missing"
        and "without soundfile" in by["extra speech"]["said"]
    )
    assert by["extra speech"]["todo"] == "For it: pip install 'zipper-lm[speech]'"
    assert (
        by["extra speech"]["versions"]["soundfile"] is None
        and by["extra speech"]["versions"]["soxr"]
    )
    assert "there is no c++" in by["compiler"]["said"]
    assert (
        "without a file" in by["shipped model"]["said"]
        and by["shipped model"]["said"].count(doctor.SENTENCE) == 2
    )


def test_every_extra_of_the_project_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_checked", lambda name, check: Finding(name, "ok", ""))
    found = [finding.name for finding in doctor.examine()]
    assert found == [
        *environment.tried(),
        *(f"extra {name}" for name in environment.extras()),
        *found[-4:],
    ]
    assert found[-4:] == ["compiler", "cuda", "tiny zip", "shipped model"]


def test_what_is_installed_and_does_not_load_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soxr.py").write_text("raise AttributeError('built for another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soxr", raising=False)
    found = doctor._extra("speech", environment.extras()["speech"])
    assert (
        found.state == "broken"
        and "soxr: built for another numpy" in found.said
        and not doctor.works([found])
    )


def test_a_torch_that_does_not_load_is_said_and_nothing_that_needs_it_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    found = {finding.name: finding for finding in doctor.examine()}
    assert (
        found["transformers"].state == "broken"
        and found["transformers"].todo == environment.known_ground()
    )
    assert "tiny zip" not in found


def test_a_compiler_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho 'no OpenMP here' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.delenv("ZIPPER_NATIVE", raising=False)
    native.library.cache_clear()
    try:
        found = doctor._checked("compiler", doctor._compiler)
    finally:
        native.library.cache_clear()
    assert found.state == "broken" and "no OpenMP here" in found.said
    monkeypatch.setenv("CXX", "'c++")
    found = doctor._checked("compiler", doctor._compiler)
    assert found.state == "broken" and "CXX cannot be read: No closing quotation" in found.said


def test_a_broken_promise_and_a_crash_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "zipper.verify.verify",
        lambda model: [Check("no leak", False, "3 of 9"), Check("cached", True, "0")],
    )
    found = doctor._checked("tiny zip", doctor._tiny_zip)
    assert (found.state, found.said) == ("broken", "no leak (3 of 9)")

    def crash() -> tuple[str, str, str]:
        raise RuntimeError("two\nlines")

    found = doctor._checked("shipped model", crash)
    assert (found.state, found.said) == ("broken", "RuntimeError: two lines")


def test_the_exit_code_is_1_only_where_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[Any] = [
        Finding("a", "ok", "1.0"),
        Finding("b", "missing", "without c", "Do: d"),
        Finding("e", "untried", "2.0"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: said)
    assert cli.main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["ok", "a", "1.0"],
        ["missing", "b", "without", "c"],
        ["Do:", "d"],
        ["untried", "e", "2.0"],
    ]
    said.append(Finding("f", "broken", "no"))
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"]["f"]["state"] == "broken"
