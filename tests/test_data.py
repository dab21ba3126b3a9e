"""Text to tokens and back: every source, every tokenizer, nothing left half done."""
import base64
import json
import random
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

import data.prepare
from data.prepare import (DOWNLOADS, LONGEST, SECTION, TokenData, documents,
                          get_tokenizer, prepare, tokenize)

LINES = "".join(f"line {i}\n" for i in range(20_000))   # 30 documents


def tokens_of(name, split="train"):
    return np.fromfile(data.prepare.DATA_DIR / name / f"{split}.bin", TokenData(name).meta["dtype"])


def decoded(name, split="train"):
    """The documents of a split, as bytes."""
    tokenizer = TokenData(name).tokenizer
    found = []
    for token in tokens_of(name, split).tolist():
        if token == tokenizer.eot_token:   # the first token, too
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode_bytes(ids) for ids in found]


def test_the_standard_library_is_prepared_unasked_with_tabs_for_blanks(data_dir):
    stdlib = TokenData("stdlib")
    assert stdlib.meta["vocab_size"] == 257 and stdlib.meta["train_tokens"] > 5_000_000
    assert 0.02 < stdlib.meta["val_tokens"] / stdlib.meta["train_tokens"] < 0.3
    text = tokens_of("stdlib")[:200_000].astype(np.uint8).tobytes()
    assert b"\n\tdef " in text and b"    " not in text


def test_every_kind_of_file(data_dir, tmp_path):
    """Of a folder, without hidden ones; byte order marks and blank documents are dropped."""
    folder = tmp_path / "mixed"
    (folder / ".git").mkdir(parents=True)
    files = {".git/x.txt": "hidden", "a.txt": "\ufeffplain text\r\n", "b.md": "# markdown",
             "c.py": "if x:\n    y()", "d.jsonl": '{"text": "one"}\n{"text": "\\u00e9", "x": 1}\n',
             "e.txt": " \n<|endoftext|>x<|endoftext|>", "f.bin": "not text"}
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    prepare([str(folder)], val_fraction=0)
    assert decoded("mixed") == [b"plain text\r\n", b"# markdown", b"if x:\n    y()", b"one",
                                "é".encode(), b"x"]


@pytest.mark.parametrize("text, last", [
    (b"a<|endoftext|>b<|endoftext|>", b""),
    (b"line <|endoftext|> another", b" another"),
    (b"x\n" + b"a" * 65531 + b"<|endoftext|>" + b"b" * 100, b"b" * 100),
    (b"a" * 20_000 + b"<|endoftext|>b", b"b"),
    (b"a" * (2**20 - 5) + b"<|endoftext|>" + b"b" * 100, b"b" * 100),   # across two reads
    (b"a" * (2**20 - 5 - SECTION) + b"\n" + b"c" * SECTION + b"<|endoftext|>b", b"b"),
    ("é".encode() * 30_000, None)])
def test_documents_end_at_each_separator_and_where_they_get_long(text, last, tmp_path):
    (tmp_path / "t.txt").write_bytes(text)
    found = [document.encode() for document in documents(tmp_path / "t.txt", "strict")]
    assert b"".join(found) == text.replace(b"<|endoftext|>", b"")
    assert max(len(document.decode()) for document in found) <= SECTION + 13
    assert last is None or found[-1] == last


def test_code_is_cut_only_where_it_is_very_long_and_at_line_ends(tmp_path):
    for name, limit in (("a.py", LONGEST), ("a.txt", SECTION)):
        (tmp_path / name).write_text(LINES)
        found = list(documents(tmp_path / name, "strict"))
        assert "".join(found) == LINES and all(part.endswith("\n") for part in found)
        assert limit / 2 < max(map(len, found)) <= limit + 13


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
    assert meta["documents"] == 700 and meta["val_tokens"] == len(tokens_of("many", "val"))


def test_windows_are_the_text_at_their_offsets_and_know_their_documents(trained):
    foxes = TokenData(trained / "foxes")
    tokens = tokens_of(trained / "foxes", "val")
    assert foxes.batch("val", [0, 7], 20).tolist() == [tokens[:20].tolist(), tokens[7:27].tolist()]
    offsets = foxes.even_offsets(10, 50)
    assert len(offsets) == 10 and (np.diff(offsets) >= 50).all()
    assert offsets[-1] + 50 <= len(tokens)
    borders = np.flatnonzero(tokens == 256)
    assert foxes.document_numbers(borders).tolist() == list(range(1, len(borders) + 1))
    assert foxes.document_numbers(borders[1:] - 1).tolist() == list(range(1, len(borders)))


@pytest.fixture
def vocabulary(tmp_path):
    """A tiktoken-format file: the 256 bytes and a few merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (tmp_path / "small.model").write_bytes(b"".join(lines))
    return str(tmp_path / "small.model")


ODD = ["\0", "\u2028", "\r\n", "<|end_of_text|>", "<|reserved_0|>", " " * 9, "\t\n\n", "é", "中文",
       "\ue000", "x" * 20_000, "naïve"]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_odd_text_round_trips_through_every_tokenizer(kind, data_dir, tmp_path, vocabulary):
    """From many corners of Unicode, with long lines, and what looks like special tokens."""
    random.seed(0)
    texts = {"".join(random.sample(ODD, len(ODD))) for _ in range(20)}
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, "", " \n"]]
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    prepare([tmp_path / "odd.jsonl"], None, "bytes" if kind == "bytes" else vocabulary, 0.3)
    found = decoded("odd", "train") + decoded("odd", "val")
    assert {document.decode() for document in found} == texts
    if kind == "bytes":   # which takes any
        (tmp_path / "raw.txt").write_bytes(bytes(range(1, 256)))
        prepare([tmp_path / "raw.txt"], val_fraction=0)
        assert decoded("raw") == [bytes(range(1, 256))]


def test_a_file_is_a_vocabulary_with_llama_3s_special_tokens(vocabulary, data_dir, tmp_path):
    """Its merges are used, and <|begin_of_text|> is end-of-text, too."""
    (tmp_path / "story.txt").write_text("the thing in the thick of it, naïve\n\n" * 50)
    prepare([tmp_path / "story.txt"], "mine", vocabulary, val_fraction=0)
    meta = TokenData("mine").meta
    assert (meta["vocab_size"], meta["eot"], meta["dtype"]) == (261 + 256, 261, "uint16")
    assert b"".join(decoded("mine")) == (tmp_path / "story.txt").read_bytes()
    assert tokenize(get_tokenizer(vocabulary), [b"the", b"in the"]) == [[257], [259, 258]]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a server on this machine serves in place of those of DOWNLOADS."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    http = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    for name, url in DOWNLOADS.items():
        address = f"http://127.0.0.1:{http.server_port}/{Path(url).name}"
        monkeypatch.setitem(DOWNLOADS, name, address)
    yield tmp_path
    http.shutdown()


def test_downloads_are_prepared_and_all_of_wikitext_is_held_out(data_dir, served):
    with pytest.raises(SystemExit, match="could not download .* fetch it yourself to"):
        prepare(["tinystories"])   # it is not there yet
    stories = "Once upon a time.\n<|endoftext|>\nThe end.\n<|endoftext|>\n"
    (served / "TinyStoriesV2-GPT4-train.txt").write_text(stories)
    prepare(["tinystories"], val_fraction=0)
    assert decoded("tinystories") == [b"Once upon a time.\n", b"\nThe end.\n"]
    articles = [" = First = \n \n = = Section = = \n \n M . \n", " = Second = \n \n W \n"]
    lines = "".join(json.dumps({"text": article}) + "\n" for article in articles)
    (served / "wikitext_document_level-test.json").write_text(lines)
    prepare(["wikitext103-test"])
    assert decoded("wikitext103-test", "val") == [article.encode() for article in articles]
    assert TokenData("wikitext103-test").meta["train_tokens"] == 0


def test_a_download_that_breaks_off_is_not_taken_for_whole(data_dir, monkeypatch):
    def broken(url, path, progress):
        Path(path).write_text("half")
        raise OSError("4 of 8 bytes")

    monkeypatch.setattr("urllib.request.urlretrieve", broken)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"could not download .*4 of 8 bytes"):
            prepare(["shakespeare"])


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
