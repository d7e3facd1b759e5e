"""A method of mask search of one's own, used by its name in the whole pipeline: docs/your-own-method.md explains it.

``pip install "s2ap_ext[train]"``, then ``python examples/taylor.py``, which prunes the digits recipe with it; more arguments are those of
``s2ap run digits``.
"""

import sys

from s2ap_ext.methods import Method, listen, scores_of
from s2ap_ext.nn import pruned_layers
from s2ap_ext.parts import register


@register("taylor")
class Taylor(Method):
    """Scores are running means of |weight * gradient of the loss with respect to it|; the weights train under the mask."""

    def parameters(self, model, *, perturbed):
        model.requires_grad_(True)
        scores = scores_of(model)
        for s in scores:
            s.requires_grad_(perturbed)
        self.importance, self.handles = {}, listen(model, self.collect)
        return [{"params": [p for p in model.parameters() if all(p is not s for s in scores)]}]

    def collect(self, layer, grad):
        self.importance[layer] = (layer.weight.detach() * grad).abs()

    def after_step(self, model):
        for layer in pruned_layers(model).values():
            layer.scores.data = 0.99 * layer.scores.detach().abs() + 0.01 * self.importance[layer]

    def finish(self, model):
        for handle in self.handles:
            handle.remove()


if __name__ == "__main__":
    from s2ap_ext.cli import main

    sys.exit(main(["run", "digits", "--set", "prune.method=taylor", *sys.argv[1:]]))
