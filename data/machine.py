"""
The machine that a run is on: device, precision, processes of torchrun; and checkpoints.
Nothing here knows a model, and nothing here is needed to understand CALM.
"""
import atexit
import ctypes
import os
import platform
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

DTYPES = ("auto", "float32", "bfloat16", "float16")   # of --dtype


class Machine:
    """Where a program computes, and which process of a run it is."""

    def __init__(self, device="auto", dtype="auto"):
        """The flags --device (auto: a CUDA card, if there is one) and --dtype."""
        self.size = int(os.environ.get("WORLD_SIZE", 1))   # torchrun sets these three
        self.rank = int(os.environ.get("RANK", 0))
        local_rank = os.environ.get("LOCAL_RANK", 0)
        self.is_first = self.rank == 0                     # the one that prints and writes

        if device == "auto":
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = fast_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif platform.libc_ver()[0] == "glibc":
            keep_freed_memory()
        if self.size > 1:
            dist.init_process_group()
            atexit.register(dist.destroy_process_group)

    def autocast(self):
        """Mixed precision: matrix products in self.dtype, weights and losses in float32."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=mixed)

    def to_device(self, tokens):
        """Copy a batch to the device. From pinned memory that is asynchronous; from ordinary
        memory Python would wait until the card has done all that is in its queue."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def barrier(self):
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()


def fast_dtype(device):
    """bfloat16 where the device multiplies it fast; else float32, on older cards float16."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    capability = torch.backends.cpu.get_cpu_capability()   # lower, if ATEN_CPU_CAPABILITY says so
    avx512_bf16 = torch.cpu._is_avx512_bf16_supported()
    amx = torch.cpu._is_amx_tile_supported()
    fast = capability == "AVX512" and (avx512_bf16 or amx)
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Tell glibc to keep freed memory. It would give large blocks back to the system and ask
    for them anew at every step, which takes a tenth of the time at width 512."""
    M_MMAP_MAX = -4
    M_TRIM_THRESHOLD = -1
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(M_MMAP_MAX, 0)                   # no block is mapped by itself
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)     # none is given back


def seed_noise(*numbers):
    """Seed torch's noise with a hash of whole numbers, such as a seed and a step. (On a CPU
    torch keeps only the lowest 32 bits of a seed.)"""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values. What is at `path` is always whole."""
    partial = path.with_suffix(".tmp")
    torch.save(checkpoint, partial)
    partial.replace(path)


def load_checkpoint(path):
    """Read what save_checkpoint wrote -> dict. (With weights_only a file cannot run code.)"""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"no checkpoint at {path}: `python train.py --model {path.stem} "
                         f"--out_dir {path.parent}` trains one")
    return torch.load(path, map_location="cpu", weights_only=True)
