"""What a job under SLURM does when its time is up: it asks to be started again."""

import os
import shutil
import signal
import subprocess
import sys

__all__ = ["job_number", "requeue_after"]


def job_number() -> str | None:
    """The number of the SLURM job, with that of its task if it is one of an array; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def requeue_after(number: int) -> None:
    """Have SLURM start the job again, after SIGUSR1 (`#SBATCH --signal=SIGUSR1@90`); for the first rank alone.

    SIGTERM is what `scancel` sends, and preemption, which requeues by itself: nothing is asked for after it. A failure
    is told and no more, as all is saved: the same command goes on.
    """
    job = job_number()
    if number != signal.SIGUSR1 or job is None:
        return
    if shutil.which("scontrol") is None:
        print(f"job {job} cannot be requeued: there is no scontrol here; submit it again", file=sys.stderr)
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    said = "requeued" if done.returncode == 0 else f"could not be requeued ({done.stderr.strip()}); submit it again"
    print(f"job {job}: {said}", file=sys.stderr)
