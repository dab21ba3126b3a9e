"""Text to tokens and back: every source, every tokenizer, nothing left half done."""
import base64
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

import data.prepare
from data.console import remove_leftovers, temporary
from data.prepare import (DOWNLOADS, FILES, decode, encode, get_tokenizer, load_data, pieces,
                          prepare)
from helpers import ROOT, assert_one_line


def decoded(folder, split="train"):
    """The documents of a split, as bytes."""
    data = load_data(str(folder))
    documents = []
    for token in getattr(data, split).tolist():
        if token == data.meta["border"]:   # the first token, too
            documents.append([])
        else:
            documents[-1].append(token)
    return [decode(data.tokenizer, document) for document in documents]


def json_lines(texts):
    """Bytes -> a file with a JSON object for each."""
    return b"".join(json.dumps({"text": text.decode()}).encode() + b"\n" for text in texts)


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def vocabulary(tmp_path):
    """A tiktoken-format file: the 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    path = tmp_path / "small.model"
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


# --- Sources -------------------------------------------------------------------------------
def test_the_standard_library_is_the_default_with_tabs_for_blanks(data_dir):
    assert prepare(out_root=data_dir) == data_dir / "stdlib"
    stdlib = load_data("stdlib")
    assert stdlib.meta["vocab_size"] == 257 and stdlib.meta["train_tokens"] > 5_000_000
    assert 0.02 < stdlib.meta["val_tokens"] / stdlib.meta["train_tokens"] < 0.3
    text = decode(stdlib.tokenizer, stdlib.train[:200_000].tolist()).decode()
    assert "\n\tdef " in text and "    " not in text


def test_site_packages_adds_the_source_of_installed_packages(data_dir, tmp_path, monkeypatch):
    for path in ("lib/json.py", "lib/test/test_json.py", "lib/site-packages/torch.py",
                 "lib/site-packages/torch/tests/big.py", "lib/site-packages/torch/data.bin",
                 "lib/site-packages/pip/_vendor/six.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"def {Path(path).stem}():\n    return 1\n")
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "lib" / "site-packages"}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    for name, stems in (("stdlib", ["json"]), ("site-packages", ["json", "torch"])):
        folder = prepare([name], val_fraction=0.0, out_root=data_dir)
        assert decoded(folder) == [b"def %s():\n\treturn 1\n" % stem.encode() for stem in stems]


def test_every_kind_of_file_and_stdin(data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("plain text")
    (folder / "b.md").write_text("# markdown")
    (folder / "c.py").write_text("if x:\n    y()")
    (folder / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "\\u00e9 two", "more": 1}\n')
    (folder / "ignored.bin").write_text("not text")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"compressed"))
    out = prepare([folder], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"plain text", b"# markdown", b"if x:\n    y()", b"one",
                            "é two".encode(), b"compressed"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"from stdin")))
    assert decoded(prepare(["-"], val_fraction=0, out_root=data_dir)) == [b"from stdin"]


def test_what_is_no_text_in_a_folder_is_left_out_and_counted(data_dir, tmp_path, run):
    folder = tmp_path / "notes"
    files = {"a.md": b"mine", "package.json": b'{\n"name": "x"}', "cut.txt.gz": PACKED[:-20],
             "utf16.txt": "mine".encode("utf-16"), "page.html": b"<p>", "sub/Makefile": b"all:",
             ".git/info.txt": b"theirs", "node_modules/x/readme.md": b"theirs",
             "sub/.venv/site-packages/y.py": b"theirs"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    result = run(data.prepare, folder, "--val_fraction", 0)
    assert decoded(data_dir / "notes") == [b"mine"]
    assert result.out.endswith(
        "; files left out: 1 not readable (cut.txt.gz), 1 not JSON lines (package.json), "
        "2 with other endings (.html, Makefile), 1 not text (utf16.txt)\n")
    hidden = prepare([folder / ".git"], val_fraction=0, out_root=data_dir)   # named: searched
    assert decoded(hidden) == [b"theirs"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_stdin_and_txt_may_be_json_lines_or_packed(pack, data_dir, tmp_path, run):
    lines = json_lines([b"one", b"two\nlines"])
    (tmp_path / "lines.txt").write_bytes(pack(lines))
    for source in ("-", tmp_path / "lines.txt"):
        run(data.prepare, source, "--name", "t", "--val_fraction", 0, stdin=pack(lines))
        assert decoded(data_dir / "t") == [b"one", b"two\nlines"]
    run(data.prepare, "-", "--name", "t", "--val_fraction", 0, stdin=pack(b"{} is no text\n"))
    assert decoded(data_dir / "t") == [b"{} is no text\n"]


def test_long_text_is_cut_at_good_places_and_loses_nothing():
    random.seed(0)
    lines = "".join("é" * random.randrange(200) + "\n" * random.randrange(1, 3)
                    for _ in range(2000)).encode()
    letters = "é".encode() * 30_000
    for text in (lines, letters, bytes([0x80]) * 30_000, b"a<|endoftext|>b<|endoftext|>" * 9):
        cut = list(pieces(io.BytesIO(text), 8192))
        assert b"".join(cut) == text.replace(b"<|endoftext|>", b"")
        assert max(map(len, cut)) <= 8192 + 1
    assert all(piece.endswith(b"\n") for piece in list(pieces(io.BytesIO(lines), 8192))[:-1])
    assert all(piece.decode() for piece in pieces(io.BytesIO(letters), 8191))   # none is torn


# --- Documents and splits ------------------------------------------------------------------
def test_a_document_keeps_its_split_when_others_come_and_go(data_dir, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.md").write_text(f"document number {i}")
    before = set(decoded(prepare([folder], "a", val_fraction=0.5, out_root=data_dir), "val"))
    for i in range(0, 100, 2):
        (folder / f"{i:03}.md").unlink()
    after = set(decoded(prepare([folder], "b", val_fraction=0.5, out_root=data_dir), "val"))
    assert 20 < len(before) < 80
    assert after == {text for text in before if int(text.split()[-1]) % 2}


def test_text_that_cannot_be_split_validates_on_itself_and_says_so(data_dir, tmp_path, capsys):
    (tmp_path / "one.md").write_text("a single document")
    out = prepare([tmp_path / "one.md"], out_root=data_dir)
    assert decoded(out, "train") == decoded(out, "val")
    assert "warning" in capsys.readouterr().err
    assert load_data("one").val_repeats_train


@pytest.mark.parametrize("kind, size", [("md", 80_000), ("txt", 40_000), ("py", 5000)])
@pytest.mark.parametrize("seed", range(3))
def test_of_a_single_file_a_tenth_is_held_out(kind, size, seed, data_dir, tmp_path):
    random.seed(seed)
    lines = [b"%d\n" % random.randrange(10**60) for _ in range(size // 60)]
    (tmp_path / f"one.{kind}").write_bytes(b"".join(lines))
    out = prepare([tmp_path / f"one.{kind}"], out_root=data_dir)
    held = b"".join(decoded(out, "val"))
    assert 0.09 < len(held) / size < 0.25 and not load_data("one").val_repeats_train
    assert sorted((b"".join(decoded(out)) + held).splitlines(keepends=True)) == sorted(lines)


def test_batches_are_the_text_at_the_offsets(foxes):
    data = load_data(foxes)
    batch = data.batch("train", [0, 7], 20)
    assert batch.tolist() == [data.train[:20].tolist(), data.train[7:27].tolist()]
    assert str(batch.dtype) == "torch.int64"
    drawn = data.random_offsets("train", 5, 20, (0, 3))
    assert np.array_equal(drawn, data.random_offsets("train", 5, 20, (0, 3)))
    assert not np.array_equal(drawn, data.random_offsets("train", 5, 20, (0, 4)))
    offsets = data.even_offsets("val", 10, 50)
    assert len(offsets) == 10 and (np.diff(offsets) >= 50).all()
    assert offsets[-1] + 50 <= len(data.val)


# --- Tokenizers ----------------------------------------------------------------------------

ODD = ["\0", "\u2028", "\ufeff", "\r\n", "<|end_of_text|>", "<|reserved_0|>", " " * 9, "\t\n\n",
       "é", "中文", "😀", "\ue000", "x" * 20_000, "naïve"]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_odd_text_round_trips_through_every_tokenizer(kind, data_dir, tmp_path, vocabulary):
    """From many corners of Unicode, with long lines, and what looks like special tokens."""
    name = "bytes" if kind == "bytes" else str(vocabulary)
    random.seed(0)
    texts = {"".join(random.sample(ODD, len(ODD))) for _ in range(20)}
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "", " \n"]]
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    out = prepare([tmp_path / "odd.jsonl"], tokenizer=name, val_fraction=0.3, out_root=data_dir)
    found = decoded(out, "train") + decoded(out, "val")
    assert {document.decode() for document in found} == texts


def test_a_million_blanks_are_encoded(vocabulary):
    enc = get_tokenizer(str(vocabulary))
    text = b" " * 1_000_000 + b"a"
    assert decode(enc, encode(enc, text)) == text


def test_several_threads_encode_as_one_does(vocabulary, monkeypatch):
    """In the order of the text, and what looks like a special token as text."""
    monkeypatch.setattr(data.prepare, "BATCH", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    enc = get_tokenizer(str(vocabulary))
    random.seed(0)
    texts = ["".join(random.sample(ODD, 9)).encode() for _ in range(200)]
    found = list(data.prepare.encode_all(enc, [(None, text) for text in texts]))
    assert [text for text, _ in found] == texts
    assert all(ids.tolist() == encode(enc, text) for text, ids in found)


def test_a_tokenizer_file_is_kept_with_the_tokens(data_dir, tmp_path, vocabulary):
    """Its merges are used, <|begin_of_text|> is the border, and the file is not needed again."""
    text = tmp_path / "story.txt"
    text.write_text("the thing in the thick of it, naïve 😀\n\n" * 50)
    out = prepare([text], tokenizer=str(vocabulary), val_fraction=0, out_root=data_dir)
    assert out.name == "story-small"
    vocabulary.unlink()
    data = load_data("story-small")
    assert data.meta["vocab_size"] == 261 + 256 and data.meta["dtype"] == "uint16"
    assert data.meta["border"] == data.tokenizer.encode_single_token("<|begin_of_text|>") == 261
    assert b"".join(decoded(out)) == text.read_bytes()
    assert len(data.train) < len(text.read_bytes())
    assert str(tmp_path) not in json.dumps(data.meta)
    assert decode(data.tokenizer, [257, 10_000, 258]) == b"the the"   # 10,000 is no token


def test_ids_in_a_gap_of_a_vocabulary_are_left_out_of_the_text():
    ranks = {bytes([i]): i for i in range(256)}
    enc = tiktoken.Encoding("gap", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                            special_tokens={"<|endoftext|>": 300})
    assert decode(enc, [97, 256, 98, 299, 300, 301, 99]) == b"ab<|endoftext|>c"


def test_dtype_follows_the_vocabulary(data_dir, tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("hello " * 100)
    for size, dtype in ((256, "uint8"), (60_000, "uint16"), (128_256, "uint32")):
        ranks = {bytes([i]): i for i in range(255)}
        enc = tiktoken.Encoding("x", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                special_tokens={"<|endoftext|>": size - 1})
        monkeypatch.setattr(data.prepare, "get_tokenizer", lambda name: enc)
        prepare([text], "t", tokenizer="x", val_fraction=0, out_root=data_dir)
        assert load_data("t").train.dtype == dtype and load_data("t").train[0] == size - 1


def test_a_vocabulary_that_cannot_be_downloaded_is_said(data_dir, tmp_path, run, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", disk_full)   # any OSError
    (tmp_path / "t.txt").write_text("text")
    result = run(data.prepare, tmp_path / "t.txt", "--tokenizer", "gpt2")
    assert_one_line(result, "could not download the vocabulary 'gpt2'")


# --- Downloads, from a server on this machine ----------------------------------------------
@pytest.fixture
def server(monkeypatch):
    """serve(name, body): what DOWNLOADS[name] gets, from the loopback interface."""
    pages = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, length = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()

    def serve(name, body, length=None):
        pages[f"/{name}"] = (body, len(body) if length is None else length)
        url = f"http://127.0.0.1:{http.server_port}/{name}"
        monkeypatch.setitem(DOWNLOADS, name, (url, *DOWNLOADS[name][1:]))

    yield serve
    http.shutdown()


def zipped(texts):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, text in texts.items():
            archive.writestr(member, text)
    return buffer.getvalue()


def test_downloads_are_prepared(data_dir, server):
    server("shakespeare", b"First Citizen:\nBefore we proceed any further, hear me.\n\n" * 2000)
    out = prepare(["shakespeare"], out_root=data_dir)
    assert len(decoded(out)) > 5 and len(decoded(out, "val")) > 0
    server("tinystories", b"Once upon a time.\n<|endoftext|>\nThe end.\n<|endoftext|>\n")
    out = prepare(["tinystories"], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"Once upon a time.\n", b"\nThe end.\n"]
    server("enwik8", zipped({"enwik8": b"<page>text</page>\n" * 5000}))
    out = prepare(["enwik8"], val_fraction=0, out_root=data_dir)
    assert b"".join(decoded(out)) == b"<page>text</page>\n" * 5000


def test_books_are_the_authors_a_to_f_of_an_archive(data_dir, server, tmp_path):
    """The same data set, byte for byte, as from their folders."""
    titles = {"Aesop/Fables.md": "The Fox", "Aesop B/Z.md": "A", "Émile Zola/N.md": "no",
              "Fyodor Dostoevsky/The Idiot.md": "Prince Myshkin, é", "G. K. Chesterton/M.md": "no",
              "Aesop/cover.png": "no", "README.md": "no"}
    for title, text in titles.items():
        path = tmp_path / "commit" / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    server("books", zipped({f"commit/{title}": text for title, text in titles.items()}))
    out = prepare(["books"], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"The Fox", b"A", "Prince Myshkin, é".encode()]
    folders = sorted((tmp_path / "commit").glob("[A-F]*/"))
    again = prepare(folders, name="again", val_fraction=0, out_root=data_dir)
    assert (again / "train.bin").read_bytes() == (out / "train.bin").read_bytes()


def test_wikitext_is_one_document_an_article_all_for_validation(data_dir, server):
    articles = [b" = First = \n \n W . \n \n = = Section = = \n \n M . \n",
                b" = Second = \n \n W \n"]
    server("wikitext103-test", json_lines(articles))
    out = prepare(["wikitext103-test"], out_root=data_dir)
    assert decoded(out, "val") == articles and decoded(out, "train") == []


def test_a_broken_download_leaves_nothing_that_looks_finished(data_dir, server, run):
    server("shakespeare", b"half a text", length=22)
    assert_one_line(run(data.prepare, "shakespeare"), "could not download")
    assert not list((data_dir / "downloads").iterdir()) and not (data_dir / "shakespeare").exists()


@pytest.mark.parametrize("content", [b"no zip", zipped({"enwik8": b"text" * 999})[:-30]])
def test_a_damaged_copy_of_a_download_is_named_and_kept(content, data_dir, run):
    copy = data_dir / "downloads" / "enwik8.zip"
    copy.parent.mkdir()
    copy.write_bytes(content)
    result = run(data.prepare, "enwik8")
    assert_one_line(result, "enwik8.zip could not be read")
    assert "delete it" in result.err
    assert copy.read_bytes() == content and not (data_dir / "enwik8").exists()


# --- Bad input: one line, exit code 2 ------------------------------------------------------

WHOLE = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
PACKED = gzip.compress(random.Random(0).randbytes(3000))
BAD_FILES = {
    "good.txt": b"text",
    "empty.txt": b"",
    "latin.txt": "é".encode("latin-1"),
    "shakespeare.txt": b"text",
    "bad.jsonl": b'{"text": "a"}\n{"words": "b"}\n',
    "cut.txt.gz": PACKED[:-20],
    "whole.model": WHOLE,
    "gap.model": WHOLE + b"dGhlcmU= 257\n",
}
BAD = {
    "no data": (["nowhere.txt"], "no data at 'nowhere.txt'"),
    "empty file": (["empty.txt"], "no text there"),
    "folder without text": (["pictures"], "expected .txt"),
    "a known one among others": (["stdlib", "good.txt"], "or alone stdlib"),
    "the name of a known one": (
        ["shakespeare.txt"], "would replace the known data set 'shakespeare': give it a --name"),
    "parent": (["good.txt", "--name", ".."], "--name '..' must be the name of one folder"),
    "not UTF-8": (["latin.txt", "--tokenizer", "whole.model"], "latin.txt is not UTF-8"),
    "no text field": (["bad.jsonl"], "bad.jsonl, line 2"),
    "cut .gz": (["cut.txt.gz"], "cut.txt.gz could not be read (EOFError"),
    "fraction": (["good.txt", "--val_fraction", "1.5"], "--val_fraction"),
    "unknown tokenizer": (["good.txt", "--tokenizer", "gpt99"], "unknown tokenizer 'gpt99'"),
    "a text for a vocabulary": (
        ["good.txt", "--tokenizer", "bad.jsonl"], "not a tiktoken-format file"),
    "a gap in the ranks": (["good.txt", "--tokenizer", "gap.model"], "is not a whole vocabulary"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, data_dir, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    flags, message = BAD[case]
    assert_one_line(run(data.prepare, *flags), message)
    assert not list(data_dir.iterdir())   # not even a temporary folder
    for name, content in BAD_FILES.items():
        assert (tmp_path / name).read_bytes() == content


def test_what_is_hardly_text_is_said_once_a_file(data_dir, tmp_path, capsys):
    (tmp_path / "utf16.txt").write_bytes("plain text".encode("utf-16") * 2000)   # several documents
    (tmp_path / "utf8.txt").write_bytes("naïve 中文 😀\n\x1b[31mred\x1b[0m".encode() * 2000)
    prepare([tmp_path / "utf16.txt", tmp_path / "utf8.txt"], "t", out_root=data_dir)
    said = capsys.readouterr().err
    assert said.count("is hardly text") == said.count("utf16.txt is hardly text") == 1


@pytest.mark.parametrize("file, old, new", [
    ("train.bin", b"q", b"r"), ("meta.json", b"}", b""),
    ("meta.json", b'"train_tokens": ', b'"train_tokens": 1')])
def test_damaged_data_are_said(file, old, new, foxes, data_dir, capsys):
    path = data_dir / foxes / file
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(SystemExit, match="2"):
        load_data(foxes)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data_dir / foxes}: meta.json or tokens damaged")
    assert error.count("\n") == 1 and "prepare anew" in error


def test_a_data_set_of_20_gb_opens_at_once(foxes, data_dir):
    path = data_dir / foxes / "train.bin"
    with open(path, "r+b") as file:
        file.truncate(20 << 30)   # by zeros that take no room on the disk
        file.seek(-20, os.SEEK_END)
        file.write(np.arange(10, dtype=np.uint16).tobytes())
    meta = json.loads((data_dir / foxes / "meta.json").read_text())
    del meta["checksum"]
    meta["spot_check"][0] = data.prepare.spot_check(path)
    meta["checksum"] = data.prepare.checksum(meta)
    (data_dir / foxes / "meta.json").write_text(json.dumps(meta))
    began = time.perf_counter()
    opened = load_data(foxes)
    assert time.perf_counter() - began < 1
    assert len(opened.train) == 10 << 30
    assert opened.batch("train", [len(opened.train) - 10], 10).tolist() == [list(range(10))]


# --- Nothing of the user's is lost ---------------------------------------------------------
def test_preparing_replaces_its_own_files_and_nothing_else(data_dir, run):
    """Text beside its tokens, as in nanoGPT; several times, also with the folder as source."""
    folder = data_dir / "mine"
    (folder / "more").mkdir(parents=True)
    kept = {"prepare.py": b"mine()", "more/notes.md": b"# notes", "train.bin.bak": b"\0"}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    for source, text in ((folder, b"some text"), (folder / "input.txt", b"other")):
        (folder / "input.txt").write_bytes(text)
        assert run(data.prepare, source, "--name", "mine").code == 0
        found = {str(path.relative_to(folder)): path.read_bytes()
                 for path in folder.rglob("*") if path.is_file()}
        assert kept.items() <= found.items() and found["input.txt"] == text
        assert found.keys() == {*kept, "input.txt", *FILES}
        assert text in decoded(folder) + decoded(folder, "val")


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_preparing_replaces_is_no_source(file, foxes, data_dir, run):
    before = everything(data_dir / foxes)
    result = run(data.prepare, data_dir / foxes / file, "--name", foxes)
    assert_one_line(result, "is a file that preparing foxes replaces")
    assert everything(data_dir / foxes) == before


def interrupted(*_):
    yield b"other text"
    raise KeyboardInterrupt   # Ctrl-C


def terminated(*_):
    yield b"other text"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)


def disk_full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how, function, code", [
    (interrupted, "documents", 130), (terminated, "documents", 143),
    (disk_full, "write_splits", 2)])
def test_a_prepare_that_is_broken_off_leaves_what_was_there(how, function, code, foxes, data_dir,
                                                            tmp_path, run, monkeypatch):
    before = everything(data_dir / foxes)
    monkeypatch.setattr(data.prepare, function, how)
    for name in (foxes, "another"):
        result = run(data.prepare, tmp_path / "foxes.txt", "--name", name)
        assert result.code == code
        if how == disk_full:
            assert_one_line(result, f"disk full: {data_dir / name} could not be written")
    assert everything(data_dir / foxes) == before
    assert [path.name for path in data_dir.iterdir()] == [foxes]


def test_what_a_killed_process_left_is_removed_and_nothing_else(foxes, data_dir, tmp_path, run):
    dead = subprocess.Popen(["true"])
    dead.wait()

    def left_by(process, path):
        return path.with_name(temporary(path).name.replace(str(os.getpid()), str(process)))

    left = [left_by(dead.pid, data_dir / "big"), left_by(dead.pid, data_dir / foxes / "tokens")]
    kept = [left_by(os.getppid(), data_dir / "big"), data_dir / f".big.elsewhere-{dead.pid}.tmp",
            data_dir / ".mine.tmp"]
    for folder in left + kept:
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"half")
    run(data.prepare, tmp_path / "foxes.txt")
    assert not any(folder.exists() for folder in left)
    assert all((folder / "train.bin").exists() for folder in kept)
    file = left_by(dead.pid, tmp_path / "calm.pt")
    file.write_bytes(b"half")
    remove_leftovers(tmp_path, "ar.pt")
    assert file.exists()
    remove_leftovers(tmp_path, "calm.pt")
    assert not file.exists()


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    """Also where another package is called data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('not ours')")
    for script in ("data/prepare.py", "train.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path,
                              capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
