"""Training: it learns, it resumes, several processes agree; the optimizer, the flags, the bench."""
import itertools
import math
import os
import shlex
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

import autoencoder as autoencoder_script
import bench
import data.prepare
import eval_brier
import sample
import train
from data.checkpoint import append_log
from data.machine import Machine
from data.prepare import load_data
from helpers import (FOXES, TINY, assert_one_line, assert_same_weights, checkpoint_of,
                     last_line, log_of, losses, torchrun)


# --- It learns -----------------------------------------------------------------------------
def test_the_whole_road_learns_a_repeating_text(fit, tmp_path, run):
    """Autoencoder, CALM, BrierLM, text: near certainty about a sentence that repeats."""
    out = tmp_path / "out"
    long = ["--eval_interval", 1000, "--max_steps", 200, "--ae_max_steps", 110]
    for stage in ("--", "--ae_"):
        long += [f"{stage}optimizer", "muon", f"{stage}lr", 0.01, f"{stage}decay_frac", 0.5]
    assert "python sample.py" in fit(out, *long).out
    report = last_line(run(autoencoder_script, "--out_dir", out, "--json", "--device", "cpu"))
    assert set(report) == {"accuracy", "sigma", "active_dims", "latent_dim"}
    assert report["accuracy"]["posterior"] > 0.999 and report["accuracy"]["sigma_0.3"] > 0.999
    fit(out, *long, "--model", "ar")
    for model in ("calm", "ar"):
        flags = ["--out_dir", out, "--model", model, "--device", "cpu"]
        score = last_line(run(eval_brier, *flags, "--json", "--windows", 16))
        assert score["brierlm"] > 90 and score["documents"] == 1
        result = run(sample, *flags, "--start", "the quick brown fox", "--temperature", 0.5,
                     "--max_new_tokens", 40)
        assert "the quick brown fox jumps over the lazy dog. the quick" in result.out


@pytest.mark.parametrize("K", [1, 3, 8])
def test_chunks_of_other_sizes_train_and_are_scored_where_the_baseline_is(K, fit, tmp_path):
    positions = {}
    for model in ("calm", "ar"):
        fit(tmp_path, "--model", model, "--chunk_size", K, "--eval_interval", 100)
        positions[model] = log_of(tmp_path)[-1]["positions"]
    assert positions["calm"] == positions["ar"]


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_other_heads_train_resume_and_sample(head, fit, tmp_path, run):
    fit(tmp_path, "--head", head, "--num_evals", 4, "--input_mode", "both")
    fit(tmp_path, "--resume", "--max_steps", 20)
    assert all(math.isfinite(loss) for loss in losses(tmp_path, "calm").values())
    assert run(sample, "--out_dir", tmp_path, "--num_evals", 6, "--max_new_tokens", 8).code == 0


def test_muon_auxiliary_loss_accumulation_and_bfloat16_train(fit, tmp_path):
    fit(tmp_path, "--optimizer", "muon", "--aux_weight", 0.5, "--grad_accum", 2, "--batch_size", 2,
        "--dtype", "bfloat16")
    assert losses(tmp_path, "calm")[15] < losses(tmp_path, "calm")[1]


def test_a_stage_that_was_better_before_its_end_says_when(tmp_path):
    said = []
    stage = SimpleNamespace(kind="autoencoder", log=tmp_path / "log.jsonl",
                            machine=SimpleNamespace(say=said.append))
    for step, loss in ((500, 2.0), (1000, 2.019), (1500, 2.03)):
        append_log(stage.log, {"stage": stage.kind, "step": step, "seconds": 1, "val_loss": loss})
        train.Stage.say_if_best_before(stage)
    assert len(said) == 1 and "best at step 500 (2, in the end 2.03)" in said[0]
    assert "or --ae_max_steps 500 and another --out_dir" in said[0]


def test_the_rate_rises_for_the_warm_up_and_falls_to_zero_at_the_end(fit, tmp_path):
    fit(tmp_path, "--model", "ar", "--lr", 1, "--warmup_steps", 4, "--decay_frac", 0.4,
        "--log_interval", 1)
    rates = [entry["lr"] for entry in log_of(tmp_path) if "lr" in entry]
    falling = [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[1] * 7, *falling])


# --- A budget of FLOPs ---------------------------------------------------------------------
def test_runs_get_the_training_flops_of_the_run_they_are_matched_to(fit, tmp_path):
    """The baseline, and CALM with another K, whose own autoencoder counts."""
    out = tmp_path / "out"
    few = ["--ae_max_steps", 5, "--eval_interval", 100]
    fit(out, *few)
    fit(out, *few, "--model", "ar", "--match_flops", out)
    fit(tmp_path / "k2", *few, "--chunk_size", 2, "--match_flops", out)
    flops = checkpoint_of(out, "calm")["flops"]
    assert checkpoint_of(out, "ar")["flops"] == pytest.approx(flops, rel=0.05)
    assert checkpoint_of(tmp_path / "k2", "calm")["flops"] == pytest.approx(flops, rel=0.05)
    assert checkpoint_of(tmp_path / "k2", "calm")["step"] > 15


def test_a_matched_baseline_has_the_sizes_of_the_run_and_its_text(trained):
    """Unless others are given."""
    argv = ["--model", "ar", "--match_flops", str(trained / "out")]
    args = train.parse_args(argv)
    config = checkpoint_of(trained / "out", "calm")["config"]
    for name in ("n_embd", "n_layer", "n_head", "n_ff"):
        assert getattr(args, name) == config[name]
    assert args.context == config["block_size"] * 4 and args.data == str(trained / "foxes4")
    assert train.parse_args([*argv, "--n_embd", "128"]).n_embd == 128
    assert train.parse_args([*argv, "--preset", "S"]).n_embd == 768


def test_a_resumed_run_ends_at_the_flops_that_it_is_given(fit, tmp_path):
    """Also with another batch; once more, it only evaluates; fewer than are spent are refused."""
    fit(tmp_path, "--model", "ar")
    flags = ["--model", "ar", "--resume", "--batch_size", 8, "--flops"]
    spent = checkpoint_of(tmp_path, "ar")["flops"]
    fit(tmp_path, *flags, 2.5 * spent)
    once = checkpoint_of(tmp_path, "ar")
    a_step = (once["flops"] - spent) / (once["step"] - 15)
    assert once["flops"] == pytest.approx(2.5 * spent, abs=a_step / 2)
    fit(tmp_path, *flags, 2.5 * spent)
    assert checkpoint_of(tmp_path, "ar")["step"] == once["step"]
    assert_one_line(fit(tmp_path, *flags, spent, code=2), "FLOPs are spent: raise --flops")


def test_evaluations_and_checkpoints_do_not_count_as_training_time(fit, tmp_path, monkeypatch):
    """Half a minute is added to each, at steps 10 and 15, and to no training."""
    clock = SimpleNamespace(added=0.0)
    now = train.time.time

    def slower(function):
        def slow(*args, **kwargs):
            clock.added += 30
            return function(*args, **kwargs)
        return slow

    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now() + clock.added))
    monkeypatch.setattr(train, "validate", slower(train.validate))
    monkeypatch.setattr(train.Stage, "save", slower(train.Stage.save))
    fit(tmp_path, "--model", "ar")
    assert clock.added == 120
    assert max(entry["seconds"] for entry in log_of(tmp_path)) < 30


# --- It resumes ----------------------------------------------------------------------------
def interrupt_step_7(monkeypatch, stage, number):
    """From now on this process gets a signal in the seventh step of a stage."""
    plain = train.train_step
    calls = []

    def step(compute, *args):
        calls.append(type(compute).__name__.lower())
        if calls.count(stage) == 7 and calls[-1] == stage:
            os.kill(os.getpid(), number)
        return plain(compute, *args)

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("stage, model, number", [
    ("autoencoder", "calm", signal.SIGTERM), ("calm", "calm", signal.SIGINT),
    ("ar", "ar", signal.SIGINT)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(stage, model, number, fit,
                                                                 tmp_path):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken in two"
    flags = ["--model", model, "--optimizer", "muon"]
    result = fit(whole, *flags)
    times = 0.22 if stage == "autoencoder" else 0.11
    assert f"{stage}: " in result.out and f"(reads the text {times} times)" in result.out
    assert f"\n{stage}: 100%" in f"\n{result.err}"   # lines: stderr is no terminal here
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step_7(patch, stage, number)
        result = fit(broken, *flags, code=130)
    assert "interrupted at step 7" in result.out
    command = result.out.split("Go on with: ")[1].splitlines()[0]
    assert {"train.py", "--resume", str(broken)} <= set(shlex.split(command))
    assert checkpoint_of(broken, stage)["step"] == 7
    fit(broken, *shlex.split(command)[2:], "--device", "cpu")
    assert_same_weights(whole, broken, model)
    assert losses(whole, stage).items() <= losses(broken, stage).items()


def test_a_finished_autoencoder_is_used_as_it_is(fit, tmp_path):
    """Also with another length asked for: a CALM may have been trained on it. Only --model
    autoencoder goes on with it."""
    path = tmp_path / "autoencoder.pt"
    fit(tmp_path, "--model", "autoencoder")
    before = path.read_bytes()
    fit(tmp_path, "--ae_max_steps", 30)
    assert path.read_bytes() == before
    fit(tmp_path, "--model", "autoencoder", "--resume", "--ae_max_steps", 30)
    assert checkpoint_of(tmp_path, "autoencoder")["step"] == 30


def test_a_resumed_run_has_the_rates_and_the_batch_that_it_is_given(fit, tmp_path):
    """The rates of both optimizers, and the weight decay, at a constant rate."""
    fit(tmp_path, "--model", "ar", "--optimizer", "muon")
    before = checkpoint_of(tmp_path, "ar")
    fit(tmp_path, "--model", "ar", "--resume", "--lr", 1e-5, "--muon_lr", 3e-5, "--decay_frac", 0,
        "--weight_decay", 0.5, "--batch_size", 8, "--max_steps", 30)
    after = checkpoint_of(tmp_path, "ar")
    groups = [group for optimizer in after["optimizers"] for group in optimizer["param_groups"]]
    found = [(group["lr"], group["weight_decay"]) for group in groups]
    assert found == [(1e-5, 0.0), (1e-5, 0.5), (1e-5, 0.0), (3e-5, 0.5)]
    assert after["tokens"] == before["tokens"] + 15 * 8 * 64
    assert after["flops"] == pytest.approx(before["flops"] * after["tokens"] / before["tokens"])


@pytest.mark.parametrize("first, second", [("float32", "float16"), ("float16", "bfloat16")])
def test_a_run_goes_on_in_another_precision(first, second, fit, tmp_path):
    fit(tmp_path, "--model", "ar", "--dtype", first)
    fit(tmp_path, "--model", "ar", "--resume", "--max_steps", 20, "--dtype", second)
    assert losses(tmp_path, "ar")[20] < losses(tmp_path, "ar")[1]


# --- Speed ---------------------------------------------------------------------------------
class Reads(TorchDispatchMode):
    """Counts what a program reads of a tensor as a number (item, bool, float): there it would wait
    for a GPU."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_a_step_reads_one_number(model, fit, tmp_path, monkeypatch):
    """The norm of the gradient, whatever the number of micro-batches."""
    plain = train.train_step
    before = []   # each step of the model, after those of the autoencoder

    def step(*args):
        before.append(reads.count)
        return plain(*args)

    monkeypatch.setattr(train, "train_step", step)
    with Reads() as reads:
        fit(tmp_path, "--model", model, "--optimizer", "muon", "--grad_accum", 2, "--max_steps", 10,
            "--ae_max_steps", 3, "--log_interval", 1000, "--eval_interval", 1000)
    between = [b - a for a, b in zip(before[-9:], before[-8:])]    # from step 2 to step 10
    assert between == [1] * 8


def test_the_log_says_how_fast_it_was(trained):
    """Since the entry before. TFLOP/s are those of flops."""
    entries = [entry for entry in log_of(trained / "out") if entry["stage"] == "calm"]
    for before, entry in zip(entries, entries[1:-1]):
        seconds = entry["seconds"] - before["seconds"]
        speed = (entry["tokens"] - before["tokens"]) / seconds
        assert entry["tokens_per_s"] == pytest.approx(speed, rel=0.02 / seconds)
        teraflops = (entry["flops"] - before["flops"]) / (entry["tokens"] - before["tokens"]) / 1e12
        assert entry["tflops_per_s"] == pytest.approx(entry["tokens_per_s"] * teraflops, rel=1e-3)


def test_only_a_stage_that_wins_it_back_is_compiled():
    """Of `mini` that is not the autoencoder; --compile on compiles each."""
    machine = SimpleNamespace(compiles=True)

    def compiled(*flags):
        args = train.parse_args(["--preset", "mini", *flags])
        stages = []
        for kind in train.KINDS:
            config = train.config_of(train.TrainConfig, args, kind)
            stages.append(SimpleNamespace(machine=machine, args=args, config=config))
        return [train.Stage.compiles(stage) for stage in stages]

    assert compiled() == [False, True, True]
    assert compiled("--max_steps", "100") == [False, False, False]
    assert compiled("--max_steps", "100", "--compile", "on") == [True, True, True]


# --- Several processes ---------------------------------------------------------------------
def test_two_processes_go_the_whole_road_from_an_empty_folder(foxes, data_dir, tmp_path):
    """The last evaluation, which they share, is that of a single process to the digit."""
    flags = ["--data", data_dir / foxes, "--out_dir", tmp_path]
    done = torchrun(2, *flags, *TINY, "--block_size", 8, "--ae_max_steps", 4, "--max_steps", 4,
                    "--ae_grad_accum", 2, "--grad_accum", 2)
    assert done.returncode == 0 and "BrierLM" in done.stdout, done.stderr
    for kind in ("autoencoder", "calm"):
        assert checkpoint_of(tmp_path, kind)["done"] and checkpoint_of(tmp_path, kind)["step"] == 4
    shared = log_of(tmp_path)[-1]
    assert torchrun(1, *flags, "--resume", "--device", "cpu").returncode == 0
    assert shared["final"] and shared["positions"] > 32 * 7   # more windows than a batch has
    assert log_of(tmp_path)[-1] == shared


COMPILED = """import functools, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")   # Inductor takes a minute
sys.path.insert(0, ".")
import train
train.main()
"""


@pytest.mark.parametrize("model, compiled", [("calm", "off"), ("ar", "on")])
def test_two_processes_make_the_steps_of_one(model, compiled, fit, foxes, data_dir, tmp_path):
    """One process with two micro-batches a step, or two with one each. AR draws no noise: there it
    is the same as twice the batch, and compiled. From a checkpoint on: AdamW's very first steps
    have the full size whatever the gradient, which is then partly rounding."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    fit(one, "--optimizer", "adamw", "--model", model, "--n_layer", 1)
    shutil.copytree(one, two)
    flags = ["--resume", "--model", model, "--max_steps", 21, "--device", "cpu"]
    shared = ["--grad_accum", 2, "--ae_grad_accum", 2]
    fit(one, *flags, *(shared if model == "calm" else ["--batch_size", 8]))
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    done = torchrun(2, *flags, *shared, "--data", data_dir / foxes, "--out_dir", two,
                    "--compile", compiled, script=script)
    assert done.returncode == 0, done.stderr
    assert (", compiled" in done.stdout) == (compiled == "on"), done.stdout
    assert_same_weights(one, two, model, rtol=1e-3, atol=1e-5)
    assert losses(one, model) == pytest.approx(losses(two, model), rel=1e-4)


@torch.no_grad()
def test_every_micro_batch_has_noise_of_its_own(trained):
    """A function of seed, kind of model, step and micro-batch, and of each of them."""
    data = load_data(trained / "foxes4")
    machine = SimpleNamespace(size=1, rank=0, to_device=lambda tokens: tokens)

    def noise(seed, kind, step):
        batches = train.micro_batches(data, seed, machine, kind, step, 3, 2, 16)
        return [torch.rand(3).tolist() for _ in batches]

    numbers = list(itertools.product((0, 1, 4096), ("autoencoder", "calm", "ar"), (1, 2, 4097)))
    drawn = sum((noise(*each) for each in numbers), [])
    assert len({tuple(x) for x in drawn}) == 27 * 3
    assert sum((noise(*each) for each in numbers), []) == drawn


@pytest.mark.parametrize("flags, processes, advice", [
    (["--preset", "mini"], 8, "start 1, or --ae_grad_accum 8 --ae_batch_size 1 --grad_accum 8 "
                              "--batch_size 4"),
    (["--preset", "mini", "--model", "ar", "--grad_accum", "2"], 3, "start 1 or 2"),
    (["--preset", "M"], 8, None)])
def test_a_batch_that_cannot_be_shared_equally_is_refused_with_what_works(
        flags, processes, advice, monkeypatch, capsys):
    args = train.parse_args(flags)
    machine = Machine("cpu")
    machine.size = processes
    monkeypatch.setattr(Machine, "barrier", lambda machine: None)
    if advice is None:
        train.check_shares(args, machine)
        return
    with pytest.raises(SystemExit, match="2"):
        train.check_shares(args, machine)
    assert capsys.readouterr().err.endswith(f"equally: {advice}\n")
    if "--" in advice:
        train.check_shares(train.parse_args([*flags, *advice.split(", or ")[1].split()]), machine)


# --- Fine-tuning ---------------------------------------------------------------------------
def test_a_run_begins_with_the_weights_of_another_on_other_text(trained, fit, data_dir, tmp_path):
    """At a rate near 0 they stay what they are, and so does the loss. It resumes like any run."""
    (tmp_path / "again.txt").write_text(FOXES[:20000])
    data.prepare.prepare([tmp_path / "again.txt"], out_root=data_dir)
    old = trained / "out"
    new = tmp_path / "new"
    flags = ["--data", "again", "--device", "cpu", "--log_interval", 1]
    fit(new, *flags, "--init_from", old, "--max_steps", 1, "--lr", 1e-12, "--muon_lr", 1e-12)
    assert_same_weights(old, new, "calm", atol=1e-6)
    assert_same_weights(old, new, "autoencoder")
    assert losses(new, "calm")[1] == pytest.approx(losses(old, "calm")[40], rel=0.2)
    fit(new, *flags, "--resume", "--max_steps", 2)
    assert checkpoint_of(new, "autoencoder")["data"]["name"] == "again"
    assert losses(new, "calm").keys() == {1, 2}


# --- Muon, compiling -----------------------------------------------------------------------
def test_a_step_of_muon_is_a_step_of_torchs():
    """Within what bfloat16, in which torch computes it, can tell: with momentum, so two steps."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (128, 40), (1, 5), (16, 48)]   # two of one shape
    first = [torch.randn(shape) / 50 for shape in shapes]
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in first]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in first]
    optimizers = [train.Muon(ours, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)]
    for _ in range(2):
        before = [matrix.detach().clone() for matrix in theirs]
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b, old in zip(ours, theirs, before):
            assert (a - b).norm() < 0.05 * (b - old).norm()


def test_muon_has_the_inner_matrices_and_adamw_decays_no_vector_and_no_embedding():
    model = train.make_model("calm", train.parse_args(TINY))
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = train.make_optimizers(model, train.TrainConfig(optimizer="muon"))
    embeddings, matrices, vectors = adamw.param_groups
    assert [names[p] for p in embeddings["params"]] == ["embed_tokens.weight"]
    assert [names[p] for p in matrices["params"]] == ["aux.weight"]
    assert embeddings["weight_decay"] == vectors["weight_decay"] == 0 < matrices["weight_decay"]
    assert all(p.ndim == 1 for p in vectors["params"])
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    groups = [*adamw.param_groups, *muon.param_groups]
    trained = sum(p.requires_grad for p in model.parameters())
    assert trained == sum(len(group["params"]) for group in groups)


def test_muon_is_compiled_once_for_each_shape():
    """Whatever the learning rate is; and makes the same step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((16, 16), (48, 16), (16, 48), (16, 16))]
    plain = [torch.nn.Parameter(matrix.clone()) for matrix in weights]
    compiled = [torch.nn.Parameter(matrix.clone()) for matrix in weights]
    optimizers = [train.Muon(plain, lr=0.02), train.Muon(compiled, lr=0.02)]
    optimizers[1].update = torch.compile(train.muon_update, dynamic=False, backend=backend)
    for lr in (0.02, 0.03, 0.01):
        for a, b in zip(plain, compiled):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    assert len(graphs) == 3
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def but_for_the_machine_code(graph, *_, **__):
    """For compile_fx: what Inductor makes of a graph is computed step by step."""

    def run(values):
        return graph(*values)

    run._boxed_call = True   # it takes one list
    return run


@pytest.mark.parametrize("vocab_size", [257, 5000])
def test_a_compiled_training_step_is_one_graph_and_the_plain_one(vocab_size):
    """The loss and the gradient, with the same random numbers. On a CPU Inductor does all but
    compile C++, which takes a minute. (Of 5,000 tokens the auxiliary loss is a sample.)"""
    backend = partial(compile_fx, inner_compile=but_for_the_machine_code)
    if torch.cuda.is_available():
        backend = "inductor"
    args = train.parse_args([*TINY, "--n_layer", "1", "--ae_n_layer", "1"])
    args.vocab_size = vocab_size
    model = train.make_model("calm", args).train()
    tokens = torch.randint(vocab_size, (2, args.context + args.chunk_size))
    found = []
    with inductor.patch(fallback_random=True):
        for compute in (model, torch.compile(model, backend=backend, fullgraph=True)):
            torch.manual_seed(0)
            loss, _ = compute(tokens)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
            model.zero_grad()
    for plain, compiled in zip(*found):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)


def test_without_a_compiler_a_run_goes_on_uncompiled_and_says_so(monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("Cannot find a working triton installation\nand more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert not Machine("cpu", "float32", "on").compiles
    said = "not compiled: RuntimeError: Cannot find a working triton installation and more lines\n"
    assert said in capsys.readouterr().out


# --- The flags -----------------------------------------------------------------------------
def test_a_card_gets_another_preset_and_text(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.parse_args([]).data == "stdlib"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = train.parse_args([])
    assert (args.data, str(args.out_dir)) == ("site-packages", "out/site-packages")
    assert args.n_layer == train.PRESETS["mini"]["n_layer"]
    assert train.parse_args(["--data", "stdlib"]).data == "stdlib"
    assert train.parse_args(["--device", "cpu"]).data == "stdlib"


@pytest.mark.parametrize("K", [1, 2, 3, 8, 16])
def test_sizes_follow_from_the_chunk_size(K):
    args = train.parse_args(["--preset", "nano", "--chunk_size", str(K)])
    assert args.latent_dim == 8 * K and 512 - K < args.context <= 512


ACTIONS = {action.dest: action for action in train.make_parser()._actions}


@pytest.mark.parametrize("name", sorted(ACTIONS.keys() - {"help", *train.OWN}))
def test_a_resumed_run_obeys_a_flag_or_refuses_it(name, trained, capsys):
    was = checkpoint_of(trained / "out", "calm")["settings"][name]
    values = ACTIONS[name].choices or ([0.125] if isinstance(was, float) else [3])
    value = next(value for value in values if value != was)
    argv = ["--resume", "--out_dir", str(trained / "out"), f"--{name}", str(value)]
    if name not in train.FIXED:
        assert getattr(train.parse_args(argv), name) in (value, str(value))
        return
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(argv)
    assert f"has {name} {was}, this run asks for {value}: drop" in capsys.readouterr().err


def test_the_bench_measures_each_part_and_both_models(run):
    figures = last_line(run(bench, "--seconds", 0.02, "--json", *TINY, "--vocab_size", 50))
    assert figures["precision"] == "float32" and figures["mfu"] is None
    assert 0 < figures["matmul_share"] < 1 and figures["peak_memory_gb"] > 0.1
    parts = {"backbone", "head", "energy_score", "autoencoder", "optimizer"}
    assert set(figures["share"]) == parts and min(figures["share"].values()) > 0
    assert min(figures["generate"].values()) > 0
