"""
BrierLM: how well does a model predict, judged from its samples alone (paper section 4)?

    python eval_brier.py                        # the CALM in out/stdlib, with a standard error
    python eval_brier.py --model ar             # the token-by-token baseline at the same positions
    python eval_brier.py --num_samples 2 --json # the paper's two-sample estimate

The Brier score of a forecast P for an outcome y is 2 P(y) - sum_x P(x)^2: highest in expectation when P is the truth,
as the likelihood's, but it needs no probabilities: P(y) is how often a sample hits y, sum_x P(x)^2 how often two samples
are equal. Brier-n takes n-grams as outcomes; BrierLM = 100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4).
"""
import json
import math

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from autoencoder import autocast, check_tokenizer, select_device, select_dtype
from calm import AR, KVCache, load_model
from data.prepare import Parser, fail, load_data


def brier_ngram(samples, targets):
    """Brier-1..4 of each position: samples (S, P, >=4) drawn independently, targets (P, >=4) -> (P, 4).

    Equation 14 averaged over all pairs of the S samples (a U-statistic): unbiased, and the paper's estimate at S = 2.
    """
    S = len(samples)
    samples, targets = samples[..., :4], targets[..., :4]
    hit = (samples == targets).cumprod(-1).float().mean(0)                    # first n tokens right, (P, 4)
    same = (samples[:, None] == samples[None]).cumprod(-1).float().sum((0, 1))
    return 2 * hit - (same - S) / (S * (S - 1))                               # minus the S pairs of a sample with itself


def brierlm(brier):
    """Brier-1..4 (..., 4) -> BrierLM (...): 100 times the geometric mean, 0 where a factor is not positive."""
    return 100 * np.clip(brier, 0, None).prod(-1) ** 0.25


def agreement(model, h, chunk, S):
    """The chance that a draw given h (B, D) begins with the first 1..K tokens of chunk (B, K) -> (B, K).

    Estimated from S samples for CALM, exact for AR (K = 1)."""
    if isinstance(model, AR):
        return model.lm_head(h).float().softmax(-1).gather(-1, chunk)
    return (model.sample_chunks(h, S) == chunk).cumprod(-1).float().mean(0)


def brier_by_rollout(model, tokens, stride, S):
    """Brier-1..4 where 4 tokens span several steps (AR, and CALM with K < 4): tokens (B, W) -> (B, starts, 4).

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
            hits.append(hit * agreement(model, hidden[:, first - 1 + step], truth, S))
            path = model.draw(path_h)                                         # a's next chunk (B, K)
            along_path = same * agreement(model, path_h, path, S - 1)
            if isinstance(model, AR):   # the last token's collision is known exactly: sum_v p(v)^2
                sames.append(same * model.lm_head(path_h).float().softmax(-1).square().sum(-1, keepdim=True))
            else:
                sames.append(along_path)
            hit, same = hits[-1][:, -1:], along_path[:, -1:]
            if step + 1 < steps:
                path_h = model.hidden(path, cache)[:, -1]
        scores.append(2 * torch.cat(hits, 1)[:, :4] - torch.cat(sames, 1)[:, :4])
    return torch.stack(scores, dim=1)


def brier_of_windows(model, tokens, stride, S):
    """Brier-1..4 at the token offsets stride, 2 stride, ... of each window: tokens (B, W) -> (B, starts, 4)."""
    K = model.chunk_size
    if K < 4:
        return brier_by_rollout(model, tokens, stride, S)
    every = stride // K
    h = model.hidden(tokens[:, :-K])[:, every - 1::every]                     # (B, starts, D)
    targets = tokens.unflatten(1, (-1, K))[:, every::every]                   # (B, starts, K)
    samples = model.sample_chunks(h, S)                                       # (S, B, starts, K)
    return brier_ngram(samples.flatten(1, 2), targets.flatten(0, 1)).unflatten(0, h.shape[:2])


@torch.inference_mode()
def evaluate(model, data, device, dtype, windows=750, num_samples=4, stride=None, context=None, seed=0, progress=False):
    """BrierLM on the validation split -> {"brier", "brierlm", "stderr", "positions", "samples"}.

    Windows of `context` tokens (default: the model's) are spread evenly over the split; n-grams start every `stride`
    tokens (default: the smallest multiple of K that is at least 4) with all of the window before them as context.
    Equal windows, stride and context give equal positions, whatever the model. The standard error is a bootstrap over
    windows, because positions of one window are not independent. Under torchrun the processes share the windows: call it
    on all of them.
    """
    K = model.chunk_size
    stride = stride or K * math.ceil(4 / K)
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
            scores[i] = brier_of_windows(model, tokens, stride, num_samples).float().cpu()
    if size > 1:
        parts = [None] * size
        dist.all_gather_object(parts, scores)
        scores = {i: score for part in parts for i, score in part.items()}
    scores = torch.cat([scores[i] for i in sorted(scores)])                   # (windows, starts, 4)
    by_window = scores.mean(1).double().numpy()
    resampled = np.random.default_rng(seed).integers(0, len(by_window), size=(1000, len(by_window)))
    return {"brier": by_window.mean(0).tolist(), "brierlm": float(brierlm(by_window.mean(0))),
            "stderr": float(brierlm(by_window[resampled].mean(1)).std()),
            "positions": scores.shape[0] * scores.shape[1], "samples": num_samples}


def describe(result):
    ngrams = ", ".join(f"Brier-{n} {100 * b:.2f}" for n, b in enumerate(result["brier"], 1))
    return f"BrierLM {result['brierlm']:.2f} +- {result['stderr']:.2f} ({ngrams}; {result['positions']:,} positions)"


def main():
    parser = Parser(description="BrierLM of a checkpoint, with a standard error.")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder")
    parser.add_argument("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    parser.add_argument("--data", help="data set under data/; None: the one it was trained on")
    parser.add_argument("--windows", type=int, default=750, help="validation windows, evenly spread (fewer if the text is short)")
    parser.add_argument("--num_samples", type=int, default=4, help="S: samples a position, at least 2")
    parser.add_argument("--stride", type=int, help="tokens from one n-gram's start to the next; None: K, at least 4")
    parser.add_argument("--context", type=int, help="tokens a window; None: the model's context")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    args = parser.parse_args()
    for name, least in (("windows", 1), ("num_samples", 2), ("stride", 4), ("context", 8), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name} must be at least {least}, not {getattr(args, name)}")
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    model, checkpoint = load_model(args.out_dir, args.model, device, dtype)
    data = load_data(args.data or checkpoint["data"]["name"])
    check_tokenizer(checkpoint, data)
    result = evaluate(model, data, device, dtype, args.windows, args.num_samples, args.stride, args.context, args.seed,
                      progress=True)
    print(describe(result))
    if args.json:
        print(json.dumps({**result, "step": checkpoint["step"]}))


if __name__ == "__main__":
    main()
