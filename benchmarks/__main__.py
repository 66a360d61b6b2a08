"""python -m benchmarks step [--json PATH]
python -m benchmarks gpu [--steps STEPS] [--out FOLDER] [--commit NAME]
"""
from __future__ import annotations

import argparse
import pathlib
import sys

from .gpu import check

STEP = "a training step of one layer in float32: forward, KL, backward; on the CPU"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True)
    command = commands.add_parser("step", description=STEP, help=STEP)
    command.add_argument("--json", metavar="PATH", help="save the results there")
    command.add_argument("--seconds", type=float, default=5.0,
                         help="for each shape, all cases together (default 5)")
    what = "build, test and time on a machine with a GPU"
    command = commands.add_parser("gpu", description=f"{what}. {check.__doc__}", help=what,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--steps", nargs="+", choices=list(check.STEPS), default=list(check.STEPS),
                         help="default: all")
    command.add_argument("--out", type=pathlib.Path, default=check.ROOT / "benchmarks" / "results",
                         metavar="FOLDER", help="default: benchmarks/results")
    command.add_argument("--commit", help="what the results say they are of, where there is no git")
    options = parser.parse_args(arguments)
    if options.name == "gpu":
        sys.exit(check.check(options.steps, options.out, options.commit))

    from . import harness, step  # these import bnn_fast, which `gpu` first builds

    found = harness.results("step", step.measure(seconds=options.seconds), base="nn.Linear")
    print(harness.show(found))
    if options.json:
        harness.save(found, options.json)


if __name__ == "__main__":
    main()
