"""Sound as clients take it: in which formats, whole or while it is made."""

import io
import struct
from typing import Any

import numpy as np

from zipper.audio.sound import BLOCK, Audio
from zipper.environment import extra
from zipper.serving.refusals import Refused

MEDIA = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "pcm": "audio/pcm",
}
#: What libsndfile calls them; pcm is ours.
CALLED = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
CALLED["mp3"] = ("MP3", "MPEG_LAYER_III")
STREAMED = ("wav", "pcm")
UNKNOWN = 0xFFFFFFFF  # of bytes, where a wav is not finished yet


def formats() -> list[str]:
    """Those that can be written here."""
    soundfile = extra("soundfile")
    kinds = soundfile.available_formats()
    known = {
        name
        for name, (kind, coded) in CALLED.items()
        if kind in kinds and coded in soundfile.available_subtypes(kind)
    }
    return [name for name in MEDIA if name == "pcm" or name in known]


def check_format(name: str) -> None:
    """Raises Refused for a format that cannot be written here."""
    if name not in (there := formats()):
        raise Refused(
            400,
            "unsupported_format",
            f"response_format {name!r:.40} cannot be written here. Take one of {', '.join(there)}.",
        )


def media(name: str, rate_hz: int) -> str:
    """The media type of a format; raw samples need their rate beside them."""
    return f"{MEDIA[name]};rate={rate_hz};channels=1" if name == "pcm" else MEDIA[name]


def pcm(sound: Audio) -> bytes:
    """Samples of 16 bits, little endian; what lies beyond 1 is cut, for a stream cannot go back."""
    return (sound.samples.clip(-1, 1) * np.float32(32767)).round().astype("<i2").tobytes()


def header(rate_hz: int) -> bytes:
    """The head of a wav whose length is not known yet."""
    parts = (b"RIFF", UNKNOWN, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16, b"data")
    return struct.pack("<4sI4s4sIHHIIHH4sI", *parts, UNKNOWN)


def content(sound: Audio, name: str) -> bytes:
    """A sound as a file of this format. Raises Refused where there is nothing to write."""
    if name == "pcm":
        return pcm(sound)
    if not len(sound.samples):
        raise Refused(422, "nothing_said", "The model said nothing: there is no sound to send.")
    soundfile: Any = extra("soundfile")
    kind, coded = CALLED[name]
    scale = np.float32(max(1.0, np.abs(sound.samples).max()))
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", sound.rate_hz, 1, format=kind, subtype=coded) as out:
        for at in range(0, len(sound.samples), BLOCK):
            out.write(sound.samples[at : at + BLOCK] / scale)
    return file.getvalue()
