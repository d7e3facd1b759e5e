"""reuse: along the gradient that the attack's last backward has left on the way, so that the ascent costs no pass of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...parts import register
from .base import Ascent, Step


@register("reuse")
class Reuse(Ascent):
    """One backward pass, at the point above along the gradients that :meth:`~s2ap_ext.optim.Stepper.step` is given.

    They are meant to be those of :meth:`s2ap_ext.attacks.Attack.with_gradients`: of the loss that the attack maximises (summed over the
    minibatch, without label smoothing and without a method's penalty), at the unperturbed scores and the model in evaluation mode, on the
    images before the attack's last step. So the direction differs from that of ``exact`` by the last step of the attack, by the mode of
    BatchNorm, and by what the training loss adds to the attack's.

    Under ``DistributedDataParallel`` each process ascends along the gradient of its own images, since no reduction has seen it.

    The step returns the loss at the perturbed point, which is the only one it sees. Where nothing flips that is the loss at the point
    itself: there is no second pass to skip.

    Source: S2AP, arXiv 2510.18381, which leaves a cheaper ascent open; the gradients of an attack as a by-product are those of Shafahi et
    al., arXiv 1904.12843.

    Equivalent to::

        x_adv, along = attack.with_gradients(model, x, y, optimizer.wanted_gradients())
        z = {s: gamma * s.norm() * along[s] / (along[s].norm() + eps) for s in scores}
        ... one backward at s + z, as S2AP does it
    """

    wants_gradients = True

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        if at.given is None:
            raise RuntimeError(
                "ascent reuse: expected the gradients of an attack; call step(closure, along), with the along of "
                "attack.with_gradients(model, x, y, optimizer.wanted_gradients())"
            )
        at.move(at.given)
        backward()
