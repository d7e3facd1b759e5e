"""The four stages: pretrain, prune, finetune, evaluate; and :func:`run`, which chains them.

Randomness: every step starts from a seed of its own, made of the recipe's seed, the stage, the epoch and the step. So the same
recipe gives the same bits on the same machine, and a stage that was stopped between two steps goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._library import backend
from ..analysis import layer_masks, mask_distance
from ..attacks import accuracy, pgd
from ..data import Batches, Dataset, Split, load_data, seeded_generator
from ..losses import LOSSES, Loss, get_loss
from ..methods import METHODS, Method
from ..models import build_model
from ..nn import refresh, sparse_layers, train_weights
from ..optim import AWP, S2AP
from ..parts import find
from ..settings import types_of
from ..speed import latency
from . import checkpoint, progress
from .recipe import Recipe, Training, from_table, to_table
from .run_folder import RESULTS, STATE, RunFolder

# Each training stage and the model that it leaves.
STAGES = {"pretrain": "dense", "prune": "pruned", "finetune": "finetuned"}


class Stopped(Exception):
    """The run was asked to stop, and did. All it needs to go on is in its folder."""


@dataclass
class Session:
    """What the stages share.

    Attributes:
        recipe: what to do.
        data: the images.
        folder: where everything is written.
        show: how progress is shown.
        stop: asked after every step; when it says True the run is saved and :class:`Stopped` raised.
    """

    recipe: Recipe
    data: Dataset
    folder: RunFolder
    show: progress.Silent = field(default_factory=progress.Silent)
    stop: Callable[[], bool] = lambda: False


# ---------------------------------------------------------------------------------------------------------------------- stages


def pretrain(session: Session, model: nn.Module) -> nn.Module:
    """Trains the dense ``model`` robustly, in place."""
    settings = session.recipe.pretrain
    _fit(session, "pretrain", model, _sgd(model.parameters(), settings), settings)
    return model


def prune(session: Session, model: nn.Module) -> nn.Module:
    """Makes the dense ``model`` sparse, in place, and searches its mask with the recipe's method, plain or with S2AP."""
    settings = session.recipe.prune
    method = make_sparse(model, session.recipe)
    optimizer = _sgd(method.prepare(model, s2ap=settings.s2ap), settings)
    if settings.s2ap:
        optimizer = S2AP(model, optimizer, gamma=settings.gamma, warmup_epochs=settings.warmup_epochs, defer_grads=True)
    _fit(session, "prune", model, optimizer, settings, after_step=method.after_step)
    return model


def finetune(session: Session, model: nn.Module) -> nn.Module:
    """Trains the weights of the pruned ``model`` under its mask, in place, with AWP where the recipe says so."""
    settings = session.recipe.finetune
    train_weights(model.requires_grad_(True))
    optimizer = _sgd([p for p in model.parameters() if p.requires_grad], settings)
    if settings.awp:
        optimizer = AWP(model, optimizer, gamma=settings.gamma, warmup_epochs=settings.warmup_epochs)
    _fit(session, "finetune", model, optimizer, settings)
    return model


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
    batches = Batches(data.test, recipe.evaluate.batch_size, device=_device_of(model))
    masks = layer_masks(model)
    scores = {layer.scores for layer in sparse_layers(model).values()}
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p not in scores)
    removed = sum(int((~mask).sum()) for mask in masks.values())

    def shown() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            if stop():
                raise Stopped
            yield batch
            show.advance(f"test {name}", "")

    _seed(recipe.seed, 0)
    show.start(f"test {name}", len(batches))
    note = ""
    try:
        found = accuracy(model if run is None else run, shown(), _test_attack(recipe))
        note = f"clean {progress.percent(found.clean)}  robust {progress.percent(found.robust)}"
    finally:
        show.stop(note)
    counts = {"images": found.images, "weights": weights, "kept": weights - removed, "sparsity": removed / weights}
    return {"model": name, "clean": found.clean, "robust": found.robust, **counts}


@contextlib.contextmanager
def reproducible(recipe: Recipe) -> Iterator[None]:
    """Within it torch uses the recipe's number of threads and, on CUDA, deterministic algorithms wherever there is one.

    Afterwards these settings and torch's random state are the caller's again.
    """
    algorithms, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    fill, threads = torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a workspace of its own
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and makes no difference here
        torch.set_num_threads(recipe.threads or threads)
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms)
        torch.backends.cudnn.deterministic = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = fill


# ------------------------------------------------------------------------------------------------------------------- the chain


def run(session: Session, stages: Iterable[str] = tuple(STAGES)) -> list[dict[str, Any]]:
    """Runs the training stages that are not done yet, evaluates the models, and writes results.json.

    A model whose checkpoint is in the folder is taken from there; so a stopped run goes on where it was, and a stage can start
    from a checkpoint that was put there.

    Returns:
        one row for each model: what :func:`evaluate` gives, and the ``seconds`` of training.

    Raises:
        Stopped: ``session.stop`` said so.
        ValueError: a stage without the model it starts from; a checkpoint that cannot be read; NaN in images or scores.
        FloatingPointError: a loss or parameter that is not finite.
    """
    recipe, folder = session.recipe, session.folder
    train = {"pretrain": pretrain, "prune": prune, "finetune": finetune}
    model, rows = None, []
    with reproducible(recipe):
        for stage, name in STAGES.items():
            file = folder.path / f"{name}.safetensors"
            if file.exists():
                model = load_model(file, data=session.data, device=pick_device(recipe.device))[0]
            elif stage not in stages:
                continue
            else:
                if stage == "pretrain":
                    model = new_model(recipe, session.data)
                elif model is None:
                    raise ValueError(f"{stage}: expected a model to start from, found no checkpoint in {folder.path}")
                train[stage](session, model)
                _save_model(file, model, name, recipe, session.data)
                (folder.path / STATE).unlink(missing_ok=True)
            if not folder.find("evaluate", model=name):
                seconds = sum(record["seconds"] for record in folder.find(stage))
                row = evaluate(recipe, session.data, model, name, show=session.show, stop=session.stop)
                folder.log({"stage": "evaluate", **row, "seconds": seconds})
            rows += folder.find("evaluate", model=name)
        layers = {name: int(mask.sum()) / mask.numel() for name, mask in layer_masks(model).items()}
        results = {"recipe": recipe.name, "attack": describe_attack(recipe), "images": rows[-1]["images"], "rows": rows, "density": layers}
        if sparse_layers(model) and _device_of(model).type == "cpu" and backend().cpu == "C++":
            results["latency"] = [asdict(row) for row in latency(model, session.data.shape)]
    checkpoint.write_json(folder.path / RESULTS, results)
    return rows


def new_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for ``data``, untrained, on the recipe's device."""
    model = _build(recipe, recipe.seed, _shape(data))
    return model.to(pick_device(recipe.device))


def make_sparse(model: nn.Module, recipe: Recipe) -> Method:
    """Turns the layers of ``model`` that the recipe prunes into pruned ones, in place, and returns its method."""
    settings = recipe.prune
    method = METHODS[settings.method]()
    exclude = [name.strip() for name in settings.exclude.split(",") if name.strip()]
    method.prune(model, settings.sparsity, granularity=settings.granularity, exclude=exclude)
    return method


def check_prunable(recipe: Recipe, data: Dataset) -> None:
    """Raises ValueError if the recipe's granularity or its excluded layers do not fit its model: before the hours of pretraining."""
    with torch.random.fork_rng():
        make_sparse(new_model(recipe, data), recipe)


def open_data(recipe: Recipe) -> Dataset:
    """The recipe's images; errors as :func:`s2ap_ext.data.load_data`."""
    data = recipe.data
    return load_data(data.name, data_dir=data.dir or None, limit=data.train_size or None, test_limit=data.test_size or None)


def load_model(path: str | Path, *, data: Dataset | None = None, device: torch.device | str = "cpu") -> tuple[nn.Module, Recipe, str]:
    """The model of a checkpoint, sparse if it was, the recipe that made it, and which model it is (dense, pruned or finetuned).

    Args:
        path: the checkpoint.
        data: images that the model must fit, by the number of their channels and classes.
        device: where the model goes.

    Raises:
        ValueError: no such file; a truncated or foreign file; one that holds no model; a model that does not fit ``data``.
    """
    tensors, about = checkpoint.load(path)
    if "shape" not in about:
        raise ValueError(f"checkpoint {path}: expected a model, found the state of the stage {about.get('stage')}")
    shape, recipe = about["shape"], from_table(about["recipe"], f"checkpoint {path}")
    if data is not None and shape != _shape(data):
        text = "{in_channels} channels and {num_classes} classes"
        raise ValueError(f"checkpoint {path}: the model is for {text.format(**shape)}, {data.name} has {text.format(**_shape(data))}")
    model = _build(recipe, 0, shape)
    if about["model"] != "dense":
        make_sparse(model, recipe)
    checkpoint.load_state(model, tensors, path)
    return model.to(device), recipe, about["model"]


def start_from(recipe: Recipe, stage: str, path: str | Path, data: Dataset) -> Recipe:
    """Checks that the checkpoint ``path`` is a model that ``stage`` can start from, and returns ``recipe`` with the sections that made it.

    Raises:
        ValueError: as :func:`load_model`; a checkpoint of another stage, or of another model than the recipe's.
    """
    _, made_by, name = load_model(path, data=data)
    if name != model_before(stage):
        raise ValueError(f"checkpoint {path}: {stage} starts from a {model_before(stage)} model, this one is {name}")
    if made_by.model != recipe.model:
        settings = " ".join(f"--set model.{key}={value}" for key, value in asdict(made_by.model).items())
        raise ValueError(f"checkpoint {path}: not the recipe's model; to take it, add {settings}")
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    return replace(recipe, **{section: getattr(made_by, section) for section in earlier})


def model_before(stage: str) -> str:
    """The name of the model that ``stage`` starts from."""
    return STAGES[list(STAGES)[list(STAGES).index(stage) - 1]]


def _shape(data: Dataset) -> dict[str, int]:
    """What a model must know of the images."""
    return {"num_classes": data.num_classes, "in_channels": data.shape[0]}


def _build(recipe: Recipe, seed: int, shape: dict[str, int]) -> nn.Module:
    """The recipe's model; its width goes to those that have one."""
    has_width = "width" in types_of(find("model", recipe.model.name).Settings)
    return build_model(recipe.model.name, seed=seed, **shape, **({"width": recipe.model.width} if has_width else {}))


def _save_model(path: Path, model: nn.Module, name: str, recipe: Recipe, data: Dataset) -> None:
    checkpoint.save(path, model.state_dict(), {"model": name, "recipe": to_table(recipe), "shape": _shape(data)})


def pick_device(name: str) -> torch.device:
    """The torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means; raises ValueError if it is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {name!r} ({str(error).splitlines()[0]})") from None
    return device


def describe_attack(recipe: Recipe) -> str:
    """The attack on the test images in a few words."""
    eps = recipe.attack.eps
    radius = f"{255 * eps:g}/255" if math.isclose(255 * eps, round(255 * eps)) else f"{eps:g}"
    return f"PGD-{recipe.evaluate.steps}, {recipe.attack.norm}, eps {radius}"


# -------------------------------------------------------------------------------------------------------------------- training


@dataclass
class _Place:
    """Where a stage stands, with the sums of the epoch so far."""

    epoch: int = 0  # from 0
    step: int = 0
    images: int = 0
    loss: float = 0.0  # sum over images
    right: int = 0  # of the attacked training images
    flips: int = 0  # by the perturbations of S2AP
    seconds: float = 0.0


def _fit(
    session: Session,
    stage: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | S2AP | AWP,
    settings: Training,
    after_step: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """The training loop of every stage, from where the folder says it stands."""
    recipe, show = session.recipe, session.show
    number = 1 + list(STAGES).index(stage)
    device = _device_of(model)
    loss_of = _loss(recipe, settings)
    batches = Batches(
        session.data.train,
        settings.batch_size,
        device=device,
        seed=1000 * recipe.seed + number,  # the stages shuffle each in its own way
        shift=recipe.data.shift,
        flip=recipe.data.flip,
    )
    few = Split(*(t[: recipe.evaluate.images_per_epoch] for t in (session.data.test.images, session.data.test.labels)))
    watched = Batches(few, recipe.evaluate.batch_size, device=device)

    place, mask = _restore(session, stage, model, optimizer)
    show.start(stage, settings.epochs * len(batches), place.epoch * len(batches) + place.step)
    try:
        while place.epoch < settings.epochs:
            epoch = place.epoch
            lr = _set_lr(optimizer, settings, epoch)
            if isinstance(optimizer, (S2AP, AWP)):
                optimizer.set_epoch(epoch)
            if mask is None:
                mask = layer_masks(model)
            model.train()
            for step, (x, y) in enumerate(batches.epoch(epoch)):
                if step < place.step:  # done before the run was stopped
                    continue
                started = time.perf_counter()
                _seed(recipe.seed, number, epoch, step)
                try:
                    loss, right = _step(model, optimizer, loss_of, x, y)
                except (ValueError, FloatingPointError) as error:
                    kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
                    raise kind(f"{stage}, epoch {epoch + 1}, step {step + 1}: {error}") from error
                after_step(model)
                place.step += 1
                place.images += len(y)
                place.loss += loss * len(y)
                place.right += right
                place.flips += optimizer.flips if isinstance(optimizer, S2AP) else 0
                place.seconds += time.perf_counter() - started
                note = f"loss {place.loss / place.images:.3f}  robust {progress.percent(place.right / place.images)}"
                show.advance(f"{stage} {epoch + 1}/{settings.epochs}", note)
                if session.stop():
                    _store(session, stage, model, optimizer, place, mask)
                    raise Stopped
            _check_finite(model, stage, epoch)

            _seed(recipe.seed, 0)
            found = accuracy(model, watched, _test_attack(recipe))
            record = {
                "stage": stage,
                "epoch": epoch + 1,
                "lr": lr,
                "loss": place.loss / place.images,
                "train_robust": place.right / place.images,
                "clean": found.clean,
                "robust": found.robust,
                "seconds": place.seconds,
            }
            if stage == "prune":
                now = layer_masks(model)
                kept = sum(int(m.sum()) for m in now.values())
                record["mask_distance"] = mask_distance(mask, now)
                record["flips"] = place.flips / max(kept * len(batches), 1)  # of the kept weights, per step
            session.folder.log(record)
            show.epoch(record, settings.epochs)
            place, mask = _Place(epoch=epoch + 1), None
            _store(session, stage, model, optimizer, place, {})
    finally:
        show.stop()


def _step(model: nn.Module, optimizer, loss_of: Loss, x: Tensor, y: Tensor) -> tuple[float, int]:
    """One training step: the loss at the unperturbed point, and how many of the attacked images are classified correctly there."""
    refresh(model)
    x_adv = loss_of.attack(model, x, y)
    first_logits: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, logits = loss_of(model, x, x_adv, y)
        loss.backward()
        first_logits.append(logits.detach())
        return loss

    loss = optimizer.step(closure).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss: expected a finite number, got {loss}; lower the learning rate")
    return loss, int((first_logits[0].argmax(dim=1) == y).sum())


def _loss(recipe: Recipe, settings: Training) -> Loss:
    offered = {**asdict(recipe.attack), "beta": settings.beta}
    return get_loss(settings.loss, **{f.name: offered[f.name] for f in fields(LOSSES[settings.loss])})


def _test_attack(recipe: Recipe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    test = recipe.evaluate
    return functools.partial(pgd, eps=recipe.attack.eps, norm=recipe.attack.norm, step_size=test.step_size, steps=test.steps)


def _sgd(parameters: Iterable[nn.Parameter], settings: Training) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def _set_lr(optimizer: torch.optim.Optimizer | S2AP | AWP, settings: Training, epoch: int) -> float:
    """Sets the learning rate of ``epoch`` (from 0): a function of the epoch alone, so a resumed run needs no scheduler's state."""
    lr = settings.lr
    if settings.schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _check_finite(model: nn.Module, stage: str, epoch: int) -> None:
    """Nothing that is not finite gets into a checkpoint."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{stage}, epoch {epoch + 1}: {name} is no longer finite; lower {stage}.lr")


# ---------------------------------------------------------------------------------------------------------- stopping, going on


def _store(session: Session, stage: str, model: nn.Module, optimizer, place: _Place, mask: dict[str, Tensor]) -> None:
    """Writes state.safetensors: the model, the optimizer, the place, and the masks that the epoch began with."""
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": t for name, t in checkpoint.optimizer_tensors(_base(optimizer)).items()}
    tensors |= {f"mask/{name}": t for name, t in mask.items()}
    checkpoint.save(session.folder.path / STATE, tensors, {"stage": stage, "place": asdict(place)})


def _restore(session: Session, stage: str, model: nn.Module, optimizer) -> tuple[_Place, dict[str, Tensor] | None]:
    """Puts model and optimizer where state.safetensors says ``stage`` stands; the start if it says nothing of this stage."""
    path = session.folder.path / STATE
    if not path.exists():
        return _Place(), None
    tensors, about = checkpoint.load(path)
    if about["stage"] != stage:
        return _Place(), None
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "mask": {}}
    for name, tensor in tensors.items():
        part, _, name = name.partition("/")
        parts[part][name] = tensor
    checkpoint.load_state(model, parts["model"], path)
    checkpoint.load_optimizer(_base(optimizer), parts["optimizer"])
    device = _device_of(model)
    return _Place(**about["place"]), {name: m.to(device) for name, m in parts["mask"].items()} or None


def _base(optimizer: torch.optim.Optimizer | S2AP | AWP) -> torch.optim.Optimizer:
    return optimizer.base_optimizer if isinstance(optimizer, (S2AP, AWP)) else optimizer


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seed(*key: int) -> None:
    """Seeds torch, on every device, with a function of ``key``."""
    torch.manual_seed(seeded_generator(*key).initial_seed())
