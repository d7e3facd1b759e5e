"""Forwards in lower precision, in channels_last, and compiled: close to the model's own, with the same gradients at the same places."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, Selections, assert_same_state, images, small_net
from torch._dynamo.testing import CompileCounterWithBackend

from s2ap_ext import S2AP, sparsify
from s2ap_ext.attacks import pgd
from s2ap_ext.engine import for_attack
from s2ap_ext.nn import Accelerated, dense_kernels, matmul_precision, train_scores
from s2ap_ext.nn.accelerated import check_cuda_graphs, check_precision

# torch.compile looks at .grad of every input, with the warning hidden; where warnings are errors it cannot hide it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


def searching():
    return train_scores(sparsify(small_net(), 0.5))


def trained(make, **how):
    """A network after three steps of S2AP on PGD examples, with the losses; ``make`` gives what is called in its place."""
    net = searching()
    forwards = make(net)
    optimizer = S2AP(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9), gamma=0.05, **how)
    losses = []
    with dense_kernels():
        for seed in range(3):
            x = pgd(forwards, images(seed=seed), LABELS, eps=0.1, step_size=0.05, steps=2, random_start=False)

            def closure(x=x):
                optimizer.zero_grad()
                loss = F.cross_entropy(forwards(x), LABELS)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
    return net, losses


def aot(net, batch=4, **how):
    return Accelerated(net, compiled_batch=batch, backend="aot_eager", **how)


@pytest.mark.parametrize("defer_grads", [False, True])
def test_compiled_steps_are_the_eager_ones(defer_grads):
    torch.compiler.reset()
    net, losses = trained(lambda net: net, defer_grads=defer_grads)
    compiled, same = trained(aot, defer_grads=defer_grads)
    assert losses == pytest.approx(same, rel=1e-5)
    for (name, a), (_, b) in zip(net.state_dict().items(), compiled.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lower_precision_is_close_and_the_scores_stay_float32(precision, channels_last):
    _, losses = trained(lambda net: net)
    net, close = trained(lambda net: Accelerated(net, precision=precision, channels_last=channels_last), defer_grads=True)
    assert losses == pytest.approx(close, rel=0.05)
    assert losses != close
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert all(t.is_contiguous() for t in net.state_dict().values())
    assert Accelerated(net, precision=precision)(images()).dtype == torch.float32


def test_channels_last_gives_the_same_step():
    net, losses = trained(lambda net: net, defer_grads=True)
    other, same = trained(lambda net: Accelerated(net, channels_last=True), defer_grads=True)
    assert losses == pytest.approx(same, rel=1e-5)
    for (name, a), (_, b) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    seen = []
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    Accelerated(net, channels_last=True)(images())
    assert seen == [True]


def test_a_compiled_model_selects_once_per_change_and_only_full_batches_are_compiled():
    torch.compiler.reset()
    net = searching()
    forwards = aot(net)
    forwards(images())
    with torch.no_grad():
        for layer in (net[0], net[3], net[5]):
            layer.scores.mul_(1.5)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    with Selections() as selections:
        forwards(images())
        forwards(images())
        forwards(images()[:3])
    assert selections.calls["select"] == 1
    assert calls[-1] is False
    torch.testing.assert_close(forwards(images()), net(images()), rtol=1e-5, atol=1e-6)


def test_compiled_forwards_tell_those_who_listen():
    torch.compiler.reset()
    found = []
    for make in (lambda net: net, aot):
        net = searching()
        heard = {}
        handles = [
            layer.mask_state.listen(lambda scores, grad, i=i, heard=heard: heard.__setitem__(i, grad.clone()))
            for i, layer in enumerate((net[0], net[3], net[5]))
        ]
        with dense_kernels():
            F.cross_entropy(make(net)(images()), LABELS).backward()
        for handle in handles:
            handle.remove()
        found.append(heard)
    assert found[0].keys() == found[1].keys() == {0, 1, 2}
    for i, grad in found[0].items():
        torch.testing.assert_close(found[1][i], grad, rtol=1e-4, atol=1e-6)


def test_nothing_asked_for_changes_no_bit_and_the_model_is_left_as_it_was():
    net, twin = searching(), searching()
    assert list(net.state_dict()) == [name.removeprefix("model.") for name in Accelerated(net).state_dict()]
    assert torch.equal(Accelerated(net)(images()), twin(images()))
    assert_same_state(net, twin)
    aot(net)
    assert list(net.state_dict()) == list(twin.state_dict())


def test_the_engine_leaves_accelerated_models_alone():
    assert for_attack(Accelerated(searching(), precision="bf16"), images()) is None


def test_a_search_compiles_two_graphs_and_no_more():
    torch.compiler.reset()
    counted = CompileCounterWithBackend("eager")
    trained(lambda net: Accelerated(net, compiled_batch=4, backend=counted), defer_grads=True)
    assert counted.frame_count == 2  # in the attack, where nothing trains, and in training


def test_tf32_is_set_for_a_while():
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with matmul_precision("bf16"):
        assert settings() == before
    with matmul_precision("tf32"):
        assert settings() == (True, True)
    assert settings() == before


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="precision: expected one of fp32, tf32, bf16, fp16, got 'int8'"):
        Accelerated(small_net(), precision="int8")
    with pytest.raises(ValueError, match="compiled_batch: expected an integer >= 0, got -1"):
        Accelerated(small_net(), compiled_batch=-1)
    for precision in ("tf32", "fp16"):
        with pytest.raises(ValueError, match=f"precision: {precision} needs a CUDA device, got cpu"):
            check_precision(precision, torch.device("cpu"))
        check_precision(precision, torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(ValueError, match="cuda_graphs: expected a compiled_batch above 0 with it, got 0"):
        Accelerated(small_net(), cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: expected compile = true with it"):
        check_cuda_graphs(True, False, torch.device("cuda"))
    with pytest.raises(ValueError, match="cuda_graphs: needs a CUDA device, got cpu"):
        check_cuda_graphs(True, True, torch.device("cpu"))
    check_cuda_graphs(True, True, torch.device("cuda"))
    check_cuda_graphs(False, False, torch.device("cpu"))
