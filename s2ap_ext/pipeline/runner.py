"""A whole run: the stages one after the other, the evaluation of each model, and the results."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from .._library import backend
from ..analysis import layer_masks
from ..attacks import accuracy
from ..data import Batches, Dataset
from ..data.checksums import REMEMBERED
from ..models import build_model
from ..nn import pruned_layers, sparsify, sparsity_table
from ..speed import latency
from . import checkpoint, progress
from .evaluation import attacked, check_attacks, radius
from .model_file import adopt, load_model, model_before, new_model, pick_device, save_model
from .plan import STAGES, plan, stage_before
from .progress import Stopped
from .records import CONFIG
from .run_folder import PLAIN, RunFolder, check_run, read_metrics
from .sections import Recipe
from .stages import TRAIN
from .trainer import Session, evaluation_attack, seed

EVALUATIONS = "evaluations"  # folder of the finished batches of attacks


def open_data(recipe: Recipe) -> Dataset:
    """The recipe's images; errors as :func:`s2ap_ext.data.load_data`."""
    data = recipe.data
    images: Dataset = data.source.make().load(limit=data.train_size or None, test_limit=data.test_size or None)
    return images


def run(session: Session, stages: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Runs the training stages that are not done yet, evaluates the models, and writes results.json.

    A model whose checkpoint is in the folder is taken from there; so a stopped run goes on where it was, and a stage can start
    from a checkpoint that was put there.

    Args:
        stages: which of the recipe's stages to run; None: all of its plan.

    Returns:
        one row for each model: what :func:`evaluate` gives, the accuracy under each of the recipe's further attacks by its name and the
        ``worst`` case over these, and the ``seconds`` of training.

    Raises:
        Stopped: ``session.stop`` said so.
        ValueError: a stage without the model it starts from; a checkpoint that cannot be read; NaN in images or scores.
        FloatingPointError: a loss or parameter that is not finite.
    """
    recipe, folder = session.recipe, session.folder
    stages = plan(recipe) if stages is None else tuple(stages)
    model, rows, plain = None, [], None
    if session.data.files.bytes >= REMEMBERED:
        session.show.say(f"checksums of the data's files ({session.data.files.bytes / 1e9:.1f} GB), which are read once for it")
    folder.check_files(session.data.files)
    with reproducible(recipe):
        for stage in plan(recipe):
            name = STAGES[stage]
            file = folder.path / f"{name}.safetensors"
            if file.exists():
                model = _own_model(session, file, name)
            elif stage not in stages:
                continue
            else:
                if stage_before(recipe, stage) is None:
                    model = new_model(recipe, session.data)
                elif model is None:
                    raise ValueError(f"{stage}: expected a model to start from, found no checkpoint in {folder.path}")
                TRAIN[stage](session, model)
                save_model(file, model, name, recipe, session.identity, session.data)
                folder.remove_state()
            if not folder.find("evaluate", model=name):
                seconds = sum(record["seconds"] for record in folder.find(stage))
                row = evaluate(recipe, session.data, model, name, show=session.show, stop=session.stop)
                if recipe.evaluate.attacks:
                    row |= _attacked(session, model, name)
                folder.log({"stage": "evaluate", **row, "seconds": seconds})
            rows += folder.find("evaluate", model=name)
            begun = (folder.path / PLAIN / CONFIG).is_file()
            if stage == "prune" and recipe.prune.s2ap and recipe.prune.control and (begun or stage in stages):
                plain = _search_plainly(session)
        assert model is not None  # of the last stage
        layers = {name: int(mask.sum()) / mask.numel() for name, mask in layer_masks(model).items()}
        results = {"recipe": recipe.name, "attack": describe_attack(recipe), "images": rows[-1]["images"], "rows": rows, "density": layers}
        if plain is not None:
            results["plain"] = plain
        if whose := check_attacks(recipe, model, session.data):
            results["attacks"] = whose
        results["environment"] = environment(next(model.parameters()).device)
        if pruned_layers(model) and next(model.parameters()).device.type == "cpu" and backend().cpu == "C++":
            results["latency"] = [asdict(row) for row in latency(model, session.data.shape)]
    if "latency" in results and recipe.evaluate.latency_at_scale:
        results["latency_at_scale"] = _latency_at_scale(recipe.prune.sparsity)  # on as many threads as torch takes
    folder.save_results(results)
    return rows


def _search_plainly(session: Session) -> dict[str, Any]:
    """The row of the model that the same search without S2AP gives: that of a run of its own, in the folder ``plain`` of this one."""
    recipe, folder = session.recipe, session.folder
    plain = replace(
        recipe,
        name=f"{recipe.name}-{PLAIN}",
        prune=replace(recipe.prune, s2ap=False, control=False),
        evaluate=replace(recipe.evaluate, latency_at_scale=False),
    )
    with RunFolder.open(folder.path / PLAIN, plain) as own:
        before = model_before(recipe, "prune")
        if before is not None:
            take_over(folder.path, own, plain, session.data, (before,))
        return run(Session(plain, session.data, own, progress.Prefixed(PLAIN, session.show), session.stop), ("prune",))[-1]


def take_over(start: Path, folder: RunFolder, recipe: Recipe, data: Dataset, models: Iterable[str] = tuple(STAGES.values())) -> None:
    """Copies ``models``, as far as the run in ``start`` has them, and their records into ``folder``, as those of the run of ``recipe``.

    What ``folder`` has already stays as it is.
    """
    present = [name for name in models if (start / f"{name}.safetensors").is_file()]
    missing = [name for name in present if not (folder.path / f"{name}.safetensors").is_file()]
    if missing:
        trained = {stage for stage, name in STAGES.items() if name in present}
        for record in read_metrics(start):
            if record["stage"] in trained or record.get("model") in present:
                folder.log(record)
    for name in missing:
        adopt(start / f"{name}.safetensors", folder.path / f"{name}.safetensors", recipe, data)


def _attacked(session: Session, model: nn.Module, name: str) -> dict[str, Any]:
    """The accuracies under the recipe's further attacks by name and in the ``worst`` case over them, and the ``engine`` they ran on."""
    keep = session.folder.path / EVALUATIONS
    found = attacked(session.recipe, session.data, model, name, keep=keep, show=session.show, stop=session.stop)
    fractions = {attack: fraction for attack, fraction in found.accuracy.items() if attack != "clean"}
    return {**fractions, "worst": found.worst, "engine": found.engine}


def _latency_at_scale(sparsity: float) -> dict[str, Any]:
    """The latency of a ResNet-18 for CIFAR with ``sparsity``: of which weights, and of what values, makes no difference to it."""
    model = build_model("resnet18", num_classes=10, seed=0)
    sparsify(model, sparsity)
    rows = latency(model, (3, 32, 32), batches=(1, 8))
    return {"network": "ResNet-18", "sparsity": sparsity, "threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers and times depend on besides its recipe: versions, the machine, the device, kernels and threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kernels = backend().cuda if device.type == "cuda" else backend().cpu
    return {
        "s2ap_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": name,
        "kernels": kernels,
        "threads": torch.get_num_threads(),
    }


def _own_model(session: Session, path: Path, name: str) -> nn.Module:
    """The model of this run called ``name``; raises ValueError if the file at its place is another's, or another model."""
    _, about = checkpoint.load(path)
    check_run(path, about, session.identity)
    if about.get("model") != name:
        raise ValueError(f"checkpoint {path}: expected the {name} model, found the {about.get('model')} one")
    return load_model(path, data=session.data, device=pick_device(session.recipe.device))[0]


def evaluate(
    recipe: Recipe,
    data: Dataset,
    model: nn.Module,
    name: str = "model",
    *,
    run: nn.Module | None = None,
    show: progress.Silent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Clean and robust accuracy on the test images under the recipe's attack, and how sparse ``model`` is.

    Args:
        run: what computes the logits in ``model``'s place, such as what :func:`s2ap_ext.engine.compile_sparse` made of it.

    Returns:
        its name (``model``), ``clean`` and ``robust`` in [0, 1], the number of ``images``, and of the weights of more than one
        dimension: ``weights``, how many are ``kept``, and ``sparsity``.

    Raises:
        Stopped: ``stop``, asked before each batch, said so.
    """
    show = show or progress.Silent()
    batches = Batches(data.test, recipe.evaluate.batch_size, device=next(model.parameters()).device)
    table = sparsity_table(model)

    def shown() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            if stop():
                raise Stopped
            yield batch
            show.advance(f"test {name}", "")

    seed(recipe.seed, 0)
    show.start(f"test {name}", len(batches))
    note = ""
    try:
        found = accuracy(model if run is None else run, shown(), evaluation_attack(recipe))
        assert found.robust is not None
        note = f"clean {progress.percent(found.clean)}  robust {progress.percent(found.robust)}"
    finally:
        show.stop(note)
    counts = {"images": found.images, "weights": table.weights, "kept": table.kept, "sparsity": table.sparsity}
    return {"model": name, "clean": found.clean, "robust": found.robust, **counts}


@contextlib.contextmanager
def reproducible(recipe: Recipe) -> Iterator[None]:
    """Within it torch uses the recipe's number of threads and, on CUDA, deterministic algorithms wherever there is one.

    Afterwards these settings and torch's random state are the caller's again.
    """
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic
    deterministic: Any = torch.utils.deterministic  # a module whose attributes are properties
    fill, threads = deterministic.fill_uninitialized_memory, torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a workspace of its own
    try:
        # The same as use_deterministic_algorithms(True, warn_only=True), which imports torch's compiler: seconds that only compiling needs.
        torch.set_deterministic_debug_mode("warn")
        if recipe.compile:  # whose settings know of it too
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        deterministic.fill_uninitialized_memory = False  # costs time and makes no difference here
        torch.set_num_threads(recipe.threads or threads)
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        if recipe.compile:
            torch.use_deterministic_algorithms(mode > 0)
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.deterministic = cudnn
        deterministic.fill_uninitialized_memory = fill


def describe_attack(recipe: Recipe) -> str:
    """The attack on the test images in a few words."""
    return f"PGD-{recipe.evaluate.steps}, {recipe.attack.norm}, eps {radius(recipe.attack.eps)}"
