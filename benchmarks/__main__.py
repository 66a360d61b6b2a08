"""python -m benchmarks step [--json PATH]"""
from __future__ import annotations

import argparse

from . import harness, step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="name", required=True)
    command = commands.add_parser("step", description=step.__doc__, help=step.__doc__)
    command.add_argument("--json", metavar="PATH", help="save the results there")
    command.add_argument("--seconds", type=float, default=5.0,
                         help="for each shape, all cases together (default 5)")
    options = parser.parse_args(arguments)
    found = harness.results("step", step.measure(seconds=options.seconds), base="nn.Linear")
    print(harness.show(found))
    if options.json:
        harness.save(found, options.json)


if __name__ == "__main__":
    main()
