"""Ascents, one small file each: when a perturbed step leaves its point, along which gradient, and how far it goes."""

from ...parts import import_all
from .base import Ascent

import_all(__name__, __path__)

__all__ = ["Ascent"]
