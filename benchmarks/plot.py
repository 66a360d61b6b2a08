"""Results files as pictures: the step's ratios by provider, the scaling curves, the memory."""
from __future__ import annotations

import json
import pathlib
from typing import Callable

from bnn_fast.plotting import BLUE, GREEN, GREY, ORANGE, VERMILION

from .providers import BASE
from .scaling import BATCH, FLOOR, WEIGHTS
from .step import shape_name

COLORS = {BASE: "black", "bnn_fast": BLUE, "plain PyTorch": ORANGE, "torch.compile": VERMILION,
          "torchbnn": GREEN}  # the others are grey
MARKERS = dict(zip(COLORS, "os^vD"))


def draw(path: pathlib.Path) -> list[pathlib.Path]:
    """The pictures, beside the file and named after it. A file of other results has none."""
    sections = json.loads(path.read_text()).get("sections", {})
    drawn = []
    for name, picture in (("step", steps), ("scaling", curves), ("memory", memory)):
        if sections.get(name, {}).get("settings"):
            figure = picture(sections[name]["settings"])
            figure.suptitle(figure.get_suptitle() + "\n" + origin(sections[name]["environment"]), fontsize=10)
            drawn.append(path.with_name(f"{path.stem}_{name}.png"))
            figure.savefig(drawn[-1])
    return drawn


def origin(where: dict) -> str:
    return (f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['torch']}, "
            f"commit {where['commit']}, {where['date'][:10]}")


def steps(settings: dict):
    whole = {name: cases for name, cases in settings.items() if "alone" not in name}
    return bars(whole, "A training step over nn.Linear's", lambda t: t.get("ratio"), log=True)


def memory(settings: dict):
    return bars(settings, "Peak extra memory of a step, MiB: above parameters, gradients and output",
                lambda t: t["extra"] / 2 ** 20 if "extra" in t else None, log=False)


def bars(settings: dict, title: str, value: Callable[[dict], float | None], log: bool):
    """A panel for each setting, a bar for each provider."""
    from matplotlib.figure import Figure  # not pyplot: no global state, and no display is asked for

    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(3.2 * columns + 1.2, 2.6 * rows + 0.6), dpi=130, layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    names = list(dict.fromkeys(name for cases in settings.values() for name in cases))
    for (setting, cases), ax in zip(settings.items(), panels):
        found = [value(cases.get(name, {})) for name in names]
        ax.barh(names, [v or 0.0 for v in found], color=[COLORS.get(name, GREY) for name in names])
        for name, v in zip(names, found):
            text = "failed" if v is None else f"{float(f'{v:.3g}'):g}"  # three digits, no exponent
            ax.annotate(text, (v or (1.0 if log else 0.0), name),
                        (3, 0), textcoords="offset points", va="center", fontsize=7)
        largest = max(v or 0.0 for v in found)
        if log:
            ax.set(xscale="log", xlim=(0.5, 2.2 * max(2.0, largest)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
            ax.axvline(1.0, color="black", linewidth=0.8)
        else:
            ax.set_xlim(0.0, 1.25 * largest or 1.0)
        ax.set_title(setting.replace("points, ", "points,\n"), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels:  # those that are left over
        ax.axis("off")
    figure.axes[0].invert_yaxis()
    figure.suptitle(title)
    return figure


def curves(settings: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    lines(left, settings, {n_in * n_out: shape_name(n_in, n_out, batch) for n_in, n_out, batch in WEIGHTS})
    lines(right, settings, {batch: shape_name(n_in, n_out, batch) for n_in, n_out, batch in BATCH})
    left.set(xlabel=f"weights of a square layer, batch {WEIGHTS[0][2]}", ylabel="seconds")
    right.set(xlabel=f"batch, layer {BATCH[0][0]} x {BATCH[0][1]}")
    left.legend(frameon=False, fontsize=8)
    right.set_xticks([batch for *_, batch in BATCH])
    right.xaxis.set_major_formatter("{x:g}")
    figure.suptitle("A training step (forward, KL, backward)")
    return figure


def lines(ax, settings: dict, at: dict[int, str]) -> None:
    """at: the settings to draw, by their place on the x axis."""
    cases = {x: settings[name] for x, name in at.items() if name in settings}
    for name in dict.fromkeys(name for found in cases.values() for name in found):
        key = FLOOR if name == FLOOR else "median"
        points = [(x, found[name][key]) for x, found in cases.items() if key in found.get(name, {})]
        style = ({"color": GREY, "linestyle": "--", "label": "floor of a variational layer"} if name == FLOOR
                 else {"color": COLORS.get(name, GREY), "marker": MARKERS.get(name), "label": name})
        ax.plot(*zip(*points), linewidth=1.3, markersize=4, **style)
    ax.set_yscale("log")
    ax.set_xscale("log", base=2)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
