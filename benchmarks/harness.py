"""What every benchmark does with its times: a table, and a file that says where they were taken."""
from __future__ import annotations

import datetime
import json
import pathlib
import platform
import subprocess

import torch

from bnn_fast.demos.common import table
from bnn_fast.demos.timing import Times


def environment() -> dict[str, object]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.isoformat(timespec="seconds"), "commit": commit(),
            "torch": str(torch.__version__), "cpu": cpu(), "threads": torch.get_num_threads()}


def cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str:
    """Of the checkout that this file is in, "-dirty" where it has changes; "unknown" without git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], text=True,
                              check=True, capture_output=True, cwd=pathlib.Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results(name: str, times: dict[str, dict[str, Times]], base: str) -> dict[str, object]:
    """times: for each shape or other setting, the cases' times; ratios of medians are to the case `base`."""
    return {"benchmark": name, "environment": environment(), "base": base, "settings": {
        setting: {case: {**t._asdict(), "ratio": t.median / cases[base].median} for case, t in cases.items()}
        for setting, cases in times.items()}}


def show(found: dict) -> str:
    """Results as a table: milliseconds, the 20th and 80th percentiles, and the ratio to the base."""
    rows = [("", "case", "median", "20 % to 80 %", f"over {found['base']}")]
    for setting, cases in found["settings"].items():
        for case, t in cases.items():
            rows.append((setting, case, f"{1e3 * t['median']:.3f} ms",
                         f"{1e3 * t['low']:.3f} to {1e3 * t['high']:.3f}", f"{t['ratio']:.2f}"))
            setting = ""
    where = found["environment"]
    return table(f"{found['benchmark']}: torch {where['torch']}, {where['cpu']}, {where['threads']} threads, "
                 f"commit {where['commit']}, {where['date']}", rows)


def save(found: dict, path: str) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")
