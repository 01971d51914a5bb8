"""Which of a run's processes this one is: what torchrun, srun or Lightning has put into its environment."""

import contextlib
import os
import subprocess
import time

PLACES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
PATIENCE = 3.0  # seconds in which the first process says what all of them would say


def is_first() -> bool:
    """Whether this process speaks and writes for the run: its only one, or the first of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's order of machines need not be srun's
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in PLACES)


def launched() -> tuple[int, int] | None:
    """(processes on each machine, machines) where torchrun or srun started them; None where Lightning does, or no one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        machines = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // machines, machines
    return None


def has_lost_contact(error: BaseException) -> bool:
    """Whether an exception is that of a collective operation whose partner has gone."""
    import torch.distributed

    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    broken = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return broken or isinstance(error, torch.distributed.DistError)


def give_way() -> None:
    """To be called before an error is said: where the first process ends with the same one, its launcher ends this one."""
    if launched() and not is_first():
        time.sleep(PATIENCE if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0" else 2 * PATIENCE)


def requeue() -> None:
    """Have SLURM start this job again, if there is one."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")  # a task's id may be the whole array's
    if job:
        with contextlib.suppress(OSError):
            subprocess.run(["scontrol", "requeue", job], check=False)
