"""
Text to tokens on disk: data/<name>/{train.bin, val.bin, meta.json}.

    python data/prepare.py                        # the standard library of this Python, as bytes: no network
    python data/prepare.py shakespeare            # or tinystories, enwik8, wikitext103-test: downloaded
    python data/prepare.py notes/ book.txt.gz --name mine --tokenizer gpt2

Tokens go to disk as they come, so a text may be larger than memory. Before each document stands the border
token; it is held out for validation or not by a hash of its own text: adding a file moves no other.
"""
import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import urllib.request
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent
FILES = ("train.bin", "val.bin", "meta.json")   # of a data set: all that preparing it replaces
SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl")   # read in folders; a file named by hand may have any
SECTION = 8 << 10    # bytes of a document at most, about: a longer text is cut, at a good place
LONGEST = 128 << 10  # the same of a .md or .py: no single one is most of the validation split
CONTROL = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})   # bytes that text hardly has

# name -> (address, member of the zip archive or None, share of documents for validation)
DOWNLOADS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                    "input.txt", None, 0.1),
    "tinystories": ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
                    "TinyStoriesV2-GPT4-train.txt", None, 0.01),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "enwik8", 0.1),
    "wikitext103-test": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                         "wikitext-103-raw/wiki.test.raw", 1.0),
}
MADE_HERE = ("stdlib", "site-packages")   # from the Python that runs this
KNOWN = (*MADE_HERE, *DOWNLOADS)

def fail(message):
    """The user's mistake: one line on stderr, exit code 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)   # above a progress bar
    raise SystemExit(2)

@contextmanager
def script(when_full="use less data"):
    """Around a script's main: Ctrl-C, too little memory, a pipe that closes: an end without a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:   # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")   # what the terminal cannot show
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that nothing half done is left
    try:
        yield
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):   # `| head` has read enough
        raise SystemExit(130)
    except OSError as error:
        fail(f"could not write or read: {error}")
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|overflow", str(error)):
            raise
        fail(f"{str(error).splitlines()[0].split('. ')[0] or 'out of memory'}: {when_full}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:   # else Python tries again when it ends, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

class Parser(argparse.ArgumentParser):
    """argparse that shows every default, and whose errors are one line."""
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
    def error(self, message):
        fail(f"{message}; `python {self.prog} --help` lists the flags")
def within(low, high=float("inf"), kind=int):
    """The type of a flag that takes a number in [low, high]."""
    def number(text):
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
    return number

# --- Tokenizers: each is a tiktoken.Encoding ------------------------------------------------------------
# Llama 3's split pattern: contractions, words, numbers of up to three digits, punctuation, line ends, blanks.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def get_tokenizer(name):
    """`bytes`, a tiktoken name (gpt2, o200k_base, ...), or the path of a tiktoken-format file -> Encoding.
    A file is read as Llama 3 reads its own: with its split pattern and 256 special tokens after the ranks."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if Path(name).is_file():
        ranks = read_ranks(name)
        special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_{i}|>" for i in range(254)]
        return tiktoken.Encoding(f"./{Path(name).name}", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={s: len(ranks) + i for i, s in enumerate(special)})
    names = tiktoken.list_encoding_names()
    if name not in names:
        fail(f"unknown tokenizer {name!r}: use bytes, a tiktoken-format file, or one of {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:   # requests' errors: tiktoken downloads a vocabulary the first time it is used
        fail(f"tiktoken could not download the vocabulary {name!r} ({type(error).__name__}): go online once, "
             f"or point TIKTOKEN_CACHE_DIR at a folder that has it, or use --tokenizer bytes")
def read_ranks(path):
    """A tiktoken-format file -> {token: rank}. Checked: tiktoken panics over one that is not whole."""
    try:
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        fail(f"{path} is not a tiktoken-format file (one `base64 rank` pair a line)")
    if sorted(ranks.values()) != [*range(len(pairs))] or any(bytes([i]) not in ranks for i in range(256)):
        fail(f"{path} is not a whole vocabulary: expected the ranks 0, 1, 2, ... and all 256 single bytes")
    return ranks

def vocabulary_of(tokenizer):
    """An Encoding as plain values: kept with data and checkpoints, which then need no file and no network."""
    return {"pat_str": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens, "mergeable_ranks":
            {token.decode("latin-1"): rank for token, rank in tokenizer._mergeable_ranks.items()}}
def tokenizer_from(meta):
    """The contents of a meta.json, also those in a checkpoint -> the Encoding."""
    ranks = {token.encode("latin-1"): rank for token, rank in meta["vocabulary"]["mergeable_ranks"].items()}
    return tiktoken.Encoding(meta["tokenizer"], **meta["vocabulary"] | {"mergeable_ranks": ranks})
def border_token(tokenizer):
    """The id that stands before each document: where a model begins, and where it ends."""
    llama3 = "<|begin_of_text|>" in tokenizer.special_tokens_set
    return tokenizer.encode_single_token("<|begin_of_text|>" if llama3 else "<|endoftext|>")
def encode(tokenizer, text, source="the text"):
    """bytes -> list of ids. The byte tokenizer takes any bytes; the others need UTF-8."""
    if tokenizer.name == "bytes":
        return list(text)
    try:
        text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 (byte {error.start}): only --tokenizer bytes takes any bytes")
    parts = (text[i:i + LONGEST] for i in range(0, len(text), LONGEST))   # tiktoken dies of a million blanks
    return [token for part in parts for token in tokenizer.encode_ordinary(part)]

# --- Sources: every one is a stream of documents, each a bytes object -----------------------------------
def cut(text, limit):
    """Where to cut `text` near `limit`: after a blank line, else a line end, else between characters."""
    for border in (b"\n\n", b"\n"):
        if (at := text.rfind(border, limit // 2, limit)) >= 0:
            return at + len(border)
    return next((i for i in range(limit, limit - 4, -1) if text[i] & 0xC0 != 0x80), limit)   # UTF-8 borders
def pieces(stream, limit):
    """Cut a stream of bytes at every <|endoftext|>, and wherever `limit` bytes have gone by without one."""
    buffer = b""
    while block := stream.read(1 << 16):
        *complete, buffer = (buffer + block).split(b"<|endoftext|>")
        yield from complete
        while len(buffer) > limit:
            end = cut(buffer, limit)
            yield buffer[:end]
            buffer = buffer[end:]
    yield buffer

def documents(path, known):
    """The documents of one file, by its kind."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if known in DOWNLOADS and kind == ".zip":
        opened = zipfile.Path(path, DOWNLOADS[known][1]).open("rb")
    elif str(path) == "-":
        opened = sys.stdin.buffer
    else:
        opened = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    with opened as stream:
        if known == "wikitext103-test":
            yield from re.split(rb"^(?= = [^=\n].* = \n)", stream.read(), flags=re.MULTILINE)   # at titles
        elif kind in (".json", ".jsonl"):
            for number, line in enumerate(stream, 1):
                try:
                    yield json.loads(line)["text"].encode("utf-8", "surrogatepass") if line.strip() else b""
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    fail(f'{path}, line {number}: each line must be an object with a string "text"')
        else:
            yield from pieces(stream, LONGEST if kind in (".md", ".py") else SECTION)
def python_source(known):
    """The .py files of this Python's standard library; for "site-packages" also of all installed packages.
    Without tests, IDLE, and the `encodings`: generated tables, so predictable that they flatter BrierLM."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"])][:2 if known == "site-packages" else 1]
    skip = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [(root, path) for root in roots for path in sorted(root.rglob("*.py"))]
    return [path for root, path in files if not skip.intersection(path.relative_to(root).parts)]
def local_files(sources):
    """Files, whatever their names; folders, which are searched for SUFFIXES; "-" is stdin."""
    paths = []
    for source in map(str, sources):
        path = Path(source)
        if source != "-" and not (source and path.exists()):
            fail(f"no data at {source!r}: give files, folders, - for stdin, or alone {', '.join(KNOWN)}")
        found = [path]
        if path.is_dir():   # a meta.json is of tokens, beside which there may be text
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "meta.json"
                           and p.name.lower().removesuffix(".gz").endswith(SUFFIXES))
        if not found:
            fail(f"{source} holds no text: expected {', '.join(SUFFIXES)} files (or .gz of these)")
        paths += found
    return paths
def downloaded(name):
    """[the local copy of a known download], fetched if it is missing. It gets its name when it is whole."""
    url, member, _ = DOWNLOADS[name]
    path = DATA_DIR / "downloads" / (name + (".zip" if member else ".txt"))
    part = path.with_name(f"{path.name}.{os.getpid()}.part")   # another process may fetch it, too
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as out:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(out, "write", total=size or None, desc=f"download {name}") as file:
                    shutil.copyfileobj(response, file)
                if size and out.tell() != size:
                    raise OSError(f"got {out.tell()} of {size} bytes")
            part.replace(path)
        except Exception as error:   # no network, a broken connection, a full disk
            fail(f"could not download {url} ({error}): check the network, or fetch it yourself to {path}")
        finally:
            part.unlink(missing_ok=True)
    return [path]

# --- Preparing, and reading back ------------------------------------------------------------------------
def prepare(sources=("stdlib",), name=None, tokenizer="bytes", val_fraction=None, out_root=None):
    """Tokenize `sources` into out_root/<name> (default: data/<name>) -> that folder. Same input, same bytes.
    There FILES are replaced once the new ones are whole, and nothing else is ever touched."""
    known = sources[0] if len(sources) == 1 and sources[0] in KNOWN else None
    enc = get_tokenizer(tokenizer)
    name = default_name(sources[0], tokenizer) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name):
        fail(f"--name {name!r} must be the name of one folder: letters, digits, and . - _ behind the first")
    folder = Path(out_root or DATA_DIR) / name
    find = downloaded if known in DOWNLOADS else python_source
    paths = find(known) if known else local_files(sources)
    if taken := {*map(os.path.realpath, paths)} & {os.path.realpath(folder / file) for file in FILES}:
        fail(f"{taken.pop()} is a file that preparing {name} replaces: give another --name")
    if val_fraction is None:
        val_fraction = DOWNLOADS[known][2] if known in DOWNLOADS else 0.1
    with TemporaryDirectory(dir=folder if folder.exists() else folder.parent) as own, open(__file__) as lock:
        splits = write_splits(Path(own), read_all(paths, known), enc, val_fraction)
        meta = {"name": name, "sources": [Path(s).name for s in sources], "val_fraction": val_fraction,
                "tokenizer": enc.name, "vocab_size": enc.n_vocab, "border": border_token(enc), **splits,
                "vocabulary": vocabulary_of(enc)}
        Path(own, "meta.json").write_text(json.dumps(meta | {"checksum": checksum(meta)}, indent=2))
        folder.mkdir(exist_ok=True)
        with suppress(ImportError, OSError):   # Windows and some network disks have no locks
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)   # this file serves: one process at a time moves its three
        for file in FILES:
            Path(own, file).replace(folder / file)
    print(f"{folder}: {meta['documents']:,} documents, {meta['train_tokens']:,} training and "
          f"{meta['val_tokens']:,} validation tokens")
    return folder

def read_all(paths, known):
    """(path, document) of every file, with a progress bar; blank documents are left out."""
    plain = [p for p in paths if p.is_file() and p.suffix.lower() not in (".gz", ".zip")]
    size, warned = sum(p.stat().st_size for p in plain) or None, None
    with tqdm(total=size, unit="B", unit_scale=True, desc="prepare") as bar:
        for path in paths:
            try:
                for text in documents(path, known):
                    bar.update(len(text))
                    if known in MADE_HERE:   # else the commonest chunk is four blanks, which flatters BrierLM
                        text = text.replace(b"    ", b"\t")
                    rare = len(text) - len(text.translate(None, CONTROL))
                    if path != warned and (rare > len(text) / 20 or text[:2] in (b"\xff\xfe", b"\xfe\xff")):
                        warned = path
                        tqdm.write(f"warning: {path} is hardly text: if it is, save it as UTF-8", sys.stderr)
                    if text.strip():
                        yield path, text
            except Exception as error:   # whatever is wrong in the file
                helps = "delete it, to download it again" if known in DOWNLOADS else "is it whole?"
                fail(f"{path} could not be read ({type(error).__name__}: {error}): {helps}")
def write_splits(folder, texts, enc, val_fraction):
    """Write train.bin and val.bin as (path, document) come, an empty one as a copy -> part of meta.json."""
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32) if enc.n_vocab <= np.iinfo(d).max + 1)
    documents, tokens, border = 0, {"train": 0, "val": 0}, border_token(enc)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for path, text in texts:
            draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64   # in [0, 1)
            split, file = ("val", val) if draw < val_fraction else ("train", train)
            ids = [border, *encode(enc, text, path)]
            np.array(ids, dtype).tofile(file)
            tokens[split] += len(ids)
            documents += 1
    if documents == 0:
        fail("no text there: empty files cannot be prepared")
    if 0 < val_fraction < 1 and 0 in tokens.values():
        full, empty = sorted(tokens, key=tokens.get, reverse=True)
        print(f"warning: too few documents to hold some out: {empty}.bin repeats {full}.bin", file=sys.stderr)
        shutil.copyfile(folder / f"{full}.bin", folder / f"{empty}.bin")
        tokens[empty] = tokens[full]
    return {"dtype": np.dtype(dtype).name, "documents": documents, "train_tokens": tokens["train"],
            "val_tokens": tokens["val"], "fingerprint": [fingerprint(folder / f"{s}.bin") for s in tokens]}
def fingerprint(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
def checksum(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
def default_name(source, tokenizer):
    """stdlib, shakespeare, the stem of a path; then the tokenizer's, unless it is the default."""
    base = "stdin" if source == "-" else Path(os.path.abspath(source)).name.split(".")[0]
    name = base if tokenizer == "bytes" else f"{base}-{Path(tokenizer).stem}"
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".-") or "data"

@dataclass
class TokenData:
    """A prepared data set: `train` and `val` are memory maps of token ids."""
    folder: Path
    meta: dict
    tokenizer: tiktoken.Encoding
    train: np.ndarray
    val: np.ndarray

    def batch(self, split, offsets, length):
        """Tokens [o, o + length) for each of the offsets o (B,) -> int64 (B, length): what makes a batch."""
        tokens = getattr(self, split)
        return torch.from_numpy(np.stack([tokens[o:o + length] for o in offsets]).astype(np.int64))
    def random_offsets(self, split, count, length, seed):
        """`count` window starts, a function of the seed alone: nothing to save for an exact resume."""
        starts = len(self.check(split, length)) - length + 1
        return np.random.default_rng(seed).integers(0, starts, size=count)
    def even_offsets(self, split, count, length):
        """Up to `count` starts of windows that do not overlap, spread evenly over the split."""
        whole = len(self.check(split, length)) // length
        return np.arange(min(count, whole)) * whole // min(count, whole) * length
    def check(self, split, length):
        tokens = getattr(self, split)
        if len(tokens) < length:
            fail(f"{self.folder}/{split}.bin has {len(tokens)} tokens, fewer than one context of {length}: "
                 "prepare more text, or use a shorter context")
        return tokens

def load_data(name):
    """Open data/<name> (or a folder given by its path) -> TokenData. A known one is prepared if missing."""
    if name in KNOWN and not (DATA_DIR / name / "meta.json").is_file():
        prepare([name])
    folder = next((f for f in (DATA_DIR / name, Path(name)) if (f / "meta.json").is_file()), None)
    if folder is None:
        fail(f"no data set {name!r} under {DATA_DIR}: `python data/prepare.py SOURCE --name {name}` makes it")
    splits = {}
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("checksum") != checksum(meta):
            raise ValueError("a value in it has changed")
        for split, expected in zip(("train", "val"), meta["fingerprint"]):
            path, count = folder / f"{split}.bin", meta[f"{split}_tokens"]
            if not path.is_file() or fingerprint(path) != expected:
                raise ValueError(f"{path.name} is not, or no longer, what was prepared")
            splits[split] = np.memmap(path, meta["dtype"], "r") if count else np.empty(0, meta["dtype"])
        tokenizer = tokenizer_from(meta)
    except Exception as error:   # whatever is wrong in the files
        fail(f"{folder}: meta.json or tokens damaged, or old ({type(error).__name__}: {error}): prepare anew")
    inside = folder.absolute().parent == DATA_DIR   # then its name is enough, wherever this folder moves
    name = folder.absolute().name if inside else str(folder)
    return TokenData(folder, meta | {"name": name}, tokenizer, **splits)

@script()
def main():
    parser = Parser(description="Tokenize text into data/<name>/.")
    add = parser.add_argument
    add("source", nargs="*", default=["stdlib"], help=f"{', '.join(KNOWN)}; files, folders; - for stdin")
    add("--name", help="name of the data set; None: from the source and the tokenizer")
    add("--tokenizer", default="bytes", help="bytes, a tiktoken name, or a tiktoken-format file")
    add("--val_fraction", type=within(0, 1, float), help="share of documents held out; None: the source's")
    args = parser.parse_args()
    prepare(args.source, args.name, args.tokenizer, args.val_fraction)

if __name__ == "__main__":
    main()
