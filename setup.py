"""Builds the two compiled libraries; everything else about the package is in pyproject.toml.

``s2ap_ext._C`` (CPU kernels) wherever there is a C++ compiler, ``s2ap_ext._C_cuda`` wherever there is nvcc, GPU or not.
A part that cannot be built is left out with one line why, which ``s2ap_ext/_build.json`` keeps for ``s2ap doctor``.

CUDA kernels are built for the GPUs of this machine. Without one they go along only as PTX of the oldest generation: the driver of any GPU
compiles that when they are first used, which takes it a while, once.

Environment:
    S2AP_NO_CUDA=1         leave the CUDA library out
    S2AP_FORCE_CUDA=1      fail where the CUDA library cannot be built
    CUDA_HOME              the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    S2AP_ALL_ARCHS=1       build the CUDA library for every generation of GPUs, so that no driver need compile it
    TORCH_CUDA_ARCH_LIST   e.g. "8.0;9.0+PTX" (default: the GPUs of this machine; without one, PTX of the oldest generation)
    CXX, MAX_JOBS          the C++ compiler; how many run at once
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from torch import __version__ as torch_version
    from torch import cuda as torch_cuda
    from torch import version as torch_versions
    from torch.utils import cpp_extension
except (ImportError, OSError) as error:  # an sdist, or --no-build-isolation without torch, or a torch that is broken
    cpp_extension = None
    no_torch = f"torch cannot be imported in the build ({error}); install torch first, or leave out --no-build-isolation"

ROOT = Path(__file__).resolve().parent
INTERFACE = re.search(r"^INTERFACE = (\d+)$", (ROOT / "s2ap_ext/_library.py").read_text(encoding="utf-8"), re.MULTILINE).group(1)

# Results must be the same bits on every machine: no fast-math, no contraction to FMA, no -march=native (hot loops choose their
# instruction set when they run). The target version pins torch's stable ABI: one build runs on any later torch.
COMMON = ["-O3", "-std=c++20", f"-DS2AP_INTERFACE={INTERFACE}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = [*COMMON, "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]
NVCC_FLAGS = [*COMMON, "--fmad=false", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off,-pthread"]
# One for each generation of GPUs; each runs on the later members of its own. The last one built goes along as PTX for those to come.
GENERATIONS = ["7.5", "8.0", "9.0", "10.0", "12.0"]


class Unavailable(Exception):
    """A part that cannot be built here; the message is the reason, in one line."""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def choose_compiler() -> None:
    """Sets CXX, which torch reads, where the user did not."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(shlex.split(candidate)[0]):
            os.environ["CXX"] = candidate
            return
    raise Unavailable(f"no C++ compiler found (looked for {', '.join(candidates)}); install g++, or set CXX")


def find_toolkit() -> Path:
    """The CUDA toolkit: a folder with bin/nvcc and the headers beside it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin/nvcc").exists() and (Path(candidate) / "include/cuda_runtime.h").exists():
            return Path(candidate)
    raise Unavailable("nvcc not found; install the CUDA toolkit, or set CUDA_HOME to it")


def output_of(*command: str | Path) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {words[0] if words else error}") from error


def choose_architectures(nvcc: Path) -> tuple[str, list[str]]:
    """The GPUs to build for, in words, and the flags of nvcc that say so. No flags where torch reads them from TORCH_CUDA_ARCH_LIST, which
    is set here where the user did not."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"], []
    known = output_of(nvcc, "--list-gpu-arch").split()
    generations = [a for a in GENERATIONS if f"compute_{a.replace('.', '')}" in known]
    if enabled("S2AP_ALL_ARCHS"):
        chosen = generations
    elif torch_cuda.device_count():
        capabilities = {torch_cuda.get_device_capability(i) for i in range(torch_cuda.device_count())}
        chosen = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    else:  # To assemble for one generation, which may not be the user's, would take half of the build's time.
        virtual = f"compute_{generations[0].replace('.', '')}"
        return f"PTX of {generations[0]}", [f"-gencode=arch={virtual},code={virtual}"]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"], []


def quoted(name: str, text: str) -> str:
    return f'-D{name}="{text}"'


def sources(main: str, kernels: str) -> list[str]:
    return [f"csrc/{main}", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(kernels))]


def configure_cpu(extension: Extension, temporary: Path) -> None:
    if cpp_extension is None:
        raise Unavailable(no_torch)
    choose_compiler()
    extension.include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths()]
    extension.library_dirs = cpp_extension.library_paths()
    extension.extra_compile_args = {"cxx": [*CXX_FLAGS, quoted("S2AP_TORCH", torch_version), quoted("S2AP_FLAGS", " ".join(CXX_FLAGS))]}
    # By name: Python loads torch's libraries in a scope of their own, so only what names them as a dependency sees their symbols.
    extension.extra_link_args = ["-Wl,--no-as-needed", "-ltorch_cpu", "-pthread", "-s"]


def configure_cuda(extension: Extension, temporary: Path) -> None:
    if enabled("S2AP_NO_CUDA"):
        raise Unavailable("left out by S2AP_NO_CUDA")
    configure_cpu(extension, temporary)
    toolkit = find_toolkit()
    release = re.search(r"release (\d+)\.(\d+)", output_of(toolkit / "bin/nvcc", "--version"))
    if torch_versions.cuda and release and release.group(1) != torch_versions.cuda.split(".")[0]:
        raise Unavailable(
            f"nvcc is of CUDA {release.group(1)}, torch of CUDA {torch_versions.cuda}; set CUDA_HOME to a toolkit that fits torch"
        )
    gpus, architecture_flags = choose_architectures(toolkit / "bin/nvcc")
    cpp_extension.CUDA_HOME = str(toolkit)  # a CPU-only torch never looks for one
    extension.include_dirs.append(str(toolkit / "include"))
    extension.library_dirs += [str(toolkit / lib) for lib in ("lib64", "lib") if (toolkit / lib).exists()]
    if not (Path(cpp_extension.TORCH_LIB_PATH) / "libtorch_cuda.so").exists():
        # A CPU-only torch has the headers but not this library. An empty one of the same name lets the linker note down the
        # dependency, so that what is built here also loads once a CUDA torch is installed.
        temporary.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ["CXX"])
        stand_in = temporary / "libtorch_cuda.so"
        output_of(*compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, f"-Wl,-soname,{stand_in.name}", "-o", stand_in)
        extension.library_dirs.append(str(temporary))
    # The static CUDA runtime: it needs none of the user's CUDA libraries, only the driver.
    extension.extra_link_args += ["-ltorch_cuda", "-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,libcudart_static.a"]
    extension.extra_compile_args["cxx"].append(quoted("S2AP_GPUS", gpus))
    extension.extra_compile_args["nvcc"] = [*NVCC_FLAGS, *architecture_flags]


@contextmanager
def captured(words: list[str]):
    """Appends to ``words`` the lines that the compilers print within the block; shows them when it ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in enumerate(kept, start=1):
                os.dup2(original, number)
                os.close(original)
            file.seek(0)
            text = file.read().decode(errors="replace")
            print(text, flush=True)
            words += text.splitlines()


def first_error(words: list[str], error: Exception) -> str:
    """The line of the build's output that tells most about why it failed."""
    lines = [line.strip() for line in words if re.search(r"\berror\b|\bfatal\b|not found|undefined reference", line, re.IGNORECASE)]
    return (lines[0] if lines else str(error).splitlines()[0])[:300]


class BuildKernels(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """Builds each library on its own, so that one that fails does not take the other along, and records what came of it."""

    def run(self) -> None:
        package = ROOT / "s2ap_ext" if self.inplace else Path(self.build_lib) / "s2ap_ext"
        for folder in {package, Path(self.build_lib) / "s2ap_ext"}:
            for left_over in [*folder.glob("_C*.so"), folder / "_build.json"]:  # of an earlier build, perhaps of other sources
                left_over.unlink(missing_ok=True)
        record = {"interface": INTERFACE}
        parts = {"cpu": configure_cpu, "cuda": configure_cuda}
        for (part, configure), extension in zip(parts.items(), self.distribution.ext_modules, strict=True):
            try:
                configure(extension, Path(self.build_temp).resolve())
                self.build_alone(extension)
                record[part] = "built"
            except Unavailable as reason:
                record[part] = f"not built: {reason}"
            print(f"s2ap_ext: {part} kernels {record[part]}", flush=True)
        if record["cuda"] != "built" and enabled("S2AP_FORCE_CUDA"):
            raise SystemExit(f"s2ap_ext: S2AP_FORCE_CUDA is set, but the CUDA kernels were {record['cuda']}")
        self.extensions = [e for e, part in zip(self.distribution.ext_modules, parts, strict=True) if record[part] == "built"]
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def build_alone(self, extension: Extension) -> None:
        words: list[str] = []
        in_place, self.extensions, self.compiler = self.inplace, [extension], None
        try:
            with captured(words):
                super().run()
        except Exception as error:  # compilers, linkers, ninja and torch's own checks each raise their own
            raise Unavailable(f"{first_error(words, error)} (all of it: pip install -v .)") from error
        finally:
            self.inplace = in_place


def main() -> None:
    if enabled("S2AP_NO_CUDA") and enabled("S2AP_FORCE_CUDA"):
        raise SystemExit("s2ap_ext: S2AP_NO_CUDA and S2AP_FORCE_CUDA are both set; unset one")
    libraries = [
        Extension("s2ap_ext._C", sources("ops.cpp", "cpu/*.cpp"), language="c++"),
        Extension("s2ap_ext._C_cuda", sources("ops_cuda.cpp", "cuda/*.cu"), language="c++"),
    ]
    setup(ext_modules=libraries, cmdclass={"build_ext": BuildKernels})


main()
