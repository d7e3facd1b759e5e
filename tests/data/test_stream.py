"""Streamed images: the same batches for any number of processes and from any place on, in little memory."""

import io
import itertools
import multiprocessing
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, huge_png, pictures, write

from s2ap_ext.data import Batches, Files, load_data
from s2ap_ext.data import stream as streaming
from s2ap_ext.data.images import Fit, decode
from s2ap_ext.data.parquet import ParquetSource

pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

N = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ninety training images of different sizes in two shards with row groups of 7 and of 30, and eight test images."""
    root = tmp_path_factory.mktemp("stream")
    images = [encoded(pictures(1, i, (18 + i % 5, 16 + i % 7, 3))[0]) for i in range(N)]
    for shard, (rows, group) in enumerate([(slice(0, 41), 7), (slice(41, N), 30)]):
        labels = [i % 10 for i in range(N)[rows]]
        write(root / f"train-0000{shard}-of-00002.parquet", images[rows], labels, names=list("0123456789"), group=group)
    write(root / "validation.parquet", images[:8], [i % 10 for i in range(8)])
    return root


def opened(folder, **options):
    return load_data("my/set", data_dir=folder, **{"size": 12, "workers": 1, **options})


def batches(folder, epoch=0, start=0, batch_size=16, **options):
    return list(Batches(opened(folder, **options).train, batch_size, seed=3, shift=1, flip=True).epoch(epoch, start))


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True))


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_ROWS", 20)


def test_an_epoch_has_every_image_once(folder, small_buffer):
    data = opened(folder, scale=1.0)
    assert isinstance(opened(folder).train, streaming.Stream)
    assert data.shape == (3, 12, 12)
    memory = {tuple(x.flatten().tolist()): int(y) for x, y in zip(data.train.images, data.train.labels, strict=True)}
    stream = opened(folder, scale=1.0, stream="always").train
    seen = [
        (tuple(x.flatten().tolist()), int(y))
        for xs, ys in stream.read(stream.shuffled(torch.Generator()), 16)
        for x, y in zip(xs, ys, strict=True)
    ]
    assert len(seen) == N
    assert dict(seen) == memory
    in_order = torch.cat([x for x, _ in stream.read(torch.arange(N), 16)])
    assert torch.equal(in_order, data.train.images)


def test_the_batches_do_not_depend_on_the_number_of_processes(folder, small_buffer):
    one, three = (batches(folder, workers=workers) for workers in (1, 3))
    assert all(x.is_contiguous() for x, _ in one)
    assert same(one, three)
    assert not same(one, batches(folder, epoch=1))
    decoded_here = opened(folder).train
    here = Batches(streaming.replace(decoded_here, workers=0), 16, seed=3, shift=1, flip=True)
    assert same(one, list(here.epoch(0)))


@pytest.mark.parametrize("batch_size", [1, 16, 20, 45])
def test_from_any_batch_on_they_are_the_same(folder, small_buffer, batch_size):
    stream = streaming.replace(opened(folder).train, workers=0)
    through = list(Batches(stream, batch_size, seed=3).epoch(2))
    for start in range(0, len(through) + 1, 1 if batch_size > 1 else 13):
        assert same(through[start:], list(Batches(stream, batch_size, seed=3).epoch(2, start)))


@pytest.fixture
def read(monkeypatch):
    """The rows that parquet sources give, as they give them."""
    seen = []
    rows = ParquetSource.rows

    def noted(self, block):
        for row in rows(self, block):
            seen.append(row.where)
            yield row

    monkeypatch.setattr(ParquetSource, "rows", noted)
    return seen


def test_going_on_reads_only_the_stretch_that_the_place_is_in(folder, small_buffer, read):
    stream = streaming.replace(opened(folder).train, workers=0)
    read.clear()
    list(Batches(stream, 16).epoch(0))
    assert len(read) == len(set(read)) == N
    read.clear()
    list(Batches(stream, 16).epoch(0, 5))  # the last stretch: rows 80 to 89
    assert 10 <= len(read) <= 10 + 30  # and those before them in the row group that it begins in


def test_at_most_a_buffer_and_a_batch_of_rows_are_held(folder, small_buffer, read):
    stream = opened(folder).train
    read.clear()
    given = 0
    for rows in stream._batches(stream.shuffled(torch.Generator()), 16, 0, None):
        given += len(rows)
        assert len(read) - given <= 20
    assert given == len(read) == N


def test_the_buffer_is_smaller_for_larger_images(folder, monkeypatch):
    stream = opened(folder).train
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 10 * stream.source.row_bytes)
    assert stream.buffer == 10


def test_neighbours_change_from_epoch_to_epoch(folder, small_buffer):
    stream = opened(folder).train
    orders = [stream.shuffled(torch.Generator().manual_seed(i)) for i in range(2)]
    assert all(order.sort().values.equal(torch.arange(N)) for order in orders)
    stretches = [set(order[:20].tolist()) for order in orders]
    assert stretches[0] != stretches[1]
    assert not orders[0][:20].equal(orders[0][:20].sort().values)


def test_a_limit_takes_the_first_rows(folder):
    part = load_data("my/set", data_dir=folder, size=12, stream="always", limit=44, test_limit=3, workers=1)
    assert (len(part.train), len(part.test)) == (44, 3)
    labels = torch.cat([y for _, y in Batches(part.train, 16)])
    assert labels.tolist() == [i % 10 for i in range(44)]
    shuffled = torch.cat([y for _, y in Batches(part.train, 16).epoch(0)])
    assert shuffled.sort().values.equal(labels.sort().values)


def test_streaming_draws_nothing_from_torch(folder):
    state = torch.get_rng_state()
    batches(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_one_size_are_streamed_as_they_are(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [encoded(p) for p in pictures(10)], range(10), label="fine_label", image="image")
    data = load_data("cifar100", data_dir=tmp_path, stream="always", workers=1)
    memory = load_data("cifar100", data_dir=tmp_path, stream="never")
    assert data.shape == memory.shape == (3, 32, 32)
    assert data.num_classes == 10
    assert torch.equal(torch.cat([x for x, _ in data.train.read(torch.arange(10), 4)]), memory.train.images)


def test_what_takes_more_memory_is_streamed(folder, monkeypatch):
    monkeypatch.setattr("s2ap_ext.data.encoded.IN_MEMORY", 3 * 12 * 12 * N - 1)
    data = opened(folder, scale=1.0)
    assert isinstance(data.train, streaming.Stream)
    assert not isinstance(data.test, streaming.Stream)


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_one_line_from_every_process(tmp_path, workers):
    good = [encoded(p) for p in pictures(6)]
    write(tmp_path / "train.parquet", [*good, b"broken"], [0] * 7)
    write(tmp_path / "test.parquet", good, [0] * 6)
    stream = load_data("my/set", data_dir=tmp_path, size=8, workers=1).train
    with pytest.raises(ValueError, match=r"train.parquet, row 6: not a readable image [^\n]*$"):
        list(streaming.replace(stream, workers=workers).read(torch.arange(7), 2))


def test_a_file_that_ends_early_is_named(folder, tmp_path, monkeypatch):
    data = opened(folder)
    monkeypatch.setattr("s2ap_ext.data.parquet._cells", lambda path, group, images: iter([({"bytes": b""}, 0)]))
    with pytest.raises(ValueError, match=r"train-00000-of-00002.parquet: truncated or corrupt \(1 rows where 7 were promised\)"):
        list(data.train.read(torch.arange(20), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_before_an_error_is_handed_out(folder, monkeypatch, workers):
    stream = streaming.replace(opened(folder).train, workers=workers)
    own = streaming.Stream._encoded

    def ends(self, order):
        yield from itertools.islice(own(self, order), 9)
        raise ValueError("the disk is gone")

    monkeypatch.setattr(streaming.Stream, "_encoded", ends)
    monkeypatch.setattr(streaming.Stream, "buffer", 1)
    batches = stream.read(torch.arange(20), 4)
    sizes = []
    with pytest.raises(ValueError, match="the disk is gone"):
        sizes.extend(len(labels) for _, labels in batches)
    assert sizes == [4, 4]
    assert not multiprocessing.active_children(), "they would keep whoever lets go of the error for seconds"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "size: expected an integer >= 0, got -1"),
        ({"size": 5000}, r"size: expected an integer in \[0, 4096\], got 5000"),
        ({"resize": 8}, "my/set: resize: expected an integer >= size, which is 12, got 8"),
        ({"scale": 0}, "scale: expected a number in"),
        ({"stream": "sometimes"}, "stream: expected one of auto, always, never"),
        ({"stream": "never"}, "stream: expected auto or always, since training images are cut out anew in each epoch"),
        ({"size": 0}, r"row 1: expected an image of shape .* got one of \(3, 19, 17\)"),
        ({"workers": 10_000}, r"workers: expected an integer in \[0, 256\]"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        opened(folder, **options)


def test_processes_end_with_a_parent_that_is_killed(folder, tmp_path):
    """Also at once: what they have inherited, such as the lock of a run's folder, they would hold for seconds."""
    code = f"""
import torch
from s2ap_ext.data import Batches, Files, load_data
for x, y in Batches(load_data("my/set", data_dir={str(folder)!r}, size=12, workers=2).train, 4).epoch(0):
    print("begun", flush=True)
    import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 3
    while (left := [pid for pid in children if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------------------- how images fit


def test_the_middle_is_that_of_the_scaled_image():
    smooth = np.broadcast_to(np.linspace(0, 255, 70)[:, None, None], (70, 90, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(smooth).resize((72, 56), Image.Resampling.BILINEAR).crop((12, 4, 60, 52)))
    ours = decode(encoded(smooth), None, "FILE", fit=Fit(48, 56))
    assert ours.shape == (48, 48, 3)
    assert np.abs(ours.astype(int) - expected).max() <= 2


def test_random_parts_are_as_large_and_as_wide_as_they_may_be():
    fit, generator = Fit(8, 9, 0.25), np.random.default_rng(0)
    for width, height in ((100, 80), (30, 200), (1, 1), (3, 500)):
        boxes = np.array([fit.training_box(width, height, generator) for _ in range(300)])
        wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert boxes[:, :2].min() >= 0
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (wide > 0).all()
        assert (high > 0).all()
        if (width, height) == (100, 80):
            areas, ratios = wide * high / 8000, wide / high
            assert 0.24 < areas.min() < 0.3
            assert 0.9 < areas.max() <= 1
            assert 0.73 < ratios.min() < 0.8
            assert 1.25 < ratios.max() < 1.36
            assert len(np.unique(boxes, axis=0)) > 250


def test_the_same_key_cuts_out_the_same():
    image = encoded(pictures(1, 0, (40, 40, 3))[0])
    fit = Fit(16, 18, 0.1)
    one, again, other = (decode(image, None, "FILE", fit=fit, key=(1, 2, number)) for number in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(decode(image, None, "FILE", fit=Fit(16, 18), key=(1, 2, 3)), decode(image, None, "FILE", fit=fit))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_fitted_images_have_three_channels(mode):
    grey = Image.fromarray(pictures(1, 0, (20, 30, 3))[0]).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF")
    fitted = decode(out.getvalue(), None, "FILE", fit=Fit(8, 9))
    assert fitted.shape == (8, 8, 3)
    if mode != "1":
        assert np.abs(fitted.astype(int) - decode(encoded(np.asarray(grey)), None, "FILE", fit=Fit(8, 9))).max() <= 1


def test_an_absurd_size_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match=r"FILE: not a readable image \(Image size .* exceeds limit"):
        decode(huge_png(60_000, 60_000), None, "FILE", fit=Fit(8, 9))


def test_streams_of_a_users_function_come_with_their_files(folder, monkeypatch):
    data = opened(folder)
    module = types.ModuleType("own_streams")
    module.whole = lambda: data
    module.without = lambda: streaming.replace(data, files=Files())
    module.other = lambda: streaming.replace(data, test=opened(folder, size=10).test)
    monkeypatch.setitem(sys.modules, "own_streams", module)
    assert load_data("own_streams:whole", limit=20).train.count == 20
    with pytest.raises(ValueError, match=r"without: train: expected the files of streamed images \(Dataset.files\)"):
        load_data("own_streams:without")
    with pytest.raises(ValueError, match=r"other: test: expected images .* of one shape in both splits, got \[8, 3, 10, 10\]"):
        load_data("own_streams:other")
