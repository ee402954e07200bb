"""Lead the workers: compile in several, measure in one, go on with a new one if it dies."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwfuse._bench.shapes import Task

Event = dict[str, Any]
Step = Callable[[int, int, str], None]


@dataclass
class Job:
    """What to measure and how."""

    tasks: Sequence[Task]
    libraries: Sequence[str] = ()
    replays: int = 11
    patience: float = 300.0  # s without a word, after which a process hangs
    skip: list[list[Any]] = field(default_factory=list)


class Worker:
    """One process; iterate over its events, which end when it does."""

    def __init__(self, job: Job, tasks: Sequence[Task], *, warm: bool = False) -> None:
        command = [sys.executable, "-m", "hwfuse._bench.worker"]
        # Each worker compiles in itself: there are enough of them.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env=environment,
        )  # fmt: skip
        text = json.dumps(
            {"tasks": tasks, "libraries": job.libraries, "replays": job.replays, "warm": warm,
             "skip": job.skip}
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.close()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def events(self, silence: float) -> Iterator[Event]:
        """Yield what the process says; kill it if it says nothing for *silence* seconds."""
        while True:
            try:
                line = self._lines.get(timeout=silence)
            except queue.Empty:
                yield {"silent": silence}
                return
            if line is None:
                return
            yield json.loads(line)

    def waiting(self) -> list[Event]:
        """Return what the process has said since the last time."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return [json.loads(line) for line in lines if line]

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()

    def why(self) -> str:
        """Wait for the end of the process and return what it died of; empty if of nothing."""
        try:
            code = self._process.wait(30)
        except subprocess.TimeoutExpired:  # it has said everything and does not end
            self.kill()
            code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        self._errors.close()
        return "" if code == 0 else (lines or [f"exit code {code}"])[-1][:200]


def warm(job: Job, num_workers: int, step: Step) -> None:
    """Compile everything in several processes; what fails is met again when it is measured."""
    # Neighbours share kernels: dealt out in turn, the workers wait for each other's least.
    workers = [Worker(job, job.tasks[i::num_workers], warm=True) for i in range(num_workers)]
    done, heard = 0, time.monotonic()
    while any(w.is_running for w in workers) and time.monotonic() < heard + job.patience:
        for each in workers:
            for event in each.waiting():
                done, heard = done + ("done" in event), time.monotonic()
                if "start" in event:
                    step(done, len(job.tasks), f"compiles {_text(event['start'])}")
        time.sleep(0.2)
    for each in workers:
        if each.is_running:
            each.kill()
        each.why()


def measured(job: Job, step: Step) -> Iterator[Event]:
    """Yield the rows and what the worker says of its machine, crash or no crash."""
    left = list(job.tasks)
    while left:
        worker = Worker(job, left)
        current: list[Any] | None = None
        why = ""
        for event in worker.events(job.patience):
            if "start" in event:
                current = event["start"]
                step(len(job.tasks) - len(left), len(job.tasks), _text(current))
            elif "done" in event:
                left.pop(0)
            elif "silent" in event:
                why = f"it said nothing for {event['silent']:g} s"
                worker.kill()
                break
            else:
                yield event
            if "start" not in event:
                current = None  # whoever was measured is not to blame for what comes next
        end = worker.why()
        if not left:
            return
        why = why or end or "it ended early"
        if current is None:
            yield {"problem": f"{_text(left[0])}: {why}"}
            left.pop(0)
            continue
        yield {"crash": current, "why": why}
        job.skip.append(current)


def _text(words: Sequence[Any]) -> str:
    op, shape, m, *who = words
    return " ".join([op, shape, f"m={m}", *who])
