"""
Figures, with matplotlib (`pip install matplotlib`; it is not among the requirements).

    python data/plot.py out/stdlib out/k2    # BrierLM over training FLOPs of runs: curves.svg
    python data/plot.py                      # the figures of data/RESULTS.md, from their numbers

Nothing imports this script, and it may import all else.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
NAMES = {"calm": "CALM", "ar": "token model"}

# BrierLM of `nano` over training FLOPs, in units of 1e13: data/RESULTS.md.
SCORES = {
    "CALM, K = 4": ([1, 2, 2.8, 4, 8], [14.36, 16.64, 18.00, 19.35, 21.90]),
    "token model, as wide": ([1, 2, 2.8, 4], [20.31, 25.04, 27.59, 30.50]),
    "token model, as cheap": ([1, 2, 2.8, 4, 8], [24.63, 28.22, 29.07, 30.35, 31.59]),
}


def new_figure(x, y):
    """Axes for a page that may be light or dark: grey, without a background."""
    grey = "#808080"
    plt.rcParams.update({"font.size": 11, "text.color": grey, "axes.edgecolor": grey,
                         "axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey})
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_curves(runs, path):
    """BrierLM over training FLOPs, from the logs of runs. A step that was made twice counts as it
    was made last."""
    figure, axes = new_figure("training FLOPs", "BrierLM")
    for run in runs:
        entries = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
        curves = {}
        for entry in entries:
            if "brierlm" in entry:
                curves.setdefault(entry["stage"], {})[entry["flops"]] = entry["brierlm"]
        for stage, points in curves.items():
            axes.plot(*zip(*sorted(points.items())), "o-", label=f"{NAMES[stage]} ({run})")
    axes.set_xscale("log")
    axes.legend(frameon=False)
    save(figure, path)


def draw_results():
    figure, axes = new_figure("training FLOPs, in units of 1e13", "BrierLM")
    for name, (flops, scores) in SCORES.items():
        axes.plot(flops, scores, "o-", label=name)
    axes.set(xscale="log", xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"], ylim=(0, 35))
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, HERE / "curve.svg")


def save(figure, path):
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(f"drawn: {path}")


def main():
    if sys.argv[1:]:
        draw_curves(sys.argv[1:], "curves.svg")
    else:
        draw_results()


if __name__ == "__main__":
    main()
