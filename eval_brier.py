"""
BrierLM: how well does a model predict, judged from its samples alone (paper section 4)?

    python eval_brier.py                        # the CALM in out/stdlib, with a standard error
    python eval_brier.py --model ar             # the token-by-token baseline at the same positions
    python eval_brier.py --num_samples 2 --json # the paper's two-sample estimate
    python eval_brier.py --frontier             # accuracy against collision rate, over temperatures
    python eval_brier.py --plot curves.svg out/*   # BrierLM over training FLOPs, from the log of each run

The Brier score of a forecast P for an outcome y is 2 P(y) - sum_x P(x)^2: highest in expectation when P is the truth,
as the likelihood's, but it needs no probabilities: P(y) is how often a sample hits y, sum_x P(x)^2 how often two samples
are equal. Brier-n takes n-grams as outcomes; BrierLM = 100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4).
"""
import json
import math
import signal
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from autoencoder import autocast, check_tokenizer, select_device, select_dtype
from calm import AR, KVCache, check_vocabulary, generate, load_model, load_official
from data.prepare import Parser, fail, load_data, within


def hit_and_collision(samples, targets):
    """E[1[a = y]] and E[1[a = b]] of the first 1..4 tokens, over S samples (S, P, >=4) and their pairs -> (P, 4) each."""
    S = len(samples)
    samples, targets = samples[..., :4], targets[..., :4]
    hit = (samples == targets).cumprod(-1).float().mean(0)
    same = (samples[:, None] == samples[None]).cumprod(-1).float().sum((0, 1))
    return hit, (same - S) / (S * (S - 1))                                    # without the S pairs of a sample with itself


def brier_ngram(samples, targets):
    """Brier-1..4 of each position: samples (S, P, >=4) drawn independently, targets (P, >=4) -> (P, 4).

    Equation 14 averaged over all pairs of the S samples (a U-statistic): unbiased, and the paper's estimate at S = 2.
    """
    hit, same = hit_and_collision(samples, targets)
    return 2 * hit - same


def geometric_mean(x):
    """(..., 4) -> (...), 0 where a factor is not positive."""
    return np.clip(x, 0, None).prod(-1) ** 0.25


def brierlm(brier):
    """Brier-1..4 (..., 4) -> BrierLM (...): 100 times their geometric mean."""
    return 100 * geometric_mean(brier)


def agreement(model, h, chunk, S, temperature, **sampling):
    """The chance that a draw given h (B, D) begins with the first 1..K tokens of chunk (B, K) -> (B, K).

    Estimated from S samples for CALM, exact for AR (K = 1)."""
    if isinstance(model, AR):
        return model.probabilities(h, temperature).gather(-1, chunk)
    return (model.draw(h, temperature, S, **sampling) == chunk).cumprod(-1).float().mean(0)


def score_by_rollout(model, tokens, stride, S, temperature=1.0, **sampling):
    """The same as score_windows where 4 tokens span several steps (AR, and CALM with K < 4).

    P(y) is a product along the truth; sum_x P(x)^2 = E_{a ~ P} P(a) is a product along the model's own path a.
    """
    K = model.chunk_size
    steps = math.ceil(4 / K)
    cache = KVCache(model.config.block_size)
    hidden = model.hidden(tokens[:, :-K], cache)                              # (B, W/K - 1, D)
    scores = []
    # From the last start to the first: rolling out overwrites the cache behind a start, where no later one looks.
    for start in reversed(range(stride, tokens.shape[1] - steps * K + 1, stride)):
        cache.length = first = start // K
        hit = same = torch.ones(len(tokens), 1, device=tokens.device)         # chance that all earlier steps agree
        hits, sames = [], []
        path_h = hidden[:, first - 1]
        for step in range(steps):
            truth = tokens[:, start + step * K:start + (step + 1) * K]
            hits.append(hit * agreement(model, hidden[:, first - 1 + step], truth, S, temperature, **sampling))
            path = model.draw(path_h, temperature, **sampling)[0]             # a's next chunk (B, K)
            along_path = same * agreement(model, path_h, path, S - 1, temperature, **sampling)
            if isinstance(model, AR):   # the last token's collision is known exactly: sum_v p(v)^2
                sames.append(same * model.probabilities(path_h, temperature).square().sum(-1, keepdim=True))
            else:
                sames.append(along_path)
            hit, same = hits[-1][:, -1:], along_path[:, -1:]
            if step + 1 < steps:
                path_h = model.hidden(path, cache)[:, -1]
        scores.append(torch.stack([torch.cat(part, 1)[:, :4] for part in (hits, sames)]))
    return torch.stack(scores[::-1], dim=2)


def score_windows(model, tokens, stride, S, temperature=1.0, **sampling):
    """E[1[a = y]] and E[1[a = b]] of the n-grams that start at stride, 2 stride, ... of each window, n = 1..4.

    tokens (B, W) -> (2, B, starts, 4). Brier-n is twice the first minus the second."""
    K = model.chunk_size
    if K < 4:
        return score_by_rollout(model, tokens, stride, S, temperature, **sampling)
    every = stride // K
    h = model.hidden(tokens[:, :-K])[:, every - 1::every]                     # (B, starts, D)
    targets = tokens.unflatten(1, (-1, K))[:, every::every].flatten(0, 1)     # (B * starts, K)
    samples = model.draw(h.flatten(0, 1), temperature, S, **sampling)         # (S, B * starts, K)
    return torch.stack(hit_and_collision(samples, targets)).unflatten(1, h.shape[:2])


def ngram_stride(K):
    """From one n-gram's start to the next, in tokens: the smallest multiple of K that is at least 4."""
    return K * math.ceil(4 / K)


@torch.inference_mode()
def evaluate(model, data, device, dtype, windows=375, num_samples=4, stride=None, context=None, seed=0, progress=False,
             **sampling):
    """BrierLM on the validation split -> {"brier", "brierlm", "stderr", "accuracy", "collision", "positions", "samples"}.

    Windows of `context` tokens (default: the model's) are spread evenly over the split; n-grams start every `stride`
    tokens (default: ngram_stride of the model's K) with all of the window before them as context.
    Equal windows, stride and context give equal positions, whatever the model. The standard error is a bootstrap over
    windows, because positions of one window are not independent. sampling: a temperature and other arguments of
    `CALM.draw`. Under torchrun the processes share the windows: call it on all of them.
    """
    K = model.chunk_size
    stride = stride or ngram_stride(K)
    context = context or model.config.block_size * K
    if stride % K or context % K:
        fail(f"--stride {stride} and --context {context} must be multiples of the chunk size {K}")
    if context > model.config.block_size * K:
        fail(f"--context {context} is longer than the model's own, {model.config.block_size * K} tokens")
    if context < stride + max(4, K):
        fail(f"--context {context} is too short for an n-gram after {stride} tokens")
    offsets = data.even_offsets("val", windows, context)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = {}
    with autocast(device, dtype):
        for i in tqdm(range(32 * rank, len(offsets), 32 * size), desc="BrierLM", disable=not progress, leave=False):
            torch.manual_seed((seed << 20) + i)   # the same samples, however the windows are shared
            tokens = data.batch("val", offsets[i:i + 32], context).to(device)
            scores[i] = score_windows(model, tokens, stride, num_samples, **sampling).float().cpu()
    if size > 1:
        parts = [None] * size
        dist.all_gather_object(parts, scores)
        scores = {i: score for part in parts for i, score in part.items()}
    scores = torch.cat([scores[i] for i in sorted(scores)], dim=1)            # (2, windows, starts, 4)
    accuracy, collision = scores.mean(2).double().numpy()                     # (windows, 4)
    brier = 2 * accuracy - collision
    resampled = np.random.default_rng(seed).integers(0, len(brier), size=(1000, len(brier)))
    return {"brier": brier.mean(0).tolist(), "brierlm": float(brierlm(brier.mean(0))),
            "stderr": float(brierlm(brier[resampled].mean(1)).std()),
            "accuracy": accuracy.mean(0).tolist(), "collision": collision.mean(0).tolist(),
            "positions": scores.shape[1] * scores.shape[2], "samples": num_samples}


def describe(result):
    ngrams = ", ".join(f"Brier-{n} {100 * b:.2f}" for n, b in enumerate(result["brier"], 1))
    return f"BrierLM {result['brierlm']:.2f} +- {result['stderr']:.2f} ({ngrams}; {result['positions']:,} positions)"


# --- Is the model's text as varied as real text? ----------------------------------------------------------------------

def variety(texts):
    """texts (B, length) -> {"distinct", "collision"}, each for n = 1..4: the share of different n-grams among all of them,
    and the chance that two of them, picked at random, are equal."""
    distinct, collision = [], []
    for n in range(1, 5):
        ngrams = texts.unfold(1, n, 1).flatten(0, 1)                          # (m, n)
        m, count = len(ngrams), ngrams.unique(dim=0, return_counts=True)[1].double()
        distinct.append(len(count) / m)
        collision.append(((count * (count - 1)).sum() / (m * (m - 1))).item())
    return {"distinct": distinct, "collision": collision}


@torch.inference_mode()
def compare_text(model, data, device, dtype, texts=64, seed=0):
    """The model's continuations of held-out beginnings beside the real ones -> {"generated", "real"}, a `variety` each."""
    K, context = model.chunk_size, model.config.block_size * model.chunk_size
    window = min(320, context) // K * K
    windows = data.batch("val", data.even_offsets("val", texts, window), window)
    begin = max(window // 5 // K, 1) * K
    torch.manual_seed(seed)
    with autocast(device, dtype):
        made = generate(model, windows[:, :begin].to(device), window - begin)   # on past any end-of-text
    return {"generated": variety(made[:, begin:].cpu()), "real": variety(windows[:, begin:])}


def show_text(found):
    print(f"{'':16}{'distinct-1 .. 4':32}collision-1 .. 4")
    for name, text in found.items():
        print(f"{name + ' text':16}" + "".join(f"{x:<8.4f}" for x in text["distinct"] + text["collision"]))


# --- The frontier: what a temperature trades (section 5, figures 10 and 11) -------------------------------------------

def frontier(model, args, measure):
    """Accuracy and collision rate, geometric means over n = 1..4, at every setting of the sampler: a table, or JSON lines."""
    if args.model == "ar":
        settings = [{"temperature": T} for T in args.temperatures]
    else:
        settings = [{"temperature": T, "num_candidates": N} for N in args.candidates for T in args.temperatures
                    if T < 1 and N >= 1 / T]
        settings = [{"temperature": 1.0}, *settings, *({"noise_scale": scale} for scale in args.noise_scales)]
    print("temperature  candidates  noise  accuracy  collision  BrierLM")
    for setting in settings:
        result = measure(**setting)
        accuracy, collision = (float(geometric_mean(np.array(result[name]))) for name in ("accuracy", "collision"))
        print(f"{setting.get('temperature', 1.0):11.2f}  {setting.get('num_candidates', 1):10}  {setting.get('noise_scale', 1.0):5.2f}  "
              f"{accuracy:8.4f}  {collision:9.4f}  {result['brierlm']:7.2f}")
        if args.json:
            print(json.dumps({**setting, "accuracy": accuracy, "collision": collision, "brierlm": result["brierlm"],
                              "stderr": result["stderr"]}))


# --- A figure: BrierLM over training FLOPs, from the log of each run ---------------------------------------------------

def curves(folder):
    """The evaluations in a run's log.jsonl -> {stage: [(training FLOPs, BrierLM), ...]}; CALM's FLOPs include its autoencoder's."""
    path, found = Path(folder) / "log.jsonl", {}
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]   # not a torn last line
        for entry in entries:
            if "brierlm" in entry:
                found.setdefault(entry["stage"], []).append((entry["flops"], entry["brierlm"]))
    except (OSError, ValueError, KeyError) as error:
        fail(f"{path} is not the log of a run ({type(error).__name__}: {error}): give folders that train.py wrote")
    if not found:
        fail(f"{path} has no evaluation with BrierLM yet: train longer, or with a smaller --eval_interval")
    return found


def plot(path, folders, width=720, height=420):
    """Write the curves of some runs to an SVG: a line for each, with its name at its end."""
    lines = [(Path(folder).name, stage, points) for folder in folders for stage, points in curves(folder).items()]
    top_x, top_y = (max(point[i] for *_, points in lines for point in points) for i in (0, 1))
    unit = 10 ** math.floor(math.log10(top_x))
    # Around the curves: 50 units on the left for the scores, 120 on the right for the names, 20 above, 40 below for the FLOPs.
    x = lambda flops: 50 + flops / top_x * (width - 170)
    y = lambda score: height - 40 - score / max(top_y, 1) * (height - 60)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    for score in range(0, int(top_y) + 1, 5):
        svg.append(f'<path d="M50 {y(score):.1f}H{x(top_x):.1f}" stroke="#ddd"/><text x="42" y="{y(score) + 4:.1f}" '
                   f'text-anchor="end">{score}</text>')
    for i in range(int(top_x / unit) + 1):
        svg.append(f'<text x="{x(i * unit):.1f}" y="{height - 20}" text-anchor="middle">{i}</text>')
    svg.append(f'<text x="50" y="14">BrierLM</text><text x="{x(top_x):.1f}" y="{height - 4}" text-anchor="end">'
               f'training FLOPs, x {unit:.0e}</text>')
    lowest = height   # labels from the lowest curve's end to the highest, 15 units apart where the ends are closer
    for i, (run, stage, points) in enumerate(sorted(lines, key=lambda line: line[2][-1][1])):
        color, dash = f"hsl({360 * i // len(lines)}, 70%, 40%)", ' stroke-dasharray="5 4"' if stage == "ar" else ""
        lowest = min(lowest - 15, y(points[-1][1]) + 4)
        svg.append(f'<polyline points="{" ".join(f"{x(flops):.1f},{y(score):.1f}" for flops, score in points)}" fill="none" '
                   f'stroke="{color}" stroke-width="2"{dash}/><text x="{x(points[-1][0]) + 6:.1f}" y="{lowest:.1f}" '
                   f'fill="{color}">{escape(run)}{" (AR)" if stage == "ar" else ""}</text>')
    try:
        Path(path).write_text("\n".join([*svg, "</svg>"]) + "\n")
    except OSError as error:
        fail(f"could not write {path} ({error.strerror}): name a file in a folder that exists")
    print(f"{len(lines)} curves in {path}")


def main():
    parser = Parser(description="BrierLM of a checkpoint, with a standard error.")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder")
    parser.add_argument("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    parser.add_argument("--official", metavar="DIR", help="a model that the authors published, in place of a run; with --data")
    parser.add_argument("--data", help="data set under data/; None: the one it was trained on")
    parser.add_argument("--windows", type=within(1), help="validation windows, evenly spread; None: 375, or 32 with --frontier")
    parser.add_argument("--num_samples", type=within(2), default=4, help="S: samples a position, at least 2")
    parser.add_argument("--stride", type=within(4), help="tokens from one n-gram's start to the next; None: K of the run, at least 4")
    parser.add_argument("--context", type=within(8), help="tokens a window; None: the model's context")
    parser.add_argument("--texts", type=within(0), default=64, help="texts to write, to compare with real text; 0: none")
    parser.add_argument("--num_evals", type=within(1), help="of a flow or diffusion head: evaluations a sample")
    parser.add_argument("--frontier", action="store_true", help="accuracy and collision rate of each sampler setting below")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.65, 0.5, 0.4, 0.33], help="of --frontier")
    parser.add_argument("--candidates", type=within(1), nargs="+", default=[200], help="of --frontier: N of Algorithm 2")
    parser.add_argument("--noise_scales", type=within(0, 1, float), nargs="*", default=[0.8, 0.6, 0.4], help="of --frontier")
    parser.add_argument("--plot", nargs="+", metavar=("SVG", "RUN"), help="evaluate nothing; draw the curves of runs' log.jsonl")
    parser.add_argument("--seed", type=within(0), default=0, help="of the samples")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line; with --frontier one a setting")
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot[0], args.plot[1:] or [args.out_dir])
    args.windows = args.windows if args.windows is not None else 32 if args.frontier else 375
    if not all(0 < T <= 1 for T in args.temperatures):
        fail("--temperatures must be in (0, 1]")
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    changes = {"num_evals": args.num_evals} if args.num_evals else {}
    if args.official:
        if not args.data or args.model == "ar":
            fail("--official names a CALM and needs --data, prepared with its tokenizer")
        model, checkpoint = load_official(args.official, device, dtype, **changes), {"step": None}
        data = load_data(args.data)
        check_vocabulary(model, data.tokenizer)
    else:
        model, checkpoint = load_model(args.out_dir, args.model, device, dtype, **changes)
        data = load_data(args.data or checkpoint["data"]["name"])
        check_tokenizer(checkpoint, data)
        args.stride = args.stride or ngram_stride(checkpoint["settings"]["chunk_size"])   # the baseline where CALM is asked
    measure = partial(evaluate, model, data, device, dtype, args.windows, args.num_samples, args.stride, args.context, args.seed,
                      True)
    if args.frontier:
        return frontier(model, args, measure)
    result = measure()
    print(describe(result))
    more = {name: result.pop(name) for name in ("accuracy", "collision")}
    print("accuracy of 1..4 tokens  " + "  ".join(f"{a:.4f}" for a in more["accuracy"])
          + "    collision rate  " + "  ".join(f"{c:.4f}" for c in more["collision"]))
    if args.texts:
        more["text"] = compare_text(model, data, device, dtype, args.texts, args.seed)
        show_text(more["text"])
    if args.json:
        print(json.dumps(more))
        print(json.dumps({**result, "step": checkpoint["step"]}))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends it at once, without a traceback
    main()
