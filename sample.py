"""
From vectors to text: temperature from samples alone (section 5 of the paper), generation, and the
loading of a trained model.

    python sample.py --start "def main(" --sampler near --chunks

A softmax is sharpened by dividing its logits by a temperature T. CALM has no logits, only samples.
But n samples decode to the same chunk x with probability P(x)^n: if they all do, x is a draw at
T = 1/n. A low temperature is a matter of drawing more, and of keeping what repeats: Algorithms 1
and 2 of the paper. After them come two cheaper ways of ours, `nearest_chunk` and `less_noise`.

Shapes: B texts, K tokens in a chunk, D width of h, L width of a vector, N or m candidates.
"""
import codecs
import math
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, HEADS, ARConfig, CALMConfig, EnergyHead, KVCache
from data.checkpoint import DEFAULT_RUN, load_checkpoint, load_tokenizer
from data.console import Parser, bar_options, clean_end, fail, within
from data.machine import autocast, select_device, select_dtype
from data.prepare import border_token, decode, encode, get_tokenizer
from data.published import read_official


# --- Temperature without likelihoods (section 5) -------------------------------------------

# What --sampler near does. Text of the default run is then about as varied as real text.
NEAR = {"nearest_of": 2, "noise_scale": 0.35}


def temperature_exact(draw, batch, temperature, max_calls=1_000_000):
    """Algorithm 1: a draw from P^(1/T) / Z, with nothing but a sampler of P, for any T in (0, 1).

    For one row, with 1/T = n + a, where n is whole and a is in [0, 1):

        start:  draw x_1 .. x_n. Once one is not x_1: go to start.      # x_1 is now ~ P^n
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
    -> tokens (batch, K), number of samples that each row took (batch,). A row that is not done
    after max_calls samples gets what Algorithm 2 picks from 200 more; its number of samples, then
    above max_calls, tells so.
    """
    n = math.floor(1 / temperature)
    a = 1 / temperature - n
    samples = draw(min(n, 256))                                    # (n, batch, K)
    device = samples.device
    first = torch.zeros_like(samples[0])                           # x_1 of each row's attempt
    count = torch.zeros(batch, dtype=torch.long, device=device)    # samples in this attempt
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    result = torch.zeros_like(first)                               # of the rows that are done
    taken = torch.zeros(batch, dtype=torch.long, device=device)    # samples in all attempts

    while True:
        for x in samples:                                          # (batch, K): one more sample
            active = ~done & (taken < max_calls)
            taken = taken + active
            count = count + 1
            first = torch.where((count == 1)[:, None], x, first)
            equal = (x == first).all(-1)                           # (batch,)
            i = count - n                                          # from 1 on: in the loop over i

            if a == 0:
                accepted = active & equal & (i == 0)
            else:
                accepted = active & equal & (i > 0)
            result = torch.where(accepted[:, None], first, result)
            done = done | accepted

            starts_anew = (i <= 0) | (torch.rand(batch, device=device) < a / i)
            count = count.masked_fill(~equal & starts_anew, 0)

        if (done | (taken >= max_calls)).all():
            break
        samples = draw(min(2 * len(samples), 256))   # fewer, larger calls for rows that need many

    if not done.all():
        warnings.warn(f"a chunk took over {max_calls:,} samples: Algorithm 2 picks it")
        fallback = temperature_batch(draw(200), temperature)
        result = torch.where(done[:, None], result, fallback)
        taken = taken + 200 * ~done
    return result, taken


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
    # In float64, for lgamma of large numbers; on the CPU, for not every device has float64.
    c = counts(samples).cpu().double()                             # of each candidate, (N, batch)
    s = c.amax(0).clamp_max(1 / temperature)                       # (batch,)
    log_C = (c + 1).lgamma() - (c - s + 1).lgamma()                # G(s + 1) is the same for all
    log_C = log_C.masked_fill(c < s.floor(), -math.inf)
    log_weight = log_C - c.log()                                   # shared by a chunk's c copies
    pick = torch.multinomial(log_weight.softmax(0).T, 1).squeeze(1)    # (batch,)
    return samples[pick, torch.arange(samples.shape[1])]


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


def temperature_as_needed(draw, batch, temperature, num_candidates=200, first=None):
    """Algorithm 2 with no more candidates than a row needs (ours).

    `first` (None: 8/T), twice, four times, ... as many candidates are drawn until some chunk has
    come 1/T times, rounded up, or there are num_candidates. Algorithm 2 picks from those. An easy
    chunk takes few. The price: what is drawn is warmer than T says, however large the limit is.
    With first = num_candidates this is Algorithm 2 as it stands.
    draw(m, rows) -> m samples for each of these rows (m, len(rows), K)
    -> tokens (batch, K), number of samples that each row took (batch,)
    """
    if num_candidates < 1 / temperature:
        raise ValueError(f"num_candidates {num_candidates} is below 1/T = {1 / temperature:.4g}")
    first = first or math.ceil(8 / temperature)
    rows = torch.arange(batch)                                     # that draw on
    samples = draw(min(first, num_candidates), rows)               # (N, len(rows), K)
    result = torch.zeros_like(samples[0])                          # (batch, K)
    taken = torch.zeros(batch, dtype=torch.long)
    while True:
        N = len(samples)
        enough = (counts(samples).amax(0) >= 1 / temperature).cpu()
        if N == num_candidates:
            enough[:] = True
        result[rows[enough]] = temperature_batch(samples[:, enough], temperature)
        taken[rows[enough]] = N
        rows = rows[~enough]
        if len(rows) == 0:
            return result, taken
        more = draw(min(N, num_candidates - N), rows)
        samples = torch.cat([samples[:, ~enough], more])


def algorithm_2(num_candidates, name):
    """Algorithm 2 as a sampler for `next_chunks`. name: "as_needed", with at most num_candidates;
    or "batch", with all of them at once."""
    first = None if name == "as_needed" else num_candidates
    return partial(temperature_as_needed, num_candidates=num_candidates, first=first)


def nearest_chunk(model, h, m):
    """Ours: draw m vectors for each h (B, D), and keep the one that lies closest to the encoder's
    mean for the chunk that it decodes to -> tokens of that chunk (B, K).

    Most vectors that the head draws lie between those of the chunks: the default run's about seven
    times as far from the mean of their chunk as a sample of its posterior does. They decode to some
    chunk all the same, but mostly to a wrong one. So a larger m is a safer choice, like a lower
    temperature; m = 1 is T = 1. Algorithms 1 and 2 wait for a chunk to come twice, which hardly
    ever happens where the vocabulary is large. This does not.
    """
    z = model.sample_vectors(h, m)                                 # (m, B, L)
    tokens = model.autoencoder.tokens(z)                           # (m, B, K)
    mean, _ = model.autoencoder.encode(tokens)                     # (m, B, L)
    nearest = (z.float() - mean).norm(dim=-1).argmin(0)            # (B,)
    return tokens[nearest, torch.arange(len(h), device=h.device)]


@contextmanager
def less_noise(head, scale):
    """Ours: within this context an energy head multiplies its noise by `scale`, from 0 (none) to 1
    (all, as in training), where it enters the residual stream: behind norm_noise, which would undo
    most of it. The other heads take no notice.

    The less noise there is, the less the vectors for one h differ, and the likelier are the chunks
    that they decode to. Like a low temperature it trades variety for safety, but it costs nothing.
    It is not P^(1/T). Each block's LayerNorm undoes the scale, too, so the block's MLP still sees
    the noise, except at 0: then there is one vector for each h.
    """
    head.noise_scale = scale
    try:
        yield
    finally:
        head.noise_scale = 1.0


def next_chunks(model, h, temperature=1.0, n=1, sampler=temperature_as_needed, nearest_of=1,
                noise_scale=1.0, calls=None):
    """n next chunks for each h (B, D) at a temperature in (0, 1] -> tokens (n, B, K).

    sampler: how CALM draws at T < 1: temperature_as_needed, temperature_exact, or a partial of
    these. AR needs none: it has a softmax.
    nearest_of: if above 1, CALM draws by `nearest_chunk` of so many samples; the temperature is
    ignored. noise_scale: of an energy head, see `less_noise`.
    calls: a list, to which the number of samples that each chunk took (n * B,) is appended. Nothing
    is, if each took one.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], not {temperature}")
    if isinstance(model, AR):
        return model.sample_chunks(h, n, temperature)
    with less_noise(model.head, noise_scale):
        if temperature == 1 and nearest_of == 1:
            return model.sample_chunks(h, n)
        tokens, taken = choose(model, h.repeat(n, 1), temperature, sampler, nearest_of)
    if calls is not None:
        calls.append(taken.cpu())
    return tokens.view(n, len(h), -1)


def choose(model, h_rows, temperature, sampler, nearest_of):
    """One chunk for each h (rows, D), chosen among several samples -> tokens (rows, K), number of
    samples that each took (rows,). The arguments are those of `next_chunks`."""

    def draw(m, rows=slice(None)):
        return model.sample_chunks(h_rows[rows], m)

    if nearest_of > 1:
        at_once = max(1, 2**14 // nearest_of)                      # rows: so memory stays bounded
        tokens = [nearest_chunk(model, part, nearest_of) for part in h_rows.split(at_once)]
        return torch.cat(tokens), torch.full((len(h_rows),), nearest_of)
    return sampler(draw, len(h_rows), temperature)


# --- Generation ----------------------------------------------------------------------------


def whole_chunks(prompt, chunk_size, eot):
    """Prompt (B, length) -> (B, a positive multiple of K): a chunk ends where the prompt ends.

    Up to K - 1 tokens at its front are left out. What remains is like the windows of training,
    which begin anywhere in a text; padding in front would make a first chunk unlike any of those.
    Only a prompt shorter than a chunk is padded, with the token eot.
    """
    length = prompt.shape[1]
    if length >= chunk_size:
        return prompt[:, length % chunk_size:]
    if eot is None:
        raise ValueError("a prompt that is shorter than a chunk needs eot, to fill it up")
    return F.pad(prompt, (chunk_size - length, 0), value=eot)


@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=1.0, eot=None, **sampling):
    """Continue prompt (B, length), of 0 tokens up to the context. Yields tokens (B, K) as drawn.

    eot: the token between documents, which ends a text (see `border_token`). After its first one a
    text is filled with it, and generation stops when all texts have one. None: no token ends it.
    A text that outgrows the context goes on with the last half of the context.
    sampling: other arguments of `next_chunks`.
    """
    K = model.chunk_size
    block_size = model.config.block_size                           # the context, in chunks
    cache = KVCache(block_size)
    text = whole_chunks(prompt, K, eot)
    unread = text                                                  # what is not in the cache yet
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for _ in range(0, max_new_tokens, K):
        if cache.length == block_size:
            cache.length = 0
            unread = text[:, -max(block_size // 2, 1) * K:]
        h = model.hidden(unread, cache)                            # (B, chunks of `unread`, D)
        new = next_chunks(model, h[:, -1], temperature, **sampling)[0]    # (B, K)
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


def generate(model, prompt, max_new_tokens, *args, **kwargs):
    """Prompt (B, length) -> it and up to max_new_tokens more (B, length + new). See `stream`."""
    new = list(stream(model, prompt, max_new_tokens, *args, **kwargs))
    return torch.cat([prompt, *new], dim=1)[:, :prompt.shape[1] + max_new_tokens]


def ways_to_write(model, noise_scale=1.0):
    """In which ways a model's text is shown -> {a name: arguments of `next_chunks`}. noise_scale:
    at T = 1 and 0.5; near has its own."""
    if isinstance(model, AR):
        return {"T = 1": {}, "T = 0.5": {"temperature": 0.5}}
    less = "" if noise_scale == 1 else f", noise {noise_scale:g}"
    return {f"T = 1{less}": {"noise_scale": noise_scale},
            "near": NEAR,
            f"T = 0.5{less}": {"noise_scale": noise_scale, "temperature": 0.5}}


def continue_text(model, data, device, dtype, seed, new_tokens=300):
    """Print a piece of held-out text, and how the model continues it in different ways."""
    context = model.config.block_size * model.chunk_size
    offset = data.even_offsets("val", 2, context)[-1:]             # in the middle of the split
    prompt = data.batch("val", offset, max(context // 4, 1)).to(device)
    print(f"--- held-out text {'-' * 62}\n{show(data.tokenizer, prompt[0].tolist())}")
    eot = border_token(data.tokenizer)
    for way, sampling in ways_to_write(model).items():
        torch.manual_seed(seed)
        calls = []
        with autocast(device, dtype):
            text = generate(model, prompt, new_tokens, eot=eot, calls=calls, **sampling)
        cost = f", {torch.cat(calls).double().mean():.0f} samples per chunk" if calls else ""
        print(f"--- continued by the model, {way}{cost} {'-' * 30}")
        print(show(data.tokenizer, text[0, prompt.shape[1]:].tolist()))


def document_start(model, checkpoint, tokenizer):
    """What the model reads before a new document begins -> list of ids.

    In training that is the end of another document and a border token, so a run's checkpoint has
    such a text. A published model does not say what it has read there: it gets border tokens.
    """
    if checkpoint is None:
        return [border_token(tokenizer)] * model.chunk_size
    context = model.config.block_size * model.chunk_size
    return checkpoint["document_start"][-(context // 2):]


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
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    if isinstance(model, CALM) and model.config.input_mode == "discrete":
        # The decoder's last matrix. In the other modes h depends on it, so there it stays float32.
        model.autoencoder.encoder.embed_tokens.to(dtype)
    return model


def add_model_flags(add):
    """The flags of a script that loads a model."""
    add("--out_dir", default=DEFAULT_RUN, help="the run's folder")
    add("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    add("--official", metavar="DIR", help="a model that the authors published, in place of a run")
    add("--num_evals", type=within(1, 1000),
        help="evaluations per sample of a flow or diffusion head")
    add("--noise", type=within(0, 1, float),
        help="scale of the energy head's noise, from 0 to 1: less gives likelier, less varied "
        f"text, at no cost; None: 1, with --sampler near {NEAR['noise_scale']}")
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
            model = load_official(args.official, device, dtype, **changes)
            checkpoint = None
        else:
            model, checkpoint = load_model(args.out_dir, args.model, device, dtype, **changes)
    except ValueError as error:   # a number of evaluations that this head does not take
        fail(f"--{error}")
    return model, checkpoint, device, dtype


def chosen_noise_scale(args, model):
    """What --noise asks for, or else the default of the sampler. AR has none, and ignores it."""
    if args.noise is None:
        return NEAR["noise_scale"] if args.sampler == "near" else 1.0
    if isinstance(model, CALM) and not isinstance(model.head, EnergyHead):
        fail(f"--noise is for the energy head, not for {type(model.head).__name__}: drop it")
    return args.noise


def check_vocabulary(model, tokenizer):
    """Fail unless a published model may be used with this tokenizer."""
    V = model.config.vocab_size
    if V - tokenizer.n_vocab not in (0, 1):   # theirs have one id more: [PAD]
        fail(f"the model has a vocabulary of {V:,}, "
             f"{tokenizer.name} one of {tokenizer.n_vocab:,}")


# --- Run it --------------------------------------------------------------------------------


def how_to_draw(args, model):
    """The flags of the sampler -> arguments of `next_chunks`."""
    T = args.temperature
    default = NEAR["nearest_of"] if args.sampler == "near" else 200
    N = args.num_candidates or default
    how = {"temperature": T, "noise_scale": chosen_noise_scale(args, model)}
    if args.sampler == "near":
        if T < 1:
            fail("--sampler near has no temperature: drop --temperature, and choose "
                 "--num_candidates (more: safer text)")
        return how | {"nearest_of": N}
    if args.sampler == "exact":
        return how | {"sampler": partial(temperature_exact, max_calls=args.max_calls)}
    if args.model == "calm" and N < 1 / T:
        fail(f"--num_candidates {N} is below 1/T = {1 / T:.4g}")
    return how | {"sampler": algorithm_2(N, args.sampler)}


def write(model, tokenizer, tokens, prompt, args, **sampling):
    """Print the prompt, a list of ids, and what follows. A single text is printed as it is drawn,
    several only when all are done.

    tokens (1, P): what the model reads first; the prompt is its end.
    sampling: arguments of `next_chunks`.
    """
    eot = border_token(tokenizer)
    calls = []                                                     # samples that each chunk took
    drawn = []                                                     # chunks (texts, K)
    began = time.time()
    chunks = stream(model, tokens.expand(args.texts, -1), args.max_new_tokens, eot=eot, calls=calls,
                    **sampling)
    chunks = kept_in(drawn, chunks)                                # from now on `drawn` fills up
    start = show(tokenizer, prompt)
    if args.texts == 1:
        print(start, end="", flush=True)
        for part in parts_of_text(chunks, 0, tokenizer, args):
            print(part, end="", flush=True)
        print()
    else:
        total = math.ceil(args.max_new_tokens / model.chunk_size)
        for _ in tqdm(chunks, desc="write", total=total, unit="chunk", **bar_options()):
            pass
        for i in range(args.texts):
            text = start + "".join(parts_of_text(drawn, i, tokenizer, args))
            print(f"--- text {i + 1} {'-' * 66}\n{text}")
    seconds = time.time() - began
    made = 0
    for i, chunk in enumerate(drawn):                              # the last one may be cut
        made += (chunk[:, :args.max_new_tokens - i * model.chunk_size] != eot).sum().item()
    cost = describe_calls(calls, args) if calls else ""
    print(f"[{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s{cost}]",
          file=sys.stderr)


def kept_in(values, iterator):
    """The values of an iterator, which are also put into a list."""
    for value in iterator:
        values.append(value)
        yield value


def parts_of_text(chunks, i, tokenizer, args):
    """Chunks (texts, K), one after the other -> the text of row i, string by string."""
    eot = border_token(tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")     # characters may span chunks
    left = args.max_new_tokens
    for chunk in chunks:
        ids = [t for t in chunk[i].tolist()[:left] if t != eot]
        left -= chunk.shape[1]
        text = decoder.decode(decode(tokenizer, ids))              # ids -> bytes -> text
        bar = "|" if args.chunks and text else ""
        yield bar + text
    yield decoder.decode(b"", final=True)


def describe_calls(calls, args):
    """What the temperature has cost. calls: how many samples each chunk took."""
    calls = torch.cat(calls)
    text = f", {calls.double().mean():.0f} samples per chunk"
    if args.sampler == "exact":
        text += f", {(calls > args.max_calls).double().mean():.0%} of them left to Algorithm 2"
    return text


def read_prompt(args, tokenizer, context):
    """--start -> list of ids, at most `context` of them."""
    if args.start == "-":
        start = sys.stdin.buffer.read()
    else:
        start = args.start.replace(r"\n", "\n").replace(r"\t", "\t")
        start = start.encode("utf-8", "surrogateescape")
    ids = encode(tokenizer, start, "the prompt")
    if len(ids) > context:
        print(f"[a prompt of {len(ids):,} tokens: going on from its last {context:,}]",
              file=sys.stderr)
    return ids[-context:]


def main():
    with clean_end(when_memory_is_full="lower --texts or --num_candidates"):
        parser = Parser(description="Write text with a trained model.")
        add = parser.add_argument
        add_model_flags(add)
        add("--tokenizer",
            help="with --official: Llama 3's file; None: DIR/tokenizer.model")
        add("--start", default="", help=r"the prompt, where \n is a line end and \t a tab; "
            "- for stdin; empty starts a document")
        add("--max_new_tokens", type=within(1), default=500,
            help="tokens, if the document does not end before")
        add("--texts", type=within(1, 1 << 20), default=1, help="how many, side by side")
        add("--chunks", action="store_true", help="a bar before each chunk")
        add("--temperature", type=within(1e-6, 1, float), default=1.0, help="in (0, 1]")
        add("--sampler", default="as_needed", choices=("as_needed", "batch", "exact", "near"),
            help="Algorithm 2 with few candidates, with all of them; Algorithm 1; or, without a "
            "temperature, the candidate nearest to what it decodes to")
        add("--num_candidates", type=within(1, 1 << 20),
            help=f"samples per chunk; None: for near {NEAR['nearest_of']}, else 200 (Algorithm 2 "
            "needs at least 1/T)")
        add("--max_calls", type=within(1), default=10_000,
            help="of Algorithm 1: samples per chunk, then Algorithm 2 takes over")
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
        prompt = read_prompt(args, tokenizer, context)
        ids = prompt
        if len(prompt) < model.chunk_size:   # no whole chunk: a new document, which begins so
            ids = document_start(model, checkpoint, tokenizer) + prompt
        tokens = torch.tensor([ids], device=device)
        sampling = how_to_draw(args, model)
        torch.manual_seed(args.seed)
        with autocast(device, dtype):
            write(model, tokenizer, tokens, prompt, args, **sampling)


if __name__ == "__main__":
    main()
