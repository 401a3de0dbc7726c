"""tools/versions.py: what is asked of pip and what is made of its answer; pip itself and the gate
are stand-ins here."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from zipper import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, with files of its own."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "constraints.txt").write_text(
        "# head\nhere==1.0\nold==2.0\ntorch==2.13.0\ntransformers==5.24.0\n"
    )
    (tmp_path / "tried.json").write_text(
        json.dumps({"python": ["3.11"], "torch": ["2.13.0"], "transformers": ["5.5.0", "5.24.0"]})
    )
    monkeypatch.setattr(module, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(environment, "TRIED", tmp_path / "tried.json")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    environment.tried.cache_clear()
    yield module
    environment.tried.cache_clear()


def report(**packages: str) -> str:
    """What `pip install --report` writes of these."""
    named = {
        "zipper-lm": "0.1.0",
        "nvidia-cublas": "13.1",
        "triton": "3.6",
        "setuptools": "81.0",
    } | packages
    return json.dumps(
        {
            "install": [
                {"metadata": {"name": name, "version": version}} for name, version in named.items()
            ]
        }
    )


def test_the_lowest_of_every_direct_dependency_is_the_bound_itself(
    monkeypatch: pytest.MonkeyPatch, versions: Any
) -> None:
    monkeypatch.setattr(versions, "ROOT", ROOT)
    wanted = {requirement.name: requirement for requirement in map(Requirement, versions.lowest())}
    ranges = [
        Requirement(name + bound)
        for part in versions.ranges().values()
        for name, bound in part.items()
    ]
    assert {r.name for r in ranges} - wanted.keys() == {"ruff"}  # pinned to a minor version
    for allowed in ranges:
        for bound in allowed.specifier if allowed.name != "ruff" else ():
            assert bound.operator == ">=", (
                f"{allowed}: an upper bound stands only where a failure is known"
            )
            (lowest,) = wanted[allowed.name].specifier
            assert Version(lowest.version) == Version(bound.version)


def test_an_upgrade_writes_pins_without_builds_and_says_what_moved(
    versions: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    new = report(here="1.0", New_One="0.1", torch="2.13.0+cpu", transformers="5.25.0")
    code = 0

    def run(command: list[str], **_: Any) -> Any:
        asked.append([str(word) for word in command])
        return SimpleNamespace(stdout=new, returncode=code)

    monkeypatch.setattr(versions, "ranges", lambda: {"": {}, "speech": {}, "dev": {}})
    monkeypatch.setattr(subprocess, "run", run)
    assert versions.upgrade(None) == 0
    assert asked[0][-2:] == [".[speech,dev]", "torch==2.13.0"] and "--ignore-installed" in asked[0]
    assert asked[1] == ["make", "check"]
    pins = versions.pins(versions.CONSTRAINTS.read_text())
    assert pins == {"here": "1.0", "new-one": "0.1", "torch": "2.13.0", "transformers": "5.25.0"}
    moved = [re.split(r" +(?:-> )?", line) for line in capsys.readouterr().out.splitlines()]
    assert (
        moved
        == [["new-one", "-", "0.1"], ["old", "2.0", "-"], ["transformers", "5.24.0", "5.25.0"]] * 2
    )
    assert environment.tried()["transformers"] == ("5.5.0", "5.24.0", "5.25.0")
    assert versions.upgrade(None) == 0 and capsys.readouterr().out == "Nothing moved.\n"
    new, code = report(here="1.1", torch="2.13.0", transformers="5.25.0"), 2
    assert (
        versions.upgrade(None) == 2
        and "The gate is red. Repair it, or go back: git checkout" in capsys.readouterr().out
    )


def test_a_row_is_pinned_by_uv_without_extras(
    versions: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def run(command: list[Any], **_: Any) -> None:
        asked.append([*map(str, command)])
        (tmp_path / "constraints.txt").write_text(
            "ray[serve]==2.50\nclick==8.5.1\n    # via ray[x]\n"
        )

    monkeypatch.setattr(versions, "pip", lambda *_: "")
    monkeypatch.setattr(versions, "ranges", lambda: {"": {}, "serve": {}, "ray": {}})
    monkeypatch.setattr(versions.subprocess, "run", run)
    found = versions.settled(tmp_path / "bin" / "python", ["ray[default,serve]==2.50", "jiwer==3"])
    assert (tmp_path / "wanted.txt").read_text() == "ray==2.50\njiwer==3\n"
    assert found.read_text() == "ray==2.50\nclick==8.5.1\n    # via ray[x]\n"
    assert asked[0][1:5] == ["-m", "uv", "pip", "compile"]
    assert asked[0][7:11] == ["--extra", "serve", "--extra", "ray"]


def test_a_row_that_fails_is_not_recorded(
    versions: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "lowest": ({"torch": "2.11.0+cu130", "transformers": "5.4.0", "python": "3.12"}, "passed"),
        "newest": ({"torch": "2.14.1", "transformers": "5.30.0", "python": "3.12"}, "failed"),
        "transformers-5.5.0": ({}, "does not install"),
    }
    monkeypatch.setattr(versions, "ENVIRONMENTS", versions.ROOT / "matrix")
    monkeypatch.setattr(versions, "lowest", list)
    monkeypatch.setattr(versions, "tried", lambda row, wanted, tests, workers: found[row])
    assert versions.matrix([*found], ["tests"], 1) == 1
    assert environment.tried() == {
        "python": ("3.11", "3.12"),
        "torch": ("2.11.0", "2.13.0"),
        "transformers": ("5.4.0", "5.5.0", "5.24.0"),
    }
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["lowest", "passed"],
        ["newest", "failed"],
        ["transformers-5.5.0", "does"],
    ]
    assert versions.matrix(["lowest"], ["tests"], 1) == 0
    with pytest.raises(SystemExit, match="There are no rows"):
        versions.matrix(["oldest"], ["tests"], 1)
