"""Signals: channels over time to a row of ids and back. Accelerometers, electrocardiograms, prices.

Every channel is brought to mean 0 and scale 1 by what the data it was fitted on had. Then an id
names the nearest of K centroids of a few steps of all channels ("patches"), or the bin that one
channel lies in at one step ("bins", as Chronos has them, Ansari et al. 2024; but by a scale that is
stored, since one of each series' own loses how large its values are). The codebook and that scale
are the whole definition; nothing here knows of towers or sound.
"""

import csv
import hashlib
import io
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.codebook import kmeans, nearest
from zipper.modality.kind import Kind, Scores
from zipper.saving.files import (
    as_json,
    header,
    parse,
    place,
    read_json,
    settle,
    write,
    write_json,
)

Method = Literal["patches", "bins"]

MOST_NUMBERS = 1 << 25  # of one series: 128 MiB; 15 hours of 6 channels at 100 Hz
MOST_FITTED = 1 << 28  # of all series that are fitted on: 1 GiB
MOST_CHANNELS = 1_000
MOST_CODEBOOK = 1 << 24  # numbers: 64 MiB
MOST_CSV_BYTES = 1 << 30
MOST_LINE = 1 << 20  # bytes of a line of CSV
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1e-9, 1e9  # one step in 30 years, and radar
#: Relative: rates that are nearer are one. A time column in text is rounded, and clocks of sensors
#: are worse.
SAME_RATE = 1e-4
SAME_CLOCK = 0.01  # relative, of a time column and what a row says of its rate
MOST_RATIO = 1_000  # of two rates
#: Of a step, by which one may be shorter or longer than their mean. Times are rounded and sensors
#: are late; beyond, a step is missing or there twice.
STEPS_OFF = 0.5
SLACK_S = 0.5  # that the end of a piece may lie behind the end of its file: manifests are rounded
FARTHEST = 1e6  # scales: what lies beyond is cut, so that squares stay finite
DTW_STEPS = 1_000  # of either series; longer ones are averaged down
STEPS = 150  # of the k-means
POINTS = 1 << 16  # that are looked up together
TRACES, TRACE_PLACES = 12, 300  # that a picture shows

#: What a file may ask for: (least, most).
LIMITS = {
    "rate_hz": (LOWEST_RATE_HZ, HIGHEST_RATE_HZ),
    "mean": (-1e38, 1e38),
    "scale": (1e-38, 1e38),
    "patch": (1, 10_000),
    "codes": (2, 65_536),
}


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
        names, of = _words("channels", channels), _words("units", units)
        of = of or ("",) * len(names)
        _check_names(names, of)
        numbers = _numbers(values, len(names))
        if not isinstance(rate_hz, int | float | np.integer | np.floating) or isinstance(
            rate_hz, bool
        ):
            raise ZipperError(f"The rate {rate_hz!r:.80} was given. Give steps a second, e.g. 50.")
        if not LOWEST_RATE_HZ <= float(rate_hz) <= HIGHEST_RATE_HZ:  # NaN does not
            raise ZipperError(
                f"A rate of {float(rate_hz):g} Hz was given; it must lie between "
                f"{LOWEST_RATE_HZ:g} and {HIGHEST_RATE_HZ:g}."
            )
        _check_finite(numbers, names)
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
        _check_size(math.ceil(len(self.values) * ratio), len(self.channels), "At the other rate it")
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
class SignalConfig:
    """What the ids are made of.

    rate_hz, channels, units: what every series is brought to, or refused. mean, scale: of each
    channel, in its unit; a value is coded as (value - mean) / scale. method: "patches" or "bins".
    patch: steps that one id stands for ("patches"). codes: of the codebook: centroids, or bins of a
    channel.
    """

    rate_hz: float
    channels: tuple[str, ...]
    units: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    method: Method = "patches"
    patch: int = 8
    codes: int = 256

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        _check_names(self.channels, self.units)
        if len(self.mean) != len(self.channels) or len(self.scale) != len(self.channels):
            raise ZipperError(
                f"{len(self.mean)} means and {len(self.scale)} scales were given for "
                f"{len(self.channels)} channels. Give one of each for each channel."
            )
        if self.method == "bins" and self.patch != 1:
            raise ZipperError(f"patch={self.patch} was given; bins are of 1 step. Give patch=1.")
        if max(self.codes * self.width, self.codes * len(self.channels)) > MOST_CODEBOOK:
            raise ZipperError(
                f"{self.codes} codes of {self.patch} steps of {len(self.channels)} channels are "
                f"more than {MOST_CODEBOOK:,} numbers. Ask for fewer or shorter ones."
            )

    @property
    def width(self) -> int:
        """Numbers of one entry of the codebook."""
        return self.patch * len(self.channels) if self.method == "patches" else 1

    @property
    def ids_per_s(self) -> float:
        """How many ids a second has."""
        each = 1 / self.patch if self.method == "patches" else len(self.channels)
        return self.rate_hz * each


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


class Signal(Kind):
    """Series <-> ids. By patches, ids 0 .. K-1 are centroids of `patch` steps of all channels; by
    bins, id c * K + b is bin b of channel c, the channels of a step one after the other. Then come
    begin and end.

    A series of another rate is resampled, channels are put in order by their names. Lost is what
    the codebook cannot say, and by patches the length: the last patch is filled up by repeating the
    last step, and `decode` gives all of it.
    """

    name = "signal"
    takes: ClassVar[str] = (
        'the path of a CSV, NPY or Parquet file, a piece of one as {"path", "start", "stop"} in '
        'seconds, {"values", "rate_hz", "channels"}, or a list of steps'
    )
    suffix: ClassVar[str] = ".csv"
    CODEBOOK: ClassVar[str] = "codebook.safetensors"
    CONFIG: ClassVar[str] = "signal.json"

    def __init__(self, codebook: Float32[np.ndarray, "codes width"], config: SignalConfig) -> None:
        """codebook: normalised values, (codes, patch * channels) with the channels of a step side
        by side; of bins their centres, (codes, 1), rising."""
        wanted = (config.codes, config.width)
        if codebook.shape != wanted or not np.isfinite(codebook).all():
            raise ZipperError(
                f"a codebook of shape {codebook.shape} was given, {wanted} and finite was wanted. "
                "Fit the signal anew."
            )
        if config.method == "bins" and not (np.diff(codebook[:, 0]) > 0).all():
            raise ZipperError("the bins given do not rise. Fit the signal anew.")
        self.codebook, self.config, self.codes = codebook.copy(), config, config.codes
        self.begin = self.codes * (len(config.channels) if config.method == "bins" else 1)
        self.end = self.begin + 1
        self.vocabulary = self.end + 1
        self._mean, self._scale = np.array(config.mean), np.array(config.scale)

    @classmethod
    def fitted(
        cls,
        values: Sequence[Any],
        codes: int = 256,
        patch: int = 8,
        rate_hz: float | None = None,
        method: Method = "patches",
        limit: float = 5.0,
        seed: int = 0,
    ) -> "Signal":
        """A signal for data like this.

        values: Series, files, pieces of files or values in a row, as `read` takes them; the first
        says the channels, their units and their order, and its rate holds unless `rate_hz` is
        given. codes: centroids, by k-means of `seed`; with method="bins" as many bins of one width
        from -limit to limit scales, where what lies beyond falls into the outermost (limit and
        codes were never tuned; `patch` neither, and it is for patches alone).

        Raises ZipperError for data that does not agree, that is too little for so many codes, or
        more than 2**28 numbers, all of which are in memory.
        """
        series = [_series(value, Path(), None) for value in _counted(values)]
        if not series:
            raise ZipperError("There are no series to fit on. Give some.")
        first = series[0]
        rate = first.rate_hz if rate_hz is None else rate_hz
        alike = [conformed(one, rate, first.channels, first.units) for one in series]
        if sum(one.values.size for one in alike) > MOST_FITTED:
            raise ZipperError(
                f"This data has more than {MOST_FITTED:,} numbers. Fit on a part of it."
            )
        mean, scale = _spread([one.values for one in alike])
        config = SignalConfig(
            rate_hz=rate,
            channels=first.channels,
            units=first.units,
            mean=mean,
            scale=scale,
            method=method,
            patch=patch if method == "patches" else 1,
            codes=codes,
        )
        if method == "bins":
            if not 0 < limit <= FARTHEST:
                raise ZipperError(f"limit={limit:g} was given; give scales, e.g. 5.")
            centres = (np.arange(codes) + 0.5) * (2 * limit / codes) - limit
            return cls(centres.astype(np.float32)[:, None], config)
        points = [patched(_normal(one.values, mean, scale), patch) for one in alike]
        found = kmeans(
            np.concatenate(points), codes, seed, STEPS, points_of=f"patches of {patch} steps"
        )
        return cls(found.astype(np.float32), config)

    @property
    def fingerprint(self) -> str:
        """sha256 of the codebook and of what it is made of."""
        described = json.dumps(asdict(self.config), sort_keys=True)
        return hashlib.sha256(self.codebook.tobytes() + described.encode()).hexdigest()

    def encode(self, raw: Any) -> list[int]:
        """Ids of a series, or of what `read` takes: one per started patch, or one per channel and
        step. Raises ZipperError for other channels or units, naming them, and for no steps."""
        points = self._points(self.read(raw))
        if self.config.method == "patches":
            points = patched(points, self.config.patch)
            parts = [points[at : at + POINTS] for at in range(0, len(points), POINTS)]
            codes: list[int] = np.concatenate(
                [nearest(one, self.codebook) for one in parts]
            ).tolist()
            return codes
        centres = self.codebook[:, 0]
        bins = np.searchsorted((centres[1:] + centres[:-1]) / 2, points)
        ids: list[int] = (bins + self.codes * np.arange(points.shape[1])).ravel().tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> Series:
        """The series of the ids, in the units of the channels; ids that stand for none are passed
        over.

        By bins, a step ends where a channel comes that is not behind the one before it; a channel
        that a step lacks keeps its value, and begins with its mean.
        """
        kept = np.array([one for one in ids if 0 <= one < self.begin], np.int64)
        width = len(self.config.channels)
        if self.config.method == "patches":
            points = self.codebook[kept].reshape(-1, width)
        else:
            points = _held(kept // self.codes, self.codebook[kept % self.codes, 0], width)
        values = points * self._scale + self._mean
        largest = np.finfo(np.float32).max
        return self._own(np.clip(values, -largest, largest).astype(np.float32))

    def read(self, value: Any, folder: Path = Path()) -> Series:
        """A series: from a Series, a file or a piece of one, or values in a row.

        A file is CSV, NPY or Parquet by its ending. CSV and Parquet have a column for each channel,
        named "ax" or "ax [m/s2]"; a column "time", in seconds, says the rate by its mean step, from
        which none may differ by more than half. Without it the row says the rate, as {"path": ...,
        "rate_hz": 50}; with both, which must agree within 1 %, uneven steps are made even along
        lines between them. NPY is (time, channels), with a JSON of the same stem beside it:
        {"rate_hz": 50, "channels": ["ax"], "units": ["m/s2"]}. A piece is {"path": ..., "start":
        1.5, "stop": 3}, in seconds from the first step.

        In a row, it is {"values": [[...], ...], "rate_hz": ..., "channels": [...]}, or a bare list
        of steps, which is in this modality's own rate, channels and units.

        Raises ZipperError for anything else, for NaN and infinity, for no steps, and for more than
        2**25 numbers (of CSV 1 GiB), before there is memory taken for them.
        """
        return _series(value, folder, self._own)

    def files(self, value: Any, folder: Path = Path()) -> list[Path]:
        """See `Kind.files`; of an array also the JSON beside it."""
        named = _path(value)
        if named is None:
            return []
        path = folder / place(named)
        return [path, path.with_suffix(".json")] if path.suffix.lower() == ".npy" else [path]

    def write(self, raw: Series, path: Path) -> None:
        """As CSV: a time column in seconds, and a column for each channel with its unit. `read`
        gives the same series again (of one step, told its rate)."""
        written(raw, path)

    def told(self, raw: Series) -> Any:
        """How long it is, of what: values are for files."""
        return f"{raw.seconds:.2f} s of {', '.join(raw.channels)} at {raw.rate_hz:g} Hz"

    def html(self, raw: Series) -> str:
        """A picture of each channel over time, the first 12."""
        if not len(raw.values):
            return "<span>(nothing)</span>"
        traces = [_trace(raw, channel) for channel in range(min(TRACES, len(raw.channels)))]
        more = len(raw.channels) - len(traces)
        return "".join([*traces, f"<div>and {more} more channels</div>" * bool(more)])

    def seconds(self, raw: Series) -> float:
        """See `Kind.seconds`."""
        return raw.seconds

    def about(self) -> Mapping[str, Any]:
        """Its rates, channels and codebook."""
        config = self.config
        named = zip(config.channels, config.units, strict=True)
        kept = f"patches of {config.patch} steps" if config.method == "patches" else "bins"
        return {
            "rate": f"{config.rate_hz:g} steps a second",
            "channels": ", ".join(_named(channel, unit) for channel, unit in named),
            "ids": f"{config.ids_per_s:g} a second, {config.codes} {kept}",
        }

    def scores(self, wanted: Sequence[Any], made: Sequence[Any]) -> Scores:
        """mse: squared error in scales of the channels, of every number wanted; a step that was not
        made counts as the mean, and those too many not at all. dtw: dynamic time warping (Sakoe and
        Chiba 1978), the distance (Euclid, in scales) along the best way, by steps wanted; series of
        more than 1,000 steps are averaged down to that first. length: how far it is off, as a share
        of the one wanted."""
        found: dict[str, list[tuple[float, float]]] = {"mse": [], "dtw": [], "length": []}
        for one, other in zip(wanted, made, strict=True):
            a, b = self._points(one).astype(np.float64), self._points(other).astype(np.float64)
            missing = max(0, len(a) - len(b))
            error = np.square(a - np.pad(b, ((0, missing), (0, 0)))[: len(a)]).sum()
            found["mse"].append((float(error), float(a.size)))
            found["dtw"].append(warped(a, b if len(b) else np.zeros_like(a[:1])))
            found["length"].append((abs(one.seconds - other.seconds), one.seconds))
        return found

    @classmethod
    def example(cls, folder: Path) -> str:
        """Pendulums: a manifest.jsonl with the fields text and signal, and the CSV files that it
        names. They are computed by the equation of motion, which a README.md there says."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, (metres, degrees) in enumerate(_PENDULUMS):
            swing = _pendulum(metres, degrees)
            written(swing, folder / f"pendulum_{number}.csv")
            text = f"a pendulum of {metres:g} m, let go at {degrees:g} degrees"
            rows.append(as_json({"text": text, "signal": f"pendulum_{number}.csv"}))
        write(folder / "manifest.jsonl", "".join(f"{row}\n" for row in rows).encode())
        write(folder / "README.md", _ABOUT_PENDULUMS.encode())
        return "--set codes=64"

    def save(self, folder: str | Path) -> None:
        """Writes codebook.safetensors and signal.json; the second pins both by a hash."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codebook": self.codebook}, folder / self.CODEBOOK)
        write_json(folder / self.CONFIG, {**asdict(self.config), "sha256": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> "Signal":
        """Reads what `save` wrote. Raises ZipperError for anything else, and for a codebook or a
        description that was changed since."""
        folder = place(folder)
        try:
            described = read_json(folder / cls.CONFIG)
            pinned = described.pop("sha256", None)
            config = parse(SignalConfig, described, str(folder / cls.CONFIG), LIMITS)
            entries = header(folder / cls.CODEBOOK).items()
            held = {name: (entry.dtype, entry.shape) for name, entry in entries}
            if held != {"codebook": ("F32", (config.codes, config.width))}:
                raise ZipperError(
                    f"{folder / cls.CODEBOOK} holds {held!s:.100}, not the codebook that "
                    f"{cls.CONFIG} describes"
                )
            loaded = cls(load_file(folder / cls.CODEBOOK)["codebook"], config)
        except (OSError, SafetensorError, ZipperError) as error:
            raise ZipperError(
                f"{folder} holds no signal: {error} It needs {cls.CONFIG} and {cls.CODEBOOK}, "
                "written by save."
            ) from error
        if loaded.fingerprint != pinned:
            raise ZipperError(
                f"{folder} holds a codebook and a {cls.CONFIG} that were not saved together: ids "
                "would mean other values. Restore both files from the run that made them, or fit "
                "the signal anew."
            )
        return loaded

    def _own(self, values: Any) -> Series:
        """Values in this modality's own rate, channels and units."""
        config = self.config
        return Series(values, config.rate_hz, config.channels, config.units)

    def _points(self, raw: Series) -> Float32[np.ndarray, "time channels"]:
        """A series in this modality's terms, normalised."""
        config = self.config
        alike = conformed(raw, config.rate_hz, config.channels, config.units)
        return _normal(alike.values, config.mean, config.scale)


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
        asked = ", ".join(_named(name, unit) for name, unit in wanted.items())
        raise ZipperError(
            f"Of the channels {'; '.join(faults[:8])}{more}. Give a series of {asked:.300}."
        )
    order = [raw.channels.index(name) for name in channels]
    if order != [*range(len(order))]:
        raw = Series(raw.values[:, order], raw.rate_hz, tuple(channels), tuple(units))
    return raw.resample(rate_hz)


def patched(
    points: Float32[np.ndarray, "time channels"], patch: int
) -> Float32[np.ndarray, "patches width"]:
    """`patch` steps side by side; the last one is filled up by repeating the last step."""
    width = patch * points.shape[1]
    if not len(points):
        return np.zeros((0, width), np.float32)
    return np.pad(points, ((0, -len(points) % patch), (0, 0)), mode="edge").reshape(-1, width)


def warped(
    wanted: Float64[np.ndarray, "time channels"], made: Float64[np.ndarray, "other_time channels"]
) -> tuple[float, float]:
    """Dynamic time warping: the distance along the best way, and steps wanted. Neither may be
    empty; of more than 1,000 steps, both are averaged over as many steps as bring them below."""
    by = -(-max(len(wanted), len(made)) // DTW_STEPS)
    wanted, made = _averaged(wanted, by), _averaged(made, by)
    row = np.full(len(made), np.inf)
    for step, point in enumerate(wanted):
        cost = np.sqrt(np.square(made - point).sum(axis=1))
        entered = np.minimum(row, np.concatenate([[np.inf if step else 0.0], row[:-1]]))
        # The best way along the row: from any place that it was entered at, by what lies between.
        along = np.cumsum(cost)
        row = np.minimum.accumulate(entered - (along - cost)) + along
    return float(row[-1]), float(len(wanted))


def written(raw: Series, path: Path) -> None:
    """Write a series as CSV, whole or not at all: a time column in seconds, and a column for each
    channel with its unit. Raises ZipperError for a path with another ending."""
    if path.suffix.lower() != ".csv":
        raise ZipperError(f"{path} does not end in .csv. Series are written as CSV.")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    named = zip(raw.channels, raw.units, strict=True)
    table.writerow(["time [s]", *(_named(channel, unit) for channel, unit in named)])
    for step, row in enumerate(raw.values):
        table.writerow([step / raw.rate_hz, *map(str, row)])  # the shortest that is this number
    write(path, text.getvalue().encode())


# --- checks


def _words(what: str, given: Any) -> tuple[str, ...]:
    """Names or units."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
        raise ZipperError(f"The {what} {given!r:.80} were given. Give a list of strings.")
    return tuple(given)


def _check_names(names: Sequence[str], units: Sequence[str]) -> None:
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


def _numbers(values: Any, channels: int) -> Float32[np.ndarray, "time channels"]:
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
    _check_size(len(found), channels, "This series")
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is found and named
        return np.ascontiguousarray(found, np.float32)


def _check_size(steps: int, channels: int, what: str) -> None:
    if steps * channels > MOST_NUMBERS:
        raise ZipperError(
            f"{what} has {steps} steps of {channels} channels, and at most {MOST_NUMBERS:,} "
            "numbers are read at once. Cut it into pieces."
        )


def _check_finite(values: Float32[np.ndarray, "time channels"], names: Sequence[str]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        step, channel = np.argwhere(~finite)[0]
        raise ZipperError(
            f"Step {step} of the channel {names[channel]!a:.80} (the first is 0) is "
            f"{values[step, channel]}: {int((~finite).sum())} values are not finite, or too large "
            "for 32 bits. Leave such steps out, or fill them."
        )


# --- reading


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """Values to fit on; a bare list says neither rate nor channels."""
    for value in values:
        if isinstance(value, list | tuple):
            raise ZipperError(
                "A bare list was given to fit on, which says neither rate nor channels. Give "
                "{'values': [[...], ...], 'rate_hz': ..., 'channels': [...]}."
            )
        yield value


def _path(value: Any) -> str | None:
    """The path that a value of a row names."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return str(value) if isinstance(value, str | Path) and str(value) else None


def _series(value: Any, folder: Path, own: Any) -> Series:
    """What a row means, at least one step of it; own: makes a series of a bare list."""
    if isinstance(value, Series):
        found = value
    elif isinstance(value, list | tuple | np.ndarray) and own is not None:
        found = own(value)
    elif isinstance(value, Mapping) and "values" in value:
        side = parse(
            _Side, {key: value[key] for key in value if key != "values"}, "this series", LIMITS
        )
        found = Series(value["values"], side.rate_hz, side.channels, side.units)
    elif _path(value) is not None:
        found = _piece(value, folder)
    else:
        raise ZipperError(f"{value!r:.200} was given; give {Signal.takes}.")
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
    readers = {".csv": _csv, ".parquet": _parquet}
    ending = path.suffix.lower()
    if ending not in (".npy", *readers):
        raise ZipperError(f"{path} is no series by its ending. Give .csv, .npy or .parquet.")
    if not path.is_file():
        raise ZipperError(f"{path} {'is no plain file' if path.exists() else 'does not exist'}.")
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
                "name it in the row as {'path': ..., 'rate_hz': 50}."
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
        places = np.arange(int((times[-1] - times[0]) * given) + 1) / given
        _check_size(len(places), values.shape[1], "At even steps it")
        _check_finite(values, table.channels)
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


def _csv(path: Path) -> _Table:
    """CSV with a header; nothing is kept but its numbers."""
    if path.stat().st_size > MOST_CSV_BYTES:
        raise ZipperError(
            f"it has more than {MOST_CSV_BYTES:,} bytes. Cut it into pieces, or write Parquet."
        )
    numbers, times = array("f"), array("d")
    with path.open("rb") as file:
        rows = csv.reader(_bounded(file), strict=True)
        try:
            head = next(rows, [])
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
    _check_names(channels, units)
    return channels, units, times[0] if times else None


def _array(path: Path, rate_hz: Any) -> Series:
    """NPY and the JSON beside it."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise ZipperError(
            f"{beside.name} is not beside it. Write it: {{'rate_hz': 50, 'channels': ['ax'], "
            "'units': ['m/s2']}, in JSON."
        )
    side = parse(_Side, read_json(beside), str(beside), LIMITS)
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
    _check_size(len(held), math.prod(held.shape[1:]), "It")
    # A copy: what becomes of the file is nothing to the series.
    return Series(np.array(held), side.rate_hz, side.channels, side.units)


def _parquet(path: Path) -> _Table:
    """Parquet, a column at a time."""
    lib, types = extra("pyarrow.parquet"), extra("pyarrow.types")
    try:
        with lib.ParquetFile(path) as file:
            schema, steps = file.schema_arrow, file.metadata.num_rows
            channels, units, at = _columns(schema.names)
            _check_size(steps, len(schema.names), "It")
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


# --- numbers


def _spread(
    series: Sequence[Float32[np.ndarray, "_ channels"]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all series; a channel that does not move has
    the scale 1."""
    steps = sum(map(len, series))
    mean = np.sum([one.sum(axis=0, dtype=np.float64) for one in series], axis=0) / steps
    squares = [np.square(one - mean).sum(axis=0) for one in series]
    scale = np.sqrt(np.sum(squares, axis=0) / steps)
    still = scale <= np.maximum(1e-7 * np.abs(mean), LIMITS["scale"][0])
    return tuple(mean.tolist()), tuple(np.where(still, 1.0, scale).tolist())


def _normal(
    values: Float32[np.ndarray, "time channels"], mean: Sequence[float], scale: Sequence[float]
) -> Float32[np.ndarray, "time channels"]:
    normal = values - np.array(mean)
    normal /= np.array(scale)
    return np.clip(normal, -FARTHEST, FARTHEST, out=normal).astype(np.float32)


def _held(
    channels: Int64[np.ndarray, " ids"], points: Float32[np.ndarray, " ids"], width: int
) -> Float32[np.ndarray, "time channels"]:
    """Steps of values that come one by one; what a step lacks is held from the one before."""
    if not len(channels):
        return np.zeros((0, width), np.float32)
    steps = np.concatenate([[0], np.cumsum(channels[1:] <= channels[:-1])])
    found = np.full((steps[-1] + 1, width), np.nan, np.float32)
    found[steps, channels] = points
    found[0] = np.nan_to_num(found[0])
    there = np.where(np.isnan(found), 0, np.arange(len(found))[:, None])
    return found[np.maximum.accumulate(there, axis=0), np.arange(width)]


def _averaged(
    points: Float64[np.ndarray, "time channels"], by: int
) -> Float64[np.ndarray, "fewer channels"]:
    """The means of `by` steps each; the last is filled up by repeating the last step."""
    if by == 1:
        return points
    whole = np.pad(points, ((0, -len(points) % by), (0, 0)), mode="edge")
    return whole.reshape(-1, by, points.shape[1]).mean(axis=1)


# --- showing


def _named(channel: str, unit: str) -> str:
    return f"{channel} [{unit}]" if unit else channel


def _trace(raw: Series, channel: int) -> str:
    """One channel over time: the lowest and highest value at each of so many places, since steps
    left out would take the peaks with them."""
    values = raw.values[:, channel].astype(np.float64)
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(0, len(values), min(len(values), TRACE_PLACES) + 1).astype(int)
    points = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[start:stop]
        ends = [int(part.argmin()), int(part.argmax())]
        points += [(start + at, float(part[at])) for at in sorted({*ends})]
    across, up = 600 / max(1, len(values) - 1), 56 / ((high - low) or 1.0)
    line = " ".join(f"{at * across:.1f},{58 - (value - low) * up:.1f}" for at, value in points)
    named = escape(_named(raw.channels[channel], raw.units[channel]))
    return (
        f"<div><small>{named}: {low:g} to {high:g}, {raw.seconds:g} s</small><br>"
        '<svg viewBox="0 0 600 60" width="600" height="60" role="img">'
        f'<polyline fill="none" stroke="currentColor" points="{line}"/></svg></div>'
    )


# --- the example

_PENDULUMS = [(0.25, 20.0), (0.25, 80.0), (0.5, 30.0), (0.5, 60.0), (1.0, 45.0), (1.0, 120.0)]
_ABOUT_PENDULUMS = """# Pendulums

Computed, not measured: damped pendulums by their equation of motion,
angle'' = -g / length * sin(angle) - 0.15 / s * angle', with g = 9.81 m/s2, by the method of Runge
and Kutta (fourth order), 6 s at 50 Hz. Each has the channels angle and speed; manifest.jsonl says
of each in words how long it is and where it was let go.
"""


def _pendulum(metres: float, degrees: float) -> Series:
    """Six seconds of a damped pendulum."""

    def slope(state: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "2"]:
        angle, speed = state
        return np.array([speed, -9.81 / metres * math.sin(angle) - 0.15 * speed])

    rate, states = 50, [np.array([math.radians(degrees), 0.0])]
    for _ in range(6 * rate - 1):
        a = slope(at := states[-1])
        b = slope(at + a / (2 * rate))
        c = slope(at + b / (2 * rate))
        d = slope(at + c / rate)
        states.append(at + (a + 2 * b + 2 * c + d) / (6 * rate))
    return Series(np.stack(states), rate, ("angle", "speed"), ("rad", "rad/s"))
