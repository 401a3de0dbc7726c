"""Proteins: what each is and of whom, in words, and its residues.

The public original is DB.fasta.gz of Debian's package mmseqs2-examples, 14-7e284: 20,000 records of
UniProtKB (CC BY 4.0), of which any FASTA will do. Knows no model.
"""

import gzip
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper_lab.corpora.originals import original, part, writable

HOME = "https://packages.debian.org/mmseqs2-examples, its DB.fasta.gz, or a FASTA of uniprot.org"
FILES = ("uniprot*.fasta", "uniprot*.fasta.gz", "DB.fasta", "DB.fasta.gz")
LEAST, MOST = 20, 256  # residues; in fewer no kinship is seen
SHARES = {"test": 0.12, "dev": 0.06}
KNOWN = {"known": 0.08}  # of those that have kin where they are trained on
WORD = 5  # residues of the words by which kin are known
SHARED = 4  # so many words in common make kin
COMMON = 0.02  # of all proteins: a cluster of more of them is trained on

_HEAD = re.compile(r">(?:\w+\|)?([^\s|]+)\S* (.+?) OS=(.+?)(?= \w+=|$)")
_RESIDUES = re.compile(r"[A-Z]+")
_NAMELESS = re.compile(r"uncharacteri[sz]ed|hypothetical|predicted protein|genomic|whole genome")
_ASIDE = re.compile(r" \([^()]*\)(?= |$)")
_TAG = re.compile(r"(?!upf|duf)\S*(_\S*\d|(?<![(\d])\d{4})\S*")  # of a gene; UPF0147 is a family
_PLAIN = re.compile(r"[a-z'-]+")
_DOUBTS = ("putative", "probable", "possible")
_OPEN = ("of", "type", "serovar", "serotype")


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests of pairs by homology: train.jsonl, dev.jsonl, test.jsonl, known.jsonl,
    unpaired.jsonl and texts.jsonl.

    Rows hold "text", of "name" and "species" in small letters, and "protein" (LEAST to MOST
    residues), each protein once. All of a cluster are in one part (see `clusters`); common clusters
    are trained on. known.jsonl: proteins that were held back and have kin in train.jsonl.
    unpaired.jsonl: the proteins of train.jsonl, and those without a name of the same clusters or
    others that are trained on. texts.jsonl: the texts of train.jsonl and of longer proteins, none
    of a held-out row. data: the folder that holds the FASTA. Raises ZipperError if there is none or
    it is damaged, MissingExtra without scipy.
    """
    path = original(data, FILES, HOME)
    read = sorted(_rows(path), key=lambda row: not row["text"])  # of twins the one with a name
    found = dict[str, dict[str, Any]]()
    for row in read:
        if LEAST <= len(row["protein"]) <= MOST:
            found.setdefault(row["protein"], row)
    if not found:
        raise ZipperError(
            f"{path} holds no protein of {LEAST} to {MOST} residues. The public original: {HOME}."
        )
    rows = defaultdict[str, list[dict[str, Any]]](list)
    for owner, row in zip(_owners([*found.values()], seed), found.values(), strict=True):
        rows[owner].append(row)
    alone = [{"id": row["id"], "protein": row["protein"]} for row in rows["train"]]
    manifests.write(folder / "unpaired.jsonl", alone)
    parts = ("train", "dev", "test", "known")
    named = {owner: [row for row in rows[owner] if row["text"]] for owner in parts}
    held = {row["text"] for row in chain(named["dev"], named["test"], named["known"])}
    longer = [row for row in read if len(row["protein"]) > MOST and row["text"]]
    told = dict.fromkeys(row["text"] for row in named["train"] + longer)
    texts = [text for text in told if text not in held]
    for owner, some in named.items():
        manifests.write(folder / f"{owner}.jsonl", writable(some, texts))
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in texts])


def clusters(proteins: Sequence[str]) -> list[int]:
    """A number for each protein: the same for kin, and for the kin of kin.

    Two are kin if they share SHARED words of WORD residues: by 3, two of three proteins are kin of
    kin; by 4, the largest cluster has 7 % of them (docs/log.md).
    """
    sparse = extra("scipy.sparse")
    words = [_words(protein) for protein in proteins]
    known = {word: n for n, word in enumerate(dict.fromkeys(chain.from_iterable(words)))}
    places = [known[word] for word in chain.from_iterable(words)]
    ends = np.cumsum([0, *map(len, words)])
    shape = (len(words), len(known))
    holds = sparse.csr_array((np.ones(len(places), np.int32), places, ends), shape)
    shared = (holds @ holds.T).tocoo()
    near = shared.data >= SHARED
    kin = sparse.coo_array((near[near], (shared.row[near], shared.col[near])), shared.shape)
    _, labels = extra("scipy.sparse.csgraph").connected_components(kin, directed=False)
    return [int(label) for label in labels]


def name(said: str) -> str:
    """The name of a protein in small letters, without notes, doubts and numbers of genes; "" for
    one that says only that nobody knows."""
    told = said.lower().encode("ascii", "ignore").decode()
    words = [word for word in _ASIDE.sub("", told).split() if not _TAG.fullmatch(word)]
    while words and words[0] in _DOUBTS:
        words.pop(0)
    nameless = _NAMELESS.search(told) or words in ([], ["protein"])
    return "" if nameless else " ".join(words).rstrip(",")


def species(said: str) -> str:
    """Of whom a protein is, in small letters, without strains: two words and what plain words
    follow."""
    words = said.encode("ascii", "ignore").decode().partition(" (")[0].split()
    kept = [*words[:2], *takewhile(_PLAIN.fullmatch, words[2:])]
    while kept and kept[-1] in _OPEN:
        kept.pop()
    return " ".join(kept).lower()


def _owners(rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """The part of each row. The first of every cluster, with a name if any has one, stays with it
    where it is trained on."""
    labels = clusters([row["protein"] for row in rows])
    sizes, first = Counter(labels), dict[int, tuple[bool, str]]()
    for label, row in zip(labels, rows, strict=True):
        place = not row["text"], row["id"]
        first[label] = min(place, first.get(label, place))
    owners = []
    for label, row in zip(labels, rows, strict=True):
        common, (_, name) = sizes[label] > max(1, COMMON * len(rows)), first[label]
        owner = "train" if common else part(f"{seed} {name}", SHARES)
        if owner == "train" and row["text"] and row["id"] != name:
            owner = part(f"{seed} known {row['id']}", KNOWN)
        owners.append(owner)
    return owners


def _words(protein: str) -> list[str]:
    """The words that kin are known by, each once; none with a residue that nobody knows."""
    words = (protein[n : n + WORD] for n in range(len(protein) - WORD + 1))
    return [word for word in dict.fromkeys(words) if "X" not in word]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """All of a FASTA; the text is "" where the name is none."""
    for head, residues in _records(path):
        said = _HEAD.match(head)
        if not said or not _RESIDUES.fullmatch(residues):
            wrong = head if head and not said else residues
            raise ZipperError(
                f"{path} holds {wrong!r:.100}, no record of UniProtKB: '>sp|ID|NAME what OS=whose' "
                f"and residues in capitals under it. Take it from {HOME} again."
            )
        row = {"id": said[1], "name": name(said[2]), "species": species(said[3])}
        told = row["name"] and f"{row['name']} of {row['species']}"
        yield {**row, "text": told, "protein": residues}


def _records(path: Path) -> Iterator[tuple[str, str]]:
    """Head and residues of each record."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ZipperError(f"{path} is damaged ({error}). Take it from {HOME} again.") from error
    head, residues = "", list[str]()
    for line in chain(lines, [">"]):
        if line.startswith(">") and (head or residues):
            yield head, "".join(residues)
        if line.startswith(">"):
            head, residues = line, []
        elif line.strip():
            residues.append(line.strip())
