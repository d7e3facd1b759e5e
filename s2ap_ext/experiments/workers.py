"""Does jobs one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ..pipeline import Stopped
from .jobs import Job, do

LOOK = 0.2  # seconds between two looks whether to stop


@dataclass(frozen=True)
class Done:
    """The job was done; ``row`` is that of its last model."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The job cannot be done; ``why`` says so in one line."""

    why: str


Outcome = Done | Failed


def work(jobs: Sequence[Job], workers: int, stop: Callable[[], bool]) -> Iterator[tuple[Job, Outcome]]:
    """Does ``jobs``, each after the one it starts from if that is among them, and yields each with its outcome as it ends.

    A job whose start has failed is not done and not yielded. When ``stop`` says so, the jobs in progress stop and no other starts.

    Args:
        workers: how many jobs at a time. One is done in this process; several in as many processes, started anew (``spawn``), which end
            with this one, however it ends.
    """
    return _here(jobs, stop) if workers == 1 else _in_processes(jobs, workers, stop)


def attempt(job: Job, stop: Callable[[], bool]) -> Outcome | None:
    """Does ``job``; None if it was stopped."""
    try:
        return Done(do(job, stop))
    except Stopped:
        return None
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return Failed(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return Failed(f"not enough memory ({' '.join(str(error).split())})")


class _Queue:
    """Which jobs can be done next."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = list(jobs)
        self.missing = {job.folder for job in jobs}  # folders whose job is not done

    def next(self) -> Job | None:
        for job in self.waiting:
            if job.start not in self.missing:
                self.waiting.remove(job)
                return job
        return None

    def ended(self, job: Job, outcome: Outcome) -> None:
        if isinstance(outcome, Done):
            self.missing.discard(job.folder)


def _here(jobs: Sequence[Job], stop: Callable[[], bool]) -> Iterator[tuple[Job, Outcome]]:
    queue = _Queue(jobs)
    while not stop() and (job := queue.next()) is not None:
        outcome = attempt(job, stop)
        if outcome is None:
            return
        queue.ended(job, outcome)
        yield job, outcome


# ---------------------------------------------------------------------------------------------------------------------- processes


def _in_processes(jobs: Sequence[Job], workers: int, stop: Callable[[], bool]) -> Iterator[tuple[Job, Outcome]]:
    queue = _Queue(jobs)
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Job]] = {}
    stopping = False
    try:
        while True:
            while len(busy) < workers and not stopping and (job := queue.next()) is not None:
                worker = idle.pop() if idle else _Worker()
                worker.connection.send(job)
                busy[worker.connection] = worker, job
            if not busy:
                return
            ready = wait(list(busy), LOOK)
            for connection in [connection for connection in busy if connection in ready]:
                worker, job = busy.pop(connection)
                outcome, alive = worker.outcome()
                if alive:
                    idle.append(worker)
                if outcome is not None and not (stopping and not alive):
                    queue.ended(job, outcome)
                    yield job, outcome
            if stop() and not stopping:
                stopping = True
                for worker, _ in busy.values():
                    worker.process.terminate()
    finally:
        for worker, _ in busy.values():
            worker.process.kill()  # a run survives that
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.close()


class _Worker:
    """A process that does jobs, and this end of the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self) -> tuple[Outcome | None, bool]:
        """What became of the job, None if it was stopped; and whether the process lives."""
        try:
            return self.connection.recv(), True
        except (EOFError, OSError):
            self.close()
            return Failed(f"its process ended with exit code {self.process.exitcode}"), False

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def serve(jobs: Connection, parent: int) -> None:
    """What a worker's process does: a job at a time until nobody sends one. SIGTERM stops the job, as does the end of the parent."""
    told = False

    def handle(signum: int, frame: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, handle)
    for pressed in (signal.SIGINT, signal.SIGHUP):
        signal.signal(pressed, signal.SIG_IGN)  # they reach the parent too, which decides
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        jobs.send(attempt(job, lambda: told or os.getppid() != parent))
