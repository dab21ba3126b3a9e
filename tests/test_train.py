"""Training: it learns, it resumes, several processes agree; the optimizer, the flags, the bench."""
import itertools
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import autoencoder as autoencoder_script
import bench
import eval_brier
import sample
import train
from data.machine import save_checkpoint
from data.prepare import TokenData
from helpers import (ALONE, SENTENCE, SHORT, assert_same_weights, checkpoint_of, log_of,
                     losses, tiny_calm, torchrun)


def test_the_whole_road_learns_a_repeating_text(fit, tmp_path, run):
    """Near certainty about a sentence that repeats: BrierLM, text, the autoencoder's table."""
    muon = ["--optimizer", "muon", "--lr", 0.01, "--decay_frac", 0.5, "--eval_interval", 1000]
    said = fit(tmp_path, "--max_steps", 200, *muon)
    assert "held-out text" in said and "--noise 0.25" in said and "FLOPs" in said
    table = run(autoencoder_script, "--out_dir", tmp_path).out.splitlines()
    for row in ("drawn from the posterior", "the mean, moved by sigma = 0.3"):
        right, = [line.split()[-2] for line in table if line.startswith(row)]
        assert float(right.rstrip("%")) > 99
    fit(tmp_path, "--max_steps", 200, *muon, "--model", "ar")
    for model in ("calm", "ar"):
        flags = ["--out_dir", tmp_path, "--model", model, "--device", "cpu"]
        found = run(eval_brier, *flags, "--json", "--windows", 16).out
        assert json.loads(found.splitlines()[-1])["brierlm"] > 80
        text = run(sample, *flags, "--start", SENTENCE[:20], "--temperature", 0.5,
                   "--max_new_tokens", 40).out
        assert SENTENCE + SENTENCE[:9] in text


@pytest.mark.parametrize("K", [3, 8])
def test_another_chunk_size_alone_is_a_run_that_works(K, tmp_path, run, trained):
    """Its latent size and context follow, and it is scored at n-grams of its own stride."""
    flags = ["--data", trained / "foxes", "--out_dir", tmp_path, "--chunk_size", K, "--n_embd", 64,
             "--n_ff", 64, "--n_layer", 2, "--max_steps", 4, "--batch_size", 2]
    for model in ("autoencoder", "calm"):
        assert run(train, *flags, "--model", model).error is None
    config = checkpoint_of(tmp_path, "calm")["config"]
    assert config["latent_dim"] == 8 * K and 512 - K < config["block_size"] * K <= 512
    assert log_of(tmp_path)[-1]["stride"] == {3: 18, 8: 16}[K]


def test_a_run_of_so_many_flops_counts_its_autoencoder(fit, tmp_path, trained):
    spent = checkpoint_of(trained / "out", "autoencoder")["flops"]
    for model, extra in (("calm", spent), ("ar", 0.0)):
        fit(tmp_path, "--model", model, "--flops", 1.2 * spent, "--block_size", 32)   # not its 16
        checkpoint = checkpoint_of(tmp_path, model)
        a_step = (checkpoint["flops"] - extra) / checkpoint["step"]
        assert checkpoint["flops"] == pytest.approx(1.2 * spent, abs=a_step / 2 + 1)
    fit(tmp_path, "--model", "ar", "--resume", "--max_steps", checkpoint["step"] + 3)
    assert checkpoint_of(tmp_path, "ar")["step"] == checkpoint["step"] + 3


@pytest.mark.parametrize("first, second", [("float32", "float16"), ("float16", "bfloat16")])
def test_a_run_learns_in_every_precision_and_goes_on_in_another(first, second, fit, tmp_path):
    fit(tmp_path, "--model", "ar", "--optimizer", "muon", "--grad_accum", 2, "--dtype", first)
    fit(tmp_path, "--model", "ar", "--resume", "--max_steps", 25, "--dtype", second)
    assert losses(tmp_path, "ar")[25] < losses(tmp_path, "ar")[15] < losses(tmp_path, "ar")[5]


def test_in_float16_no_optimizer_steps_where_a_gradient_is_not_finite():
    model = torch.nn.Linear(2, 2)
    model.forward = lambda tokens: (model.weight.sum() * float("inf") + model.bias.sum(), {})
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = [torch.optim.SGD([p], lr=1) for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scale = scaler.get_scale()
    machine = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    train.train_step(model, [None], 1, optimizers, scaler, 1.0, machine)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert scaler.get_scale() < scale


@pytest.mark.parametrize("kind", ["autoencoder", "calm", "ar"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(kind, trained, run, tmp_path,
                                                                monkeypatch):
    """From its last evaluation, at step 10; in stage 1 on the way to CALM, too."""
    plain = train.micro_batches
    of_autoencoder, of_model = train.PRESETS["nano"]
    small = of_autoencoder | dict(n_embd=32, max_steps=15, batch_size=2)
    monkeypatch.setitem(train.PRESETS, "nano", (small, of_model))

    def stopped(data, seed, machine, stage, step, *args):
        if (stage, step) == (kind, 13):
            raise KeyboardInterrupt
        return plain(data, seed, machine, stage, step, *args)

    model = "ar" if kind == "ar" else "calm"
    flags = ["--data", trained / "foxes", "--model", model, "--out_dir"]
    settings = [*SHORT, "--optimizer", "muon"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(train, *flags, whole, *settings).error is None
    monkeypatch.setattr(train, "micro_batches", stopped)
    assert f"'{kind}': 10" in run(train, *flags, broken, *settings).error
    monkeypatch.setattr(train, "micro_batches", plain)
    assert run(train, *flags, broken, "--resume").error is None
    assert_same_weights(whole, broken, model)
    assert losses(whole, kind) == losses(broken, kind) and losses(whole, kind).keys() == {5, 10, 15}


def test_a_finished_autoencoder_is_used_as_it_is_and_a_trained_model_never_overwritten(
        fit, trained, run, tmp_path):
    before = (trained / "out" / "autoencoder.pt").read_bytes()
    fit(tmp_path, "--dropout", 0.5)
    assert (tmp_path / "autoencoder.pt").read_bytes() == before
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--model", "autoencoder"], ["--init_from", trained / "out"]):
        again = run(train, "--data", trained / "foxes", "--out_dir", tmp_path, *SHORT, *more)
        assert "--resume, or choose another --out_dir" in again.error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """Of 100 MB, again and again; killed at any time."""
    path = tmp_path / "calm.pt"
    script = ("import pathlib, sys, torch, data.machine as m; path = pathlib.Path(sys.argv[1])\n"
              "while True: m.save_checkpoint(path, {'x': torch.ones(25_000_000)})")
    for delay in (0.0, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", script, path], **ALONE)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert torch.load(path, weights_only=True)["x"].sum() == 25_000_000
        path.unlink()
    save_checkpoint(path, {"x": 1})   # what the killed one left is in nobody's way
    assert [file.name for file in tmp_path.iterdir()] == ["calm.pt"]


def test_the_checkpoint_is_written_before_the_evaluation_which_takes_no_larger_batches(
        fit, tmp_path, monkeypatch):
    """So what trains is kept, even if the evaluation does not fit into memory."""
    plain = train.AR.hidden
    sizes = []

    def hidden(model, tokens, *cache):
        sizes.append(len(tokens))
        if len(sizes) > 30:
            raise MemoryError
        return plain(model, tokens, *cache)

    monkeypatch.setattr(train.AR, "hidden", hidden)
    with pytest.raises(MemoryError):
        fit(tmp_path, "--model", "ar", "--batch_size", 3)
    # One to count FLOPs, ten steps, 16 windows by three; then three windows, with eight samples.
    assert sizes == [1, *[3] * 15, 1, 3, *[8 * 3] * 9, 3, *[8 * 3] * 3]
    assert checkpoint_of(tmp_path, "ar")["step"] == 10


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_two_processes_make_the_steps_of_one(model, fit, trained, tmp_path):
    """One process with two micro-batches a step, or two with one each. From a checkpoint on:
    AdamW's very first steps have the full size whatever the gradient, which is partly rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    fit(one, "--model", model, "--n_layer", 1, "--optimizer", "muon", "--grad_accum", 2)
    shutil.copytree(one, two)
    flags = ["--resume", "--model", model, "--max_steps", 21]
    fit(one, *flags)
    done = torchrun(2, *flags, "--data", trained / "foxes", "--out_dir", two)
    assert done.returncode == 0 and "2 x cpu" in done.stdout, done.stderr
    assert_same_weights(one, two, model, rtol=1e-3, atol=1e-5)
    assert log_of(two)[-1]["final"] and log_of(two)[-1]["flops"] == log_of(one)[-1]["flops"]


@torch.no_grad()
def test_every_micro_batch_has_noise_of_its_own(trained):
    """A function of seed, kind of model, step and micro-batch, and of each of them."""
    data = TokenData(trained / "foxes")
    config = train.TrainConfig(batch_size=2, grad_accum=4)
    machine = SimpleNamespace(size=1, rank=0, to_device=lambda tokens: tokens)

    def noise(seed, kind, step):
        batches = train.micro_batches(data, seed, machine, kind, step, config, 16)
        return [(*tokens.flatten().tolist(), *torch.rand(3).tolist()) for tokens in batches]

    numbers = list(itertools.product((0, 1, 4096), train.KINDS, (1, 2, 4097)))
    drawn = sum((noise(*each) for each in numbers), [])
    assert len(set(drawn)) == 27 * 4 and sum((noise(*each) for each in numbers), []) == drawn


@pytest.mark.parametrize("rows, columns", [(16, 16), (48, 16), (16, 48)])
def test_muon_brings_all_singular_values_near_one(rows, columns):
    """Down to a thousandth of the norm; and leaves the singular vectors what they are."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    x = train.orthogonal(5 * U @ torch.logspace(-2.5, 0, 16).diag() @ Vh)
    values = U.mT @ x @ Vh.mT   # (3, 16, 16)
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - diagonal.diag_embed()).abs().max() < 1e-4
    assert diagonal.min() > 0.18 and diagonal.max() < 1.87


def test_a_step_of_muon_goes_along_its_orthogonal_momentum():
    """Two of one shape are stacked; the step is as long as Jordan's, and the weights decay."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 48), (48, 16), (16, 48))]
    muon = train.Muon(weights, 0.02, 0.1, torch.float32, compiled=False)
    average = [0.0, 0.0, 0.0]
    for _ in range(2):
        expected = []
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            average[i] = 0.95 * average[i] + 0.05 * weight.grad
            update = train.orthogonal((0.05 * weight.grad + 0.95 * average[i])[None])[0]
            scale = 3 ** 0.5 if weight.shape == (48, 16) else 1
            expected.append(weight.detach() * (1 - 0.02 * 0.1) - 0.02 * scale * update)
        muon.step()
        torch.testing.assert_close([weight.detach() for weight in weights], expected)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_decay_and_beside_muon_no_matrix_of_tokens_does(optimizer):
    model = tiny_calm(aux_weight=0.5)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name for p, name in names.items() if p.ndim == 2}
    of_tokens = {"embed_tokens.weight", "aux.weight"} if optimizer == "muon" else set()
    decay = {}
    for each in train.make_optimizers(model, train.TrainConfig(optimizer=optimizer)):
        for group in each.param_groups:
            decay |= {names[p]: group["weight_decay"] for p in group["params"]}
    assert decay == {name: 0.1 * (name in matrices - of_tokens) for name in names.values()}


def test_flags_are_for_the_model_that_model_names():
    """Its autoencoder has the sizes of a chunk from them, and what CALM has not."""
    flags = "--preset nano --n_embd 64 --lr 1 --latent_dim 9 --dropout 0.3".split()
    for model, width, rate in (("calm", 128, 6e-3), ("autoencoder", 64, 1.0)):
        args = train.parse_args([*flags, "--model", model])
        config = train.config_of(train.AutoencoderConfig, args, "autoencoder")
        assert (config.n_embd, config.latent_dim, config.dropout) == (width, 9, 0.3)
        assert train.config_of(train.TrainConfig, args, "autoencoder").lr == rate
    args = train.parse_args(flags)
    config = train.config_of(train.CALMConfig, args, "calm", vocab_size=7)
    assert (config.n_embd, config.latent_dim, config.vocab_size) == (64, 9, 7)


def test_a_run_begins_with_the_weights_of_another_and_resumes_with_its_settings(
        trained, run, tmp_path):
    """At a rate near 0 they stay what they are; and with its sizes, whatever the flags say."""
    flags = ["--data", trained / "foxes", "--out_dir", tmp_path]
    slow = ["--max_steps", 1, "--lr", 1e-12, "--muon_lr", 1e-12, "--batch_size", 2, "--seed", 3]
    assert run(train, *flags, "--init_from", trained / "out", *slow).error is None
    assert_same_weights(trained / "out", tmp_path, "calm", atol=1e-6)
    args = train.parse_args(["--resume", "--out_dir", str(tmp_path), "--lr", "0.5"])
    assert (args.seed, args.muon_lr, args.lr) == (3, 1e-12, 0.5)
    assert run(train, *flags, "--resume", "--max_steps", 2, "--block_size", 8).error is None
    resumed = checkpoint_of(tmp_path, "calm")
    assert resumed["step"] == 2 and resumed["settings"]["block_size"] == 16


def test_the_bench_measures_training_and_generation(run):
    flags = ["--seconds", 0.02, "--json", *SHORT]
    figures = json.loads(run(bench, *flags, "--vocab_size", 50).out.splitlines()[-1])
    assert figures["precision"] == "float32" and figures["mfu"] is None
    assert figures["train_tokens_per_s"] > 0 and figures["peak_memory_gb"] > 0.1
    assert set(figures["generate"]) == {"calm_T1", "calm_T0.5", "ar_T1"}
