"""Text to tokens and back: every source, every tokenizer, nothing left half done."""
import base64
import gzip
import io
import json
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

import data.prepare as prepare_script
from data.prepare import DOWNLOADS, encode, eot_token, get_tokenizer, load_data, pieces, prepare


def decoded(folder, split="train"):
    """The documents of a split, as bytes."""
    data = load_data(str(folder))
    documents, document = [], []
    for token in getattr(data, split).tolist():
        if token == data.meta["eot"]:
            documents.append(data.tokenizer.decode_bytes(document))
            document = []
        else:
            document.append(token)
    assert not document   # the last document ends in end-of-text, too
    return documents


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
        assert enc.decode_bytes(ids) == text and eot_token(enc) not in ids and max(ids) < enc.n_vocab
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


def test_a_tokenizer_file_is_read_and_kept_beside_the_tokens(data_dir, tmp_path, vocabulary):
    text = tmp_path / "story.txt"
    text.write_text("the thing in the thick of it, naïve 😀\n\n" * 50)
    out = prepare([text], tokenizer=str(vocabulary), val_fraction=0, out_root=data_dir)
    assert out.name == "story-small"
    vocabulary.unlink()
    data = load_data("story-small")
    assert data.meta["vocab_size"] == 261 + 256 and data.meta["eot"] == 262 and data.meta["dtype"] == "uint16"
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
        assert data.meta["dtype"] == dtype and data.train.dtype == dtype and data.train[-1] == size - 1


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
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_script, "documents", killed)
    with pytest.raises(SystemExit):
        prepare([text], "t", out_root=data_dir)
    if earlier:
        assert everything(data_dir / "t") == before
    else:
        with pytest.raises(SystemExit):
            load_data("t")


# --- Bad input: one line, exit code 2 -----------------------------------------------------------------------

def bad_inputs():
    return {
        "no data": (["nowhere.txt"], "no data at nowhere.txt"),
        "empty file": (["empty.txt"], "no text there"),
        "blank file": (["blank.md"], "no text there"),
        "empty folder": (["nothing"], "nothing holds no text"),
        "unknown kind": (["picture.png"], "expected .txt"),
        "not UTF-8": (["latin.txt", "--tokenizer", "small.model"], "latin.txt is not UTF-8"),
        "unknown tokenizer": (["good.txt", "--tokenizer", "gpt99"], "unknown tokenizer 'gpt99'"),
        "not a vocabulary": (["good.txt", "--tokenizer", "good.txt"], "not a tiktoken-format file"),
        "no text field": (["bad.jsonl"], "bad.jsonl, line 2"),
        "fraction": (["good.txt", "--val_fraction", "1.5"], "--val_fraction"),
        "unknown flag": (["good.txt", "--nam", "x"], "--nam"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line_and_exit_code_2(case, data_dir, tmp_path, vocabulary, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "empty.txt": b"",
        "blank.md": b" \n\n",
        "picture.png": b"x",
        "latin.txt": "é".encode("latin-1"),
        "good.txt": b"text",
        "bad.jsonl": b'{"text": "a"}\n{"words": "b"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    argv, message = bad_inputs()[case]
    result = run(prepare_script, *argv)
    errors = [line for line in result.err.splitlines() if "error" in line]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]
    assert not list(data_dir.iterdir())   # not even a temporary folder


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


def test_documents_that_look_like_special_tokens_stay_text():
    enc = get_tokenizer("bytes")
    assert eot_token(enc) not in encode(enc, b"a <|endoftext|> b")


def test_meta_names_what_is_needed_to_decode(foxes, data_dir):
    meta = json.loads((data_dir / "foxes" / "meta.json").read_text())
    assert set(meta) >= {"tokenizer", "tokenizer_fingerprint", "vocab_size", "eot",
                         "dtype", "fingerprint", "train_tokens", "val_tokens"}
