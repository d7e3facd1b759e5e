"""The pipeline on real digits, small: what each stage changes, the same bits twice, and going on after a stop."""

import itertools
import json

import pytest
import torch
from command_line import refused
from torch import nn

from s2ap_ext import backend, densify, sparsify
from s2ap_ext.methods.hydra import Hydra
from s2ap_ext.nn import pruned_layers
from s2ap_ext.nn.tied import TiedWeight
from s2ap_ext.optim import Plain
from s2ap_ext.pipeline import RunFolder, Session, Stopped, checkpoint, evaluate, load_model, load_recipe, new_model, open_data, run
from s2ap_ext.pipeline.run_folder import read_metrics, read_results
from s2ap_ext.pipeline.stages import Search
from s2ap_ext.sparsity import kept_count

SMALL = [
    "model.width=4",
    "data.train_size=80",
    "data.test_size=40",
    "attack.steps=2",
    "pretrain.epochs=2",
    "pretrain.batch_size=32",
    "prune.epochs=3",
    "prune.batch_size=32",
    "prune.warmup_epochs=1",
    "prune.gamma=0.05",
    "finetune.epochs=2",
    "finetune.batch_size=32",
    "evaluate.steps=2",
    "evaluate.images_per_epoch=16",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
]
MODELS = ("dense", "pruned", "finetuned")


def start(folder, *overrides, stop=lambda: False):
    recipe = load_recipe("digits", [*SMALL, *overrides])
    with RunFolder.create(folder, recipe) as opened:
        return run(Session(recipe, open_data(recipe), opened, stop=stop))


def go_on(folder, stop=lambda: False):
    with RunFolder.resume(folder) as opened:
        recipe = load_recipe(folder / "config.toml")
        return run(Session(recipe, open_data(recipe), opened, stop=stop))


def after(times):
    """A ``stop`` that says True when it is asked for the ``times``-th time."""
    count = itertools.count(1)
    return lambda: next(count) == times


def same_results(a, b):
    for name in MODELS:
        assert (a / f"{name}.safetensors").read_bytes() == (b / f"{name}.safetensors").read_bytes(), name
    timeless = [[{**record, "seconds": 0} for record in read_metrics(p)] for p in (a, b)]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    rows = start(folder)
    return folder, rows


def test_a_run_leaves_a_complete_folder(finished):
    folder, rows = finished
    names = {path.name.partition(".tfevents")[0] for path in folder.iterdir()}
    wanted = {"config.toml", "metrics.jsonl", "results.json", "events.out", *(f"{name}.safetensors" for name in MODELS)}
    assert names == wanted  # and neither state.safetensors nor a temporary file
    assert [row["model"] for row in rows] == list(MODELS)
    assert load_recipe(folder / "config.toml") == load_recipe("digits", SMALL)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r.get("epoch")) for r in records if r["stage"] == "prune"] == [("prune", e) for e in (1, 2, 3)]
    assert len(records) == 2 + 3 + 2 + 3
    results = json.loads((folder / "results.json").read_text())
    assert results["rows"] == rows
    assert results["attack"] == "PGD-2, linf, eps 0.1"
    if backend().cpu == "C++":
        assert [row["batch"] for row in results["latency"]] == [1, 8, 64]
        assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 for row in results["latency"])
    else:
        assert "latency" not in results
    assert "latency_at_scale" not in results


@pytest.mark.slow
@pytest.mark.skipif(backend().cpu != "C++", reason="the sparse engine needs the kernels")
def test_the_speed_of_a_larger_network(tmp_path):
    how = [*SMALL, "pretrain.epochs=0", "prune.epochs=0", "finetune.epochs=0", "prune.sparsity=0.95", "evaluate.latency_at_scale=true"]
    recipe = load_recipe("digits", how)
    threads = torch.get_num_threads()
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        run(Session(recipe, open_data(recipe), folder))
    found = read_results(tmp_path / "run")["latency_at_scale"]
    assert (found["network"], found["sparsity"], found["threads"]) == ("ResNet-18", 0.95, threads)
    assert [row["batch"] for row in found["rows"]] == [1, 8]
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 for row in found["rows"])


def test_rows_tell_the_sparsity_and_the_time(finished):
    folder, (dense, pruned, finetuned) = finished
    numels = [layer.weight.numel() for layer in pruned_layers(load_model(folder / "pruned.safetensors")[0]).values()]
    assert dense["weights"] == dense["kept"] == sum(numels)
    assert dense["sparsity"] == 0
    for row in (pruned, finetuned):
        assert row["kept"] == sum(kept_count(n, 0.9) for n in numels)
        assert row["sparsity"] == 1 - row["kept"] / sum(numels)
    assert all(row["seconds"] > 0 and row["images"] == 40 and 0 <= row["robust"] <= row["clean"] <= 1 for row in (dense, pruned, finetuned))


def test_hydra_trains_scores_and_batchnorm_only(finished):
    folder, _ = finished
    dense, pruned = (load_model(folder / f"{name}.safetensors")[0] for name in ("dense", "pruned"))
    before, after = dense.state_dict(), pruned.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if before[name].dim() > 1)
    assert torch.equal(before["linear.bias"], after["linear.bias"])
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    search = [r for r in records if r["stage"] == "prune"]
    assert all(r["mask_distance"] > 0 for r in search)
    assert [r["flips"] > 0 for r in search] == [False, True, True]  # the first epoch is S2AP's warm-up


def test_a_search_tells_how_the_mask_of_each_layer_moves(finished):
    folder, _ = finished
    search = [r for r in read_metrics(folder) if r["stage"] == "prune"]
    sizes = {name: layer.weight.numel() for name, layer in pruned_layers(load_model(folder / "pruned.safetensors")[0]).items()}
    kept = {name: kept_count(n, 0.9) for name, n in sizes.items()}
    for r in search:
        assert r["layer_density"] == {name: kept[name] / n for name, n in sizes.items()}
        moved = {name: round(r["layer_distance"][name] * n) for name, n in sizes.items()}
        assert r["mask_distance"] == pytest.approx(sum(moved.values()) / sum(sizes.values()))
        shared = {name: kept[name] - moved[name] / 2 for name in sizes}  # each entry that leaves makes room for another
        assert r["layer_jaccard"] == pytest.approx({name: shared[name] / (2 * kept[name] - shared[name]) for name in sizes})
        assert r["jaccard"] == pytest.approx(sum(shared.values()) / sum(2 * kept[name] - shared[name] for name in sizes))
        assert r["flips"] == pytest.approx(sum(r["layer_flips"][name] * kept[name] for name in sizes) / sum(kept.values()))
        assert r["churn"] == pytest.approx(sum(r["layer_churn"][name] * kept[name] for name in sizes) / sum(kept.values()))
        assert all(0 <= r["layer_churn"][name] * kept[name] <= moved[name] / 2 for name in sizes)
    assert search[0]["churn"] == 0  # nothing can come back that never left


def test_what_comes_back_is_told_from_what_is_new():
    net = sparsify(nn.Sequential(nn.Linear(4, 1, bias=False)), 0.5)
    search = Search(Hydra(), net, Plain(net, torch.optim.SGD(net.parameters(), lr=0.1)), sampled=1.0)
    told = []
    for scores in ([4, 3, 2, 1], [4, 1, 2, 3], [4, 3, 2, 1], [1, 2, 4, 3]):
        with torch.no_grad():
            net[0].scores.copy_(torch.tensor([scores]))
        if search.masks:
            told.append(search.metrics()["churn"])
        search.start_epoch()
    assert told == [0, 0.5, 0.5]  # the second weight comes back, then the fourth beside the third, which is new


def test_each_epoch_but_the_first_of_a_stage_tells_how_far_the_predictions_moved(finished):
    records = [r for r in read_metrics(finished[0]) if "epoch" in r]
    assert all(("functional_distance" in r) == (r["epoch"] > 1) for r in records)
    assert all(r["functional_distance"] > 0 for r in records if r["epoch"] > 1)


def test_the_results_say_where_they_come_from(finished):
    environment = json.loads((finished[0] / "results.json").read_text())["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert environment["device"] == "cpu"


def test_finetuning_keeps_the_mask_and_the_scores(finished):
    folder, _ = finished
    pruned, finetuned = (pruned_layers(load_model(folder / f"{name}.safetensors")[0]) for name in ("pruned", "finetuned"))
    for name in pruned:
        assert torch.equal(pruned[name].mask, finetuned[name].mask)
        assert torch.equal(pruned[name].scores, finetuned[name].scores)
        assert not torch.equal(pruned[name].masked_weight, finetuned[name].masked_weight)
        assert not finetuned[name].masked_weight[~pruned[name].mask].any()


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_settings(finished, tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    start(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    same_results(finished[0], tmp_path / "again")


def test_another_seed_gives_another_result(finished, tmp_path):
    start(tmp_path / "other", "seed=1")
    assert (tmp_path / "other" / "dense.safetensors").read_bytes() != (finished[0] / "dense.safetensors").read_bytes()


# ``stop`` is asked after each step (pretrain: 1 to 6, prune: 8 to 16, finetune: 18 to 23) and each evaluated batch (7, 17, 24). Steps 1, 2,
# 8, 12 and 20 are within an epoch, 3, 6, 11 and 23 end one; 8 is in S2AP's warm-up.
@pytest.mark.parametrize("moment", [1, 2, 3, 6, 7, 8, 11, 12, 17, 20, 23, 24])
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, moment):
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        start(folder, stop=after(moment))
    assert (folder / "state.safetensors").exists() == (moment not in (7, 17, 24))
    assert not (folder / "results.json").exists()
    go_on(folder)
    assert not (folder / "state.safetensors").exists()
    same_results(finished[0], folder)


def test_what_a_loss_carries_survives_a_stop(tmp_path):
    carries = ("pretrain.loss=free_at", "pretrain.epochs=1", "prune.epochs=0", "finetune.epochs=0")
    start(tmp_path / "through", *carries)
    with pytest.raises(Stopped):
        start(tmp_path / "stopped", *carries, stop=after(2))
    go_on(tmp_path / "stopped")
    same_results(tmp_path / "through", tmp_path / "stopped")


def test_a_run_that_is_stopped_again_and_again_arrives_too(finished, tmp_path):
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        start(folder, stop=after(2))
    for _ in range(100):
        try:
            go_on(folder, stop=after(2))
            break
        except Stopped:
            continue
    same_results(finished[0], folder)


def test_going_on_with_a_finished_run_changes_nothing(finished, tmp_path):
    before = {path.name: path.read_bytes() for path in finished[0].glob("*.safetensors")}
    assert go_on(finished[0]) == finished[1]
    assert {path.name: path.read_bytes() for path in finished[0].glob("*.safetensors")} == before


@pytest.mark.parametrize("method", ["hydra", "magnitude"])
def test_gamma_0_is_the_plain_search_to_the_bit(method, tmp_path):
    start(tmp_path / "plain", f"prune.method={method}", "prune.s2ap=false", "pretrain.epochs=1")
    start(tmp_path / "zero", f"prune.method={method}", "prune.gamma=0", "pretrain.epochs=1")
    tensors = [checkpoint.load(tmp_path / run / "finetuned.safetensors")[0] for run in ("plain", "zero")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("s2ap", ["true", "false"])
def test_magnitude_keeps_the_largest_weights_and_trains_them(s2ap, tmp_path):
    start(tmp_path / "run", "prune.method=magnitude", f"prune.s2ap={s2ap}", "pretrain.epochs=1")
    dense, pruned = (load_model(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("dense", "pruned"))
    for name, layer in pruned_layers(pruned).items():
        assert torch.equal(layer.scores, layer.weight)
        largest = torch.sort(layer.weight.abs().flatten(), stable=True).indices[-int(layer.kept) :]
        assert torch.equal(layer.mask.flatten().nonzero().flatten(), largest.sort().values)
        assert not torch.equal(layer.weight, dense.get_submodule(name).weight)


def test_s2ap_changes_what_magnitude_finds(tmp_path):
    start(tmp_path / "plain", "prune.method=magnitude", "prune.s2ap=false", "pretrain.epochs=1")
    start(tmp_path / "s2ap", "prune.method=magnitude", "prune.warmup_epochs=0", "pretrain.epochs=1")
    a, b = (checkpoint.load(tmp_path / run / "pruned.safetensors")[0] for run in ("plain", "s2ap"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_magnitude_without_epochs_is_least_weight_magnitude(tmp_path):
    start(tmp_path / "run", "prune.method=magnitude", "prune.epochs=0", "pretrain.epochs=1", "finetune.epochs=0")
    dense, pruned = (load_model(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("dense", "pruned"))
    for name, layer in pruned_layers(pruned).items():
        weight = dense.get_submodule(name).weight
        order = torch.sort(weight.abs().flatten(), stable=True).indices
        expected = weight.detach().flatten().index_fill(0, order[: -int(layer.kept)], 0).view_as(weight)
        assert torch.equal(layer.masked_weight, expected)


@pytest.mark.parametrize("sparsity", [0, 1])
def test_nothing_or_everything_may_be_pruned(sparsity, tmp_path):
    _, pruned, finetuned = start(tmp_path / "run", f"prune.sparsity={sparsity}", "pretrain.epochs=1")
    assert pruned["sparsity"] == finetuned["sparsity"] == sparsity


def test_two_of_four(tmp_path):
    how = ["prune.granularity=2:4", "prune.sparsity=0.5", "prune.exclude=conv1, linear"]
    rows = start(tmp_path / "run", "pretrain.epochs=1", "prune.epochs=2", "finetune.epochs=1", *how)
    assert 0 < rows[-1]["sparsity"] < 0.5
    model, _, _ = load_model(tmp_path / "run/finetuned.safetensors")
    assert list(pruned_layers(model)) == ["conv2", "conv3"]
    for layer in pruned_layers(model).values():
        assert (layer.mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()


@pytest.mark.parametrize("method", ["hydra", "harp", "magnitude"])
def test_layers_that_are_added_may_share_a_mask(method, tmp_path):
    how = ["prune.granularity=channel", "prune.tied=true", "prune.sparsity=0.5", "prune.exclude=:last", f"prune.method={method}"]
    short = ["pretrain.epochs=1", "prune.epochs=1", "prune.warmup_epochs=0", "finetune.epochs=1"]
    start(tmp_path / "run", "model.name=resnet18", *how, *short)
    model, recipe, _ = load_model(tmp_path / "run/finetuned.safetensors")
    dense, _, _ = load_model(tmp_path / "run/dense.safetensors")
    assert any(isinstance(module, TiedWeight) for module in model.modules())
    images = open_data(recipe).test.floats()[:8]
    with torch.no_grad():
        before = model.eval()(images)
        after = densify(model, shrink=True, example=images[:2])(images)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in dense.parameters())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["prune.loss=trades"],
        ["prune.loss=natural"],
        ["prune.loss=free_at"],
        ["attack.norm=l2", "pretrain.loss=pgd_at", "finetune.loss=pgd_at"],
        ["attack.norm=l1", "pretrain.loss=pgd_at", "finetune.loss=pgd_at"],
        ["prune.loss=mart"],
        ["data.shift=1"],
        ["prune.schedule=constant"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_other_settings_run(overrides, tmp_path):
    rows = start(tmp_path / "run", *overrides, "pretrain.epochs=1", "prune.epochs=2", "finetune.epochs=1")
    assert len(rows) == 3


def test_a_loss_that_does_not_go_with_the_attack_is_refused_before_the_run(tmp_path, capsys):
    error = refused(capsys, "run", "digits", "--set", "attack.norm=l2", "--out", tmp_path / "run")
    assert "pretrain: loss n_fgsm: expected an adversary of norm linf, got l2" in error
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_follows_half_a_cosine(finished):
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    recipe = load_recipe("digits", SMALL)
    assert [r["lr"] for r in records if r["stage"] == "prune"] == pytest.approx([recipe.prune.lr * c for c in (1, 0.75, 0.25)])


def test_evaluate_says_what_a_plain_computation_says(finished):
    recipe = load_recipe("digits", [*SMALL, "evaluate.steps=0"])
    data = open_data(recipe)
    model, _, name = load_model(finished[0] / "finetuned.safetensors", data=data)
    found = evaluate(recipe, data, model)
    assert name == "finetuned"
    with torch.no_grad():
        right = model.eval()(data.test.floats()).argmax(1) == data.test.labels
    assert found["clean"] == right.double().mean().item()


def test_a_loss_that_diverges_is_reported_and_leaves_no_checkpoint(tmp_path):
    with pytest.raises((FloatingPointError, ValueError), match=r"pretrain, epoch 1, step \d: .*(loss|NaN)"):
        start(tmp_path / "run", "pretrain.lr=1e6")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_stage_without_a_model_to_start_from(tmp_path):
    recipe = load_recipe("digits", SMALL)
    with RunFolder.create(tmp_path / "run", recipe) as folder, pytest.raises(ValueError, match="prune: expected a model to start from"):
        run(Session(recipe, open_data(recipe), folder), ["prune"])


# ------------------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_gives_back_bits_and_words(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7), "empty": torch.zeros(0, 2), "half": torch.randn(2).half()}
    tensors["same"] = tensors["a"]
    checkpoint.save(tmp_path / "x.safetensors", tensors, {"epoch": 3, "name": "é"})
    found, about = checkpoint.load(tmp_path / "x.safetensors")
    assert about == {"epoch": 3, "name": "é"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_named(finished, tmp_path, keep):
    data = (finished[0] / "pruned.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors: truncated or not a safetensors file"):
        load_model(path)


def test_other_files_are_not_taken_for_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors: not written by s2ap_ext"):
        load_model(tmp_path / "foreign.safetensors")


def test_a_checkpoint_that_does_not_fit_is_named(finished, tmp_path):
    tensors, about = checkpoint.load(finished[0] / "dense.safetensors")
    del tensors["conv1.weight"]
    checkpoint.save(tmp_path / "part.safetensors", tensors, about)
    with pytest.raises(ValueError, match=r"part\.safetensors: does not fit the model \(.*conv1\.weight"):
        load_model(tmp_path / "part.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def write_half():
        with checkpoint.replacing(path) as temporary:
            temporary.write_text("new, half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        RunFolder.create(tmp_path, load_recipe("digits"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_model_of_a_recipe_is_seeded():
    recipe = load_recipe("digits", SMALL)
    data = open_data(recipe)
    a, b = (new_model(recipe, data).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
