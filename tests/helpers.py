"""Small models and small runs for the tests."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from autoencoder import Autoencoder, AutoencoderConfig
from calm import AR, CALM, ARConfig, CALMConfig
from data.machine import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the quick brown fox jumps over the lazy dog. "
FOXES = "<|endoftext|>".join(str(i) + " " + SENTENCE * (20 + i % 5) for i in range(60))

# Flags of a run of a second or two, with a small model.
SHORT = """--device cpu --dtype float32 --chunk_size 4 --latent_dim 32 --block_size 16 --n_embd 64
           --n_ff 128 --n_layer 2 --n_head 4 --warmup_steps 20 --log_interval 5 --batch_size 4
           --max_steps 15 --eval_interval 10""".split()

# For a process of its own: in the project, with one thread.
ALONE = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}

V = 16     # the vocabulary of the tiny models
EOT = 15


def tiny_calm(K=4, seed=0, **options):
    """A CALM of random weights, far from the small first ones, so that samples differ."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(V, K, latent_dim=6, n_embd=16, n_ff=24))
    sizes = dict(n_embd=32, n_ff=48, n_layer=2, n_head=4, n_head_layer=1, n_noise=8,
                 block_size=12, num_samples=4, num_targets=5)
    model = CALM(CALMConfig(V, K, 6, **sizes, **options), autoencoder)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def tiny_ar(vocab_size=V, seed=0):
    torch.manual_seed(seed)
    model = AR(ARConfig(vocab_size, n_embd=32, n_ff=48, n_layer=2, n_head=4, block_size=48))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


BOTH = [tiny_calm, tiny_ar]


def log_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(out_dir, stage):
    """{step: loss} of a stage, from the log."""
    return {entry["step"]: entry["loss"] for entry in log_of(out_dir)
            if entry["stage"] == stage and "loss" in entry}


def checkpoint_of(out_dir, kind):
    return load_checkpoint(Path(out_dir) / f"{kind}.pt")


def assert_same_weights(one, other, kind, rtol=0, atol=0):
    """Of the checkpoints of a kind in two folders."""
    weights = [dict(checkpoint_of(folder, kind)["model"]) for folder in (one, other)]
    torch.testing.assert_close(*weights, rtol=rtol, atol=atol)


def torchrun(processes, *argv):
    """train.py on so many gloo processes -> the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", "train.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **ALONE)


def assert_unbiased(found, exact):
    """The mean of found (P,) is `exact`, within five standard errors."""
    assert abs(found.mean() - exact) < 5 * found.std() / len(found) ** 0.5
