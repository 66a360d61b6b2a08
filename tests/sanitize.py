"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set that this machine has.

    python tests/sanitize.py        exit status 1 if anything was found

Builds the extension a second time, in build/sanitize, and runs the kernels' and the functions' tests with it, tensors beside
unreadable pages among them. The sanitizers' runtimes are the compiler's own and come before all else (LD_PRELOAD).
"""
from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
SETS = ("generic", "avx2", "avx2x16", "avx512")
FILES = ("tests/operators/test_kernels_linear.py", "tests/operators/test_kernels_sample.py", "tests/operators/test_kernels_noisy.py",
         "tests/operators/test_kernels_rows.py",
         "tests/operators/test_functional.py", "tests/operators/test_chain.py", "tests/operators/test_estimators.py",
         "tests/field_reports/memory.py")
# A test of each kind: under the sanitizers all of them would take several times as long as without.
CHOSEN = ("(awkward and (127-3 or 5-257 or 0)) or (narrow_shapes and (20 or 17)) or beyond or strides or half_inputs or threads"
          " or (options and sampled and float32) or agrees or memory"
          " or (chain and (against_the_reference or whole_range or empty or groups) and not instruction_sets)"
          " or (test_kernels_rows and (empty or infinite or (bit_for_bit and (1- or 6- or 65- or 300-))))"
          " or (test_estimators and against_reference and sampled and (3-5 or 1-33))")
SETTINGS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",  # the interpreter itself never frees all
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1", "BNN_FAST_NODES": "0",
            "PYTHONPATH": f"{BUILD / 'lib'}", "OMP_NUM_THREADS": "1"}


def runtimes() -> str:
    """The sanitizers' libraries, and the C++ runtime, which they look for at their start."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = [subprocess.run([*compiler, f"-print-file-name={name}"], text=True, capture_output=True).stdout.strip()
             for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    missing = [path for path in found if not os.path.isabs(path)]
    if missing:
        sys.exit(f"{shlex.join(compiler)} has no {', '.join(missing)}. Remedy: install g++ with its sanitizers' runtimes"
                 " (on Debian and Ubuntu they come with it) and name it: CXX=g++ make sanitize")
    return " ".join(os.path.realpath(path) for path in found)


def build() -> None:
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", BUILD, "--build-lib", BUILD / "lib"]
    subprocess.run(command, cwd=ROOT, check=True,
                   env={**os.environ, "BNN_FAST_SANITIZE": "1", "BNN_FAST_CUDA": "0", "BNN_FAST_STRICT": "0"})


def run(instruction_set: str, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    # from elsewhere: the checkout itself must not be imported
    return subprocess.run([sys.executable, *command], cwd=BUILD, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**environment, "BNN_FAST_CPU": instruction_set})


def main() -> int:
    preload = runtimes()
    build()
    environment = {**os.environ, **SETTINGS, "LD_PRELOAD": preload}
    probe = ("-c", "import bnn_fast; print(bnn_fast.__file__, bnn_fast.build_info()['cpu_capability'])")
    probes = {name: run(name, environment, *probe) for name in SETS}
    sets = [name for name, done in probes.items() if done.returncode == 0]
    if not sets or str(BUILD) not in probes[sets[0]].stdout:
        print(f"the sanitized build does not run: {probes['generic'].stdout}")
        return 1
    tests = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", *(str(ROOT / file) for file in FILES), "-k", CHOSEN)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(sets, pool.map(lambda name: run(name, environment, *tests), sets)))
    for name, done in results.items():
        print(f"sanitized {name}: {done.stdout.splitlines()[-1] if done.returncode == 0 else done.stdout[-20000:]}")
    return int(any(done.returncode for done in results.values()))


if __name__ == "__main__":
    sys.exit(main())
