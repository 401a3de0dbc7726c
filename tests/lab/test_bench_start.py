"""The benchmark of whole processes: whose time is counted, who takes turns, what is said of it."""

import json
from pathlib import Path

import pytest

from zipper.cli import main
from zipper.errors import ZipperError
from zipper_lab.bench import in_turn, start

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BUSY = "import time\nwhile time.process_time() < 0.3: pass"
ASLEEP = "import time; time.sleep(0.3)"
PARENT = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {BUSY!r}], check=True)"
)


def test_work_is_counted_also_that_of_children_and_sleep_is_not(tmp_path: Path) -> None:
    busy, asleep, parent = (
        start._turn(tmp_path, ["-S", "-c", code], None) for code in (BUSY, ASLEEP, PARENT)
    )
    assert busy["cpu_s"] >= 0.3 and parent["cpu_s"] >= 0.3
    assert asleep["seconds"] >= 0.3 > asleep["cpu_s"]


def test_another_version_is_the_one_that_runs_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packages of the same name, one of them by a relative path."""
    for version in ("here", "there"):
        (tmp_path / version / "zipper").mkdir(parents=True)
        (tmp_path / version / "zipper" / "__init__.py").write_text("")
        (tmp_path / version / "zipper" / "__main__.py").write_text(
            f"import pathlib, sys; print('{version}', *sys.argv[1:], "
            f"file=open({str(tmp_path / 'log')!r}, 'a'))"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setattr(start, "BARE", "import this")
    found = start.bench(2, 0, str(tmp_path / "zip"), {"before": str(tmp_path / "there")})
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("here speak") and len(lines) == 1 + 2 * 2 * len(start.COMMANDS)
    first, second = lines[1 : 1 + 2 * len(start.COMMANDS)], lines[1 + 2 * len(start.COMMANDS) :]
    assert second == first[::-1], "there and back"
    assert first[:4] == [
        "there --help",
        "here --help",
        f"there show {tmp_path / 'zip'}",
        f"here show {tmp_path / 'zip'}",
    ]
    assert all(
        f"--model {tmp_path / 'zip'}" in line
        for line in lines
        if "speak" in line or "transcribe" in line
    )
    assert [row["above"] for row in found["ratios"] if row["below"] == "speak"] == ["speak, before"]
    assert found["settings"]["model"] == "zip" and str(tmp_path) not in json.dumps(
        found["settings"]
    )
    shown = start.markdown(found)
    assert shown.count("\n| ") == 2 + 9 + 8 + 4 and "| speak, before / speak |" in shown


def test_a_command_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZipperError, match=r"(?s)ended with code 1: .*no such luck"):
        start._turn(tmp_path, ["-c", "raise SystemExit('no such luck')"], None)
    assert main(["bench", "start", "--model", str(tmp_path / "none"), "--rounds", "1"]) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert main(["bench", "start", "--beside", "before"]) == 2
    assert "--beside 'before' is not NAME=VALUE" in capsys.readouterr().err


def test_turns_go_there_and_back() -> None:
    said: list[str] = []

    def turn(name: str) -> dict[str, float]:
        said.append(name)
        return {"number": float(len(said))}

    found = in_turn({"a": lambda: turn("a"), "b": lambda: turn("b")}, 2, 1)
    assert said == ["a", "b", "b", "a", "a", "b"]
    assert found == {
        "a": [{"number": 4.0}, {"number": 5.0}],
        "b": [{"number": 3.0}, {"number": 6.0}],
    }


def test_what_the_readme_says_of_it_is_what_was_measured() -> None:
    found = json.loads((RESULTS / "start_2cpu_202611.json").read_text(encoding="utf-8"))
    assert (RESULTS / "start_2cpu_202611.md").read_text(encoding="utf-8") == start.markdown(found)
    arms = found["arms"]
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ("transcribe", "speak"):
        assert f"{arms[name]['cpu_s']:.1f} s" in readme
