"""Sound: read, write, resample it, and turn it into a log-mel picture and back.

Everything here is one channel of float32 samples in [-1, 1] with its rate beside it. It knows
nothing of units or towers.
"""

import functools
import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Complex64, Float32, Float64
from numpy.lib.stride_tricks import sliding_window_view

from zipper.audio import containers
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.saving.files import place, replacing

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 8_000, 192_000
MOST_CHANNELS = 8
LONGEST_S = 600.0
MOST_DECODED_BYTES = 256 << 20  # of all channels as float32; 600 s of stereo at 48 kHz are 220 MiB
FRAMES = 4_096  # that are transformed at once, 17 MB of them
MOST_BYTES = 25_000_000  # of a file that is given as bytes, and so lies in memory
BLOCK = 65_536  # samples of all channels that are decoded at once
SLACK_S = 0.5  # that the end of a piece may lie behind the end of its file: manifests are rounded
# of the power that the sum of channels with nothing in common has; two of one power: a correlation
# below -0.9
CANCELLED = 0.1
WRITABLE = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True, init=False, eq=False)  # arrays are neither equal nor unequal
class Audio:
    """One channel of sound: `samples` float32, finite, in [-1, 1] by custom; `rate_hz` samples per
    second, 8,000 to 192,000."""

    samples: Float32[np.ndarray, " time"]
    rate_hz: int

    def __init__(self, samples: Any, rate_hz: Any) -> None:
        """samples: an array, a tensor or a list of one channel, (time,), (1, time) or (time, 1).
        Floats stay as they are; integers of 8, 16 or 32 bits are scaled by what they can hold, as
        in a file. None at all are silence of no length.

        Raises ZipperError for several channels (which of the two axes they are is a guess), for NaN
        and infinity, for integers of another width, and for a rate out of bounds.
        """
        object.__setattr__(self, "samples", _one_channel(samples))
        number = isinstance(rate_hz, int | float | np.integer | np.floating) and not isinstance(
            rate_hz, bool
        )
        if not number or not np.isfinite(rate_hz) or rate_hz != int(rate_hz):
            raise ZipperError(
                f"The rate {rate_hz!r} was given for a sound. Give a whole number of samples a "
                "second, e.g. 16000."
            )
        _check_rate(int(rate_hz), "this sound")
        object.__setattr__(self, "rate_hz", int(rate_hz))

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate_hz

    @property
    def swing_db(self) -> float:
        """How far its loud frames of 25 ms (95th percentile) lie above its quiet ones (10th), above
        400 Hz.

        Speech swings between vowels and stops, by 7 dB and more; silence, noise and hum by 0 to
        2.4, however loud they are. Below 400 Hz brown noise would swing too.
        """
        hop = self.rate_hz // 40
        power = _frame_power(self.centred(2.5).samples[: len(self.samples) // hop * hop], hop)
        if not len(power):
            return 0.0
        loud, quiet = np.quantile(power, (0.95, 0.1))
        return 10 * math.log10(loud / max(quiet, loud * 1e-12)) if loud > 0 else 0.0

    def resample(self, rate_hz: int) -> "Audio":
        """The same sound at another rate (soxr, high quality)."""
        _check_rate(rate_hz, "the rate asked for")
        if rate_hz == self.rate_hz:
            return self
        return Audio(
            extra("soxr").resample(self.samples, self.rate_hz, rate_hz).astype(np.float32), rate_hz
        )

    def between(self, start: int, stop: int) -> "Audio":
        """The samples from `start` to before `stop`, zeros where there are none."""
        before, behind = max(0, -start), max(0, stop - len(self.samples))
        return Audio(
            np.pad(self.samples, (before, behind))[start + before : stop + before], self.rate_hz
        )

    def centred(self, window_ms: float = 50.0) -> "Audio":
        """Without an offset, and what else swings less than 20 times a second: less its moving
        mean."""
        if not len(self.samples):
            return self
        samples = self.samples - self.samples.mean(dtype=np.float64)
        window = max(1, round(window_ms / 1000 * self.rate_hz))
        return Audio((samples - _moving_mean(samples, window)).astype(np.float32), self.rate_hz)

    def ends(self, front: "Front | None" = None) -> tuple[int, int]:
        """The samples from and before which something is heard; (0, length) where nothing is.

        They are found to the sample: the ends of sound that comes later are later by as much.
        """
        front = front or Front()
        window = max(1, round(front.window_ms / 1000 * self.rate_hz))
        power = _running_power(self.centred(front.mean_ms).samples, window)
        loudest = float(power.max(initial=0.0))
        if loudest <= 0:
            return 0, len(self.samples)
        live = power[:: max(1, window // 2)]
        # Digital silence around a recording says nothing of the noise in it.
        live = live[live > loudest * 1e-9]
        noise = float(np.quantile(live, front.noise_share)) * 10 ** (front.noise_db / 10)
        quiet, least = (loudest * 10 ** (db / 10) for db in (front.quiet_db, front.least_db))
        heard = np.flatnonzero(power > min(max(noise, quiet), least))
        return int(heard[0]), int(heard[-1]) - window + 2

    def trim(self, margin_s: float = 0.02) -> "Audio":
        """Without the pauses at both ends, of silence or of noise, except `margin_s` seconds.

        Where there was less, silence fills it up.
        """
        if not self.samples.any():
            return self
        margin, (start, stop) = round(margin_s * self.rate_hz), self.ends()
        return self.between(start - margin, stop + margin)

    def level(self, loud: float) -> "Audio":
        """Scaled so that its loud frames (95th percentile of 10 ms power) have this root mean
        square, however it was recorded."""
        power = (
            float(np.quantile(_frame_power(self.samples, self.rate_hz // 100), 0.95))
            if len(self.samples)
            else 0.0
        )
        return (
            self
            if power < 1e-12
            else Audio(self.samples * np.float32(loud / power**0.5), self.rate_hz)
        )


@dataclass(frozen=True)
class Front:
    """What becomes of a sound before it is told as codes (docs/log.md has what each is worth).

    Its offset goes, so do the pauses around what is heard in it, and what a code sounds like is
    compared with it as its noise and its band let that be heard.

    mean_ms: of the moving mean without which `Audio.ends` looks: 2.5 leave what lies above 400 Hz,
    and so little of what wind and machines do. window_ms: of the running mean power by which it
    tells what is heard. More than `quiet_db` under the loudest is silence, and so is what lies less
    than `noise_db` above the noise, the power that `noise_share` of the sound stays below; but
    never what is less than `least_db` under the loudest. margin_ms: of the pause that stays behind
    the end. places, fitted: see `SpeechUnits.log_mel`. floor_share: of the frames lie below a
    sound's noise, bin by bin.
    empty_nats: above the floor of the picture; a bin that never comes higher holds no sound.
    """

    mean_ms: float = 2.5
    window_ms: float = 2.0
    quiet_db: float = -45.0  # eSpeak's own pauses lie below -60, its weakest fricatives above -40
    noise_share: float = 0.1
    # With 0.1 and 2 ms: no noise, of any colour, is taken for speech; docs/log.md.
    noise_db: float = 10.0
    least_db: float = -15.0
    margin_ms: float = 20.0
    places: int = 4
    fitted: int = 4
    floor_share: float = 0.05
    empty_nats: float = 2.0


def read(
    source: str | Path | bytes,
    rate_hz: int | None = None,
    resample: bool = True,
    start_s: float = 0.0,
    stop_s: float | None = None,
) -> Audio:
    """The sound of a wav, flac, mp3, ogg, opus, aiff, au, caf, w64 or sph file, its channels
    averaged.

    source: a path, or the content of a file (at most 25 MB). rate_hz: the rate wanted; None keeps
    the file's. start_s, stop_s: the piece wanted, in seconds (None: to the end):
    `samples[start:stop]` of the whole, but for the scale where samples go beyond 1.

    What is returned was decoded, whatever a header says: the file is read until nothing more comes.
    Raises ZipperError for what is no such file; for a length that differs from the header's (the
    file was cut short, damaged or joined); and for sound that is empty, holds NaN or infinity, has
    an odd rate (8 to 192 kHz are fine), more than 8 channels, or is longer than 600 s or 256 MiB
    decoded, which is asked of the header first and of the decoder again. Where a header gives no
    length (a stream: MP3 without a Xing header, Ogg, sizes of 0xFFFFFFFF, FLAC of 0 samples) what
    can be decoded is the sound.

    Channels that cancel each other out (one of them is inverted) are not averaged: the loudest is
    taken, with a warning.
    """
    where = "(sound given as bytes)"
    if isinstance(source, bytes):
        if len(source) > MOST_BYTES:
            raise ZipperError(
                f"{len(source):,} bytes of a sound file were given, at most {MOST_BYTES:,} are "
                "read. Give its path, or shorten it."
            )
        file: io.BufferedIOBase = io.BytesIO(source)
    elif isinstance(source, str | Path):
        file, where = _open(place(source)), str(source)
    else:
        raise ZipperError(
            f"A {type(source).__name__} was given as sound. Give the path of a sound file, its "
            "bytes, or Audio(samples, rate_hz)."
        )
    with file:
        heard = _decode(file, where, start_s, stop_s)
        if heard.cancelled:
            heard = _decode(file, where, start_s, stop_s, heard.loudest)
            warnings.warn(
                f"{where}: its channels cancel each other out, one is inverted. Channel "
                f"{heard.loudest + 1} was taken alone.",
                stacklevel=2,
            )
    if rate_hz not in (None, heard.rate_hz) and not resample:
        raise ZipperError(
            f"{where} is {heard.rate_hz} Hz, these units need {rate_hz} Hz. Pass resample=True or "
            "convert it first."
        )
    if not len(heard.samples):
        raise ZipperError(
            f"{where} holds no sound (0 samples). Give a recording with something in it."
        )
    low, high = float(heard.samples.min()), float(heard.samples.max())  # abs() would be a copy
    if not np.isfinite([low, high]).all():
        raise ZipperError(
            f"{where} holds NaN or infinite samples. It was damaged when it was written: export "
            "it again."
        )
    samples = heard.samples
    samples /= np.float32(max(1.0, -low, high))
    return Audio(samples, heard.rate_hz).resample(rate_hz or heard.rate_hz)


def write(path: str | Path, audio: Audio) -> None:
    """Sound as a wav (16 bit), flac, ogg or mp3 file, told by the name's ending; the file is there
    whole or not at all.

    Samples beyond 1 are scaled down, not cut. Raises ZipperError for a sound of no samples, which
    `read` would refuse, for a rate that the kind of file does not know, and for a place that cannot
    be written.
    """
    soundfile, path = extra("soundfile"), place(path)
    check_writable(path)
    if not len(audio.samples):
        raise ZipperError(f"There is no sound to write to {path} (0 samples).")
    scale = max(1.0, float(np.abs(audio.samples).max()))
    try:
        with replacing(path) as beside:
            pour(beside, audio, path.suffix[1:], scale)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise ZipperError(
            f"{path} cannot be written ({error}). Try another place, or .wav, which takes any rate."
        ) from error


def pour(file: Any, audio: Audio, kind: str, scale: float = 1.0) -> None:
    """Sound, divided by `scale`, into a file of a kind ("wav", "flac", "ogg", "mp3"), a block at a
    time: libsndfile lays a whole Vorbis file on its stack, and dies of it."""
    made = extra("soundfile").SoundFile(file, "w", audio.rate_hz, 1, format=kind.upper())
    with made as into:
        for at in range(0, len(audio.samples), BLOCK):
            into.write(audio.samples[at : at + BLOCK] / np.float32(scale))


def check_writable(path: str | Path) -> None:
    """Raises ZipperError if sound cannot be written there: ask before the work, not after it."""
    path = place(path)
    if path.suffix.lower() not in WRITABLE:
        raise ZipperError(
            f"{path} does not say which kind of sound it is. End its name in one of "
            f"{', '.join(WRITABLE)}."
        )
    if path.is_dir():
        raise ZipperError(f"{path} is a folder, a file was wanted.")
    if not path.parent.is_dir():
        raise ZipperError(f"the folder {path.parent} does not exist. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ZipperError(f"the folder {path.parent} is not yours to write in. Choose another one.")


class _Heard(NamedTuple):
    """What was decoded. cancelled: its channels do not bear being averaged; the loudest of them is
    `loudest`."""

    samples: Float32[np.ndarray, " time"]
    rate_hz: int
    cancelled: bool
    loudest: int


class _Header(NamedTuple):
    """What a file says of itself. frames: samples a channel, None where it does not say; slack: how
    many of them may be missing."""

    where: str
    rate_hz: int
    channels: int
    frames: int | None
    slack: int

    def piece(self, start_s: float, stop_s: float | None) -> tuple[int, int]:
        """The samples wanted, from and up to; of all, one more than may be. Raises ZipperError for
        what need not be decoded."""
        _check_rate(self.rate_hz, self.where)
        if self.channels > MOST_CHANNELS:
            raise ZipperError(
                f"{self.where} has {self.channels} channels, at most {MOST_CHANNELS} are read. "
                "Mix it down first."
            )
        last = np.inf if self.frames is None else self.frames
        end_s = np.inf if stop_s is None else stop_s
        start = round(start_s * self.rate_hz) if 0 <= start_s < end_s else -1
        if (
            start < 0
            or start >= last > 0
            or (stop_s is not None and (stop_s - SLACK_S) * self.rate_hz > last)
        ):
            raise self._no_piece(self.frames, start_s, stop_s)
        stop = (
            start + self._most + 1
            if stop_s is None
            else max(start + 1, round(stop_s * self.rate_hz))
        )
        long = min(last, stop if stop_s is not None else np.inf) - start
        if np.isfinite(long) and long > self._most:
            raise self._too_long(f"{long / self.rate_hz:.0f}", int(long))
        return start, stop

    def check(self, at: int, stop: int, start_s: float, stop_s: float | None) -> None:
        """Raises ZipperError if what was decoded, up to `at`, is not what was wanted, up to `stop`,
        or not what the file says."""
        if stop_s is None and at == stop:
            raise self._too_long(f"more than {self._most / self.rate_hz:.0f}", at)
        told = at if self.frames is None else self.frames
        if at < min(told, stop) - self.slack or (stop_s is None and at > told):
            raise ZipperError(
                f"{self.where} was cut short or damaged: its header speaks of "
                f"{told / self.rate_hz:.2f} s, "
                f"{at / self.rate_hz:.2f} s can be decoded. Fetch or export it again."
            )
        if stop_s is not None and at < stop - SLACK_S * self.rate_hz:
            raise self._no_piece(at, start_s, stop_s)

    @property
    def _most(self) -> int:
        """Samples a channel that are decoded at most."""
        return min(int(LONGEST_S * self.rate_hz), MOST_DECODED_BYTES // (4 * self.channels))

    def _too_long(self, seconds: str, frames: int) -> ZipperError:
        limit = f"{LONGEST_S:.0f} s are read"
        if frames <= LONGEST_S * self.rate_hz:
            longest = self._most / self.rate_hz
            limit = f"{longest:.0f} s of {self.channels} channels at {self.rate_hz} Hz are read"
        return ZipperError(f"{self.where} lasts {seconds} s, at most {limit}. Cut it into pieces.")

    def _no_piece(self, frames: int | None, start_s: float, stop_s: float | None) -> ZipperError:
        lasts = "" if frames is None else f"lasts {frames / self.rate_hz:.2f} s; "
        return ZipperError(f"{self.where} {lasts}{start_s} to {stop_s} s are no piece of it.")


def _open(path: Path) -> io.BufferedIOBase:
    if not os.path.isfile(path):
        raise ZipperError(
            f"{path} is a folder, a sound file was wanted."
            if os.path.isdir(path)
            else f"{path} does not exist. Give a sound file."
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise ZipperError(
            f"{path} is not readable sound ({error}). Give a file that is yours to read."
        ) from error


def _decode(
    file: io.BufferedIOBase,
    where: str,
    start_s: float,
    stop_s: float | None,
    channel: int | None = None,
) -> _Heard:
    """A piece of a file, its channels averaged or one of them alone, block by block: never are all
    channels in memory at once."""
    soundfile = extra("soundfile")
    try:
        opened = containers.opened(file, where)
        opened.file.seek(0)  # libsndfile begins where a file stands
        with _forward()(opened.file) as sound:
            told = opened.frames or (sound.frames if sound.frames < 1 << 62 else None)
            header = _Header(where, sound.samplerate, sound.channels, told, opened.slack)
            start, stop = header.piece(start_s, stop_s)
            at = _seek(sound, start) if start else 0
            count = sound.channels
            room = np.empty((BLOCK // count, count), np.float32)
            share = (
                np.full(count, 1 / count, np.float32)
                if channel is None
                else np.eye(count, dtype=np.float32)[channel]
            )
            pcm, total, products = bytearray(), np.zeros(count), np.zeros((count, count))
            while at < stop and len(block := sound.read(out=room[: stop - at])):
                fresh = block[max(0, start - at) :]
                at += len(block)
                with np.errstate(all="ignore"):  # of NaN and infinity, which are refused at the end
                    pcm += (fresh @ share).tobytes()
                    total += fresh.sum(axis=0)
                    products += fresh.T @ fresh
    except soundfile.LibsndfileError as error:
        raise ZipperError(
            f"{where} is not readable sound ({error.error_string}). It was cut short, damaged or "
            "is of another kind: fetch or export it again."
        ) from error
    except OSError as error:
        raise ZipperError(
            f"{where} is not readable sound ({error}). Give a wav, flac, mp3 or ogg file."
        ) from error
    header.check(at, stop, start_s, stop_s)
    heard = max(1, at - start)
    with np.errstate(all="ignore"):
        # Covariance: an offset is no sound.
        spread = products / heard - np.outer(total / heard, total / heard)
        # Float32 leaves as much of an offset alone.
        sounds = spread.trace() > 1e-5 * products.trace() / heard
        cancelled = bool(sounds and spread.sum() < CANCELLED * spread.trace())
    return _Heard(
        np.frombuffer(pcm, np.float32), header.rate_hz, cancelled, int(spread.diagonal().argmax())
    )


@functools.cache
def _forward() -> Any:
    """soundfile's reader without its seek behind every block: after one MP3 is decoded without what
    came before, and FLAC that does not say where it ends fails there."""

    class Forward(extra("soundfile").SoundFile):  # type: ignore[misc]
        def seekable(self) -> bool:
            return False

    return Forward


def _seek(sound: Any, start: int) -> int:
    """Goes to a sample, or before it where that is not exact, and says where. What an MP3, Vorbis
    or Opus decoder gives hangs on
    what it read before: 1 s of that is enough for all three (RFC 7845 asks 80 ms for Opus;
    tests/test_audio.py).
    """
    if not super(type(sound), sound).seekable():
        return 0
    place = (
        max(0, start - sound.samplerate)
        if sound.subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III")
        else start
    )
    sound.seek(place)
    return place


def _one_channel(samples: Any) -> Float32[np.ndarray, " time"]:
    try:
        given = np.asarray(samples)
        if given.dtype.name in ("uint8", "int16", "int32"):
            info = np.iinfo(given.dtype)
            given = (given - np.float32((info.max + info.min + 1) / 2)) / np.float32(
                (info.max - info.min + 1) / 2
            )
        elif given.size and given.dtype.kind != "f":
            raise TypeError(
                f"numbers of the type {given.dtype}; PCM has floats, or integers of 8, 16 or 32 "
                "bits"
            )
        with np.errstate(over="ignore"):
            one = given.reshape(-1) if given.ndim == 2 and 1 in given.shape else given
            one = one.astype(np.float32, copy=False)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # a tensor of bfloat16, on a device, or with a gradient
        raise ZipperError(
            f"The samples of a sound are not an array of one channel ({error}). Give a float32 "
            "array."
        ) from error
    if one.ndim != 1:
        raise ZipperError(
            f"Samples of the shape {given.shape} were given, one channel of the shape (time,) was "
            "wanted. Average the channels, samples.mean(axis=0) of (channels, time) or "
            "samples.mean(axis=1) of (time, channels), or take one."
        )
    if not np.isfinite(one).all():
        raise ZipperError(
            "The samples of a sound hold NaN or infinity. Look at what made them; np.nan_to_num "
            "makes silence of them."
        )
    return one


def _check_rate(rate_hz: int, whose: str) -> None:
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise ZipperError(
            f"{whose} is {rate_hz} Hz, wanted are {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz. "
            "Convert it first."
        )


def _moving_mean(
    samples: Float64[np.ndarray, " time"], window: int
) -> Float64[np.ndarray, " time"]:
    """Mean of the `window` samples around each, zeros beyond the ends."""
    total = np.pad(samples, (window // 2 + 1, window))
    np.cumsum(total, out=total)  # in place: ten minutes are 77 MB each time
    mean = total[window : window + len(samples)] - total[: len(samples)]
    mean /= window
    return mean


def _running_power(
    samples: Float32[np.ndarray, " time"], window: int
) -> Float64[np.ndarray, " windows"]:
    """Mean power of the `window` samples up to each, zeros before the first and behind the last."""
    total = np.square(np.pad(samples, (window, window - 1)), dtype=np.float64)
    np.cumsum(total, out=total)
    power = total[window:] - total[:-window]
    np.maximum(power, 0, out=power)
    power /= window
    return power


def _frame_power(samples: Float32[np.ndarray, " time"], hop: int) -> Float32[np.ndarray, " frames"]:
    padded = np.pad(samples, (0, -len(samples) % hop))
    return np.square(padded).reshape(-1, hop).mean(axis=1)


@dataclass(frozen=True)
class Mel:
    """A log-mel picture of sound: its settings, the way there and the way back.

    `window`, `hop` and `fft` are in samples at `rate_hz`; `bins` triangles lie evenly on HTK's mel
    scale, `low_hz` to `high_hz`.
    """

    rate_hz: int = 16_000
    window: int = 400
    hop: int = 160
    fft: int = 512
    bins: int = 40
    low_hz: float = 60.0
    high_hz: float = 7_600.0
    # Root mean square of a loud frame after levelling; speech then peaks near 0.5.
    loud: float = 0.1
    # mel power that counts as silence; 1e-6 cut weak fricatives off, 1e-10 spent codes on the noise
    # of silence
    floor: float = 1e-8

    def picture(self, audio: Audio) -> Float32[np.ndarray, "frames bins"]:
        """Natural logarithm of mel power, one row per started hop, of the resampled sound; its
        loudness does not matter."""
        return self.logs(audio.resample(self.rate_hz).level(self.loud).samples)

    def logs(
        self, samples: Float32[np.ndarray, " time"], hop: int = 0
    ) -> Float32[np.ndarray, "frames bins"]:
        """The picture of samples that are at the right rate and loudness already, one row per `hop`
        (0: its own)."""
        return np.concatenate(
            [
                np.log(np.maximum(np.abs(part) ** 2 @ self.filters.T, np.float32(self.floor)))
                for part in self._parts(samples, -(-len(samples) // (hop or self.hop)), hop)
            ]
        )

    def sound(self, picture: Float32[np.ndarray, "frames bins"], rounds: int = 40) -> Audio:
        """Sound whose picture is close to this one, at `rate_hz`; the same for the same picture."""
        return self.phased(self.magnitude(picture), rounds)

    def magnitude(
        self, picture: Float32[np.ndarray, "frames bins"], rounds: int = 50
    ) -> Float32[np.ndarray, "frames frequencies"]:
        """A spectrum without phase whose picture is close to this one: non-negative least squares
        by multiplicative updates (Lee and Seung 2001), smooth between the triangles' peaks."""
        mel, weights = np.exp(picture), self.filters
        spectrum = mel @ weights / np.maximum(np.square(weights).sum(0), 1e-12)
        target = mel @ weights
        for _ in range(rounds):
            spectrum = spectrum * target / np.maximum(spectrum @ weights.T @ weights, 1e-20)
        return np.sqrt(spectrum)

    def phased(
        self,
        magnitude: Float32[np.ndarray, "frames frequencies"],
        rounds: int = 40,
        momentum: float = 0.99,
        said: Float32[np.ndarray, " before"] | None = None,
    ) -> Audio:
        """Sound whose spectrum is close to this one, at `rate_hz`; the same for the same spectrum.

        Phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013) from that of a fixed noise.
        rounds: 0.3 ms each for 2 s of sound. said: the sound of the first frames, if it was made
        before; it stays as it is, and what follows joins it.
        """
        if not len(magnitude):
            return Audio(np.zeros(0, np.float32), self.rate_hz)
        looked = _Looked(self, magnitude, np.zeros(0, np.float32) if said is None else said)
        spectrum = looked.spectrum()
        before = np.zeros_like(spectrum)
        for _ in range(rounds):
            looked.hear(spectrum)
            now = looked.spectrum()
            np.subtract(now, before, out=spectrum)
            spectrum *= np.float32(momentum)
            spectrum += now
            before = now
        looked.hear(spectrum)
        if said is not None:
            return Audio(looked.samples.clip(-1, 1), self.rate_hz)
        loudest = float(np.abs(looked.samples).max(initial=0.0))
        return Audio(looked.samples / max(1.0, loudest), self.rate_hz)

    @functools.cached_property
    def filters(self) -> Float32[np.ndarray, "bins frequencies"]:
        """Triangles over the frequencies, divided by the window's energy: a sound's power is the
        sum over its bins."""
        low, high = 1127 * np.log1p(np.array([self.low_hz, self.high_hz]) / 700)
        edges = 700 * np.expm1(np.linspace(low, high, self.bins + 2) / 1127)
        frequency = np.linspace(0, self.rate_hz / 2, self.fft // 2 + 1)
        up = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        down = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
        energy = np.square(np.hanning(self.window)).sum() * self.fft / 2
        return (np.maximum(0, np.minimum(up, down)) / energy).astype(np.float32)

    def _parts(
        self, samples: Float32[np.ndarray, " time"], frames: int, hop: int = 0
    ) -> Iterator[Complex64[np.ndarray, "some frequencies"]]:
        """The transform, FRAMES at a time; there is always one."""
        hop = hop or self.hop
        before = (self.window - hop) // 2  # the window's middle lies on the hop's middle
        needed = (frames - 1) * hop + self.window if frames else self.window
        padded = np.pad(samples, (before, max(0, needed - before - len(samples))))
        views = sliding_window_view(padded, self.window)[::hop][:frames]
        for start in range(0, max(1, frames), FRAMES):
            yield np.fft.rfft(views[start : start + FRAMES] * self._shape, self.fft)

    @functools.cached_property
    def _shape(self) -> Float32[np.ndarray, " window"]:
        return np.hanning(self.window).astype(np.float32)


@final
class _Looked:
    """A sound that is changed and looked at round after round, in memory that is taken once.

    samples: as they are now; those that were said before stay. Its transform is torch's, which
    takes a fifth of the time of numpy's; codes are told by numpy's, and stay what they were.
    """

    def __init__(
        self,
        mel: Mel,
        magnitude: Float32[np.ndarray, "frames frequencies"],
        said: Float32[np.ndarray, " before"],
    ) -> None:
        """Begins as noise, the same for every sound."""
        frames, before = len(magnitude), (mel.window - mel.hop) // 2
        time, parts = frames * mel.hop, -(-mel.window // mel.hop)
        padded = np.zeros(before + time + mel.window, np.float32)
        self.samples = padded[before : before + time]
        self._views = sliding_window_view(padded, mel.window)[:: mel.hop][:frames]
        self._rows = np.zeros((frames, mel.fft), np.float32)
        self._total = np.zeros((frames + parts - 1, mel.hop), np.float32)
        self._mel, self._magnitude, self._said = mel, magnitude, said
        self._gain = np.empty_like(magnitude)
        window = np.broadcast_to(mel._shape**2, (frames, mel.window))
        self._weight = np.maximum(self._overlapped(window), np.float32(1e-3))
        self.samples[:] = np.random.default_rng(0).standard_normal(time, dtype=np.float32)
        self.samples[: len(said)] = said

    def spectrum(self) -> Complex64[np.ndarray, "frames frequencies"]:
        """What is heard now."""
        np.multiply(self._views, self._mel._shape, out=self._rows[:, : self._mel.window])
        found: Complex64[np.ndarray, "frames frequencies"] = torch.fft.rfft(
            torch.from_numpy(self._rows)
        ).numpy()
        return found

    def hear(self, spectrum: Complex64[np.ndarray, "frames frequencies"]) -> None:
        """Becomes the sound nearest to the magnitude wanted with this phase (Griffin and Lim 1984:
        overlap-add by the squared window). Scales the spectrum that is given."""
        np.maximum(np.abs(spectrum, out=self._gain), np.float32(1e-12), out=self._gain)
        spectrum *= np.divide(self._magnitude, self._gain, out=self._gain)
        rows = torch.fft.irfft(torch.from_numpy(spectrum), self._mel.fft).numpy()
        rows = rows[:, : self._mel.window]
        rows *= self._mel._shape
        np.divide(self._overlapped(rows), self._weight, out=self.samples)
        self.samples[: len(self._said)] = self._said

    def _overlapped(
        self, rows: Float32[np.ndarray, "frames window"]
    ) -> Float32[np.ndarray, " time"]:
        """The sum of windows, each a hop behind the last."""
        total, hop = self._total, self._mel.hop
        total.fill(0)
        for part in range(len(total) - len(rows) + 1):
            piece = rows[:, part * hop : (part + 1) * hop]
            total[part : part + len(rows), : piece.shape[1]] += piece
        before = (self._mel.window - hop) // 2
        return total.reshape(-1)[before : before + len(self.samples)]
