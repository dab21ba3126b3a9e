"""
BrierLM: how well does a model predict, judged from its samples alone (section 4 of the paper)?

    python eval_brier.py                            # BrierLM of the default run
    python eval_brier.py --frontier                 # accuracy and collision over temperatures
    python eval_brier.py --plot curves.svg out/*    # BrierLM over training FLOPs, from logs

The Brier score of a forecast P for an outcome y is 2 P(y) - sum_x P(x)^2. Its expectation is
highest when P is the truth. It needs no probabilities: P(y) is how often a sample equals y, and
sum_x P(x)^2 is how often two samples equal each other, the collision rate. The outcomes of Brier-n
are n-grams; BrierLM is 100 times the geometric mean of Brier-1 to Brier-4.

Shapes: S samples, P positions, B windows of W tokens, K tokens in a chunk, D width of h.
"""
import json
import math

import numpy as np
import torch
from tqdm import tqdm

from calm import AR, KVCache
from data.checkpoint import check_tokenizer
from data.console import Parser, clean_end, fail, within
from data.figure import plot
from data.machine import autocast
from data.prepare import load_data
from sample import add_model_flags, check_vocabulary, draw, generate, load


# --- The score -----------------------------------------------------------------------------


def hit_and_collision(samples, targets):
    """E[1[a = y]] and E[1[a = b]] of the first 1..4 tokens, over all samples a and pairs a, b.

    samples (S, P, >=4), targets (P, >=4) -> (P, 4) each
    """
    S = len(samples)
    samples = samples[..., :4]
    targets = targets[..., :4]
    # The cumulative product over tokens is 1 as long as all tokens so far are equal.
    hit = (samples == targets).cumprod(-1).float().mean(0)                  # (P, 4)
    equal = (samples[:, None] == samples[None]).cumprod(-1).float()         # (S, S, P, 4)
    pairs = equal.sum((0, 1)) - S                                  # without a sample and itself
    return hit, pairs / (S * (S - 1))


def brier_ngram(samples, targets):
    """Brier-1..4 at each position (equation 14): samples (S, P, >=4), targets (P, >=4) -> (P, 4).

    The mean over all pairs of the S samples, a U-statistic: unbiased, and for S = 2 the paper's.
    """
    hit, collision = hit_and_collision(samples, targets)
    return 2 * hit - collision


def brierlm(brier):
    """Brier-1..4 (..., 4) -> BrierLM (...): 100 times their geometric mean, 0 if one is below 0."""
    return 100 * np.clip(brier, 0, None).prod(-1) ** 0.25


def score_windows(model, tokens, stride, S, temperature=1.0, **sampling):
    """E[1[a = y]] and E[1[a = b]] of the n-grams, n = 1..4, that start at stride, 2 stride, ...
    of each window: tokens (B, W) -> (2, B, starts, 4). sampling: other arguments of `draw`."""
    K = model.chunk_size
    if K < 4:
        return score_by_rollout(model, tokens, stride, S, temperature, **sampling)
    every = stride // K                                            # in chunks
    h = model.hidden(tokens[:, :-K])[:, every - 1::every]          # (B, starts, D)
    targets = tokens.unflatten(1, (-1, K))[:, every::every]        # (B, starts, K)
    samples = draw(model, h.flatten(0, 1), temperature, S, **sampling)      # (S, B * starts, K)
    scores = hit_and_collision(samples, targets.flatten(0, 1))
    return torch.stack(scores).unflatten(1, h.shape[:2])


def score_by_rollout(model, tokens, stride, S, temperature=1.0, **sampling):
    """`score_windows` where four tokens take several steps: for AR, and for CALM with K < 4.

    A step draws one chunk, so the probability of an n-gram is a product over steps:

        E[1[a = y]] = P(y), along the true text y
        E[1[a = b]] = sum_x P(x)^2 = E_{a ~ P}[P(a)], along a text a that the model draws itself
    """
    K = model.chunk_size
    steps = math.ceil(4 / K)
    starts = range(stride, tokens.shape[1] - steps * K + 1, stride)
    cache = KVCache(model.config.block_size)
    hidden = model.hidden(tokens[:, :-K], cache)                   # (B, W/K - 1, D)
    chunks = tokens.unflatten(1, (-1, K))                          # (B, W/K, K)
    scores = []
    # From the last start to the first: the cache after a start is overwritten by what the model
    # draws there, and an earlier start does not look at it.
    for start in reversed(starts):
        chunk = start // K                                         # is predicted by h of chunk - 1
        cache.length = chunk
        scores.append(score_start(model, cache, hidden[:, chunk - 1:chunk - 1 + steps],
                                  chunks[:, chunk:chunk + steps], S, temperature, **sampling))
    return torch.stack(scores[::-1], dim=2)                        # (2, B, starts, 4)


def score_start(model, cache, hidden, truth, S, temperature, **sampling):
    """The n-grams that begin at one start: hidden (B, steps, D) predict the true chunks, truth
    (B, steps, K) -> (2, B, 4). The cache holds what comes before."""
    P_y = torch.ones(len(truth), 1, device=truth.device)     # probability of the true steps so far
    P_a = torch.ones(len(truth), 1, device=truth.device)     # probability of the drawn steps so far
    hits = []                                                # for each length of an n-gram
    collisions = []
    h_a = hidden[:, 0]                                       # h along the drawn text
    for step in range(truth.shape[1]):
        agree = agreement(model, hidden[:, step], truth[:, step], S, temperature, **sampling)
        hits.append(P_y * agree)                                   # (B, K)
        P_y = P_y * agree[:, -1:]

        a = draw(model, h_a, temperature, **sampling)[0]           # (B, K): the next drawn chunk
        agree = agreement(model, h_a, a, S - 1, temperature, **sampling)
        if isinstance(model, AR):   # for one token the sum over all x is known exactly
            p = model.probabilities(h_a, temperature)              # (B, V)
            collisions.append(P_a * p.square().sum(-1, keepdim=True))
        else:
            collisions.append(P_a * agree)                         # (B, K)
        P_a = P_a * agree[:, -1:]
        if step + 1 < truth.shape[1]:
            h_a = model.hidden(a, cache)[:, -1]                    # (B, D)
    return torch.stack([torch.cat(hits, 1)[:, :4], torch.cat(collisions, 1)[:, :4]])


def agreement(model, h, chunk, S, temperature, **sampling):
    """The chance that a draw given h (B, D) begins as chunk (B, K) does, for each length
    -> (B, K). From S samples; for AR exact."""
    if isinstance(model, AR):
        return model.probabilities(h, temperature).gather(-1, chunk)
    samples = draw(model, h, temperature, S, **sampling)           # (S, B, K)
    return (samples == chunk).cumprod(-1).float().mean(0)


def ngram_stride(K):
    """From one n-gram's start to the next, in tokens: the least multiple of K from 4 on."""
    return K * math.ceil(4 / K)


@torch.inference_mode()
def evaluate(model, data, device, dtype, windows=375, stride=None, context=None, num_draws=4,
             seed=0, progress=False, **sampling):
    """BrierLM on the validation split -> dict of results, with a standard error.

    windows: of `context` tokens each (default: the model's context), spread evenly over the split.
    stride: from one n-gram's start to the next, in tokens (default: ngram_stride of the model's K).
    Each n-gram has the window before it as context. At one stride it is the same n-grams for any
    model. num_draws: S, samples per position. sampling: other arguments of `draw`.
    """
    K = model.chunk_size
    longest = model.config.block_size * K
    stride = stride or ngram_stride(K)
    context = context or longest
    shortest = stride + max(4, K)
    if stride % K or context % K or not shortest <= context <= longest:
        fail(f"--stride {stride} and --context {context} must be multiples of the chunk size {K}, "
             f"the context from {shortest} to at most the model's, {longest}")

    offsets = data.even_offsets("val", windows, context)
    scores = []
    with autocast(device, dtype):
        batches = range(0, len(offsets), 32)
        for i in tqdm(batches, desc="BrierLM", disable=not progress, leave=False):
            torch.manual_seed((seed << 20) + i)
            tokens = data.batch("val", offsets[i:i + 32], context).to(device)
            scores.append(score_windows(model, tokens, stride, num_draws, **sampling).float().cpu())
    scores = torch.cat(scores, dim=1)                              # (2, windows, starts, 4)
    accuracy, collision = scores.mean(2).double().numpy()          # (windows, 4) each
    brier = 2 * accuracy - collision

    # The standard error, by a bootstrap: BrierLM of windows drawn anew, with repetition.
    drawn = np.random.default_rng(seed).integers(0, len(brier), size=(1000, len(brier)))
    return {"brier": brier.mean(0).tolist(), "brierlm": float(brierlm(brier.mean(0))),
            "stderr": float(brierlm(brier[drawn].mean(1)).std()),
            "accuracy": accuracy.mean(0).tolist(), "collision": collision.mean(0).tolist(),
            "positions": scores.shape[1] * scores.shape[2], "samples": num_draws,
            "context": context, "stride": stride}


def describe(result):
    """What `evaluate` found, as a line."""
    ngrams = [f"Brier-{n} {100 * brier:.2f}" for n, brier in enumerate(result["brier"], 1)]
    return (f"BrierLM {result['brierlm']:.2f} +- {result['stderr']:.2f} ({', '.join(ngrams)}; "
            f"{result['positions']:,} positions, {result['stride']} tokens apart, "
            f"in windows of {result['context']})")


# --- Beside the score: variety of the text, and what a temperature trades ------------------


def distinct(texts, n=4):
    """The share of different n-grams among all n-grams of texts (B, length)."""
    ngrams = texts.unfold(1, n, 1).flatten(0, 1)                   # (B * (length - n + 1), n)
    return len(ngrams.unique(dim=0)) / len(ngrams)


@torch.inference_mode()
def compare_text(model, data, device, dtype, texts=64, seed=0):
    """distinct-4 of the model's continuations of held-out beginnings, and of the real ones."""
    K = model.chunk_size
    length = min(max(320, 5 * K), model.config.block_size * K)
    windows = data.batch("val", data.even_offsets("val", texts, length), length)
    beginning = max(length // 5 // K, 1) * K
    prompt = windows[:, :beginning].to(device)
    torch.manual_seed(seed)
    with autocast(device, dtype):   # without eot: it goes on past any end-of-text
        made = generate(model, prompt, length - beginning)
    return distinct(made[:, beginning:].cpu()), distinct(windows[:, beginning:])


def frontier(args, measure):
    """Print accuracy and collision rate (figures 10 and 11), geometric means over n = 1..4, of
    each number of candidates and temperature. measure(temperature, num_candidates): `evaluate`."""
    print("temperature  candidates   accuracy  collision    BrierLM")
    for N in args.candidates or [200]:
        for T in args.temperatures or (1, 0.8, 0.65, 0.5, 0.33):
            if N < 1 / T:
                print(f"{T:11.2f}  {N:10}  too few candidates: at least 1/T")
                continue
            result = measure(temperature=T, num_candidates=N)
            accuracy = float(brierlm(np.array(result["accuracy"]))) / 100
            collision = float(brierlm(np.array(result["collision"]))) / 100
            score = result["brierlm"]
            print(f"{T:11.2f}  {N:10}  {accuracy:9.4f}  {collision:9.4f}  {score:9.4f}")
            if args.json:
                print(json.dumps({"temperature": T, "num_candidates": N, "accuracy": accuracy,
                                  "collision": collision, "brierlm": score,
                                  "stderr": result["stderr"]}))


# --- Run it --------------------------------------------------------------------------------


def parse_args():
    parser = Parser(description="BrierLM of a checkpoint, with a standard error.")
    add = parser.add_argument
    add_model_flags(add)
    add("--data", help="data set under data/; None: the one it was trained on")
    add("--windows", type=within(1), help="validation windows; None: 375, or 32 with --frontier")
    add("--num_draws", type=within(2, 1000), default=4, help="S: samples per position")
    add("--stride", type=within(4),
        help="tokens from one n-gram's start to the next; None: the run's")
    add("--context", type=within(8), help="tokens per window; None: the model's context")
    add("--frontier", action="store_true", help="accuracy and collision of each setting below")
    add("--temperatures", type=within(1e-6, 1, float), nargs="+",
        help="for --frontier; None: 1 to 0.33")
    add("--candidates", type=within(1, 1 << 20), nargs="+", help="for --frontier; None: 200")
    add("--plot", nargs="+", metavar=("SVG", "RUN"),
        help="draw logs of runs, or of folders of runs")
    add("--x", default="flops", choices=("flops", "inference_flops"),
        help="for --plot: FLOPs of training, or per token in inference")
    add("--json", action="store_true",
        help="end with one JSON object on a line; with --frontier one per row")
    args = parser.parse_args()
    if (args.temperatures or args.candidates) and not args.frontier:
        fail("--temperatures and --candidates are for --frontier: add it")
    if args.official and not args.data and not args.plot:
        fail("--official needs --data, prepared with the model's tokenizer")
    return args


def main():
    with clean_end(when_memory_is_full="lower --num_draws or --context"):
        args = parse_args()
        if args.plot:
            plot(args.plot[0], args.plot[1:] or [args.out_dir], args.x)
            return

        model, checkpoint, device, dtype = load(args)
        data = load_data(args.data or checkpoint["data"]["name"])
        stride = args.stride
        if args.official:
            check_vocabulary(model, data.tokenizer)
        else:
            check_tokenizer(checkpoint, data)
            stride = stride or checkpoint["settings"]["stride"]    # the baseline's is CALM's

        def measure(**sampling):
            windows = args.windows or (32 if args.frontier else 375)
            return evaluate(model, data, device, dtype, windows, stride, args.context,
                            args.num_draws, args.seed, progress=True, **sampling)

        if args.frontier:
            frontier(args, measure)
            return
        result = measure()
        print(describe(result))
        for name in ("accuracy", "collision"):
            numbers = "  ".join(f"{value:.4f}" for value in result.pop(name))
            print(f"{name:9} of 1 .. 4 tokens  {numbers}")
        made, real = compare_text(model, data, device, dtype, seed=args.seed)
        print(f"distinct-4 of its text {made:.4f}, of real text {real:.4f}")
        if args.json:
            print(json.dumps({**result, "step": checkpoint["step"] if checkpoint else None}))


if __name__ == "__main__":
    main()
