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
import json
import math
import os
import signal
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
             lr=3e-4, warmup_steps=2000, decay_frac=0.0, max_steps=250_000, batch_size=8, grad_accum=32, aux_weight=0.0,
             ae_lr=3e-4, ae_warmup_steps=1000, ae_decay_frac=0.0, ae_max_steps=30_000, ae_batch_size=64)
PRESETS = {
    "nano": dict(chunk_size=4, latent_dim=32, ae_n_embd=256, ae_n_ff=640, n_layer=4, n_embd=256, n_head=4, n_ff=688,
                 n_head_layer=1, block_size=128, optimizer="muon", lr=3e-3, muon_lr=0.01, warmup_steps=50, decay_frac=0.4,
                 max_steps=2500, batch_size=4, grad_accum=1, aux_weight=0.5,
                 ae_lr=3e-3, ae_warmup_steps=50, ae_decay_frac=0.4, ae_max_steps=600, ae_batch_size=8),
    "mini": dict(chunk_size=4, latent_dim=32, ae_n_embd=256, ae_n_ff=640, n_layer=8, n_embd=512, n_head=8, n_ff=1376,
                 n_head_layer=2, block_size=256, optimizer="muon", lr=3e-3, muon_lr=0.01, warmup_steps=100, decay_frac=0.4,
                 max_steps=6000, batch_size=32, grad_accum=1, aux_weight=0.5,
                 ae_lr=3e-3, ae_warmup_steps=50, ae_decay_frac=0.4, ae_max_steps=2000, ae_batch_size=16),
    "S": dict(PAPER, n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3),
    "M": dict(PAPER, n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4),
    "L": dict(PAPER, n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4),
    "XL": dict(PAPER, n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4),
}
STAGE = {"autoencoder": 0, "calm": 1, "ar": 2}   # keeps the stages' random draws apart


# ----------------------------------------------------------------------------------------------------------------------
# Settings

def parse_args(argv=None):
    parser = Parser(description="Train CALM, its autoencoder, or the AR baseline.")
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
    loop = parser.add_argument_group("training")
    loop.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="muon: for the matrices inside the model")
    loop.add_argument("--lr", type=float, default=3e-4, help="of AdamW")
    loop.add_argument("--muon_lr", type=float, default=0.01, help="of Muon")
    loop.add_argument("--weight_decay", type=float, default=0.1, help="of matrices; vectors have none")
    loop.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    loop.add_argument("--warmup_steps", type=int, default=2000, help="steps of linear warm-up")
    loop.add_argument("--decay_frac", type=float, default=0.0, help="share of the steps, at the end, over which lr falls to 0")
    loop.add_argument("--max_steps", type=int, default=250_000, help="optimizer steps")
    loop.add_argument("--batch_size", type=int, default=8, help="sequences a micro-batch")
    loop.add_argument("--grad_accum", type=int, default=1, help="micro-batches a step and process")
    loop.add_argument("--ae_lr", type=float, default=3e-4, help="the same settings for the autoencoder (AdamW, one micro-batch)")
    loop.add_argument("--ae_warmup_steps", type=int, default=1000)
    loop.add_argument("--ae_decay_frac", type=float, default=0.0)
    loop.add_argument("--ae_max_steps", type=int, default=30_000)
    loop.add_argument("--ae_batch_size", type=int, default=64, help="sequences of block_size chunks")
    loop.add_argument("--log_interval", type=int, default=10, help="steps between lines of log.jsonl")
    loop.add_argument("--eval_interval", type=int, default=500, help="steps between evaluations, each followed by a checkpoint")
    add_config_flags(parser.add_argument_group("model (CALM and, where it has the field, AR)"), CALMConfig, "")
    add_config_flags(parser.add_argument_group("autoencoder"), AutoencoderConfig, "ae_")

    early = parser.parse_args(argv)   # first for the preset (or the run to resume), then again over its defaults
    preset = ("mini" if select_device(early.device).type == "cuda" else "nano") if early.preset == "auto" else early.preset
    parser.set_defaults(**PRESETS[preset])
    if early.resume:
        parser.set_defaults(**resumed_settings(early))
    args = parser.parse_args(argv)
    args.out_dir = Path(args.out_dir or Path("out") / Path(args.data).name)
    check_args(args)
    return args


def add_config_flags(group, config, prefix):
    """Every field of a config dataclass becomes a flag; the autoencoder's get the prefix where both have the name."""
    clash = {f.name for f in fields(CALMConfig)} if prefix else set()
    for f in fields(config):
        shared = prefix and f.name in ("chunk_size", "latent_dim")   # one flag for both: they must agree
        if f.name != "vocab_size" and not shared:
            name = prefix + f.name if f.name in clash else f.name
            choices = {"input_mode": ("discrete", "continuous", "both"), "head": ("energy",)}.get(f.name)
            group.add_argument(f"--{name}", type=type(f.default), default=f.default, choices=choices, help=HELP.get(f.name))


HELP = {
    "chunk_size": "K: tokens in a chunk", "latent_dim": "L: size of a chunk's vector", "n_embd": "width",
    "n_ff": "width of the SwiGLU", "n_layer": "blocks (autoencoder: a side)", "n_head": "attention heads",
    "n_head_layer": "blocks of the generative head", "n_noise": "size of the head's noise",
    "block_size": "context in chunks (AR gets the same text: K times as many tokens)", "num_samples": "N: head samples a position",
    "num_targets": "M: target samples a position", "alpha": "exponent of the energy score, in (0, 2)",
    "input_mode": "what the Transformer reads", "head": "generative head",
    "aux_weight": "departure from the paper: weight of a next-chunk cross-entropy read from h, dropped at inference",
    "dropout": "of latent dimensions and of input tokens, stage 1", "kl_weight": "beta, stage 1",
    "kl_clip": "nats a latent dimension below which the KL term does not push, stage 1",
}


def resumed_settings(early):
    """The settings saved in the checkpoint that --resume goes on from."""
    out_dir = Path(early.out_dir or Path("out") / Path(early.data).name)
    saved = [out_dir / f"{kind}.pt" for kind in (early.model, "autoencoder")]
    path = next((p for p in saved if p.is_file()), None)
    if path is None or early.model == "ar" and path != saved[0]:
        fail(f"nothing to resume in {out_dir}: start with `python train.py --out_dir {out_dir}`")
    settings = load_checkpoint(path)["settings"]
    return {k: v for k, v in settings.items() if k not in ("resume", "out_dir", "device", "model")}


def check_args(args):
    if args.chunk_size < 1:
        fail(f"--chunk_size must be at least 1, not {args.chunk_size}")
    for name in ("block_size", "n_layer", "n_embd", "n_ff", "n_head", "latent_dim", "max_steps", "batch_size", "grad_accum",
                 "ae_n_layer", "ae_n_embd", "ae_n_ff", "ae_max_steps", "ae_batch_size", "log_interval", "eval_interval",
                 "num_targets", "n_noise"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.num_samples < 2:
        fail(f"--num_samples must be at least 2 (the energy score compares samples), not {args.num_samples}")
    if args.n_embd % args.n_head or args.n_embd // args.n_head % 2:
        fail(f"--n_embd {args.n_embd} must be divisible by --n_head {args.n_head}, into heads of an even width")
    if not 0 < args.alpha < 2:
        fail(f"--alpha must be in (0, 2), where the energy score is strictly proper, not {args.alpha}")
    if not 0 <= args.dropout < 1:
        fail(f"--dropout must be in [0, 1), not {args.dropout}")
    if args.match_flops and args.model != "ar":
        fail("--match_flops sets the length of an AR run: add --model ar")


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
        torch.set_float32_matmul_precision("high")   # TF32 where the card has it
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_):
        """Ctrl-C and a scheduler's SIGTERM: the loop ends after this step and saves. A second one ends at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def say(self, *text):
        if self.main:
            tqdm.write(" ".join(map(str, text)))

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

    Muon steps along the nearest orthogonal matrix to the momentum: at small scale it learns several times faster, the
    energy head above all. The autoencoder has AdamW always."""
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
    """Linear warm-up, then constant, then linear to 0 over the last decay_frac of the run."""
    decay = decay_frac * max_steps
    return min(1.0, (step + 1) / (warmup + 1), (max_steps - step) / decay if decay else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation during training

@torch.no_grad()
def validate(stage, model, data, world, length, brier_windows):
    """Metrics on fixed validation windows with fixed noise: the loss, and accuracy (stage 1) or BrierLM."""
    model.eval()
    tokens = data.batch("val", data.even_offsets("val", 16, length), length).to(world.device)
    with torch.random.fork_rng(), autocast(world.device, world.dtype):
        torch.manual_seed(0)
        if stage == "autoencoder":
            chunks = tokens.unflatten(1, (-1, model.config.chunk_size))
            metrics = {"val_loss": model.loss(chunks)[0].item(), "posterior": accuracy(model, chunks, "posterior")[0],
                       "sigma_0.3": accuracy(model, chunks, 0.3)[0]}
        else:
            metrics = {"val_loss": model.loss(tokens)[0].item()}
    if stage != "autoencoder" and brier_windows:
        result = eval_brier.evaluate(model, data, world.device, world.dtype, windows=brier_windows, num_samples=4)
        metrics["brierlm"], metrics["stderr"] = result["brierlm"], result["stderr"]
    model.train()
    return metrics


def peak_flops(device, dtype, n=8192):
    """FLOPs a second that this card reaches on one large matrix product: what MFU is measured against."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for repeat in range(20):
        if repeat == 10:
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

def train_stage(stage, model, args, data, world, flops, extra, resume_from=None):
    """Train `model` to its last step, checkpointing to out_dir/<stage>.pt -> True, or False if it was interrupted.

    flops: training FLOPs a token; extra: what else belongs in the checkpoint; resume_from: a checkpoint of this stage.
    """
    first = stage == "autoencoder"
    steps, warmup, decay_frac, batch_size = ((args.ae_max_steps, args.ae_warmup_steps, args.ae_decay_frac, args.ae_batch_size)
                                             if first else
                                             (args.max_steps, args.warmup_steps, args.decay_frac, args.batch_size))
    accum = 1 if first else args.grad_accum
    K = model.config.chunk_size if stage != "ar" else args.chunk_size
    length = args.block_size * K + {"autoencoder": 0, "calm": K, "ar": 1}[stage]   # inputs, and the last target
    tokens_per_step = world.size * accum * batch_size * args.block_size * K
    path, log_path = args.out_dir / f"{stage}.pt", args.out_dir / "log.jsonl"

    model.to(world.device).train()
    optimizers = make_optimizers(model, args, stage)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    step = 0
    if resume_from:
        step = resume_from["step"]
        for optimizer, state in zip(optimizers, resume_from["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resume_from["scaler"])
    earlier = trim_log(log_path, stage, step) if world.main else 0.0          # seconds spent before this process
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.forward = model.loss   # what DistributedDataParallel and torch.compile wrap
    compute = torch.compile(model) if world.compile else model
    if world.size > 1:
        compute = DistributedDataParallel(compute, device_ids=[world.device.index] if world.device.type == "cuda" else None)
    data.check("train", length), data.check("val", length)

    world.say(f"{stage}: {sum(p.numel() for p in parameters):,} parameters, {steps:,} steps of {tokens_per_step:,} tokens, "
              f"{flops * tokens_per_step * steps:.2e} FLOPs, on {world.size} x {world.device.type} in "
              f"{str(world.dtype).removeprefix('torch.')}{', compiled' if world.compile else ''}")
    peak = peak_flops(world.device, world.dtype) if world.device.type == "cuda" and world.main else None

    def save():
        if world.main:
            save_checkpoint(path, {
                "kind": stage, "config": asdict(model.config), "model": model.state_dict(), "step": step, "done": step >= steps,
                "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
                "random": {"seed": args.seed, "step": step},   # all of it: each micro-batch is seeded by these
                "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                "data": {**data.meta, "name": args.data}, **extra,
                "flops": extra.get("flops", 0.0) + flops * tokens_per_step * step})

    bar = tqdm(total=steps, initial=step, desc=stage, unit="step", disable=not world.main)
    began, began_at, evaluated = time.time(), step, 0.0
    while step < steps:
        factor = lr_factor(step, warmup, decay_frac, steps)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = factor * group["peak_lr"]
        offsets = data.random_offsets("train", world.size * accum * batch_size, length, (args.seed, STAGE[stage], step))
        mean_loss = 0.0
        for micro in range(accum):
            number = micro * world.size + world.rank                          # of this micro-batch in the whole step
            batch = data.batch("train", offsets[number * batch_size:(number + 1) * batch_size], length)
            if world.device.type == "cuda":
                batch = batch.pin_memory().to(world.device, non_blocking=True)
            batch = batch.to(world.device)
            torch.manual_seed((args.seed << 40) + (STAGE[stage] << 38) + (step << 12) + number)
            last = micro == accum - 1   # processes exchange gradients once a step
            with nullcontext() if last or world.size == 1 else compute.no_sync():
                with autocast(world.device, world.dtype):
                    loss, metrics = compute(batch.unflatten(1, (-1, K)) if first else batch)
                scaler.scale(loss / accum).backward()
            mean_loss = mean_loss + metrics["loss"] / accum
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        bar.update()

        evaluating = step % args.eval_interval == 0 or step == steps
        logging = step % args.log_interval == 0 or step == 1 or evaluating
        stopping = world.stopped if world.size == 1 else logging and world.mean(world.stopped) > 0   # all, or none
        if logging or stopping:
            value = world.mean(mean_loss)
            if not math.isfinite(value):
                bar.close()
                kept = f"{path} holds the last good step" if path.exists() else "no checkpoint had been written yet"
                fail(f"the loss of {stage} is {value} at step {step}: stopped; {kept}. Lower --lr / --muon_lr, or try --dtype float32")
            seconds = time.time() - began - evaluated
            speed = (step - began_at) * tokens_per_step / seconds
            shown = {"loss": f"{value:.3f}", "tok/s": f"{speed:,.0f}"}
            entry = {"stage": stage, "step": step, "loss": value, "tokens": step * tokens_per_step, "seconds": round(earlier + seconds, 2),
                     "lr": factor * optimizers[0].param_groups[0]["peak_lr"]}
            if peak:
                entry["mfu"] = speed * flops / (peak * world.size)
                entry["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
                shown["mfu"] = f"{entry['mfu']:.0%}"
            bar.set_postfix(shown)
            if evaluating and world.main:
                paused = time.time()
                entry.update(validate(stage, model, data, world, length, 0 if step == steps else 32))
                world.say(f"{stage} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in entry.items()
                                                               if k not in ("stage", "step", "tokens", "seconds")))
                evaluated += time.time() - paused
            if world.main:
                with open(log_path, "a") as log:
                    log.write(json.dumps(entry) + "\n")
            if stopping or evaluating:
                save()
                world.barrier()
            if stopping and step < steps:
                bar.close()
                world.say(f"interrupted at step {step}, saved to {path}. Go on with: python train.py --resume "
                          f"--model {args.model} --out_dir {args.out_dir}")
                return False
    bar.close()
    return True


# ----------------------------------------------------------------------------------------------------------------------
# The whole road

def open_data(args, world):
    """The data set named by --data; the default and the downloads are prepared the first time they are asked for."""
    known = args.data == "stdlib" or args.data in DOWNLOADS
    if world.main and known and not (DATA_DIR / args.data / "meta.json").exists():
        prepare([args.data])
    world.barrier()
    return load_data(args.data)


def open_stage(stage, config, args, data, build):
    """-> (model, checkpoint to go on from or None). A checkpoint that does not fit is an error, never overwritten."""
    path = args.out_dir / f"{stage}.pt"
    torch.manual_seed(args.seed)
    model = build()
    if not path.exists():
        return model, None
    checkpoint = load_checkpoint(path, stage)
    elsewhere = "use another --out_dir"
    if checkpoint["data"]["fingerprint"] != data.meta["fingerprint"]:
        fail(f"{path} was trained on other data than {data.folder} holds now: {elsewhere}")
    for name, value in asdict(config).items():
        if checkpoint["config"].get(name) != value:
            fail(f"{path} has {name} {checkpoint['config'].get(name)}, this run asks for {value}: {elsewhere}, or drop the flag")
    if not checkpoint["done"] and not args.resume:
        fail(f"{path} is unfinished (step {checkpoint['step']:,}): add --resume to go on, or {elsewhere}")
    if checkpoint["done"] and not args.resume and stage == args.model:
        fail(f"{path} is already trained ({checkpoint['step']:,} steps): add --resume with a larger --max_steps, or {elsewhere}")
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def config_of(kind, args, **given):
    """A config dataclass from the flags of the same names (the autoencoder's have their prefix)."""
    prefix = "ae_" if kind is AutoencoderConfig else ""
    return kind(**{f.name: given.get(f.name, getattr(args, prefix + f.name, getattr(args, f.name, None))) for f in fields(kind)})


def finish(model, args, data, world):
    """BrierLM, two samples, and what to run next."""
    result = eval_brier.evaluate(model, data, world.device, world.dtype, progress=True)
    print("\n" + eval_brier.describe(result))
    with open(args.out_dir / "log.jsonl", "a") as log:
        log.write(json.dumps({"stage": args.model, "step": args.max_steps, "seconds": 0.0, "final": True, **result}) + "\n")
    prompt = torch.full((1, 1), eot_token(data.tokenizer), device=world.device)
    for temperature in (1.0, 0.5):
        torch.manual_seed(args.seed)
        with autocast(world.device, world.dtype):
            text = generate(model, prompt, 400, temperature, eot=eot_token(data.tokenizer))[0, 1:].tolist()
        print(f"\n--- a sample at T = {temperature:g} " + "-" * 60)
        print(data.tokenizer.decode_bytes(text).decode("utf-8", "replace"))
    print("-" * 80 + "\nNext:")
    print(f"  python sample.py --out_dir {args.out_dir} --model {args.model} --temperature 0.5 --start 'def main('")
    if args.model == "calm":
        print(f"  python train.py --out_dir {args.out_dir} --data {args.data} --model ar --match_flops {args.out_dir}"
              f"   # the baseline at equal cost")
        print(f"  python autoencoder.py --out_dir {args.out_dir}   # how faithful, how robust are the vectors?")
    else:
        print(f"  python eval_brier.py --out_dir {args.out_dir} --model {args.model}")


def main():
    args = parse_args()
    world = World(args)
    data = open_data(args, world)
    vocab_size = data.meta["vocab_size"]
    extra = {}

    if args.model != "ar":
        config = config_of(AutoencoderConfig, args, vocab_size=vocab_size)
        model, checkpoint = open_stage("autoencoder", config, args, data, lambda: Autoencoder(config))
        flops = flops_per_token(config)["train"]
        if not (checkpoint and checkpoint["step"] >= args.ae_max_steps):
            if not train_stage("autoencoder", model, args, data, world, flops, {}, checkpoint):
                return
        autoencoder = load_autoencoder(load_checkpoint(args.out_dir / "autoencoder.pt", "autoencoder"))
        extra = {"autoencoder_config": asdict(config), "flops": load_checkpoint(args.out_dir / "autoencoder.pt")["flops"]}

    if args.model == "calm":
        config = config_of(CALMConfig, args, vocab_size=vocab_size)
        cost = flops_per_token(config, autoencoder.config)["train"]
        build = lambda: CALM(config, autoencoder)
    elif args.model == "ar":
        config = config_of(ARConfig, args, vocab_size=vocab_size, block_size=args.block_size * args.chunk_size)
        cost = flops_per_token(config)["train"]
        build = lambda: AR(config)
        if args.match_flops:
            total = load_checkpoint(Path(args.match_flops) / "calm.pt", "calm")["flops"]
            tokens_per_step = world.size * args.grad_accum * args.batch_size * config.block_size
            args.max_steps = round(total / cost / tokens_per_step)
            world.say(f"{args.max_steps:,} steps match the {total:.2e} training FLOPs of {args.match_flops}, its autoencoder's included")
    if args.model != "autoencoder":
        model, checkpoint = open_stage(args.model, config, args, data, build)
        if not train_stage(args.model, model, args, data, world, cost, extra, checkpoint):
            return
        if world.main:
            finish(model.eval(), args, data, world)
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
