"""The work list: what is to be measured on a GPU, the most valuable first."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

# Of an adversarial network and two trainings cut short, the same for all arms of the comparison.
SHORT = ("pretrain.epochs=15", "prune.epochs=6", "prune.warmup_epochs=1", "finetune.epochs=8", "data.test_size=1000")
STAGES = ("pretrain", "prune", "finetune")
AUTOATTACK = "autoattack.json"  # in the folder of a run: what evaluate --json writes
APART = {"S2AP_PHASES_APART": "1"}  # each phase of an op is a launch of its own
BITS = "cpus or reference or as_the_cpu_does or three_levels or changes_no_bit"  # tests of the ops' results
# The arms of the comparison: method, kind of steps, sparsity in per cent.
ARMS = {
    f"{method}-{kind}-{sparsity}": (method, kind, sparsity)
    for sparsity in (90, 95, 99)
    for method in ("hydra", "harp")
    for kind in ("plain", "s2ap")
}
TINY = (
    *("model.width=8", "data.name=digits", "data.train_size=32", "data.test_size=16", "data.flip=false", "attack.steps=1"),
    *("evaluate.steps=1", "evaluate.images_per_epoch=8", "prune.warmup_epochs=0"),
    *(f"{stage}.{setting}" for stage in STAGES for setting in ("epochs=1", "batch_size=16")),
)


@dataclass(frozen=True)
class Setting:
    """What the parts are told: where results go, what they run on, whether at tiny size, and where the images of CIFAR-10 are."""

    folder: Path
    device: str
    tiny: bool
    data_dir: Path | None = None


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what its environment has besides."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One part of the list.

    Attributes:
        name: its results are in ``NAME.json``.
        minutes: how long it may take, a guess made before it was ever measured.
        what: for the reader of the list.
        commands: gives what it runs, in order, up to the first that fails; asked for when the part starts.
        after: files, relative to the folder of the results, without which it cannot start.
    """

    name: str
    minutes: float
    what: str
    commands: Callable[[], Sequence[Command]]
    after: tuple[str, ...] = ()


def parts(at: Setting) -> list[Part]:
    """All parts in their order."""

    def measured(name: str, minutes: float, what: str, *tests: str) -> Part:
        return Part(name, minutes, what, lambda: [_benchmark(at, name, *tests)])

    def checked(tool: str, minutes: float, what: str) -> Part:
        return Part(tool, minutes, what, lambda: [_sanitized(at, tool)])

    found = [
        Part("tests", 3, "the tests that need a GPU: bits, graphs, streams, no call that waits", lambda: [_tests(at)]),
        checked("memcheck", 2, "compute-sanitizer looks for wrong accesses in every op and dtype"),
        checked("racecheck", 3, "compute-sanitizer looks for races in every op and dtype"),
        measured("ops", 2, "the ops on ResNet-18 against their floors and torch", "test_ops.py", "-k", "ResNet-18"),
        Part("phases", 1, "how long each phase of a launch takes, and a grid barrier", lambda: [_phases(at)]),
        measured("step", 2, "a mask search step: S2AP, plain, and the sort form", "test_step.py", "-k", "test_step"),
        measured("precision", 3, "steps by precision, channels_last and compile, batch 128 and 512", "test_fast_step.py"),
        measured("scaling", 3, "the ops on 1e3 to 1e8 scores, and on many layers", "test_scaling.py"),
        measured("ops-large", 3, "the ops on WRN-28-4, ResNet-50 and ViT-B", "test_ops.py", "-k", "not ResNet-18"),
        measured("ascents", 3, "what each ascent adds to a step", "test_step.py", "-k", "ascents and dense"),
        measured("memory", 1, "the memory of an S2AP step", "test_memory.py"),
        Part("tests-apart", 2, "the ops' bits again, with a launch for each phase", lambda: [_tests_apart(at)]),
        measured("semi-structured", 3, "2:4 against dense linear layers, ViT-B, batch 1 to 256", "test_semi_structured.py"),
        *_comparison(at),
        *_examinations(at),
        Part("five-minutes", 7, "s2ap run cifar10-5min, all of it", lambda: [_run(at, "cifar10-5min", "five-minutes", ())]),
    ]
    return [replace(part, minutes=0.1) for part in found] if at.tiny else found


def _comparison(at: Setting) -> list[Part]:
    """A robust dense network, and from it each arm of {HYDRA, HARP} x {plain, S2AP} x {90, 95, 99 %} with the same short schedule."""
    found = [Part("central/dense", 4, "the robust dense network of the comparison", lambda: [_train(at, "pretrain", "dense", ())])]
    dense = at.folder / "central/dense/dense.safetensors"
    for arm, (method, kind, sparsity) in ARMS.items():
        settings = (f"prune.method={method}", f"prune.s2ap={str(kind == 's2ap').lower()}", f"prune.sparsity=0.{sparsity}")

        def commands(arm: str = arm, settings: tuple[str, ...] = settings) -> list[Command]:
            pruned = at.folder / f"central/{arm}-search/pruned.safetensors"
            search = _train(at, "prune", f"{arm}-search", settings, start=dense)
            return [search, _train(at, "finetune", arm, settings, start=pruned), _table(at)]

        what = f"{method}, {kind} steps, {sparsity} % sparse: mask search, finetuning with AWP, PGD-20"
        found.append(Part(f"central/{arm}", 4, what, commands, after=("central/dense/dense.safetensors",)))
    return found


def _examinations(at: Setting) -> list[Part]:
    """AutoAttack on the networks of the comparison, which needs ``pip install ".[eval]"``, and the sharpness of their minima."""
    found = []
    for arm in ("dense", *ARMS):
        last = "dense.safetensors" if arm == "dense" else "finetuned.safetensors"
        run = at.folder / "central" / arm

        def attacked(run: Path = run, last: str = last) -> list[Command]:
            words = ["evaluate", str(run / last), "--attack", "autoattack", "--json", str(run / AUTOATTACK), "--device", at.device]
            return [_program(at, *words), _table(at)]

        def examined(run: Path = run) -> list[Command]:
            return [_program(at, "analyze", str(run)), _table(at)]

        after = (f"central/{arm}/results.json",)
        found.append(Part(f"autoattack/{arm}", 2, f"{arm}: AutoAttack on the test images", attacked, after))
        found.append(Part(f"sharpness/{arm}", 1, f"{arm}: the largest eigenvalues of the Hessian, and landscapes", examined, after))
    return found


def _program(at: Setting, *words: str) -> Command:
    where = ["--data-dir", str(at.data_dir)] if at.data_dir and not at.tiny and words[0] == "evaluate" else []
    return Command([sys.executable, "-m", "s2ap_ext.cli", *words, *where])


def _table(at: Setting) -> Command:
    return Command([sys.executable, "-m", "benchmarks.gpu.table", str(at.folder)])


def _tests(at: Setting, *which: str) -> Command:
    tests = ["tests/test_import.py"] if at.tiny else ["-m", "cuda", *which]
    return Command([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests])


def _tests_apart(at: Setting) -> Command:
    return replace(_tests(at, "tests/test_cuda.py", "-k", BITS), environment=APART)


def _sanitized(at: Setting, tool: str) -> Command:
    ops = [sys.executable, "-m", "benchmarks.gpu.every_op", "--device", at.device]
    if at.device == "cpu":
        return Command(ops)
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return Command([program, "--tool", tool, "--error-exitcode", "1", *ops], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _phases(at: Setting) -> Command:
    words = [sys.executable, "-m", "benchmarks.gpu.phases", "--device", at.device, *(["--scores", "10000"] if at.tiny else [])]
    return Command(words)


def _benchmark(at: Setting, name: str, *tests: str) -> Command:
    file, *selection = tests
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"benchmarks/{file}", *selection, "--device", at.device]
    return Command([*words, "--table", str(at.folder / f"{name}.md"), *(["--quick"] if at.tiny else [])])


def _train(at: Setting, stage: str, run: str, settings: Sequence[str], *, start: Path | None = None) -> Command:
    return _run(at, "cifar10-5min", f"central/{run}", (*SHORT, *settings), verb=stage, start=start)


def _run(at: Setting, recipe: str, run: str, settings: Sequence[str], *, verb: str = "run", start: Path | None = None) -> Command:
    """The command that trains, or goes on where the time was over before."""
    program, out = [sys.executable, "-m", "s2ap_ext.cli", verb], at.folder / run
    environment = {"TORCH_COMPILE_DISABLE": "1"} if at.tiny else {}  # compiling takes longer than all else at tiny size
    if (out / "config.toml").exists():
        return Command([*program, "--resume", str(out)], environment)
    settings = [*settings, *(TINY if at.tiny else ())]
    where = ["--data-dir", str(at.data_dir)] if at.data_dir and not at.tiny else []
    chosen = [word for text in settings for word in ("--set", text)]
    origin = ["--from", str(start)] if start else []
    return Command([*program, recipe, "--device", at.device, *where, *chosen, *origin, "--out", str(out)], environment)
