"""Where numbers go: metrics.csv, which is ours and always there, and Weights & Biases with a fallback that needs no network.

Any logger of Lightning's works through its `_target_`; each gets the run directory as its save_dir.
"""

import contextlib
import csv
import errno
import io
import logging
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from tinygpt.config import UserError
from tinygpt.summary import read_metrics
from tinygpt.sweep import sweep_of

log = logging.getLogger("tinygpt")

COLUMNS = (
    "step",
    "tokens",
    "train/loss",
    "val/loss",
    "val/bits_per_byte",
    "val/perplexity",
    "val/accuracy",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "seconds",
)  # timing comes last: all before it is the same in every run of one config and seed


# Of waiting for W&B's server, before a run (which with wandb's own start comes to less than 20) and when it is over.
INIT_SECONDS, FINISH_SECONDS = 12, 60


class CSVLogger(Logger):
    """metrics.csv: one line a step that is logged, on disk at once."""

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path, self.begun, self.last = Path(save_dir) / "metrics.csv", False, -1
        self.seconds = 0.0  # what the kept lines had taken
        self.waiting: list[list[Any]] = []  # lines that the disk has refused so far
        self.warned = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in .hydra/ and in the checkpoint."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        if not self.begun:
            self.cut_back(step - 1)
        elif step == self.last:  # a callback after ours has ended the run, which is then validated
            self.begun, self.waiting = False, [line for line in self.waiting if line[0] != step]
            with contextlib.suppress(OSError):  # then the step has two lines
                self.cut_back(step - 1)
            self.begun = True
        self.last = step
        self.waiting.append([step, *("" if metrics.get(c) is None else metrics[c] for c in COLUMNS[1:])])
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()

    def flush(self) -> None:
        """Write what waits; where the disk refuses it goes on waiting."""
        try:
            if self.waiting:
                self.write()
                self.waiting = []
        except OSError as error:
            if not self.warned:
                log.warning("%s cannot be written: %s; its lines wait for the next try", self.path, error.strerror)
            self.warned = True

    def write(self) -> None:
        """Append what waits, whole or not at all; with a header where the file is new, or has gone."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows([*([] if self.path.exists() else [COLUMNS]), *self.waiting])
        content = text.getvalue().encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(content) < len(content):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @rank_zero_only
    def sync(self) -> None:
        """Have the lines survive a power cut: a checkpoint of this step is about to."""
        self.flush()
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    @rank_zero_only
    def cut_back(self, step: int) -> None:
        """Header, and of the lines that an earlier process left those up to `step`: a resumed run writes the rest again."""
        if self.begun:
            return
        kept = [row for row in read_metrics(self.path) if int(row["step"]) <= step] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self.begun = True
        self.seconds = float(kept[-1]["seconds"] or 0) if kept else 0.0


def wandb(
    project: str,
    save_dir: str | Path,
    name: str | None = None,
    id: str | None = None,
    mode: str = "auto",
    group: str | None = None,
) -> Logger:
    """A W&B run: online where there is a key and a server, else offline, which it says once with how to upload it.

    id continues that run. The jobs of a sweep are a group of that name, unless another is given. mode: auto | online |
    offline. Raises UserError where wandb is not installed.
    """
    if mode not in ("auto", "online", "offline"):
        raise UserError(f"logger.wandb.mode={mode} is not known", "choose one of: auto, online, offline")
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # only the first process talks to W&B
        return CSVLogger(save_dir)
    try:
        import wandb as library
    except ImportError as error:
        raise UserError("the wandb package is not installed", "pip install wandb") from error
    from lightning.pytorch.loggers import WandbLogger

    sweep = sweep_of(Path(save_dir))
    if sweep:
        name, group = name or f"{sweep.name}/{Path(save_dir).name}", group or sweep.name
    wanted: dict[str, Any] = {
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "console": "off",
        "silent": True,
    }
    known = {key: value for key, value in wanted.items() if key in library.Settings.model_fields}  # older ones wait on
    settings = library.Settings(disable_git=True, **known)
    options: dict[str, Any] = {"project": project, "name": name, "group": group, "id": id}
    options |= {"dir": str(save_dir), "settings": settings}
    run = None
    if mode == "online" or (mode == "auto" and has_key()):
        run = connect(library, options, required=mode == "online")
    if run is None:
        run = library.init(mode="offline", **options)
        folder = Path(run.settings.sync_dir)
        print(
            f"W&B: no key or no server, so this run is kept offline; upload it with: wandb sync {folder}",
            file=sys.stderr,
        )
    return WandbLogger(experiment=run, save_dir=str(save_dir))


def connect(library: Any, options: dict[str, Any], required: bool) -> Any:
    """An online run, or None where no server answers and none is required."""
    try:
        return library.init(mode="online", resume="allow", **options)
    except (library.errors.CommError, library.errors.UsageError, library.errors.AuthenticationError) as error:
        if required:
            raise UserError("no W&B server takes this run", "run `wandb login`, or logger.wandb.mode=offline") from error
        return None


def has_key() -> bool:
    """Whether a W&B key is at hand, in the environment or in ~/.netrc; nobody is asked for one."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def finish(loggers: list[Logger], well: bool = True) -> None:
    """End what a logger holds open; without this the second job of a sweep goes on in the first one's W&B run."""
    for logger in loggers:
        logger.finalize("success" if well else "failed")
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish(exit_code=0 if well else 1)  # type: ignore[attr-defined]
