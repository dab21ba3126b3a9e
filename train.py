"""
Training: stage 1 is the autoencoder, stage 2 is CALM. (The baseline, AR, has one stage.)

    python train.py                                    # data, both stages, BrierLM, text
    python train.py --preset S --data mine             # the paper's smallest, on your text
    torchrun --nproc_per_node 8 train.py --preset M    # several GPUs, one process each

Every batch and all noise are functions of the seed and the step. So a run that was stopped
goes on (--resume) from its last evaluation to the same weights, and several processes, which
share the micro-batches of a step, make the same steps as one.
"""
import argparse
import inspect
import json
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, HEADS, ARConfig, CALMConfig, EnergyHead, flops_per_token
from data.machine import DTYPES, Machine, load_checkpoint, save_checkpoint, seed_noise
from data.prepare import DEFAULT_DATA, TokenData
from eval_brier import default_stride, describe, evaluate
from sample import check_text, generate, load_model, load_official, show

KINDS = ("autoencoder", "calm", "ar")   # of models, stages and checkpoints


# --- What is trained, and how ---


@dataclass
class TrainConfig:
    """How a stage is trained. The defaults are the paper's (section 6) for CALM."""
    optimizer: Literal["adamw", "muon"] = "adamw"   # muon: for most matrices
    lr: float = 3e-4           # peak learning rate of AdamW
    muon_lr: float = 0.01      # peak learning rate of Muon
    weight_decay: float = 0.1  # of matrices; with Muon, of those it trains
    grad_clip: float = 1.0     # largest norm of the gradient
    warmup_steps: int = 2000   # steps over which the rate rises to its peak
    decay_frac: float = 0.0    # share of the steps, at the end, over which the rate falls to 0
    max_steps: int = 250_000   # optimizer steps
    batch_size: int = 8        # sequences of block_size chunks in a micro-batch
    grad_accum: int = 32       # micro-batches a step, shared equally among processes


# The paper's recipe, for models of four sizes.
PAPER_AUTOENCODER = dict(warmup_steps=1000, max_steps=30_000, batch_size=2)
PAPER = dict(latent_dim=128, n_head=16, block_size=2048)

# Ours, for minutes in place of weeks. data/RESULTS.md says what the differences are worth.
SMALL_AUTOENCODER = dict(n_embd=128, n_ff=64, optimizer="muon", lr=6e-3, warmup_steps=50,
                         decay_frac=0.8, batch_size=8, grad_accum=1)
SMALL = dict(latent_dim=32, n_head_layer=1,
             num_samples=4, num_targets=32, aux_weight=0.5,
             optimizer="muon", warmup_steps=50, decay_frac=0.8, grad_accum=1)

# A preset: defaults for the autoencoder, and for CALM or AR. nano is for two cores of a laptop,
# mini for one GPU. latent_dim and block_size are for K = 4: parse_args scales them. lr is AdamW's:
# with Muon it trains only embeddings, token outputs, norms and biases.
PRESETS = {
    "nano": (SMALL_AUTOENCODER | dict(max_steps=350),
             SMALL | dict(n_layer=4, n_embd=128, n_head=2, n_ff=344, block_size=128,
                          n_noise=16, alpha=0.25, lr=2e-2, batch_size=4, max_steps=5750)),
    "mini": (SMALL_AUTOENCODER | dict(max_steps=2000),
             SMALL | dict(n_layer=8, n_embd=768, n_head=12, n_ff=2048, n_head_layer=2,
                          block_size=256, alpha=0.5, lr=3e-3, batch_size=32, max_steps=9600)),
    "S": (PAPER_AUTOENCODER, PAPER | dict(n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3)),
    "M": (PAPER_AUTOENCODER, PAPER | dict(n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4)),
    "L": (PAPER_AUTOENCODER, PAPER | dict(n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4)),
    "XL": (PAPER_AUTOENCODER, PAPER | dict(n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4)),
}


# --- The flags (to be skipped at first) ---


def make_parser():
    parser = argparse.ArgumentParser(description="Train CALM, its autoencoder, or AR.")
    add = parser.add_argument
    add("--model", default="calm", choices=KINDS, help="what is trained; flags are for it")
    add("--preset", default="mini" if torch.cuda.is_available() else "nano", choices=PRESETS)
    add("--data", default=DEFAULT_DATA, help="a data set in data/; known ones are made if missing")
    add("--out_dir", help="the run's folder; by default out/ and the name of the data")
    add("--resume", action="store_true", help="go on from the checkpoint in out_dir")
    add("--init_from", metavar="DIR", help="fine-tune a run's or a published model")
    add("--flops", type=float, help="train for so many FLOPs, autoencoder included")
    add("--seed", type=int, default=0, help="of weights, batches and noise")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", choices=DTYPES, help="precision of matrix products")
    add("--compile", type=int, default=int(torch.cuda.is_available()), help="1: torch.compile")
    add("--log_interval", type=int, default=10, help="steps between lines of log.jsonl")
    add("--eval_interval", type=int, default=1000, help="steps between evaluations, which save")
    for config in (CALMConfig, AutoencoderConfig, TrainConfig):
        add_fields(parser, config)
    return parser


def add_fields(parser, config):
    """Add a flag for each field of a config class that has none yet. Its help is the comment
    beside the field; its default is None, not given."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.MULTILINE))
    group = parser.add_argument_group(config.__name__)
    for field in fields(config):
        flag = f"--{field.name}"
        if field.name == "vocab_size" or flag in parser._option_string_actions:
            continue
        choices = {"head": list(HEADS)}.get(field.name, get_args(field.type)) or None
        group.add_argument(flag, type=type(field.default), choices=choices,
                           help=comments[field.name])


def parse_args(argv):
    """The settings of a run -> argparse.Namespace. What is None there is the preset's to say."""
    parser = make_parser()
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir or f"out/{Path(args.data).name}")
    if args.resume:
        path = out_dir / f"{args.model}.pt"
        if args.model == "calm" and not path.exists():
            path = out_dir / "autoencoder.pt"   # the run was stopped in stage 1
        settings = load_checkpoint(path)["settings"]
        if settings["model"] == args.model:
            parser.set_defaults(**settings)
            args = parser.parse_args(argv)

    args.out_dir = out_dir
    _, preset = PRESETS[args.preset]
    args.chunk_size = args.chunk_size or 4
    args.latent_dim = args.latent_dim or preset["latent_dim"] * args.chunk_size // 4
    args.block_size = args.block_size or preset["block_size"] * 4 // args.chunk_size
    args.context = args.block_size * args.chunk_size   # in tokens
    return args


def config_of(config, args, kind, **given):
    """A config: the defaults of its class, then of the preset, then flags, then `given`. Flags
    are for the model that --model names; stage 1 on the way to CALM takes only a few of them."""
    of_stage_1 = {"chunk_size", "latent_dim", "dropout", "token_mask", "kl_weight", "kl_clip"}
    of_autoencoder, of_model = PRESETS[args.preset]
    settings = dict(of_autoencoder if kind == "autoencoder" else of_model)
    for name, value in vars(args).items():
        if value is not None and (kind == args.model or name in of_stage_1):
            settings[name] = value
    settings |= given
    names = {field.name for field in fields(config)}
    return config(**{name: value for name, value in settings.items() if name in names})


# --- Optimizers ---


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), for matrices: a step along their momentum, made orthogonal.
    (torch.optim.Muon computes in bfloat16: on a CPU that has none a step takes seconds.)"""

    def __init__(self, params, lr, weight_decay, dtype, compiled):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        # float16 has too small a range for powers of singular values.
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.orthogonal = torch.compile(orthogonal, dynamic=False) if compiled else orthogonal

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = {}   # matrices of one shape are updated together
            for p in group["params"]:
                same_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in same_shape.items():
                gradient = torch.stack([p.grad for p in matrices])  # (n, rows, columns)
                state = self.state[matrices[0]]  # one for all of this shape
                if not state:
                    state["average"] = torch.zeros_like(gradient)
                average = state["average"].lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp(average, group["momentum"])
                update = self.orthogonal(nesterov.to(self.dtype)).type_as(gradient)
                update *= group["lr"] * max(1, rows / columns) ** 0.5  # Jordan's scale
                for p, change in zip(matrices, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)


def orthogonal(g):
    """Matrices g = U S V^T (n, rows, columns) -> about U V^T, by three Newton-Schulz steps.

    A step takes every singular value s to a s + b s^3 + c s^5, and leaves U and V. The numbers
    are those of Polar Express (Amsel et al., 2025): s from 0.002 to 1 ends between 0.18 and 1.87.
    """
    if g.shape[1] > g.shape[2]:
        return orthogonal(g.mT).mT   # the smaller of the two products
    x = g / (1.01 * g.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7))   # so that s is below 1
    for a, b, c in ((8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484),
                    (3.94869, -2.90890, 0.55182)):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def make_optimizers(model, config, dtype=torch.float32, compiled=False):
    """AdamW and, if config.optimizer says so, Muon for the matrices -> list. Muon leaves to AdamW
    those with a row for each token: embeddings, the outputs of AR and of the auxiliary loss.
    dtype: of Muon's products."""
    of_tokens = ("embed_tokens.", "lm_head.", "aux.", "encoder.embed_tokens.")
    muon = config.optimizer == "muon"
    matrices = []
    others = []   # norms, biases and, beside Muon, those of tokens: AdamW without decay
    for name, p in model.named_parameters():
        if not p.requires_grad:   # the frozen autoencoder
            continue
        if p.ndim != 2 or (muon and name.startswith(of_tokens)):
            others.append(p)
        else:
            matrices.append(p)
    decay = config.weight_decay
    groups = [dict(params=others, weight_decay=0.0), dict(params=[] if muon else matrices)]
    adamw = torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=decay, fused=True)
    if muon:
        return [adamw, Muon(matrices, config.muon_lr, decay, dtype, compiled)]
    return [adamw]


def set_rates(optimizers, step, config):
    """The schedule of the learning rates: linear up, constant, linear to 0."""
    rise = step / max(config.warmup_steps, 1)
    fall = (config.max_steps + 1 - step) / max(config.decay_frac * config.max_steps, 1)
    factor = min(rise, 1.0, fall)
    for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = factor * peak


# --- One step, and the loop over steps ---


def micro_batches(data, seed, machine, kind, step, config, length):
    """This process's micro-batches of a step -> tokens (batch_size, length), one by one.
    Windows begin at any token, so the borders of chunks fall anywhere. Each micro-batch seeds
    torch anew: its noise is the same on any number of processes."""
    stage = KINDS.index(kind)
    B = config.batch_size
    offsets = data.random_offsets(config.grad_accum * B, length, (seed, stage, step))
    for micro in range(machine.rank, config.grad_accum, machine.size):
        seed_noise(seed, stage, step, micro)
        yield machine.to_device(data.batch("train", offsets[micro * B:(micro + 1) * B], length))


def train_step(model, batches, count, optimizers, scaler, grad_clip, machine):
    """One optimizer step over `count` micro-batches -> their mean loss, a tensor."""
    mean_loss = 0.0
    for micro, tokens in enumerate(batches, 1):
        # DistributedDataParallel averages gradients once a step; others take no notice.
        model.require_backward_grad_sync = (micro == count)
        with machine.autocast():
            loss, _ = model(tokens)
        scaler.scale(loss / count).backward()
        mean_loss = mean_loss + loss.detach() / count

    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # In float16 a gradient that is not finite asks for a smaller scale, and no step.
    if not scaler.is_enabled() or norm.isfinite():
        for optimizer in optimizers:
            optimizer.step()
    scaler.update()
    model.zero_grad()
    return mean_loss


@torch.no_grad()
def validate(kind, model, data, machine, batch_size, length):
    """Loss and BrierLM on fixed validation windows with fixed noise -> dict of metrics. (At most
    batch_size at once: what fits in training fits here.)"""
    model.eval()
    offsets = data.even_offsets(16, length)
    found = {}
    torch.manual_seed(0)   # the same noise each time; training batches have their own seeds
    for i in range(0, len(offsets), batch_size):
        tokens = data.batch("val", offsets[i:i + batch_size], length).to(machine.device)
        with machine.autocast():
            _, metrics = model.loss(tokens)
        for name, value in metrics.items():
            share = value.item() * len(tokens) / len(offsets)
            found[f"val_{name}"] = found.get(f"val_{name}", 0.0) + share
    if kind != "autoencoder":
        result, _ = evaluate(model, data, machine, windows=32, batch_size=batch_size)
        found |= {"brierlm": result["brierlm"], "stderr": result["stderr"]}
    model.train()
    return found


def plan(kind, model, args, data, checkpoint, flops_before):
    """How a stage is trained -> its config, tokens in a window, tokens and FLOPs of a step."""
    config = config_of(TrainConfig, args, kind)
    if checkpoint and kind != args.model:   # a resumed stage 1: the flags are CALM's
        config = TrainConfig(**checkpoint["train_config"])

    # A window has a context to read and, at its end, tokens that are only predicted.
    length = args.context + {"autoencoder": 0, "calm": args.chunk_size, "ar": 1}[kind]
    data.check_length("train", length)
    data.check_length("val", length)
    tokens_per_step = config.grad_accum * config.batch_size * args.context
    autoencoder = getattr(model, "autoencoder", None)
    cost = flops_per_token(model.config, autoencoder and autoencoder.config)
    step_flops = cost["train"] * tokens_per_step
    if args.flops and kind == args.model:   # for all stages, less what the first spent
        config.max_steps = max(1, round((args.flops - flops_before) / step_flops))
        args.max_steps = config.max_steps
        args.flops = None   # a resumed run goes by max_steps
    return config, length, tokens_per_step, step_flops


def train(kind, model, args, data, machine, checkpoint=None, flops_before=0.0):
    """Train a model to its last step, from its checkpoint on if there is one -> training
    FLOPs, with those of earlier stages, flops_before."""
    config, length, tokens_per_step, step_flops = plan(kind, model, args, data, checkpoint,
                                                       flops_before)
    model.to(machine.device).train()
    done = checkpoint["step"] if checkpoint else 0
    if done >= config.max_steps:
        return checkpoint["flops"]
    if config.grad_accum % machine.size != 0:   # for they share the micro-batches of a step
        raise SystemExit(f"{kind}: --grad_accum {config.grad_accum} must be a multiple of the "
                         f"{machine.size} processes (--model {kind} sets it)")
    compiled = args.compile and kind == args.model   # stage 1 is too short
    optimizers = make_optimizers(model, config, machine.dtype, compiled)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if checkpoint:
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())   # {} if not float16
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    faster = torch.compile(model) if compiled else model
    if machine.size > 1:   # around the compiled model: torch advises this order
        faster = DistributedDataParallel(faster)

    if machine.is_first:
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{kind}: {parameters:,} parameters, {config.max_steps:,} steps of "
              f"{tokens_per_step:,} tokens, {config.max_steps * step_flops:.2e} FLOPs, "
              f"on {machine.size} x {machine.device.type} in {machine.dtype}")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    log = open(args.out_dir / "log.jsonl", "a", buffering=1)   # each line is written at once
    # The bar counts tokens, so that it shows tokens per second.
    bar = tqdm(range(done + 1, config.max_steps + 1), initial=done, total=config.max_steps,
               desc=kind, unit="tok", unit_scale=tokens_per_step, disable=not machine.is_first)
    for step in bar:
        set_rates(optimizers, step, config)
        batches = micro_batches(data, args.seed, machine, kind, step, config, length)
        loss = train_step(faster, batches, config.grad_accum // machine.size, optimizers, scaler,
                          config.grad_clip, machine)

        # The first process logs, evaluates, saves. The others wait for it in the next step.
        evaluating = step % args.eval_interval == 0 or step == config.max_steps
        if not machine.is_first or not (evaluating or step % args.log_interval == 0):
            continue
        entry = {"stage": kind, "step": step, "loss": loss.item(), "tokens": step * tokens_per_step,
                 "flops": flops_before + step * step_flops, "seconds": bar.format_dict["elapsed"]}
        bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
        if not all(numbers.isfinite().all() for numbers in (loss, *model.parameters())):
            raise SystemExit(f"{kind}: not finite at step {step} (loss {loss:.4g}): lower --lr")
        if evaluating:
            states = [optimizer.state_dict()["state"] for optimizer in optimizers]
            save(model, kind, args, data, step=step, flops=entry["flops"], optimizers=states,
                 scaler=scaler.state_dict(), train_config=asdict(config), flops_before=flops_before)
            found = validate(kind, model, data, machine, config.batch_size, length)
            entry |= found
            shown = [f"{name} {value:.4g}" for name, value in found.items() if value is not None]
            bar.write(f"{kind} step {step:,}: loss {entry['loss']:.4g}, {', '.join(shown)}")
        print(json.dumps(entry), file=log)
    return flops_before + config.max_steps * step_flops


def save(model, kind, args, data, **state):
    """Write a checkpoint: the model, its text, the settings, and the state of training."""
    state |= {"config": asdict(model.config), "model": model.state_dict(), "data": data.meta,
              "settings": {**vars(args), "out_dir": None}}
    if kind == "calm":
        state["autoencoder_config"] = asdict(model.autoencoder.config)
    save_checkpoint(args.out_dir / f"{kind}.pt", state)


# --- All of it ---


def get_model(kind, args, data, autoencoder=None):
    """The model of a stage, as its checkpoint or --init_from has it, or new (CALM: on an
    autoencoder) -> model, its checkpoint or None."""
    path = args.out_dir / f"{kind}.pt"
    V = data.meta["vocab_size"]
    if path.exists():
        model, checkpoint = load_model(args.out_dir, kind)
        check_text(checkpoint, data)
        finished = checkpoint["step"] == checkpoint["train_config"]["max_steps"]
        if not args.resume and not (finished and kind != args.model):
            raise SystemExit(f"{path} is there, at step {checkpoint['step']:,}: go on with "
                             "--resume, or choose another --out_dir")
        return model, checkpoint

    if args.init_from:
        published = Path(args.init_from, "config.json").is_file()
        model = load_official(args.init_from) if published else load_model(args.init_from, kind)[0]
        if model.config.vocab_size - V not in (0, 1):   # published ones have one more, [PAD]
            raise SystemExit(f"{args.init_from} was trained in other tokens than {data.folder}")
        return model, None

    torch.manual_seed(args.seed)
    try:
        if kind == "autoencoder":
            return Autoencoder(config_of(AutoencoderConfig, args, kind, vocab_size=V)), None
        if kind == "calm":
            return CALM(config_of(CALMConfig, args, kind, vocab_size=V), autoencoder), None
        sizes = dict(vocab_size=V, block_size=args.context)   # in tokens: CALM's is in chunks
        return AR(config_of(ARConfig, args, kind, **sizes)), None
    except ValueError as error:
        raise SystemExit(f"these sizes do not fit: {error}")


def finish(model, args, data, machine, flops):
    """Print BrierLM, and a held-out text as the model continues it in two ways."""
    result, _ = evaluate(model.eval(), data, machine, progress=True)
    print(f"\n{describe(result)}\ntraining took {flops:.3e} FLOPs")
    with open(args.out_dir / "log.jsonl", "a") as log:
        print(json.dumps({"stage": args.model, "flops": flops, "final": True, **result}), file=log)

    offset = data.even_offsets(2, args.context)[-1:]  # the second of two: mid-split
    prompt = data.batch("val", offset, max(args.context // 4, 1)).to(machine.device)
    print(f"--- held-out text {'-' * 60}\n{data.tokenizer.decode(prompt[0].tolist())}")
    ways = {"temperature 1": {}, "--temperature 0.5": {"temperature": 0.5}}
    if isinstance(getattr(model, "head", None), EnergyHead):
        ways = {"temperature 1": {}, "--noise 0.25": {"noise_scale": 0.25}}
    for way, sampling in ways.items():
        torch.manual_seed(args.seed)
        with machine.autocast():
            text = generate(model, prompt, 300, **sampling)[0, prompt.shape[1]:]
        print(f"--- as the model goes on, {way} {'-' * 36}\n{show(data.tokenizer, text.tolist())}")


def main():
    args = parse_args(sys.argv[1:])
    machine = Machine(args.device, args.dtype)
    if machine.is_first:
        TokenData(args.data)   # which prepares a known one, if it is not there
    machine.barrier()
    data = TokenData(args.data)
    if args.context < default_stride(args.chunk_size) + max(4, args.chunk_size):
        raise SystemExit(f"--block_size {args.block_size} is too short a context for BrierLM")

    try:
        if args.model == "calm" and not args.init_from and not (args.out_dir / "calm.pt").exists():
            autoencoder, checkpoint = get_model("autoencoder", args, data)
            model, _ = get_model("calm", args, data, autoencoder)   # now, to see if sizes fit
            autoencoder.requires_grad_(True)   # which CALM has frozen
            flops = train("autoencoder", autoencoder, args, data, machine, checkpoint)
            autoencoder.requires_grad_(False)
            flops = train("calm", model, args, data, machine, flops_before=flops)
        else:   # a single stage, or a CALM that has its autoencoder inside
            model, checkpoint = get_model(args.model, args, data)
            vars(args).update(asdict(model.config))   # a loaded model keeps its sizes
            args.chunk_size = getattr(model.config, "chunk_size", 1)
            args.context = args.block_size * args.chunk_size
            before = checkpoint["flops_before"] if checkpoint else 0.0
            flops = train(args.model, model, args, data, machine, checkpoint, before)
        if args.model != "autoencoder" and machine.is_first:
            finish(model, args, data, machine, flops)
    except KeyboardInterrupt:
        saved = {path.stem: load_checkpoint(path)["step"] for path in args.out_dir.glob("*.pt")}
        raise SystemExit(f"\nstopped; saved are the steps {saved}. To go on: python train.py "
                         f"--resume --model {args.model} --out_dir {args.out_dir}")
    machine.barrier()   # none leaves before the others


if __name__ == "__main__":
    main()
