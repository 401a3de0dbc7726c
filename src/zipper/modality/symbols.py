"""Symbols: strings over an alphabet or a word list, one id for each symbol. Proteins, DNA, SMILES,
chess moves, actions, events.

The list of symbols and how a string is cut into them are the whole definition; nothing here knows
of towers or of what the symbols mean.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from zipper.errors import ZipperError
from zipper.modality.kind import Kind, Scores, short
from zipper.saving.files import as_json, parse, place, read_json, write, write_json

Split = Literal["characters", "words", "smiles"]

MOST_SYMBOLS = 100_000
MOST_CHARACTERS = 500_000  # of all symbols together
#: Of a symbols.json: every character written as an escape, every symbol on a line of its own.
MOST_BYTES = 8 << 20
MOST_LINE = 16 << 20  # bytes of a line of data; whole chromosomes come in lines of 80
NAMED = 20  # symbols that an error names, each by its first characters
SHOWN = 40

#: Atom-wise, as Schwaller et al. 2019 (Molecular Transformer) cut SMILES: an atom in brackets is
#: one symbol, as are Br, Cl and rings of two digits.
SMILES = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|[NOSPFIbcnops]|[().=#+\\/:~@?>*$-]|%[0-9]{2}|[0-9]|(?P<none>.)", re.DOTALL
)
FASTA = (".fasta", ".fa", ".faa", ".fna")

_OPENINGS = {
    "Ruy Lopez": "e4 e5 Nf3 Nc6 Bb5",
    "Italian Game": "e4 e5 Nf3 Nc6 Bc4",
    "Scotch Game": "e4 e5 Nf3 Nc6 d4",
    "Petrov's Defense": "e4 e5 Nf3 Nf6",
    "Philidor Defense": "e4 e5 Nf3 d6",
    "Vienna Game": "e4 e5 Nc3",
    "King's Gambit": "e4 e5 f4",
    "Sicilian Defense": "e4 c5",
    "French Defense": "e4 e6",
    "Caro-Kann Defense": "e4 c6",
    "Scandinavian Defense": "e4 d5",
    "Queen's Gambit": "d4 d5 c4",
    "Queen's Gambit Declined": "d4 d5 c4 e6",
    "Slav Defense": "d4 d5 c4 c6",
    "Nimzo-Indian Defense": "d4 Nf6 c4 e6 Nc3 Bb4",
    "Dutch Defense": "d4 f5",
}


@dataclass(frozen=True)
class _Definition:
    """As symbols.json has it. sha256: the fingerprint of the rest."""

    symbols: tuple[str, ...]
    split: Split
    unknown: str | None
    sha256: str


class Symbols(Kind):
    """Strings <-> ids of symbols. Ids 0 .. n-1 are the symbols in their order, n begins and n+1
    ends a segment.

    With `unknown`, what is no symbol is read as one id, n+2, which is written as the string
    `unknown`; where `unknown` is itself one of the symbols (X of proteins, N of DNA), it is read as
    that symbol and there is no further id. So `decode(encode(x)) == x`, but for symbols that are
    unknown, and but for white space between words, which is one space in what `decode` makes.
    """

    name = "symbols"
    takes: ClassVar[str] = "a string of symbols, or a list of symbols"
    FILE: ClassVar[str] = "symbols.json"

    def __init__(
        self, symbols: Sequence[str], split: Split = "characters", unknown: str | None = None
    ) -> None:
        """symbols: the alphabet in the order of its ids, at most 100,000 different ones.

        split: how a string is cut: "characters" (code points), "words" (between white space) or
        "smiles" (atom by atom, Schwaller et al. 2019). Every symbol must be one piece of that cut.
        unknown: how a symbol that is not in the list is written; None refuses it. Raises
        ZipperError for symbols that are none, given twice, or too many.
        """
        if split not in get_args(Split):
            raise ZipperError(
                f"split={split!r:.80} was given; take one of {', '.join(get_args(Split))}."
            )
        if isinstance(symbols, str) and split != "characters":
            raise ZipperError(f"{symbols!a:.80} is one string. Give a list of symbols.")
        self.symbols, self.split, self.unknown = tuple(symbols), split, unknown
        self._check()
        self._ids = {symbol: number for number, symbol in enumerate(self.symbols)}
        self.begin, self.end = len(self.symbols), len(self.symbols) + 1
        self.vocabulary = self.end + 1
        self._written = dict(enumerate(self.symbols))
        self.unknown_id = None if unknown is None else self._ids.get(unknown, self.vocabulary)
        if self.unknown_id == self.vocabulary and unknown is not None:
            self._written[self.vocabulary] = unknown
            self.vocabulary += 1

    @classmethod
    def protein(cls, unknown: str | None = None) -> "Symbols":
        """The 20 amino acids, one letter each, and the letters of UniProt for others and doubt: X,
        B, Z, U, O and J. Small letters are none of them."""
        return cls(tuple("ACDEFGHIKLMNPQRSTVWYXBZUOJ"), "characters", unknown)

    @classmethod
    def dna(cls, unknown: str | None = None) -> "Symbols":
        """A, C, G, T, and N for any of them. Small letters (masked repeats) are none of them, nor
        are the rarer letters of IUPAC: `unknown="N"` reads all of these as N."""
        return cls(tuple("ACGTN"), "characters", unknown)

    @classmethod
    def fitted(
        cls,
        values: Sequence[Any],
        split: Split = "characters",
        unknown: str | None = None,
        most: int = MOST_SYMBOLS,
    ) -> "Symbols":
        """The symbols that occur in data, in the order of their code points.

        values: strings, lists of symbols, and Paths of text files in UTF-8: one item a line, or
        FASTA by its ending (.fasta, .fa, .faa, .fna), either of them packed too (.gz). A string is
        content, never the name of a file. most: keep only so many, the most frequent; the rest is
        unknown, so `unknown` must be given. Raises ZipperError for data without symbols, with too
        many, or that is not as `split` cuts it, and for files that cannot be read.
        """
        cutter, counted = cls(("C",), split), Counter[str]()
        for value in values:
            for item in _items(value, split):
                counted.update(cutter.cut(item))
                if len(counted) > 10 * MOST_SYMBOLS:
                    raise ZipperError(
                        f"This data has more than {10 * MOST_SYMBOLS:,} different symbols, cut "
                        f"into {split}. Cut it into smaller pieces."
                    )
        if not counted:
            raise ZipperError("There is no symbol in this data. Give strings, or Paths of files.")
        if most < 1 or (len(counted) > most and unknown is None):
            raise ZipperError(
                f"This data has {len(counted)} different symbols; {most} may be kept. Keep more "
                "(most=...), or say how the others are written, e.g. unknown='?'."
            )
        kept = sorted(counted, key=lambda symbol: (-counted[symbol], symbol))[:most]
        return cls(sorted(kept), split, unknown)

    @property
    def fingerprint(self) -> str:
        """sha256 of the symbols in their order, how strings are cut, and what is unknown."""
        described = json.dumps([self.name, self.split, self.unknown, *self.symbols])
        return hashlib.sha256(described.encode()).hexdigest()

    def cut(self, raw: Any) -> list[str]:
        """The symbols of a string, known or not; a list is cut already. Raises ZipperError for
        anything else."""
        if not isinstance(raw, str):
            return [*_symbols(raw)]
        if self.split == "words":
            return raw.split()
        return [*raw] if self.split == "characters" else [one[0] for one in SMILES.finditer(raw)]

    def encode(self, raw: Any) -> list[int]:
        """Ids of a string, or of a list of symbols. Raises ZipperError naming what is no symbol,
        unless there is an `unknown`."""
        return self.noted(raw)[0]

    def noted(self, raw: Any) -> tuple[list[int], str]:
        """Ids, and which symbols of it were unknown."""
        pieces = self.cut(short(raw) if isinstance(raw, str) else raw)
        strange = _named(piece for piece in pieces if piece not in self._ids)
        if self.unknown_id is None and strange:
            raise ZipperError(
                f"{self._shortly(pieces)} holds {strange}, not among the {len(self.symbols)} "
                f"symbols of this alphabet ({_named(self.symbols, 8)}). Leave that out, or make "
                "the alphabet with a string for what is unknown, e.g. unknown='?'."
            )
        ids = [self._ids.get(piece, self.unknown_id) for piece in pieces]
        return [one for one in ids if one is not None], strange and f"unknown: {strange}"

    def decode(self, ids: Sequence[int]) -> str:
        """A string, words with one space between them; ids that stand for no symbol are passed
        over."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The string while its ids are made, symbol by symbol, with the space before it."""
        before = ""
        for one in ids:
            if one in self._written:
                yield before + self._written[one]
                before = " " * (self.split == "words")

    def read(self, value: Any, folder: Path = Path()) -> Any:
        """A string of symbols or a list of them; a path is not opened, nor is a string that looks
        like one. Raises ZipperError for anything else."""
        if not isinstance(value, str):
            _symbols(value)
        return value

    def told(self, raw: Any) -> str:
        """As a string."""
        return raw if isinstance(raw, str) else self._joined(self.cut(raw))

    def html(self, raw: Any) -> str:
        """The string, in letters of one width."""
        return f"<code>{escape(self.told(raw))}</code>"

    def about(self) -> Mapping[str, Any]:
        """How many symbols, how strings are cut, and what is unknown."""
        found = {"symbols": len(self.symbols), "cut into": self.split}
        return found if self.unknown is None else {**found, "unknown is written": self.unknown}

    def scores(self, wanted: Sequence[Any], made: Sequence[Any]) -> Scores:
        """exact: 1 where all symbols are the same. errors: the fewest symbols put in, left out and
        exchanged (Levenshtein 1966), by the number of symbols wanted."""
        pairs = [(self.cut(a), self.cut(b)) for a, b in zip(wanted, made, strict=True)]
        return {
            "exact": [(float(a == b), 1.0) for a, b in pairs],
            "errors": [(float(edits(a, b)), float(len(a))) for a, b in pairs],
        }

    @classmethod
    def example(cls, folder: Path) -> str:
        """Chess openings, their names and first moves, as a manifest.jsonl with the fields text and
        moves: for split="words"."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [as_json({"text": name, "moves": moves}) for name, moves in _OPENINGS.items()]
        write(folder / "manifest.jsonl", "".join(f"{row}\n" for row in rows).encode())
        return "--field moves --set split=words"

    def save(self, folder: str | Path) -> None:
        """Writes symbols.json."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = _Definition(self.symbols, self.split, self.unknown, self.fingerprint)
        write_json(folder / self.FILE, asdict(described))

    @classmethod
    def load(cls, folder: str | Path) -> "Symbols":
        """Reads what `save` wrote. Raises ZipperError for anything else, and for a definition that
        was changed since."""
        path = place(folder) / cls.FILE
        described = parse(_Definition, read_json(path, MOST_BYTES), str(path))
        try:
            loaded = cls(described.symbols, described.split, described.unknown)
        except ZipperError as error:
            raise ZipperError(f"{path} defines no symbols: {error}") from error
        if loaded.fingerprint != described.sha256:
            raise ZipperError(
                f"{path} was changed since it was saved: ids would mean other symbols. Restore it "
                "from the run that made it, or make the symbols anew."
            )
        return loaded

    def _check(self) -> None:
        """Raises a ZipperError for a definition that is none."""
        symbols, more = self.symbols, [] if self.unknown is None else [self.unknown]
        if not symbols or len(symbols) > MOST_SYMBOLS:
            raise ZipperError(
                f"{len(symbols)} symbols were given. Give at least 1 and at most {MOST_SYMBOLS:,}."
            )
        if wrong := [one for one in [*symbols, *more] if not isinstance(one, str) or not one]:
            raise ZipperError(f"{wrong[0]!r:.80} is no symbol. Give strings that are not empty.")
        if sum(map(len, [*symbols, *more])) > MOST_CHARACTERS:
            raise ZipperError(
                f"These symbols have more than {MOST_CHARACTERS:,} characters together. Give fewer "
                "or shorter ones."
            )
        if len(set(symbols)) < len(symbols):
            twice = _named(one for one, times in Counter(symbols).items() if times > 1)
            raise ZipperError(f"{twice}: given more than once. Give every symbol once.")
        if cut := [one for one in [*symbols, *more] if self.cut(one) != [one]]:
            raise ZipperError(
                f"{_named(cut)}: not one symbol where strings are cut into {self.split}. Give "
                "symbols that are one piece each, or another split."
            )

    def _joined(self, pieces: Sequence[str]) -> str:
        return (" " if self.split == "words" else "").join(pieces)

    def _shortly(self, pieces: Sequence[str]) -> str:
        return _short(self._joined([piece[:SHOWN] for piece in pieces[:SHOWN]]))


def edits(wanted: Sequence[str], made: Sequence[str]) -> int:
    """The fewest symbols put in, left out and exchanged that make one of the other (Levenshtein
    1966). Takes time for every pair of symbols: a second for 15,000 by 15,000."""
    if len(wanted) < len(made):  # a row for each symbol of the shorter
        wanted, made = made, wanted
    numbers = {symbol: number for number, symbol in enumerate({*wanted, *made})}
    longer = np.array([numbers[symbol] for symbol in wanted], np.int32)
    along = np.arange(len(wanted) + 1)
    row = along.copy()
    for count, symbol in enumerate(made, start=1):
        fresh = np.concatenate([[count], row[:-1] + (longer != numbers[symbol])])
        np.minimum(fresh, row + 1, out=fresh)
        # The best way along the row: from any place before, at one for each step.
        row = np.minimum.accumulate(fresh - along) + along
    return int(row[-1])


def _symbols(value: Any) -> Sequence[str]:
    """A list of symbols."""
    if isinstance(value, Path):
        raise ZipperError(
            f"The path {str(value)!r:.200} was given, and strings are content here: nothing is "
            "opened. Give what is in the file."
        )
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ZipperError(f"{value!r:.200} was given; give {Symbols.takes}.")
    return value


def _items(value: Any, split: str) -> Iterator[str | Sequence[str]]:
    """What there is in one value to fit on."""
    if isinstance(value, Path):
        yield from _lines(place(value), split)
    elif isinstance(value, str):
        yield _plain(value, split, "")
    else:
        yield _symbols(value)


def _lines(path: Path, split: str) -> Iterator[str]:
    """The items of a text file; of FASTA the lines of its sequences."""
    packed = path.suffix.lower() == ".gz"
    fasta = (path.with_suffix("") if packed else path).suffix.lower() in FASTA
    if fasta and split != "characters":
        raise ZipperError(f"{path} is FASTA, which is cut into characters; not into {split}.")
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            every = chain.from_iterable(part.splitlines() for part in _bounded(file, path))
            for number, line in enumerate(every, start=1):
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if fasta and line.startswith((b">", b";")):
                    continue
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ZipperError(
                        f"{path}, line {number} is no text in UTF-8: {error}. Give a text file."
                    ) from error
                yield _plain(text, split, f"{path}, line {number}: ")
    except (OSError, EOFError, zlib.error) as error:
        raise ZipperError(
            f"{path} cannot be read: {error}. Give a text file, or a .gz of one."
        ) from error


def _bounded(file: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    """The lines of a file, none too long for the memory."""
    while line := file.readline(MOST_LINE + 1):
        if len(line) > MOST_LINE:
            raise ZipperError(
                f"{path} has a line of more than {MOST_LINE:,} bytes. Give one item a line."
            )
        yield line


def _plain(text: str, split: str, where: str) -> str:
    """A string to fit on; for SMILES only if it is one, since each foreign character would become
    a symbol."""
    if split != "smiles":
        return text
    text = text.strip()
    if strange := _named(one[0] for one in SMILES.finditer(text) if one["none"] is not None):
        raise ZipperError(
            f"{where}{_short(text)} is no SMILES: it holds {strange}. Give the molecule alone."
        )
    return text


def _named(symbols: Iterable[str], most: int = NAMED) -> str:
    """Symbols for a message, each once, in their order."""
    found = [*dict.fromkeys(symbols)]
    rest = [f"{len(found) - most} more"] if len(found) > most else []
    return ", ".join([*map(_short, found[:most]), *rest])


def _short(text: str) -> str:
    return ascii(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
