"""
Speed and memory of any configuration, with random weights and random tokens: it needs no data.

    python tests/bench.py                                   # the preset of this machine
    python tests/bench.py --preset S --n_embd 512 --n_layer 8 --vocab_size 32000
    python tests/bench.py --dtype bfloat16 --compile on --seconds 5 --json

It measures a training step and the share of each part in it, then generation by CALM and by the
token-by-token baseline. A part's share is its time alone, backward pass included, over that of a
step. The shares need not add up to 1: the auxiliary loss and the gradient's norm are in none.
Step, parts and a large matrix product take turns, and each figure is a median over rounds of a
quotient within a round, for the speed of a machine changes meanwhile.
"""
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # so that it runs from anywhere

import torch
import torch.nn.functional as F

import train
from calm import AR, energy_score, flops_per_token, rotate
from autoencoder import posterior_samples
from data.console import Parser, within
from data.machine import Machine
from sample import cast_matrices, generate


def rounds(functions, device, seconds):
    """Times of functions {name: function} that take turns -> a list of {name: seconds}, one a
    round: at least 3 after a warm-up, and about `seconds` for each function."""
    times = []
    began = time.perf_counter()
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
    times = rounds({"it": function}, device, seconds)
    return statistics.median(time["it"] for time in times)


def peak_memory_gb(device):
    """The most that was allocated on a CUDA device so far, elsewhere by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:   # Windows
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20   # ru_maxrss is in bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def parts_of_a_step(model, tokens, machine):
    """{name: function} for the parts of a training step on tokens (B, (T+1)*K)."""
    c = model.config
    K = model.chunk_size
    chunks = tokens[:, K:].unflatten(1, (-1, K))                   # (B, T, K)
    with machine.autocast():
        h = model.hidden(tokens[:, :-K]).flatten(0, 1).detach().requires_grad_()   # (P, D)
    mean = torch.zeros(len(h), c.latent_dim, device=tokens.device)
    log_std = torch.zeros_like(mean)
    z = torch.randn(c.num_samples, *mean.shape, device=tokens.device, requires_grad=True)

    def score():
        return energy_score(z, posterior_samples(mean, log_std, c.num_targets), c.alpha)

    parts = {"backbone": lambda: model.hidden(tokens[:, :-K]),
             "head": lambda: model.head.sample(h, c.num_samples),
             "energy_score": score,
             "autoencoder": lambda: model.autoencoder.encode(chunks)[0]}
    if c.head != "energy":   # it trains on one evaluation per sample, without the energy score
        parts["head"] = lambda: model.head.loss(h, mean, log_std)
        del parts["energy_score"]
    return parts


def training(model, args, machine, seconds):
    """-> tokens per second, peak memory in GB, FLOPs that large matrix products make in the time
    of a step, and the share of each part in that time."""
    device = machine.device
    config = train.config_of(train.TrainConfig, args, "calm")
    length = args.context + args.chunk_size
    tokens = torch.randint(args.vocab_size, (config.batch_size, length), device=device)
    optimizers = train.make_optimizers(model, config, machine.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=machine.dtype == torch.float16)
    compiled = torch.compile if machine.compiles else lambda function: function
    compute = compiled(model)

    def step():
        train.train_step(compute, [tokens], 1, optimizers, scaler, config.grad_clip, machine)

    for _ in range(2):
        step()
    memory = peak_memory_gb(device)

    def run(part):
        with machine.autocast():
            y = part()
        if y.requires_grad:
            y.sum().backward()

    gradient = {p: torch.randn_like(p) for p in model.parameters() if p.requires_grad}

    def optimize():
        for p in model.parameters():
            p.grad = gradient.get(p)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    n = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(n, n, device=device, dtype=machine.dtype)
    parts = parts_of_a_step(model, tokens, machine)
    timed = {name: partial(run, compiled(part)) for name, part in parts.items()}
    timed |= {"optimizer": optimize, "step": step,
              "products": lambda: [matrix @ matrix for _ in range(10)]}
    times = rounds(timed, device, seconds)
    shares = {name: statistics.median(t[name] / t["step"] for t in times)
              for name in (*parts, "optimizer")}
    products = 10 * statistics.median(t["step"] / t["products"] for t in times)
    step_seconds = statistics.median(t["step"] for t in times)
    return config.batch_size * args.context / step_seconds, memory, 2 * n ** 3 * products, shares


def generation(calm, ar, args, machine, seconds):
    """Tokens per second after a prompt of two chunks, within the context, of one text and of 32."""
    K = args.chunk_size
    new = max(1, min(args.block_size, 64) - 2) * K
    few = max(new // 4 // K, 1) * K   # where it is slow
    prompt = torch.randint(args.vocab_size, (1, 2 * K), device=machine.device)

    def speed(model, new, temperature=1.0, texts=1):
        with machine.autocast():
            write = partial(generate, model, prompt.expand(texts, -1), new, temperature)
            return texts * new / median_seconds(write, machine.device, seconds)

    return {"calm_T1": speed(calm, new), "calm_T0.5": speed(calm, few, 0.5),
            "ar_T1": speed(ar, new), "calm_T1_b32": speed(calm, new, texts=32),
            "ar_T1_b32": speed(ar, few, texts=32)}


def one_graph_step(model, B):
    """A step of generation with B texts as torch.compile can make a single graph of it, on a GPU a
    CUDA graph: a cache of a fixed size, and the position a tensor. Is it worth having?
    -> step(tokens (B, K), position (1,)) -> tokens (B, K)"""
    c = model.config
    transformer = model.transformer
    heads = (c.n_head, -1)
    embed = model.embed_tokens if isinstance(model, AR) else model.inputs
    places = torch.arange(c.block_size, device=transformer.cos.device)
    caches = [torch.zeros(2, B, c.n_head, c.block_size, c.n_embd // c.n_head, device=places.device,
                          dtype=model.transformer.layers[0].self_attn.q_proj.weight.dtype)
              for _ in transformer.layers]

    def step(tokens, position):
        x = embed(tokens)                                          # (B, 1, D)
        cos = transformer.cos[position]
        sin = transformer.sin[position]
        mask = (places <= position)[None]                          # (1, block_size)
        for layer, cache in zip(transformer.layers, caches):
            y = layer.input_layernorm(x)
            attention = layer.self_attn
            q, k, v = (proj(y).unflatten(-1, heads).transpose(1, 2) for proj in
                       (attention.q_proj, attention.k_proj, attention.v_proj))
            cache[0].index_copy_(2, position, rotate(k, cos, sin).type_as(v))
            cache[1].index_copy_(2, position, v)
            q = rotate(q, cos, sin).type_as(v)
            y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
            x = x + attention.o_proj(y.transpose(1, 2).flatten(-2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return model.sample_chunks(transformer.norm(x)[:, -1], 1)[0]

    mode = "reduce-overhead" if places.device.type == "cuda" else None
    return torch.compile(step, dynamic=False, mode=mode)


@torch.inference_mode()
def one_graph(model, args, machine, seconds, texts=1):
    """Tokens per second of `one_graph_step` at T = 1, and the seconds that compiling took."""
    K = model.chunk_size
    step = one_graph_step(model, texts)
    positions = torch.arange(model.config.block_size, device=machine.device)[:, None]
    new = min(len(positions), 64)

    def write():
        tokens = torch.zeros(texts, K, dtype=torch.long, device=machine.device)
        for position in positions[:new]:
            tokens = step(tokens, position).clone()   # the graph's own output is overwritten

    with machine.autocast():
        began = time.perf_counter()
        write()
        compiling = time.perf_counter() - began
        return texts * new * K / median_seconds(write, machine.device, seconds), compiling


def main():
    parser = Parser(usage="python tests/bench.py [flags of train.py] [flags below]",
                    description="Speed and memory of any configuration.")
    add = parser.add_argument
    add("--seconds", type=within(0, kind=float), default=2.0, help="about, a measurement")
    add("--vocab_size", type=within(1), default=257, help="of the models")
    add("--json", action="store_true", help="end with one JSON object on a line")
    own, flags = parser.parse_known_args()
    args = train.parse_args(flags)
    args.vocab_size = own.vocab_size
    machine = Machine(args.device, args.dtype, args.compile)

    model = train.make_model("calm", args).to(machine.device).train()
    speed, memory, most, shares = training(model, args, machine, own.seconds)
    flops = flops_per_token(model.config, model.autoencoder.config)["train"]
    share = flops * args.batch_size * args.context / most
    on_cuda = machine.device.type == "cuda"
    precision = str(machine.dtype).removeprefix("torch.")
    name = f"MFU {share:.1%}" if on_cuda else f"{share:.1%} share of its matrix-product speed"
    print(f"{'training, ' + precision:28} {speed:10,.0f} tokens/s, "
          f"peak memory {memory:.2f} GB, {name}")
    for name, value in shares.items():
        print(f"{'  ' + name.replace('_', ' '):28} {value:10.1%} of a step")

    ar = train.make_model("ar", args).to(machine.device)
    models = [cast_matrices(model.eval(), machine.dtype) for model in (model, ar)]
    made = generation(*models, args, machine, own.seconds)
    for name, value in made.items():
        print(f"{'generation, ' + name:28} {value:10,.0f} tokens/s")
    if machine.compiles:
        for name, it in zip(("calm", "ar"), models):
            for texts in (1, 32):
                value, compiling = one_graph(it, args, machine, own.seconds, texts)
                title = f"generation, {name}_T1_b{texts}, one graph"
                made[f"{name}_T1_b{texts}_one_graph"] = value
                print(f"{title:34} {value:10,.0f} tokens/s, after {compiling:.0f} s of compiling")
    if own.json:
        print(json.dumps({"train_tokens_per_s": speed, "peak_memory_gb": memory,
                          "mfu": share if on_cuda else None, "matmul_share": share,
                          "precision": precision, "share": shares, "generate": made}))


if __name__ == "__main__":
    main()
