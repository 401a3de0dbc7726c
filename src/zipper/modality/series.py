"""Series: channels over time, and the files they come in (CSV, NPY, Parquet). Knows no ids."""

import csv
import io
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.saving.files import (
    parse,
    place,
    read_json,
    write,
)

MOST_NUMBERS = 1 << 25  # of one series: 128 MiB; 15 hours of 6 channels at 100 Hz
MOST_CHANNELS = 1_000
MOST_CSV_BYTES = 1 << 30
MOST_LINE = 1 << 20  # bytes of a line of CSV
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1e-9, 1e9  # one step in 30 years, and radar
RATES = {"rate_hz": (LOWEST_RATE_HZ, HIGHEST_RATE_HZ)}  # what a file may say
#: What stands for a series, in words.
TAKES = (
    'the path of a CSV, NPY or Parquet file, the bytes of a CSV, a piece of a file as {"path", '
    '"start", "stop"} in seconds, {"values", "rate_hz", "channels"}, or a list of steps'
)
#: Relative: rates that are nearer are one. A time column in text is rounded, and clocks of sensors
#: are worse.
SAME_RATE = 1e-4
SAME_CLOCK = 0.01  # relative, of a time column and what a row says of its rate
MOST_RATIO = 1_000  # of two rates
#: Of a step, by which one may be shorter or longer than their mean. Times are rounded and sensors
#: are late; beyond, a step is missing or there twice.
STEPS_OFF = 0.5
SLACK_S = 0.5  # that the end of a piece may lie behind the end of its file: manifests are rounded


@dataclass(frozen=True, init=False, eq=False)
class Series:
    """Channels over time: `values` float32 (time, channels), finite; `rate_hz` steps a second, the
    first at 0 s; a name and a unit for each channel ("" for none)."""

    values: Float32[np.ndarray, "time channels"]
    rate_hz: float
    channels: tuple[str, ...]
    units: tuple[str, ...]

    def __init__(self, values: Any, rate_hz: Any, channels: Any, units: Any = ()) -> None:
        """values: an array or lists, (time, channels), or (time,) for one channel; no steps at all
        are a series of no length. channels: names, all different, without brackets, not "time".
        units: as many, or none at all.

        Raises ZipperError for NaN and infinity, naming the step and the channel, and for anything
        else that does not fit.
        """
        names, of = words_of("channels", channels), words_of("units", units)
        of = of or ("",) * len(names)
        check_names(names, of)
        numbers = numbers_of(values, len(names))
        if not isinstance(rate_hz, int | float | np.integer | np.floating) or isinstance(
            rate_hz, bool
        ):
            raise ZipperError(f"The rate {rate_hz!r:.80} was given. Give steps a second, e.g. 50.")
        if not LOWEST_RATE_HZ <= float(rate_hz) <= HIGHEST_RATE_HZ:  # NaN does not
            raise ZipperError(
                f"A rate of {float(rate_hz):g} Hz was given; it must lie between "
                f"{LOWEST_RATE_HZ:g} and {HIGHEST_RATE_HZ:g}."
            )
        check_finite(numbers, names)
        object.__setattr__(self, "values", numbers)
        object.__setattr__(self, "rate_hz", float(rate_hz))
        object.__setattr__(self, "channels", names)
        object.__setattr__(self, "units", of)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.values) / self.rate_hz

    def between(self, start_s: float, stop_s: float | None) -> "Series":
        """The steps from `start_s` to before `stop_s`, rounded to whole steps and counted from the
        first one. Raises ZipperError for a piece that lies behind the end."""
        steps = len(self.values)
        first = round(start_s * self.rate_hz)
        last = steps if stop_s is None else round(stop_s * self.rate_hz)
        if first >= steps or last > steps + max(1, round(SLACK_S * self.rate_hz)):
            raise ZipperError(
                f"its piece from {start_s:g} to {self.seconds if stop_s is None else stop_s:g} s "
                f"lies behind its end at {self.seconds:g} s. Give a piece of it."
            )
        return Series(self.values[first:last], self.rate_hz, self.channels, self.units)

    def resample(self, rate_hz: float) -> "Series":
        """The same at another rate, step k at k / rate_hz seconds: polyphase filtering by scipy
        (Kaiser window), which leaves out what the slower rate cannot carry; what lies before and
        behind is taken to go on along a line. Rates within 1 in 10,000 of each other are one, and
        that is how exactly the ratio is kept.

        Raises ZipperError for rates of which one is more than 1,000 times the other, and for a
        result that is too large.
        """
        ratio = rate_hz / self.rate_hz
        if abs(ratio - 1) < SAME_RATE:
            return Series(self.values, rate_hz, self.channels, self.units)
        if not 1 / MOST_RATIO <= ratio <= MOST_RATIO:
            raise ZipperError(
                f"A series of {self.rate_hz:g} Hz cannot be made one of {rate_hz:g} Hz: more than "
                f"{MOST_RATIO} times. Give one that is nearer."
            )
        check_size(math.ceil(len(self.values) * ratio), len(self.channels), "At the other rate it")
        slower = Fraction(min(ratio, 1 / ratio)).limit_denominator(round(1 / SAME_RATE))
        up, down = slower.numerator, slower.denominator
        if ratio > 1:
            up, down = down, up
        if len(self.values) < 2:
            values = np.repeat(self.values, -(-up // down), axis=0)
        else:
            values = extra("scipy.signal").resample_poly(
                self.values.astype(np.float64), up, down, axis=0, padtype="line"
            )
        return Series(values, rate_hz, self.channels, self.units)


@dataclass(frozen=True)
class _Side:
    """The JSON beside an array, and a series in a row."""

    rate_hz: float
    channels: tuple[str, ...]
    units: tuple[str, ...] = ()


class _Table(NamedTuple):
    """What a file of columns holds; times in seconds, None where there is no such column."""

    values: Float32[np.ndarray, "time channels"]
    channels: tuple[str, ...]
    units: tuple[str, ...]
    times: Float64[np.ndarray, " time"] | None


def conformed(raw: Series, rate_hz: float, channels: Sequence[str], units: Sequence[str]) -> Series:
    """A series with these channels, in this order and at this rate. Raises ZipperError naming the
    channels that are missing, that are too many, or that come in another unit: none is guessed."""
    there = dict(zip(raw.channels, raw.units, strict=True))
    wanted = dict(zip(channels, units, strict=True))
    faults = [f"{name!a:.80} is missing" for name in wanted if name not in there]
    faults += [f"{name!a:.80} was not asked for" for name in there if name not in wanted]
    faults += [
        f"{name!a:.80} comes in {there[name]!a:.80}, not in {unit!a:.80}"
        for name, unit in wanted.items()
        if there.get(name, unit) != unit
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        asked = ", ".join(labelled(name, unit) for name, unit in wanted.items())
        raise ZipperError(
            f"Of the channels {'; '.join(faults[:8])}{more}. Give a series of {asked:.300}."
        )
    order = [raw.channels.index(name) for name in channels]
    if order != [*range(len(order))]:
        raw = Series(raw.values[:, order], raw.rate_hz, tuple(channels), tuple(units))
    return raw.resample(rate_hz)


def written(raw: Series, path: Path) -> None:
    """Write a series as CSV, whole or not at all: a time column in seconds, and a column for each
    channel with its unit. Raises ZipperError for a path with another ending."""
    if path.suffix.lower() != ".csv":
        raise ZipperError(f"{path} does not end in .csv. Series are written as CSV.")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    named = zip(raw.channels, raw.units, strict=True)
    table.writerow(["time [s]", *(labelled(channel, unit) for channel, unit in named)])
    for step, row in enumerate(raw.values):
        table.writerow([step / raw.rate_hz, *map(str, row)])  # the shortest that is this number
    write(path, text.getvalue().encode())


def words_of(what: str, given: Any) -> tuple[str, ...]:
    """Names or units."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ZipperError(f"The {what} {given!r:.80} were given. Give a list of strings.")
    return tuple(given)


def check_names(names: Sequence[str], units: Sequence[str]) -> None:
    """Raises a ZipperError for names of channels that are none or not different, or units not
    as many."""
    if not 1 <= len(names) <= MOST_CHANNELS or len(units) != len(names):
        raise ZipperError(
            f"{len(names)} channels with {len(units)} units were given. Give 1 to {MOST_CHANNELS} "
            "channels and a unit for each."
        )
    if len(set(names)) < len(names):
        raise ZipperError(f"Channels of one name were given: {names!s:.200}. Give each its own.")
    for name in [*names, *units]:
        if re.search(r"[\[\]\x00-\x1f\x7f\ud800-\udfff]", name) or name.strip() != name:
            raise ZipperError(
                f"{name!a:.80} cannot name a channel or a unit. Leave out brackets, line breaks "
                "and white space around it."
            )
    if wrong := [name for name in names if not name or name.lower() == "time"]:
        raise ZipperError(f"{wrong[0]!r} cannot name a channel. Give it another name.")


def numbers_of(values: Any, channels: int) -> Float32[np.ndarray, "time channels"]:
    """Values of any kind as (time, channels)."""
    try:
        found = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ZipperError(
            f"These values are no table: {error!s:.200}. Give as many for each step as there are "
            "channels."
        ) from error
    if not found.size and found.ndim < 3:  # [] is a list of no steps
        return np.zeros((0, channels), np.float32)
    if found.dtype.kind not in "iuf":
        raise ZipperError("These values are not all numbers. Give numbers, and no null among them.")
    if found.ndim == 1 and channels == 1:
        found = found[:, None]
    if found.ndim != 2 or found.shape[1] != channels:
        raise ZipperError(
            f"Values of shape {found.shape} were given for {channels} channels. Give (time, "
            f"{channels})."
        )
    check_size(len(found), channels, "This series")
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is found and named
        return np.ascontiguousarray(found, np.float32)


def check_size(steps: int, channels: int, what: str) -> None:
    """Raises a ZipperError for more numbers than a series may have."""
    if steps * channels > MOST_NUMBERS:
        raise ZipperError(
            f"{what} has {steps} steps of {channels} channels, and at most {MOST_NUMBERS:,} "
            "numbers are read at once. Cut it into pieces."
        )


def check_finite(values: Float32[np.ndarray, "time channels"], names: Sequence[str]) -> None:
    """Raises a ZipperError that names the first step and channel that is no number."""
    finite = np.isfinite(values)
    if not finite.all():
        step, channel = np.argwhere(~finite)[0]
        raise ZipperError(
            f"Step {step} of the channel {names[channel]!a:.80} (the first is 0) is "
            f"{values[step, channel]}: {int((~finite).sum())} values are not finite, or too large "
            "for 32 bits. Leave such steps out, or fill them."
        )


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """Values to fit on; a bare list says neither rate nor channels."""
    for value in values:
        if isinstance(value, list | tuple):
            raise ZipperError(
                "A bare list was given to fit on, which says neither rate nor channels. Give "
                "{'values': [[...], ...], 'rate_hz': ..., 'channels': [...]}."
            )
        yield value


def path_of(value: Any) -> str | None:
    """The path that a value of a row names."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return str(value) if isinstance(value, str | Path) and str(value) else None


def opened(value: Any, folder: Path, own: Any) -> Series:
    """What a row means, at least one step of it; own: makes a series of a bare list."""
    if isinstance(value, Series):
        found = value
    elif isinstance(value, list | tuple | np.ndarray) and own is not None:
        found = own(value)
    elif isinstance(value, Mapping) and "values" in value:
        side = parse(
            _Side, {key: value[key] for key in value if key != "values"}, "this series", RATES
        )
        found = Series(value["values"], side.rate_hz, side.channels, side.units)
    elif isinstance(value, bytes):
        found = _timed(_csv(io.BytesIO(value), len(value)), None)
    elif path_of(value) is not None:
        found = _piece(value, folder)
    else:
        raise ZipperError(f"{value!r:.200} was given; give {TAKES}.")
    if not len(found.values):
        raise ZipperError("The series given has no steps. Give one with something in it.")
    return found


def _piece(value: Any, folder: Path) -> Series:
    """The series of a file, or the piece of it that a row means."""
    where = dict(value) if isinstance(value, Mapping) else {"path": value}
    if strange := where.keys() - {"path", "start", "stop", "rate_hz"}:
        raise ZipperError(
            f"{sorted(map(str, strange))!s:.200} was given beside a path; known are start, stop "
            "and rate_hz."
        )
    for key in ("start", "stop"):
        at = where.get(key)
        if at is not None and (type(at) not in (int, float) or not 0 <= at <= 1e12):
            raise ZipperError(f"{key!r} holds {at!r:.80}; give seconds, from 0 to 1e12.")
    start = float(where.get("start") or 0.0)
    stop = None if where.get("stop") is None else float(where["stop"])
    if stop is not None and start >= stop:
        raise ZipperError(
            f"its piece from {start:g} to {stop:g} s is none. Give a start before the stop."
        )
    path = folder / place(where["path"])
    whole = _file(path, where.get("rate_hz"))
    try:
        return whole.between(start, stop) if "start" in where or "stop" in where else whole
    except ZipperError as error:
        raise ZipperError(f"{path}: {error}") from error


def _file(path: Path, rate_hz: Any) -> Series:
    """The series of a file; rate_hz: what the row says of it, if anything."""
    readers = {".csv": _csv_file, ".parquet": _parquet}
    ending = path.suffix.lower()
    if ending not in (".npy", *readers):
        raise ZipperError(f"{path} is no series by its ending. Give .csv, .npy or .parquet.")
    if not os.path.isfile(path):
        there = os.path.exists(path)
        raise ZipperError(f"{path} {'is no plain file' if there else 'does not exist'}.")
    try:
        if ending == ".npy":
            return _array(path, rate_hz)
        table = readers[ending](path)
        return _timed(table, rate_hz)
    except OSError as error:
        raise ZipperError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ZipperError as error:
        raise ZipperError(f"{path}: {error}") from error


def _timed(table: _Table, given: Any) -> Series:
    """The columns of a file at even steps. given: steps a second, as the row says, if it does."""
    values, times = table.values, table.times
    if not len(values):
        raise ZipperError("it has no steps, only a header.")
    if given is not None and (type(given) not in (int, float) or not 0 < given < math.inf):
        raise ZipperError(f"rate_hz holds {given!r:.80}; give steps a second, e.g. 50.")
    if times is None or len(times) < 2:
        if given is None:
            raise ZipperError(
                "Nothing says its rate. Add a column 'time' in seconds (of two steps at least), or "
                "name it in the row as {'path': ..., 'rate_hz': 50}. (A modality's own rate_hz is "
                "that to which it converts.)"
            )
        return Series(values, given, table.channels, table.units)
    rate, at = _rate(times)
    if given is not None and abs(given / rate - 1) > SAME_CLOCK:
        raise ZipperError(
            f"its time column says {rate:g} Hz, and its row {given:g} Hz. Leave out the wrong one."
        )
    if at is not None and given is None:
        raise ZipperError(
            f"its time is not even: from step {at - 1} to {at} are {times[at] - times[at - 1]:g} "
            f"s, and the mean step is {1 / rate:g} s. Cut it at its gaps, or have it brought to "
            f"even steps: {{'path': ..., 'rate_hz': {rate:.4g}}}."
        )
    if at is not None:
        places = np.arange(int((times[-1] - times[0]) * given + 1e-6) + 1) / given
        check_size(len(places), values.shape[1], "At even steps it")
        check_finite(values, table.channels)
        lines = [np.interp(places, times - times[0], channel) for channel in values.T]
        values = np.stack(lines, axis=1).astype(np.float32)
    return Series(values, rate if given is None else given, table.channels, table.units)


def _rate(times: Float64[np.ndarray, " time"]) -> tuple[float, int | None]:
    """Steps a second by the mean of the steps, and where one of them ends that is not like it; None
    where all are. Raises ZipperError for a time that does not go on."""
    if not np.isfinite(times).all():
        step = int(np.argmin(np.isfinite(times)))
        raise ZipperError(f"its time is {times[step]} at step {step}. Give seconds.")
    steps = np.diff(times)
    if not 0 < (mean := float(times[-1] - times[0]) / len(steps)) < math.inf or steps.min() < 0:
        raise ZipperError(
            f"its time does not go on: from step {int(steps.argmin())} to the next are "
            f"{steps.min():g} s. Sort it by its time, which should be in seconds."
        )
    steps /= mean
    steps -= 1
    off = np.abs(steps, out=steps)
    return 1 / mean, int(off.argmax()) + 1 if off.max() > STEPS_OFF else None


def _csv_file(path: Path) -> _Table:
    with path.open("rb") as file:
        return _csv(file, path.stat().st_size)


def _csv(file: BinaryIO, size: int) -> _Table:
    """CSV with a header; nothing is kept but its numbers."""
    if size > MOST_CSV_BYTES:
        raise ZipperError(
            f"it has more than {MOST_CSV_BYTES:,} bytes. Cut it into pieces, or write Parquet."
        )
    numbers, times = array("f"), array("d")
    rows = csv.reader(_bounded(file), strict=True)
    try:
        head = next(rows, [])
        if len(head) == 1 and {*head[0]} & {";", "\t"}:
            raise ZipperError(
                f"its header {head[0]!r:.80} is one cell, below which is no number. Part cells "
                "by commas, and write decimal points."
            )
        channels, units, at = _columns(head)
        for row in rows:
            if len(row) != len(head):
                if not row:
                    continue
                raise ZipperError(
                    f"line {rows.line_num} has {len(row)} cells, and the header {len(head)}."
                )
            found = _cells(row, head, rows.line_num)
            if at is not None:
                times.append(found.pop(at))
            numbers.extend(found)
            if len(numbers) + 2 * len(times) > MOST_NUMBERS:  # a time has 64 bits
                raise ZipperError(
                    f"it has more than {MOST_NUMBERS:,} numbers, which are not read at once. "
                    "Cut it into pieces."
                )
    except csv.Error as error:
        raise ZipperError(f"line {rows.line_num} is no CSV: {error}.") from error
    values = np.asarray(numbers, np.float32).reshape(-1, len(channels))  # without a copy
    return _Table(values, channels, units, None if at is None else np.asarray(times, np.float64))


def _cells(row: Sequence[str], head: Sequence[str], line: int) -> list[float]:
    """The numbers of a line."""
    try:
        if "_" not in "".join(row):  # which float() takes
            return [float(cell) for cell in row]
        raise ValueError
    except ValueError:
        for name, cell in zip(head, row, strict=True):
            try:
                if "_" not in cell:
                    float(cell)
                    continue
            except ValueError:
                pass
            raise ZipperError(
                f"line {line} has {cell!a:.80} for {name!a:.80}, which is no number. Leave such "
                "lines out, or fill them."
            ) from None
        raise


def _bounded(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file as text, none too long."""
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise ZipperError(f"line {number} has more than {MOST_LINE:,} bytes.")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ZipperError(f"line {number} is no text in UTF-8: {error}.") from error


def _columns(head: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], int | None]:
    """The channels and units that the names of columns say, and which column is the time."""
    if not 1 <= len(head) <= MOST_CHANNELS + 1:
        raise ZipperError(
            f"it has {len(head)} columns. Give a header, and 1 to {MOST_CHANNELS} channels."
        )
    named = []
    for name in head:
        found = re.fullmatch(r"\s*([^\[\]]*?)\s*(?:\[\s*([^\[\]]*?)\s*\])?\s*", name)
        if found is None:
            raise ZipperError(
                f"{name!a:.80} names no channel. Write it as 'ax', or with its unit as 'ax [m/s2]'."
            )
        named.append((found[1], found[2] or ""))
    if all(re.fullmatch(r"[-+]?\.?\d[-+.\deE]*", name) for name, _ in named):
        raise ZipperError(
            f"its first line holds numbers ({', '.join(head)!s:.80}). Put the names of the "
            "channels above them."
        )
    times = [at for at, (name, _) in enumerate(named) if name.lower() == "time"]
    if len(times) > 1 or len(times) == len(named):
        raise ZipperError(f"{len(times)} of its {len(named)} columns are the time. Give channels.")
    if times and named[times[0]][1] not in ("", "s"):
        raise ZipperError(f"its time is in {named[times[0]][1]!a:.80}. Give it in seconds.")
    kept = [each for at, each in enumerate(named) if at not in times]
    channels, units = tuple(name for name, _ in kept), tuple(unit for _, unit in kept)
    check_names(channels, units)
    return channels, units, times[0] if times else None


def _array(path: Path, rate_hz: Any) -> Series:
    """NPY and the JSON beside it."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise ZipperError(
            f"{beside.name} is not beside it. Write it: {{'rate_hz': 50, 'channels': ['ax'], "
            "'units': ['m/s2']}, in JSON."
        )
    side = parse(_Side, read_json(beside), str(beside), RATES)
    if rate_hz is not None and rate_hz != side.rate_hz:
        raise ZipperError(
            f"{beside.name} says {side.rate_hz:g} Hz, and its row {rate_hz!r:.80}. Leave that out."
        )
    try:
        held = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy raises nothing more precise for a header that is none
        raise ZipperError(f"it is no array: {error!s:.200}. Write it by numpy.save.") from error
    if held.dtype.kind not in "iuf" or held.ndim not in (1, 2):
        raise ZipperError(
            f"it is an array of {held.dtype}, of shape {held.shape}. Write numbers, (time, "
            "channels)."
        )
    check_size(len(held), math.prod(held.shape[1:]), "It")
    # A copy: what becomes of the file is nothing to the series.
    return Series(np.array(held), side.rate_hz, side.channels, side.units)


def _parquet(path: Path) -> _Table:
    """Parquet, a column at a time."""
    lib, types = extra("pyarrow.parquet"), extra("pyarrow.types")
    try:
        with lib.ParquetFile(path) as file:
            schema, steps = file.schema_arrow, file.metadata.num_rows
            channels, units, at = _columns(schema.names)
            check_size(steps, len(schema.names), "It")
            if wrong := [each for each in schema if not _plain(each.type, types)]:
                raise ZipperError(
                    f"its column {wrong[0].name!a:.80} is of type {wrong[0].type}. Give numbers; "
                    "time in seconds."
                )
            kept = [name for number, name in enumerate(schema.names) if number != at]
            values = np.empty((steps, len(kept)), np.float32)
            times = None if at is None else _column(file, schema.names[at]).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is found and named
                for number, name in enumerate(kept):
                    values[:, number] = _column(file, name)
    except (ZipperError, OSError):
        raise
    except Exception as error:  # whatever a stranger's file leads pyarrow to
        raise ZipperError(f"it is no Parquet: {error!s:.200}.") from error
    return _Table(values, channels, units, times)


def _column(file: Any, name: str) -> np.ndarray:
    """A column of a Parquet file, NaN where it has nothing."""
    column: np.ndarray = file.read(columns=[name]).column(0).to_numpy()
    return column


def _plain(kind: Any, types: Any) -> bool:
    return bool(types.is_floating(kind) or types.is_integer(kind))


def labelled(channel: str, unit: str) -> str:
    """A channel as the head of a file has it: "ax [m/s2]"."""
    return f"{channel} [{unit}]" if unit else channel
