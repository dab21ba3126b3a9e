"""
From vectors to text: temperature from samples alone (section 5 of the paper), generation,
and the loading of a trained model.

    python sample.py --start "def main(" --noise 0.25 --chunks

A softmax is sharpened by dividing its logits by a temperature. CALM has only samples.
But n samples are all the same chunk x with probability p(x)^n: if they are, x is a draw at
temperature 1/n. A low temperature is a matter of drawing more, and of keeping what repeats.

Shapes: B texts, K tokens in a chunk, D width of h, N candidates. p: the law of the next chunk.
"""
import argparse
import itertools
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, ARConfig, CALMConfig, KVCache
from data.machine import DTYPES, Machine, load_checkpoint
from data.prepare import DEFAULT_DATA, get_tokenizer
from data.published import read_official


# --- Temperature without likelihoods (section 5) ---


def temperature_exact(samples, temperature):
    """Algorithm 1: a draw from p^(1/temperature) / Z, for any temperature in (0, 1).

    samples: an iterator of independent draws from p, which can be compared -> one of them

    Let 1/temperature be n + a, with n whole and a in [0, 1). If the first n samples are all x,
    then x is a draw from p^n. The loop over i keeps it with probability p(x)^a. This takes few
    samples where one chunk is likely, and millions where none is (theorem 2).
    """
    n = math.floor(1 / temperature)
    a = 1 / temperature - n
    while True:
        x = next(samples)
        if any(next(samples) != x for _ in range(n - 1)):
            continue
        if a == 0:
            return x
        # Why p^a (p = p(x), q = 1 - p): sample i is the first that equals x, with probability
        # p q^(i-1) prod_{j<i} (1 - a/j). Summed over i (binomial series): p (1 - q)^(a-1) = p^a.
        for i in itertools.count(1):
            if next(samples) == x:
                return x
            if torch.rand(()) < a / i:
                break   # and start again


def temperature_batch(samples, temperature):
    """Algorithm 2: pick one of N candidates, about as p^(1/temperature) / Z would, for any
    temperature in (0, 1]. The bias vanishes as N grows.

    samples (N, batch, K), draws from p -> tokens (batch, K)

    First for 1/temperature = n, a whole number. Let a chunk occur c times among the candidates.
    There are C(c, n) ways to take n of its copies, so it is picked with a weight of C(c, n).
    For example, N = 6 candidates a a a b b c at a temperature of 1/2:

        a: C(3, 2) = 3      b: C(2, 2) = 1      c: C(1, 2) = 0

    a is picked with probability 3/4, b with 1/4, c never. For many candidates C(c, n) is in
    proportion to c^n, and c to p. If no chunk is there n times, the paper tries n - 1, and so
    on; here n becomes the largest count at once, which is the same.

    For any temperature (ours) C(c, s) = G(c + 1) / (G(s + 1) G(c - s + 1)), with the Gamma
    function G and s = 1/temperature, for c >= floor(s); below that the weight is 0.
    """
    key = samples[..., 0]                                   # a hash of each chunk
    for token in samples.unbind(-1)[1:]:
        key = key * 1_000_003 + token
    # How often each candidate's chunk occurs. (All pairs at once: N x N x batch numbers.)
    c = sum((key == x).long() for x in key).cpu().double()  # (N, batch)
    s = c.amax(0).clamp_max(1 / temperature)                # (batch,)
    log_C = (c + 1).lgamma() - (c - s + 1).lgamma()         # G(s + 1) is the same for all
    log_C = log_C.masked_fill(c < s.floor(), -math.inf)
    log_weight = log_C - c.log()                            # the chunk's weight / its c copies
    pick = torch.multinomial(log_weight.softmax(0).T, 1).squeeze(1)  # (batch,)
    return samples[pick, torch.arange(samples.shape[1])]


def next_chunks(model, h, n=1, temperature=1.0, num_candidates=64, exact=False, noise_scale=1.0):
    """n next chunks for each h (B, D) at a temperature in (0, 1] -> tokens (n, B, K).

    Below 1, CALM takes Algorithm 2 with num_candidates or, if `exact`, Algorithm 1.
    noise_scale: see EnergyHead.sample. AR needs none of these; it divides its logits.
    """
    if isinstance(model, AR):
        return model.sample_chunks(h, n, temperature)
    if temperature == 1:
        return model.sample_chunks(h, n, noise_scale)
    h = h.repeat(n, 1)                                  # (n*B, D)
    if exact:
        streams = [endless_samples(model, row, noise_scale) for row in h]
        tokens = [temperature_exact(samples, temperature) for samples in streams]
        tokens = torch.tensor(tokens, device=h.device)  # (n*B, K)
    else:
        samples = model.sample_chunks(h, num_candidates, noise_scale)  # (N, n*B, K)
        tokens = temperature_batch(samples, temperature)
    return tokens.unflatten(0, (n, -1))


def endless_samples(model, h, noise_scale):
    """Draws of the next chunk given h (D,), without end: tuples of K tokens."""
    while True:
        yield from map(tuple, model.sample_chunks(h, 256, noise_scale).tolist())


# --- Generation ---


def whole_chunks(prompt, chunk_size, eot):
    """Prompt (B, length) -> (B, a positive multiple of K): a chunk ends where the prompt ends.

    Up to K - 1 tokens at its front are left out: what remains is like the windows of training,
    which begin anywhere in a text. Only a prompt shorter than a chunk is padded, with `eot`,
    the end-of-text token.
    """
    missing = max(chunk_size - prompt.shape[1], 0)
    prompt = F.pad(prompt, (missing, 0), value=eot)
    return prompt[:, prompt.shape[1] % chunk_size:]


@torch.inference_mode()
def generate(model, prompt, max_new_tokens, temperature=1.0, eot=None, progress=False, **sampling):
    """Continue prompt (B, length) -> prompt and continuation, (B, length + max_new_tokens). Where
    the context is full, it is cut to its last half. sampling: arguments of `next_chunks`."""
    K = model.chunk_size
    block_size = model.config.block_size  # the context, in chunks
    cache = KVCache(block_size)
    text = whole_chunks(prompt, K, eot)
    unread = text[:, -block_size * K:]    # what is not in the cache yet
    new = []
    for _ in tqdm(range(0, max_new_tokens, K), desc="write", unit="chunk", disable=not progress):
        if cache.length == block_size:
            cache.length = 0
            unread = torch.cat([text, *new], dim=1)[:, -max(block_size // 2, 1) * K:]
        h = model.hidden(unread, cache)   # (B, chunks of `unread`, D)
        unread = next_chunks(model, h[:, -1], temperature=temperature, **sampling)[0]  # (B, K)
        new.append(unread)
    return torch.cat([prompt, *new], dim=1)[:, :prompt.shape[1] + max_new_tokens]


def show(tokenizer, ids, chunk_size=None):
    """List of ids -> text, up to the first end-of-text. chunk_size: a bar before each chunk."""
    if tokenizer.eot_token in ids:
        ids = ids[:ids.index(tokenizer.eot_token)]
    if chunk_size is None:
        return tokenizer.decode(ids)
    chunks = [ids[i:i + chunk_size] for i in range(0, len(ids), chunk_size)]
    return "".join("|" + tokenizer.decode(chunk) for chunk in chunks)


# --- Loading a run's model, or the authors' weights ---


def load_model(out_dir, kind):
    """The model of a run, "calm", "autoencoder" or "ar" -> model in eval mode, checkpoint."""
    checkpoint = load_checkpoint(Path(out_dir, f"{kind}.pt"))
    if kind == "autoencoder":
        model = Autoencoder(AutoencoderConfig(**checkpoint["config"]))
    elif kind == "ar":
        model = AR(ARConfig(**checkpoint["config"]))
    else:
        autoencoder = Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"]))
        model = CALM(CALMConfig(**checkpoint["config"]), autoencoder)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def load_official(folder):
    """A directory as the authors publish a model -> CALM in eval mode."""
    sizes, autoencoder_sizes, state = read_official(Path(folder))
    with torch.device("meta"):   # no memory for first weights, which are replaced at once
        model = CALM(CALMConfig(**sizes), Autoencoder(AutoencoderConfig(**autoencoder_sizes)))
    model.load_state_dict(state, assign=True)
    return model.float().eval()


def load(args, machine):
    """The model that the flags below name -> model, checkpoint (None with --official)."""
    if args.official:
        model = load_official(args.official)
        checkpoint = None
    else:
        model, checkpoint = load_model(args.out_dir, args.model)
    return cast_matrices(model.to(machine.device), machine.dtype), checkpoint


def cast_matrices(model, dtype):
    """For inference: cast once what autocast would cast at every call -> the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    if isinstance(model, CALM):
        model.autoencoder.encoder.embed_tokens.to(dtype)  # also the decoder's output layer
    return model


def check_text(checkpoint, data, what="fingerprint"):
    """End the program unless data is the text of a checkpoint's model, by a checksum, or has at
    least the same "tokenizer"."""
    if checkpoint["data"][what] != data.meta[what]:
        raise SystemExit(f"{data.folder} is not the text that this model was trained on, or has "
                         f"changed ({what}): prepare that text again, or name --data, --out_dir")


def make_parser(description):
    """A parser with the flags of scripts that draw from a model."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out_dir", default=f"out/{DEFAULT_DATA}", help="the run's folder")
    add("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    add("--official", metavar="DIR", help="a published model in place of a run")
    add("--temperature", type=float, default=1.0, help="in (0, 1]")
    add("--num_candidates", type=int, default=64, help="per chunk, at a temperature below 1")
    add("--exact", action="store_true", help="exact sampling (slow), in place of candidates")
    add("--noise", type=float, default=1.0, help="scale of the energy head's noise, 0 to 1")
    add("--seed", type=int, default=0, help="of the samples: same seed, same text")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", choices=DTYPES, help="precision of matrix products")
    return parser


def sampling_of(args):
    """The samplers' flags -> arguments of `next_chunks`."""
    T = args.temperature
    if not 0 < T <= 1:
        raise SystemExit(f"--temperature must be in (0, 1], not {T:g}: the greedy way is --noise 0")
    if args.model == "calm" and not args.exact and args.num_candidates < 1 / T:
        raise SystemExit(f"--num_candidates {args.num_candidates} is below 1/temperature = "
                         f"{1 / T:.3g}: no chunk can come so often")
    return {"temperature": T, "num_candidates": args.num_candidates, "exact": args.exact,
            "noise_scale": args.noise}


# --- Run it ---


def main():
    parser = make_parser("Write text with a trained model.")
    add = parser.add_argument
    add("--tokenizer", help="with --official: Llama 3's file; by default DIR/tokenizer.model")
    add("--start", default="\n", help=r"the prompt, where \n is a line end and \t a tab")
    add("--max_new_tokens", type=int, default=500, help="if the document does not end before")
    add("--texts", type=int, default=1, help="how many, side by side")
    add("--chunks", action="store_true", help="a bar before each chunk")
    args = parser.parse_args()
    sampling = sampling_of(args)
    machine = Machine(args.device, args.dtype)

    model, checkpoint = load(args, machine)
    if args.official:
        tokenizer = get_tokenizer(args.tokenizer or f"{args.official}/tokenizer.model")
    else:
        tokenizer = get_tokenizer(checkpoint["data"]["tokenizer"])
    start = args.start.replace(r"\n", "\n").replace(r"\t", "\t")
    ids = tokenizer.encode_ordinary(start)
    prompt = torch.tensor([ids], dtype=torch.long, device=machine.device).expand(args.texts, -1)
    torch.manual_seed(args.seed)
    with machine.autocast():
        texts = generate(model, prompt, args.max_new_tokens, eot=tokenizer.eot_token,
                         progress=True, **sampling)
    chunk_size = model.chunk_size if args.chunks else None
    for text in texts[:, len(ids):].tolist():
        print(start + show(tokenizer, text, chunk_size))


if __name__ == "__main__":
    main()
