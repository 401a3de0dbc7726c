"""Symbols: what is encoded comes back, what is unknown is named, and a saved alphabet is that one or
refused."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

from zipper import Pipeline, Segment, modality
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality import symbols
from zipper.modality.kind import Kind, Modality
from zipper.modality.symbols import SMILES, Symbols, edits
from zipper.model import Zipper
from zipper.testing import tiny_tower

# Of textbooks: caffeine, alanine, a salt, a complex with a ring of two digits and a radioisotope.
MOLECULES = [
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C[C@H](N)C(=O)O",
    "[Na+].[Cl-]",
    "BrC1=CC=C(C=C1)/C=C/Cl",
    "[99Tc]C%12CCCCC%12",
]

alphabets = st.lists(st.characters(codec="utf-8"), min_size=1, max_size=20, unique=True)
words = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Z", "Cc"]), min_size=1, max_size=6),
    min_size=1,
    max_size=12,
    unique=True,
).filter(lambda found: all(word.split() == [word] for word in found))


# --- the mapping


def test_ids_are_symbols_in_their_order_then_begin_and_end() -> None:
    dna = Symbols.dna()
    assert isinstance(dna, Modality) and isinstance(dna, Kind)
    assert dna.encode("GATTACA") == [2, 0, 3, 3, 0, 1, 0]
    assert (dna.begin, dna.end, dna.vocabulary, dna.unknown_id) == (5, 6, 7, None)
    assert dna.decode([5, 2, 0, 3, 6, -1, 7, 99]) == "GAT"
    assert dna.encode("") == [] and dna.decode([]) == ""
    assert set("MKWVTFISLLFLFSSAYS") <= set(Symbols.protein().symbols)


@given(alphabets, st.data())
def test_characters_come_back(alphabet: list[str], data: st.DataObject) -> None:
    symbols = Symbols(alphabet)
    raw = data.draw(st.text(st.sampled_from(alphabet)))
    ids = symbols.encode(raw)
    assert symbols.decode(ids) == raw and len(ids) == len(raw)
    assert symbols.encode([*raw]) == ids
    assert "".join(symbols.stream(ids)) == raw


@given(words, st.data())
def test_words_come_back_with_one_space_between_them(
    alphabet: list[str], data: st.DataObject
) -> None:
    symbols = Symbols(alphabet, split="words")
    said = data.draw(st.lists(st.sampled_from(alphabet)))
    spaced = "".join(data.draw(st.sampled_from([" ", "\n\t ", "  "])) + word for word in said)
    assert symbols.decode(symbols.encode(spaced)) == " ".join(said)
    assert symbols.encode(said) == symbols.encode(spaced)
    assert "".join(symbols.stream(symbols.encode(said))) == " ".join(said)


@given(st.lists(st.sampled_from(Symbols.fitted(MOLECULES, split="smiles").symbols)))
def test_smiles_come_back(atoms: list[str]) -> None:
    """However atoms follow each other: B and r are then the bromine that they spell."""
    symbols, raw = Symbols.fitted([*MOLECULES, "Bc"], split="smiles"), "".join(atoms)
    assert symbols.decode(symbols.encode(raw)) == raw


def test_smiles_are_cut_atom_by_atom() -> None:
    symbols = Symbols.fitted(MOLECULES, split="smiles")
    assert symbols.cut("[99Tc]C%12CCl") == ["[99Tc]", "C", "%12", "C", "Cl"]
    assert symbols.cut("C[C@H](N)C(=O)O") == "C [C@H] ( N ) C ( = O ) O".split()
    assert all(symbols.decode(symbols.encode(one)) == one for one in MOLECULES)
    with pytest.raises(ZipperError, match=r"'\[Fe\+2\]', not among the"):
        symbols.encode("[Fe+2]")
    assert not any(found["none"] for found in SMILES.finditer("".join(MOLECULES)))


@given(alphabets, st.text(), st.sampled_from("?\N{REPLACEMENT CHARACTER}X"))
def test_with_a_string_for_what_is_unknown_only_that_is_lost(
    alphabet: list[str], raw: str, unknown: str
) -> None:
    symbols = Symbols(alphabet, unknown=unknown)
    ids = symbols.encode(raw)
    made = symbols.decode(ids)
    assert made == "".join(c if c in alphabet else unknown for c in raw)
    assert symbols.encode(made) == ids and all(0 <= one < symbols.vocabulary for one in ids)
    assert (symbols.vocabulary == len(alphabet) + 2) == (unknown in alphabet)


def test_unknown_symbols_are_all_named_once_and_shortly() -> None:
    with pytest.raises(ZipperError, match=r"holds 'x', 'y', not among .* unknown='\?'"):
        Symbols.dna().encode("GxxATyxTACA")
    with pytest.raises(ZipperError) as caught:
        Symbols(["a"], split="words").encode([f"{number}" * 1000 for number in range(200)])
    assert "180 more" in str(caught.value) and len(str(caught.value)) < 3000
    assert Symbols.dna(unknown="N").noted("Gx") == ([2, 4], "unknown: 'x'")
    assert Symbols.dna(unknown="?").encode("x") == [7]
    assert Symbols.dna().noted("G") == ([2], "")


@pytest.mark.parametrize(
    ("symbols", "split", "wrong"),
    [
        ([], "characters", "0 symbols"),
        (["a", ""], "characters", "not empty"),
        (["a", "b", "a"], "characters", "'a': given more than once"),
        (["ab"], "characters", "'ab': not one symbol"),
        (["a b"], "words", "'a b': not one symbol"),
        ([" "], "words", "not one symbol"),
        (["CC"], "smiles", "not one symbol"),
        ("abc", "words", "one string"),
        ([str(number) for number in range(100_001)], "words", "at most 100,000"),
        (["a" * 500_001], "words", "more than 500,000 characters"),
    ],
)
def test_an_alphabet_that_is_none_is_refused(symbols: Any, split: Any, wrong: str) -> None:
    with pytest.raises(ZipperError, match=wrong):
        Symbols(symbols, split)
    with pytest.raises(ZipperError, match="not one symbol"):
        Symbols(["a"], unknown="??")


# --- reading and showing


@pytest.mark.parametrize("value", [3, None, 1.5, {"path": "x"}, b"ACG", ["A", 3], Path("x.fa")])
def test_what_is_no_string_is_refused(value: Any) -> None:
    dna = Symbols.dna()
    for use in (dna.read, dna.encode):
        with pytest.raises(ZipperError, match=r"was given"):
            use(value)


def test_a_string_is_content_even_where_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("CAT").write_text("GGG")
    dna = Symbols.dna()
    assert dna.encode(dna.read("CAT", tmp_path)) == dna.encode("CAT")
    assert dna.files("CAT") == []
    assert Symbols.fitted(["CAT"]).symbols == ("A", "C", "T")
    assert Symbols.fitted([Path("CAT")]).symbols == ("G",)


def test_it_is_told_and_shown_as_a_string() -> None:
    moves = Symbols(["e4", "<b>"], split="words", unknown="?")
    assert moves.told(["e4", "<b>"]) == "e4 <b>" == moves.told("e4 <b>")
    assert moves.html(["<b>"]) == "<code>&lt;b&gt;</code>"
    assert moves.about() == {"symbols": 2, "cut into": "words", "unknown is written": "?"}


def levenshtein(a: str, b: str) -> int:
    """By its definition."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[0], table[:, 0] = range(len(b) + 1), range(len(a) + 1)
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = min(
            table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j])
        )
    return int(table[-1, -1])


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
@example("kitten", "sitting")
def test_errors_are_the_fewest_edits(a: str, b: str) -> None:
    assert edits(a, b) == levenshtein(a, b) == edits(b, a)


def test_scores_count_symbols() -> None:
    moves = Symbols(["e4", "e5", "Nf3"], split="words")
    found = moves.scores(["e4 e5 Nf3", "e4", "e4"], [["e4", "e5"], "e4  ", "d4 e4"])
    assert found == {
        "exact": [(0.0, 1.0), (1.0, 1.0), (0.0, 1.0)],
        "errors": [(1.0, 3.0), (0.0, 1.0), (1.0, 1.0)],
    }


# --- fitting


def test_symbols_are_found_in_strings_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfba\r\n\r\ncd\n")
    (tmp_path / "b.fasta").write_text("\ufeff>sp|X1 a protein\nMKV\nLA\n>other\nMM*\n")
    with gzip.open(tmp_path / "c.FA.gz", "wt") as file:
        file.write(">zzz\nWY\n")
    assert Symbols.fitted([tmp_path / "a.txt"]).symbols == tuple("abcd")
    files = [tmp_path / "b.fasta", tmp_path / "c.FA.gz"]
    assert Symbols.fitted(files).symbols == tuple("*AKLMVWY")
    assert Symbols.fitted(["b a", ["c", "a"]], split="words").symbols == ("a", "b", "c")
    with pytest.raises(ZipperError, match="FASTA, which is cut into characters"):
        Symbols.fitted(files, split="words")


@pytest.mark.parametrize("ending", ["fasta", "fa", "faa", "fna", "FNA"])
def test_names_and_remarks_of_fasta_are_no_symbols(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").write_text(">xyz\n;remark\nAC\nGT\n")
    assert Symbols.fitted([tmp_path / f"a.{ending}"]).symbols == tuple("ACGT")


def test_the_letters_of_proteins_and_dna_are_those_of_their_ids() -> None:
    letters = "ACDEFGHIKLMNPQRSTVWYXBZUOJ"
    assert Symbols.protein().encode(letters) == [*range(26)]
    assert Symbols.dna().encode("ACGTN") == [*range(5)]


def test_data_that_no_memory_would_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbols, "MOST_LINE", 10)
    (tmp_path / "a.txt").write_text("abc\n" + "d" * 10 + "\n")
    with pytest.raises(ZipperError, match=r"a\.txt has a line of more than 10 bytes"):
        Symbols.fitted([tmp_path / "a.txt"])
    monkeypatch.setattr(symbols, "MOST_SYMBOLS", 3)
    with pytest.raises(ZipperError, match="more than 30 different symbols"):
        Symbols.fitted(["".join(map(chr, range(100, 131)))], unknown="?", most=3)


def test_the_rarest_are_left_out_if_asked_for() -> None:
    kept = Symbols.fitted(["aaabbc", "d"], unknown="?", most=2)
    assert kept.symbols == ("a", "b") and kept.decode(kept.encode("abcd")) == "ab??"
    with pytest.raises(ZipperError, match=r"4 different symbols; 2 may be kept.*unknown='\?'"):
        Symbols.fitted(["aaabbc", "d"], most=2)
    for most in (0, -1):
        with pytest.raises(ZipperError, match="may be kept"):
            Symbols.fitted(["a"], unknown="?", most=most)


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(random.Random(0).randbytes(1000))
    (tmp_path / "no.gz").write_bytes(b"plain text")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"ACGT" * 10_000)[:-20])
    (tmp_path / "empty.fa").write_text(">only a name\n")
    (tmp_path / "names.smi").write_text("CCO ethanol\n")
    for name, wrong in {
        "binary.txt": "line 1 is no text in UTF-8",
        "no.gz": "cannot be read: Not a gzip",
        "cut.gz": "cannot be read",
        "empty.fa": "no symbol in this data",
        "missing.txt": "cannot be read",
        ".": "cannot be read",
    }.items():
        with pytest.raises(ZipperError, match=wrong):
            Symbols.fitted([tmp_path / name])
    with pytest.raises(ZipperError, match=r"line 1: .* is no SMILES: it holds ' ', 'e', 't', 'h'"):
        Symbols.fitted([tmp_path / "names.smi"], split="smiles")
    with pytest.raises(ZipperError, match="There is no symbol"):
        Symbols.fitted([])


def test_the_example_is_fitted_and_comes_back(tmp_path: Path) -> None:
    Symbols.example(tmp_path / "chess")
    lines = (tmp_path / "chess" / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    moves = Symbols.fitted([row["moves"] for row in rows], split="words")
    assert len(rows) >= 12 and {"e4", "e5", "Nf3"} <= set(moves.symbols)
    for row in rows:
        assert row["text"] and moves.decode(moves.encode(moves.read(row["moves"]))) == row["moves"]


# --- saved


def test_the_fingerprint_is_of_all_that_changes_ids() -> None:
    found = [
        Symbols("ab"),
        Symbols("ba"),
        Symbols("abc"),
        Symbols(["a", "b"], split="words"),
        Symbols("ab", unknown="?"),
        Symbols("ab", unknown="a"),
        Symbols(["ab"], split="words"),
        Symbols(['a", "b'.replace(" ", "")], split="words"),
    ]
    assert len({one.fingerprint for one in found}) == len(found)
    assert Symbols("ab").fingerprint == Symbols(["a", "b"]).fingerprint


@given(alphabets, st.none() | st.sampled_from("?\x00\U0001f600"))
def test_a_saved_one_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, alphabet: list[str], unknown: str | None
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    symbols = Symbols(alphabet, unknown=unknown)
    modality.save(symbols, folder)
    again = modality.load(folder)
    assert isinstance(again, Symbols) and again.fingerprint == symbols.fingerprint
    assert again.symbols == symbols.symbols and again.vocabulary == symbols.vocabulary


def test_the_largest_alphabet_is_not_too_large_to_be_read(tmp_path: Path) -> None:
    """All characters as escapes, which half a character in one of them makes of all."""
    wide = [f"\u4e00{number:05}" for number in range(10_000)]
    wide += ["\ud800" * (symbols.MOST_CHARACTERS - sum(map(len, wide)))]
    Symbols(wide, split="words").save(tmp_path)
    spent = (tmp_path / Symbols.FILE).stat().st_size
    assert spent + symbols.MOST_SYMBOLS * len('  "",\n') < symbols.MOST_BYTES


HOSTILE: list[tuple[str, Any]] = [
    ("symbols", []),
    ("symbols", ["a", "a"]),
    ("symbols", ["a", ""]),
    ("symbols", ["a", 3]),
    ("symbols", ["a", None]),
    ("symbols", "ab"),
    ("symbols", {"a": 1}),
    ("symbols", None),
    ("symbols", ["a", "cd"]),
    ("symbols", ["b", "a"]),
    ("symbols", [chr(number) for number in range(100, 161)]),
    ("symbols", ["a" * 1_000_000]),
    ("split", "lines"),
    ("split", None),
    ("split", "words"),
    ("unknown", 3),
    ("unknown", ""),
    ("unknown", "?"),
    ("unknown", "xy"),
    ("sha256", "0" * 64),
    ("sha256", None),
    ("colour", "red"),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_hostile_definition_is_refused(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbols, "MOST_SYMBOLS", 60)
    Symbols("ab").save(tmp_path)
    path = tmp_path / Symbols.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ZipperError, match=r"symbols\.json") as caught:
        Symbols.load(tmp_path)
    assert len(str(caught.value)) < 2_000


def test_too_many_symbols_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / Symbols.FILE).open("wb") as file:
        file.write(b'{"symbols": [')
        file.write(b'"a",' * 10_000_000)
    with pytest.raises(ZipperError, match="more than 8388608 bytes"):
        Symbols.load(tmp_path)


def test_an_empty_folder_holds_none(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="not readable JSON"):
        Symbols.load(tmp_path)


def test_a_zip_with_symbols_is_saved_loaded_and_runs(tmp_path: Path) -> None:
    modalities: dict[str, Any] = {"text": tiny.text(), "dna": Symbols.dna()}
    towers = {
        name: tiny_tower("llama", vocabulary=each.vocabulary) for name, each in modalities.items()
    }
    ends = {name: (each.begin, each.end) for name, each in modalities.items()}
    zipped = Zipper.from_towers(towers, train=("dna",), ends=ends, link=LinkConfig(head_width=16))
    pipe = Pipeline(zipped, modalities)
    pipe.save_pretrained(tmp_path / "zip", include=["text"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    assert isinstance(again.modalities["dna"], Symbols)
    asked, limits = [Segment("text", tiny.text().encode("red lamp"))], {"dna": 6}
    made = again.run(asked, ["dna"], limits=limits)
    assert made == pipe.run(asked, ["dna"], limits=limits)
    ids = made[0].content
    assert len(again.modalities["dna"].decode(ids)) <= 6


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_may_end_as_any_machine_has_them(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "plain.txt").write_bytes(b"ACGT" + end + b"AC" + end)
    (tmp_path / "one.fasta").write_bytes(b">name" + end + b"ACGT" + end)
    for name in ("plain.txt", "one.fasta"):
        assert {*Symbols.fitted([tmp_path / name]).symbols} == {*"ACGT"}
