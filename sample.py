"""
From vectors to text: temperature from samples alone (section 5 of the paper), generation, and the
loading of a trained model.

    python sample.py --start "def main(" --temperature 0.5 --chunks

A softmax is sharpened by dividing its logits by a temperature T. CALM has no logits, only samples.
But n samples decode to the same chunk x with probability P(x)^n: if they all do, x is a draw at
T = 1/n. A low temperature is a matter of drawing more, and of keeping what repeats.

Shapes: B texts, K tokens in a chunk, D width of h, N candidates.
"""
import codecs
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, HEADS, ARConfig, CALMConfig, KVCache
from data.checkpoint import DEFAULT_RUN, load_checkpoint, load_tokenizer
from data.console import Parser, clean_end, fail, within
from data.machine import autocast, select_device, select_dtype
from data.prepare import border_token, encode, get_tokenizer
from data.published import read_official


# --- Temperature without likelihoods (section 5) -------------------------------------------


def temperature_exact(draw, batch, temperature, max_calls=1_000_000):
    """Algorithm 1: a draw from P^(1/T) / Z, with nothing but a sampler of P, for any T in (0, 1).

    For one row, with 1/T = n + a, where n is whole and a is in [0, 1):

        start:  draw x_1 .. x_n. Unless all are equal: go to start.     # x_1 is now ~ P^n
                if a = 0: return x_1
                for i = 1, 2, ...:
                    draw x
                    if x = x_1: return x_1
                    with probability a / i: go to start

    The loop over i returns x_1 with probability P(x_1)^a, so that what is returned is ~ P^(n + a).
    (With q = 1 - P(x_1), it reaches sample i with probability q^(i-1) prod_{j<i} (1 - a/j). These
    sum to (1 - q)^(a-1) = P(x_1)^(a-1), by the binomial series, and each has a chance of P(x_1).)

    Here many rows, each one chunk to draw, run this side by side with samples of their own. They
    get out of step, so `count` says where a row is: at count <= n it is drawing x_1 .. x_n, and at
    count = n + i it is in turn i of the loop.
    draw(m) -> m samples for every row (m, batch, K)
    -> tokens (batch, K), samples that each row took (batch,). A row that is not done after
    max_calls samples gets what Algorithm 2 picks from 200 more.
    """
    n = math.floor(1 / temperature)
    a = 1 / temperature - n
    samples = draw(min(n, 256))                                    # (n, batch, K)
    device = samples.device
    first = torch.zeros_like(samples[0])                           # x_1 of each row's attempt
    count = torch.zeros(batch, dtype=torch.long, device=device)    # samples in this attempt
    all_equal = torch.zeros(batch, dtype=torch.bool, device=device)    # are they all x_1?
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    result = torch.zeros_like(first)                               # of the rows that are done
    calls = torch.zeros(batch, dtype=torch.long, device=device)    # samples in all attempts

    while True:
        for x in samples:                                          # (batch, K): one more sample
            active = ~done & (calls < max_calls)
            calls = calls + active
            count = count + 1
            starting = count == 1
            first = torch.where(starting[:, None], x, first)
            equal = (x == first).all(-1)                           # (batch,)
            all_equal = (all_equal | starting) & equal             # not read once count > n
            i = count - n                                          # from 1 on: in the loop over i

            if a == 0:
                accepted = active & all_equal & (i == 0)
            else:
                accepted = active & equal & (i > 0)   # whose x_1 .. x_n were all equal
            result = torch.where(accepted[:, None], first, result)
            done = done | accepted

            not_all_equal = (i == 0) & ~all_equal
            unlucky = (i > 0) & ~equal & (torch.rand(batch, device=device) < a / i)
            count = count.masked_fill(not_all_equal | unlucky, 0)  # to start

        if (done | (calls >= max_calls)).all():
            break
        samples = draw(min(2 * len(samples), 256))   # fewer, larger calls for rows that need many

    if not done.all():
        warnings.warn(f"a chunk took over {max_calls:,} samples: Algorithm 2 picks it")
        fallback = temperature_batch(draw(200), temperature)
        result = torch.where(done[:, None], result, fallback)
        calls = calls + 200 * ~done
    return result, calls


def temperature_batch(samples, temperature):
    """Algorithm 2: from N candidates, samples (N, batch, K) of P, pick one of each row
    -> tokens (batch, K), ~ P^(1/T) / Z with a bias that vanishes as N grows; T in (0, 1].

    First for 1/T = n, a whole number. Let c be how often a chunk is among the candidates. There are
    C(c, n) ways to take n of its copies, so it is picked with a weight of C(c, n). For example,
    N = 6 candidates a a a b b c at T = 1/2:

        a: C(3, 2) = 3      b: C(2, 2) = 1      c: C(1, 2) = 0

    a is picked with probability 3/4, b with 1/4, c never. For many candidates C(c, n) is in
    proportion to c^n, and c to P. If no chunk is there n times, the paper tries n - 1, and so on;
    here n becomes the largest count at once, which is the same.

    For any T (ours) the binomial coefficient is C(c, s) = G(c + 1) / (G(s + 1) G(c - s + 1)), with
    s = 1/T and the Gamma function G. It is positive for counts c from floor(s) on; smaller ones get
    no weight.
    """
    c = counts(samples).float()                                    # of each candidate, (N, batch)
    s = c.amax(0).clamp_max(1 / temperature)                       # (batch,)
    log_C = (c + 1).lgamma() - (c - s + 1).lgamma()                # G(s + 1) is the same for all
    log_C = log_C.masked_fill(c < s.floor(), -math.inf)
    log_weight = log_C - c.log()                                   # shared by a chunk's c copies
    pick = torch.multinomial(log_weight.softmax(0).T, 1).squeeze(1)    # (batch,)
    return samples[pick, torch.arange(samples.shape[1], device=samples.device)]


def counts(samples):
    """How often each sample's chunk is among the N of its row: (N, batch, K) -> (N, batch)."""
    # Each chunk becomes one number, a 64-bit hash. In a sorted row, equal ones stand together.
    key = samples[..., 0].T.contiguous()                           # (batch, N)
    for k in range(1, samples.shape[2]):
        key = key * 1_000_003 + samples[..., k].T
    in_order = key.sort(dim=-1).values
    begin = torch.searchsorted(in_order, key)
    end = torch.searchsorted(in_order, key, right=True)
    return (end - begin).T


def draw(model, h, temperature=1.0, n=1, num_candidates=200, exact=None):
    """n next chunks for each h (B, D) at a temperature in (0, 1] -> tokens (n, B, K).

    CALM draws by Algorithm 2 from num_candidates, unless `exact` is a function to draw with in its
    place: temperature_exact, or a partial of it. AR needs neither: it has a softmax.
    """
    if isinstance(model, AR):
        return model.sample_chunks(h, n, temperature)
    if temperature == 1:
        return model.sample_chunks(h, n)

    rows = n * len(h)

    def candidates(count):
        return model.sample_chunks(h, count * n).view(count, rows, -1)

    if exact is not None:
        tokens, _ = exact(candidates, rows, temperature)           # (n * B, K)
    else:
        tokens = temperature_batch(candidates(num_candidates), temperature)
    return tokens.view(n, len(h), -1)


# --- Generation ----------------------------------------------------------------------------


def pad_front(prompt, chunk_size, eot):
    """Prompt (B, P) -> (B, P'), P' a positive multiple of K, with the token eot in front.

    So a chunk ends where the prompt ends.
    """
    padding = -prompt.shape[1] % chunk_size
    if prompt.shape[1] == 0:
        padding = chunk_size
    if padding == 0:
        return prompt
    if eot is None:
        raise ValueError("a prompt that does not fill its last chunk needs eot, to pad with")
    return F.pad(prompt, (padding, 0), value=eot)


@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=1.0, eot=None, **sampling):
    """Continue prompt (B, P), P from 0 to the context. Yields tokens (B, K) as they are drawn.

    eot: the end-of-text token. After its first one a text is filled with it, and generation stops
    when all texts have one. None: no token is special.
    A text that outgrows the context goes on with the last half of the context.
    sampling: other arguments of `draw`.
    """
    check_sampling(temperature, **sampling)
    K = model.chunk_size
    context = model.config.block_size                              # in chunks
    cache = KVCache(context)
    text = pad_front(prompt, K, eot)
    unread = text                                                  # what is not in the cache yet
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for _ in range(0, max_new_tokens, K):
        if cache.length == context:
            cache.length = 0
            unread = text[:, -max(context // 2, 1) * K:]
        h = model.hidden(unread, cache)                            # (B, T, D)
        new = draw(model, h[:, -1], temperature, **sampling)[0]    # (B, K)
        if eot is not None:
            is_eot = new == eot
            after_eot = (is_eot.cumsum(1) - is_eot.long()) > 0     # after the first of this chunk
            new = new.masked_fill(ended[:, None] | after_eot, eot)
            ended = ended | is_eot.any(1)
        yield new
        if eot is not None and ended.all():
            return
        unread = new
        text = torch.cat([text, new], dim=1)


def check_sampling(temperature, num_candidates=None, exact=None):
    """Raise ValueError unless the temperature T is in (0, 1] and num_candidates, if it is given, is
    at least 1/T."""
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], not {temperature}")
    if temperature < 1 and num_candidates and num_candidates < 1 / temperature:
        raise ValueError(f"num_candidates {num_candidates} is below 1/T = {1 / temperature:.1f}")


def generate(model, prompt, max_new_tokens, *args, **kwargs):
    """Prompt (B, P) -> tokens (B, P + new): it and up to max_new_tokens more. See `stream`."""
    new = list(stream(model, prompt, max_new_tokens, *args, **kwargs))
    return torch.cat([prompt, *new], dim=1)[:, :prompt.shape[1] + max_new_tokens]


def continue_text(model, data, device, dtype, seed, new_tokens=300):
    """Print a piece of held-out text, and what the model makes of it at T = 1 and at T = 1/2."""
    context = model.config.block_size * model.chunk_size
    offset = data.even_offsets("val", 2, context)[-1:]
    prompt = data.batch("val", offset, max(context // 4, 1)).to(device)
    print(f"--- held-out text {'-' * 62}\n{show(data.tokenizer, prompt[0].tolist())}")
    for temperature in (1.0, 0.5):
        torch.manual_seed(seed)
        with autocast(device, dtype):
            eot = border_token(data.tokenizer)
            text = generate(model, prompt, new_tokens, temperature, eot)
        print(f"--- continued by the model at T = {temperature:g} {'-' * 43}")
        print(show(data.tokenizer, text[0, prompt.shape[1]:].tolist()))


def decode(tokenizer, ids):
    """list of ids -> bytes, without the [PAD] of a published model, which is in no tokenizer."""
    return tokenizer.decode_bytes([i for i in ids if i < tokenizer.n_vocab])


def show(tokenizer, ids):
    """list of ids -> text; what is not UTF-8 becomes a replacement character."""
    return decode(tokenizer, ids).decode("utf-8", "replace")


# --- Loading a run's model, or the authors' weights ----------------------------------------


def load_model(out_dir, kind, device="cpu", dtype=torch.float32, **changes):
    """The model of a run -> model in eval mode with its matrices in `dtype`, and its checkpoint.

    kind: calm or ar. changes: fields of CALMConfig in place of the run's.
    """
    checkpoint = load_checkpoint(Path(out_dir) / f"{kind}.pt", kind)
    if kind == "ar":
        model = AR(ARConfig(**checkpoint["config"]))
    else:
        autoencoder = Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"]))
        model = CALM(CALMConfig(**checkpoint["config"] | changes), autoencoder)
    model.load_state_dict(checkpoint["model"])
    return cast_matrices(model.to(device).eval(), dtype), checkpoint


def load_official(folder, device="cpu", dtype=torch.float32, **changes):
    """A directory as the authors publish a model -> CALM in eval mode, its matrices in `dtype`."""
    sizes, autoencoder_sizes, state = read_official(Path(folder))
    try:
        with torch.device("meta"):   # no memory for first weights, which are replaced at once
            head = guess_head(sizes, state)
            config = CALMConfig(**sizes | changes, head=head)
            model = CALM(config, Autoencoder(AutoencoderConfig(**autoencoder_sizes)))
            model = cast_matrices(model, dtype)
        for name, parameter in model.state_dict().items():
            if name in state:
                state[name] = state[name].to(parameter.dtype)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:   # load_state_dict names what does not fit
        what = " ".join(str(error).split())[:500]
        fail(f"{folder} is not a published CALM: {what}")
    return model.to(device).eval()


def guess_head(sizes, state):
    """The name of that head in HEADS which most of the tensors named head.* fit."""

    def tensors_that_fit(head):
        tensors = HEADS[head](CALMConfig(**sizes, head=head)).state_dict()
        shapes = {f"head.{name}": tensor.shape for name, tensor in tensors.items()}
        return sum(name in state and state[name].shape == shapes[name] for name in shapes)

    return max(HEADS, key=tensors_that_fit)


def cast_matrices(model, dtype):
    """For inference: cast once what autocast would cast at every call -> the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "autoencoder.encoder.embed_tokens":
            module.to(dtype)
    return model


def add_model_flags(add):
    """The flags of a script that loads a model."""
    add("--out_dir", default=DEFAULT_RUN, help="the run's folder")
    add("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    add("--official", metavar="DIR", help="a model that the authors published, in place of a run")
    add("--num_evals", type=within(1, 1000),
        help="evaluations per sample of a flow or diffusion head")
    add("--seed", type=within(0, (1 << 20) - 1), default=0,
        help="of the samples: same seed, same text")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of matrix products")


def load(args):
    """What those flags ask for -> model, its checkpoint (None if published), device, dtype."""
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    if args.official and args.model == "ar":
        fail("--official names a CALM: drop --model ar")
    changes = {"num_evals": args.num_evals} if args.num_evals else {}
    try:
        if args.official:
            return load_official(args.official, device, dtype, **changes), None, device, dtype
        model, checkpoint = load_model(args.out_dir, args.model, device, dtype, **changes)
        return model, checkpoint, device, dtype
    except ValueError as error:   # a number of evaluations that this head does not take
        fail(f"--{error}")


def check_vocabulary(model, tokenizer):
    """Fail unless a published model may be used with this tokenizer."""
    V = model.config.vocab_size
    if V - tokenizer.n_vocab not in (0, 1):   # theirs have one id more: [PAD]
        fail(f"the model has a vocabulary of {V:,}, "
             f"{tokenizer.name} one of {tokenizer.n_vocab:,}")


# --- Run it --------------------------------------------------------------------------------


def write(model, tokenizer, prompt, eot, args, sampling):
    """Print the prompt (1, P), and what follows as it is drawn."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # characters may span chunks
    made = 0
    began = time.time()
    print(show(tokenizer, [t for t in prompt[0].tolist() if t != eot]), end="", flush=True)
    for new in stream(model, prompt, args.max_new_tokens, args.temperature, eot, **sampling):
        tokens = new[0].tolist()[:args.max_new_tokens - made]
        tokens = [t for t in tokens if t != eot]
        made += len(tokens)
        text = decoder.decode(decode(tokenizer, tokens))
        if args.chunks and text:
            text = "|" + text
        print(text, end="", flush=True)
    seconds = time.time() - began
    print(decoder.decode(b"", final=True))
    print(f"[{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s]", file=sys.stderr)


def read_prompt(args, tokenizer, context):
    """--start -> tokens (1, P), behind a border token: a new document. At most `context` long."""
    if args.start == "-":
        start = sys.stdin.buffer.read()
    else:
        start = args.start.encode("utf-8", "surrogateescape")
    ids = encode(tokenizer, start, "the prompt")
    if len(ids) > context:
        print(f"[a prompt of {len(ids):,} tokens: going on from its last {context:,}]",
              file=sys.stderr)
    ids = [border_token(tokenizer), *ids]
    return torch.tensor([ids[-context:]])


def main():
    with clean_end(when_memory_is_full="lower --num_candidates"):
        parser = Parser(description="Write text with a trained model.")
        add = parser.add_argument
        add_model_flags(add)
        add("--tokenizer",
            help="with --official: Llama 3's file; None: DIR/tokenizer.model")
        add("--start", default="", help="the prompt, or - for stdin; empty starts a document")
        add("--max_new_tokens", type=within(1), default=500,
            help="tokens, if the document does not end before")
        add("--chunks", action="store_true", help="a bar before each chunk")
        add("--temperature", type=within(1e-6, 1, float), default=1.0, help="in (0, 1]")
        add("--sampler", default="batch", choices=("batch", "exact"),
            help="Algorithm 2 (fast) or 1 (exact)")
        add("--num_candidates", type=within(1, 1 << 20), default=200,
            help="for batch: candidates per chunk, at least 1/T")
        add("--max_calls", type=within(1), default=10_000,
            help="for exact: samples per chunk, then batch takes over")
        args = parser.parse_args()
        if args.tokenizer and not args.official:
            fail("--tokenizer is for --official: a run has the tokenizer of its data")

        model, checkpoint, device, dtype = load(args)
        if args.official:
            file = args.tokenizer or str(Path(args.official) / "tokenizer.model")
            tokenizer = get_tokenizer(file)
            check_vocabulary(model, tokenizer)
        else:
            tokenizer = load_tokenizer(checkpoint)
        context = model.config.block_size * model.chunk_size       # in tokens
        prompt = read_prompt(args, tokenizer, context).to(device)
        sampling = {}
        if args.model == "calm" and args.sampler == "batch":
            sampling = {"num_candidates": args.num_candidates}
        elif args.model == "calm":
            sampling = {"exact": partial(temperature_exact, max_calls=args.max_calls)}

        torch.manual_seed(args.seed)
        try:
            with autocast(device, dtype):
                write(model, tokenizer, prompt, border_token(tokenizer), args, sampling)
        except ValueError as error:   # too few candidates for the temperature
            fail(f"--{error}")


if __name__ == "__main__":
    main()
