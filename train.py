"""
The one training loop: stage 1 the autoencoder, stage 2 CALM, or the token-by-token baseline.

    python train.py                                    # data, autoencoder, CALM, BrierLM, samples: all of it
    python train.py --model ar --match_flops out/stdlib   # the baseline at the same training FLOPs
    python train.py --resume                           # go on where an interrupted run stopped
    python train.py --data shakespeare --preset mini
    torchrun --nproc_per_node 8 train.py --preset M    # several GPUs, one process each

A run lives in --out_dir: autoencoder.pt, calm.pt or ar.pt, and log.jsonl. Every micro-batch seeds its own noise from
(seed, step, its number), so a resumed run, or one spread over other processes, draws what the plain run draws.
"""
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval_brier
from autoencoder import (Autoencoder, AutoencoderConfig, accuracy, autocast, load_autoencoder, load_checkpoint, save_checkpoint,
                         select_device, select_dtype)
from calm import AR, CALM, ARConfig, CALMConfig, flops_per_token, generate
from data.prepare import DATA_DIR, DOWNLOADS, Parser, eot_token, fail, load_data, prepare

# The paper's sizes and training (section 6), and two small recipes found by measurement. Any flag given wins.
PAPER = dict(chunk_size=4, latent_dim=128, ae_n_embd=512, ae_n_ff=1280, n_head=16, block_size=2048, optimizer="adamw",
             lr=3e-4, warmup_steps=2000, decay_frac=0.0, max_steps=250_000, batch_size=8, grad_accum=32, alpha=1.0,
             aux_weight=0.0, ae_lr=3e-4, ae_warmup_steps=1000, ae_decay_frac=0.0, ae_max_steps=30_000, ae_batch_size=2,
             ae_grad_accum=32)
SMALL = dict(chunk_size=4, latent_dim=32, ae_n_embd=256, ae_n_ff=640, optimizer="muon", lr=3e-3, muon_lr=0.01,
             warmup_steps=50, decay_frac=0.4, batch_size=8, grad_accum=1, alpha=0.5, aux_weight=0.5, ae_lr=3e-3,
             ae_warmup_steps=50, ae_decay_frac=0.4, ae_batch_size=8, ae_grad_accum=1)
PRESETS = {
    "nano": dict(SMALL, n_layer=4, n_embd=256, n_head=4, n_ff=688, n_head_layer=1, block_size=128, max_steps=1600,
                 ae_max_steps=600),
    "mini": dict(SMALL, n_layer=8, n_embd=512, n_head=8, n_ff=1376, n_head_layer=2, block_size=256, max_steps=6000,
                 batch_size=32, ae_max_steps=2000, ae_batch_size=16),
    "S": dict(PAPER, n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3),
    "M": dict(PAPER, n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4),
    "L": dict(PAPER, n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4),
    "XL": dict(PAPER, n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4),
}
STAGE = {"autoencoder": 0, "calm": 1, "ar": 2}   # keeps the stages' random draws apart


# ----------------------------------------------------------------------------------------------------------------------
# Settings

CHOICES = {"input_mode": ("discrete", "continuous", "both"), "head": ("energy",)}


def parse_args(argv):
    parser = Parser(usage="python train.py [flags]", description="Train CALM, its autoencoder, or the AR baseline.")
    run = parser.add_argument_group("run")
    run.add_argument("--model", default="calm", choices=list(STAGE), help="what to train; calm trains its autoencoder first")
    run.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="auto: mini on CUDA, else nano")
    run.add_argument("--data", default="stdlib", help="a data set under data/; stdlib and downloads are prepared if missing")
    run.add_argument("--out_dir", help="the run's folder (default: out/<data name>)")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in out_dir, with its settings")
    run.add_argument("--match_flops", metavar="RUN", help="with --model ar: train for the FLOPs that RUN's calm.pt cost")
    run.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    run.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of matrix products")
    run.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on CUDA")
    run.add_argument("--log_interval", type=int, default=10, help="steps between lines of log.jsonl")
    run.add_argument("--eval_interval", type=int, default=500, help="steps between evaluations, each followed by a checkpoint")

    loop = parser.add_argument_group("training")
    loop.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="muon: for the matrices inside the model")
    loop.add_argument("--muon_lr", type=float, default=0.01, help="peak learning rate of Muon")
    loop.add_argument("--weight_decay", type=float, default=0.1, help="of matrices; vectors have none")
    loop.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    model = parser.add_argument_group("model (the baseline takes what it has; its context is the same text, block_size * K tokens)")
    stage1 = parser.add_argument_group("autoencoder")
    for group, prefix in ((loop, ""), (stage1, "ae_")):   # each stage has its own
        add = lambda name, type, help: group.add_argument(f"--{prefix}{name}", type=type, default=PAPER[prefix + name], help=help)
        add("lr", float, "peak learning rate of AdamW")
        add("warmup_steps", int, "steps of linear warm-up")
        add("decay_frac", float, "share of the steps, at the end, over which the rate falls to 0")
        add("max_steps", int, "optimizer steps")
        add("batch_size", int, "sequences of block_size chunks in a micro-batch")
        add("grad_accum", int, "micro-batches a step, shared among the processes (at least one each)")
    add_fields(model, CALMConfig, skip={"vocab_size"})
    add_fields(stage1, AutoencoderConfig, skip={"vocab_size", "chunk_size", "latent_dim"})   # these must agree: one flag each

    # Parsed twice: first for the preset (or the run to resume), then, help included, with its settings as the defaults.
    early = parser.parse_args([flag for flag in argv if flag not in ("-h", "--help")])
    preset = ("mini" if select_device(early.device).type == "cuda" else "nano") if early.preset == "auto" else early.preset
    parser.set_defaults(**PRESETS[preset])
    if early.resume:
        parser.set_defaults(**resumed_settings(early))
    args = parser.parse_args(argv)
    args.out_dir = Path(args.out_dir or Path("out") / Path(args.data).name)
    for name in ("max_steps", "batch_size", "grad_accum", "ae_max_steps", "ae_batch_size", "ae_grad_accum", "log_interval",
                 "eval_interval"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.seed < 1 << 20:
        fail(f"--seed must be in 0 .. {(1 << 20) - 1}, not {args.seed}")
    if args.match_flops and args.model != "ar":
        fail("--match_flops sets the length of an AR run: add --model ar")
    for config in (AutoencoderConfig, CALMConfig, ARConfig):   # wrong sizes are found now, not after the autoencoder
        config_of(config, args)
    return args


def add_fields(group, config, skip):
    """Every field of a config is a flag, and the comment beside it is its help."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.MULTILINE))
    taken = {f.name for f in fields(CALMConfig)} if config is not CALMConfig else {}
    for f in fields(config):
        if f.name not in skip:
            group.add_argument(f"--{'ae_' if f.name in taken else ''}{f.name}", type=f.type, default=f.default,
                               choices=CHOICES.get(f.name), help=comments[f.name])


def resumed_settings(early):
    """The settings saved in the checkpoint that --resume goes on from."""
    out_dir = Path(early.out_dir or Path("out") / Path(early.data).name)
    stages = {"calm": ("calm", "autoencoder")}.get(early.model, (early.model,))
    path = next((out_dir / f"{stage}.pt" for stage in stages if (out_dir / f"{stage}.pt").is_file()), None)
    if path is None:
        fail(f"nothing to resume in {out_dir}: start with `python train.py --out_dir {out_dir}`")
    settings = load_checkpoint(path)["settings"]
    return {k: v for k, v in settings.items() if k not in ("resume", "out_dir", "device", "model", "match_flops")}


def config_of(kind, args, **given):
    """A config from the flags of the same names (the autoencoder's have a prefix where CALM's have the name)."""
    prefix = "ae_" if kind is AutoencoderConfig else ""
    flag = lambda name: getattr(args, prefix + name, getattr(args, name, 1))   # vocab_size is no flag: the data's
    return kind(**{f.name: given.get(f.name, flag(f.name)) for f in fields(kind)})


# ----------------------------------------------------------------------------------------------------------------------
# One process of a run: alone, or one of torchrun's

class World:
    """Who we are among the processes, and where we compute."""
    def __init__(self, args):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.main = self.rank == 0
        self.device = select_device(args.device)
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.dtype = select_dtype(args.dtype, self.device)
        self.compile = args.compile == "on" or args.compile == "auto" and self.device.type == "cuda"
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")   # TF32 for what stays in float32
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_):
        """Ctrl-C and a scheduler's SIGTERM: the loop ends after this step and saves. A second one ends at once."""
        if self.stopped:
            raise SystemExit(130)
        self.stopped = True

    def say(self, text):
        if self.main:
            tqdm.write(text)   # above the bar

    def mean(self, value):
        """The mean over the processes of a number on each -> float."""
        value = torch.as_tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def barrier(self):
        if self.size > 1:
            dist.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule

def make_optimizers(model, args, stage):
    """AdamW with weight decay on matrices only; with --optimizer muon, Muon for the matrices between embedding and output.

    Muon steps along the nearest orthogonal matrix to the momentum (measured in the README). The autoencoder has AdamW
    always."""
    muon, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        inside = not name.startswith(("embed.", "lm_head.", "aux."))
        if p.ndim == 2 and inside and stage != "autoencoder" and args.optimizer == "muon":
            muon.append(p)
        else:
            (decayed if p.ndim == 2 else plain).append(p)
    lr = args.ae_lr if stage == "autoencoder" else args.lr
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=args.muon_lr, weight_decay=args.weight_decay, momentum=0.95))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, warmup, decay_frac, max_steps):
    """Of step 1..max_steps: linear warm-up, then constant, then linear to 0 over the last decay_frac of the run."""
    decay = decay_frac * max_steps
    return min(1.0, step / (warmup + 1), (max_steps + 1 - step) / decay if decay else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation during training

@torch.no_grad()
def validate(stage, model, data, world, length, brier_windows):
    """Metrics on fixed validation windows with fixed noise: the loss, and accuracy (stage 1) or BrierLM."""
    model.eval()
    tokens = data.batch("val", data.even_offsets("val", 16, length), length).to(world.device)
    torch.manual_seed(0)   # every training batch seeds anew
    with autocast(world.device, world.dtype):
        if stage == "autoencoder":
            chunks = tokens.unflatten(1, (-1, model.config.chunk_size))
            metrics = {"val_loss": model.loss(chunks)[0].item(), "posterior": accuracy(model, chunks, "posterior")[0],
                       "sigma_0.3": accuracy(model, chunks, 0.3)[0]}
        else:
            metrics = {"val_loss": model.loss(tokens)[0].item()}
    if stage != "autoencoder" and brier_windows:
        result = eval_brier.evaluate(model, data, world.device, world.dtype, windows=brier_windows)
        metrics["brierlm"], metrics["stderr"] = result["brierlm"], result["stderr"]
    model.train()
    return metrics


class Progress:
    """The bar on the screen and the lines of log.jsonl, one JSON object a logged step."""
    def __init__(self, args, world, stage, begin, steps, tokens_per_step, cost):
        self.world, self.stage, self.begin, self.tokens_per_step, self.cost = world, stage, begin, tokens_per_step, cost
        self.path = args.out_dir / "log.jsonl"
        self.earlier = trim_log(self.path, stage, begin) if world.main else 0.0   # seconds spent before this process
        self.peak = peak_flops(world.device, world.dtype) if world.device.type == "cuda" else None
        self.bar = tqdm(total=steps, initial=begin, desc=stage, unit="step", disable=not world.main)
        self.began, self.paused = time.time(), 0.0

    def log(self, step, loss, lr, metrics):
        """Say where the run is; the time spent evaluating does not count."""
        seconds = time.time() - self.began - self.paused
        speed = (step - self.begin) * self.tokens_per_step / seconds
        entry = {"stage": self.stage, "step": step, "loss": loss, "tokens": step * self.tokens_per_step,
                 "seconds": round(self.earlier + seconds, 2), "lr": lr, **metrics}
        shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}"}
        if self.peak:
            entry["mfu"] = speed * self.cost / (self.peak * self.world.size)
            entry["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
            shown["mfu"] = f"{entry['mfu']:.0%}"
        self.bar.set_postfix(shown)
        if metrics:
            self.world.say(f"{self.stage} step {step}: loss {loss:.4g}, " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if self.world.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def peak_flops(device, dtype, n=8192):
    """FLOPs a second that this card reaches on one large matrix product: what MFU is measured against."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for repeat in range(20):
        if repeat == 10:   # after a warm-up
            torch.cuda.synchronize()
            began = time.time()
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * n ** 3 / (time.time() - began)


def trim_log(path, stage, step):
    """Drop the lines that a resumed run will write again -> seconds this stage had taken by `step`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["stage"] != stage or line["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
    return max((line["seconds"] for line in lines if line["stage"] == stage), default=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def micro_batches(data, args, world, stage, step, count, batch_size, length):
    """This process's share of one step's batch: `count` tensors of tokens (batch_size, length).

    All processes draw the same offsets and take every size-th micro-batch; each seeds its own noise before it is used."""
    offsets = data.random_offsets("train", world.size * count * batch_size, length, (args.seed, STAGE[stage], step))
    for micro in range(count):
        number = micro * world.size + world.rank
        tokens = data.batch("train", offsets[number * batch_size:(number + 1) * batch_size], length)
        if world.device.type == "cuda":
            tokens = tokens.pin_memory()   # so that the copy can overlap the step before
        torch.manual_seed((args.seed << 40) + (STAGE[stage] << 38) + (step << 12) + number)
        yield tokens.to(world.device, non_blocking=True)


def update(optimizers, scaler, parameters, grad_clip):
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


def train_stage(stage, model, args, data, world, cost, extra, resume_from=None):
    """Train `model` to its last step, with checkpoints in out_dir/<stage>.pt.

    cost: training FLOPs a token; extra: what else belongs in the checkpoint; resume_from: a checkpoint of this stage."""
    first = stage == "autoencoder"
    setting = lambda name: getattr(args, f"ae_{name}" if first else name)
    steps, batch_size = setting("max_steps"), setting("batch_size")
    accum = math.ceil(setting("grad_accum") / world.size)                     # micro-batches of each process
    K = args.chunk_size
    length = args.block_size * K + {"autoencoder": 0, "calm": K, "ar": 1}[stage]   # inputs, and the last target
    tokens_per_step = world.size * accum * batch_size * args.block_size * K
    path = args.out_dir / f"{stage}.pt"
    data.check("train", length), data.check("val", length)

    model.to(world.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, args, stage)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    begin = 0
    if resume_from:
        begin = resume_from["step"]
        for optimizer, state in zip(optimizers, resume_from["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resume_from["scaler"])
    model.forward = model.loss   # what torch.compile and DistributedDataParallel wrap
    compute = torch.compile(model) if world.compile else model
    if world.size > 1:
        compute = DistributedDataParallel(compute, device_ids=[world.device.index] if world.device.type == "cuda" else None)

    def save(step):
        if world.main:
            save_checkpoint(path, {
                "kind": stage, "config": asdict(model.config), "model": model.state_dict(), "step": step, "done": step >= steps,
                "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
                "random": {"seed": args.seed, "step": step},   # all of it: each micro-batch is seeded by these
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                "data": {**data.meta, "name": args.data}, **extra,
                "flops": extra.get("flops", 0.0) + cost * tokens_per_step * step})

    world.say(f"{stage}: {sum(p.numel() for p in parameters):,} parameters, {steps:,} steps of {tokens_per_step:,} tokens, "
              f"{cost * tokens_per_step * steps:.2e} FLOPs, on {world.size} x {world.device.type} in "
              f"{str(world.dtype).removeprefix('torch.')}{', compiled' if world.compile else ''}")
    progress = Progress(args, world, stage, begin, steps, tokens_per_step, cost)
    for step in range(begin + 1, steps + 1):
        factor = lr_factor(step, setting("warmup_steps"), setting("decay_frac"), steps)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = factor * group["peak_lr"]
        loss = 0.0
        for micro, tokens in enumerate(micro_batches(data, args, world, stage, step, accum, batch_size, length)):
            exchange = world.size == 1 or micro == accum - 1   # processes average their gradients once a step
            with nullcontext() if exchange else compute.no_sync():
                with autocast(world.device, world.dtype):
                    objective, _ = compute(tokens.unflatten(1, (-1, K)) if first else tokens)
                scaler.scale(objective / accum).backward()
            loss = loss + objective.detach() / accum
        update(optimizers, scaler, parameters, args.grad_clip)
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
            fail(f"the loss of {stage} is {loss} at step {step}: stopped; {kept}. Lower --lr or --muon_lr, or try --dtype float32")
        metrics = {}
        if evaluating and world.main:
            began = time.time()
            metrics = validate(stage, model, data, world, length, brier_windows=0 if step == steps else 32)
            progress.paused += time.time() - began
        progress.log(step, loss, factor * setting("lr"), metrics)
        if stopping or evaluating:
            save(step)
            world.barrier()
        if stopping and step < steps:
            progress.bar.close()
            world.say(f"interrupted at step {step}, saved to {path}. Go on with: python train.py --resume "
                      f"--model {args.model} --data {args.data} --out_dir {args.out_dir}")
            raise SystemExit(130)
    progress.bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# The whole road

def open_data(args, world):
    """The data set named by --data; the default and the downloads are prepared the first time they are asked for."""
    known = args.data == "stdlib" or args.data in DOWNLOADS
    if world.main and known and not (DATA_DIR / args.data / "meta.json").exists():
        prepare([args.data])
    world.barrier()
    return load_data(args.data)


def open_stage(stage, config, args, data, build, *parts):
    """-> (model, checkpoint to go on from or None). A checkpoint that does not fit is an error, never overwritten."""
    path = args.out_dir / f"{stage}.pt"
    torch.manual_seed(args.seed)
    model = build(*parts)
    if not path.exists():
        return model, None
    checkpoint = load_checkpoint(path, stage)
    elsewhere, longer = "use another --out_dir", "--ae_max_steps" if stage == "autoencoder" else "--max_steps"
    if checkpoint["data"]["fingerprint"] != data.meta["fingerprint"]:
        fail(f"{path} was trained on other data than {data.folder} holds now: {elsewhere}")
    for name, value in asdict(config).items():
        if checkpoint["config"].get(name) != value:
            fail(f"{path} has {name} {checkpoint['config'].get(name)}, this run asks for {value}: {elsewhere}, or drop the flag")
    if not checkpoint["done"] and not args.resume:
        fail(f"{path} is unfinished (step {checkpoint['step']:,}): add --resume to go on, or {elsewhere}")
    if checkpoint["done"] and not args.resume and stage == args.model:
        fail(f"{path} is already trained ({checkpoint['step']:,} steps): add --resume with a larger {longer}, or {elsewhere}")
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def finish(model, args, data, world):
    """BrierLM, a held-out text continued, and what to run next."""
    result = eval_brier.evaluate(model, data, world.device, world.dtype, progress=True)
    print("\n" + eval_brier.describe(result))
    with open(args.out_dir / "log.jsonl", "a") as log:
        log.write(json.dumps({"stage": args.model, "step": args.max_steps, "seconds": 0.0, "final": True, **result}) + "\n")
    middle = data.even_offsets("val", 2, args.block_size * args.chunk_size)[-1:]
    prompt = data.batch("val", middle, args.block_size * args.chunk_size // 4).to(world.device)
    decode = lambda tokens: data.tokenizer.decode_bytes(tokens.tolist()).decode("utf-8", "replace")
    print(f"\n--- held-out text {'-' * 62}\n{decode(prompt[0])}")
    for temperature in (1.0, 0.5):
        torch.manual_seed(args.seed)
        with autocast(world.device, world.dtype):
            text = generate(model, prompt, 400, temperature, eot=eot_token(data.tokenizer))
        print(f"--- continued by the model at T = {temperature:g} {'-' * 43}\n{decode(text[0, prompt.shape[1]:])}")
    print("-" * 80 + "\nNext:")
    print(f"  python sample.py --out_dir {args.out_dir} --model {args.model} --temperature 0.5 --start 'def main('")
    if args.model == "calm":
        print(f"  python train.py --out_dir {args.out_dir} --data {args.data} --model ar --match_flops {args.out_dir}"
              f"   # the baseline at equal cost")
        print(f"  python autoencoder.py --out_dir {args.out_dir}   # how faithful, how robust are the vectors?")
    else:
        print(f"  python eval_brier.py --out_dir {args.out_dir} --model {args.model}")


def main():
    args = parse_args(sys.argv[1:])
    world = World(args)
    data = open_data(args, world)
    vocab_size = data.meta["vocab_size"]
    extra = {}

    if args.model != "ar":
        config = config_of(AutoencoderConfig, args, vocab_size=vocab_size)
        model, checkpoint = open_stage("autoencoder", config, args, data, Autoencoder, config)
        if not checkpoint or not checkpoint["done"] or args.model == "autoencoder":   # a finished one stays as it is
            train_stage("autoencoder", model, args, data, world, flops_per_token(config)["train"], {}, checkpoint)
    if args.model == "calm":
        checkpoint = load_checkpoint(args.out_dir / "autoencoder.pt", "autoencoder")
        autoencoder = load_autoencoder(checkpoint)
        extra = {"autoencoder_config": checkpoint["config"], "flops": checkpoint["flops"]}
        config = config_of(CALMConfig, args, vocab_size=vocab_size)
        cost = flops_per_token(config, autoencoder.config)["train"]
        model, checkpoint = open_stage("calm", config, args, data, CALM, config, autoencoder)
    if args.model == "ar":
        config = config_of(ARConfig, args, vocab_size=vocab_size, block_size=args.block_size * args.chunk_size)
        cost = flops_per_token(config)["train"]
        if args.match_flops:
            total = load_checkpoint(Path(args.match_flops) / "calm.pt", "calm")["flops"]
            tokens_per_step = world.size * math.ceil(args.grad_accum / world.size) * args.batch_size * config.block_size
            args.max_steps = round(total / cost / tokens_per_step)
            world.say(f"{args.max_steps:,} steps match the {total:.2e} training FLOPs of {args.match_flops}, its autoencoder's included")
        model, checkpoint = open_stage("ar", config, args, data, AR, config)
    if args.model != "autoencoder":
        train_stage(args.model, model, args, data, world, cost, extra, checkpoint)
        if world.main:
            finish(model.eval(), args, data, world)
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
