"""
Speed and memory of any configuration, with random weights and random tokens: no data and no run is needed.

    python tests/bench.py                                   # the preset of this machine
    python tests/bench.py --preset S --n_embd 512 --n_layer 8 --vocab_size 32000
    python tests/bench.py --dtype bfloat16 --compile on --seconds 5 --json

A training step and the share of each part in it, then generation by CALM and by the token-by-token baseline.
A part's share is its time alone, backward pass included, over that of a step. They need not add up to 1: the
auxiliary loss and the gradient's norm are in none of them. Step, parts and a large matrix product take turns,
and each figure is a median over rounds of a quotient within a round: a machine's speed changes meanwhile.
"""
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project: this runs from anywhere

import torch

import train
from autoencoder import Autoencoder, AutoencoderConfig, posterior_samples
from calm import AR, CALM, ARConfig, CALMConfig, energy_score, flops_per_token
from data.checkpoint import autocast, cast_matrices
from data.prepare import Parser, within
from sample import generate

def rounds(functions, device, seconds):
    """Times of functions {name: function} that take turns -> a list of {name: seconds}, one a round: at least
    3 after a warm-up, and about `seconds` for each function."""
    times, began = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < seconds * len(functions):
        times.append({})
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times[-1][name] = time.perf_counter() - start
    return times[1:]

def median_seconds(function, device, seconds):
    """Median time of a call."""
    return statistics.median(times["it"] for times in rounds({"it": function}, device, seconds))

def peak_memory_gb(device):
    """The most that was allocated on a CUDA device so far, elsewhere by the whole process (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20   # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def training(model, args, world, seconds):
    """-> tokens a second, peak memory in GB, FLOPs of large matrix products in the time of a step, and the
    share of each part in that time."""
    device, K, c = world.device, args.chunk_size, model.config
    config = train.config_of(train.TrainConfig, args, "calm")
    tokens = torch.randint(c.vocab_size, (config.batch_size, args.context + K), device=device)
    optimizers = train.make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=world.dtype == torch.float16)
    compiled = torch.compile if world.compile else lambda function: function
    compute = compiled(model)

    def step():
        train.train_step(compute, [tokens], 1, optimizers, scaler, config.grad_clip, world)
    for _ in range(2):
        step()
    memory = peak_memory_gb(device)

    chunks = tokens[:, K:].unflatten(1, (-1, K))                          # (B, T, K)
    with autocast(device, world.dtype):
        h = model.hidden(tokens[:, :-K]).flatten(0, 1).detach().requires_grad_()   # (P, D)
    mean, log_std = torch.zeros(2, len(h), c.latent_dim, device=device)
    x = torch.randn(c.num_samples, *mean.shape, device=device, requires_grad=True)
    parts = {"backbone": lambda: model.hidden(tokens[:, :-K]),
             "head": lambda: model.head.sample(h, c.num_samples),
             "energy_score": lambda: energy_score(
                 x, posterior_samples(mean, log_std, c.num_targets), c.alpha),
             "autoencoder": lambda: model.autoencoder.encode(chunks)[0]}
    if c.head != "energy":   # it trains on one evaluation a sample, and without the energy score
        parts["head"] = lambda: model.head.loss(h, mean, log_std)
        del parts["energy_score"]

    def run(part):
        with autocast(device, world.dtype):
            y = part()
        if y.requires_grad:
            y.sum().backward()

    def optimize():
        for p in model.parameters():
            p.grad = gradient.get(p)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    gradient = {p: torch.randn_like(p) for p in model.parameters() if p.requires_grad}
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=world.dtype) for _ in range(2))
    timed = {name: partial(run, compiled(part)) for name, part in parts.items()}
    timed |= {"optimizer": optimize, "step": step, "products": lambda: [a @ b for _ in range(10)]}
    times = rounds(timed, device, seconds)
    shares = {name: statistics.median(t[name] / t["step"] for t in times) for name in (*parts, "optimizer")}
    products = 10 * statistics.median(t["step"] / t["products"] for t in times)   # in the time of a step
    speed = chunks.numel() / statistics.median(t["step"] for t in times)
    return speed, memory, 2 * n ** 3 * products, shares

def generation(calm, ar, args, world, seconds):
    """Tokens a second behind a prompt of two chunks, within the context, of one text and of 32 at once."""
    K = args.chunk_size
    new = max(1, min(args.block_size, 64) - 2) * K
    few = max(new // 4 // K, 1) * K   # where it is slow
    prompt = torch.randint(calm.config.vocab_size, (1, 2 * K), device=world.device)

    def speed(model, new, temperature=1.0, texts=1):
        with autocast(world.device, world.dtype):
            write = partial(generate, model, prompt.expand(texts, -1), new, temperature)
            return texts * new / median_seconds(write, world.device, seconds)
    return {"calm_T1": speed(calm, new), "calm_T0.5": speed(calm, few, 0.5), "ar_T1": speed(ar, new),
            "calm_T1_b32": speed(calm, new, texts=32), "ar_T1_b32": speed(ar, few, texts=32)}

def main():
    parser = Parser(usage="python tests/bench.py [flags of train.py] [flags below]",
                    description="Speed and memory of any configuration.")
    parser.add_argument("--seconds", type=within(0, kind=float), default=2.0, help="about, a measurement")
    parser.add_argument("--vocab_size", type=within(1), default=257, help="of the models")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    own, flags = parser.parse_known_args()
    args = train.parse_args(flags)
    world, V = train.World(args), own.vocab_size

    autoencoder = Autoencoder(train.config_of(AutoencoderConfig, args, "autoencoder", vocab_size=V))
    model = CALM(train.config_of(CALMConfig, args, "calm", vocab_size=V), autoencoder)
    model = model.to(world.device).train()
    speed, memory, most, shares = training(model, args, world, own.seconds)
    flops = args.batch_size * args.context * flops_per_token(model.config, autoencoder.config)["train"]
    of_peak, on_cuda = flops / most, world.device.type == "cuda"
    precision = str(world.dtype).removeprefix("torch.")
    name = f"MFU {of_peak:.1%}" if on_cuda else f"{of_peak:.1%} share of its matrix-product speed"
    print(f"{'training, ' + precision:28} {speed:10,.0f} tokens/s, peak memory {memory:.2f} GB, {name}")
    for name, value in shares.items():
        print(f"{'  ' + name.replace('_', ' '):28} {value:10.1%} of a step")

    ar = AR(train.config_of(ARConfig, args, "ar", vocab_size=V, block_size=args.context)).to(world.device)
    models = (cast_matrices(m.eval(), world.dtype) for m in (model, ar))
    made = generation(*models, args, world, own.seconds)
    for name, value in made.items():
        print(f"{'generation, ' + name:28} {value:10,.0f} tokens/s")
    if own.json:
        print(json.dumps({"train_tokens_per_s": speed, "peak_memory_gb": memory,
                          "mfu": of_peak if on_cuda else None, "matmul_share": of_peak,
                          "precision": precision, "share": shares, "generate": made}))

if __name__ == "__main__":
    main()
