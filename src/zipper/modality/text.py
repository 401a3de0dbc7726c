"""Text: strings to tokens and back, by any fast tokenizer of Hugging Face or by a small one trained
here.

A folder holds the usual two files (tokenizer.json, tokenizer_config.json), so transformers reads
ours and this reads theirs. Nothing here knows of towers or speech.
"""

import hashlib
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zipper import evaluation
from zipper.errors import ZipperError
from zipper.modality.kind import Kind, Scores, short
from zipper.normaliser import NORMALISER
from zipper.saving.files import lines as lines_of
from zipper.saving.files import place, read_json, write, write_json

BEGIN, END = "<s>", "</s>"
TOKENS = ("bos_token", "eos_token")  # as transformers calls what begins and ends a text
MOST_BYTES = 64 << 20  # of a tokenizer.json; a vocabulary of 262,000 takes 33 MB
SAID = "#%&*/@\\_\N{PER MILLE SIGN}"  # punctuation to Unicode, and words to those who read it aloud
# Always in the alphabet, so that any plain word can be written.
LETTERS = " 'abcdefghijklmnopqrstuvwxyz"


class Text(Kind):
    """Strings <-> token ids. Markup in a string stays text: "</s>" never becomes the end token."""

    name = "text"
    takes = "text"
    shows = 0
    DEFINITION, CONFIG = "tokenizer.json", "tokenizer_config.json"

    def __init__(self, definition: str, begin: str | None, end: str | None) -> None:
        """definition: the content of a tokenizer.json. begin, end: tokens; without a begin token
        the end token takes its place."""
        try:
            self.tokenizer = Tokenizer.from_str(definition)
            model = json.loads(definition)["model"]
        except Exception as error:  # tokenizers raises nothing more precise
            raise ZipperError(
                f"this is not the definition of a fast tokenizer: {error}. Give the content of a "
                "tokenizer.json."
            ) from error
        if end is None:
            raise ZipperError(
                "this tokenizer names no end token (eos_token). Set one before use: a segment "
                "needs an end."
            )
        self.definition, self.tokens = definition, (begin or end, end)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.begin, self.end = (self._id(token) for token in self.tokens)
        self.vocabulary = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        unknown = model.get("unk_token")
        self._unknown = (
            model.get("unk_id") if unknown is None else self.tokenizer.token_to_id(unknown)
        )

    @classmethod
    def train(cls, lines: Iterable[str], merges: int = 150) -> "Text":
        """Byte-pair encoding of lower-case words (a space belongs to the word behind it), without
        an unknown token.

        merges: how many; the vocabulary is that, the alphabet, begin and end. `decode(encode(line))
        == line` for every lower-case line in the alphabet (a to z, apostrophe, space and what
        `lines` hold); capitals are read as small letters, tabs as spaces.
        """
        lines = [line.lower() for line in lines]
        if not lines:
            raise ZipperError("no lines to train a tokenizer on. Give some text.")
        if merges < 0:
            raise ZipperError(f"merges is {merges}; it must be a whole number from 0 on.")
        alphabet = sorted(set(LETTERS).union(*lines) - set("\t\r\n"))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(r"[\t\r\n]"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+| +"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        size = 2 + len(alphabet) + merges
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[BEGIN, END],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer.to_str(), BEGIN, END)

    @classmethod
    def fitted(cls, values: Sequence[Any], merges: int = 150) -> "Text":
        """`train` on strings, and on the lines of files (`Path`)."""
        rows: list[str] = []
        for value in values:
            if isinstance(value, Path):
                for number, line in lines_of(value):
                    try:
                        rows.append(line.decode())
                    except UnicodeDecodeError as error:
                        raise ZipperError(
                            f"{value}, line {number} is no text in UTF-8: {error}. Give a text "
                            "file."
                        ) from error
            elif isinstance(value, str):
                rows.append(value)
            else:
                raise ZipperError(f"{value!r:.200} was given; give text, or files of text.")
        return cls.train(rows, merges)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Text":
        """The tokenizer of a folder or a hub id. Raises ZipperError if there is none, or only a
        slow one."""
        if os.path.isfile(place(source) / cls.DEFINITION):
            return cls.load(source)
        loaded = _loaded(source)
        return cls(loaded.backend_tokenizer.to_str(), loaded.bos_token, loaded.eos_token)

    @property
    def fingerprint(self) -> str:
        """sha256 of the definition and the two tokens."""
        return hashlib.sha256("\0".join([self.definition, *self.tokens]).encode()).hexdigest()

    def says_nothing(self, raw: str) -> bool:  # type: ignore[override]
        """Whether there is no word in it: white space, or signs that are left out."""
        return not raw.strip() or not self.encode(raw)

    def encode(self, raw: str) -> list[int]:
        """Token ids of what `spell` makes of it. Raises ZipperError naming the characters that this
        tokenizer cannot write."""
        return self.spell(raw)[0]

    def spell(self, raw: str) -> tuple[list[int], str]:
        """Token ids, and the text that they are of: this one, without the punctuation that the
        tokenizer has no token for.

        Only signs that nobody says are left out (not % or &, nor a point before a digit), and a
        typographic apostrophe becomes a plain one. Raises ZipperError naming the other characters
        that it cannot write, and for text that is none.
        """
        if strange := next(
            (c for c in short(raw) if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace()),
            None,
        ):
            raise ZipperError(
                f"{raw!a:.200} holds the character {strange!a}, which is no text. It was damaged "
                "or read as another encoding."
            )
        ids: list[int] = self.tokenizer.encode(raw, add_special_tokens=False).ids
        if self.decode(ids) == raw:
            return ids, raw
        lost = {
            character
            for character in {*raw}
            if not character.isspace() and not self._writes(character)
        }
        if not lost and self._unknown in ids:  # each letter can be written, but not in its place
            raise ZipperError(
                f"this tokenizer cannot write {short(raw)!r}, though it knows all its characters. "
                "Spell it otherwise or leave it out."
            )
        if not lost:  # capitals, white space
            return ids, raw
        if self._writes("'"):
            raw = re.sub(r"(?<=\w)[\u2018\u2019\u02bc](?=\w)", "'", raw)
        plain = "".join(
            " " if c in lost and _unsaid(c, after) else c
            for c, after in zip(raw, f"{raw[1:]} ", strict=True)
        )
        if left := sorted(lost.intersection(plain)):
            raise ZipperError(
                f"this tokenizer cannot write {' '.join(left)} in {raw!r}. Spell it in letters or "
                "leave it out."
            )
        plain = " ".join(plain.split())
        return self.tokenizer.encode(plain, add_special_tokens=False).ids, plain

    def accepts(self, value: Any) -> bool:
        """See `Kind.accepts`: only a string is text, and an empty one says that nobody speaks."""
        return isinstance(value, str)

    def read(self, value: Any, folder: Path = Path()) -> str:
        """See `Kind.read`."""
        if not isinstance(value, str):
            raise ZipperError(f"{value!r:.200} was given; give {self.takes}.")
        return value

    def noted(self, raw: str) -> tuple[list[int], str]:
        """See `Kind.noted`: punctuation that the tokenizer has no token for is passed over."""
        if not raw.strip():
            return [], ""
        ids, spelled = self.spell(raw)
        return ids, "" if spelled == raw else "punctuation"

    def scores(
        self, wanted: Sequence[str], made: Sequence[str], normaliser: str = NORMALISER
    ) -> Scores:
        """Word and character edits by those wanted, and whether no word is wrong; see
        `evaluation.lines`."""
        compared = evaluation.lines(wanted, made, normaliser)
        return {
            "wer": [(line.word_edits, line.words) for line in compared],
            "cer": [(line.character_edits, line.characters) for line in compared],
            "exact": [(float(not line.word_edits), 1.0) for line in compared],
        }

    def decode(self, ids: Sequence[int]) -> str:
        """The string, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text while its tokens are made, in pieces that together are what `decode` makes of all.

        A piece is held back while what comes next may change it: bytes of a character that is not
        whole yet, and white space, which some tokenizers take away before a sign.
        """
        read: list[int] = []
        said = 0
        for token in ids:
            read.append(token)
            text = self.decode(read).rstrip("\ufffd" + string.whitespace)
            if len(text) > said:
                yield text[said:]
                said = len(text)
        if rest := self.decode(read)[said:]:
            yield rest

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / self.DEFINITION, self.definition.encode())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.tokens[0],
            "eos_token": self.tokens[1],
        }
        write_json(folder / self.CONFIG, config)

    @classmethod
    def load(cls, folder: str | Path) -> "Text":
        """From a folder with a tokenizer.json, ours or another's; where tokenizer_config.json does
        not name the tokens that begin and end a text, transformers knows the other places that
        may.
        """
        folder = place(folder)
        try:
            with (folder / cls.DEFINITION).open("rb") as file:
                definition = file.read(MOST_BYTES + 1)
            if len(definition) > MOST_BYTES:
                raise ValueError(f"{cls.DEFINITION} has more than {MOST_BYTES} bytes")
            config = read_json(folder / cls.CONFIG) if (folder / cls.CONFIG).is_file() else {}
            named = [_token(config.get(name)) for name in TOKENS]
            if named[1] is None or "bos_token" not in config:
                named = _tokens(folder, definition.decode(), named)
            return cls(definition.decode(), *named)
        except (OSError, ValueError) as error:
            raise ZipperError(
                f"{folder} holds no tokenizer: {error} It needs {cls.DEFINITION} and {cls.CONFIG}."
            ) from error

    def _id(self, token: str) -> int:
        number: int | None = self.tokenizer.token_to_id(token)
        if number is None:
            raise ZipperError(
                f"this tokenizer has no token {token!r}, which should begin or end a segment. "
                "Name one that it has."
            )
        return number

    def _writes(self, character: str) -> bool:
        ids = self.tokenizer.encode(character, add_special_tokens=False).ids
        return bool(ids) and self._unknown not in ids


def _loaded(source: str | Path) -> Any:
    """A fast tokenizer by transformers, without code of strangers. Raises a ZipperError where there
    is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds

    try:
        loaded = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # whatever a stranger's files lead transformers to
        raise ZipperError(
            f"no tokenizer at {source}: {error!s:.500}. Give a folder with a {Text.DEFINITION} or "
            "a hub id."
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ZipperError(
            f"the tokenizer of {source} is a slow one ({type(loaded).__name__}). Save it as a "
            f"fast one ({Text.DEFINITION}) first."
        )
    return loaded


def _tokens(folder: Path, definition: str, named: list[str | None]) -> list[str | None]:
    """The tokens that begin and end a text: as transformers knows them (by more files, and by the
    tokenizer's class) or, where it knows none that the definition has, those whose ids the model's
    own configuration beside it names. named: by one file.
    """
    try:
        loaded, tokenizer = _loaded(folder), Tokenizer.from_str(definition)
    except Exception:
        # None that transformers knows either, or no definition: whoever reads it says so.
        return named
    ids: dict[str, Any] = {}
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids |= {
            name: value
            for name, value in (read_json(path) if path.is_file() else {}).items()
            if value is not None
        }
    found: list[str | None] = []
    for name, own in zip(TOKENS, named, strict=True):
        number = ids.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        by_id = (
            tokenizer.id_to_token(number) if type(number) is int and 0 <= number < 1 << 31 else None
        )
        candidates = (own, getattr(loaded, name), by_id)
        found.append(
            next(
                (
                    c
                    for c in candidates
                    if c is not None and (c is own or tokenizer.token_to_id(c) is not None)
                ),
                None,
            )
        )
    return found


def _unsaid(character: str, after: str) -> bool:
    """Whether it is a sign that nobody says; a point, comma, colon or dash is said before a
    digit."""
    kind, plain = unicodedata.category(character), unicodedata.normalize("NFKC", character)
    return (
        kind[0] == "P"
        and plain not in SAID
        and not (after.isdigit() and (kind == "Pd" or plain in ".,:"))
    )


def _token(entry: Any) -> str | None:
    """A token as tokenizer_config.json names it: a string, or an object around it in older
    files."""
    token = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(token, str | None):
        raise ValueError(f"{token!a:.80} is no token.")
    return token
