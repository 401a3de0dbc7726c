"""What kinds of modality that are made of sound have in common: how a row names a sound, and how
one is written, shown and compared."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.modality.kind import Kind, Scores
from zipper.saving.files import place

LONGEST_S = 1e7  # of any time in a row
# Of `Audio.swing_db`, between noise of any colour (up to 2.4) and single words (from 6.7).
SWING_DB = 4.5


class Sound(Kind):
    """A kind whose raw data are `Audio`: it reads files, their content and pieces of them."""

    takes: ClassVar[str] = "the path of a sound file, its content or a piece of it"
    suffix: ClassVar[str] = ".wav"
    like: ClassVar[str] = "hello.wav"

    def accepts(self, value: Any) -> bool:
        """See `Kind.accepts`."""
        return isinstance(value, Audio | Path) or names_a_sound(value)

    def read(self, value: Any, folder: Path = Path()) -> Audio:
        """An Audio, the path of a sound file, its content, or {"path" or "bytes", "start", "stop"}
        for a piece of one, in seconds. Raises ZipperError for no sound, or one without samples."""
        if not self.accepts(value):
            raise ZipperError(f"{value!r:.200} was given; give {self.takes}.")
        value = str(value) if isinstance(value, Path) else value
        sound = value if isinstance(value, Audio) else heard(value, folder)
        if not self.there(sound):
            raise ZipperError("The sound given has no samples. Give one with something in it.")
        return sound

    def bounded(self, value: Any, most_s: float) -> Audio:
        """`read`, for encoders that take all of a sound at once. Raises a ZipperError for more than
        `most_s` seconds, and for samples that are no numbers."""
        sound = self.read(value)
        if sound.seconds > most_s:
            raise ZipperError(
                f"A sound of {sound.seconds:.0f} s was given; at most {most_s:g} s are encoded at "
                "once. Cut it."
            )
        if not np.isfinite(sound.samples).all():
            raise ZipperError("The sound holds NaN or infinity. Give one that was not damaged.")
        return sound

    def files(self, value: Any, folder: Path = Path()) -> list[Path]:
        """See `Kind.files`."""
        path = at(value).get("path") if names_a_sound(value) else None
        return [folder / place(path)] if path else []

    def there(self, raw: Audio) -> bool:
        """See `Kind.there`."""
        return bool(len(raw.samples))

    def write(self, raw: Audio, path: Path) -> None:
        """See `Kind.write`; the ending says in which format."""
        audio.write(path, raw)

    def told(self, raw: Audio) -> Any:
        """How long it is: samples are for files."""
        return f"{raw.seconds:.2f} s of sound"

    def html(self, raw: Audio) -> str:
        """A player."""
        if not self.there(raw):
            return "<span>(silence)</span>"
        with tempfile.TemporaryDirectory() as folder:
            audio.write(path := Path(folder) / "said.wav", raw)
            content = base64.b64encode(path.read_bytes()).decode()
        return f'<audio controls preload="none" src="data:audio/wav;base64,{content}"></audio>'

    def track(self, writer: Any, name: str, raw: Audio, step: int) -> None:
        """See `Kind.track`: a sound that can be played."""
        if self.there(raw):
            writer.add_audio(name, raw.samples.clip(-1, 1)[None], step, sample_rate=raw.rate_hz)

    def seconds(self, raw: Audio) -> float:
        """See `Kind.seconds`."""
        return raw.seconds

    @staticmethod
    def says_nothing(raw: Audio) -> bool:
        """Whether it is silence, to the sample: of rain there may be something to say."""
        return not raw.samples.any()

    def scores(self, wanted: Sequence[Audio], made: Sequence[Audio]) -> Scores:
        """How far the length is off, as a share of the one wanted: without a recogniser nothing
        else of two sounds is comparable."""
        pairs = zip(wanted, made, strict=True)
        return {"length": [(abs(a.seconds - b.seconds), a.seconds) for a, b in pairs]}


class Spoken(Sound):
    """A kind whose sounds are people who speak."""

    @staticmethod
    def says_nothing(raw: Audio) -> bool:
        """Whether this is silence, or a noise that goes on and on: speech swings more."""
        return raw.swing_db < SWING_DB


def names_a_sound(value: Any) -> bool:
    """Whether it is a path, the content of a file, or {"path" or "bytes", "start", "stop"}."""
    if isinstance(value, Mapping):
        there = isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
        return there and not value.keys() - {"path", "bytes", "start", "stop"}
    return isinstance(value, str | bytes)


def at(value: Any) -> dict[str, Any]:
    """Where a sound lies, and which piece of it, in one form."""
    if isinstance(value, Mapping):
        return dict(value)
    return {"bytes" if isinstance(value, bytes) else "path": value}


def heard(value: Any, folder: Path) -> Audio:
    """The sound, or the piece of one, that a row means."""
    where = at(value)
    if not where.get("bytes") and not where.get("path"):
        raise ZipperError("its sound is empty: neither bytes nor a path.")
    start, stop = where.get("start"), where.get("stop")
    start = 0.0 if start is None else time_s("start", start)
    if stop is not None and start >= time_s("stop", stop):
        raise ZipperError(
            f"its piece from {start:g} to {stop:g} s is none. Give a start before the stop."
        )
    source = where.get("bytes") or folder / place(where["path"])
    return audio.read(source, start_s=start, stop_s=stop)


def time_s(key: str, value: Any) -> float:
    """Seconds in a row."""
    if not is_time(value):
        raise ZipperError(f"{key!r} holds {value!r:.200}; give seconds, from 0 to {LONGEST_S:g}.")
    return float(value)


def is_time(value: Any) -> bool:
    """Whether it can be a time; NaN compares with nothing."""
    return type(value) in (int, float) and 0 <= value <= LONGEST_S
