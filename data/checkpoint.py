"""
What a run leaves on disk: its checkpoints and its log.

A checkpoint is a dict of tensors and plain values, read with `weights_only=True`: it cannot run
code. The log, log.jsonl, has a JSON object for each logged step and evaluation.
Nothing here is needed to understand CALM.
"""
import errno
import json
import os
import re
import shlex
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

try:
    import fcntl   # Windows has none
except ImportError:
    fcntl = None

import torch

from data.console import fail, temporary
from data.prepare import tokenizer_from

# The folder that `python train.py` writes to when it is given no flags.
DEFAULT_RUN = "out/site-packages" if torch.cuda.is_available() else "out/stdlib"
FORMAT = 4   # of checkpoints; one with another number, or with none, is of an earlier version


# --- The folder of a run, and what is written there -----------------------------------------


@contextmanager
def only_writer(folder):
    """Around all that a run writes to its folder: fail if another run writes there, too.

    The lock is the operating system's and ends with the process, whatever ends that. Windows and
    some network folders have no such locks: there nothing is checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


def lock(handle, folder):
    """Lock an open folder, and remove what a process that was killed left half written in it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to {folder}: use another --out_dir, or wait until it ends")
    except OSError:   # no locks here
        return
    for path in folder.iterdir():
        if re.fullmatch(r"\.((autoencoder|calm|ar)\.pt|log\.jsonl)\..+\.tmp", path.name):
            path.unlink()


@contextmanager
def writing(path, checkpoint):
    """Around what writes `path`. If that fails, one line says how to go on from `checkpoint`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:   # torch calls some OSErrors a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        full = getattr(cause, "errno", None) == errno.ENOSPC
        what = "disk full" if full else str(cause).splitlines()[0]
        remedy = "make room" if full else "mend this"
        if checkpoint.exists():
            advice = f"the previous checkpoint is intact: {remedy}, then go on with --resume"
        else:
            advice = f"nothing was saved: {remedy}, then start again"
        fail(f"could not write {path} ({what}); {advice}")


@contextmanager
def replacing(path, checkpoint):
    """The path to write to in place of `path`. It is renamed to that in the end, so that what is at
    `path` is whole at every moment."""
    partial = temporary(path)
    with writing(path, checkpoint):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


# --- Checkpoints ---------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, in place of the previous one if there is one."""
    with replacing(path, path) as partial, open(partial, "wb") as file:
        torch.save({"format": FORMAT, **checkpoint}, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, kind):
    """Read what save_checkpoint wrote -> dict. kind: what it must hold, such as "calm"."""
    path = Path(path)
    if not path.is_file():
        command = shlex.join(["python", "train.py", "--model", kind, "--out_dir", str(path.parent)])
        fail(f"no checkpoint at {path}: `{command}` trains one")
    try:
        with zipfile.ZipFile(path) as archive:   # torch.save adds checksums
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
        version = checkpoint.get("format")
    except Exception as error:   # whatever is wrong in the file
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        fail(f"{path} is not a whole checkpoint of this project ({what}): "
             "move it away and train again")
    if version != FORMAT:
        fail(f"{path} is of an earlier version of this project: use that, or another --out_dir")
    if found != kind:
        fail(f"{path} holds a model of kind {found!r}, expected {kind!r}")
    return checkpoint


def checksums(path):
    """What tells one checkpoint from another: the checksums in it. None without a whole one."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return [member.CRC for member in archive.infolist()]


def check_fits(checkpoint, path, config, data):
    """Fail unless a checkpoint was trained on this data, and has the sizes of this config."""
    for name in ("fingerprint", "vocabulary"):
        if checkpoint["data"][name] != data.meta[name]:
            fail(f"{path} was trained on other data than {data.folder} holds now: "
                 "use another --out_dir")
    for name, value in asdict(config).items():
        trained = checkpoint["config"][name]
        if trained != value:
            fail(f"{path} has {name} {trained}, this run asks for {value}: "
                 "use another --out_dir, or drop the flag")


def saved_settings(out_dir, kinds):
    """The flags of a run, from the first of these kinds of checkpoint that it has -> dict."""
    there = [kind for kind in kinds if (out_dir / f"{kind}.pt").is_file()]
    kind = there[0] if there else kinds[0]
    settings = load_checkpoint(out_dir / f"{kind}.pt", kind)["settings"]
    if kind != "autoencoder":   # its budget of FLOPs has become a number of steps, max_steps
        del settings["flops"], settings["match_flops"]
    return settings


def load_tokenizer(checkpoint):
    """The tokenizer that a checkpoint's model was trained with -> tiktoken.Encoding."""
    return tokenizer_from(checkpoint["data"])


def check_tokenizer(checkpoint, data):
    """Fail unless `data` was prepared with the tokenizer of a checkpoint's model."""
    if data.meta["vocabulary"] != checkpoint["data"]["vocabulary"]:
        fail(f"the model was trained with the tokenizer {checkpoint['data']['tokenizer']}, and "
             f"{data.meta['name']} was prepared with another: prepare it again with the model's")


# --- The log -------------------------------------------------------------------------------


def append_log(path, entry):
    """Add a line to a log.jsonl."""
    with writing(path, path.with_name(f"{entry['stage']}.pt")), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path):
    """The entries of a log.jsonl -> list of dicts, without the torn last line of a killed run."""
    try:
        lines = path.read_text().splitlines()
        if lines and not lines[-1].endswith("}"):
            lines.pop()
        entries = [json.loads(line) for line in lines]
        for entry in entries:   # each has a stage and numbers, else this fails
            entry["stage"]
            sum([entry["step"], entry["seconds"], entry.get("flops", 0), entry.get("brierlm", 0)])
        return entries
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path} is not the log of a run, or damaged: move it away "
             f"({type(error).__name__}: {error})")


def rewind_log(path, stage, step):
    """Drop what the log says of a stage after `step`, to write it anew -> seconds until then."""
    kept = []
    seconds = 0.0
    for entry in read_log(path) if path.exists() else []:
        if entry["stage"] != stage:
            kept.append(entry)
        elif entry["step"] <= step:
            kept.append(entry)
            seconds = max(seconds, entry["seconds"])

    with replacing(path, path.with_name(f"{stage}.pt")) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    return seconds
