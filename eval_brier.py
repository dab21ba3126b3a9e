"""
BrierLM: how well does a model predict, judged from its samples alone (section 4 of the paper)?

    python eval_brier.py                            # BrierLM of the default run; how its text reads
    python eval_brier.py --against out/stdlib/ar.pt # is it better than another model?
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
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from autoencoder import posterior_samples
from calm import AR, KVCache, flops_per_token
from data.checkpoint import check_tokenizer
from data.console import Parser, clean_end, fail, within
from data.figure import plot
from data.machine import autocast, seed_noise, share_out
from data.prepare import load_data
from sample import (add_model_flags, algorithm_2, check_vocabulary, chosen_noise_scale, generate,
                    load, load_model, next_chunks, ways_to_write)


# --- The score -----------------------------------------------------------------------------


def hit_and_collision(samples, targets):
    """E[1[a = y]] and E[1[a = b]] of the first 1..4 tokens, over all samples a and pairs a, b.

    samples (S, P, >=4), targets (P, >=4) -> (P, 4) each
    """
    S = len(samples)
    samples = samples[..., :4]
    targets = targets[..., :4]
    # The cumulative product over tokens is 1 as long as all tokens so far are equal.
    hit = (samples == targets).cumprod(-1).float().mean(0)         # (P, 4)
    pairs = sum((a == samples).cumprod(-1).sum(0) for a in samples)   # (P, 4), one a at a time
    return hit, (pairs - S) / (S * (S - 1))                        # without a sample and itself


def brier_ngram(samples, targets):
    """Brier-1..4 at each position (equation 14): samples (S, P, >=4), targets (P, >=4) -> (P, 4).

    The mean over all pairs of the S samples, a U-statistic: unbiased, and for S = 2 the paper's.
    Of a whole text `Scores.brier` is the mean of these.
    """
    hit, collision = hit_and_collision(samples, targets)
    return 2 * hit - collision


def geometric_mean(values):
    """Of values (..., 4) -> (...); 0 if one is below 0."""
    return np.clip(values, 0, None).prod(-1) ** 0.25


def brierlm(brier):
    """Brier-1..4 (..., 4) -> BrierLM (...): 100 times their geometric mean."""
    return 100 * geometric_mean(brier)


def score_windows(model, tokens, stride, S, temperature=1.0, **sampling):
    """E[1[a = y]] and E[1[a = b]] of the n-grams, n = 1..4, that start at stride, 2 stride, ...
    of each window: tokens (B, W) -> (2, B, starts, 4). sampling: arguments of `next_chunks`."""
    K = model.chunk_size
    if K < 4:
        return score_by_rollout(model, tokens, stride, S, temperature, **sampling)
    every = stride // K                                            # in chunks
    # h of chunk t - 1 predicts chunk t, for t = every, 2 every, ...
    h = model.hidden(tokens[:, :-K])[:, every - 1::every]          # (B, starts, D)
    targets = tokens.unflatten(1, (-1, K))[:, every::every]        # (B, starts, K)
    samples = next_chunks(model, h.flatten(0, 1), temperature, S, **sampling)   # (S, B*starts, K)
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

        a = next_chunks(model, h_a, temperature, **sampling)[0]    # (B, K), one of the S samples
        agree = agreement(model, h_a, a, S - 1, temperature, **sampling)    # with the other ones
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
    samples = next_chunks(model, h, temperature, S, **sampling)    # (S, B, K)
    return (samples == chunk).cumprod(-1).float().mean(0)


def ngram_stride(K):
    """From one n-gram's start to the next, in tokens: the least multiple of K from 4 on."""
    return K * math.ceil(4 / K)


# --- The score of a data set, with its error -----------------------------------------------


@dataclass
class Scores:
    """Sums over the n-grams, n = 1..4, that begin in each document."""
    hits: np.ndarray          # of E[1[a = y]], (documents, 4)
    collisions: np.ndarray    # of E[1[a = b]], (documents, 4)
    count: np.ndarray         # number of n-grams, (documents,)
    stride: int               # from one n-gram's start to the next, in tokens
    context: int              # tokens in a window
    samples: int              # S
    val_repeats_train: bool   # is it the text of training, as there was too little to hold out any?

    def means(self, weights=1.0):
        """Means over all n-grams -> hit, collision (..., 4) each.

        weights (..., documents): how often each document counts.
        """
        weights = weights * np.ones(len(self.count))
        total = (weights @ self.count)[..., None]
        return (weights @ self.hits) / total, (weights @ self.collisions) / total

    def brier(self, weights=1.0):
        """Brier-1..4 (..., 4), with documents weighted as in `means`."""
        hit, collision = self.means(weights)
        return 2 * hit - collision

    def brierlm(self, weights=1.0):
        """BrierLM (...), with documents weighted as in `means`."""
        return brierlm(self.brier(weights))

    def accuracy(self, weights=1.0):
        """How often a sample is right (...): the geometric mean over n."""
        return geometric_mean(self.means(weights)[0])

    def collision(self, weights=1.0):
        """How often two samples are equal (...): the geometric mean over n."""
        return geometric_mean(self.means(weights)[1])

    def error(self, statistic):
        """The standard error of statistic(weights), such as `brierlm`: how much it would vary with
        other held-out documents. None if there is only one document.

        It is a bootstrap: 1000 times, as many documents are drawn from these, with repetition.
        """
        documents = len(self.count)
        if documents == 1:
            return None
        each = np.full(documents, 1 / documents)
        weights = np.random.default_rng(0).multinomial(documents, each, size=1000)
        return float(statistic(weights).std())


def grid(model, stride=None, context=None):
    """Where n-grams start and how long windows are -> stride, context, both in tokens.

    Fail unless they fit the model. Default: ngram_stride of its K, and its context.
    """
    K = model.chunk_size
    longest = model.config.block_size * K
    stride = stride or ngram_stride(K)
    context = context or longest
    shortest = stride + max(4, K)
    if stride % K or context % K or not shortest <= context <= longest:
        fail(f"--stride {stride} and --context {context} must be multiples of the chunk size {K}, "
             f"the context from {shortest} to at most the model's, {longest}")
    return stride, context


@torch.inference_mode()
def score_documents(model, data, device, dtype, windows=375, stride=None, context=None,
                    num_draws=4, seed=0, progress=False, **sampling):
    """Score the validation split -> Scores: sums over each document, for errors over documents.

    windows: of `context` tokens each, spread evenly over the split. stride: from one n-gram's start
    to the next. (Defaults: see `grid`.) An n-gram is predicted from all that precedes it in its
    window. With the same stride and context all models are scored at the same n-grams.
    num_draws: S, samples per position. sampling: other arguments of `next_chunks`.
    The processes of a run share the work; the scores are the same for any number of them.
    """
    stride, context = grid(model, stride, context)
    offsets = data.even_offsets("val", windows, context)
    batches = range(0, len(offsets), 32)

    def score_batch(i):
        seed_noise(seed, i)
        tokens = data.batch("val", offsets[i:i + 32], context).to(device)
        return score_windows(model, tokens, stride, num_draws, **sampling).cpu()

    with autocast(device, dtype):
        scores = share_out(score_batch, batches, "BrierLM" if progress else None)
    scores = torch.cat(scores, dim=1).double()                     # (2, windows, starts, 4)

    starts = stride * np.arange(1, scores.shape[2] + 1)            # of the n-grams of a window
    numbers = data.document_numbers((offsets[:, None] + starts).ravel())
    # Of each n-gram its document, counted from 0, and of each document its number of n-grams.
    _, document, count = np.unique(numbers, return_inverse=True, return_counts=True)
    sums = torch.zeros(2, len(count), 4, dtype=torch.float64)
    sums.index_add_(1, torch.from_numpy(document), scores.flatten(1, 2))
    hits, collisions = sums.numpy()
    return Scores(hits, collisions, count, stride, context, samples=num_draws,
                  val_repeats_train=data.val_repeats_train)


def summary(scores):
    """Scores -> dict of results; its errors are over documents."""
    hit, collision = scores.means()
    return {
        "brier": scores.brier().tolist(),
        "brierlm": float(scores.brierlm()),
        "stderr": scores.error(scores.brierlm),
        "accuracy": hit.tolist(),
        "collision": collision.tolist(),
        "documents": len(scores.count),
        "positions": int(scores.count.sum()),
        "samples": scores.samples,
        "context": scores.context,
        "stride": scores.stride,
        "val_repeats_train": scores.val_repeats_train,
    }


def evaluate(*args, **kwargs):
    """BrierLM on the validation split -> dict of results. Arguments: those of score_documents."""
    return summary(score_documents(*args, **kwargs))


def describe(result):
    """What `evaluate` found, as a line."""
    ngrams = [f"Brier-{n} {100 * brier:.2f}" for n, brier in enumerate(result["brier"], 1)]
    score = with_error(result["brierlm"], result["stderr"], 2)
    return (f"BrierLM {score} ({', '.join(ngrams)}; "
            f"{result['positions']:,} positions in {result['documents']} documents, "
            f"{result['stride']} tokens apart, in windows of {result['context']})"
            f"{', on the text of training' if result['val_repeats_train'] else ''}")


def with_error(value, error, digits):
    """A number and its standard error, as text."""
    return f"{value:.{digits}f} +- {'?' if error is None else f'{error:.{digits}f}'}"


def difference(scores, other):
    """Is one model better than another? Both scored at the same n-grams -> dict.

    Some documents are harder than others, for both models. For the error of the difference the
    same documents are drawn for both, so this cancels.
    """

    assert (scores.count == other.count).all()                     # the same n-grams

    def minus(weights=1.0):
        return scores.brierlm(weights) - other.brierlm(weights)

    def ratio(weights=1.0):
        return scores.brierlm(weights) / other.brierlm(weights)

    found = {"brierlm": float(other.brierlm()),
             "difference": float(minus()), "difference_stderr": scores.error(minus)}
    if other.brierlm() > 0.5:   # near 0 a ratio has no meaning
        found |= {"ratio": float(ratio()), "ratio_stderr": scores.error(ratio)}
    return found


# --- Beside the score: what BrierLM cannot see ---------------------------------------------


def distinct(texts, n=4):
    """The share of different n-grams among all n-grams of texts (B, length)."""
    ngrams = texts.unfold(1, n, 1).flatten(0, 1)                   # (B * (length - n + 1), n)
    return len(ngrams.unique(dim=0)) / len(ngrams)


def bits_per_token(judge, texts, begin):
    """What texts (B, length) cost from token `begin` on, read by an AR model: the mean of
    -log2 P(token | all before it). Text that is unlike any real one is expensive."""
    bits = []
    for part in texts.split(8):
        logits = judge.lm_head(judge.hidden(part[:, :-1])[:, begin - 1:]).float()
        bits.append(F.cross_entropy(logits.transpose(1, 2), part[:, begin:], reduction="none"))
    return torch.cat(bits).mean().item() / math.log(2)


def text_length(K, context):
    """How long the texts are that are compared, in tokens. The first fifth of each, at least a
    chunk, is held-out text."""
    return min(max(320, 5 * K), context)


@torch.inference_mode()
def compare_texts(model, judge, data, device, dtype, context, texts=64, seed=0,
                  noise_scale=1.0):
    """Held-out beginnings, as they go on in truth and as the models continue them, in the ways of
    `ways_to_write` -> {whose text: (distinct-4, bits per token)}

    judge: an AR that reads every text. It writes texts, too, unless it is the model. None: there
    are no bits. context: the longest text, beginning included, in tokens.
    noise_scale: see `ways_to_write`.
    """
    K = model.chunk_size
    length = text_length(K, context)
    windows = data.batch("val", data.even_offsets("val", texts, length), length).to(device)
    begin = max(length // 5 // K, 1) * K
    written = {"real": windows}
    writers = {"model": model}
    if judge not in (None, model):
        writers["judge"] = judge
    with autocast(device, dtype):
        for name, writer in writers.items():
            for way, sampling in ways_to_write(writer, noise_scale).items():
                seed_noise(seed)
                # Without eot: it goes on past any end-of-text.
                written[f"{name}, {way}"] = generate(writer, windows[:, :begin], length - begin,
                                                     **sampling)
        return {name: (distinct(text[:, begin:].cpu()),
                       bits_per_token(judge, text, begin) if judge else None)
                for name, text in written.items()}


def distances_to_means(autoencoder, z):
    """How far vectors z (P, L) lie from the mean of the chunk that they decode to, and how far
    samples of that chunk's own posterior do -> (P,), (P,)."""
    mean, log_std = autoencoder.encode(autoencoder.tokens(z))      # (P, L) each
    y = posterior_samples(mean, log_std, 1)[0]                     # (P, L)
    return (z - mean).norm(dim=-1), (y - mean).norm(dim=-1)


@torch.inference_mode()
def off_manifold(model, data, device, dtype, context, windows=32, seed=0):
    """Does the head draw vectors like the autoencoder's, or does it oversmooth? The medians of
    `distances_to_means` over its samples at held-out positions -> two numbers."""
    tokens = data.batch("val", data.even_offsets("val", windows, context), context).to(device)
    seed_noise(seed)
    with autocast(device, dtype):
        z = model.head.sample(model.hidden(tokens).flatten(0, 1), 1)[0].float()    # (P, L)
        of_samples, of_posterior = distances_to_means(model.autoencoder, z)
    return of_samples.median().item(), of_posterior.median().item()


# --- What a temperature trades -------------------------------------------------------------


def frontier(args, model, measure):
    """Print accuracy and collision rate (figures 10 and 11), geometric means over n = 1..4, for
    each limit of candidates and each temperature, with errors over documents.

    measure(calls=calls, other arguments of `next_chunks`) -> Scores
    """
    near = args.sampler == "near"
    if near:
        temperatures = [1.0]
        limits = args.candidates or [1, 2, 4, 8, 16, 64]
    else:
        temperatures = args.temperatures or [1, 0.8, 0.65, 0.5, 0.33]
        limits = args.candidates or [200]
    autoencoder_config = None if isinstance(model, AR) else model.autoencoder.config
    flops = flops_per_token(model.config, autoencoder_config)
    print("temperature  candidates: at most  drawn          accuracy         collision"
          "           BrierLM  FLOPs/token")
    for N in limits if args.model == "calm" else [1]:   # AR needs no candidates
        for T in temperatures:
            if N < 1 / T and args.model == "calm":
                print(f"{T:11.3g}  {N:19}  too few candidates: at least 1/T")
                continue
            calls = []   # samples that each chunk took
            if near:
                scores = measure(calls=calls, nearest_of=N)
            else:
                sampler = algorithm_2(N, args.sampler or "as_needed")
                scores = measure(calls=calls, temperature=T, sampler=sampler)
            drawn = torch.cat(calls).double().mean().item() if calls else 1.0
            # FLOPs of inference include one candidate.
            cost = flops["inference"] + (drawn - 1) * flops.get("candidate", 0.0)
            if near and N > 1:   # each candidate's chunk is encoded, too
                cost += N * flops["encode"]
            row = {"temperature": T, "num_candidates": N, "noise": chosen_noise_scale(args, model),
                   "candidates_drawn": drawn, "flops_per_token": cost}
            columns = ""
            for name, digits in (("accuracy", 4), ("collision", 4), ("brierlm", 2)):
                statistic = getattr(scores, name)
                row[name] = float(statistic())
                row[f"{name}_stderr"] = scores.error(statistic)
                columns += f"  {with_error(row[name], row[f'{name}_stderr'], digits):>16}"
            print(f"{T:11.3g}  {N:19}  {drawn:5.1f}{columns}  {cost:11.2e}")
            if args.json:
                print(json.dumps(row))


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
    add("--against", metavar="RUN",
        help="compare with this run's model at the same n-grams; or with its calm.pt or ar.pt")
    add("--judge", metavar="RUN",
        help="a run whose ar.pt reads the text of the model; None: that beside it, if there")
    add("--frontier", action="store_true", help="accuracy and collision of each setting below")
    add("--temperatures", type=within(1e-6, 1, float), nargs="+",
        help="for --frontier; None: 1 to 0.33")
    add("--candidates", type=within(1, 1 << 20), nargs="+",
        help="for --frontier; None: 200, for near 1 to 64")
    add("--sampler", choices=("as_needed", "batch", "near"),
        help="for --frontier: at most so many candidates; all, as in the paper; or the nearest of "
        "them, without a temperature; None: as_needed")
    add("--plot", nargs="+", metavar=("SVG", "RUN"),
        help="draw logs of runs, or of folders of runs")
    add("--x", default="flops", choices=("flops", "inference_flops"),
        help="for --plot: FLOPs of training, or per token in inference")
    add("--json", action="store_true",
        help="end with one JSON object on a line; with --frontier one per row")
    args = parser.parse_args()
    if args.judge is not None and (args.official or args.frontier):
        fail("--judge reads the text of a run's model: drop --official and --frontier")
    if args.against is not None and args.frontier:
        fail("--against compares at T = 1: drop --frontier")
    if (args.temperatures or args.candidates or args.sampler) and not args.frontier:
        fail("--temperatures, --candidates and --sampler are for --frontier: add it")
    if args.sampler == "near" and (args.temperatures or args.model == "ar"):
        fail("--sampler near is for CALM, and has no temperature: drop --temperatures, --model ar")
    if args.official and not args.data and not args.plot:
        fail("--official needs --data, prepared with the model's tokenizer")
    if args.windows is None:
        args.windows = 32 if args.frontier else 375
    return args


def held_out_data(args, model, checkpoint):
    """The data set of --data, or that of training, unless it has changed -> TokenData.

    checkpoint: None for a published model.
    """
    data = load_data(args.data or checkpoint["data"]["name"])
    if args.official:
        check_vocabulary(model, data.tokenizer)
        return data
    check_tokenizer(checkpoint, data)
    if not args.data and data.meta["fingerprint"] != checkpoint["data"]["fingerprint"]:
        fail(f"{data.folder} has changed since the model was trained, and what is held out may "
             f"have been trained on: --data {data.meta['name']} scores it all the same")
    return data


def load_other(run, kind, data, device, dtype):
    """A second model, which must have the same tokenizer -> model, checkpoint.

    run: a folder, whose model of this kind is taken; or one of its checkpoints.
    """
    run = Path(run)
    if run.suffix == ".pt":
        kind = run.stem
        run = run.parent
    if kind not in ("calm", "ar"):
        fail(f"expected a run's folder, its calm.pt or its ar.pt, not {run / kind}.pt")
    model, checkpoint = load_model(run, kind, device, dtype)
    check_tokenizer(checkpoint, data)
    if checkpoint["data"]["fingerprint"] != data.meta["fingerprint"]:
        print(f"warning: {run} was trained on other data: it may have seen what is held out here",
              file=sys.stderr)
    return model, checkpoint


def load_judge(args, model, data, device, dtype, length):
    """The AR of --judge; or the model, if it is one; or the AR beside it, if there is one; or None.

    length: of the texts that it must be able to read, in tokens.
    """
    run = args.judge
    if run is None and isinstance(model, AR):
        return model
    if run is None and not args.official and Path(args.out_dir, "ar.pt").is_file():
        run = args.out_dir
    if run is None:
        return None
    judge, _ = load_other(run, "ar", data, device, dtype)
    if not isinstance(judge, AR) or judge.config.block_size < length:
        fail(f"{run} cannot judge: expected an ar.pt that reads {length} tokens; "
             "name one by --judge, or lower --context")
    return judge


def report_score(result):
    print(describe(result))
    for name in ("accuracy", "collision"):
        numbers = "  ".join(f"{value:.4f}" for value in result[name])
        print(f"{name:9} of 1 .. 4 tokens  {numbers}")


def report_difference(name, result):
    minus = with_error(result["difference"], result["difference_stderr"], 2)
    line = f"{name} has {result['brierlm']:.2f}: a difference of {minus}"
    if "ratio" in result:
        line += f", a ratio of {with_error(result['ratio'], result['ratio_stderr'], 3)}"
    print(line)


def report_text(args, model, judge, data, device, dtype, context):
    """Print how the model's text reads -> dict of these figures."""
    found = {"bits": {}, "distinct": {}}
    if args.model == "calm":
        far, usual = off_manifold(model, data, device, dtype, context, seed=args.seed)
        found["off_manifold"] = far / usual
        print(f"off the manifold: {far / usual:.1f} times as far from the mean of its chunk as a "
              f"sample of the posterior ({far:.2f}, {usual:.2f})")
    title = f"{'text':26}  distinct-4"
    if judge:
        title += f"  bits per token, read by the AR in {args.judge or args.out_dir}"
    print(title)
    texts = compare_texts(model, judge, data, device, dtype, context, seed=args.seed,
                          noise_scale=chosen_noise_scale(args, model))
    for name, (share, bits) in texts.items():
        found["distinct"][name] = share
        line = f"{name:26}  {share:10.4f}"
        if judge:
            found["bits"][name] = bits
            line += f"  {bits:14.3f}"
        print(line)
    return found


def main():
    with clean_end(when_memory_is_full="lower --num_draws or --context"):
        args = parse_args()
        if args.plot:
            plot(args.plot[0], args.plot[1:] or [args.out_dir], args.x)
            return

        model, checkpoint, device, dtype = load(args)
        data = held_out_data(args, model, checkpoint)
        stride = args.stride
        context = args.context
        if checkpoint:
            stride = stride or checkpoint["settings"]["stride"]    # an AR's is that of its CALM
        if args.against is not None:
            other, other_checkpoint = load_other(args.against, args.model, data, device, dtype)
            stride, context = common_grid(model, other, stride, other_checkpoint, context)
        stride, context = grid(model, stride, context)
        noise = chosen_noise_scale(args, model)
        judge = None
        if not args.frontier:
            length = text_length(model.chunk_size, context)
            judge = load_judge(args, model, data, device, dtype, length)

        def measure(model=model, **sampling):
            return score_documents(model, data, device, dtype, args.windows, stride, context,
                                   args.num_draws, args.seed, progress=True,
                                   noise_scale=noise, **sampling)

        if args.frontier:
            frontier(args, model, measure)
            return
        scores = measure()
        result = summary(scores)
        report_score(result)
        if args.against is not None:
            result["against"] = difference(scores, measure(other))
            report_difference(args.against, result["against"])
        result |= report_text(args, model, judge, data, device, dtype, context)
        if args.json:
            print(json.dumps({**result, "step": checkpoint["step"] if checkpoint else None}))


def common_grid(model, other, stride, other_checkpoint, context):
    """A stride and a context at which two models are scored at the same n-grams."""
    stride = math.lcm(stride or ngram_stride(model.chunk_size),
                      other_checkpoint["settings"]["stride"])
    longest = min(m.config.block_size * m.chunk_size for m in (model, other))
    if longest < 2 * stride:
        fail(f"the models cannot be compared: one reads {longest} tokens, expected {2 * stride}")
    return grid(other, stride, context or longest // stride * stride)


if __name__ == "__main__":
    main()
