"""Checksums of the files of a data set, and what is remembered of large ones."""

import json
import os
import time
import zlib

import pytest

from s2ap_ext.data import checksums
from s2ap_ext.data.checksums import Files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two files, which count as a large set and were left alone for a while; the cache lies beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "REMEMBERED", 1)
    for name, content in (("a", b"one"), ("b", b"another")):
        put(tmp_path / "data" / name, content)
    return tmp_path / "data"


def put(path, content, age=100):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, times=(time.time() - age,) * 2)


def files(folder):
    return Files.single(folder, sorted(folder.iterdir()))


def cache(folder):
    return list((folder.parent / "cache").rglob("*.json"))


@pytest.fixture
def read(monkeypatch):
    seen = []
    chunks = checksums._chunks
    monkeypatch.setattr(checksums, "_chunks", lambda path: seen.append(os.path.basename(path)) or chunks(path))
    return seen


def test_a_checksum_is_the_size_and_the_crc(folder):
    assert files(folder).checksums == {"a": f"3 {zlib.crc32(b'one'):08x}", "b": f"7 {zlib.crc32(b'another'):08x}"}
    assert files(folder).bytes == 10


def test_a_large_set_is_read_once(folder, read):
    first = files(folder).checksums
    assert sorted(read) == ["a", "b"]
    assert files(folder).checksums == first
    assert len(read) == 2
    assert len(cache(folder)) == 1


def test_a_file_that_has_changed_is_read_anew(folder, read):
    files(folder).checksums  # noqa: B018
    put(folder / "a", b"two", age=50)  # of the same size
    assert files(folder).checksums["a"] == f"3 {zlib.crc32(b'two'):08x}"
    assert sorted(read) == ["a", "a", "b"]


def test_a_file_that_was_written_just_now_is_not_remembered(folder, read):
    put(folder / "a", b"new", age=0)
    for _ in range(2):
        files(folder).checksums  # noqa: B018
    assert sorted(read) == ["a", "a", "b"]


def test_a_small_set_is_read_each_time(folder, read, monkeypatch):
    monkeypatch.setattr(checksums, "REMEMBERED", 11)
    for _ in range(2):
        files(folder).checksums  # noqa: B018
    assert sorted(read) == ["a", "a", "b", "b"]
    assert cache(folder) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"x": 3}', "[" * 100_000])
def test_a_damaged_cache_is_none(folder, read, content):
    expected = files(folder).checksums
    (path,) = cache(folder)
    path.write_text(content)
    assert files(folder).checksums == expected
    assert len(read) == 4
    assert len(json.loads(path.read_text())) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(folder, read):
    (folder.parent / "cache").write_text("no folder")
    assert files(folder).checksums == files(folder).checksums
    assert len(read) == 4


def test_a_file_that_cannot_be_read_is_named(folder):
    known = files(folder)
    (folder / "b").unlink()
    with pytest.raises(FileNotFoundError, match="data/b"):
        known.checksums  # noqa: B018
