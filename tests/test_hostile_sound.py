"""Hostile sound: whatever a file is, reading it ends soon, in little memory, with a ZipperError or
with the right samples.

The files are made here, and what is right is known here: the pulses a file was made of, another
parser, or the same file unharmed. They are read by a process of its own, so that a crash, a hang
and the memory are seen.
"""

import io
import json
import random
import select
import struct
import subprocess
import sys
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from jaxtyping import Int16

from zipper.audio.containers import _checksum
from zipper.audio.containers import _frame as mp3_frame

SLOWEST_S, MOST_MB, HANGS_S = (
    2.0,
    512.0,
    120.0,
)  # of the processor; over idle; of the clock, before a reader is given up
MUTATIONS = 300
RATE_HZ = 16_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

READER = """
import json, sys, time
import numpy as np, soundfile, soxr
from zipper import audio
from zipper.errors import ZipperError

def most_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

idle = most_mb()
for line in sys.stdin:
    source, out = json.loads(line)
    since, said = time.process_time(), {}
    try:
        sound = audio.read(open(source[6:], "rb").read() if source.startswith("bytes:") else source)
        np.save(out, sound.samples)
        said = {"rate_hz": sound.rate_hz}
    except ZipperError as error:
        said = {"refused": str(error)}
    except BaseException as error:
        said = {"raised": repr(error)}
    print(json.dumps({**said, "seconds": time.process_time() - since, "mb": most_mb() - idle}), flush=True)
"""


@dataclass(frozen=True)
class File:
    """A file to be read. samples: what is right; with `most`, what the samples read are a beginning
    of, `late` behind their own.
    near: how far they may be from it. refusal: whether that is right too; it is the only right
    thing where nothing else is given.
    most: samples there can be.
    """

    name: str
    content: bytes
    samples: np.ndarray | None = None
    refusal: bool = False
    near: float = 1e-6
    most: int = 0
    late: int = 0


class Reader:
    """The process that reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds, self.mb = folder, 0.0, 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self, source: str) -> dict:
        """What it said of a file; it must say something."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(
            json.dumps([source, str(self.folder / "out.npy")]), file=self.process.stdin, flush=True
        )
        there, _, _ = select.select([self.process.stdout], [], [], HANGS_S)
        said = self.process.stdout.readline() if there else ""
        assert said, f"{source}: the reader {'died' if there else 'hangs'} ({self.process.poll()})"
        told = json.loads(said)
        self.seconds, self.mb = max(self.seconds, told["seconds"]), max(self.mb, told["mb"])
        return told


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reading = Reader(tmp_path)
    yield reading
    reading.process.kill()
    reading.process.wait()


def judge(reader: Reader, file: File, as_bytes: bool) -> str:
    """How the reading of a file ended; fails where that is wrong."""
    path = reader.folder / file.name.replace("/", " ")
    path.write_bytes(file.content)
    told = reader.read(f"bytes:{path}" if as_bytes else str(path))
    path.unlink()
    assert "raised" not in told, f"{file.name}: {told['raised']}"
    if "refused" in told:
        nothing_else = file.samples is None and not file.most
        assert file.refusal or nothing_else, f"{file.name} should be read: {told['refused']}"
        return "refused"
    samples = np.load(reader.folder / "out.npy")
    assert (
        samples.dtype == np.float32
        and samples.ndim == 1
        and len(samples)
        and np.isfinite(samples).all()
    ), file.name
    assert np.abs(samples).max() <= 1, file.name
    if file.samples is None:
        assert file.most, f"{file.name} should be refused, and gave {len(samples)} samples"
        assert len(samples) <= file.most, (
            f"{file.name}: {len(samples)} samples, at most {file.most} are in it"
        )
        return "unknown"
    if file.most:
        assert file.late < len(samples) <= file.most, (
            f"{file.name}: {len(samples)} samples, at most {file.most} are right"
        )
        length = min(len(file.samples), len(samples) - file.late)
        samples, right = samples[file.late :][:length], file.samples[:length]
    else:
        assert len(samples) == len(file.samples), (
            f"{file.name}: {len(samples)} samples, {len(file.samples)} are right"
        )
        right = file.samples
    # Of what is there: a cut file has its own peak.
    right = right / max(1.0, float(np.abs(right).max()))
    np.testing.assert_allclose(samples, right, atol=file.near, rtol=0, err_msg=file.name)
    return "right"


# --- what files are made of


def pulses(
    seconds: float = 1.0, channels: int = 1, rate_hz: int = RATE_HZ
) -> Int16[np.ndarray, "time channels"]:
    """A rising tone in noise: no two stretches of it are alike, so that a repeated or a foreign one
    is seen."""
    time = np.arange(int(seconds * rate_hz))[:, None] / rate_hz
    tone = 9_000 * np.sin(2 * np.pi * (200 + 300 * time + 40 * np.arange(channels)) * time)
    return (tone + np.random.default_rng(channels).normal(0, 300, tone.shape)).astype(np.int16)


def floats(pcm: np.ndarray) -> np.ndarray:
    return (pcm.astype(np.float32) / 32_768).mean(axis=1)


def encoded(
    kind: str, subtype: str | None, pcm: np.ndarray, rate_hz: int = RATE_HZ, **more: object
) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, pcm, rate_hz, format=kind, subtype=subtype, **more)
    return out.getvalue()


def decoded(content: bytes, folder: Path) -> np.ndarray:
    """By libsndfile from a path, in one go: for whole files with a header that is true."""
    (folder / "decoded").write_bytes(content)
    samples, _ = soundfile.read(folder / "decoded", dtype="float32", always_2d=True)
    return samples.mean(axis=1)


def mp3(pcm: np.ndarray, folder: Path, rate_hz: int = RATE_HZ, mode: str = "VARIABLE") -> bytes:
    """By a path: libsndfile writes no Xing header into memory."""
    soundfile.write(
        folder / "a.mp3", pcm, rate_hz, format="MP3", bitrate_mode=mode, compression_level=0.5
    )
    return (folder / "a.mp3").read_bytes()


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return (
        name
        + struct.pack("<I", len(content) if size is None else size)
        + content
        + bytes(len(content) % 2)
    )


def wav(
    data: bytes,
    rate_hz: int = RATE_HZ,
    channels: int = 1,
    bits: int = 16,
    size: int | None = None,
    tag: int = 1,
    *others: bytes,
) -> bytes:
    width = channels * max(1, bits // 8)
    shape = struct.pack(
        "<HHIIHH",
        tag,
        channels & 0xFFFF,
        rate_hz,
        rate_hz * width & 0xFFFFFFFF,
        width & 0xFFFF,
        bits,
    )
    body = b"WAVE" + b"".join(others) + chunk(b"fmt ", shape) + chunk(b"data", data, size)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def rf64(data: bytes, size: int) -> bytes:
    shape = struct.pack("<HHIIHH", 1, 1, RATE_HZ, 2 * RATE_HZ, 2, 16)
    sizes = chunk(b"ds64", struct.pack("<QQQI", size + 72, size, size // 2, 0))
    return (
        b"RF64"
        + b"\xff" * 4
        + b"WAVE"
        + sizes
        + chunk(b"fmt ", shape)
        + chunk(b"data", data, 0xFFFFFFFF)
    )


def flac_saying(
    content: bytes,
    frames: int | None = None,
    rate_hz: int | None = None,
    channels: int | None = None,
) -> bytes:
    """FLAC with another STREAMINFO: 20 bits of rate, 3 of channels, 5 of width, 36 of length."""
    told = int.from_bytes(content[18:26], "big")
    fields = {0: (36, frames), 41: (3, channels and channels - 1), 44: (20, rate_hz)}
    for place, (bits, value) in fields.items():
        if value is not None:
            told = told & ~((1 << bits) - 1 << place) | value << place
    return content[:18] + told.to_bytes(8, "big") + content[26:]


def ogg_pages(content: bytes) -> list[bytes]:
    pages = []
    while content:
        length = 27 + content[26] + sum(content[27 : 27 + content[26]])
        pages.append(content[:length])
        content = content[length:]
    return pages


def resealed(page: bytes, place: int, change: bytes) -> bytes:
    """An Ogg page with other bytes and the checksum of these, bit by bit (RFC 3533)."""
    page = page[:place] + change + page[place + len(change) :]
    page, crc = page[:22] + bytes(4) + page[26:], 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc >> 31 else crc << 1) & 0xFFFFFFFF
    return page[:22] + struct.pack("<I", crc) + page[26:]


# --- the files


def headers() -> Iterator[File]:
    """WAV headers that say odd things."""
    pcm, right = pulses(), floats(pulses())
    data = pcm.tobytes()
    for rate_hz in (0, 1, 7_999, 192_001, 100_000_000, 2**32 - 1):
        yield File(f"{rate_hz} Hz.wav", wav(data, rate_hz))
        yield File(f"44 bytes of {rate_hz} Hz.wav", wav(b"", rate_hz))
    for rate_hz in (8_000, 11_025, 192_000):
        yield File(f"{rate_hz} Hz.wav", wav(data, rate_hz), right)
    for channels in (0, 9, 16, 1_024, 65_535):
        yield File(f"{channels} channels.wav", wav(data * 4, channels=channels))
        yield File(f"44 bytes of {channels} channels.wav", wav(b"", channels=channels))
    for bits in (0, 1, 7, 12, 20, 64, 255, 65_535):
        yield File(f"{bits} bits.wav", wav(data, bits=bits), refusal=True, most=len(data))
    for tag in (0, 2, 0x11, 0x55, 0xFFFE, 0xFFFF):
        yield File(f"format {tag}.wav", wav(data, tag=tag), refusal=True, most=8 * len(data))
    for size in (
        2**31 - 4096,
        2**31 - 1,
        2**31,
        2**32 - 1,
    ):  # by SoX, -, arecord, ffmpeg into a pipe
        yield File(f"size {size:x}.wav", wav(data, size=size), right)
    yield File("its header counted in.wav", wav(data, size=len(data) + 44), right)
    for size in (0, 2, 100, len(data) // 2, len(data) + 1_000, 10**9):
        yield File(f"size {size}.wav", wav(data, size=size))
    for length in range(0, 48, 4):
        yield File(f"{length} bytes.wav", wav(data)[:length])
    for share in (0.1, 0.5, 0.9, 0.99):
        yield File(f"{share} of it.wav", wav(data)[: int(share * len(wav(data)))])
    yield File("one sample.wav", wav(data[:2]), right[:1])
    yield File("many chunks.wav", wav(data, RATE_HZ, 1, 16, None, 1, chunk(b"junk", b"") * 100_000))
    yield File(
        "some chunks.wav", wav(data, RATE_HZ, 1, 16, None, 1, chunk(b"LIST", b"INFOxyz")), right
    )
    yield File(
        "chunk beyond all.wav", wav(data, RATE_HZ, 1, 16, None, 1, chunk(b"junk", b"", 2**32 - 1))
    )
    yield File("trailing chunk.wav", wav(data) + chunk(b"LIST", b"INFOISFT" + bytes(9)), right)
    yield File("trailing zeros.wav", wav(data) + bytes(5_000), right)
    yield File("another behind.wav", wav(data) + data)
    yield File("data first.wav", b"RIFF" + struct.pack("<I", 99) + b"WAVE" + chunk(b"data", data))
    wide = b"".join(b"\0" + data[n : n + 2] for n in range(0, len(data) - 2, 2))
    yield File(
        "24 bits, odd, trailing chunk.wav",
        wav(wide, bits=24) + chunk(b"id3 ", b"x" * 33),
        right[:-1],
    )
    yield File("rf64.wav", rf64(data, len(data)), right)
    yield File("rf64 of 2 TB.wav", rf64(data, 2**41))
    yield File("rf64 of half.wav", rf64(data, len(data) // 2))
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e300": 1e300}.items():
        for place in (0, 8_000, 15_999):
            bad = right.astype(np.float64)
            bad[place] = value
            yield File(f"{name} at {place}.wav", wav(bad.tobytes(), bits=64, tag=3))
    yield File("floats.wav", wav(right.tobytes(), bits=32, tag=3), right)
    yield File(
        "loud floats.wav", wav((right * 1e4).tobytes(), bits=32, tag=3), right / np.abs(right).max()
    )
    yield File(
        "denormals.wav",
        wav((right * 1e-40).astype(np.float32).tobytes(), bits=32, tag=3),
        right * 0,
    )
    stereo = pulses(channels=2)
    yield File("two channels.wav", wav(stereo.tobytes(), channels=2), floats(stereo))
    eight = pulses(channels=8)
    yield File("eight channels.wav", wav(eight.tobytes(), channels=8), floats(eight), near=1e-5)
    yield File("ten hours of 8 kHz.wav", wav(data, 8_000, size=36_000 * 16_000))


def streams(folder: Path) -> Iterator[File]:
    """FLAC, Ogg and MP3, whole, cut, joined and with headers that lie."""
    pcm = pulses(3.0)
    flac, right = encoded("FLAC", "PCM_16", pcm), floats(pcm)
    yield File("a.flac", flac, right)
    yield File("a flac named.wav", flac, right)
    yield File("length unknown.flac", flac_saying(flac, 0), right)
    for frames in (1, 100, len(pcm) - 1, len(pcm) + 1, 10 * len(pcm), 2**36 - 1):
        yield File(f"length {frames}.flac", flac_saying(flac, frames))
    yield File("655350 Hz of 8 channels.flac", flac_saying(flac, None, 655_350, 8))
    for rate_hz, channels in ((1, 1), (0, 1), (655_350, 1), (RATE_HZ, 8)):
        yield File(
            f"{rate_hz} Hz of {channels}.flac",
            flac_saying(flac, None, rate_hz, channels),
            refusal=True,
            most=len(pcm),
        )
    yield File("joined.flac", flac + flac)
    yield File(
        "tagged.flac", b"ID3\x04\0\0\0\0\x01\0" + bytes(128) + flac + b"TAG" + bytes(125), right
    )
    for share in (0.01, 0.1, 0.5, 0.9, 0.999):
        for length in (len(pcm), 0):
            yield File(
                f"{share} of it, length {length}.flac",
                flac_saying(flac, length)[: int(share * len(flac))],
            )
    for subtype in ("VORBIS", "OPUS"):
        ogg = encoded("OGG", subtype, pcm)
        right, pages = decoded(ogg, folder), ogg_pages(ogg)
        yield File(f"{subtype}.ogg", ogg, right)
        yield File(f"{subtype} named.mp3", ogg, right)
        yield File(f"{subtype} with more behind.ogg", ogg + b"TAG" + bytes(125), right)
        yield File(f"{subtype} joined.ogg", ogg + ogg)
        yield File(
            f"{subtype} joined with another.ogg", ogg + encoded("OGG", "VORBIS", pulses(1.0))
        )
        for n in range(len(pages)):
            lost = b"".join(pages[:n] + pages[n + 1 :])
            last = n == len(pages) - 1  # which a stream need not have
            yield File(
                f"{subtype} without page {n}.ogg",
                lost,
                right if last else None,
                most=len(pcm) if last else 0,
            )
        for share in (0.01, 0.1, 0.5, 0.9, 0.999):
            yield File(f"{share} of {subtype}.ogg", ogg[: int(share * len(ogg))])
        for time in (0, 1, 10**9, 2**62):
            changed = b"".join(pages[:-1]) + resealed(pages[-1], 6, struct.pack("<q", time))
            yield File(
                f"{subtype} that ends at {time}.ogg", changed, refusal=True, most=len(pcm) + 1_024
            )
    for rate_hz, channels in ((16_000, 1), (44_100, 2), (8_000, 1)):
        for mode in ("CONSTANT", "VARIABLE", "AVERAGE"):
            yield from mp3s(
                f"{mode} {rate_hz}", pulses(3.0, channels, rate_hz), rate_hz, mode, folder
            )


def mp3s(name: str, pcm: np.ndarray, rate_hz: int, mode: str, folder: Path) -> Iterator[File]:
    """One MP3 in many coats. LAME pads 1,105 samples in front, of which a decoder leaves out 529
    and the header says the rest."""
    whole = mp3(pcm, folder, rate_hz, mode)
    first = mp3_frame(whole[:4])
    assert first is not None and whole[first.info : first.info + 4] in (b"Xing", b"Info")
    right, bare = decoded(whole, folder), whole[first.size :]
    most = len(pcm) + 4 * first.samples
    yield File(f"{name}.mp3", whole, right)
    yield File(f"{name} mp3 named.wav", whole, right)
    tagged = b"ID3\x03\0\0\0\0\x07\x0a" + bytes(7 * 128 + 10) + whole + b"TAG" + b"title".ljust(125)
    yield File(f"{name} tagged.mp3", tagged, right)
    yield File(f"{name} zeros before.mp3", bytes(1_000) + whole, right)
    yield File(f"{name} bare.mp3", bare, right, most=most, late=576)
    yield File(f"{name} only a header.mp3", whole[: first.size])
    yield File(f"{name} joined.mp3", whole + whole, right, most=2 * most, late=576)
    yield File(f"{name} with a hole.mp3", whole[: len(whole) // 2] + whole[len(whole) // 2 + 300 :])
    for share in (0.3, 0.5, 0.9):
        yield File(f"{share} of {name}.mp3", whole[: int(share * len(whole))])
        yield File(
            f"{share} of {name} bare.mp3",
            bare[: int(share * len(bare))],
            right,
            most=most,
            late=576,
        )


def others(folder: Path) -> Iterator[File]:
    """Other containers, whole and cut, and what is no sound at all."""
    pcm = pulses()
    linear = "AIFF AU CAF W64 NIST RF64 WAVEX".split()
    for kind, subtype in [
        *((kind, "PCM_16") for kind in linear),
        ("CAF", "ALAC_16"),
        ("AIFF", "PCM_24"),
        ("W64", "PCM_24"),
    ]:
        whole = encoded(kind, subtype, pcm)
        yield File(f"{kind} {subtype}", whole, floats(pcm))
        for share in (0.02, 0.3, 0.7, 0.99):
            yield File(f"{share} of {kind} {subtype}", whole[: int(share * len(whole))])
    for kind, subtype in [
        ("WAV", "ULAW"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "MS_ADPCM"),
        ("WAV", "GSM610"),
        ("AU", "ALAW"),
        ("WAV", "PCM_U8"),
    ]:
        whole = encoded(kind, subtype, pcm)
        yield File(f"{kind} {subtype}", whole, decoded(whole, folder))
    for name, content in {
        "a page.wav": b"<!DOCTYPE html><html><body>404</body></html>" * 99,
        "nothing.wav": b"",
        "zeros.mp3": bytes(100_000),
        "ones.mp3": b"\xff" * 100_000,
        "frames.mp3": b"\xff\xfb" * 50_000,
        "words.flac": b"these are words " * 999,
        "noise.ogg": random.Random(0).randbytes(100_000),
        "only a tag.mp3": b"ID3\x04\0\0\0\0\x01\0" + bytes(128),
        "tags.mp3": (b"ID3\x04" + bytes(6)) * 100_000,
        "a tag beyond all.mp3": b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(99),
        "movie.m4a": b"\0\0\0\x20ftypM4A " + bytes(999),
        "matroska.webm": b"\x1a\x45\xdf\xa3" + bytes(999),
        "aac.mp3": b"\xff\xf1\x50\x80" * 999,
        "pages.ogg": (b"OggS" + bytes(23)) * 9_999,
        "fetch.wav": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "magic.wav": b"RIFF",
        "magic.flac": b"fLaC",
        "magic.ogg": b"OggS",
        "magic.caf": b"caff\0\1\0\0" + (b"data" + b"\xff" * 8) * 2,
        "magic.w64": b"riff" + b"\xff" * 99,
        "magic.au": b".snd" + b"\xff" * 99,
        "magic.sph": b"NIST_1A\n   1024\nsample_count -i 999999999999\n",
    }.items():
        yield File(name, content)


def mutations(folder: Path) -> Iterator[File]:
    """Good files with some bytes changed, lost, doubled or put in; the changes of PCM are followed
    in the pulses."""
    pcm = pulses(2.0)
    bases: dict[str, tuple[bytes, np.ndarray]] = {}
    for kind in ("WAV", "AIFF", "AU", "W64", "RF64", "NIST", "CAF"):
        bases[kind] = encoded(kind, "PCM_16", pcm), floats(pcm)
    for kind, subtype in {
        "FLAC": "PCM_16",
        "OGG": "VORBIS",
        "OGG ": "OPUS",
        "WAV ": "FLOAT",
        "WAV  ": "IMA_ADPCM",
        "CAF ": "ALAC_16",
    }.items():
        whole = encoded(kind.strip(), subtype, pcm)
        bases[f"{kind} {subtype}"] = whole, decoded(whole, folder)
    for mode in ("CONSTANT", "VARIABLE"):
        bases[f"MP3 {mode}"] = mp3(pcm, folder, RATE_HZ, mode), np.zeros(0)
    for n in range(MUTATIONS):
        chance = random.Random(n)
        name = sorted(bases)[n % len(bases)]
        content, right = bases[name]
        how = chance.choice(list(HARM))
        at = chance.randrange(min(len(content), 100) if chance.random() < 0.5 else len(content))
        changed = HARM[how](content, at, chance)
        yield File(
            f"{n} {name} {how} at {at}", changed, *expected(name, content, changed, right, len(pcm))
        )


HARM: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "bit": lambda c, at, chance: c[:at] + bytes([c[at] ^ 1 << chance.randrange(8)]) + c[at + 1 :],
    "noise": lambda c, at, chance: c[:at] + chance.randbytes(min(16, len(c) - at)) + c[at + 16 :],
    "zeros": lambda c, at, chance: c[:at] + bytes(min(99, len(c) - at)) + c[at + 99 :],
    "cut": lambda c, at, chance: c[:at],
    "lost": lambda c, at, chance: c[:at] + c[at + chance.randrange(1, 5_000) :],
    "doubled": lambda c, at, chance: c[: at + chance.randrange(1, 5_000)] + c[at:],
    "put in": lambda c, at, chance: c[:at] + chance.randbytes(chance.randrange(1, 99)) + c[at:],
}


def expected(
    name: str, content: bytes, changed: bytes, right: np.ndarray, length: int
) -> tuple[np.ndarray | None, bool, float, int]:
    """What is right of a changed file: samples, whether a refusal, near, most."""
    if name == "WAV":  # another parser, that of Python
        try:
            with wave.open(io.BytesIO(changed)) as file:
                if file.getsampwidth() == 2:
                    return (
                        floats(
                            np.frombuffer(file.readframes(2**30), "<i2").reshape(
                                -1, file.getnchannels()
                            )
                        ),
                        True,
                        1e-6,
                        0,
                    )
        except (wave.Error, EOFError, RuntimeError, ValueError, ZeroDivisionError):
            pass
        return None, True, 0, len(changed)
    for order in "<>":
        data = (right * 32_768).astype(f"{order}i2").tobytes()
        place = content.find(data)
        if place > 0 and len(changed) == len(content) and changed[:place] == content[:place]:
            return (
                floats(np.frombuffer(changed[place : place + len(data)], f"{order}i2")[:, None]),
                False,
                1e-6,
                0,
            )
    if name.startswith(("FLAC", "OGG")):  # every frame or page has a checksum
        return right, True, 1e-6, length
    return None, True, 0, 2 * length + len(changed)


# --- the laws


@LINUX
def test_bad_and_odd_files_are_refused_or_read_right(reader: Reader, tmp_path: Path) -> None:
    """At least 400: see `headers`, `streams`, `others` and `mutations`; every second one is given
    as bytes."""
    ends: Counter[str] = Counter()
    wrong = []
    for n, file in enumerate(
        [*headers(), *streams(tmp_path), *others(tmp_path), *mutations(tmp_path)]
    ):
        try:
            ends[judge(reader, file, as_bytes=bool(n % 2))] += 1
        except AssertionError as error:
            wrong.append(str(error).partition("\n(")[0])
    assert not wrong, "\n".join(wrong)
    print(
        f"{ends.total()} files: {dict(ends)}, at most {reader.seconds:.2f} s and {reader.mb:.0f} "
        "MB over idle"
    )
    assert ends.total() >= 400
    assert ends["right"] >= 100 and ends["refused"] >= 100, ends
    assert reader.seconds <= SLOWEST_S and reader.mb <= MOST_MB


def bombs() -> Iterator[File]:
    """What is small as a file and would be large as sound, or long to look through; and the largest
    that is read."""
    silent = np.zeros((48_000 * 60, 1), np.int16)
    for length in (0, 36_000 * 48_000, 600 * 48_000):
        out = io.BytesIO()
        with soundfile.SoundFile(out, "w", 48_000, 1, format="FLAC", subtype="PCM_16") as file:
            for _ in range(60):
                file.write(silent)
        yield File(
            f"an hour of silence that says {length}.flac", flac_saying(out.getvalue(), length)
        )
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 8_000, 1, format="OGG", subtype="OPUS") as file:
        for _ in range(11):
            file.write(np.zeros((8_000 * 60, 1), np.int16))
    pages = ogg_pages(out.getvalue())
    yield File("eleven minutes of silence.opus", out.getvalue())
    yield File(
        "ten hours, it says.opus",
        b"".join(pages[:-1]) + resealed(pages[-1], 6, struct.pack("<q", 36_000 * 48_000)),
    )
    frame = b"\xff\xf3\x14\xc4" + bytes(20)  # 8 kbit/s, 24 kHz, one channel
    yield File("seven hours of empty frames.mp3", frame * 1_040_000)
    yield File("frames of nothing.mp3", b"\xff\xf3\x14\xc4" * 6_200_000)
    yield File("a million pages.ogg", b"".join(empty_page(number) for number in range(900_000)))
    yield File("chunks.wav", wav(b"", RATE_HZ, 1, 16, None, 1, chunk(b"junk", b"") * 3_000_000))
    yield File("tags.mp3", (b"ID3\x04" + bytes(6)) * 2_400_000)
    yield File("more than 25 MB.wav", wav(bytes(25_000_000)))


def empty_page(number: int) -> bytes:
    head, tail = (
        b"OggS\0" + bytes([2 * (number == 0)]) + bytes(8) + b"zip!" + struct.pack("<I", number),
        b"\0",
    )
    return head + struct.pack("<I", _checksum(head + bytes(4) + tail)) + tail


def giants() -> Iterator[File]:
    """The largest that are read."""
    for seconds, channels in {43: 8, 349: 1}.items():
        pcm = np.zeros((192_000 * seconds, channels), np.int16)
        yield File(
            f"{seconds} s of {channels} channels.flac",
            encoded("FLAC", "PCM_16", pcm, 192_000),
            floats(pcm[:, :1]),
        )


@LINUX
@pytest.mark.slow
def test_a_bomb_takes_no_more_than_any_other_file(reader: Reader) -> None:
    for file in bombs():
        print(
            f"{file.name}, {len(file.content) / 1e6:.1f} MB: {judge(reader, file, as_bytes=True)}"
        )
    for hours, rate_hz in {
        10: 16_000,
        1: 192_000,
    }.items():  # a hole in the disk, that takes no room
        path = reader.folder / "long.wav"
        with path.open("wb") as hole:
            hole.write(wav(b"", rate_hz, size=hours * 3_600 * rate_hz * 2))
            hole.truncate(44 + hours * 3_600 * rate_hz * 2)
        assert "lasts" in reader.read(str(path))["refused"]
    print(f"at most {reader.seconds:.2f} s and {reader.mb:.0f} MB over idle")
    assert reader.seconds <= SLOWEST_S and reader.mb <= MOST_MB
    assert [judge(reader, file, as_bytes=False) for file in giants()] == ["right"] * 2
    print(f"with the largest that are read {reader.seconds:.2f} s and {reader.mb:.0f} MB")
    assert reader.mb <= MOST_MB
