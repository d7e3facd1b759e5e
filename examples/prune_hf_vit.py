"""Prunes half of the heads of a Hugging Face ViT on handwritten digits, with S2AP, and takes them away.

``pip install transformers``, then ``python examples/prune_hf_vit.py``. It takes about a minute on one core.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from s2ap_ext import S2AP, attacks, densify, sparsify
from s2ap_ext.data import load_digits
from s2ap_ext.nn import pruned_layers, sparsity_table, train_scores, train_weights

ATTACK = {"eps": 0.1, "step_size": 0.025}


class Logits(nn.Module):
    """What attacks and losses want of a classifier: images in [0, 1] to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=(images - 0.5) / 0.5).logits


def train(model, optimizer, images, labels, epochs):
    """Adversarial training, by plain steps or S2AP's."""
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            x, y = images[batch], labels[batch]
            x = attacks.pgd(model, x, y, steps=3, **ATTACK)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


def tell(what, model, images, labels):
    attacked = attacks.pgd(model.eval(), images, labels, steps=10, random_start=False, **ATTACK)
    with torch.no_grad():
        clean, robust = ((model(x).argmax(dim=1) == labels).double().mean() for x in (images, attacked))
    print(f"{what:28} {sum(p.numel() for p in model.parameters()):7,} parameters  clean {clean:.1%}  robust {robust:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="of dense training; the search and finetuning take a third")
    parser.add_argument("--images", type=int, default=1437, help="the most for training, and for testing")
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits().limited(args.images, args.images)
    train_set, test_set = ((split.floats(), split.labels) for split in (digits.train, digits.test))
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=64,
    )
    model = Logits(ViTForImageClassification(config))
    epochs = max(args.epochs // 3, 1)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), *train_set, args.epochs)
    tell("dense", model, *test_set)

    train_scores(sparsify(model, 0.5, granularity="head"))
    scores = [layer.scores for layer in pruned_layers(model).values()]
    train(model, S2AP(model, torch.optim.SGD(scores, lr=0.01, momentum=0.9), gamma=0.01), *train_set, epochs)
    tell("half of the heads, searched", model, *test_set)

    train_weights(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), *train_set, epochs)
    tell("finetuned", model, *test_set)
    print(sparsity_table(model))

    densify(model, shrink=True)
    tell("smaller", model, *test_set)


if __name__ == "__main__":
    main()
