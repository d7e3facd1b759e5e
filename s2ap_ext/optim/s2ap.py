"""S2AP: the step for the mask search, with the gradient at perturbed scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.layers import Pruned, pruned_layers
from ..nn.mask_state import Perturbation, PrunedLayer
from ..nn.selection import ascend, descend
from ..reference import CUT_COLUMNS, FLIPS
from . import fused_sgd
from .ascents import Ascent
from .deferred import Deferred
from .flip_budget import FlipBudget, budget_of
from .gammas import Gamma, gamma_per_layer
from .perturbed import Perturbed

GAMMA = "gamma"


class S2AP(Perturbed):
    """Score-space sharpness-aware step for the mask search: the gradient is taken at the perturbed scores ``s + z``.

    Per layer, ``z = gamma * ||s|| * g / (||g|| + eps)`` with ``g = dL/ds``, and 0 where ``g`` is 0. ``s + z`` is never
    written: the layers' masked weights are made at ``s + z`` in one fused call, so restoring is free and exact.

    Args:
        model: a model with pruned layers (:func:`s2ap_ext.sparsify`).
        base_optimizer: steps on whatever it holds, as a rule the scores and the BatchNorm parameters. Only scores are perturbed.
        gamma: size of the perturbation relative to the scores, >= 0. One for all layers; or by patterns of layer names, such as
            ``{"layer1.*": 0, "*": 1e-3}``, where the first that fits counts; or float64 [L], in the order of
            :func:`s2ap_ext.nn.pruned_layers`. 0 everywhere gives the plain step, bit for bit. ``"flips:P"``: in each step and layer one
            with which ``P`` times as many mask entries flip as weights are kept; ``"track:P"``: the same on average, by the
            steps before (:class:`s2ap_ext.optim.FlipBudget`).
        ascent: when to perturb, along which gradient and how far: the name of a registered ascent, or an :class:`Ascent`.
        eps: added to ``||g||``.
        warmup_epochs: plain steps in so many first epochs; :meth:`set_epoch` tells which it is.
        restore: ``"before"`` the step, as SAM does it; ``"after"``, as AWP does it: step at ``s + z``, then take ``z`` off.
        defer_grads: within :meth:`step`, the backward leaves the gradients of the masked weights with this object, and the kernels
            form those of the scores where they read them. This saves some passes over the scores; but ``scores.grad`` stays None, so
            leave it off where something looks at it: gradient clipping, ``DistributedDataParallel``, hooks.

    Attributes:
        gamma: float64 [L], on the layers' device; every form of the argument can be assigned. With ``"flips:P"`` those of the last
            perturbation, with ``"track:P"`` those of the next.
        step_flips: how many mask entries the last step of the base optimizer flipped, a scalar tensor. None where that did not fall out
            of a fused step, which needs torch's SGD, momentum buffers (its first step makes them), and ``restore="before"``; plain steps
            are fused only with ``defer_grads``.

    Raises:
        ValueError: ``gamma``, ``eps`` or ``warmup_epochs`` negative or not finite; a ``gamma`` that does not fit the layers; an unknown
            ``ascent`` or ``restore``; a model without pruned layers. In :meth:`step` and :meth:`descend`: NaN scores, named by layer.
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``, or ``ascent`` neither a text nor an :class:`Ascent`.

    Source: S2AP, arXiv 2510.18381.

    Equivalent to::

        z = {s: gamma * s.norm() * s.grad / (s.grad.norm() + eps) for s in scores}
        for s in scores: s.add_(z[s])
        zero_grad(); loss(model, x_adv, y).backward()
        for s in scores: s.copy_(saved[s])
        base_optimizer.step()
    """

    _gamma: Tensor

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        gamma: Gamma | str = 1e-3,
        ascent: str | Ascent = "exact",
        eps: float = 1e-12,
        warmup_epochs: int = 0,
        restore: str = "before",
        defer_grads: bool = False,
    ) -> None:
        super().__init__(model, base_optimizer, ascent=ascent, eps=eps, warmup_epochs=warmup_epochs)
        if restore not in ("before", "after"):
            raise ValueError(f"restore: expected 'before' or 'after', got {restore!r}")
        if not pruned_layers(model):
            raise ValueError("model: expected pruned layers, found none; call s2ap_ext.sparsify(model, sparsity) first")
        self.gamma = gamma
        self.restore = restore
        self.defer_grads = defer_grads
        self.step_flips: Tensor | None = None
        self._deferred = Deferred()
        self._layers: list[Pruned] = []  # those that stand at s + z
        self._straight_through = False  # whether they went there along deferred gradients
        self._seen: list[tuple[list[str], Tensor]] = []  # names and cuts at s + z of the layers of each fused call
        self._cuts: dict[Pruned, Tensor] = {}  # the same cuts by layer

    @property
    def gamma(self) -> Tensor:
        device = next(iter(self._pruned())).scores.device
        if self._gamma.device != device:
            self._gamma = self._gamma.to(device)
        return self._gamma

    @gamma.setter
    def gamma(self, gamma: Gamma | str) -> None:
        self._budget = budget_of(gamma) if isinstance(gamma, str) else None
        values = gamma_per_layer(FlipBudget.START if isinstance(gamma, str) else gamma, pruned_layers(self.model))
        # Known on the host, so that no step waits for the device.
        self._still = not any(values) or (self._budget is not None and self._budget.share == 0)
        self._gamma = torch.tensor(values, dtype=torch.float64)

    def gammas(self) -> dict[str, float]:
        return {} if self.plain else dict(zip(pruned_layers(self.model), self.gamma.tolist(), strict=True))

    gammas.__doc__ = Perturbed.gammas.__doc__

    def layer_flips(self) -> dict[str, int]:
        """Mask entries that the last perturbation flipped, by layer; 0 after a plain step. Waits for the device."""
        return dict(zip(pruned_layers(self.model), self.changes()[:, 0].tolist(), strict=True))

    def changes(self) -> Tensor:
        """What the last perturbation changed, int64 [L, 2] on the layers' device: flipped mask entries, and scores of another sign.

        Where a layer's are both 0, its masked weight and the gradient with respect to its scores are the same at ``s`` and ``s + z``.
        """
        none = torch.zeros(CUT_COLUMNS, dtype=torch.int64, device=self.gamma.device)
        return torch.stack([self._cuts[layer].to(none.device) if layer in self._cuts else none for layer in self._pruned()])[:, FLIPS:]

    def unchanged(self) -> bool:
        """Whether the move has flipped no mask entry and changed no score's sign. Reading it waits for the device."""
        return not self.changes().any()

    def zero_grad(self) -> None:
        super().zero_grad()
        self._deferred.clear()

    def perturbed_parameters(self) -> dict[str, nn.Parameter]:
        """The scores of the pruned layers."""
        scores = {layer.scores for layer in self._pruned()}
        return {name: p for name, p in self.model.named_parameters() if p in scores}

    def gradients(self) -> dict[str, Tensor]:
        self._deferred.form(self._pruned())
        return super().gradients()

    gradients.__doc__ = Perturbed.gradients.__doc__

    def _pruned(self) -> list[Pruned]:
        return list(pruned_layers(self.model).values())

    def _begin(self) -> None:
        self._seen, self._cuts = [], {}

    def _take(self, backward: Callable[[], Tensor], along: Mapping[str, Tensor] | None) -> None:
        with self._deferred.collecting(self._pruned() if self.defer_grads else []):
            super()._take(backward, along)

    def _check_scores(self) -> None:
        for names, cuts in self._seen:
            ops.check_finite(cuts, names)
        super()._check_scores()

    def _gamma_is_zero(self) -> bool:
        return self._still

    def _move(self, along: dict[nn.Parameter, Tensor] | None, gamma: Tensor | None) -> None:
        layers, own = self._pruned(), gamma is None
        gamma = self.gamma if gamma is None else gamma
        if gamma.shape != (len(layers),):
            raise ValueError(f"gamma: expected float64 of shape ({len(layers)},), got shape {tuple(gamma.shape)}")
        self._straight_through = False
        if along is None:
            if any(layer.scores.grad is not None for layer in layers):  # a part of the model did not defer: compiled, for example
                self._deferred.form(layers)
            self._straight_through = bool(self._deferred.grads)
            along = self._deferred.grads or {layer.scores: layer.scores.grad for layer in layers if layer.scores.grad is not None}
        moved = [layer for layer in layers if layer.scores in along]
        if not moved:
            raise RuntimeError("no layer's scores have a gradient to ascend along; call loss.backward() first")
        # In the order of the fused calls, each of which takes the layers of one device and dtype.
        kinds = list(dict.fromkeys((layer.scores.device, layer.scores.dtype) for layer in moved))
        ordered = sorted(moved, key=lambda layer: kinds.index((layer.scores.device, layer.scores.dtype)))
        how: dict[str, Any] = {"eps": self.eps, "straight_through": self._straight_through}
        budget = self._budget if own else None
        if budget is not None and not budget.tracked:
            before = dict(zip(layers, gamma, strict=True))
            start = torch.stack([before[layer] for layer in moved])
            self._set_gamma(moved, budget.search(moved, along, start, device=gamma.device, **how))
            gamma = self._gamma
        gammas = dict(zip(layers, gamma, strict=True))
        self._seen = ascend(ordered, along, gamma=torch.stack([gammas[layer] for layer in ordered]), **how)
        self._layers = ordered
        self._cuts = dict(zip(ordered, (cut for _, cuts in self._seen for cut in cuts), strict=True))
        if budget is not None and budget.tracked:
            flips = dict(zip(layers, self.changes()[:, 0], strict=True))
            at = torch.stack([gammas[layer] for layer in moved])
            self._set_gamma(moved, budget.follow(at, moved, torch.stack([flips[layer] for layer in moved])))

    def _set_gamma(self, layers: list[Pruned], values: Tensor) -> None:
        """Gives ``layers`` their next gamma. Layers that share their scores have that of the first of them."""
        found: dict[nn.Parameter, Tensor] = {}
        for layer, value in zip(layers, values, strict=True):
            found.setdefault(layer.scores, value)
        self._gamma = torch.stack([found.get(layer.scores, now) for layer, now in zip(self._pruned(), self._gamma, strict=True)])

    def _return(self) -> None:
        descend(self._layers)
        self._layers = []

    def _return_and_step(self) -> None:
        layers = self._pruned()
        # Two kinds of deferred gradients are none that a kernel can form: a part of one, whose rest autograd has given, and one taken at an
        # s + z where z came from the scores' gradient.
        along_scores = () if self._straight_through else self._layers
        self._deferred.form(layer for layer in layers if layer.scores.grad is not None or layer in along_scores)
        calls = self._fused_calls(layers)
        taken = {scores for call in calls for scores in call.scores}
        self._deferred.form(layers, keep=taken)
        moves = descend(self._layers)
        self._layers = []
        flips = [fused_sgd.take(call, self.base_optimizer, layers, self._deferred.grads, moves) for call in calls]
        every = {layer.scores for layer in layers if layer.scores.grad is not None} | taken
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

    def _fused_calls(self, layers: list[Pruned]) -> list[fused_sgd.Call]:
        """The steps of torch's SGD that end a perturbation, or that have deferred gradients."""
        if type(self.base_optimizer) is not torch.optim.SGD or self.restore == "after" or not (self._layers or self._deferred.grads):
            return []
        return fused_sgd.calls(self.base_optimizer, layers, self._deferred.grads, self._layers)

    # State

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Perturbed.state_dict`, and ``gamma`` where it is not given but found."""
        return super().state_dict() | self._found_gamma()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load_gamma(state)
        super().load_state_dict(state)

    def state_tensors(self) -> dict[str, Tensor]:
        """As :meth:`Perturbed.state_tensors`, and ``gamma`` where it is not given but found."""
        return super().state_tensors() | self._found_gamma()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._load_gamma(tensors)
        super().load_state_tensors({name: value for name, value in tensors.items() if name != GAMMA})

    def _found_gamma(self) -> dict[str, Tensor]:
        return {} if self._budget is None else {GAMMA: self.gamma}

    def _load_gamma(self, state: Mapping[str, Any]) -> None:
        expected = {name: tuple(value.shape) for name, value in self._found_gamma().items()}
        got = {name: tuple(value.shape) for name, value in state.items() if name == GAMMA}
        if got != expected:
            raise ValueError(f"optimizer state: expected gamma of shape {expected.get(GAMMA)}, got {got.get(GAMMA)}")
        if expected:
            self._gamma = state[GAMMA].to(self._gamma)

    def _move_for_good(self, moves: Mapping[PrunedLayer, Perturbation]) -> dict[nn.Parameter, Tensor]:
        """Writes ``s + z`` into the scores; returns what that added."""
        added = {}
        for layer, move in moves.items():
            if layer.scores not in added:
                at = move.position(layer.scores, layer.weight)
                added[layer.scores] = at - layer.scores
                layer.scores.copy_(at)
        return added
