"""The package's PEP 517 backend: setuptools, plus one rule about torch.

pip builds in an isolated environment that does not see what is installed. The kernels must be built against the torch they
will run under, and torch is a download of gigabytes, so:

* a suitable torch is installed beside the Python that pip runs in: it is added to the path, and the build downloads no torch;
* none is: torch is required for the build, and pip gets the one that it then installs as a dependency.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks this module does not change)

REQUIREMENT = "torch>=2.11"  # as in pyproject.toml's dependencies
MINIMUM = (2, 11)


def _has_torch(folder: str) -> bool:
    for distribution in metadata.distributions(name="torch", path=[folder]):
        found = re.match(r"(\d+)\.(\d+)", distribution.version)
        return found is not None and tuple(map(int, found.groups())) >= MINIMUM
    return False


_SITE = sysconfig.get_path("platlib")
_INSTALLED = _has_torch(_SITE)
if _INSTALLED and _SITE not in sys.path:
    sys.path.append(_SITE)  # last: the build's own setuptools and ninja come first


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [] if _INSTALLED else [REQUIREMENT, "numpy"]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    for left_over in Path("build").glob("lib*"):  # setuptools would pack modules that are long gone from the sources
        shutil.rmtree(left_over)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
