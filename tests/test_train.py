"""The whole road on a tiny text: learn it, break it off, spread it over processes, and get wrong input."""
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

import autoencoder as autoencoder_script
import data.prepare
import eval_brier
import sample
import train
from autoencoder import load_checkpoint
from calm import load_model

ROOT = Path(__file__).resolve().parent.parent
TINY = """--device cpu --dtype float32 --compile off --chunk_size 4 --latent_dim 32 --n_embd 64 --n_ff 128 --n_layer 2 --n_head 4
          --n_head_layer 1 --block_size 16 --num_targets 20 --ae_n_embd 128 --ae_n_ff 256 --batch_size 8
          --ae_batch_size 16 --log_interval 5""".split()
SHORT = [*TINY, "--ae_max_steps", "15", "--max_steps", "15", "--eval_interval", "10"]


def losses(out_dir, stage):
    entries = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e["loss"] for e in entries if e["stage"] == stage and "loss" in e}


def weights(path):
    return load_checkpoint(path)["model"]


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance)


def torchrun(processes, *argv):
    """The command line of a script on so many gloo processes, one thread each."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *map(str, argv)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# --- Learning ---------------------------------------------------------------------------------------------------------

def test_the_whole_road_learns_a_repeating_text(foxes, tmp_path, run):
    """Autoencoder, CALM, BrierLM, text: near-certainty about a sentence that repeats, from both models."""
    out = tmp_path / "out"
    common = ["--data", foxes, "--out_dir", out, *TINY, "--eval_interval", "1000", "--max_steps", "400"]
    result = run(train, *common, "--ae_max_steps", "300")
    assert result.code == 0 and "python sample.py" in result.out
    result = run(autoencoder_script, "--out_dir", out, "--json", "--device", "cpu")
    report = json.loads(result.out.splitlines()[-1])
    assert set(report) == {"accuracy", "sigma", "active_dims", "latent_dim"} and report["latent_dim"] == 32
    assert report["accuracy"]["posterior"] > 0.999 and report["accuracy"]["sigma_0.3"] > 0.999
    assert run(train, *common, "--model", "ar").code == 0
    for model in ("calm", "ar"):
        result = run(eval_brier, "--out_dir", out, "--model", model, "--json", "--device", "cpu", "--windows", 16)
        score = json.loads(result.out.splitlines()[-1])
        assert set(score) == {"brier", "brierlm", "stderr", "positions", "samples", "step"}
        assert score["brierlm"] > 90 and 0 <= score["stderr"] < 5 and score["step"] == 400
        result = run(sample, "--out_dir", out, "--model", model, "--device", "cpu", "--start", "the quick brown fox",
                     "--temperature", 0.5, "--max_new_tokens", 40)
        assert "the quick brown fox jumps over the lazy dog. the quick" in result.out
        assert "tokens/s" in result.err


@pytest.mark.parametrize("K", [1, 2, 3, 8, 16])
def test_chunks_of_other_sizes_train_and_evaluate(K, foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--chunk_size", K).code == 0
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--chunk_size", K, "--model", "ar").code == 0
    positions = []
    for model in ("calm", "ar"):   # scored at the same ones, in the end and by hand
        result = run(eval_brier, "--out_dir", out, "--model", model, "--json", "--windows", 4, "--device", "cpu")
        assert result.code == 0 and len(json.loads(result.out.splitlines()[-1])["brier"]) == 4
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        positions.append((json.loads(result.out.splitlines()[-1])["positions"],
                          next(e["positions"] for e in log if e["stage"] == model and e.get("final"))))
    assert positions[0] == positions[1]


def test_each_model_has_its_own_rate_unless_one_is_given():
    rate = lambda *flags: train.parse_args(["--preset", "nano", *flags]).muon_lr
    assert (rate(), rate("--model", "ar"), rate("--model", "ar", "--muon_lr", "0.5")) == (0.01, 0.02, 0.5)


def test_a_figure_of_the_learning_curves_is_made_from_the_logs(foxes, tmp_path, run):
    """--plot: one line a model, whose last point is the final BrierLM at the FLOPs in the checkpoint."""
    out = tmp_path / "a&b"
    for model in ("calm", "ar"):
        assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", model).code == 0
    found = eval_brier.curves(out)
    assert set(found) == {"calm", "ar"}
    for stage, points in found.items():
        assert len(points) == 2 and points[0][0] < points[1][0] == load_checkpoint(out / f"{stage}.pt")["flops"]
    namesake = tmp_path / "elsewhere" / "a&b"   # another run of that name; killed while it wrote its log
    namesake.mkdir(parents=True)
    (namesake / "log.jsonl").write_text((out / "log.jsonl").read_text() + '{"stage": "calm", "st')
    assert "4 curves" in run(eval_brier, "--plot", tmp_path / "both.svg", out, namesake).out
    result = run(eval_brier, "--plot", tmp_path / "curves.svg", out)
    assert result.code == 0 and "2 curves" in result.out
    svg = xml.etree.ElementTree.parse(tmp_path / "curves.svg").getroot()
    lines = svg.findall("{http://www.w3.org/2000/svg}polyline")
    labels = [text.text for text in svg.findall("{http://www.w3.org/2000/svg}text")]
    assert len(lines) == 2 and {"a&b", "a&b (AR)"} <= set(labels)
    for line in lines:   # both points lie on the sheet, time runs to the right
        (x0, y0), (x1, y1) = (map(float, corner.split(",")) for corner in line.get("points").split())
        assert 50 < x0 < x1 <= 600 and 0 <= min(y0, y1) <= max(y0, y1) <= 380


def test_muon_auxiliary_loss_accumulation_and_bfloat16_train(foxes, tmp_path, run):
    out = tmp_path / "out"
    result = run(train, "--data", foxes, "--out_dir", out, *SHORT, "--optimizer", "muon", "--aux_weight", "0.5",
                 "--transformer_share", "0", "--grad_accum", "2", "--dtype", "bfloat16")
    assert result.code == 0
    curve = losses(out, "calm")
    assert curve[15] < curve[1]


@pytest.mark.slow
def test_every_precision_trains_to_the_same_loss(foxes, tmp_path, run):
    """float16 with its gradient scaler, bfloat16 and float32: the same autoencoder and CALM, within a few per cent.

    The autoencoder's rate stays up for longer than nano's: at 60 steps its loss is then past the steep part of the curve,
    where one step more or less is worth a tenth."""
    last = {}
    for dtype in ("float32", "bfloat16", "float16"):
        assert run(train, "--data", foxes, "--out_dir", tmp_path / dtype, *SHORT, "--ae_max_steps", 60, "--max_steps", 60,
                   "--ae_lr", 3e-3, "--ae_decay_frac", 0.4, "--lr", 1e-3, "--dtype", dtype).code == 0
        last[dtype] = [losses(tmp_path / dtype, stage)[60] for stage in ("autoencoder", "calm")]
        assert last[dtype] == pytest.approx(last["float32"], rel=0.05)
    assert losses(tmp_path / "float16", "autoencoder")[1] > 2 * last["float16"][0]


def test_runs_get_the_training_flops_of_the_run_they_are_matched_to(foxes, tmp_path, run):
    """The baseline, and CALM with another K, whose own autoencoder counts."""
    out, other = tmp_path / "out", tmp_path / "k2"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--max_steps", 40).code == 0
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar", "--match_flops", out).code == 0
    assert run(train, "--data", foxes, "--out_dir", other, *SHORT, "--chunk_size", 2, "--match_flops", out).code == 0
    calm, ar, k2 = (load_checkpoint(path) for path in (out / "calm.pt", out / "ar.pt", other / "calm.pt"))
    assert load_checkpoint(other / "autoencoder.pt")["flops"] > 0 and k2["step"] > 15
    assert ar["flops"] == pytest.approx(calm["flops"], rel=0.05) and k2["flops"] == pytest.approx(calm["flops"], rel=0.05)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_other_heads_train_resume_and_sample(head, foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--head", head, "--num_evals", 4,
               "--input_mode", "both").code == 0
    assert all(math.isfinite(loss) for loss in losses(out, "calm").values())
    assert run(train, "--resume", "--data", foxes, "--out_dir", out, "--max_steps", 20).code == 0
    assert run(sample, "--out_dir", out, "--num_evals", 6, "--max_new_tokens", 8).code == 0
    assert run(eval_brier, "--out_dir", out, "--num_evals", 2, "--windows", 2, "--texts", 2).code == 0


def test_an_autoencoder_trains_without_any_of_its_regularisers(foxes, tmp_path, run):
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "autoencoder", "--kl_weight", 0, "--kl_clip", 0,
               "--dropout", 0, "--token_mask", 0).code == 0
    curve = losses(out, "autoencoder")
    assert curve[max(curve)] < curve[1]


# --- The toolkit on a trained model -----------------------------------------------------------------------------------

def test_exact_sampling_reports_its_calls_or_falls_back(trained, run):
    flags = ["--out_dir", trained / "out", "--device", "cpu", "--max_new_tokens", 12, "--sampler", "exact"]
    result = run(sample, *flags, "--temperature", 0.6)
    assert result.code == 0 and "calls a chunk" in result.err
    result = run(sample, *flags, "--temperature", 0.02, "--max_calls", 20)   # fifty samples in a row must be equal
    assert result.code == 0 and "using --sampler batch" in result.err and "calls a chunk" not in result.err


@pytest.mark.parametrize("model, rows", [("calm", 4), ("ar", 2)])
def test_the_frontier_falls_from_accuracy_and_collision_at_one_to_certainty(model, rows, trained, run):
    result = run(eval_brier, "--out_dir", trained / "out", "--model", model, "--device", "cpu", "--windows", 4, "--frontier",
                 "--temperatures", 1, 0.5, "--candidates", 1, 20, "--noise_scales", 0.5, 0, "--json")
    points = [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    assert result.code == 0 and len(points) == rows
    assert points[rows // 2]["collision"] >= points[0]["collision"]           # colder is more alike
    if model == "ar":
        assert points[1]["collision"] > points[0]["collision"] > 0
    else:
        assert points[-1]["collision"] == 1                                   # without noise there is one answer


# --- Interrupted, resumed, spread out ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, model, share, step", [("autoencoder", "calm", 0, 7), ("calm", "calm", 0, 7), ("ar", "ar", 0, 7),
                                                       ("transformer", "calm", 0.5, 7), ("calm", "calm", 0.2, 10)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(stage, model, share, step, number, foxes, tmp_path, run, monkeypatch):
    """Broken off in the seventh step of each stage; of CALM all at once, and of its Transformer before its head."""
    flags = ["--data", foxes, *SHORT, "--model", model, "--optimizer", "muon", "--transformer_share", share]
    assert run(train, *flags, "--out_dir", tmp_path / "whole").code == 0
    plain = train.make_optimizers

    def interrupted(m, *settings):
        """The optimizers, the first of which sends the signal in its seventh step of the stage in question."""
        optimizers, now = plain(m, *settings), {"Autoencoder": "autoencoder", "CALM": "calm", "AR": "ar"}[type(m).__name__]
        if getattr(m, "part", "all") == "transformer":
            now = "transformer"
        step, calls = optimizers[0].step, []

        def counted(*a, **k):
            calls.append(1)
            if now == stage and len(calls) == 7:
                os.kill(os.getpid(), number)
            return step(*a, **k)
        optimizers[0].step = counted
        return optimizers

    monkeypatch.setattr(train, "make_optimizers", interrupted)
    result = run(train, *flags, "--out_dir", tmp_path / "broken")
    assert result.code == 130 and f"interrupted at step {step}" in result.out and "--resume" in result.out
    assert load_checkpoint(tmp_path / "broken" / f"{stage}.pt")["step"] == step
    monkeypatch.setattr(train, "make_optimizers", plain)
    assert run(train, "--resume", "--model", model, "--data", foxes, "--out_dir", tmp_path / "broken", "--device", "cpu").code == 0
    assert_same_weights(weights(tmp_path / "whole" / f"{model}.pt"), weights(tmp_path / "broken" / f"{model}.pt"), rtol=0, atol=0)
    whole, broken = (losses(tmp_path / name, stage) for name in ("whole", "broken"))
    assert {k: broken[k] for k in whole} == whole


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(foxes, data_dir, tmp_path):
    """SIGKILL at random moments of both stages, half of them while a checkpoint is being written."""
    command = [sys.executable, ROOT / "train.py", "--data", data_dir / foxes, *TINY, "--ae_max_steps", "150", "--max_steps", "150",
               "--eval_interval", "4"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ONE_THREAD)
    subprocess.run([*map(str, command), "--out_dir", tmp_path / "whole"], check=True, **quiet)
    out, moments, writing = tmp_path / "killed", random.Random(0), 0
    kills = 0
    while True:
        resume = ["--resume"] if list(out.glob("*.pt")) else []
        process = subprocess.Popen([*map(str, command), "--out_dir", out, *resume], **quiet)
        before = (out / "log.jsonl").read_bytes() if (out / "log.jsonl").exists() else b""
        while kills < 20 and process.poll() is None:                          # until it trains
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes() != before:
                break
            time.sleep(0.01)
        if kills == 20:
            assert process.wait() == 0, process.stderr.read()
            break
        time.sleep(moments.uniform(0, 0.5))
        while kills % 2 and process.poll() is None and not list(out.glob("*.tmp")):
            pass
        writing += bool(list(out.glob("*.tmp")))
        assert process.poll() is None, f"ended before the 20 kills: {process.stderr.read()}"
        process.kill()
        process.wait()
        kills += 1
    assert writing >= 5
    for stage in ("autoencoder", "calm"):
        assert_same_weights(weights(tmp_path / "whole" / f"{stage}.pt"), weights(out / f"{stage}.pt"), rtol=0, atol=0)
        assert losses(out, stage) == losses(tmp_path / "whole", stage)


def test_a_finished_autoencoder_is_used_as_it_is(foxes, tmp_path, run):
    """Also with another length asked for: a CALM may have been trained on it. Only --model autoencoder goes on with it."""
    flags, path = ["--data", foxes, "--out_dir", tmp_path / "out", *SHORT], tmp_path / "out" / "autoencoder.pt"
    assert run(train, *flags, "--model", "autoencoder").code == 0
    before = path.read_bytes()
    assert run(train, *flags, "--ae_max_steps", "30").code == 0
    assert path.read_bytes() == before
    assert run(train, *flags, "--model", "autoencoder", "--resume", "--ae_max_steps", "30").code == 0
    assert load_checkpoint(path)["step"] == 30


def test_a_transformer_serves_any_head_and_stands_still_under_it(foxes, tmp_path, run):
    """It is trained once; a copy of the file is what another head, also on another latent space, begins with."""
    flags, first, second = ["--data", foxes, *SHORT, "--transformer_share", 0.4], tmp_path / "energy", tmp_path / "flow"
    assert run(train, *flags, "--out_dir", first).code == 0
    assert set(losses(first, "transformer")) == {1, 5, 6} and set(losses(first, "calm")) == {10, 15}
    second.mkdir()
    shutil.copy(first / "transformer.pt", second)
    assert run(train, *flags, "--out_dir", second, "--head", "flow", "--latent_dim", 16).code == 0
    learned = weights(first / "transformer.pt")
    assert learned and not any(name.startswith(("head.", "autoencoder.")) for name in learned)
    for out in (first, second):
        whole = weights(out / "calm.pt")
        assert_same_weights(learned, {name: whole[name] for name in learned}, rtol=0, atol=0)
    result = run(train, *flags, "--out_dir", second, "--resume", "--latent_dim", 16, "--n_layer", 1)
    assert result.code == 2 and "transformer.pt has n_layer 2, this run asks for 1" in result.err


def test_the_rate_falls_to_zero_for_the_transformer_and_then_for_the_head(foxes, tmp_path, run):
    """6 steps of one, 9 of the other, each from its own first step to its own last."""
    out = tmp_path / "out"
    assert run(train, "--data", foxes, "--out_dir", out, *SHORT, "--transformer_share", 0.4, "--lr", 1, "--warmup_steps", 1,
               "--decay_frac", 1).code == 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = {(e["stage"], e["step"]): e["lr"] for e in entries if e["stage"] in ("transformer", "calm") and "lr" in e}
    assert rates == pytest.approx({("transformer", 1): 1, ("transformer", 5): 2 / 6, ("transformer", 6): 1 / 6,
                                   ("calm", 10): 6 / 9, ("calm", 15): 1 / 9})


@pytest.mark.parametrize("model, processes, shard", [("calm", 2, False), ("ar", 2, False), ("calm", 4, True)])
def test_gloo_processes_equal_one_with_as_many_micro_batches(model, processes, shard, foxes, data_dir, tmp_path, run):
    """The same micro-batches on one process or one on each: the same losses, weights and BrierLM, also with the optimizer's
    state in shares. ar has no noise: literally so many times the batch.

    From a checkpoint on: AdamW makes a full step of any gradient, also of the head's first ones, which are rounding noise."""
    share = 0.45 if shard else 0   # of the Transformer alone: then it is the head that the processes train
    assert run(train, "--data", foxes, *SHORT, "--optimizer", "adamw", "--model", model, "--transformer_share", share,
               "--out_dir", tmp_path / "one").code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    flags = ["--resume", "--data", data_dir / foxes, "--model", model, "--max_steps", 21]
    alone = ["--grad_accum", processes] if model == "calm" else ["--batch_size", 8 * processes]
    assert run(train, *flags, *alone, "--out_dir", tmp_path / "one").code == 0
    command = torchrun(processes, ROOT / "train.py", *flags, "--out_dir", tmp_path / "many", *["--shard_optimizer"] * shard)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(tmp_path / "one" / f"{model}.pt"), weights(tmp_path / "many" / f"{model}.pt"), rtol=1e-3, atol=1e-5)
    one, many = losses(tmp_path / "one", model), losses(tmp_path / "many", model)
    assert one == pytest.approx(many, rel=1e-4)
    if shard:   # what the shares were put together to is what one process goes on from
        assert run(train, *flags[:-1], 25, "--out_dir", tmp_path / "many", "--device", "cpu").code == 0
        assert load_checkpoint(tmp_path / "many" / "calm.pt")["step"] == 25


def test_processes_share_the_windows_of_brierlm(trained, tmp_path):
    """The same score, to the digit, from one process and from three."""
    script = tmp_path / "share.py"
    script.write_text(f"""
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
from calm import load_model
from data.prepare import load_data
from eval_brier import evaluate
if "RANK" in os.environ:
    dist.init_process_group("gloo")
model, _ = load_model({str(trained / "out")!r}, "calm")
result = evaluate(model, load_data({str(trained / "foxes4")!r}), torch.device("cpu"), torch.float32, windows=55, context=32)
if os.environ.get("RANK", "0") == "0":
    print(result)
""")
    one, three = (subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120).stdout.splitlines()[-1]
                  for command in ([sys.executable, str(script)], torchrun(3, script)))
    assert "brierlm" in one and one == three


def test_a_dead_process_ends_the_run_and_another_number_goes_on(foxes, data_dir, tmp_path, run):
    out = tmp_path / "out"
    flags = ["--data", data_dir / foxes, *SHORT, "--model", "ar", "--out_dir", out]
    group = subprocess.Popen(torchrun(2, ROOT / "train.py", *flags, "--max_steps", 100_000), cwd=ROOT, env=ONE_THREAD,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "ar.pt").exists():
            assert group.poll() is None
            time.sleep(0.1)
        workers = subprocess.run(["pgrep", "-P", str(group.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert group.wait(timeout=90) != 0
    finally:
        group.kill()
    step = load_checkpoint(out / "ar.pt")["step"]
    assert run(train, *flags, "--resume", "--max_steps", step + 5).code == 0
    assert load_checkpoint(out / "ar.pt")["step"] == step + 5


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
    assert result.code == 2 and "No space left" in result.err and "previous checkpoint is intact" in result.err
    assert (out / "ar.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_step(foxes, tmp_path, run, monkeypatch):
    out, plain, calls = tmp_path / "out", train.AR.loss, []

    def loss(model, tokens):
        calls.append(1)
        value, metrics = plain(model, tokens)
        return (value * math.nan, {"loss": value.detach() * math.nan}) if len(calls) > 12 else (value, metrics)
    monkeypatch.setattr(train.AR, "loss", loss)
    result = run(train, "--data", foxes, "--out_dir", out, *SHORT, "--model", "ar", "--log_interval", "1")
    assert result.code == 2 and "nan at step 12" in result.err   # 10 training steps, a validation, 2 more steps
    checkpoint = load_checkpoint(out / "ar.pt")
    assert checkpoint["step"] == 10 and all(v.isfinite().all() for v in checkpoint["model"].values())


# --- Faults in files --------------------------------------------------------------------------------------------------

@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run and of its data, to damage -> the baseline's flags to go on with it, the run's folder, the data's."""
    out, folder = (shutil.copytree(trained / name, tmp_path / name) for name in ("out", "foxes4"))
    return ["--data", folder, "--out_dir", out, "--model", "ar", "--resume"], out, folder


@pytest.mark.parametrize("damage", ["a flipped byte", "missing bytes", "a page of zeros"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(damage, copied, run):
    flags, out, _ = copied
    path, earlier = out / "ar.pt", out / "ar.previous.pt"                     # of steps 15 and 10
    whole, kept, middle = path.read_bytes(), weights(path), path.stat().st_size // 2
    page = next(i for i in range(middle, len(whole), 4096) if any(whole[i:i + 4096]))           # one that is not zero yet
    path.write_bytes({"a flipped byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:],
                      "missing bytes": whole[:middle], "a page of zeros": whole[:page] + bytes(4096) + whole[page + 4096:]}[damage])
    for script, argv in ((train, flags), (sample, ["--out_dir", out, "--model", "ar"])):
        result = run(script, *argv)
        assert result.code == 2 and "ar.pt is not a whole checkpoint" in result.err
        assert "rename ar.previous.pt to ar.pt" in result.err and "Traceback" not in result.err
    earlier.rename(path)
    assert run(train, *flags, "--device", "cpu").code == 0
    assert_same_weights(kept, weights(path), rtol=0, atol=0)                  # the same steps again, to the same end


def test_data_replaced_between_runs_is_recognised(copied, tmp_path, run):
    flags, out, folder = copied
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[2:] + path.read_bytes()[:2])           # as long as before
    result = run(train, *flags, "--max_steps", 20)
    assert result.code == 2 and "train.bin is not, or no longer, what was prepared" in result.err
    text = tmp_path / "cats.txt"
    text.write_text("the quick brown cat jumps over the lazy dog. " * 800)
    data.prepare.prepare([text], folder.name, out_root=folder.parent)         # other data under the same name
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
    result = run(train, "--data", trained / "foxes4", "--out_dir", tmp_path / "file" / "out", *SHORT, "--model", "ar")
    assert result.code == 2 and "could not write" in result.err and "Traceback" not in result.err


def test_a_checkpoint_cannot_choose_where_a_resumed_run_writes(copied, tmp_path, run):
    flags, out, folder = copied
    checkpoint = load_checkpoint(out / "ar.pt")
    checkpoint["settings"] |= {"out_dir": str(tmp_path / "elsewhere"), "match_flops": str(tmp_path / "elsewhere"), "max_steps": 20}
    torch.save(checkpoint, out / "ar.pt")
    before = set(tmp_path.rglob("*"))
    assert run(train, *flags, "--device", "cpu").code == 0
    assert {p.parent for p in set(tmp_path.rglob("*")) - before} <= {out} and load_checkpoint(out / "ar.pt")["step"] == 20


def test_a_deterministic_run_repeats_to_the_bit(trained, tmp_path):
    """Twice in processes of their own, because the switch is one of the whole process."""
    command = [sys.executable, ROOT / "train.py", "--data", trained / "foxes4", *SHORT, "--deterministic", "--optimizer", "muon",
               "--aux_weight", "0.5", "--ae_max_steps", "5", "--max_steps", "5"]
    for name in ("one", "two"):
        subprocess.run([*map(str, command), "--out_dir", str(tmp_path / name)], check=True, capture_output=True, cwd=ROOT)
    for stage in ("autoencoder", "calm"):
        assert_same_weights(weights(tmp_path / "one" / f"{stage}.pt"), weights(tmp_path / "two" / f"{stage}.pt"), rtol=0, atol=0)


# --- Other machines ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuda, mps, expected", [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")])
def test_one_function_chooses_the_device(cuda, mps, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert autoencoder_script.select_device().type == expected
    for name, there in (("cuda:0", cuda), ("mps", mps), ("cpu", True)):
        if there:
            assert str(autoencoder_script.select_device(name)) == name
        else:
            with pytest.raises(SystemExit, match="2"):
                autoencoder_script.select_device(name)
            assert f"no device {name!r} here" in capsys.readouterr().err


@pytest.mark.parametrize("device, fast, expected", [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("cpu", True, torch.bfloat16),
                                                    ("cpu", False, torch.float32), ("mps", False, torch.float32)])
def test_one_function_chooses_the_precision(device, fast, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert autoencoder_script.select_dtype("auto", torch.device(device)) == expected
    assert autoencoder_script.select_dtype("float16", torch.device(device)) == torch.float16


# --- Speed -----------------------------------------------------------------------------------------------------------

def test_the_bench_measures_each_part_and_both_models(run):
    result = run(train, "--bench", "0.02", "--json", *TINY, "--vocab_size", "50")
    figures = json.loads(result.out.splitlines()[-1])
    assert result.code == 0 and figures["precision"] == "float32" and figures["mfu"] is None
    assert figures["train_tokens_per_s"] > 0 and figures["peak_memory_gb"] > 0.1
    assert set(figures["share"]) == {"backbone", "head", "energy_score", "autoencoder"} and min(figures["share"].values()) > 0
    assert set(figures["generate"]) == {"calm_T1", "calm_T0.5", "ar_T1", "calm_T1_b32", "ar_T1_b32"}
    assert min(figures["generate"].values()) > 0


@torch.no_grad()
def test_casting_matrices_once_equals_autocast(trained):
    """The cast for inference gives what autocast gives, for CALM and AR."""
    for kind in ("calm", "ar"):
        tokens = torch.arange(32)[None] % 97
        hidden = []
        for dtype in (torch.float32, torch.bfloat16):
            model, _ = load_model(trained / "out", kind, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                hidden.append(model.hidden(tokens))
                torch.manual_seed(0)
                hidden.append(model.draw(hidden[-1][:, -1])[0])
        assert model.transformer.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
        assert torch.equal(hidden[0], hidden[2]) and torch.equal(hidden[1], hidden[3])


# --- Bad input: one line, exit code 2, nothing lost -------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of both models, in place of data/ and out/."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "foxes.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 800)
    for K in (4, 8):   # the same text under two names: two data sets of one vocabulary
        data.prepare.prepare([text], f"foxes{K}", out_root=folder)
    tokens = b"".join(b"%s %d\n" % (__import__("base64").b64encode(bytes([i])), i) for i in range(256))
    (folder / "other.model").write_bytes(tokens)
    data.prepare.prepare([text], "other", tokenizer=str(folder / "other.model"), out_root=folder)
    short = folder / "short.txt"
    short.write_text("too short")
    data.prepare.prepare([short], "short", out_root=folder)
    for model in ("calm", "ar"):
        subprocess.run([sys.executable, str(ROOT / "train.py"), *SHORT, "--data", str(folder / "foxes4"), "--model", model,
                        "--out_dir", str(folder / "out")], check=True, capture_output=True, cwd=ROOT)
    (folder / "cut").mkdir()
    (folder / "cut" / "calm.pt").write_bytes((folder / "out" / "calm.pt").read_bytes()[:-5000])
    (folder / "swapped").mkdir()
    (folder / "swapped" / "calm.pt").write_bytes((folder / "out" / "ar.pt").read_bytes())
    (folder / "only_ae").mkdir()
    (folder / "only_ae" / "autoencoder.pt").write_bytes((folder / "out" / "autoencoder.pt").read_bytes())
    (folder / "transformed").mkdir()
    for kind in ("autoencoder", "transformer"):
        (folder / "transformed" / f"{kind}.pt").write_bytes((folder / "out" / f"{kind}.pt").read_bytes())
    unfinished = load_checkpoint(folder / "out" / "autoencoder.pt")
    (folder / "unfinished").mkdir()
    torch.save({**unfinished, "done": False, "step": 5}, folder / "unfinished" / "autoencoder.pt")
    (folder / "dear").mkdir()
    finished = load_checkpoint(folder / "out" / "autoencoder.pt")
    torch.save({**finished, "flops": 1e30}, folder / "dear" / "autoencoder.pt")
    (folder / "old").mkdir()
    for kind in ("autoencoder", "calm"):
        checkpoint = load_checkpoint(folder / "out" / f"{kind}.pt")
        torch.save({**checkpoint, "config": {**checkpoint["config"], "gone": 1}}, folder / "old" / f"{kind}.pt")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    return folder


BAD = {   # script, flags after --out_dir, folder for --out_dir, what the line must say
    "no data": (train, ["--data", "nothing"], "new", "no data set 'nothing'"),
    "short text": (train, ["--data", "short", *TINY], "new", "fewer than one context"),
    "chunk size 0": (train, ["--chunk_size", "0"], "new", "--chunk_size must be at least 1"),
    "heads": (train, ["--n_embd", "100", "--n_head", "3"], "new", "divisible by n_head 3"),
    "odd heads": (train, ["--n_embd", "12", "--n_head", "4"], "new", "heads of an even width"),
    "one sample": (train, ["--num_samples", "1"], "new", "--num_samples must be at least 2"),
    "alpha 2": (train, ["--alpha", "2"], "new", "--alpha must be in (0, 2)"),
    "negative seed": (train, ["--seed", "-1"], "new", "argument --seed: -1 is not in [0, "),
    "not a number": (train, ["--lr", "fast"], "new", "--lr"),
    "negative rate": (train, ["--lr", "-1"], "new", "--lr must be a number from 0 on"),
    "autoencoder of no width": (train, ["--ae_n_embd", "0"], "new", "--ae_n_embd must be at least 1"),
    "a rate that is no number": (train, ["--ae_muon_lr", "nan"], "new", "--ae_muon_lr must be a number from 0 on"),
    "negative auxiliary weight": (train, ["--aux_weight", "-1"], "new", "--aux_weight must be a number from 0 on"),
    "a Transformer with nothing to learn from": (train, ["--transformer_share", "0.5", "--aux_weight", "0"], "new",
                                                 "needs an --aux_weight above 0"),
    "negative lookup": (train, ["--lookup", "-1"], "new", "--lookup must be at least 0, not -1"),
    "negative scale of queries": (train, ["--qk_norm", "-1"], "new", "--qk_norm must be a number from 0 on"),
    "a figure of nothing": (eval_brier, ["--plot", "curves.svg", "nowhere"], "out", "nowhere/log.jsonl is not the log of a run"),
    "a figure nowhere": (eval_brier, ["--plot", "nowhere/curves.svg", "out"], "out", "could not write nowhere/curves.svg"),
    "no steps": (train, ["--max_steps", "0"], "new", "--max_steps must be at least 1"),
    "no interval": (train, ["--eval_interval", "0"], "new", "argument --eval_interval: 0 is not in [1, inf]"),
    "unknown flag": (train, ["--learning_rate", "1"], "new", "--learning_rate"),
    "unknown preset": (train, ["--preset", "XXL"], "new", "--preset"),
    "unknown device": (train, ["--device", "abacus"], "new", "no device 'abacus'"),
    "nothing to resume": (train, ["--resume", "--data", "foxes4"], "new", "nothing to resume"),
    "nothing to resume, ar": (train, ["--resume", "--model", "ar", "--data", "foxes4"], "only_ae", "nothing to resume"),
    "resume, other size": (train, ["--resume", "--data", "foxes4", "--n_embd", "128"], "out", "n_embd 64, this run asks for 128"),
    "other K": (train, ["--data", "foxes4", *SHORT, "--chunk_size", "8"], "only_ae", "chunk_size 4, this run asks for 8"),
    "other data": (train, ["--data", "short", *SHORT, "--block_size", "1"], "only_ae", "trained on other data"),
    "other vocabulary": (train, ["--data", "other", *SHORT], "only_ae", "trained on other data"),
    "another version": (sample, [], "old", "unexpected keyword argument 'gone'"),
    "another version, training": (train, ["--data", "foxes4", *SHORT], "old", "autoencoder.pt is of another version"),
    "a kernel without width": (train, ["--kernel_width", "0"], "new", "--kernel_width must be a number above 0"),
    "a Brier score of negative weight": (train, ["--brier_weight", "-1"], "new", "--brier_weight must be a number from 0 on"),
    "no steps for the head": (train, ["--data", "foxes4", *SHORT, "--max_steps", "3"], "transformed", "transformer.pt has 8 steps"),
    "already trained": (train, ["--data", "foxes4", *SHORT], "out", "already trained"),
    "unfinished": (train, ["--data", "foxes4", *SHORT], "unfinished", "unfinished (step 5)"),
    "match_flops of an autoencoder": (train, ["--model", "autoencoder", "--match_flops", "out"], "new", "drop it, or --model"),
    "no FLOPs left": (train, ["--data", "foxes4", *SHORT, "--match_flops", "out", "--max_steps", "20"], "dear", "autoencoder alone"),
    "match_flops of nothing": (train, ["--model", "ar", "--data", "foxes4", "--match_flops", "nowhere"], "new", "no checkpoint at"),
    "no checkpoint": (sample, [], "new", "no checkpoint at"),
    "truncated checkpoint": (sample, [], "cut", "not a whole checkpoint"),
    "wrong kind": (sample, ["--model", "calm"], "swapped", "holds a model of kind 'ar'"),
    "temperature 0": (sample, ["--temperature", "0"], "out", "--temperature must be in (0, 1]"),
    "temperature 2": (sample, ["--temperature", "2"], "out", "--temperature must be in (0, 1]"),
    "few candidates": (sample, ["--temperature", "0.1", "--num_candidates", "5"], "out", "--num_candidates 5 is below 1/T"),
    "no calls": (sample, ["--max_calls", "0"], "out", "argument --max_calls: 0 is not in [1, inf]"),
    "noise scale 2": (sample, ["--noise_scale", "2"], "out", "argument --noise_scale: 2 is not in [0, 1]"),
    "exact, compiled": (sample, ["--sampler", "exact", "--compile"], "out", "drop one of the two"),
    "unknown sampler": (sample, ["--sampler", "nucleus"], "out", "--sampler"),
    "evaluations of an energy head": (sample, ["--num_evals", "4"], "out", "num_evals 4"),
    "official, nothing there": (sample, ["--official", "nowhere"], "out", "nowhere is not a published model"),
    "negative beta": (train, ["--kl_weight", "-1"], "new", "--kl_weight must be in [0"),
    "all tokens masked": (train, ["--token_mask", "1"], "new", "token_mask must be in [0, 1)"),
    "official baseline": (sample, ["--official", "nowhere", "--model", "ar"], "out", "drop --model ar"),
    "unknown head": (train, ["--head", "softmax"], "new", "--head"),
    "odd evaluations of a flow": (train, ["--head", "flow", "--num_evals", "5"], "new", "num_evals 5"),
    "unknown input": (train, ["--input_mode", "pixels"], "new", "--input_mode"),
    "no samples": (sample, ["--num_samples", "0"], "out", "argument --num_samples: 0 is not in [1, inf]"),
    "long prompt": (sample, ["--start", "x" * 100], "out", "the prompt has 100 tokens, but the context is 64"),
    "no prompt file": (sample, ["--start", "FILE:nowhere"], "out", "no file nowhere"),
    "brier of nothing": (eval_brier, [], "new", "no checkpoint at"),
    "one brier sample": (eval_brier, ["--num_samples", "1"], "out", "argument --num_samples: 1 is not in [2, inf]"),
    "brier, other vocabulary": (eval_brier, ["--data", "other"], "out", "was trained with the tokenizer bytes"),
    "brier, odd stride": (eval_brier, ["--stride", "6"], "out", "multiples of the chunk size 4"),
    "brier, long context": (eval_brier, ["--context", "128"], "out", "longer than the model's own"),
    "frontier, temperature 2": (eval_brier, ["--frontier", "--temperatures", "2"], "out", "--temperatures must be in (0, 1]"),
    "official without data": (eval_brier, ["--official", "nowhere"], "out", "--official names a CALM and needs --data"),
    "brier, short text": (eval_brier, ["--data", "short"], "out", "fewer than one context"),
    "autoencoder of nothing": (autoencoder_script, [], "new", "no checkpoint at"),
    "autoencoder, other vocabulary": (autoencoder_script, ["--data", "other"], "out", "was trained with the tokenizer bytes"),
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


def test_an_empty_prompt_and_a_prompt_from_a_file_or_stdin_are_continued(trained, run, monkeypatch):
    import io
    from types import SimpleNamespace
    out = ["--out_dir", trained / "out", "--device", "cpu", "--max_new_tokens", 9]
    assert run(sample, *out).code == 0
    (trained / "start.txt").write_text("the quick")
    assert run(sample, *out, "--start", f"FILE:{trained / 'start.txt'}").out.startswith("the quick")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff any bytes")))
    assert run(sample, *out, "--start", "-").out.startswith("\ufffd any bytes")


@pytest.mark.parametrize("prompt", [b"\0" * 5, b"\xff\xfe\x80", "\U0010fffd\u2028".encode(), b"\xed\xa0\x80 half", b"\r\n\t" * 9])
def test_any_bytes_are_a_prompt(prompt, trained, tmp_path, run):
    (tmp_path / "prompt").write_bytes(prompt)
    result = run(sample, "--out_dir", trained / "out", "--device", "cpu", "--start", f"FILE:{tmp_path / 'prompt'}", "--max_new_tokens", 9,
                 "--num_samples", 2)
    assert result.code == 0 and result.out.startswith(prompt.decode("utf-8", "replace").rstrip("\ufffd")) and "tokens/s" in result.err


def test_the_baseline_takes_no_notice_of_the_heads_flags(trained, run):
    assert run(sample, "--out_dir", trained / "out", "--model", "ar", "--num_evals", 4, "--sampler", "exact", "--temperature", 0.5,
               "--max_new_tokens", 4).code == 0


def test_same_seed_same_text_another_seed_another(trained, run):
    flags = ["--out_dir", trained / "out", "--model", "ar", "--device", "cpu", "--num_samples", 2, "--max_new_tokens", 30]
    first, again, other = (run(sample, *flags, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_a_checkpoint_that_carries_code_is_refused(trained, tmp_path, run):
    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))
    torch.save({"kind": "calm", "trap": Trap()}, tmp_path / "calm.pt")
    result = run(sample, "--out_dir", tmp_path)
    assert result.code == 2 and "code ran" not in result.out + result.err
