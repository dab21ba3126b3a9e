"""
Training: stage 1 is the autoencoder, stage 2 is CALM. (The baseline, AR, has a single stage.)

    python train.py                                    # data, both stages, BrierLM, text: all of it
    python train.py --preset S --data mine             # the paper's smallest model, on your text
    torchrun --nproc_per_node 8 train.py --preset M    # several GPUs, one process each

In this order: what is trained and how (presets), flags, Muon, one step, the loop, all of it.

Every batch and all noise are functions of the seed and the step. So a run that was stopped and
resumed ends with the same weights as an uninterrupted one, on as many threads. Several processes
share the micro-batches of a step, so their number must divide --grad_accum: then the step is the
same as with one process. (A compiled model draws other noise than a plain one.)

Ctrl-C or SIGTERM saves after the step that is being made; torchrun allows 30 seconds for that. If
a process dies, or hangs for ten minutes, all end, and --resume goes on from the last evaluation.
"""
import math
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval_brier
from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, HEADS, ARConfig, CALMConfig, flops_per_token
from data.checkpoint import (append_log, check_fits, check_tokenizer, checksums, load_checkpoint,
                             only_writer, read_log, rewind_log, save_checkpoint, saved_settings)
from data.console import Parser, add_fields, bar_options, clean_end, fail, within
from data.machine import Machine, seed_noise, select_device
from data.prepare import load_data
from data.published import is_published
from sample import cast_matrices, check_vocabulary, continue_text, load_official

KINDS = ("autoencoder", "calm", "ar")   # of models, stages and checkpoints


# --- What is trained, and how --------------------------------------------------------------


@dataclass
class TrainConfig:
    """How a stage is trained. The defaults are the paper's (section 6) for CALM."""
    optimizer: Literal["adamw", "muon"] = "adamw"   # muon: for all but TOKEN_MATRICES, vectors
    lr: float = 3e-4           # peak learning rate of AdamW, which trains whatever Muon does not
    muon_lr: float = 0.01      # peak learning rate of Muon
    weight_decay: float = 0.1  # of matrices, but for token embeddings beside Muon
    grad_clip: float = 1.0     # largest norm of the gradient
    warmup_steps: int = 2000   # steps over which the rate rises to its peak
    decay_frac: float = 0.0    # share of the steps, at the end, over which the rate falls to 0
    max_steps: int = 250_000   # optimizer steps
    batch_size: int = 8        # sequences of block_size chunks in a micro-batch
    grad_accum: int = 32       # micro-batches a step, shared equally among processes

    def __post_init__(self):
        if self.grad_clip == 0:
            raise ValueError("grad_clip must be above 0; 1e9 clips nothing")
        if self.decay_frac > 1:
            raise ValueError(f"decay_frac must be at most 1, not {self.decay_frac}")


# The paper's recipe, for models of four sizes. Settings of the autoencoder begin with ae_.
PAPER = dict(latent_dim=128, n_head=16, block_size=2048,
             ae_warmup_steps=1000, ae_max_steps=30_000, ae_batch_size=2)

# Ours, for minutes in place of weeks. data/RESULTS.md has what the main differences are worth.
SMALL = dict(latent_dim=32, n_head_layer=1,
             num_samples=4, num_targets=32, alpha=0.5, aux_weight=0.5,
             optimizer="muon", muon_lr=0.01,
             lr=2e-2,   # of AdamW, which trains only token tables, norms and biases then
             warmup_steps=50, decay_frac=0.8, grad_accum=1,
             ae_n_embd=128, ae_n_ff=64,
             ae_optimizer="muon", ae_lr=6e-3, ae_warmup_steps=50, ae_decay_frac=0.8,
             ae_batch_size=8, ae_grad_accum=1)

# A preset is a set of defaults for the flags. latent_dim and block_size are those for K = 4.
PRESETS = {
    # Two cores of a laptop, in eight to ten minutes.
    "nano": SMALL | dict(n_layer=4, n_embd=128, n_head=2, n_ff=344, block_size=128,
                         n_noise=16, alpha=0.25,
                         batch_size=4, max_steps=5000, ae_max_steps=350),
    # One GPU: meant for ten minutes, not yet timed from start to end.
    "mini": SMALL | dict(data="site-packages",
                         n_layer=8, n_embd=768, n_head=12, n_ff=2048, n_head_layer=2,
                         block_size=256, batch_size=32, lr=3e-3,
                         max_steps=9600, ae_max_steps=2000,
                         eval_interval=1000),   # a checkpoint has 0.6 GB
    "S": PAPER | dict(n_layer=12, n_embd=768, n_ff=2048, n_head_layer=3),
    "M": PAPER | dict(n_layer=16, n_embd=1024, n_ff=2752, n_head_layer=4),
    "L": PAPER | dict(n_layer=16, n_embd=1536, n_ff=4096, n_head_layer=4),
    "XL": PAPER | dict(n_layer=16, n_embd=2560, n_ff=6880, n_head_layer=4),
}


# --- The flags: one for every field of a config. On a first reading, skip to "Optimizers" ---

# CALM and its autoencoder must agree on these, so one flag sets both.
SHARED = {"vocab_size", "chunk_size", "latent_dim"}
# Both stages have settings of these names: the flags for the autoencoder's begin with --ae_.
PREFIXED = {"n_embd", "n_ff", "n_layer", *(field.name for field in fields(TrainConfig))}


def flag(name, kind):
    """The flag of a config's field, without its dashes. kind: one of KINDS."""
    return f"ae_{name}" if kind == "autoencoder" and name in PREFIXED else name


# Settings that are never taken from a checkpoint.
OWN = {"resume", "out_dir", "device", "model"}
# With --init_from these come from that run, and no flag may change them.
MODEL = {flag(field.name, "calm") for field in fields(CALMConfig)}
MODEL |= {flag(field.name, "autoencoder") for field in fields(AutoencoderConfig)}
# With --resume all settings but OWN come from the checkpoint. A flag may change them, but not
# these, which say what is trained, and for what.
FIXED = MODEL | {"preset", "optimizer", "ae_optimizer", "init_from"}


def config_of(config, args, kind, **given):
    """An instance of a config class, from the flags of its fields and what is given beside them."""
    # vocab_size has no flag: it comes from the data set. Until that is open, its default stands in.
    values = {field.name: getattr(args, flag(field.name, kind), field.default)
              for field in fields(config)}
    return config(**values | given)


def make_parser():
    parser = Parser(usage="python train.py [flags]",
                    description="Train CALM, its autoencoder, or AR.")
    add = parser.add_argument_group("run").add_argument
    add("--model", default="calm", choices=KINDS,
        help="what to train; calm trains its autoencoder first")
    add("--preset", default="auto", choices=["auto", *PRESETS],
        help="auto: mini on CUDA, else nano")
    add("--data", default="stdlib",
        help="a data set in data/; known ones are made if missing; mini: site-packages")
    add("--out_dir", help="the run's folder; None: out/<data name>")
    add("--resume", action="store_true",
        help="go on from the checkpoint in out_dir, with its settings")
    add("--init_from", metavar="RUN",
        help="fine-tune: begin with the weights of a run's folder, or of a published model's")
    add("--flops", type=within(1, 1e30, float),
        help="train for so many FLOPs, autoencoder included; wins over --max_steps")
    add("--match_flops", metavar="RUN",
        help="train for as many FLOPs as RUN's calm.pt was")
    add("--seed", type=within(0, (1 << 20) - 1), default=0, help="of weights, batches and noise")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of matrix products")
    add("--compile", default="auto", choices=("auto", "on", "off"),
        help="torch.compile; auto: on CUDA")
    add("--log_interval", type=within(1), default=10, help="steps between lines of log.jsonl")
    add("--eval_interval", type=within(1), default=500,
        help="steps between evaluations, with a checkpoint each")

    model = parser.add_argument_group("model (AR's context: block_size * chunk_size tokens)")
    add_fields(model, CALMConfig, skip={"vocab_size"}, choices={"head": list(HEADS)})
    add_fields(parser.add_argument_group("training"), TrainConfig)
    autoencoder = parser.add_argument_group("autoencoder")
    ae_flag = partial(flag, kind="autoencoder")
    add_fields(autoencoder, AutoencoderConfig, ae_flag, skip=SHARED)
    add_fields(autoencoder, TrainConfig, ae_flag)
    return parser


def parse_args(argv):
    """The settings of a run -> argparse.Namespace.

    Each setting comes from the first of these that has it: a flag, the run of --resume or, if it is
    a model's size, of --init_from, the run of --match_flops (for AR, unless a flag names a preset),
    the preset, the config class.
    """
    # The first parse only finds the preset and the runs. Their settings become the defaults of the
    # second, which is also the one that answers --help.
    parser = make_parser()
    given = parser.parse_args([arg for arg in argv if arg not in ("-h", "--help")])
    parser.set_defaults(**preset_settings(given))
    if given.model == "ar" and given.match_flops and given.preset == "auto":
        parser.set_defaults(**settings_of(Path(given.match_flops), ["calm"]))
    args = parser.parse_args(argv)

    args.out_dir = Path(args.out_dir or Path("out") / Path(args.data).absolute().name)
    if args.resume:
        kinds = ["calm", "autoencoder"] if args.model == "calm" else [args.model]
        args = go_on_from(args.out_dir, settings_of(args.out_dir, kinds), FIXED, parser, argv, args)
    elif args.init_from is not None:
        if args.model == "autoencoder":
            fail("--init_from takes an autoencoder as it is: drop it, or --model autoencoder")
        saved = sizes_of(Path(args.init_from), args.model)
        args = go_on_from(args.init_from, saved, MODEL, parser, argv, args)

    if (given.flops or given.match_flops) and args.model == "autoencoder":
        fail("--flops, --match_flops set the length of a CALM or AR run: drop it, "
             "or --model autoencoder")
    args.context = args.block_size * args.chunk_size   # in tokens
    # BrierLM scores an n-gram every `stride` tokens. AR takes CALM's stride: the same n-grams.
    args.stride = eval_brier.ngram_stride(args.chunk_size)
    check_settings(args)
    return args


def preset_settings(given):
    """The settings of the preset, with the sizes that depend on --chunk_size made to fit it."""
    preset = given.preset
    if preset == "auto":
        preset = "mini" if select_device(given.device).type == "cuda" else "nano"
    settings = dict(PRESETS[preset])
    settings["latent_dim"] = settings["latent_dim"] * given.chunk_size // 4
    settings["block_size"] = settings["block_size"] * 4 // given.chunk_size   # as much text
    return settings


def settings_of(out_dir, kinds):
    """The settings of an earlier run, but for those that each run has of its own."""
    settings = saved_settings(out_dir, kinds)
    return {name: value for name, value in settings.items() if name not in OWN}


def sizes_of(run, kind):
    """The settings of a run's model, or of a published one, for --init_from."""
    if not is_published(run):
        saved = settings_of(run, [kind])
        return {name: saved[name] for name in MODEL}
    if kind == "ar":
        fail(f"{run} is a published CALM: drop --model ar")
    model = load_official(run)
    sizes = {flag(name, "calm"): value for name, value in asdict(model.config).items()}
    for name, value in asdict(model.autoencoder.config).items():
        sizes[flag(name, "autoencoder")] = value
    return sizes


def go_on_from(run, saved, fixed, parser, argv, args):
    """Parse the flags once more, with the settings of an earlier run as their defaults. No flag may
    change those in `fixed`. -> argparse.Namespace, with the out_dir of `args`"""
    parser.set_defaults(**saved)
    out_dir = args.out_dir
    args = parser.parse_args(argv)
    args.out_dir = out_dir
    for name in fixed:   # (vocab_size has no flag and passes here; check_fits checks it)
        asked = getattr(args, name)
        if asked != saved[name]:
            fail(f"{run} has {name} {saved[name]}, this run asks for {asked}: drop the flag")
    return args


def check_settings(args):
    """Fail if anything does not fit: now, and not after the autoencoder has been trained."""
    for kind in KINDS:
        try:
            config_of(TrainConfig, args, kind)
            with torch.device("meta"):   # a model without memory
                make_model(kind, args)
        except ValueError as error:   # whose text begins with the name of a field
            name, what = str(error).split(maxsplit=1)
            fail(f"--{flag(name, kind)} {what}")
    least = args.stride + max(4, args.chunk_size)   # `stride` tokens to read, then what is scored
    if args.context < least and args.model != "autoencoder":
        fail(f"--block_size {args.block_size} is too short a context for BrierLM: "
             "take a longer one")


def check_shares(args, machine):
    """Fail unless each process gets as many micro-batches of a step as the others. (A step must be
    the same for any number of processes, and each micro-batch has noise of its own.)"""
    numbers = []
    flags = []   # of the same batches, in micro-batches that can be shared
    for kind in ("autoencoder", "calm") if args.model == "calm" else (args.model,):
        config = config_of(TrainConfig, args, kind)
        numbers.append(config.grad_accum)
        sequences = config.grad_accum * config.batch_size
        least = math.ceil(config.grad_accum / machine.size) * machine.size
        for count in range(least, sequences + 1, machine.size):
            if sequences % count == 0:
                flags += [f"--{flag('grad_accum', kind)} {count}",
                          f"--{flag('batch_size', kind)} {sequences // count}"]
                break
    common = math.gcd(*numbers)
    if common % machine.size != 0:
        shares = [str(n) for n in range(1, common + 1) if common % n == 0]
        same = f", or {' '.join(flags)}" if len(flags) == 2 * len(numbers) else ""
        machine.fail(f"{machine.size} processes cannot share the micro-batches of a step equally: "
                     f"start {' or '.join(shares)}{same}")


def make_model(kind, args, autoencoder=None):
    """A model with its first weights. autoencoder: CALM's; None: an untrained one."""
    if kind == "autoencoder":
        return Autoencoder(config_of(AutoencoderConfig, args, kind))
    if kind == "calm":
        autoencoder = autoencoder or make_model("autoencoder", args)
        return CALM(config_of(CALMConfig, args, kind), autoencoder)
    return AR(config_of(ARConfig, args, kind, block_size=args.context))


# --- Optimizers ----------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), for matrices: a step along their momentum, made orthogonal.

    torch.optim.Muon computes in bfloat16. On a CPU that has no bfloat16 each of its steps takes
    seconds; this one computes in the precision of the run, `dtype`.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        # float16 has too small a range for powers of singular values.
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.update = muon_update   # `train` compiles it where it compiles the model

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = {}   # matrices of one shape are updated together
            for p in group["params"]:
                same_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in same_shape.items():
                state = self.state[matrices[0]]                    # one for all of this shape
                if not state:
                    state["average"] = matrices[0].new_zeros(len(matrices), rows, columns)
                average = state["average"]
                step_size = group["lr"] * max(1, rows / columns) ** 0.5    # Jordan's scale
                shrink = 1 - group["lr"] * group["weight_decay"]
                # As tensors: for each new float torch.compile would compile the function anew.
                numbers = [average.new_full((), x) for x in (step_size, shrink)]
                self.update(matrices, [p.grad for p in matrices], average, group["momentum"],
                            *numbers, self.dtype)


def muon_update(matrices, gradients, average, momentum, step_size, shrink, dtype):
    """A step of n matrices of one shape. average (n, rows, columns): the momentum; step_size and
    shrink, tensors of one number; dtype: of the matrix products."""
    gradient = torch.stack(gradients)                              # (n, rows, columns)
    average.lerp_(gradient, 1 - momentum)
    nesterov = gradient.lerp(average, momentum)
    updates = step_size * orthogonal(nesterov.to(dtype)).type_as(gradient)
    for p, update in zip(matrices, updates):
        p.mul_(shrink).sub_(update)


def orthogonal(g):
    """Matrices g = U S V^T (n, rows, columns) -> about U V^T, by five Newton-Schulz steps.

    Each step takes every singular value s to a s + b s^3 + c s^5. After five steps, all that was
    in (0, 1] and not tiny is about 1.
    """
    a = 3.4445                                                     # Jordan's numbers
    b = -4.7750
    c = 2.0315
    x = g / g.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)       # so that no s is above 1
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT                                          # the smaller of the two products
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


# Matrices with a row for each token of the vocabulary are left to AdamW.
TOKEN_MATRICES = (
    "embed_tokens.",           # the input of CALM and of AR
    "lm_head.",                # the output of AR
    "aux.",                    # the output of CALM's auxiliary loss
    "encoder.embed_tokens.",   # the autoencoder's input, and its output
)


def make_optimizers(model, config, dtype=torch.float32):
    """AdamW; and, if config.optimizer says so, Muon for all matrices but TOKEN_MATRICES -> list.

    Muon's matrices: the Transformer's, embed_proj's, all of the head's, all of the autoencoder's.
    (Jordan leaves the first and the last matrices to AdamW.) dtype: of Muon's own products.
    """
    embeddings = []    # of tokens, beside Muon: AdamW, without weight decay
    matrices = []      # AdamW
    vectors = []       # norms and biases: AdamW, without weight decay
    of_muon = []
    for name, p in model.named_parameters():
        if not p.requires_grad:   # the frozen autoencoder
            continue
        if p.ndim != 2:
            vectors.append(p)
        elif config.optimizer == "muon" and name == "embed_tokens.weight":
            embeddings.append(p)
        elif config.optimizer == "muon" and not name.startswith(TOKEN_MATRICES):
            of_muon.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=embeddings, weight_decay=0.0), dict(params=matrices),
              dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, config.lr, (0.9, 0.95), 1e-8, config.weight_decay,
                                    fused=True)]
    if of_muon:
        optimizers.append(Muon(of_muon, config.muon_lr, config.weight_decay, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers, step, config):
    """The schedule of the learning rates: a linear warm-up, constant, then linear to 0."""
    factor = min(1.0, step / config.warmup_steps)
    decay_steps = config.decay_frac * config.max_steps
    if decay_steps > 0:
        factor = min(factor, (config.max_steps + 1 - step) / decay_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


# --- One step ------------------------------------------------------------------------------


def micro_batches(data, seed, machine, kind, step, grad_accum, batch_size, length):
    """This process's share of a step's grad_accum micro-batches -> tokens (batch_size, length), one
    by one.

    Windows begin at any token of the text, at random: the borders of chunks fall anywhere, and some
    parts are read more often than others. Each micro-batch seeds torch anew, so that the model
    draws the same noise for it on any number of processes.
    """
    number = KINDS.index(kind)
    offsets = data.random_offsets("train", grad_accum * batch_size, length, (seed, number, step))
    for micro in range(machine.rank, grad_accum, machine.size):
        seed_noise(seed, number, step, micro)
        own = offsets[micro * batch_size:(micro + 1) * batch_size]
        yield machine.to_device(data.batch("train", own, length))


def train_step(model, batches, count, optimizers, scaler, grad_clip, machine):
    """One optimizer step over `count` micro-batches -> their mean loss (a tensor), and the norm of
    its gradient (a float).

    model: as it is, or compiled, or as DistributedDataParallel.
    """
    mean_loss = 0.0
    for micro, tokens in enumerate(batches, 1):
        # DistributedDataParallel averages gradients once per step; other models take no notice.
        model.require_backward_grad_sync = (micro == count)
        with machine.autocast():
            loss, _ = model(tokens)
        scaler.scale(loss / count).backward()
        mean_loss = mean_loss + loss.detach() / count
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # Here, and nowhere else in a step that is not logged, Python waits for a GPU: to read the norm.
    # The optimizers are only started; while they work, the next batch is made.
    norm = norm.item()
    # No step if the gradient is not finite. (scaler.step would ask that of each optimizer alone, so
    # that one might move its weights and another not.)
    if math.isfinite(norm):
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()
    scaler.update()       # float16: a smaller scale after a norm that was not finite
    return mean_loss, norm


@torch.no_grad()
def validate(stage, brier_windows):
    """Loss and BrierLM on fixed validation windows with fixed noise -> dict of metrics."""
    machine = stage.machine
    stage.model.eval()
    offsets = stage.data.even_offsets("val", 16, stage.window)
    tokens = stage.data.batch("val", offsets, stage.window).to(machine.device)
    torch.manual_seed(0)   # the same noise each time; every training batch has a seed of its own
    with machine.autocast():
        _, metrics = stage.model.loss(tokens)
    metrics = {f"val_{name}": value.item() for name, value in metrics.items()}
    if stage.kind != "autoencoder" and brier_windows > 0:
        result = eval_brier.evaluate(stage.model, stage.data, machine.device, machine.dtype,
                                     brier_windows, stage.args.stride)
        metrics["brierlm"] = result["brierlm"]
        if result["stderr"] is not None:
            metrics["stderr"] = result["stderr"]
    stage.model.train()
    return metrics


# --- A stage, and its loop -----------------------------------------------------------------


class Stage:
    """A stage of training: a model, its optimizers, how far it has come, where that is kept."""

    def __init__(self, kind, model, args, data, machine, token_flops, flops_of_earlier_stages=0.0,
                 **extra):
        """token_flops: what training on a token costs. extra: what else belongs in the
        checkpoint."""
        self.kind = kind
        self.args = args
        self.data = data
        self.machine = machine
        self.extra = extra
        self.path = args.out_dir / f"{kind}.pt"
        self.log = args.out_dir / "log.jsonl"
        self.config = config_of(TrainConfig, args, kind)

        self.model = model.to(machine.device).train()
        self.optimizers = make_optimizers(model, self.config, machine.dtype)
        self.scaler = torch.amp.GradScaler(machine.device.type,
                                           enabled=machine.dtype == torch.float16)

        # A window has a context to read and, at its end, tokens that are only predicted.
        only_predicted = {"autoencoder": 0, "calm": args.chunk_size, "ar": 1}[kind]
        self.window = args.context + only_predicted                # in tokens
        self.tokens_per_step = self.config.grad_accum * self.config.batch_size * args.context
        self.token_flops = token_flops
        self.flops_of_earlier_stages = flops_of_earlier_stages
        self.steps_before = 0                                      # of this stage, before this call
        self.tokens_before = 0                                     # read in them
        self.seconds_before = 0.0                                  # of training in them
        self.tokens_shown = 0                                      # in the last report
        self.seconds_shown = 0.0
        self.skip = False                                          # is it trained already?
        machine.check_same(checksums(self.path), self.path)
        if self.path.exists():
            self.resume()
        elif (args.out_dir / f"{args.model}.pt").exists():
            # Stage 2 was trained, but the autoencoder that it needs is not there any more.
            fail(f"{self.path}, which {args.model}.pt was trained with, is gone: put it back")
        elif args.init_from:
            self.take_weights(Path(args.init_from))

    def resume(self):
        """Go on from this stage's checkpoint. That needs --resume, with one exception: CALM may
        always be trained on a finished autoencoder."""
        checkpoint = load_checkpoint(self.path, self.kind)
        check_fits(checkpoint, self.path, self.model.config, self.data)
        done = checkpoint["done"]
        # Only an autoencoder on the way to CALM is skipped. The model that --model names is not:
        # a larger --max_steps may ask for more steps. --init_from asks for another autoencoder.
        another = self.args.init_from and not self.args.resume
        self.skip = done and self.kind != self.args.model and not another
        if not self.skip and not self.args.resume:
            state = "already trained" if done else "unfinished"
            fail(f"{self.path} is {state} (step {checkpoint['step']:,}): add --resume to go on, "
                 "or use another --out_dir")

        self.model.load_state_dict(checkpoint["model"])
        self.steps_before = checkpoint["step"]
        self.tokens_before = checkpoint["tokens"]
        if self.skip:
            return
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizers"]):
            # Learning rates are those of this call's flags, moments those of the checkpoint.
            settings = optimizer.state_dict()
            optimizer.load_state_dict(settings | {"state": saved["state"]})
        if checkpoint["scaler"]:                                   # empty, unless it was float16
            self.scaler.load_state_dict(checkpoint["scaler"])

    def take_weights(self, run):
        """Begin with the weights of an earlier run, or of a published model. An autoencoder is not
        trained any further, and becomes this run's own."""
        step = 0
        tokens = 0
        if is_published(run):
            model = load_official(run)
            check_vocabulary(model, self.data.tokenizer)
            weights = (model.autoencoder if self.kind == "autoencoder" else model).state_dict()
        else:
            path = run / f"{self.kind}.pt"
            self.machine.check_same(checksums(path), path)
            checkpoint = load_checkpoint(path, self.kind)
            check_tokenizer(checkpoint, self.data)
            weights = checkpoint["model"]
            step = checkpoint["step"]
            tokens = checkpoint["tokens"]
        self.model.load_state_dict(weights)
        if self.kind == "autoencoder":
            self.skip = True
            self.config.max_steps = step
            self.steps_before = step
            self.tokens_before = tokens
            self.save(step)

    def set_budget(self, total):
        """Set max_steps so that the FLOPs of all stages come as close to `total` as they can."""
        spent = self.flops_at(self.steps_before)
        steps = (total - spent) / (self.token_flops * self.tokens_per_step)
        resumed = self.steps_before > 0
        least = -0.5 if resumed else 0   # steps are rounded: a finished run may be over by a half
        if steps < least:
            fail(f"{spent:.2e} of {total:.2e} FLOPs are spent: raise --flops, "
                 "or lower --ae_max_steps")
        steps = round(steps)
        if steps == 0 and not resumed:
            steps = 1
        self.config.max_steps = self.steps_before + steps
        self.args.max_steps = self.config.max_steps                # saved: a resumed run has it

    def tokens_at(self, step):
        """Tokens that this stage has read by the end of `step`."""
        return self.tokens_before + self.tokens_per_step * (step - self.steps_before)

    def flops_at(self, step):
        """Training FLOPs spent by the end of `step`, those of earlier stages included."""
        return self.flops_of_earlier_stages + self.token_flops * self.tokens_at(step)

    def report(self, bar, step, loss, seconds, metrics):
        """Show how far it is, on the terminal and in the log. seconds: in training so far. tok/s is
        the speed since the last report; TFLOP/s is that times the FLOPs of a token, by the paper's
        count."""
        tokens = self.tokens_at(step)
        speed = (tokens - self.tokens_shown) / max(seconds - self.seconds_shown, 1e-9)
        self.tokens_shown = tokens
        self.seconds_shown = seconds
        if metrics:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.machine.say(f"{self.kind} step {step}: loss {loss:.4g}, {shown}")
        teraflops = speed * self.token_flops / 1e12
        shown = {"loss": f"{loss:.3f}", "tok/s": f"{speed:,.0f}", "TFLOP/s": f"{teraflops:.3g}"}
        refresh = False   # it is shown with the next step
        self.machine.show(bar.set_postfix, shown, refresh)
        if self.machine.is_first:
            append_log(self.log, {
                "stage": self.kind, "chunk_size": self.args.chunk_size, "step": step, "loss": loss,
                "tokens": tokens, "seconds": round(seconds, 2), "flops": self.flops_at(step),
                "tokens_per_s": speed, "tflops_per_s": teraflops,
                "lr": self.optimizers[0].param_groups[0]["lr"], **metrics})
        if step == self.config.max_steps:
            # The summary covers this call only, not what was done before --resume.
            tokens -= self.tokens_before
            seconds -= self.seconds_before
            mean = tokens / seconds
            self.machine.say(f"{self.kind}: {tokens:,} tokens in {seconds:,.0f} s of training, "
                             f"{mean:,.0f} a second, {mean * self.token_flops / 1e12:.3g} TFLOP/s")

    def save(self, step):
        """Write the checkpoint; the first process does."""
        if not self.machine.is_first:
            return
        settings = {name: value for name, value in vars(self.args).items() if name not in OWN}
        save_checkpoint(self.path, {
            "kind": self.kind,
            "config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": {"seed": self.args.seed, "step": step},      # all noise follows from these
            "step": step,
            "done": step >= self.config.max_steps,
            "tokens": self.tokens_at(step),
            "flops": self.flops_at(step),
            "settings": settings,
            "data": self.data.meta,
            "document_start": self.data.document_start(),
            **self.extra,
        })

    def describe(self):
        """The line that a stage begins with."""
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        steps = self.config.max_steps
        flops = self.token_flops * self.tokens_per_step * steps
        times = self.tokens_at(steps) / len(self.data.train)
        machine = self.machine
        return (f"{self.kind}: {parameters:,} parameters, {steps:,} steps of "
                f"{self.tokens_per_step:,} tokens (reads the text {times:,.2f} times), "
                f"{flops:.2e} FLOPs, on {machine.size} x "
                f"{machine.device.type} in {machine.dtype}"
                f"{', compiled' if self.compiles() else ''}")

    def compiles(self):
        """Is it compiled? Unless --compile says "on", only a stage that is long enough: to compile
        takes about a minute, which a stage of fewer micro-batches would not win back."""
        long = self.config.max_steps * self.config.grad_accum >= 4000
        return self.machine.compiles and (long or self.args.compile == "on")

    def faster_model(self):
        """What computes the loss: the model, compiled, and shared among the processes."""
        model = self.model
        if self.compiles():
            model = torch.compile(model)
            for optimizer in self.optimizers:
                if isinstance(optimizer, Muon):
                    # Compiled anew for each shape, since none is allowed to vary.
                    optimizer.update = torch.compile(muon_update, dynamic=False)
        if self.machine.size > 1:   # around the compiled model: torch advises this order
            model = DistributedDataParallel(model)
        return model

    def rewind(self):
        """Drop the log's lines after the checkpoint's step, which will be made again -> seconds of
        training up to that step (0 for all processes but the first)."""
        if self.machine.is_first:
            self.seconds_before = rewind_log(self.log, self.kind, self.steps_before)
        self.seconds_shown = self.seconds_before
        self.tokens_shown = self.tokens_before
        return self.seconds_before

    def say_if_best_before(self):
        """Say so if the validation loss was lower by over 1 % at an earlier step than at the last:
        then the model has begun to learn the text by heart."""
        entries = [entry for entry in read_log(self.log)
                   if entry["stage"] == self.kind and "val_loss" in entry]
        if not entries:   # the log of a finished run was moved away
            return
        best = min(entries, key=lambda entry: entry["val_loss"])
        last = entries[-1]
        if last["val_loss"] - best["val_loss"] > 0.01 * abs(best["val_loss"]):
            self.machine.say(
                f"{self.kind}: the validation loss was best at step {best['step']:,} "
                f"({best['val_loss']:.4g}, in the end {last['val_loss']:.4g}): give it more text, "
                f"or --{flag('max_steps', self.kind)} {best['step']} and another --out_dir")


def train(stage):
    """Train a stage to its last step -> training FLOPs, those of earlier stages included."""
    args = stage.args
    config = stage.config
    machine = stage.machine
    if stage.skip:
        machine.say(f"{stage.kind}: {stage.path} is finished, and used as it is")
        return stage.flops_at(stage.steps_before)
    if stage.steps_before > config.max_steps:
        fail(f"{stage.path} is at step {stage.steps_before:,}: "
             f"--{flag('max_steps', stage.kind)} must be at least that")
    machine.say(stage.describe())
    model = stage.faster_model()
    earlier_seconds = stage.rewind()
    started = time.time() - earlier_seconds
    bar = tqdm(total=config.max_steps, initial=stage.steps_before, desc=stage.kind, unit="step",
               disable=not machine.is_first, **bar_options())
    machine.listen()   # for Ctrl-C

    own_share = config.grad_accum // machine.size   # micro-batches of a step, for this process
    for step in range(stage.steps_before + 1, config.max_steps + 1):
        set_rates(stage.optimizers, step, config)
        batches = micro_batches(stage.data, args.seed, machine, stage.kind, step,
                                config.grad_accum, config.batch_size, stage.window)
        loss, norm = train_step(model, batches, own_share, stage.optimizers, stage.scaler,
                                config.grad_clip, machine)
        machine.show(bar.update)

        last = step == config.max_steps
        evaluating = last or step % args.eval_interval == 0
        stopping = machine.any_interrupted()
        # A gradient that is not finite ends the run; in float16 only once the scale has gone down
        # to 1, for a large scale may be the reason. (Without a scaler the scale is 1.)
        broken = not math.isfinite(norm) and stage.scaler.get_scale() <= 1
        if not (evaluating or stopping or broken or step == 1 or step % args.log_interval == 0):
            continue
        loss = machine.mean(loss)
        if broken or not math.isfinite(loss):
            machine.show(bar.close)
            fail(f"the loss of {stage.kind} is {loss}, its gradient's norm {norm}, at step {step}: "
                 f"lower --{flag('lr', stage.kind)} or --{flag('muon_lr', stage.kind)}; "
                 f"{stage.path} holds an earlier step, if any")

        seconds = time.time() - started   # in training
        metrics = {}
        if evaluating:
            # After the last step finish() makes the full BrierLM.
            metrics = validate(stage, brier_windows=0 if last else 32)
        stage.report(bar, step, loss, seconds, metrics)
        if evaluating or stopping:
            stage.save(step)
        started = time.time() - seconds   # evaluations and checkpoints do not count
        if stopping:
            command = shlex.join(["python", "train.py", "--resume", "--model", args.model, "--data",
                                  args.data, "--out_dir", str(args.out_dir)])
            machine.say(f"interrupted at step {step}, saved to {stage.path}. Go on with: {command}")
            raise SystemExit(130)

    machine.show(bar.close)
    if machine.is_first:
        stage.say_if_best_before()
    machine.listening = False   # all is saved
    if machine.any_interrupted():   # during the last evaluation
        raise SystemExit(130)
    return stage.flops_at(config.max_steps)


# --- All of it: autoencoder, then CALM or AR, then BrierLM and text ------------------------


def train_all(args, data, machine):
    total_flops = args.flops
    if args.match_flops:
        total_flops = load_checkpoint(Path(args.match_flops) / "calm.pt", "calm")["flops"]
    flops = 0.0
    autoencoder = None
    extra = {}

    if args.model != "ar":   # stage 1
        torch.manual_seed(args.seed)
        autoencoder = make_model("autoencoder", args)
        cost = flops_per_token(autoencoder.config)
        flops = train(Stage("autoencoder", autoencoder, args, data, machine, cost["train"]))
        extra = {"autoencoder_config": asdict(autoencoder.config)}
    if args.model == "autoencoder":
        return

    torch.manual_seed(args.seed)   # stage 2, or the baseline
    model = make_model(args.model, args, autoencoder)
    cost = flops_per_token(model.config, autoencoder.config if autoencoder else None)
    stage = Stage(args.model, model, args, data, machine, cost["train"], flops, **extra)
    if total_flops:
        stage.set_budget(total_flops)
    flops = train(stage)
    finish(cast_matrices(model.eval(), machine.dtype), args, data, machine, flops,
           cost["inference"])
    machine.barrier()   # gloo may abort a process that leaves before the others


def open_data(args, machine):
    """The data set of --data, prepared first if it is a known one -> TokenData."""
    if machine.is_first:
        load_data(args.data)
    machine.barrier()
    data = load_data(args.data)
    machine.check_same(data.meta["fingerprint"], f"the data set {data.folder}")
    if not (args.resume or args.init_from):   # else the model has one, which will be checked
        args.vocab_size = data.meta["vocab_size"]
    args.data = data.meta["name"]
    for split in ("train", "val"):
        data.check_length(split, args.context + args.chunk_size)
    return data


def finish(model, args, data, machine, flops, inference_flops):
    """BrierLM, a held-out text continued, and what to run next."""
    result = eval_brier.evaluate(model, data, machine.device, machine.dtype, stride=args.stride,
                                 progress=True)   # which all processes share
    if not machine.is_first:
        return
    print("\n" + eval_brier.describe(result))
    append_log(args.out_dir / "log.jsonl", {
        "stage": args.model, "chunk_size": args.chunk_size, "step": args.max_steps, "seconds": 0.0,
        "flops": flops, "inference_flops": inference_flops, "final": True, **result})
    continue_text(model, data, machine.device, machine.dtype, args.seed)
    out_dir = shlex.quote(str(args.out_dir))
    way = "--sampler near" if args.model == "calm" else "--model ar --temperature 0.5"
    print(f"Next:\n  python sample.py --out_dir {out_dir} {way}")
    if args.model == "calm":   # the baseline at equal cost
        print(f"  python train.py --model ar --match_flops {out_dir} --out_dir {out_dir}")


def main():
    advice = "lower --batch_size and raise --grad_accum by as much (stage 1: --ae_batch_size, ...)"
    with clean_end(when_memory_is_full=advice):
        args = parse_args(sys.argv[1:])
        machine = Machine(args.device, args.dtype, args.compile)
        check_shares(args, machine)
        data = open_data(args, machine)
        with only_writer(args.out_dir) if machine.is_first else nullcontext():
            machine.barrier()   # if the first process may not write, all end here
            train_all(args, data, machine)


if __name__ == "__main__":
    main()
