"""Extraction: one pass over a corpus leaves unit files that are the same bytes whoever worked and
however often it was killed."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from zipper import cli
from zipper.audio import disturbance
from zipper.audio import sound as audio
from zipper.data import extraction, rows
from zipper.data import manifests as data
from zipper.data.extraction import Job, Policy, Record, _bear, extract, processes
from zipper.errors import MissingExtra, ZipperError
from zipper.saving.files import held

MODALITIES = {"text": tiny.text(), "speech": tiny.units()}
HERE = processes(1)


def many(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ids, of all lengths."""
    chance = random.Random(seed)
    return [
        {
            "id": f"n{i}",
            "text": chance.choices(range(2, 42), k=chance.randrange(9)),
            "speech": [i % 24],
        }
        for i in range(n)
    ]


def spoil(path: Path, which: Iterable[int]) -> None:
    """Every way in which a line can be bad, in turn."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(which):
        ways = [
            lines[line][: len(lines[line]) // 2],
            "[]",
            '{"id": 1}',
            '{"speech": [99], "id": "x"}',
            '{"text": "€"}',
            '{"speech": "a"}',
        ]
        lines[line] = ways[number % len(ways)]
    path.write_text("".join(line + "\n" for line in lines))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_unit_files_hold_what_reading_the_manifest_gives(tmp_path: Path) -> None:
    tiny.sound(tmp_path / "a.wav", seconds=0.7)
    raw = [
        *tiny.pairs(7),
        {"text": "call"},
        {"speech": []},
        {"id": "said", "speech": "a.wav", "question:text": "send"},
        {"text": [3], "duration": 2.5},
    ]
    data.write(tmp_path / "rows.jsonl", raw)
    found = extract(
        str(tmp_path / "rows.jsonl"), tmp_path / "units", MODALITIES, shard=4, spread=HERE
    )
    wanted = data.read(tmp_path / "rows.jsonl", MODALITIES)
    assert [found[i] for i in range(len(found))] == wanted
    assert [found.name(i) for i in range(7)] == [row["id"] for row in raw[:7]] and found.name(
        9
    ) == "said"
    assert found.lengths.tolist() == [sum(map(len, row.values())) for row in wanted]
    assert found.lengths_of("text").tolist() == [
        len(row.get("text", "-")) if "text" in row else -1 for row in wanted
    ]
    assert found.seconds.tolist() == pytest.approx([0.0] * 9 + [0.7, 2.5])
    assert list(data.read(tmp_path / "units", MODALITIES, limit=3)) == wanted[:3]
    told = rows.provenance(tmp_path / "units")
    assert told["fields"]["question"] == {
        "rows": 1,
        "ids": len(wanted[9]["question"]),
        "longest": len(wanted[9]["question"]),
        "empty": 0,
    }
    assert (told["samples"], told["rows"], told["bad"], told["seconds"]) == (11, 11, 0, 3.2)
    assert told["modalities"] == {
        name: modality.fingerprint for name, modality in MODALITIES.items()
    }


@pytest.mark.slow
def test_of_10_000_samples_100_are_bad_and_the_others_are_as_in_a_clean_pass(
    tmp_path: Path,
) -> None:
    data.write(tmp_path / "clean.jsonl", many(10_000))
    (tmp_path / "dirty.jsonl").write_bytes((tmp_path / "clean.jsonl").read_bytes())
    bad = sorted(random.Random(1).sample(range(10_000), 100))
    spoil(tmp_path / "dirty.jsonl", bad)
    clean = extract(str(tmp_path / "clean.jsonl"), tmp_path / "clean", MODALITIES, spread=HERE)
    dirty = extract(
        str(tmp_path / "dirty.jsonl"),
        tmp_path / "dirty",
        MODALITIES,
        Policy("skip", 0.01),
        spread=HERE,
    )
    good = sorted({*range(10_000)} - {*bad})
    assert (
        len(clean) == 10_000 and len(dirty) == 9_900 == rows.provenance(tmp_path / "dirty")["rows"]
    )
    assert list(dirty) == list(clean.select(np.array(good)))
    assert [dirty.name(i) for i in range(0, 9_900, 900)] == [
        f"n{good[i]}" for i in range(0, 9_900, 900)
    ]
    listed = data.manifest(tmp_path / "dirty" / "bad.jsonl")
    assert [line["where"] for line in listed] == [
        f"{tmp_path / 'dirty.jsonl'}, line {n + 1}" for n in bad
    ]
    assert all(line["why"].startswith(line["where"]) for line in listed)
    with pytest.raises(
        ZipperError, match=r"100 of 10000 samples are bad, .* share of 0.0099 that was allowed"
    ):
        extract(
            str(tmp_path / "dirty.jsonl"),
            tmp_path / "dirty",
            MODALITIES,
            Policy("skip", 0.0099),
            spread=HERE,
        )
    with pytest.warns(
        UserWarning, match=r"100 of 10000 samples are bad, .* All are listed in .*bad.jsonl"
    ):
        extract(
            str(tmp_path / "dirty.jsonl"),
            tmp_path / "dirty",
            MODALITIES,
            Policy("warn"),
            spread=HERE,
        )
    with pytest.raises(ZipperError, match=rf"dirty.jsonl, line {bad[0] + 1} is not JSON"):
        extract(str(tmp_path / "dirty.jsonl"), tmp_path / "dirty", MODALITIES, spread=HERE)


def test_broken_sound_files_are_left_out_and_counted(tmp_path: Path) -> None:
    for n in range(20):
        tiny.sound(tmp_path / f"{n:02d}.wav", seconds=0.2, seed=n)
    clean = list(
        extract(f"sounds:{tmp_path}", tmp_path / "clean", {"speech": tiny.units()}, spread=HERE)
    )
    (tmp_path / "03.wav").write_bytes(b"no sound")
    (tmp_path / "11.wav").write_bytes(b"")
    (tmp_path / "15.wav").unlink()
    (tmp_path / "15.wav").symlink_to("gone.wav")
    found = extract(
        f"sounds:{tmp_path}",
        tmp_path / "dirty",
        {"speech": tiny.units()},
        Policy("skip", 0.2),
        spread=HERE,
    )
    assert list(found) == [row for n, row in enumerate(clean) if n not in (3, 11, 15)]
    assert [line["id"] for line in data.manifest(tmp_path / "dirty" / "bad.jsonl")] == [
        "03",
        "11",
        "15",
    ]


def test_a_stopped_pass_goes_on_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    """At every shard of five."""
    data.write(tmp_path / "rows.jsonl", many(50))
    spoil(tmp_path / "rows.jsonl", [13, 14])

    def run(folder: str, report: Callable[[dict[str, float]], None] | None = None) -> rows.Rows:
        policy = Policy("skip", 0.1)
        return extract(
            str(tmp_path / "rows.jsonl"),
            tmp_path / folder,
            MODALITIES,
            policy,
            shard=10,
            spread=HERE,
            report=report,
        )

    run("whole")
    for stop in range(1, 5):
        made = []

        def report(seen: dict[str, float], stop: int = stop, made: list[float] = made) -> None:
            made.append(seen["samples"])
            if len(made) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(f"stopped{stop}", report)
        with pytest.raises(ZipperError, match="holds no finished unit files"):
            rows.Rows.open(tmp_path / f"stopped{stop}")
        made.clear()
        run(f"stopped{stop}", lambda seen, made=made: made.append(seen["samples"]))
        assert len(made) == 5 - stop, "what was there was made again"
        assert content(tmp_path / f"stopped{stop}") == {
            name: held.replace(b"whole", b"stopped%d" % stop)
            for name, held in content(tmp_path / "whole").items()
        }


def test_what_changed_is_made_anew_and_nothing_else(tmp_path: Path) -> None:
    source, folder, made = tmp_path / "rows.jsonl", tmp_path / "units", []
    for n in range(4):
        tiny.sound(tmp_path / f"{n}.wav", seconds=0.1)

    def run() -> rows.Rows:
        made.clear()
        return extract(
            str(source),
            folder,
            MODALITIES,
            shard=2,
            spread=HERE,
            report=lambda seen: made.append(seen["samples"]),
        )

    data.write(source, [{"speech": f"{n}.wav"} for n in range(4)])
    run()
    assert made == [2, 4]
    before = content(folder)
    run()
    assert made == [] and content(folder) == before
    tiny.sound(tmp_path / "3.wav", seconds=0.3)
    assert len(run()[3]["speech"]) == 9  # 0.3 s, 20 ms behind, and what lies before it on the grid
    assert made == [2] and len(list(folder.glob("*.safetensors"))) == 2
    shard = folder / rows.provenance(folder)["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ZipperError, match="is missing or damaged"):
        rows.check(folder)
    run()
    rows.check(folder)
    with pytest.raises(
        ZipperError, match="holds the units of another source, part, tokenizer or codebook"
    ):
        extract(str(source), folder, MODALITIES | {"speech": tiny.units(seed=1)}, spread=HERE)
    with pytest.raises(
        ZipperError,
        match=r"made with another 'speech' than the one given.*Give .*units/modalities/speech",
    ):
        data.read(folder, {"speech": tiny.units(seed=1)})


def test_a_sound_is_another_by_its_size_or_by_its_time(tmp_path: Path) -> None:
    sound, made = tmp_path / "a.wav", list[float]()
    data.write(tmp_path / "rows.jsonl", [{"speech": "a.wav"}])

    def run() -> int:
        made.clear()
        found = extract(
            str(tmp_path / "rows.jsonl"),
            tmp_path / "units",
            MODALITIES,
            spread=HERE,
            report=lambda seen: made.append(seen["samples"]),
        )
        return len(found[0]["speech"])

    for seconds, time_ns, wanted in ((0.1, 1, [1]), (0.1, 1, []), (0.1, 2, [1]), (0.3, 2, [1])):
        tiny.sound(sound, seconds=seconds)
        os.utime(sound, ns=(time_ns, time_ns))
        length = run()
        assert made == wanted
    assert length == 9


def test_what_a_killed_pass_left_serves_no_other_takes_or_units(tmp_path: Path) -> None:
    row = {"id": "a", "text": "call", "speech": tiny.sound(tmp_path / "a.wav").name}
    data.write(tmp_path / "rows.jsonl", [row])
    source, folder = str(tmp_path / "rows.jsonl"), tmp_path / "units"
    other = MODALITIES | {"speech": tiny.units(seed=1)}
    assert len(extract(source, folder, MODALITIES, spread=HERE)) == 1
    (folder / "provenance.json").unlink()
    assert len(extract(source, folder, MODALITIES, spread=HERE, takes=2)) == 2
    (folder / "provenance.json").unlink()
    found = extract(source, folder, other, spread=HERE, takes=2)
    wanted = extract(source, tmp_path / "new", other, spread=HERE, takes=2)
    assert list(found) == list(wanted)


def test_why_a_line_is_bad_is_told_as_it_is_now(tmp_path: Path) -> None:
    path, folder = tmp_path / "rows.jsonl", tmp_path / "units"
    for line, why in (("[]", "holds a list"), ("{", "is not JSON")):
        path.write_text(f'{{"text": "call"}}\n{line}\n')
        extract(str(path), folder, MODALITIES, Policy("skip", 0.5), spread=HERE)
        (told,) = data.manifest(folder / "bad.jsonl")
        assert why in told["why"]


def test_what_is_not_installed_makes_no_sample_bad_and_all_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.write(tmp_path / "rows.jsonl", [{"id": "a", "text": "call"}, {"text": "send"}])
    source, folder, take = str(tmp_path / "rows.jsonl"), tmp_path / "units", data.take

    def fails(error: Exception) -> None:
        def taken(row: Any, *given: Any) -> Any:
            if "id" in row and row["id"] == "a":
                raise error
            return take(row, *given)

        monkeypatch.setattr(data, "take", taken)

    fails(MissingExtra("this needs soundfile"))
    with pytest.raises(MissingExtra, match="this needs soundfile"):
        extract(source, folder, MODALITIES, Policy("skip", 0.5), spread=HERE)
    fails(KeyError("x"))
    assert len(extract(source, folder, MODALITIES, Policy("skip", 0.5), spread=HERE)) == 1
    (told,) = data.manifest(folder / "bad.jsonl")
    assert told["why"] == f"{told['where']}: KeyError: 'x'"


def test_split_and_limit_take_a_part(tmp_path: Path) -> None:
    source = str(tmp_path / "rows.jsonl")
    data.write(
        tmp_path / "rows.jsonl",
        [{"speech": [n], "split": ("train", "dev")[n % 2]} for n in range(9)],
    )
    found = extract(source, tmp_path / "a", MODALITIES, split="dev", limit=3, shard=2, spread=HERE)
    assert [row["speech"] for row in found] == [[1], [3], [5]]
    with pytest.raises(ZipperError, match=r"no sample in .* of the split 'test'"):
        extract(source, tmp_path / "b", MODALITIES, split="test", spread=HERE)


def test_what_is_used_refused_and_passed_over_adds_up_by_name(tmp_path: Path) -> None:
    raw = [
        {"id": "a", "text": "Call, Anna!", "speech": [5], "snr": 3},
        {"id": "a", "text": "", "speech": [5], "voice": "alto", "snr": None},
        {"id": "b", "text": "€", "speech": [5], "snr": 3},
        {"text": "send", "speech": [24]},
        {"text": "send", "speech": [2]},
    ]
    data.write(tmp_path / "rows.jsonl", raw)
    found = extract(
        str(tmp_path / "rows.jsonl"),
        tmp_path / "units",
        MODALITIES,
        Policy("skip", 0.5),
        shard=2,
        spread=HERE,
    )
    told = rows.provenance(tmp_path / "units")
    assert [found.name(n) for n in range(3)] == ["a", "a", "5"] and found.distinct() == 2
    assert [line["id"] for line in data.manifest(tmp_path / "units" / "bad.jsonl")] == ["b", "4"]
    assert told["samples"] == 5 and told["rows"] == 3 and told["bad"] == 2
    assert told["passed"] == {
        "field snr": 1,
        "field voice": 1,
        "ids that another sample has too": 1,
        "punctuation of text": 1,
    }
    assert told["fields"]["text"]["empty"] == 1
    assert extraction.told(told["passed"]).startswith(
        "Passed over: field snr (1), field voice (1), ids that"
    )
    assert extraction.told({}) == ""


def test_under_skip_whatever_a_sample_does_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.sound(tmp_path / "a.wav", seconds=0.2)
    lines = [
        '{"speech": "a.wav"}',
        '{"text": "call \\ud83d"}',
        '{"speech": "\\ud83d.wav"}',
        json.dumps({"speech": "x" * 300 + ".wav"}),
        '{"speech": {"path": "a.wav", "start": NaN}}',
        '{"speech": {"path": "a.wav", "stop": 1e999}}',
        '{"speech": {"path": "a.wav", "start": 1' + "0" * 400 + "}}",
        '{"speech": "a\\u0000.wav"}',
        '{"speech": {"path": "a.wav", "bytes": ' + "[" * 800 + "]" * 800 + "}}",
        '{"id": {"a": [1]}, "split": [2], "voice": {}, "text": "call"}',
        '{"text": "caf' + "\udce9" + '"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = extract(
        str(tmp_path / "rows.jsonl"),
        tmp_path / "units",
        MODALITIES,
        Policy("skip", 0.9),
        spread=HERE,
    )
    assert len(found) == 2
    assert [
        line["where"].rpartition(" ")[2] for line in data.manifest(tmp_path / "units" / "bad.jsonl")
    ] == [
        *"2345678",
        "9",
        "11",
    ]

    def fail(*_: object) -> None:
        raise MemoryError("what a library says")

    monkeypatch.setattr("zipper.audio.sound.read", fail)
    found = extract(
        str(tmp_path / "rows.jsonl"),
        tmp_path / "again",
        MODALITIES,
        Policy("skip", 1.0),
        shard=3,
        spread=HERE,
    )
    assert len(found) == 1


SCRIPT = """
import sys
from pathlib import Path
from zipper.data.extraction import extract, processes
from zipper.modality import load
folder = Path(sys.argv[1])
found = extract(f"sounds:{folder / 'clips'}", folder / "made", {"speech": load(folder / "speech")}, shard=1, spread=processes(2))
print(len(found))
"""


def test_a_script_without_a_guard_extracts_too(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for n in range(3):
        tiny.sound(tmp_path / "clips" / f"{n}.wav", seconds=0.1, seed=n)
    tiny.units().save(tmp_path / "speech")
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mine.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "3\n") and "one process does all" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_second_pass_over_one_cold_cache_waits_and_finds_all_made(tmp_path: Path) -> None:
    data.write(tmp_path / "rows.jsonl", many(6))
    source, policy, cache = str(tmp_path / "rows.jsonl"), Policy("skip"), tmp_path / "cache"

    def loaded() -> list[rows.Row]:
        return list(extraction.load(source, MODALITIES, policy=policy, cache=cache))

    first = loaded()
    (folder,) = cache.iterdir()
    whole = content(folder)
    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match="waits for it") as told:
        with held(folder):
            (folder / "provenance.json").unlink()
            second = pool.submit(loaded)
            while not told and not second.done():
                time.sleep(0.01)
            time.sleep(0.1)
            assert not second.done() and not (folder / "provenance.json").exists()
        assert second.result() == first
    assert content(folder) == whole


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data.write(tmp_path / "rows.jsonl", many(1))
    (tmp_path / "file").touch()
    with pytest.raises(ZipperError, match=r"made could not be saved: Not a directory"):
        extract(str(tmp_path / "rows.jsonl"), tmp_path / "file" / "made", MODALITIES)


def test_training_loads_manifests_into_memory_and_all_else_from_disk(tmp_path: Path) -> None:
    data.write(tmp_path / "rows.jsonl", [*many(3), {"text": "€"}])
    source, cache = str(tmp_path / "rows.jsonl"), tmp_path / "cache"
    with pytest.raises(ZipperError, match="line 4"):
        extraction.load(source, MODALITIES, cache=cache)
    assert (
        isinstance(extraction.load(source, MODALITIES, limit=3, cache=cache), list)
        and not cache.exists()
    )
    skipped = extraction.load(source, MODALITIES, policy=Policy("skip", 0.5), cache=cache)
    assert isinstance(skipped, rows.Rows) and list(skipped) == list(
        data.read(Path(source), MODALITIES, limit=3)
    )
    (folder,) = cache.iterdir()
    assert list(extraction.load(str(folder), MODALITIES)) == list(skipped)


def test_just_the_share_that_was_allowed_may_be_bad(tmp_path: Path) -> None:
    """What is refused is listed, and the folder is not one of finished units."""
    data.write(tmp_path / "rows.jsonl", [*many(3), {"text": "€"}])
    source, folder = str(tmp_path / "rows.jsonl"), tmp_path / "units"
    with pytest.raises(ZipperError, match=r"1 of 4 samples are bad, .* the share of 0\.24 that"):
        extract(source, folder, MODALITIES, Policy("skip", 0.24), spread=HERE)
    assert [line["id"] for line in data.manifest(folder / "bad.jsonl")] == ["4"]
    assert not (folder / "provenance.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(extract(source, folder, MODALITIES, Policy("skip", 0.25), spread=HERE)) == 3
    with pytest.warns(UserWarning, match=r"1 of 4 samples are bad, e\.g\. .*, line 4"):
        extract(source, folder, MODALITIES, Policy("warn", 0.25), spread=HERE)


def test_a_report_says_after_every_file_what_was_done_so_far(tmp_path: Path) -> None:
    data.write(tmp_path / "rows.jsonl", [*many(2), {"text": "€"}, {"text": "€"}, *many(1)])
    source, seen = str(tmp_path / "rows.jsonl"), list[tuple[float, float]]()

    def report(made: dict[str, float]) -> None:
        seen.append((made["samples"], made["bad"]))

    extract(source, tmp_path / "a", MODALITIES, Policy("skip", 1), None, None, 2, HERE, report)
    assert seen == [(2, 0), (4, 2), (5, 2)]
    seen.clear()
    with pytest.raises(ZipperError, match="line 3"):  # at the first; none is made behind it
        extract(source, tmp_path / "b", MODALITIES, None, None, None, 1, HERE, report)
    assert seen == [(1, 0), (2, 0), (3, 1)]


@pytest.mark.parametrize(
    "wrong", [{"bad": "ignore"}, {"most_bad": 1.5}, {"most_bad": -0.1}, {"most_bad": math.nan}]
)
def test_a_policy_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ZipperError, match=f"{next(iter(wrong))} is"):
        Policy(**wrong)


KILLED = """
import sys
from pathlib import Path
from zipper.data.extraction import Policy, extract, processes
from zipper.modality import load
folder = Path(sys.argv[1])
if __name__ == "__main__":
    units = {"speech": load(folder / "speech")}
    extract(f"sounds:{folder / 'clips'}", folder / "killed", units, Policy("skip", 0.1), shard=4, spread=processes(2),
            report=lambda seen: print(seen["samples"], flush=True))
"""


@pytest.mark.slow
def test_a_pass_of_two_processes_killed_in_the_middle_goes_on_and_leaves_the_bytes_of_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "clips").mkdir()
    for n in range(60):
        tiny.sound(tmp_path / "clips" / f"{n:03d}.wav", seconds=1, seed=n)
    (tmp_path / "clips" / "030.wav").write_bytes(b"no sound")
    tiny.units().save(tmp_path / "speech")
    extract(
        f"sounds:{tmp_path / 'clips'}",
        tmp_path / "whole",
        {"speech": tiny.units()},
        Policy("skip", 0.1),
        shard=4,
        spread=HERE,
    )
    (tmp_path / "killed.py").write_text(KILLED)
    program = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
        ).stdout.split()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.1)
    there = len(list((tmp_path / "killed").glob("units-*")))
    assert 1 <= there < 15 and len(children) >= 2
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert len(done) == 15 - there
    assert {
        name: held
        for name, held in content(tmp_path / "killed").items()
        if not name.endswith(".zipper-new")
    } == content(tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_of_ray_leave_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    data.write(tmp_path / "rows.jsonl", many(40))
    spoil(tmp_path / "rows.jsonl", [5, 25])
    source, policy = str(tmp_path / "rows.jsonl"), Policy("skip", 0.1)
    extract(source, tmp_path / "one", MODALITIES, policy, shard=10, spread=HERE)
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
    )
    try:
        extract(source, tmp_path / "two", MODALITIES, policy, shard=10, spread=extraction.on_ray)
    finally:
        ray.shutdown()
    assert content(tmp_path / "two") == content(tmp_path / "one")


def lacking(job: Job) -> Record:
    raise MissingExtra(f"{job.path} needs soundfile.")


def test_what_a_machine_of_ray_lacks_comes_back_as_it_is() -> None:
    job = pickle.dumps((lacking, Job(Path("a"), [], ())))
    found = extraction._far({"number": 3, "job": job})
    assert found["number"] == 3 and not found["record"]
    with pytest.raises(MissingExtra, match="a needs soundfile"):
        raise pickle.loads(found["error"])


def test_the_command_makes_unit_files_of_a_corpus_and_leaves_out_what_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, modality in MODALITIES.items():
        modality.save(name)
    tiny.sound(tmp_path / "a.wav", seconds=0.4)
    data.write(
        Path("rows.jsonl"),
        [
            {"id": "a", "text": "call", "speech": "a.wav"},
            {"text": "€"},
            {"text": "send", "split": "dev"},
        ],
    )
    asked = [
        "units",
        "rows.jsonl",
        "-o",
        "made",
        "--units",
        "speech",
        "--text",
        "text",
        "--workers",
        "1",
    ]
    assert cli.main(asked) == 2
    assert "rows.jsonl, line 2: this tokenizer cannot write €" in capsys.readouterr().err
    assert cli.main([*asked, "--bad", "skip"]) == 2
    assert "1 of 3 samples are bad" in capsys.readouterr().err
    assert cli.main([*asked, "--bad", "skip", "--most-bad", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["bad"], told["rows"], told["seconds"]) == (3, 1, 2, 0.4)
    call, send = data.read(Path("made"), MODALITIES)
    assert call["speech"] == tiny.units().encode(tmp_path / "a.wav") and send == {
        "text": tiny.text().encode("send")
    }
    assert cli.main([*asked, "--split", "dev"]) == 2
    assert (
        "made holds the units of another source, part, tokenizer or codebook"
        in capsys.readouterr().err
    )
    assert cli.main(["units", "nowhere:x", "-o", "other"]) == 2
    assert "'nowhere:x' is no source. Give the path of a .jsonl manifest" in capsys.readouterr().err


def test_takes_lie_beside_the_clean_sound_of_each_sample(tmp_path: Path) -> None:
    told = [
        {
            "id": str(n),
            "text": "call anna",
            "voice": "low",
            "speech": tiny.sound(tmp_path / f"{n}.wav", seed=n).name,
        }
        for n in range(3)
    ]
    data.write(tmp_path / "pairs.jsonl", told)
    source = str(tmp_path / "pairs.jsonl")
    plain = extract(source, tmp_path / "plain", MODALITIES, spread=HERE)
    found = extract(source, tmp_path / "taken", MODALITIES, spread=HERE, takes=30)
    assert rows.provenance(tmp_path / "taken")["takes"] == 30
    assert (len(found), rows.provenance(tmp_path / "taken")["samples"]) == (90, 3)
    silent = 0
    for number in range(90):
        row, clean = dict(found[number]), plain[number // 30]
        assert found.name(number) == str(number // 30)
        heard, said = row.pop("heard"), row.pop("said")
        assert row == clean  # what is to be spoken stays clean
        sound, anything = disturbance.take(
            audio.read(tmp_path / f"{number // 30}.wav"), f"{number // 30} {number % 30}"
        )
        assert heard == MODALITIES["speech"].encode(sound)
        assert said == (clean["text"] if anything else [])
        silent += not anything
    assert 0 < silent < 20
    with pytest.raises(ZipperError, match="units of another source"):
        extract(source, tmp_path / "taken", MODALITIES, spread=HERE, takes=2)


def test_a_sample_without_sound_cannot_be_taken_again(tmp_path: Path) -> None:
    data.write(tmp_path / "pairs.jsonl", tiny.pairs(2))
    with pytest.raises(
        ZipperError,
        match=r"line 1 has no sound and text, so it cannot be taken again. Give both, or leave "
        r"takes out",
    ):
        extract(str(tmp_path / "pairs.jsonl"), tmp_path / "units", MODALITIES, spread=HERE, takes=2)


@pytest.mark.parametrize("field", ["heard", "said"])
def test_takes_do_not_write_over_a_field_of_the_row(tmp_path: Path, field: str) -> None:
    row = {"speech": tiny.sound(tmp_path / "a.wav").name, "text": "call", f"{field}:text": "send"}
    data.write(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(ZipperError, match=f"has a field '{field}' of its own"):
        extract(str(tmp_path / "pairs.jsonl"), tmp_path / "units", MODALITIES, spread=HERE, takes=1)


@pytest.mark.parametrize("other", [{}, {"text": "call", "speech": [1]}], ids=["text", "sound"])
def test_what_is_taken_again_has_sound_and_text(tmp_path: Path, other: dict[str, Any]) -> None:
    row = {"speech": tiny.sound(tmp_path / "a.wav").name} | other
    data.write(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(ZipperError, match="line 1 has no sound and text"):
        extract(str(tmp_path / "pairs.jsonl"), tmp_path / "units", MODALITIES, spread=HERE, takes=1)


def test_other_units_of_a_source_have_a_cache_of_their_own(tmp_path: Path) -> None:
    tiny.sound(tmp_path / "a.wav")
    for n in range(2):
        units = {"speech": tiny.units(seed=n)}
        (row,) = extraction.load(f"sounds:{tmp_path}", units, cache=tmp_path / "cache")
        assert row["speech"] == units["speech"].encode(tmp_path / "a.wav")
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_every_part_of_a_source_has_a_cache_of_its_own(tmp_path: Path) -> None:
    told = [{"speech": [n], "split": ("train", "dev")[n % 2]} for n in range(6)]
    data.write(tmp_path / "rows.jsonl", told)
    source, cache = str(tmp_path / "rows.jsonl"), tmp_path / "cache"
    for split, limit, wanted in (
        (None, None, [0, 1, 2, 3, 4, 5]),
        ("dev", None, [1, 3, 5]),
        ("train", None, [0, 2, 4]),
        ("dev", 2, [1, 3]),
        (None, 2, [0, 1]),
    ):
        found = extraction.load(source, MODALITIES, limit, Policy("skip"), split, cache)
        assert [row["speech"] for row in found] == [[n] for n in wanted]
    assert len([*cache.iterdir()]) == 5


def test_a_folder_of_so_many_samples_is_not_one_of_more(tmp_path: Path) -> None:
    data.write(tmp_path / "rows.jsonl", many(4))
    source, folder = str(tmp_path / "rows.jsonl"), tmp_path / "units"
    assert len(extract(source, folder, MODALITIES, limit=2, spread=HERE)) == 2
    with pytest.raises(ZipperError, match="holds the units of another source, part"):
        extract(source, folder, MODALITIES, limit=3, spread=HERE)


def test_a_split_of_a_manifest_is_not_the_whole_manifest(tmp_path: Path) -> None:
    told = [{"speech": [n], "split": ("train", "dev")[n % 2]} for n in range(6)]
    data.write(tmp_path / "rows.jsonl", told)
    found = extraction.load(
        str(tmp_path / "rows.jsonl"), MODALITIES, split="dev", cache=tmp_path / "cache"
    )
    assert [row["speech"] for row in found] == [[1], [3], [5]]


def test_as_large_a_share_of_bad_samples_as_is_allowed_is_allowed() -> None:
    bad = [{"why": "It is bad."}] * 29
    _bear({"bad": bad, "samples": 100}, Policy("skip", 0.29), Path("units"))  # 0.29 * 100 < 29
    with pytest.raises(ZipperError, match="29 of 99 samples are bad"):
        _bear({"bad": bad, "samples": 99}, Policy("skip", 0.29), Path("units"))
