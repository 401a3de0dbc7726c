"""Speech as units: sound to a row of codes and back.

A code names the nearest of K centroids of stacked log-mel frames (25 codes a second), found by
k-means. Back, the centroids are the frames of a log-mel picture. The codebook is the whole
definition; nothing here knows of towers or text.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from zipper.audio.sound import HIGHEST_RATE_HZ, LONGEST_S, LOWEST_RATE_HZ, Audio, Front, Mel, read
from zipper.errors import ZipperError
from zipper.modality.codebook import BATCH as BATCH
from zipper.modality.codebook import kmeans, load_codebook, nearest, save_codebook, stacked
from zipper.modality.sound import SWING_DB, Spoken
from zipper.saving.files import parse, place, read_json, write_json

#: What a file may ask for: (least, most).
LIMITS = {
    "rate_hz": (LOWEST_RATE_HZ, HIGHEST_RATE_HZ),
    "window": (1, 16_384),
    "hop": (1, 16_384),
    "fft": (2, 16_384),
    "bins": (1, 1_024),
    "low_hz": (0.0, HIGHEST_RATE_HZ),
    "high_hz": (0.0, HIGHEST_RATE_HZ),
    "loud": (1e-6, 1.0),
    "floor": (1e-30, 1.0),
    "stack": (1, 1_000),
    "mean_ms": (0.1, 1_000.0),
    "window_ms": (0.1, 1_000.0),
    "quiet_db": (-200.0, 0.0),
    "noise_share": (0.0, 1.0),
    "noise_db": (0.0, 100.0),
    "least_db": (-200.0, 0.0),
    "margin_ms": (0.0, 1_000.0),
    "places": (1, 1_000),
    "fitted": (1, 100),
    "floor_share": (0.0, 1.0),
    "empty_nats": (0.0, 100.0),
}
# units that must be known behind those that are made into sound, or heard behind those that are
# told
AHEAD = 2
# units that must be heard before the grid is laid: then one in twelve is laid elsewhere, after six
# one in six
SURE = 12
BEHIND = 3  # units of finished sound that the next part of a stream goes on from


@dataclass(frozen=True)
class UnitsConfig:
    """What the codes are made of. `stack` mel frames make one unit: 4 frames of 10 ms are 25 units
    a second.

    front: how sound is cut first; None takes it as it is, from its first sample, as all units were
    made before there was one.
    """

    mel: Mel = field(default_factory=Mel)
    stack: int = 4
    voices: tuple[str, ...] = ()
    fitted_on: str = ""
    front: Front | None = field(default_factory=Front)

    @property
    def units_per_s(self) -> float:
        """25 by default."""
        return self.mel.rate_hz / self.mel.hop / self.stack


class SpeechUnits(Spoken):
    """Sound <-> codes. Ids 0 .. K-1 are codes, K begins and K+1 ends a segment, K+2 .. name the
    voices in `voices`."""

    name = "speech"
    prefixed = "voice"
    CODEBOOK, CONFIG = "codebook.safetensors", "units.json"

    def __init__(
        self, codebook: Float32[np.ndarray, "codes stacked_bins"], config: UnitsConfig
    ) -> None:
        width = config.stack * config.mel.bins
        if codebook.ndim != 2 or codebook.shape[1] != width or not np.isfinite(codebook).all():
            raise ZipperError(
                f"a codebook of shape {codebook.shape} was given, (codes, {width}) and finite was "
                "wanted. Fit the units anew."
            )
        self.codebook, self.config, self.voices = codebook.copy(), config, config.voices
        self.codes = len(codebook)
        self.begin, self.end = self.codes, self.codes + 1
        self.vocabulary = self.codes + 2 + len(self.voices)

    @classmethod
    def fit(
        cls,
        pictures: Sequence[Float32[np.ndarray, "_ bins"]],
        codes: int = 256,
        config: UnitsConfig | None = None,
        seed: int = 0,
        steps: int = 150,
    ) -> "SpeechUnits":
        """Units for sound like this: `pictures` are log-mels by `config.mel`. Raises ZipperError if
        they are too few."""
        config = config or UnitsConfig()
        points = (
            np.concatenate([stacked(picture, config.stack) for picture in pictures])
            if len(pictures)
            else np.zeros((0, 1), np.float32)
        )
        made = kmeans(points, codes, seed, steps, points_of="units of sound", more="sound")
        return cls(made, config)

    @classmethod
    def fitted(
        cls, values: Sequence[Any], codes: int = 256, seed: int = 0, bad: str = "error"
    ) -> "SpeechUnits":
        """Units for sounds like these (`Spoken.read` says what may stand for one).

        bad: "skip" leaves out what cannot be read. Raises a ZipperError for what is no sound, and
        for too little of it.
        """
        config, reader = UnitsConfig(fitted_on=f"{len(values)} sounds"), Spoken()
        mels = []
        for value in tqdm(values, desc="log-mel", unit="sound", disable=None):
            try:
                mels.append(config.mel.picture(reader.read(value)))
            except ZipperError:
                if bad == "error":
                    raise
        return cls.fit(mels, codes, config, seed)

    @property
    def prefixes(self) -> Mapping[str, int]:
        """The voices."""
        return {name: self.codes + 2 + n for n, name in enumerate(self.voices)}

    def about(self) -> Mapping[str, Any]:
        """See `Kind.about`."""
        rate = f"{self.config.units_per_s:g} units a second"
        return {"codes": self.codes, "rate": rate, "voices": ", ".join(self.voices) or "none"}

    @property
    def fingerprint(self) -> str:
        """sha256 of the codebook and of what it is made of and fitted on."""
        described = asdict(self.config)
        if self.config.front is None:  # as it was before there was one
            del described["front"]
        return hashlib.sha256(
            self.codebook.tobytes() + json.dumps(described, sort_keys=True).encode()
        ).hexdigest()

    def log_mel(self, audio: Audio) -> Float32[np.ndarray, "frames bins"]:
        """The picture that these units are codes of; sound of any rate and loudness.

        With a front (`config.front`) it has no offset and no pauses, and begins where the grid of
        units fits best. For a sound and the same 20 ms later, cut by one grid, have other codes. So
        the grid is laid anew for each: it begins up to a unit before the first thing heard, at one
        of `front.places` places a frame, the one from which the codebook comes nearest to the first
        `front.fitted` units. A sound has the same codes wherever it lies in a file.
        """
        return self._laid(audio)[0]

    def start_s(self, audio: Audio) -> float:
        """Where in a sound its first code begins, for the times of words; below 0 if that lies
        before it."""
        return self._laid(audio)[1] / self.config.mel.rate_hz

    def heard_in(
        self, picture: Float32[np.ndarray, "frames bins"]
    ) -> Float32[np.ndarray, "codes stacked_bins"]:
        """The codebook as it would look in this sound.

        Its noise is added (parallel model combination, Gales and Young 1996); where the sound has
        nothing in a bin, as behind a telephone, all codes are alike.
        """
        front = self.config.front
        if front is None or not len(picture):
            return self.codebook
        noise, loud = np.quantile(picture, (front.floor_share, 0.95), axis=0).astype(np.float32)
        empty = loud < np.float32(np.log(self.config.mel.floor) + front.empty_nats)
        if empty.all():
            return self.codebook
        frames = self.codebook.reshape(-1, len(noise))
        return np.where(empty, noise, np.logaddexp(frames, noise)).reshape(self.codebook.shape)

    def encode(self, raw: Audio | str | Path | bytes) -> list[int]:
        """Codes of a sound, a sound file or its content, one per started 40 ms of its `log_mel`;
        nothing but codes. Raises ZipperError for sound of more than LONGEST_S, as for a file."""
        sound = raw if isinstance(raw, Audio) else read(raw)
        if sound.seconds > LONGEST_S:
            raise ZipperError(
                f"A sound of {sound.seconds:.0f} s was given; at most {LONGEST_S:.0f} s are "
                "encoded at once. Cut it."
            )
        return self._codes(self.log_mel(sound))

    def decode(self, ids: Sequence[int]) -> Audio:
        """Sound of the codes, about 6 ms of work a second of sound; ids that are no codes are
        passed over."""
        codes = [code for code in ids if 0 <= code < self.codes]
        return self.config.mel.phased(self._spectra[codes].reshape(-1, self._spectra.shape[-1]))

    def listen(self, sounds: Iterable[Audio]) -> Iterator[list[int]]:
        """Codes of a sound that comes in parts of one rate, as soon as they are known: some codes,
        perhaps none, for each part, and the rest at the end.

        They differ from those of the whole where its loudness and noise are not known yet. Pauses
        are cut as in `encode`: nothing is told before something is heard and the grid is laid on
        it, where it stays; a pause is told when speech goes on behind it, so the last one never is.
        Everything heard is looked at again with each part: for utterances, not for hours.
        """
        heard, told, begin = Audio(np.zeros(0, np.float32), self.config.mel.rate_hz), 0, None
        for sound in sounds:
            if len(heard.samples) and sound.rate_hz != heard.rate_hz:
                raise ZipperError(
                    f"Sound of {sound.rate_hz} Hz came behind sound of {heard.rate_hz} Hz. "
                    "Resample one of them."
                )
            heard = Audio(np.concatenate([heard.samples, sound.samples]), sound.rate_hz)
            picture, first = self._laid(heard, begin)
            codes = self._codes(picture)
            if begin is None and self.config.front is not None:
                # More than for all of it: it may yet become louder.
                if heard.swing_db < 2 * SWING_DB or len(codes) < SURE:
                    codes = []
                else:
                    begin = first
            known = codes[told:-AHEAD]
            told += len(known)
            yield known
        yield self._codes(self._laid(heard, begin)[0])[told:]

    def stream(self, ids: Iterable[int], chunk: int = 10) -> Iterator[Audio]:
        """Sound of codes while they are made: `chunk` codes at a time, each when `AHEAD` more are
        known; all of it together is as long as what `decode` makes of them. Every part goes on from
        the sound before it (as RTISI-LA does, Zhu, Beauregard and Wyse 2007). Raises a ZipperError
        for a chunk of less than one code.
        """
        if chunk < 1:
            raise ZipperError(f"Sound in parts of {chunk} codes was asked for. Take at least 1.")
        per_unit = self.config.stack * self.config.mel.hop
        codes, said = (
            list[int](),
            np.zeros(0, np.float32),
        )  # those of the last part and all since; the sound of that part

        def go_on(new: int) -> Audio:
            nonlocal codes, said
            past = len(said) // per_unit
            spectra = self._spectra[codes].reshape(-1, self._spectra.shape[-1])
            sound = self.config.mel.phased(spectra, said=said).samples
            fresh = sound[len(said) : (past + new) * per_unit]
            keep = max(0, past + new - BEHIND)
            codes, said = codes[keep:], sound[keep * per_unit : (past + new) * per_unit]
            return Audio(fresh, self.config.mel.rate_hz)

        for code in ids:
            if 0 <= code < self.codes:
                codes.append(code)
            if len(codes) - len(said) // per_unit == chunk + AHEAD:
                yield go_on(chunk)
        if left := len(codes) - len(said) // per_unit:
            yield go_on(left)

    def voice_id(self, name: str) -> int:
        """The id that stands for a voice. Raises ZipperError for a name that is none."""
        if name not in self.voices:
            raise ZipperError(
                f"these units have no voice {name!r}. "
                + (f"Take one of {', '.join(self.voices)}." if self.voices else "They have none.")
            )
        return self.prefixes[name]

    def save(self, folder: str | Path) -> None:
        """Writes codebook.safetensors and units.json; the second pins the first by its hash."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_codebook(self.codebook, folder / self.CODEBOOK)
        described = {
            **asdict(self.config),
            "codes": self.codes,
            "codebook_sha256": _sha256(self.codebook),
        }
        write_json(folder / self.CONFIG, described)

    @classmethod
    def load(cls, folder: str | Path) -> "SpeechUnits":
        """Reads what `save` wrote. Raises ZipperError for anything else, and for a codebook that
        the description does not pin."""
        folder = place(folder)
        try:
            described = read_json(folder / cls.CONFIG)
            codes, pinned = described.pop("codes", None), described.pop("codebook_sha256", None)
            config = parse(
                UnitsConfig, {"front": None, **described}, str(folder / cls.CONFIG), LIMITS
            )
            found = load_codebook(folder / cls.CODEBOOK, codes, config.stack * config.mel.bins)
            if (
                not config.mel.low_hz < config.mel.high_hz <= config.mel.rate_hz / 2
                or config.mel.fft < config.mel.window
            ):
                raise ZipperError(f"{folder / cls.CONFIG} describes no mel scale: {config.mel}")
            if config.front is not None and config.mel.hop % config.front.places:
                raise ZipperError(
                    f"{folder / cls.CONFIG} lays the grid in {config.front.places} places a hop "
                    f"of {config.mel.hop}"
                )
        except ZipperError as error:
            raise ZipperError(
                f"{folder} holds no speech units: {error} It needs {cls.CONFIG} and "
                f"{cls.CODEBOOK}, written by save."
            ) from error
        if _sha256(found) != pinned:
            raise ZipperError(
                f"{folder} holds a foreign codebook, not the one that its {cls.CONFIG} describes: "
                "codes would mean other sounds. "
                "Restore both files from the run that made them, or fit the units anew."
            )
        return cls(found, config)

    @functools.cached_property
    def _spectra(self) -> Float32[np.ndarray, "codes stack frequencies"]:
        """What each code sounds like, without phase: found once, not for every sound."""
        magnitude = self.config.mel.magnitude(self.codebook.reshape(-1, self.config.mel.bins))
        return magnitude.reshape(self.codes, self.config.stack, -1)

    def _laid(
        self, audio: Audio, begin: int | None = None
    ) -> tuple[Float32[np.ndarray, "frames bins"], int]:
        """The picture, and the sample at `mel.rate_hz` where the grid begins; begin: where it was
        found to begin before."""
        mel, front, unit = (
            self.config.mel,
            self.config.front,
            self.config.stack * self.config.mel.hop,
        )
        if front is None or not audio.samples.any():
            return mel.picture(audio), 0
        sound = audio.resample(mel.rate_hz).centred()
        start, stop = sound.ends(front)
        first = start - unit if begin is None else begin
        sound = sound.between(
            first, max(first, stop + round(front.margin_ms / 1000 * mel.rate_hz))
        ).level(mel.loud)
        place = self._place(sound, front) if begin is None else 0
        return mel.logs(sound.samples[place:]), first + place

    def _place(self, sound: Audio, front: Front) -> int:
        """The sample, up to a unit in, from which the codebook fits best; the last of equals."""
        mel, stack = self.config.mel, self.config.stack
        unit, step, frames = stack * mel.hop, mel.hop // front.places, stack * front.fitted
        known = self.heard_in(mel.logs(sound.samples[unit:], 2 * mel.hop))
        # One row a place.
        head = mel.logs(
            sound.between((mel.hop - step) // 2, unit + frames * mel.hop + mel.hop).samples, step
        )
        points = np.concatenate(
            [
                stacked(head[place :: front.places][:frames], stack)
                for place in range(unit // step, 0, -1)
            ]
        )
        errors = (
            np.square(points - known[nearest(points, known)])
            .sum(axis=1)
            .reshape(-1, front.fitted)
            .mean(axis=1)
        )
        return unit - step * int(errors.argmin())

    def _codes(self, picture: Float32[np.ndarray, "frames bins"]) -> list[int]:
        codes: list[int] = nearest(
            stacked(picture, self.config.stack), self.heard_in(picture)
        ).tolist()
        return codes


def _sha256(codebook: Float32[np.ndarray, "codes stacked_bins"]) -> str:
    return hashlib.sha256(codebook.tobytes()).hexdigest()
