"""
The one training loop: stage 1 the autoencoder, stage 2 CALM (in small presets its Transformer first, then its head), or
the token-by-token baseline.

    python train.py                                    # data, autoencoder, CALM, BrierLM, samples: all of it
    python train.py --model ar --match_flops out/stdlib   # the baseline at the same training FLOPs
    python train.py --resume                           # go on where an interrupted run stopped
    python train.py --data shakespeare --preset mini
    torchrun --nproc_per_node 8 train.py --preset M    # several GPUs, one process each

A run lives in --out_dir: autoencoder.pt, transformer.pt, calm.pt or ar.pt, and log.jsonl. Every micro-batch seeds its
own noise from (seed, step, its number), so a resumed run, or one spread over other processes, draws what the plain run draws.
"""
import atexit
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval_brier
from autoencoder import (Autoencoder, AutoencoderConfig, autocast, check_sizes, load_autoencoder, load_checkpoint,
                         median_seconds, peak_flops, peak_memory_gb, save_checkpoint, select_device, select_dtype)
from calm import AR, CALM, ARConfig, CALMConfig, KVCache, cast_matrices, energy_score, flops_per_token, generate, half_of_targets
from data.prepare import Parser, eot_token, fail, load_data, within

STAGES = ("autoencoder", "calm", "ar", "transformer")   # the last one: CALM without its head


@dataclass
class TrainConfig:
    """How a stage is trained. The defaults are the paper's (section 6) for CALM."""
    optimizer: Literal["adamw", "muon"] = "adamw"   # muon: for the matrices inside the model, AdamW for the rest
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
        check_sizes(self)
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip", "decay_frac"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")


# The paper's sizes and training, and two small recipes: nano's found by measurement, mini's the same for a larger model.
# Any flag given wins.
PAPER = dict(chunk_size=4, latent_dim=128, n_head=16, block_size=2048, ae_warmup_steps=1000, ae_max_steps=30_000,
             ae_batch_size=2)
SMALL = dict(chunk_size=4, latent_dim=32, alpha=0.5, num_samples=4, aux_weight=0.5, embed_std=1.0, qk_norm=1.2, lookup=12,
             retrieved=32, kernel_weight=4.0, brier_weight=1.0, head_init=1.0, transformer_share=0.55, optimizer="muon", lr=3e-3,
             warmup_steps=50, decay_frac=0.8, grad_accum=1, ae_n_embd=256, ae_n_ff=128, ae_lr=3e-3, ae_warmup_steps=50,
             ae_decay_frac=0.8, ae_grad_accum=1)
PRESETS = {
    "nano": dict(SMALL, chunk_size=3, latent_dim=24, n_layer=3, n_embd=192, n_head=3, n_ff=512, n_head_layer=1, block_size=340,
                 max_steps=3859, batch_size=2, ae_n_embd=192, ae_n_ff=64, ae_lr=6e-3, ae_batch_size=4, ae_max_steps=300),
    "mini": dict(SMALL, n_layer=8, n_embd=512, n_head=8, n_ff=1376, n_head_layer=2, block_size=256, max_steps=10_000,
                 batch_size=32, ae_max_steps=2000, ae_batch_size=16),
    "S": dict(PAPER, n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3),
    "M": dict(PAPER, n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4),
    "L": dict(PAPER, n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4),
    "XL": dict(PAPER, n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4),
}


# --- Settings: every field of a config is a flag ----------------------------------------------------------------------

PREFIXED = {"n_embd", "n_ff", "n_layer", *(f.name for f in fields(TrainConfig))}   # the autoencoder's own: --ae_n_embd, ...
SHARED = {"vocab_size", "chunk_size", "latent_dim"}                               # it must have CALM's
OF_THE_HEAD = {"latent_dim", "n_head_layer", "n_noise", "num_samples", "num_targets", "alpha", "head", "num_evals",
               "kernel_weight", "kernel_width", "brier_weight", "head_init", "retrieved"}   # the Transformer alone has not seen them


def flag(name, stage):
    return f"ae_{name}" if stage == "autoencoder" and name in PREFIXED else name


def add_flags(group, config, stage="calm", skip=()):
    """A flag for every field of a config class, with the comment beside the field as its help."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.MULTILINE))
    for f in fields(config):
        if f.name not in skip:
            choices = get_args(f.type)   # of a Literal; else none
            group.add_argument(f"--{flag(f.name, stage)}", type=str if choices else f.type, choices=choices or None,
                               default=f.default, help=comments[f.name])


def config_of(config, args, stage, **given):
    """A config from the flags of its fields, or from what is given in their place."""
    return config(**{f.name: given.get(f.name, getattr(args, flag(f.name, stage), f.default)) for f in fields(config)})


def parse_args(argv):
    parser = Parser(usage="python train.py [flags]", description="Train CALM, its autoencoder, or the AR baseline.")
    run = parser.add_argument_group("run")
    run.add_argument("--model", default="calm", choices=STAGES[:3], help="what to train; calm trains its autoencoder first")
    run.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="auto: mini on CUDA, else nano")
    run.add_argument("--data", default="stdlib", help="a data set under data/; known ones (data/prepare.py --help) are prepared if missing")
    run.add_argument("--out_dir", help="the run's folder; None: out/<data name>")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in out_dir, with its settings")
    run.add_argument("--match_flops", metavar="RUN", help="as many steps as cost the FLOPs of RUN's calm.pt (autoencoders included)")
    run.add_argument("--seed", type=within(0, (1 << 20) - 1), default=0, help="of weights, batches and noise")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of matrix products")
    run.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on CUDA")
    run.add_argument("--deterministic", action="store_true", help="only operations that repeat to the bit (a CPU's all do)")
    run.add_argument("--bench", type=within(0, kind=float), nargs="?", const=2.0, metavar="SECONDS",
                     help="train nothing; measure speed and memory with random weights and tokens, about 2 seconds a figure")
    run.add_argument("--json", action="store_true", help="with --bench: end with one JSON object on a line")
    run.add_argument("--vocab_size", type=int, default=257, help="of --bench; a training run takes its data's")
    run.add_argument("--shard_optimizer", action="store_true", help="under torchrun: a share of its state in each process")
    run.add_argument("--log_interval", type=within(1), default=10, help="steps between lines of log.jsonl")
    run.add_argument("--eval_interval", type=within(1), default=500, help="steps between evaluations, each with a checkpoint")
    training = parser.add_argument_group("training")
    add_flags(training, TrainConfig)
    training.add_argument("--transformer_share", type=within(0, 1, float), default=0.0, help="departure: share of CALM's steps in "
                          "which its Transformer learns, from the auxiliary loss alone; then its head does (0: both at once)")
    add_flags(parser.add_argument_group("model (the baseline takes what it has; its context is the same text, block_size * K "
                                        "tokens)"), CALMConfig, skip={"vocab_size"})
    stage1 = parser.add_argument_group("autoencoder")
    add_flags(stage1, AutoencoderConfig, "autoencoder", skip=SHARED)
    add_flags(stage1, TrainConfig, "autoencoder")

    # Parsed twice: first for the preset (or the run to resume), then, help included, with its settings as the defaults.
    early = parser.parse_args([arg for arg in argv if arg not in ("-h", "--help")])
    preset = ("mini" if select_device(early.device).type == "cuda" else "nano") if early.preset == "auto" else early.preset
    parser.set_defaults(**PRESETS[preset])
    if early.model == "ar":
        parser.set_defaults(muon_lr=0.02)   # what suits the baseline best (README)
    if early.resume:
        parser.set_defaults(**resumed_settings(early))
    args = parser.parse_args(argv)
    args.out_dir = Path(args.out_dir or Path("out") / Path(args.data).name)
    if args.transformer_share and not args.aux_weight:
        fail("--transformer_share needs an --aux_weight above 0: the auxiliary loss is what the Transformer learns from")
    if args.match_flops and args.model == "autoencoder":
        fail("--match_flops sets the length of a CALM or an AR run: drop it, or --model autoencoder")
    for config, stage in ((TrainConfig, "autoencoder"), (TrainConfig, "calm"), (AutoencoderConfig, "autoencoder"),
                          (CALMConfig, "calm"), (ARConfig, "ar")):
        try:
            config_of(config, args, stage)   # wrong sizes are found now, not after the autoencoder is trained
        except ValueError as error:
            name, what = str(error).split(maxsplit=1)
            fail(f"--{flag(name, stage)} {what}")
    return args


def resumed_settings(early):
    """The settings saved in the checkpoint that --resume goes on from."""
    out_dir = Path(early.out_dir or Path("out") / Path(early.data).name)
    stages = ("calm", "transformer", "autoencoder") if early.model == "calm" else (early.model,)
    path = next((out_dir / f"{stage}.pt" for stage in stages if (out_dir / f"{stage}.pt").is_file()), None)
    if path is None:
        fail(f"nothing to resume in {out_dir}: start with `python train.py --out_dir {out_dir}`")
    settings = load_checkpoint(path)["settings"]
    return {k: v for k, v in settings.items() if k not in ("resume", "out_dir", "device", "model", "match_flops")}


# --- One process of a run: alone, or one of torchrun's ----------------------------------------------------------------

class World:
    """Who we are among the processes, and where we compute."""
    def __init__(self, args):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.main = self.rank == 0
        self.device = select_device(args.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")   # TF32 for what stays in float32
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
            atexit.register(dist.destroy_process_group)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # what CUDA's matrix products need for it
            torch.use_deterministic_algorithms(True)
        self.dtype = select_dtype(args.dtype, self.device)
        self.compile = args.compile == "on" or args.compile == "auto" and self.device.type == "cuda"
        self.stopped = False

    def listen(self):
        """From now on Ctrl-C and a scheduler's SIGTERM end the loop after its step, and it saves. A second one ends at once."""
        def stop(*_):
            if self.stopped:
                raise SystemExit(130)
            self.stopped = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def say(self, text):
        if self.main:
            tqdm.write(text)   # above the bar

    def mean(self, value):
        """The mean over the processes of a number on each -> float."""
        value = torch.as_tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size


# --- Optimizer, schedule, batches -------------------------------------------------------------------------------------

# The matrices of embeddings, and those whose rows are tokens: AdamW's in either case.
NOT_MUON = ("embed_tokens.", "lm_head.", "aux.", "head.readout.", "head.hint.", "encoder.embed_tokens.",
            "transformer.lookup.embed.", "transformer.lookup.value.")


def make_optimizers(model, config, shard=False):
    """AdamW with weight decay on matrices only; with optimizer "muon", Muon for the matrices between embedding and output.

    Muon steps along the nearest orthogonal matrix to the momentum (measured in the README). With `shard` each process
    keeps the state of, and updates, a share of the parameters; then they exchange them (ZeRO stage 1)."""
    matrices = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
    muon = {name: p for name, p in matrices.items() if config.optimizer == "muon" and not name.startswith(NOT_MUON)}
    groups = [dict(params=[p for name, p in matrices.items() if name not in muon], weight_decay=config.weight_decay),
              dict(params=[p for p in model.parameters() if p.requires_grad and p.ndim != 2], weight_decay=0.0)]
    kinds = [(torch.optim.AdamW, groups, dict(lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True))]
    if muon:
        kinds.append((torch.optim.Muon, list(muon.values()),
                      dict(lr=config.muon_lr, weight_decay=config.weight_decay, momentum=0.95)))
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer   # here: only builds with torch.distributed have it
        optimizers = [ZeroRedundancyOptimizer(params, kind, **settings) for kind, params, settings in kinds]
    else:
        optimizers = [kind(params, **settings) for kind, params, settings in kinds]
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, config):
    """Of step 1..max_steps: linear warm-up, then constant, then linear to 0 over the last decay_frac of the run."""
    decay = config.decay_frac * config.max_steps
    return min(1.0, step / config.warmup_steps, (config.max_steps + 1 - step) / decay if decay else 1.0)


def micro_batches(data, seed, world, stage, step, count, batch_size, length):
    """This process's share of one step's batch: `count` tensors of tokens (batch_size, length).

    All processes draw the same offsets and take every size-th micro-batch; each seeds its own noise before it is used."""
    number = STAGES.index(stage)
    offsets = data.random_offsets("train", world.size * count * batch_size, length, (seed, number, step))
    for micro in range(world.rank, world.size * count, world.size):
        tokens = data.batch("train", offsets[micro * batch_size:(micro + 1) * batch_size], length)
        if world.device.type == "cuda":
            tokens = tokens.pin_memory()   # so that the copy can overlap the step before
        torch.manual_seed((seed << 40) + (number << 38) + (step << 12) + micro)
        yield tokens.to(world.device, non_blocking=True)


# --- What the loop says while it runs ---------------------------------------------------------------------------------

@torch.no_grad()
def validate(stage, model, data, world, length, brier_windows, K):
    """Metrics on fixed validation windows with fixed noise: the loss and its parts, and BrierLM."""
    model.eval()
    tokens = data.batch("val", data.even_offsets("val", 16, length), length).to(world.device)
    torch.manual_seed(0)   # every training batch seeds anew
    with autocast(world.device, world.dtype):
        metrics = {f"val_{name}": value.item() for name, value in model.loss(tokens)[1].items()}
    if stage in ("calm", "ar") and brier_windows:
        result = eval_brier.evaluate(model, data, world.device, world.dtype, brier_windows, stride=eval_brier.ngram_stride(K))
        metrics |= {"brierlm": result["brierlm"], "stderr": result["stderr"]}
    model.train()
    return metrics


def write_log(path, mode, *entries):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    except OSError as error:
        fail(f"could not write {path} ({error.strerror}): --out_dir must be a folder on a disk with space; then --resume")


class Progress:
    """The bar on the screen and the lines of log.jsonl, one JSON object a logged step."""
    def __init__(self, path, world, stage, begin, steps, tokens_per_step, cost, flops_at):
        self.path, self.world, self.stage, self.begin = path, world, stage, begin
        self.tokens_per_step, self.cost, self.flops_at = tokens_per_step, cost, flops_at
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("}")]    # not the torn last line of a killed run
        lines = [line for line in lines if line["stage"] != stage or line["step"] <= begin]   # the others are written anew
        self.earlier = max((line["seconds"] for line in lines if line["stage"] == stage), default=0.0)
        if world.main:
            write_log(path, "w", *lines)
        self.peak = peak_flops(world.device, world.dtype) if world.device.type == "cuda" else None
        self.bar = tqdm(total=steps, initial=begin, desc=stage, unit="step", disable=not world.main)
        self.began, self.paused = time.time(), 0.0

    def log(self, step, loss, lr, metrics):
        """Say where the run is; the time spent evaluating does not count."""
        seconds = time.time() - self.began - self.paused
        speed = (step - self.begin) * self.tokens_per_step / seconds
        entry = {"stage": self.stage, "step": step, "loss": loss, "tokens": step * self.tokens_per_step,
                 "seconds": round(self.earlier + seconds, 2), "lr": lr, "flops": self.flops_at(step), **metrics}
        shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
        if self.peak:
            entry["mfu"] = speed * self.cost / (self.peak * self.world.size)
            entry["memory_gb"] = peak_memory_gb(self.world.device)
            shown["mfu"] = f"{entry['mfu']:.0%}"
        self.bar.set_postfix(shown)
        if metrics:
            self.world.say(f"{self.stage} step {step}: loss {loss:.4g}, " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if self.world.main:
            write_log(self.path, "a", entry)


# --- The loop ---------------------------------------------------------------------------------------------------------

def train_step(compute, batches, count, optimizers, scaler, grad_clip, world):
    """One optimizer step over `count` micro-batches -> their mean loss, still on the device."""
    total = 0.0
    for micro, tokens in enumerate(batches, 1):
        exchange = world.size == 1 or micro == count   # processes average their gradients once a step
        with nullcontext() if exchange else compute.no_sync():
            with autocast(world.device, world.dtype):
                loss, _ = compute(tokens)
            scaler.scale(loss / count).backward()
        total = total + loss.detach() / count
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], grad_clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total


def train_stage(stage, model, args, data, world, cost, first=0, steps=None, **extra):
    """Train `model` in the steps from first + 1 to `steps` (its max_steps), on from its checkpoint out_dir/<stage>.pt if
    there is one -> its last step, training FLOPs so far. What is finished stays as it is, unless it is what was asked for.
    cost: training FLOPs a token; extra: what else belongs in the checkpoint."""
    checkpoint, config = open_stage(stage, model, args, data), config_of(TrainConfig, args, stage)
    if checkpoint and checkpoint["done"] and stage != args.model:
        return checkpoint["step"], checkpoint["flops"]
    steps, count = steps or config.max_steps, math.ceil(config.grad_accum / world.size)   # micro-batches of each process
    inputs = args.block_size * args.chunk_size
    length = inputs + {"autoencoder": 0, "ar": 1}.get(stage, args.chunk_size)   # with the last target
    tokens_per_step = world.size * count * config.batch_size * inputs
    path = args.out_dir / f"{stage}.pt"
    data.check("train", length), data.check("val", length)
    flops_at = lambda step: extra.get("flops", 0.0) + cost * tokens_per_step * (step - first)   # with the stages before

    model.to(world.device).train()
    shard = args.shard_optimizer and world.size > 1
    optimizers = make_optimizers(model, config, shard)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    begin = checkpoint["step"] if checkpoint else first
    if checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    model.forward = model.loss   # what torch.compile and DistributedDataParallel wrap
    compute = torch.compile(model) if world.compile else model
    if world.size > 1:
        compute = DistributedDataParallel(compute, device_ids=[world.device] if world.device.type == "cuda" else None)

    def save(step):
        for optimizer in optimizers if shard else ():
            optimizer.consolidate_state_dict()   # gathered in the first process
        weights = model.state_dict()
        if stage == "transformer":
            weights = {name: value for name, value in weights.items() if not name.startswith(("head.", "autoencoder."))}
        if world.main:
            save_checkpoint(path, {
                "kind": stage, "config": asdict(model.config), "model": weights, "step": step, "done": step >= steps,
                "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
                "random": {"seed": args.seed, "step": step},   # all of it: each micro-batch is seeded by these
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                "data": {**data.meta, "name": args.data}, **extra, "flops": flops_at(step)})

    world.say(f"{stage}: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters, {steps - first:,} steps "
              f"of {tokens_per_step:,} tokens, {cost * tokens_per_step * (steps - first):.2e} FLOPs, on {world.size} x "
              f"{world.device.type} in {str(world.dtype).removeprefix('torch.')}{', compiled' if world.compile else ''}")
    progress = Progress(args.out_dir / "log.jsonl", world, stage, begin, steps, tokens_per_step, cost, flops_at)
    world.listen()
    for step in range(begin + 1, steps + 1):
        factor = lr_factor(step - first, replace(config, max_steps=steps - first))
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = factor * group["peak_lr"]
        batches = micro_batches(data, args.seed, world, stage, step, count, config.batch_size, length)
        loss = train_step(compute, batches, count, optimizers, scaler, config.grad_clip, world)
        progress.bar.update()

        evaluating = step % args.eval_interval == 0 or step == steps
        logging = evaluating or step % args.log_interval == 0 or step == 1
        stopping = world.stopped if world.size == 1 else logging and world.mean(world.stopped) > 0   # all, or none
        if not (logging or stopping):
            continue
        loss = world.mean(loss)                                               # the host waits for the device here
        if not math.isfinite(loss):
            progress.bar.close()
            kept = f"{path} holds the last good step" if path.exists() else "no checkpoint had been written yet"
            fail(f"the loss of {stage} is {loss} at step {step}: stopped; {kept}. Lower --lr or --muon_lr, or use --dtype float32")
        metrics = {}
        if evaluating:
            began = time.time()
            metrics = validate(stage, model, data, world, length, brier_windows=0 if step == steps else 32, K=args.chunk_size)
            progress.paused += time.time() - began
        progress.log(step, loss, factor * config.lr, metrics)
        if stopping or evaluating:
            save(step)
        if stopping and step < steps:
            progress.bar.close()
            world.say(f"interrupted at step {step}, saved to {path}. Go on with: python train.py --resume "
                      f"--model {args.model} --data {args.data} --out_dir {args.out_dir}")
            raise SystemExit(130)
    progress.bar.close()
    return steps, flops_at(steps)


# --- The bench -------------------------------------------------------------------------------------------------------

def bench(args, world):
    """Speed and memory of one configuration: a training step and its parts, then generation by CALM and by AR."""
    device, K, config = world.device, args.chunk_size, config_of(TrainConfig, args, "calm")
    autoencoder = Autoencoder(config_of(AutoencoderConfig, args, "autoencoder"))
    model = CALM(config_of(CALMConfig, args, "calm"), autoencoder).to(device).train()
    c, P = model.config, config.batch_size * args.block_size
    tokens = torch.randint(c.vocab_size, (config.batch_size, (args.block_size + 1) * K), device=device)
    optimizers, scaler = make_optimizers(model, config), torch.amp.GradScaler(device.type, enabled=world.dtype == torch.float16)
    model.forward = model.loss
    compute = torch.compile(model) if world.compile else model
    train = lambda: train_step(compute, [tokens], 1, optimizers, scaler, config.grad_clip, world)
    step = median_seconds(train, device, args.bench)
    speed, memory, mfu = P * K / step, peak_memory_gb(device), None
    if device.type == "cuda":
        mfu = speed * flops_per_token(c, autoencoder.config)["train"] / peak_flops(device, world.dtype)

    def share(forward):
        """Of a part, its backward pass included, in the time of a step."""
        def both():
            with autocast(device, world.dtype):
                y = forward()
            if y.requires_grad:
                y.sum().backward()
        return median_seconds(both, device, args.bench) / step

    with autocast(device, world.dtype):
        h = model.hidden(tokens[:, K:]).flatten(0, 1).detach().requires_grad_()
    log_std = torch.zeros(P, c.latent_dim, device=device)
    x = torch.randn(c.num_samples, P, c.latent_dim, device=device).requires_grad_()
    shares = {"backbone": share(lambda: model.hidden(tokens[:, K:])), "head": share(lambda: model.head.sample(h, c.num_samples)),
              "energy_score": share(lambda: energy_score(x, half_of_targets(log_std, c.num_targets), c.alpha, True)),
              "autoencoder": share(lambda: torch.no_grad()(autoencoder.encode)(tokens[:, K:].unflatten(1, (-1, K)))[0])}

    def tokens_per_s(model, new, temperature=1.0, batch=1):
        prompt, cache = tokens[:1, :2 * K].expand(batch, -1), KVCache(model.config.block_size)
        write = lambda: generate(model, prompt, new, temperature, cache=cache, compiled=world.compile)
        with autocast(device, world.dtype):
            return batch * new / median_seconds(write, device, args.bench)

    new = max(1, min(args.block_size, 64) - 2) * K   # after a prompt of 2 chunks, within the context
    ar = AR(config_of(ARConfig, args, "ar", block_size=args.block_size * K)).to(device)
    calm, ar = (cast_matrices(m.eval(), world.dtype) for m in (model, ar))
    made = {"calm_T1": tokens_per_s(calm, new), "calm_T0.5": tokens_per_s(calm, new // 4, 0.5), "ar_T1": tokens_per_s(ar, new),
            "calm_T1_b32": tokens_per_s(calm, new, batch=32), "ar_T1_b32": tokens_per_s(ar, new // 4, batch=32)}
    precision = str(world.dtype).removeprefix("torch.")
    print(f"{'training, ' + precision:28} {speed:10,.0f} tokens/s, peak memory {memory:.2f} GB" + (f", MFU {mfu:.1%}" if mfu else ''))
    for name, value in shares.items():
        print(f"{'  ' + name.replace('_', ' '):28} {value:10.1%} of the step")
    for name, value in made.items():
        print(f"{'generation, ' + name:28} {value:10,.0f} tokens/s")
    if args.json:
        print(json.dumps({"train_tokens_per_s": speed, "peak_memory_gb": memory, "mfu": mfu, "precision": precision,
                          "share": shares, "generate": made}))


# --- The whole road ---------------------------------------------------------------------------------------------------

def open_stage(stage, model, args, data):
    """Load the model's weights if the run has some -> the checkpoint to go on from, or None.

    A checkpoint that does not fit is an error, never overwritten."""
    path = args.out_dir / f"{stage}.pt"
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, stage)
    elsewhere, longer = "use another --out_dir", f"--{flag('max_steps', stage)}"
    if checkpoint["data"]["fingerprint"] != data.meta["fingerprint"]:
        fail(f"{path} was trained on other data than {data.folder} holds now: {elsewhere}")
    try:
        trained = asdict(type(model.config)(**checkpoint["config"]))
    except TypeError as error:   # a field that this version does not have
        fail(f"{path} is of another version ({error}): {elsewhere}")
    any_head = stage == "transformer" and model.config.input_mode == "discrete"   # else it has read the latents
    for name, value in asdict(model.config).items():
        if trained[name] != value and not (any_head and name in OF_THE_HEAD):
            fail(f"{path} has {name} {trained[name]}, this run asks for {value}: {elsewhere}, or drop the flag")
    if not checkpoint["done"] and not args.resume:
        fail(f"{path} is unfinished (step {checkpoint['step']:,}): add --resume to go on, or {elsewhere}")
    if checkpoint["done"] and not args.resume and stage == args.model:
        fail(f"{path} is already trained ({checkpoint['step']:,} steps): add --resume with a larger {longer}, or {elsewhere}")
    model.load_state_dict(checkpoint["model"], strict=stage != "transformer")
    return checkpoint


def finish(model, args, data, world, flops):
    """BrierLM, a held-out text continued, and what to run next."""
    stride = eval_brier.ngram_stride(args.chunk_size)   # the baseline's too: CALM's positions
    result = eval_brier.evaluate(model, data, world.device, world.dtype, stride=stride, progress=world.main)
    if not world.main:
        return
    print("\n" + eval_brier.describe(result))
    entry = {"stage": args.model, "step": args.max_steps, "seconds": 0.0, "flops": flops, "final": True, **result}
    write_log(args.out_dir / "log.jsonl", "a", entry)
    middle = data.even_offsets("val", 2, args.block_size * args.chunk_size)[-1:]
    prompt = data.batch("val", middle, args.block_size * args.chunk_size // 4).to(world.device)
    decode = lambda tokens: data.tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace")
    print(f"\n--- held-out text {'-' * 62}\n{decode(prompt[0])}")
    for temperature in (1.0, 0.5):
        torch.manual_seed(args.seed)
        with autocast(world.device, world.dtype):
            text = generate(model, prompt, 400, temperature, eot_token(data.tokenizer))
        print(f"--- continued by the model at T = {temperature:g} {'-' * 43}\n{decode(text[0, prompt.shape[1]:])}")
    print(f"{'-' * 80}\nNext:")
    print(f"  python sample.py --out_dir {args.out_dir} --model {args.model} --temperature 0.5 --start 'def main('")
    if args.model == "calm":
        print(f"  python train.py --out_dir {args.out_dir} --data {args.data} --model ar --match_flops {args.out_dir}"
              f"   # the baseline at equal cost")
    print(f"  python {'autoencoder.py' if args.model == 'calm' else 'eval_brier.py --model ar'} --out_dir {args.out_dir}")


def main():
    args = parse_args(sys.argv[1:])
    world = World(args)
    if args.bench:
        return bench(args, world)
    if world.main:
        load_data(args.data)   # prepares it, if it is a known one
    world.mean(0)              # the others wait
    data = load_data(args.data)
    vocab_size, extra = data.meta["vocab_size"], {}

    torch.manual_seed(args.seed)
    if args.model != "ar":
        model = Autoencoder(config_of(AutoencoderConfig, args, "autoencoder", vocab_size=vocab_size))
        train_stage("autoencoder", model, args, data, world, flops_per_token(model.config)["train"])
    if args.model == "autoencoder":
        return

    torch.manual_seed(args.seed)
    share = args.transformer_share if args.model == "calm" else 0.0
    if args.model == "calm":
        checkpoint = load_checkpoint(args.out_dir / "autoencoder.pt", "autoencoder")
        extra = {"autoencoder_config": checkpoint["config"], "flops": checkpoint["flops"]}
        model = CALM(config_of(CALMConfig, args, "calm", vocab_size=vocab_size), load_autoencoder(checkpoint))
        costs = flops_per_token(model.config, model.autoencoder.config)
        cost = share * costs["transformer"] + (1 - share) * costs["head"] if share else costs["train"]   # the mean of a step
    else:
        model = AR(config_of(ARConfig, args, "ar", vocab_size=vocab_size, block_size=args.block_size * args.chunk_size))
        cost = flops_per_token(model.config)["train"]
    if args.match_flops:
        total, before = load_checkpoint(Path(args.match_flops) / "calm.pt", "calm")["flops"], extra.get("flops", 0.0)
        if before >= total:
            fail(f"the autoencoder alone cost {before:.2e} FLOPs, {args.match_flops} in all {total:.2e}: lower --ae_max_steps")
        micro_batches_a_step = world.size * math.ceil(args.grad_accum / world.size)
        tokens_per_step = micro_batches_a_step * args.batch_size * args.block_size * args.chunk_size
        args.max_steps = max(1, round((total - before) / cost / tokens_per_step))
        world.say(f"{args.max_steps:,} steps match the {total:.2e} training FLOPs of {args.match_flops}, autoencoder included")
    first = min(round(share * args.max_steps), args.max_steps - 1)   # the steps of the Transformer alone
    if first:
        model.learn_only("transformer")
        first, extra["flops"] = train_stage("transformer", model, args, data, world, costs["transformer"], steps=first, **extra)
        if first >= args.max_steps:
            fail(f"{args.out_dir / 'transformer.pt'} has {first:,} steps: --max_steps counts them and the head's, and must be larger")
        model.learn_only("head")
        cost = costs["head"]
    _, flops = train_stage(args.model, model, args, data, world, cost, first, **extra)
    finish(cast_matrices(model.eval(), world.dtype), args, data, world, flops)   # the training is over


if __name__ == "__main__":
    main()
