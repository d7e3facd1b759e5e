"""Evaluations: which image holds under what, how certain that is, and what goes on after a stop."""

import json
from dataclasses import dataclass

import pytest
import torch
from evaluation_models import EPS, images_of, small_network
from helpers import assert_as_found, snapshot
from torch import nn

import s2ap_ext
from s2ap_ext import parts, sparsify
from s2ap_ext.attacks import Attack, Pgd
from s2ap_ext.engine import compile_sparse
from s2ap_ext.evaluation import Evaluation, evaluate
from s2ap_ext.intervals import wilson
from s2ap_ext.settings import key


class Threshold(nn.Module):
    """One pixel and a threshold at 0.5: an image is robust iff it is further than eps from the threshold."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.5))
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return torch.cat([self.level - x, x - self.level], dim=1)


X = torch.tensor([[0.1], [0.45], [0.55], [0.9], [0.3], [0.45], [0.7]])
Y = torch.tensor([0, 0, 1, 1, 1, 1, 1])  # two are wrong as they are: the fifth, and the sixth, which an attack could "mend"


def test_by_hand():
    found = evaluate(Threshold(), X, Y, ["clean", "pgd"], eps=0.1)
    assert found.held["clean"].tolist() == [True, True, True, True, False, False, True]
    assert found.held["pgd"].tolist() == [True, False, False, True, False, False, True]
    assert found.accuracy == {"clean": 5 / 7, "pgd": 3 / 7}
    assert (found.worst, found.n) == (3 / 7, 7)
    assert found.implementations == {"clean": "no attack", "pgd": f"s2ap_ext {s2ap_ext.__version__}"}
    assert list(found.per_class()) == [
        (0, 2, {"clean": 1, "pgd": 0.5, "worst": 0.5}),
        (1, 5, {"clean": 3 / 5, "pgd": 2 / 5, "worst": 2 / 5}),
    ]


class Moves(Attack):
    """Moves every image by so much."""

    @dataclass(frozen=True)
    class Settings:
        by: float = key(0.0, "by so much")

    def __init__(self, name, by, calls=None):
        super().__init__(by=by)
        self.name, self.calls = name, calls

    def __call__(self, model, x, y, *, loss="ce", generator=None):
        if self.calls is not None:
            self.calls.append((len(x), generator.initial_seed()))
        return x + self.settings.by


class Lost(Moves):
    """Answers something that is no number."""

    def __call__(self, model, x, y, *, loss="ce", generator=None):
        return x / 0


def test_the_worst_case_is_taken_image_by_image():
    found = evaluate(Threshold(), X[1:4], Y[1:4], [Moves("up", 0.08), Moves("down", -0.08)], eps=0.1)
    assert found.held["up"].tolist() == [False, True, True]
    assert found.held["down"].tolist() == [True, False, True]
    assert found.worst == 1 / 3
    assert found.worst_held.tolist() == [False, False, True]


def test_an_attack_is_for_what_is_right_and_starts_each_batch_with_the_seed():
    calls = []
    evaluate(Threshold(), X, Y, [Moves("still", 0.0, calls)], eps=0.1, batch_size=2, seed=11)
    assert calls == [(2, 11), (2, 11), (1, 11)]


@pytest.mark.parametrize("by", [0.2, -0.2])
def test_an_attack_that_leaves_the_ball_or_the_range_of_images_is_told(by):
    with pytest.raises(RuntimeError, match=r"attack far: expected images in \[0, 1\] within linf distance 0.1, got one at 0.2"):
        evaluate(Threshold(), X[:1], Y[:1], [Moves("far", by)], eps=0.1)
    with pytest.raises(RuntimeError, match=r"attack lost: expected images in .* got one at nan"):
        evaluate(lambda x: torch.cat([0.5 - x, x], dim=1), torch.zeros(1, 1), Y[:1], [Lost("lost", 0.0)], eps=0.1)
    with pytest.raises(RuntimeError, match=r"attack out: expected images in \[0, 1\] .* values in"):
        evaluate(Threshold(), torch.zeros(1, 1), Y[:1], [Moves("out", -0.01)], eps=0.1)


@pytest.mark.parametrize("norm", list(EPS))
def test_restarts_find_what_one_start_finds_and_more(norm):
    model = small_network()
    x, y = images_of(model, 40)
    how = {"norm": norm, "eps": 4 * EPS[norm]}
    one, many = (evaluate(model, x, y, [Pgd.within(**how, steps=0, restarts=n)], **how).held["pgd"] for n in (1, 20))
    assert not (many & ~one).any()
    assert one.sum() > many.sum() > 0


def test_restarts_need_classes_and_take_no_gradients_of_parameters():
    model = small_network()
    x, y = images_of(model)
    with pytest.raises(ValueError, match="y: expected classes"):
        Pgd(restarts=2)(model, x, None, loss="kl")
    with pytest.raises(ValueError, match="takes no gradients of parameters with 2 restarts"):
        Pgd(restarts=2).with_gradients(model, x, y, dict(model.named_parameters()))


def test_everything_is_left_as_found():
    model = sparsify(small_network(), 0.5).train()
    x, y = images_of(model)
    before, state = snapshot(model), torch.get_rng_state()
    with torch.inference_mode():
        inside = evaluate(model, x, y, eps=EPS["linf"])
    assert torch.equal(inside.held["pgd"], evaluate(model, x, y, eps=EPS["linf"]).held["pgd"])
    assert_as_found(model, before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(s2ap_ext.backend().cpu != "C++", reason="needs the C++ kernels")
def test_on_the_kept_weights():
    model = sparsify(small_network(), 0.5)
    x, y = images_of(model, 30)
    how = {"norm": "l2", "eps": EPS["l2"]}
    dense, sparse = (evaluate(model, x, y, **how, engine=engine) for engine in ("torch", "sparse"))
    assert torch.equal(dense.held["pgd"], sparse.held["pgd"])
    assert sparse.engine == "sparse"
    own = evaluate(compile_sparse(model, x), x, y, **how)
    assert torch.equal(own.held["pgd"], sparse.held["pgd"])


def test_any_callable():
    found = evaluate(lambda x: torch.cat([0.5 - x, x - 0.5], dim=1), X, Y, eps=0.1)
    assert found.accuracy == {"clean": 5 / 7, "pgd": 3 / 7}


# --------------------------------------------------------------------------------------------------------------------- intervals


def test_intervals_of_an_evaluation():
    found = evaluate(Threshold(), X, Y, eps=0.1)
    assert found.interval("pgd") == found.interval("worst") == wilson(3 / 7, 7)
    assert found.interval("clean") == wilson(5 / 7, 7)
    with pytest.raises(ValueError, match="name: expected one of clean, pgd, worst, got 'square'"):
        found.interval("square")


def test_the_summary_is_json():
    found = evaluate(Threshold(), X, Y, eps=0.1)
    summary = json.loads(json.dumps(found.summary()))
    assert summary["attacks"]["pgd"]["broken"] == [1, 2, 4, 5]
    assert summary["attacks"]["pgd"]["accuracy"] == 3 / 7
    assert (summary["eps"], summary["norm"], summary["images"], summary["engine"]) == (0.1, "linf", 7, "torch")
    assert summary["classes"][1] == {"class": 1, "images": 5, "clean": 3 / 5, "pgd": 2 / 5, "worst": 2 / 5}


# ---------------------------------------------------------------------------------------------------------------------- going on


class Stop(Exception):
    pass


def stopping(after):
    def tell(label, done, total, held):
        nonlocal after
        after -= 1
        if after < 0:
            raise Stop

    return tell


@pytest.mark.parametrize("after", range(6))
def test_a_stopped_evaluation_goes_on_with_the_batch_after_the_last_finished_one(after, tmp_path):
    keep, how = tmp_path / "kept", {"eps": 0.1, "batch_size": 3}
    attacks = ["pgd", Moves("up", 0.06)]
    whole = evaluate(Threshold(), X, Y, attacks, **how)
    with pytest.raises(Stop):
        evaluate(Threshold(), X, Y, attacks, **how, keep=keep, tell=stopping(after))
    labels = []
    again = evaluate(Threshold(), X, Y, attacks, **how, keep=keep, tell=lambda label, done, total, held: labels.append(label))
    assert labels == ["clean", "clean", "clean", "pgd", "pgd", "up", "up"][after + 1 :]
    for name, held in whole.held.items():
        assert torch.equal(held, again.held[name])
    model = Threshold()
    evaluate(model, X, Y, attacks, **how, keep=keep)
    assert not model.batches, "all of it is there"


def changed_model():
    model = Threshold()
    with torch.no_grad():
        model.level += 1e-7
    return model


@pytest.mark.parametrize(
    "changed",
    [
        {"model": changed_model()},
        {"images": X.flip(0)},
        {"labels": 1 - Y},
        {"eps": 0.11},
        {"seed": 1},
        {"batch_size": 4},
        {"attacks": ["pgd", "clean", Moves("up", 0.02)]},
        {"attacks": [Pgd(eps=0.1, steps=3)]},
        {"norm": "l2"},
    ],
)
def test_what_is_kept_belongs_to_one_model_set_of_images_and_settings(changed, tmp_path):
    call = {"model": Threshold(), "images": X, "labels": Y, "attacks": ["pgd"], "eps": 0.1, "keep": tmp_path / "kept"}
    evaluate(**call)
    (first,) = (tmp_path / "kept").iterdir()
    ran = []
    evaluate(**{**call, **changed}, tell=lambda *about: ran.append(about))
    assert ran
    (second,) = {*(tmp_path / "kept").iterdir()} - {first}
    first.replace(second)
    with pytest.raises(ValueError, match=r"keep: .* is of another evaluation \(another model, other images or settings\); was it renamed"):
        evaluate(**{**call, **changed})


def test_what_cannot_be_kept_or_taken(tmp_path):
    keep = tmp_path / "kept"
    with pytest.raises(ValueError, match="keep: expected a model with a state_dict, which tells it from others, got function"):
        evaluate(lambda x: Threshold()(x), X, Y, eps=0.1, keep=keep)
    evaluate(Threshold(), X, Y, eps=0.1, keep=keep)
    (file,) = keep.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"evaluation-.*: damaged"):
        evaluate(Threshold(), X, Y, eps=0.1, keep=keep)


# --------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": X[:0], "labels": Y[:0]}, r"images: expected at least one, got shape \(0, 1\)"),
        ({"images": X * 255}, r"images: expected values in \[0, 1\], got some in \[25.5, 229.5\]"),
        ({"images": X * float("nan")}, r"images: expected values in \[0, 1\], got some in \[nan, nan\]"),
        ({"labels": Y[:3]}, r"labels: expected int64 of shape \(7,\), one for each image, got torch.int64 of shape \(3,\)"),
        ({"labels": Y.float()}, "labels: expected int64"),
        ({"eps": -1.0}, "eps: expected a finite number >= 0, got -1.0"),
        ({"norm": "l3"}, "norm: expected one of linf, l2, l1, got 'l3'"),
        ({"engine": "cuda"}, "engine: expected one of torch, sparse, got 'cuda'"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"attacks": ["pgdd"]}, r"attack: expected one of .*, got 'pgdd'; did you mean pgd"),
        ({"attacks": ["pgd", "pgd"]}, "attacks: expected each once, got pgd twice"),
        ({"attacks": [Pgd(eps=0.2)]}, "attack pgd: eps: expected 0.1, got 0.2"),
        ({"attacks": [Pgd(eps=0.1, norm="l2")]}, "attack pgd: norm: expected linf, got l2"),
        ({"model": lambda x: x, "engine": "sparse"}, "engine: expected torch for a model that is no nn.Module but function"),
        ({"model": lambda x: x[:, 0]}, r"model: expected logits of shape \(7, classes\), got \(7,\)"),
    ],
)
def test_bad_input_is_told(changed, message):
    call = {"model": Threshold(), "images": X, "labels": Y, "attacks": ["pgd"], "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        evaluate(**{**call, **changed})


def test_images_of_bytes_are_told():
    with pytest.raises(TypeError, match=r"images: expected floating point in \[0, 1\], got torch.uint8"):
        evaluate(Threshold(), (X * 255).byte(), Y, eps=0.1)


def test_an_attack_of_ones_own_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(parts, "_registered", dict(parts._registered))

    @parts.register("grey")
    class Grey(Attack):
        def __call__(self, model, x, y, *, loss="ce", generator=None):
            return x + 0.1 * (0.5 - x)

    found = evaluate(Threshold(), X, Y, ["grey"], eps=0.1)
    assert isinstance(found, Evaluation)
    assert found.accuracy["grey"] == 5 / 7
