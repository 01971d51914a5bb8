"""prepare.py: what a training finds, after a kill at any moment, on every core, from data sets of the Hugging Face form."""

import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import ROOT, SMALL, files, run, run_inside

from tinygpt import meter, pieces, shards, writer
from tinygpt.config import DataConfig, TokenizerConfig, UserError
from tinygpt.corpus import gpt2_merges
from tinygpt.pieces import first_part, recut, split_of
from tinygpt.shards import prepare
from tinygpt.streams import Unreachable
from tinygpt.tokenizer import _EQUAL_PATTERN, END_OF_TEXT, GPT2_PATTERN, CharTokenizer, GPT2Tokenizer


def ids(tokens):
    return tokens.windows(np.array([0]), len(tokens))[0].tolist()


def documents(tokens):
    """The ids of each document of a split."""
    bounds = tokens.documents
    return [tokens.windows(bounds[i : i + 1], bounds[i + 1] - bounds[i])[0].tolist() for i in range(len(bounds) - 1)]


# The script


def test_a_training_finds_what_was_prepared(tmp_path, rhyme):
    (tmp_path / "my.txt").write_text(rhyme * 3, encoding="utf-8")
    arguments = ("data=text", "data.path=my.txt", "data/tokenizer=bpe", "data.tokenizer.vocab_size=270", "cache_dir=cache")
    done = run_inside("prepare", *arguments, cwd=tmp_path)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["corpus"], result["vocab_size"]) == ("text", 270)
    assert result["tokens"]["train"] > 5 * result["tokens"]["val"] > 0 == result["tokens"]["test"]
    prepared = {path: (tmp_path / "cache" / path).stat().st_mtime_ns for path in files(tmp_path / "cache")}
    assert f"{result['folder']}/train-00000.bin".removeprefix("cache/") in prepared
    done = run_inside("train", *SMALL, *arguments, "trainer.max_steps=1", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert {path: (tmp_path / "cache" / path).stat().st_mtime_ns for path in files(tmp_path / "cache")} == prepared
    assert run_inside("prepare", *arguments, cwd=tmp_path).stdout == json.dumps(result) + "\n"


def test_a_missing_text_is_one_line(tmp_path):
    done = run_inside("prepare", "data=text", "data.path=no.txt", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.path=no.txt does not exist\nhint: ")
    assert files(tmp_path) == set()


def test_a_large_text_shows_how_far_it_is(tmp_path, rhyme, monkeypatch, capsys):
    monkeypatch.setattr(meter, "LARGE_TEXT", 1000)
    monkeypatch.setattr(meter, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(writer, "PART_BYTES", 500)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr("tinygpt.corpus.CHUNK_SIZE", 100)
    (tmp_path / "my.txt").write_text(rhyme, encoding="utf-8")
    data = DataConfig(corpus="text", path=str(tmp_path / "my.txt"), tokenizer=TokenizerConfig("byte"))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, tmp_path, tmp_path)
    shown = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"tokenising: 0 MB \(\d+%\), \d+\.\d MB/s", shown[0])
    assert "(100%)" in shown[-1]
    (left,) = tmp_path.glob(".*/manifest.json")
    left.unlink()
    prepare(data, tmp_path, tmp_path)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "going on after 0 MB that are tokenised already"
    assert "(100%)" in shown[-1]


# The same tokens


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return GPT2Tokenizer.from_merges(gpt2_merges(shared_data))


@pytest.mark.parametrize("name", ["wikitext2/wiki.valid.raw", "books/1661.txt", "enwik/enwik6.txt"])
def test_pieces_on_every_core_have_the_tokens_of_plain_tiktoken(shared_data, tmp_path, gpt2, monkeypatch, name):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken_cache"))
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 2**13)
    monkeypatch.setattr("tinygpt.corpus.CHUNK_SIZE", 2**12)
    path = shared_data / name
    prepared = prepare(DataConfig(corpus="text", path=str(path), tokenizer=TokenizerConfig("gpt2")), shared_data, tmp_path)
    text, plain = path.read_bytes().decode(), tiktoken.get_encoding("gpt2")
    border = first_part(len(text), 0.1)
    assert ids(prepared.train) == plain.encode_ordinary(text[:border])
    assert ids(prepared.val) == plain.encode_ordinary(text[border:])


SPACES = "a's 1!\n\t\r\x0b\x1c\x85\xa0\u2003\u3000é日"


@given(chunks=st.lists(st.text(SPACES, max_size=12), max_size=8))
def test_pieces_have_gpt2s_tokens_whatever_the_spaces(gpt2, chunks):
    assert [token for piece in recut(chunks) for token in gpt2.encode(piece)] == gpt2.encode("".join(chunks))


@settings(max_examples=300)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from(SPACES + "sdmtlver_٣²Ⅷ\u0301\u200b\u2028"), max_size=30))
def test_the_quick_pattern_cuts_where_gpt2s_own_does(text):
    assert regex.findall(_EQUAL_PATTERN, text) == regex.findall(GPT2_PATTERN, text)


RANKS = [bytes([value]) for value in range(256)] + [b"  ", b" a", b"\n\n", b"aa"]


@given(
    texts=st.lists(
        st.text("a \n<|endoftx>", max_size=20) | st.just(f"a{END_OF_TEXT} ") | st.just("a" * 2**16), min_size=1, max_size=6
    )
)
def test_documents_together_have_the_tokens_of_each_alone(texts):
    tokenizer = GPT2Tokenizer(RANKS, GPT2_PATTERN, {END_OF_TEXT: len(RANKS)})
    alone = [[len(RANKS), *tokenizer.encode(text)] for text in texts]
    assert [tokens.tolist() for tokens in tokenizer.encode_documents(texts)] == alone


@given(text=st.text(st.characters(codec="utf-8"), max_size=50), ascii=st.text("abc \n", max_size=50))
def test_characters_have_the_ids_of_their_order(text, ascii):
    for known in (text + ascii, ascii):
        if known:
            tokenizer = CharTokenizer.learn([known[:3], known])
            order = sorted(set(known))
            assert tokenizer.state()["characters"] == "".join(order)
            for part in (known, ascii):
                assert tokenizer.encode(part) == [order.index(character) for character in part]


# Killed


def test_a_process_killed_at_any_moment_is_gone_on_with(tmp_path, rhyme):
    (tmp_path / "text.txt").write_text(rhyme * 2, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests/killed.py"), str(tmp_path / "text.txt"), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(moments) > 30
    total = moments[0]["whole"]["encoded"]
    for moment in moments:
        assert moment["files"] == moment["whole"]["files"]
        assert moment["left"] == moment["whole"]["left"]
        assert moment["encoded"] in (total - moment["done"], 0)  # 0: what was left was no more than a name
    assert len({moment["done"] for moment in moments}) > 4


def test_a_text_that_changed_since_the_kill_is_refused_and_then_read_anew(tmp_path, rhyme, monkeypatch):
    path, cache = tmp_path / "text.txt", tmp_path / "cache"
    path.write_text(rhyme, encoding="utf-8")
    monkeypatch.setattr(writer, "PART_BYTES", 500)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr("tinygpt.corpus.CHUNK_SIZE", 100)
    data = DataConfig(corpus="text", path=str(path), tokenizer=TokenizerConfig("byte"))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, cache, cache)
    (left,) = cache.iterdir()
    (left / "manifest.json").unlink()
    seen = path.stat()
    path.write_text(rhyme.swapcase(), encoding="utf-8")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # the same size and time: the cache cannot know
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(data, cache, cache)
    assert list(cache.iterdir()) == []
    assert ids(prepare(data, cache, cache).tokens("all")) == list(path.read_bytes())


def interrupt(*arguments):
    raise KeyboardInterrupt


# Data sets of the Hugging Face form: folders here, as there is no hub where the tests run


TEXTS = [f"Document {number}.\n\nIt ends{'.' * (number % 7)}" for number in range(300)] + [
    "same",
    "same",
    f"odd {END_OF_TEXT}",
]


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


@pytest.fixture
def folder(datasets, tmp_path):
    """A folder with the texts as three parquet files, an empty document and a missing one among them."""
    rows = [*TEXTS[:5], "", None, *TEXTS[5:]]
    (tmp_path / "set").mkdir()
    for number in range(3):
        part = rows[number * 120 : (number + 1) * 120]
        columns = {"text": part, "title": [f"t{i}" for i in range(len(part))], "score": list(range(len(part)))}
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / f"set/train-{number:05d}-of-00003.parquet"))
    return tmp_path / "set"


def streamed(folder, kind="byte", **options):
    return DataConfig(corpus="hf", path=str(folder), tokenizer=TokenizerConfig(kind, vocab_size=280), **options)


def test_documents_of_a_data_set_go_where_their_hash_says(folder, tmp_path):
    data = streamed(folder, val_fraction=0.2, test_fraction=0.1)
    prepared = prepare(data, tmp_path, tmp_path / "cache")
    for split, tokens in (("train", prepared.train), ("val", prepared.val), ("test", prepared.test)):
        expected = [text for text in TEXTS if split_of(text.encode(), data) == split]
        assert documents(tokens) == [list(f"\n{text}".encode()) for text in expected]
        assert len(expected) > 15
    assert prepared.corpus == "set"


def test_fewer_documents_stay_on_their_sides(folder, tmp_path):
    every, some = (prepare(streamed(folder, max_documents=n), tmp_path, tmp_path / "cache") for n in (None, 100))
    assert len(documents(some.train)) + len(documents(some.val)) == 100
    for split in ("train", "val"):
        found = documents(some.tokens(split))
        assert found == documents(every.tokens(split))[: len(found)]
    assert every.sha256 != some.sha256


def test_documents_begin_with_end_of_text_where_there_is_one(folder, tmp_path, gpt2, shared_data):
    prepared = prepare(streamed(folder, "gpt2"), shared_data, tmp_path / "cache")
    expected = [[50256, *gpt2.encode(text)] for text in TEXTS if split_of(text.encode(), streamed(folder)) == "train"]
    assert documents(prepared.train) == expected


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_tokenizer_is_learned_from_a_stream(folder, tmp_path, kind):
    prepared = prepare(streamed(folder, kind), tmp_path, tmp_path / "cache")
    decoded = [prepared.tokenizer.decode(document) for document in documents(prepared.train)]
    if kind != "word":
        expected = [f"\n{text}" for text in TEXTS if split_of(text.encode(), streamed(folder)) == "train"]
        assert decoded == expected
    assert prepared.tokenizer.kind == kind


def test_a_stream_that_breaks_is_gone_on_with(folder, tmp_path, monkeypatch):
    """Without reading again what was written: the data set goes on from its own state."""
    from tinygpt import streams

    monkeypatch.setattr(writer, "PART_BYTES", 300)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 100)
    whole = prepare(streamed(folder), tmp_path, tmp_path / "whole")
    text, read = streams.Documents._text, []

    def breaking(self, row):
        read.append(row["text"])
        if len(read) == 200:
            raise ConnectionError("the line went dead")
        return text(self, row)

    monkeypatch.setattr(streams.Documents, "_text", breaking)
    with pytest.raises(Unreachable, match=r"cannot reach .*/set: the line went dead") as caught:
        prepare(streamed(folder), tmp_path, tmp_path / "cache")
    assert "hf download" in caught.value.hint
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".part"]
    journal = json.loads(next((tmp_path / "cache").glob(".*/journal.json")).read_text())
    assert 150 < journal["place"]["pieces"] < 200
    read.extend([""] * 1000)
    again = prepare(streamed(folder), tmp_path, tmp_path / "cache")
    assert len([name for name in read[1200:] if name]) == len(TEXTS) - journal["place"]["pieces"]
    assert again.sha256 == whole.sha256
    assert [path.read_bytes() for path in sorted(again.folder.iterdir())] == [
        path.read_bytes() for path in sorted(whole.folder.iterdir())
    ]


def test_a_folder_of_json_lines_trains_a_model(datasets, tmp_path):
    rows = "".join(json.dumps({"body": text, "id": number}) + "\n" for number, text in enumerate(TEXTS))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_text(rows)
    arguments = ("data=hf", "data.path=lines", "data.column=body", "data/tokenizer=byte", "cache_dir=cache")
    done = run_inside("prepare", *arguments, cwd=tmp_path)
    assert done.code == 0, done.stderr
    done = run_inside("train", *SMALL, *arguments, "trainer.max_steps=1", "data.layout=packed", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "a"}\n' * 9)[:-9], b"no gzip"], ids=["cut short", "foreign"])
def test_a_damaged_file_of_a_data_set_is_said_to_be_one(datasets, content, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/train.jsonl.gz").write_bytes(content)
    done = run_inside("prepare", "data=hf", "data.path=packed", "data/tokenizer=byte", cwd=tmp_path)
    assert done.code == 2
    assert done.stderr.startswith(f"error: a file of {tmp_path}/packed is damaged"), done.stderr
    assert "get it again" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (["data.column=body"], "has no column body", "text, title, score"),
        (["data.column=score"], "holds int, not text", "text, title, score"),
        (["data.hf_split=test"], "Bad split: test", "data.hf_split="),
        (["data.subset=small"], "'small' not found", "data.subset="),
        (["data.max_documents=2", "data.val_fraction=0.001"], "none is in the val split", "data.max_documents"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(folder, tmp_path, arguments, words, hint):
    done = run_inside("prepare", "data=hf", f"data.path={folder}", "data/tokenizer=byte", *arguments, cwd=tmp_path)
    assert done.code == 2
    error, advice = done.stderr.strip().splitlines()
    assert words in error
    assert hint in advice
    assert not list((tmp_path / "data/cache").iterdir())


def test_without_the_hub_the_error_is_a_recipe(datasets, tmp_path):
    done = run("prepare", "data=tinystories", "data/tokenizer=byte", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert (done.code, done.stdout) == (2, "")
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: cannot reach the data set roneneldan/TinyStories: ")
    assert "data.path=FOLDER" in hint


def test_without_the_library_the_error_is_a_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = run_inside("prepare", "data=tinystories", "data/tokenizer=byte", cwd=tmp_path)
    assert done.code == 2
    assert done.stderr == "error: data=hf needs the datasets library\nhint: pip install -c constraints.txt -e '.[hf]'\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corpus": "hf"}, "needs data.path"),
        ({"subset": "x"}, "data.subset has no meaning"),
        ({"max_documents": 5}, "has no"),
    ],
)
def test_settings_of_data_sets_belong_to_them(options, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**options)
