"""metrics.csv through kills and resumes; W&B without a key or a network; TensorBoard in the run directory."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scripts import ROOT
from tiny import CSV, column, rows, run, summary

from tinygpt import loggers as module
from tinygpt.checkpoint import open_checkpoint
from tinygpt.config import UserError
from tinygpt.loggers import COLUMNS, CSVLogger, has_key
from tinygpt.summary import read_metrics
from tinygpt.targets import call

HEADER = ",".join(COLUMNS)
WANDB = {**CSV, "wandb": {"_target_": "tinygpt.loggers.wandb", "project": "test", "name": None, "mode": "auto"}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A machine on which nobody has logged in to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is to be asked"))


def steps(folder):
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv")]


def logged(folder, *numbers):
    logger = CSVLogger(folder)
    for step in numbers:
        logger.log_metrics({"tokens": 10 * step, "train/loss": 1.5, "unknown": 3}, step)


def test_lines_have_the_columns_of_the_contract_timing_last(tmp_path):
    logged(tmp_path, 1)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == [HEADER, "1,10,1.5,,,,,,,,,"]
    assert COLUMNS[-3:] == ("tokens_per_second", "mfu", "seconds")


def test_each_line_is_on_disk_at_once(tmp_path):
    logger = CSVLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"tokens": step}, step)
        assert steps(tmp_path)[-1] == step


def test_a_new_process_cuts_back_to_where_it_begins(tmp_path):
    logged(tmp_path, 1, 2, 3, 4, 5)
    logger = CSVLogger(tmp_path)
    logger.cut_back(3)
    assert steps(tmp_path) == [1, 2, 3]
    logger.log_metrics({"tokens": 1}, 4)
    logger.cut_back(0)  # once only: the rest is its own
    assert steps(tmp_path) == [1, 2, 3, 4]
    logged(tmp_path, 2, 3)  # who has not been told begins before the first line
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("tail", ["4", "4,40", "4,40,1.5", "4,40,1.5,,,,,,,,", "\n", "\n\n"])
def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, tail):
    logged(tmp_path, 1, 2, 3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(tail)
    assert steps(tmp_path) == [1, 2, 3]
    logged(tmp_path, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["", HEADER, "step,tok", HEADER + "\n"])
def test_a_file_that_holds_no_line_is_begun_anew(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    logged(tmp_path, 1)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == HEADER
    assert steps(tmp_path) == [1]


def test_tensorboard_writes_into_the_run_directory(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "", "version": "tensorboard"}
    run_dir = run(tmp_path, logger={**CSV, "tensorboard": node})
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for name in ("val/loss", "train/loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in column(run_dir, name)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "outputs", "run", "text.txt"]


def offline_runs(run_dir):
    return sorted(path.name.rsplit("-", 1)[1] for path in (run_dir / "wandb").glob("offline-run-*"))


def test_wandb_without_a_key_is_kept_offline_and_says_how_to_upload_it(tmp_path, no_account, capfd):
    run_dir = run(tmp_path, logger=WANDB)
    said = capfd.readouterr().err
    assert said.count("wandb sync") == 1
    folder = re.search(r"wandb sync (\S+)", said)[1]
    assert any(name.endswith(".wandb") for name in os.listdir(folder))  # noqa: PTH208
    assert folder.startswith(str(run_dir))
    assert "WANDB_MODE" not in os.environ
    assert len(rows(run_dir)) == 7  # metrics.csv as always
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["cache", "outputs", "run", "text.txt"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_another_does_not(tmp_path, no_account):
    first = run(tmp_path, "first", logger=WANDB)
    second = run(tmp_path, "second", ["trainer.max_steps=9"], steps=9, logger=WANDB, resume="first")
    third = run(tmp_path, "third", logger=WANDB)
    assert offline_runs(first) == offline_runs(second)
    assert len(offline_runs(second)) == 1
    assert offline_runs(third) != offline_runs(first)  # one process, two runs: the first was finished
    card = open_checkpoint(second / "checkpoints" / "last.ckpt")["tinygpt"]
    assert card["logger_ids"] == {"wandb": offline_runs(first)[0]}


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=sometimes") as error:
        module.wandb("p", tmp_path, mode="sometimes")
    assert "auto, online, offline" in error.value.hint


def test_where_a_key_is_looked_for(tmp_path, no_account, monkeypatch):
    assert not has_key()
    (tmp_path / "home").mkdir(exist_ok=True)
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40)
    netrc.chmod(0o600)
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_key()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not has_key()


NOBODY_ANSWERS = """
from pathlib import Path
from tinygpt.loggers import wandb, finish
logger = wandb("p", Path("run").absolute(), mode={mode!r})
logger.log_metrics({{"x": 1.0}}, step=1)
finish([logger])
"""


def unreachable(folder, mode):
    (folder / "run").mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    fake = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(folder / "home")}
    code = NOBODY_ANSWERS.format(mode=mode)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**clean, **fake}, capture_output=True, text=True, timeout=100
    )


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_no_reason_to_stop(tmp_path):
    done = unreachable(tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb sync") == 1
    assert len(offline_runs(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_server_that_must_answer_and_does_not_is_an_error(tmp_path):
    done = unreachable(tmp_path, "online")
    assert done.returncode == 1
    assert "UserError: no W&B server takes this run" in done.stderr


def test_a_failed_run_is_marked_as_failed(tmp_path, monkeypatch):
    from tinygpt.lit import LitGPT

    endings = []
    monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: endings.append(status))
    run(tmp_path, "good")
    monkeypatch.setattr(LitGPT, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "bad")
    assert endings[0] == "success"
    assert "failed" in endings
    assert summary(tmp_path / "bad")["status"] == "failed"


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs to begin."""

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["content-length"])).decode(errors="replace")
        entity = {"name": "me", "id": "1"}
        bucket = {"id": "1", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
        bucket["project"] = {"id": "1", "name": "p", "entity": entity}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in asked else {"model": None}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


GOES_AWAY = """
from pathlib import Path
from tinygpt import loggers
loggers.FINISH_SECONDS = 1
logger = loggers.wandb("p", Path("run").absolute(), mode="online")
print(logger.experiment.offline, flush=True)
input()
logger.log_metrics({"x": 1.0}, step=1)
loggers.finish([logger])
"""


def test_a_server_that_goes_away_does_not_hold_a_run_at_its_end(tmp_path):
    (tmp_path / "run").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    fake = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "HOME": str(tmp_path)}
    fake |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GOES_AWAY]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**clean, **fake}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "False\n"  # online
        server.shutdown()
        server.server_close()
        try:
            process.stdin.write("\n")
            process.stdin.flush()
            process.wait(timeout=60)  # for good, if W&B's own default held
        finally:
            process.kill()
    assert process.returncode == 0
    assert list(tmp_path.rglob("*.wandb"))  # to be uploaded later


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "Neither `tensorboard` nor `tensorboardX` is available.\nRequirement 'tensorboardX' not met.",
            "-e '.[tensorboard]'",
        ),
        ("Module not found: 'comet_ml'. HINT: ...", "install it with pip"),
    ],
)
def test_a_logger_whose_package_is_missing_says_what_to_install(said, hint):
    def logger():
        raise ModuleNotFoundError(said)

    with pytest.raises(UserError, match=r"logger\.x needs a package that is not installed: ") as caught:
        call(logger, {}, "logger.x")
    assert "\n" not in str(caught.value)
    assert caught.value.hint.endswith(hint)
