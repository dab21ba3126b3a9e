"""
BrierLM: how well does a model predict, judged from its samples alone (paper section 4)?

    python eval_brier.py --frontier             # accuracy against collision rate, over temperatures
    python eval_brier.py --plot curves.svg out/*   # BrierLM over training FLOPs, from the logs of runs

The Brier score of a forecast P for an outcome y is 2 P(y) - sum_x P(x)^2, highest in expectation when P is
the truth. It needs no probabilities: P(y) is how often a sample hits y, sum_x P(x)^2 how often two are equal.
The outcomes of Brier-n are n-grams; BrierLM is 100 times the geometric mean of Brier-1 to Brier-4.
Shapes: S samples, P positions, B windows, K tokens in a chunk, D width of h.
"""
import json
import math
from html import escape
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from calm import AR, KVCache
from data.checkpoint import autocast, load_tokenizer, read_log
from data.prepare import Parser, fail, load_data, script, within
from sample import add_model_flags, check_vocabulary, generate, load

def hit_and_collision(samples, targets):
    """E[1[a = y]] and E[1[a = b]] of the first 1..4 tokens, over samples and their pairs -> (P, 4) each."""
    S = len(samples)
    samples, targets = samples[..., :4], targets[..., :4]
    hit = (samples == targets).cumprod(-1).float().mean(0)
    same = (samples[:, None] == samples[None]).cumprod(-1).float().sum((0, 1))
    return hit, (same - S) / (S * (S - 1))                         # without a sample's pair with itself

def brier_ngram(samples, targets):
    """Brier-1..4 of each position: independent samples (S, P, >=4), targets (P, >=4) -> (P, 4). Equation 14,
    averaged over all pairs of the S samples (a U-statistic): unbiased, and the paper's estimate at S = 2."""
    hit, same = hit_and_collision(samples, targets)
    return 2 * hit - same

def brierlm(brier):
    """Brier-1..4 (..., 4) -> BrierLM (...): 100 times their geometric mean, 0 where one is not positive."""
    return 100 * np.clip(brier, 0, None).prod(-1) ** 0.25
def agreement(model, h, chunk, S, temperature, **sampling):
    """The chance that a draw given h (B, D) begins as chunk (B, K) -> (B, K): by S samples, for AR exact."""
    if isinstance(model, AR):
        return model.probabilities(h, temperature).gather(-1, chunk)
    return (model.draw(h, temperature, S, **sampling) == chunk).cumprod(-1).float().mean(0)

def score_by_rollout(model, tokens, stride, S, temperature=1.0, **sampling):
    """score_windows where 4 tokens span several steps (AR, and CALM with K < 4): P(y) is a product along the
    truth, sum_x P(x)^2 = E_{a ~ P} P(a) is one along the model's own path a."""
    K = model.chunk_size
    steps = math.ceil(4 / K)
    cache = KVCache(model.config.block_size)
    hidden = model.hidden(tokens[:, :-K], cache)                   # (B, W/K - 1, D)
    scores = []
    # From the last start to the first: a rollout overwrites the cache behind its start, where no other looks.
    for start in reversed(range(stride, tokens.shape[1] - steps * K + 1, stride)):
        cache.length = chunk = start // K
        hit = same = torch.ones(len(tokens), 1, device=tokens.device)   # chance that all earlier steps agree
        hits, sames, path_h = [], [], hidden[:, chunk - 1]
        for step in range(steps):
            truth = tokens[:, start + step * K:start + (step + 1) * K]
            truth_h = hidden[:, chunk - 1 + step]                          # (B, D)
            hits.append(hit * agreement(model, truth_h, truth, S, temperature, **sampling))
            path = model.draw(path_h, temperature, **sampling)[0]  # a's next chunk (B, K)
            along_path = same * agreement(model, path_h, path, S - 1, temperature, **sampling)
            sames.append(along_path)
            if isinstance(model, AR):   # the last token's collision is known exactly: sum_v p(v)^2
                sames[-1] = same * model.probabilities(path_h, temperature).square().sum(-1, keepdim=True)
            hit, same = hits[-1][:, -1:], along_path[:, -1:]
            if step + 1 < steps:
                path_h = model.hidden(path, cache)[:, -1]
        scores.append(torch.stack([torch.cat(part, 1)[:, :4] for part in (hits, sames)]))
    return torch.stack(scores[::-1], dim=2)
def score_windows(model, tokens, stride, S, temperature=1.0, **sampling):
    """E[1[a = y]], E[1[a = b]] of the n-grams, n = 1..4, that start at stride, 2 stride, ... of each window.
    tokens (B, W) -> (2, B, starts, 4). Brier-n is twice the first minus the second."""
    K = model.chunk_size
    if K < 4:
        return score_by_rollout(model, tokens, stride, S, temperature, **sampling)
    every = stride // K
    h = model.hidden(tokens[:, :-K])[:, every - 1::every]          # (B, starts, D)
    targets = tokens.unflatten(1, (-1, K))[:, every::every].flatten(0, 1)   # (B * starts, K)
    samples = model.draw(h.flatten(0, 1), temperature, S, **sampling)       # (S, B * starts, K)
    return torch.stack(hit_and_collision(samples, targets)).unflatten(1, h.shape[:2])

def ngram_stride(K):
    """From one n-gram's start to the next, in tokens: the smallest multiple of K that is at least 4."""
    return K * math.ceil(4 / K)

@torch.inference_mode()
def evaluate(model, data, device, dtype, windows=375, stride=None, context=None, num_draws=4, seed=0,
             progress=False, **sampling):
    """BrierLM on the validation split -> a dict of results, with a standard error: a bootstrap over windows.
    These, of `context` tokens (default: the model's), are spread evenly over the split; n-grams start every
    `stride` tokens (default: ngram_stride of the model's K), at one stride the same for any model, the
    window before as context. num_draws: S, samples a position. sampling: arguments of `CALM.draw`."""
    K = model.chunk_size
    longest, stride = model.config.block_size * K, stride or ngram_stride(K)
    context = context or longest
    if stride % K or context % K or not stride + max(4, K) <= context <= longest:
        fail(f"--stride {stride} and --context {context} must be multiples of the chunk size {K}, "
             f"the context from {stride + max(4, K)} to at most the model's, {longest}")
    offsets, scores = data.even_offsets("val", windows, context), []
    with autocast(device, dtype):
        for i in tqdm(range(0, len(offsets), 32), desc="BrierLM", disable=not progress, leave=False):
            torch.manual_seed((seed << 20) + i)
            tokens = data.batch("val", offsets[i:i + 32], context).to(device)
            scores.append(score_windows(model, tokens, stride, num_draws, **sampling).float().cpu())
    scores = torch.cat(scores, dim=1)                              # (2, windows, starts, 4)
    accuracy, collision = scores.mean(2).double().numpy()          # (windows, 4)
    brier = 2 * accuracy - collision
    resampled = np.random.default_rng(seed).integers(0, len(brier), size=(1000, len(brier)))
    return {"brier": brier.mean(0).tolist(), "brierlm": float(brierlm(brier.mean(0))),
            "stderr": float(brierlm(brier[resampled].mean(1)).std()),
            "accuracy": accuracy.mean(0).tolist(), "collision": collision.mean(0).tolist(),
            "positions": scores.shape[1] * scores.shape[2], "samples": num_draws,
            "context": context, "stride": stride}
def describe(result):
    ngrams = ", ".join(f"Brier-{n} {100 * b:.2f}" for n, b in enumerate(result["brier"], 1))
    return (f"BrierLM {result['brierlm']:.2f} +- {result['stderr']:.2f} ({ngrams}; {result['positions']:,} "
            f"positions, {result['stride']} tokens apart, in windows of {result['context']})")

# --- Beside the score: variety of the text, what a temperature trades, a figure -------------------------
def distinct(texts, n=4):
    """The share of different n-grams among all n-grams of texts (B, length)."""
    ngrams = texts.unfold(1, n, 1).flatten(0, 1)                   # (m, n)
    return len(ngrams.unique(dim=0)) / len(ngrams)

@torch.inference_mode()
def compare_text(model, data, device, dtype, texts=64, seed=0):
    """distinct-4 of the model's continuations of held-out beginnings, and of the real ones."""
    length = min(max(320, 5 * model.chunk_size), model.config.block_size * model.chunk_size)
    windows = data.batch("val", data.even_offsets("val", texts, length), length)
    beginning = max(length // 5 // model.chunk_size, 1) * model.chunk_size
    torch.manual_seed(seed)
    with autocast(device, dtype):   # without eot: on past any end-of-text
        made = generate(model, windows[:, :beginning].to(device), length - beginning)
    return distinct(made[:, beginning:].cpu()), distinct(windows[:, beginning:])
def frontier(args, measure):
    """Accuracy and collision rate (figures 10 and 11), geometric means over n = 1..4, for each setting."""
    print("temperature  candidates   accuracy  collision    BrierLM")
    temperatures = args.temperatures or (1, 0.8, 0.65, 0.5, 0.33)
    for N, T in [(N, T) for N in args.candidates or [200] for T in temperatures]:
        if N < 1 / T:
            print(f"{T:11.2f}  {N:10}  too few candidates: at least 1/T")
            continue
        result = measure(temperature=T, num_candidates=N)
        point = {name: float(brierlm(np.array(result[name]))) / 100 for name in ("accuracy", "collision")}
        point["brierlm"] = result["brierlm"]
        print(f"{T:11.2f}  {N:10}  " + "  ".join(f"{value:9.4f}" for value in point.values()))
        if args.json:
            print(json.dumps({"temperature": T, "num_candidates": N, **point, "stderr": result["stderr"]}))
def curves(folder, x="flops"):
    """The evaluations in a run's log -> {stage: [(x, BrierLM, the run's name), ...]}; in a folder of runs,
    the last of each. x: "flops" in training, or "inference_flops" a token, known of the last alone."""
    runs, found = sorted(Path(folder).glob("*/log.jsonl")), {}
    for path in runs or Path(folder).glob("log.jsonl"):
        entries = [e for e in read_log(path) if "brierlm" in e and e.get(x, 0) > 0]
        for entry in {e["stage"]: e for e in entries if "final" in e}.values() if runs else entries:
            found.setdefault(entry["stage"], []).append((entry[x], entry["brierlm"], path.parent.name))
    if not found:
        fail(f"{folder} has no evaluation with BrierLM yet, or is no run: train, or lower --eval_interval")
    return {stage: sorted(points) for stage, points in found.items()}
def plot(path, folders, x):
    """Write BrierLM over x to a new SVG: a line for each run or folder of runs, and its name, best first."""
    lines = [(points, Path(run).name + " (AR)" * (stage == "ar"))
             for run in folders for stage, points in curves(run, x).items()]
    xs, scores, _ = zip(*(point for points, _ in lines for point in points))
    low, top, span = min(xs), max(*scores, 1), max(math.log2(max(xs) / min(xs)), 1)   # in doublings
    def place(value, score):   # on a sheet of 720 x 420
        return 50 + 620 * math.log2(value / low) / span, 380 - 360 * score / top
    def text(x, y, content, color="black"):
        return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}">{escape(str(content))}</text>'
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 420" font-family="sans-serif" '
           'font-size="13"><rect width="720" height="420" fill="white"/>', text(50, 14, "BrierLM"),
           text(310, 416, "training FLOPs" if x == "flops" else "inference FLOPs a token")]
    svg += [text(20, place(low, score)[1], score) for score in range(0, int(top) + 1, 5)]
    svg += [text(place(tick, 0)[0] - 20, 400, f"{tick:.1e}") for tick in low * 2 ** np.linspace(0, span, 7)]
    for i, (points, name) in enumerate(sorted(lines, key=lambda line: -line[0][-1][1])):
        color, corners = f"hsl({360 * i // len(lines)}, 70%, 40%)", [place(*point[:2]) for point in points]
        svg += [f'<polyline points="{" ".join("%.1f,%.1f" % corner for corner in corners)}" fill="none" '
                f'stroke="{color}" stroke-width="2"/>', text(70, 30 + 16 * i, name, color)]
        svg += [text(cx - 5, cy + 5, "\u25cf " + run * (x != "flops"), color)
                for (cx, cy), (*_, run) in zip(corners, points)]
    with open(path, "x", encoding="utf-8", errors="replace") as file:   # never over another file
        file.write("\n".join([*svg, "</svg>"]) + "\n")
    print(f"{len(lines)} curves in {path}")

@script("lower --num_draws or --context")
def main():
    parser = Parser(description="BrierLM of a checkpoint, with a standard error.")
    add = parser.add_argument
    add_model_flags(add)
    add("--data", help="data set under data/; None: the one it was trained on")
    add("--windows", type=within(1), help="validation windows; None: 375, or 32 with --frontier")
    add("--num_draws", type=within(2, 1000), default=4, help="S: samples a position, at least 2")
    add("--stride", type=within(4), help="tokens from one n-gram's start to the next; None: the run's")
    add("--context", type=within(8), help="tokens a window; None: the model's context")
    add("--frontier", action="store_true", help="accuracy and collision rate of each sampler setting below")
    add("--temperatures", type=within(1e-6, 1, float), nargs="+", help="of --frontier; None: 1 to 0.33")
    add("--candidates", type=within(1, 1 << 20), nargs="+", help="of --frontier: N of batch; None: 200")
    add("--plot", nargs="+", metavar=("SVG", "RUN"), help="draw the logs of runs, or of folders of runs")
    add("--x", default="flops", choices=("flops", "inference_flops"), help="of --plot: a run's, a token's")
    add("--json", action="store_true", help="end with one JSON object on a line; --frontier: one a row")
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot[0], args.plot[1:] or [args.out_dir], args.x)
    if (args.temperatures or args.candidates) and not args.frontier:
        fail("--temperatures and --candidates are for --frontier: add it")
    if args.official and not args.data:
        fail("--official needs --data, prepared with the model's tokenizer")
    model, checkpoint, device, dtype = load(args)
    data = load_data(args.data or checkpoint["data"]["name"])
    if args.official:
        check_vocabulary(model, data.tokenizer)
    else:
        load_tokenizer(checkpoint, data)   # which must be the same
        args.stride = args.stride or checkpoint["settings"]["stride"]   # the baseline's is CALM's
    def measure(progress=True, **sampling):
        windows = args.windows or (32 if args.frontier else 375)
        return evaluate(model, data, device, dtype, windows, args.stride, args.context, args.num_draws,
                        args.seed, progress, **sampling)
    if args.frontier:
        return frontier(args, measure)
    print(describe(result := measure()))
    for name in ("accuracy", "collision"):
        print(f"{name:9} of 1 .. 4 tokens  " + "  ".join(f"{value:.4f}" for value in result.pop(name)))
    made, real = compare_text(model, data, device, dtype, seed=args.seed)
    print(f"distinct-4 of its text {made:.4f}, of real text {real:.4f}")
    if args.json:
        print(json.dumps({**result, "step": checkpoint["step"] if checkpoint else None}))

if __name__ == "__main__":
    main()
