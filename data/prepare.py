"""
Text to tokens on disk: data/<name>/{train.bin, val.bin, meta.json}.

    python data/prepare.py                        # the standard library of this Python, as bytes: no network
    python data/prepare.py site-packages          # and of everything installed for it
    python data/prepare.py shakespeare            # or tinystories, enwik8, wikitext103-test: downloaded
    python data/prepare.py notes/ book.txt.gz --name mine --tokenizer gpt2
    cat book.txt | python data/prepare.py - --name book

Tokens go to disk as they come, so a text may be larger than memory. A document ends in the end-of-text token and
belongs to the training or to the validation split by a hash of its own text: never by its position, so adding a file
moves no other.
"""
import argparse
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
import zipfile
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
SECTION = 8 << 10    # bytes: a .txt or stdin with no document borders of its own is cut at the first good place after this
LONGEST = 128 << 10  # bytes: any other document is cut after these: none fills the memory, or most of the validation split
BATCH = 256          # documents handed to the tokenizer's threads at once

# name -> (address, member of the zip archive or None, share of documents for validation)
DOWNLOADS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", None, 0.1),
    "tinystories": ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", None, 0.01),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "enwik8", 0.1),
    "wikitext103-test": ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip", "wikitext-103-raw/wiki.test.raw", 1.0),
}

MADE_HERE = ("stdlib", "site-packages")   # of the Python that runs this: its own source; with that of installed packages
KNOWN = (*MADE_HERE, *DOWNLOADS)


def fail(message):
    """The user's mistake: one line on stderr, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
    number.__name__ = kind.__name__   # argparse says "invalid int value"
    return number


# --- Tokenizers: each is a tiktoken.Encoding --------------------------------------------------------------------------

# Llama 3's split pattern: contractions, words, numbers of up to three digits, punctuation, line ends, blanks.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def get_tokenizer(name):
    """`bytes`, a tiktoken name (gpt2, cl100k_base, o200k_base), or the path of a tiktoken-format file -> Encoding.

    A file is read the way Llama 3 reads its own: its split pattern, and 256 special tokens after the ranks.
    """
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if Path(name).is_file():
        try:
            ranks = load_tiktoken_bpe(str(name))
        except Exception:
            fail(f"{name} is not a tiktoken-format file (one `base64 rank` pair a line)")
        special = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_{i}|>" for i in range(254)]
        return tiktoken.Encoding(str(name), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={s: len(ranks) + i for i, s in enumerate(special)})
    if name not in tiktoken.list_encoding_names():
        fail(f"unknown tokenizer {name!r}: use bytes, the path of a tiktoken-format file, "
             f"or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:   # requests' errors: tiktoken downloads a vocabulary the first time it is used
        fail(f"tiktoken could not download the vocabulary {name!r} ({type(error).__name__}): go online once, or point "
             f"TIKTOKEN_CACHE_DIR at a folder that has it, or use --tokenizer bytes")


def eot_token(tokenizer):
    """The id that ends a document."""
    return tokenizer.encode_single_token("<|end_of_text|>" if "<|end_of_text|>" in tokenizer.special_tokens_set
                                         else "<|endoftext|>")


def encode(tokenizer, text, source="the text"):
    """bytes -> list of ids. The byte tokenizer takes any bytes; the others need UTF-8."""
    return list(text) if tokenizer.name == "bytes" else tokenizer.encode_ordinary(as_utf8(text, source))


def as_utf8(text, source):
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 (byte {error.start}): only --tokenizer bytes takes any bytes")


def fingerprint_tokenizer(tokenizer):
    """A hash of the vocabulary, to tell whether two tokenizers are the same one."""
    vocabulary = b"\n".join(tokenizer.token_byte_values()) + str(tokenizer.n_vocab).encode()
    return hashlib.sha256(vocabulary).hexdigest()[:16]


# --- Sources: every one is a stream of documents, each a bytes object -------------------------------------------------

def cut(text, limit):
    """Where to cut `text` near `limit`: after the last blank line, else after a line end, else between characters."""
    for border in (b"\n\n", b"\n"):
        if (at := text.rfind(border, limit // 2, limit)) >= 0:
            return at + len(border)
    return next((i for i in range(limit, limit - 4, -1) if text[i] & 0xC0 != 0x80), limit)   # 10xxxxxx continues one


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


def articles(lines):
    """WikiText: an article begins at its ` = Title = ` line."""
    article = []
    for line in lines:
        if re.match(rb" = [^=].* = \n", line) and article:
            yield b"".join(article)
            article = []
        article.append(line)
    yield b"".join(article)


def documents(path, known):
    """The documents of one file, by its kind."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    with sys.stdin.buffer if path.name == "-" else gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
        if known == "wikitext103-test":
            yield from articles(stream)
        elif kind == ".jsonl":
            yield from json_texts(path, stream)
        else:
            yield from pieces(stream, LONGEST if kind in (".md", ".py") else SECTION)


def python_source(known):
    """The .py files of the running interpreter's standard library; for "site-packages" also of all installed packages.

    Without tests, IDLE, and the `encodings`: 122 generated tables of code points, so predictable that they would be a
    fifth of the BrierLM."""
    names = ("stdlib", "purelib") if known == "site-packages" else ("stdlib",)
    roots = [Path(sysconfig.get_paths()[name]) for name in names]
    skip = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages", "__pycache__"}
    return [p for root in roots for p in sorted(root.rglob("*.py")) if not skip.intersection(p.relative_to(root).parts)]


def local_files(sources):
    """Files as they are, folders searched for SUFFIXES; "-" is stdin."""
    paths = []
    for source in map(Path, sources):
        found = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        if not source.is_dir() and str(source) != "-" and not source.is_file():
            fail(f"no data at {source}: give files, folders, - for stdin, or one of {', '.join(KNOWN)}")
        text = [p for p in found if str(p) == "-" or p.name.removesuffix(".gz").endswith(SUFFIXES)]
        if not text:
            fail(f"{source} holds no text: expected {', '.join(SUFFIXES)} files (or .gz of these)")
        paths += text
    return paths


def downloaded(name):
    """The local copy of a known download, fetched with a progress bar if it is missing. It gets its name when it is whole."""
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
            fail(f"could not download {url} ({error}): check the network, or fetch the file yourself to {path}")
        finally:
            part.unlink(missing_ok=True)
    return zipfile.Path(path, member) if member else path


# --- Preparing, and reading back --------------------------------------------------------------------------------------

def prepare(sources=("stdlib",), name=None, tokenizer="bytes", val_fraction=None, out_root=None):
    """Tokenize `sources` into out_root/<name> (default: data/<name>) and return that folder. Same input, same bytes out.

    It is made under another name and renamed when whole: until then an earlier data set of that name stays."""
    known = sources[0] if len(sources) == 1 and sources[0] in KNOWN else None
    if val_fraction is None:
        val_fraction = DOWNLOADS[known][2] if known in DOWNLOADS else 0.1
    enc = get_tokenizer(tokenizer)
    paths = python_source(known) if known in MADE_HERE else [downloaded(known)] if known else local_files(sources)
    folder = Path(out_root or DATA_DIR) / (name or default_name(sources[0], tokenizer))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)   # of an earlier run that was killed
    try:
        partial.mkdir(parents=True)
        meta = {"name": folder.name, "sources": [str(s) for s in sources], "tokenizer": str(tokenizer),
                "tokenizer_fingerprint": fingerprint_tokenizer(enc), "vocab_size": enc.n_vocab, "eot": eot_token(enc),
                "val_fraction": val_fraction, **write_splits(partial, tokenized(read_all(paths, known), enc), enc, val_fraction)}
        if Path(tokenizer).is_file():   # keep the vocabulary beside the tokens: the original may move
            shutil.copyfile(tokenizer, partial / "tokenizer.tiktoken")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, KeyboardInterrupt) as error:   # a full disk, a file that may not be read, Ctrl-C
        fail(f"{folder.name} was not prepared ({str(error) or 'interrupted'}): nothing was changed")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: {meta['documents']:,} documents, {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation "
          f"tokens of a vocabulary of {meta['vocab_size']:,}")
    return folder


def read_all(paths, known):
    """(path, document) of every file, with a progress bar; blank documents are left out."""
    plain = [p for p in paths if isinstance(p, Path) and p.is_file() and p.suffix != ".gz"]
    with tqdm(total=sum(p.stat().st_size for p in plain) or None, unit="B", unit_scale=True, desc="prepare") as bar:
        for path in paths:
            for text in documents(path, known):
                bar.update(len(text))
                if known in MADE_HERE:
                    # Four blanks -> one tab. Else the chunk of four blanks is by far the commonest: it flatters BrierLM,
                    # and a text drawn at a low temperature that falls into blanks never comes out.
                    text = text.replace(b"    ", b"\t")
                if text.strip():
                    yield path, text


def tokenized(texts, enc):
    """(path, document) pairs -> (document, token ids) pairs, a BATCH of documents at a time through the tokenizer's threads."""
    while batch := list(itertools.islice(texts, BATCH)):
        ids = ([np.frombuffer(text, np.uint8) for _, text in batch] if enc.name == "bytes" else
               enc.encode_ordinary_batch([as_utf8(text, path) for path, text in batch], num_threads=os.cpu_count()))
        yield from zip((text for _, text in batch), ids)


def write_splits(folder, texts, enc, val_fraction):
    """Write train.bin and val.bin into `folder` as (document, token ids) come -> their part of meta.json."""
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32) if enc.n_vocab <= np.iinfo(d).max + 1)
    documents, tokens = 0, {"train": 0, "val": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for text, ids in texts:
            draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64   # in [0, 1), the text's own
            split, file = ("val", val) if draw < val_fraction else ("train", train)
            np.append(ids, eot_token(enc)).astype(dtype).tofile(file)
            tokens[split] += len(ids) + 1
            documents += 1
    if documents == 0:
        fail("no text there: empty files cannot be prepared")
    if 0 < val_fraction < 1 and 0 in tokens.values():
        full, empty = sorted(tokens, key=tokens.get, reverse=True)
        print(f"warning: too few different documents to hold some out, so {empty}.bin repeats {full}.bin: "
              f"validation figures will be training figures", file=sys.stderr)
        shutil.copyfile(folder / f"{full}.bin", folder / f"{empty}.bin")
        tokens[empty] = tokens[full]
    return {"dtype": np.dtype(dtype).name, "documents": documents, "train_tokens": tokens["train"], "val_tokens": tokens["val"],
            "fingerprint": [fingerprint(folder / f"{split}.bin") for split in ("train", "val")]}


def fingerprint(path, blocks=4096):
    """A hash of a file's size and of 4 KiB at so many places of it: a moment's work, however large the file."""
    size = path.stat().st_size if path.is_file() else 0
    digest = hashlib.sha256(str(size).encode())
    if size:
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
        """Token windows [o, o + length) for each offset -> int64 tensor (B, length). The one place that makes a batch."""
        tokens = getattr(self, split)
        return torch.from_numpy(np.stack([tokens[o:o + length] for o in offsets]).astype(np.int64))

    def random_offsets(self, split, count, length, seed):
        """`count` window starts, a function of the seed alone: nothing to save for an exact resume."""
        return np.random.default_rng(seed).integers(0, len(self.check(split, length)) - length + 1, size=count)

    def even_offsets(self, split, count, length):
        """Up to `count` starts of windows that do not overlap, spread evenly over the split."""
        whole = len(self.check(split, length)) // length
        return np.arange(min(count, whole)) * whole // min(count, whole) * length

    def check(self, split, length):
        tokens = getattr(self, split)
        if len(tokens) < length:
            fail(f"the {split} split of {self.folder} has {len(tokens)} tokens, fewer than one context of {length}: "
                 f"prepare more text (python data/prepare.py --help) or lower --block_size")
        return tokens


def load_data(name):
    """Open data/<name> (or a folder given by its path) -> TokenData. A known one is prepared if missing."""
    if name in KNOWN and not (DATA_DIR / name / "meta.json").is_file():
        prepare([name])
    folder = next((f for f in (DATA_DIR / name, Path(name)) if (f / "meta.json").is_file()), None)
    if folder is None:
        fail(f"no data set {name!r} under {DATA_DIR}: make it with `python data/prepare.py SOURCE --name {name}`")
    meta = json.loads((folder / "meta.json").read_text())
    splits = {}
    for split, expected in zip(("train", "val"), meta["fingerprint"]):
        path, count = folder / f"{split}.bin", meta[f"{split}_tokens"]
        if fingerprint(path) != expected:
            fail(f"{path} is not, or no longer, what was prepared ({count:,} {meta['dtype']} tokens): prepare it again")
        splits[split] = np.memmap(path, dtype=meta["dtype"], mode="r") if count else np.empty(0, meta["dtype"])
    copy = folder / "tokenizer.tiktoken"   # a vocabulary that came as a file stays with its tokens
    if copy.is_file():
        meta["tokenizer"] = str(copy)
    return TokenData(folder, meta, get_tokenizer(meta["tokenizer"]), **splits)


def main():
    parser = Parser(description="Tokenize text into data/<name>/.")
    parser.add_argument("source", nargs="*", default=["stdlib"],
                        help=f"{', '.join(KNOWN)}, files or folders ({' '.join(SUFFIXES)}, .gz of these), or -")
    parser.add_argument("--name", help="name of the data set; None: from the source and the tokenizer")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, a tiktoken name, or a tiktoken-format file")
    parser.add_argument("--val_fraction", type=within(0, 1, float), help="share of documents held out; None: the source's, or 0.1")
    args = parser.parse_args()
    prepare(args.source, args.name, args.tokenizer, args.val_fraction)


if __name__ == "__main__":
    main()
