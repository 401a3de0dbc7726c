"""What a microphone, a room and a file do to speech: one list for training, evaluation and tests.

A disturbance is a value; sound and seed decide what it does, to the bit. It knows neither units nor
models.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from zipper.audio.sound import Audio, pour
from zipper.environment import extra
from zipper.errors import ZipperError


@dataclass(frozen=True)
class Disturbance:
    """What happens to a sound, in the order of the fields; by default nothing does.

    speed_percent: faster and higher by so much, as from a tape. lead_ms, trail_ms: of pause before
    and behind. room_db: noise in these pauses, under full scale (None: silence). snr_db: noise
    under all of it, so far below the mean power of the sound without its pauses (None: no noise).
    colour: of all noise; its power falls with frequency to this power: 0 is white, 1 pink, 2 brown.
    through_hz: a sampling rate that it went through (None: it did not). gain_db: louder.
    clip_times: so many times as loud, cut off at full scale, and back. offset: added to every
    sample, of full scale. codec: "mp3", "ogg", or "" for none.
    """

    speed_percent: float = 0.0
    lead_ms: float = 0.0
    trail_ms: float = 0.0
    room_db: float | None = None
    snr_db: float | None = None
    colour: float = 0.0
    through_hz: int | None = None
    gain_db: float = 0.0
    clip_times: float = 1.0
    offset: float = 0.0
    codec: str = ""

    def apply(self, audio: Audio, seed: int = 0) -> Audio:
        """The sound after it happened, at its own rate."""
        chance, rate_hz = np.random.default_rng(seed), audio.rate_hz
        if self.speed_percent:
            played_hz = round(rate_hz * (1 + self.speed_percent / 100))
            audio = Audio(
                extra("soxr").resample(audio.samples, played_hz, rate_hz).astype(np.float32),
                rate_hz,
            )
        mean = float(np.square(audio.samples).mean()) if len(audio.samples) else 0.0
        if self.lead_ms or self.trail_ms:
            pauses = [self._pause(ms, rate_hz, chance) for ms in (self.lead_ms, self.trail_ms)]
            audio = Audio(np.concatenate([pauses[0], audio.samples, pauses[1]]), rate_hz)
        samples = audio.samples
        if self.snr_db is not None:
            samples = samples + _noise(len(samples), self.colour, chance) * np.float32(
                (mean / 10 ** (self.snr_db / 10)) ** 0.5
            )
        if self.through_hz is not None and self.through_hz < rate_hz:
            samples = Audio(samples, rate_hz).resample(self.through_hz).resample(rate_hz).samples
        if self.gain_db:
            samples = samples * np.float32(10 ** (self.gain_db / 20))
        if self.clip_times != 1:
            samples = (samples * np.float32(self.clip_times)).clip(-1, 1) / np.float32(
                self.clip_times
            )
        if self.offset:
            samples = samples + np.float32(self.offset)
        return (
            _coded(Audio(samples, rate_hz), self.codec) if self.codec else Audio(samples, rate_hz)
        )

    def _pause(
        self, ms: float, rate_hz: int, chance: np.random.Generator
    ) -> Float32[np.ndarray, " time"]:
        count = round(ms * rate_hz / 1000)
        if self.room_db is None:
            return np.zeros(count, np.float32)
        return _noise(count, self.colour, chance) * np.float32(10 ** (self.room_db / 20))


#: What speech to text is tried under: values at which a model that heard clean sound only failed.
TABLE: dict[str, Disturbance] = {
    "clean": Disturbance(),
    "10 ms later": Disturbance(lead_ms=10.0),
    "20 ms later": Disturbance(lead_ms=20.0),
    "25 ms later": Disturbance(lead_ms=25.0),
    "400 ms of silence in front": Disturbance(lead_ms=400.0),
    "400 ms of a room at -60 dB around": Disturbance(lead_ms=400.0, trail_ms=400.0, room_db=-60.0),
    "5 % faster": Disturbance(speed_percent=5.0),
    "5 % slower": Disturbance(speed_percent=-5.0),
    "10 % faster": Disturbance(speed_percent=10.0),
    "10 % slower": Disturbance(speed_percent=-10.0),
    "through 8 kHz": Disturbance(through_hz=8_000),
    "clipped x4": Disturbance(clip_times=4.0),
    "offset 0.1": Disturbance(offset=0.1),
    "20 dB quieter": Disturbance(gain_db=-20.0),
    "20 dB louder": Disturbance(gain_db=20.0),
    "as mp3": Disturbance(codec="mp3"),
    "noise at 20 dB": Disturbance(snr_db=20.0),
}


def drawn(seed: int) -> Disturbance:
    """One of those that training hears: some of what stands in TABLE together, up to a little
    beyond it."""
    chance = np.random.default_rng(seed)

    def sometimes(share: float, least: float, most: float) -> float | None:
        value = float(chance.uniform(least, most))
        return value if chance.random() < share else None

    through = sometimes(0.15, 7_990.0, 15_000.0)
    return Disturbance(
        speed_percent=sometimes(0.6, -14.0, 14.0) or 0.0,
        lead_ms=sometimes(0.5, 0.0, 600.0) or 0.0,
        trail_ms=sometimes(0.5, 0.0, 600.0) or 0.0,
        room_db=sometimes(0.5, -75.0, -50.0),
        snr_db=sometimes(0.25, 15.0, 40.0),
        colour=sometimes(0.5, 0.0, 2.0) or 0.0,
        through_hz=None if through is None else max(8_000, round(through)),
        gain_db=sometimes(0.5, -25.0, 21.0) or 0.0,
        clip_times=sometimes(0.4, 1.0, 6.0) or 1.0,
        offset=sometimes(0.2, -0.2, 0.2) or 0.0,
    )


#: Sounds in which nothing is said.
NOTHINGS = ("silence", "noise", "hum", "clicks", "steps")


def nothing(seed: int, seconds: float = 1.5, rate_hz: int = 16_000, kind: str = "") -> Audio:
    """A sound in which nothing is said, of a kind of NOTHINGS or, by default, of one that the seed
    draws; at any loudness."""
    chance = np.random.default_rng(seed)
    kind, count = kind or str(chance.choice(NOTHINGS)), round(seconds * rate_hz)
    samples = _noise(count, float(chance.uniform(0, 2)), chance)
    if kind == "silence":
        samples = samples * np.float32(chance.choice([0, 1e-5, 1e-4]))
    elif kind == "hum":  # of the mains, with its harmonics
        time = np.arange(count) / rate_hz * chance.choice([50, 60]) * 2 * np.pi
        waves = [
            chance.random() * np.sin(time * harmonic + chance.uniform(0, 6))
            for harmonic in range(1, 13)
        ]
        samples = (np.sum(waves, axis=0) + samples * chance.choice([1e-3, 1e-2, 1e-1])).astype(
            np.float32
        )
    elif kind in ("clicks", "steps"):  # short and hard, or longer and duller, in a quiet room
        length_ms = 3 if kind == "clicks" else 60
        fall = np.exp(-np.arange(count) / (length_ms / 1000 * rate_hz))
        heard = np.zeros(count)
        for _ in range(chance.integers(1, 9)):
            at = chance.integers(count)
            heard[at:] += (
                chance.uniform(0.2, 1)
                * (fall * _noise(count, float(chance.uniform(0, 2)), chance))[: count - at]
            )
        samples = (heard + samples * 10 ** chance.uniform(-4, -2)).astype(np.float32)
    return Audio(samples * np.float32(10 ** chance.uniform(-2, -0.7)), rate_hz)


NOTHING_SHARE = 0.04  # of takes; not tuned


def take(audio: Audio, key: str) -> tuple[Audio, bool]:
    """A sound as some microphone would have taken it, and True; the same for the same sound and
    key.

    Four in a hundred are a sound in which nothing is said instead, and False.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    chance = np.random.default_rng(seed)
    if chance.random() < NOTHING_SHARE:
        return nothing(seed, float(chance.uniform(0.2, 4)), audio.rate_hz), False
    return drawn(seed).apply(audio, seed), True


def _noise(count: int, colour: float, chance: np.random.Generator) -> Float32[np.ndarray, " time"]:
    """Normal noise of root mean square 1."""
    noise = chance.standard_normal(count, dtype=np.float32)
    if not colour or count < 2:
        return noise
    spectrum = np.fft.rfft(noise)
    # Flat below a 200th of the band.
    spectrum /= np.maximum(np.arange(len(spectrum)), len(spectrum) / 200) ** (colour / 2)
    coloured = np.fft.irfft(spectrum, count)
    return (coloured / max(float(np.sqrt(np.square(coloured).mean())), 1e-12)).astype(np.float32)


def _coded(audio: Audio, codec: str) -> Audio:
    """Through a lossy file in memory; what a codec adds at the ends stays."""
    soundfile, file = extra("soundfile"), io.BytesIO()
    try:
        pour(file, audio, codec)
    except soundfile.LibsndfileError as error:
        raise ZipperError(
            f"Sound of {audio.rate_hz} Hz cannot be written as {codec} ({error}). Give another "
            "rate, such as 16000."
        ) from error
    file.seek(0)
    return Audio(soundfile.read(file, dtype="float32")[0], audio.rate_hz)
