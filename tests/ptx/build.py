"""Builds what tests/ptx needs with nvcc, in build/, each result under a hash of its command and sources.

- `operators`: csrc/ops.cpp, the CUDA bindings and the kernels' host launchers, as the operators of the
  library `bnn_fast_ptx` on CPU tensors, linked with the stand-in runtime; and the kernels' PTX.
- `resources`: what ptxas says of each kernel on each default architecture.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# setup.py's, but for the architectures; test_resources.py holds them against it.
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--fmad=false",
    "-lineinfo",
    "-Xcompiler",
    "-fvisibility=hidden",
    "-DBNN_FAST_WITH_CUDA",
]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
STAND_IN = ["-DBNN_FAST_STAND_IN", "-DBNN_FAST_LIBRARY=bnn_fast_ptx", "-DBNN_FAST_CUDA_KEY=CPU"]
JOBS = 2


class Operators(NamedTuple):
    library: Path
    ptx: tuple[Path, ...]


class Resources(NamedTuple):
    """Of one kernel on one architecture; sizes in bytes."""

    source: str
    architecture: str
    kernel: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@functools.cache
def find_nvcc() -> str | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    tried = [f"{named}/bin/nvcc"] if named else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in tried if path and os.access(path, os.X_OK)), None)


def architectures() -> list[str]:
    """setup.py's defaults, as in "80"."""
    names = re.search(r'^DEFAULT_ARCHITECTURES = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    return [name.removesuffix("+PTX").replace(".", "") for name in names.split(";")]


def kernel_sources(csrc: Path = CSRC) -> list[Path]:
    return sorted(csrc.glob("cuda/*.cu"))


def operators(architecture: str = "80", csrc: Path = CSRC) -> Operators:
    """The operators of the sources in `csrc`, their kernels as PTX for `architecture`."""
    includes = [f"-isystem={folder}" for folder in cpp_extension.include_paths()]
    shared = ["-c", "-Xcompiler", "-fPIC"]
    common = [*NVCC_FLAGS, *shared]
    stable = [*common, *TORCH_FLAGS, *STAND_IN, *includes]
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"  # no ptxas
    jobs = [(source, [*common, *STAND_IN, code, "--keep", "--keep-dir=."]) for source in kernel_sources(csrc)]
    jobs += [(source, stable) for source in [csrc / "ops.cpp", *sorted(csrc.glob("cuda/*.cpp"))]]
    visible = ["-std=c++20", "-O2", *shared, "-Xcompiler", "-Wall,-Wextra,-Werror", *includes]
    jobs += [(source, visible) for source in sorted((HERE / "stand_in").glob("*.cpp"))]
    headers = headers_of(csrc)
    objects = in_parallel(
        [functools.partial(cached, source, flags, headers, torch.__version__) for source, flags in jobs]
    )
    linked = link([folder / "out.o" for folder in objects])
    return Operators(linked, tuple(p for folder in objects for p in sorted(folder.glob("*.ptx"))))


def link(objects: list[Path]) -> Path:
    folder = ROOT / "build" / f"test-ptx-{digest(*map(str, objects))}"
    library = folder / "operators.so"
    command = [os.environ.get("CXX", "c++"), "-shared", *map(str, objects)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    # Nothing may stay undefined, and a libcudart that torch has loaded must not be met.
    command += ["-Wl,--no-undefined", "-Wl,-Bsymbolic", "-o", library.name]
    return make(folder, command) / library.name


def cubin(source: Path, architecture: str) -> Path:
    """The folder with a source's code for an architecture, compiled as setup.py does, as out.o; a warning is an error."""
    flags = [*NVCC_FLAGS, "-Werror=all-warnings", "-cubin", "-Xptxas=-v", f"-arch=sm_{architecture}"]
    return cached(source, flags, headers_of(CSRC))


def resources(architectures: list[str], sources: list[Path] | None = None) -> list[Resources]:
    """Of every kernel on these architectures."""
    pairs = [(source, name) for source in sources or kernel_sources() for name in architectures]
    folders = in_parallel([functools.partial(cubin, source, name) for source, name in pairs])
    found = []
    for (source, name), folder in zip(pairs, folders):
        found += parse_resources(source.name, name, (folder / "log").read_text())
    return found


def parse_resources(source: str, architecture: str, log: str) -> list[Resources]:
    found = []
    for part in log.split("Compiling entry function ")[1:]:

        def number(pattern: str) -> int:
            return int((re.search(pattern, part) or [0, 0])[1])

        found.append(
            Resources(
                source,
                architecture,
                short_name(re.match(r"'(\S+)'", part)[1]),
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores"),
                number(r"(\d+) bytes spill loads"),
            )
        )
    return found


def short_name(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\(anonymous namespace\)::|bnn_fast::", "", name).strip()


def headers_of(csrc: Path) -> tuple[Path, ...]:
    return tuple(path for kind in ("*.h", "*.cuh") for path in sorted(csrc.rglob(kind)))


def cached(source: Path, flags: list[str], headers: tuple[Path, ...], *more: str) -> Path:
    """The folder in which nvcc has compiled `source` to out.o, with what it said in `log`."""
    contents = [path.read_bytes() for path in (source, *headers)]
    command = [find_nvcc(), *flags, f"-I{source.parents[1]}", str(source), "-o", "out.o"]
    key = digest(*command, *more, nvcc_version(), *contents)
    return make(ROOT / "build" / f"test-ptx-{source.stem}-{key}", command)


def make(folder: Path, command: list[str]) -> Path:
    """Runs `command` in `folder`, which comes to be only once it has succeeded."""
    if folder.exists():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True)
    try:
        done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
        (work / "log").write_text(done.stdout)
        for path in work.iterdir():
            if path.suffix not in ("", ".o", ".so", ".ptx"):  # what --keep keeps is large
                path.unlink()
        work.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another run was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def in_parallel(jobs: list[Callable[[], Path]]) -> list[Path]:
    with ThreadPoolExecutor(JOBS) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def digest(*parts: str | bytes) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
