"""What goes wrong: wrong input, damaged files, a full disk, numbers that are none, closed pipes.
Each is one clear line and exit code 2, and nothing of the user's is lost."""
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

import autoencoder as autoencoder_script
import data.machine
import data.prepare
import eval_brier
import sample
import train
from data.checkpoint import only_writer, save_checkpoint
from data.machine import Machine
from helpers import (ALONE, FOXES, SHORT, TINY, assert_one_line, assert_same_weights, checkpoint_of)


# --- Wrong input ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def faulty(trained, tmp_path_factory):
    """A folder with the trained run and its data, and with faulty ones of their kind."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (folder / "cats.txt").write_text(FOXES.replace("fox", "cat"))
    (folder / "short.txt").write_text("too short")
    for name in ("cats", "short"):
        data.prepare.prepare([folder / f"{name}.txt"], name, out_root=folder)
    ae = checkpoint_of(folder / "out", "autoencoder")
    calm = checkpoint_of(folder / "out", "calm")
    other = {**calm["data"], "tokenizer": "other", "vocabulary": {}}
    checkpoints = {
        "other/autoencoder": {**ae, "data": other},
        "only_ae/autoencoder": ae,
        "unfinished/autoencoder": {**ae, "done": False, "step": 5},
        "dear/autoencoder": {**ae, "tokens": 10**30},
        "old/calm": {name: value for name, value in calm.items() if name != "format"},
        "other/calm": {**calm, "data": other},
        "swapped/calm": checkpoint_of(folder / "out", "ar"),
    }
    for place, checkpoint in checkpoints.items():
        (folder / place).parent.mkdir(exist_ok=True)
        torch.save(checkpoint, folder / f"{place}.pt")
    return folder


NEW = [*SHORT, "--data", "foxes4"]
OLD = ["--resume", "--data", "foxes4"]
BAD = {   # script, flags, folder for --out_dir, what the line must say
    "no data": (train, ["--data", "nothing"], "new", "no data set 'nothing'"),
    "short text": (train, ["--data", "short", *TINY], "new", "fewer than one context of 68"),
    "unknown flag": (train, ["--learning_rate", "1"], "new", "--learning_rate"),
    "unknown device": (train, ["--device", "cuda:99"], "new", "no device 'cuda:99'"),
    "a number that is none": (train, ["--ae_muon_lr", "nan"], "new", "--ae_muon_lr: nan is not in"),
    "a number too large": (train, ["--n_embd", "9" * 40], "new", "is not in [1, "),
    "chunk size 0": (train, ["--chunk_size", "0"], "new", "--chunk_size: 0 is not in"),
    "short context": (train, ["--block_size", "1"], "new", "--block_size 1 is too short"),
    "heads": (train, ["--n_embd", "100", "--n_head", "3"], "new", "divisible by 2 n_head = 6"),
    "one sample": (train, ["--num_samples", "1"], "new", "--num_samples must be at least 2"),
    "alpha 2": (train, ["--alpha", "2"], "new", "--alpha must be in (0, 2)"),
    "all tokens masked": (train, ["--token_mask", "1"], "new", "--token_mask must be below 1"),
    "no clipping": (train, ["--ae_grad_clip", "0"], "new", "--ae_grad_clip must be above 0"),
    "odd evaluations of a flow": (
        train, ["--head", "flow", "--num_evals", "5"], "new", "--num_evals must be even"),
    "nothing to resume": (train, OLD, "new", "no checkpoint at new/calm.pt"),
    "resume, other size": (train, [*OLD, "--n_embd", "128"], "out", "this run asks for 128"),
    "resume, earlier step": (
        train, [*OLD, "--max_steps", "5"], "out", "at step 40: --max_steps must be at least that"),
    "weights of nothing": (train, [*NEW, "--init_from", "x"], "new", "no checkpoint at x/calm.pt"),
    "weights for other tokens": (
        train, [*NEW, "--init_from", "other"], "new", "was trained with the tokenizer other, and"),
    "weights beside others": (
        train, [*NEW, "--init_from", "out"], "only_ae", "already trained (step 40): add --resume"),
    "weights of another size": (
        train, [*NEW, "--init_from", "out", "--n_embd", "32"], "new", "out has n_embd 64, this"),
    "weights of an autoencoder": (
        train, [*NEW, "--init_from", "out", "--model", "autoencoder"], "new", "drop it, or"),
    "already trained": (train, NEW, "out", "already trained"),
    "unfinished": (train, NEW, "unfinished", "unfinished (step 5)"),
    "other K": (train, [*NEW, "--chunk_size", "8"], "only_ae", "chunk_size 4, this run asks for 8"),
    "other data": (train, ["--data", "cats", *SHORT], "only_ae", "trained on other data"),
    "flops of an autoencoder": (
        train, ["--model", "autoencoder", "--flops", "1e9"], "new", "drop it, or --model"),
    "too few flops": (train, [*NEW, "--flops", "9"], "only_ae", "lower --ae_max_steps"),
    "no flops left": (train, [*NEW, "--match_flops", "out"], "dear", "FLOPs are spent"),
    "another version": (sample, [], "old", "old/calm.pt is of an earlier version"),
    "no checkpoint": (sample, [], "new", "no checkpoint at"),
    "wrong kind": (sample, [], "swapped", "holds a model of kind 'ar'"),
    "few candidates": (
        sample, ["--temperature", "0.1", "--num_candidates", "5"], "out", "5 is below 1/T"),
    "evaluations of an energy head": (
        sample, ["--num_evals", "4"], "out", "--num_evals must be 1 for the energy head, not 4"),
    "the tokenizer of a run": (sample, ["--tokenizer", "x"], "out", "is for --official"),
    "no published model": (sample, ["--official", "x"], "out", "x is not a published model"),
    "published baseline": (
        sample, ["--official", "x", "--model", "ar"], "out", "drop --model ar"),
    "published without data": (eval_brier, ["--official", "x"], "out", "needs --data"),
    "another tokenizer": (eval_brier, [], "other", "was trained with the tokenizer other, and"),
    "long context": (eval_brier, ["--context", "128"], "out", "at most the model's, 64"),
    "no frontier": (eval_brier, ["--temperatures", "0.5"], "out", "are for --frontier: add it"),
    "a figure of nothing": (
        eval_brier, ["--plot", "x.svg", "nowhere"], "out", "no evaluation with BrierLM yet"),
    "a figure over another file": (
        eval_brier, ["--plot", "cats.txt", "out"], "out", "File exists: 'cats.txt'"),
    "autoencoder of nothing": (autoencoder_script, [], "new", "no checkpoint at"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, faulty, run, monkeypatch):
    script, flags, folder, message = BAD[case]
    monkeypatch.setattr(data.prepare, "DATA_DIR", faulty)
    monkeypatch.chdir(faulty)
    before = {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()}
    assert_one_line(run(script, *flags, "--out_dir", folder), message)
    after = {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"RANK": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "many"}])
def test_variables_of_torchrun_set_by_hand_are_one_line(variables, fit, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = fit(tmp_path / "out", code=2)
    assert_one_line(result, "torchrun sets WORLD_SIZE and RANK")
    assert not (tmp_path / "out").exists()


def test_a_process_that_waits_in_vain_for_another_ends_with_a_line(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(data.machine, "PATIENCE", timedelta(seconds=0.1))
    with pytest.raises(SystemExit, match="2"):
        Machine("cpu")
    assert "clients joined" in capsys.readouterr().err


def test_processes_with_other_data_or_checkpoints_end_together(trained, run, monkeypatch):
    """As if there were three, of which the last one differs: each of them ends."""
    def gather(values, value):
        values[:] = [value, value, "other"]

    flags = ["--data", trained / "foxes4", "--out_dir", trained / "out", "--resume"]
    monkeypatch.setattr(data.machine, "join_processes", lambda device: (3, rank))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(Machine, "barrier", lambda machine: None)
    monkeypatch.setattr(train, "check_shares", lambda args, machine: None)
    message = "foxes4 of process 2 is not that of the first process: copy that one to every machine"
    for rank in range(3):
        result = run(train, *flags)
        if rank == 0:
            assert_one_line(result, message)
        assert result.code == 2 and (rank == 0 or not result.err)


def test_two_runs_do_not_write_to_one_folder_and_a_killed_one_leaves_nothing(fit, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".calm.pt.4711.tmp", ".log.jsonl.4711.tmp", ".notes.pt.4711.tmp"):
        (out / name).write_text("half")
    with only_writer(out):
        assert_one_line(fit(out, code=2), f"another run is writing to {out}: use another")
    assert [path.name for path in out.iterdir()] == [".notes.pt.4711.tmp"]
    with only_writer(out):   # once more: the lock ends with its holder
        pass


# --- Damaged files -------------------------------------------------------------------------
@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run and of its data, to damage -> the baseline's flags to go on with
    it, the run's folder, the data's."""
    out = shutil.copytree(trained / "out", tmp_path / "out")
    folder = shutil.copytree(trained / "foxes4", tmp_path / "foxes4")
    flags = ["--data", folder, "--out_dir", out, "--model", "ar", "--resume", "--max_steps", 20]
    return flags, out, folder


def flip_a_byte(whole):
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]


def lose_the_end(whole):
    return whole[:-5000]


@pytest.mark.parametrize("damage", [flip_a_byte, lose_the_end])
def test_a_damaged_checkpoint_is_named_kept_and_trained_again_once_it_is_away(damage, copied,
                                                                              trained, run):
    flags, out, folder = copied
    path = out / "ar.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    for script, argv in ((train, flags), (sample, ["--out_dir", out, "--model", "ar"])):
        result = run(script, *argv)
        assert_one_line(result, "ar.pt is not a whole checkpoint")
        assert "move it away and train again" in result.err
    assert path.read_bytes() == damaged
    path.unlink()
    assert run(train, "--data", folder, "--out_dir", out, *SHORT, "--model", "ar").code == 0
    assert_same_weights(trained / "out", out, "ar")


def test_data_replaced_between_runs_are_recognised(copied, tmp_path, run):
    flags, _, folder = copied
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[2:] + path.read_bytes()[:2])   # as long as before
    assert_one_line(run(train, *flags), "train.bin is not, or no longer, what was prepared")
    (tmp_path / "cats.txt").write_text(FOXES.replace("fox", "cat"))
    data.prepare.prepare([tmp_path / "cats.txt"], folder.name, out_root=folder.parent)
    assert_one_line(run(train, *flags), "was trained on other data")


def test_an_autoencoder_that_is_gone_is_not_trained_anew(copied, run):
    _, out, folder = copied
    (out / "autoencoder.pt").unlink()
    for flags in (["--resume", "--max_steps", 50], []):
        result = run(train, "--data", folder, "--out_dir", out, *flags)
        assert_one_line(result, "autoencoder.pt, which calm.pt was trained with, is gone")


@pytest.mark.parametrize("damage", [b"hello\n", b'{"stage": "\xff"}\n', b'{"stage": "ar"}\n',
                                    b'{"stage": "ar", "step": "six", "seconds": 1}\n'])
def test_a_damaged_log_is_said_and_kept(damage, copied, tmp_path, run):
    flags, out, _ = copied
    damaged = damage + (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(damaged)
    for result in (run(train, *flags), run(eval_brier, "--plot", tmp_path / "x.svg", out)):
        assert_one_line(result, "log.jsonl is not the log of a run, or damaged: move it away")
    assert (out / "log.jsonl").read_bytes() == damaged


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_cannot_run_code_or_choose_where_a_run_writes(copied, tmp_path, run):
    flags, out, _ = copied
    (tmp_path / "trap").mkdir()
    torch.save({"kind": "calm", "trap": Trap()}, tmp_path / "trap" / "calm.pt")
    result = run(sample, "--out_dir", tmp_path / "trap")
    assert result.code == 2 and "code ran" not in result.out + result.err

    checkpoint = checkpoint_of(out, "ar")
    checkpoint["settings"]["out_dir"] = str(tmp_path / "elsewhere")
    torch.save(checkpoint, out / "ar.pt")
    before = set(tmp_path.rglob("*"))
    assert run(train, *flags, "--device", "cpu").code == 0
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} <= {out}
    assert checkpoint_of(out, "ar")["step"] == 20


# --- A full disk, a full memory, numbers that are none -------------------------------------
def test_a_full_disk_leaves_the_old_checkpoint(copied, run, monkeypatch, capsys):
    flags, out, _ = copied
    before = (out / "ar.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    advice = "the previous checkpoint is intact: make room, then go on with --resume"
    assert_one_line(run(train, *flags), f"could not write {out / 'ar.pt'} (disk full); {advice}")
    assert (out / "ar.pt").read_bytes() == before and not list(out.glob(".*.tmp"))
    with pytest.raises(SystemExit, match="2"):
        save_checkpoint(out / "calm2.pt", {})
    assert "nothing was saved: make room, then start again" in capsys.readouterr().err


@pytest.mark.parametrize("message, line", [
    ("CUDA out of memory. Tried to allocate 20.00 MiB.", "error: CUDA out of memory: lower --"),
    ("CUDA error: an illegal memory access was encountered", None)])
def test_a_full_card_is_one_line_with_advice_another_fault_of_it_is_not(message, line, trained, run,
                                                                        monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fault)
    for script in (sample, eval_brier):
        if line:
            assert_one_line(run(script, "--out_dir", trained / "out"), line)
        else:
            with pytest.raises(RuntimeError, match="illegal"):
                run(script, "--out_dir", trained / "out")


@pytest.mark.parametrize("what, dtype, step", [
    ("loss", "float32", 12), ("gradient", "float32", 12), ("gradient", "float16", 27)])
def test_a_number_that_is_none_stops_the_run_and_keeps_the_last_good_step(
        what, dtype, step, fit, tmp_path, monkeypatch):
    """From step 12 on, at the step itself; float16 first halves its scale from 2^16 to 1."""
    plain = train.AR.loss
    calls = []

    def loss(model, tokens):
        calls.append(1)
        value, metrics = plain(model, tokens)
        if len(calls) < 13 or not value.requires_grad:   # 11 training steps and a validation
            return value, metrics
        if what == "loss":
            return value * math.nan, metrics
        weight = model.lm_head.weight   # 0, with an infinite derivative
        return value + 0 * (weight - weight.detach()).sum().sqrt(), metrics

    monkeypatch.setattr(train.AR, "loss", loss)
    result = fit(tmp_path, "--model", "ar", "--dtype", dtype, "--max_steps", 40, code=2)
    assert_one_line(result, f"its gradient's norm nan, at step {step}: lower --lr")
    checkpoint = checkpoint_of(tmp_path, "ar")
    assert checkpoint["step"] == (step - 1) // 10 * 10
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


# --- Interruptions, closed pipes, dead processes -------------------------------------------
def test_ctrl_c_in_the_last_step_of_stage_1_does_not_start_stage_2(fit, tmp_path, monkeypatch):
    plain = train.validate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)

    monkeypatch.setattr(train, "validate", interrupted)
    fit(tmp_path, "--eval_interval", 100, code=130)
    assert checkpoint_of(tmp_path, "autoencoder")["done"] and not (tmp_path / "calm.pt").exists()


def test_a_pipe_sees_each_line_and_a_run_whose_pipe_closes_is_saved(trained, tmp_path):
    command = [sys.executable, "train.py", "--data", trained / "foxes4", "--out_dir", tmp_path,
               *SHORT, "--model", "ar", "--max_steps", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **ALONE)
    assert process.stdout.readline().startswith(b"ar: ")
    process.stdout.close()
    assert process.wait() == 130 and checkpoint_of(tmp_path, "ar")["step"] < 1000


SHELL = {   # what stands behind the command in a shell -> its exit code, what is on stderr
    "| head -c 5": (0, ""), "2>&1 | true": (0, ""), "> /dev/full": (2, "No space left"),
    ">&-": (0, "tokens/s"), "2>&-": (0, ""), "| cat": (0, "tokens/s")}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_pipe_that_closes_and_the_like_are_no_traceback(trained):
    """Nor are bytes that are no text, and a terminal that cannot show what comes out."""
    command = (f"echo 'n\u00e9 \u4e2d \\377' | PYTHONIOENCODING=ascii {sys.executable} sample.py "
               f"--out_dir {trained}/out --device cpu --max_new_tokens 60 --start - ")
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **ALONE)
    processes = {what: subprocess.Popen(["sh", "-c", command + what], **piped) for what in SHELL}
    for what, process in processes.items():
        code, said = SHELL[what]
        error = process.communicate()[1]
        assert process.returncode == code and said in error, (what, error)
        assert "Traceback" not in error and "Exception" not in error, (what, error)


def test_a_dead_process_ends_the_run_and_another_number_goes_on(foxes, data_dir, fit, tmp_path):
    out = tmp_path / "out"
    group = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", *SHORT, "--data", data_dir / foxes, "--model", "ar", "--out_dir", out,
         "--max_steps", "100000", "--grad_accum", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **ALONE)
    try:
        while not (out / "ar.pt").exists():
            assert group.poll() is None
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(group.pid)], capture_output=True, text=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        assert group.wait(timeout=90) != 0
    finally:
        group.kill()
    step = checkpoint_of(out, "ar")["step"]
    fit(out, "--model", "ar", "--resume", "--max_steps", step + 5)
    assert checkpoint_of(out, "ar")["step"] == step + 5
