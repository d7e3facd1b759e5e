"""Runs parts of the work list one after the other within a time limit, and writes what came of each as soon as it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import machine, write

from s2ap_ext import backend

from . import ROOT
from .parts import Part

TAIL = 20_000  # characters of a command's output that its result keeps
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


class WorkList:
    """The results of one commit on one machine.

    Args:
        folder: where ``PART.json`` is written for each part: a folder of this commit alone.
        commit: what the results are of.
        device: what the parts run on, ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, folder: Path, commit: str, device: str) -> None:
        self.folder, self.commit, self.device = folder, commit, device

    def state(self, part: Part) -> str:
        """``"done"``, ``"failed"`` or ``"stopped"`` (by the time limit), as its result says; ``"open"`` without one."""
        try:
            return json.loads(self._file(part).read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return "open"

    def run(self, parts: Sequence[Part], minutes: float) -> bool:
        """Runs the parts that are not done and fit into the time that is left. Returns whether all that were tried are done now."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("benchmarks.gpu: no CUDA device; --tiny --device cpu shows that the parts run")
        if self.device == "cuda" and backend().cuda != "CUDA":
            raise SystemExit(f"benchmarks.gpu: the CUDA kernels are not built ({backend().why}); what would run is plain PyTorch")
        end, fine = time.monotonic() + 60 * minutes, True
        for part in parts:
            left = end - time.monotonic()
            if self.state(part) == "done":
                print(f"{part.name}: done already", flush=True)
            elif missing := [name for name in part.after if not (self.folder / name).exists()]:
                print(f"{part.name}: waits for {missing[0]}", flush=True)
            elif 60 * part.minutes > left:
                print(f"{part.name}: needs about {part.minutes:g} min, {left / 60:.1f} are left", flush=True)
            else:
                print(f"{part.name}: {part.what}", flush=True)
                result = self._run(part, end)
                fine = fine and result == "done"
                print(f"{part.name}: {result}", flush=True)
        return fine

    def _run(self, part: Part, end: float) -> str:
        about = {"part": part.name, "what": part.what, "machine": {**machine(), "commit": self.commit}, "clocks_before": clocks()}
        started, commands, state = time.monotonic(), [], "done"
        for command in part.commands():
            self.folder.mkdir(parents=True, exist_ok=True)
            code, output, seconds = call(command.words, {**os.environ, **command.environment}, end - time.monotonic())
            commands.append({"command": command.words, "exit": code, "seconds": round(seconds, 1), "output": output[-TAIL:]})
            if code != 0:
                state = "stopped" if code is None else "failed"
                break
        result = {**about, "state": state, "seconds": round(time.monotonic() - started, 1), "clocks_after": clocks(), "commands": commands}
        write(self._file(part), json.dumps(result, indent=1).encode() + b"\n")
        return state

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.name}.json"


def call(words: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str, float]:
    """Runs a command in the checkout: its exit code, None where the time was over; what it wrote; how many seconds it took."""
    started = time.monotonic()
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **how)
    except OSError as error:  # no such program
        return 127, str(error), time.monotonic() - started
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        return process.returncode, output, time.monotonic() - started
    except subprocess.TimeoutExpired:
        # A run of the pipeline saves its state when it is asked to end, and goes on from there the next time.
        for number, grace in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=grace)
                return None, output, time.monotonic() - started
        return None, "did not end", time.monotonic() - started


def clocks() -> str:
    """What nvidia-smi says of the GPU at this moment, or why it says nothing."""
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def commit_of() -> str:
    """The commit of this checkout; where files differ from it, with a digest of how."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
        changes = subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + (f"-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")
