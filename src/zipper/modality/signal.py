"""Signals: channels over time to a row of ids and back. Accelerometers, electrocardiograms, prices.

Every channel is brought to mean 0 and scale 1 by what the data it was fitted on had. Then an id
names the nearest of K centroids of a few steps of all channels ("patches"), or the bin that one
channel lies in at one step ("bins", as Chronos has them, Ansari et al. 2024; but by a scale that is
stored, since one of each series' own loses how large its values are). The codebook and that scale
are the whole definition; nothing here knows of towers or sound.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64

from zipper.errors import ZipperError
from zipper.modality.codebook import kmeans, load_codebook, nearest, save_codebook, stacked
from zipper.modality.kind import Kind, Scores
from zipper.modality.series import (
    HIGHEST_RATE_HZ,
    LOWEST_RATE_HZ,
    TAKES,
    check_names,
    conformed,
    counted,
    labelled,
    opened,
    path_of,
    written,
)
from zipper.modality.series import Series as Series
from zipper.saving.files import (
    as_json,
    parse,
    place,
    read_json,
    settle,
    write,
    write_json,
)

Method = Literal["patches", "bins"]
MOST_FITTED = 1 << 28  # of all series that are fitted on: 1 GiB
MOST_CODEBOOK = 1 << 24  # numbers: 64 MiB
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
        check_names(self.channels, self.units)
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


class Signal(Kind):
    """Series <-> ids. By patches, ids 0 .. K-1 are centroids of `patch` steps of all channels; by
    bins, id c * K + b is bin b of channel c, the channels of a step one after the other. Then come
    begin and end.

    A series of another rate is resampled, channels are put in order by their names. Lost is what
    the codebook cannot say, and by patches the length: the last patch is filled up by repeating the
    last step, and `decode` gives all of it.
    """

    name = "signal"
    takes: ClassVar[str] = TAKES
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
        patch: int | None = None,
        rate_hz: float | None = None,
        method: Method = "patches",
        limit: float | None = None,
        seed: int = 0,
    ) -> "Signal":
        """A signal for data like this.

        values: Series, files, pieces of files or values in a row, as `read` takes them; the first
        says the channels, their units and their order, and its rate holds unless `rate_hz` is
        given. codes: centroids, by k-means of `seed`; with method="bins" as many bins of one width
        from -limit to limit scales, where what lies beyond falls into the outermost (limit and
        codes were never tuned). patch: for patches alone, 8 by default, never tuned; limit: for
        bins alone, 5 by default.

        Raises ZipperError for data that does not agree, that is too little for so many codes, or
        more than 2**28 numbers, all of which are in memory.
        """
        if method == "bins" and patch not in (None, 1):
            raise ZipperError(f"patch={patch} was given; bins are of 1 step. Leave it out.")
        if method == "patches" and limit is not None:
            raise ZipperError(f"limit={limit:g} was given; it is of bins. Leave it out.")
        patch = 8 if patch is None else patch
        limit = 5.0 if limit is None else limit
        series = [opened(value, Path(), None) for value in counted(values)]
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
        points = [stacked(_normal(one.values, mean, scale), patch) for one in alike]
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
            points = stacked(points, self.config.patch)
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
        return opened(value, folder, self._own)

    def files(self, value: Any, folder: Path = Path()) -> list[Path]:
        """See `Kind.files`; of an array also the JSON beside it."""
        named = path_of(value)
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
            "channels": ", ".join(labelled(channel, unit) for channel, unit in named),
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
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_codebook(self.codebook, folder / self.CODEBOOK)
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
            found = load_codebook(folder / cls.CODEBOOK, config.codes, config.width)
            loaded = cls(found, config)
        except ZipperError as error:
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


def warped(
    wanted: Float64[np.ndarray, "time channels"], made: Float64[np.ndarray, "other_time channels"]
) -> tuple[float, float]:
    """Dynamic time warping: the distance along the best way, and steps wanted; none of either where
    none is wanted. Of more than 1,000 steps, both are averaged over as many steps as bring them
    below."""
    if not len(wanted):
        return 0.0, 0.0
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
    named = escape(labelled(raw.channels[channel], raw.units[channel]))
    return (
        f"<div><small>{named}: {low:g} to {high:g}, {raw.seconds:g} s</small><br>"
        '<svg viewBox="0 0 600 60" width="600" height="60" role="img">'
        f'<polyline fill="none" stroke="currentColor" points="{line}"/></svg></div>'
    )


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
