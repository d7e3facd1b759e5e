"""What a run prints while it trains."""

import pytest

from s2ap_ext.pipeline import progress

RECORD = {
    "stage": "prune",
    "epoch": 2,
    "loss": 0.5,
    "train_robust": 0.75,
    "robust": 0.8,
    "clean": 0.9,
    "mask_distance": 0.01,
    "seconds": 3.0,
}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_stage_is_one_line_with_its_time(clock, capsys):
    lines = progress.Lines()
    lines.start("prune", 8)
    for epoch in (1, 2):
        for _ in range(4):
            clock[0] += 10
            lines.advance(f"prune {epoch}/2", "loss 0.6")
        lines.epoch({**RECORD, "epoch": epoch}, 2)
    lines.stop()
    after_a_minute, last = capsys.readouterr().out.splitlines()
    assert after_a_minute == "prune 2/2  loss 0.6  about 20 s left"
    assert last == "prune 2/2  loss 0.500  robust 75.0 % (train)  80.0 % (test)  clean 90.0 % (test)  mask moved 1.0 %  in 1 min 20 s"


def test_the_time_left_counts_only_what_this_process_has_done(clock, capsys):
    lines = progress.Lines()
    lines.start("prune", 100, done=90)
    clock[0] += 60
    lines.advance("prune 1/1", "")
    assert capsys.readouterr().out == "prune 1/1  about 9 min 0 s left\n"


def test_verbose_lines_are_one_for_each_epoch(clock, capsys):
    lines = progress.Lines(verbose=True)
    lines.start("prune", 8)
    lines.epoch(RECORD, 2)
    assert capsys.readouterr().out.endswith("mask moved 1.0 %  3.0 s\n")


def test_an_evaluation_says_what_it_found(clock, capsys):
    lines = progress.Lines()
    lines.start("test dense", 3)
    clock[0] += 2.5
    lines.stop("robust 91.0 %")
    assert capsys.readouterr().out == "test dense  robust 91.0 %  2.5 s\n"


def test_a_stage_that_was_stopped_in_its_first_epoch_has_nothing_to_tell(clock, capsys):
    lines = progress.Lines()
    lines.start("prune", 8)
    lines.stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (42.4, "42 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7815, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
