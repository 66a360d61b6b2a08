"""Networks trained from start to finish: `python -m bnn_fast.demos --help`."""
