"""Text: nothing is lost between a string and its tokens, and what would be is named."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zipper import modality
from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.modality import text as text_module
from zipper.modality.text import Text

LINES = [
    "send forty two oranges to vienna",
    "set an alarm for seven fifty six on friday",
    "call anna on five five three",
] * 5
TEXT = Text.train(LINES, merges=40)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz' "))
def test_any_string_of_the_alphabet_comes_back(line: str) -> None:
    ids = TEXT.encode(line)
    assert TEXT.decode(ids) == line
    assert all(0 <= i < TEXT.vocabulary and i not in (TEXT.begin, TEXT.end) for i in ids)


def test_the_vocabulary_is_alphabet_merges_begin_and_end() -> None:
    assert TEXT.vocabulary == len("abcdefghijklmnopqrstuvwxyz' ") + 40 + 2
    assert len({TEXT.begin, TEXT.end}) == 2
    longer = Text.train([*LINES, "7 times 8"], merges=0)
    assert longer.vocabulary == len("abcdefghijklmnopqrstuvwxyz' 78") + 2
    # Without merges a token is a character.
    assert len(longer.encode("7 times 8")) == len("7 times 8")


def test_frequent_words_become_few_tokens() -> None:
    line = LINES[0]
    # A word and the space before it.
    assert len(Text.train(LINES, merges=200).encode(line)) == len(line.split())
    assert TEXT.decode([TEXT.begin, *TEXT.encode(line), TEXT.end]) == line


def test_training_is_the_same_twice_and_knows_what_it_was_trained_on() -> None:
    assert Text.train(LINES, merges=40).fingerprint == TEXT.fingerprint
    assert Text.train(LINES, merges=41).fingerprint != TEXT.fingerprint
    with pytest.raises(ZipperError, match="no lines"):
        Text.train([])


def test_capitals_and_tabs_are_read_as_plain_text() -> None:
    assert TEXT.encode("Send\tforty") == TEXT.encode("send forty")


def test_characters_that_would_be_lost_are_named() -> None:
    with pytest.raises(ZipperError, match=r"cannot write 4 ö in 'send 4 öpfel'. Spell it"):
        TEXT.encode("send 4 öpfel")


def test_punctuation_without_a_token_is_left_out_where_nobody_says_it() -> None:
    for raw, plain in {
        "“Call Anna!” -- she said; (twice): \u2018yes\u2019...": "call anna she said twice yes",
        "don\u2019t, boys\u2019 x": "don't boys x",
        "forty-two\u2014red\u2013blue": "forty two red blue",
        "¿qué?".replace("é", "e"): "que",
        "'tis anna's": "'tis anna's",  # what it can write stays
    }.items():
        ids, spelled = TEXT.spell(raw)
        assert TEXT.decode(ids) == plain == spelled.lower() and ids == TEXT.encode(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "3.5",
        "at 9:30",
        "send 7",
        "x-5",
        "ten %",
        "a & b",
        "a@b",
        "half / half",
        "5 €",
        "ü",
        "a+b",
        "#a",
    ],
)
def test_what_somebody_says_is_never_left_out(raw: str) -> None:
    with pytest.raises(ZipperError, match="cannot write"):
        TEXT.encode(raw)


def test_punctuation_with_a_token_stays() -> None:
    points = Text.train([*LINES, "call anna, please."], merges=5)
    assert points.decode(points.encode("call anna, please.")) == "call anna, please."
    assert points.decode(points.encode("call anna, please!")) == "call anna, please"


@pytest.mark.parametrize("raw", ["call \ud83d", "a\0b", "a\x07b", "\x9f"])
def test_what_is_no_text_is_refused_by_every_tokenizer(raw: str) -> None:
    with pytest.raises(ZipperError, match="which is no text"):
        TEXT.encode(raw)


def test_markup_in_a_string_never_becomes_a_special_token() -> None:
    with pytest.raises(ZipperError, match="cannot write / < >"):
        TEXT.encode("send </s>")
    angles = Text.train([*LINES, "a < / > b"], merges=5)
    ids = angles.encode("send </s>")
    assert angles.end not in ids
    assert angles.decode(ids) == "send </s>"


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    TEXT.save(tmp_path)
    for back in (Text.load(tmp_path), modality.load(tmp_path), Text.from_pretrained(tmp_path)):
        assert isinstance(back, Modality)
        assert back.fingerprint == TEXT.fingerprint
        assert (back.begin, back.end, back.vocabulary) == (TEXT.begin, TEXT.end, TEXT.vocabulary)
        assert back.encode(LINES[0]) == TEXT.encode(LINES[0])


def test_whatever_changes_ids_changes_the_fingerprint() -> None:
    ends = [("<s>", "</s>"), ("</s>", "<s>"), (None, "</s>")]
    made = [Text(TEXT.definition, *tokens) for tokens in ends]
    made.append(Text.train(["another"]))
    assert len({text.fingerprint for text in made}) == 4


def test_a_tokenizer_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TEXT.save(tmp_path)
    monkeypatch.setattr(text_module, "MOST_BYTES", 1_000)
    with pytest.raises(ZipperError, match=r"tokenizer\.json has more than 1000 bytes"):
        Text.load(tmp_path)


def test_a_tokenizer_that_pads_or_cuts_does_neither_here() -> None:
    tokenizer = Tokenizer.from_str(TEXT.definition)
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(2)
    assert Text(tokenizer.to_str(), "<s>", "</s>").encode("call anna") == TEXT.encode("call anna")


def test_the_unknown_token_of_a_unigram_is_never_written_in_silence() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0)]
    text = Text(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str(), None, "</s>")
    assert text.encode("ab") == [2, 3]
    with pytest.raises(ZipperError, match="cannot write z in"):
        text.encode("abz")


def test_a_folder_is_loaded_without_transformers(tmp_path: Path) -> None:
    TEXT.save(tmp_path)
    program = f"import sys; from zipper.modality.text import Text; Text.load({str(tmp_path)!r}); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def word_level(folder: Path, **config: object) -> Path:
    words = {"<unk>": 0, "</s>": 1, "send": 2, "forty": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(1)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_of_others_ends_with_its_eos_and_begins_with_it_too_if_it_has_no_bos(
    tmp_path: Path,
) -> None:
    text = Text.load(
        word_level(tmp_path, bos_token=None, eos_token={"content": "</s>", "lstrip": False})
    )
    assert (text.begin, text.end, text.vocabulary) == (1, 1, 4)
    assert text.encode("send forty send") == [
        2,
        3,
        2,
    ]  # its truncation is switched off: nothing is lost in silence
    with pytest.raises(ZipperError, match="cannot write"):
        text.encode("send nine")


def test_tokenizers_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="names no end token"):
        Text.load(word_level(tmp_path))
    with pytest.raises(ZipperError, match="has no token '<end>'"):
        Text.load(word_level(tmp_path, eos_token="<end>"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ZipperError, match=r"tokenizer\.json"):
        Text.load(tmp_path)
    with pytest.raises(ZipperError, match="holds no tokenizer"):
        Text.load(tmp_path / "missing")
    with pytest.raises(ZipperError, match="holds no modality"):
        modality.load(tmp_path / "missing")
    with pytest.raises(ZipperError, match="no tokenizer at"):
        Text.from_pretrained(tmp_path / "missing")


def test_transformers_reads_what_is_saved_and_is_read_in_turn(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TEXT.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(LINES[0], add_special_tokens=False)["input_ids"] == TEXT.encode(LINES[0])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (TEXT.begin, TEXT.end)
    theirs.save_pretrained(tmp_path / "theirs")
    assert Text.from_pretrained(tmp_path / "theirs").encode(LINES[0]) == TEXT.encode(LINES[0])


# --- where the tokens that begin and end a text may stand


def gpt2(folder: Path, **files: dict[str, object]) -> Path:
    """A byte-level tokenizer, and the files beside it; what none of them says is said by the
    tokenizer's class or by nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<go>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["call anna"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "begin", "end"),
    [
        (
            {
                "tokenizer_config": {"model_max_length": 64},
                "config": {"model_type": "gpt2", "vocab_size": 300},
            },
            0,
            0,
        ),
        ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, 0, 0),
        (
            {
                "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
                "special_tokens_map": {"eos_token": "<go>"},
            },
            1,
            1,
        ),
        (
            {
                "tokenizer_config": {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "eos_token": "<|endoftext|>",
                },
                "special_tokens_map": {"bos_token": {"content": "<go>", "lstrip": False}},
            },
            1,
            0,
        ),
        ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<go>"}}, 0, 1),
        (
            {
                "tokenizer_config": {"bos_token": None, "eos_token": "<go>"},
                "config": {"model_type": "gpt2", "bos_token_id": 0},
            },
            1,
            1,
        ),
        ({"config": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 0}}, 1, 0),
        (
            {
                "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
                "config": {"model_type": "llama", "eos_token_id": None, "bos_token_id": None},
                "generation_config": {"eos_token_id": [1, 0]},
            },
            1,
            1,
        ),
    ],
    ids=str,
)
def test_the_tokens_of_a_folder_are_found_wherever_they_may_stand(
    tmp_path: Path, files: dict[str, dict[str, object]], begin: int, end: int
) -> None:
    folder = gpt2(tmp_path, **files)
    for text in (Text.load(folder), Text.from_pretrained(folder), modality.load(folder)):
        assert (text.begin, text.end) == (begin, end)
        assert text.decode(text.encode("call anna")) == "call anna"
    # And so in a zip, which names them in one place.
    Text.load(folder).save(tmp_path / "saved")
    assert (Text.load(tmp_path / "saved").begin, Text.load(tmp_path / "saved").end) == (begin, end)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}},
            "names no end token",
        ),
        ({"config": {"model_type": "bert", "eos_token_id": 10_000}}, "names no end token"),
        (
            {
                "tokenizer_config": {
                    "auto_map": {"AutoTokenizer": ["x.Evil", None]},
                    "tokenizer_class": "Evil",
                }
            },
            "names no end token",
        ),
        ({"tokenizer_config": {"eos_token": 3}}, "3 is no token"),
    ],
    ids=str,
)
def test_a_folder_that_names_no_end_is_refused_and_runs_no_code(
    tmp_path: Path, files: dict[str, dict[str, object]], message: str
) -> None:
    (tmp_path / "x.py").write_text("raise SystemExit('code of a stranger')")
    with pytest.raises(ZipperError, match=message):
        Text.load(gpt2(tmp_path, **files))


@given(st.text(max_size=40), st.sampled_from(["bytes", "words"]))
def test_a_stream_says_what_decoding_all_of_it_says(line: str, kind: str) -> None:
    """Characters of several tokens are never cut, and nothing that was said is taken back."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([], trainer)
        text = Text(tokenizer.to_str(), "<s>", "</s>")
    else:
        text = TEXT
        line = "".join(c for c in line.lower() if c in "abcdefghijklmnopqrstuvwxyz' ")
    ids = text.tokenizer.encode(line, add_special_tokens=False).ids
    pieces = list(text.stream(ids))
    assert "".join(pieces) == text.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert not ids or len(pieces) <= len(ids) + 1


def test_a_stream_begins_before_the_end() -> None:
    ids = TEXT.encode("send forty two oranges")
    read: list[int] = []
    stream = TEXT.stream(read.append(token) or token for token in ids)  # type: ignore[func-returns-value]
    assert next(stream).startswith("s") and len(read) < len(ids)


def test_a_word_of_known_letters_that_cannot_be_written_is_an_error() -> None:
    pieces = {"[UNK]": 0, "a": 1, "b": 2, "##b": 3, "<s>": 4, "</s>": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab=pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    text = Text(tokenizer.to_str(), "<s>", "</s>")
    assert text.encode("ab") == [1, 3]
    with pytest.raises(ZipperError, match=r"cannot write 'ab ba', though it knows all"):
        text.encode("ab ba")


def test_a_save_that_fails_leaves_the_tokenizer_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Text.train(["some words"], 10)
    mine.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = Text.train(["other words"], 10)
    with pytest.raises(OSError, match="No space"):
        other.save(tmp_path)
    assert Text.load(tmp_path).fingerprint == mine.fingerprint != other.fingerprint
