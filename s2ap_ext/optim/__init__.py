"""Training steps behind one interface: plain, S2AP for the mask search, AWP for finetuning.

A :class:`Stepper` wraps a torch optimizer, and a training loop asks the same of each::

    optimizer = S2AP(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), gamma=1e-3)
    for epoch in range(epochs):
        optimizer.set_epoch(epoch)
        for x, y in batches:
            x_adv = attack(model, x, y)

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model, x_adv, y)
                loss.backward()
                return loss

            optimizer.step(closure)

Learning-rate schedulers act on the base optimizer. Steps that take their gradient at a perturbed point (:class:`Perturbed`) can also be
driven by hand, in the shape of SAM (Foret et al., arXiv 2010.01412)::

    loss_of(model, x_adv, y).backward()
    optimizer.ascend()  # the model now stands at the perturbed point
    loss_of(model, x_adv, y).backward()
    optimizer.descend()  # back, and one step of the base optimizer with the second gradient

When such a step ascends, along which gradient and how far is decided by an :class:`Ascent`, a part that is chosen by name. ``reuse``
ascends along a gradient that the attack has left on its way, which the loop hands on::

    x_adv, along = Pgd(steps=10).with_gradients(model, x, y, optimizer.wanted_gradients())
    optimizer.step(closure, along)
"""

from .ascents import Ascent
from .awp import AWP
from .flip_budget import FlipBudget
from .loss_scale import LossScale, Overflow
from .perturbed import Perturbed
from .s2ap import S2AP
from .stepper import Plain, Stepper

__all__ = ["AWP", "S2AP", "Ascent", "FlipBudget", "LossScale", "Overflow", "Perturbed", "Plain", "Stepper"]
