"""What ``import s2ap_ext`` brings: every module of the package within reach, and nothing that takes long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import s2ap_ext

FOLDER = Path(s2ap_ext.__file__).parent
MODULES = [
    "analysis",
    "attacks",
    "data",
    "engine",
    "evaluation",
    "losses",
    "methods",
    "models",
    "nn",
    "ops",
    "optim",
    "parts",
    "pipeline",
    "reference",
]


def fresh(code):
    """What ``code`` leaves as ``answer``, in a Python of its own."""
    program = f"{code}\nimport json\nprint(json.dumps(answer))"
    result = subprocess.run([sys.executable, "-c", program], cwd=FOLDER.parent, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_brings_nothing_that_only_some_need():
    loaded = set(fresh("import sys, s2ap_ext\nanswer = list(sys.modules)"))
    assert {"torch", "s2ap_ext.nn"} <= loaded
    assert not {"PIL", "huggingface_hub", "matplotlib", "pyarrow", "rich", "safetensors", "tensorboard"} & loaded
    assert not {f"s2ap_ext.{name}" for name in ("attacks", "data", "models", "pipeline", "cli")} & loaded


def test_modules_are_within_reach():
    pytest.importorskip("safetensors")
    answer = fresh(f"import s2ap_ext\nanswer = [getattr(s2ap_ext, name).__name__ for name in {MODULES}]")
    assert answer == [f"s2ap_ext.{name}" for name in MODULES]


def test_dir_names_them():
    listed = fresh("import s2ap_ext\nanswer = dir(s2ap_ext)")
    assert {*MODULES, "S2AP", "sparsify", "__version__"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert "recipes" not in listed, "a folder of files is no module"


@pytest.mark.parametrize("name", ["evil", "recipes", "_C_that_is_not_there", "__wrapped__"])
def test_other_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=f"module 's2ap_ext' has no attribute '{name}'"):
        getattr(s2ap_ext, name)
