"""The IMDB reviews: the same in either form, split by review, cleaned as asked, trained on, evaluated."""

import json
import lzma
import re

import pytest
import reviews
from scripts import SMALL, run_inside

from tinygpt import imdb
from tinygpt.config import DataConfig, TokenizerConfig, UserError
from tinygpt.shards import prepare
from tinygpt.tokenizer import WordTokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with 40 reviews as JSON lines."""
    reviews.write_json_lines(tmp_path / "data", reviews.make(), monkeypatch)
    return tmp_path / "data"


def words(**options):
    tokenizer = TokenizerConfig("word", min_frequency=2, specials=["<pad>"])
    return DataConfig(**{"corpus": "imdb", "test_fraction": 0.1, "tokenizer": tokenizer, **options})


def documents(tokens):
    """The ids of each document of a split."""
    bounds = tokens.documents
    return [tokens.windows(bounds[i : i + 1], bounds[i + 1] - bounds[i])[0].tolist() for i in range(len(bounds) - 1)]


# The reviews


def test_both_forms_give_the_same_reviews(tmp_path, monkeypatch):
    made = reviews.make()
    archive = reviews.write_archive(tmp_path / "one", made, monkeypatch)
    assert imdb.find(tmp_path / "one") == [archive]
    reviews.write_json_lines(tmp_path / "two", made, monkeypatch)
    found = [imdb.read_reviews(imdb.find(tmp_path / name), clean=False) for name in ("one", "two")]
    assert found[0] == found[1]
    assert sorted(found[0]) == sorted(text for *_, text in made)


def test_the_order_is_by_chance_and_stays_what_it_is(folder):
    texts = imdb.read_reviews(imdb.find(folder), clean=False)
    # Who changes the order changes what every split of the real corpus holds.
    assert [re.match(r"\w+, \d+", text)[0] for text in texts[:5]] == ["Neg, 9", "Neg, 3", "Pos, 0", "Pos, 6", "Neg, 5"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("It's GREAT.<br /><br />Really: 10/10!", "its greatreally "),
        ("well-made <i>film</i>, naïve café", "wellmade film nave caf"),
        ("two\tthree  four", "two\tthree  four"),
        ("3 < 4 > 2 stays in pieces", "   stays in pieces"),
        ("an open <tag", "an open tag"),
        ("!?", ""),
    ],
)
def test_cleaning_deletes_and_puts_nothing_in_its_place(raw, clean):
    assert imdb.cleaned(raw) == clean


def test_another_file_in_its_place_is_refused(folder, monkeypatch):
    path = folder / "imdb/imdb_test.jsonl.xz"
    path.write_bytes(lzma.compress(b"{}"))
    with pytest.raises(UserError, match=r"imdb_test\.jsonl\.xz is not the file it should be"):
        imdb.find(folder)
    archive = reviews.write_archive(folder / "other", reviews.make(), monkeypatch)
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(UserError, match=r"aclImdb_v1\.tar\.gz is not the file it should be"):
        imdb.find(folder / "other")
    with pytest.raises(UserError, match=r"aclImdb_v1\.tar\.gz is damaged"):
        imdb.read_reviews([archive], clean=False)


# Splits and vocabulary


def test_splits_are_by_review(folder, tmp_path):
    prepared = prepare(words(), folder, tmp_path / "cache")
    texts = [f"\n{text}" for text in imdb.read_reviews(imdb.find(folder), clean=False)]
    parts = {"train": texts[:32], "val": texts[32:36], "test": texts[36:], "all": texts}
    for split, mine in parts.items():
        assert documents(prepared.tokens(split)) == [prepared.tokenizer.encode(text) for text in mine], split
    again = prepare(words(), folder, tmp_path / "cache")
    assert again.folder == prepared.folder
    assert documents(again.test) == documents(prepared.test)


def test_the_vocabulary_is_the_training_splits(folder, tmp_path):
    tokenizer = prepare(words(clean=True), folder, tmp_path / "cache").tokenizer
    train = imdb.read_reviews(imdb.find(folder), clean=True)[:32]
    assert tokenizer.state() == WordTokenizer.learn([f"\n{text}" for text in train], 2, ["<pad>"]).state()
    assert [tokenizer.decode([i]) for i in range(2)] == ["<unk>", "<pad>"]
    assert {word for word in tokenizer.state()["words"] if not re.fullmatch("[a-z]+", word)} == {"<pad>", "\n"}


def test_a_special_is_no_words_id():
    tokenizer = WordTokenizer.learn(["pad the pad"], 1, ["<pad>"])
    assert tokenizer.vocab_size == 4
    assert 1 not in tokenizer.encode("<pad> pad the")
    for specials in (["pad"], ["<unk>"], ["<a>", "<a>"], ["<>"]):
        with pytest.raises(UserError, match=r"data\.tokenizer\.specials"):
            TokenizerConfig("word", specials=specials)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-8])])
def test_a_cache_without_its_documents_is_built_again(folder, tmp_path, damage):
    prepared = prepare(words(), folder, tmp_path / "cache")
    expected = documents(prepared.val)
    damage(prepared.folder / "val-documents.bin")
    assert documents(prepare(words(), folder, tmp_path / "cache").val) == expected


def test_real_reviews(shared_data, tmp_path, monkeypatch):
    """1000 of them, through the same door as all."""
    rows = [json.loads(line) for line in (shared_data / "imdb/imdb_train_sample_1000.jsonl").open(encoding="utf-8")]
    made = [("train", row["label"], *row["id"].split("/")[1].split("_"), row["text"]) for row in rows]
    reviews.write_json_lines(tmp_path, made, monkeypatch)
    tokenizer = TokenizerConfig("word", min_frequency=5, specials=["<pad>"])
    prepared = prepare(words(clean=True, tokenizer=tokenizer), tmp_path, tmp_path / "cache")
    assert [len(documents(prepared.tokens(split))) for split in ("train", "val", "test")] == [800, 100, 100]
    assert prepared.tokenizer.vocab_size == 3240
    newline = prepared.tokenizer.encode("\n")[0]
    assert all(document[0] == newline and newline not in document[1:] for document in documents(prepared.tokens("all")))


# Training and evaluating


def script(verb, folder, *arguments):
    return run_inside(verb, *arguments, f"data_dir={folder}", f"cache_dir={folder}/cache", cwd=folder)


def train(folder, *arguments):
    recipe = ("data=imdb", "data.clean=true", "data.tokenizer.min_frequency=1", "data.global_batch_size=5")
    steps = ("trainer=cpu", "optimizer.schedule=constant", "optimizer.warmup_steps=0", "trainer.log_every_n_steps=1")
    done = script("train", folder, *SMALL, *recipe, *steps, *arguments)
    assert done.code == 0, done.stderr
    return done


def evaluate(folder, *arguments):
    done = script("evaluate", folder, *arguments)
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def test_a_padded_run_resumes_exactly(folder):
    steps = ("trainer.val_check_interval=3", "data.layout=padded", "model.dropout=0.1", "data.micro_batch_size=2")
    train(folder, *steps, "trainer.max_steps=6", "hydra.run.dir=whole")
    train(folder, *steps, "trainer.max_steps=3", "hydra.run.dir=half")
    train(folder, *steps, "resume=half", "trainer.max_steps=6", "hydra.run.dir=rest")
    columns = [line.split(",")[:9] for line in (folder / "whole/metrics.csv").read_text().splitlines()]
    resumed = [line.split(",")[:9] for line in (folder / "rest/metrics.csv").read_text().splitlines()]
    assert resumed[1:] == columns[-3:]
    assert columns[0][3:7] == ["val/loss", "val/bits_per_byte", "val/perplexity", "val/accuracy"]
    whole = evaluate(folder, "ckpt=whole")
    assert whole["loss"] == pytest.approx(json.loads((folder / "whole/summary.json").read_text())["best_val_loss"], rel=1e-6)


def test_both_validations_and_the_test_split(folder):
    train(folder, "data/tokenizer=char", "data.layout=packed", "trainer.max_steps=2", "hydra.run.dir=run")
    whole, openings = (evaluate(folder, "ckpt=run", f"rows={rows}") for rows in ("windows", "openings"))
    test, again = (evaluate(folder, "ckpt=run", "split=test", f"batch_size={size}") for size in (1, 7))
    prepared = prepare(words(clean=True, tokenizer=TokenizerConfig()), folder, folder / "cache")
    assert (whole["rows"], whole["tokens"]) == ("windows", len(prepared.val) - 1)
    assert (openings["rows"], openings["tokens"]) == ("openings", 4 * 16)
    assert (test["split"], test["tokens"]) == ("test", len(prepared.test) - 1)
    assert test["loss"] == pytest.approx(again["loss"], rel=1e-6)
    assert test["bits_per_byte"] is None  # cleaning loses text


def test_tokens_and_epochs_of_padded_reviews_are_those_that_count(folder):
    done = train(folder, "data.layout=padded", "trainer.max_epochs=2", "dry_run=true")
    tokens = prepare(words(clean=True, tokenizer=TokenizerConfig("word", min_frequency=1)), folder, folder / "cache").train
    rows = [min(16, len(document)) for document in documents(tokens)]
    assert sum(rows[:-1]) < 16 * 31  # some are shorter than a window
    assert re.search(r"steps  13 .*, 2\.03 epochs\)", done.stdout), done.stdout  # of 32 reviews, five a step
    assert f"tokens per step  {5 * sum(rows) / 32:.0f} " in done.stdout


def test_what_has_no_meaning_is_refused(folder, tiny_home):
    text = f"data.path={tiny_home}/it's, a=[text].txt"
    for arguments, message in {
        ("data=text", text, "data.layout=padded"): "data.layout=padded needs documents",
        ("data=text", text, "data.clean=true"): "data.clean has no meaning for the corpus text",
        ("data=imdb", "data.layout=ragged"): "data.layout=ragged is not known",
        ("data=imdb", "data.val_fraction=0.9"): "leave no training text",
        ("data=imdb", "data.tokenizer.specials=[pad]"): "'pad' cannot be one",
    }.items():
        done = script("train", folder, *SMALL, *arguments, "dry_run=true")
        assert done.code == 2, arguments
        assert done.stderr.startswith("error: ")
        assert message in done.stderr, done.stderr
        assert "\nhint: " in done.stderr
    ckpt = f"ckpt={tiny_home}/outputs/latest/checkpoints/best.ckpt"
    done = run_inside("evaluate", ckpt, "rows=openings", f"cache_dir={tiny_home}/cache", cwd=tiny_home)
    assert done.code == 2
    assert "rows=openings needs documents" in done.stderr
    done = run_inside("evaluate", ckpt, "split=test", f"cache_dir={tiny_home}/cache", cwd=tiny_home)
    assert done.code == 2
    assert "the split test holds 0 tokens" in done.stderr


def test_a_resumed_run_keeps_its_layout(folder):
    train(folder, "data=imdb", "data.global_batch_size=12", "trainer.max_steps=2", "hydra.run.dir=run")
    changed = ("data=imdb", "data.clean=true", "data.tokenizer.min_frequency=1", "data.layout=padded", "trainer.max_steps=4")
    done = script("train", folder, "resume=run", *changed)
    assert done.code == 2
    assert "a resumed run cannot change data.layout\n" in done.stderr
