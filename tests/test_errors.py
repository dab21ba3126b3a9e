"""What a newcomer meets: one line, no traceback, nothing written."""
import shutil
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import data.prepare
import eval_brier
import sample
import train
from data.machine import save_checkpoint
from helpers import FOXES, SHORT, checkpoint_of, tiny_ar

FOXES_DATA = ["--data", "foxes", *SHORT, "--out_dir"]
OUT = ["--out_dir", "out"]
CASES = {   # script, flags, what the line must say
    "no checkpoint": (sample, ["--out_dir", "new"], "no checkpoint at new/calm.pt: `python train"),
    "nothing to resume": (train, [*FOXES_DATA, "new", "--resume"], "no checkpoint at new"),
    "nothing to tune": (train, [*FOXES_DATA, "new", "--init_from", "x"], "no checkpoint at x/calm"),
    "folder taken": (train, [*FOXES_DATA, "out"], "out/calm.pt is there, at step 120: go"),
    "no data set": (train, ["--data", "nothing", "--out_dir", "new"], "no data set 'nothing'"),
    "no source": (data.prepare, ["nowhere.txt"], "no text at 'nowhere.txt': expected stdlib"),
    "no text in a folder": (data.prepare, ["pictures"], "a folder with .txt"),
    "one document": (data.prepare, ["short.txt"], "too little text: all documents (1) fell on one"),
    "short text": (train, [*FOXES_DATA, "new", "--block_size", "9999"], "or lower --block_size"),
    "no tokenizer": (data.prepare, ["short.txt", "--tokenizer", "gpt2"], "no tokenizer 'gpt2'"),
    "not UTF-8": (data.prepare, ["latin.txt", "--tokenizer", "small.model"], "latin.txt is not UT"),
    "no vocabulary": (data.prepare, ["cats.txt", "--tokenizer", "short.txt"], "no tokenizer"),
    "no text in JSON": (data.prepare, ["x.jsonl"], "x.jsonl is not UTF-8 (--tokenizer bytes"),
    "other tokens": (eval_brier, ["--out_dir", "changed", "--data", "foxes"], "(tokenizer)"),
    "heads": (train, [*FOXES_DATA, "ae", "--n_head", "5"],
              "these sizes do not fit: n_embd 64 must be a multiple of 2 n_head = 10"),
    "chunk": (train, [*FOXES_DATA, "ae", "--chunk_size", "8"], "is 8, but the autoencoder's is 4"),
    "context": (train, [*FOXES_DATA, "new", "--block_size", "2"], "too short a context"),
    "temperature 0": (sample, [*OUT, "--temperature", "0"], "the greedy way is --noise 0"),
    "temperature 2": (eval_brier, [*OUT, "--temperature", "2"], "must be in (0, 1], not 2"),
    "few candidates": (sample, [*OUT, "--temperature", "0.01"], "64 is below 1/temperature = 100"),
    "stride": (eval_brier, [*OUT, "--stride", "6"], "does not fit chunks of 4: try 16"),
    "another text": (train, ["--data", "cats", *SHORT, "--out_dir", "ae"], "is not the text"),
    "changed text": (eval_brier, ["--out_dir", "changed"], "is not the text that this model was"),
    "no weights": (eval_brier, ["--official", "x"], "no weights at x/pytorch_model.bin"),
}


@pytest.fixture(scope="module")
def faulty(trained, tmp_path_factory):
    """A folder with the trained run and its data, and with faulty ones of their kind."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    for place in ("ae", "changed", "pictures"):
        (folder / place).mkdir()
    shutil.copy(folder / "out" / "autoencoder.pt", folder / "ae")
    calm = checkpoint_of(folder / "out", "calm")
    calm["data"] = {**calm["data"], "fingerprint": 1, "tokenizer": "gpt2"}
    save_checkpoint(folder / "changed" / "calm.pt", calm)
    (folder / "cats.txt").write_text(FOXES.replace("fox", "cat"))
    (folder / "short.txt").write_text("too short")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    (folder / "small.model").write_text("IQ== 0\n")
    (folder / "x.jsonl").write_text('{"title": "x"}\n')
    (folder / "pictures" / "a.png").write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.prepare, "DATA_DIR", folder)
        data.prepare.prepare([folder / "cats.txt"])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_nothing_is_written(case, faulty, run, monkeypatch):
    script, flags, message = CASES[case]
    monkeypatch.setattr(data.prepare, "DATA_DIR", faulty)
    monkeypatch.setattr(tiktoken, "get_encoding", open)   # which finds no file of that name
    monkeypatch.chdir(faulty)
    before = {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()}
    error = run(script, *flags).error
    assert isinstance(error, str) and message in error and "\n" not in error.strip()
    assert {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()} == before
    assert not (faulty / "new").exists()


def test_processes_that_do_not_divide_are_one_line(trained):
    args = train.parse_args([*SHORT, "--model", "ar", "--grad_accum", "32"])
    foxes = data.prepare.TokenData(trained / "foxes")
    with pytest.raises(SystemExit, match="--grad_accum 32 must be a multiple of the 3 processes"):
        train.train("ar", tiny_ar(), args, foxes, SimpleNamespace(size=3, device="cpu"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_step(
        fit, trained, run, tmp_path):
    flags = ["--data", trained / "foxes", "--out_dir", tmp_path, *SHORT, "--model", "ar"]
    plain = train.AR.forward

    def forward(model, tokens):
        loss, metrics = plain(model, tokens)
        return loss * float("nan") if (tmp_path / "ar.pt").exists() else loss, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.AR, "forward", forward)
        assert "ar: not finite at step 15 (loss nan): lower --lr" in run(train, *flags).error
    checkpoint = checkpoint_of(tmp_path, "ar")
    assert checkpoint["step"] == 10
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"trap": Trap()}, tmp_path / "calm.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        sample.load_model(tmp_path, "calm")
    assert "code ran" not in capsys.readouterr().out
