"""Layers of one model select together, any number of threads may be first, and copies are on their own."""

import contextlib
import copy
import gc
import os
import pickle
import sys
import threading
import time

import pytest
import torch
from helpers import Selections, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2APLinear, densify, sparsify
from s2ap_ext.nn import pruned_layers, refresh, train_scores
from s2ap_ext.nn import selection as selection_module


def in_threads(count, work):
    """What ``work()`` gives in each of so many threads that start it together."""
    barrier, found, interval = threading.Barrier(count), [], sys.getswitchinterval()

    def run():
        barrier.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    sys.setswitchinterval(1e-6)  # so that the threads meet in every place
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == count
    return found


def new_scores(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in pruned_layers(model).values():
            layer.scores.copy_(torch.randn(layer.scores.shape, generator=generator))


# Threads


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_threads_that_come_first_together_all_get_the_whole_weight(grad):
    layer, x = train_scores(S2APLinear(400, 300)), torch.rand(2, 400)
    expected, wrong = layer(x), 0

    def call():
        with torch.set_grad_enabled(grad):
            return fresh(x)

    for _ in range(300):
        fresh = copy.deepcopy(layer)
        wrong += sum(not torch.equal(y, expected) for y in in_threads(4, call))
    assert wrong == 0


def test_threads_that_call_a_model_together_select_once():
    model = sparsify(nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)), 0.9).eval()
    x = torch.rand(2, 200)
    calls, select = [], torch.ops.s2ap.select

    def call():
        with torch.no_grad():
            return model(x)

    for seed in range(50):
        new_scores(model, seed)
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.s2ap, "select", lambda *a: calls.append(1) or select(*a))
            found = in_threads(4, call)
        assert len(calls) == 1
        expected = copy.deepcopy(model)(x)
        assert all(torch.equal(y, expected) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python's warning of just this
def test_a_forked_process_does_not_wait_for_threads_that_are_gone():
    layer, x = S2APLinear(6, 5), torch.rand(2, 6)
    holding, done = threading.Event(), threading.Event()

    def hold():
        with selection_module._writing:
            holding.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            layer(x)
            os._exit(0)
        os._exit(1)
    done.set()
    thread.join()
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for ever")
    assert status == 0


# One call for a model


def test_the_first_forward_selects_for_the_whole_model():
    net = sparsify(small_net(), 0.9)
    for expected in ({"select": 3}, {}):
        with Selections() as seen:
            net(images())
        assert seen.layers == expected
        assert seen.calls == dict.fromkeys(expected, 1)
    new_scores(net, 0)
    with Selections() as seen:
        net[5](torch.rand(1, 288))
        net(images())
    assert seen.layers == {"select": 3}
    assert seen.calls == {"select": 1}
    for layer in pruned_layers(net).values():
        assert torch.equal(layer.mask, oracle_mask(layer.scores, int(layer.kept)))


def test_layers_of_several_kinds_take_a_call_each():
    net = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6).double(), nn.Linear(6, 6), nn.Linear(6, 6, device="meta")), 0.5)
    with Selections() as seen:
        net[0](torch.rand(1, 6))
        assert seen.layers == {"select": 2}
        net[1](torch.rand(1, 6).double())
        net[2](torch.rand(1, 6))
    assert seen.layers == {"select": 3}
    assert seen.calls == {"select": 2}


def test_nan_in_one_layer_names_it_and_leaves_the_others_alone():
    net = sparsify(small_net(), 0.9)
    net(images())
    new_scores(net, 0)
    with torch.no_grad():
        net[3].scores[0, 0, 0, 0] = float("nan")
    net[0](images())
    net[5](torch.rand(1, 288))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"scores: expected numbers, got NaN in 3 \(1\)"):
            net(images())
        with pytest.raises(ValueError, match=r"got NaN in 3 \(1\)"):
            refresh(net)
    with torch.no_grad():
        net[3].scores.nan_to_num_()
    with Selections() as seen:
        net(images())
    assert seen.layers == {"select": 1}


def test_a_layer_that_cannot_be_selected_leaves_the_others_alone():
    net = sparsify(small_net(), 0.9)
    net[3].kept.fill_(-1)
    net[0](images())
    for ask in (net[3], refresh):
        with pytest.raises(ValueError, match=r"expected a count in \[0, 288\], got -1"):
            ask(net if ask is refresh else torch.rand(1, 8, 8, 8))
    net[3].kept.fill_(29)
    net(images())


def test_scores_that_come_back_are_selected_again():
    layer, x = S2APLinear(6, 6, sparsity=0.5), torch.rand(1, 6)
    expected, given = layer(x), layer.scores.data
    layer.scores.data = torch.full((6, 6), float("nan"))
    with pytest.raises(ValueError, match="got NaN in S2APLinear"):
        layer(x)
    layer.scores.data = given
    assert torch.equal(layer(x), expected)


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_has_a_group_of_its_own(copied):
    net = sparsify(small_net(), 0.9)
    net(images())
    twin = copied(net)
    assert len({id(layer.mask_state.group) for layer in pruned_layers(twin).values()}) == 1
    assert twin[0].mask_state.group is not net[0].mask_state.group
    new_scores(net, 0)
    with Selections() as seen:
        twin(images())
    assert (seen.layers, seen.calls) == ({"select": 3}, {"select": 1})
    assert twin[3].mask_state.label == "3"
    assert net[0].mask_state.group.layers() == [net[0], net[3], net[5]]


def test_copies_that_share_tensors_have_selections_of_their_own():
    layer, x = S2APLinear(6, 6, sparsity=0.5), torch.rand(1, 6)
    expected = layer(x)
    for twin in (copy.copy(layer), layer._replicate_for_data_parallel()):
        twin.scores, twin.weight, twin.bias = layer.scores, layer.weight, layer.bias
        assert twin.mask_state is not layer.mask_state
        assert torch.equal(twin(x), expected)


def test_a_group_keeps_no_layer_alive_and_forgets_dense_ones():
    net = sparsify(small_net().append(nn.Conv1d(4, 4, 1)), 0.9)
    group, pruned = net[0].mask_state.group, net[6].pruned_weight
    net[5] = nn.Identity()
    gc.collect()
    assert group.layers() == [net[0], net[3], pruned]
    densify(net[3])
    densify(net[6])
    assert group.layers() == [net[0]]
    net[0](images())
