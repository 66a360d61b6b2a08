"""python -m bnn_fast.demos NAME [NAME ...]"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import time

from . import bayes_by_backprop, bayesian_linear_regression, bayesian_neural_networks, digits, digits_data, images
from . import pretrained, series, variational_regression

DEMOS = {module.__name__.rpartition(".")[2]: module for module in (
    variational_regression, bayes_by_backprop, bayesian_linear_regression, bayesian_neural_networks, digits, images, pretrained, series)}
WITH_DATA = ("digits", "images", "pretrained")
EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def parse(arguments: list[str]) -> argparse.Namespace:
    # `NAME --help` tells of that demo: which ones are named is seen before the options are read.
    named = [name for name in DEMOS if name in arguments] or list(DEMOS)
    parser = argparse.ArgumentParser(
        prog="python -m bnn_fast.demos", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n\n".join(f"{name}: {DEMOS[name].__doc__}" for name in named))
    parser.add_argument("names", nargs="+", choices=DEMOS, metavar="NAME", help=", ".join(DEMOS))
    parser.add_argument("--epochs", type=positive, metavar="N",
                        help="default: " + ", ".join(f"{DEMOS[n].EPOCHS} ({n})" for n in named))
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the initialisation, the noise and the batches (default 0)")
    parser.add_argument("--device", default="cpu", help="as torch names it: cpu (default), cuda, cuda:1")
    parser.add_argument("--out", default="figures", metavar="FOLDER",
                        help="where the pictures go (default: figures)")
    if any(name in named for name in WITH_DATA):
        parser.add_argument("--data", metavar="FOLDER",
                            help="digits, images, pretrained: MNIST from this folder, its four IDX files, .gz or not")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, given {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(sys.argv[1:] if arguments is None else arguments))
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"the demos need {', '.join(missing)}: pip install bnn_fast[demos]", file=sys.stderr)
        return 1
    data = options.pop("data", None)
    start = time.perf_counter()
    try:
        for name in options.pop("names"):
            DEMOS[name].run(**options, **({"data": data} if name in WITH_DATA else {}))
    except digits_data.BadData as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
