"""
Figures, with matplotlib (`pip install matplotlib`; it is not among the requirements).

    python data/plot.py out/stdlib out/k2     # BrierLM over training FLOPs of these runs
    python data/plot.py clouds out/stdlib --start "class Test("   # clouds.png, of README.md
    python data/plot.py                       # curve.svg and text.svg, of data/RESULTS.md

The first writes curves.svg. Nothing imports this script; it may import all else.
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
from data.prepare import get_tokenizer
from sample import load_model, whole_chunks

HERE = Path(__file__).resolve().parent
NAMES = {"calm": "CALM", "ar": "token model"}
START = "class Test("
COLORS = ("C0", "C1", "C2", "C3", "C4", "C6", "C8", "C9")   # all but brown and grey

# `nano`, by data/RESULTS.md: BrierLM over training FLOPs, means of seeds;
SCORES = {
    "CALM": ([1e13, 3.18e13, 8e13], [13.50, 18.31, 21.88]),
    "token model, as wide": ([1e13, 3.18e13, 8e13], [17.95, 27.16, 33.88]),
}
# and how likely a written text is, in bits a byte, over how varied it is, by distinct-4.
WAYS = {
    "CALM, temperature 1, 0.65, 0.5": ([0.75, 0.62, 0.32], [5.40, 4.44, 2.59]),
    "CALM, --noise 1, 0.5, 0.25, 0": ([0.75, 0.61, 0.52, 0.21], [5.40, 4.36, 3.91, 3.36]),
    "CALM, K = 2, --noise 1, 0.25": ([0.66, 0.54], [3.86, 3.11]),
    "token model, temperature 1, 0.65, 0.5": ([0.53, 0.34, 0.25], [2.14, 1.26, 1.06]),
    "real text": ([0.46], [1.86]),
}

# For a page that may be light or dark: grey, without a background.
GREY = "#808080"
STYLE = {
    "font.size": 11,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "savefig.transparent": True,
    "savefig.dpi": 150,
    "svg.hashsalt": "calm",   # the same file each time
}


def read_runs(runs):
    """BrierLM over training FLOPs, from the logs of runs -> lines for draw_lines."""
    lines = {}
    for run in runs:
        entries = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
        for entry in [entry for entry in entries if "brierlm" in entry]:
            points = lines.setdefault(f"{NAMES[entry['stage']]} ({run})", {})
            points[entry["flops"]] = entry["brierlm"]   # of the last, if it was made twice
    return {name: zip(*sorted(points.items())) for name, points in lines.items()}


def draw_lines(lines, path, **labels):
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, (x, y) in lines.items():
        axes.plot(x, y, "o-", label=name)
    axes.set(**labels)
    axes.legend(frameon=False)
    save(figure, path)


@torch.no_grad()
def draw_clouds(run, start, path, n=1500):
    """Where samples of the head fall after one prompt, and where the vectors of chunks lie, in
    the plane of the samples' two largest principal components."""
    torch.manual_seed(0)
    model, checkpoint = load_model(run, "calm")
    tokenizer = get_tokenizer(checkpoint["data"]["tokenizer"])
    ids = tokenizer.encode_ordinary(start.replace(r"\n", "\n"))
    prompt = whole_chunks(torch.tensor([ids]), model.chunk_size, tokenizer.eot_token)
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
        for color, (chunk, _) in zip(COLORS, common):
            own = z[(decoded == torch.tensor(chunk)).all(-1)]
            mean, log_std = model.autoencoder.encode(torch.tensor(chunk))
            y = posterior_samples(mean, log_std, 60)
            axis.scatter(*((own - middle) @ plane).T, s=6, color=color)
            axis.scatter(*((y - middle) @ plane).T, s=5, color=color, marker="x", lw=0.5)
            axis.scatter(*((mean - middle) @ plane), s=150, color=color, marker="*",
                         edgecolors=GREY, label=repr(tokenizer.decode(chunk)))
        axis.set(title=title, xlabel="first principal component")
    axes[0].set(ylabel="second principal component")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False,
                  title="chunk")
    save(figure, path)


def save(figure, path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")


def main():
    plt.rcParams.update(STYLE)
    parser = argparse.ArgumentParser(description="Draw figures.")
    parser.add_argument("what", nargs="*", help="folders of runs; or `clouds` and one")
    parser.add_argument("--start", default=START, help="the prompt of clouds")
    args = parser.parse_args()
    score = {"xlabel": "training FLOPs", "ylabel": "BrierLM", "xscale": "log"}
    if not args.what:
        draw_lines(SCORES, HERE / "curve.svg", **score)
        draw_lines(WAYS, HERE / "text.svg", xlabel="distinct-4, a share",
                   ylabel="bits per byte, by another token model")
    elif args.what[0] == "clouds":
        draw_clouds(args.what[1], args.start, "clouds.png")
    else:
        draw_lines(read_runs(args.what), "curves.svg", **score)


if __name__ == "__main__":
    main()
