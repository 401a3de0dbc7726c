"""Disturbances: each does what its name says, by a measured amount; at strength 0 none does
anything; a seed decides all."""

from dataclasses import fields, replace

import numpy as np
import pytest

from zipper.audio import disturbance
from zipper.audio.disturbance import NOTHINGS, TABLE, Disturbance, drawn, nothing, take
from zipper.audio.sound import Audio
from zipper.errors import ZipperError

RATE_HZ = 16_000
TIME = np.arange(RATE_HZ) / RATE_HZ
TONE = Audio((0.5 * np.sin(2 * np.pi * 440 * TIME)).astype(np.float32), RATE_HZ)


def power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


def share_above(sound: Audio, hertz: float) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples)) ** 2
    return float(
        spectrum[np.fft.rfftfreq(len(sound.samples), 1 / sound.rate_hz) > hertz].sum()
        / spectrum.sum()
    )


def loudest_hertz(sound: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples * np.hanning(len(sound.samples))))
    return float(spectrum.argmax() * sound.rate_hz / len(sound.samples))


def test_at_strength_0_nothing_happens() -> None:
    for one in (
        Disturbance(),
        TABLE["clean"],
        Disturbance(colour=1.5, room_db=-20.0),
        Disturbance(through_hz=RATE_HZ),
    ):
        np.testing.assert_array_equal(one.apply(TONE, seed=3).samples, TONE.samples)


@pytest.mark.parametrize("name", list(TABLE))
def test_the_same_seed_does_the_same_and_the_sound_is_not_touched(name: str) -> None:
    before = TONE.samples.copy()
    one, again = (TABLE[name].apply(TONE, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.samples, again.samples)
    np.testing.assert_array_equal(TONE.samples, before)
    assert one.rate_hz == RATE_HZ
    assert one.samples.dtype == np.float32
    assert (
        name == "clean"
        or len(one.samples) != len(before)
        or np.abs(one.samples - before).max() > 1e-3
    )


def test_the_table_has_every_kind_of_disturbance() -> None:
    plain = Disturbance()
    changed = {
        field.name
        for one in TABLE.values()
        for field in fields(one)
        if getattr(one, field.name) != getattr(plain, field.name)
    }
    assert changed == {field.name for field in fields(plain)} - {"colour"}


def test_noise_lies_as_far_under_the_sound_as_it_says_whatever_the_pauses() -> None:
    for db in (0.0, 20.0):
        sound = Disturbance(snr_db=db, lead_ms=500.0).apply(TONE, 1)
        assert 10 * np.log10(power(TONE.samples) / power(sound.samples[:8_000])) == pytest.approx(
            db, abs=0.3
        )
        np.testing.assert_array_equal(
            sound.samples, Disturbance(snr_db=db, lead_ms=500.0).apply(TONE, 1).samples
        )
        assert not np.array_equal(
            sound.samples, Disturbance(snr_db=db, lead_ms=500.0).apply(TONE, 2).samples
        )


def test_pauses_are_as_long_and_as_loud_as_they_say() -> None:
    sound = Disturbance(lead_ms=250.0, trail_ms=125.0).apply(TONE)
    np.testing.assert_array_equal(sound.samples, np.pad(TONE.samples, (4_000, 2_000)))
    room = Disturbance(lead_ms=250.0, room_db=-40.0).apply(TONE).samples
    np.testing.assert_array_equal(room[4_000:], TONE.samples)
    assert 10 * np.log10(power(room[:4_000])) == pytest.approx(-40, abs=0.3)


def test_faster_is_shorter_and_higher() -> None:
    for percent in (10.0, -10.0):
        sound = Disturbance(speed_percent=percent).apply(TONE)
        assert sound.seconds == pytest.approx(1 / (1 + percent / 100), abs=1e-3)
        assert loudest_hertz(sound) == pytest.approx(440 * (1 + percent / 100), abs=2)


def test_a_band_a_gain_an_offset_and_clipping_do_what_they_say() -> None:
    noise = nothing(0, 1.0, kind="noise")
    white = replace(
        noise, samples=np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32) / 10
    )
    assert share_above(white, 4_000) == pytest.approx(0.5, abs=0.03)
    assert share_above(Disturbance(through_hz=8_000).apply(white), 4_100) < 1e-3
    np.testing.assert_allclose(
        Disturbance(gain_db=20.0).apply(TONE).samples, 10 * TONE.samples, rtol=1e-5
    )
    np.testing.assert_allclose(
        Disturbance(offset=0.1).apply(TONE).samples - TONE.samples, 0.1, atol=1e-6
    )
    clipped = Disturbance(clip_times=4.0).apply(TONE).samples
    np.testing.assert_allclose(clipped, np.clip(TONE.samples, -0.25, 0.25), atol=1e-6)


def test_brown_noise_is_darker_than_pink_than_white() -> None:
    quiet = Audio(np.full(RATE_HZ, 1e-9, np.float32), RATE_HZ)
    rooms = [
        Disturbance(lead_ms=1_000.0, room_db=-20.0, colour=colour).apply(quiet)
        for colour in (0.0, 1.0, 2.0)
    ]
    white, pink, brown = (share_above(room, 1_000) for room in rooms)
    assert white > 1.3 * pink > 1.69 * brown
    assert all(
        10 * np.log10(2 * power(room.samples)) == pytest.approx(-20, abs=0.5) for room in rooms
    )


@pytest.mark.parametrize("codec", ["mp3", "ogg"])
def test_a_codec_leaves_nearly_the_same_sound(codec: str) -> None:
    sound = Disturbance(codec=codec).apply(TONE)
    assert abs(sound.seconds - 1) < 0.2
    assert loudest_hertz(sound) == pytest.approx(440, abs=3)


@pytest.mark.slow
def test_what_training_hears_reaches_beyond_what_is_evaluated() -> None:
    seen = [drawn(seed) for seed in range(3_000)]
    assert seen == [drawn(seed) for seed in range(3_000)]
    for one in TABLE.values():
        for name in (
            "speed_percent",
            "lead_ms",
            "trail_ms",
            "room_db",
            "snr_db",
            "through_hz",
            "gain_db",
            "clip_times",
            "offset",
        ):
            values = [value for other in seen if (value := getattr(other, name)) is not None]
            wanted = getattr(one, name)
            assert wanted is None or min(values) <= wanted <= max(values)
    assert (
        sum(one == replace(Disturbance(), colour=one.colour, room_db=one.room_db) for one in seen)
        > 30
    )  # clean sound too


@pytest.mark.parametrize("kind", NOTHINGS)
def test_sounds_of_nothing_are_finite_and_differ_by_seed(kind: str) -> None:
    some = [nothing(seed, 0.5, kind=kind) for seed in range(12)]
    assert all(np.isfinite(sound.samples).all() and len(sound.samples) == 8_000 for sound in some)
    assert len({sound.samples.tobytes() for sound in some}) >= 8
    np.testing.assert_array_equal(nothing(3, 0.5, kind=kind).samples, some[3].samples)


def test_some_takes_say_nothing_and_a_key_decides_all() -> None:
    takes = [take(TONE, f"a {number}") for number in range(500)]
    silent = sum(not said for _, said in takes)
    assert silent == pytest.approx(500 * disturbance.NOTHING_SHARE, abs=15)
    for number in (0, 1, 2):
        np.testing.assert_array_equal(
            take(TONE, f"a {number}")[0].samples, takes[number][0].samples
        )
    assert not np.array_equal(take(TONE, "b 0")[0].samples, takes[0][0].samples)


def test_a_long_sound_passes_through_a_codec_and_a_rate_that_it_lacks_is_named() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 200 * 16_000).astype(np.float32)
    assert Disturbance(codec="ogg").apply(Audio(noise, 16_000)).seconds == pytest.approx(200, 0.01)
    with pytest.raises(ZipperError, match="96000 Hz cannot be written as mp3"):
        Disturbance(codec="mp3").apply(Audio(noise[:1000], 96_000))
