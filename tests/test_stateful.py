"""Layers and steps in any order: whatever was done, the masked weights are those of the scores and weights as they are now.

``python -m pytest tests/test_stateful.py --hypothesis-seed=N`` tries others; ``S2AP_EXAMPLES=5000`` tries more.
"""

import copy
import os

import torch
from helpers import LABELS, closure_for, images, small_net
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from s2ap_ext import AWP, S2AP, densify, reference, sparsify
from s2ap_ext.nn import pruned_layers, refresh, train_scores, train_weights
from s2ap_ext.optim import Plain

SPARSITIES = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


class Layers(RuleBasedStateMachine):
    @initialize(sparsity=SPARSITIES, granularity=st.sampled_from(["weight", "channel"]))
    def make(self, sparsity, granularity):
        self.net = sparsify(small_net(), sparsity, granularity=granularity)
        self.saved = copy.deepcopy(self.net.state_dict())
        self.optimizer = None

    def layer(self, index):
        layers = list(pruned_layers(self.net).values())
        return layers[index % len(layers)]

    # What trains

    @rule(which=st.sampled_from([train_scores, train_weights]))
    def choose(self, which):
        which(self.net)
        self.optimizer = None

    @rule(kind=st.sampled_from([S2AP, AWP, Plain]), gamma=st.sampled_from([0.0, 0.05]), momentum=st.sampled_from([0.0, 0.9]))
    def step(self, kind, gamma, momentum):
        (train_weights if kind is AWP else train_scores)(self.net.requires_grad_(True))
        if type(self.optimizer) is not kind:
            base = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.05, momentum=momentum)
            self.optimizer = kind(self.net, base) if kind is Plain else kind(self.net, base, gamma=gamma)
        before = {name: layer.scores.detach().clone() for name, layer in pruned_layers(self.net).items()}
        self.optimizer.step(closure_for(self.net, self.optimizer))
        if kind is AWP:  # which leaves the scores, and so the mask
            assert all(torch.equal(layer.scores, before[name]) for name, layer in pruned_layers(self.net).items())

    @rule()
    def ascend_and_descend(self):
        train_scores(self.net.requires_grad_(True))
        optimizer = S2AP(self.net, torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.05), gamma=0.05)
        for move in (optimizer.ascend, optimizer.descend):
            torch.nn.functional.cross_entropy(self.net(images()), LABELS).backward()
            move()
        optimizer.zero_grad()
        self.optimizer = None

    # What changes tensors from outside

    @rule(index=st.integers(0, 9), place=st.integers(0, 10**6), value=st.sampled_from([0.0, -0.0, 5.0, -7.0, 1e-30]))
    def write(self, index, place, value):
        layer = self.layer(index)
        with torch.no_grad():
            for tensor in (layer.scores, layer.weight):
                tensor.view(-1)[place % tensor.numel()] = value

    @rule(index=st.integers(0, 9))
    def write_unseen(self, index):
        layer = self.layer(index)
        layer.scores.data.neg_().add_(0.5)
        layer.weight.data.neg_()
        layer.invalidate()

    @rule(index=st.integers(0, 9), sparsity=SPARSITIES)
    def keep(self, index, sparsity):
        self.layer(index).sparsity = sparsity

    @rule(index=st.integers(0, 9))
    def reset(self, index):
        self.layer(index).reset_scores()

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.net.state_dict())

    @rule()
    def load(self):
        self.net.load_state_dict(self.saved)

    # What must change nothing

    @rule()
    def copied(self):
        self.net = copy.deepcopy(self.net)
        self.optimizer = None

    @rule(training=st.booleans())
    def mode(self, training):
        self.net.train(training)

    @rule()
    def bring_up_to_date(self):
        refresh(self.net)

    @rule()
    def forward(self):
        self.net(images())

    # What must hold

    @invariant()
    def masked_weights_are_those_of_the_scores(self):
        for name, layer in pruned_layers(self.net).items() if hasattr(self, "net") else ():
            expected, _ = reference.select(layer.scores.detach(), layer.weight.detach(), int(layer.kept), layer.mask_state.pattern)
            assert torch.equal(layer.masked_weight, expected), name
            assert not layer.masked_weight[~layer.mask].any(), name

    @invariant()
    def dense_copies_give_the_same_logits(self):
        if hasattr(self, "net"):
            modes = [module.training for module in self.net.modules()]
            dense = densify(copy.deepcopy(self.net)).eval()
            with torch.no_grad():
                expected = dense(images())
                found = copy.deepcopy(self.net).eval()(images())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert [module.training for module in self.net.modules()] == modes


TestLayers = Layers.TestCase
TestLayers.settings = hypothesis_settings(
    max_examples=int(os.environ.get("S2AP_EXAMPLES", "20")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
