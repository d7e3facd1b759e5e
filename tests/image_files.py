"""Images as files: encoded, in parquet files as those of the hub, and in a folder for each class."""

import io
import json
import struct
import zlib

import numpy as np


def encoded(pixels, kind="PNG"):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pictures(n, seed=0, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write(path, cells, labels, image="img", names=None, label="label", group=4):
    """A parquet file as the hub's: an image struct, a label, and perhaps the class names in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    cell_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [cell if cell is None or isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells]
    table = pa.table({image: pa.array(rows, cell_type), label: pa.array(labels, pa.int64())})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def write_folders(root, classes, splits=("train", "val"), each=3, shape=None):
    """A folder for each class with ``each`` images, of the ``shape`` or each of another size."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                seed = 100 * s + 10 * c + i
                size = shape or (20 + seed % 7, 16 + seed % 5, 3)
                (root / split / name / f"{i}.png").write_bytes(encoded(pictures(1, seed, size)[0]))


def huge_png(width, height):
    """A PNG whose header promises ``width`` x ``height`` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
