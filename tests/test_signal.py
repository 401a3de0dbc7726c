"""Signals: the codes say what the codebook can, other channels and units are named, files are read
with care, and a saved signal is that one or refused."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist

from zipper import Pipeline, Segment, modality
from zipper.data import fitting
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality import series
from zipper.modality.codebook import stacked
from zipper.modality.kind import Kind, Modality
from zipper.modality.signal import Series, Signal, SignalConfig, warped
from zipper.model import Zipper
from zipper.testing import tiny_tower

CHANNELS, UNITS = ("ax", "ay"), ("m/s2", "g")


def walk(seed: int, steps: int = 100, rate_hz: float = 50.0) -> Series:
    """Two channels of other sizes that swing, with some noise."""
    chance, time = np.random.default_rng(seed), np.arange(steps) / rate_hz
    swing = np.sin(2 * np.pi * chance.uniform(1, 4) * time + seed)
    noise = chance.normal(0, 0.05, (2, steps))
    values = [300 + 50 * swing + noise[0], 1e-3 * (swing**2 + noise[1])]
    return Series(np.stack(values, axis=1), rate_hz, CHANNELS, UNITS)


PATCHES = Signal.fitted([walk(seed) for seed in range(6)], codes=16, patch=4)
BINS = Signal.fitted([walk(seed) for seed in range(6)], codes=128, method="bins")
BOTH = pytest.mark.parametrize("kind", [PATCHES, BINS], ids=["patches", "bins"])


# --- the mapping


def test_ids_are_codes_then_begin_and_end() -> None:
    for kind in (PATCHES, BINS):
        assert isinstance(kind, Modality) and isinstance(kind, Kind)
    assert (PATCHES.begin, PATCHES.end, PATCHES.vocabulary) == (16, 17, 18)
    assert (BINS.begin, BINS.end, BINS.vocabulary) == (256, 257, 258)
    assert PATCHES.config.ids_per_s == 12.5 and BINS.config.ids_per_s == 100


def test_a_code_is_the_centroid_nearest_to_its_patch() -> None:
    series = walk(99)
    config = PATCHES.config
    normal = (series.values - np.array(config.mean)) / np.array(config.scale)
    points = normal.reshape(25, 8)
    assert PATCHES.encode(series) == cdist(points, PATCHES.codebook).argmin(axis=1).tolist()


def test_channels_are_coded_at_mean_0_and_scale_1() -> None:
    values = np.concatenate([walk(seed).values for seed in range(6)]).astype(np.float64)
    np.testing.assert_allclose(PATCHES.config.mean, values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(PATCHES.config.scale, values.std(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("steps", "ids"), [(1, 1), (3, 1), (4, 1), (5, 2), (100, 25)])
def test_the_last_patch_is_filled_up_by_its_last_step(steps: int, ids: int) -> None:
    series = walk(1, steps)
    codes = PATCHES.encode(series)
    assert len(codes) == ids and len(PATCHES.decode(codes).values) == 4 * ids
    held = np.concatenate([series.values, np.repeat(series.values[-1:], -steps % 4, axis=0)])
    assert PATCHES.encode(Series(held, 50, CHANNELS, UNITS)) == codes
    assert stacked(np.zeros((0, 2), np.float32), 4).shape == (0, 8)


numbers = st.floats(-5, 5, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_bins_lose_less_than_half_a_bin(rows: list[tuple[float, float]]) -> None:
    """In scales, and inside the limit; how many steps there are is not lost."""
    mean, scale = np.array(BINS.config.mean), np.array(BINS.config.scale)
    series = Series(np.array(rows) * scale + mean, 50, CHANNELS, UNITS)
    ids = BINS.encode(series)
    made = BINS.decode(ids)
    assert made.values.shape == series.values.shape
    off = np.abs(made.values.astype(np.float64) - series.values) / scale
    assert off.max() <= 5 / 128 + 1e-4
    assert BINS.encode(made) == ids
    assert [one // 128 for one in ids] == [0, 1] * len(rows)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_patches_of_the_codebook_come_back(ids: list[int]) -> None:
    assert PATCHES.encode(PATCHES.decode(ids)) == ids
    assert PATCHES.decode([16, *ids, 17, -1, 99]).values.tolist() == (
        PATCHES.decode(ids).values.tolist()
    )


@BOTH
def test_what_is_decoded_is_a_series_in_the_units_of_the_data(kind: Signal) -> None:
    series = walk(7)
    made = kind.decode(kind.encode(series))
    assert (made.rate_hz, made.channels, made.units) == (50.0, CHANNELS, UNITS)
    error = np.abs(made.values - series.values).mean(axis=0)
    assert (error < 0.3 * np.array(kind.config.scale)).all()
    empty = kind.decode([kind.begin, kind.end])
    assert empty.values.shape == (0, 2) and kind.seconds(empty) == 0


@given(st.lists(st.integers(0, 257), max_size=30))
def test_any_row_of_bins_is_a_series(ids: list[int]) -> None:
    """By a loop: channels that a step lacks keep their values, and begin with the mean."""
    made = BINS.decode(ids).values
    steps: list[list[float]] = []
    before = 2
    for one in [one for one in ids if one < 256]:
        channel, code = divmod(one, 128)
        if channel <= before or not steps:
            steps.append([*(steps[-1] if steps else BINS.config.mean)])
        value = BINS.codebook[code, 0] * BINS.config.scale[channel] + BINS.config.mean[channel]
        steps[-1][channel] = value
        before = channel
    np.testing.assert_allclose(made, np.array(steps).reshape(-1, 2), rtol=1e-5)


def test_what_lies_beyond_the_limit_falls_into_the_outermost_bin() -> None:
    far = Series([[1e30, -1e30]], 50, CHANNELS, UNITS)
    assert BINS.encode(far) == [127, 128]
    assert len(PATCHES.encode(far)) == 1
    farthest = np.array([[3e38, -3e38]] * 4)  # beyond 32 bits in scales of the second channel
    cut = np.sign(farthest) * 1e6 * np.array(PATCHES.config.scale) + np.array(PATCHES.config.mean)
    codes = [PATCHES.encode(Series(each, 50, CHANNELS, UNITS)) for each in (farthest, cut)]
    assert codes[0] == codes[1]
    wide = SignalConfig(1.0, ("a",), ("",), (3e37,), (1e38,), "bins", 1, 2)
    made = Signal(np.array([[-5.0], [5.0]], np.float32), wide).decode([0, 1])
    assert np.isfinite(made.values).all()  # a scale may be beyond what 32 bits can hold of it


def test_a_channel_that_does_not_move_is_no_division_by_zero() -> None:
    still = Series(np.full((50, 1), 0.1), 1, ["still"])
    kind = Signal.fitted([still], codes=4, method="bins", limit=1.0)
    assert kind.config.scale == (1.0,)
    assert abs(kind.decode(kind.encode(still)).values - 0.1).max() <= 0.25


# --- other rates and channels


def test_channels_are_put_in_order_by_their_names() -> None:
    series = walk(3)
    turned = Series(series.values[:, ::-1], 50, CHANNELS[::-1], UNITS[::-1])
    for kind in (PATCHES, BINS):
        assert kind.encode(turned) == kind.encode(series)


@pytest.mark.parametrize(
    ("channels", "units", "wrong"),
    [
        (("ax", "az"), UNITS, r"'ay' is missing; 'az' was not asked for.*ax \[m/s2\], ay \[g\]"),
        (CHANNELS, ("m/s2", "m/s2"), "'ay' comes in 'm/s2', not in 'g'"),
        (CHANNELS, ("", ""), "'ax' comes in '', not in 'm/s2'"),
    ],
)
def test_other_channels_and_units_are_named(channels: Any, units: Any, wrong: str) -> None:
    with pytest.raises(ZipperError, match=wrong):
        PATCHES.encode(Series(walk(0).values, 50, channels, units))
    with pytest.raises(ZipperError, match=wrong):
        Signal.fitted([walk(0), Series(walk(0).values, 50, channels, units)])


@pytest.mark.parametrize("rate", [10.0, 48.0, 52.083333, 104.0, 1000.0])
def test_another_rate_is_resampled(rate: float) -> None:
    """A swing of 1 Hz is the same swing at any of these rates."""

    def swing(rate_hz: float) -> Series:
        time = np.arange(int(4 * rate_hz)) / rate_hz
        return Series(np.sin(2 * np.pi * time)[:, None] + 7, rate_hz, ["a"])

    found, wanted = swing(rate).resample(50.0), swing(50.0)
    assert found.rate_hz == 50.0 and abs(len(found.values) - 200) <= 5
    inside = slice(25, 175)  # away from the ends, behind which nothing is known
    np.testing.assert_allclose(found.values[inside], wanted.values[inside], atol=0.03)


def test_what_the_slower_rate_cannot_carry_is_left_out() -> None:
    time = np.arange(1000) / 1000
    fast = Series(np.sin(2 * np.pi * 90 * time)[:, None], 1000, ["a"])
    assert np.abs(fast.resample(100.0).values[10:-10]).max() < 0.05  # else it would be one of 10 Hz


def test_rates_that_are_nearly_one_are_one_and_others_too_far() -> None:
    series = walk(0)
    near = Series(series.values, 50.0004, CHANNELS, UNITS)
    assert PATCHES.encode(near) == PATCHES.encode(series)
    np.testing.assert_array_equal(near.resample(50.0).values, series.values)
    with pytest.raises(ZipperError, match="more than 1000 times"):
        series.resample(1e-3)
    assert Series([[1.0]], 10, ["a"]).resample(30.0).values.tolist() == [[1.0]] * 3
    assert len(Series(np.zeros((0, 1)), 10, ["a"]).resample(30.0).values) == 0


def test_a_series_that_would_be_too_large_at_the_other_rate_is_refused() -> None:
    with pytest.raises(ZipperError, match="At the other rate it has 60000000 steps"):
        Series(np.zeros((60_000, 1)), 1, ["a"]).resample(1000.0)


# --- raw data


@pytest.mark.parametrize(
    ("values", "rate", "channels", "units", "wrong"),
    [
        ([[1, 2], [3, math.nan]], 50, CHANNELS, (), "Step 1 of the channel 'ay' .* is nan: 1"),
        ([[1, 2], [math.inf, 4]], 50, CHANNELS, (), "Step 1 of the channel 'ax' .* is inf"),
        ([[1e300, 2]], 50, CHANNELS, (), "too large for 32 bits"),
        ([[1, 2, 3]], 50, CHANNELS, (), r"shape \(1, 3\) were given for 2 channels"),
        ([1, 2], 50, CHANNELS, (), r"shape \(2,\) were given"),
        ([[1, 2], [3]], 50, CHANNELS, (), "no table"),
        ([["1", "2"]], 50, CHANNELS, (), "not all numbers"),
        ([[1, None]], 50, CHANNELS, (), "not all numbers"),
        ([[True, False]], 50, CHANNELS, (), "not all numbers"),
        ([[1j, 2]], 50, CHANNELS, (), "not all numbers"),
        (np.zeros((1, 2, 3)), 50, CHANNELS, (), "shape"),
        ([[1, 2]], 0, CHANNELS, (), "0 Hz"),
        ([[1, 2]], math.nan, CHANNELS, (), "nan Hz"),
        ([[1, 2]], "50", CHANNELS, (), "rate '50'"),
        ([[1, 2]], True, CHANNELS, (), "rate True"),
        ([[1, 2]], 50, ("a", "a"), (), "one name"),
        ([[1, 2]], 50, ("a", "time"), (), "'time' cannot name"),
        ([[1, 2]], 50, ("a", "b [g]"), (), "cannot name"),
        ([[1, 2]], 50, ("a", " b"), (), "cannot name"),
        ([[1, 2]], 50, ("a", "b\n"), (), "cannot name"),
        ([[1, 2]], 50, ("a", ""), (), "cannot name"),
        ([[1, 2]], 50, CHANNELS, ("g",), "2 channels with 1 units"),
        ([[1, 2]], 50, "ab", (), "list of strings"),
        ([[1, 2]], 50, (1, 2), (), "list of strings"),
        ([[]], 50, (), (), "0 channels"),
    ],
)
def test_a_series_that_is_none_is_refused(
    values: Any, rate: Any, channels: Any, units: Any, wrong: str
) -> None:
    with pytest.raises(ZipperError, match=wrong):
        Series(values, rate, channels, units)


def test_values_in_a_row_are_read() -> None:
    series = walk(5, 6)
    rows = series.values.tolist()
    inline = {"values": rows, "rate_hz": 50, "channels": [*CHANNELS], "units": [*UNITS]}
    for value in (series, rows, inline, series.values):
        assert PATCHES.encode(PATCHES.read(value)) == PATCHES.encode(series)
    one = Signal.fitted([Series(np.arange(20.0), 1, ["price"])], codes=4, method="bins")
    assert one.encode([0.0, 19.0]) == one.encode([[0.0], [19.0]])
    with pytest.raises(ZipperError, match="'az' was not asked for"):
        PATCHES.encode({**inline, "channels": ["ax", "az"]})


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (3, "was given; give the path"),
        (None, "was given"),
        (b"a,b", "no steps, only a header"),
        ("", "was given"),
        ({}, "was given"),
        ({"path": 3}, "was given"),
        ([], "no steps"),
        ([[]], "no steps"),
        ({"values": [], "rate_hz": 1, "channels": ["a"]}, "no steps"),
        ({"values": [[1.0]], "channels": ["a"]}, "lacks the key 'rate_hz'"),
        ({"values": [[1.0]], "rate_hz": 1}, "lacks the key 'channels'"),
        ({"values": [[1.0]], "rate_hz": 0, "channels": ["a"]}, "must lie between"),
        ({"values": [[1.0]], "rate_hz": 1, "channels": ["a"], "colour": 1}, "'colour'"),
        ("a.txt", "no series by its ending"),
        ("missing.csv", "does not exist"),
        ({"path": "a.csv", "colour": "red"}, "'colour'"),
        ({"path": "a.csv", "start": -1}, "give seconds"),
        ({"path": "a.csv", "stop": "3"}, "give seconds"),
        ({"path": "a.csv", "stop": math.nan}, "give seconds"),
        ({"path": "a.csv", "start": 3, "stop": 3}, "is none"),
        ({"path": "a.csv", "start": 3}, "lies behind its end at 0.2 s"),
        ({"path": "a.csv", "stop": 3}, "lies behind its end"),
        ({"path": "a.csv", "rate_hz": 100}, "says 50 Hz, and its row 100 Hz"),
        ({"path": "a.csv", "rate_hz": -50}, "rate_hz holds -50"),
        ({"path": "a.csv", "rate_hz": "50"}, "rate_hz holds '50'"),
    ],
)
def test_what_names_no_series_is_refused(value: Any, wrong: str, tmp_path: Path) -> None:
    PATCHES.write(walk(0, 10), tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ZipperError, match=wrong):
        PATCHES.read(value, tmp_path)


# --- files


@given(
    st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2)),
    st.floats(1e-3, 1e6),
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])), max_size=4),
)
def test_a_written_series_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, float]],
    rate: float,
    words: list[str],
) -> None:
    a, b, *units = [re.sub(r"[\[\]]", "", word) for word in [*words, "", "", "", ""][:4]]
    channels = (f"a{a}", f"b,{b}")
    series = Series(np.array([(0, 0), (0, 0), *rows]), rate, channels, units)
    path = tmp_path_factory.mktemp("written") / "series.csv"
    PATCHES.write(series, path)
    again = PATCHES.read(path.name, path.parent)
    np.testing.assert_array_equal(again.values, series.values)
    assert (again.channels, again.units) == (series.channels, series.units)
    assert abs(again.rate_hz / rate - 1) < 1e-9
    assert PATCHES.files(path.name, path.parent) == [path]


def test_pieces_are_counted_from_the_first_step(tmp_path: Path) -> None:
    series = walk(2, 100)
    PATCHES.write(series, tmp_path / "a.csv")
    piece = PATCHES.read({"path": "a.csv", "start": 0.5, "stop": 1.0}, tmp_path)
    np.testing.assert_array_equal(piece.values, series.values[25:50])
    rest = PATCHES.read({"path": str(tmp_path / "a.csv"), "start": 1.5, "stop": 2.3})
    np.testing.assert_array_equal(rest.values, series.values[75:])


def test_a_row_that_says_another_rate_than_its_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 1), np.float32))
    (tmp_path / "a.json").write_text('{"rate_hz": 50, "channels": ["ax"]}')
    assert PATCHES.read({"path": "a.npy", "rate_hz": 50}, tmp_path).rate_hz == 50
    with pytest.raises(ZipperError, match=r"a\.json says 50 Hz, and its row 60"):
        PATCHES.read({"path": "a.npy", "rate_hz": 60}, tmp_path)


def test_the_files_of_an_array_are_itself_and_its_json(tmp_path: Path) -> None:
    for named in ("a.npy", {"path": "a.npy", "start": 1}):
        assert PATCHES.files(named, tmp_path) == [tmp_path / "a.npy", tmp_path / "a.json"]
    assert PATCHES.files("a.csv", tmp_path) == [tmp_path / "a.csv"]
    assert PATCHES.files([[1.0, 2.0]], tmp_path) == []


def test_arrays_have_a_json_beside_them(tmp_path: Path) -> None:
    series = walk(2)
    np.save(tmp_path / "a.npy", series.values)
    with pytest.raises(ZipperError, match=r"a\.json is not beside it"):
        PATCHES.read("a.npy", tmp_path)
    side = {"rate_hz": 50, "channels": CHANNELS, "units": UNITS}
    (tmp_path / "a.json").write_text(json.dumps(side))
    assert PATCHES.encode(PATCHES.read("a.npy", tmp_path)) == PATCHES.encode(series)
    assert PATCHES.files({"path": "a.npy"}, tmp_path) == [tmp_path / "a.npy", tmp_path / "a.json"]
    for array, wrong in {
        "words": np.array(["a"]),
        "complex128": np.ones((3, 2), complex),
        r"shape \(3, 2, 1\)": np.ones((3, 2, 1)),
        "given for 2 channels": np.ones((3, 3)),
        "no array": np.array([{}], object),
    }.items():
        np.save(tmp_path / "a.npy", wrong)
        with pytest.raises(ZipperError, match=array if array != "words" else "<U1"):
            PATCHES.read("a.npy", tmp_path)
    for bad in ({**side, "rate_hz": "50"}, {"rate_hz": 50}, {**side, "channels": []}):
        (tmp_path / "a.json").write_text(json.dumps(bad))
        with pytest.raises(ZipperError, match=r"a\.(json|npy)"):
            PATCHES.read("a.npy", tmp_path)


def test_parquet_is_read_by_its_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    series, path = walk(2), tmp_path / "a.parquet"
    columns = {
        "ax [m/s2]": series.values[:, 0],
        "time": np.arange(100) / 50,
        "ay [g]": series.values[:, 1],
    }
    parquet.write_table(arrow.table(columns), path)
    assert PATCHES.encode(PATCHES.read(path)) == PATCHES.encode(series)
    for change, wrong in [
        ({"time": ["1"] * 100}, "'time' is of type string"),
        ({"ax [m/s2]": [None, *[1.0] * 99]}, "Step 0 of the channel 'ax' .* is nan"),
        ({"time": [None] * 100}, "of type null"),
        ({"ay [g]": [[1.0]] * 100}, "of type list"),
    ]:
        parquet.write_table(arrow.table({**columns, **change}), path)
        with pytest.raises(ZipperError, match=wrong):
            PATCHES.read(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ZipperError, match="no Parquet"):
        PATCHES.read(path)


CSV = [
    ("", "has 0 columns"),
    ("time,ax\n", "no steps, only a header"),
    ("ax,ay\n1,2\n", r"Nothing says its rate.*'time' in seconds"),
    ("time,ax\n0,1\n", "Nothing says its rate"),
    ("0,1,2\n0.1,3,4\n", "first line holds numbers"),
    ("time,ax\n0,1\n0.1\n", "line 3 has 1 cells, and the header 2"),
    ("time,ax\n0,1\n0.1,2,3\n", "line 3 has 3 cells"),
    ("time,ax\n0,1\n0.1,\n", "line 3 has '' for 'ax', which is no number"),
    ("time,ax\n0,1\n0.1,1_0\n", "line 3 has '1_0' for 'ax'"),
    ("time,ax\n0,1\n0.1,nan\n", "Step 1 of the channel 'ax' .* is nan"),
    ("time,ax\n0,1\n0.1,1e39\n", "too large for 32 bits"),
    ("time,ax\n0,1\nnan,2\n", "time is nan at step 1"),
    ("time,ax\n0,1\n0,2\n", "does not go on"),
    ("time,ax\n0,1\n2,2\n1,3\n", "does not go on"),
    ("time,ax\n0,1\n1,2\n2,3\n4,4\n5,5\n6,6\n", "not even: from step 2 to 3 are 2 s"),
    ("time [ms],ax\n0,1\n1,2\n", "time is in 'ms'. Give it in seconds"),
    ("time,time,ax\n0,0,1\n", "2 of its 3 columns are the time"),
    ("time\n0\n1\n", "1 of its 1 columns"),
    ("time,ax,ax\n0,1,1\n1,2,2\n", "one name"),
    ("time,,ax\n0,1,1\n", "cannot name a channel"),
    ("time,a [b] c\n0,1\n", "names no channel"),
    ('time,ax\n0,"1\n1,2\n', "no CSV"),
    ("time,ax\n0,1\r1,2\r", "no CSV"),
    ("time;ax\n0;1\n1;2\n", "no number. Part cells by commas"),
    ("time\tax\n0\t1\n1\t2\n", "Part cells by commas"),
    ("time,ax\n0,1\n1,\N{MINUS SIGN}2\n", "no number"),
    (",".join(f"c{number}" for number in range(1002)), "1002 columns"),
]


@pytest.mark.parametrize(("text", "wrong"), CSV)
def test_bad_csv_is_refused_with_its_line(text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ZipperError, match=rf"a\.csv.*{wrong}"):
        PATCHES.read("a.csv", tmp_path)


def test_times_that_are_rounded_or_late_are_even(tmp_path: Path) -> None:
    times = np.round(np.arange(200) / 104, 3) + 1_600_000_000
    lines = [f"{time:.3f},{step}" for step, time in enumerate(times)]
    (tmp_path / "a.csv").write_text("\ufeffTime, ax [m/s2] \n\n" + "\n".join(lines) + "\n")
    found = PATCHES.read("a.csv", tmp_path)
    assert abs(found.rate_hz - 104) < 0.05 and found.values[:, 0].tolist() == [*range(200)]
    assert (found.channels, found.units) == (("ax",), ("m/s2",))


def test_a_step_that_is_there_twice_is_no_even_time(tmp_path: Path) -> None:
    times = [*range(50), 49.2, *range(50, 99)]
    (tmp_path / "a.csv").write_text("time,ax\n" + "\n".join(f"{time},1" for time in times))
    with pytest.raises(ZipperError, match=r"not even: from step 49 to 50 are 0\.2"):
        PATCHES.read("a.csv", tmp_path)


def test_uneven_times_are_made_even_where_the_row_says_the_rate(tmp_path: Path) -> None:
    times = [0.0, 0.0, 0.1, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    lines = [f"{time},{10 * time}" for time in times]
    (tmp_path / "a.csv").write_text("time,ax\n" + "\n".join(lines))
    with pytest.raises(ZipperError, match=r"not even.*\{'path': \.\.\., 'rate_hz': 8\.889\}"):
        PATCHES.read("a.csv", tmp_path)
    found = PATCHES.read({"path": "a.csv", "rate_hz": 8.889}, tmp_path)
    np.testing.assert_allclose(found.values[:, 0], 10 * np.arange(9) / 8.889, rtol=1e-5)


def test_the_last_step_is_kept_where_time_is_made_even(tmp_path: Path) -> None:
    """58 steps at 100 Hz, of which one is late: .57 * 100 is 56.99999999999999."""
    times = [round(n / 100 + 0.004 * (n == 20), 3) for n in range(58)]
    (tmp_path / "a.csv").write_text("time,ax\n" + "".join(f"{t},{t}\n" for t in times))
    found = PATCHES.read({"path": "a.csv", "rate_hz": 100}, tmp_path)
    assert len(found.values) == 58 and found.values[-1, 0] == pytest.approx(0.57)


@pytest.mark.parametrize("ending", ["csv", "npy", "parquet"])
def test_garbage_is_refused(ending: str, tmp_path: Path) -> None:
    chance, path = random.Random(0), tmp_path / f"a.{ending}"
    side = {"rate_hz": 50, "channels": CHANNELS}
    (tmp_path / "a.json").write_text(json.dumps(side))
    heads = {"csv": b"time,ax\n0,1\n", "npy": b"\x93NUMPY\x01\x00v\x00{", "parquet": b"PAR1"}
    for size in (0, 1, 8, 1000):
        for head in (b"", heads[ending], b"PK\x03\x04"):
            path.write_bytes(head + chance.randbytes(size))
            with pytest.raises(ZipperError, match=rf"a\.{ending}"):
                PATCHES.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ZipperError, match="no plain file"):
        PATCHES.read(path)


MEASURED = """
import re, sys
from pathlib import Path
from zipper.modality.signal import Signal, Series
from zipper.errors import ZipperError

def memory(which):
    return int(re.search(which + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

kind = Signal.fitted([Series([[0.0], [1.0]], 1, ["a"])], codes=2, method="bins")
before = memory("VmRSS")
try:
    kind.read(sys.argv[1])
except ZipperError as error:
    print(memory("VmHWM") - before, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is nobody else's."""
    np.lib.format.open_memmap(tmp_path / "sparse.npy", "w+", np.float64, (1 << 33, 1))
    (tmp_path / "sparse.json").write_text('{"rate_hz": 1, "channels": ["a"]}')
    with (tmp_path / "wide.csv").open("wb") as file:
        file.write(b"time,a\n" + b"1," * (30 << 20))
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(1 << 40)
    for name, wrong in {
        "sparse.npy": "at most 33,554,432 numbers",
        "wide.csv": "line 2 has more than 1,048,576 bytes",
        "sparse.csv": "more than 1,073,741,824 bytes",
    }.items():
        command = [sys.executable, "-c", MEASURED, str(tmp_path / name)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert wrong in said and int(said.split()[0]) < 100, said


@pytest.mark.parametrize("ending", ["csv", "npy", "parquet"])
def test_more_numbers_than_are_read_at_once_are_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, values = tmp_path / f"a.{ending}", np.arange(61.0)
    if ending == "csv":
        path.write_text("a\n" + "".join(f"{value}\n" for value in values))
    elif ending == "npy":
        np.save(path, values)
        path.with_suffix(".json").write_text('{"rate_hz": 1, "channels": ["a"]}')
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"a": values}), path)
    asked = {"path": str(path), "rate_hz": 1}
    assert len(PATCHES.read(asked).values) == 61
    monkeypatch.setattr(series, "MOST_NUMBERS", 60)
    with pytest.raises(
        ZipperError, match=rf"a\.{ending}: (it has more than|It has .*at most) 60 n"
    ):
        PATCHES.read(asked)


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rate_hz": 1, "channels": ["a"]}))
    np.save(tmp_path / "a.npy", np.zeros((1000, 1)))
    whole = (tmp_path / "a.npy").read_bytes()
    for shape in (b"(1000000000000, 1), ", b"(-1, 1), ", b"(99999999999999999999, 9), "):
        (tmp_path / "a.npy").write_bytes(re.sub(rb"\(1000, 1\), ", shape, whole))
        with pytest.raises(ZipperError, match=r"a\.npy: it (is no array|has)"):
            Signal.read(BINS, "a.npy", tmp_path)


# --- showing and comparing


def test_it_is_told_and_shown(tmp_path: Path) -> None:
    series = Series(walk(0, 1000).values, 50, ("a<b>", "c"), UNITS)
    assert PATCHES.told(series) == "20.00 s of a<b>, c at 50 Hz" and PATCHES.seconds(series) == 20
    shown = PATCHES.html(series)
    assert shown.count("<polyline") == 2 and "a&lt;b&gt; [m/s2]" in shown and "<b>" not in shown
    assert "http" not in shown and len(shown) < 30_000
    spike = np.zeros((100_000, 1))
    spike[77_777] = 1
    assert ",2.0" in PATCHES.html(Series(spike, 1, ["a"]))  # its top
    many = Series(np.zeros((1, 20)), 1, [f"c{number}" for number in range(20)])
    assert "and 8 more channels" in PATCHES.html(many)
    assert "<svg" not in PATCHES.html(PATCHES.decode([]))
    assert not PATCHES.says_nothing(series)
    assert PATCHES.about() == {
        "rate": "50 steps a second",
        "channels": "ax [m/s2], ay [g]",
        "ids": "12.5 a second, 16 patches of 4 steps",
    }
    with pytest.raises(ZipperError, match=r"does not end in \.csv"):
        PATCHES.write(series, tmp_path / "a.wav")


def test_scores_are_in_scales_of_the_channels() -> None:
    config, wanted = PATCHES.config, walk(3, 40)
    off = Series(wanted.values + 2 * np.array(config.scale), 50, CHANNELS, UNITS)
    found = PATCHES.scores([wanted, wanted, wanted], [wanted, off, PATCHES.decode([])])
    same, other, nothing = found["mse"]
    assert same == (0, 80) and other[0] / other[1] == pytest.approx(4, rel=1e-3)
    normal = (wanted.values - np.array(config.mean)) / np.array(config.scale)
    assert nothing[0] == pytest.approx(np.square(normal).sum(), rel=1e-4)
    assert found["dtw"][0] == (0, 40) and found["dtw"][1][0] > 0
    assert found["dtw"][2][0] == pytest.approx(np.linalg.norm(normal, axis=1).sum(), rel=1e-4)
    assert found["length"] == [(0, 0.8), (0, 0.8), (0.8, 0.8)]


points = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9)


@given(points, points)
def test_warping_finds_the_best_way(a: list[Any], b: list[Any]) -> None:
    """By its definition."""
    one, other = np.array(a), np.array(b)
    table = np.full((len(a) + 1, len(b) + 1), np.inf)
    table[0, 0] = 0
    for i, j in np.ndindex(len(a), len(b)):
        least = min(table[i, j], table[i, j + 1], table[i + 1, j])
        table[i + 1, j + 1] = least + np.linalg.norm(one[i] - other[j])
    found, steps = warped(one, other)
    assert steps == len(a) and found == pytest.approx(table[-1, -1], abs=1e-9)


def test_long_series_are_averaged_before_they_are_warped() -> None:
    long = np.sin(np.arange(9_999) / 300)[:, None]
    distance, steps = warped(long, np.repeat(long, 2, axis=0))
    assert steps <= 1000 and distance / steps < 0.05


# --- fitting


def test_fitting_is_the_same_for_the_same_data_and_seed(tmp_path: Path) -> None:
    series = [walk(seed) for seed in range(3)]
    for number, each in enumerate(series):
        PATCHES.write(each, tmp_path / f"{number}.csv")
    paths = [tmp_path / f"{number}.csv" for number in range(3)]
    settings: dict[str, Any] = {"codes": 8, "patch": 4, "rate_hz": 50.0}
    found = Signal.fitted(series, **settings).fingerprint
    assert Signal.fitted(paths, **settings).fingerprint == found
    assert Signal.fitted(series, **settings, seed=1).fingerprint != found
    assert Signal.fitted(series, codes=8, patch=4, rate_hz=25.0).config.rate_hz == 25
    assert Signal.fitted([{"path": str(paths[0]), "stop": 1.0}], **settings).codes == 8


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ZipperError, match="no series to fit on"):
        Signal.fitted([])
    with pytest.raises(ZipperError, match="13 patches of 8 steps are too few, or too alike, for"):
        Signal.fitted([walk(0)])
    with pytest.raises(ZipperError, match="says neither rate nor channels"):
        Signal.fitted([[[1.0, 2.0]]])
    for wrong in ({"codes": 1}, {"codes": 10**9}, {"patch": 0}, {"rate_hz": -1.0}):
        with pytest.raises(ZipperError):
            Signal.fitted([walk(0)], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ZipperError, match="limit=0"):
        Signal.fitted([walk(0)], method="bins", limit=0.0)
    with pytest.raises(ZipperError, match="limit=5 was given; it is of bins"):
        Signal.fitted([walk(0)], codes=2, limit=5.0)
    with pytest.raises(ZipperError, match="patch=8 was given; bins are of 1 step"):
        Signal.fitted([walk(0)], method="bins", patch=8)


def test_the_example_is_fitted_and_says_that_it_is_computed(tmp_path: Path) -> None:
    Signal.example(tmp_path)
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert "Computed, not measured" in (tmp_path / "README.md").read_text()
    kind = Signal.fitted([tmp_path / row["signal"] for row in rows], codes=64, patch=5)
    swings = [kind.read(row["signal"], tmp_path) for row in rows]
    assert all(row["text"] for row in rows) and len(rows) >= 6
    made = [kind.decode(kind.encode(swing)) for swing in swings]
    errors = kind.scores(swings, made)["mse"]
    assert sum(error for error, _ in errors) / sum(many for _, many in errors) < 0.05
    # The energy of a damped swing falls; a small one has the period 2 pi sqrt(length / g).
    angle, speed = swings[0].values.astype(np.float64).T
    energy = 0.5 * (0.25 * speed) ** 2 + 9.81 * 0.25 * (1 - np.cos(angle))
    assert (np.diff(energy) < 1e-6).all()
    crossings = np.flatnonzero((angle[:-1] > 0) & (angle[1:] <= 0))
    period = np.diff(crossings).mean() / 50
    assert period == pytest.approx(2 * math.pi * math.sqrt(0.25 / 9.81), rel=0.02)


# --- saved


def test_the_fingerprint_is_of_all_that_changes_ids() -> None:
    config = dict(
        rate_hz=50.0, channels=CHANNELS, units=UNITS, mean=(0.0, 1.0), scale=(1.0, 2.0), codes=4
    )
    book = np.arange(64, dtype=np.float32).reshape(4, 16)
    same = Signal(book, SignalConfig(**config)).fingerprint  # type: ignore[arg-type]
    changes: list[dict[str, Any]] = [
        {"rate_hz": 51.0},
        {"channels": ("ax", "az")},
        {"units": ("g", "g")},
        {"mean": (0.0, 1.5)},
        {"scale": (1.0, 2.5)},
    ]
    found = {Signal(book, SignalConfig(**{**config, **one})).fingerprint for one in changes}
    found |= {Signal(book + 1, SignalConfig(**config)).fingerprint, same}  # type: ignore[arg-type]
    assert len(found) == 7
    assert Signal(book.copy(), SignalConfig(**config)).fingerprint == same  # type: ignore[arg-type]


@BOTH
def test_a_saved_one_is_the_same(kind: Signal, tmp_path: Path) -> None:
    modality.save(kind, tmp_path)
    again = modality.load(tmp_path)
    assert isinstance(again, Signal) and again.config == kind.config
    assert again.fingerprint == kind.fingerprint
    assert again.encode(walk(9)) == kind.encode(walk(9))
    assert modality.of_kind("signal") is Signal


NOT_COUNTS = [-1, 0, 10**9, 2**63, 1.5, "8", None, [], {}, 15]
HOSTILE: list[tuple[str, Any]] = [
    *[("codes", value) for value in NOT_COUNTS],
    *[("patch", value) for value in NOT_COUNTS],
    *[("rate_hz", value) for value in (0, -1, "50", None, 1e300, 51)],
    *[("channels", value) for value in ([], "ax", ["ax"], ["ax", "ax"], ["ax", 3], None)],
    ("channels", ["a"] * 2_000),
    *[("units", value) for value in ([], ["g"], ["g", "g"], None)],
    *[("mean", value) for value in ([0.0], [0.0, "1"], [0.0, 1e300], None, [0.0, 1.0])],
    *[("scale", value) for value in ([1.0], [0.0, 1.0], [-1.0, 1.0], [1.0, 1.0])],
    *[("method", value) for value in ("bins", "other", None, 3)],
    ("sha256", "0" * 64),
    ("sha256", None),
    ("colour", "red"),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_hostile_description_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    PATCHES.save(tmp_path)
    path = tmp_path / Signal.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ZipperError, match=r"holds no signal|not saved together") as caught:
        Signal.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 2_000


@BOTH
def test_a_foreign_codebook_is_refused(kind: Signal, tmp_path: Path) -> None:
    kind.save(tmp_path)
    path = tmp_path / Signal.CODEBOOK
    book = load_file(path)["codebook"]
    with np.errstate(divide="ignore", invalid="ignore"):
        others = [book[:-1], book[::-1], book / 0, book.T, book[None], book.astype(np.float64)]
    for other in others:
        save_file({"codebook": np.ascontiguousarray(other)}, path)
        with pytest.raises(ZipperError, match=r"holds no signal|not saved together|do not rise"):
            Signal.load(tmp_path)
    save_file({"book": book}, path)
    with pytest.raises(ZipperError, match="holds no signal"):
        Signal.load(tmp_path)


@BOTH
def test_a_zip_with_a_signal_is_saved_loaded_and_runs(kind: Signal, tmp_path: Path) -> None:
    modalities: dict[str, Any] = {"text": tiny.text(), "motion": kind}
    towers = {
        name: tiny_tower("llama", vocabulary=each.vocabulary) for name, each in modalities.items()
    }
    ends = {name: (each.begin, each.end) for name, each in modalities.items()}
    link = LinkConfig(head_width=16)
    zipped = Zipper.from_towers(towers, train=("motion",), ends=ends, link=link)
    pipe = Pipeline(zipped, modalities)
    pipe.save_pretrained(tmp_path / "zip", include=["text"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    loaded = again.modalities["motion"]
    assert isinstance(loaded, Signal) and loaded.fingerprint == kind.fingerprint
    asked, limits = [Segment("motion", kind.encode(walk(0, 20)))], {"text": 4}
    assert again.run(asked, ["text"], limits=limits) == pipe.run(asked, ["text"], limits=limits)


def test_nothing_wanted_is_no_step_of_dtw() -> None:
    some, none = np.zeros((3, 2)), np.zeros((0, 2))
    assert warped(none, some) == (0.0, 0.0) == warped(none, none)


def test_a_setting_that_is_out_of_all_bounds_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(100, dtype=np.float32).reshape(50, 2))
    about = {"rate_hz": 50, "channels": ["x", "y"], "units": ["m", "m"]}
    (tmp_path / "one.json").write_text(json.dumps(about))
    with pytest.raises(ZipperError, match="cannot be made with"):
        fitting.fit(Signal, [tmp_path / "one.npy"], settings={"codes": 2, "limit": "five"})


def test_hidden_files_are_fitted_to_by_nobody(tmp_path: Path) -> None:
    for name in ("a.csv", ".git/b.csv", ".c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert fitting.values_of(tmp_path, "signal") == [tmp_path / "a.csv"]


def test_the_content_of_a_file_is_read_as_the_file_is(tmp_path: Path) -> None:
    content = b"time [s],ax [g],ay\n0.00,1,2\n0.02,3,4\n0.04,5,6\n"
    (tmp_path / "a.csv").write_bytes(content)
    read, there = (series.opened(one, tmp_path, None) for one in (content, "a.csv"))
    assert np.array_equal(read.values, there.values) and read.values.shape == (3, 2)
    assert (read.rate_hz, read.channels, read.units) == (50.0, ("ax", "ay"), ("g", ""))
    assert (there.rate_hz, there.channels, there.units) == (50.0, ("ax", "ay"), ("g", ""))
    for wrong in (b"time [ms],a\n0,1\n20,2\n", b"a,b\n0,1\n", b"time,a\n0,\n1,2\n", b"\x89PNG"):
        with pytest.raises(ZipperError):
            series.opened(wrong, tmp_path, None)
