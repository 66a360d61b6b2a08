"""Builds bnn_fast._C: one binary on LibTorch's stable ABI and Python's limited API, for every torch from 2.11
and Python from 3.10, with the CPU kernels and, where nvcc is found, the CUDA kernels; and bnn_fast._autograd, the nodes of
autograd's graph, for this torch and this Python alone, without which all works. README.md lists the environment variables that
steer it; the package's metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

MINIMUM_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
MINIMUM_COMPILER = {"clang": 14, "g++": 11}
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# Under AddressSanitizer and UndefinedBehaviorSanitizer, for tests/sanitize.py.
SANITIZE = (["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1",
             "-O1"]  # with -O3 it takes the compiler minutes
            if os.environ.get("BNN_FAST_SANITIZE") == "1" else [])
STRICT = os.environ.get("BNN_FAST_STRICT") == "1"  # for those who work on it: another compiler has other warnings
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))


def fail(problem: str, remedy: str):
    raise SystemExit(f"\nbnn_fast cannot be built: {problem}\nRemedy: {remedy}\n")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    fail(
        f"this Python ({sys.executable}) cannot import torch ({error}).",
        "install torch 2.11 or newer, then `pip install --no-build-isolation .`; without that flag"
        " pip builds in an environment of its own, where an installed torch is not seen.",
    )


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return str(error)
    return done.stdout


def check_torch() -> None:
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < MINIMUM_TORCH:
        fail(f"torch {torch.__version__} is too old, 2.11 or newer is needed.", "pip install 'torch>=2.11'")


def check_compiler() -> None:
    name = os.environ.get("CXX", "c++")
    macros = output_of(*shlex.split(name), "-dM", "-E", "-x", "c++", os.devnull)
    # clang defines __GNUC__ too, so it is asked for first.
    for kind, macro in (("clang", "__clang_major__"), ("g++", "__GNUC__")):
        found = re.search(rf"^#define {macro} (\d+)$", macros, re.MULTILINE)
        if found:
            break
    remedy = "install g++ 11 or clang 14, or newer, and name it with CXX, for example `CXX=g++-12`."
    if not found:
        fail(f"no C++ compiler was found as `{name}` ({macros.strip()[:200]}).", remedy)
    if int(found[1]) < MINIMUM_COMPILER[kind]:
        fail(f"the C++ compiler `{name}` is {kind} {found[1]}, too old for C++20.", remedy)


def check_ninja() -> None:
    # An interpreter called by its path does not put its own scripts on PATH, and ninja may be one of them.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    if not cpp_extension.is_ninja_available():
        fail("ninja was not found.", "pip install ninja")


def cuda_architectures(nvcc: str) -> list[str]:
    """The architectures to compile for, as in "9.0" or "12.0+PTX", each known to this nvcc."""
    known = set(re.findall(r"^compute_(\d+)$", output_of(nvcc, "--list-gpu-arch"), re.MULTILINE))
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    parsed = [(name, re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name))
              for name in re.split(r"[;,\s]+", given or DEFAULT_ARCHITECTURES)]
    wrong = [name for name, match in parsed if not match or match[1] + match[2] not in known]
    if given and wrong:
        fail(f"TORCH_CUDA_ARCH_LIST={given!r} holds {', '.join(wrong)}, which {nvcc} does not know.",
             f"give numbers, for example TORCH_CUDA_ARCH_LIST='{DEFAULT_ARCHITECTURES}'; this nvcc knows"
             f" {', '.join(sorted(f'{arch[:-1]}.{arch[-1]}' for arch in known))}.")
    names = [name for name, _ in parsed if name not in wrong]
    if wrong and names:  # an older nvcc: the newest architecture it knows carries the PTX for later ones
        names[-1] = names[-1].removesuffix("+PTX") + "+PTX"
    if not names:
        fail(f"{nvcc} knows none of the architectures {DEFAULT_ARCHITECTURES}.",
             "install a CUDA toolkit 12.0 or newer, or set BNN_FAST_CUDA=0.")
    return names


def code_generation_flags(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cuda() -> Path | None:
    """The folder of the CUDA toolkit, or None where it is not to be used; prints the decision."""
    wanted = os.environ.get("BNN_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"BNN_FAST_CUDA={wanted!r} is not understood.", "set it to auto, 0 or 1, or leave it unset.")
    if wanted == "0":
        print("bnn_fast: building without CUDA kernels (BNN_FAST_CUDA=0)", flush=True)
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = [shutil.which("nvcc") or "nvcc on PATH", "/usr/local/cuda/bin/nvcc"]
    tried = [f"{named}/bin/nvcc"] if named else usual
    nvcc = next((path for path in tried if os.access(path, os.X_OK)), None)
    if nvcc is None:
        if wanted == "1":
            fail(f"BNN_FAST_CUDA=1, but nvcc was not found (tried {', '.join(tried)}).",
                 "install the CUDA toolkit and put nvcc on PATH or its folder in CUDA_HOME,"
                 " or set BNN_FAST_CUDA=0 for a build without CUDA kernels.")
        print("bnn_fast: building without CUDA kernels (BNN_FAST_CUDA=auto, nvcc was not found)", flush=True)
        return None
    # nvcc on PATH may be a wrapper script elsewhere; nvcc itself knows where it lives.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if not top or not release:
        fail(f"{nvcc} does not work.", "repair the CUDA toolkit, or set BNN_FAST_CUDA=0.")
    torch_major = (torch.version.cuda or release[1]).split(".")[0]
    if torch_major != release[1]:
        fail(f"nvcc is CUDA {release[1]}.{release[2]} ({nvcc}), torch {torch.__version__} is built for CUDA"
             f" {torch.version.cuda}: the major versions differ.",
             f"point CUDA_HOME at a CUDA {torch_major} toolkit, install a torch built for CUDA {release[1]},"
             " or set BNN_FAST_CUDA=0.")
    print(f"bnn_fast: building with CUDA kernels (BNN_FAST_CUDA={wanted}, nvcc {release[1]}.{release[2]}:"
          f" {nvcc})", flush=True)
    return Path(top[1]).resolve()


class BuildExtension(cpp_extension.BuildExtension):
    """Checks the tools and decides on CUDA when something is compiled, not when metadata is asked for."""

    def finalize_options(self):
        super().finalize_options()
        # the same for every kind of install, so that each is incremental
        self.build_temp = "build/sanitize/objects" if SANITIZE else "build/objects"

    def build_extensions(self):
        check_torch()
        check_compiler()
        check_ninja()
        kernels, nodes = self.extensions
        self.configure(kernels, find_cuda())
        nodes.extra_compile_args = {"cxx": self.cxx_flags()}
        if SANITIZE:
            self.extensions = [kernels]
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        try:
            super().build_extension(extension)
        except RuntimeError as error:  # torch's, where setuptools expects errors of its own
            if not extension.optional:
                raise
            print(f"bnn_fast: built without autograd's nodes, small layers will be slower: {error}", flush=True)

    @staticmethod
    def cxx_flags() -> list[str]:
        flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off",
                 "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
                 "-Wno-psabi"]  # vector types in signatures; none of them crosses a file
        for folder in cpp_extension.include_paths():
            flags += ["-isystem", folder]  # as -I, torch's headers would be warned about too
        if STRICT:
            flags += ["-Werror"]
        return flags

    def configure(self, extension: Extension, cuda: Path | None) -> None:
        architectures = []
        cxx = [*self.cxx_flags(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DTORCH_STABLE_ONLY",
               *SANITIZE]
        if cuda:
            nvcc = str(cuda / "bin" / "nvcc")
            architectures = cuda_architectures(nvcc)
            print("bnn_fast: CUDA architectures", ";".join(architectures), flush=True)
            folders = [lib for lib in (cuda / "lib64", cuda / "lib") if (lib / "libcudart_static.a").exists()]
            if not folders:
                fail(f"libcudart_static.a is missing from {cuda}/lib64.",
                     "install the CUDA toolkit's runtime development files (cudart), or set BNN_FAST_CUDA=0.")
            extension.sources += sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
            extension.library_dirs.append(str(folders[0]))
            # Static, and hidden by --exclude-libs, so that it never meets the libcudart.so that torch loads.
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
            cxx += ["-isystem", str(cuda / "include"), "-DBNN_FAST_WITH_CUDA", "-DUSE_CUDA"]
            cpp_extension.CUDA_HOME = str(cuda)  # torch leaves it empty in its CPU builds
            self.remove_stale_cuda_objects(extension.sources)
        nvcc_flags = ["-std=c++20", "-O3", "--fmad=false", "-lineinfo", "-Xcompiler", "-fvisibility=hidden",
                      "-DBNN_FAST_WITH_CUDA", *code_generation_flags(architectures)]
        if STRICT:
            nvcc_flags += ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage"]
        cxx += [f'-DBNN_FAST_VERSION="{self.distribution.get_version()}"',
                f'-DBNN_FAST_TORCH_VERSION="{torch.__version__}"',
                f'-DBNN_FAST_CUDA_ARCHITECTURES="{";".join(architectures)}"']
        extension.extra_compile_args = {"cxx": cxx, "nvcc": nvcc_flags}
        stems = [os.path.splitext(source)[0] for source in extension.sources]
        twins = {stem for stem in stems if stems.count(stem) > 1}
        if twins:  # they would overwrite each other's object file
            fail(f"two sources differ only in their suffix: {', '.join(sorted(twins))}.", "rename one.")

    def remove_stale_cuda_objects(self, sources: list[str]) -> None:
        # ninja learns from g++ which headers a .cpp file includes; torch's CPU builds do not ask nvcc for it.
        newest = max(map(os.path.getmtime, HEADERS), default=0.0)
        for source in sources:
            compiled = Path(self.build_temp, source).with_suffix(".o")
            if source.endswith(".cu") and compiled.exists() and compiled.stat().st_mtime < newest:
                compiled.unlink()


setup(
    ext_modules=[
        Extension(
            "bnn_fast._C",
            sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            depends=HEADERS,
            include_dirs=[os.path.abspath("csrc")],  # ninja runs elsewhere
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch_cpu"],
            extra_link_args=["-Wl,--exclude-libs,ALL", *SANITIZE],
            language="c++",
            py_limited_api=True,
        ),
        Extension(
            "bnn_fast._autograd",
            sources=sorted(glob("csrc/autograd/*.cpp")),
            depends=HEADERS,
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch_cpu", "torch", "torch_python"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            language="c++",
            optional=not STRICT,
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
