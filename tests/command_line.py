"""What tests of the ``s2ap`` command share: the smallest run, and what a refusal looks like."""

from s2ap_ext.cli import main

TINY = [
    "model.width=2",
    "data.train_size=32",
    "data.test_size=16",
    "attack.steps=1",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=8",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
    *(f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=16")),
]


def settings(*overrides, base=TINY):
    """``base`` and then ``overrides`` as words of the command line."""
    return [word for text in (*base, *overrides) for word in ("--set", text)]


def refused(capsys, *arguments):
    """Runs the command, which must refuse: exit code 2, one line, nothing else printed. Returns the line."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2, err or out
    assert err.startswith("s2ap: error: "), err
    assert err.count("\n") == 1, err
    assert len(err) < 2000, err
    assert out == ""
    return err
