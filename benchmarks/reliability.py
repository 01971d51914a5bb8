"""What a run survives: killed at any instant, stopped by signals, a disk that is full, a folder that goes away.

    python benchmarks/reliability.py [--trials 200] [--only kill,signal,disk,folder,ddp]

kill     SIGKILL at a random instant while a checkpoint is written after every step, again and again, until the run is done.
         After each kill last.ckpt must load; each run that gets done must equal, bit for bit, the one that was never killed.
signal   Ctrl-C, SIGTERM or SIGUSR1 at a random instant: the exit code, last.ckpt, and the same end when resumed.
disk     a file system of a random size that fills up (root, or a kernel that lets users mount): an error, exit code 2, and
         each checkpoint that is there loads.
folder   the run directory is removed at a random instant: an error or a run that is done, no traceback.
ddp      two processes, one of which gets SIGKILL at a random instant: all end, the resumed run is the undisturbed one.

Runs are small (1 layer, 30 steps, dropout, two micro-batches, EMA, Muon and AdamW). All but those of ddp are forked from
this process, which saves the imports. Writes benchmarks/results/reliability.json.
"""

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import ROOT, machine, write_result

from tinygpt import forecast
from tinygpt.checkpoint import open_checkpoint
from tinygpt.config import DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig, UserError
from tinygpt.run import train
from tinygpt.summary import read_summary
from tinygpt.verify import compare

STEPS = 30
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran\n", "hen", "who", "sang\n", "to", "us.")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


@dataclass
class Tally:
    """What became of the trials of one kind."""

    trials: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def count(self, problem: str | None, note: str = "") -> None:
        self.trials += 1
        self.survived += problem is None
        self.lost += [problem] if problem else []
        if note:
            self.notes[note] = self.notes.get(note, 0) + 1


class Bench:
    """A text, a run of it that nothing disturbs, and how to start others."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(self.draw.choice(WORDS) for _ in range(1000)), encoding="utf-8")
        self.whole = folder / "whole"
        self.took(self.whole)  # the first also prepares the text
        self.seconds = min(self.took(folder / f"timed-{number}") for number in range(3))

    def took(self, run_dir: Path) -> float:
        """Seconds of a run that nothing disturbs."""
        start = time.perf_counter()
        assert os.waitstatus_to_exitcode(os.waitpid(self.start(run_dir), 0)[1]) == 0
        return time.perf_counter() - start

    def config(self) -> TrainConfig:
        return TrainConfig(
            model=ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, dropout=0.2),
            data=DataConfig(
                corpus="text",
                path=str(self.text),
                global_batch_size=6,
                micro_batch_size=4,
                tokenizer=TokenizerConfig("char"),
            ),
            optimizer=OptimizerConfig(name="muon", warmup_steps=2),
            trainer={
                "_target_": "lightning.Trainer",
                "accelerator": "cpu",
                "devices": 1,
                "log_every_n_steps": 1,
                "max_steps": STEPS,
                "val_check_interval": 7,
                "enable_progress_bar": False,
            },
            callbacks={
                "best": {"_target_": "tinygpt.callbacks.BestCheckpoint"},
                "last": {"_target_": "tinygpt.callbacks.LastCheckpoint", "every_n_steps": 1, "keep_last": 2},
                "samples": {"_target_": "tinygpt.callbacks.Samples", "max_new_tokens": 5},
                "ema": {"_target_": "tinygpt.callbacks.EMA", "decay": 0.9},
            },
            logger={"csv": {"_target_": "tinygpt.loggers.CSVLogger"}},
            cache_dir=str(self.folder / "cache"),
            resume="auto",
        )

    def start(self, run_dir: Path) -> int:
        """The process of a run that starts, or goes on, in run_dir. Its exit code is that of train.py; 99: a traceback."""
        run_dir.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child:
            return child
        os.chdir(self.folder)
        forecast.repeat = lambda *_, **__: [1.0]  # a kill while the machine is measured would try nothing
        code = 99
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                train(self.config(), run_dir)
            code = 0
        except UserError:
            code = 2
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:
            (self.folder / "traceback.txt").write_text(repr(error), encoding="utf-8")
        finally:
            os._exit(code)

    def instant(self) -> float:
        return self.draw.uniform(0, self.seconds)

    def traceback(self) -> str:
        return (self.folder / "traceback.txt").read_text(encoding="utf-8")


def unreadable(run_dir: Path) -> str | None:
    """What is wrong with the checkpoints of a run, read whole."""
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt")):
        try:
            open_checkpoint(path)
            torch.load(path, weights_only=True)
        except Exception as error:
            return f"{path.name}: {error!r}"
    return None


def end(process: int, seconds: float, number: int) -> int:
    """Send a signal after so many seconds; the exit code, negative where the signal itself ended the process."""
    time.sleep(seconds)
    os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(bench: Bench, trials: int) -> Tally:
    tally, number = Tally(), 0
    while tally.trials < trials:
        run_dir, code = bench.folder / f"kill-{number}", -1
        while code != 0 and tally.trials < trials:
            code = end(bench.start(run_dir), bench.instant(), signal.SIGKILL)
            problem = unreadable(run_dir) if code in (0, -signal.SIGKILL) else f"exit code {code}: {bench.traceback()}"
            if code == 0:
                problem = problem or compare(bench.whole, run_dir).difference
            tally.count(problem, "done and compared" if code == 0 else "killed")
        shutil.rmtree(run_dir)
        number += 1
    return tally


def stop(bench: Bench, trials: int) -> Tally:
    tally = Tally()
    for number in range(trials):
        run_dir, which = bench.folder / f"signal-{number}", bench.draw.choice(list(SIGNALS))
        code = end(bench.start(run_dir), bench.instant(), which)
        early = not (run_dir / "checkpoints" / "last.ckpt").exists() and code in (-which, 130)
        done = code == 0 or (code == -which and read_summary(run_dir).get("status") == "done")  # as the process was leaving
        problem = None if code == SIGNALS[which] or early or done else f"{which.name}: exit code {code}"
        problem = problem or unreadable(run_dir)
        if not problem and os.waitstatus_to_exitcode(os.waitpid(bench.start(run_dir), 0)[1]):
            problem = f"{which.name}: cannot be resumed: {bench.traceback()}"
        problem = problem or compare(bench.whole, run_dir).difference
        tally.count(problem, "before it trained" if early else "already done" if done else which.name)
        shutil.rmtree(run_dir)
    return tally


def fill(bench: Bench, trials: int) -> Tally:
    tally, size = Tally(), (bench.whole / "checkpoints" / "last.ckpt").stat().st_size
    for _ in range(trials):
        place = Path(tempfile.mkdtemp(dir=bench.folder))
        limit = int(size * bench.draw.uniform(0.5, 4.5))
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", place], capture_output=True).returncode:
            return tally  # not allowed here
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(bench.start(place / "run"), 0)[1])
            problem = unreadable(place / "run")
            if code not in (0, 2):
                problem = problem or f"exit code {code}: {bench.traceback()}"
            tally.count(problem, "done" if code == 0 else "refused, the checkpoints before it load")
        finally:
            subprocess.run(["umount", place], check=True)
    return tally


def vanish(bench: Bench, trials: int) -> Tally:
    tally = Tally()
    for number in range(trials):
        run_dir = bench.folder / f"folder-{number}"
        process = bench.start(run_dir)
        time.sleep(bench.instant())
        run_dir.rename(bench.folder / "gone")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        problem = None if code in (0, 2) else f"exit code {code}: {bench.traceback()}"
        tally.count(problem or unreadable(run_dir) or unreadable(bench.folder / "gone"), f"exit code {code}")
        for left in (run_dir, bench.folder / "gone"):
            shutil.rmtree(left, ignore_errors=True)
    return tally


def ddp(bench: Bench, trials: int) -> Tally:
    """Real processes, by the command that a user types."""
    words = [
        *(sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", "data=text", f"data.path={bench.text}"),
        *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=16", "data.global_batch_size=4"),
        *("model.dropout=0.2", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=7", "trainer.log_every_n_steps=1"),
        *("callbacks.last.every_n_steps=1", "callbacks.samples.max_new_tokens=5", "resume=auto"),
    ]
    environment = {**os.environ, "TINYGPT_CACHE_DIR": str(bench.folder / "cache")}

    def start(run_dir: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*words, f"hydra.run.dir={run_dir}"],
            cwd=bench.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    tally, whole = Tally(), bench.folder / "ddp-whole"
    before = time.perf_counter()
    assert start(whole).wait() == 0
    seconds = time.perf_counter() - before
    number = 0
    while tally.trials < trials:
        run_dir, code = bench.folder / f"ddp-{number}", -1
        while code != 0 and tally.trials < trials:
            process = start(run_dir)
            time.sleep(bench.draw.uniform(0.4, 1) * seconds)
            family = [process.pid, *children(process.pid)]
            victim = bench.draw.choice(family)
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
            try:
                code = process.wait(30)
                problem = unreadable(run_dir)
            except subprocess.TimeoutExpired:
                problem = "still there after 30 s"
            for left in family:
                with suppress(OSError):
                    os.kill(left, signal.SIGKILL)
            process.wait()
            if code == 0:
                problem = problem or compare(whole, run_dir).difference
            tally.count(problem, "done and compared" if code == 0 else "killed")
        number += 1
    return tally


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


KINDS = {"kill": (kill, 1.0), "signal": (stop, 0.25), "disk": (fill, 0.25), "folder": (vanish, 0.1), "ddp": (ddp, 0.1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of kill; a quarter of it for signal and disk, a tenth else")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads would not live on in a forked process
    results = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), arguments.seed)
        print(f"{'':8} {'trials':>6} {'survived':>8} {'lost':>5}")
        for kind in arguments.only.split(","):
            trial, share = KINDS[kind]
            tally = trial(bench, max(1, round(share * arguments.trials)))
            results[kind] = {"trials": tally.trials, "survived": tally.survived, "lost": tally.lost, "how": tally.notes}
            print(f"{kind:8} {tally.trials:6} {tally.survived:8} {len(tally.lost):5}  {tally.notes}", flush=True)
            for problem in tally.lost:
                print(f"  {problem}")
    complete = set(results) == set(KINDS)
    write_result("reliability", {**machine(), "seed": arguments.seed, "kinds": results}, quick=not complete)


if __name__ == "__main__":
    main()
