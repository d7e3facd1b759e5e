"""Robust training, mask search with S2AP and finetuning with AWP in a loop of one's own, on handwritten digits.

``pip install "s2ap_ext[train]"``, then ``python examples/plain_loop.py``. It takes about a minute on one core.
"""

import argparse

import torch
import torch.nn.functional as F

from s2ap_ext import AWP, S2AP, attacks, densify, sparsify
from s2ap_ext.data import load_digits
from s2ap_ext.models import build_model
from s2ap_ext.nn import pruned_layers, sparsity_table, train_scores, train_weights
from s2ap_ext.optim import Plain

ATTACK = {"eps": 0.1, "step_size": 0.025}


def train(model, step, images, labels, epochs):
    """Adversarial training; ``step`` calls its closure once or, where it perturbs something, twice."""
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            x, y = images[batch], labels[batch]
            x_adv = attacks.pgd(model, x, y, steps=5, **ATTACK)

            def closure(x_adv=x_adv, y=y):
                step.zero_grad()
                loss = F.cross_entropy(model(x_adv), y)
                loss.backward()
                return loss

            step.step(closure)


def tell(what, model, images, labels):
    attacked = attacks.pgd(model.eval(), images, labels, steps=20, random_start=False, **ATTACK)
    with torch.no_grad():
        clean, robust = ((model(x).argmax(dim=1) == labels).double().mean() for x in (images, attacked))
    print(f"{what:10} clean {clean:.1%}  robust {robust:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="of each stage")
    parser.add_argument("--images", type=int, default=1437, help="the most for training, and for testing")
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits().limited(args.images, args.images)
    train_set, test_set = ((split.floats(), split.labels) for split in (digits.train, digits.test))
    model = build_model("digits_cnn", num_classes=10, in_channels=1)

    train(model, Plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)), *train_set, args.epochs)
    tell("dense", model, *test_set)

    train_scores(sparsify(model, 0.9))  # the scores train, the weights stay as they are
    scores = [layer.scores for layer in pruned_layers(model).values()]
    train(model, S2AP(model, torch.optim.SGD(scores, lr=0.1, momentum=0.9), gamma=1e-3), *train_set, args.epochs)
    tell("pruned", model, *test_set)

    train_weights(model)  # the kept weights train, the mask stays as it is
    weights = [p for p in model.parameters() if p.requires_grad]
    train(model, AWP(model, torch.optim.SGD(weights, lr=0.01, momentum=0.9), gamma=5e-3), *train_set, args.epochs)
    tell("finetuned", model, *test_set)

    print(sparsity_table(model))
    densify(model)  # an ordinary network again, with zeros where weights were removed
    tell("densified", model, *test_set)


if __name__ == "__main__":
    main()
