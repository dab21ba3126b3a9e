"""
Text to tokens on disk: data/<name>/{train.bin, val.bin, meta.json}.

    python data/prepare.py                        # the standard library of this Python, as bytes: no network
    python data/prepare.py shakespeare            # or tinystories, enwik8, wikitext103-test: downloaded
    python data/prepare.py notes/ book.txt.gz --name mine --tokenizer gpt2

Tokens go to disk as they come, so a text may be larger than memory. A document ends in the end-of-text token
and is held out for validation or not by a hash of its own text: adding a file moves no other.
"""
import argparse
import gzip
import hashlib
import json
import re
import shutil
import sys
import sysconfig
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SECTION = 8 << 10    # bytes: a .txt or stdin without document borders is cut at a good place near this
LONGEST = 128 << 10  # bytes: as is any other document near this: none is most of the validation split

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
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

@contextmanager
def script(when_full):
    """Around a script's main: Ctrl-C ends it without a traceback, a full card in a line of what to lower."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130)
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).split('. ')[0]}: {when_full}")

class Parser(argparse.ArgumentParser):
    """argparse that shows every default, and whose errors are one line."""
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(f"{message}; `python {self.prog} --help` lists the flags")

def within(low, high=float("inf"), kind=int):
    """The type of a flag that takes a number in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value
    return number

# --- Tokenizers: each is a tiktoken.Encoding ------------------------------------------------------------
# Llama 3's split pattern: contractions, words, numbers of up to three digits, punctuation, line ends, blanks.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def get_tokenizer(name):
    """`bytes`, a tiktoken name (gpt2, o200k_base, ...), or the path of a tiktoken-format file -> Encoding.
    A file is read as Llama 3 reads its own: with its split pattern and 256 special tokens after the ranks."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    if Path(name).is_file():
        try:
            ranks = load_tiktoken_bpe(str(name))
        except Exception:
            fail(f"{name} is not a tiktoken-format file (one `base64 rank` pair a line)")
        special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_{i}|>" for i in range(254)]
        return tiktoken.Encoding(str(name), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={s: len(ranks) + i for i, s in enumerate(special)})
    names = tiktoken.list_encoding_names()
    if name not in names:
        fail(f"unknown tokenizer {name!r}: use bytes, a tiktoken-format file, or one of {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:   # requests' errors: tiktoken downloads a vocabulary the first time it is used
        fail(f"tiktoken could not download the vocabulary {name!r} ({type(error).__name__}): go online once, "
             f"or point TIKTOKEN_CACHE_DIR at a folder that has it, or use --tokenizer bytes")

def eot_token(tokenizer):
    """The id that ends a document."""
    llama3 = "<|end_of_text|>" in tokenizer.special_tokens_set
    return tokenizer.encode_single_token("<|end_of_text|>" if llama3 else "<|endoftext|>")

def encode(tokenizer, text, source="the text"):
    """bytes -> list of ids. The byte tokenizer takes any bytes; the others need UTF-8."""
    if tokenizer.name == "bytes":
        return list(text)
    try:
        return tokenizer.encode_ordinary(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 (byte {error.start}): only --tokenizer bytes takes any bytes")

def fingerprint_tokenizer(tokenizer):
    """A hash of the vocabulary, to tell whether two tokenizers are the same one."""
    vocabulary = b"\n".join(tokenizer.token_byte_values()) + str(tokenizer.n_vocab).encode()
    return hashlib.sha256(vocabulary).hexdigest()[:16]

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

def json_texts(path, lines):
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)["text"].encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f'{path}, line {number}: each line of a .jsonl file must be an object with a string "text"')

def articles(stream):
    """WikiText: an article begins at its ` = Title = ` line."""
    return re.split(rb"^(?= = [^=\n].* = \n)", stream.read(), flags=re.MULTILINE)

def documents(path, known):
    """The documents of one file, by its kind."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if path.name == "-":
        opened = sys.stdin.buffer
    else:
        opened = gzip.open(path) if path.name.endswith(".gz") else path.open("rb")
    with opened as stream:
        if known == "wikitext103-test":
            yield from articles(stream)
        elif kind == ".jsonl":
            yield from json_texts(path, stream)
        else:
            yield from pieces(stream, LONGEST if kind in (".md", ".py") else SECTION)

def python_source(known):
    """The .py files of this Python's standard library; for "site-packages" also of all installed packages.
    Without tests, IDLE, and the `encodings`: generated tables, so predictable that they flatter BrierLM."""
    names = ("stdlib", "purelib") if known == "site-packages" else ("stdlib",)
    roots = [Path(sysconfig.get_paths()[name]) for name in names]
    skip = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [(root, path) for root in roots for path in sorted(root.rglob("*.py"))]
    return [path for root, path in files if not skip.intersection(path.relative_to(root).parts)]

def local_files(sources):
    """Files as they are, folders searched for SUFFIXES; "-" is stdin."""
    paths = []
    for source in map(Path, sources):
        if not source.exists() and str(source) != "-":
            fail(f"no data at {source}: give files, folders, - for stdin, or one of {', '.join(KNOWN)}")
        found = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        text = [p for p in found if str(p) == "-" or p.name.removesuffix(".gz").endswith(SUFFIXES)]
        if not text:
            fail(f"{source} holds no text: expected {', '.join(SUFFIXES)} files (or .gz of these)")
        paths += text
    return paths

def downloaded(name):
    """The local copy of a known download, fetched if it is missing. It gets its name when it is whole."""
    url, member, _ = DOWNLOADS[name]
    path = DATA_DIR / "downloads" / (name + (".zip" if member else ".txt"))
    part = path.with_name(path.name + ".part")
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
        except (OSError, HTTPException) as error:   # no network, a timeout, a broken connection, a full disk
            fail(f"could not download {url} ({error}): check the network, or fetch it yourself to {path}")
        finally:
            part.unlink(missing_ok=True)
    return zipfile.Path(path, member) if member else path

# --- Preparing, and reading back ------------------------------------------------------------------------
def prepare(sources=("stdlib",), name=None, tokenizer="bytes", val_fraction=None, out_root=None):
    """Tokenize `sources` into out_root/<name> (default: data/<name>) -> that folder. Same input, same bytes.
    It is made under another name and renamed when whole: until then an earlier set of that name stays."""
    known = sources[0] if len(sources) == 1 and sources[0] in KNOWN else None
    enc = get_tokenizer(tokenizer)
    if known in DOWNLOADS:
        paths, share = [downloaded(known)], DOWNLOADS[known][2]
    else:
        paths, share = python_source(known) if known else local_files(sources), 0.1
    val_fraction = share if val_fraction is None else val_fraction
    folder = Path(out_root or DATA_DIR) / (name or default_name(sources[0], tokenizer))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)   # of an earlier run that was killed
    try:
        partial.mkdir(parents=True)
        splits = write_splits(partial, read_all(paths, known), enc, val_fraction)
        meta = {"name": folder.name, "sources": [str(s) for s in sources], "tokenizer": str(tokenizer),
                "tokenizer_fingerprint": fingerprint_tokenizer(enc), "vocab_size": enc.n_vocab,
                "eot": eot_token(enc), "val_fraction": val_fraction, **splits}
        if Path(tokenizer).is_file():   # keep the vocabulary beside the tokens: the original may move
            shutil.copyfile(tokenizer, partial / "tokenizer.tiktoken")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, KeyboardInterrupt) as error:   # a full disk, a file that may not be read, Ctrl-C
        fail(f"{folder.name} was not prepared ({str(error) or 'interrupted'}): nothing was changed")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    train, val = meta["train_tokens"], meta["val_tokens"]
    print(f"{folder}: {meta['documents']:,} documents, {train:,} training and {val:,} validation tokens")
    return folder

def read_all(paths, known):
    """(path, document) of every file, with a progress bar; blank documents are left out."""
    plain = [p for p in paths if isinstance(p, Path) and p.is_file() and p.suffix != ".gz"]
    size = sum(p.stat().st_size for p in plain) or None
    with tqdm(total=size, unit="B", unit_scale=True, desc="prepare") as bar:
        for path in paths:
            for text in documents(path, known):
                bar.update(len(text))
                if known in MADE_HERE:   # else the commonest chunk is four blanks, which flatters BrierLM
                    text = text.replace(b"    ", b"\t")
                if text.strip():
                    yield path, text

def write_splits(folder, texts, enc, val_fraction):
    """Write train.bin and val.bin into `folder` as (path, document) come -> their part of meta.json."""
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32) if enc.n_vocab <= np.iinfo(d).max + 1)
    documents, tokens = 0, {"train": 0, "val": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for path, text in texts:
            draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64   # in [0, 1)
            split, file = ("val", val) if draw < val_fraction else ("train", train)
            ids = [*encode(enc, text, path), eot_token(enc)]
            np.array(ids, dtype).tofile(file)
            tokens[split] += len(ids)
            documents += 1
    if documents == 0:
        fail("no text there: empty files cannot be prepared")
    if 0 < val_fraction < 1 and 0 in tokens.values():
        full, empty = sorted(tokens, key=tokens.get, reverse=True)
        print(f"warning: too few different documents to hold some out, so {empty}.bin repeats {full}.bin",
              file=sys.stderr)
        shutil.copyfile(folder / f"{full}.bin", folder / f"{empty}.bin")
        tokens[empty] = tokens[full]
    return {"dtype": np.dtype(dtype).name, "documents": documents, "train_tokens": tokens["train"],
            "val_tokens": tokens["val"], "fingerprint": [fingerprint(folder / f"{s}.bin") for s in tokens]}

def fingerprint(path, blocks=4096):
    """A hash of a file's size and of 4 KiB at so many places of it: a moment's work for any file."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(i * size // blocks)
            digest.update(file.read(4096))
    return digest.hexdigest()[:16]

def default_name(source, tokenizer):
    """stdlib, shakespeare, the stem of a path; then the tokenizer's, unless it is the default."""
    base = "stdin" if source == "-" else Path(source).resolve().name.split(".")[0] or "data"
    return base if tokenizer == "bytes" else f"{base}-{Path(tokenizer).stem}"

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
            fail(f"the {split} split of {self.folder} has {len(tokens)} tokens, fewer than one context of "
                 f"{length}: prepare more text (python data/prepare.py --help) or lower --block_size")
        return tokens

def load_data(name):
    """Open data/<name> (or a folder given by its path) -> TokenData. A known one is prepared if missing."""
    if name in KNOWN and not (DATA_DIR / name / "meta.json").is_file():
        prepare([name])
    folder = next((f for f in (DATA_DIR / name, Path(name)) if (f / "meta.json").is_file()), None)
    if folder is None:
        fail(f"no data set {name!r} under {DATA_DIR}: `python data/prepare.py SOURCE --name {name}` makes it")
    meta = json.loads((folder / "meta.json").read_text())
    splits = {}
    for split, expected in zip(("train", "val"), meta["fingerprint"]):
        path, count = folder / f"{split}.bin", meta[f"{split}_tokens"]
        if not path.is_file() or fingerprint(path) != expected:
            fail(f"{path} is not, or no longer, what was prepared ({count:,} tokens): prepare it again")
        splits[split] = np.memmap(path, meta["dtype"], "r") if count else np.empty(0, meta["dtype"])
    copy = folder / "tokenizer.tiktoken"   # a vocabulary that came as a file stays with its tokens
    if copy.is_file():
        meta["tokenizer"] = str(copy)
    return TokenData(folder, meta, get_tokenizer(meta["tokenizer"]), **splits)

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
