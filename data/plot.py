"""
Figures, with matplotlib (`pip install matplotlib`; it is not among the requirements).

    python data/plot.py out/stdlib out/k2     # BrierLM over training FLOPs of these runs
    python data/plot.py clouds out/stdlib --start "import os\\nimport sy"
    python data/plot.py                       # the figures of README.md and data/RESULTS.md

The first two write curves.svg and clouds.svg. Nothing imports this script; it may import
all else.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
import torch

from autoencoder import posterior_samples
from data.prepare import border_token, get_tokenizer
from sample import load_model, whole_chunks

HERE = Path(__file__).resolve().parent
NAMES = {"calm": "CALM", "ar": "token model"}
START = r"import os\nimport sy"

# BrierLM of `nano` over training FLOPs, in units of 1e13: data/RESULTS.md.
SCORES = {
    "CALM, K = 4": ([1, 2, 2.8, 4, 8], [14.36, 16.64, 18.00, 19.35, 21.90]),
    "token model, as wide": ([1, 2, 2.8, 4], [20.31, 25.04, 27.59, 30.50]),
    "token model, as cheap": ([1, 2, 2.8, 4, 8], [24.63, 28.22, 29.07, 30.35, 31.59]),
}

# For a page that may be light or dark: grey, without a background.
GREY = "#808080"
STYLE = {"font.size": 11, "svg.hashsalt": "calm", "savefig.transparent": True}
STYLE |= {f"{name}color": GREY for name in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}


def draw_curves(runs, path):
    """BrierLM over training FLOPs, from the logs of runs. A step that was made twice counts as
    it was made last."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for run in runs:
        curves = {}
        entries = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
        for entry in [entry for entry in entries if "brierlm" in entry]:
            curves.setdefault(entry["stage"], {})[entry["flops"]] = entry["brierlm"]
        for stage, points in curves.items():
            axes.plot(*zip(*sorted(points.items())), "o-", label=f"{NAMES[stage]} ({run})")
    axes.set(xlabel="training FLOPs", ylabel="BrierLM", xscale="log")
    save(figure, path)


def draw_scores(path):
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, (flops, scores) in SCORES.items():
        axes.plot(flops, scores, "o-", label=name)
    axes.set(xlabel="training FLOPs, in units of 1e13", ylabel="BrierLM", xscale="log",
             ylim=(0, 36), xticks=[1, 2, 4, 8], xticklabels=["1", "2", "4", "8"])
    axes.minorticks_off()
    save(figure, path)


@torch.no_grad()
def draw_clouds(run, start, path, n=1500):
    """Where samples of the head fall after one prompt, and where the vectors of chunks lie, in
    the plane of the samples' two largest principal components."""
    torch.manual_seed(0)
    model, checkpoint = load_model(run, "calm")
    tokenizer = get_tokenizer(checkpoint["data"]["tokenizer"])
    ids = tokenizer.encode_ordinary(start.replace(r"\n", "\n"))
    prompt = whole_chunks(torch.tensor([ids]), model.chunk_size, border_token(tokenizer))
    h = model.hidden(prompt)[0, -1]                                # (D,)
    clouds = {"all of the noise": model.head.sample(h, n),         # (n, L)
              "noise 0.25": model.head.sample(h, n, noise_scale=0.25)}
    middle = clouds["all of the noise"].mean(0)
    _, _, plane = torch.pca_lowrank(clouds["all of the noise"], 2)   # (L, 2)
    chunks = model.autoencoder.tokens(torch.cat([*clouds.values()]))
    common = Counter(map(tuple, chunks.tolist())).most_common(8)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", sharex=True,
                                sharey=True)
    for axis, (title, z) in zip(axes, clouds.items()):
        decoded = model.autoencoder.tokens(z)
        axis.scatter(*((z - middle) @ plane).T, s=4, color=GREY, alpha=0.4)
        for i, (chunk, _) in enumerate(common):
            own = z[(decoded == torch.tensor(chunk)).all(-1)]
            mean, log_std = model.autoencoder.encode(torch.tensor(chunk))
            y = posterior_samples(mean, log_std, 60)
            axis.scatter(*((own - middle) @ plane).T, s=6, color=f"C{i}")
            axis.scatter(*((y - middle) @ plane).T, s=5, color=f"C{i}", marker="x", linewidths=0.5)
            axis.scatter(*((mean - middle) @ plane), s=150, color=f"C{i}", marker="*",
                         edgecolors=GREY, label=repr(tokenizer.decode(chunk)))
        axis.set(title=title, xlabel="first principal component")
    axes[0].set(ylabel="second principal component")
    save(figure, path)


def save(figure, path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")


def main():
    plt.rcParams.update(STYLE)
    parser = argparse.ArgumentParser(description="Draw runs, samples, or the figures of the texts.")
    parser.add_argument("what", nargs="*", help="folders of runs; or `clouds` and one")
    parser.add_argument("--start", default=START, help="the prompt of clouds")
    args = parser.parse_args()
    if not args.what:
        draw_scores(HERE / "curve.svg")
    elif args.what[0] == "clouds":
        draw_clouds(args.what[1], args.start, "clouds.svg")
    else:
        draw_curves(args.what, "curves.svg")


if __name__ == "__main__":
    main()
