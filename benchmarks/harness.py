"""What every benchmark does with its times: a table, and a file that says where they were taken."""
from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # what runs on a fresh checkout builds bnn_fast before anything imports it
    from bnn_fast.demos.timing import Times


def environment(cuda: bool = False) -> dict[str, object]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.isoformat(timespec="seconds"), "commit": commit(),
            "torch": str(torch.__version__), "cpu": cpu(), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
            **(gpu() if cuda else {})}


def cpu() -> str:
    """The processor's name, and its family, where the name of a virtual machine's tells nothing of its generation."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} family {fields['cpu family']}" if "cpu family" in fields else name


def commit() -> str:
    """Of the checkout that this file is in, "-dirty" where anything but results has changed; "unknown" without git."""
    def git(*command):
        return subprocess.run(["git", *command], text=True, check=True, capture_output=True,
                              cwd=pathlib.Path(__file__).parent).stdout.strip()

    try:
        changed = git("diff", "HEAD", "--name-only", "--", ":/", ":!results")
        return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu() -> dict[str, object]:
    """The GPU, as torch and nvidia-smi tell; clocks in MHz, as they are between two steps."""
    device = torch.cuda.get_device_properties(0)
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    try:
        told = subprocess.run(["nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}",
                               "--format=csv,noheader,nounits"], text=True, capture_output=True, timeout=30,
                              check=True).stdout.strip().split(", ")
    except (OSError, subprocess.SubprocessError):
        told = ["unknown"] * len(asked)
    return {"gpu": device.name, "capability": f"{device.major}.{device.minor}", "cuda": torch.version.cuda,
            "multiprocessors": device.multi_processor_count, "l2_bytes": device.L2_cache_size,
            **dict(zip(asked, told))}


def ratios(cases: dict[str, Times], base: str) -> dict[str, dict[str, float]]:
    """The times, and the ratio of each median to that of the case `base`, if that is among them."""
    return {case: {**t._asdict(), **({"ratio": t.median / cases[base].median} if base in cases else {})}
            for case, t in cases.items()}


def together(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """The settings of several runs as one: medians of their figures, and `ratios`, that of each run."""
    return {setting: {case: _case([run[setting][case] for run in runs]) for case in cases}
            for setting, cases in runs[-1].items()}


def _case(runs: list[dict]) -> dict:
    failed = [t for t in runs if "error" in t]
    if failed or len(runs) == 1:
        return (failed or runs)[0]
    found = {key: statistics.median(t[key] for t in runs) if type(value) in (int, float) else value
             for key, value in runs[-1].items()}
    return {**found, "ratios": [t["ratio"] for t in runs]} if "ratio" in found else found


def ratio(t: dict) -> str:
    """A case's ratio to the base, with the range of the runs where there were several."""
    spread = t.get("ratios", ())
    return f"{t['ratio']:.2f}" + (f" ({min(spread):.2f} to {max(spread):.2f})" if spread else "")


def results(name: str, settings: dict[str, dict], base: str, absent: dict[str, str],
            cuda: bool = False) -> dict[str, object]:
    """settings: for each shape or other setting, what was found for each case; ratios are to the case `base`.
    absent: why providers are not among the cases."""
    return {"benchmark": name, "environment": environment(cuda), "base": base, "absent": absent,
            "settings": settings}


def rows(settings: dict, base: str) -> list[tuple]:
    """Of a table: milliseconds, the 20th and 80th percentiles, the ratio to the base, what else was found."""
    found = [("", "case", "median", "20 % to 80 %", f"over {base}", "extra memory", "")]
    for setting, cases in settings.items():
        for case, t in cases.items():
            time = (f"{1e3 * t['median']:.3f} ms", f"{1e3 * t['low']:.3f} to {1e3 * t['high']:.3f}",
                    ratio(t) if "ratio" in t else "") if "median" in t else ("", "", "")
            memory = f"{t['extra'] / 2 ** 20:.2f} MiB" if "extra" in t else ""
            time = (f"{1e3 * t['floor']:.3f} ms", "", "") if "floor" in t else time
            found.append((setting, case, *time, memory, t.get("error", t.get("note", ""))[:80]))
            setting = ""
    return found


def show(found: dict) -> str:
    """Results as a table."""
    from bnn_fast.demos.common import table

    where = found["environment"]
    return table(f"{found['benchmark']}: torch {where['torch']}, {where.get('gpu', where['cpu'])}, "
                 f"{where['threads']} threads, commit {where['commit']}, {where['date']}",
                 rows(found["settings"], found["base"]))


def save(found: dict, path: str | pathlib.Path) -> None:
    """Whole or not at all: a run that is stopped leaves the file of the save before."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, path)
