"""What got faster or slower between two results files, by more than the noise, and what needs more memory.

Compared are the ratios to nn.Linear within a run. A change counts where they differ by more than 3 % and the
ranges do not meet: those of several runs, or of one from the case's 20th percentile over nn.Linear's 80th, to its 80th
over nn.Linear's 20th.
Memory counts where it differs by more than 1 % and 64 KiB.
"""
from __future__ import annotations

import json
import pathlib
from typing import Iterator

from bnn_fast.demos.common import table

from .providers import BASE

LEAST = 0.03
MEMORY, BYTES = 0.01, 2 ** 16
SAME = ("cpu", "gpu", "threads", "torch")
Row = tuple[str, str, str, str]  # case, before, now, what that is


def compare(old: dict, new: dict) -> list[Row]:
    return [row for name, *cases in pairs(old, new) for row in changes(name, *cases)]


def pairs(old: dict, new: dict) -> Iterator[tuple[str, dict, dict]]:
    """(name, before, now) of cases that are in both; times in both with the reach of their ratio."""
    for section, found in new["sections"].items():
        before = old["sections"].get(section, {"settings": {}})["settings"]
        for setting, cases in found["settings"].items():
            for case, now in cases.items():
                if case in before.get(setting, {}):
                    yield (f"{section}: {setting}: {case}", reached(before[setting], case),
                           reached(cases, case))


def changes(name: str, before: dict, now: dict) -> Iterator[Row]:
    if "error" in now and "error" not in before:
        yield name, "", now["error"][:60], "fails"
    if "ratio" in before and "ratio" in now:
        change = now["ratio"] / before["ratio"] - 1
        apart = now["least"] > before["most"] or now["most"] < before["least"]
        if apart and abs(change) > LEAST:
            yield (name, f"{before['ratio']:.2f}", f"{now['ratio']:.2f}",
                   f"{100 * abs(change):.0f} % {'slower' if change > 0 else 'faster'}")
    if "extra" in before and "extra" in now:
        more = now["extra"] - before["extra"]
        if abs(more) > max(BYTES, MEMORY * before["extra"]):
            yield (name, f"{before['extra'] / 2 ** 20:.2f} MiB", f"{now['extra'] / 2 ** 20:.2f} MiB",
                   "more memory" if more > 0 else "less memory")


def reached(cases: dict[str, dict], case: str) -> dict:
    t = cases[case]
    if "ratio" not in t:
        return t
    if "ratios" in t:
        return {**t, "least": min(t["ratios"]), "most": max(t["ratios"])}
    return {**t, "least": t["low"] / cases[BASE]["high"], "most": t["high"] / cases[BASE]["low"]}


def worse(rows: list[Row]) -> bool:
    return any(what.endswith("slower") or what in ("more memory", "fails") for *_, what in rows)


def show(rows: list[Row], old: dict, new: dict) -> str:
    different = sorted({f"{key}: {a.get(key)} and {b.get(key)}" for section in old["sections"]
                        if section in new["sections"] for key in SAME
                        for a, b in [[r["sections"][section]["environment"] for r in (old, new)]]
                        if a.get(key) != b.get(key)})
    notes = "".join(f"\nnot the same: {line}" for line in different)
    if not rows:
        count = len(list(pairs(old, new)))
        return f"nothing got faster or slower by more than the noise, of {count} cases{notes}"
    return table(f"over {BASE}, before and now", rows) + notes


def read(path: str) -> dict:
    return json.loads(pathlib.Path(path).read_text())
