"""Sound: files in and out, levels, and the log-mel picture against laws of acoustics."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from zipper.audio import sound as audio
from zipper.audio.sound import Audio, Mel
from zipper.errors import ZipperError


def tone(hertz: float, seconds: float = 0.5, rate_hz: int = 16_000, height: float = 0.5) -> Audio:
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    return Audio((height * np.sin(2 * np.pi * hertz * time)).astype(np.float32), rate_hz)


def loudest_hertz(sound: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples * np.hanning(len(sound.samples))))
    return float(spectrum.argmax() * sound.rate_hz / len(sound.samples))


@pytest.mark.parametrize(
    ("ending", "error"), [(".wav", 2**-15), (".flac", 2**-15), (".ogg", 0.05), (".mp3", 0.05)]
)
def test_what_is_written_is_read_back(tmp_path: Path, ending: str, error: float) -> None:
    path, sound = tmp_path / f"a{ending}", tone(440)
    audio.write(path, sound)
    back = audio.read(path)
    assert back.rate_hz == 16_000
    assert back.samples.dtype == np.float32
    middle = slice(2000, 6000)  # mp3 adds silence at the ends
    if ending == ".mp3":
        assert loudest_hertz(back) == pytest.approx(440, abs=3)
    else:
        np.testing.assert_allclose(back.samples[middle], sound.samples[middle], atol=error)
    assert os.listdir(tmp_path) == [path.name]


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(300).samples, tone(700).samples
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(
        audio.read(tmp_path / "a.wav").samples, (left + right) / 2, atol=1e-6
    )


def test_samples_beyond_one_are_scaled_not_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 8 * tone(440).samples, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(
        audio.read(tmp_path / "a.wav").samples, 2 * tone(440).samples, atol=1e-3
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_peak_to_either_side_is_scaled_not_cut(tmp_path: Path, sign: int) -> None:
    samples = np.zeros(8_000, np.float32)
    samples[1_000], samples[2_000] = 4 * sign, -sign
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    heard = audio.read(tmp_path / "a.wav").samples
    assert heard[[1_000, 2_000]].tolist() == [sign, -sign / 4]
    audio.write(tmp_path / "b.wav", Audio(samples, 16_000))
    written = audio.read(tmp_path / "b.wav").samples
    assert written[[1_000, 2_000]] == pytest.approx([sign, -sign / 4], abs=1e-4)


def test_resampling_keeps_the_tone_and_the_length() -> None:
    sound = tone(1000, rate_hz=44_100).resample(16_000)
    assert (sound.rate_hz, sound.seconds) == (16_000, pytest.approx(0.5, abs=1e-3))
    assert loudest_hertz(sound) == pytest.approx(1000, abs=3)


def test_a_wanted_rate_is_given_or_refused(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", tone(440, rate_hz=8_000))
    assert audio.read(tmp_path / "a.wav", rate_hz=16_000).rate_hz == 16_000
    with pytest.raises(
        ZipperError,
        match=r"a.wav is 8000 Hz, these units need 16000 Hz. Pass resample=True or convert it "
        r"first",
    ):
        audio.read(tmp_path / "a.wav", rate_hz=16_000, resample=False)


def wav_header(frames: int, rate_hz: int = 16_000, channels: int = 1) -> bytes:
    size = 2 * channels * frames
    shape = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * 2 * channels, 2 * channels, 16)
    return (
        struct.pack("<4sI4s4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16)
        + shape
        + struct.pack("<4sI", b"data", size)
    )


def test_bad_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "words.wav").write_text("these are words")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "empty.wav").write_bytes(wav_header(0))
    (tmp_path / "slow.wav").write_bytes(wav_header(10, rate_hz=4_000) + bytes(20))
    (tmp_path / "fast.wav").write_bytes(wav_header(10, rate_hz=1_000_000) + bytes(20))
    (tmp_path / "wide.wav").write_bytes(wav_header(10, channels=9) + bytes(180))
    (tmp_path / "headless.raw").write_bytes(bytes(100))
    for name, value in {"nan.wav": np.nan, "inf.wav": np.inf}.items():
        soundfile.write(
            tmp_path / name, np.array([0.1, value, 0.1], np.float32), 16_000, subtype="FLOAT"
        )
    # A hole in the disk: an hour at 192 kHz that takes no room.
    with (tmp_path / "long.wav").open("wb") as file:
        file.write(wav_header(3600 * 192_000, rate_hz=192_000))
        file.truncate(2 * 3600 * 192_000)
    reasons = {
        "missing.wav": "does not exist",
        ".": "is a folder",
        "words.wav": "not readable sound",
        "nothing.wav": "not readable sound",
        "headless.raw": "not readable sound",
        "empty.wav": "holds no sound",
        "slow.wav": "is 4000 Hz, wanted are 8000 to 192000 Hz",
        "fast.wav": "is 1000000 Hz",
        "wide.wav": "has 9 channels, at most 8",
        "nan.wav": "NaN or infinite",
        "inf.wav": "NaN or infinite",
        "long.wav": "lasts 3600 s, at most 600 s",
    }
    for name, reason in reasons.items():
        with pytest.raises(ZipperError, match=reason):
            audio.read(tmp_path / name)


ORDINARY = {
    "WAV": "PCM_16 PCM_24 FLOAT ULAW IMA_ADPCM MS_ADPCM GSM610".split(),
    "AIFF": ["PCM_16", "PCM_24"],
    "AU": ["PCM_16", "G721_32"],
    "CAF": ["PCM_16", "ALAC_16"],
    "W64": ["PCM_16"],
    "RF64": ["PCM_16"],
    "NIST": ["ULAW"],
    "FLAC": ["PCM_16"],
    "OGG": ["VORBIS", "OPUS"],
    "MP3": ["MPEG_LAYER_III"],
}


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [(kind, subtype) for kind, subtypes in ORDINARY.items() for subtype in subtypes],
)
def test_a_piece_of_a_file_is_that_piece_of_the_whole(
    tmp_path: Path, kind: str, subtype: str
) -> None:
    rate, chance = 16_000, np.random.default_rng(0)
    time = np.arange(12 * rate) / rate
    sound = 0.2 * np.sin(2 * np.pi * (200 + 100 * time) * time) + 0.02 * chance.standard_normal(
        len(time)
    )
    soundfile.write(tmp_path / "a", sound.astype(np.float32), rate, format=kind, subtype=subtype)
    whole = audio.read(tmp_path / "a").samples
    content = (tmp_path / "a").read_bytes()
    np.testing.assert_array_equal(audio.read(content).samples, whole)
    assert len(sound) <= len(whole) <= len(sound) + 1_000  # blocks of codecs
    places = [
        (0.0, 0.5),
        (0.00006, 1.0),
        (11.5, 12.0),
        (11.99, 12.05),
        *((s, s + 0.7) for s in chance.uniform(0, 11, 8)),
    ]
    for start, stop in places:
        piece = audio.read(content, start_s=start, stop_s=stop).samples
        expected = whole[round(start * rate) : round(stop * rate)]
        assert len(piece) == len(expected)
        # MP3 is summed up in another order.
        np.testing.assert_allclose(piece, expected, atol=2e-7, rtol=0)
    np.testing.assert_allclose(
        audio.read(content, start_s=11.0).samples, whole[11 * rate :], atol=2e-7, rtol=0
    )


def test_a_piece_that_is_none_is_refused(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.flac", tone(440, 2.0))
    told = flac_of_unknown_length((tmp_path / "a.flac").read_bytes())
    # Manifests are rounded.
    assert len(audio.read(tmp_path / "a.flac", start_s=1.5, stop_s=2.4).samples) == 8_000
    assert len(audio.read(told, start_s=1.5, stop_s=2.4).samples) == 8_000
    for start, stop in [
        (2.0, None),
        (2.5, 3.0),
        (1.0, 1.0),
        (1.0, 0.5),
        (-1.0, 1.0),
        (1.0, 2.6),
        (0.0, 2.6),
        (np.nan, None),
        (0.0, np.nan),
    ]:
        with pytest.raises(
            ZipperError, match=r"a\.flac lasts 2.00 s; .* to .* s are no piece of it"
        ):
            audio.read(tmp_path / "a.flac", start_s=start, stop_s=stop)
        with pytest.raises(ZipperError, match=r"are no piece of it|not readable sound"):
            audio.read(told, start_s=start, stop_s=stop)


def flac_of_unknown_length(content: bytes) -> bytes:
    return content[:21] + bytes([content[21] & 0xF0]) + bytes(4) + content[26:]


def test_a_length_that_is_not_true_is_said_with_both(tmp_path: Path) -> None:
    for name in ("a.wav", "a.mp3", "a.flac"):
        audio.write(tmp_path / name, tone(440, 4.0))
    wav, mp3, flac = ((tmp_path / name).read_bytes() for name in ("a.wav", "a.mp3", "a.flac"))
    told = int.from_bytes(flac[22:26], "big")
    for content, message in [
        (
            wav[: 44 + 64_000],
            r"was cut short: its header speaks of 128,000 bytes of sound, 64,000 are there",
        ),
        (
            wav[:40] + struct.pack("<I", 64_000) + wav[44:],
            r"holds more than it says: behind its 64,000 bytes of sound lie 64,000",
        ),
        (
            mp3[: len(mp3) // 2],
            r"was cut short: its header speaks of 4.\d\d s, [12].\d\d s are there",
        ),
        (
            flac[:22] + (2 * told).to_bytes(4, "big") + flac[26:],
            r"its header speaks of 8.00 s, 4.00 s can be decoded",
        ),
        (
            flac[:22] + (told // 2).to_bytes(4, "big") + flac[26:],
            r"its header speaks of 2.00 s, 4.00 s can be decoded",
        ),
        (flac[: len(flac) // 2], r"is not readable sound \(.*flac.*\)\. It was cut short, damaged"),
    ]:
        with pytest.raises(ZipperError, match=message):
            audio.read(content)


def test_more_than_may_be_is_refused_before_and_while_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio.write(tmp_path / "a.flac", tone(440, 3.0))
    content = (tmp_path / "a.flac").read_bytes()
    monkeypatch.setattr(audio, "LONGEST_S", 2.0)
    with pytest.raises(ZipperError, match=r"lasts 3 s, at most 2 s are read. Cut it into pieces"):
        audio.read(content)
    with pytest.raises(ZipperError, match=r"lasts more than 2 s, at most 2 s are read"):
        audio.read(flac_of_unknown_length(content))
    assert audio.read(content, start_s=0.5, stop_s=2.5).seconds == 2.0
    monkeypatch.setattr(audio, "LONGEST_S", 9.0)
    monkeypatch.setattr(audio, "MOST_DECODED_BYTES", 4 * 16_000)
    with pytest.raises(
        ZipperError, match=r"lasts 3 s, at most 1 s of 1 channels at 16000 Hz are read"
    ):
        audio.read(content)
    monkeypatch.setattr(audio, "MOST_BYTES", 1_000)
    with pytest.raises(
        ZipperError,
        match=r"[\d,]+ bytes of a sound file were given, at most 1,000 are read. Give its path",
    ):
        audio.read(content)


def test_channels_that_cancel_each_other_out_are_not_averaged(tmp_path: Path) -> None:
    speech, noise = (
        tone(300).samples,
        0.001 * np.random.default_rng(0).standard_normal(8_000).astype(np.float32),
    )
    for quieter, offset in [(1.0, 0.0), (0.8, 0.0), (1.0, 0.2)]:
        left, right = speech + noise + offset, -quieter * speech + offset
        soundfile.write(
            tmp_path / "a.wav", np.stack([right, left], axis=1), 16_000, subtype="FLOAT"
        )
        with pytest.warns(
            UserWarning,
            match=r"a.wav: its channels cancel each other out, one is inverted. Channel 2 was "
            r"taken",
        ):
            heard = audio.read(tmp_path / "a.wav")
        np.testing.assert_allclose(heard.samples, left, atol=1e-6)


def test_channels_that_differ_are_averaged_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    one, other, silence = tone(300).samples, tone(700).samples, np.zeros(8_000, np.float32)
    steady = silence + np.float32(0.3)
    for channels in [
        (one, silence),
        (one, other),
        (silence, silence),
        (steady, steady),
        (steady, -steady),
        (one, -0.3 * one),
        (one, *[silence] * 7),
        (one, one, -one),
    ]:
        soundfile.write(tmp_path / "a.wav", np.stack(channels, axis=1), 16_000, subtype="FLOAT")
        np.testing.assert_allclose(
            audio.read(tmp_path / "a.wav").samples, np.mean(channels, axis=0), atol=1e-6
        )
    assert not recwarn.list


def test_what_is_no_sound_file_is_told_by_what_it_is(tmp_path: Path) -> None:
    for content, told in {
        b"\0\0\0\x20ftypM4A ": "it is MP4, such as m4a",
        b"<!DOCTYPE html>": "it is a page of HTML or XML",
        b"version https://git-lfs.github.com/spec/v1": "it is a pointer of Git LFS",
        b"plain words": "it begins with b'plain wo'",
        b"": "nothing is in it",
    }.items():
        with pytest.raises(ZipperError, match=f"not readable sound \\({told}"):
            audio.read(content)
    read: Any = audio.read
    for thing in (np.zeros(3, np.float32), [0.1], None, bytearray(3)):
        with pytest.raises(
            ZipperError,
            match=r"A \w+ was given as sound. Give the path of a sound file, its bytes, or Audio",
        ):
            read(thing)


# --- sound as an object


def test_samples_of_any_usual_type_are_the_same_sound() -> None:
    pulses = (tone(440).samples * 32_768).astype(np.int16)
    right = pulses.astype(np.float32) / 32_768
    for samples in (
        right,
        right.astype(np.float64),
        right.tolist(),
        right[None],
        right[:, None],
        pulses,
        torch.from_numpy(right)[None],
    ):
        sound = Audio(samples, 16_000)
        assert sound.samples.dtype == np.float32
        np.testing.assert_array_equal(sound.samples, right)
    np.testing.assert_array_equal(Audio(pulses.astype(np.int32) << 16, 16_000).samples, right)
    np.testing.assert_array_equal(
        Audio(np.array([0, 128, 255], np.uint8), 16_000).samples, np.float32([-1, 0, 127 / 128])
    )
    assert Audio(right, 16_000).samples is right
    for rate in (16_000, np.int64(16_000), 16_000.0):
        assert type(Audio(right, rate).rate_hz) is int
    assert Audio([], 16_000).seconds == Audio(np.zeros((1, 0)), 16_000).seconds == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            np.zeros((2, 100)),
            r"shape \(2, 100\) were given.*samples.mean\(axis=0\) of \(channels, time\)",
        ),
        (
            np.zeros((100, 2)),
            r"shape \(100, 2\) were given.*samples.mean\(axis=1\) of \(time, channels\)",
        ),
        (np.zeros((1, 1, 5)), r"shape \(1, 1, 5\)"),
        (0.5, r"shape \(\)"),
        ([0.1, np.nan], "NaN or infinity"),
        ([np.inf], "NaN or infinity"),
        ([1e300], "NaN or infinity"),
        (np.arange(5), "type int64"),
        (np.ones(5, bool), "type bool"),
        (np.ones(5, complex), "type complex128"),
        ("a.wav", "not an array of one channel"),
        (None, "not an array of one channel"),
        ([[1, 2], [3]], "not an array of one channel"),
        (torch.zeros(3, requires_grad=True), "not an array of one channel"),
        (torch.zeros(3, dtype=torch.bfloat16), "not an array of one channel"),
    ],
)
def test_what_is_not_one_channel_of_finite_samples_is_no_sound(
    samples: object, message: str
) -> None:
    with pytest.raises(ZipperError, match=message):
        Audio(samples, 16_000)


def test_a_rate_is_a_whole_number_within_bounds() -> None:
    for rate in (0, -16_000, 7_999, 192_001, 1e9):
        with pytest.raises(ZipperError, match=r"wanted are 8000 to 192000 Hz"):
            Audio([0.1], rate)
    for rate in (16_000.5, np.nan, np.inf, "16000", None, True):
        with pytest.raises(
            ZipperError, match=r"The rate .* was given for a sound. Give a whole number"
        ):
            Audio([0.1], rate)


# --- files written


def test_sound_beyond_one_is_scaled_before_it_is_written(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", Audio(8 * tone(440).samples, 16_000))
    np.testing.assert_allclose(
        audio.read(tmp_path / "a.wav").samples, 2 * tone(440).samples, atol=2**-14
    )


def test_a_sound_of_no_length_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match=r"no sound to write to .*a.wav \(0 samples\)"):
        audio.write(tmp_path / "a.wav", Audio([], 16_000))
    assert not os.listdir(tmp_path)


def test_a_long_ogg_is_written(tmp_path: Path) -> None:
    """In one piece it would end the process: libsndfile 1.2.2 has no room for it on its stack."""
    audio.write(tmp_path / "a.ogg", Audio(np.zeros(250 * 16_000, np.float32), 16_000))
    assert audio.read(tmp_path / "a.ogg").seconds == 250


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    for path, reason in {
        "a": "which kind",
        "a.txt": "which kind",
        "folder.wav": "is a folder",
        "no/a.wav": "does not exist",
    }.items():
        with pytest.raises(ZipperError, match=reason):
            audio.check_writable(tmp_path / path)
        with pytest.raises(ZipperError, match=reason):
            audio.write(tmp_path / path, tone(440))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.mp3", tone(440))
    before = (tmp_path / "a.mp3").read_bytes()
    with pytest.raises(ZipperError, match="cannot be written"):
        audio.write(tmp_path / "a.mp3", tone(440, rate_hz=192_000))  # mp3 ends at 48 kHz
    assert os.listdir(tmp_path) == ["a.mp3"]
    assert (tmp_path / "a.mp3").read_bytes() == before


def test_trimming_takes_the_silence_at_the_ends_only() -> None:
    rate, silence, word = 16_000, np.zeros(8_000, np.float32), tone(440, 0.25).samples
    sound = Audio(np.concatenate([silence, word, silence, word, silence]), rate)
    assert sound.trim().seconds == pytest.approx(0.25 + 0.5 + 0.25 + 2 * 0.02, abs=0.011)
    assert Audio(silence, rate).trim().seconds == 0.5


def word_at(start: int, length: int = 8_000, noise: float = 0.0) -> Audio:
    """A tone of 200 ms that begins at a sample, in a room."""
    room = noise * np.random.default_rng(start).standard_normal(length).astype(np.float32)
    room[start : start + 3_200] += tone(440, 0.2, height=0.3).samples
    return Audio(room, 16_000)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 3e-3])
@pytest.mark.parametrize("start", [0, 1, 997, 4_800])
def test_the_ends_of_a_sound_are_found_to_a_millisecond(start: int, noise: float) -> None:
    first, last = word_at(start, noise=noise).ends()
    # A millisecond: the mean that is taken off lets a tone begin a little before it does.
    assert abs(first - start) <= 20
    assert abs(last - start - 3_200) <= 32


def test_the_ends_of_a_sound_that_comes_later_are_later_by_as_much() -> None:
    first, last = word_at(1_000).ends()
    for later in (1, 7, 160, 1_234):
        assert word_at(1_000 + later).ends() == (first + later, last + later)


def test_pauses_are_filled_up_where_there_were_none() -> None:
    sound = Audio(word_at(0).samples[:3_200], 16_000).trim()
    assert abs(len(sound.samples) - 3_200 - 640) <= 16
    assert not sound.samples[:300].any()
    assert not sound.samples[-300:].any()
    np.testing.assert_array_equal(sound.between(-2, 3).samples, [0, 0, *sound.samples[:3]])


def test_an_offset_goes_and_the_sound_stays() -> None:
    sound = tone(440, 0.5)
    shifted = Audio(sound.samples + np.float32(0.3), 16_000)
    np.testing.assert_allclose(shifted.centred().samples, sound.samples, atol=0.02)
    assert Audio(np.full(8_000, 0.3, np.float32), 16_000).centred().samples.max() == pytest.approx(
        0, abs=1e-6
    )


def test_speech_swings_and_noise_does_not() -> None:
    noise = Audio(np.random.default_rng(0).standard_normal(16_000).astype(np.float32), 16_000)
    assert noise.swing_db < 2
    assert tone(440).swing_db < 1
    assert Audio(np.zeros(100, np.float32), 16_000).swing_db == 0
    assert word_at(4_000, noise=3e-3).swing_db == pytest.approx(
        10 * np.log10(0.3**2 / 2 / 3e-3**2), abs=1.5
    )


def test_levelling_makes_loud_frames_equally_loud() -> None:
    quiet, loud = (
        Audio(np.float32(height) * tone(440).samples, 16_000).level(0.1) for height in (0.001, 1.0)
    )
    np.testing.assert_allclose(quiet.samples, loud.samples, rtol=1e-4, atol=1e-6)
    assert float(np.sqrt(np.square(loud.samples).mean())) == pytest.approx(0.1, rel=0.02)


def test_the_picture_of_a_tone_is_brightest_where_the_mel_scale_puts_it() -> None:
    mel = Mel()
    for hertz in (250.0, 1000.0, 4000.0):
        # HTK's mel scale.
        low, high, here = (1127 * np.log(1 + f / 700) for f in (60.0, 7600.0, hertz))
        expected = (here - low) / (high - low) * (mel.bins + 1) - 1
        assert abs(mel.picture(tone(hertz))[10:-10].mean(0).argmax() - expected) <= 0.51


def test_the_bins_of_a_picture_add_up_to_the_power_of_the_sound() -> None:
    power = np.exp(Mel(loud=0.1).picture(tone(1000, 1.0)))[10:-10].sum(axis=1)
    np.testing.assert_allclose(power, 0.1**2, rtol=0.02)


def test_loudness_does_not_change_the_picture_and_silence_is_its_floor() -> None:
    mel, noise = Mel(), np.random.default_rng(0).standard_normal(16_000, dtype=np.float32)
    pictures = [mel.picture(Audio(np.float32(height) * noise, 16_000)) for height in (0.001, 0.2)]
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-3)
    np.testing.assert_allclose(
        mel.picture(Audio(np.zeros(1600, np.float32), 16_000)), np.log(mel.floor), rtol=1e-6
    )


def test_a_picture_has_one_row_for_each_started_hop_at_any_rate() -> None:
    for time, rows in [(0, 0), (1, 1), (160, 1), (161, 2), (16_000, 100)]:
        assert Mel().picture(Audio(np.ones(time, np.float32), 16_000)).shape == (rows, 40)
    assert Mel().picture(tone(440, 1.0, rate_hz=22_050)).shape == (100, 40)


@pytest.mark.parametrize("said", [None, 0.1 * np.ones(480, np.float32)])
def test_phases_are_found_by_fast_griffin_lim_as_it_is_written_down(said: Any) -> None:
    mel = Mel()
    magnitude = np.random.default_rng(1).random((12, 257), dtype=np.float32)
    held = np.zeros(0) if said is None else said
    window, before = np.hanning(400), (400 - 160) // 2

    def transform(sound: Any) -> Any:
        padded = np.pad(sound, (before, 400))
        return np.stack(
            [np.fft.rfft(padded[at : at + 400] * window, 512) for at in range(0, 1920, 160)]
        )

    def nearest(spectrum: Any) -> Any:
        total, weight = np.zeros(3000), np.zeros(3000)
        wanted = magnitude * np.exp(1j * np.angle(spectrum))
        for at, row in zip(range(0, 1920, 160), np.fft.irfft(wanted, 512), strict=True):
            total[at : at + 400] += row[:400] * window
            weight[at : at + 400] += window**2
        sound = (total / np.maximum(weight, 1e-3))[before : before + 1920]
        return np.concatenate([held, sound[len(held) :]])

    noise = np.random.default_rng(0).standard_normal(1920, dtype=np.float32)
    spectrum = transform(np.concatenate([held, noise[len(held) :]]))
    last = np.zeros_like(spectrum)
    for _ in range(4):
        now = transform(nearest(spectrum))
        spectrum, last = now + 0.99 * (now - last), now
    found = mel.phased(magnitude, rounds=4, said=said).samples
    np.testing.assert_allclose(found, nearest(spectrum), atol=2e-5)


def test_sound_does_not_depend_on_how_many_threads_make_it() -> None:
    magnitude = np.random.default_rng(1).random((90, 257), dtype=np.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(Mel().phased(magnitude, rounds=3).samples)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*found)


def test_sound_made_from_a_picture_has_that_picture() -> None:
    chance = np.random.default_rng(0)
    glide = 0.4 * np.sin(
        2 * np.pi * np.cumsum(np.linspace(200, 2500, 8_000)) / 16_000
    ) + 0.01 * chance.standard_normal(8_000)
    mel = Mel()
    picture = mel.picture(Audio(glide.astype(np.float32), 16_000))
    sound = mel.sound(picture)
    assert (sound.rate_hz, len(sound.samples), sound.samples.dtype) == (16_000, 8_000, np.float32)
    assert np.abs(sound.samples).max() <= 1
    difference = np.abs(mel.picture(sound) - picture)[5:-5]
    assert difference.mean() < 0.2 * np.abs(picture - picture.mean(axis=0)).mean()
    np.testing.assert_array_equal(sound.samples, mel.sound(picture).samples)
    assert len(mel.sound(picture[:0]).samples) == 0
