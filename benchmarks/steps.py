"""One training step on PGD examples, as the pipeline's trainer makes it: what the benchmarks of steps time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from s2ap_ext.attacks import Pgd
from s2ap_ext.losses import PgdAt
from s2ap_ext.nn import matmul_precision, refresh
from s2ap_ext.optim import LossScale, Overflow, Plain, Stepper

MakeStepper = Callable[[nn.Module, torch.optim.Optimizer], Stepper]


class Step:
    """Called, it attacks a batch of random images of CIFAR's size and takes one step.

    Args:
        model: a network whose parameters that train require gradients.
        make_stepper: makes the step from the model and its optimizer.
        batch: images in the batch.
        attack_steps: of PGD.
        around: gives what the step runs in; None for nothing.
        forwards: what attack and loss call in the model's place, such as :class:`s2ap_ext.nn.Accelerated`.
        precision: ``"tf32"``: the step runs in it; any other changes nothing here.
        loss_scale: what scales the loss, for float16; a step that overflows is not taken.
    """

    def __init__(
        self,
        model: nn.Module,
        make_stepper: MakeStepper = Plain,
        *,
        batch: int,
        attack_steps: int,
        device: torch.device | str = "cpu",
        around: Callable[[nn.Module], AbstractContextManager] | None = None,
        forwards: nn.Module | None = None,
        precision: str = "fp32",
        loss_scale: LossScale | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(batch, 3, 32, 32, generator=generator).to(device)
        self.y = torch.randint(10, (batch,), generator=generator).to(device)
        self.model = model.to(device)
        self.forwards, self.precision, self.loss_scale = forwards or model, precision, loss_scale
        self.loss = PgdAt(adversary=Pgd(eps=8 / 255, step_size=2 / 255, steps=attack_steps))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.stepper = make_stepper(model, torch.optim.SGD(self.trained, lr=1e-3, momentum=0.9, weight_decay=5e-4))
        self.around = around

    def __call__(self) -> None:
        with matmul_precision(self.precision), self.around(self.model) if self.around else contextlib.nullcontext():
            refresh(self.model)
            wanted, along = self.stepper.wanted_gradients(), None
            if wanted:
                x_adv, along = self.loss.attack_with_gradients(self.forwards, self.x, self.y, wanted)
            else:
                x_adv = self.loss.attack(self.forwards, self.x, self.y)

            def closure() -> Tensor:
                self.stepper.zero_grad()
                value, _ = self.loss(self.forwards, self.x, x_adv, self.y)
                if self.loss_scale is None:
                    value.backward()
                else:
                    self.loss_scale.backward(value, self.trained)
                return value

            overflowed = False
            try:
                self.stepper.step(closure, along)
            except Overflow:
                overflowed = True
            if self.loss_scale is not None:
                self.loss_scale.update(overflowed=overflowed)
