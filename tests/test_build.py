"""Installing on machines that lack something, libraries that do not fit, and what backend() and doctor say about it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import s2ap_ext
from s2ap_ext import _library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(s2ap_ext.__file__).parent

# Imports the package, runs one op and prints what a test wants to know. Ties, so that the ranking rule shows.
PROBE = """
import json, sys, warnings
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]  # or it would find another copy's library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import s2ap_ext
import torch
from s2ap_ext import ops
b = s2ap_ext.backend()
masked, _ = ops.select([torch.tensor([2.0, 1, 1, 1, 2])], [torch.arange(1.0, 6)], [3])
print(json.dumps({"cpu": b.cpu, "why": b.why, "build": b.build, "file": s2ap_ext.__file__, "masked": masked[0].tolist(),
                  "warnings": [str(w.message) for w in caught if "s2ap_ext" in str(w.message)]}))
"""
MASKED = [1.0, 0.0, 0.0, 4.0, 5.0]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("S2AP_") and name not in ("PYTHONPATH", "CXX", "CC")}
    return kept | changes


def run(*arguments: str | Path, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def probe(site: Path, **changes: str) -> dict:
    """What a fresh Python that finds the package in ``site`` says."""
    result = run("-c", PROBE, cwd=site, env=environment(PYTHONPATH=str(site), **changes))
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert Path(answer["file"]).is_relative_to(site)
    return answer


def copy_of_checkout(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.so", "_build.json", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))


def install(tmp_path: Path, **changes: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """pip-installs a copy of the checkout into a folder of its own, without the network."""
    checkout, site = copy_of_checkout(tmp_path), tmp_path / "site"
    command = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", site, checkout]
    return site, run(*command, cwd=tmp_path, env=environment(**changes))


def record_of(site: Path) -> dict[str, str]:
    return json.loads((site / "s2ap_ext/_build.json").read_text())


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with this package in it, without its compiled libraries and their record."""
    shutil.copytree(PACKAGE, tmp_path / "s2ap_ext", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    return tmp_path


def write_record(site: Path, **changes: str) -> None:
    record = {"interface": str(_library.INTERFACE), "cpu": "built", "cuda": "not built: for this test"} | changes
    (site / "s2ap_ext/_build.json").write_text(json.dumps(record))


def test_these_tests_run_on_a_built_package() -> None:
    assert (PACKAGE / "_build.json").exists(), (
        f"the tests import s2ap_ext from {PACKAGE}, sources that were never built. Run `pip install .` and then `pytest`, "
        "not `python -m pytest`, which puts the folder it is started in before the installed package"
    )
    disabled = os.environ.get("S2AP_DISABLE_EXT", "0") != "0"
    built = _library.build_record()["cpu"] == "built"
    assert s2ap_ext.backend().cpu == ("C++" if built and not disabled else "PyTorch"), str(s2ap_ext.backend())


def test_backend_names_what_the_kernels_were_built_with() -> None:
    if s2ap_ext.backend().cpu != "C++":
        pytest.skip(str(s2ap_ext.backend()))
    build = s2ap_ext.backend().build
    assert build["interface"] == str(_library.INTERFACE)
    assert "-ffp-contract=off" in build["flags"]
    assert not {"-ffast-math", "-march=native"} & set(build["flags"].split())
    assert build["python"].split(".")[:2] == [str(v) for v in sys.version_info[:2]]


@pytest.mark.slow
def test_install_without_a_compiler_is_pure_pytorch_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    site, result = install(tmp_path, PATH=str(tmp_path / "empty"))
    assert result.returncode == 0, result.stderr
    assert record_of(site)["cpu"].startswith("not built: no C++ compiler found")
    answer = probe(site)
    assert answer["cpu"] == "PyTorch"
    assert answer["masked"] == MASKED
    assert "no C++ compiler found" in answer["why"][0]
    assert "pip install" in answer["why"][0]
    assert len(answer["warnings"]) == 1
    assert (site / "s2ap_ext/py.typed").exists()
    assert list((site / "s2ap_ext/recipes").glob("*.toml"))


@pytest.mark.slow
def test_cxx_that_does_not_exist_and_no_cuda_by_request(tmp_path: Path) -> None:
    site, result = install(tmp_path, CXX="no-such-compiler", S2AP_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    assert "no-such-compiler" in record_of(site)["cpu"]
    assert record_of(site)["cuda"] == "not built: left out by S2AP_NO_CUDA"


@pytest.mark.slow
def test_force_cuda_makes_a_missing_cuda_library_an_error(tmp_path: Path) -> None:
    _, result = install(tmp_path, CXX="no-such-compiler", S2AP_FORCE_CUDA="1")
    assert result.returncode != 0
    assert "S2AP_FORCE_CUDA is set, but the CUDA kernels were not built: no C++ compiler found" in result.stdout + result.stderr


@pytest.mark.slow
def test_force_and_no_cuda_together_are_an_error(tmp_path: Path) -> None:
    _, result = install(tmp_path, S2AP_FORCE_CUDA="1", S2AP_NO_CUDA="1")
    assert result.returncode != 0
    assert "S2AP_NO_CUDA and S2AP_FORCE_CUDA are both set" in result.stdout + result.stderr


@pytest.mark.slow
def test_a_build_in_place_clears_away_the_libraries_of_an_earlier_one(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path)
    library = checkout / "s2ap_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"of an earlier build")
    write_record(checkout)
    result = run("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, env=environment(CXX="no-such-compiler"))
    assert result.returncode == 0, result.stderr
    assert not library.exists()
    assert record_of(checkout)["interface"] == str(_library.INTERFACE)
    assert "no-such-compiler" in record_of(checkout)["cpu"]


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A stand-in for a C++ compiler that makes empty objects and links the library that these tests run on: a real one takes a minute."""
    built = list(PACKAGE.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"))
    if COMPILER is None or not built:
        pytest.skip("needs a C++ compiler and the compiled library")
    path = tmp_path / "c++"
    path.write_text(f"""#!/bin/sh
arguments="$*" out=""
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then out=$2; fi
  shift
done
case $out in
  "") exec {COMPILER} $arguments ;;
  *.o) : > "$out" ;;
  *) cp {built[0]} "$out" ;;
esac
""")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_a_failing_nvcc_leaves_the_cpu_library(tmp_path: Path, compiler: Path) -> None:
    toolkit = tmp_path / "toolkit"
    for folder in ("bin", "include"):
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").touch()
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: out of luck' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    site, result = install(tmp_path, CUDA_HOME=str(toolkit), CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    assert record_of(site)["cpu"] == "built"
    assert "nvcc fatal: out of luck" in record_of(site)["cuda"]
    answer = probe(site)
    assert answer["cpu"] == "C++"
    assert answer["masked"] == MASKED


@pytest.mark.slow
def test_an_sdist_is_complete_and_its_wheel_runs(tmp_path: Path, compiler: Path) -> None:
    checkout, dist, site = copy_of_checkout(tmp_path), tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    backend = "import sys; sys.path.insert(0, 'build_backend'); import s2ap_build; s2ap_build.build_{0}(sys.argv[1])"
    result = run("-c", backend.format("sdist"), dist, cwd=checkout, env=environment())
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(next(dist.glob("*.tar.gz")), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in ("csrc", "build_backend", "s2ap_ext", "tests", "benchmarks", "examples"):
        sources = {
            path.relative_to(checkout) for path in (checkout / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
        assert sources
        assert {path for path in sources if not (unpacked / path).exists()} == set()

    result = run("-c", backend.format("wheel"), dist, cwd=unpacked, env=environment(CXX=str(compiler), S2AP_NO_CUDA="1"))
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(next(dist.glob("*.whl")), site, "zip")
    answer = probe(site)
    assert (answer["cpu"], answer["masked"], answer["warnings"]) == ("C++", MASKED, [])
    packed = {path.relative_to(site) for path in (site / "s2ap_ext").rglob("*") if path.suffix != ".so"}
    missing = {
        path.relative_to(checkout)
        for path in (checkout / "s2ap_ext").rglob("*")
        if path.suffix in (".py", ".toml", ".html", ".safetensors")
    } - packed
    assert missing == set()


@pytest.mark.slow
def test_sources_that_were_never_installed_work(bare: Path) -> None:
    answer = probe(bare)
    assert answer["masked"] == MASKED
    assert len(answer["warnings"]) == 1
    assert "never installed" in answer["warnings"][0]


@pytest.mark.slow
def test_a_library_for_another_interface_is_not_even_loaded(bare: Path) -> None:
    (bare / "s2ap_ext/_C.py").write_text("import os\nos._exit(7)\n")
    write_record(bare, interface="0")
    answer = probe(bare)
    assert answer["cpu"] == "PyTorch"
    assert answer["masked"] == MASKED
    assert len(answer["warnings"]) == 1
    assert "stale" in answer["warnings"][0]
    assert "pip install" in answer["warnings"][0]


@pytest.mark.slow
def test_a_library_that_belies_its_record_loses_its_kernels(bare: Path) -> None:
    (bare / "s2ap_ext/_C.py").write_text(
        "import torch\n"
        "library = torch.library.Library('s2ap', 'IMPL')\n"
        "library.impl('select', lambda scores, weights, kept, masked, cuts: masked[0].fill_(-1), 'CPU')\n"
        "def build_info(): return {'interface': '0'}\n"
    )
    write_record(bare)
    answer = probe(bare)
    assert answer["cpu"] == "PyTorch"
    assert answer["masked"] == MASKED
    assert "stale" in answer["why"][0]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["broken library", "lost library", "truncated record"])
def test_a_damaged_installation_falls_back(bare: Path, damage: str) -> None:
    write_record(bare)
    if damage == "broken library":
        (bare / "s2ap_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    if damage == "truncated record":
        (bare / "s2ap_ext/_build.json").write_text('{"interface": "1", "cp')
    answer = probe(bare)
    assert answer["cpu"] == "PyTorch"
    assert answer["masked"] == MASKED
    assert len(answer["warnings"]) == 1


@pytest.mark.slow
def test_disabled_by_the_environment_is_told_without_a_warning(bare: Path) -> None:
    answer = probe(bare, S2AP_DISABLE_EXT="1")
    assert answer["why"][0] == "C++ kernels disabled by S2AP_DISABLE_EXT"
    assert all(why.endswith("disabled by S2AP_DISABLE_EXT") for why in answer["why"])
    assert answer["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_doctor_tells_what_runs_and_checks_it(tmp_path: Path, disabled: str) -> None:
    env = environment(PYTHONPATH=str(PACKAGE.parent), S2AP_DISABLE_EXT=disabled)
    result = run("-m", "s2ap_ext.doctor", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every op gives the bits of the reference" in result.stdout
    assert ("disabled by S2AP_DISABLE_EXT" in result.stdout) == (disabled == "1")
    assert torch.__version__ in result.stdout


def backend_with(site: Path, monkeypatch: pytest.MonkeyPatch):
    """The PEP 517 backend as a build sees it whose Python has ``site`` as its site-packages."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *args, **kwargs: str(site))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("s2ap_build_under_test", ROOT / "build_backend/s2ap_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("installed", "requires_torch"),
    [("2.13.0+cpu", False), ("2.11.0", False), ("3.0.0a0+git1234", False), ("2.10.1", True), ("1.13.1", True), (None, True)],
)
def test_the_build_requires_torch_only_where_none_is_installed(tmp_path, monkeypatch, installed, requires_torch) -> None:
    if installed:
        folder = tmp_path / f"torch-{installed}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n")
    module = backend_with(tmp_path, monkeypatch)
    requirements = module.get_requires_for_build_wheel()
    assert any(r.startswith("torch") for r in requirements) == requires_torch
    assert module.get_requires_for_build_editable() == requirements
    assert module.get_requires_for_build_sdist() == []
    assert (str(tmp_path) in sys.path) == (not requires_torch)
