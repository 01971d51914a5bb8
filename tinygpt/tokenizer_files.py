"""Tokenizers as the files that Hugging Face's libraries read, and back: `tokenizer.json`, `vocab.json`, `merges.txt`.

Out: each of our kinds becomes a `tokenizer.json` that gives the same ids. In: byte-level BPE, GPT-2's included, becomes
ours; what our classes cannot hold to the id (SentencePiece, WordPiece, special tokens in front) is not approximated.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import UserError
from tinygpt.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    MergedBytes,
    Tokenizer,
    WordTokenizer,
    bytes_by_character,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

GPT2_FINGERPRINT = "76c59f605202b3f16267cc40b316ee23839f057d2832c212c2ae5e3d00acf3b9"
# What two tokenizers must agree on before one is taken for the other.
PROBE = (
    "The quick brown fox, don't they'd say: it's 3.14 or 2,718?\r\n\tSpaces   here  \n\n\n and 12345 there! (a+b)*c == d;\n"
    "  def f(x):\n    return x**2  # naïve café Größe 東京の猫 🐈 cafe\u0301 …\u00a0end İstanbul ǅ ½ ² \u200b\u0085\x1c\x00"
    " I'LL'VE ''s"
)


# Out


def write_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write the files from which `AutoTokenizer` gives our ids. Raises UserError for a tokenizer that they cannot hold."""
    library = to_library(tokenizer)
    library.save(str(folder / "tokenizer.json"))
    if isinstance(tokenizer, MergedBytes):
        library.model.save(str(folder))  # vocab.json and merges.txt, which older programs read
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if end_of_text(tokenizer) is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def end_of_text(tokenizer: Tokenizer | None) -> int | None:
    """The id of `<|endoftext|>`, where there is one."""
    return tokenizer.special_tokens.get(END_OF_TEXT) if isinstance(tokenizer, MergedBytes) else None


def to_library(tokenizer: Tokenizer) -> "Library":
    """The same tokenizer as one of the `tokenizers` library."""
    writers: dict[type[Tokenizer], Callable[[Any], Library]] = {
        CharTokenizer: _char,
        ByteTokenizer: _byte,
        WordTokenizer: _word,
        GPT2Tokenizer: _bpe,
        BPETokenizer: _bpe,
    }
    return writers[type(tokenizer)](tokenizer)


def _char(tokenizer: CharTokenizer) -> "Library":
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    characters = [tokenizer.piece(token).decode() for token in range(tokenizer.vocab_size)]
    # Without <unk> the library refuses an unknown character, as we do.
    library = Library(models.WordLevel({character: token for token, character in enumerate(characters)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    library.decoder = decoders.Fuse()
    return library


def _byte(tokenizer: ByteTokenizer) -> "Library":
    vocabulary = {_spell(tokenizer.piece(token)): token for token in range(tokenizer.vocab_size)}
    return _byte_level(vocabulary, [], pattern=None)


# Python's \w and \s, which are not quite those of the library's regular expressions.
_LETTER, _SPACE = r"\p{L}\p{N}_", r"\s\x1c-\x1f"
_WORD = rf"\n|[{_LETTER}]+(?:'[{_LETTER}]+)?|[^{_LETTER}{_SPACE}]"


def _word(tokenizer: WordTokenizer) -> "Library":
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    words = [tokenizer.UNKNOWN, *tokenizer.state()["words"]]
    library = Library(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=tokenizer.UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    spaced = decoders.WordPiece(prefix="##", cleanup=False)  # no word begins with ##
    library.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(Regex(" ?\n ?"), "\n")])
    return library


def _bpe(tokenizer: MergedBytes) -> "Library":
    from tokenizers import AddedToken

    ranks = [tokenizer.piece(token) for token in range(tokenizer.vocab_size - len(tokenizer.special_tokens))]
    vocabulary = {_spell(token): rank for rank, token in enumerate(ranks)} | tokenizer.special_tokens
    library = _byte_level(vocabulary, merges(ranks), tokenizer.state()["pattern"])
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.special_tokens])
    return library


def _byte_level(vocabulary: dict[str, int], pairs: list[tuple[str, str]], pattern: str | None) -> "Library":
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocabulary, pairs))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2_PATTERN)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern not in (None, GPT2_PATTERN) else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, plain]) if split else plain
    library.decoder = decoders.ByteLevel()
    return library


def merges(ranks: Sequence[bytes]) -> list[tuple[str, str]]:
    """The merges of a byte-level BPE, best first, from its tokens in the order of their ranks.

    A token was made of the two parts that the merges before it leave of its bytes: GPT-2's own list comes back so.
    Raises UserError where more than two are left.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    found = []
    for rank, token in enumerate(ranks):
        if len(token) == 1:
            continue
        parts = _merge([token[i : i + 1] for i in range(len(token))], rank_of, below=rank)
        if len(parts) != 2:
            raise UserError(f"the token {token!r} of the BPE is no merge of two others", "use format=safetensors")
        found.append((_spell(parts[0]), _spell(parts[1])))
    return found


def _merge(parts: list[bytes], rank_of: dict[bytes, int], below: int) -> list[bytes]:
    while True:
        pairs = [(rank_of.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


_CHARACTERS = {value: character for character, value in bytes_by_character().items()}


def _spell(token: bytes) -> str:
    """Bytes in GPT-2's visible characters."""
    return "".join(_CHARACTERS[value] for value in token)


# In


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Ours for the tokenizer files of a folder, with as many ids as the model has (those without a text are unused).

    None where there are no such files, or where our classes do not give the ids that the files give. Raises
    UserError where a file is damaged.
    """
    library = _open_library(folder)
    if library is None:
        return None
    try:
        ours = _from_library(json.loads(library.to_str()), vocab_size)
        same = ours is not None and ours.encode(PROBE) == library.encode(PROBE, add_special_tokens=False).ids
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return ours if same else None


def _open_library(folder: Path) -> "Library | None":
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    whole, vocabulary, pairs = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Library.from_file(str(whole))
        if not (vocabulary.is_file() and pairs.is_file()):
            return None
        library = _byte_level({}, [], GPT2_PATTERN)
        library.model = models.BPE.from_file(str(vocabulary), str(pairs))
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer files in {folder} cannot be read: {reason}", "get them again") from error
    return library


def _from_library(spec: dict[str, Any], vocab_size: int) -> MergedBytes | None:
    """A byte-level BPE whose ids are the order of its merges; None for another kind."""
    model, pattern = spec["model"], _pattern(spec["pre_tokenizer"])
    ordinary = [added for added in spec["added_tokens"] if not added["special"]]  # words that are found before any cutting
    if model["type"] != "BPE" or spec["normalizer"] or pattern is None or ordinary:
        return None
    byte_of = bytes_by_character()
    results = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ids = {token: model["vocab"][token] for token in (*byte_of, *results)}
    if [ids[token] for token in results] != sorted(ids[token] for token in results):
        return None
    tokens = sorted(ids, key=lambda token: ids[token])
    ranks = [bytes(byte_of[character] for character in token) for token in tokens]
    if [ids[token] for token in tokens] != list(range(len(ranks))) or len(ranks) > vocab_size:
        return None
    named = model["vocab"] | {added["content"]: added["id"] for added in spec["added_tokens"]}
    text_of = {token: text for text, token in named.items()}
    specials = {text_of.get(token, f"<|unused_{token}|>"): token for token in range(len(ranks), vocab_size)}
    gpt2 = GPT2Tokenizer(ranks, pattern, specials)
    return gpt2 if gpt2.fingerprint() == GPT2_FINGERPRINT else BPETokenizer(ranks, pattern, specials)


def _pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression by which a byte-level pre-tokenizer cuts; None where it does something else as well."""
    parts = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return GPT2_PATTERN if last["use_regex"] else None
    split = before[0]
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"] and not last["use_regex"]
    return str(split["pattern"]["Regex"]) if plain else None
