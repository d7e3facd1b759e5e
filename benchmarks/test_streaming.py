"""An epoch of streamed JPEGs: the memory that it takes, and its images per second beside decoding alone on one core.

pytest benchmarks/test_streaming.py --images 100000
"""

import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from measure import ROWS

from s2ap_ext.data import Batches, load_data
from s2ap_ext.data.stream import AHEAD

BATCH = 128
DIFFERENT = 512  # images that are made; the set repeats them, each time with other bytes at the end
LIMIT = 1 << 30  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick, request):
    """JPEGs in shards with row groups of 100 rows, as the hub writes ImageNet; the sides are a third of those of its photographs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 2_000 if quick else request.config.getoption("--images")
    root = tmp_path_factory.mktemp("jpegs")
    encoded = [_jpeg(seed) for seed in range(min(DIFFERENT, count))]
    shards = max(1, count // 5000)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard, rows in enumerate(np.array_split(np.arange(count), shards)):
        cells = [{"bytes": encoded[i % len(encoded)] + int(i).to_bytes(8, "big"), "path": None} for i in rows]
        table = pa.table({"image": pa.array(cells, kind), "label": pa.array(rows % 10)})
        path = root / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    pq.write_table(table.slice(0, 8), root / "validation.parquet")
    return root


def _jpeg(seed):
    """Smooth shapes and some noise, about as many bytes for a pixel as a photograph has."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    height, width = generator.integers(110, 170, 2)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(int) + generator.normal(0, 8, (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_epoch_of_streamed_jpegs(folder, quick, benchmark, workers):
    """In a process of its own, since this one has made the images and holds what that took."""
    command = [sys.executable, __file__, str(folder), str(workers)]
    done = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True), rounds=1)
    found = json.loads(done.stdout)
    share = found["streamed"] / found["alone"]
    benchmark.extra_info.update(found)
    ROWS.append(
        {
            "benchmark": f"an epoch of {found['images']:,} streamed JPEGs, {workers} decoding process(es)",
            "rounds": found["rounds"],
            "median_ms": {"streamed, per image": 1e3 / found["streamed"], "decoded alone, per image": 1e3 / found["alone"]},
            "ratio_to_first": {"streamed, per image": 1.0, "decoded alone, per image": share},
            "note": (
                f"{found['streamed']:,.0f} images/s, {share:.0%} of what one core decodes; of a decoding process's time on its core "
                f"{found['decoding']:.0%} go into decoding. At most {found['resident'] / 2**20:,.0f} MiB are resident in all processes."
            ),
        }
    )
    assert found["resident"] < LIMIT


def measure(folder, workers):
    """Streams an epoch, and between its parts decodes some images in this process, with all else at rest."""
    split = load_data("some/jpegs", data_dir=folder, size=112, workers=workers).train
    rows = list(itertools.islice(split.source.all_rows(), min(1000, len(split) // 20)))
    batches = Batches(split, BATCH, flip=True).epoch(0)
    part = -(-len(split) // BATCH) // 5
    alone, streamed, decoding, resident = [], [], [], 0
    for _ in range(5):
        start, busy = time.perf_counter(), time.process_time()
        for number, row in enumerate(rows):
            split.source.decode(row, split.decoder, (0, 0, number))
        alone.append((time.perf_counter() - start) / len(rows))
        here = (time.process_time() - busy) / len(rows)
        for _ in range(AHEAD * workers + 1):  # which were made while this process decoded
            next(batches, None)
        images, start, busy = 0, time.perf_counter(), _busy()
        for number, (x, _) in enumerate(itertools.islice(batches, max(1, part - AHEAD * workers - 1))):
            images += len(x)
            if number % 20 == 0:
                resident = max(resident, sum(_resident(process) for process in (os.getpid(), *_decoders())))
        if images:
            streamed.append((time.perf_counter() - start) / images)
            if (spent := _busy() - busy) > 0:  # it is counted in hundredths of a second, and batches may have been made before
                decoding.append(here * images / spent)
    median = {
        name: float(np.median(values or [np.nan])) for name, values in {"alone": alone, "streamed": streamed, "decoding": decoding}.items()
    }
    found = {"images": len(split), "rounds": len(alone), "resident": resident, "decoding": median["decoding"]}
    print(json.dumps({**found, "alone": 1 / median["alone"], "streamed": 1 / median["streamed"]}))


def _decoders():
    """The processes that decode."""
    own = os.getpid()
    return [int(child) for child in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def _busy():
    """The seconds that the decoding processes have computed."""
    ticks = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13] for process in _decoders()]
    return sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")


def _resident(process):
    """The bytes of memory that the process holds, its share of what several hold."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]))
