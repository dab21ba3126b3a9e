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

import data.prepare as prepare_script
from data.prepare import DOWNLOADS, FILES, border_token, encode, get_tokenizer, load_data, pieces, prepare
from sample import decode


ROOT = Path(__file__).resolve().parent.parent


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


def everything(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def vocabulary(tmp_path):
    """A tiktoken-format file: the 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    path = tmp_path / "small.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def test_the_standard_library_is_the_default_with_tabs_for_blanks(data_dir):
    folder = prepare(out_root=data_dir)
    data = load_data("stdlib")
    assert folder == data_dir / "stdlib" and data.meta["vocab_size"] == 257
    assert data.meta["train_tokens"] > 5_000_000
    assert 0.02 < data.meta["val_tokens"] / data.meta["train_tokens"] < 0.3
    text = data.tokenizer.decode_bytes(data.train[:200_000].tolist()).decode()
    assert "\n\tdef " in text or "\n\treturn" in text
    assert "    " not in text


def test_site_packages_adds_the_source_of_installed_packages(data_dir, tmp_path, monkeypatch):
    for path in ("lib/json.py",
                 "lib/test/test_json.py",
                 "lib/site-packages/torch.py",
                 "lib/site-packages/torch/tests/big.py",
                 "lib/site-packages/torch/data.bin"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"def {Path(path).stem}():\n    return 1\n")
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "lib" / "site-packages"}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    for name, expected in (("stdlib", ["json"]), ("site-packages", ["json", "torch"])):
        folder = prepare([name], val_fraction=0.0, out_root=data_dir)
        assert folder.name == name
        data = load_data(name)
        text = data.tokenizer.decode_bytes([t for t in data.train.tolist() if t < 256]).decode()
        assert text == "".join(f"def {stem}():\n\treturn 1\n" for stem in expected)


def test_same_input_same_bytes_out(data_dir, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.md").write_text(f"document {i}\n" * 20)
    first = everything(prepare([tmp_path / "texts"], "one", out_root=data_dir))
    assert first == everything(prepare([tmp_path / "texts"], "one", out_root=data_dir))


def test_any_bytes_round_trip(data_dir, tmp_path):
    random.seed(0)
    texts = {random.randbytes(random.randrange(1, 3000)) for _ in range(60)}
    texts |= {bytes(range(256)), b"\0", b"\r\n\xff\xfe"}
    folder = tmp_path / "binary"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.md").write_bytes(text)
    out = prepare([folder], out_root=data_dir)
    assert sorted(decoded(out) + decoded(out, "val")) == sorted(t for t in texts if t.strip())


PLANES = [(0x20, 0x7F), (0xA0, 0x2FF), (0x4E00, 0x9FFF), (0xE000, 0xF8FF),
          *((p << 16, (p << 16) + 0xFFFD) for p in range(1, 17))]


def odd_text(number):
    """Valid UTF-8 from every plane of Unicode, with NULs, separators, long lines and what looks like
    special tokens."""
    random.seed(number)
    parts = [chr(random.randint(*plane)) * random.randrange(3) for plane in random.choices(PLANES, k=200)]
    parts += ["\0", "\u2028", "\ufeff", "\r\n",
              "<|end_of_text|>", "<|reserved_0|>",
              "x" * random.randrange(20_000),
              " " * 9, "\t\n\n"]
    random.shuffle(parts)
    return "".join(parts)


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_odd_text_round_trips_through_every_tokenizer(kind, data_dir, tmp_path, vocabulary):
    name = "bytes" if kind == "bytes" else str(vocabulary)
    enc = get_tokenizer(name)
    for number in range(20):
        text = odd_text(number).encode()
        ids = encode(enc, text)
        assert decode(enc, ids) == text and border_token(enc) not in ids and max(ids) < enc.n_vocab
    texts = {odd_text(number) for number in range(20)}
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, "", " \n"]))
    out = prepare([tmp_path / "odd.jsonl"], tokenizer=name, val_fraction=0.3, out_root=data_dir)
    assert {d.decode() for split in ("train", "val") for d in decoded(out, split)} == texts


def test_lone_surrogates_are_bytes_to_one_tokenizer_and_an_error_to_the_others(
        data_dir, tmp_path, vocabulary, capsys):
    (tmp_path / "half.jsonl").write_text('{"text": "half of a pair: \\ud83d"}\n')
    out = prepare([tmp_path / "half.jsonl"], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"half of a pair: \xed\xa0\xbd"]
    with pytest.raises(SystemExit, match="2"):
        prepare([tmp_path / "half.jsonl"], tokenizer=str(vocabulary), out_root=data_dir)
    assert "half.jsonl is not UTF-8" in capsys.readouterr().err


def test_a_document_keeps_its_split_when_others_come_and_go(data_dir, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.md").write_text(f"document number {i}")
    before = set(decoded(prepare([folder], "before", val_fraction=0.5, out_root=data_dir), "val"))
    for i in range(0, 100, 2):
        (folder / f"{i:03}.md").unlink()
    after = set(decoded(prepare([folder], "after", val_fraction=0.5, out_root=data_dir), "val"))
    assert 20 < len(before) < 80
    assert after == {t for t in before if int(t.split()[-1]) % 2}


def test_every_kind_of_file_and_stdin(data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text("plain text")
    (folder / "b.md").write_text("# markdown")
    (folder / "c.py").write_text("if x:\n    y()")
    (folder / "d.jsonl").write_text('{"text": "line one"}\n{"text": "line \\u00e9 two", "more": 1}\n')
    (folder / "ignored.bin").write_text("not text")
    with gzip.open(folder / "e.txt.gz", "wb") as file:
        file.write(b"compressed")
    out = prepare([folder], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"plain text",
                            b"# markdown",
                            b"if x:\n    y()",
                            b"line one", "line é two".encode(),
                            b"compressed"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"from stdin")))
    assert decoded(prepare(["-"], val_fraction=0, out_root=data_dir)) == [b"from stdin"]


def test_long_text_is_cut_at_good_places_and_loses_nothing():
    random.seed(0)
    lines = "\n".join("é" * random.randrange(200) + "\n" * random.randrange(2) for _ in range(2000)).encode()
    for text in (lines, "é".encode() * 30_000, bytes([0x80]) * 30_000, b"a<|endoftext|>b<|endoftext|>" * 9):
        cut = list(pieces(io.BytesIO(text), 8192))
        assert b"".join(cut) == text.replace(b"<|endoftext|>", b"")
        assert max(map(len, cut)) <= 8192 + 1
    assert all(piece.endswith(b"\n") for piece in list(pieces(io.BytesIO(lines), 8192))[:-1])
    # No character is torn.
    assert all(piece.decode() for piece in pieces(io.BytesIO("é".encode() * 30_000), 8191))


def test_a_tokenizer_file_is_read_and_kept_with_the_tokens(data_dir, tmp_path, vocabulary):
    text = tmp_path / "story.txt"
    text.write_text("the thing in the thick of it, naïve 😀\n\n" * 50)
    out = prepare([text], tokenizer=str(vocabulary), val_fraction=0, out_root=data_dir)
    assert out.name == "story-small"
    vocabulary.unlink()
    data = load_data("story-small")
    assert data.meta["vocab_size"] == 261 + 256 and data.meta["border"] == 261
    assert data.meta["dtype"] == "uint16"
    assert b"".join(decoded(out)) == text.read_bytes()
    assert len(data.train) < len(text.read_bytes())   # merges were used


def test_dtype_follows_the_vocabulary(data_dir, tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("hello " * 100)
    for size, dtype in ((256, "uint8"), (60_000, "uint16"), (128_256, "uint32")):
        special = {"<|endoftext|>": size - 1}
        ranks = {bytes([i]): i for i in range(255)}
        enc = tiktoken.Encoding("x", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
        monkeypatch.setattr(prepare_script, "get_tokenizer", lambda name: enc)
        prepare([text], "t", tokenizer="x", val_fraction=0, out_root=data_dir)
        data = load_data("t")
        assert data.meta["dtype"] == dtype and data.train.dtype == dtype and data.train[0] == size - 1


def test_text_that_cannot_be_split_validates_on_itself_and_says_so(data_dir, tmp_path, capsys):
    text = tmp_path / "one.md"
    text.write_text("a single document")
    out = prepare([text], out_root=data_dir)
    assert decoded(out, "train") == decoded(out, "val")
    assert "warning" in capsys.readouterr().err


def test_batches_are_the_text_at_the_offsets(foxes):
    data = load_data(foxes)
    batch = data.batch("train", [0, 7], 20)
    assert batch.tolist() == [data.train[:20].tolist(), data.train[7:27].tolist()]
    assert str(batch.dtype) == "torch.int64"
    drawn = data.random_offsets("train", 5, 20, (0, 3))
    assert np.array_equal(drawn, data.random_offsets("train", 5, 20, (0, 3)))
    assert not np.array_equal(drawn, data.random_offsets("train", 5, 20, (0, 4)))
    offsets = data.even_offsets("val", 10, 50)
    assert len(offsets) == 10 and (np.diff(offsets) >= 50).all() and offsets[-1] + 50 <= len(data.val)


# --- Downloads, from a server on this machine ---------------------------------------------------------------

@pytest.fixture
def server(monkeypatch):
    """Serve {path: (body, claimed length)} on the loopback interface."""
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
        _, member, fraction = DOWNLOADS[name]
        url = f"http://127.0.0.1:{http.server_port}/{name}"
        monkeypatch.setitem(DOWNLOADS, name, (url, member, fraction))
    yield serve
    http.shutdown()


def zipped(member, text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, text)
    return buffer.getvalue()


def test_downloads_are_prepared(data_dir, server):
    server("shakespeare", b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 2000)
    out = prepare(["shakespeare"], out_root=data_dir)
    assert len(decoded(out)) > 5 and len(decoded(out, "val")) > 0
    server("tinystories", b"Once upon a time.\n<|endoftext|>\nThe end.\n<|endoftext|>\n")
    out = prepare(["tinystories"], val_fraction=0, out_root=data_dir)
    assert decoded(out) == [b"Once upon a time.\n", b"\nThe end.\n"]
    server("enwik8", zipped("enwik8", b"<page>text</page>\n" * 5000))
    out = prepare(["enwik8"], val_fraction=0, out_root=data_dir)
    assert b"".join(decoded(out)) == b"<page>text</page>\n" * 5000


def test_wikitext_is_one_document_an_article_all_for_validation(data_dir, server):
    text = b" \n = First = \n \n Words . \n \n = = Section = = \n \n More . \n \n = Second = \n \n Words . \n"
    server("wikitext103-test", zipped("wikitext-103-raw/wiki.test.raw", text))
    out = prepare(["wikitext103-test"], out_root=data_dir)
    documents = decoded(out, "val")
    assert [d[:10] for d in documents] == [b" = First =", b" = Second "] and b"Section" in documents[0]
    assert decoded(out, "train") == []


def test_a_broken_download_leaves_nothing_that_looks_finished(data_dir, server, run):
    body = b"half a text"
    server("shakespeare", body, length=2 * len(body))
    result = run(prepare_script, "shakespeare")
    assert result.code == 2 and "could not download" in result.err
    assert not list((data_dir / "downloads").iterdir()) and not (data_dir / "shakespeare").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_prepare_leaves_what_was_there_before(earlier, data_dir, tmp_path, monkeypatch):
    text = tmp_path / "t.md"
    text.write_text("some text")
    if earlier:
        before = everything(prepare([text], "t", out_root=data_dir))

    def killed(*_):
        yield b"other text"
        raise KeyboardInterrupt   # Ctrl-C
    monkeypatch.setattr(prepare_script, "documents", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare([text], "t", out_root=data_dir)
    if earlier:
        assert everything(data_dir / "t") == before
    else:
        with pytest.raises(SystemExit):
            load_data("t")


# --- Bad input: one line, exit code 2 -----------------------------------------------------------------------

def bad_inputs():
    return {
        "no data": (["nowhere.txt"], "no data at 'nowhere.txt'"),
        "empty file": (["empty.txt"], "no text there"),
        "blank file": (["blank.md"], "no text there"),
        "empty folder": (["nothing"], "nothing holds no text"),
        "folder without text": (["pictures"], "expected .txt"),
        "empty source": ([""], "no data at ''"),
        "parent": (["good.txt", "--name", ".."], "--name '..' must be the name of one folder"),
        "this folder": (["good.txt", "--name", "."], "--name '.' must be"),
        "a path": (["good.txt", "--name", "/x"], "--name '/x' must be"),
        "a path inside": (["good.txt", "--name", "a/../../b"], "must be the name of one folder"),
        "an empty name": (["good.txt", "--name", ""], "--name '' must be"),
        "a hidden name": (["good.txt", "--name", ".git"], "--name '.git' must be"),
        "a name like a flag": (["good.txt", "--name=-rf"], "--name '-rf' must be"),
        "a name of two lines": (["good.txt", "--name", "a\nb"], "must be"),
        "a very long name": (["good.txt", "--name", "x" * 300], "File name too long"),
        "a loop": (["loop"], "no data at 'loop'"),
        "a known one among others": (["stdlib", "good.txt"], "or alone stdlib"),
        "a very long source": (["x" * 5000], "File name too long"),
        "not UTF-8": (["latin.txt", "--tokenizer", "small.model"], "latin.txt is not UTF-8"),
        "unknown tokenizer": (["good.txt", "--tokenizer", "gpt99"], "unknown tokenizer 'gpt99'"),
        "tokenizer, a folder": (["good.txt", "--tokenizer", "nothing"], "unknown tokenizer 'nothing'"),
        "no tokenizer": (["good.txt", "--tokenizer", ""], "unknown tokenizer ''"),
        "no text field": (["bad.jsonl"], "bad.jsonl, line 2"),
        "torn line": (["torn.json"], "torn.json, line 2"),
        "no object a line": (["list.json"], "list.json, line 1"),
        "text of no string": (["number.jsonl"], "number.jsonl, line 1"),
        "too deep": (["deep.jsonl"], "deep.jsonl, line 1"),
        "not UTF-8, jsonl": (["latin.jsonl"], "latin.jsonl, line 1"),
        "cut .gz": (["cut.txt.gz"], "cut.txt.gz could not be read (EOFError"),
        "flipped .gz": (["flipped.txt.gz"], "flipped.txt.gz could not be read"),
        "no .gz": (["plain.gz"], "plain.gz could not be read (BadGzipFile"),
        "cut .jsonl.gz": (["cut.jsonl.GZ"], "cut.jsonl.GZ could not be read (EOFError"),
        "fraction": (["good.txt", "--val_fraction", "1.5"], "--val_fraction"),
        "fraction, no number": (["good.txt", "--val_fraction", "nan"], "nan is not in [0, 1]"),
        "unknown flag": (["good.txt", "--nam", "x"], "--nam"),
        **{f"vocabulary, {kind}": (["good.txt", "--tokenizer", f"{kind}.model"], "not a tiktoken-format file")
           for kind in ("text", "binary", "no_rank", "torn", "words")},
        **{f"vocabulary, {kind}": (["good.txt", "--tokenizer", f"{kind}.model"], "is not a whole vocabulary")
           for kind in ("empty", "blank", "bytes_missing", "gap", "from_1", "negative", "twice",
                        "same_rank")},
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line_and_exit_code_2(case, data_dir, tmp_path, vocabulary, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = vocabulary.read_bytes().splitlines(keepends=True)
    packed = gzip.compress(random.Random(0).randbytes(3000))
    files = {
        "text.model": b"text",
        "binary.model": bytes(range(256)),
        "no_rank.model": b"".join([*whole, b"dGhlcmU=\n"]),
        "torn.model": b"".join(whole)[:-7],
        "words.model": b"".join([*whole, b"dGhlcmU= many\n"]),
        "empty.model": b"",
        "blank.model": b"\n\n",
        "bytes_missing.model": b"".join(whole[:100]),
        "gap.model": b"".join(whole[:-1]) + whole[-1].replace(b"260", b"261"),
        "from_1.model": b"".join(b"%s %d\n" % (line.split()[0], i) for i, line in enumerate(whole, 1)),
        "negative.model": b"".join(whole) + b"dGhlcmU= -1\n",
        "twice.model": b"".join(whole) + whole[-1],
        "same_rank.model": b"".join(whole) + b"dGhlcmU= 260\n",
        "torn.json": b'{"text": "a"}\n{"text": "b',
        "list.json": b'[{"text": "a"}]',
        "number.jsonl": b'{"text": 5}',
        "deep.jsonl": b"[" * 100_000,
        "latin.jsonl": '{"text": "é"}'.encode("latin-1"),
        "cut.txt.gz": packed[:-20],
        "flipped.txt.gz": packed[:1500] + bytes([packed[1500] ^ 255]) + packed[1501:],
        "plain.gz": b"text",
        "cut.jsonl.GZ": gzip.compress(b'{"text": "a"}\n' * 9)[:-9],
        "empty.txt": b"",
        "blank.md": b" \n\n",
        "latin.txt": "é".encode("latin-1"),
        "good.txt": b"text",
        "bad.jsonl": b'{"text": "a"}\n{"words": "b"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    argv, message = bad_inputs()[case]
    result = run(prepare_script, *argv)
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert result.code == 2 and len(errors) == 1 and message in result.err, result.err
    assert not list(data_dir.iterdir())   # not even a temporary folder
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_a_vocabulary_that_cannot_be_downloaded_is_said(data_dir, tmp_path, run, monkeypatch):
    def offline(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (tmp_path / "t.txt").write_text("text")
    result = run(prepare_script, tmp_path / "t.txt", "--tokenizer", "gpt2")
    assert result.code == 2 and "could not download the vocabulary 'gpt2'" in result.err


def test_a_full_disk_is_said_and_the_earlier_data_stays(foxes, data_dir, tmp_path, run, monkeypatch):
    before = everything(data_dir / "foxes")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare_script, "write_splits", full)
    result = run(prepare_script, tmp_path / "foxes.txt")
    assert result.code == 2 and "No space left" in result.err and everything(data_dir / "foxes") == before


def test_a_truncated_data_file_is_said(foxes, data_dir, capsys):
    path = data_dir / "foxes" / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SystemExit):
        load_data(foxes)
    assert "train.bin" in capsys.readouterr().err


META_DAMAGE = {
    "cut": lambda meta: meta[:100],
    "empty": lambda meta: b"",
    "a list": lambda meta: b"[]",
    "no JSON": lambda meta: b"\0" * 50,
    "not UTF-8": lambda meta: meta.replace(b"foxes", b"f\xffxes", 1),
    "a flipped digit": lambda meta: meta.replace(b'"train_tokens": ', b'"train_tokens": 1', 1),
    "another type": lambda meta: meta.replace(b'"uint16"', b'"float16"', 1),
    "another vocabulary": lambda meta: meta.replace(b'"a": 97', b'"a": 98', 1),
    "no border": lambda meta: meta.replace(b"<|endoftext|>", b"<|endofbook|>", 1),
    "of an earlier version": lambda meta: json.dumps({"tokenizer": "bytes", "train_tokens": 1}).encode(),
}


@pytest.mark.parametrize("damage", META_DAMAGE)
def test_a_damaged_meta_json_is_said(damage, foxes, data_dir, capsys):
    path = data_dir / foxes / "meta.json"
    whole = path.read_bytes()
    path.write_bytes(META_DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    with pytest.raises(SystemExit, match="2"):
        load_data(foxes)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data_dir / foxes}: meta.json") and error.count("\n") == 1
    assert "prepare" in error


# --- Nothing of the user's is lost --------------------------------------------------------------------------

def test_preparing_replaces_its_own_files_and_nothing_else(data_dir, run):
    """Text beside its tokens, as in nanoGPT; twice, the second time with other text; the folder as source."""
    folder = data_dir / "mine"
    (folder / "more").mkdir(parents=True)
    kept = {"input.txt": b"some text " * 9, "prepare.py": b"mine()", "more/notes.md": b"# notes",
            "tokenizer.tiktoken": b"mine", "train.bin.bak": b"\0"}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    for source, text in ((folder, b"some text"), (folder / "input.txt", b"some text"), (folder, b"x")):
        (folder / "input.txt").write_bytes(text)
        assert run(prepare_script, source, "--name", "mine").code == 0
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert {name: found[name] for name in kept} == kept | {"input.txt": text}
        assert found.keys() == kept.keys() | set(FILES)
        assert text in decoded(folder) + decoded(folder, "val")


def test_a_terminated_prepare_leaves_nothing(data_dir, tmp_path, run, monkeypatch):
    def terminated(*_):
        yield b"text"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    monkeypatch.setattr(prepare_script, "documents", terminated)
    (tmp_path / "t.txt").write_text("text")
    assert run(prepare_script, tmp_path / "t.txt").code == 143 and not list(data_dir.iterdir())


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_preparing_replaces_is_no_source(file, foxes, data_dir, run):
    before = everything(data_dir / foxes)
    result = run(prepare_script, data_dir / foxes / file, "--name", foxes)
    assert result.code == 2 and "is a file that preparing foxes replaces" in result.err
    assert everything(data_dir / foxes) == before


def test_a_linked_folder_is_filled_where_it_is(data_dir, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "mine.txt").write_text("kept")
    (data_dir / "far").symlink_to(disk)
    (tmp_path / "t.txt").write_text("some text")
    prepare([tmp_path / "t.txt"], "far", out_root=data_dir)
    assert (data_dir / "far").is_symlink() and {p.name for p in disk.iterdir()} == {"mine.txt", *FILES}
    assert decoded(data_dir / "far") == [b"some text"]


def test_processes_that_prepare_one_data_set_at_a_time_leave_a_whole_one(data_dir, tmp_path):
    """Of different texts, over and over: what is left is that of one of them."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 5000)
    code = """if True:
        import sys
        from pathlib import Path
        from data.prepare import prepare
        for _ in range(30):
            prepare([sys.argv[1]], "both", out_root=Path(sys.argv[2]))"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path / f"{name}.txt", data_dir], cwd=ROOT,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(set(b"".join(decoded(data_dir / "both")))) == 1
    assert {p.name for p in (data_dir / "both").iterdir()} == set(FILES)


NAMES = {"My Notes (2).txt": "My-Notes-2-", "-rf.txt": "rf", "...txt": "data", "日本語.txt": "日本語",
         "a\nb.md": "a-b", ".env": "data", "UPPER.TXT": "UPPER", "$(ls).txt": "ls-"}


@pytest.mark.parametrize("file", NAMES)
def test_a_name_is_made_from_any_files(file, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(file).write_text("some text")
    assert prepare([str(tmp_path / file)], out_root=data_dir).name == NAMES[file]


@pytest.mark.parametrize("file", [
    "a.TXT", "wiki.raw", "README", "a.JSON", "a.jsonl", "a.tsv", "a.MD.GZ", "-"])
def test_a_file_named_by_hand_is_read_whatever_its_name(file, data_dir, tmp_path):
    text = b'{"text": "some"}\n\n{"text": "text"}\n'
    lines = [b"some", b"text"] if "json" in file.lower() else [text]
    (tmp_path / file).write_bytes(gzip.compress(text) if "GZ" in file else text)
    folder = prepare([tmp_path / file], "by-hand", val_fraction=0, out_root=data_dir)
    assert decoded(folder) == lines


NO_TEXT = {
    "UTF-16": "plain text".encode("utf-16"),
    "UTF-16 without a mark": ("plain text " * 9).encode("utf-16-le"),
    "UTF-16, Chinese": ("中文，書。\n" * 99).encode("utf-16-le"),
    "UTF-32": "plain text".encode("utf-32-le"),
    "zipped": gzip.compress(random.Random(0).randbytes(999)),
    "numbers": np.arange(99.0).tobytes(),
}
TEXT = {
    "UTF-8": "naïve 中文 😀\n".encode() * 9,
    "Latin-1": "né à l'été".encode("latin-1") * 9,
    "colours": b"\x1b[31mred\x1b[0m\n" * 9,
    "Windows": b"a\r\n\x0c" * 9,
}


@pytest.mark.parametrize("kind", [*NO_TEXT, *TEXT])
def test_what_is_hardly_text_is_said_once(kind, data_dir, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes((NO_TEXT | TEXT)[kind] * 200)   # several documents
    prepare([tmp_path / "t.txt"], val_fraction=0, out_root=data_dir)
    assert capsys.readouterr().err.count("t.txt is hardly text") == (kind in NO_TEXT)


def test_a_vocabulary_with_begin_of_text_has_it_as_border(vocabulary, data_dir, tmp_path):
    enc = get_tokenizer(str(vocabulary))
    assert border_token(enc) == enc.encode_single_token("<|begin_of_text|>")
    assert border_token(get_tokenizer("bytes")) == 256
    (tmp_path / "t.jsonl").write_text('{"text": "in"}\n{"text": "the"}\n')
    prepare([tmp_path / "t.jsonl"], "t", str(vocabulary), val_fraction=0, out_root=data_dir)
    assert load_data("t").train.tolist() == [261, 259, 261, 257]


def test_data_and_their_vocabulary_need_no_other_file(data_dir, tmp_path, vocabulary):
    """Renamed, it is the same vocabulary; a token that is none decodes to nothing."""
    (tmp_path / "t.txt").write_text("the thing")
    one = load_data(str(prepare([tmp_path / "t.txt"], "one", str(vocabulary), out_root=data_dir)))
    vocabulary = vocabulary.rename(tmp_path / "bytes")
    two = load_data(str(prepare([tmp_path / "t.txt"], "two", str(vocabulary), out_root=data_dir)))
    assert one.meta["vocabulary"] == two.meta["vocabulary"] and str(tmp_path) not in json.dumps(one.meta)
    assert one.train.tolist() == two.train.tolist()
    assert decode(one.tokenizer, [257, 10_000, 258]) == b"the the"   # 10,000 is no token


def test_a_million_blanks_are_encoded(vocabulary):
    enc, text = get_tokenizer(str(vocabulary)), b" " * 1_000_000 + b"a"
    assert decode(enc, encode(enc, text)) == text


@pytest.mark.parametrize("name, content, error", [
    ("enwik8", b"no zip", "BadZipFile"), ("enwik8", b"", "BadZipFile"), ("enwik8", "cut", "BadZipFile"),
    ("enwik8", "flipped", "could not be read"), ("enwik8", "other member", "could not be read"),
    ("shakespeare", b"", "no text there")])
def test_a_damaged_copy_of_a_download_is_named(name, content, error, data_dir, run):
    whole = zipped("enwik8", random.Random(0).randbytes(9000))
    content = {"cut": whole[:-30], "flipped": whole[:4000] + bytes([whole[4000] ^ 1]) + whole[4001:],
               "other member": zipped("enwik9", b"text")}.get(content, content)
    copy = data_dir / "downloads" / (name + (".zip" if name == "enwik8" else ".txt"))
    copy.parent.mkdir()
    copy.write_bytes(content)
    result = run(prepare_script, name)
    assert result.code == 2 and error in result.err and "Traceback" not in result.err
    assert copy.read_bytes() == content and not (data_dir / name).exists()
    if name == "enwik8":
        assert "enwik8.zip could not be read" in result.err and "delete it" in result.err


def test_documents_that_look_like_special_tokens_stay_text():
    enc = get_tokenizer("bytes")
    assert border_token(enc) not in encode(enc, b"a <|endoftext|> b")


def test_meta_names_what_is_needed_to_decode(foxes, data_dir):
    meta = json.loads((data_dir / "foxes" / "meta.json").read_text())
    assert set(meta) >= {"tokenizer", "vocabulary", "vocab_size", "border", "checksum",
                         "dtype", "fingerprint", "train_tokens", "val_tokens"}
