"""
The machine that a run is on: its device and precision, the processes of a run, and interruptions.
Nothing here knows a model or an optimizer, and nothing here is needed to understand CALM.
"""
import atexit
import ctypes
import os
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.console import bar_options, fail


# --- Device and precision ------------------------------------------------------------------


def select_device(name="auto"):
    """auto: CUDA if it is there, else the CPU; or the device of that name -> torch.device.

    MPS (an Apple GPU) has never been tried here, so it is taken by its name only.
    """
    available = {"cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    kind, _, index = name.partition(":")
    indices = ["", "0"] + [str(i) for i in range(torch.cuda.device_count())]
    if not available.get(kind) or index not in indices:
        here = ", ".join(kind for kind in available if available[kind])
        fail(f"no device {name!r} here: use --device auto, or {here}")
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc to keep freed memory. It would give large blocks back to the system and ask for
    them anew at every step, which takes a fifth of a training step at width 512."""
    with suppress(OSError):   # no glibc here
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        mallopt(M_MMAP_MAX, 0)                   # no block is mapped by itself
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)     # none is given back


def select_dtype(name, device):
    """auto: bfloat16 where the device multiplies it fast; else float32, on CUDA float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    if device.type != "cpu":
        return torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    held_back = torch.backends.cpu.get_cpu_capability() != "AVX512"   # by ATEN_CPU_CAPABILITY
    return torch.bfloat16 if fast and not held_back else torch.float32


def autocast(device, dtype):
    """Mixed precision: matrix products in `dtype`, weights and losses in float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def seed_noise(*numbers):
    """Seed torch's noise with a hash of whole numbers, such as a seed and a step. On a CPU torch
    keeps only the lowest 32 bits of a seed: numbers that stand side by side in it would be lost."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def why_not_compile(device):
    """torch.compile needs a C++ compiler, on CUDA Triton and a card that it knows.
    -> None if it works here, else what went wrong, in a line"""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:   # whatever is missing
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


# --- The processes of a run ----------------------------------------------------------------


class Machine:
    """Where a run computes, and which of its processes this is: the only one, or one of many."""

    def __init__(self, device="auto", dtype="auto", compiled="auto"):
        """The flags --device, --dtype and --compile (auto: on CUDA)."""
        self.device = select_device(device)
        if self.device.type == "cuda":   # each process of torchrun's has a card of its own
            index = os.environ.get("LOCAL_RANK", self.device.index or 0)
            self.device = select_device(f"cuda:{index}")
            torch.cuda.set_device(self.device)
        self.size, self.rank = join_processes(self.device)
        self.is_first = self.rank == 0   # the one that prints and writes
        self.dtype = select_dtype(dtype, self.device)
        self.interrupted = False         # has this process been asked to end?
        self.listening = False           # if so, does its loop end after its step?

        self.compiles = compiled == "on" or (compiled == "auto" and self.device.type == "cuda")
        if self.compiles:
            # torch.compile advises TF32, which is too coarse for distances between vectors.
            warnings.filterwarnings("ignore", "TensorFloat32")
            # By default a function may be compiled for 8 shapes; Muon's matrices may have more.
            torch._dynamo.config.recompile_limit = 64
            if missing := why_not_compile(self.device):
                self.compiles = False
                self.say(f"not compiled: {missing}")

    def autocast(self):
        return autocast(self.device, self.dtype)

    def to_device(self, tokens):
        """Copy a batch to the device. From pinned memory that is asynchronous; from ordinary memory
        Python would wait until the GPU has finished all that is in its queue."""
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self.device, non_blocking=True)

    def mean(self, value):
        """The mean over the processes of a number on each of them -> float."""
        value = float(value)
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)   # on the CPU: no GPU is asked to wait
        dist.all_reduce(total)
        return total.item() / self.size

    def barrier(self):
        """Wait until every process has come here, for a day at most: while the first prepares data,
        or writes text, the others have nothing to do."""
        with patiently() as group:
            if self.size > 1:
                dist.barrier(group=group)

    def fail(self, message):
        """End all processes, each of which calls this, over a mistake of the user's: one line."""
        try:
            if self.is_first:
                fail(message)
        finally:
            self.barrier()   # no process ends before the line is written
        raise SystemExit(2)

    def check_same(self, value, what):
        """End all processes, with one line, unless `value` is the same on each of them.

        value: what tells one thing from another, as plain values; what: the name of the thing.
        """
        if self.size == 1:
            return
        values = [None] * self.size
        dist.all_gather_object(values, value)
        others = [str(rank) for rank in range(self.size) if values[rank] != values[0]]
        if others:
            self.fail(f"{what} of process {', '.join(others)} is not that of the first process: "
                      "copy that one to every machine")

    def say(self, text):
        """Print a line, above the progress bar; the first process does."""
        if self.is_first:
            self.show(tqdm.write, text)

    def show(self, write, *args):
        """Call what writes to the terminal. If nobody reads any more, because a pipe or terminal
        was closed, that counts as an interruption: the run saves and ends."""
        try:
            write(*args)
            sys.stdout.flush()   # tqdm does not: a pipe would see each line only at the end
        except OSError:
            self.interrupted = True

    def listen(self):
        """From now on Ctrl-C, SIGTERM and a closed terminal only set `interrupted`, so that the
        loop can save after its step. A second Ctrl-C ends the program at once."""
        self.listening = True
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)   # Windows has no SIGHUP; nohup ignores it
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.interrupt)

    def interrupt(self, number, frame):
        """What happens on a signal."""
        again = self.interrupted and number == signal.SIGINT
        if again or not self.listening:
            raise SystemExit(130)
        self.interrupted = True

    def any_interrupted(self):
        """Has any of the processes been asked to end? All get the same answer."""
        return self.mean(self.interrupted) > 0


def share_out(work, items, title=None):
    """As [work(item) for item in items], but each process of the run does a part of the items; all
    get the whole list. work(item) must not depend on what a process has done before.

    title: of a progress bar; None: there is none.
    """
    many = dist.is_initialized()
    size = dist.get_world_size() if many else 1
    rank = dist.get_rank() if many else 0
    bar = tqdm(items[rank::size], desc=title, disable=title is None or rank > 0, leave=False,
               **bar_options())
    mine = [work(item) for item in bar]
    parts = [mine] * size
    with patiently() as group:   # a process without items waits here for the others
        if many:
            dist.all_gather_object(parts, mine, group)
    results = [None] * len(items)
    for i, part in enumerate(parts):
        results[i::size] = part
    return results


PATIENCE = timedelta(minutes=10)   # how long a process waits for one that hangs, or never comes
patient_group = None               # of all processes, who wait for each other for a day


@contextmanager
def patiently():
    """Around a wait for other processes that may be long -> the group to wait in, for which a day
    is not too long. If another process has ended, this one ends, too."""
    try:
        yield patient_group
    except RuntimeError:   # one of the others has ended, and has said why
        raise SystemExit(1)


def join_processes(device):
    """Meet the processes that torchrun has started, if any -> how many, and which one this is."""
    global patient_group
    try:
        size = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0))
        if not 0 <= rank < size:
            raise ValueError(f"RANK {rank} of {size}")
        if size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            python = signal.signal(signal.SIGINT, signal.SIG_DFL)   # Python would not hear Ctrl-C
            dist.init_process_group(backend, timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)
            patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            signal.signal(signal.SIGINT, python)
    except (ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:150]
        fail(f"{what}: torchrun sets WORLD_SIZE and RANK, else unset them")
    return size, rank
