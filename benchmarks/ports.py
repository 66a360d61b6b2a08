"""How many cycles the arithmetic of a weight takes at least, by llvm-mca's model of a processor with AVX-512 (Ice Lake: two ports of 512
bits): `python -m benchmarks.ports`, with g++ and llvm-mca at hand.

Of each piece of ports.cpp: instructions a weight; the cycles for which the busiest port is taken (the floor), and those of the modelled
schedule, in which a piece waits for its own chains of operations. llvm-mca 14 has no model of Zen 4 or 5, and in that of Zen 3 an fma takes
twice as long as it does.
"""
from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile

from bnn_fast.demos.common import table

HERE = pathlib.Path(__file__).parent
VECTORS = {"draw": 8, "sigma and KL": 4, "gradients from dW and noise": 4}  # of 16 weights in a piece
PROCESSOR, OPTIONS = "icelake-server", ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DBNN_FAST_VECTOR_BITS=512")
ITERATIONS = 100


def modelled() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder) / "ports.s"
        subprocess.run(["g++", "-std=c++20", "-O3", "-S", "-ffp-contract=off", "-Wno-psabi", f"-I{HERE.parent / 'csrc'}",
                        "-DBNN_FAST_ISA=modelled", *OPTIONS, str(HERE / "ports.cpp"), "-o", str(code)], check=True)
        done = subprocess.run(["llvm-mca", f"-mcpu={PROCESSOR}", f"-iterations={ITERATIONS}", "--json", str(code)], check=True,
                              capture_output=True, text=True)
    return json.loads(done.stdout)["CodeRegions"]


def main() -> None:
    rows = []
    for region in modelled():
        found, weights = region["SummaryView"], 16 * VECTORS[region["Name"]]
        rows.append((region["Name"], f"{found['Instructions'] / ITERATIONS / weights:.2f}", f"{found['BlockRThroughput'] / weights:.2f}",
                     f"{found['TotalCycles'] / ITERATIONS / weights:.2f}"))
    print(table("a weight, by llvm-mca", [("", "instructions", "cycles of the busiest port", "cycles scheduled"), *rows]))


if __name__ == "__main__":
    main()
