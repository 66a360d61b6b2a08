"""python -m benchmarks step | predict | train | memory | scaling | calls | threads | models | networks | all
                     [options, see --help]
python -m benchmarks plot [FILE ...]
python -m benchmarks compare OLD.json NEW.json
python -m benchmarks gpu [--steps STEPS] [--out FOLDER] [--commit NAME]
"""
from __future__ import annotations

import argparse
import os
import pathlib
import sys

# Before torch is imported: the profiler, which watches the memory, has messages of its own.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from .gpu import check  # noqa: E402

RESULTS = check.ROOT / "benchmarks" / "results"
SECTIONS = {
    "step": "a training step: forward, KL, backward; each alone",
    "predict": "several posterior draws of the output",
    "train": "whole trainings, wall clock to a stated loss",
    "memory": "peak extra memory of a step with several draws",
    "scaling": "a step's time against the weights and against the batch",
    "calls": "what a call costs beside its arithmetic: small layers, the ELBO",
    "threads": "a step's time on 1, 2, ... CPU threads",
    "models": "ResNet-20 and LSTM: a training step; 100 draws of a variational head; embeddings",
    "networks": "whole networks: a training step, several draws a step, predictions from many draws",
    "all": "all of these, and one table",
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.name == "gpu":
        return check.check(options.steps, options.out, options.commit)
    # what follows imports bnn_fast, which `gpu` first builds
    if options.name == "compare":
        return compared(options.old, options.new)
    if options.name == "plot":
        from . import plot

        files = options.files or sorted(RESULTS.glob("*.json"))
        print(*(path for file in files for path in plot.draw(file)), sep="\n")
        return 0
    return measured(options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True)
    for name, what in SECTIONS.items():
        command = commands.add_parser(name, description=what, help=what)
        command.add_argument("--device", default="cpu", help="cpu (default) or cuda")
        command.add_argument("--runs", type=int, default=1,
                             help="how often everything is repeated; ratios are then given with their range (default 1)")
        command.add_argument("--seconds", type=float, default=3.0,
                             help="for each shape, all cases together, at least (default 3)")
        command.add_argument("--providers", nargs="+", metavar="NAME", help="default: all that are installed")
        command.add_argument("--data", metavar="FOLDER", help="train: MNIST too, its four IDX files")
        command.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER",
                             help="default: benchmarks/results")
    what = "draw results files"
    command = commands.add_parser("plot", description=what, help=what)
    command.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE",
                         help="default: all of benchmarks/results; the pictures go beside them")
    what = "what got faster or slower by more than the noise"
    command = commands.add_parser("compare", description=f"{what}; exit status 1 if anything got worse",
                                  help=what)
    command.add_argument("old", metavar="OLD.json")
    command.add_argument("new", metavar="NEW.json")
    what = "build, test and time on a machine with a GPU"
    command = commands.add_parser("gpu", description=f"{what}. {check.__doc__}", help=what,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--steps", nargs="+", choices=list(check.STEPS), default=list(check.STEPS),
                         help="default: all")
    command.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="FOLDER",
                         help="default: benchmarks/results")
    command.add_argument("--commit", help="what the results say they are of, where there is no git")
    return parser.parse_args(arguments)


def compared(old: str, new: str) -> int:
    from . import compare

    before, now = compare.read(old), compare.read(new)
    rows = compare.compare(before, now)
    print(compare.show(rows, before, now))
    return int(compare.worse(rows))


def measured(options: argparse.Namespace) -> int:
    from . import harness, providers, suite
    from .measure import Run

    unknown = set(options.providers or ()) - set(providers.MAKERS)
    if unknown:
        print(f"--providers: expected any of {', '.join(providers.MAKERS)}; "
              f"given {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    if options.runs < 1:
        print(f"--runs: expected at least 1, given {options.runs}", file=sys.stderr)
        return 1
    found, absent = providers.available(options.providers or tuple(providers.MAKERS))
    run = Run(found, options.device, options.seconds, data=options.data)
    names = list(suite.SECTIONS) if options.name == "all" else [options.name]
    record, path = suite.measure(names, run, absent, options.out, options.runs)
    print(suite.show(record) if options.name == "all" else harness.show(record["sections"][options.name]))
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
