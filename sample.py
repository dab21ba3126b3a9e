"""
Text from a checkpoint.

    python sample.py --start "def main(" --temperature 0.5
    python sample.py --model ar --num_samples 3 --seed 1
    python sample.py --start FILE:notes.txt --max_new_tokens 1000
    git diff | python sample.py --start -
"""
import codecs
import sys
import time
from pathlib import Path

import torch

from autoencoder import autocast, load_tokenizer, select_device, select_dtype
from calm import load_model, stream
from data.prepare import Parser, encode, eot_token, fail


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


def main():
    parser = Parser(description="Write text with a trained model.")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder")
    parser.add_argument("--model", default="calm", choices=("calm", "ar"), help="which of its models")
    parser.add_argument("--start", default="", help="the prompt: TEXT, FILE:path, or - for stdin; empty starts a document")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, drawn as one batch")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens a text, if no end-of-text comes first")
    parser.add_argument("--temperature", type=float, default=1.0, help="in (0, 1]; below 1 CALM uses batch sampling (Algorithm 2)")
    parser.add_argument("--num_candidates", type=int, default=200, help="candidate chunks for a temperature below 1, at least 1/T")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    parser.add_argument("--compile", action="store_true", help="compile the step: a minute's wait that pays for long texts on CUDA")
    args = parser.parse_args()
    if not 0 < args.temperature <= 1:
        fail(f"--temperature must be in (0, 1], not {args.temperature}")
    if args.model == "calm" and args.temperature < 1 and args.num_candidates < 1 / args.temperature:
        fail(f"--num_candidates {args.num_candidates} is below 1/T = {1 / args.temperature:.1f}: raise it or --temperature")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        fail("--num_samples and --max_new_tokens must be at least 1")

    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    model, checkpoint = load_model(args.out_dir, args.model, device, dtype)
    tokenizer = load_tokenizer(checkpoint)
    eot, K = eot_token(tokenizer), model.chunk_size
    ids = encode(tokenizer, read_start(args.start), "the prompt")
    context = model.config.block_size * K
    if len(ids) > context:
        fail(f"the prompt has {len(ids)} tokens, but the context is {context}: shorten --start")
    ids = ids or [eot]   # an empty prompt: the place where a document begins
    prompt = torch.tensor([ids] * args.num_samples, device=device)

    torch.manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")   # a character may end in the next chunk
    write = lambda data, final=False: print(decoder.decode(data, final), end="", flush=True)
    texts, began = [[] for _ in range(args.num_samples)], time.time()
    write(tokenizer.decode_bytes(until_eot(ids, eot)))
    with autocast(device, dtype):
        for new in stream(model, prompt, args.max_new_tokens, args.temperature, args.num_candidates, eot,
                          compiled=args.compile):
            for text, tokens in zip(texts, new.tolist()):
                shown = len(until_eot(text, eot))
                text += tokens[:args.max_new_tokens - len(text)]
                if text is texts[0]:   # the first text streams, the others follow when all are done
                    write(tokenizer.decode_bytes(until_eot(text, eot)[shown:]))
    write(b"", final=True)
    seconds = time.time() - began
    for text in texts[1:]:
        whole = until_eot(ids, eot) + until_eot(text, eot)
        print("\n" + "-" * 80 + "\n" + tokenizer.decode_bytes(whole).decode("utf-8", "replace"), end="")
    total = sum(len(until_eot(text, eot)) for text in texts)
    print(f"\n[{total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
