"""The authors' modules, in numbers: their weights, inputs and outputs (official.npz) against ours,
to 1e-4 relative. The weights come from directories written as the authors publish theirs.
CALM_PARITY names a folder with another official.npz and official.json: the same claims."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig, kl_to_normal
from calm import AR, CALM, ARConfig, CALMConfig, energy_score
from data.published import our_name, read_official
from eval_brier import brier_ngram
from sample import load_official

FOLDER = Path(os.environ.get("CALM_PARITY", Path(__file__).parent))
SIZES = json.loads((FOLDER / "official.json").read_text())
with np.load(FOLDER / "official.npz") as arrays:
    OFFICIAL = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
HEADS = ("energy", "flow", "diffusion")


def weights(part):
    prefix = f"{part}.weights/"
    return {name.removeprefix(prefix): tensor for name, tensor in OFFICIAL.items()
            if name.startswith(prefix)}


def publish(folder, tensors, config):
    """Write a directory as the authors do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{head: model}, with the autoencoder in a directory beside them."""
    folder = tmp_path_factory.mktemp("published")
    publish(folder / "CALM-Autoencoder", weights("autoencoder"), SIZES["ae"])
    found = {}
    for head in HEADS:
        sizes, ae_sizes, state = read_official(publish(folder / head, weights(head), SIZES["lm"]))
        model = CALM(CALMConfig(**sizes, head=head), Autoencoder(AutoencoderConfig(**ae_sizes)))
        model.load_state_dict(state)
        found[head] = model.eval()
    return found


def assert_close(ours, theirs):
    """The largest difference is at most 1e-4 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max() <= 1e-4 * theirs.double().abs().max()


@torch.no_grad()
def test_autoencoder_is_theirs(models):
    ae = models["energy"].autoencoder
    chunks = OFFICIAL["input_ids"].unflatten(1, (-1, SIZES["ae"]["patch_size"]))
    mean, log_std = ae.encode(chunks)
    assert_close(mean, OFFICIAL["autoencoder.mean"])
    assert_close(log_std, OFFICIAL["autoencoder.log_std"])
    assert_close(ae.decode(OFFICIAL["autoencoder.z"]).flatten(1, 2), OFFICIAL["autoencoder.logits"])


def test_clipped_kl_is_theirs():
    kl = kl_to_normal(OFFICIAL["autoencoder.mean"], OFFICIAL["autoencoder.log_std"])
    clipped = kl.clamp_min(OFFICIAL["autoencoder.kl_clamp"].item()).sum(-1)
    assert_close(clipped, OFFICIAL["autoencoder.kl_clipped"])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_inputs_and_hidden_states_are_theirs(models, head):
    assert_close(models[head].inputs(OFFICIAL["input_ids"]), OFFICIAL[f"{head}.inputs"])
    assert_close(models[head].hidden(OFFICIAL["input_ids"]), OFFICIAL[f"{head}.hidden"])


@torch.no_grad()
def test_energy_head_samples_as_theirs(models):
    noise = OFFICIAL["energy.noise"]
    h = OFFICIAL["energy.hidden"][:, :-1].flatten(0, 1)
    assert_close(models["energy"].head.sample(h, len(noise), noise), OFFICIAL["energy.samples"])


@pytest.mark.parametrize("name", [k for k in OFFICIAL if k.startswith("energy.score_alpha_")])
def test_energy_score_is_minus_theirs(name):
    std = OFFICIAL["energy.target_log_std"].exp()
    y = OFFICIAL["energy.target_mean"] + std * OFFICIAL["energy.target_noise"]
    alpha = float(name.removeprefix("energy.score_alpha_"))
    assert_close(-energy_score(OFFICIAL["energy.samples"], y, alpha), OFFICIAL[name])


@torch.no_grad()
def test_flow_head_is_theirs(models):
    head = models["flow"].head
    x, t, h = (OFFICIAL[f"flow.{name}"] for name in ("x", "t", "context"))
    assert_close(head.velocity(x, t, h), OFFICIAL["flow.velocity"])
    assert_close(head.sample(h, 1, x[None])[0], OFFICIAL["flow.midpoint20"])


@torch.no_grad()
def test_diffusion_head_is_theirs(models):
    head = models["diffusion"].head
    x, t, h = (OFFICIAL[f"diffusion.{name}"] for name in ("x", "t", "context"))
    assert_close(head(x, t, h), OFFICIAL["diffusion.net_out"])
    before = torch.nn.functional.pad(head.alpha_bar[:-1], (1, 0), value=1.0)
    assert_close(1 - head.alpha_bar / before, OFFICIAL["diffusion.betas"])
    z = OFFICIAL["diffusion.x_start"]
    squared_error, bits = head.terms(z, OFFICIAL["diffusion.noise"], t, h)
    assert_close(squared_error, OFFICIAL["diffusion.mse"])
    assert_close(bits, OFFICIAL["diffusion.vb"])
    assert_close(squared_error + bits, OFFICIAL["diffusion.loss"])


def test_brier_estimate_is_theirs():
    names = ("sample_a", "sample_b", "target")
    a, b, y = (OFFICIAL[f"brier.{name}"].flatten(0, 1) for name in names)
    assert_close(brier_ngram(torch.stack([a, b]), y).mean(0), OFFICIAL["brier.n1_to_n4"])


@torch.no_grad()
def test_ar_baseline_is_theirs():
    theirs = weights("ar")
    ids = OFFICIAL["input_ids"]
    vocab_size, width = theirs["model.embed_tokens.weight"].shape
    n_ff = len(theirs["model.layers.0.mlp.gate_proj.weight"])
    n_layer = sum(name.endswith("q_proj.weight") for name in theirs)
    n_head = SIZES["lm"]["num_attention_heads"]
    model = AR(ARConfig(vocab_size, width, n_ff, n_layer, n_head, ids.shape[1]))
    model.load_state_dict({our_name(name.replace("model.", "transformer.")): tensor
                           for name, tensor in theirs.items()})
    assert_close(model.lm_head(model.hidden(ids)), OFFICIAL["ar.logits"])


@torch.no_grad()
@pytest.mark.parametrize("names", [["mlp_generator"], ["generative_head"],
                                   ["mlp_generator", "generative_head"]])
@pytest.mark.parametrize("prefix", ["ae_model.", "autoencoder."])
def test_a_published_directory_loads(tmp_path, names, prefix):
    """With the autoencoder inside, the tied embedding twice, and the head under either of its
    names, or both."""
    theirs = {prefix + name: tensor for name, tensor in weights("autoencoder").items()}
    for name, tensor in weights("energy").items():
        for alias in names:
            theirs[name.replace("mlp_generator", alias)] = tensor
    config = SIZES["lm"] | {"beta": 0.5}
    model = load_official(publish(tmp_path / "m", theirs, config))
    assert model.config.alpha == 0.5   # which they call beta
    assert_close(model.hidden(OFFICIAL["input_ids"]), OFFICIAL["energy.hidden"])
    h = OFFICIAL["energy.hidden"][:, :-1].flatten(0, 1)
    noise = OFFICIAL["energy.noise"]
    assert_close(model.head.sample(h, len(noise), noise), OFFICIAL["energy.samples"])
    logits = model.autoencoder.decode(OFFICIAL["autoencoder.z"]).flatten(1, 2)
    assert_close(logits, OFFICIAL["autoencoder.logits"])
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
