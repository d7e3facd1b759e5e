"""What the data sets of encoded images have in common: their options, and the choice between memory and streaming."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..settings import key
from .base import AnySplit, Data, Dataset, check_limits
from .images import Fit
from .parquet import Sources
from .source import Decoder, Source, load, shape_of
from .stream import Stream, default_workers

FITTING = ("size", "resize")  # the settings that say how large test images become
IN_MEMORY = 2 << 30  # bytes of pixels: what is larger is streamed


class ImageData(Data):
    """A data set of encoded images. A subclass says where they are; its ``Settings`` may have other defaults.

    Attributes:
        by_class: whether the files are sorted by class, so that images in memory are put in a fixed random order.
    """

    by_class: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Settings:
        dir: str = key("", "folder of the set's files")
        size: int = key(
            0, "height and width that images of any size are cut out and scaled to; 0: all have one size, and keep it", low=0, high=4096
        )
        resize: int = key(
            0, "with size: what a test image's shorter side is scaled to before its middle is cut out; 0: 8/7 of size", low=0, high=8192
        )
        scale: float = key(
            0.08, "with size: the smallest share of its area that is cut out of a training image; 1: as of test images", low=0.001, high=1
        )
        stream: str = key(
            "auto",
            "decode images during training; auto: where they take more than 2 GiB of memory or are cut out at random",
            choices=("auto", "always", "never"),
        )
        workers: int = key(0, "processes that decode streamed images; 0: one for each core but one, at most 8", low=0, high=256)

    settings: Settings

    @abstractmethod
    def sources(self) -> Sources:
        """The encoded images; errors as in :meth:`load`."""

    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        check_limits(limit, test_limit)
        fit = self._fit()
        found = self.sources()
        middle = fit and Fit(fit.size, fit.resize)
        train = self._split(found.train, Decoder(len(found.classes), fit=fit), limit)
        test = self._split(found.test, Decoder(len(found.classes), train.shape, middle), test_limit)
        return Dataset(self.name, train, test, found.classes, found.files)

    def _fit(self) -> Fit | None:
        settings = self.settings
        if not settings.size:
            return None
        fit = Fit(settings.size, settings.resize or -(-8 * settings.size // 7), settings.scale)
        if fit.resize < fit.size:
            raise ValueError(f"data {self.name}: resize: expected an integer >= size, which is {fit.size}, got {fit.resize}")
        if settings.stream == "never" and fit.is_random:
            raise ValueError(
                f"data {self.name}: stream: expected auto or always, since training images are cut out anew in each epoch, got never; "
                "with scale=1 they are cut out once"
            )
        return fit

    def _split(self, source: Source, decoder: Decoder, limit: int | None) -> AnySplit:
        count = min(limit or len(source), len(source))
        shape = (3, decoder.fit.size, decoder.fit.size) if decoder.fit else decoder.shape or shape_of(source, decoder)
        decoder = Decoder(decoder.num_classes, shape, decoder.fit)
        wants = count * math.prod(shape) > IN_MEMORY or (decoder.fit is not None and decoder.fit.is_random)
        if self.settings.stream == "always" or (self.settings.stream == "auto" and wants):
            return Stream(source, decoder, count, self.settings.workers or default_workers())
        return load(source, decoder, limit, mixed=self.by_class)
