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
import sys
import time
from pathlib import Path

import torch

from autoencoder import autocast, load_tokenizer, select_device, select_dtype
from calm import check_vocabulary, expected_calls, load_model, load_official, pad_front, stream
from data.prepare import Parser, encode, eot_token, fail, get_tokenizer


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


def main():
    parser = Parser(description="Write text with a trained model.")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder")
    parser.add_argument("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    parser.add_argument("--official", metavar="DIR", help="a model that the authors published, in place of a run")
    parser.add_argument("--tokenizer", help="of --official: Llama 3's tiktoken-format file; None: DIR/tokenizer.model")
    parser.add_argument("--start", default="", help="the prompt: TEXT, FILE:path, or - for stdin; empty starts a document")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, drawn as one batch")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens a text, if no end-of-text comes first")
    parser.add_argument("--temperature", type=float, default=1.0, help="in (0, 1]")
    parser.add_argument("--sampler", default="batch", choices=("batch", "exact"), help="how CALM samples at a temperature below 1: "
                        "Algorithm 2, which is fast, or Algorithm 1, which is exact")
    parser.add_argument("--num_candidates", type=int, default=200, help="of batch: candidate chunks, at least 1/T")
    parser.add_argument("--max_calls", type=int, default=10_000, help="of exact: samples for one chunk, past which batch takes over")
    parser.add_argument("--noise_scale", type=float, default=1.0, help="shrink the head's noise: a heuristic in place of a temperature")
    parser.add_argument("--num_evals", type=int, help="network evaluations a sample of a flow or diffusion head; None: the model's")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    parser.add_argument("--compile", action="store_true", help="compile the step: a minute's wait that pays for long texts on CUDA")
    args = parser.parse_args()
    if not 0 < args.temperature <= 1:
        fail(f"--temperature must be in (0, 1], not {args.temperature}")
    if args.model == "calm" and args.temperature < 1 and args.num_candidates < 1 / args.temperature:
        fail(f"--num_candidates {args.num_candidates} is below 1/T = {1 / args.temperature:.1f}: raise it or --temperature")
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("max_calls", 1), ("num_evals", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.noise_scale <= 1:
        fail(f"--noise_scale must be in [0, 1], not {args.noise_scale}")
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
    eot, K = eot_token(tokenizer), model.chunk_size
    ids = encode(tokenizer, read_start(args.start), "the prompt")
    context = model.config.block_size * K
    if len(ids) > context:
        fail(f"the prompt has {len(ids)} tokens, but the context is {context}: shorten --start")
    ids = ids or [eot]   # an empty prompt: the place where a document begins
    prompt = torch.tensor([ids] * args.num_samples, device=device)

    torch.manual_seed(args.seed)
    calls, sampling = [], {}
    if args.model == "calm":
        sampling = dict(num_candidates=args.num_candidates, noise_scale=args.noise_scale)
        if args.sampler == "exact" and args.temperature < 1:
            sampling |= dict(sampler="exact", max_calls=args.max_calls, calls=calls)
            with torch.inference_mode(), autocast(device, dtype):
                h = model.hidden(pad_front(prompt[:1], K, eot))[:, -1]
                expected = expected_calls(model.sample_chunks(h, 1000, args.noise_scale), args.temperature).item()
            if expected > args.max_calls:
                print(f"[exact sampling of the first chunk would take about {expected:,.0f} calls or more, and --max_calls is "
                      f"{args.max_calls:,}: using --sampler batch]", file=sys.stderr)
                sampling["sampler"] = "batch"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # a character may end in the next chunk
    write = lambda data, final=False: print(decoder.decode(data, final), end="", flush=True)
    texts, began = [[] for _ in range(args.num_samples)], time.time()
    write(decode(tokenizer, until_eot(ids, eot)))
    with autocast(device, dtype):
        for new in stream(model, prompt, args.max_new_tokens, args.temperature, eot, compiled=args.compile, **sampling):
            for text, tokens in zip(texts, new.tolist()):
                shown = len(until_eot(text, eot))
                text += tokens[:args.max_new_tokens - len(text)]
                if text is texts[0]:   # the first text streams, the others follow when all are done
                    write(decode(tokenizer, until_eot(text, eot)[shown:]))
    write(b"", final=True)
    seconds = time.time() - began
    for text in texts[1:]:
        whole = until_eot(ids, eot) + until_eot(text, eot)
        print("\n" + "-" * 80 + "\n" + decode(tokenizer, whole).decode("utf-8", "replace"), end="")
    total = sum(len(until_eot(text, eot)) for text in texts)
    print(f"\n[{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s]", file=sys.stderr)
    if calls:
        calls = torch.stack(calls)
        print(f"[exact sampling: {calls.double().mean():,.0f} calls a chunk; {int((calls > args.max_calls).sum())} of {calls.numel()} "
              f"chunks passed --max_calls {args.max_calls:,} and were drawn by batch sampling]", file=sys.stderr)


if __name__ == "__main__":
    main()
