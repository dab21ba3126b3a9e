"""
Text to tokens on disk, data/<name>/{train.bin, val.bin, meta.json}, and to batches.

    python data/prepare.py                   # the standard library of this Python
    python data/prepare.py shakespeare       # or tinystories, wikitext103-test: downloaded
    python data/prepare.py notes/ book.txt --name mine --tokenizer gpt2   # your own text

A text becomes documents. Each is held out or not by a hash of its own bytes, so that adding
a file moves no other. Nothing here is needed to understand CALM.
"""
import argparse
import base64
import hashlib
import json
import sysconfig
import tempfile
import urllib.request
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent
DEFAULT_DATA = "site-packages" if torch.cuda.is_available() else "stdlib"
SUFFIXES = (".txt", ".md", ".py", ".jsonl")   # what is read in a folder
SEPARATOR = "<|endoftext|>"   # of documents, wherever it stands in a file
SECTION = 8 << 10     # characters: longer text is cut into documents of about this size
LONGEST = 128 << 10   # .md and .py are cut here: else parts of one file are in both splits

GITHUB = "https://raw.githubusercontent.com"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
DOWNLOADS = {
    "shakespeare": f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinystories": f"{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt",
    # What the authors of CALM evaluate on: all of it is held out.
    "wikitext103-test": f"{GITHUB}/shaochenze/calm/main/data/wikitext_document_level-test.json",
}
# The source of this Python: its library alone, or with all that is installed. Without tests,
# and what flatters BrierLM: generated tables, and copies, which would be in both splits.
PYTHON = {"stdlib": ["stdlib"], "site-packages": ["stdlib", "purelib"]}
NOT_READ = {"test", "tests", "idlelib", "encodings", "artifacts", "serialized_patterns", "_vendor",
            "vendor", "vendored", "extern", "_distutils", "site-packages", "dist-packages"}
KNOWN = (*PYTHON, *DOWNLOADS)


# --- Tokenizers: each is a tiktoken.Encoding ---

# Where Llama 3 splits: contractions, words, up to three digits, punctuation, blanks.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def get_tokenizer(name):
    """`bytes`, a tiktoken name (gpt2, ...), or a tiktoken-format file, as Llama 3's -> Encoding."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    try:
        if not Path(name).is_file():
            return tiktoken.get_encoding(name)   # which downloads it the first time
        pairs = [line.split() for line in Path(name).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except Exception as error:   # of many kinds
        raise SystemExit(f"no tokenizer {name!r} ({type(error).__name__}): expected bytes, a "
                         "tiktoken file, or, with a network, gpt2, o200k_base, ...")
    special = {f"<|reserved_{i}|>": len(ranks) + i for i in range(256)}
    special["<|endoftext|>"] = special.pop("<|reserved_0|>")   # Llama's <|begin_of_text|>
    return tiktoken.Encoding(Path(name).name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def tokenize(tokenizer, texts):
    """List of bytes -> list of ids for each."""
    if tokenizer.name == "bytes":
        return [np.frombuffer(text, np.uint8) for text in texts]
    return tokenizer.encode_ordinary_batch([text.decode() for text in texts])   # on all cores


# --- Sources: files, and the documents in them ---


def find_files(source):
    """A known name, a file, or a folder (without what is hidden) -> list of paths."""
    if source in DOWNLOADS:
        return [download(source)]
    if Path(source).is_file():
        return [Path(source)]
    known = source in PYTHON
    roots = [sysconfig.get_path(place) for place in PYTHON.get(source, [])] or [source]
    found = []
    for root in roots:
        for path in sorted(Path(root).rglob("*.py" if known else "*")):
            parts = path.relative_to(root).parts
            skipped = known and NOT_READ & set(parts) or any(part[0] == "." for part in parts)
            if path.suffix in SUFFIXES and path.is_file() and not skipped:
                found.append(path)
    if not found:
        raise SystemExit(f"no text at {source!r}: expected {', '.join(KNOWN)}, a file, or a folder "
                         f"with {', '.join(SUFFIXES)} files")
    return found


def download(name):
    """Fetch a known text, unless it is there already -> its path."""
    url = DOWNLOADS[name]
    path = DATA_DIR / "downloads" / f"{name}{Path(url).suffix}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".tmp")
        bar = tqdm(desc=f"download {name}", unit="B", unit_scale=True)
        try:
            urllib.request.urlretrieve(url, partial, lambda block, size, total: bar.update(size))
        except OSError as error:   # no network, or a connection that broke
            raise SystemExit(f"could not download {url} ({error}): fetch it yourself to {path}")
        partial.replace(path)
    return path


def documents(path, errors):
    """The documents of a file: of JSON lines each "text"; of other text what stands between
    separators, cut to size where it is long."""
    # utf-8-sig: without a byte order mark. newline: as the file has them.
    with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
        if path.suffix in (".json", ".jsonl"):
            yield from (json.loads(line)["text"] for line in file if line.strip())
            return

        limit = LONGEST if path.suffix in (".py", ".md") else SECTION
        rest = ""
        while block := file.read(1 << 20):
            *complete, rest = (rest + block).split(SEPARATOR)
            for text in complete:
                yield from sections(text, limit)
            # The last section may go on in the next block.
            *complete, rest = sections(rest, limit)
            yield from complete
        yield rest


def sections(text, limit):
    """Cut a text at line ends into parts of about `limit` characters."""
    # The last part may be longer, so that no separator that has begun at its end is cut.
    while len(text) > limit + len(SEPARATOR):
        end = text.rfind("\n", limit // 2, limit) + 1 or limit
        yield text[:end]
        text = text[end:]
    yield text


def read_all(paths, tokenizer, tabs):
    """The documents of all files as bytes, without blank ones. tabs: of four blanks, in code the
    commonest chunk by far, which flatters BrierLM."""
    # For the byte tokenizer bytes that are not UTF-8 pass through as they are.
    errors = "surrogateescape" if tokenizer == "bytes" else "strict"
    for path in paths:
        try:
            for text in documents(path, errors):
                text = text.replace("    ", "\t") if tabs else text
                if text.strip():
                    yield text.encode(errors=errors)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not UTF-8 (--tokenizer bytes takes any bytes), or "
                             f'JSON without "text": {error!r}')


# --- Preparing ---


def prepare(sources, name=None, tokenizer="bytes", val_fraction=0.1):
    """Tokenize known names, files and folders into data/<name>. A data set that is there is
    replaced when the new one is whole; a folder that is none is left alone."""
    enc = get_tokenizer(tokenizer)
    paths = [path for source in sources for path in find_files(source)]
    folder = (DATA_DIR / (name or Path(sources[0]).resolve().stem)).resolve()
    meta_path = folder / "meta.json"
    ours = meta_path.exists() and "fingerprint" in meta_path.read_text()
    if any(folder.glob("*")) and not ours:
        raise SystemExit(f"{folder} is no data set: move it away, or give another --name")
    texts = read_all(paths, tokenizer, tabs=sources[0] in PYTHON)
    val_fraction = 1 if sources[0] == "wikitext103-test" else val_fraction
    meta = {"tokenizer": str(Path(tokenizer).resolve()) if Path(tokenizer).is_file() else tokenizer,
            "vocab_size": enc.n_vocab, "eot": enc.eot_token,
            "dtype": np.min_scalar_type(enc.n_vocab).name}   # uint16 or uint32

    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        write_splits(Path(partial), iter(tqdm(texts, "prepare")), enc, meta, val_fraction)
        folder.mkdir(parents=True, exist_ok=True)
        meta_path.unlink(missing_ok=True)   # without it no data set is there
        for file in ("train.bin", "val.bin"):
            Path(partial, file).replace(folder / file)
    meta_path.write_text(json.dumps(meta, indent=1))
    print(f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation "
          f"tokens, {meta['documents']:,} documents")


def write_splits(folder, texts, enc, meta, val_fraction):
    """Write documents as they come, an eot token before each; count and checksum into meta."""
    meta |= {"documents": 0, "train_tokens": 0, "val_tokens": 0, "fingerprint": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        while batch := list(islice(texts, 256)):
            for text, ids in zip(batch, tokenize(enc, batch)):
                # In [0, 1), from the document alone, as good as random.
                fraction = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
                split = "val" if fraction < val_fraction else "train"
                written = np.concatenate([[meta["eot"]], ids]).astype(meta["dtype"]).tobytes()
                files[split].write(written)
                meta["fingerprint"] = zlib.crc32(written, meta["fingerprint"])
                meta[f"{split}_tokens"] += 1 + len(ids)
                meta["documents"] += 1
    if 0 < val_fraction < 1 and 0 in (meta["train_tokens"], meta["val_tokens"]):
        raise SystemExit(f"too little text: all documents ({meta['documents']}) fell on one side: "
                         "give more, or another --val_fraction, the share that is held out")


# --- Reading back ---


class TokenData:
    """A prepared data set, data/<name>. A known one is prepared first, if it is not there."""

    def __init__(self, name):
        self.folder = DATA_DIR / name   # an absolute path stays what it is
        meta_path = self.folder / "meta.json"
        if name in KNOWN and not meta_path.exists():
            prepare([name])
        if not meta_path.exists():
            raise SystemExit(f"no data set {name!r} in {DATA_DIR}: "
                             f"`python data/prepare.py SOURCE --name {name}` makes it")
        self.meta = {"name": name, **json.loads(meta_path.read_text())}   # a checkpoint keeps it
        self.tokenizer = get_tokenizer(self.meta["tokenizer"])
        # Opened once: what is prepared anew is another file.
        self.tokens = {split: np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], "r")
                       for split in ("train", "val") if self.meta[f"{split}_tokens"] > 0}

    def batch(self, split, offsets, length):
        """Tokens [o, o + length) for each offset o (B,) -> int64 (B, length)."""
        windows = np.stack([self.tokens[split][o:o + length] for o in offsets])
        return torch.from_numpy(windows.astype(np.int64))

    def random_offsets(self, count, length, seed):
        """`count` starts of training windows, a function of the seed alone."""
        starts = self.meta["train_tokens"] - length + 1
        return np.random.default_rng(seed).integers(0, starts, size=count)

    def even_offsets(self, count, length):
        """Up to `count` starts of validation windows that do not overlap, spread evenly."""
        windows = self.meta["val_tokens"] // length   # as many as there could be
        count = min(count, windows)
        return np.arange(count) * windows // count * length

    def document_numbers(self, positions):
        """The number of the document of the validation split that each position lies in."""
        begins = np.flatnonzero(self.tokens["val"] == self.meta["eot"])
        return np.searchsorted(begins, positions, side="right")

    def check_length(self, split, length):
        """End the program if a split is shorter than a window."""
        if self.meta[f"{split}_tokens"] < length:
            raise SystemExit(f"too little text: {self.folder}/{split}.bin is shorter than a "
                             f"window of {length} tokens: prepare more, or lower --block_size")


def main():
    parser = argparse.ArgumentParser(description="Tokenize text into data/<name>/.")
    add = parser.add_argument
    add("sources", nargs="*", default=["stdlib"], help=f"files, folders, or {', '.join(KNOWN)}")
    add("--name", help="name of the data set; by default that of the first source")
    add("--tokenizer", default="bytes", help="bytes, a tiktoken name, or a tiktoken-format file")
    add("--val_fraction", type=float, default=0.1, help="share of the documents held out")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
