"""Containers: how much sound a file says it holds, and how much is there. Knows how files are laid
out, nothing of samples.

libsndfile believes headers. It reads half of an MP3 that has none, the first of two files that were
joined, what is left of a WAV that was cut short, and says nothing. So a file is looked through
first, and what libsndfile gets has a header that is true or says "unknown".
"""

import functools
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from zipper.errors import ZipperError

# Sound has a dozen; libsndfile and we would walk through millions of empty ones.
MOST_CHUNKS = 1_000
MOST_TAGS = 10
# Of Ogg: 2.8 hours if each holds 20 ms, days as most are written; 1.2 s of work.
MOST_PAGES = 500_000
NEAR = 65_536  # bytes in which the first frame of an MP3 must begin
#: From here on 32 bits mean "unknown": pipes leave 0x7FFFF000 (SoX), 0x80000000 (arecord),
#: 0xFFFFFFFF (ffmpeg).
UNKNOWN_BYTES = 0x7FFFF000
OFF = 64  # bytes that a size may be wrong by: some writers count their header in


@dataclass(frozen=True)
class Opened:
    """What libsndfile is given. frames: samples a channel that the file speaks of, where libsndfile
    was not told. slack: samples a channel that may be missing from what is spoken of."""

    file: io.IOBase
    frames: int | None = None
    slack: int = 0


def opened(file: io.BufferedIOBase, where: str) -> Opened:
    """A sound file that has been looked through: wav, rf64, w64, aiff, au, caf, sph, flac, ogg,
    opus or mp3, told by its content.

    `where` names it in errors. Raises ZipperError for another kind of file, one that was cut short,
    and one that holds more than its header says.
    """
    size = file.seek(0, io.SEEK_END)
    at = _behind_tag(file)
    head = _at(file, at, 32)
    chunks = _CHUNKED.get(head[:4])
    if at:
        pass  # only streams of frames have tags before them
    elif chunks and re.match(chunks.kind, head[8:]):
        return _chunked(file, size, chunks, where)
    elif head[:4] in (b".snd", b"dns."):
        order: Literal["big", "little"] = "big" if head[:1] == b"." else "little"
        told = int.from_bytes(head[8:12], order)
        return (
            Opened(file)
            if told == 0xFFFFFFFF
            else _sized(file, size, int.from_bytes(head[4:8], order), told, where)
        )
    elif head[:7] == b"NIST_1A":
        return _nist(file, size, where)
    elif head[:4] == b"OggS":
        return _ogg(file, size, where)
    end = size - 128 if size - 128 > at and _at(file, size - 128, 3) == b"TAG" else size  # ID3v1
    if head[:4] == b"fLaC":
        return _flac(file, at, end)
    first = _first_frame(file, at)
    if first is not None:
        return _mp3(file, first, end, where)
    kind = next((told for start, told in _FOREIGN.items() if head.lower().startswith(start)), "")
    kind = "MP4, such as m4a" if head[4:8] == b"ftyp" else kind
    begins = (
        f"it is {kind}" if kind else f"it begins with {head[:8]!r}" if head else "nothing is in it"
    )
    raise ZipperError(
        f"{where} is not readable sound ({begins}). Give a wav, flac, mp3, ogg or opus file."
    )


class Part(io.RawIOBase):
    """`head`, and behind it what `file` holds from `start` to `stop`."""

    def __init__(self, file: io.BufferedIOBase, head: bytes, start: int, stop: int) -> None:
        self._file, self._head, self._start, self._stop = file, head, start, stop
        self._place = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning of `head`."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file; what lies before the beginning is the beginning, for a decoder's callback
        may not raise."""
        length = len(self._head) + self._stop - self._start
        self._place = max(0, (0, self._place, length)[whence] + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer unless the file ends: a decoder takes less for the end."""
        wanted = memoryview(buffer).cast("B")
        content = self._head[self._place : self._place + len(wanted)]
        if len(content) < len(wanted):
            at = self._start + max(0, self._place - len(self._head))
            content += _at(self._file, at, max(0, min(len(wanted) - len(content), self._stop - at)))
        wanted[: len(content)] = content
        self._place += len(content)
        return len(content)


def _at(file: io.BufferedIOBase, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _behind_tag(file: io.BufferedIOBase) -> int:
    """Where a file begins behind the ID3v2 tags before it."""
    at = 0
    for _ in range(MOST_TAGS):
        tag = _at(file, at, 10)
        if tag[:3] != b"ID3" or len(tag) < 10 or max(tag[6:]) > 127:
            break
        at += (
            10
            + sum(byte << 7 * n for n, byte in enumerate(reversed(tag[6:])))
            + (10 if tag[5] & 16 else 0)
        )
    return at


_FOREIGN = {
    b"\x1ae\xdf\xa3": "WebM or Matroska",
    b"<": "a page of HTML or XML",
    b"#!amr": "AMR",
    b"\xff\xf1": "AAC",
    b"\xff\xf9": "AAC",
    b"\x30\x26\xb2\x75": "WMA",
    b"ajkg": "Shorten",
    b"wvpk": "WavPack",
    b"version https://git-lfs": "a pointer of Git LFS, the file itself was not fetched",
}


# --- chunks: wav, rf64, w64, aiff, caf


class _Chunks(NamedTuple):
    """How a file is cut into chunks. counted: bytes before a chunk's content that its size counts
    in."""

    first: int
    name: int
    size: int
    order: Literal["big", "little"]
    counted: int
    align: int
    sound: bytes
    kind: bytes  # a pattern of what stands at byte 8


_CHUNKED = {
    b"RIFF": _Chunks(12, 4, 4, "little", 0, 2, b"data", b"WAVE"),
    b"RIFX": _Chunks(12, 4, 4, "big", 0, 2, b"data", b"WAVE"),
    b"RF64": _Chunks(12, 4, 4, "little", 0, 2, b"data", b"WAVE"),
    b"FORM": _Chunks(12, 4, 4, "big", 0, 2, b"SSND", b"AIF[FC]"),
    b"caff": _Chunks(8, 4, 8, "big", 0, 1, b"data", b""),
    b"riff": _Chunks(40, 16, 8, "little", 24, 8, b"data", b""),
}


def _chunked(file: io.BufferedIOBase, size: int, layout: _Chunks, where: str) -> Opened:
    long = 0
    for name, place, length in _chunks(file, size, layout, where):
        if name == b"ds64":
            long = int.from_bytes(_at(file, place + 8, 8), "little")
        if name[:4] == layout.sound:
            told = long if long and length == 0xFFFFFFFF else length
            unknown = UNKNOWN_BYTES <= length <= 0xFFFFFFFF and told == length and layout.size == 4
            return (
                Opened(file)
                if unknown or length >= 1 << 62
                else _sized(file, size, place, told, where, layout.align)
            )
    raise ZipperError(f"{where} ends before its sound begins. Fetch or export it again.")


def _chunks(
    file: io.BufferedIOBase, size: int, layout: _Chunks, where: str
) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of the content of every chunk that begins in the file."""
    at = layout.first
    for _ in range(MOST_CHUNKS):
        head = _at(file, min(at, size), layout.name + layout.size)
        if len(head) < layout.name + layout.size:
            return
        length = int.from_bytes(head[layout.name :], layout.order) - layout.counted
        at += len(head)
        yield head[: layout.name], at, length
        at += max(0, length)
        at += -at % layout.align
    raise ZipperError(
        f"{where} has more than {MOST_CHUNKS} chunks before its sound. Export it again."
    )


def _sized(
    file: io.BufferedIOBase, size: int, place: int, told: int, where: str, align: int = 0
) -> Opened:
    """A file that says it has so many bytes of sound from `place` on. align: chunks may follow, at
    multiples of so many bytes."""
    there = max(0, size - place)
    if told > there + OFF:
        raise ZipperError(
            f"{where} was cut short: its header speaks of {told:,} bytes of sound, {there:,} are "
            "there. Fetch or export it again."
        )
    rest = _at(file, place + told, NEAR)
    if (
        size - place - told > OFF
        and rest.strip(b"\0")
        and not any(re.match(rb"[ -~]{4}", rest[n:]) for n in range(align))
    ):
        raise ZipperError(
            f"{where} holds more than it says: behind its {told:,} bytes of sound lie "
            f"{size - place - told:,} others. "
            "It was not closed when it was written: export it again."
        )
    return Opened(file)


def _nist(file: io.BufferedIOBase, size: int, where: str) -> Opened:
    """NIST Sphere: a page of text, then sound."""
    page = _at(file, 0, 16)[8:].strip()
    place = int(page) if page.isdigit() else 1024
    said = {
        name: int(n)
        for name, n in re.findall(
            rb"^(\w+) -i (\d{1,12})\s*$", _at(file, 0, min(place, NEAR)), re.MULTILINE
        )
    }
    told = (
        said.get(b"sample_count", 0)
        * said.get(b"channel_count", 1)
        * said.get(b"sample_n_bytes", 1)
    )
    return _sized(file, size, place, told, where)


# --- streams: flac, ogg


def _flac(file: io.BufferedIOBase, at: int, end: int) -> Opened:
    """FLAC that says its length is unknown, so that libsndfile reads to the end; each frame has a
    checksum."""
    head = _at(file, at, 26)
    told = int.from_bytes(head[18:], "big")
    frames = told & (1 << 36) - 1
    return Opened(
        Part(file, head[:18] + (told - frames).to_bytes(8, "big"), at + 26, end), frames or None
    )


def _ogg(file: io.BufferedIOBase, size: int, where: str) -> Opened:
    """Ogg with one stream whose pages are all there and whole. It has no length but the time of the
    last page; libsndfile takes the page before a damaged one for the last, passes over damaged ones
    at the beginning, and does not enter a second stream.
    """
    at, serial = 0, b""
    for number in range(MOST_PAGES):
        head = _at(file, at, 27 + 255)
        if head[:4] != b"OggS" and number:  # what others have put behind it
            return Opened(file)
        if (
            len(head) < 27
            or len(head) < 27 + head[26]
            or at + (length := 27 + head[26] + sum(head[27 : 27 + head[26]])) > size
        ):
            raise ZipperError(
                f"{where} was cut short: it ends inside of page {number + 1}. Fetch or export it "
                "again."
            )
        page = _at(file, at, length)
        serial = serial or page[14:18]
        if page[14:18] != serial or (number and page[5] & 2):
            raise ZipperError(
                f"{where} holds more than one stream, one behind or inside of the other; one can "
                "be read. Split it."
            )
        whole = _checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(page[22:26], "little")
        if not whole or int.from_bytes(page[18:22], "little") != number:
            raise ZipperError(
                f"{where} is damaged: page {number + 1} is "
                f"{'missing' if whole else 'not what it was'}. Fetch or export it again."
            )
        at += length
    raise ZipperError(f"{where} has more than {MOST_PAGES:,} pages. Cut it into pieces.")


def _checksum(page: bytes) -> int:
    """Ogg's CRC (RFC 3533, 6), which is zlib's with the bits of all bytes, and its own, in the
    other order."""
    mirrored = ~zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) & 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# --- mp3


class _Frame(NamedTuple):
    """A frame of an MP3: its bytes, its samples a channel, where a header of the whole lies in it,
    and what all have in common."""

    size: int
    samples: int
    info: int
    rate_hz: int
    common: bytes


_KBPS = {
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# Without a tag libsndfile knows an MP3 by its path only.
_ID3 = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)


@functools.lru_cache(4096)
def _frame(head: bytes) -> _Frame | None:
    """The frame of layer III that begins with these four bytes, if one does (ISO 11172-3,
    13818-3)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or head[1] & 0x18 == 0x08:
        return None
    bits, rate, padded = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if bits in (0, 15) or rate == 3:
        return None
    version, mono = {0x18: 1, 0x10: 2, 0x00: 4}[head[1] & 0x18], head[3] >> 6 == 3
    rate_hz = (44_100, 48_000, 32_000)[rate] // version
    samples = 1152 if version == 1 else 576
    size = samples * 125 * _KBPS[min(version, 2)][bits - 1] // rate_hz + padded
    info = 4 + {(1, False): 32, (1, True): 17, (2, False): 17, (2, True): 9}[min(version, 2), mono]
    return _Frame(size, samples, info, rate_hz, bytes((head[1] & 0xFE, rate, mono)))


def _first_frame(file: io.BufferedIOBase, at: int) -> int | None:
    """Where the first frame of an MP3 lies that has another like it behind it."""
    near = _at(file, at, NEAR)
    for found in re.finditer(rb"\xff[\xe2-\xff]", near[:-4]):
        frame = _frame(near[found.start() : found.start() + 4])
        if frame:
            behind = _at(file, at + found.start() + frame.size, 4)
            following = _frame(behind)
            if (following and following.common == frame.common) or (
                not behind and not found.start()
            ):
                return at + found.start()
    return None


def _mp3(file: io.BufferedIOBase, start: int, end: int, where: str) -> Opened:
    """MP3 with a header that says how many frames there are: its own if that is true, else a new
    one."""
    first = _frame(_at(file, start, 4))
    assert first is not None
    there, stop = _count(file, start, end, first.common)
    seconds = first.samples / first.rate_hz
    rest = _at(file, stop, end - stop if end - stop < 2 * NEAR else NEAR)
    if stop < end and _first_frame(io.BytesIO(rest), 1 if rest[:1] == b"\xff" else 0) is not None:
        raise ZipperError(
            f"{where} is damaged, or joined from two of different kinds, after "
            f"{there * seconds:.2f} s. Fetch or export it again."
        )
    head = _at(file, start, first.size).ljust(first.info + 12, b"\0")  # it may be cut short
    xing = head[first.info : first.info + 4] in (b"Xing", b"Info")
    told = (
        int.from_bytes(head[first.info + 8 : first.info + 12], "big")
        if xing and head[first.info + 7] & 1
        else 0
    )
    if head[36:40] == b"VBRI":  # as Fraunhofer writes it
        xing, told = True, int.from_bytes(head[50:54], "big")
    there = max(0, there - xing)  # the header is a frame without sound
    if told > there + 2:  # whether it counts itself is not agreed upon
        raise ZipperError(
            f"{where} was cut short: its header speaks of {told * seconds:.2f} s, "
            f"{there * seconds:.2f} s are there. Fetch or export it again."
        )
    if told < there - 2 or head[36:40] == b"VBRI":
        begin = start + first.size if xing else start
        return Opened(
            Part(file, _ID3 + _info(head[:4], there), begin, stop), slack=2 * first.samples
        )
    return Opened(Part(file, _ID3, start, stop), slack=2 * first.samples)


def _count(file: io.BufferedIOBase, start: int, end: int, common: bytes) -> tuple[int, int]:
    """How many whole frames lie in a row, and where they end."""
    at = start
    for count in range(end - start):
        frame = _frame(_at(file, at, 4))
        if frame is None or frame.common != common or at + frame.size > end:
            return count, at
        at += frame.size
    return 0, start


def _info(like: bytes, frames: int) -> bytes:
    """A frame without sound that says how many follow, for frames like this one."""
    for bits in range(1, 15):
        head = bytes((like[0], like[1] | 1, bits << 4 | like[2] & 0x0C, like[3]))
        frame = _frame(head)
        if frame is not None and frame.size >= frame.info + 12:
            told = b"Info" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
            return (head + bytes(frame.info - 4) + told).ljust(frame.size, b"\0")
    raise AssertionError("the largest frames hold more")
