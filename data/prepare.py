"""
Text to tokens on disk, data/<name>/{train.bin, val.bin, meta.json}, and from there to batches.

    python data/prepare.py                  # the standard library of this Python: no network needed
    python data/prepare.py books            # or shakespeare, tinystories, enwik8: downloaded
    python data/prepare.py notes/ book.txt.gz --name mine --tokenizer gpt2

A text becomes documents, also at each <|endoftext|> in it. Each document is held out for validation
or not by a hash of its own bytes, so that adding a file moves no other. On disk a border token
stands before each document. Tokens are written as they come: a text may be larger than memory.
"""
import base64
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath

# Run as a script, the first place that Python imports from is data/, and not the project.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from data.console import Parser, bar_options, clean_end, fail, remove_leftovers, temporary, within

DATA_DIR = Path(__file__).resolve().parent
FILES = ("train.bin", "val.bin", "meta.json")   # a data set: all that preparing it replaces
SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl")   # what is read in a folder
NOT_SEARCHED = {"node_modules", "venv", "__pycache__", "site-packages", "dist-packages"}
SECTION = 8 << 10     # bytes: a longer text is cut into documents of about this size
LONGEST = 128 << 10   # the same for .md and .py, so that none is most of the validation split
BATCH = 1 << 20       # bytes: a thread encodes as many at a time
LITTLE = 4 << 20      # bytes: with less text, the share that the hashes hold out is looked at
CONTROL = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})   # bytes that hardly occur in text

# name -> address; which files of it, if it is a zip archive; share of the documents for validation
DOWNLOADS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt", None, 0.1),
    "tinystories": ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
                    "TinyStoriesV2-GPT4-train.txt", None, 0.01),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "enwik8", 0.1),
    # English books of the authors A to F, 123 MB.
    "books": ("https://github.com/mlschmitt/classic-books-markdown/archive/"
              "944882722e9a96fa6cf2739dc2ea757e101f412f.zip", "*/[A-F]*/*.md", 0.1),
    # The file that the authors of CALM evaluate on.
    "wikitext103-test": ("https://raw.githubusercontent.com/shaochenze/calm/main/data/"
                         "wikitext_document_level-test.json", None, 1.0),
}
MADE_HERE = ("stdlib", "site-packages")   # from the Python that runs this
KNOWN = (*MADE_HERE, *DOWNLOADS)


# --- Tokenizers: each is a tiktoken.Encoding -----------------------------------------------

# Llama 3's pattern: contractions, words, numbers of up to three digits, punctuation, blanks.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def get_tokenizer(name):
    """`bytes`, a tiktoken name (gpt2, o200k_base, ...), or a tiktoken-format file -> Encoding.

    A file is read as Llama 3 reads its own: with its split pattern, and 256 special tokens behind
    the ranks.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    if Path(name).is_file():
        ranks = read_ranks(name)
        special = ["<|begin_of_text|>", "<|end_of_text|>"]
        special += [f"<|reserved_{i}|>" for i in range(254)]
        ids = {token: len(ranks) + i for i, token in enumerate(special)}
        return tiktoken.Encoding(f"./{Path(name).name}", pat_str=LLAMA3_PATTERN,
                                 mergeable_ranks=ranks, special_tokens=ids)
    names = tiktoken.list_encoding_names()
    if name not in names:
        fail(f"unknown tokenizer {name!r}: use bytes, a tiktoken-format file, "
             f"or one of {', '.join(names)}")
    try:
        return tiktoken.get_encoding(name)   # which downloads it the first time
    except Exception as error:
        fail(f"tiktoken could not download the vocabulary {name!r} ({type(error).__name__}): go "
             "online once, or point TIKTOKEN_CACHE_DIR at a folder that has it, or use "
             "--tokenizer bytes")


def read_ranks(path):
    """A tiktoken-format file -> {token: rank}. It is checked: tiktoken panics over a torn one."""
    try:
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        fail(f"{path} is not a tiktoken-format file (one `base64 rank` pair a line)")
    every_byte = all(bytes([i]) in ranks for i in range(256))
    if sorted(ranks.values()) != list(range(len(lines))) or not every_byte:
        fail(f"{path} is not a whole vocabulary: expected the ranks 0, 1, 2, ... "
             "and all 256 single bytes")
    return ranks


def vocabulary_of(tokenizer):
    """An Encoding as plain values, which data and checkpoints keep: they need no other file."""
    ranks = {token.decode("latin-1"): rank for token, rank in tokenizer._mergeable_ranks.items()}
    return {"pat_str": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens,
            "mergeable_ranks": ranks}


def tokenizer_from(meta):
    """The contents of a meta.json, which a checkpoint has too -> the Encoding."""
    vocabulary = dict(meta["vocabulary"])
    ranks = vocabulary.pop("mergeable_ranks")
    ranks = {token.encode("latin-1"): rank for token, rank in ranks.items()}
    return tiktoken.Encoding(meta["tokenizer"], mergeable_ranks=ranks, **vocabulary)


def border_token(tokenizer):
    """The id that stands before each document: there a text begins, and the one before ends."""
    if "<|begin_of_text|>" in tokenizer.special_tokens_set:   # Llama 3
        return tokenizer.encode_single_token("<|begin_of_text|>")
    return tokenizer.encode_single_token("<|endoftext|>")


def encode(tokenizer, text, source="the text"):
    """bytes -> list of ids. The byte tokenizer takes any bytes; the others need UTF-8."""
    if tokenizer.name == "bytes":
        return list(text)
    ids = []
    for part in strings(text, source):
        ids += tokenizer.encode_ordinary(part)
    return ids


def strings(text, source):
    """bytes -> list of strings of at most LONGEST characters: tiktoken dies of a million blanks."""
    try:
        text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"{source} is not UTF-8 (byte {error.start}): "
             "only --tokenizer bytes takes any bytes")
    return [text[start:start + LONGEST] for start in range(0, len(text), LONGEST)]


def encode_all(tokenizer, pairs):
    """Encode (path, document) pairs with all cores: threads will do, as tiktoken lets Python go on.
    Yields (document, ids), in their order; ids is an array. Only a few batches of documents are in
    memory at a time."""
    if tokenizer.name == "bytes":
        for _, text in pairs:
            yield text, np.frombuffer(text, np.uint8)
        return

    def encode_batch(batch):
        # A special token that is written out in a text is text like any other.
        return [(text, np.concatenate([tokenizer.encode_to_numpy(part, disallowed_special=())
                                       for part in parts])) for text, parts in batch]

    threads = torch.get_num_threads()   # as many as there are cores, or OMP_NUM_THREADS
    pool = ThreadPoolExecutor(threads)
    in_work = deque()
    try:
        for batch in batches((text, strings(text, path)) for path, text in pairs):
            in_work.append(pool.submit(encode_batch, batch))
            if len(in_work) > 2 * threads:
                yield from in_work.popleft().result()
        for done in in_work:
            yield from done.result()
    finally:
        pool.shutdown(cancel_futures=True)   # after Ctrl-C, what is not begun need not be done


def batches(pairs):
    """(document, anything) pairs -> lists of them, with about BATCH bytes of text in each."""
    batch = []
    size = 0
    for text, other in pairs:
        batch.append((text, other))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def decode(tokenizer, ids):
    """list of ids -> bytes. A model may draw ids that its tokenizer does not have, in a gap of the
    vocabulary or behind its end: they are left out."""
    parts = []
    for token in ids:
        with suppress(KeyError):
            parts.append(tokenizer.decode_single_token_bytes(token))
    return b"".join(parts)


# --- Sources: each is a stream of documents, which are bytes -------------------------------


class NotJSONLines(Exception):
    """A line is no JSON object with a string "text"."""


def documents(path):
    """The documents of one file, by its kind."""
    kind = kind_of(path)
    with open_source(path) as stream:
        if kind in (".json", ".jsonl"):
            yield from json_lines(stream, path)
            return
        first = stream.readline(1 << 24)   # whatever the name says, JSON lines are recognised
        if json_text(first) is not None:
            yield from json_lines(chain([first], stream), path)
        else:
            yield from pieces(stream, LONGEST if kind in (".md", ".py") else SECTION, first)


def kind_of(path):
    """The ending of a file's name in lower case, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_source(path):
    """A file, a file in a zip archive, or stdin -> an open binary stream."""
    stream = io.BufferedReader(sys.stdin.buffer) if str(path) == "-" else path.open("rb")
    if path.name.lower().endswith(".gz") or stream.peek(2)[:2] == b"\x1f\x8b":
        return gzip.open(stream)
    return stream


def json_lines(lines, path):
    """The "text" of each line's JSON object."""
    for number, line in enumerate(lines, 1):
        text = json_text(line)
        if text is not None:
            yield text
        elif line.strip():
            raise NotJSONLines(f"{path}, line {number}: "
                               'each line must be an object with a string "text"')


def json_text(line):
    """The string "text" of a line that is a JSON object -> bytes, or None if there is none."""
    try:
        return json.loads(line)["text"].encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def pieces(stream, limit, first=b""):
    """Cut a stream of bytes at every <|endoftext|>, and after about `limit` bytes without one.

    first: what has been read from the stream already.
    """
    buffer = b""
    block = first or stream.read(1 << 16)
    while block:
        *complete, buffer = (buffer + block).split(b"<|endoftext|>")
        yield from complete
        *complete, buffer = sections(buffer, limit)
        yield from complete
        block = stream.read(1 << 16)
    yield buffer


def sections(text, limit):
    """Cut a text into parts of about `limit` bytes."""
    start = 0
    while len(text) - start > limit:
        part = text[start:start + limit + 1]
        end = good_cut(part, limit)
        yield part[:end]
        start += end
    yield text[start:]


def good_cut(text, limit):
    """Where to cut near `limit`: after a blank line, else a line end, else between characters."""
    for border in (b"\n\n", b"\n"):
        at = text.rfind(border, limit // 2, limit)
        if at >= 0:
            return at + len(border)
    for at in range(limit, limit - 4, -1):
        if text[at] & 0xC0 != 0x80:   # not inside a UTF-8 character
            return at
    return limit


def python_source(known):
    """The .py files of this Python's standard library, for "site-packages" also of all that is
    installed -> list of paths.

    Tests are left out. So is what flatters BrierLM: the `encodings` and other generated tables,
    which are predictable, and copies of other packages, which are in both splits.
    """
    folders = sysconfig.get_paths()
    roots = [Path(folders["stdlib"])]
    if known == "site-packages":
        roots.append(Path(folders["purelib"]))
    skipped = {"test", "tests", "idlelib", "encodings", "artifacts", "serialized_patterns",
               "_vendor", "vendor", "vendored", "extern", "_distutils",
               "site-packages", "dist-packages", "__pycache__"}
    found = []
    for root in roots:
        found += [path for path in files_below(root, skipped) if path.suffix == ".py"]
    return found


def files_below(folder, skipped):
    """The files in a folder and below, without hidden folders and those of the names `skipped`."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        found += [Path(place, name) for name in names if os.path.isfile(Path(place, name))]
    return sorted(found)


def local_files(sources, enc):
    """Files, whatever their names; folders, which are searched for text; - is stdin.

    -> list of paths, and what of the folders is left out: {why: names}
    """
    paths = []
    left_out = {}
    for source in map(str, sources):
        path = Path(source)
        if source != "-" and not (source and path.exists()):
            fail(f"no data at {source!r}: give files, folders, - for stdin, "
                 f"or alone {', '.join(KNOWN)}")
        found = text_files(path, enc, left_out) if path.is_dir() else [path]
        if not found:
            fail(f"{source} holds no text: expected {', '.join(SUFFIXES)} files "
                 f"(or .gz of these){summary(left_out)}")
        paths += found
    return paths, left_out


def text_files(folder, enc, left_out):
    """The files in a folder and below that can be read as text. The others go to `left_out`."""
    found = []
    for path in tqdm(files_below(folder, NOT_SEARCHED), desc="look", delay=2):
        if path.name in FILES:   # of tokens beside the text
            continue
        if kind_of(path) in SUFFIXES:
            fault = fault_of(path, enc)
            name = path.name
        else:
            fault = "with other endings"
            name = path.suffix or path.name
        if fault:
            left_out.setdefault(fault, []).append(name)
        else:
            found.append(path)
    return found


def fault_of(path, enc):
    """Why a file cannot be read as text, or None. To know this it is read, from end to end."""
    try:
        for text in documents(path):
            if hardly_text(text):
                return "not text"
            if enc.name != "bytes":
                text.decode("utf-8")
    except NotJSONLines:
        return "not JSON lines"
    except UnicodeDecodeError:
        return "not UTF-8"
    except Exception:   # whatever is wrong in the file
        return "not readable"


def summary(left_out):
    """{why: names} -> "; files left out: 12 with other endings (.png, .html, ...)", or nothing."""
    parts = []
    for why, names in left_out.items():
        examples = list(dict.fromkeys(names))
        more = ", ..." if len(examples) > 3 else ""
        parts.append(f"{len(names):,} {why} ({', '.join(examples[:3])}{more})")
    return f"; files left out: {', '.join(parts)}" if parts else ""


def downloaded(name):
    """The files of a known download -> list of paths. It is fetched if there is no copy of it; a
    copy that bears its name is whole."""
    url, wanted, _ = DOWNLOADS[name]
    path = DATA_DIR / "downloads" / (name + (".zip" if wanted else ".txt"))
    if not path.exists():
        download(name, url, path)
    return files_in_archive(path, wanted) if wanted else [path]


def files_in_archive(path, wanted):
    """The files in a zip archive whose names match a pattern -> list of paths."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        fail(f"{path} could not be read ({error}): delete it, to download it again")
    names = [name for name in archive.namelist() if fnmatchcase(name, wanted)]
    return [zipfile.Path(archive, name) for name in sorted(names, key=PurePosixPath)]


def download(name, url, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    part = temporary(path)   # another process may fetch it, too
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as out:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(out, "write", total=size or None, desc=f"download {name}",
                                  **bar_options()) as file:
                shutil.copyfileobj(response, file)
            if size and out.tell() != size:
                raise OSError(f"got {out.tell()} of {size} bytes")
        part.replace(path)
    except Exception as error:   # no network, a broken connection
        fail_if_full(error, path)
        fail(f"could not download {url} ({error}): check the network, "
             f"or fetch it yourself to {path}")
    finally:
        part.unlink(missing_ok=True)


# --- Preparing -----------------------------------------------------------------------------


def prepare(sources=("stdlib",), name=None, tokenizer="bytes", val_fraction=None, out_root=None):
    """Tokenize `sources` into out_root/<name> (default: data/<name>) -> that folder.

    The same input gives the same bytes. FILES are replaced once the new ones are whole, and
    nothing else is ever touched.
    """
    known = sources[0] if len(sources) == 1 and sources[0] in KNOWN else None
    enc = get_tokenizer(tokenizer)
    if name is None:
        name = default_name(sources[0], tokenizer)
        if name in KNOWN and not known and Path(sources[0]).exists():
            fail(f"{sources[0]} would replace the known data set {name!r}: give it a --name")
    if not re.fullmatch(r"\w[\w.-]*", name):
        fail(f"--name {name!r} must be the name of one folder: letters, digits, "
             "and . - _ behind the first")
    folder = Path(out_root or DATA_DIR) / name
    left_out = {}
    if known in DOWNLOADS:
        paths = downloaded(known)
    elif known:
        paths = python_source(known)
    else:
        paths, left_out = local_files(sources, enc)
    sources_there = {os.path.realpath(str(path)) for path in paths}
    replaced = {os.path.realpath(folder / file) for file in FILES}
    for path in sources_there & replaced:
        fail(f"{path} is a file that preparing {name} replaces: give another --name")
    check_is_ours(folder)
    if val_fraction is None:
        val_fraction = DOWNLOADS[known][2] if known in DOWNLOADS else 0.1

    meta = {"name": name, "sources": [Path(s).name for s in sources],
            "val_fraction": val_fraction, "tokenizer": enc.name, "vocab_size": enc.n_vocab,
            "border": border_token(enc)}
    write_data(folder, meta, read_all(paths, known), enc)
    print(f"{folder}: {meta['documents']:,} documents, {meta['train_tokens']:,} training and "
          f"{meta['val_tokens']:,} validation tokens{summary(left_out)}")
    return folder


def check_is_ours(folder):
    """Fail if a folder has files of the names that preparing replaces, but no data set of ours."""
    there = [file for file in FILES if (folder / file).exists()]
    with suppress(OSError, ValueError, AttributeError):
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("checksum", None) == checksum(meta):
            return
    if there:
        fail(f"{folder} holds {', '.join(there)} of another origin: move that away, "
             "or give another --name")


def write_data(folder, meta, texts, enc):
    """Write (path, document) pairs as FILES into a folder. meta: meta.json, which is completed."""
    remove_leftovers(folder)
    remove_leftovers(folder.parent)
    partial = temporary(folder / "tokens" if folder.exists() else folder)
    try:
        partial.mkdir()
        meta.update(write_splits(partial, texts, enc, meta["val_fraction"]))
        meta["vocabulary"] = vocabulary_of(enc)
        meta["checksum"] = checksum(meta)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items()]
        (partial / "meta.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        folder.mkdir(exist_ok=True)
        for file in FILES:
            (partial / file).replace(folder / file)
    except OSError as error:
        fail_if_full(error, folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fail_if_full(error, path):
    """Fail with a clear line if an error says that the disk is full."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        fail(f"disk full: {path} could not be written: free some space, and try again")


def default_name(source, tokenizer):
    """stdlib, shakespeare, the stem of a path; then the tokenizer's, unless it is the default."""
    base = "stdin" if source == "-" else Path(os.path.abspath(source)).name.split(".")[0]
    name = base if tokenizer == "bytes" else f"{base}-{Path(tokenizer).stem}"
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".-") or "data"


def read_all(paths, known):
    """(path, document) of every file, with a progress bar. Blank documents are left out."""
    size = sum(map(size_of, paths))
    with tqdm(total=size or None, unit="B", unit_scale=True, desc="prepare",
              **bar_options()) as bar:
        for path in paths:
            warned = False
            try:
                for text in documents(path):
                    bar.update(len(text))
                    if known in MADE_HERE:
                        # Else the commonest chunk by far is four blanks, which flatters BrierLM.
                        text = text.replace(b"    ", b"\t")
                    if not warned and hardly_text(text):
                        warned = True
                        tqdm.write(f"warning: {path} is hardly text: if it is, save it as UTF-8",
                                   sys.stderr)
                    if text.strip():
                        yield path, text
            except NotJSONLines as error:
                fail(error)
            except Exception as error:   # whatever is wrong in the file
                advice = "is it whole?"
                if known in DOWNLOADS:
                    advice = "delete it, to download it again"
                fail(f"{path} could not be read ({type(error).__name__}: {error}): {advice}")


def size_of(path):
    """Bytes of text in a file; 0 where only reading it would tell."""
    if isinstance(path, zipfile.Path):
        return path.root.getinfo(path.at).file_size
    known = path.is_file() and path.suffix.lower() != ".gz"
    return path.stat().st_size if known else 0


def hardly_text(text):
    """Does it begin as UTF-16 does, or is over a twentieth of it control characters?"""
    rare = len(text) - len(text.translate(None, CONTROL))
    return rare > len(text) / 20 or text[:2] in (b"\xff\xfe", b"\xfe\xff")


def hold_out(texts, val_fraction):
    """Decide which (path, document) pairs become validation -> pairs, and a bound: those are held
    out whose fraction_of is below it.

    The bound is val_fraction. Of little text it may hold out nothing, or most of the text: if
    so, they are cut into about twenty parts (fewer, if the text is short), and the bound is such
    that the right number of parts is below it.
    """
    pairs = []
    total = 0
    for path, text in texts:
        pairs.append((path, text))
        total += len(text)
        if total >= LITTLE:
            break
    wanted = val_fraction * total
    most = (1 + val_fraction) / 2 * total
    held = bytes_below(val_fraction, pairs)
    if total >= LITTLE or wanted / 2 <= held <= min(2 * wanted, most):
        return chain(pairs, texts), val_fraction

    limit = max(min(SECTION, total // 20 + 1), 1 << 10)
    parts = []
    for path, text in pairs:
        parts += [(path, part) for part in sections(text, limit) if part.strip()]
    held = 0
    for bound, part in sorted((fraction_of(part), part) for _, part in parts):
        if held >= wanted:
            break
        held += len(part)   # it is below the next bound; the last part is below none
    if bytes_below(bound, parts) > most:   # the text repeats one part over and over
        bound = 0.0
    return parts, bound


def bytes_below(bound, pairs):
    """How many bytes of (path, document) pairs such a bound holds out."""
    return sum(len(text) for _, text in pairs if fraction_of(text) < bound)


def write_splits(folder, texts, enc, val_fraction):
    """Write (path, document) pairs into train.bin and val.bin as they come -> part of meta.json.

    If one of the two stays empty, it becomes a copy of the other.
    """
    sizes = (np.uint8, np.uint16, np.uint32)
    dtype = next(d for d in sizes if enc.n_vocab <= np.iinfo(d).max + 1)
    border = dtype(border_token(enc)).tobytes()
    documents = 0
    tokens = {"train": 0, "val": 0}
    hashes = {split: hashlib.sha256() for split in tokens}
    pairs, bound = hold_out(texts, val_fraction)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for text, ids in encode_all(enc, pairs):
            split = "val" if fraction_of(text) < bound else "train"
            written = border + ids.astype(dtype).tobytes()
            (val if split == "val" else train).write(written)
            hashes[split].update(written)
            tokens[split] += 1 + len(ids)
            documents += 1
    if documents == 0:
        fail("no text there: empty files cannot be prepared")
    repeats = 0 < val_fraction < 1 and 0 in tokens.values()
    if repeats:
        full, empty = sorted(tokens, key=tokens.get, reverse=True)
        print(f"warning: too little text to hold some out: {empty}.bin repeats {full}.bin",
              file=sys.stderr)
        shutil.copyfile(folder / f"{full}.bin", folder / f"{empty}.bin")
        tokens[empty] = tokens[full]
        hashes[empty] = hashes[full]
    return {"dtype": np.dtype(dtype).name, "documents": documents,
            "train_tokens": tokens["train"], "val_tokens": tokens["val"],
            "val_repeats_train": repeats,
            # Hashes of all bytes: they say which text a model was trained on.
            "fingerprint": [hashes[split].hexdigest()[:16] for split in ("train", "val")],
            # Hashes of a few blocks: they tell quickly whether a file has changed.
            "spot_check": [spot_check(folder / f"{split}.bin") for split in ("train", "val")]}


def fraction_of(text):
    """A number in [0, 1), made from the document alone and as good as random."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def spot_check(path):
    """A hash of a file's size and of 64 blocks of 16 KB, evenly spread over it; of all of it up to
    1 MB. The time does not depend on the size."""
    block = 1 << 14
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(max(size - block, 0) * i // 63)
            found.update(file.read(block))
    return found.hexdigest()[:16]


def checksum(meta):
    """A hash of the contents of a meta.json."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]


# --- Reading back --------------------------------------------------------------------------


@dataclass
class TokenData:
    """A prepared data set. `train` and `val` are memory maps of token ids."""
    folder: Path
    meta: dict
    tokenizer: tiktoken.Encoding
    train: np.ndarray
    val: np.ndarray

    @property
    def val_repeats_train(self):
        """Is the validation text the training text? It is if there was too little to hold out."""
        return self.meta.get("val_repeats_train", False)   # an older data set does not say

    def batch(self, split, offsets, length):
        """Tokens [o, o + length) for each offset o (B,) -> int64 (B, length)."""
        tokens = getattr(self, split)
        windows = np.stack([tokens[o:o + length] for o in offsets])
        return torch.from_numpy(windows.astype(np.int64))

    def random_offsets(self, split, count, length, seed):
        """`count` window starts, a function of the seed alone: an exact resume saves nothing."""
        self.check_length(split, length)
        starts = len(getattr(self, split)) - length + 1
        return np.random.default_rng(seed).integers(0, starts, size=count)

    def even_offsets(self, split, count, length):
        """Up to `count` starts of windows that do not overlap, spread evenly over the split."""
        self.check_length(split, length)
        windows = len(getattr(self, split)) // length   # as many as there could be
        count = min(count, windows)
        return np.arange(count) * windows // count * length

    def document_start(self):
        """The end of a document, and the border before the next one -> 256 ids at the most."""
        return [*self.train[-255:].tolist(), self.meta["border"]]

    @cached_property
    def val_borders(self):
        """Where each document of the validation split begins -> positions in it."""
        border = self.meta["border"]
        block = 1 << 24
        found = [start + np.flatnonzero(self.val[start:start + block] == border)
                 for start in range(0, len(self.val), block)]
        return np.concatenate(found)

    def document_numbers(self, positions):
        """The number of the document of the validation split that each position lies in."""
        return np.searchsorted(self.val_borders, positions, side="right")

    def check_length(self, split, length):
        """Fail if a split is shorter than one window."""
        tokens = len(getattr(self, split))
        if tokens < length:
            fail(f"{self.folder}/{split}.bin has {tokens} tokens, fewer than one context of "
                 f"{length}: prepare more text, or use a shorter context")


def load_data(name):
    """Open data/<name>, or a folder by its path -> TokenData. A known one is prepared first."""
    if name in KNOWN and not (DATA_DIR / name / "meta.json").is_file():
        prepare([name])
    places = [DATA_DIR / name, Path(name)]
    there = [place for place in places if (place / "meta.json").is_file()]
    if not there:
        fail(f"no data set {name!r} under {DATA_DIR}: "
             f"`python data/prepare.py SOURCE --name {name}` makes it")
    folder = there[0]
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("checksum") != checksum(meta):
            raise ValueError("a value in it has changed")
        if "spot_check" not in meta:
            fail(f"{folder} is of an earlier version of this project: prepare it anew (the same "
                 "text makes the same data set)")
        splits = {}
        for split, expected in zip(("train", "val"), meta["spot_check"]):
            path = folder / f"{split}.bin"
            if not path.is_file() or spot_check(path) != expected:
                raise ValueError(f"{path.name} is not, or no longer, what was prepared")
            if meta[f"{split}_tokens"] > 0:
                splits[split] = np.memmap(path, meta["dtype"], "r")
            else:   # which cannot be mapped
                splits[split] = np.empty(0, meta["dtype"])
        tokenizer = tokenizer_from(meta)
    except Exception as error:   # whatever is wrong in the files
        fail(f"{folder}: meta.json or tokens damaged, or old ({type(error).__name__}: {error}): "
             "prepare anew")
    # A data set in data/ is known by its name, wherever the project moves.
    inside = folder.absolute().parent == DATA_DIR
    meta["name"] = folder.absolute().name if inside else str(folder)
    return TokenData(folder, meta, tokenizer, **splits)


def main():
    with clean_end():
        parser = Parser(description="Tokenize text into data/<name>/.")
        add = parser.add_argument
        add("source", nargs="*", default=["stdlib"],
            help=f"{', '.join(KNOWN)}; or files, folders; - for stdin "
                 "(text ends at each <|endoftext|>)")
        add("--name", help="name of the data set; None: from the source and the tokenizer")
        add("--tokenizer", default="bytes",
            help="bytes, a tiktoken name, or a tiktoken-format file")
        add("--val_fraction", type=within(0, 1, float),
            help="share of documents held out; None: the source's")
        args = parser.parse_args()
        prepare(args.source, args.name, args.tokenizer, args.val_fraction)


if __name__ == "__main__":
    main()
