"""Training losses, one part per file. Each says which examples it trains on and what is minimised on them.

The two are apart because S2AP and AWP look at one minibatch twice: the attack runs once, and the loss is evaluated on the same
``x_adv`` at the weights and again at the perturbed ones. A training loop does, for each minibatch::

    for _ in range(loss.replays):
        x_adv = loss.attack(model, x, y)
        value, logits = loss(model, x, x_adv, y)
        value.backward()
        loss.after_backward(x, x_adv)
        optimizer.step()

and where a step has two passes, the second one, at the perturbed point, comes after ``after_backward`` and without it.
"""

from ..parts import import_all
from .base import Loss
from .free_at import FreeAt
from .mart import Mart
from .n_fgsm import NFgsm
from .natural import Natural
from .pgd_at import PgdAt
from .trades import Trades

__all__ = ["FreeAt", "Loss", "Mart", "NFgsm", "Natural", "PgdAt", "Trades"]

import_all(__name__, __path__)
