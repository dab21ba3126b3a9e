"""
The one training loop: stage 1 the autoencoder, stage 2 CALM (or the token-by-token baseline).

    python train.py                                    # data, autoencoder, CALM, BrierLM, samples: all of it
    torchrun --nproc_per_node 8 train.py --preset M    # several GPUs, one process each

The noise of a micro-batch has a seed of its own: it stays the same when resumed, or on more processes.
"""
import atexit
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval_brier
from autoencoder import Autoencoder, AutoencoderConfig, check, check_numbers
from calm import AR, CALM, HEADS, NANO, ARConfig, CALMConfig, flops_per_token
from data.checkpoint import (autocast, cast_matrices, load_checkpoint, open_checkpoint, rewind_log,
                             save_checkpoint, saved_settings, select_device, select_dtype, write_log)
from data.prepare import Parser, fail, load_data, script, within
from sample import continue_text

STAGES = ("autoencoder", "calm", "ar")

@dataclass
class TrainConfig:
    """How a stage is trained. The defaults are the paper's (section 6) for CALM."""
    optimizer: Literal["adamw", "muon"] = "adamw"   # muon: of the inner matrices; AdamW has the rest
    lr: float = 3e-4           # peak learning rate of AdamW
    muon_lr: float = 0.01      # peak learning rate of Muon
    weight_decay: float = 0.1  # of matrices; vectors have none
    grad_clip: float = 1.0     # largest norm of the gradient
    warmup_steps: int = 2000   # steps of linear warm-up
    decay_frac: float = 0.0    # share of the steps, at the end, over which the rate falls to 0
    max_steps: int = 250_000   # optimizer steps
    batch_size: int = 8        # sequences of block_size chunks in a micro-batch
    grad_accum: int = 32       # micro-batches a step, shared among the processes (at least one each)

    def __post_init__(self):
        check_numbers(self)
        check(self.grad_clip > 0, f"grad_clip must be above 0, not {self.grad_clip}: 1e9 clips nothing")
        check(self.decay_frac <= 1, f"decay_frac must be at most 1, not {self.decay_frac}")

# Any flag given wins. latent_dim and block_size are for chunks of 4: they follow another --chunk_size.
PAPER = dict(latent_dim=128, n_head=16, block_size=2048, ae_warmup_steps=1000, ae_max_steps=30_000,
             ae_batch_size=2)
SMALL = dict(NANO, optimizer="muon", lr=2e-2, warmup_steps=50, decay_frac=0.8, grad_accum=1,   # see calm.py
             ae_n_embd=128, ae_n_ff=64, ae_optimizer="muon", ae_lr=6e-3, ae_warmup_steps=50,
             ae_decay_frac=0.8, ae_batch_size=8, ae_grad_accum=1)
PRESETS = {
    "nano": dict(SMALL, batch_size=4, max_steps=5000, ae_max_steps=350),
    "mini": dict(SMALL, data="site-packages", n_layer=8, n_embd=768, n_head=12, n_ff=2048, n_head_layer=2,
                 block_size=256, batch_size=16, grad_accum=2, lr=3e-3, max_steps=9600, ae_max_steps=2000),
    "S": dict(PAPER, n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3),
    "M": dict(PAPER, n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4),
    "L": dict(PAPER, n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4),
    "XL": dict(PAPER, n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4),
}

# --- Settings: every field of a config is a flag --------------------------------------------------------
SHARED = {"vocab_size", "chunk_size", "latent_dim"}   # the autoencoder has CALM's
PREFIXED = {"n_embd", "n_ff", "n_layer", *(f.name for f in fields(TrainConfig))}   # --ae_n_embd, ...

def flag(name, stage):
    return f"ae_{name}" if stage == "autoencoder" and name in PREFIXED else name

# A resumed run takes no flag in OWN from its checkpoint. Of all others it obeys what is given; but another
# value of one in FIXED is an error: the models are what they were, and so are the optimizers.
OWN = {"resume", "out_dir", "device", "model"}
FIXED = {"preset", "optimizer", "ae_optimizer", *(flag(f.name, stage) for config, stage in (
    (CALMConfig, "calm"), (AutoencoderConfig, "autoencoder")) for f in fields(config))}

def add_flags(group, config, stage="calm", skip=()):
    """A flag for every field of a config class, with the comment beside the field as its help."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.MULTILINE))
    for f in (f for f in fields(config) if f.name not in skip):
        choices = list(HEADS) if f.name == "head" else get_args(f.type)   # get_args: of a Literal, else none
        group.add_argument(f"--{flag(f.name, stage)}", type=str if choices else f.type,
                           choices=choices or None, default=f.default, help=comments[f.name])
def config_of(config, args, stage, **given):
    """A config from the flags of its fields, or from what is given in their place."""
    values = {f.name: getattr(args, flag(f.name, stage), f.default) for f in fields(config)}
    return config(**values | given)

def parse_args(argv):
    parser = Parser(usage="python train.py [flags]", description="Train CALM, its autoencoder, or AR.")
    run = parser.add_argument_group("run").add_argument
    run("--model", default="calm", choices=STAGES, help="what to train; calm trains its autoencoder first")
    run("--preset", default="auto", choices=["auto", *PRESETS], help="auto: mini on CUDA, else nano")
    run("--data", default="stdlib", help="data set under data/; a known one is prepared; mini: site-packages")
    run("--out_dir", help="the run's folder; None: out/<data name>")
    run("--resume", action="store_true", help="go on from the checkpoint in out_dir, with its settings")
    run("--flops", type=within(1, 1e30, float), help="as many steps as cost this, the autoencoder included")
    run("--match_flops", metavar="RUN", help="--flops of what RUN's calm.pt and its autoencoder cost")
    run("--seed", type=within(0, (1 << 20) - 1), default=0, help="of weights, batches and noise")
    run("--device", default="auto", help="auto, cuda, mps or cpu")
    run("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="matrix products")
    run("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on CUDA")
    run("--log_interval", type=within(1), default=10, help="steps between lines of log.jsonl")
    run("--eval_interval", type=within(1), default=500, help="steps between evaluations and checkpoints")
    sizes = parser.add_argument_group("model (AR has the same text as context, block_size * K tokens)")
    add_flags(sizes, CALMConfig, skip={"vocab_size"})
    add_flags(parser.add_argument_group("training"), TrainConfig)
    stage1 = parser.add_argument_group("autoencoder")
    add_flags(stage1, AutoencoderConfig, "autoencoder", skip=SHARED)
    add_flags(stage1, TrainConfig, "autoencoder")

    # Parsed twice: first for the preset (or the run to resume), then with its settings as the defaults.
    early = parser.parse_args([arg for arg in argv if arg not in ("-h", "--help")])
    auto = "mini" if select_device(early.device).type == "cuda" else "nano"
    defaults, K = PRESETS[auto if early.preset == "auto" else early.preset], max(early.chunk_size, 1)
    parser.set_defaults(**defaults | {"latent_dim": defaults["latent_dim"] * K // 4,
                                      "block_size": defaults["block_size"] * 4 // K})
    if early.model == "ar" and early.match_flops and early.preset == "auto":   # with CALM's settings, too
        parser.set_defaults(**saved_settings(Path(early.match_flops), ["calm"], OWN))
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir or Path("out") / Path(args.data).absolute().name)
    if args.resume:
        stages = ("calm", "autoencoder") if args.model == "calm" else (args.model,)
        saved = saved_settings(out_dir, stages, OWN)
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name in FIXED:
            if (asked := getattr(args, name)) != saved[name]:
                fail(f"{out_dir} has {name} {saved[name]}, this run asks for {asked}: drop the flag")
    args.out_dir = out_dir
    args.context = args.block_size * args.chunk_size   # in tokens
    if (early.flops or early.match_flops) and args.model == "autoencoder":
        fail("--flops, --match_flops set the length of a CALM or AR run: drop it, or --model autoencoder")
    for config, stage in ((TrainConfig, "autoencoder"), (AutoencoderConfig, "autoencoder"),
                          (TrainConfig, "calm"), (CALMConfig, "calm"), (ARConfig, "ar")):
        try:
            config_of(config, args, stage)   # wrong sizes are found now, not after the autoencoder is trained
        except ValueError as error:
            name, what = str(error).split(maxsplit=1)
            fail(f"--{flag(name, stage)} {what}")
    args.stride = eval_brier.ngram_stride(args.chunk_size)   # of BrierLM; AR is scored where CALM is
    if args.context < args.stride + max(4, args.chunk_size) and args.model != "autoencoder":
        fail(f"--block_size {args.block_size} is too short a context for BrierLM: take a longer one")
    return args

# --- One process of a run: alone, or one of torchrun's --------------------------------------------------
class World:
    """Who we are among the processes, and where we compute."""
    def __init__(self, args):
        self.device = select_device(args.device)
        if self.device.type == "cuda":
            self.device = select_device(f"cuda:{os.environ.get('LOCAL_RANK', self.device.index or 0)}")
            torch.cuda.set_device(self.device)
        try:
            self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
            check(0 <= self.rank < self.size, f"RANK {self.rank} of {self.size}")
            if self.size > 1:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                        timeout=timedelta(days=1))   # the others wait while one prepares data
                atexit.register(dist.destroy_process_group)
        except (ValueError, RuntimeError) as error:
            fail(f"{' '.join(str(error).split())[:150]}: torchrun sets WORLD_SIZE and RANK, else unset them")
        self.main = self.rank == 0
        self.dtype = select_dtype(args.dtype, self.device)
        self.compile = args.compile == "on" or args.compile == "auto" and self.device.type == "cuda"
        self.interrupted = self.training = False
        try:   # torch.compile needs a C++ compiler, on CUDA Triton and a card that it knows
            if self.compile:
                torch.compile(lambda x: x + 1)(torch.zeros(1, device=self.device))
        except Exception as error:   # whatever is missing
            self.compile = False
            self.say(f"not compiled: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    def listen(self):
        """From now on Ctrl-C and its like end the loop after its step; a second Ctrl-C ends it at once."""
        def stop(number, _):
            if not self.training or self.interrupted and number == signal.SIGINT:
                raise SystemExit(130)
            self.interrupted = True
        self.training = True
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):   # SIGHUP: the terminal closed; nohup ignores it
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
                signal.signal(getattr(signal, name), stop)
    def say(self, text):
        if self.main:
            self.show(tqdm.write, text)   # above the bar
    def show(self, write, *args):
        """Where nobody reads any more, a closed pipe or terminal, the run ends after its step, and saves."""
        try:
            write(*args)
            sys.stdout.flush()   # tqdm does not: a pipe would see each line only at the end
        except OSError:
            self.interrupted = True
    def mean(self, value):
        """The mean over the processes of a number on each -> float."""
        value = torch.as_tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

# --- Optimizers, schedule, one step ---------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), for matrices: their momentum, made orthogonal. torch.optim.Muon does so in
    bfloat16, seconds a step on a processor that has none; here, whatever --dtype, where bfloat16 is fast."""
    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                same_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in same_shape.items():
                g = torch.stack([p.grad for p in matrices])               # (n, rows, columns)
                state = self.state[matrices[0]]                           # of all n together
                if not state:
                    state["average"] = torch.zeros_like(g)
                average = state["average"].lerp_(g, 1 - group["momentum"])
                step_size = group["lr"] * max(1, rows / columns) ** 0.5
                updates = step_size * orthogonal(g.lerp(average, group["momentum"]))   # Nesterov's
                for p, update in zip(matrices, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)

def orthogonal(g):
    """Matrices g = U S V^T (n, rows, columns) -> about U V^T: five Newton-Schulz steps, each of which takes
    every singular value s to a s + b s^3 + c s^5: from (0, 1] to about 1, where s is not tiny."""
    a, b, c = 3.4445, -4.7750, 2.0315
    fast = select_dtype("auto", g.device)
    x = g.to(torch.float32 if fast == torch.float16 else fast)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)              # so that no s is above 1
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT                                                 # the smaller of the two
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).type_as(g)

NOT_MUON = ("embed_tokens.", "lm_head.", "aux.", "encoder.embed_tokens.")   # matrices whose rows are tokens
def make_optimizers(model, config):
    """AdamW with weight decay on matrices only; with optimizer "muon", Muon for the inner matrices."""
    matrices = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim != 2]
    of_muon = [name for name in matrices if config.optimizer == "muon" and not name.startswith(NOT_MUON)]
    inner = [matrices.pop(name) for name in of_muon]
    groups = [dict(params=list(matrices.values())), dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, config.lr, (0.9, 0.95), 1e-8, config.weight_decay, fused=True)]
    if inner:
        optimizers.append(Muon(inner, config.muon_lr, config.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers
def lr_factor(step, config):
    """Of step 1 .. max_steps: linear warm-up, constant, linear to 0 over the last decay_frac of the run."""
    decay_steps = config.decay_frac * config.max_steps
    decay = (config.max_steps + 1 - step) / decay_steps if decay_steps else 1.0
    return min(1.0, step / config.warmup_steps, decay)
def micro_batches(data, seed, world, stage, step, count, batch_size, length):
    """This process's `count` micro-batches of a step, tokens (batch_size, length), each with its own seed."""
    number = STAGES.index(stage)
    offsets = data.random_offsets("train", world.size * count * batch_size, length, (seed, number, step))
    for micro in range(world.rank, world.size * count, world.size):
        torch.manual_seed((seed << 40) + (number << 38) + (step << 12) + micro)
        own = offsets[micro * batch_size:(micro + 1) * batch_size]
        yield data.batch("train", own, length).to(world.device)

def train_step(compute, batches, count, optimizers, scaler, grad_clip, world):
    """One optimizer step over `count` micro-batches -> their mean loss, the norm of its gradient."""
    mean_loss = 0.0
    for micro, tokens in enumerate(batches, 1):
        compute.require_backward_grad_sync = micro == count   # processes average their gradients once a step
        with autocast(world.device, world.dtype):
            loss, _ = compute(tokens)
        scaler.scale(loss / count).backward()
        mean_loss = mean_loss + loss.detach() / count
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(compute.parameters(), grad_clip)
    if norm.isfinite():   # one decision for all optimizers, before a weight is not a number
        for optimizer in optimizers:
            optimizer.step()
    compute.zero_grad()
    scaler.update()       # float16: a smaller scale after a norm that was not finite
    return mean_loss, norm
@torch.no_grad()
def validate(stage, model, args, data, world, length, brier_windows):
    """Metrics on fixed validation windows with fixed noise: the loss and its parts, and BrierLM."""
    model.eval()
    tokens = data.batch("val", data.even_offsets("val", 16, length), length).to(world.device)
    torch.manual_seed(0)   # every training batch seeds anew
    with autocast(world.device, world.dtype):
        metrics = {f"val_{name}": value.item() for name, value in model.loss(tokens)[1].items()}
    if stage != "autoencoder" and brier_windows:
        result = eval_brier.evaluate(model, data, world.device, world.dtype, brier_windows, args.stride)
        metrics |= {name: result[name] for name in ("brierlm", "stderr")}
    model.train()
    return metrics

# --- The loop -------------------------------------------------------------------------------------------
def train(stage, model, args, data, world, token_flops, earlier_flops=0.0, total=None, **extra):
    """Train `model` to max_steps, or for total FLOPs, on from its checkpoint if there is one -> FLOPs. Both
    FLOPs include those of the stage before. extra: what else belongs in the checkpoint."""
    path, config = args.out_dir / f"{stage}.pt", config_of(TrainConfig, args, stage)
    checkpoint = open_checkpoint(path, stage, model, data, args.resume, wanted=stage == args.model)
    if checkpoint and checkpoint["done"] and stage != args.model:
        world.say(f"{stage}: {path} is finished, and used as it is")
        return checkpoint["flops"]
    if not checkpoint and (args.out_dir / f"{args.model}.pt").exists():
        fail(f"{path}, which {args.model}.pt was trained with, is gone: put it back")
    first, seen = (checkpoint["step"] + 1, checkpoint["tokens"]) if checkpoint else (1, 0)   # seen: tokens
    count = math.ceil(config.grad_accum / world.size)                     # micro-batches of each process
    length = args.context + {"autoencoder": 0, "calm": args.chunk_size, "ar": 1}[stage]   # with the targets
    tokens_per_step = world.size * count * config.batch_size * args.context
    if total:
        spent = earlier_flops + token_flops * seen
        left = (total - spent) / (token_flops * tokens_per_step)   # in steps
        if left < (-0.5 if checkpoint else 0):   # a finished run may be half a step over
            fail(f"{spent:.2e} of {total:.2e} FLOPs are spent: raise --flops, or lower --ae_max_steps")
        args.max_steps = config.max_steps = first - 1 + (round(left) or int(not checkpoint))
    if first - 1 > config.max_steps:
        fail(f"{path} is at step {first - 1:,}: --{flag('max_steps', stage)} must be at least that")
    model.to(world.device).train()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    if checkpoint and checkpoint["scaler"]:   # empty, unless that was float16
        scaler.load_state_dict(checkpoint["scaler"])
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"] if checkpoint else []):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})   # rates: this call's
    compute = torch.compile(model) if world.compile else model
    if world.size > 1:
        compute = DistributedDataParallel(compute)

    def tokens_at(step):
        return seen + tokens_per_step * (step - first + 1)
    def flops_at(step):
        return earlier_flops + token_flops * tokens_at(step)
    def save(step):
        settings = {name: value for name, value in vars(args).items() if name not in OWN}
        save_checkpoint(path, {
            "kind": stage, "config": asdict(model.config), "model": model.state_dict(), "step": step,
            "done": step >= config.max_steps, "optimizers": [o.state_dict() for o in optimizers],
            "scaler": scaler.state_dict(), "random": {"seed": args.seed, "step": step}, "settings": settings,
            "data": data.meta, "tokens": tokens_at(step), "flops": flops_at(step), **extra})

    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world.say(f"{stage}: {size:,} parameters, {config.max_steps:,} steps of {tokens_per_step:,} tokens, "
              f"{token_flops * tokens_per_step * config.max_steps:.2e} FLOPs, on "
              f"{world.size} x {world.device.type} in {world.dtype}{', compiled' if world.compile else ''}")
    log = args.out_dir / "log.jsonl"
    started = time.time() - (rewind_log(log, stage, first - 1) if world.main else 0.0)   # without evaluations
    bar = tqdm(total=config.max_steps, initial=first - 1, desc=stage, unit="step", disable=not world.main)
    world.listen()
    for step in range(first, config.max_steps + 1):
        factor = lr_factor(step, config)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = factor * group["peak_lr"]
        batches = micro_batches(data, args.seed, world, stage, step, count, config.batch_size, length)
        loss, norm = train_step(compute, batches, count, optimizers, scaler, config.grad_clip, world)
        world.show(bar.update)

        last = step == config.max_steps
        evaluating = last or step % args.eval_interval == 0
        logging = evaluating or step == 1 or step % args.log_interval == 0
        stopping = world.mean(world.interrupted) > 0   # all of the processes, or none
        bad = not norm.isfinite() and scaler.get_scale() <= 1   # float16 tries smaller scales first
        if not (logging or stopping or bad):
            continue
        loss = world.mean(loss)
        if bad or not math.isfinite(loss):
            world.show(bar.close)
            fail(f"the loss of {stage} is {loss}, its gradient's norm {norm}, at step {step}: lower --"
                 f"{flag('lr', stage)} or --{flag('muon_lr', stage)}; {path} holds an earlier step, if any")
        seconds, metrics = time.time() - started, {}
        if evaluating:
            metrics = validate(stage, model, args, data, world, length, brier_windows=0 if last else 32)
            started = time.time() - seconds
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            world.say(f"{stage} step {step}: loss {loss:.4g}, {shown}")
        world.show(bar.set_postfix, {"loss": f"{loss:.3f}", "tok/s": f"{tokens_at(step) / seconds:,.0f}"})
        if world.main:
            write_log(log, "a", {"stage": stage, "step": step, "loss": loss, "tokens": tokens_at(step),
                                 "seconds": round(seconds, 2), "lr": factor * config.lr,
                                 "flops": flops_at(step), **metrics})
            if stopping or evaluating:
                save(step)
        if stopping:
            world.say(f"interrupted at step {step}, saved to {path}. Go on with: python train.py --resume "
                      f"--model {args.model} --data {args.data} --out_dir {args.out_dir}")
            raise SystemExit(130)
    world.show(bar.close)
    world.training = False   # all is saved
    if world.mean(world.interrupted) > 0:   # during the last step's evaluation
        raise SystemExit(130)
    return flops_at(config.max_steps)

# --- The whole road: autoencoder, then CALM or AR, then BrierLM and text --------------------------------
def finish(model, args, data, world, flops, inference_flops):
    """BrierLM, a held-out text continued, and what to run next."""
    result = eval_brier.evaluate(model, data, world.device, world.dtype, stride=args.stride, progress=True)
    print("\n" + eval_brier.describe(result))
    write_log(args.out_dir / "log.jsonl", "a", {"stage": args.model, "step": args.max_steps, "seconds": 0.0,
              "flops": flops, "inference_flops": inference_flops, "final": True, **result})
    continue_text(model, data, world.device, world.dtype, args.seed)
    print(f"Next:\n  python sample.py --out_dir {args.out_dir} --model {args.model} --temperature 0.5")
    if args.model == "calm":   # the baseline at equal cost
        print(f"  python train.py --model ar --match_flops {args.out_dir} --out_dir {args.out_dir}")

@script("lower --batch_size (in stage 1 --ae_batch_size) and raise --grad_accum as much")
def main():
    args = parse_args(sys.argv[1:])
    world = World(args)
    if world.main:
        load_data(args.data)   # prepares it, if it is a known one
    world.mean(0)              # the others wait
    data = load_data(args.data)
    args.vocab_size, args.data = data.meta["vocab_size"], data.meta["name"]
    data.check("train", args.context + args.chunk_size), data.check("val", args.context + args.chunk_size)
    flops, total, extra = 0.0, args.flops, {}
    if args.match_flops:
        total = load_checkpoint(Path(args.match_flops) / "calm.pt", "calm")["flops"]
    torch.manual_seed(args.seed)
    if args.model != "ar":   # stage 1
        autoencoder = Autoencoder(config_of(AutoencoderConfig, args, "autoencoder"))
        cost = flops_per_token(autoencoder.config)   # of a token
        flops = train("autoencoder", autoencoder, args, data, world, cost["train"])
    if args.model == "autoencoder":
        return
    torch.manual_seed(args.seed)
    if args.model == "calm":   # stage 2
        model = CALM(config_of(CALMConfig, args, "calm"), autoencoder)
        cost = flops_per_token(model.config, autoencoder.config)
        extra = {"autoencoder_config": asdict(autoencoder.config)}
    else:
        model = AR(config_of(ARConfig, args, "ar", block_size=args.context))
        cost = flops_per_token(model.config)
    flops = train(args.model, model, args, data, world, cost["train"], flops, total, **extra)
    if world.main:
        finish(cast_matrices(model.eval(), world.dtype), args, data, world, flops, cost["inference"])
    world.mean(0)   # the others wait: gloo may abort a process that leaves before

if __name__ == "__main__":
    main()
