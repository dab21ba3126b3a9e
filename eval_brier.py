"""
BrierLM: how well does a model predict, judged from its samples alone (section 4)?

    python eval_brier.py                               # the default run: BrierLM, and its text
    python eval_brier.py --against out/stdlib/ar.pt    # is it better than another model?

The Brier score of a forecast p for an outcome t is 2 p(t) - sum_x p(x)^2. On average it is
highest when p is the truth. It needs no probabilities: p(t) is how often a sample equals t,
and sum_x p(x)^2 is how often two samples equal each other, the collision rate. Brier-n is
that of n-grams; BrierLM is 100 times the geometric mean of Brier-1 to Brier-4.

Shapes: S samples, P positions, B windows of W tokens, K tokens in a chunk, D width of h.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from calm import KVCache
from data.machine import Machine, seed_noise
from data.prepare import TokenData
from sample import (check_text, generate, load, load_model, make_parser, next_chunks,
                    sampling_of)


# --- The score ---


def hit_and_collision(samples, targets):
    """Samples (S, P, >=4), targets (P, >=4) -> for n = 1..4, the share of samples whose first n
    tokens are the target's, and the share of pairs that agree in theirs: (P, 4), (P, 4)."""
    S = len(samples)
    samples = samples[..., :4]
    # The cumulative product over tokens is 1 as long as all tokens so far are equal.
    hit = (samples == targets[..., :4]).cumprod(-1).float().mean(0)  # (P, 4)
    pairs = sum((a == samples).cumprod(-1).sum(0) for a in samples)   # (P, 4), one a at a time
    return hit, (pairs - S) / (S * (S - 1))  # not with itself


def brier_ngram(samples, targets):
    """Brier-1..4 at each position (equation 14): samples (S, P, >=4), targets (P, >=4) -> (P, 4).
    A mean over all pairs of samples, a U-statistic: unbiased, and for S = 2 the paper's."""
    hit, collision = hit_and_collision(samples, targets)
    return 2 * hit - collision


def brierlm(brier):
    """Means of Brier-1..4 over positions (..., 4) -> BrierLM (...): 100 times the geometric mean;
    0 if one is negative."""
    return 100 * np.clip(brier, 0, None).prod(-1) ** 0.25


def sample_ngrams(model, tokens, starts, S, **sampling):
    """Draw S n-grams of four tokens at each start, given the window before it: tokens (B, W),
    starts are positions in the window, multiples of K -> (S, B, len(starts), 4)."""
    K = model.chunk_size
    steps = math.ceil(4 / K)                      # chunks in an n-gram
    cache = KVCache(model.config.block_size)
    hidden = model.hidden(tokens[:, :-K], cache)  # (B, W/K - 1, D)
    for layer, kv in cache.layers.items():        # one copy for each of S samples
        cache.layers[layer] = kv.repeat(1, S, 1, 1, 1)
    ngrams = []
    # A start needs the true text before it in the cache. What is drawn there overwrites what
    # comes after it. So the last start is first.
    for start in reversed(starts):
        cache.length = start // K
        h = hidden[:, start // K - 1]             # it predicts the chunk at start
        drawn = [next_chunks(model, h, S, **sampling).flatten(0, 1)]  # (S*B, K)
        for _ in range(steps - 1):
            h = model.hidden(drawn[-1], cache)[:, -1]
            drawn.append(next_chunks(model, h, **sampling)[0])
        ngrams.append(torch.cat(drawn, dim=1)[:, :4])
    return torch.stack(ngrams[::-1], dim=1).unflatten(0, (S, -1))


# --- The score of a data set, with its error ---


def default_stride(K):
    """Tokens from one n-gram's start to the next: 16, or the least multiple of K above."""
    return math.ceil(16 / K) * K


@torch.inference_mode()
def evaluate(model, data, machine, windows=375, stride=None, context=None, S=8, batch_size=4,
             seed=0, progress=False, **sampling):
    """Score n-grams of the validation split -> results (dict), and a row for each document,
    (documents, 1 + 4 + 4): its number of n-grams, the sums of their hits and collisions.

    windows: how many, of `context` tokens. stride: from one n-gram to the next. With the same
    stride and context all models are scored at the same n-grams. S: samples of each.
    """
    K = model.chunk_size
    stride = stride or default_stride(K)
    context = context or model.config.block_size * K
    data.check_length("val", context)
    offsets = data.even_offsets(windows, context)
    starts = range(stride, context - math.ceil(4 / K) * K + 1, stride)
    scores = []
    for i in tqdm(range(0, len(offsets), batch_size), desc="BrierLM", disable=not progress):
        seed_noise(seed, i)
        tokens = data.batch("val", offsets[i:i + batch_size], context).to(machine.device)
        with machine.autocast():
            samples = sample_ngrams(model, tokens, starts, S, **sampling)
        targets = tokens.unfold(1, 4, 1)[:, list(starts)]  # the truth (B, starts, 4)
        hit, collision = hit_and_collision(samples.flatten(1, 2), targets.flatten(0, 1))
        scores.append(torch.cat([torch.ones_like(hit[:, :1]), hit, collision], dim=1).cpu())

    numbers = data.document_numbers((offsets[:, None] + np.array(starts)).ravel())
    _, document = np.unique(numbers, return_inverse=True)  # of each n-gram, from 0 on
    rows = np.zeros((document.max() + 1, 9))
    np.add.at(rows, document, torch.cat(scores).double().numpy())
    return summary(rows) | {"samples": S, "context": context, "stride": stride}, rows


def bootstrap(rows):
    """Mean hits and collisions of all n-grams, (1001, 4) each: of the text itself, then of 1000
    texts of as many documents, drawn from these with repetition. (Windows of one document are
    not independent.)"""
    documents = len(rows)
    each = np.full(documents, 1 / documents)
    drawn = np.random.default_rng(0).multinomial(documents, each, size=1000)
    weights = np.concatenate([np.ones((1, documents)), drawn])  # how often each document counts
    sums = weights @ rows                                       # (1001, 9)
    means = sums[:, 1:] / sums[:, :1]
    return means[:, :4], means[:, 4:]


def with_error(values, valid=True):
    """A statistic of the text and of the bootstrap's texts (1001,) -> its value, its standard
    error. The error is None with one document, or if any text is not `valid`."""
    error = float(values[1:].std())
    return float(values[0]), error if error > 1e-9 and np.all(valid) else None


def summary(rows):
    hit, collision = bootstrap(rows)
    brier = 2 * hit - collision  # (1001, 4)
    score, error = with_error(brierlm(brier), valid=brier > 0)
    return {"brierlm": score, "stderr": error, "brier": brier[0].tolist(),
            "accuracy": float(brierlm(hit[0])) / 100,   # a geometric mean over n, too
            "collision": float(brierlm(collision[0])) / 100,
            "documents": len(rows), "positions": int(rows[:, 0].sum())}


def difference(rows, other_rows):
    """Is a model better than another at the same n-grams? -> {name: (value, error)}: the first
    one's minus the other's, and the ratio of BrierLM. Some documents are harder, for both: the
    bootstrap draws the same ones for both, so this cancels in the error."""
    hit, collision = bootstrap(rows)
    other_hit, other_collision = bootstrap(other_rows)
    one = 2 * hit - collision  # Brier-1..4, (1001, 4)
    other = 2 * other_hit - other_collision
    valid = (one > 0) & (other > 0)
    found = {f"Brier-{n + 1}": with_error(one[:, n] - other[:, n]) for n in range(4)}
    found["BrierLM"] = with_error(brierlm(one) - brierlm(other), valid)
    if np.all(valid):
        found["ratio"] = with_error(brierlm(one) / brierlm(other))
    return found


def describe(result):
    """What `evaluate` found, as text."""
    ngrams = ", ".join(f"{100 * brier:.2f}" for brier in result["brier"])
    return (f"BrierLM {plus_minus(result['brierlm'], result['stderr'])} (100 times Brier-1 to -4: "
            f"{ngrams})\naccuracy {result['accuracy']:.4f}, collision {result['collision']:.4f}; "
            f"{result['positions']:,} n-grams in {result['documents']} documents, every "
            f"{result['stride']} tokens in windows of {result['context']}, {result['samples']} "
            "samples each")


def plus_minus(value, error):
    """A number and its standard error as text."""
    unknown = "? (one document, or a Brier-n not surely above 0)"
    return f"{value:.4g} +- " + (unknown if error is None else f"{error:.3g}")


# --- Beside the score: what BrierLM cannot see ---


def distinct(texts, n=4):
    """The share of different n-grams among all n-grams of texts (B, length)."""
    ngrams = texts.unfold(1, n, 1).flatten(0, 1)  # (B * (length - n + 1), n)
    return len(ngrams.unique(dim=0)) / len(ngrams)


def bits_per_token(judge, texts, begin):
    """The mean of -log2 p(token | those before), from token `begin` of texts (B, length) on."""
    nats = 0.0
    for text in texts:   # one at a time: the logits of a large vocabulary take gigabytes
        logits = judge.lm_head(judge.hidden(text[None, :-1])[0, begin - 1:]).float()
        nats += F.cross_entropy(logits, text[begin:]).item() / len(texts)
    return nats / math.log(2)


@torch.inference_mode()
def judge_texts(model, judge, data, machine, texts=64, seed=0, **sampling):
    """Held-out beginnings, as they go on in truth and as the model continues them
    -> {"real": ..., "model": ...}, with distinct-4 and, if there is a judge, bits per token."""
    K = model.chunk_size
    limit = min(m.config.block_size * m.chunk_size for m in (model, judge or model))
    length = min(max(320, 5 * K), limit)  # of which a fifth is given
    begin = max(length // 5 // K, 1) * K
    real = data.batch("val", data.even_offsets(texts, length), length).to(machine.device)
    seed_noise(seed)
    found = {}
    with machine.autocast():
        own = generate(model, real[:, :begin], length - begin, **sampling)
        for name, text in (("real", real), ("model", own)):
            found[name] = {"distinct-4": distinct(text[:, begin:])}
            if judge:
                found[name]["bits"] = bits_per_token(judge, text, begin)
    return found


# --- Run it ---


def main():
    parser = make_parser("BrierLM of a model, with its error.")
    add = parser.add_argument
    add("--data", help="a data set in data/, by default that of training")
    add("--windows", type=int, default=375, help="how many, spread evenly over the text")
    add("--num_draws", type=int, default=8, help="S: samples of each n-gram")
    add("--stride", type=int, help="tokens from one n-gram's start to the next; default 16")
    add("--against", metavar="RUN", help="compare with another run, or its calm.pt or ar.pt")
    add("--judge", metavar="RUN", help="whose ar.pt reads the text; by default --out_dir's")
    add("--json", action="store_true", help="end with one JSON object on a line")
    args = parser.parse_args()
    sampling = sampling_of(args)
    machine = Machine(args.device, args.dtype)
    model, checkpoint = load(args, machine)
    data = TokenData(args.data or (checkpoint["data"]["name"] if checkpoint else "wikitext"))
    same = "tokenizer" if args.data else "fingerprint"   # what must be as in training
    if checkpoint:
        check_text(checkpoint, data, same)
    other = model
    if args.against:
        path = Path(args.against)
        path = path if path.suffix == ".pt" else path / f"{args.model}.pt"
        other, other_checkpoint = load_model(path.parent, path.stem)
        check_text(other_checkpoint, data, same)
    judge = None
    if args.judge or (not args.official and Path(args.out_dir, "ar.pt").is_file()):
        judge, judge_checkpoint = load_model(args.judge or args.out_dir, "ar")
        check_text(judge_checkpoint, data, "tokenizer")
        judge.to(machine.device)

    K = math.lcm(model.chunk_size, other.chunk_size)
    stride = args.stride or default_stride(K)
    if stride % K != 0:
        raise SystemExit(f"--stride {stride} does not fit chunks of {K}: try {default_stride(K)}")
    context = min(m.config.block_size * m.chunk_size for m in (model, other)) // K * K
    how = dict(windows=args.windows, stride=stride, context=context, S=args.num_draws,
               seed=args.seed, progress=True, **sampling)

    result, rows = evaluate(model, data, machine, **how)
    print(describe(result))
    if args.against:
        _, other_rows = evaluate(other.to(machine.device), data, machine, **how)
        result["against"] = difference(rows, other_rows)
        print(f"{args.out_dir}/{args.model}.pt minus {path}:")
        for name, (value, error) in result["against"].items():
            print(f"{name:8} {plus_minus(value, error)}")

    result["text"] = judge_texts(model, judge, data, machine, seed=args.seed, **sampling)
    for name, found in result["text"].items():
        print(f"{name:8} " + ", ".join(f"{what} {value:.3f}" for what, value in found.items()))
    if args.json:
        print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
