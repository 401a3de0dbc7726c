"""Containers: what is told of a file before it is decoded. Whole files and bad ones are in
test_hostile_sound.py."""

import io
import random

import numpy as np
import pytest
import soundfile

from zipper.audio import containers
from zipper.audio.containers import Part, opened
from zipper.errors import ZipperError


def encoded(kind: str, seconds: float = 1.0) -> bytes:
    out = io.BytesIO()
    soundfile.write(
        out, np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds)), 16_000, format=kind
    )
    return out.getvalue()


def test_a_part_is_read_as_the_file_it_stands_for() -> None:
    chance = random.Random(0)
    content = chance.randbytes(1_000)
    for head, start, stop in [
        (b"", 0, 1_000),
        (b"header", 10, 900),
        (b"x" * 300, 999, 1_000),
        (b"only", 5, 5),
    ]:
        part, plain = (
            Part(io.BytesIO(content), head, start, stop),
            io.BytesIO(head + content[start:stop]),
        )
        for _ in range(300):
            if chance.random() < 0.5:
                whence = chance.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
                back = {
                    io.SEEK_SET: 0,
                    io.SEEK_CUR: plain.tell(),
                    io.SEEK_END: len(plain.getvalue()),
                }[whence]
                offset = chance.randrange(-back, 400) if back else chance.randrange(400)
                assert part.seek(offset, whence) == plain.seek(offset, whence)
            room, other = bytearray(chance.randrange(1, 200)), bytearray(200)
            assert part.readinto(room) == plain.readinto(memoryview(other)[: len(room)])
            assert room == other[: len(room)]
            assert part.tell() == plain.tell()
    assert part.seek(-10_000) == 0


def test_the_checksum_of_ogg_is_that_of_its_pages() -> None:
    page = encoded("OGG")[:58]  # the first page of Vorbis: one packet of 30 bytes
    assert page[26] == 1 and page[27] == 30
    assert containers._checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(
        page[22:26], "little"
    )


def test_a_stream_is_told_to_be_read_to_its_end() -> None:
    flac = encoded("FLAC")
    told = opened(io.BytesIO(flac), "a.flac")
    assert told.frames == 16_000
    with soundfile.SoundFile(told.file) as sound:
        assert sound.frames > 2**60  # unknown


def test_frames_of_mp3_are_as_long_as_the_standard_says() -> None:
    for head, size, samples, info in [
        (b"\xff\xfb\x90\x00", 417, 1152, 36),  # 128 kbit/s, 44.1 kHz, two channels
        (b"\xff\xfb\x92\x00", 418, 1152, 36),  # padded
        (b"\xff\xfb\xe4\xc0", 960, 1152, 21),  # 320, 48 kHz, one
        (b"\xff\xf3\x14\xc4", 24, 576, 13),  # 8, 24 kHz, one
        (b"\xff\xe3\x48\xc4", 288, 576, 13),  # 32, 8 kHz, one
    ]:
        frame = containers._frame(head)
        assert frame is not None and (frame.size, frame.samples, frame.info) == (
            size,
            samples,
            info,
        )
        header = containers._info(head, 1_234)
        assert (
            containers._frame(header[:4]) is not None
            and len(header) == containers._frame(header[:4]).size
        )
        assert header[frame.info : frame.info + 12] == b"Info\0\0\0\1\0\0\x04\xd2"
    for head in (
        b"\xff\xf1\x50\x80",
        b"\xff\xfd\x90\x00",
        b"\xff\xff\x90\x00",
        b"\xff\xfb\xf0\x00",
        b"\xff\xfb\x9c\x00",
        b"\xff\xfb\x00\x00",
        b"\xff",
    ):
        # AAC, layers II and I, rates and lengths that are none.
        assert containers._frame(head) is None


def test_a_file_that_would_take_long_to_look_through_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(containers, "MOST_PAGES", 3)
    with pytest.raises(ZipperError, match=r"a.ogg has more than 3 pages"):
        opened(io.BytesIO(encoded("OGG", 20.0)), "a.ogg")
    monkeypatch.setattr(containers, "MOST_CHUNKS", 1)
    with pytest.raises(ZipperError, match=r"a.wav has more than 1 chunks before its sound"):
        opened(io.BytesIO(encoded("WAV")), "a.wav")


def test_an_mp3_that_was_cut_in_its_first_frame_is_one_sentence() -> None:
    whole = encoded("MP3")
    for most in range(1, 60):
        try:
            opened(io.BytesIO(whole[:most]), "a.mp3")
        except ZipperError:
            continue


def test_a_tag_with_a_foot_is_passed_over() -> None:
    tag = b"ID3\x04\0\x10\0\0\0\x05" + b"title" + b"3DI\x04\0\x10\0\0\0\x05"
    assert opened(io.BytesIO(tag + encoded("FLAC")), "a.flac").frames == 16_000


@pytest.mark.parametrize(
    ("kind", "endian", "begin"),
    [
        ("AU", "BIG", b".snd"),
        ("AU", "LITTLE", b"dns."),
        ("WAV", "LITTLE", b"RIFF"),
        ("WAV", "BIG", b"RIFX"),
    ],
)
def test_a_header_says_the_length_in_either_order(kind: str, endian: str, begin: bytes) -> None:
    out, name = io.BytesIO(), f"a.{kind.lower()}"
    samples = np.zeros(1_000, np.float32)
    soundfile.write(out, samples, 16_000, "PCM_16", format=kind, endian=endian)
    content = out.getvalue()
    assert content[:4] == begin
    opened(io.BytesIO(content), name)
    with pytest.raises(ZipperError, match=r"speaks of 2,000 bytes of sound, 1,000 are there"):
        opened(io.BytesIO(content[:-1_000]), name)


def test_an_mp3_of_fraunhofer_says_its_frames() -> None:
    whole = encoded("MP3")
    start = containers._first_frame(io.BytesIO(whole), 0)
    assert start is not None
    head = bytes((whole[start], whole[start + 1] | 1, 0xE0 | whole[start + 2] & 0x0C))
    head += whole[start + 3 : start + 4]
    first = containers._frame(head)
    assert first is not None

    def with_frames(told: int) -> bytes:
        said = head + bytes(32) + b"VBRI" + bytes(10) + told.to_bytes(4, "big")
        return said.ljust(first.size, b"\0") + whole[start:]

    opened(io.BytesIO(with_frames(20)), "a.mp3")
    with pytest.raises(ZipperError, match=r"a\.mp3 was cut short: its header speaks of"):
        opened(io.BytesIO(with_frames(20_000)), "a.mp3")
