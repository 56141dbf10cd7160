"""Two rank processes, over gloo, that are asked for one scenario after another.

They are started once. What hangs or fails is killed, and whoever asks next starts a fresh pair.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.support import CHILDREN_ARE_TRACED, ROOT
from tests.support import distributed_worker as worker

START_S = 90  # importing torch twice on a busy machine
ANSWER_S = 60


class Pair:
    """Two rank processes, and the way to ask both for a scenario."""

    def __init__(self, folder) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(
                target=worker.serve, args=(rank, str(folder / "meeting"), there), daemon=True
            )
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)
        self.asked = False

    def run(self, scenario, **arguments) -> list[dict]:
        """The results of both ranks. A failure or a hang ends both processes."""
        try:
            for end in self.ends:
                end.send((scenario.__module__, scenario.__name__, arguments))
            return self._answers(ANSWER_S if self.asked else START_S)
        except BaseException:
            self.kill()
            raise
        finally:
            self.asked = True

    def _answers(self, patience: float) -> list[dict]:
        waiting, answers, errors = dict(enumerate(self.ends)), {}, []
        deadline = time.monotonic() + patience
        while waiting:
            ready = multiprocessing.connection.wait(
                waiting.values(), max(0.0, deadline - time.monotonic())
            )
            if not ready:
                break
            for rank, end in list(waiting.items()):
                if end in ready:
                    del waiting[rank]
                    answer = torch.load(io.BytesIO(end.recv_bytes()))
                    answers[rank] = answer.get("result")
                    if "error" in answer:
                        errors.append(f"rank {rank}: {answer['error']}")
                        deadline = min(deadline, time.monotonic() + 5)  # the other may hang
        assert not errors, "\n".join(errors)
        assert not waiting, f"no answer of ranks {sorted(waiting)} in {patience} s"
        return [answers[rank] for rank in range(2)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            if process.is_alive():
                end.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def torchrun(script: Path, processes: int, *arguments: str) -> str:
    """Run a script as the docs say, in the script's folder. Returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop(CHILDREN_ARE_TRACED, None)  # a pair runs the same lines in less time
    process = subprocess.Popen(
        command, cwd=script.parent, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and the workers that it started
        process.wait()
        raise
    assert process.returncode == 0, printed
    return printed
