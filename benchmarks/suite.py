"""The sections of a results file, and the one table that sums them up."""
from __future__ import annotations

import json
import pathlib
import re
import time

import bnn_fast as bf
from bnn_fast.demos.common import table

from . import calls, harness, memory, models, networks, predict, scaling, step, threads, train
from .measure import Run
from .providers import BASE

SECTIONS = {"step": step, "predict": predict, "train": train, "memory": memory, "scaling": scaling,
            "calls": calls, "threads": threads, "models": models, "networks": networks}
# in, out, batch on two cores: how much more than nn.Linear's time a step of bnn_fast may take
TARGETS = {"1 x 20, batch 1000": 1.5, "512 x 512, batch 128": 1.5, "1200 x 1200, batch 128": 1.5,
           "2048 x 2048, batch 32": 1.8, "4096 x 4096, batch 16": 1.7, "2048 x 2048, batch 1024": 1.15,
           step.TUTORIAL: 1.25}


def machine(run: Run) -> str:
    """The name of its results: not that of `make gpu-check`, which are others."""
    where = harness.environment(run.cuda)
    parts = ([where["gpu"], "suite"] if run.cuda else
             [where["cpu"], bf.build_info()["cpu_capability"], f"{where['threads']} threads"])
    return re.sub(r"[^a-z0-9]+", "_", " ".join(map(str, parts)).lower()).strip("_")


def measure(names: list[str], run: Run, absent: dict[str, str], folder: pathlib.Path,
            runs: int = 1) -> tuple[dict, pathlib.Path]:
    """Measures sections, all of them again for each run; each replaces that of an earlier time in the machine's file, and
    is saved at once."""
    path = folder / f"{machine(run)}.json"
    record = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    before: dict[str, list[dict]] = {name: [] for name in names}
    for name in names * runs:
        print(f"{name} ...", end=" ", flush=True)
        start = time.monotonic()
        before[name].append(SECTIONS[name].measure(run))
        found = harness.results(name, harness.together(before[name]), BASE, absent, run.cuda)
        record["sections"][name] = {**found, "runs": len(before[name]),
                                    "wall_seconds": round(time.monotonic() - start, 1)}
        harness.save(record, path)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return record, path


def show(record: dict) -> str:
    """nn.Linear's time and the others' over it; training: seconds to the loss, * where that was not reached;
    peak extra memory of a step over the bytes of mu and rho."""
    sections = record["sections"]
    absent = {name: why for found in sections.values() for name, why in found["absent"].items()}
    names = list(dict.fromkeys(name for found in sections.values() for cases in found["settings"].values()
                               for name in cases if name != scaling.FLOOR))
    where = next(iter(sections.values()))["environment"]
    title = (f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['torch']}, "
             f"commit {where['commit']}, {where['date']}, runs {next(iter(sections.values())).get('runs', 1)}")
    rows = heads(names)
    for section, setting, cases in whole(sections, "step"):
        cells = [speed(cases.get(n), n) for n in names]
        rows.append((f"{section}: {setting}", target(setting, where), *cells))
    others = (*whole(sections, "predict"), *whole(sections, "models"), *whole(sections, "networks"))
    for section, setting, cases in others:
        rows.append((f"{section}: {setting}", "", *(speed(cases.get(n), n) for n in names)))
    for section, setting, cases in whole(sections, "train"):
        rows.append((f"{section}: {setting}", "", *(trained(cases.get(n)) for n in names)))
    for _, setting, cases in whole(sections, "step"):
        if setting != step.TUTORIAL:
            n_in, n_out, _ = map(int, re.findall(r"\d+", setting))
            cells = [extra(cases.get(n), 8 * n_in * n_out) for n in names]
            rows.append((f"extra memory: {setting}", "", *cells))
    missing = "".join(f"\nabsent: {name}: {why}" for name, why in absent.items())
    return table(title, rows) + missing


def whole(sections: dict, name: str) -> list[tuple[str, str, dict]]:
    """The settings of a section, without the parts of a step."""
    settings = sections.get(name, {"settings": {}})["settings"]
    return [(name, setting, cases) for setting, cases in settings.items() if not setting.endswith("alone")]


def heads(names: list[str]) -> list[tuple]:
    """The names, one word under the other."""
    words = [["", ""]] + [["target", ""]] + [re.split(r"(?<=-)| ", name) for name in names]
    height = max(map(len, words))
    return list(zip(*(word + [""] * (height - len(word)) for word in words)))


def target(setting: str, where: dict) -> str:
    return f"{TARGETS[setting]:.2f}" if setting in TARGETS and "gpu" not in where else ""


def speed(t: dict | None, name: str) -> str:
    if t is None or "median" not in t:
        return "" if t is None else "failed"
    return f"{1e3 * t['median']:.3g} ms" if name in (BASE, networks.ONE) else harness.ratio(t)


def trained(t: dict | None) -> str:
    return "" if t is None else f"{t['seconds']:.2f} s" + ("" if t["reached"] or not t["goal"] else " *")


def extra(t: dict | None, parameters: int) -> str:
    if t is None or "extra" not in t:
        return "failed" if t and "error" in t else ""
    return f"{100 * t['extra'] / parameters:.1f} %"
