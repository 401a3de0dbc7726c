"""The runner of `make gpu`: caps, failures and order, on stubs; and all of its sections in tiny
sizes."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
gpu = importlib.import_module("gpu")

STUB = """
import json, signal, subprocess, sys, time
from pathlib import Path
state, results, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]
said = state / "sections" / f"{name}.json"

def tell(**found):
    said.with_suffix(".part").write_text(json.dumps(found))
    said.with_suffix(".part").replace(said)

if name == "good":
    (written,) = results.glob("*.json")
    sections = json.loads(written.read_text())["sections"]
    tell(complete=True, found=len(sections), how=sections[name]["how"])
elif name == "bad":
    tell(half=1, traceback="Traceback: it broke here")
    sys.exit(3)
elif name == "silent":
    print("Segmentation fault")
    sys.exit(139)
elif name == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
    tell(half=1, child=child.pid)
    time.sleep(600)
elif name == "polite":
    def ended(number, frame):
        tell(half=2, saved=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, ended)
    tell(half=1)
    time.sleep(600)
"""


def section(name: str, cap_s: float, *needs: str) -> tuple[str, str, Any]:
    return name, "", gpu.Section(name, cap_s, lambda told: {}, needs)


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose sections are stubs, by its limit."""
    monkeypatch.setattr(gpu, "hardware", lambda: "NVIDIA Stub 80GB")
    monkeypatch.setattr(gpu, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu, "ENDING_S", 0.5)
    monkeypatch.setattr(gpu, "EVERY_S", 0.05)
    (tmp_path / "stub.py").write_text(STUB)
    command = [
        sys.executable,
        str(tmp_path / "stub.py"),
        str(tmp_path / "state"),
        str(tmp_path / "out"),
    ]
    return lambda limit: gpu.Run(tmp_path / "out", tmp_path / "state", "gpu", limit, command)


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_section_that_falls_over_leaves_why_and_the_next_begin(
    stubbed: Any, tmp_path: Path
) -> None:
    wanted = [
        section("bad", 60),
        section("silent", 60),
        section("good", 60, "no_such_package"),
        section("good", 60),
    ]
    wanted[2] = ("left", *wanted[2][1:])
    found = stubbed(120).run(wanted)
    assert found == written(tmp_path / "out")
    parts = found["sections"]
    assert {name: part["how"] for name, part in parts.items()} == {
        "bad": "failed",
        "silent": "failed",
        "left": "left out",
        "good": "done",
    }
    assert parts["bad"]["found"] == {"half": 1, "traceback": "Traceback: it broke here"}
    assert (
        "code 3: Traceback: it broke here" in parts["bad"]["why"]
        and "Segmentation fault" in parts["silent"]["said"]
    )
    assert "it needs no_such_package" in parts["left"]["why"]
    assert parts["good"]["found"] == {"found": 4, "how": "running"}, (
        "what there is can be read while a section runs"
    )
    lines = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| bad | failed: code 3" in lines and "# Ten minutes of NVIDIA Stub 80GB" in lines
    assert {path.name.partition("_2")[0] for path in (tmp_path / "out").iterdir()} == {
        "gpu_stub-80gb"
    }
    assert (
        set(found["machine"]["versions"]) > {"python", "torch", "transformers"}
        and len(found["machine"]["source"]) == 64
    )


@pytest.mark.parametrize(
    ("name", "ending_s", "left"),
    [("deaf", 0.5, {"half": 1}), ("polite", 60.0, {"half": 2, "saved": True})],
)
def test_a_section_past_its_cap_is_asked_to_end_and_then_ended_with_all_that_it_started(
    name: str,
    ending_s: float,
    left: dict[str, Any],
    stubbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock jumps to where it is asked as soon as the stub has begun, however busy the machine
    is."""
    said = tmp_path / "state" / "sections" / f"{name}.json"
    late = SimpleNamespace(sleep=time.sleep, strftime=time.strftime)
    late.monotonic = lambda: time.monotonic() + (1000 - ending_s + 0.1 if said.exists() else 0)
    monkeypatch.setattr(gpu, "time", late)
    monkeypatch.setattr(gpu, "ENDING_S", ending_s)
    parts = stubbed(5000).run([section(name, 1000), section("good", 600)])["sections"]
    assert {name: part["how"] for name, part in parts.items()} == {
        name: "ended at its cap",
        "good": "done",
    }
    child = parts[name]["found"].pop("child", None)
    assert parts[name]["found"] == left and (child is None or not alive(child))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_section_ends_with_its_runner(number: int, tmp_path: Path) -> None:
    """Else it would write beside the next runner's."""
    code = f"""
import dataclasses, sys, time; sys.path.insert(0, {str(ROOT / "tools")!r}); import gpu
from pathlib import Path
gpu.hardware, gpu.ENDING_S, gpu.EVERY_S = lambda: "a card", 0.2, 0.05
def waits(told):
    told.tell({{"process": __import__("os").getpid()}})
    time.sleep(600)
gpu.SECTIONS = (gpu.Section("limits", 500, waits),)
gpu.planned.__defaults__ = (gpu.SECTIONS,)
gpu.__file__ = __file__
sys.exit(gpu.main(sys.argv[1:]))
"""
    (tmp_path / "runner.py").write_text(code)
    command = [
        sys.executable,
        str(tmp_path / "runner.py"),
        "--output",
        str(tmp_path / "out"),
        "--state",
        str(tmp_path / "state"),
    ]
    said = tmp_path / "state" / "gpu" / "sections" / "limits.json"
    with subprocess.Popen(command) as runner:
        while not said.exists():
            assert runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(number)
    process = json.loads(said.read_text())["process"]
    until = time.monotonic() + 300
    while alive(process) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(process)


def test_the_whole_never_passes_its_limit(stubbed: Any) -> None:
    found = stubbed(3).run([section("deaf", 600), section("polite", 600)])
    assert (
        found["sections"]["deaf"]["cap_s"] <= 3 and found["sections"]["polite"]["how"] == "left out"
    )


def test_caps_leave_time_for_the_last_section_and_models_come_in_turn() -> None:
    names = [name for name, _, _ in gpu.planned(gpu.SIZES["gpu"])]
    assert names == [
        "limits",
        "tests",
        "decode 0.5b",
        "decode 1.5b",
        "steps 0.5b",
        "steps 1.5b",
        "compiled",
        "align",
    ]
    caps = [part.cap_s for _, _, part in gpu.planned(gpu.SIZES["gpu"])]
    assert sum(caps[:-1]) + gpu.LEAST_S < gpu.SIZES["gpu"].limit_s <= 540


def test_a_machine_without_a_gpu_is_told_so_and_unknown_sections_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "hardware", lambda: "2 cores")
    assert (
        gpu.main(["--output", str(tmp_path)]) == 2
        and "no torch with a CUDA device" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        gpu.main(["--size", "tiny", "--only", "decod", "--output", str(tmp_path)])
    assert "there are limits, tests, decode" in capsys.readouterr().err and not [
        *tmp_path.iterdir()
    ]
    with pytest.raises(SystemExit):
        gpu.main(["--size", "tiny", "--only", "decode,decod", "--output", str(tmp_path)])
    assert "there is no section 'decod'" in capsys.readouterr().err


def test_word_edits_are_the_least() -> None:
    assert gpu._edits("a b c".split(), "a c d".split()) == 2
    assert (
        gpu._edits([], ["a"]) == 1
        and gpu._edits(["a"], []) == 1
        and gpu._edits(["a", "b"], ["b", "a"]) == 2
    )


def test_units_by_a_rule_say_their_sentences(tmp_path: Path) -> None:
    ground = gpu.corpus(tmp_path / "data", 30, 20, 10)
    rows = [json.loads(line) for line in Path(ground["ground"]["data"]).read_text().splitlines()]
    assert len(rows) == 30 and all(
        len(row["text"]) <= len(row["speech"]) <= 3 * len(row["text"]) for row in rows
    )
    assert {i for row in rows for i in row["speech"]} <= {*range(512)} and len(
        {row["voice"] for row in rows}
    ) > 3
    before = Path(ground["ground"]["data"]).stat().st_mtime_ns
    assert gpu.corpus(tmp_path / "data", 99, 99, 9) == ground
    assert Path(ground["ground"]["data"]).stat().st_mtime_ns == before, "it is made once"


@pytest.mark.slow
def test_every_section_runs_in_tiny_sizes_and_the_last_goes_on_where_it_stood(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "tools/gpu.py", "--size", "tiny", "--state", str(tmp_path / "state")]
    subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, check=True)
    parts = written(tmp_path / "out")["sections"]
    assert {name: part["how"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    assert not any(
        one.get("lost")
        for part in parts.values()
        for one in part["found"].values()
        if isinstance(one, dict)
    )
    assert parts["align"]["found"]["asr"]["sentences"] == 8
    subprocess.run(
        [*command, "--only", "align", "--output", str(tmp_path / "again")], cwd=ROOT, check=True
    )
    again = written(tmp_path / "again")["sections"]["align"]["found"]
    assert [again[name]["done"] for name in ("tower text-S", "tower speech", "zip")] == [True] * 3
    assert not any("rows" in again[name] for name in ("tower text-S", "tower speech", "zip")), (
        "nothing was trained again"
    )
