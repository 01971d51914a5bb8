"""The scripts as their users meet them: what they leave, what they print where, and what they say to bad input."""

import csv
import json
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import scripts
import torch
from scripts import SMALL, files, run, run_inside

from tinygpt.config import UserError

RUN_DIRECTORY = {
    ".hydra",
    ".hydra/config.yaml",
    ".hydra/hydra.yaml",
    ".hydra/overrides.yaml",
    "train.log",
    "metrics.csv",
    "curves.png",
    "samples.md",
    "summary.json",
    "checkpoints",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
}
SUMMARY = {
    *("status", "steps", "tokens", "seconds", "tokens_per_second", "mfu", "parameters", "val_loss", "best_val_loss"),
    *("best_step", "val_bits_per_byte", "val_perplexity", "val_accuracy", "checkpoint", "seed", "corpus", "versions"),
    "overrides",
}


@pytest.fixture
def ckpt(tiny_home, tmp_path):
    """A checkpoint with nothing beside it, in a folder of its own."""
    path = tmp_path / "elsewhere" / "only.ckpt"
    path.parent.mkdir()
    shutil.copy(tiny_home / "outputs/latest/checkpoints/best.ckpt", path)
    return path


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


# train.py


def test_a_run_leaves_exactly_its_directory(tiny_home):
    latest = tiny_home / "outputs" / "latest"
    assert latest.is_symlink()
    assert not latest.readlink().is_absolute()
    assert files(latest.resolve()) == RUN_DIRECTORY
    dates = {path.name for path in (tiny_home / "outputs").iterdir()}
    assert dates == {"latest", latest.resolve().parent.name}
    ours = {"outputs", "cache", "stdout", "stderr", "done", "it's, a=[text].txt"}
    assert {path.name for path in tiny_home.iterdir()} == ours


def test_the_summary_holds_every_field(tiny_home):
    found = summary(tiny_home / "outputs/latest")
    assert set(found) >= SUMMARY
    assert all(found[name] is not None for name in SUMMARY)
    assert found["status"] == "done"
    assert (found["steps"], found["tokens"]) == (20, 20 * 12 * 16)
    assert found["best_val_loss"] <= found["val_loss"]
    assert found["corpus"]["name"] == "text"
    assert len(found["corpus"]["sha256"]) == 64
    assert "data.path='it\\'s, a=[text].txt'" in found["overrides"]
    assert Path(found["checkpoint"]).samefile(tiny_home / "outputs/latest/checkpoints/best.ckpt")


def test_results_go_to_stdout_and_the_rest_to_stderr(tiny_home):
    stdout, stderr = (tiny_home / "stdout").read_text("utf-8"), (tiny_home / "stderr").read_text("utf-8")
    best = summary(tiny_home / "outputs/latest")["best_val_loss"]
    assert f"{best:.4f}" in stdout
    assert "tokens/s" in stdout
    path = stdout.split("python sample.py ckpt=")[1].strip()
    assert not Path(path).is_absolute()  # as one would type it there
    assert (tiny_home / path).is_file()
    for line in ("parameters", "FLOPs per token", "memory", "tokens per step", "steps", "time"):
        assert f"{line}  " in stderr
    assert "FLOPs per token" not in stdout
    assert "val " in stderr
    assert "Warning" not in stderr


def test_the_learning_is_written_down(tiny_home):
    latest = tiny_home / "outputs/latest"
    with (latest / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["step"] == "0"
    assert rows[-1]["step"] == "20"
    assert float(rows[-1]["val/loss"]) < float(rows[0]["val/loss"]) - 0.1
    assert (latest / "samples.md").read_text("utf-8").count("## step") == 3
    assert (latest / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "it's, a=[text].txt" in (latest / ".hydra/overrides.yaml").read_text().replace("\\'", "'").replace("''", "'")


def test_a_dry_run_says_the_forecast_on_stdout_and_leaves_nothing(empty):
    done = run_inside("train", "dry_run=true", *SMALL, f"cache_dir={empty.parent}/cache", cwd=empty)
    assert done.code == 0
    assert "FLOPs per token" in done.stdout
    assert files(empty) == set()


def test_ctrl_c_saves_and_exits_130(tiny_home, empty):
    text = tiny_home / "it's, a=[text].txt"
    endless = ("trainer.max_steps=1000000", "trainer.val_check_interval=1000000", "trainer.log_every_n_steps=1")
    process = subprocess.Popen(
        scripts.command("train", *SMALL, "data=text", f"data.path={text}", *endless, f"cache_dir={tiny_home}/cache"),
        cwd=empty,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = empty / "outputs/latest/metrics.csv"
        end = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in stdout + stderr
    latest = empty / "outputs/latest"
    assert files(latest.resolve()) == RUN_DIRECTORY
    assert summary(latest)["status"] == "interrupted"
    saved = torch.load(latest / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert saved == summary(latest)["steps"] > 0
    named = latest.resolve().relative_to(empty.resolve())
    assert f"interrupted; to go on: python train.py resume={named}/checkpoints/last.ckpt" in stderr


@pytest.mark.parametrize(
    ("resume", "said"), [("null", "to go on: python train.py resume=run/"), ("auto", "the same command goes on from run/")]
)
def test_a_run_that_is_told_to_end_says_how_to_go_on(resume, said, empty, monkeypatch):
    def ended(config, run_dir, overrides):
        (run_dir / "checkpoints").mkdir()
        (run_dir / "checkpoints" / "last.ckpt").touch()
        raise SystemExit(143)

    monkeypatch.setattr("tinygpt.run.train", ended)
    done = run_inside("train", *SMALL, f"resume={resume}", "hydra.run.dir=run", cwd=empty)
    assert done.code == 143
    assert done.stderr == f"interrupted; {said}checkpoints/last.ckpt\n"


def test_a_sweep_ranks_its_jobs_and_a_bad_one_does_not_stop_it(tiny_home, empty):
    arguments = (
        "data=text",
        f"data.path={tiny_home}/it's, a=[text].txt",
        "trainer.max_steps=20",
        "optimizer.warmup_steps=2",
    )
    swept = ("optimizer.lr=1e-5,1e-2", "model.n_head=2,3")
    small = [item for item in SMALL if not item.startswith("model.n_head")]
    done = run_inside("train", "-m", *small, *arguments, *swept, f"cache_dir={tiny_home}/cache", cwd=empty)
    assert done.code == 2
    assert "Traceback" not in done.stderr
    assert "error: job 1: model.n_embd=16 does not divide by model.n_head=3\nhint: " in done.stderr
    (folder,) = (empty / "outputs/sweeps").iterdir()
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2", "3", "multirun.yaml", "ranking.csv", "ranking.png"}
    assert files(folder / "0") == RUN_DIRECTORY
    with (folder / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["2", "0", "1", "3"]
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    assert float(rows[0]["best_val_loss"]) < float(rows[1]["best_val_loss"])
    assert rows[0]["overrides"] == "optimizer.lr=0.01 model.n_head=2"
    assert "best val loss" in done.stdout.split(str(folder.name))[-1]


def test_a_sweep_that_hydra_refuses_leaves_nothing(empty):
    done = run_inside("train", "-m", "model=nano,nanoo", cwd=empty)
    assert_refused(done, "model=nanoo", "model=nano")
    assert files(empty) == set()


# sample.py


def test_a_lone_checkpoint_writes_text(ckpt, empty):
    done = run("sample", f"ckpt={ckpt}", "prompt=the", "max_new_tokens=20", "seed=3", cwd=empty)
    assert done.code == 0
    assert done.stderr == ""
    assert done.stdout.startswith("the")
    assert len(done.stdout) == 3 + 20 + 1
    assert run_inside("sample", f"ckpt={ckpt}", "prompt=the", "max_new_tokens=20", "seed=3", cwd=empty).stdout == done.stdout
    assert run_inside("sample", f"ckpt={ckpt}", "prompt=the", "max_new_tokens=20", "seed=4", cwd=empty).stdout != done.stdout
    assert files(empty) == set()
    assert files(ckpt.parent) == {"only.ckpt"}


def sample(ckpt, empty, *arguments, **kwargs):
    done = run_inside("sample", f"ckpt={ckpt}", *arguments, cwd=empty, **kwargs)
    assert (done.code, done.stderr) == (0, "")
    return done.stdout


def test_several_samples_are_numbered(ckpt, empty):
    out = sample(ckpt, empty, "prompt=the", "num_samples=3", "max_new_tokens=8", "seed=1")
    texts = [part.split(" ---\n", 1)[1] for part in ("\n" + out).split("\n--- ")[1:]]
    assert len(texts) == 3
    assert all(text.startswith("the") for text in texts)
    assert len(set(texts)) > 1


def test_stop_decodes_its_escapes(ckpt, empty):
    free = sample(ckpt, empty, "prompt=the", "max_new_tokens=200", "seed=1")
    assert "\n" in free.rstrip("\n")
    stopped = sample(ckpt, empty, "prompt=the", "max_new_tokens=200", "seed=1", r'stop=["\n"]')
    assert stopped == free.split("\n")[0] + "\n"


@pytest.mark.parametrize("prompt", ["on a mat", "  the  ", "us.", "", "\n", "the\nhen"])
def test_prompts_are_shown_as_typed(prompt, ckpt, empty):
    assert sample(ckpt, empty, f"prompt={prompt}", "max_new_tokens=5", "seed=1").startswith(prompt)


def test_a_prompt_from_a_file_and_from_standard_input(ckpt, empty):
    wanted = sample(ckpt, empty, "prompt=the hen\n", "max_new_tokens=5", "seed=1")
    (empty.parent / "it's, a=${prompt}.txt").write_text("the hen\n")
    path = f"prompt=@{empty.parent}/it's, a=${{prompt}}.txt"
    assert sample(ckpt, empty, path, "max_new_tokens=5", "seed=1") == wanted
    assert sample(ckpt, empty, "prompt=-", "max_new_tokens=5", "seed=1", stdin="the hen\n") == wanted


def test_an_odd_prompt_reaches_the_tokenizer_as_it_is(ckpt, empty):
    done = run_inside("sample", f"ckpt={ckpt}", "prompt=${oc.env:HOME}", cwd=empty)
    assert_refused(done, "'$'")


def test_a_prompt_longer_than_the_block_works_and_says_so(ckpt, empty):
    done = run_inside("sample", f"ckpt={ckpt}", f"prompt={'the cat ' * 10}", "max_new_tokens=5", cwd=empty)
    assert done.code == 0
    assert done.stdout.startswith("the cat " * 10)
    assert "the model reads the last 16" in done.stderr


def test_the_interactive_prompt_over_a_pipe(ckpt, empty):
    arguments = (f"ckpt={ckpt}", "interactive=true", "max_new_tokens=5", "seed=1")
    done = run_inside("sample", *arguments, cwd=empty, stdin="the\n¤\nquit\nthe\n")
    assert done.code == 0
    assert done.stdout.count(">> ") == 3
    assert "error: the character '¤'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_without_a_newline_trains_and_samples(empty):
    (empty / "line.txt").write_text("the cat sat on a mat " * 40)
    arguments = ("data=text", "data.path=line.txt", "trainer.max_steps=2", "hydra.run.dir=run", "cache_dir=cache")
    assert run_inside("train", *SMALL, *arguments, cwd=empty).code == 0
    assert len(sample("run", empty, "max_new_tokens=5")) == 6


# evaluate.py


def evaluate(*arguments, cwd):
    done = run_inside("evaluate", *arguments, cwd=cwd)
    assert done.code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def test_the_loss_is_the_run_s(tiny_home):
    found = evaluate("ckpt=latest", f"cache_dir={tiny_home}/cache", cwd=tiny_home)
    wanted = summary(tiny_home / "outputs/latest")
    assert found["loss"] == pytest.approx(wanted["best_val_loss"], abs=1e-6)
    assert found["bits_per_byte"] == pytest.approx(wanted["val_bits_per_byte"], abs=1e-5)
    assert {"perplexity", "accuracy", "tokens"} <= set(found)


def test_another_text_with_the_checkpoint_s_tokenizer(tiny_home, ckpt, empty):
    (empty / "other.txt").write_text("the dog sang to us.\n" * 50)
    arguments = (f"ckpt={ckpt}", "data=text", "data.path=other.txt", f"cache_dir={tiny_home}/cache")
    parts = {split: evaluate(*arguments, f"split={split}", cwd=empty) for split in ("train", "val", "all")}
    assert {split: part["tokens"] for split, part in parts.items()} == {"train": 899, "val": 99, "all": 999}
    assert files(empty) == {"other.txt"}
    (empty / "other.txt").write_text("@" * 500)
    assert_refused(run_inside("evaluate", *arguments, cwd=empty), "'@'")


# Closed pipes


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate"])
def test_help_into_a_closed_pipe_is_quiet(verb, empty):
    assert closed_pipe(scripts.command(verb, "--help"), empty) == ""


def test_a_sample_into_a_closed_pipe_is_quiet(ckpt, empty):
    assert closed_pipe(scripts.command("sample", f"ckpt={ckpt}", "prompt=the", "max_new_tokens=3000"), empty) == ""


def closed_pipe(command, folder):
    """What `command | true` says."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    return stderr


# Bad input


def assert_refused(done, *words):
    """Exit code 2, an `error:` line with `words`, a hint, and nothing else."""
    assert done.code == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(" ")]  # the forecast may stand before
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


BAD_TRAIN = [
    (("modle=nano",), "modle", "model"),
    (("model.n_layr=3",), "model.n_layr", "model.n_layer"),
    (("model=nanoo",), "model=nanoo", "model=nano"),
    (("trainer=gpuu",), "trainer=gpuu", "trainer=gpu"),
    (("experiment=shakespear_char",), "experiment=shakespear_char", "experiment=shakespeare_char"),
    (("data/tokenizer=chr",), "data/tokenizer=chr", "data/tokenizer=char"),
    (("trainer.max_step=3",), "trainer.max_step", "trainer.max_steps"),
    (("callbacks.samples.max_new_token=3",), "callbacks.samples.max_new_token", "callbacks.samples.max_new_tokens"),
    (("callbacks.sample.max_new_tokens=3",), "callbacks.sample", "_target_"),
    (("model.n_head=3",), "model.n_embd=16 does not divide by model.n_head=3", "15 or 18"),
    (("model.n_layer=many",), "model.n_layer", "many"),
    (("model=3",), "Got int", "--help"),
    (("model=",), "model=", "known"),
    (("=3",), "", ""),
    (("nonsense",), "nonsense", "key=value"),
    (("--nonsense",), "--nonsense", "key=value"),
    (("model.n_layer=[",), "model.n_layer=[", "key=value"),
    (("prompt=x",), "no key prompt", "known"),
    (("+model.extra=1",), "model.extra", "known"),
    (("++model.extra=1",), "model.extra", "known"),
    (("+extra.deep=1",), "extra", ""),
    (("trainer.max_steps=5", "trainer.max_tokens=5"), "max_steps and max_tokens", "one of"),
    (("trainer.max_steps=-5",), "trainer.max_steps=-5", "above 0"),
    (("trainer.max_steps=null",), "exactly one budget", "trainer.max_epochs"),
    (("trainer.accumulate_grad_batches=2",), "accumulate_grad_batches", "data.micro_batch_size"),
    (("trainer.gradient_clip_val=1",), "gradient_clip_val", "optimizer.grad_clip"),
    (("trainer.callbacks=[]",), "trainer.callbacks", "callbacks="),
    (("trainer.val_check_interval=0.5",), "trainer.val_check_interval=0.5", "steps"),
    (("trainer.precision=17",), "17", ""),
    (("callbacks.x._target_=os.system", "callbacks.x.command=id"), "os.system", "tinygpt"),
    (("callbacks.x._target_=torch.load", "callbacks.x.f=x"), "torch.load", "name"),
    (("callbacks.x._target_=torch.utils.cpp_extension.subprocess.Popen",), "Popen", "name"),
    (("callbacks.x._target_=lightning.pytorch.callbacks.Nope",), "Nope", "name"),
    (("callbacks.x=3",), "callbacks.x", "_target_"),
    (("logger.csv._target_=os.system",), "logger.csv", "os.system"),
    (("trainer._target_=os.system",), "trainer._target_=os.system", ""),
    (("data.path=x",), "data.path", "data=text"),
    (("data=text",), "data.path", "my.txt"),
    (("data=text", "data.path=nothing/*.txt"), "nothing/*.txt", "glob"),
    (("data=text", "data.path=nothing.txt"), "nothing.txt", "glob"),
    (("seed=-1",), "seed=-1", "at least 0"),
    (("seed=99999999999999999999",), "seed=", "below"),
    (("optimizer.betas=[1]",), "optimizer.betas", "0.95"),
    (("resume=nowhere",), "nowhere", "ckpt"),
    (("resume=auto",), "resume=auto", "hydra.run.dir"),
    (("init_from=nowhere",), "nowhere", "ckpt"),
    (("hydra.run.dir=/dev/null/run",), "/dev/null/run", "hydra.run.dir"),
]


@pytest.mark.parametrize(("arguments", "error", "hint"), BAD_TRAIN, ids=lambda value: str(value)[:60])
def test_train_refuses(arguments, error, hint, empty):
    budget = (
        ()
        if any("max_steps" in argument or "max_tokens" in argument for argument in arguments)
        else ("trainer.max_steps=1",)
    )
    kept = [item for item in SMALL if item.split("=")[0] not in {argument.split("=")[0] for argument in arguments}]
    done = run_inside("train", *kept, *budget, f"cache_dir={empty.parent}/cache", *arguments, cwd=empty)
    assert_refused(done, error, hint)
    assert files(empty) == set()


@pytest.mark.parametrize("trainer", ["gpu", "mps", "ddp"])
def test_missing_hardware_is_named(trainer, empty):
    here = {"gpu": torch.cuda.is_available(), "ddp": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if here[trainer]:
        pytest.skip(f"trainer={trainer} works here")
    done = run_inside("train", *SMALL, f"trainer={trainer}", cwd=empty)
    assert_refused(done, "GPU", "use trainer=cpu")
    assert files(empty) == set()


BAD_TEXTS = {
    "empty": (b"", "is empty"),
    "binary": (bytes(range(256)) * 20, "binary file"),
    "latin1": ("café ".encode("latin-1") * 100, "not UTF-8: bad byte at offset 3"),
    "short": (b"abcdefghij", "too short"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_used_is_refused(name, empty, ckpt):
    content, words = BAD_TEXTS[name]
    path = empty.parent / f"{name}.txt"
    path.write_bytes(content)
    arguments = ("data=text", f"data.path={path}", f"cache_dir={empty.parent}/cache")
    assert_refused(run_inside("train", *SMALL, *arguments, cwd=empty), words)
    if name != "short":
        assert_refused(run_inside("evaluate", f"ckpt={ckpt}", *arguments, cwd=empty), words)
    assert files(empty) == set()


def test_a_corpus_that_is_not_here_and_no_network(empty):
    closed = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), closed) | {
        "no_proxy": ""
    }
    arguments = ("data=shakespeare_char", f"data_dir={empty.parent}/data", f"cache_dir={empty.parent}/cache")
    done = run_inside("train", *SMALL, *arguments, cwd=empty, env=proxies)
    assert_refused(done, "https://", "sha256", "tinyshakespeare", "input.txt")
    assert files(empty) == set()


def foreign_checkpoints(folder, good):
    """Files that are no checkpoint of ours, by name."""
    from safetensors.torch import save_file

    content = good.read_bytes()
    (folder / "half.ckpt").write_bytes(content[: len(content) // 2])
    (folder / "nothing.ckpt").write_bytes(b"")
    (folder / "text.ckpt").write_text("hello")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps({"weights": [1.0]}))
    torch.save({"weights": torch.ones(2)}, folder / "dictionary.ckpt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.ckpt")
    torch.save(
        {"state_dict": {}, "epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6"}, folder / "lightning.ckpt"
    )
    save_file({"weights": torch.ones(2)}, str(folder / "weights.safetensors"))
    return sorted(path for path in folder.iterdir() if path != good)


def test_a_checkpoint_that_is_not_ours_is_refused(ckpt, empty):
    bad = foreign_checkpoints(ckpt.parent, ckpt)
    assert len(bad) == 8
    for path in [*bad, empty.parent / "missing.ckpt", empty.parent]:
        for verb in ("sample", "evaluate"):
            assert_refused(run_inside(verb, f"ckpt={path}", cwd=empty), str(path))
    for verb in ("sample", "evaluate"):
        assert_refused(run_inside(verb, cwd=empty), "outputs/latest", "python train.py")
    assert_refused(run_inside("train", *SMALL, f"init_from={bad[0]}", cwd=empty), str(bad[0]))
    assert files(empty) == set()


def test_another_tokenizer_than_the_checkpoint_s_is_refused(ckpt, empty):
    (empty.parent / "new.txt").write_text("\N{SNOWMAN} says ~hello~\n" * 99)
    text = ("data=text", f"data.path={empty.parent}/new.txt", f"cache_dir={empty.parent}/cache")
    for verb, start in (("train", "init_from"), ("evaluate", "ckpt")):
        done = run_inside(verb, f"{start}={ckpt}", *text, cwd=empty)
        assert_refused(done, "is unknown, like ", "\N{SNOWMAN}", "train a new model, with data/tokenizer=byte")
        done = run_inside(verb, f"{start}={ckpt}", *text, "data/tokenizer=byte", cwd=empty)
        assert_refused(done, "data/tokenizer=byte: the checkpoint brings its own tokenizer, char", "needs a new model")
    assert files(empty) == set()


BAD_SAMPLE = [
    ("max_new_tokens=0", "max_new_tokens=0"),
    ("temperature=-1", "temperature=-1"),
    ("temperature=nan", "temperature=nan"),
    ("temprature=1", "temperature"),
    ("top_k=0", "top_k=0"),
    ("top_p=1.5", "top_p=1.5"),
    ("top_p=0", "top_p=0"),
    ("min_p=2", "min_p=2"),
    ("num_samples=0", "num_samples=0"),
    ("repetition_penalty=0", "repetition_penalty=0"),
    ("stop=END", "stop"),
    ('stop=[""]', "stop string is empty"),
    ("prompt=東京", "'東'"),
    ("prompt=@nothing.txt", "nothing.txt"),
    ("prompt=@", "prompt file"),
    ("device=tpu", "device=tpu"),
    ("seed=-1", "seed=-1"),
    ("seed=99999999999999999999", "seed="),
    ("+more=1", "no key more"),
    ("-m", "-m"),
    ("trainer.max_steps=1", "trainer.max_steps"),
]


@pytest.mark.parametrize(("argument", "words"), BAD_SAMPLE)
def test_sample_refuses(argument, words, ckpt, empty):
    assert_refused(run_inside("sample", f"ckpt={ckpt}", argument, cwd=empty), words)
    assert files(empty) == set()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("split=dev", "split=dev"),
        ("batch_size=0", "batch_size=0"),
        ("data.path=x", "data=text"),
        ("data/tokenizer=char", "data=text"),
        ("data=text", "data.path"),
        ("data=txt", "data=text"),
        ("splitt=val", "split"),
    ],
)
def test_evaluate_refuses(argument, words, ckpt, empty):
    assert_refused(run_inside("evaluate", f"ckpt={ckpt}", argument, cwd=empty), words)
    assert files(empty) == set()


def test_an_error_as_a_process(empty):
    assert_refused(run("train", "modle=nano", cwd=empty), "there is no key modle", "did you mean model?")
    assert_refused(run_inside("sample", "ckpt=missing.ckpt", cwd=empty), "missing.ckpt")
    assert files(empty) == set()


def test_debug_shows_the_traceback(empty):
    with pytest.raises(UserError, match=r"there is no checkpoint missing.ckpt"):
        run_inside("sample", "ckpt=missing.ckpt", "debug=true", cwd=empty)


def test_the_users_own_folder_is_never_removed(tmp_path):
    done = run_inside("train", "hydra.run.dir=.", "data=text", "data.path=missing.txt", cwd=tmp_path)
    assert done.code == 2
    assert tmp_path.is_dir()
