"""
What the command lines share: flags, one-line errors, and a clean end whatever happens.
Nothing here is needed to understand CALM.
"""
import argparse
import inspect
import os
import platform
import re
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields
from typing import get_args

from tqdm import tqdm


def fail(message):
    """End the program over a mistake of the user's: one line on stderr, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)   # print would tear a progress bar
    raise SystemExit(2)


class LogFile:
    """stderr, where it is no terminal: whatever a progress bar shows becomes a line of its own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def bar_options():
    """What tqdm must be given so that in a log file it writes a line a minute, and not thousands
    of carriage returns."""
    if sys.stderr.isatty():
        return {}
    return {"file": LogFile(), "mininterval": 60, "maxinterval": 60}


class Parser(argparse.ArgumentParser):
    """An argparse parser that shows every default, and whose errors are one line."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message}; `python {self.prog} --help` lists the flags")


def within(low, high=float("inf"), kind=int):
    """The type of a flag that takes a number (of this kind) in [low, high]."""

    def number(text):
        value = kind(text)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")

    return number


def add_fields(group, config, flag=str, skip=(), choices={}):
    """Add a flag for every field of a dataclass. Its help is the comment beside the field.

    flag(field name) -> the flag's name. skip: fields without one. choices: {field name: values}.
    Whole numbers are from 1 on, or from 0 where that is the default; other numbers from 0 on.
    """
    comments = re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(config), re.MULTILINE)
    comments = dict(comments)
    for field in fields(config):
        if field.name in skip:
            continue
        how = {"default": field.default, "help": comments[field.name]}
        if field.name in choices:
            how["choices"] = choices[field.name]
        elif field.type is int:
            how["type"] = within(min(field.default, 1), 2**31 - 1)
        elif field.type is float:
            how["type"] = within(0, 2**31 - 1, float)
        else:
            how["choices"] = get_args(field.type)   # of a Literal
        group.add_argument(f"--{flag(field.name)}", **how)


@contextmanager
def clean_end(when_memory_is_full="use less data"):
    """Around all that a script does: Ctrl-C, a closed pipe, a full disk or a full memory end it
    without a traceback. when_memory_is_full: advice for that case, such as a flag to lower."""
    reopen_closed_streams()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.stdout.reconfigure(errors="replace")   # "?" for a character that the terminal cannot show
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # temporary files are removed
    try:
        yield
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):   # also `| head`, which has read enough
        raise SystemExit(130)
    except OSError as error:
        fail(f"could not write or read: {error}")
    except (MemoryError, OverflowError, RuntimeError) as error:
        of_memory = re.search("out of memory|allocate|overflow", str(error))
        if isinstance(error, RuntimeError) and not of_memory:
            raise
        what = str(error).splitlines()[0].split(". ")[0] if str(error) else "out of memory"
        fail(f"{what}: {when_memory_is_full}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:   # nobody reads any more: Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def reopen_closed_streams():
    """Give a program whose stdin, stdout or stderr was closed by its caller an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


# --- Temporary files -----------------------------------------------------------------------


def temporary(path):
    """The name to write under before renaming to `path`. The machine and the process are in it:
    others may write too."""
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def remove_leftovers(folder, name="*"):
    """Remove what processes that were killed left in a folder: temporary(folder / name)."""
    for path in folder.glob(f".{name}.{platform.node()}-*.tmp"):
        process = path.name.removesuffix(".tmp").split("-")[-1]
        if process.isdecimal() and not is_running(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_running(process):
    """Is there a process with this number, other than the one that asks?"""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)   # which sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):   # of another user, for example
        pass
    return True
