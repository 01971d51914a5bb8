"""Text to token ids and back: characters, bytes, words, GPT-2's BPE, or a BPE learned from the corpus.

A tokenizer is a value. `state()` is a plain dictionary that a checkpoint carries, and `from_state` rebuilds
the tokenizer from it with nothing beside it. What an id stands for is said once, by `piece`: `decode` joins
pieces, the streaming `Detokenizer` joins them one by one, and so the two always agree.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from tinygpt.config import TokenizerConfig, UserError

Ids = npt.NDArray[np.unsignedinteger[Any]]
State = dict[str, Any]
Texts = Callable[[], Iterable[str]]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest of uint8, uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


SHOWN = 20  # of the characters that are unknown


class UnknownCharacter(UserError):
    """A character that a char tokenizer has never seen; `position` counts characters from 0. `others` are unknown too."""

    def __init__(self, character: str, position: int, others: str = "") -> None:
        shown = [other if other.isprintable() and other != " " else f"U+{ord(other):04X}" for other in others[:SHOWN]]
        more = f", like {' '.join(shown)}{' ...' if len(others) > SHOWN else ''} further on" if others else ""
        super().__init__(
            f"the character {character!r} (U+{ord(character):04X}) at position {position} is unknown{more}",
            "a char tokenizer, which a checkpoint brings along, knows the characters of its training text only: leave such "
            "characters out, or train a new model, with data/tokenizer=byte, which knows them all",
        )
        self.character, self.position, self.others = character, position, others


def _refuse_surrogates(text: str) -> bytes:
    """The text as UTF-8; UserError for half a surrogate pair, which is not Unicode text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code, position = ord(text[error.start]), error.start
        raise UserError(
            f"the text is not valid Unicode: a lone surrogate, U+{code:04X}, at position {position}",
            "it often comes from a file or terminal that is not in UTF-8: convert the text first",
        ) from None


class Tokenizer(ABC):
    """Text to ids, 0 to vocab_size - 1, and back."""

    kind: ClassVar[str]

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._bytes = pieces
        self.vocab_size = len(pieces)

    @abstractmethod
    def encode_array(self, text: str) -> Ids:
        """The ids of `text`. Raises UserError where the text has none, or is not valid Unicode."""

    @abstractmethod
    def state(self) -> State:
        """All that `from_state` needs, in str, int, list and dict, which weights-only loading takes."""

    @classmethod
    @abstractmethod
    def restore(cls, state: State) -> Self:
        """The inverse of `state`; ValueError, KeyError or TypeError where the state is damaged."""

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each document, which begins with the end-of-text token where there is one, else with a newline."""
        return [self.encode_array(f"\n{text}") for text in texts]

    def twin(self) -> Self:
        """An equal tokenizer for another thread; this one, where threads do not get in each other's way."""
        return self

    def encode(self, text: str) -> list[int]:
        """`encode_array` as a list."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def piece(self, token: int, previous: int | None = None) -> bytes:
        """The UTF-8 bytes that `token` adds after `previous`.

        Raises ValueError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, invalid UTF-8 replaced by U+FFFD. Raises ValueError for an unknown id."""
        pieces, previous = [], None
        for token in map(int, ids):
            pieces.append(self.piece(token, previous))
            previous = token
        return b"".join(pieces).decode("utf-8", "replace")

    def byte_lengths(self) -> npt.NDArray[np.int64] | None:
        """UTF-8 bytes of text per id (0 for a special token); None where the tokenizer loses text."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    def fingerprint(self) -> str:
        """The sha256 of the state: equal for tokenizers that are equal."""
        canonical = json.dumps(self.state(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _code_points(text: str) -> npt.NDArray[np.integer[Any]]:
    """One number per character; the ASCII of a text without others is there already."""
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<i4")


class CharTokenizer(Tokenizer):
    """One id per character, in the order of their code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = "".join(sorted(set(characters)))
        if not self._characters:
            raise ValueError("no characters")
        super().__init__([character.encode() for character in self._characters])
        # Indexed by code point. One more entry at the end stands for all code points above the largest known.
        codes = [ord(character) for character in self._characters]
        self._table = np.full(codes[-1] + 2, self.vocab_size, dtype=token_dtype(self.vocab_size + 1))
        self._table[codes] = np.arange(self.vocab_size)
        # The same for ASCII as bytes, which is several times as fast; there is no id 255 among 128 characters.
        self._ascii = bytes(self._characters.find(chr(code)) & 255 for code in range(128)).ljust(256, b"\xff")

    @classmethod
    def learn(cls, texts: Iterable[str]) -> Self:
        """Know every character that occurs in `texts`."""
        seen, ascii_seen = np.zeros(sys.maxunicode + 1, dtype=bool), b""
        for text in texts:
            # To drop bytes is several times as fast as to mark characters, and most of a text is ASCII seen before.
            rest = text.encode(errors="surrogatepass").translate(None, ascii_seen).decode(errors="surrogatepass")
            seen[_code_points(rest)] = True
            ascii_seen = bytes(np.flatnonzero(seen[:128]).tolist())
        return cls(map(chr, np.flatnonzero(seen).tolist()))

    def encode_array(self, text: str) -> Ids:
        ids, unknown = self._look_up(text)
        if ids.size and ids.max() == unknown:
            _refuse_surrogates(text)
            position = int((ids == unknown).argmax())
            found = {text[at] for at in np.flatnonzero(ids == unknown)} - {text[position]}
            raise UnknownCharacter(text[position], position, "".join(sorted(found)))
        return ids

    def _look_up(self, text: str) -> tuple[Ids, int]:
        """An id for each character, and the one that stands for unknown."""
        if text.isascii():
            return np.frombuffer(text.encode().translate(self._ascii), dtype=np.uint8), 255
        return self._table.take(_code_points(text), mode="clip"), self.vocab_size

    def state(self) -> State:
        return {"kind": self.kind, "characters": self._characters}

    @classmethod
    def restore(cls, state: State) -> Self:
        if not isinstance(state["characters"], str):
            raise TypeError("characters are one text")
        return cls(state["characters"])


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8: 256 of them, any text, nothing to learn."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode_array(self, text: str) -> Ids:
        return np.frombuffer(_refuse_surrogates(text), dtype=np.uint8)

    def state(self) -> State:
        return {"kind": self.kind}

    @classmethod
    def restore(cls, state: State) -> Self:  # noqa: ARG003 (there is nothing to restore)
        return cls()


class WordTokenizer(Tokenizer):
    r"""One id per word, the most frequent first; rare words become `<unk>`, id 0.

    A token is a newline, a word with at most one apostrophe inside (`\w+(?:'\w+)?`), or any other single
    character that is not a space. `decode` puts one space between two tokens and none beside a newline: this
    is the normalisation, and the text comes back up to it.
    """

    kind = "word"
    UNKNOWN: ClassVar[str] = "<unk>"
    _TOKEN: ClassVar[re.Pattern[str]] = re.compile(r"\n|\w+(?:'\w+)?|[^\w\s]")

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__([word.encode() for word in (self.UNKNOWN, *words)])
        self._words = list(words)
        self._ids = {word: number for number, word in enumerate(words, start=1)}
        if len(self._ids) != len(words):
            raise ValueError("a word occurs twice")

    @classmethod
    def learn(cls, texts: Iterable[str], min_frequency: int, specials: Iterable[str] = ()) -> Self:
        """Words that occur `min_frequency` times or more: the most frequent first, then by alphabet.

        `specials` come before them; no text is encoded to one, so that their ids are free for other uses.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(cls._TOKEN.findall(text))
        known = [word for word, count in counts.items() if count >= min_frequency]
        return cls([*specials, *sorted(known, key=lambda word: (-counts[word], word))])

    def encode_array(self, text: str) -> Ids:
        _refuse_surrogates(text)
        ids = [self._ids.get(word, 0) for word in self._TOKEN.findall(text)]
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def piece(self, token: int, previous: int | None = None) -> bytes:
        word = super().piece(token)
        if previous is None or b"\n" in (word, self._bytes[previous]):
            return word
        return b" " + word

    def byte_lengths(self) -> None:
        return None

    def state(self) -> State:
        return {"kind": self.kind, "words": self._words}

    @classmethod
    def restore(cls, state: State) -> Self:
        return cls(state["words"])


# GPT-2's own rule, by which text is cut before bytes are merged.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The same cuts at more than the speed: what needs no look ahead is one group, which tiktoken's engine runs as an automaton.
_EQUAL_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
LONG_DOCUMENT = 2**16  # characters; a shorter one has no run of spaces that is too long for tiktoken


class MergedBytes(Tokenizer):
    """Byte-level BPE, run by tiktoken: a token's rank is its id and the order in which it is merged."""

    def __init__(self, ranks: Sequence[bytes], pattern: str, special_tokens: dict[str, int]) -> None:
        from tiktoken import Encoding

        _check_ranks(ranks, special_tokens)
        super().__init__([*ranks, *(text.encode() for text in special_tokens)])
        self.special_tokens = dict(special_tokens)
        self._pattern = pattern
        ids = {token: rank for rank, token in enumerate(ranks)}
        runs = _EQUAL_PATTERN if pattern == GPT2_PATTERN else pattern
        self._encoding = Encoding(self.kind, pat_str=runs, mergeable_ranks=ids, special_tokens=special_tokens)

    def encode_array(self, text: str) -> Ids:
        """As everywhere; `<|endoftext|>` in a text is no special token, but characters like any other."""
        _refuse_surrogates(text)
        try:
            return self._encode(text)
        except ValueError:  # tiktoken's regular expression gives up in a run of some 100,000 spaces
            return np.concatenate([self._encode(part) for part in _cut_long_spaces(text)])

    def twin(self) -> Self:
        """Threads that share tiktoken's regular expression wait for each other's scratch memory."""
        return type(self)(self._ranks(), self._pattern, self.special_tokens)

    def _ranks(self) -> Sequence[bytes]:
        return self._bytes[: self.vocab_size - len(self.special_tokens)]

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        begin = self.special_tokens.get(END_OF_TEXT)
        if begin is None:
            return super().encode_documents(texts)
        if any(END_OF_TEXT in text or len(text) >= LONG_DOCUMENT for text in texts):
            return [np.concatenate([np.array([begin], dtype=np.uint32), self.encode_array(text)]) for text in texts]
        # All at once: tiktoken cuts at a special token first, so that each document is encoded as if alone.
        joined = "".join(f"{END_OF_TEXT}{text}" for text in texts)
        _refuse_surrogates(joined)
        ids = self._encode(joined, {END_OF_TEXT})
        return np.split(ids, np.flatnonzero(ids == begin)[1:])

    def _encode(self, text: str, special: AbstractSet[str] = frozenset()) -> Ids:
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # which is no Exception, and has no name to import
                raise
            raise UserError(
                "the tokenizer's pattern cannot cut this text", "it is not one that tiktoken was made for"
            ) from None

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int64)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def state(self) -> State:
        return {
            "kind": self.kind,
            "ranks": " ".join(base64.b64encode(token).decode() for token in self._ranks()),
            "pattern": self._pattern,
            "special_tokens": dict(self.special_tokens),
        }

    @classmethod
    def restore(cls, state: State) -> Self:
        ranks = [base64.b64decode(token, validate=True) for token in state["ranks"].split(" ")]
        tokenizer = cls(ranks, state["pattern"], state["special_tokens"])
        tokenizer._encode(" a1.\n")  # refuses a pattern that cuts off nothing
        return tokenizer


def _check_ranks(ranks: Sequence[bytes], special_tokens: dict[str, int]) -> None:
    """tiktoken panics on these, and a panic is not an Exception."""
    if len(set(ranks)) != len(ranks) or len({token for token in ranks if len(token) == 1}) != 256:
        raise ValueError("the ranks must differ and hold all 256 bytes")
    if list(special_tokens.values()) != list(range(len(ranks), len(ranks) + len(special_tokens))):
        raise ValueError("special tokens must follow the ranks")


def _cut_long_spaces(text: str) -> list[str]:
    """Cut before the last space of each long run: GPT-2's pattern splits there too, so no token changes."""
    ends = [match.end() for match in re.finditer(r"[^\S\x1c-\x1f]{10000,}", text)]
    cuts = [end - 1 for end in ends if end < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class GPT2Tokenizer(MergedBytes):
    """OpenAI's GPT-2 vocabulary: 50,256 byte sequences and `<|endoftext|>`."""

    kind = "gpt2"

    @classmethod
    def from_merges(cls, path: Path) -> Self:
        """Read OpenAI's `vocab.bpe`: a header, then one merge a line, best first."""
        byte_of = bytes_by_character()
        merges = path.read_text(encoding="utf-8").split("\n")[1:-1]
        merged = [bytes(byte_of[character] for character in merge if character != " ") for merge in merges]
        ranks = [bytes([value]) for value in byte_of.values()] + merged
        return cls(ranks, GPT2_PATTERN, {END_OF_TEXT: len(ranks)})


class BPETokenizer(MergedBytes):
    """A byte-level BPE learned from text, cut by GPT-2's pattern. Any text round-trips."""

    kind = "bpe"

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn up to `vocab_size` tokens, the 256 bytes included; a small text may not have so many."""
        # Unless this is said, the library warns at each later fork of the process (data workers).
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from tokenizers import Tokenizer as Learner
        from tokenizers import models, pre_tokenizers, trainers

        byte_of = bytes_by_character()
        learner = Learner(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=list(byte_of), show_progress=False)
        learner.train_from_iterator(texts, trainer)
        vocabulary = learner.get_vocab()
        tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
        return cls([bytes(byte_of[character] for character in token) for token in tokens], GPT2_PATTERN, {})


def bytes_by_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters as they are, the others from U+0100 on."""
    printable = [value for value in range(256) if chr(value).isprintable() and chr(value) != " "]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}


_KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (CharTokenizer, ByteTokenizer, WordTokenizer, GPT2Tokenizer, BPETokenizer)
}


def from_state(state: State) -> Tokenizer:
    """The tokenizer whose `state()` this was. Raises UserError for an unknown kind or a damaged state."""
    name = state.get("kind") if isinstance(state, dict) else None
    kind = _KINDS.get(str(name))
    if kind is None:
        raise UserError(f"the tokenizer {name!r} is not known", f"this version of tinygpt knows {', '.join(_KINDS)}")
    try:
        return kind.restore(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the state of the {name} tokenizer is damaged: {type(error).__name__}: {error}"
        raise UserError(message, "use another checkpoint, or prepare the corpus again") from error


def build(config: TokenizerConfig, texts: Texts, train_texts: Texts, gpt2_merges: Callable[[], Path]) -> Tokenizer:
    """A tokenizer for a corpus.

    char learns from the whole text (`texts`), word and bpe from the training split (`train_texts`), whose
    chunks must not cut words. `gpt2_merges` finds OpenAI's `vocab.bpe` and is called for gpt2 alone.
    """
    builders: dict[str, Callable[[], Tokenizer]] = {
        "char": lambda: CharTokenizer.learn(texts()),
        "byte": ByteTokenizer,
        "word": lambda: WordTokenizer.learn(train_texts(), config.min_frequency, config.specials),
        "gpt2": lambda: GPT2Tokenizer.from_merges(gpt2_merges()),
        "bpe": lambda: BPETokenizer.learn(train_texts(), config.vocab_size),
    }
    return builders[config.kind]()


class Detokenizer:
    """Text from ids that come one at a time: all that `push` and `finish` return adds up to `decode`.

    A character whose bytes are not all there is held back. `previous` is the id before the first, such as the
    last one of a prompt: a word needs it to know whether a space belongs before it.
    """

    def __init__(self, tokenizer: Tokenizer, previous: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._previous = previous
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete now that `token` (one id) has come; often empty inside a character."""
        piece = self._tokenizer.piece(token, self._previous)
        self._previous = token
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
