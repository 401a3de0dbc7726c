"""Workers: work spread over fresh processes. The one place where a call that looks innocent starts
some.

A fresh process imports the script that runs, as Python's `spawn` wants it, and a script without a
main guard would begin again in each of them. So its work stays in its own process, and it is told
why. This file knows nothing of what is done.
"""

import ast
import multiprocessing
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from zipper.errors import ZipperError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def spread(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = 1
) -> Generator[Result]:
    """`map(work, items)`, in order, by so many fresh processes of one thread each, which get
    `chunk` items at a time.

    No more items are taken than keep everyone busy. The work is done in this process where there is
    no second chunk, for one worker, inside a worker of others, and in a script without a main
    guard, which is warned. Raises ZipperError if a process ends before its work is done; none is
    started again.
    """
    items = iter(items)
    first = [part for _ in range(2 if workers > 1 else 0) if (part := list(islice(items, chunk)))]
    if len(first) < 2 or not _may_start():
        yield from map(work, chain(*first, items))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        with _one_thread():
            waiting = deque(pool.submit(_each, work, part) for part in first)
            while part := list(islice(items, chunk)):
                waiting.append(pool.submit(_each, work, part))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ZipperError(
            "A worker process ended before its work was done. What it said stands above, if it "
            "said anything: was it killed, was "
            'memory short, or does your script call this outside of `if __name__ == "__main__":`? '
            "One worker does without others."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [work(item) for item in items]


def _may_start() -> bool:
    """Whether this process may start others. Raises ZipperError in one that is only just importing
    the script that started it."""
    here = multiprocessing.current_process()
    if getattr(here, "_inheriting", False):
        raise ZipperError(
            "This process was started to work for the script that it is importing, and the script "
            "starts others while it is "
            'imported. Put what it does under `if __name__ == "__main__":`.'
        )
    if here.daemon:  # it may not have children
        return False
    if script := _unguarded():
        warnings.warn(
            f'{script} has no `if __name__ == "__main__":`, so that worker processes, which '
            "import it, would begin it again: "
            "one process does all. Put what it does under that line to use more.",
            stacklevel=3,
        )
        return False
    return True


def _unguarded() -> Path | None:
    """The script that runs, if fresh processes would run all of it."""
    main = sys.modules["__main__"]
    name, path = getattr(main.__spec__, "name", "__main__.py"), getattr(main, "__file__", None)
    # A prompt, or what `spawn` does not import.
    if path is None or name == "__main__" or name.endswith(".__main__"):
        return None
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):  # not there as text
        return None
    tests = [statement.test for statement in tree.body if isinstance(statement, ast.If)]
    nodes = chain.from_iterable(map(ast.walk, tests))
    if any(isinstance(node, ast.Name) and node.id == "__name__" for node in nodes):
        return None
    return Path(path)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes begun in here have one thread each for their numbers, which is read when those are
    loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin() -> None:
    """A worker does not outlive the process that started it, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
