"""Writes the text of the prose corpus from the novels: `python tools/prose.py Rdata.rdb`.

Rdata.rdb is data/Rdata.rdb of the R package janeaustenr 1.0.0 (MIT; the six novels, in the public
domain, as Project Gutenberg has them). It lies in Debian's r-cran-janeaustenr: `apt-get download
r-cran-janeaustenr`, then `dpkg-deb -x` unpacks it.
"""

import gzip
import hashlib
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pocketsphinx

from zipper_lab.corpora.prose import TEXT

BOOKS = (
    "emma",
    "mansfield",
    "northanger",
    "persuasion",
    "pride",
    "sense",
)  # as they lie in the file
CHAPTERS = (55, 48, 31, 24, 61, 50)
SHORTEST, LONGEST = 4, 20  # words in a sentence
SHARES = {
    "test": 0.04,
    "dev": 0.02,
    "pairs": 0.20,
    "speech": 0.22,
    "text": 1.0,
}  # of all words, whole chapters; text has the rest
SEEN = 3  # times that a word stands in the part "text", at least, to be said in another part
TITLES = {
    "mr": "mister",
    "mrs": "missus",
    "dr": "doctor",
    "st": "saint",
    "esq": "esquire",
    "hon": "honourable",
    "rev": "reverend",
}


def books(database: bytes) -> Iterator[str]:
    """The character vectors of an R lazy-load database, their strings as lines."""
    while database:
        stream = zlib.decompressobj()
        content = stream.decompress(database[4:])  # behind its length
        database = stream.unused_data
        # XDR, format 3; STRSXP without attributes.
        if not (content.startswith(b"X\n") and content[18:27] == b"UTF-8\0\0\0\x10"):
            raise SystemExit("this is not the Rdata.rdb of janeaustenr 1.0.0")
        (count,) = struct.unpack_from(">I", content, 27)
        at, lines = 31, []
        for _ in range(count):
            (size,) = struct.unpack_from(">I", content, at + 4)
            lines.append(content[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield "\n".join(lines)


def chapters(book: str) -> list[str]:
    """The text between the headings, without what stands before the first and behind the end."""
    book = re.split(r"\n(?:FINIS|Finis|THE END|\*Vide)\b", book)[0]
    book = re.sub(r"(?m)^(VOLUME .*|\s*\[.*\])$", "", book)
    return re.split(r"(?mi)^chapter .*$", book)[1:]


def pieces(chapter: str) -> Iterator[list[str]]:
    """Its sentences in words: cut at every mark but the comma, and at commas where they are too
    long."""
    for paragraph in re.split(r"\n\s*\n", chapter):
        flat = re.sub(
            rf"\b({'|'.join(TITLES)})\b\.?",
            lambda m: TITLES[m[1].lower()],
            " ".join(paragraph.split()),
            flags=re.IGNORECASE,
        )
        for sentence in re.split(r'[.!?;:"()\[\]]|--', flat.replace("_", "").lower()):
            phrases = [phrase.replace("-", " ").split() for phrase in sentence.split(",")]
            if sum(map(len, phrases)) <= LONGEST:
                phrases = [[word for phrase in phrases for word in phrase]]
            whole: list[str] = []
            for phrase in phrases:
                if len(whole) + len(phrase) > LONGEST:
                    yield whole
                    whole = []
                whole = whole + phrase
            yield whole


def plain(words: list[str]) -> bool:
    """Of the right length, of letters and inner apostrophes only; initials are no words."""
    return SHORTEST <= len(words) <= LONGEST and all(
        re.fullmatch(r"[a-z]{2,}(?:'[a-z]+)*|[aio]|o'clock", word) for word in words
    )


def near(words: list[str]) -> set[tuple[str, ...]]:
    """Marks that two sentences share if one word at most was put in, left out or changed between
    them."""
    gone = {tuple(words[:i] + words[i + 1 :]) for i in range(len(words))}
    changed = {(*words[:i], "*", *words[i + 1 :]) for i in range(len(words))}
    return {tuple(words)} | gone | changed


def main() -> None:
    """Chapters to parts by their hash, near-duplicates out (the earlier part keeps them), rare
    words out of what is said."""
    found = {
        (book, number): [words for words in pieces(chapter) if plain(words)]
        for book, text in zip(BOOKS, books(Path(sys.argv[1]).read_bytes()), strict=True)
        for number, chapter in enumerate(chapters(text), start=1)
    }
    if Counter(book for book, _ in found) != dict(zip(BOOKS, CHAPTERS, strict=True)):
        raise SystemExit("these are not the chapters of janeaustenr 1.0.0")
    words_in = {chapter: sum(map(len, sentences)) for chapter, sentences in found.items()}
    left = sorted(found, key=lambda chapter: hashlib.sha256(repr(chapter).encode()).digest())
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, dict[tuple[str, int], list[list[str]]]] = {}
    for part, share in SHARES.items():
        kept[part], size = {}, 0
        while left and size < share * sum(words_in.values()):
            chapter = left.pop()
            size += words_in[chapter]
            kept[part][chapter] = []
            for words in found[chapter]:
                if not (marks := near(words)) & seen:
                    seen |= marks
                    kept[part][chapter].append(words)
    dictionary = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text(
        encoding="utf-8"
    )
    pronounced = {re.sub(r"\(\d+\)$", "", line.split()[0]) for line in dictionary.splitlines()}
    count = Counter(
        word for sentences in kept["text"].values() for words in sentences for word in words
    )
    known = {word for word in pronounced if count[word] >= SEEN}
    lines = []
    for part in reversed(SHARES):
        for (book, number), sentences in sorted(kept[part].items()):
            lines.append(f"# {part} {book} {number}")
            lines += [
                " ".join(words) for words in sentences if part == "text" or known.issuperset(words)
            ]
    lines += ["# words", *sorted(known)]
    TEXT.parent.mkdir(parents=True, exist_ok=True)
    TEXT.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    print(
        f"{TEXT.name}: {len(lines)} lines, {TEXT.stat().st_size / 1e6:.2f} MB; {len(known)} words "
        "may be said"
    )


if __name__ == "__main__":
    main()
