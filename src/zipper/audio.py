"""Sound: read, write, resample it, and turn it into a log-mel picture and back.

Everything here is one channel of float32 samples in [-1, 1] with its rate beside it. It knows nothing of units or towers.
"""

import functools
import importlib
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Complex64, Float32

from zipper.errors import ZipperError

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 8_000, 192_000
MOST_CHANNELS = 8
LONGEST_S = 600.0
BLOCK = 65_536  # samples a channel that are decoded at once
WRITABLE = (".wav", ".flac", ".ogg", ".mp3")
QUIET_DB = -45.0  # under the loudest frame: eSpeak's own pauses lie below -60, its weakest fricatives above -40


def extra(module: str) -> Any:
    """A module of the extra `speech`, imported when it is needed. Raises ZipperError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ZipperError(f"sound needs {module}, which is not installed ({error}). Do: pip install 'zipper-lm[speech]'") from error


@dataclass(frozen=True)
class Audio:
    """One channel of sound: `samples` float32 in [-1, 1], `rate_hz` samples per second."""

    samples: Float32[np.ndarray, " time"]
    rate_hz: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate_hz

    def resample(self, rate_hz: int) -> "Audio":
        """The same sound at another rate (soxr, high quality)."""
        _check_rate(rate_hz, "the rate asked for")
        if rate_hz == self.rate_hz:
            return self
        return Audio(extra("soxr").resample(self.samples, self.rate_hz, rate_hz).astype(np.float32), rate_hz)

    def trim(self, margin_s: float = 0.02) -> "Audio":
        """Without the silence at both ends, except `margin_s` seconds of it."""
        hop = self.rate_hz // 100
        power = _frame_power(self.samples, hop)
        loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (QUIET_DB / 10))
        if not len(loud):
            return self
        margin = int(margin_s * self.rate_hz)
        return Audio(self.samples[max(0, loud[0] * hop - margin) : (loud[-1] + 1) * hop + margin], self.rate_hz)

    def level(self, loud: float) -> "Audio":
        """Scaled so that its loud frames (95th percentile of 10 ms power) have this root mean square, however it was recorded."""
        power = float(np.quantile(_frame_power(self.samples, self.rate_hz // 100), 0.95)) if len(self.samples) else 0.0
        return self if power < 1e-12 else Audio(self.samples * np.float32(loud / power**0.5), self.rate_hz)


def read(
    source: str | Path | bytes, rate_hz: int | None = None, resample: bool = True, start_s: float = 0.0, stop_s: float | None = None
) -> Audio:
    """The sound of a wav, flac, mp3, ogg or opus file, its channels averaged.

    source: a path, or the content of a file. rate_hz: the rate wanted; None keeps the file's. start_s, stop_s: the piece wanted, in
    seconds (None: to the end). Raises ZipperError for what is no such file, and for sound that is empty,
    holds NaN or infinity, has an odd rate (8 to 192 kHz are fine), more than 8 channels, or lasts more than 600 s; the header
    is checked before anything is decoded.
    """
    soundfile = extra("soundfile")
    path = Path("(sound given as bytes)" if isinstance(source, bytes) else source)
    if not isinstance(source, bytes) and not path.is_file():
        raise ZipperError(
            f"{path} is a folder, a sound file was wanted." if path.is_dir() else f"{path} does not exist. Give a sound file."
        )
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else path) as file:
            start = round(start_s * file.samplerate)
            stop = file.frames if stop_s is None else min(file.frames, round(stop_s * file.samplerate))
            if (start_s, stop_s) != (0.0, None) and not 0 <= start < stop:
                raise ZipperError(
                    f"{path} lasts {file.frames / file.samplerate:.2f} s; {start_s} to {stop_s} s are no piece of it."
                )
            _check_header(path, stop - start, file.samplerate, file.channels)
            if rate_hz not in (None, file.samplerate) and not resample:
                raise ZipperError(
                    f"{path} is {file.samplerate} Hz, these units need {rate_hz} Hz. Pass resample=True or convert it first."
                )
            if start:
                file.seek(start)
            blocks = [block.mean(axis=1) for block in file.blocks(BLOCK, dtype="float32", always_2d=True, frames=stop - start)]
            audio = Audio(np.concatenate(blocks) if blocks else np.zeros(0, np.float32), file.samplerate)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise ZipperError(f"{path} is not readable sound ({error}). Give a wav, flac, mp3 or ogg file.") from error
    if not len(audio.samples):
        raise ZipperError(f"{path} holds no sound (0 samples). Give a recording with something in it.")
    peak = float(np.abs(audio.samples).max())
    if not np.isfinite(peak):
        raise ZipperError(f"{path} holds NaN or infinite samples. It was damaged when it was written: export it again.")
    audio = Audio(audio.samples / np.float32(max(1.0, peak)), audio.rate_hz)
    return audio.resample(rate_hz or audio.rate_hz)


def write(path: str | Path, audio: Audio) -> None:
    """Sound as a wav (16 bit), flac, ogg or mp3 file, told by the name's ending; the file is there whole or not at all."""
    soundfile, path = extra("soundfile"), Path(path)
    check_writable(path)
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        soundfile.write(temporary, audio.samples, audio.rate_hz)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        raise ZipperError(f"{path} cannot be written ({error}). Try another place, or .wav, which takes any rate.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises ZipperError if sound cannot be written there: ask before the work, not after it."""
    path = Path(path)
    if path.suffix.lower() not in WRITABLE:
        raise ZipperError(f"{path} does not say which kind of sound it is. End its name in one of {', '.join(WRITABLE)}.")
    if path.is_dir():
        raise ZipperError(f"{path} is a folder, a file was wanted.")
    if not path.parent.is_dir():
        raise ZipperError(f"the folder {path.parent} does not exist. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ZipperError(f"the folder {path.parent} is not yours to write in. Choose another one.")


def _check_header(path: Path, frames: int, rate_hz: int, channels: int) -> None:
    _check_rate(rate_hz, str(path))
    if channels > MOST_CHANNELS:
        raise ZipperError(f"{path} has {channels} channels, at most {MOST_CHANNELS} are read. Mix it down first.")
    if frames > LONGEST_S * rate_hz:
        raise ZipperError(f"{path} lasts {frames / rate_hz:.0f} s, at most {LONGEST_S:.0f} s are read. Cut it into pieces.")


def _check_rate(rate_hz: int, whose: str) -> None:
    if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
        raise ZipperError(f"{whose} is {rate_hz} Hz, wanted are {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz. Convert it first.")


def _frame_power(samples: Float32[np.ndarray, " time"], hop: int) -> Float32[np.ndarray, " frames"]:
    padded = np.pad(samples, (0, -len(samples) % hop))
    return np.square(padded).reshape(-1, hop).mean(axis=1)


@dataclass(frozen=True)
class Mel:
    """A log-mel picture of sound: its settings, the way there and the way back.

    `window`, `hop` and `fft` are in samples at `rate_hz`; `bins` triangles lie evenly on HTK's mel scale, `low_hz` to `high_hz`.
    """

    rate_hz: int = 16_000
    window: int = 400
    hop: int = 160
    fft: int = 512
    bins: int = 40
    low_hz: float = 60.0
    high_hz: float = 7_600.0
    loud: float = 0.1  # root mean square of a loud frame after levelling; speech then peaks near 0.5
    floor: float = 1e-8  # mel power that counts as silence; 1e-6 cut weak fricatives off, 1e-10 spent codes on the noise of silence

    def picture(self, audio: Audio) -> Float32[np.ndarray, "frames bins"]:
        """Natural logarithm of mel power, one row per started hop, of the resampled sound; its loudness does not matter."""
        samples = audio.resample(self.rate_hz).level(self.loud).samples
        power = np.abs(self._transform(samples, frames=-(-len(samples) // self.hop))) ** 2
        return np.log(np.maximum(power @ self.filters.T, np.float32(self.floor)))

    def sound(
        self,
        picture: Float32[np.ndarray, "frames bins"],
        rounds: int = 40,
        momentum: float = 0.99,
        said: Float32[np.ndarray, " before"] | None = None,
    ) -> Audio:
        """Sound whose picture is close to this one, at `rate_hz`; the same for the same picture.

        Spectrum by non-negative least squares, phase by fast Griffin-Lim (Perraudin, Balazs, Sondergaard 2013) from that of a fixed
        noise. rounds: 1.2 ms each for 2 s of sound. said: the sound of the first frames, if it was made before; it stays as it is,
        and what follows joins it.
        """
        held = np.zeros(0, np.float32) if said is None else said
        magnitude = np.sqrt(self._spectrum(np.exp(picture)))

        def heard(spectrum: Complex64[np.ndarray, "frames frequencies"]) -> Float32[np.ndarray, " time"]:
            samples = self._overlap(magnitude * _phase(spectrum))
            samples[: len(held)] = held
            return samples

        noise = np.random.default_rng(0).standard_normal(len(magnitude) * self.hop, dtype=np.float32)
        noise[: len(held)] = held
        spectrum = self._transform(noise, len(magnitude))
        before = np.zeros_like(spectrum)
        for _ in range(rounds):
            now = self._transform(heard(spectrum), len(magnitude))
            spectrum, before = now + np.float32(momentum) * (now - before), now
        samples = heard(spectrum)
        if said is not None:
            return Audio(samples.clip(-1, 1), self.rate_hz)
        return Audio(samples / max(1.0, float(np.abs(samples).max(initial=0.0))), self.rate_hz)

    @functools.cached_property
    def filters(self) -> Float32[np.ndarray, "bins frequencies"]:
        """Triangles over the frequencies, divided by the window's energy: a sound's power is the sum over its bins."""
        low, high = 1127 * np.log1p(np.array([self.low_hz, self.high_hz]) / 700)
        edges = 700 * np.expm1(np.linspace(low, high, self.bins + 2) / 1127)
        frequency = np.linspace(0, self.rate_hz / 2, self.fft // 2 + 1)
        up = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        down = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
        energy = np.square(np.hanning(self.window)).sum() * self.fft / 2
        return (np.maximum(0, np.minimum(up, down)) / energy).astype(np.float32)

    def _transform(self, samples: Float32[np.ndarray, " time"], frames: int) -> Complex64[np.ndarray, "frames frequencies"]:
        before = (self.window - self.hop) // 2  # the window's middle lies on the hop's middle
        needed = (frames - 1) * self.hop + self.window if frames else self.window
        padded = np.pad(samples, (before, max(0, needed - before - len(samples))))
        views = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:frames]
        return np.fft.rfft(views * self._shape, self.fft)

    def _overlap(self, spectrum: Complex64[np.ndarray, "frames frequencies"]) -> Float32[np.ndarray, " time"]:
        """The sound whose transform is nearest to this spectrum (Griffin and Lim 1984: overlap-add by the squared window)."""
        frames = len(spectrum)
        parts = -(-self.window // self.hop)
        rows = np.zeros((frames, parts * self.hop), np.float32)
        rows[:, : self.window] = np.fft.irfft(spectrum, self.fft)[:, : self.window] * self._shape
        weight = np.zeros(parts * self.hop, np.float32)
        weight[: self.window] = self._shape**2
        total = np.zeros((2, frames + parts - 1, self.hop), np.float32)
        for part in range(parts):
            here = slice(part * self.hop, (part + 1) * self.hop)
            total[0, part : part + frames] += rows[:, here]
            total[1, part : part + frames] += weight[here]
        before = (self.window - self.hop) // 2
        return (total[0] / np.maximum(total[1], 1e-3)).reshape(-1)[before : before + frames * self.hop]

    @functools.cached_property
    def _shape(self) -> Float32[np.ndarray, " window"]:
        return np.hanning(self.window).astype(np.float32)

    def _spectrum(self, mel: Float32[np.ndarray, "frames bins"], rounds: int = 50) -> Float32[np.ndarray, "frames frequencies"]:
        """Non-negative least squares by multiplicative updates (Lee and Seung 2001): smooth between the triangles' peaks."""
        weights = self.filters
        spectrum = mel @ weights / np.maximum(np.square(weights).sum(0), 1e-12)
        target = mel @ weights
        for _ in range(rounds):
            spectrum = spectrum * target / np.maximum(spectrum @ weights.T @ weights, 1e-20)
        return spectrum


def _phase(spectrum: Complex64[np.ndarray, "frames frequencies"]) -> Complex64[np.ndarray, "frames frequencies"]:
    return spectrum / np.maximum(np.abs(spectrum), np.float32(1e-12))
