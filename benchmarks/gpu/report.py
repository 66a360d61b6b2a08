"""The record of a run as tables. Which regime ran shows in the kernels of an operator."""
from __future__ import annotations

import re

from bnn_fast.demos.common import table

from .. import harness


def show(record: dict) -> str:
    where = record["environment"]
    found = record.get("timings", {})
    parts = [table(f"{where['gpu']}, driver {where['driver_version']}, torch {where['torch']}, "
                   f"commit {where['commit']}, {where['date']}", step_rows(record["steps"]))]
    if found.get("ceilings"):
        parts.append(table("Measured ceilings", ceiling_rows(found["ceilings"])))
    if found.get("operators"):
        parts.append(table("Operators, times of the GPU alone", operator_rows(found["operators"])))
    for name in ("step", "step on the GPU"):
        if found.get(name):
            parts.append(table(f"{name}: forward, KL, backward of one layer",
                               harness.rows(found[name], "nn.Linear")))
    if found.get("network"):
        parts.append(table("Networks: training step with Adam, and predictions",
                           harness.rows(found["network"], "nn.Linear")))
    if record.get("targets"):
        parts.append(table("Targets", target_rows(record["targets"])))
    if found.get("errors"):
        parts.append(table("Timings that failed", found["errors"].items()))
    if found.get("left_out"):
        parts.append(table("Timings left out for want of time", ((name,) for name in found["left_out"])))
    return "\n".join(parts)


def step_rows(steps: dict) -> list[tuple]:
    rows = []
    for name, step in steps.items():
        first, *others = [line[:100] for line in step["note"].splitlines()] or [""]
        rows.append((name, step["state"], f"{step['seconds']:.0f} s", first))
        rows += [("", "", "", line) for line in others]
    return rows


def ceiling_rows(ceilings: dict) -> list[tuple]:
    units = {"bytes": (1e-12, "TB/s, copy, read and written"), "clock": (1e-9, "GHz"),
             "instructions": (1e-12, "T warp instructions/s")}
    rows = []
    for name, value in ceilings.items():
        factor, unit = units.get(name, (1e-12, "TFLOP/s"))
        rows.append((name, f"{value * factor:.2f}", unit))
    return rows


def operator_rows(operators: dict) -> list[tuple]:
    rows = [("", "operator", "median us", "20 % to 80 %", "GB", "TFLOP", "instructions/weight", "floor us",
             "bound", "of floor", "kernels, us")]
    for case, found in operators.items():
        for name, t in found.items():
            count = t["instructions_per_weight"]
            kernels = ", ".join(f"{short(full)} {1e6 * s:.1f}" for full, s in t["kernels"].items())
            rows.append((case, name, f"{1e6 * t['median']:.1f}",
                         f"{1e6 * t['low']:.1f} to {1e6 * t['high']:.1f}",
                         f"{1e-9 * t['bytes']:.3f}", f"{1e-12 * t['flops']:.3f}",
                         "not counted" if count is None else f"{count:.0f}", f"{1e6 * t['floor']:.1f}",
                         t["bound"], f"{100 * t['fraction']:.0f} %", kernels))
            case = ""
    return rows


def short(kernel: str) -> str:
    """The bare name of a C++ function: without return type, namespaces, template arguments and parameters."""
    bare = re.sub(r"\(anonymous namespace\)|<unnamed>", "", kernel)
    return re.split(r"[<(]", bare, maxsplit=1)[0].split("::")[-1].removeprefix("void ").strip()


def target_rows(targets: list[dict]) -> list[tuple]:
    states = {None: "not measured", True: "met", False: "missed"}
    return [("target", "value", "found", ""), *(
        (t["name"], f"{t['target']:.2f}", "" if t["found"] is None else f"{t['found']:.2f}", states[t["met"]])
        for t in targets)]
