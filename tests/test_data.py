"""Text to tokens and back: every source, every tokenizer, nothing left half done."""
import base64
import json
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

import data.prepare
from data.prepare import (DOWNLOADS, LONGEST, SECTION, TokenData, border_token, documents,
                          get_tokenizer, prepare, tokenize)
from helpers import ROOT


def all_tokens(name, split="train"):
    folder = data.prepare.DATA_DIR / name
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype)


def decoded(name, split="train"):
    """The documents of a split, as bytes."""
    tokenizer = TokenData(name).tokenizer
    found = []
    for token in all_tokens(name, split).tolist():
        if token == border_token(tokenizer):   # the first token, too
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode_bytes(ids) for ids in found]


@pytest.fixture
def vocabulary(tmp_path):
    """A tiktoken-format file: the 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    path = tmp_path / "small.model"
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


# --- Sources -------------------------------------------------------------------------------


def test_the_standard_library_is_prepared_unasked_with_tabs_for_blanks(data_dir):
    stdlib = TokenData("stdlib")
    assert stdlib.meta["vocab_size"] == 257 and stdlib.meta["train_tokens"] > 5_000_000
    assert 0.02 < stdlib.meta["val_tokens"] / stdlib.meta["train_tokens"] < 0.3
    text = all_tokens("stdlib")[:200_000].astype(np.uint8).tobytes()
    assert b"\n\tdef " in text and b"    " not in text


def test_site_packages_adds_the_source_of_installed_packages(data_dir, tmp_path, monkeypatch):
    for path in ("lib/json.py", "lib/test/test_json.py", "lib/site-packages/torch.py",
                 "lib/site-packages/torch/tests/big.py", "lib/site-packages/torch/data.bin",
                 "lib/site-packages/pip/_vendor/six.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"def {Path(path).stem}():\n    return 1\n")
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "lib" / "site-packages"}
    monkeypatch.setattr("sysconfig.get_path", paths.get)
    for name, stems in (("stdlib", ["json"]), ("site-packages", ["json", "torch"])):
        prepare([name], val_fraction=0)
        assert decoded(name) == [b"def %s():\n\treturn 1\n" % stem.encode() for stem in stems]


def test_every_kind_of_file(data_dir, tmp_path):
    """Of a folder, without hidden ones; byte order marks and blank documents are dropped."""
    folder = tmp_path / "mixed"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "a.txt").write_text("\ufeffplain text\r\n")
    (folder / "b.md").write_text("# markdown")
    (folder / "c.py").write_text("if x:\n    y()")
    (folder / "d.jsonl").write_text('{"text": "one"}\n{"text": "\\u00e9 two", "more": 1}\n')
    (folder / "e.txt").write_text(" \n<|endoftext|>x<|endoftext|>")
    (folder / "ignored.bin").write_text("not text")
    prepare([str(folder)], val_fraction=0)
    assert decoded("mixed") == [b"plain text\r\n", b"# markdown", b"if x:\n    y()", b"one",
                                "é two".encode(), b"x"]


@pytest.mark.parametrize("text, expected", [
    (b"a<|endoftext|>b<|endoftext|>", [b"a", b"b", b""]),
    (b"line <|endoftext|> another", [b"line ", b" another"]),
    (b"x\n" + b"a" * 65531 + b"<|endoftext|>" + b"b" * 100, None),
    (b"a" * 20_000 + b"<|endoftext|>b", None),
    (b"a" * (2**20 - 5) + b"<|endoftext|>" + b"b" * 100, None),   # across two reads
    (b"a" * (2**20 - 5 - SECTION) + b"\n" + b"c" * SECTION + b"<|endoftext|>b", None),
    ("é".encode() * 30_000, None)])
def test_documents_end_at_each_separator_and_where_they_get_long(text, expected, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(text)
    found = [document.encode() for document in documents(path, "strict")]
    assert expected is None or found == expected
    assert b"".join(found) == text.replace(b"<|endoftext|>", b"")
    assert max(len(document.decode()) for document in found) <= SECTION + 13
    if expected is None and b"<" in text:
        assert text.split(b"<|endoftext|>")[1] in found   # what stands behind is one document


def test_code_is_cut_only_where_it_is_very_long_and_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000))
    for name, limit in (("a.py", LONGEST), ("a.txt", SECTION)):
        (tmp_path / name).write_text(text)
        found = list(documents(tmp_path / name, "strict"))
        assert "".join(found) == text and all(part.endswith("\n") for part in found)
        assert limit / 2 < max(map(len, found)) <= limit + 13


# --- Splits --------------------------------------------------------------------------------


def test_a_document_keeps_its_split_when_others_come_and_go(data_dir, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.md").write_text(f"document number {i}")
    prepare([folder], val_fraction=0.5)
    before = set(decoded("texts", "val"))
    for i in range(0, 100, 2):
        (folder / f"{i:03}.md").unlink()
    prepare([folder], val_fraction=0.5)
    assert 20 < len(before) < 80
    after = {text for text in before if int(text.split()[-1]) % 2}
    assert set(decoded("texts", "val")) == after


def test_every_document_is_there_once(data_dir, tmp_path):
    """They are written in batches of 256."""
    texts = {f"document {i}" for i in range(700)}
    (tmp_path / "many.txt").write_text("<|endoftext|>".join(sorted(texts)))
    prepare([tmp_path / "many.txt"])
    found = decoded("many") + decoded("many", "val")
    assert len(found) == 700 and {document.decode() for document in found} == texts
    meta = TokenData("many").meta
    assert meta["documents"] == 700 and meta["val_tokens"] == len(all_tokens("many", "val"))


def test_batches_are_the_text_at_the_offsets(trained):
    foxes = TokenData(trained / "foxes")
    tokens = np.fromfile(trained / "foxes" / "train.bin", foxes.meta["dtype"])
    batch = foxes.batch("train", [0, 7], 20)
    assert batch.tolist() == [tokens[:20].tolist(), tokens[7:27].tolist()]
    assert str(batch.dtype) == "torch.int64"
    drawn = foxes.random_offsets(5, 20, (0, 3))
    assert np.array_equal(drawn, foxes.random_offsets(5, 20, (0, 3)))
    assert not np.array_equal(drawn, foxes.random_offsets(5, 20, (0, 4)))
    offsets = foxes.even_offsets(10, 50)
    assert len(offsets) == 10 and (np.diff(offsets) >= 50).all()
    assert offsets[-1] + 50 <= foxes.meta["val_tokens"]


def test_each_position_has_the_number_of_its_document(trained):
    foxes = TokenData(trained / "foxes")
    tokens = np.fromfile(trained / "foxes" / "val.bin", foxes.meta["dtype"])
    borders = np.flatnonzero(tokens == 256)
    assert foxes.document_numbers(borders).tolist() == list(range(1, len(borders) + 1))
    assert foxes.document_numbers(borders[1:] - 1).tolist() == list(range(1, len(borders)))


# --- Tokenizers ----------------------------------------------------------------------------

ODD = ["\0", "\u2028", "\r\n", "<|end_of_text|>", "<|reserved_0|>", " " * 9, "\t\n\n", "é", "中文",
       "😀", "\ue000", "x" * 20_000, "naïve"]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_odd_text_round_trips_through_every_tokenizer(kind, data_dir, tmp_path, vocabulary):
    """From many corners of Unicode, with long lines, and what looks like special tokens."""
    random.seed(0)
    texts = {"".join(random.sample(ODD, len(ODD))) for _ in range(20)}
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "", " \n"]]
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    name = "bytes" if kind == "bytes" else str(vocabulary)
    prepare([tmp_path / "odd.jsonl"], tokenizer=name, val_fraction=0.3)
    found = decoded("odd", "train") + decoded("odd", "val")
    assert {document.decode() for document in found} == texts


def test_the_byte_tokenizer_takes_any_bytes(data_dir, tmp_path):
    raw = bytes(range(1, 256)) * 3
    (tmp_path / "raw.txt").write_bytes(raw)
    prepare([tmp_path / "raw.txt"], val_fraction=0)
    assert decoded("raw") == [raw]


def test_a_file_is_a_vocabulary_with_llama_3s_special_tokens(vocabulary, data_dir, tmp_path):
    """Its merges are used, <|begin_of_text|> is the border, ids are as wide as they must be."""
    (tmp_path / "story.txt").write_text("the thing in the thick of it, naïve 😀\n\n" * 50)
    prepare([tmp_path / "story.txt"], "mine", str(vocabulary), val_fraction=0)
    meta = TokenData("mine").meta
    assert (meta["vocab_size"], meta["border"], meta["dtype"]) == (261 + 256, 261, "uint16")
    assert b"".join(decoded("mine")) == (tmp_path / "story.txt").read_bytes()
    assert meta["train_tokens"] < (tmp_path / "story.txt").stat().st_size
    enc = get_tokenizer(str(vocabulary))
    assert tokenize(enc, [b"the", b"in the"]) == [[257], [259, 258]]


# --- Downloads, from a server on this machine ----------------------------------------------

LINES = "".join(f"line {i}\n" for i in range(20_000))   # 30 documents


@pytest.fixture
def server(monkeypatch):
    """serve(name, text): what DOWNLOADS[name] gets, from the loopback interface."""
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

    def serve(name, text, missing=0):
        path = f"/{name}{Path(DOWNLOADS[name]).suffix}"
        pages[path] = (text.encode(), len(text.encode()) + missing)
        monkeypatch.setitem(DOWNLOADS, name, f"http://127.0.0.1:{http.server_port}{path}")

    yield serve
    http.shutdown()


def test_downloads_are_prepared_and_all_of_wikitext_is_held_out(data_dir, server):
    server("tinystories", "Once upon a time.\n<|endoftext|>\nThe end.\n<|endoftext|>\n")
    prepare(["tinystories"], val_fraction=0)
    assert decoded("tinystories") == [b"Once upon a time.\n", b"\nThe end.\n"]
    articles = [" = First = \n \n = = Section = = \n \n M . \n", " = Second = \n \n W \n"]
    server("wikitext103-test", "".join(json.dumps({"text": a}) + "\n" for a in articles))
    prepare(["wikitext103-test"])
    assert decoded("wikitext103-test", "val") == [article.encode() for article in articles]
    assert TokenData("wikitext103-test").meta["train_tokens"] == 0


def test_a_broken_download_leaves_nothing_that_looks_finished(data_dir, server):
    server("shakespeare", LINES, missing=11)
    with pytest.raises(SystemExit, match="could not download"):
        prepare(["shakespeare"])
    assert not (data_dir / "downloads" / "shakespeare.txt").exists()
    server("shakespeare", LINES)
    prepare(["shakespeare"])
    assert b"".join(sorted(decoded("shakespeare") + decoded("shakespeare", "val")))


# --- Nothing half done, nothing of the user's lost -----------------------------------------


@pytest.fixture
def lines(data_dir, tmp_path):
    """A text, prepared as "lines"."""
    (tmp_path / "lines.txt").write_text(LINES)
    prepare([tmp_path / "lines.txt"])
    return tmp_path / "lines.txt"


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_broken_off_leaves_what_was_there(lines, data_dir, monkeypatch):
    before = everything(data_dir / "lines")
    plain = data.prepare.documents

    def broken_off(path, errors):
        yield from plain(path, errors)
        raise KeyboardInterrupt

    monkeypatch.setattr(data.prepare, "documents", broken_off)
    for name in ("lines", "another"):
        with pytest.raises(KeyboardInterrupt):
            prepare([lines], name)
    assert everything(data_dir / "lines") == before
    assert [path.name for path in data_dir.iterdir()] == ["lines"]


def test_without_meta_json_a_data_set_is_not_there(lines, data_dir):
    (data_dir / "lines" / "meta.json").unlink()   # as it is while files are replaced
    with pytest.raises(SystemExit, match="no data set 'lines'"):
        TokenData("lines")


@pytest.mark.parametrize("files", [["train.bin"], ["meta.json", "train.bin"], ["notes.md"]])
def test_a_folder_that_is_no_data_set_is_left_alone(files, data_dir, lines):
    (data_dir / "t").mkdir()
    for file in files:
        (data_dir / "t" / file).write_text("mine")
    with pytest.raises(SystemExit, match="is no data set"):
        prepare([lines], "t")
    assert everything(data_dir / "t") == {file: b"mine" for file in files}


def test_preparing_again_replaces_the_data_set_and_nothing_beside_it(lines, data_dir):
    (data_dir / "lines" / "notes.md").write_text("mine")
    lines.write_text(LINES.replace("line", "another"))
    prepare([lines])
    assert b"another" in decoded("lines")[0]
    assert everything(data_dir / "lines")["notes.md"] == b"mine"


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    for script in ("data/prepare.py", "train.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
