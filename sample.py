"""
Text from a checkpoint.

    python sample.py --start "def main(" --temperature 0.5
    python sample.py --temperature 0.7 --sampler exact
    python sample.py --model ar --num_samples 3 --seed 1
    python sample.py --start FILE:notes.txt --max_new_tokens 1000
    git diff | python sample.py --start -
    python sample.py --official CALM-M --tokenizer tokenizer.model --start "The history of"
"""
import codecs
import signal
import sys
import time
from pathlib import Path

import torch

from autoencoder import autocast, load_tokenizer, select_device, select_dtype
from calm import check_vocabulary, expected_calls, load_model, load_official, pad_front, stream
from data.prepare import Parser, encode, eot_token, fail, get_tokenizer, within


def read_start(start):
    """--start TEXT | FILE:path | -  ->  bytes"""
    if start == "-":
        return sys.stdin.buffer.read()
    if start.startswith("FILE:"):
        path = Path(start[5:])
        if not path.is_file():
            fail(f"no file {path} to start from: --start takes TEXT, FILE:path or -")
        return path.read_bytes()
    return start.encode("utf-8", "surrogateescape")


def until_eot(tokens, eot):
    return tokens[:tokens.index(eot)] if eot in tokens else tokens


def decode(tokenizer, tokens):
    """ids -> bytes, without the [PAD] of a published model, which is in no tokenizer."""
    return tokenizer.decode_bytes([t for t in tokens if t < tokenizer.n_vocab])


@torch.inference_mode()
def choose_sampler(model, prompt, args):
    """The arguments of `CALM.draw` that the flags ask for; not exact sampling where the first chunk alone would take too long."""
    sampling = dict(num_candidates=args.num_candidates, noise_scale=args.noise_scale)
    if args.sampler == "batch" or args.temperature == 1:
        return sampling
    samples = model.sample_chunks(model.hidden(prompt)[:, -1], 1000, args.noise_scale)
    expected = expected_calls(samples, args.temperature).item()
    if expected > args.max_calls:
        print(f"[exact sampling of the first chunk would take about {expected:,.0f} calls or more, and --max_calls is "
              f"{args.max_calls:,}: using --sampler batch]", file=sys.stderr)
        return sampling
    return sampling | dict(sampler="exact", max_calls=args.max_calls, calls=[])


def write(model, tokenizer, prompt, eot, args, sampling):
    """Draw the texts, one a row of the prompt; the first one streams, the others follow when all are done."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # a character may end in the next chunk
    show = lambda data, final=False: print(decoder.decode(data, final), end="", flush=True)
    start = until_eot(prompt[0].tolist(), eot)
    texts, began = [[] for _ in prompt], time.time()
    show(decode(tokenizer, start))
    for new in stream(model, prompt, args.max_new_tokens, args.temperature, eot, compiled=args.compile, **sampling):
        shown = len(until_eot(texts[0], eot))
        for text, tokens in zip(texts, new.tolist()):
            text += tokens[:args.max_new_tokens - len(text)]
        show(decode(tokenizer, until_eot(texts[0], eot)[shown:]))
    show(b"", final=True)
    seconds = time.time() - began
    texts = [until_eot(text, eot) for text in texts]
    for text in texts[1:]:
        print("\n" + "-" * 80 + "\n" + decode(tokenizer, start + text).decode("utf-8", "replace"), end="")
    total = sum(map(len, texts))
    print(f"\n[{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s]", file=sys.stderr)


def main():
    parser = Parser(description="Write text with a trained model.")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder")
    parser.add_argument("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    parser.add_argument("--official", metavar="DIR", help="a model that the authors published, in place of a run")
    parser.add_argument("--tokenizer", help="of --official: Llama 3's tiktoken-format file; None: DIR/tokenizer.model")
    parser.add_argument("--start", default="", help="the prompt: TEXT, FILE:path, or - for stdin; empty starts a document")
    parser.add_argument("--num_samples", type=within(1), default=1, help="texts, drawn as one batch")
    parser.add_argument("--max_new_tokens", type=within(1), default=500, help="tokens a text, if no end-of-text comes first")
    parser.add_argument("--temperature", type=float, default=1.0, help="in (0, 1]")
    parser.add_argument("--sampler", default="batch", choices=("batch", "exact"),
                        help="at a temperature below 1: Algorithm 2, which is fast, or Algorithm 1, which is exact")
    parser.add_argument("--num_candidates", type=within(1), default=200, help="of batch: candidate chunks, at least 1/T")
    parser.add_argument("--max_calls", type=within(1), default=10_000, help="of exact: samples a chunk, then batch takes over")
    parser.add_argument("--noise_scale", type=within(0, 1, float), default=1.0, help="of the head's noise: a heuristic for a temperature")
    parser.add_argument("--num_evals", type=within(1), help="of a flow or diffusion head: evaluations a sample")
    parser.add_argument("--seed", type=within(0), default=0, help="same seed, same text")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    parser.add_argument("--compile", action="store_true", help="compile the step: a minute's wait, then faster on CUDA")
    args = parser.parse_args()
    if not 0 < args.temperature <= 1:
        fail(f"--temperature must be in (0, 1], not {args.temperature}")
    if args.model == "calm" and args.temperature < 1 and args.num_candidates < 1 / args.temperature:
        fail(f"--num_candidates {args.num_candidates} is below 1/T = {1 / args.temperature:.1f}: raise it or --temperature")
    if args.official and args.model == "ar":
        fail("--official names a CALM: drop --model ar")
    if args.sampler == "exact" and args.compile:
        fail("--sampler exact takes as many steps as it takes, which --compile cannot: drop one of the two")

    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    changes = {"num_evals": args.num_evals} if args.num_evals else {}
    if args.official:
        model = load_official(args.official, device, dtype, **changes)
        tokenizer = get_tokenizer(args.tokenizer or str(Path(args.official) / "tokenizer.model"))
        check_vocabulary(model, tokenizer)
    else:
        model, checkpoint = load_model(args.out_dir, args.model, device, dtype, **changes)
        tokenizer = load_tokenizer(checkpoint)
    eot = eot_token(tokenizer)
    ids = encode(tokenizer, read_start(args.start), "the prompt")
    context = model.config.block_size * model.chunk_size
    if len(ids) > context:
        fail(f"the prompt has {len(ids)} tokens, but the context is {context}: shorten --start")
    prompt = torch.tensor([ids or [eot]] * args.num_samples, device=device)   # an empty one: where a document begins

    torch.manual_seed(args.seed)
    sampling = {}
    with autocast(device, dtype):
        if args.model == "calm":
            sampling = choose_sampler(model, pad_front(prompt[:1], model.chunk_size, eot), args)
        write(model, tokenizer, prompt, eot, args, sampling)
    if sampling.get("calls"):
        calls = torch.stack(sampling["calls"])
        print(f"[exact sampling: {calls.double().mean():,.0f} calls a chunk; {int((calls > args.max_calls).sum())} of {calls.numel()} "
              f"chunks passed --max_calls {args.max_calls:,} and were drawn by batch sampling]", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C ends it at once, without a traceback
    main()
