"""Training steps that take their gradient at a perturbed point: S2AP for the mask search, AWP for finetuning.

Both wrap a base optimizer and have the shape of SAM (Foret et al., arXiv 2010.01412)::

    optimizer = S2AP(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), gamma=1e-3)
    loss(model, x_adv, y).backward()
    optimizer.ascend()  # the model now stands at the perturbed point
    loss(model, x_adv, y).backward()
    optimizer.descend()  # back, and one step of the base optimizer with the second gradient

or, with a closure that clears the gradients, computes the loss and calls backward, ``optimizer.step(closure)``.
Learning-rate schedulers act on the base optimizer.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops
from .nn.layers import Pruned, pruned_layers
from .nn.mask_state import Perturbation
from .nn.selection import ascend, check_scores, descend, select_stale, step
from .reference import FLIPS, score_grad

__all__ = ["AWP", "S2AP"]


class _Ascent(ABC):
    """What S2AP and AWP share: the order of a step, warm-up, BatchNorm statistics that move once, state."""

    def __init__(
        self, model: nn.Module, base_optimizer: torch.optim.Optimizer, *, gamma: float, eps: float, warmup_epochs: int = 0
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer: expected a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        for name, value in {"gamma": gamma, "eps": eps, "warmup_epochs": warmup_epochs}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        self.model = model
        self.base_optimizer = base_optimizer
        self.gamma = gamma
        self.eps = eps
        self.warmup_epochs = warmup_epochs
        self.epoch: int | None = None
        self._statistics: list[tuple[Tensor, Tensor]] | None = None  # BatchNorm buffers and their values, while ascended

    @property
    def param_groups(self) -> list[dict]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, counted from 0: the first ``warmup_epochs`` take plain steps."""
        self.epoch = epoch

    @property
    def plain(self) -> bool:
        """Whether a step is the base optimizer's own: ``gamma`` is 0, or the epoch is one of the warm-up."""
        if self.warmup_epochs and self.epoch is None:
            raise RuntimeError(f"warmup_epochs is {self.warmup_epochs}: call set_epoch(epoch) at the start of each epoch")
        return self.gamma == 0 or (self.epoch is not None and self.epoch < self.warmup_epochs)

    def zero_grad(self) -> None:
        """Clears the gradients of the model and of everything the base optimizer holds."""
        self.model.zero_grad()
        self.base_optimizer.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One training step.

        Args:
            closure: clears the gradients (:meth:`zero_grad`), computes the loss, calls backward and returns the loss. Called
                twice on the same minibatch (once in a plain step), so craft the adversarial examples before.

        Returns:
            The loss at the unperturbed point.

        Raises:
            FloatingPointError: the loss is NaN. On the CPU it is raised before anything has changed; on CUDA, where looking waits
                for the device, at the end of the step.
        """
        plain = self.plain
        with torch.enable_grad():
            loss = closure()
        if loss.device.type == "cpu":
            _check_loss(loss)
        if plain:
            self._return_and_step()
            self._end()
        else:
            self.ascend()
            with torch.enable_grad():
                closure()
            self.descend()
        if loss.device.type != "cpu":
            _check_loss(loss)
        return loss.detach()

    @torch.no_grad()
    def ascend(self) -> None:
        """Moves the model to the perturbed point, using the gradients that the first backward left, and clears them.

        BatchNorm statistics have moved with the first forward; what the second adds is taken back by :meth:`descend`.

        Raises:
            RuntimeError: called twice, or without a backward before.
        """
        if self._statistics is not None:
            raise RuntimeError("ascend() was called twice; call descend() first")
        if not self.plain:
            self._move()
        self._statistics = [
            (buffer, buffer.clone())
            for module in self.model.modules()
            if isinstance(module, _BatchNorm) and module.training
            for buffer in module.buffers(recurse=False)
        ]
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        """Moves the model back, exactly, and takes one step of the base optimizer with the gradients of the second backward.

        Raises:
            RuntimeError: called without :meth:`ascend`.
        """
        if self._statistics is None:
            raise RuntimeError("descend() was called without ascend()")
        for buffer, value in self._statistics:
            buffer.copy_(value)
        self._statistics = None
        self._return_and_step()
        self._end()

    @abstractmethod
    def _move(self) -> None:
        """Moves the model to the perturbed point."""

    @abstractmethod
    def _return_and_step(self) -> None:
        """Moves the model back (if it was moved) and steps."""

    def _end(self) -> None:
        """Looks at the NaN counts of the selections in force: on the CPU that was done already, on CUDA it waits for the device."""
        check_scores(pruned_layers(self.model).values())

    def state_dict(self) -> dict:
        """The base optimizer's state and the epoch. ``gamma`` and the like are given anew at construction.

        Raises:
            RuntimeError: called between :meth:`ascend` and :meth:`descend`.
        """
        if self._statistics is not None:
            raise RuntimeError("state_dict() was called between ascend() and descend(); call descend() first")
        return {"base_optimizer": self.base_optimizer.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` returned."""
        self.base_optimizer.load_state_dict(state["base_optimizer"])
        self.epoch = state["epoch"]


class S2AP(_Ascent):
    """Score-space sharpness-aware step for the mask search: the gradient is taken at the perturbed scores ``s + z``.

    Per layer, ``z = gamma * ||s|| * g / (||g|| + eps)`` with ``g = dL/ds``, and 0 where ``g`` is 0. ``s + z`` is never
    written: the layers' masked weights are made at ``s + z`` in one fused call, so restoring is free and exact.

    Args:
        model: a model with pruned layers (:func:`s2ap_ext.sparsify`).
        base_optimizer: steps on whatever it holds, as a rule the scores and the BatchNorm parameters.
        gamma: size of the perturbation relative to the scores, >= 0. 0 gives the plain step, bit for bit.
        eps: added to ``||g||``.
        warmup_epochs: plain steps in so many first epochs; :meth:`set_epoch` tells which it is.
        restore: ``"before"`` the step, as SAM does it; ``"after"``, as AWP does it: step at ``s + z``, then take ``z`` off.
        defer_grads: within :meth:`step`, the backward leaves the gradients of the masked weights with this object, and the kernels
            form those of the scores where they read them. This saves some passes over the scores; but ``scores.grad`` stays None, so
            leave it off where something looks at it: gradient clipping, ``DistributedDataParallel``, hooks.

    Attributes:
        step_flips: how many mask entries the last step of the base optimizer flipped, a scalar tensor. None where that did not fall out
            of a fused step, which needs torch's SGD, momentum buffers (its first step makes them), and ``restore="before"``; plain steps
            are fused only with ``defer_grads``.

    Raises:
        ValueError: ``gamma``, ``eps`` or ``warmup_epochs`` negative or not finite; an unknown ``restore``; a model without pruned
            layers. In :meth:`step` and :meth:`descend`: NaN scores, named by layer.
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``.

    Source: S2AP, arXiv 2510.18381.

    Equivalent to::

        z = {s: gamma * s.norm() * s.grad / (s.grad.norm() + eps) for s in scores}
        for s in scores: s.add_(z[s])
        zero_grad(); loss(model, x_adv, y).backward()
        for s in scores: s.copy_(saved[s])
        base_optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 1e-3,
        eps: float = 1e-12,
        warmup_epochs: int = 0,
        restore: str = "before",
        defer_grads: bool = False,
    ) -> None:
        super().__init__(model, base_optimizer, gamma=gamma, eps=eps, warmup_epochs=warmup_epochs)
        if restore not in ("before", "after"):
            raise ValueError(f"restore: expected 'before' or 'after', got {restore!r}")
        if not pruned_layers(model):
            raise ValueError("model: expected pruned layers, found none; call s2ap_ext.sparsify(model, sparsity) first")
        self.restore = restore
        self.defer_grads = defer_grads
        self.step_flips: Tensor | None = None
        self._layers: list[Pruned] = []  # those that were moved by the last ascend()
        self._seen: list[tuple[list[str], Tensor]] = []  # names and cuts at s + z of the layers of each fused call
        self._deferred: dict[nn.Parameter, Tensor] = {}  # the masked weights' gradients, by scores

    @property
    def flips(self) -> int:
        """Mask entries that the last perturbation flipped, over all layers; 0 after a plain step. Reading it waits for the device."""
        return sum(int(cuts[:, FLIPS].sum()) for _, cuts in self._seen)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self._seen = []
        layers = pruned_layers(self.model).values() if self.defer_grads else ()
        with contextlib.ExitStack() as deferring:
            for layer in layers:
                deferring.enter_context(layer.mask_state.defer(self._defer))
            try:
                return super().step(closure)
            finally:
                self._deferred = {}

    step.__doc__ = _Ascent.step.__doc__

    def zero_grad(self) -> None:
        super().zero_grad()
        self._deferred = {}

    def ascend(self) -> None:
        self._seen = []
        super().ascend()

    ascend.__doc__ = _Ascent.ascend.__doc__

    def _defer(self, scores: Tensor, grad: Tensor) -> None:
        """Takes the gradient of a masked weight in place of that of its scores; those of tied layers add up, as autograd's do."""
        self._deferred[scores] = self._deferred[scores] + grad if scores in self._deferred else grad.detach()

    def _form_deferred(self, keep: Container[nn.Parameter] = ()) -> None:
        """Turns deferred gradients, but for those to ``keep``, into gradients of the scores where their layers stand."""
        for layer in pruned_layers(self.model).values():
            scores = layer.scores
            if scores in self._deferred and scores not in keep:
                grad = score_grad(self._deferred.pop(scores), layer.weight, layer.mask_state.position(scores, layer.weight))
                scores.grad = grad if scores.grad is None else scores.grad + grad

    def _move(self) -> None:
        layers = pruned_layers(self.model).values()
        if any(layer.scores.grad is not None for layer in layers):  # a part of the model did not defer: compiled, for example
            self._form_deferred()
        straight_through = bool(self._deferred)
        grads = self._deferred or {layer.scores: layer.scores.grad for layer in layers if layer.scores.grad is not None}
        self._layers = [layer for layer in layers if layer.scores in grads]
        if not self._layers:
            raise RuntimeError("ascend(): no layer's scores have a gradient; call loss.backward() first")
        self._seen = ascend(self._layers, grads, gamma=self.gamma, eps=self.eps, straight_through=straight_through)

    def _return_and_step(self) -> None:
        calls = self._fused_calls()
        taken = {scores for *_, together in calls for scores in together}
        self._form_deferred(keep=taken)
        moves = descend(self._layers)
        self._layers = []
        flips = [self._fused_sgd(*call, moves) for call in calls]
        every = {layer.scores for layer in pruned_layers(self.model).values() if layer.scores.grad is not None} | taken
        self.step_flips = torch.stack(flips).sum() if flips and taken == every else None

        hidden = {scores: scores.grad for scores in taken}
        for scores in taken:
            scores.grad = None  # so that the optimizer passes over it
        added = self._move_for_good(moves) if self.restore == "after" else {}
        self.base_optimizer.step()
        for scores, z in added.items():
            scores.sub_(z)
        for scores, grad in hidden.items():
            scores.grad = grad

    def _fused_calls(self) -> list[tuple[dict, bool, list[nn.Parameter]]]:
        """What :meth:`_fused_sgd` can step: (group of the base optimizer, whether the gradients are deferred, scores).

        Those are the steps of torch's SGD that end a perturbation, or that have deferred gradients.
        """
        if type(self.base_optimizer) is not torch.optim.SGD or self.restore == "after" or not (self._layers or self._deferred):
            return []
        calls: dict[tuple, tuple[dict, bool, list[nn.Parameter]]] = {}
        layers = {layer.scores: layer for layer in pruned_layers(self.model).values()}
        for number, group in enumerate(self.base_optimizer.param_groups):
            if group["maximize"] or group["differentiable"] or group["fused"] or isinstance(group["lr"], Tensor):
                continue  # steps of other arithmetic
            for p in group["params"]:
                deferred = p in self._deferred
                if p not in layers or not (deferred or p.grad is not None):
                    continue
                # torch makes a momentum buffer in the first step, so that one is torch's.
                if group["momentum"] == 0 or self.base_optimizer.state.get(p, {}).get("momentum_buffer") is not None:
                    kind = (number, p.device, p.dtype, deferred, layers[p] in self._layers)
                    calls.setdefault(kind, (group, deferred, []))[2].append(p)
        return list(calls.values())

    def _fused_sgd(self, group: dict, deferred: bool, scores: list[nn.Parameter], moves: dict[Pruned, Perturbation]) -> Tensor:
        """The step of torch's SGD on ``scores``, to the bit, and the selection there, in one call. Returns the number of mask flips."""
        # One layer for each parameter: the masks of layers that are tied to it are made when they are next used.
        first = {layer.scores: layer for layer in reversed(pruned_layers(self.model).values())}
        layers = [first[s] for s in scores]
        moved = all(layer in moves for layer in layers)
        if not moved:
            select_stale(layers)
        return step(
            layers,
            [self._deferred[s] if deferred else s.grad for s in scores],
            [self.base_optimizer.state[s]["momentum_buffer"] for s in scores] if group["momentum"] != 0 else [],
            [moves[layer] for layer in layers] if moved else None,
            straight_through=deferred,
            **{name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")},
        )

    def _move_for_good(self, moves: dict[Pruned, Perturbation]) -> dict[nn.Parameter, Tensor]:
        """Writes ``s + z`` into the scores; returns what that added."""
        added = {}
        for layer, move in moves.items():
            if layer.scores not in added:
                at = move.position(layer.scores, layer.weight)
                added[layer.scores] = at - layer.scores
                layer.scores.copy_(at)
        return added

    def _end(self) -> None:
        for names, cuts in self._seen:
            ops.check_finite(cuts, names)
        super()._end()


class AWP(_Ascent):
    """Adversarial weight perturbation for finetuning: the gradient is taken at perturbed weights ``w + v``.

    Per weight tensor of more than one dimension, ``v = gamma * ||w*m|| * (g*m) / (||g*m|| + eps)``; the mask ``m`` is the pruned
    layer's, and 1 elsewhere. Pruned weights are not perturbed and have no gradient.

    Args:
        model: any module.
        base_optimizer: steps on whatever it holds, as a rule the weights.
        gamma: size of the perturbation relative to the weights, >= 0. 0 gives the plain step, bit for bit.
        eps: added to ``||g*m||``.
        warmup_epochs: plain steps in so many first epochs; :meth:`set_epoch` tells which it is.

    Raises:
        ValueError: ``gamma``, ``eps`` or ``warmup_epochs`` negative or not finite.
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``.

    Source: Wu et al., NeurIPS 2020, arXiv 2004.05884, here restricted to the kept weights.

    Equivalent to::

        for w in weights: w.add_(gamma * (w * m).norm() * w.grad / (w.grad.norm() + eps))
        zero_grad(); loss(model, x_adv, y).backward()
        for w in weights: w.copy_(saved[w])
        base_optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 5e-3,
        eps: float = 1e-12,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(model, base_optimizer, gamma=gamma, eps=eps, warmup_epochs=warmup_epochs)
        self._saved: dict[nn.Parameter, Tensor] = {}

    def _move(self) -> None:
        layers = pruned_layers(self.model).values()
        scores = {layer.scores for layer in layers}
        masked = {layer.weight: layer.masked_weight for layer in layers}
        weights = [w for w in self.model.parameters() if w.dim() > 1 and w.grad is not None and w not in scores]
        if not weights:
            raise RuntimeError("ascend(): no weight has a gradient; call loss.backward() first")
        self._saved = {w: w.detach().clone() for w in weights}
        for w in weights:
            v = w.grad * (self.gamma * masked.get(w, w).norm() / (w.grad.norm() + self.eps))
            w.add_(v)

    def _return_and_step(self) -> None:
        for w, value in self._saved.items():
            w.copy_(value)
        self._saved = {}
        self.base_optimizer.step()


def _check_loss(loss: Tensor) -> None:
    if torch.isnan(loss):
        raise FloatingPointError("loss: expected a number, got NaN; lower the learning rate, or look at the data")
