"""The whole road on a tiny text: learn it, break it off, spread it over processes, and get wrong input."""
import base64
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import autoencoder as autoencoder_script
import bench
import calm
import data.prepare
import eval_brier
import sample
import train
from data.checkpoint import autocast, load_checkpoint, select_device, select_dtype

ROOT = Path(__file__).resolve().parent.parent
TINY = """--device cpu --dtype float32 --compile off --chunk_size 4 --latent_dim 32 --n_embd 64 --n_ff 128
          --n_layer 2 --n_head 4 --n_head_layer 1 --block_size 16 --num_targets 20
          --ae_n_embd 128 --ae_n_ff 256 --batch_size 4 --ae_batch_size 8 --warmup_steps 20
          --ae_warmup_steps 20 --log_interval 5""".split()
SHORT = [*TINY, "--ae_max_steps", "15", "--max_steps", "15", "--eval_interval", "10"]


def log_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def losses(out_dir, stage):
    return {e["step"]: e["loss"] for e in log_of(out_dir) if e["stage"] == stage and "loss" in e}


def last_line(result):
    """The JSON object that a script ends with."""
    assert result.code == 0
    return json.loads(result.out.splitlines()[-1])


def checkpoint_of(out_dir, kind):
    return load_checkpoint(Path(out_dir) / f"{kind}.pt", kind)


def assert_same_weights(one, other, kind, rtol=0, atol=0):
    """Of the checkpoints of a kind in two folders."""
    a, b = (checkpoint_of(out_dir, kind)["model"] for out_dir in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def torchrun(processes, *argv):
    """The command line of train.py on so many gloo processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            str(ROOT / "train.py"), *map(str, argv)]


ALONE = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})   # of processes: one thread each


def limit_windows(monkeypatch, most):
    """Of every BrierLM, also of the one that a run ends with."""
    plain = eval_brier.evaluate

    def evaluate(model, data, device, dtype, windows=most, *args, **kwargs):
        return plain(model, data, device, dtype, min(windows, most), *args, **kwargs)
    monkeypatch.setattr(eval_brier, "evaluate", evaluate)


@pytest.fixture(autouse=True)
def short_ends(monkeypatch):
    """A run ends with a score and a text, which nobody reads here."""
    limit_windows(monkeypatch, 16)
    monkeypatch.setattr(train, "continue_text", partial(sample.continue_text, new_tokens=20))


# --- Learning -----------------------------------------------------------------------------------------------

def test_the_whole_road_learns_a_repeating_text(foxes, tmp_path, run):
    """Autoencoder, CALM, BrierLM, text: near-certainty about a sentence that repeats, from both models."""
    out = tmp_path / "out"
    common = ["--data", foxes, "--out_dir", out, *TINY, "--eval_interval", "1000", "--max_steps", "250"]
    result = run(train, *common, "--ae_max_steps", "150")
    assert result.code == 0 and "python sample.py" in result.out
    report = last_line(run(autoencoder_script, "--out_dir", out, "--json", "--device", "cpu"))
    assert set(report) == {"accuracy", "sigma", "active_dims", "latent_dim"} and report["latent_dim"] == 32
    assert report["accuracy"]["posterior"] > 0.999 and report["accuracy"]["sigma_0.3"] > 0.999
    assert run(train, *common, "--model", "ar").code == 0
    for model in ("calm", "ar"):
        flags = ["--out_dir", out, "--model", model, "--device", "cpu"]
        score = last_line(run(eval_brier, *flags, "--json", "--windows", 16))
        assert set(score) == {"brier", "brierlm", "stderr", "positions", "samples", "context", "stride",
                              "step"}
        assert score["brierlm"] > 90 and 0 <= score["stderr"] < 5 and score["step"] == 250
        result = run(sample, *flags, "--start", "the quick brown fox", "--temperature", 0.5,
                     "--max_new_tokens", 40)
        assert "the quick brown fox jumps over the lazy dog. the quick" in result.out
        assert "tokens/s" in result.err


@pytest.mark.parametrize("K", [1, 2, 3, 8, 16])
def test_chunks_of_other_sizes_train_and_evaluate(K, foxes, tmp_path, run):
    out = tmp_path / "out"
    positions = []
    for model in ("calm", "ar"):   # scored at the same ones, in the end and by hand
        flags = ["--out_dir", out, "--model", model]
        assert run(train, "--data", foxes, *flags, *SHORT, "--chunk_size", K,
                   "--eval_interval", 100).code == 0
        score = last_line(run(eval_brier, *flags, "--json", "--windows", 4, "--device", "cpu"))
        assert len(score["brier"]) == 4
        final = next(e for e in log_of(out) if e["stage"] == model and e.get("final"))
        positions.append((score["positions"], final["positions"]))
    assert positions[0] == positions[1]


@pytest.mark.parametrize("K", [1, 2, 3, 8, 16])
def test_sizes_follow_from_the_chunk_size(K, foxes, tmp_path, run, monkeypatch):
    """And a run of them ends with both checkpoints: here two steps."""
    args = train.parse_args(["--preset", "nano", "--chunk_size", str(K)])
    assert args.latent_dim == 8 * K and 512 - K < args.context <= 512
    few = dict(max_steps=2, ae_max_steps=2, batch_size=1, ae_batch_size=1)
    monkeypatch.setitem(train.PRESETS, "nano", train.PRESETS["nano"] | few)
    limit_windows(monkeypatch, 2)
    out = tmp_path / "out"
    result = run(train, "--data", foxes, "--out_dir", out, "--preset", "nano", "--device", "cpu",
                 "--chunk_size", K)
    assert result.code == 0 and "BrierLM" in result.out
    assert checkpoint_of(out, "autoencoder")["done"] and checkpoint_of(out, "calm")["done"]
    assert checkpoint_of(out, "calm")["config"]["latent_dim"] == 8 * K


def test_the_rate_rises_for_the_warm_up_and_falls_to_zero_at_the_end(foxes, tmp_path, run):
    out = tmp_path / "out"
    schedule = ["--lr", 1, "--warmup_steps", 4, "--decay_frac", 0.4, "--log_interval", 1]
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar", *schedule).code == 0
    rates = [e["lr"] for e in log_of(out) if "lr" in e]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[1] * 7, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


SVG = "{http://www.w3.org/2000/svg}"


def test_a_figure_of_the_learning_curves_is_made_from_the_logs(foxes, tmp_path, run):
    """--plot: one line a model, whose last point is the final BrierLM at the FLOPs in the checkpoint."""
    out = tmp_path / "a&b"
    for model in ("calm", "ar"):
        assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", model).code == 0
    found = eval_brier.curves(out)
    assert set(found) == {"calm", "ar"}
    for stage, points in found.items():
        assert len(points) == 2 and points[0][0] < points[1][0] == checkpoint_of(out, stage)["flops"]
    namesake = tmp_path / "elsewhere" / "a&b"   # another run of that name; killed while it wrote its log
    namesake.mkdir(parents=True)
    (namesake / "log.jsonl").write_text((out / "log.jsonl").read_text() + '{"stage": "calm", "st')
    assert "4 curves" in run(eval_brier, "--plot", tmp_path / "both.svg", out, namesake).out
    result = run(eval_brier, "--plot", tmp_path / "curves.svg", out)
    assert result.code == 0 and "2 curves" in result.out
    svg = xml.etree.ElementTree.parse(tmp_path / "curves.svg").getroot()
    lines = svg.findall(f"{SVG}polyline")
    labels = [text.text for text in svg.findall(f"{SVG}text")]
    assert len(lines) == 2 and {"a&b", "a&b (AR)"} <= set(labels)
    for line in lines:   # both points lie on the sheet, time runs to the right
        corners = [map(float, corner.split(",")) for corner in line.get("points").split()]
        (x0, y0), (x1, y1) = corners
        assert 50 <= x0 < x1 <= 670 and 0 <= min(y0, y1) <= max(y0, y1) <= 380


@pytest.mark.parametrize("x, points, ticks, label", [
    ("flops", [(1e12, 4), (2e12, 6), (8e12, 5)], {"1.0e+12", "2.0e+12", "4.0e+12", "8.0e+12"}, "\u25cf "),
    ("inference_flops", [(3e5, 5), (3e5, 6), (3e5, 4)], {"3.0e+05", "6.0e+05"}, "\u25cf k1")])
def test_a_folder_of_runs_is_one_line_through_their_ends(x, points, ticks, label, tmp_path, run):
    """Sorted by x, on a scale of its powers of two; over inference FLOPs each point has its run's name."""
    for i, (flops, score) in enumerate([(1e12, 4), (8e12, 5), (2e12, 6)]):
        entry = {"stage": "calm", "step": 5, "seconds": 1, "flops": flops / 2, "brierlm": 1}
        last = {"step": 9, "flops": flops, "brierlm": score, "inference_flops": 3e5, "final": True}
        (tmp_path / "spectrum" / f"k{i}").mkdir(parents=True)
        resumed = entry | last | {"step": 7, "flops": flops / 3}   # whose end is a later one
        log = "".join(f"{json.dumps(line)}\n" for line in (entry, resumed, entry | last))
        (tmp_path / "spectrum" / f"k{i}" / "log.jsonl").write_text(log)
    found = eval_brier.curves(tmp_path / "spectrum", x)
    assert sorted(point[:2] for point in found["calm"]) == sorted(points)
    result = run(eval_brier, "--plot", tmp_path / "x.svg", tmp_path / "spectrum", "--x", x)
    assert result.code == 0 and "1 curves" in result.out
    svg = xml.etree.ElementTree.parse(tmp_path / "x.svg").getroot()
    assert ticks | {"spectrum", label} <= {text.text for text in svg.findall(f"{SVG}text")}
    corners = [corner.split(",") for corner in svg.find(f"{SVG}polyline").get("points").split()]
    if x == "flops":   # 1, 2 and 8: a third of the way to the right
        assert [float(corner[0]) for corner in corners] == pytest.approx([50, 50 + 620 / 3, 670], abs=0.1)
    result = run(eval_brier, "--plot", tmp_path / "y.svg", tmp_path)   # a folder of folders of runs
    assert result.code == 2 and "has no evaluation" in result.err


def test_muon_auxiliary_loss_accumulation_and_bfloat16_train(foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--optimizer", "muon", "--aux_weight", "0.5",
               "--grad_accum", "2", "--dtype", "bfloat16", "--batch_size", "2", "--ae_batch_size", "2",
               "--eval_interval", "100").code == 0
    curve = losses(out, "calm")
    assert curve[15] < curve[1]


@pytest.mark.slow
def test_every_precision_trains_to_the_same_loss(foxes, tmp_path, run):
    """float16 with its gradient scaler, bfloat16 and float32: the same autoencoder and CALM, within a few
    per cent.

    The autoencoder's rate stays up for longer than nano's: at 60 steps its loss is then past the steep part
    of the curve, where one step more or less is worth a tenth."""
    flags = ["--data", foxes, *SHORT, "--ae_max_steps", 60, "--max_steps", 60, "--batch_size", 8,
             "--ae_batch_size", 16, "--warmup_steps", 50, "--ae_warmup_steps", 50, "--ae_lr", 3e-3,
             "--ae_decay_frac", 0.4, "--lr", 1e-3]
    last = {}
    for dtype in ("float32", "bfloat16", "float16"):
        assert run(train, *flags, "--out_dir", tmp_path / dtype, "--dtype", dtype).code == 0
        last[dtype] = [losses(tmp_path / dtype, stage)[60] for stage in ("autoencoder", "calm")]
        assert last[dtype] == pytest.approx(last["float32"], rel=0.05)
    assert losses(tmp_path / "float16", "autoencoder")[1] > 2 * last["float16"][0]


def test_runs_get_the_training_flops_of_the_run_they_are_matched_to(foxes, tmp_path, run):
    """The baseline, and CALM with another K, whose own autoencoder counts."""
    out, other = tmp_path / "out", tmp_path / "k2"
    flags, matched = ["--data", foxes, *SHORT, "--ae_max_steps", 5], ["--match_flops", out]
    assert run(train, *flags, "--out_dir", out, "--eval_interval", 100).code == 0
    assert run(train, *flags, "--out_dir", out, "--model", "ar", *matched).code == 0
    assert run(train, *flags, "--out_dir", other, "--chunk_size", 2, *matched).code == 0
    calm, ar, k2 = checkpoint_of(out, "calm"), checkpoint_of(out, "ar"), checkpoint_of(other, "calm")
    assert checkpoint_of(other, "autoencoder")["flops"] > 0 and k2["step"] > 15
    alone = tmp_path / "alone"
    assert run(train, *flags, "--out_dir", alone, "--model", "ar", "--flops", calm["flops"]).code == 0
    assert checkpoint_of(alone, "ar")["flops"] == ar["flops"]
    assert ar["flops"] == pytest.approx(calm["flops"], rel=0.05)
    assert k2["flops"] == pytest.approx(calm["flops"], rel=0.05)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_other_heads_train_resume_and_sample(head, foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--head", head, "--num_evals", 4,
               "--input_mode", "both").code == 0
    assert all(math.isfinite(loss) for loss in losses(out, "calm").values())
    assert run(train, "--resume", "--data", foxes, "--out_dir", out, "--max_steps", 20).code == 0
    assert run(sample, "--out_dir", out, "--num_evals", 6, "--max_new_tokens", 8).code == 0
    assert run(eval_brier, "--out_dir", out, "--num_evals", 2, "--windows", 2).code == 0


def test_an_autoencoder_trains_without_any_of_its_regularisers(foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "autoencoder", "--kl_weight", 0,
               "--kl_clip", 0, "--dropout", 0, "--token_mask", 0).code == 0
    curve = losses(out, "autoencoder")
    assert curve[max(curve)] < curve[1]


# --- Muon ---------------------------------------------------------------------------------------------------

SHAPES = [(16, 16), (64, 64), (48, 16), (16, 48), (128, 40), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_takes_singular_values_to_about_one_and_keeps_the_vectors(shape):
    """Of two matrices at once, with random singular vectors and singular values from 0.02 to 1."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    update = train.orthogonal(U * torch.linspace(1, 0.02, U.shape[-1]) @ Vh)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.3
    core = U.mT @ update @ Vh.mT                                      # U^T update V
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).norm() < 0.05 * core.norm()


def test_a_step_of_muon_is_a_step_of_torchs():
    """Within what bfloat16, in which torch computes it, can tell: with momentum, so two steps."""
    torch.manual_seed(0)
    first = [torch.randn(shape) / 50 for shape in (*SHAPES, SHAPES[0])]   # two of one shape
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in first] for _ in range(2))
    optimizers = [train.Muon(ours, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)]
    for _ in range(2):
        before = [w.detach().clone() for w in theirs]
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b, old in zip(ours, theirs, before):
            assert (a - b).norm() < 0.05 * (b - old).norm()


# --- The toolkit on a trained model -------------------------------------------------------------------------

def test_exact_sampling_falls_back_and_says_so_where_it_needs_too_many_calls(trained, run):
    flags = ["--out_dir", trained / "out", "--device", "cpu", "--max_new_tokens", 12, "--sampler", "exact"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(sample, *flags, "--temperature", 0.6).code == 0
    with pytest.warns(UserWarning, match="a chunk took over 20 calls"):   # T needs fifty equal ones in a row
        result = run(sample, *flags, "--temperature", 0.02, "--max_calls", 20)
    assert result.code == 0 and "[12 tokens in" in result.err


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_the_frontier_falls_from_accuracy_and_collision_at_one(model, trained, run):
    """One candidate is too few for T = 1/2: no row."""
    result = run(eval_brier, "--out_dir", trained / "out", "--model", model, "--device", "cpu",
                 "--windows", 4, "--frontier", "--temperatures", 1, 0.5, "--candidates", 1, 20, "--json")
    points = [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    warm, cold = ([p for p in points if p["temperature"] == T] for T in (1, 0.5))
    assert result.code == 0 and len(warm) >= 1 and len(cold) == 1
    assert cold[0]["collision"] > warm[0]["collision"] > 0            # colder is more alike


def test_the_baseline_needs_no_candidates_for_a_low_temperature(trained, run):
    flags = ["--out_dir", trained / "out", "--device", "cpu", "--temperature", 0.004, "--max_new_tokens", 8]
    assert run(sample, *flags, "--model", "ar").code == 0 and run(sample, *flags).code == 2


def test_a_bar_stands_before_each_chunk(trained, run):
    """Between two bars are at most K tokens, and without the bars it is the same text."""
    flags = ["--out_dir", trained / "out", "--device", "cpu", "--start", "the quick", "--max_new_tokens", 40]
    plain, barred = run(sample, *flags).out, run(sample, *flags, "--chunks").out
    assert "|" not in plain and barred.replace("|", "") == plain
    chunks = barred.removeprefix("the quick").strip("\n").split("|")[1:]
    assert len(chunks) == 10 and max(map(len, chunks)) <= 4


def test_a_bar_tears_no_character(trained, run, monkeypatch):
    """One of several bytes may begin in a chunk and end in the next."""
    text = "é, ü: naïve café. 日本語と、漢字。"
    tokens = torch.tensor([list(text.encode())])
    monkeypatch.setattr(sample, "stream", lambda *_, **__: tokens.split(4, dim=1))
    flags = ["--out_dir", trained / "out", "--device", "cpu"]
    plain, barred = run(sample, *flags).out, run(sample, *flags, "--chunks").out
    assert text in plain and barred.replace("|", "") == plain


# --- Interrupted, resumed, spread out -----------------------------------------------------------------------

@pytest.mark.parametrize("stage, model", [("autoencoder", "calm"), ("calm", "calm"), ("ar", "ar")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
        stage, model, number, foxes, tmp_path, run, monkeypatch):
    """Broken off in the seventh step of each stage."""
    flags = ["--data", foxes, *SHORT, "--model", model, "--optimizer", "muon"]
    assert run(train, *flags, "--out_dir", tmp_path / "whole").code == 0
    plain = train.make_optimizers

    def interrupted(m, *settings):
        """The optimizers, the first of which sends the signal in its seventh step of that stage."""
        optimizers, calls = plain(m, *settings), []
        step = optimizers[0].step

        def counted(*a, **k):
            calls.append(1)
            if type(m).__name__.lower() == stage and len(calls) == 7:
                os.kill(os.getpid(), number)
            return step(*a, **k)
        optimizers[0].step = counted
        return optimizers

    monkeypatch.setattr(train, "make_optimizers", interrupted)
    result = run(train, *flags, "--out_dir", tmp_path / "broken")
    assert result.code == 130 and "interrupted at step 7" in result.out and "--resume" in result.out
    assert checkpoint_of(tmp_path / "broken", stage)["step"] == 7
    monkeypatch.setattr(train, "make_optimizers", plain)
    assert run(train, "--resume", "--model", model, "--data", foxes, "--out_dir", tmp_path / "broken",
               "--device", "cpu").code == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "broken", model)
    whole, broken = (losses(tmp_path / name, stage) for name in ("whole", "broken"))
    assert {k: broken[k] for k in whole} == whole


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(foxes, data_dir, tmp_path):
    """SIGKILL at random moments of both stages, half of them while a checkpoint is being written."""
    command = [sys.executable, ROOT / "train.py", "--data", data_dir / foxes, *TINY, "--ae_max_steps", "150",
               "--max_steps", "150", "--eval_interval", "4"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **ALONE)
    subprocess.run([*map(str, command), "--out_dir", tmp_path / "whole"], check=True, **quiet)
    out, moments, writing = tmp_path / "killed", random.Random(0), 0
    log, kills = out / "log.jsonl", 0
    while True:
        resume = ["--resume"] if list(out.glob("*.pt")) else []
        process = subprocess.Popen([*map(str, command), "--out_dir", out, *resume], **quiet)
        before, torn = log.read_bytes() if log.exists() else b"", set(out.glob(".*.pt.*.tmp"))
        while kills < 20 and process.poll() is None:   # until it trains
            if log.exists() and log.read_bytes() != before:
                break
            time.sleep(0.01)
        if kills == 20:
            assert process.wait() == 0, process.stderr.read()
            break
        time.sleep(moments.uniform(0, 0.5))
        while kills % 2 and process.poll() is None and not set(out.glob(".*.pt.*.tmp")) - torn:
            pass
        writing += bool(set(out.glob(".*.pt.*.tmp")) - torn)
        assert process.poll() is None, f"ended before the 20 kills: {process.stderr.read()}"
        process.kill()
        process.wait()
        kills += 1
    assert writing >= 5
    for stage in ("autoencoder", "calm"):
        assert_same_weights(tmp_path / "whole", out, stage)
        assert losses(out, stage) == losses(tmp_path / "whole", stage)


def test_two_runs_side_by_side_in_one_folder_leave_whole_files(foxes, data_dir, tmp_path):
    """Of one command: the same run, twice; and what else is in the folder stays."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {"log.tmp": "mine", "calm.pt.tmp": "mine", "autoencoder.pt.tmp": "mine"}
    for name, text in mine.items():
        (out / name).write_text(text)
    command = [sys.executable, ROOT / "train.py", "--data", data_dir / foxes, *SHORT, "--eval_interval", "1",
               "--out_dir", out, "--model", "autoencoder"]
    piped = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **ALONE)
    runs = [subprocess.Popen(command, **piped) for _ in "ab"]
    for process in runs:
        error = process.communicate()[1]
        assert process.returncode == 0 or b"unfinished" in error or b"already trained" in error, error
    assert checkpoint_of(out, "autoencoder")["step"] == 15
    assert {name: (out / name).read_text() for name in mine} == mine


def test_a_finished_autoencoder_is_used_as_it_is(foxes, tmp_path, run):
    """Also with another length asked for: a CALM may have been trained on it. Only --model autoencoder goes
    on with it."""
    flags = ["--data", foxes, "--out_dir", tmp_path / "out", *SHORT]
    path = tmp_path / "out" / "autoencoder.pt"
    assert run(train, *flags, "--model", "autoencoder").code == 0
    before = path.read_bytes()
    assert run(train, *flags, "--ae_max_steps", "30").code == 0
    assert path.read_bytes() == before
    assert run(train, *flags, "--model", "autoencoder", "--resume", "--ae_max_steps", "30").code == 0
    assert checkpoint_of(tmp_path / "out", "autoencoder")["step"] == 30


def test_two_processes_go_the_whole_road_from_an_empty_folder(foxes, data_dir, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(torchrun(2, "--data", data_dir / foxes, "--out_dir", out, *TINY, "--model", "calm",
                                   "--ae_max_steps", 4, "--max_steps", 4),
                          capture_output=True, text=True, timeout=240, **ALONE)
    assert done.returncode == 0, done.stderr
    assert "BrierLM" in done.stdout
    for kind in ("autoencoder", "calm"):
        assert checkpoint_of(out, kind)["done"] and checkpoint_of(out, kind)["step"] == 4


@pytest.mark.parametrize("model, processes", [("calm", 2), ("ar", 2), ("calm", 4)])
def test_gloo_processes_equal_one_with_as_many_micro_batches(
        model, processes, foxes, data_dir, tmp_path, run):
    """The same micro-batches on one process or one on each: the same losses and weights. ar has no noise:
    literally so many times the batch.

    From a checkpoint on: AdamW makes a full step of any gradient, also of the head's first ones, which are
    rounding noise."""
    one, many = tmp_path / "one", tmp_path / "many"
    assert run(train, "--data", foxes, *SHORT, "--optimizer", "adamw", "--model", model,
               "--out_dir", one).code == 0
    shutil.copytree(one, many)
    flags = ["--resume", "--data", data_dir / foxes, "--model", model, "--max_steps", 21, "--device", "cpu"]
    alone = ["--grad_accum", processes] if model == "calm" else ["--batch_size", 4 * processes]
    assert run(train, *flags, *alone, "--out_dir", one).code == 0
    done = subprocess.run(torchrun(processes, *flags, "--out_dir", many),
                          capture_output=True, text=True, timeout=240, **ALONE)
    assert done.returncode == 0, done.stderr
    assert_same_weights(one, many, model, rtol=1e-3, atol=1e-5)
    assert losses(one, model) == pytest.approx(losses(many, model), rel=1e-4)


def test_a_dead_process_ends_the_run_and_another_number_goes_on(foxes, data_dir, tmp_path, run):
    out = tmp_path / "out"
    flags = ["--data", data_dir / foxes, *SHORT, "--model", "ar", "--out_dir", out]
    group = subprocess.Popen(torchrun(2, *flags, "--max_steps", 100_000), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, **ALONE)
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
    assert run(train, *flags, "--resume", "--max_steps", step + 5).code == 0
    assert checkpoint_of(out, "ar")["step"] == step + 5


def test_a_full_disk_leaves_the_old_checkpoint(foxes, tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    flags = ["--data", foxes, "--out_dir", out, *SHORT, "--model", "ar"]
    assert run(train, *flags).code == 0
    before = (out / "ar.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    result = run(train, *flags, "--resume", "--max_steps", "20")
    assert result.code == 2 and "No space left" in result.err
    assert "previous checkpoint is intact" in result.err
    assert (out / "ar.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_step(
        foxes, tmp_path, run, monkeypatch):
    out, plain, calls = tmp_path / "out", train.AR.loss, []

    def loss(model, tokens):
        calls.append(1)
        value, metrics = plain(model, tokens)
        if len(calls) > 12:   # 10 training steps, a validation, 1 more step
            return value * math.nan, {"loss": value.detach() * math.nan}
        return value, metrics
    monkeypatch.setattr(train.AR, "loss", loss)
    result = run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar", "--log_interval", "1")
    assert result.code == 2 and "the loss of ar is nan" in result.err and "at step 12" in result.err
    checkpoint = checkpoint_of(out, "ar")
    assert checkpoint["step"] == 10 and all(v.isfinite().all() for v in checkpoint["model"].values())


@pytest.mark.parametrize("dtype, step", [("float32", 12), ("float16", 27)])   # float16: 2^16 halved to 1
def test_a_gradient_that_is_not_a_number_stops_the_run(dtype, step, foxes, tmp_path, run, monkeypatch):
    """Of a finite loss, at a step that is not logged."""
    out, plain, calls = tmp_path / "out", train.AR.loss, []

    def loss(model, tokens):
        calls.append(1)
        value, metrics = plain(model, tokens)
        if len(calls) >= 13 and value.requires_grad:
            weight = model.lm_head.weight
            value = value + 0 * (weight - weight.detach()).sum().sqrt()   # 0, with an infinite derivative
        return value, metrics
    monkeypatch.setattr(train.AR, "loss", loss)
    result = run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar", "--dtype", dtype,
                 "--max_steps", 40)
    assert result.code == 2 and f"its gradient's norm nan, at step {step}:" in result.err.replace(";", ":")
    checkpoint = checkpoint_of(out, "ar")
    assert checkpoint["step"] == (step - 1) // 10 * 10
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


# --- Faults in files ----------------------------------------------------------------------------------------

@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run and of its data, to damage -> the baseline's flags to go on with it, the
    run's folder, the data's."""
    out, folder = (shutil.copytree(trained / name, tmp_path / name) for name in ("out", "foxes4"))
    return ["--data", folder, "--out_dir", out, "--model", "ar", "--resume"], out, folder


@pytest.mark.parametrize("damage", ["a flipped byte", "missing bytes", "a page of zeros"])
def test_a_damaged_checkpoint_is_named_and_trained_again_once_it_is_away(damage, copied, trained, run):
    flags, out, folder = copied
    path = out / "ar.pt"
    whole, middle = path.read_bytes(), path.stat().st_size // 2
    page = next(i for i in range(middle, len(whole), 4096) if any(whole[i:i + 4096]))   # not zero yet
    damaged = {"a flipped byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:],
               "missing bytes": whole[:middle],
               "a page of zeros": whole[:page] + bytes(4096) + whole[page + 4096:]}[damage]
    path.write_bytes(damaged)
    for script, argv in ((train, flags), (sample, ["--out_dir", out, "--model", "ar"])):
        result = run(script, *argv)
        assert result.code == 2 and "ar.pt is not a whole checkpoint" in result.err
        assert "move it away and train again" in result.err and "Traceback" not in result.err
    assert path.read_bytes() == damaged
    path.unlink()
    assert run(train, "--data", folder, "--out_dir", out, *SHORT, "--model", "ar").code == 0
    assert_same_weights(trained / "out", out, "ar")


def test_data_replaced_between_runs_is_recognised(copied, tmp_path, run):
    flags, _, folder = copied
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[2:] + path.read_bytes()[:2])   # as long as before
    result = run(train, *flags, "--max_steps", 20)
    assert result.code == 2 and "train.bin is not, or no longer, what was prepared" in result.err
    text = tmp_path / "cats.txt"
    text.write_text("the quick brown cat jumps over the lazy dog. " * 800)
    data.prepare.prepare([text], folder.name, out_root=folder.parent)   # other data under the same name
    result = run(train, *flags, "--max_steps", 20)
    assert result.code == 2 and "was trained on other data" in result.err


def test_a_torn_line_of_the_log_is_left_out(copied, run):
    flags, out, _ = copied
    before = losses(out, "ar")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"stage": "ar", "st')
    assert run(train, *flags, "--max_steps", 20).code == 0
    assert before.items() <= losses(out, "ar").items() and 20 in losses(out, "ar")


def test_an_out_dir_that_cannot_be_written_is_one_line(trained, tmp_path, run):
    (tmp_path / "file").write_text("not a folder")
    result = run(train, "--data", trained / "foxes4", "--out_dir", tmp_path / "file" / "out", *SHORT,
                 "--model", "ar")
    assert result.code == 2 and "could not write" in result.err and "Traceback" not in result.err


def test_a_checkpoint_cannot_choose_where_a_resumed_run_writes(copied, tmp_path, run):
    flags, out, _ = copied
    checkpoint, elsewhere = checkpoint_of(out, "ar"), str(tmp_path / "elsewhere")
    checkpoint["settings"] |= {"out_dir": elsewhere, "match_flops": elsewhere, "max_steps": 20}
    torch.save(checkpoint, out / "ar.pt")
    before = set(tmp_path.rglob("*"))
    assert run(train, *flags, "--device", "cpu").code == 0
    assert {p.parent for p in set(tmp_path.rglob("*")) - before} <= {out}
    assert checkpoint_of(out, "ar")["step"] == 20


# --- Other machines -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuda, mps, expected", [
    (True, False, "cuda"), (False, True, "cpu"), (False, False, "cpu"), (True, True, "cuda")])
def test_one_function_chooses_the_device(cuda, mps, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert select_device().type == expected
    for name, there in (("cuda:0", cuda), ("mps", mps), ("cpu", True)):
        if there:
            assert str(select_device(name)) == name
        else:
            with pytest.raises(SystemExit, match="2"):
                select_device(name)
            assert f"no device {name!r} here" in capsys.readouterr().err


@pytest.mark.parametrize("device, fast, expected", [
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("cpu", True, torch.bfloat16),
    ("cpu", False, torch.float32), ("mps", False, torch.float32)])
def test_one_function_chooses_the_precision(device, fast, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert select_dtype("auto", torch.device(device)) == expected
    assert select_dtype("float16", torch.device(device)) == torch.float16
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")   # held to it
    assert device == "cuda" or select_dtype("auto", torch.device(device)) == torch.float32


def test_a_card_gets_another_preset_and_text(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.parse_args([]).data == "stdlib"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = train.parse_args([])
    assert (args.data, str(args.out_dir), args.n_layer) == ("site-packages", "out/site-packages", 8)
    assert train.parse_args(["--data", "stdlib"]).data == "stdlib"
    assert train.parse_args(["--device", "cpu"]).data == "stdlib"


def test_mini_reads_its_text_at_most_four_times_for_as_many_flops_as_were_measured():
    """The 79e6 bytes that requirements.txt brings; 4.5e16 FLOPs are what the README's figures took."""
    args = train.parse_args(["--preset", "mini"])
    ae = train.config_of(train.AutoencoderConfig, args, "autoencoder", vocab_size=257)
    config = train.config_of(train.CALMConfig, args, "calm", vocab_size=257)
    text = args.max_steps * args.batch_size * args.grad_accum * args.context
    assert 3.5 < text / 79e6 < 4
    assert train.flops_per_token(config, ae)["train"] * text == pytest.approx(4.5e16, rel=0.02)


def kept_gb(model, tokens, dtype):
    """What autograd keeps of a training step with matrix products in dtype, parameters apart, in GiB."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage   # which stays alive: no other gets its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(torch.device("cpu"), dtype):
            model.loss(tokens)
    return sum(storage.nbytes() for storage in kept.values()) / 2**30


@pytest.mark.parametrize("preset, vocab_size, most", [
    ("nano", 50_257, 0.25), ("mini", 257, 4), ("mini", 50_257, 4), ("M", 128_256, 46)])
def test_a_large_vocabulary_takes_little_memory(preset, vocab_size, most):
    """Fake tensors: the shapes of a step, without its memory. M, the paper's, has no auxiliary loss."""
    args = train.parse_args(["--preset", preset])
    with FakeTensorMode():
        ae, config = (train.config_of(kind, args, stage, vocab_size=vocab_size) for kind, stage in
                      ((train.AutoencoderConfig, "autoencoder"), (train.CALMConfig, "calm")))
        model = train.CALM(config, train.Autoencoder(ae)).train()
        tokens = torch.zeros(args.batch_size, args.context + args.chunk_size, dtype=torch.long)
        for dtype in (torch.float32, torch.bfloat16):
            assert 0.01 < kept_gb(model, tokens, dtype) < most


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_training_step_is_the_plain_one(backward):
    """The loss, and with -m slow the gradient, by Inductor, with the same random numbers."""
    from torch._inductor import config as inductor
    args = train.parse_args(TINY)
    config = train.config_of(train.CALMConfig, args, "calm", n_layer=1)
    ae = train.Autoencoder(train.config_of(train.AutoencoderConfig, args, "autoencoder", n_layer=1))
    model = train.CALM(config, ae).train()
    tokens = torch.randint(257, (2, args.context + args.chunk_size))
    found = []
    with inductor.patch(fallback_random=True):
        for compute in (model, torch.compile(model)):
            torch.manual_seed(0)
            loss, _ = compute(tokens)
            found.append([loss.detach()])
            if backward:
                loss.backward()
                found[-1] += [p.grad for p in model.parameters() if p.requires_grad]
                model.zero_grad()
    assert hasattr(compute, "_orig_mod")
    for plain, compiled in zip(*found):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)


def test_without_a_compiler_a_run_goes_on_uncompiled_and_says_so(foxes, tmp_path, run, monkeypatch):
    def no_compiler(function):
        def compiled(*args):
            raise RuntimeError("Cannot find a working triton installation\nand more lines")
        return compiled
    monkeypatch.setattr(torch, "compile", no_compiler)
    result = run(train, "--data", foxes, "--out_dir", tmp_path / "out", *SHORT, "--compile", "on",
                 "--model", "ar", "--max_steps", 2)
    assert result.code == 0
    said = "not compiled: RuntimeError: Cannot find a working triton installation and more lines\n"
    assert said in result.out and ", compiled" not in result.out


def test_a_full_card_is_one_line(foxes, trained, tmp_path, run, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    for result in (run(train, *TINY, "--data", foxes, "--out_dir", tmp_path / "out", "--model", "ar"),
                   run(sample, "--out_dir", trained / "out"), run(eval_brier, "--out_dir", trained / "out")):
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith("error: CUDA out of memory: lower --")


def test_a_fault_of_the_card_is_not_called_a_lack_of_memory(trained, run, monkeypatch):
    def fault(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fault)
    with pytest.raises(RuntimeError, match="illegal"):
        run(sample, "--out_dir", trained / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_cpu_keeps_the_memory_that_a_step_frees():
    # In a process of its own: what other tests left on the heap decides where a block goes.
    code = """
import resource, statistics, torch
from data.checkpoint import select_device
select_device("cpu")
faults = []
for _ in range(21):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)                                                   # 64 MiB: 16,384 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert float(result.stdout) < 1000


def test_the_others_wait_longer_than_any_data_takes_to_prepare(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, **kwargs: asked.update(kwargs))
    monkeypatch.setattr(train.atexit, "register", lambda function: None)
    train.World(train.parse_args(TINY))
    assert asked["timeout"].total_seconds() > 6 * 3600   # the default is ten minutes on CUDA


# --- Gradients that are no numbers --------------------------------------------------------------------------

def two_optimizers(scale=None):
    """A model of a matrix and of token embeddings, with Muon for one and AdamW for the other."""
    model = torch.nn.ModuleDict({"inner": torch.nn.Linear(4, 4, bias=False),
                                 "embed_tokens": torch.nn.Embedding(4, 4)})
    model.forward = lambda factors: (sum((p * f).sum() for p, f in zip(model.parameters(), factors)), {})
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer="muon"))
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, train.Muon]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return model, optimizers, scaler


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("value, scale", [(math.inf, 1024.0), (math.nan, 1024.0), (math.nan, None)])
def test_a_gradient_that_is_no_number_moves_no_weight_of_either_optimizer(bad, value, scale):
    model, optimizers, scaler = two_optimizers(scale)
    world = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    before = [p.detach().clone() for p in model.parameters()]

    def step(*factors):
        return train.train_step(model, [torch.tensor(factors)], 1, optimizers, scaler, 1.0, world)[1]
    norm = step(*(value if i == bad else 1.0 for i in range(2)))
    assert not norm.isfinite() and all(map(torch.equal, before, model.parameters()))
    if scale:
        assert scaler.get_scale() == scale / 2
    assert step(1.0, 1.0).isfinite()
    assert not any(map(torch.equal, before, model.parameters()))


# --- Speed --------------------------------------------------------------------------------------------------

def test_the_bench_measures_each_part_and_both_models(run):
    figures = last_line(run(bench, "--seconds", "0.02", "--json", *TINY, "--vocab_size", "50"))
    assert figures["precision"] == "float32" and figures["mfu"] is None and 0 < figures["matmul_share"] < 1
    assert figures["train_tokens_per_s"] > 0 and figures["peak_memory_gb"] > 0.1
    assert set(figures["share"]) == {"backbone", "head", "energy_score", "autoencoder", "optimizer"}
    assert min(figures["share"].values()) > 0
    assert set(figures["generate"]) == {"calm_T1", "calm_T0.5", "ar_T1", "calm_T1_b32", "ar_T1_b32"}
    assert min(figures["generate"].values()) > 0


@torch.no_grad()
def test_casting_matrices_once_equals_autocast(trained):
    """The cast for inference gives what autocast gives, for CALM and AR."""
    for kind in ("calm", "ar"):
        tokens = torch.arange(32)[None] % 97
        hidden = []
        for dtype in (torch.float32, torch.bfloat16):
            model, _ = calm.load_model(trained / "out", kind, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                hidden.append(model.hidden(tokens))
                torch.manual_seed(0)
                hidden.append(model.draw(hidden[-1][:, -1])[0])
        assert model.transformer.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
        assert torch.equal(hidden[0], hidden[2]) and torch.equal(hidden[1], hidden[3])


# --- Resumed: each flag is obeyed, or a line says that it is not --------------------------------------------

def all_flags():
    """Of train.py: {name: argparse's action}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Parser, "parse_args", lambda parser, argv: found.update(
            {action.dest: action for action in parser._actions}) or sys.exit())
        with pytest.raises(SystemExit):
            train.parse_args([])
    return found


FLAGS = all_flags()


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag not in {"help", *train.OWN}])
def test_a_resumed_run_obeys_a_flag_or_refuses_it(flag, trained, capsys):
    was = checkpoint_of(trained / "out", "calm")["settings"][flag]
    values = FLAGS[flag].choices or ([0.125] if isinstance(was, float) else [3])
    value = next(value for value in values if value != was)
    argv = ["--resume", "--out_dir", str(trained / "out"), f"--{flag}", str(value)]
    if flag not in train.FIXED:
        assert getattr(train.parse_args(argv), flag) in (value, str(value))
    else:
        with pytest.raises(SystemExit, match="2"):
            train.parse_args(argv)
        expected = f"error: .*out has {flag} {was}, this run asks for {value}: drop"
        assert re.search(expected, capsys.readouterr().err)


def test_a_resumed_run_has_the_rates_that_it_is_given(copied, run):
    """Of both optimizers, and the weight decay; at a constant rate."""
    flags, out, _ = copied
    rates = ["--lr", 1e-5, "--muon_lr", 3e-5, "--weight_decay", 0.5, "--decay_frac", 0]
    assert run(train, *flags, *rates, "--max_steps", 30).code == 0
    assert all(e["lr"] == 1e-5 for e in log_of(out) if e["stage"] == "ar" and e["step"] > 20 and "lr" in e)
    groups = [g for o in checkpoint_of(out, "ar")["optimizers"] for g in o["param_groups"]]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-5, 0.5), (1e-5, 0.0), (3e-5, 0.5)]


def test_a_resumed_run_counts_its_tokens_and_flops_on_with_another_batch(copied, run):
    flags, out, _ = copied
    before = checkpoint_of(out, "ar")["flops"]
    tokens = max(e["tokens"] for e in log_of(out) if e["stage"] == "ar" and "tokens" in e)
    assert run(train, *flags, "--batch_size", 8, "--max_steps", 20).code == 0
    last = [e for e in log_of(out) if e["stage"] == "ar" and "tokens" in e][-1]
    assert last["step"] == 20 and last["tokens"] == tokens + 5 * 8 * 64
    assert last["flops"] == pytest.approx(before * last["tokens"] / tokens)
    assert checkpoint_of(out, "ar")["flops"] == last["flops"]


def test_a_resumed_run_ends_at_the_flops_that_it_is_given(copied, run):
    """Also with another batch; again, it only evaluates; fewer than are spent are refused."""
    flags, out, _ = copied
    flags = [*flags, "--batch_size", 8, "--flops"]
    total = 2.5 * checkpoint_of(out, "ar")["flops"]
    assert run(train, *flags, total).code == 0
    once = checkpoint_of(out, "ar")
    a_step = (once["flops"] - total / 2.5) / (once["step"] - 15)
    assert once["flops"] == pytest.approx(total, abs=a_step / 2)
    assert run(train, *flags, total).code == 0 and checkpoint_of(out, "ar")["step"] == once["step"]
    result = run(train, *flags, total / 2)
    assert result.code == 2 and "FLOPs are spent: raise --flops" in result.err


@pytest.mark.parametrize("first, second", [("float32", "float16"), ("float16", "float32"),
                                           ("bfloat16", "float16"), ("float16", "bfloat16")])
def test_a_run_goes_on_in_another_precision(first, second, foxes, tmp_path, run):
    flags = ["--data", foxes, "--out_dir", tmp_path / "out", "--model", "ar"]
    assert run(train, *flags, *SHORT, "--dtype", first).code == 0
    assert run(train, *flags, "--resume", "--max_steps", 20, "--dtype", second).code == 0
    assert losses(tmp_path / "out", "ar")[20] < losses(tmp_path / "out", "ar")[1]


def test_a_run_cannot_go_on_to_an_earlier_step(copied, run):
    flags, out, _ = copied
    before = (out / "log.jsonl").read_bytes()
    result = run(train, *flags, "--max_steps", 5)
    assert result.code == 2 and "ar.pt is at step 15: --max_steps must be at least that" in result.err
    assert (out / "log.jsonl").read_bytes() == before


def test_a_matched_run_that_is_interrupted_in_stage_1_is_still_matched(trained, tmp_path, run, monkeypatch):
    plain, out = train.train_step, tmp_path / "out"

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)
    monkeypatch.setattr(train, "train_step", interrupted)
    flags = ["--data", trained / "foxes4", "--out_dir", out]
    assert run(train, *flags, *SHORT, "--chunk_size", 2, "--match_flops", trained / "out").code == 130
    monkeypatch.setattr(train, "train_step", plain)
    assert run(train, *flags, "--resume").code == 0
    flops = [checkpoint_of(folder, "calm")["flops"] for folder in (out, trained / "out")]
    assert flops[0] == pytest.approx(flops[1], rel=0.05)


def test_a_matched_baseline_has_the_sizes_of_the_run_and_its_text(trained):
    """Unless others are given."""
    run, argv = trained / "out", ["--model", "ar", "--match_flops", str(trained / "out")]
    args, calm = train.parse_args(argv), checkpoint_of(run, "calm")
    for name in ("n_embd", "n_layer", "n_head", "n_ff"):
        assert getattr(args, name) == calm["config"][name]
    assert args.context == calm["config"]["block_size"] * 4
    assert args.data == str(trained / "foxes4") and args.model == "ar"
    assert train.parse_args([*argv, "--n_embd", "128"]).n_embd == 128
    assert train.parse_args([*argv, "--preset", "S"]).n_embd == 768


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_closing_evaluation(number, foxes, tmp_path, run, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda *_: os.kill(os.getpid(), number) or time.sleep(9))
    began = time.time()
    result = run(train, "--data", foxes, "--out_dir", tmp_path / "out", *SHORT, "--model", "ar")
    assert result.code == 130 and time.time() - began < 9
    assert checkpoint_of(tmp_path / "out", "ar")["done"]


def test_ctrl_c_in_the_last_step_of_stage_1_does_not_start_stage_2(foxes, tmp_path, run, monkeypatch):
    plain = train.validate

    def interrupted(stage, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(stage, *args, **kwargs)
    monkeypatch.setattr(train, "validate", interrupted)
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--eval_interval", 100).code == 130
    assert checkpoint_of(out, "autoencoder")["done"] and not (out / "calm.pt").exists()


def test_a_run_whose_reader_has_left_is_saved(foxes, tmp_path, run, monkeypatch):
    """A closed pipe, or terminal, at the first line that is written to it in step 10."""
    plain = train.tqdm.write

    def closed(text, *args):
        if "step 10" in text:
            raise BrokenPipeError
        plain(text, *args)
    monkeypatch.setattr(train.tqdm, "write", closed)
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar").code == 130
    assert checkpoint_of(out, "ar")["step"] in (10, 11)


def test_a_pipe_sees_each_line_and_a_run_whose_pipe_closes_is_saved(trained, tmp_path):
    command = [sys.executable, "train.py", "--data", trained / "foxes4", "--out_dir", tmp_path, *SHORT,
               "--model", "ar", "--max_steps", "1000000", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **ALONE)
    assert process.stdout.readline().startswith(b"ar: ")
    process.stdout.close()
    assert process.wait() == 130 and checkpoint_of(tmp_path, "ar")["step"] < 1000


# --- Where it stands: another place, other packages, other processes ----------------------------------------

def test_a_run_samples_and_scores_in_another_place_without_the_tokenizers_file(tmp_path, run, monkeypatch):
    """Everything is moved, the vocabulary's file is gone: from absolute paths, inside the checkout."""
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "data").mkdir(parents=True)
    (old / "foxes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (old / "own.model").write_bytes(ranks)
    monkeypatch.setattr(data.prepare, "DATA_DIR", old / "data")
    data.prepare.prepare([old / "foxes.txt"], "foxes", tokenizer=str(old / "own.model"))
    assert run(train, *SHORT, "--data", old / "data" / "foxes", "--out_dir", old / "out").code == 0
    for kind in ("autoencoder", "calm"):
        assert str(tmp_path).encode() not in (old / "out" / f"{kind}.pt").read_bytes()
    old.rename(new)
    (new / "own.model").unlink()
    monkeypatch.setattr(data.prepare, "DATA_DIR", new / "data")
    flags = ["--out_dir", new / "out", "--device", "cpu"]
    assert run(sample, *flags, "--start", "the quick", "--max_new_tokens", 8).out.startswith("the quick")
    assert run(eval_brier, *flags, "--windows", 2).code == 0
    assert run(autoencoder_script, *flags, "--windows", 1).code == 0
    assert run(train, *flags, "--resume", "--max_steps", 16).code == 0
    shutil.rmtree(new / "data")
    assert run(sample, *flags, "--max_new_tokens", 8).code == 0


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data/prepare.py"])
def test_another_package_called_data_is_not_ours(script, tmp_path):
    for module in ("data", "train", "torch_data"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise SystemExit('not ours')")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"},
    {"RANK": "1"}, {"RANK": ""}, {"RANK": "-1"}, {"WORLD_SIZE": "2", "RANK": "2"},
    {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "many"}])
def test_variables_of_torchrun_set_by_hand_are_one_line(variables, foxes, tmp_path, run, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run(train, *TINY, "--data", foxes, "--out_dir", tmp_path / "out")
    assert result.code == 2 and "torchrun sets WORLD_SIZE and RANK" in result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "out").exists()


# --- What is printed, to whatever it is printed -------------------------------------------------------------

SHELL = {   # what stands behind the command in a shell -> its exit code; the text that it has on stderr
    "| head -c 5": (0, ""), "| true": (0, ""), "2>&1 | true": (0, ""), "> /dev/full": (2, "No space left"),
    ">&-": (0, "tokens/s"), "2>&-": (0, ""), "<&-": (0, "tokens/s"), ">&- 2>&- <&-": (0, ""),
    "> /dev/null": (0, "tokens/s"), "| cat": (0, "tokens/s")}


@pytest.fixture(scope="module")
def redirected(trained):
    """sample.py with each of these behind it, all at a time -> {what: exit code, stderr}."""
    command = f"{sys.executable} sample.py --out_dir {trained}/out --device cpu --max_new_tokens 60 --start -"
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **ALONE)
    processes = {what: subprocess.Popen(["sh", "-c", f"echo the quick | {command} {what}"], **piped)
                 for what in SHELL}
    return {what: (process.communicate()[1], process.returncode) for what, process in processes.items()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("what", SHELL)
def test_a_pipe_that_closes_and_the_like_are_no_traceback(what, redirected):
    (error, code), (expected, said) = redirected[what], SHELL[what]
    assert code == expected and said in error, error
    assert "Traceback" not in error and "Exception" not in error


@pytest.mark.parametrize("encoding", ["ascii", "utf-16"])
def test_a_terminal_that_cannot_show_a_character_shows_another(encoding, trained):
    done = subprocess.run([sys.executable, "sample.py", "--out_dir", trained / "out", "--device", "cpu",
                           "--start", "né 中 \U0001f600", "--max_new_tokens", "8"], capture_output=True,
                          cwd=ROOT, env={**ALONE["env"], "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stdout.decode(encoding).startswith("n"), done.stderr


def test_a_start_in_bytes_that_are_no_utf_8_is_taken(trained):
    done = subprocess.run([sys.executable, "sample.py", "--out_dir", trained / "out", "--device", "cpu",
                           "--start", b"\xff\xfe the", "--max_new_tokens", "8"], capture_output=True, **ALONE)
    assert done.returncode == 0 and " the".encode() in done.stdout, done.stderr


def test_an_autoencoder_that_is_gone_is_not_trained_anew(trained, tmp_path, run):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    (out / "autoencoder.pt").unlink()
    for flags in (["--resume", "--max_steps", 50], []):
        result = run(train, "--data", trained / "foxes4", "--out_dir", out, *flags)
        assert result.code == 2 and "autoencoder.pt, which calm.pt was trained with, is gone" in result.err


def test_the_demonstration_takes_a_run_of_any_context_and_chunk_size(foxes, tmp_path, run, monkeypatch):
    for K, block_size in ((4, 3), (80, 2)):
        out = tmp_path / str(K)
        assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--chunk_size", K,
                   "--eval_interval", 100, "--block_size", block_size).code == 0
        monkeypatch.setattr(calm, "DEFAULT_RUN", str(out))
        result = run(calm)
        assert result.code == 0 and f"chunks of K = {K}" in result.out and "nan" not in result.out
        assert run(eval_brier, "--out_dir", out, "--windows", 2).code == 0


def test_data_named_by_the_folder_that_one_is_in_is_found_again(foxes, data_dir, tmp_path, run, monkeypatch):
    monkeypatch.chdir(data_dir / foxes)
    flags = ["--out_dir", tmp_path / "out", "--device", "cpu"]
    assert run(train, *SHORT, "--data", ".", *flags, "--model", "ar").code == 0
    monkeypatch.chdir(tmp_path)
    assert run(eval_brier, *flags, "--model", "ar", "--windows", 2).code == 0


# --- Damaged logs, numbers out of range ---------------------------------------------------------------------

LOG_DAMAGE = {
    "a torn line inside": b'{"stage": "ar", "st\n', "no JSON": b"hello\n", "a number": b"5\n",
    "a list": b"[1]\n",
    "not UTF-8": b'{"stage": "\xff"}\n', "no step": b'{"stage": "ar", "seconds": 1}\n',
    "a step of words": b'{"stage": "ar", "step": "ten", "seconds": 1}\n', "zeros": b"\0" * 99 + b"\n",
    "too deep": b"[" * 100_000 + b"\n", "no stage": b'{"step": 1, "seconds": 1}\n',
    "words for numbers": b'{"stage": "ar", "step": "6", "seconds": "1"}\n',
    "a score of nothing": b'{"stage": "ar", "step": 6, "seconds": 1, "flops": 1, "brierlm": null}\n'}


@pytest.mark.parametrize("damage", LOG_DAMAGE)
def test_a_damaged_log_is_said_and_kept(damage, copied, tmp_path, run):
    flags, out, _ = copied
    damaged = LOG_DAMAGE[damage] + (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(damaged)
    for result in (run(train, *flags, "--max_steps", 20), run(eval_brier, "--plot", tmp_path / "x.svg", out)):
        assert result.code == 2 and "log.jsonl is not the log of a run" in result.err
        assert "move it away" in result.err and "Traceback" not in result.err
    assert (out / "log.jsonl").read_bytes() == damaged
    (out / "log.jsonl").unlink()
    assert run(train, *flags, "--max_steps", 20).code == 0


@pytest.mark.parametrize("file", [
    "notes.txt", "out/log.jsonl", "out/ar.pt", "figure.svg", "out", "nowhere/x.svg"])
def test_a_figure_is_written_over_nothing(file, copied, tmp_path, run):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figure.svg").write_text("<svg/>")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = run(eval_brier, "--plot", tmp_path / file, tmp_path / "out")
    assert result.code == 2 and "could not write" in result.err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("tokens, refused", [(60, True), (67, True), (68, False)])
def test_a_text_too_short_to_evaluate_is_refused_at_the_start(tokens, refused, tmp_path, data_dir, run):
    """A context is 64, and the chunk that it predicts 4; the border token is one of them."""
    (tmp_path / "t.txt").write_text("x" * (tokens - 1))
    data.prepare.prepare([tmp_path / "t.txt"], "t", out_root=data_dir)
    result = run(train, *SHORT, "--data", "t", "--out_dir", tmp_path / "out")
    assert result.code == (2 if refused else 0) and (tmp_path / "out").exists() != refused
    assert ("tokens, fewer than one context of 68" in result.err) == refused


LARGE, HUGE = str(2 ** 31), "9" * 400
RANGE = [   # script, flags
    *[(train, [f"--{flag}", value]) for value in (LARGE, HUGE, "-1", "1.5", "nan", "")
      for flag in ("n_embd", "n_layer", "n_head", "n_ff", "n_noise", "n_head_layer", "block_size",
                   "latent_dim", "chunk_size", "num_samples", "num_targets", "max_steps", "batch_size",
                   "grad_accum",
                   "warmup_steps", "ae_n_embd", "ae_n_layer", "ae_max_steps", "num_evals")],
    *[(train, [f"--{flag}", value]) for value in ("1e39", "1e400", "-1", "nan", "inf", "-inf", "")
      for flag in ("lr", "muon_lr", "weight_decay", "grad_clip", "alpha", "aux_weight", "kl_weight",
                   "kl_clip", "dropout", "token_mask", "decay_frac", "ae_lr")],
    *[(train, [f"--{flag}", value]) for value in ("-1", "0.5", "")
      for flag in ("seed", "ae_batch_size", "log_interval", "eval_interval")], (train, ["--seed", HUGE]),
    (train, ["--ae_n_embd", "2147483647"]), (train, ["--ae_n_ff", "2147483647"]),
    (train, ["--latent_dim", "2147483647"]),
    (train, ["--grad_clip", "0"]), (train, ["--decay_frac", "1.5"]), (train, ["--block_size", "1"]),
    *[(train, ["--device", device]) for device in ("cpu:1", "cpu:x", "cuda:99", "meta", "", ":0", "cuda:-1")],
    *[(script, [f"--{flag}", value]) for script in (sample, eval_brier) for value in (HUGE, "-1", "0.5", "")
      for flag in ("seed", "num_evals")],
    *[(sample, [f"--{flag}", value]) for value in (HUGE, "0", "-1", "2.5")
      for flag in ("num_candidates", "temperature")],
    *[(sample, ["--temperature", value, *more]) for value in ("1e-320", "1e-9", "nan", "inf", "1.001", "-0")
      for more in ([], ["--sampler", "exact"], ["--model", "ar"])],
    *[(eval_brier, [f"--{flag}", value]) for value in (HUGE, "0", "-1", "2.5")
      for flag in ("num_draws", "context", "candidates")],
    *[(eval_brier, ["--frontier", "--temperatures", "1", value]) for value in ("0", "nan", "1e-320", "1e9")],
    *[(eval_brier, [f"--{flag}", value]) for value in ("0", "-1", "2.5") for flag in ("windows", "stride")],
    (eval_brier, ["--stride", HUGE]),
    *[(autoencoder_script, ["--windows", value]) for value in ("0", "-1", "2.5")],
]


@pytest.mark.parametrize("script, flags", RANGE)
def test_a_number_out_of_range_is_one_line(script, flags, trained, run, tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "DATA_DIR", trained)
    new = [*TINY, "--data", "foxes4"] if script is train else []
    result = run(script, *new, *flags, "--out_dir", tmp_path / "new" if script is train else trained / "out")
    assert result.code == 2, result.out + result.err
    assert result.err.count("\n") <= 2 and "error: " in result.err and "Traceback" not in result.err
    assert not (tmp_path / "new").exists()


# --- Bad input: one line, exit code 2, nothing lost ---------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of both models, in place of data/ and out/, and what may become of its files."""
    folder = tmp_path_factory.mktemp("trained")
    text, short, cats, ranks = (folder / x for x in ("foxes.txt", "short.txt", "cats.txt", "other.model"))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 800)
    short.write_text("too short")
    cats.write_text("the quick brown cat jumps over the lazy dog. " * 800)
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)))
    data.prepare.prepare([text], "foxes4", out_root=folder)
    data.prepare.prepare([text], "other", tokenizer=str(ranks), out_root=folder)
    data.prepare.prepare([short], "short", out_root=folder)
    data.prepare.prepare([cats], "cats", out_root=folder)
    for model, steps in (("calm", 40), ("ar", 15)):   # so many that not all of CALM's samples are the same
        flags = [*SHORT, "--ae_max_steps", steps, "--max_steps", steps, "--data", folder / "foxes4",
                 "--model", model, "--out_dir", folder / "out"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
            train.main()

    def put(name, kind, content):
        (folder / name).mkdir(exist_ok=True)
        path = folder / name / f"{kind}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    calm, ar, autoencoder = ((folder / "out" / f"{kind}.pt").read_bytes()
                             for kind in ("calm", "ar", "autoencoder"))
    put("cut", "calm", calm[:-5000])
    put("swapped", "calm", ar)
    put("only_ae", "autoencoder", autoencoder)
    lines = (folder / "out" / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "only_ae" / "log.jsonl").write_text("".join(x for x in lines if '"stage": "autoencoder"' in x))
    finished = checkpoint_of(folder / "out", "autoencoder")
    put("unfinished", "autoencoder", {**finished, "done": False, "step": 5})
    put("dear", "autoencoder", {**finished, "flops": 1e30})
    for kind in ("autoencoder", "calm", "ar"):
        checkpoint = checkpoint_of(folder / "out", kind)
        del checkpoint["format"]
        put("old", kind, checkpoint)
    return folder


BAD = {   # script, flags after --out_dir, folder for --out_dir, what the line must say
    "no data": (train, ["--data", "nothing"], "new", "no data set 'nothing'"),
    "short text": (train, ["--data", "short", *TINY], "new", "fewer than one context"),
    "chunk size 0": (train, ["--chunk_size", "0"], "new", "--chunk_size must be at least 1"),
    "chunk size 0 of a preset": (
        train, ["--preset", "nano", "--chunk_size", "0"], "new", "--chunk_size must be at least 1"),
    "a chunk longer than the context": (
        train, ["--preset", "nano", "--chunk_size", "600"], "new", "--block_size must be at least 1"),
    "heads": (train, ["--n_embd", "100", "--n_head", "3"], "new", "divisible by n_head 3"),
    "odd heads": (train, ["--n_embd", "12", "--n_head", "4"], "new", "even width"),
    "one sample": (train, ["--num_samples", "1"], "new", "--num_samples must be at least 2"),
    "alpha 2": (train, ["--alpha", "2"], "new", "--alpha must be in (0, 2)"),
    "negative seed": (train, ["--seed", "-1"], "new", "argument --seed: -1 is not in [0, "),
    "not a number": (train, ["--lr", "fast"], "new", "--lr"),
    "negative rate": (train, ["--lr", "-1"], "new", "--lr must be at least 0"),
    "autoencoder of no width": (train, ["--ae_n_embd", "0"], "new", "--ae_n_embd must be at least 1"),
    "a rate that is no number": (
        train, ["--ae_muon_lr", "nan"], "new", "--ae_muon_lr must be at least 0 and finite"),
    "negative auxiliary weight": (train, ["--aux_weight", "-1"], "new", "--aux_weight must be at least 0"),
    "a figure of nothing": (
        eval_brier, ["--plot", "curves.svg", "nowhere"], "out", "no evaluation with BrierLM yet, or is"),
    "a figure of an autoencoder": (
        eval_brier, ["--plot", "curves.svg", "only_ae"], "out", "has no evaluation with BrierLM yet"),
    "a figure nowhere": (
        eval_brier, ["--plot", "nowhere/curves.svg", "out"], "out", "directory: 'nowhere/curves.svg'"),
    "no steps": (train, ["--max_steps", "0"], "new", "--max_steps must be at least 1"),
    "no interval": (train, ["--eval_interval", "0"], "new", "argument --eval_interval: 0 is not in [1, inf]"),
    "unknown flag": (train, ["--learning_rate", "1"], "new", "--learning_rate"),
    "unknown preset": (train, ["--preset", "XXL"], "new", "--preset"),
    "unknown device": (train, ["--device", "abacus"], "new", "no device 'abacus'"),
    "unknown model": (train, ["--model", "transformer"], "new", "--model"),
    "nothing to resume": (train, ["--resume", "--data", "foxes4"], "new", "no checkpoint at new/calm.pt"),
    "nothing to resume, ar": (
        train, ["--resume", "--model", "ar", "--data", "foxes4"], "only_ae", "no checkpoint at only_ae/ar"),
    "resume, other size": (
        train, ["--resume", "--data", "foxes4", "--n_embd", "128"], "out",
        "n_embd 64, this run asks for 128"),
    "other K": (
        train, ["--data", "foxes4", *SHORT, "--chunk_size", "8"], "only_ae",
        "chunk_size 4, this run asks for 8"),
    "other data": (
        train, ["--data", "cats", *SHORT], "only_ae", "trained on other data"),
    "other vocabulary": (train, ["--data", "other", *SHORT], "only_ae", "trained on other data"),
    "another version": (sample, [], "old", "old/calm.pt is of an earlier version"),
    "another version, the baseline": (
        sample, ["--model", "ar"], "old", "old/ar.pt is of an earlier version"),
    "another version, training": (
        train, ["--data", "foxes4", *SHORT], "old", "old/autoencoder.pt is of an earlier version"),
    "another version, resumed": (
        train, ["--data", "foxes4", "--resume"], "old", "old/calm.pt is of an earlier version"),
    "another version, matched": (
        train, ["--data", "foxes4", *SHORT, "--model", "ar", "--match_flops", "old"], "new",
        "old/calm.pt is of an earlier version"),
    "another version, evaluated": (eval_brier, [], "old", "old/calm.pt is of an earlier version"),
    "another version, its autoencoder": (
        autoencoder_script, [], "old", "old/autoencoder.pt is of an earlier version"),
    "already trained": (train, ["--data", "foxes4", *SHORT], "out", "already trained"),
    "unfinished": (train, ["--data", "foxes4", *SHORT], "unfinished", "unfinished (step 5)"),
    "match_flops of an autoencoder": (
        train, ["--model", "autoencoder", "--match_flops", "out"], "new", "drop it, or --model"),
    "flops of an autoencoder": (
        train, ["--model", "autoencoder", "--flops", "1e9"], "new", "drop it, or --model"),
    "flops that are none": (train, ["--flops", "0"], "new", "argument --flops: 0 is not in [1, "),
    "fewer flops than the autoencoder's": (
        train, ["--data", "foxes4", *SHORT, "--flops", "9"], "only_ae", "lower --ae_max_steps"),
    "no FLOPs left": (
        train, ["--data", "foxes4", *SHORT, "--match_flops", "out", "--max_steps", "20"], "dear",
        "FLOPs are spent"),
    "match_flops of nothing": (
        train, ["--model", "ar", "--data", "foxes4", "--match_flops", "nowhere"], "new", "no checkpoint at"),
    "no checkpoint": (sample, [], "new", "no checkpoint at"),
    "truncated checkpoint": (sample, [], "cut", "not a whole checkpoint"),
    "wrong kind": (sample, ["--model", "calm"], "swapped", "holds a model of kind 'ar'"),
    "temperature 0": (sample, ["--temperature", "0"], "out", "--temperature: 0 is not in [1e-06, 1]"),
    "temperature 2": (sample, ["--temperature", "2"], "out", "--temperature: 2 is not in [1e-06, 1]"),
    "few candidates": (
        sample, ["--temperature", "0.1", "--num_candidates", "5"], "out", "--num_candidates 5 is below 1/T"),
    "no calls": (sample, ["--max_calls", "0"], "out", "argument --max_calls: 0 is not in [1, inf]"),
    "unknown sampler": (sample, ["--sampler", "nucleus"], "out", "--sampler"),
    "evaluations of an energy head": (
        sample, ["--num_evals", "4"], "out", "--num_evals must be in range(1, 2), not 4"),
    "official, nothing there": (
        sample, ["--official", "nowhere"], "out", "nowhere is not a published model"),
    "official baseline": (sample, ["--official", "nowhere", "--model", "ar"], "out", "drop --model ar"),
    "negative beta": (train, ["--kl_weight", "-1"], "new", "--kl_weight must be at least 0"),
    "all tokens masked": (train, ["--token_mask", "1"], "new", "--token_mask must be below 1"),
    "unknown head": (train, ["--head", "softmax"], "new", "--head"),
    "odd evaluations of a flow": (
        train, ["--head", "flow", "--num_evals", "5"], "new",
        "--num_evals must be in range(2, 1001, 2), not 5"),
    "unknown input": (train, ["--input_mode", "pixels"], "new", "--input_mode"),
    "temperatures of no frontier": (
        eval_brier, ["--temperatures", "0.5"], "out", "are for --frontier: add it"),
    "the tokenizer of a run": (sample, ["--tokenizer", "x.model"], "out", "--tokenizer is for --official"),
    "no tokens": (
        sample, ["--max_new_tokens", "0"], "out", "argument --max_new_tokens: 0 is not in [1, inf]"),
    "brier of nothing": (eval_brier, [], "new", "no checkpoint at"),
    "one brier sample": (
        eval_brier, ["--num_draws", "1"], "out", "argument --num_draws: 1 is not in [2, 1000]"),
    "brier, other vocabulary": (
        eval_brier, ["--data", "other"], "out", "was trained with the tokenizer bytes, and"),
    "brier, odd stride": (eval_brier, ["--stride", "6"], "out", "multiples of the chunk size 4"),
    "brier, short stride": (eval_brier, ["--stride", "2"], "out", "argument --stride: 2 is not in [4, inf]"),
    "brier, odd context": (eval_brier, ["--context", "18"], "out", "multiples of the chunk size 4"),
    "brier, long context": (eval_brier, ["--context", "128"], "out", "at most the model's, 64"),
    "frontier, temperature 2": (
        eval_brier, ["--frontier", "--temperatures", "2"], "out", "--temperatures: 2 is not in [1e-06, 1]"),
    "official without data": (
        eval_brier, ["--official", "nowhere"], "out", "--official needs --data"),
    "brier, short text": (eval_brier, ["--data", "short"], "out", "fewer than one context"),
    "autoencoder of nothing": (autoencoder_script, [], "new", "no checkpoint at"),
    "autoencoder, other vocabulary": (
        autoencoder_script, ["--data", "other"], "out", "was trained with the tokenizer bytes, and"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, trained, run, monkeypatch):
    script, flags, folder, message = BAD[case]
    monkeypatch.setattr(data.prepare, "DATA_DIR", trained)
    monkeypatch.chdir(trained)
    before = {p: p.read_bytes() for p in trained.rglob("*.pt")}
    result = run(script, *flags, "--out_dir", folder)
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0], (result.code, result.err)
    assert {p: p.read_bytes() for p in trained.rglob("*.pt")} == before
    assert "Traceback" not in result.err


def test_an_empty_prompt_and_one_from_stdin_are_continued(trained, run):
    flags = ["--out_dir", trained / "out", "--device", "cpu", "--max_new_tokens", 9]
    assert run(sample, *flags).code == 0
    assert run(sample, *flags, "--start", "-", stdin=b"the quick").out.startswith("the quick")
    assert run(sample, *flags, "--start", "-", stdin=b"\xff any bytes").out.startswith("\ufffd any bytes")


@pytest.mark.parametrize("prompt", [
    b"\0" * 5, b"\xff\xfe\x80", "\U0010fffd\u2028".encode(), b"\xed\xa0\x80 half", b"\r\n\t" * 9])
def test_any_bytes_are_a_prompt(prompt, trained, run):
    result = run(sample, "--out_dir", trained / "out", "--device", "cpu", "--start", "-",
                 "--max_new_tokens", 9, stdin=prompt)
    assert result.code == 0 and "tokens/s" in result.err
    assert result.out.startswith(prompt.decode("utf-8", "replace").rstrip("\ufffd"))


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_a_prompt_longer_than_the_context_goes_on_from_its_last_part_and_says_so(model, trained, run):
    flags = ["--out_dir", trained / "out", "--model", model, "--device", "cpu", "--max_new_tokens", 20]
    part = ("the quick brown fox jumps over the lazy dog. " * 2)[:64]
    whole, short = (run(sample, *flags, "--start", prompt) for prompt in ("x" * 36 + part, part))
    assert whole.code == short.code == 0 and whole.out == short.out and whole.out.startswith(part)
    assert "[a prompt of 100 tokens: going on from its last 64]" in whole.err and "prompt" not in short.err


def test_the_baseline_takes_no_notice_of_the_heads_flags(trained, run):
    assert run(sample, "--out_dir", trained / "out", "--model", "ar", "--num_evals", 4, "--sampler", "exact",
               "--temperature", 0.5, "--max_new_tokens", 4).code == 0


def test_same_seed_same_text_another_seed_another(trained, run):
    flags = ["--out_dir", trained / "out", "--model", "ar", "--device", "cpu", "--max_new_tokens", 30]
    first, again, other = (run(sample, *flags, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_a_checkpoint_that_carries_code_is_refused(trained, tmp_path, run):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))
    torch.save({"kind": "calm", "format": 2, "trap": Trap()}, tmp_path / "calm.pt")
    result = run(sample, "--out_dir", tmp_path)
    assert result.code == 2 and "code ran" not in result.out + result.err
