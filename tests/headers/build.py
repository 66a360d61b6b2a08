"""Builds the module through which the tests call csrc's headers directly, and loads it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# table name: lane type, compiler flags, C++ expression for whether this CPU can run it
SCALAR = {"scalar_float": ("float", [], "true"), "scalar_double": ("double", [], "true")}
AVX2 = '__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")'
X86 = {
    "avx2_8": ("f32x8", ["-mavx2", "-mfma"], AVX2),
    "avx2_16": ("f32x16", ["-mavx2", "-mfma"], AVX2),
    "avx512_16": ("f32x16", ["-mavx2", "-mfma", "-mavx512f"], '__builtin_cpu_supports("avx512f")'),
}
TABLES = SCALAR | (X86 if platform.machine() in ("x86_64", "AMD64") else {})
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",  # every vector function is inlined, so how vectors are passed does not matter
    "-Wno-maybe-uninitialized",
]  # GCC 12 says it of its own AVX-512 intrinsics


@functools.cache
def load() -> ModuleType:
    """The module, compiled again only when a header, a flag or the compiler has changed."""
    compiler = os.environ.get("CXX", "c++")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    digest = hashlib.sha256(repr((compiler, suffix, FLAGS, TABLES, pybind11.__version__)).encode())
    for source in sorted(
        [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/lanes.h"), *HERE.glob("*.cpp"), *HERE.glob("*.h")]
    ):
        digest.update(source.read_bytes())
    folder = ROOT / "build" / f"test-headers-{digest.hexdigest()[:16]}"
    library = folder / f"bnn_fast_headers{suffix}"
    if not library.exists():
        compile_to(library, compiler)
    spec = importlib.util.spec_from_file_location("bnn_fast_headers", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_to(library: Path, compiler: str) -> None:
    work = library.parent.with_name(f"{library.parent.name}.{os.getpid()}")
    work.mkdir(parents=True)
    commands = []
    for name, (lane, flags, _) in TABLES.items():
        # A namespace for each table, as in the extension: instantiations of the same name must not be merged.
        commands.append(
            [
                compiler,
                *FLAGS,
                *flags,
                f"-DBNN_FAST_ISA={name}",
                f"-DLANE={lane}",
                f"-DTABLE={name}",
                "-c",
                str(HERE / "lanes.cpp"),
                "-o",
                str(work / f"{name}.o"),
            ]
        )
    tables = " ".join(f"X({name}, {supported})" for name, (_, _, supported) in TABLES.items())
    commands.append(
        [
            compiler,
            *FLAGS,
            f"-DTABLES(X)={tables}",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            "-c",
            str(HERE / "module.cpp"),
            "-o",
            str(work / "module.o"),
        ]
    )
    for command, process in [(c, subprocess.Popen(c, stderr=subprocess.PIPE, text=True)) for c in commands]:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{errors}")
    subprocess.run([compiler, "-shared", "-o", work / library.name, *sorted(work.glob("*.o"))], check=True)
    try:
        work.rename(library.parent)
    except OSError:  # another run was faster
        shutil.rmtree(work)
