"""Molecules: a description in sentences, and the molecule as a SMILES line.

The public original is ChEBI-20 as GitHub blender-nlp/MolT5 has it, commit 754f9bf (Edwards et al.
2021; descriptions: ChEBI, CC BY 4.0): tables of CID, SMILES and description, train.txt,
validation.txt and test.txt, of which any will do. Knows no model.
"""

import contextlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.symbols import SMILES
from zipper_lab.corpora.originals import original, part, writable

HOME = "https://github.com/blender-nlp/MolT5, its folder ChEBI-20_data"
FOLDERS = ("chebi20", "ChEBI-20*")
TABLES = ("train.txt", "validation.txt", "test.txt")
COLUMNS = ["CID", "SMILES", "description"]
MOST_SYMBOLS = 96
MOST_LETTERS = 240  # of a description: whole sentences up to that
SHARES = {"test": 0.12, "dev": 0.06}
COMMON = 0.01  # of all molecules: a scaffold of more of them is trained on
SPELLINGS = 4  # of a molecule that stands alone


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests of pairs by scaffold: train.jsonl, dev.jsonl, test.jsonl, unpaired.jsonl and
    texts.jsonl.

    Rows hold "text" (the description in small letters, whole sentences up to MOST_LETTERS) and
    "molecule" (RDKit's canonical SMILES, at most MOST_SYMBOLS symbols). Molecules of one Murcko
    scaffold are in one part, those without rings each for itself; common scaffolds are trained on.
    unpaired.jsonl: the molecules of train.jsonl, each as it is and in SPELLINGS other spellings.
    data: the folder that holds the tables, or a folder with them. Raises ZipperError if there is
    none, MissingExtra without rdkit.
    """
    found = dict[str, dict[str, Any]]()
    for row in _pairs(_tables(data)):
        found.setdefault(row["molecule"], row)
    if not found:
        raise ZipperError(
            f"The tables in {data} hold no molecule of at most {MOST_SYMBOLS} symbols with a "
            f"sentence of at most {MOST_LETTERS} letters. Take them from {HOME}."
        )
    scaffolds = {smiles: _scaffold(smiles) for smiles in found}
    sizes = Counter(scaffolds.values())
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for smiles, row in found.items():
        common = sizes[scaffolds[smiles]] > max(1, COMMON * len(found))
        owner = "train" if common else part(f"{seed} {scaffolds[smiles]}", SHARES)
        rows[owner].append(row)
    alone = []
    for row in rows["train"]:
        spelled = {row["molecule"]: 0, **dict.fromkeys(_spellings(row["molecule"], seed))}
        alone += [{"id": f"{row['id']}-{n}", "molecule": text} for n, text in enumerate(spelled)]
    known = [row["text"] for row in rows["train"]]
    for owner, some in rows.items():
        manifests.write(folder / f"{owner}.jsonl", writable(some, known))
    manifests.write(folder / "unpaired.jsonl", alone)
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in known])


def canonical(smiles: str) -> str:
    """RDKit's canonical spelling of a molecule; "" for a line that is none."""
    chemistry, log = extra("rdkit.Chem"), extra("rdkit.RDLogger")
    log.DisableLog("rdApp.*")
    # By place: what a made line can do to a parser has no end.
    with contextlib.suppress(Exception):
        molecule = chemistry.MolFromSmiles(smiles) if smiles else None
        return str(chemistry.MolToSmiles(molecule)) if molecule is not None else ""
    return ""


def symbols(smiles: str) -> list[str]:
    """The symbols of a SMILES line: atoms, bonds, brackets, rings."""
    return [found[0] for found in SMILES.finditer(smiles)]


def _tables(data: Path) -> list[Path]:
    here = any((data / name).is_file() for name in TABLES)
    place = data if here else original(data, FOLDERS, HOME)
    tables = [place / name for name in TABLES if (place / name).is_file()]
    if not tables:
        raise ZipperError(
            f"{place} holds none of {', '.join(TABLES)}. The public original: {HOME}."
        )
    return tables


def _pairs(tables: list[Path]) -> Iterator[dict[str, Any]]:
    """What is short enough and RDKit can read."""
    for table in tables:
        lines = table.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0].split("\t") != COLUMNS:
            raise ZipperError(
                f"{table} begins with {lines[0] if lines else ''!r:.100}; its columns must be "
                f"{', '.join(COLUMNS)}. Take it from {HOME} again."
            )
        for line in lines[1:]:
            number, smiles, said = line.split("\t")
            # The tables double every backslash.
            spelled, told = canonical(smiles.replace("\\\\", "\\")), _short(said)
            if spelled and told and len(symbols(spelled)) <= MOST_SYMBOLS:
                yield {"id": number, "text": told, "molecule": spelled}


def _short(said: str) -> str:
    """Whole sentences, in small ASCII letters; "" where the first one is too long."""
    told = ""
    for sentence in re.split(r"(?<=\.) (?=[A-Z])", said.strip().strip('"')):
        if len(told) + 1 + len(sentence) > MOST_LETTERS:
            break
        told = f"{told} {sentence}".strip()
    return told.lower().encode("ascii", "ignore").decode()


def _scaffold(smiles: str) -> str:
    murcko = extra("rdkit.Chem.Scaffolds.MurckoScaffold")
    return str(murcko.MurckoScaffoldSmiles(smiles=smiles)) or smiles


def _spellings(smiles: str, seed: int) -> list[str]:
    """Other lines for the same molecule, each begun at an atom that chance takes."""
    chemistry = extra("rdkit.Chem")
    molecule, chance = chemistry.MolFromSmiles(smiles), random.Random(f"{seed} {smiles}")
    starts = [chance.randrange(molecule.GetNumAtoms()) for _ in range(SPELLINGS)]
    lines = [
        str(chemistry.MolToSmiles(molecule, rootedAtAtom=start, canonical=True)) for start in starts
    ]
    return [line for line in lines if len(symbols(line)) <= MOST_SYMBOLS]
