"""Extraction: one pass over a source that checks, encodes and counts every sample, and leaves unit
files (zipper.data.rows).

A shard's name is the hash of all that decides its content: raw rows, size and time of the sound
files they name, modalities. So a pass that was killed goes on where it was, and a corpus that
changed costs only what changed; who does the work leaves no trace.
"""

import hashlib
import json
import logging
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from zipper import workers as pool
from zipper.audio import disturbance
from zipper.data import layouts
from zipper.data import manifests as data
from zipper.data.layouts import Source
from zipper.data.manifests import Row, Sample, Taken
from zipper.data.rows import BAD, PROVENANCE, Rows, provenance, read_record, write_shard
from zipper.environment import MissingExtra, extra
from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.modality import load as load_modality
from zipper.modality import save as save_modality
from zipper.modality.text import Text
from zipper.saving.files import held, place, sha256, write_json

FORMAT = 3
SHARD = 256  # samples; some 50 minutes of speech: what a kill costs each process
_WAVE = 1024  # shards whose raw rows a cluster holds at once


@dataclass(frozen=True)
class Policy:
    """What becomes of samples that have no ids. bad: "error" stops at the first, "warn" and "skip"
    leave them out and list them in bad.jsonl. most_bad: the share of all samples above which even
    those raise a ZipperError.
    """

    bad: str = "error"
    most_bad: float = 0.01

    def __post_init__(self) -> None:
        if self.bad not in ("error", "warn", "skip"):
            raise ZipperError(f"bad is {self.bad!r}; it must be error, warn or skip.")
        if not 0 <= self.most_bad <= 1:
            raise ZipperError(
                f"most_bad is {self.most_bad}; it is a share of the samples, from 0 to 1."
            )


class Job(NamedTuple):
    """A shard to be made: its file, its raw rows, the fingerprints of the modalities in modalities/
    beside it, and how many rows with a disturbed take of its speech each sample becomes (0: one,
    without).
    """

    path: Path
    samples: Sequence[Sample]
    modalities: tuple[tuple[str, str], ...]
    takes: int = 0


#: Of a shard: {"samples": how many were read, "seconds": of sound kept, "bad": [{"where", "id",
#: "why"}], "passed": {what was passed over in the samples kept: in how many}}.
Record = dict[str, Any]
#: Runs jobs somewhere and gives their records in the order of the jobs.
Spread = Callable[[Callable[[Job], Record], Iterable[Job]], Generator[Record]]


def extract(
    source: Source,
    folder: Path,
    modalities: Mapping[str, Modality],
    policy: Policy | None = None,
    split: str | None = None,
    limit: int | None = None,
    shard: int = SHARD,
    spread: Spread | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    takes: int = 0,
) -> Rows:
    """A source (see zipper.data.layouts) as unit files in `folder`; what is there already is not
    made again.

    split, limit: only this part of it, only its first so many samples. takes: so many rows of each
    sample, each with another disturbed take of its speech in the field "heard", and what is said in
    that in "said" (`disturbance.take`), to learn "heard:speech -> said:text" from; its own fields
    stay as they are. shard: samples a file. spread: who works (default: a process a core). report:
    called after every shard made with {"samples", "bad", "seconds" of sound, "real_time": seconds
    of sound a second}. The files are the same bytes whoever works and however often the pass was
    killed. bad.jsonl lists what was refused, provenance.json counts what was used and, by name,
    what was passed over. Another process that writes the same folder is waited for. Raises
    ZipperError for a source that is not there or empty, bad samples that the policy does not bear,
    and a folder that holds units of something else or cannot be written.
    """
    folder = place(folder)
    policy, spread = policy or Policy(), spread or processes()
    pins = tuple(sorted((name, modality.fingerprint) for name, modality in modalities.items()))
    origin = {
        "source": layouts.spelled(source, folder),
        "split": split,
        "limit": limit,
        "modalities": dict(pins),
        "takes": takes or None,
    }
    with held(folder, wait=True):  # two processes with one cache; the second finds all there
        if (folder / PROVENANCE).is_file() and any(
            provenance(folder).get(key) != value for key, value in origin.items()
        ):
            raise ZipperError(
                f"{folder} holds the units of another source, part, tokenizer or codebook. Choose "
                "another folder."
            )
        for name, modality in modalities.items():
            save_modality(modality, folder / "modalities" / name)
        paths, passed = list[Path](), Counter[str]()

        def missing() -> Iterator[Job]:
            found = (
                _hashed(sample, modalities)
                for sample in islice(layouts.samples(source, split, passed), limit)
            )
            while chunk := list(islice(found, shard)):
                made_of = [FORMAT, pins, takes, [content for _, content in chunk]]
                name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
                paths.append(folder / f"units-{name}.safetensors")
                if read_record(paths[-1]) is None:
                    yield Job(paths[-1], [sample for sample, _ in chunk], pins, takes)

        since, made = time.monotonic(), {"samples": 0, "bad": 0, "seconds": 0.0, "real_time": 0.0}
        with (
            tqdm(desc=f"units of {origin['source']}", unit="sample", disable=None) as bar,
            closing(spread(_make, missing())) as records,
        ):
            for record in records:
                made["samples"] += record["samples"]
                made["bad"] += len(record["bad"])
                made["seconds"] += record["seconds"]
                made["real_time"] = made["seconds"] / (time.monotonic() - since)
                bar.update(record["samples"])
                bar.set_postfix(bad=made["bad"], real_time=f"{made['real_time']:.0f}x")
                if report:
                    report(made)
                if policy.bad == "error":
                    _bear(record, policy, folder)
        return _finish(folder, paths, origin, policy, passed)


def load(
    source: str,
    modalities: Mapping[str, Modality],
    limit: int | None = None,
    policy: Policy | None = None,
    split: str | None = None,
    cache: Path = Path(".cache/units"),
) -> Sequence[Row]:
    """A source for training: a manifest in memory, a folder of unit files as it is, anything else
    as unit files in the cache.

    A manifest whose bad samples are to be left out goes through the cache too.
    """
    policy = policy or Policy()
    if (place(source) / PROVENANCE).is_file() or (
        layouts.is_manifest(source) and policy.bad == "error" and split is None
    ):
        return data.read(place(source), modalities, limit)
    parts = [
        layouts.spelled(source),
        split,
        limit,
        *sorted((name, modality.fingerprint) for name, modality in modalities.items()),
    ]
    folder = cache / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return extract(source, folder, modalities, policy, split, limit)


def processes(workers: int | None = None) -> Spread:
    """Spread over so many fresh processes of one thread each (None: one a core); a single job or
    worker stays in this process."""
    return partial(pool.spread, workers=workers or pool.cores())


def on_ray(work: Callable[[Job], Record], jobs: Iterable[Job]) -> Generator[Record]:
    """Spread over a Ray cluster by Ray Data, a task a shard. Every machine sees the folder, and the
    source, at the same paths."""
    ray, ray_data = extra("ray"), extra("ray.data")
    if not ray.is_initialized():  # what a cluster logs is its own affair; what is done is told here
        ray.init(logging_level="error", log_to_driver=False)
    ray_data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    jobs = iter(jobs)
    while wave := list(islice(jobs, _WAVE)):
        # Bytes in, bytes out: Arrow would give rows with unlike keys one shape. They travel, and
        # are kept nowhere.
        items = [{"number": n, "job": pickle.dumps((work, job))} for n, job in enumerate(wave)]
        done = ray_data.from_items(items, override_num_blocks=len(items)).map(_far).take_all()
        for row in sorted(done, key=lambda row: row["number"]):
            if row["error"]:
                raise pickle.loads(row["error"])
            yield json.loads(row["record"])


def _far(row: dict[str, Any]) -> dict[str, Any]:
    """A job on another machine. What is the user's to mend comes back as it is, not in Ray's
    words."""
    work, job = pickle.loads(row["job"])
    try:
        return {"number": row["number"], "record": json.dumps(work(job)), "error": b""}
    except ZipperError as error:
        return {"number": row["number"], "record": "", "error": pickle.dumps(error)}


def _make(job: Job) -> Record:
    """Encode the samples of a shard and write it."""
    modalities = _modalities(job.path.parent / "modalities", job.modalities)
    rows, names, seconds, bad, passed = [], [], [], [], Counter[str]()
    for sample in job.samples:
        name = str(sample.row.get("id"))
        try:
            if sample.problem:
                raise ZipperError(f"{sample.where} {sample.problem}")
            taken = data.take(sample.row, modalities, sample.folder, sample.where)
            made = [
                taken.row | more
                for more in _takes(taken, modalities, job.takes, name, sample.where)
            ]
        except MissingExtra:  # no sample is bad because of it
            raise
        except Exception as error:  # by place, not by type: it is this sample's
            why = (
                str(error)
                if isinstance(error, ZipperError)
                else f"{sample.where}: {type(error).__name__}: {error}"
            )
            bad.append({"where": sample.where, "id": name, "why": why})
            continue
        rows += made
        names += [name] * len(made)
        seconds += [taken.seconds] * len(made)
        passed.update(taken.passed)
    record = {
        "samples": len(job.samples),
        "seconds": sum(seconds, 0.0),
        "bad": bad,
        "passed": passed,
    }
    write_shard(job.path, rows, names, seconds, record)
    return record


def _takes(
    taken: Taken, modalities: Mapping[str, Modality], takes: int, name: str, where: str
) -> list[Row]:
    """The fields that disturbed takes of a sample's speech add to its row, take by take; one of
    none where none were wanted."""
    if not takes:
        return [{}]
    sounds = [(key, one) for key, one in modalities.items() if key in taken.heard]
    texts = [
        name for name, one in modalities.items() if isinstance(one, Text) and name in taken.row
    ]
    if not sounds or not texts:
        raise ZipperError(
            f"{where} has no sound and text, so it cannot be taken again. Give both, or leave "
            "takes out."
        )
    if own := sorted({"heard", "said"} & taken.row.keys()):
        raise ZipperError(
            f"{where} has a field {own[0]!r} of its own, where takes are to stand. Name it "
            "otherwise, or leave takes out."
        )
    key, sound = sounds[0]
    again = [disturbance.take(taken.heard[key], f"{name} {number}") for number in range(takes)]
    return [
        {"heard": sound.encode(take), "said": taken.row[texts[0]] if said else []}
        for take, said in again
    ]


@lru_cache(maxsize=1)
def _modalities(folder: Path, pins: tuple[tuple[str, str], ...]) -> dict[str, Modality]:
    """Loaded once a process, however many shards it makes."""
    return {name: load_modality(folder / name) for name, _ in pins}


def _hashed(sample: Sample, modalities: Mapping[str, Modality]) -> tuple[Sample, str]:
    """A sample, and a hash of all that decides its ids; one that has none for its row is a sample
    with a problem."""
    try:
        digest = hashlib.sha256(
            json.dumps([sample.row, sample.problem], sort_keys=True, default=_in_words).encode()
        )
    except Exception as error:  # nested too deep, keys of several kinds
        problem = f"cannot be read ({type(error).__name__}: {error})."
        return _hashed(
            Sample(sample.where, {"id": str(sample.row.get("id"))}, sample.folder, problem),
            modalities,
        )
    for path in data.files(sample.row, modalities, sample.folder):
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return sample, digest.hexdigest()


def _in_words(value: Any) -> str:
    """For JSON: what it has no way to say."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _bear(record: Mapping[str, Any], policy: Policy, folder: Path) -> None:
    """Raise or warn as the policy says, if some of so many samples are bad."""
    bad, read = record["bad"], record["samples"]
    if bad and policy.bad == "error":
        raise ZipperError(f"{bad[0]['why']} (To leave bad samples out, choose skip or warn.)")
    told = (
        f"{len(bad)} of {read} samples are bad, e.g. {bad[0]['why']} All are listed in "
        f"{folder / BAD}."
        if bad
        else ""
    )
    if read and len(bad) / read > policy.most_bad:
        raise ZipperError(
            f"{told} That is more than the share of {policy.most_bad:g} that was allowed."
        )
    if bad and policy.bad == "warn":
        warnings.warn(told, stacklevel=4)


def _finish(
    folder: Path,
    paths: Sequence[Path],
    origin: Mapping[str, Any],
    policy: Policy,
    passed: Counter[str],
) -> Rows:
    """Count, judge, and say that all is there."""
    records = [record for path in paths if (record := read_record(path)) is not None]
    total = {
        "samples": sum(record["samples"] for record in records),
        "bad": list(chain.from_iterable(record["bad"] for record in records)),
        "seconds": sum(record["seconds"] for record in records),
    }
    if not total["samples"]:
        raise ZipperError(
            f"There is no sample in {origin['source']} of the split {origin['split']!r}. "
            f"{told(passed)}".strip()
        )
    data.write(folder / BAD, total["bad"])
    _bear(total, policy, folder)
    rows = Rows(paths)
    for record in records:
        passed.update(record["passed"])
    if twice := total["samples"] - len(total["bad"]) - rows.distinct():
        passed["ids that another sample has too"] = twice
    counted = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("zipper-lm", "numpy", "safetensors")},
        **origin,
        "samples": total["samples"],
        "bad": len(total["bad"]),
        "passed": dict(sorted(passed.items())),
        "rows": len(rows),
        "seconds": round(total["seconds"], 3),
        "fields": {name: _counts(rows, name) for name in rows.fields},
        "shards": [{"file": path.name, "sha256": sha256(path)} for path in paths],
    }
    write_json(folder / PROVENANCE, counted)
    for path in {*folder.glob("units-*.safetensors")} - {*paths}:  # of what the source was before
        path.unlink()
    return rows


def _counts(rows: Rows, field: str) -> dict[str, int]:
    lengths = rows.lengths_of(field)
    lengths = lengths[lengths >= 0]
    ids = {
        "ids": int(lengths.sum()),
        "longest": int(lengths.max(initial=0)),
        "empty": int((lengths == 0).sum()),
    }
    return {"rows": len(lengths)} | ids


def told(passed: Mapping[str, int]) -> str:
    """What was passed over, as a sentence; "" for nothing."""
    return (
        f"Passed over: {', '.join(f'{name} ({count})' for name, count in sorted(passed.items()))}."
        if passed
        else ""
    )
