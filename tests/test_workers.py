"""Workers: the same results as one process gives, and no process that nobody asked for, whatever
the script looks like."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zipper import workers
from zipper.errors import ZipperError
from zipper.workers import spread


def where(number: int) -> tuple[int, int]:
    return number, os.getpid()


def threads(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def end(number: int) -> int:
    os._exit(1)


def test_results_come_in_order_from_other_processes_of_one_thread() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    found = list(spread(where, range(20), workers=2, chunk=3))
    assert [number for number, _ in found] == [*range(20)]
    assert (
        os.getpid() not in {process for _, process in found}
        and len({process for _, process in found}) <= 2
    )
    assert {*spread(threads, range(4), 2)} == {"1"} and os.environ.get("OMP_NUM_THREADS") == before


@pytest.mark.parametrize(("items", "count", "chunk"), [(0, 2, 1), (1, 2, 1), (8, 2, 8), (8, 1, 1)])
def test_one_chunk_or_one_worker_stays_in_this_process(items: int, count: int, chunk: int) -> None:
    found = list(spread(where, range(items), count, chunk))
    assert found == [(number, os.getpid()) for number in range(items)]


def test_items_are_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = spread(where, items(), workers=2)
    assert next(results)[0] == 0
    assert len(taken) < 10
    results.close()


def test_a_worker_that_dies_is_told_and_not_started_again() -> None:
    with pytest.raises(ZipperError, match="A worker process ended before its work was done"):
        list(spread(end, range(4), workers=2))


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(inverse, range(4), workers=2))


def inverse(number: int) -> float:
    return 1 / number


def run(folder: Path, program: str, name: str = "mine.py") -> subprocess.CompletedProcess[str]:
    """A user's script; it and all that it starts are ended after a minute."""
    (folder / name).write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(folder / name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess([], process.returncode, out, err)


CALL = "import math, sys\nfrom zipper.workers import spread\nprint('begun', file=sys.stderr)\n"


def test_a_script_without_a_guard_works_in_one_process_and_is_told_why(tmp_path: Path) -> None:
    done = run(tmp_path, CALL + "print(list(spread(math.sqrt, [1, 4, 9], 2)))\n")
    assert (done.returncode, done.stdout) == (0, "[1.0, 2.0, 3.0]\n")
    assert done.stderr.count("begun") == 1
    assert 'mine.py has no `if __name__ == "__main__":`' in done.stderr


def test_a_script_with_a_guard_works_in_several(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        CALL + "if __name__ == '__main__':\n    print(list(spread(math.sqrt, [1, 4, 9], 2)))\n",
    )
    assert (done.returncode, done.stdout) == (0, "[1.0, 2.0, 3.0]\n")
    assert done.stderr.count("begun") > 1 and "has no" not in done.stderr


def test_a_call_outside_of_the_guard_is_told_at_once(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        CALL + "print(list(spread(math.sqrt, [1, 4, 9], 2)))\nif __name__ == '__main__':\n    "
        "print('done')\n",
    )
    assert done.returncode == 1 and done.stdout == ""
    assert 1 < done.stderr.count("begun") <= 3
    assert "A worker process ended before its work was done" in done.stderr.splitlines()[-1]


def test_a_worker_of_another_pool_works_alone(tmp_path: Path) -> None:
    program = """
import math, multiprocessing
from zipper.workers import spread
def work(numbers):
    return list(spread(math.sqrt, numbers, 2))
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [[1, 4], [9, 16]]))
"""
    assert run(tmp_path, program).stdout == "[[1.0, 2.0], [3.0, 4.0]]\n"


@pytest.mark.parametrize(
    ("program", "guarded"),
    [
        ("if __name__ == '__main__':\n    pass\n", True),
        ("import x\nif '__main__' == __name__ and x:\n    main()\n", True),
        ("if True:\n    main()\n", False),
        ("'if __name__'\n", False),
        ("", False),
    ],
)
def test_a_guard_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, guarded: bool
) -> None:
    (tmp_path / "mine.py").write_text(program)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(tmp_path / "mine.py"), raising=False
    )
    assert workers._unguarded() == (None if guarded else tmp_path / "mine.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "gone.pyc"))
    # Nothing is known: a call that is not fit is told by its death.
    assert workers._unguarded() is None
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert workers._unguarded() is None  # a prompt


PARENT = """
import time
from zipper.workers import spread
if __name__ == "__main__":
    for _ in spread(time.sleep, [0.01] * 4 + [60] * 4, 2):
        print("one", flush=True)
"""


def test_workers_do_not_outlive_a_script_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "mine.py")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "one\n"
        found = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
        ).stdout.split()
        process.send_signal(signal.SIGKILL)
    assert len(found) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in found):
        assert time.monotonic() < deadline, "a worker outlives the process that started it"
        time.sleep(0.05)


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= workers.cores() <= (os.cpu_count() or 1)
    assert multiprocessing.parent_process() is None
