"""
Speed and memory of any configuration, with random weights and random tokens: it needs no data.

    python tests/bench.py                                   # the preset of this machine
    python tests/bench.py --preset S --n_embd 512 --n_layer 8 --vocab_size 32000 --json

The flags are those of train.py. Figures are medians; peak memory is that of training.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that it runs from anywhere

import torch

import train
from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, ARConfig, CALMConfig, flops_per_token
from data.machine import Machine
from sample import cast_matrices, generate


def median_seconds(function, device, seconds):
    """Median time of a call, after two to warm up: of at least 3, and for about so long."""
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def training(model, args, machine, seconds):
    """-> tokens per second, peak memory in GB, share of the speed of large matrix products."""
    config = train.config_of(train.TrainConfig, args, "calm")
    shape = (config.batch_size, args.context + args.chunk_size)
    tokens = torch.randint(model.config.vocab_size, shape, device=machine.device)
    optimizers = train.make_optimizers(model, config, machine.dtype, args.compile)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    faster = torch.compile(model) if args.compile else model

    def step():
        train.train_step(faster, [tokens], 1, optimizers, scaler, config.grad_clip, machine)

    step_seconds = median_seconds(step, machine.device, seconds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30

    n = 8192 if machine.device.type == "cuda" else 1024
    matrix = torch.randn(n, n, device=machine.device, dtype=machine.dtype)
    product_seconds = median_seconds(lambda: matrix @ matrix, machine.device, seconds)
    tokens_per_s = config.batch_size * args.context / step_seconds
    flops = flops_per_token(model.config, model.autoencoder.config)["train"]
    return tokens_per_s, memory, flops * tokens_per_s * product_seconds / (2 * n**3)


def main():
    parser = argparse.ArgumentParser(usage="python tests/bench.py [flags of train.py and below]")
    parser.add_argument("--seconds", type=float, default=2.0, help="about, a measurement")
    parser.add_argument("--vocab_size", type=int, default=257, help="of the models")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    own, flags = parser.parse_known_args()
    args = train.parse_args(flags)
    machine = Machine(args.device, args.dtype)

    V = own.vocab_size
    autoencoder = train.config_of(AutoencoderConfig, args, "autoencoder", vocab_size=V)
    config = train.config_of(CALMConfig, args, "calm", vocab_size=V)
    calm = CALM(config, Autoencoder(autoencoder)).to(machine.device).train()
    ar = AR(train.config_of(ARConfig, args, "calm", vocab_size=V, block_size=args.context))
    speed, memory, share = training(calm, args, machine, own.seconds)
    precision = str(machine.dtype).removeprefix("torch.")
    print(f"training, {precision}: {speed:,.0f} tokens/s, peak memory {memory:.2f} GB, "
          f"{share:.1%} of the speed of large matrix products")

    prompt = torch.randint(V, (1, 2 * args.chunk_size), device=machine.device)
    new = min(args.block_size - 2, 64) * args.chunk_size
    made = {}
    for name, model, T in (("calm_T1", calm, 1), ("calm_T0.5", calm, 0.5), ("ar_T1", ar, 1)):
        cast_matrices(model.to(machine.device).eval(), machine.dtype)

        def write():
            with machine.autocast():
                generate(model, prompt, new, T)

        made[name] = new / median_seconds(write, machine.device, own.seconds)
        print(f"generation, {name}: {made[name]:,.0f} tokens/s")
    if own.json:
        mfu = share if machine.device.type == "cuda" else None
        print(json.dumps({"train_tokens_per_s": speed, "peak_memory_gb": memory, "mfu": mfu,
                          "precision": precision, "generate": made}))


if __name__ == "__main__":
    main()
