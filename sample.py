"""
Text from a checkpoint.

    python sample.py --start "def main(" --temperature 0.5 --chunks
"""
import codecs
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from calm import KVCache, load_model, load_official, temperature_exact
from data.checkpoint import DEFAULT_RUN, autocast, load_tokenizer, select_device, select_dtype
from data.prepare import Parser, border_token, encode, fail, get_tokenizer, script, within

def pad_front(prompt, chunk_size, eot):
    """Prompt (B, P) -> (B, P') with P' a positive multiple of K: with eot, the border token, in front, so
    that the chunk border falls at the prompt's end. (The authors pad inside the text.)"""
    padding = -prompt.shape[1] % chunk_size if prompt.shape[1] else chunk_size
    if padding and eot is None:
        raise ValueError("a prompt that does not fill its last chunk needs eot, the id to pad with")
    return F.pad(prompt, (padding, 0), value=eot) if padding else prompt

@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=1.0, eot=None, **sampling):
    """Continue prompt (B, P), P from 0 to the context; yields tokens (B, K) as they are drawn.
    eot: the border token. After a sequence's first it yields only that; when all have ended it stops. A text
    longer than the context goes on with the last half of it. sampling: other arguments of `CALM.draw`."""
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be in (0, 1], not {temperature}")
    if temperature < 1 and sampling.get("num_candidates", math.inf) < 1 / temperature:
        raise ValueError(f"num_candidates {sampling['num_candidates']} is below 1/T = {1 / temperature:.1f}")
    K, context = model.chunk_size, model.config.block_size
    cache, text = KVCache(context), pad_front(prompt, K, eot)
    unread, ended = text, torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for made in range(0, max_new_tokens, K):
        if cache.length == context:
            cache.length, unread = 0, text[:, -max(context // 2, 1) * K:]
        h = model.hidden(unread, cache)                                    # (B, T, D)
        new = unread = model.draw(h[:, -1], temperature, **sampling)[0]    # (B, K)
        if eot is not None:
            is_eot = new == eot
            after = ended[:, None] | (is_eot.cumsum(1) - is_eot.long() > 0)   # behind the first end-of-text
            new, ended = new.masked_fill(after, eot), ended | is_eot.any(1)
        yield new
        if eot is not None and ended.all():
            return
        text = torch.cat([text, new], dim=1)
def generate(model, prompt, max_new_tokens, *args, **kwargs):
    """Prompt (B, P) -> tokens (B, P + new): the prompt and up to max_new_tokens more. See `stream`."""
    new = list(stream(model, prompt, max_new_tokens, *args, **kwargs))
    return torch.cat([prompt, *new], dim=1)[:, :prompt.shape[1] + max_new_tokens]
def continue_text(model, data, device, dtype, seed, new_tokens=300):
    """Print a piece of held-out text, and what the model makes of it at T = 1 and at T = 1/2."""
    context = model.config.block_size * model.chunk_size
    prompt = data.batch("val", data.even_offsets("val", 2, context)[-1:], max(context // 4, 1)).to(device)
    print(f"--- held-out text {'-' * 62}\n{show(data.tokenizer, prompt[0].tolist())}")
    for temperature in (1.0, 0.5):
        torch.manual_seed(seed)
        with autocast(device, dtype):
            text = generate(model, prompt, new_tokens, temperature, border_token(data.tokenizer))
        print(f"--- continued by the model at T = {temperature:g} {'-' * 43}")
        print(show(data.tokenizer, text[0, prompt.shape[1]:].tolist()))
def decode(tokenizer, ids):
    """list of ids -> bytes, without the [PAD] of a published model, which is in no tokenizer."""
    return tokenizer.decode_bytes([i for i in ids if i < tokenizer.n_vocab])
def show(tokenizer, ids):
    return decode(tokenizer, ids).decode("utf-8", "replace")

def add_model_flags(add):
    """The flags of a script that loads a model."""
    add("--out_dir", default=DEFAULT_RUN, help="the run's folder")
    add("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    add("--official", metavar="DIR", help="a model that the authors published, in place of a run")
    add("--num_evals", type=within(1, 1000), help="of a flow or diffusion head: evaluations a sample")
    add("--seed", type=within(0, (1 << 20) - 1), default=0, help="of the samples: same seed, same text")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
def load(args):
    """-> model, its checkpoint (of a published model None), device, dtype."""
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    if args.official and args.model == "ar":
        fail("--official names a CALM: drop --model ar")
    changes = {"num_evals": args.num_evals} if args.num_evals else {}
    try:
        if args.official:
            return load_official(args.official, device, dtype, **changes), None, device, dtype
        return *load_model(args.out_dir, args.model, device, dtype, **changes), device, dtype
    except ValueError as error:   # evaluations that this head does not take
        fail(f"--{error}")
def check_vocabulary(model, tokenizer):
    V = model.config.vocab_size
    if V - tokenizer.n_vocab not in (0, 1):   # a published model has one id more than its tokenizer: [PAD]
        fail(f"the model has a vocabulary of {V:,}, {tokenizer.name} one of {tokenizer.n_vocab:,}")
def write(model, tokenizer, prompt, eot, args, sampling):
    """Print the prompt (1, P), and what follows as it is drawn."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # a character may end in the next chunk
    made, began = 0, time.time()
    print(show(tokenizer, [t for t in prompt[0].tolist() if t != eot]), end="", flush=True)
    for new in stream(model, prompt, args.max_new_tokens, args.temperature, eot, **sampling):
        tokens = [t for t in new[0].tolist()[:args.max_new_tokens - made] if t != eot]   # eot ends it
        made, text = made + len(tokens), decoder.decode(decode(tokenizer, tokens))
        print("|" + text if args.chunks and text else text, end="", flush=True)
    seconds = time.time() - began
    print(decoder.decode(b"", final=True))
    print(f"[{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s]", file=sys.stderr)

@script("lower --num_candidates")
def main():
    parser = Parser(description="Write text with a trained model.")
    add = parser.add_argument
    add_model_flags(add)
    add("--tokenizer", help="of --official: Llama 3's tiktoken-format file; None: DIR/tokenizer.model")
    add("--start", default="", help="the prompt, or - for stdin; empty starts a document")
    add("--max_new_tokens", type=within(1), default=500, help="tokens, if the document does not end before")
    add("--chunks", action="store_true", help="a bar before each chunk")
    add("--temperature", type=within(1e-6, 1, float), default=1.0, help="in (0, 1]")
    add("--sampler", default="batch", choices=("batch", "exact"), help="Algorithm 2 (fast) or 1 (exact)")
    add("--num_candidates", type=within(1, 1 << 20), default=200, help="of batch: candidates, at least 1/T")
    add("--max_calls", type=within(1), default=10_000, help="of exact: calls a chunk, then batch takes over")
    args = parser.parse_args()
    if args.tokenizer and not args.official:
        fail("--tokenizer is for --official: a run has the tokenizer of its data")
    model, checkpoint, device, dtype = load(args)
    if args.official:
        tokenizer = get_tokenizer(args.tokenizer or str(Path(args.official) / "tokenizer.model"))
        check_vocabulary(model, tokenizer)
    else:
        tokenizer = load_tokenizer(checkpoint)
    eot = border_token(tokenizer)
    start = sys.stdin.buffer.read() if args.start == "-" else args.start.encode("utf-8", "surrogateescape")
    ids = encode(tokenizer, start, "the prompt")
    context = model.config.block_size * model.chunk_size
    if len(ids) > context:
        print(f"[a prompt of {len(ids):,} tokens: going on from its last {context:,}]", file=sys.stderr)
    prompt = torch.tensor([[eot, *ids][-context:]], device=device)   # a new document
    sampling = {"num_candidates": args.num_candidates} if args.model == "calm" else {}
    if args.sampler == "exact":
        sampling = {"exact": partial(temperature_exact, max_calls=args.max_calls)}
    torch.manual_seed(args.seed)
    try:
        with autocast(device, dtype):
            write(model, tokenizer, prompt, eot, args, sampling)
    except ValueError as error:   # too few candidates for the temperature
        fail(f"--{error}")

if __name__ == "__main__":
    main()
