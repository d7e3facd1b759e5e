"""Images that are decoded while the training goes on, by processes of their own: for sets that do not fit into memory.

The order of an epoch is a function of its seed and of the blocks of the source alone: the blocks are shuffled and laid end to end, and each
stretch of as many rows as the buffer holds is shuffled in itself. So a row meets those of the blocks that are near its own in this epoch,
and the next epoch has other neighbours. To give the batches from the n-th on, only the blocks of the stretch that it lies in are read anew.

The training process reads encoded rows, holds one buffer of them, and hands them out batch by batch; torch's DataLoader carries them to
the processes that decode, and the batches back in order. So neither the order nor an image depends on how many processes there are.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .source import Decoder, Row, Shape, Source

BUFFER_BYTES, BUFFER_ROWS = 256 << 20, 16_384  # of encoded rows that are held for shuffling: at most so many
AHEAD = 2  # batches that each process has to do while one is waited for
PR_SET_PDEATHSIG = 1  # of prctl

Key = tuple[int, ...] | None
Batch = list[tuple[Row, Key]]
Sample = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Stream:
    """The first ``count`` images of a source, decoded anew whenever they are read.

    Attributes:
        source: the encoded images.
        decoder: how they are decoded; its shape is known.
        count: how many there are.
        workers: processes that decode; 0: this one does.
    """

    source: Source
    decoder: Decoder
    count: int
    workers: int

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> Shape:
        """(C, H, W) of an image."""
        assert self.decoder.shape is not None
        return self.decoder.shape

    @property
    def buffer(self) -> int:
        """How many rows are held for shuffling."""
        return max(1, min(BUFFER_ROWS, BUFFER_BYTES // self.source.row_bytes))

    def first(self, count: int) -> Stream:
        """The stream of the first ``count`` images."""
        return replace(self, count=min(count, self.count))

    def to(self, device: str | torch.device) -> Stream:
        """The stream itself: it holds no images."""
        return self

    def fingerprint(self) -> Iterator[bytes]:
        """How many images there are of which shape; what they show is told by the checksums of their files."""
        yield f"{self.count} {self.shape}".encode()

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """An order that is read block by block: the blocks shuffled, and stretches as long as the buffer shuffled in themselves."""
        starts = self._starts()
        blocks = torch.randperm(len(starts) - 1, generator=generator)
        sizes = starts.diff()[blocks]
        moved = starts[blocks] - (sizes.cumsum(0) - sizes)  # how far the rows of each block are from where they stand now
        rows = torch.arange(self.count) + moved.repeat_interleave(sizes)
        stretch = torch.arange(self.count) // self.buffer
        return rows[(stretch + torch.rand(self.count, generator=generator, dtype=torch.float64)).argsort()]

    def read(
        self, order: Tensor, batch_size: int, *, start: int = 0, key: tuple[int, ...] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the images in ``order``, from batch ``start`` on: uint8 [B, C, H, W], channels innermost, and int64 [B].

        Any order is right; one of :meth:`shuffled` or the plain one is fast.

        Args:
            key: each image is cut out at random as this and its number in the split say; None: its middle.

        Raises:
            ValueError: as :meth:`.source.Source.decode`.
        """
        with warnings.catch_warnings():
            # Of forks beside threads, though the new processes touch nothing that a thread may have locked; of more processes than cores.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            batches = iter(self._loader(_told(self._batches(order, batch_size, start, key))))
        try:
            for batch in batches:
                if isinstance(batch, ValueError):
                    raise ValueError(str(batch))
                images, labels = batch
                yield images.permute(0, 3, 1, 2), labels
        finally:
            del batches  # its processes end now, and not when somebody lets go of the error

    def _loader(self, batches: Iterator[Batch | ValueError]) -> DataLoader[Any]:
        return DataLoader(
            _Decoding(self.source, self.decoder),
            batch_sampler=batches,  # type: ignore[arg-type] # of rows, where others hand out indices; or an error
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            collate_fn=_collated,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            multiprocessing_context="fork" if self.workers else None,  # at once, and with no demands on the user's main module
            generator=torch.Generator(),  # else it would draw from torch's own
        )

    def _starts(self) -> Tensor:
        """The number of the first row of each block, and after the last one how many rows there are."""
        starts = torch.tensor([0, *self.source.sizes]).cumsum(0)
        return starts[: int((starts < self.count).sum()) + 1].clamp(max=self.count)

    def _batches(self, order: Tensor, batch_size: int, start: int, key: Key) -> Iterator[Batch]:
        """The rows of each batch. At most a buffer and a batch of rows are held: as some leave, as many of the next stretch are read."""
        given = start * batch_size
        skipped = given // self.buffer * self.buffer  # whole stretches
        gone = set(order[skipped:given].tolist())
        held: dict[int, Row] = {}
        read = skipped
        with closing(self._encoded(order[skipped:])) as rows:
            for batch in torch.split(order, batch_size)[start:]:
                given += len(batch)
                while read < min(given + self.buffer, len(order)):
                    number, row = next(rows)
                    read += 1
                    if number not in gone:
                        held[number] = row
                numbers = batch.tolist()
                yield [(held.pop(number), None if key is None else (*key, number)) for number in numbers]

    def _encoded(self, order: Tensor) -> Generator[tuple[int, Row], None, None]:
        """The numbers and rows of ``order``, stretch by stretch, those of a stretch in whatever order reads each block once."""
        starts = self._starts()
        blocks: dict[int, _Block] = {}  # those that have been read in part
        for stretch in torch.split(order, self.buffer):
            stretch = stretch.sort().values
            of_block = torch.bucketize(stretch, starts, right=True) - 1
            touched, counts = torch.unique_consecutive(of_block, return_counts=True)
            for block, part in zip(touched.tolist(), torch.split(stretch, counts.tolist()), strict=True):
                first, numbers = int(starts[block]), part.tolist()
                opened = blocks.pop(block, None)
                if opened is None or opened.next > numbers[0]:
                    opened = _Block(self.source.rows(block), first)
                for number in numbers:
                    yield number, opened.row(number)
                if opened.next < int(starts[block + 1]):
                    blocks[block] = opened


def _told(batches: Iterator[Batch]) -> Iterator[Batch | ValueError]:
    """Hands an error in reading out like a batch, after the batches before it.

    Raised while the DataLoader starts its processes, it would leave them waiting, and whoever ends them would wait 5 s for each.
    """
    try:
        yield from batches
    except ValueError as error:
        yield error


class _Block:
    """A block that is read from its beginning to its end, as far as it is asked for."""

    def __init__(self, rows: Iterator[Row], first: int) -> None:
        self.rows, self.next = rows, first

    def row(self, number: int) -> Row:
        """The row ``number``, which comes after all that were asked for."""
        while True:
            row = next(self.rows)
            self.next += 1
            if self.next > number:
                return row


class _Decoding(Dataset[Sample]):
    """What the processes run: a batch of encoded rows in, images and labels out."""

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self.source, self.decoder = source, decoder

    def __getitem__(self, index: tuple[Row, Key]) -> Sample:
        row, key = index
        return self.source.decode(row, self.decoder, key)

    def __getitems__(self, batch: Batch | ValueError) -> list[Sample] | ValueError:
        """An error is handed back like a batch: raised in another process it would lose its type and its one line."""
        if isinstance(batch, ValueError):
            return batch
        try:
            return [self[index] for index in batch]
        except ValueError as error:
            return ValueError(str(error))


def _collated(batch: list[Sample] | ValueError) -> Any:
    """One tensor for the images [N, H, W, C], which another process writes into memory that this one sees, and one for the labels."""
    return batch if isinstance(batch, ValueError) else default_collate(batch)


def _start_worker(parent: int, worker: int) -> None:
    """Ends this process with its ``parent``, also where that is killed, and leaves it to that one to react to Ctrl-C and a closed terminal.

    A process that lived on for some seconds would hold the lock of the run's folder, which it has inherited.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def default_workers() -> int:
    """One process for each core but the one that trains, from 1 to 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1))
