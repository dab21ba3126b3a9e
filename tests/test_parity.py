"""The authors' modules, in numbers: their weights, inputs and outputs (official.npz) against ours, to 1e-4 relative.

CALM_PARITY names a folder with another official.npz and official.json: other K, other sizes, the same claims.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig, kl_to_normal
from calm import AR, CALM, ARConfig, CALMConfig, energy_score
from eval_brier import brier_ngram

FOLDER = Path(os.environ.get("CALM_PARITY", Path(__file__).parent))
SIZES = json.loads((FOLDER / "official.json").read_text())
with np.load(FOLDER / "official.npz") as arrays:
    OFFICIAL = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
LM, AE = SIZES["lm"], SIZES["ae"]

# their name -> ours, applied in this order
RENAMES = {
    "autoencoder": [("encoder.embed_tokens", "encoder.embed"), ("squeeze_layer", "squeeze"), ("expand_layer", "expand"),
                    ("hidden_to_latent", "to_latent"), ("latent_to_hidden", "from_latent"), ("layernorm", "norm")],
    "transformer": [("transformer.embed_tokens", "embed"), ("model.embed_tokens", "embed"), ("model.", "transformer."),
                    (".layers.", ".blocks."), ("self_attn", "attn"), ("input_layernorm", "attn_norm"),
                    ("post_attention_layernorm", "mlp_norm"), ("embed_proj", "compress")],
    "energy": [("mlp_generator.", "head."), ("mlp_blocks", "blocks"), ("noise_embd", "noise_embed"), ("norm_noise", "noise_norm"),
               ("hidden_embd", "context_embed"), ("norm_hidden", "context_norm"), ("final_layer.in_ln", "out_norm"),
               ("final_layer.linears.0", "out1"), ("final_layer.linears.2", "out2"), ("in_ln", "norm"), ("linears.0", "linear1"),
               ("linears.2", "linear2"), ("linears.4", "linear3"), ("down_proj", "linear4")],
}


def renamed(name, *groups):
    for group in groups:
        for theirs, ours in RENAMES[group]:
            name = name.replace(theirs, ours)
    return name


def weights(prefix):
    return {k.removeprefix(prefix): v for k, v in OFFICIAL.items() if k.startswith(prefix)}


def assert_close(ours, theirs):
    """Largest difference over the largest value: at most 1e-4."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= 1e-4, f"relative error {error:.1e}"


@pytest.fixture(scope="module")
def autoencoder():
    """Their layers count on through squeeze and expand; ours are named for what they see: tokens or the chunk."""
    encoder_half, decoder_half = AE["num_encoder_layers"] // 2, AE["num_decoder_layers"] // 2
    state = {}
    for name, value in weights("autoencoder.weights/").items():
        if name == "decoder.lm_head_weight":
            continue   # tied
        parts = name.split(".")
        if parts[1] in ("encoder_layers", "decoder_layers"):
            i, half = int(parts[2]), encoder_half if parts[1] == "encoder_layers" else decoder_half
            first, second = ("token_blocks", "chunk_blocks") if parts[1] == "encoder_layers" else ("chunk_blocks", "token_blocks")
            parts[1:3] = [first, str(i)] if i < half else [second, str(i - half)]
        state[renamed(".".join(parts), "autoencoder")] = value
    model = Autoencoder(AutoencoderConfig(AE["vocab_size"], AE["patch_size"], AE["latent_size"], AE["hidden_size"],
                                          AE["intermediate_size"], AE["num_encoder_layers"]))
    model.load_state_dict(state)   # strict: every weight of theirs has its place
    return model.eval()


@pytest.fixture(scope="module")
def calm(autoencoder):
    config = CALMConfig(vocab_size=LM["vocab_size"], chunk_size=LM["patch_size"], latent_dim=LM["latent_size"],
                        n_embd=LM["hidden_size"], n_ff=LM["intermediate_size"], n_layer=LM["num_hidden_layers"],
                        n_head=LM["num_attention_heads"], n_head_layer=LM["num_mlp_layers"], n_noise=LM["noise_size"],
                        block_size=LM["max_position_embeddings"], num_samples=LM["num_samples"])
    model = CALM(config, autoencoder)
    state = {}
    for name, value in weights("energy.weights/").items():
        # down_proj is the MLP's last layer in their Transformer, but Linear4 in their head
        state[renamed(name, *(["energy"] if name.startswith("mlp_generator") else ["transformer"]))] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("autoencoder.") for name in missing)
    return model.eval()


@torch.no_grad()
def test_autoencoder_encodes_as_theirs(autoencoder):
    mean, log_std = autoencoder.encode(OFFICIAL["input_ids"].unflatten(1, (-1, AE["patch_size"])))
    assert_close(mean, OFFICIAL["autoencoder.mean"])
    assert_close(log_std, OFFICIAL["autoencoder.log_std"])


@torch.no_grad()
def test_autoencoder_decodes_as_theirs(autoencoder):
    logits = autoencoder.decode(OFFICIAL["autoencoder.z"])                    # (B, T, K, V)
    assert_close(logits.flatten(1, 2), OFFICIAL["autoencoder.logits"])


def test_clipped_kl_is_theirs():
    kl = kl_to_normal(OFFICIAL["autoencoder.mean"], OFFICIAL["autoencoder.log_std"])
    assert_close(kl.clamp_min(OFFICIAL["autoencoder.kl_clamp"].item()).sum(-1), OFFICIAL["autoencoder.kl_clipped"])


@torch.no_grad()
def test_input_compression_is_theirs(calm):
    assert_close(calm.inputs(OFFICIAL["input_ids"]), OFFICIAL["energy.inputs"])


@torch.no_grad()
def test_hidden_states_are_theirs(calm):
    assert_close(calm.hidden(OFFICIAL["input_ids"]), OFFICIAL["energy.hidden"])


@torch.no_grad()
def test_energy_head_samples_as_theirs(calm):
    noise, h = OFFICIAL["energy.noise"], OFFICIAL["energy.hidden"][:, :-1].flatten(0, 1)
    assert_close(calm.head.sample(h, len(noise), noise), OFFICIAL["energy.samples"])


@pytest.mark.parametrize("name", [k for k in OFFICIAL if k.startswith("energy.score_alpha_")])
def test_energy_score_is_minus_theirs(name):
    mean, log_std = OFFICIAL["energy.target_mean"], OFFICIAL["energy.target_log_std"]
    y = mean + log_std.exp() * OFFICIAL["energy.target_noise"]
    alpha = float(name.removeprefix("energy.score_alpha_"))
    assert_close(-energy_score(OFFICIAL["energy.samples"], y, alpha), OFFICIAL[name])


def test_brier_estimate_is_theirs():
    a, b, y = (OFFICIAL[f"brier.{k}"].flatten(0, 1) for k in ("sample_a", "sample_b", "target"))
    assert_close(brier_ngram(torch.stack([a, b]), y).mean(0), OFFICIAL["brier.n1_to_n4"])


@torch.no_grad()
def test_ar_baseline_is_theirs():
    state = {renamed(k, "transformer"): v for k, v in weights("ar.weights/").items()}
    vocab_size, width = state["embed.weight"].shape
    layers = 1 + max(int(k.split(".")[2]) for k in state if ".blocks." in k)
    ids = OFFICIAL["input_ids"]
    model = AR(ARConfig(vocab_size, width, state["transformer.blocks.0.mlp.gate_proj.weight"].shape[0], layers,
                        LM["num_attention_heads"], ids.shape[1]))
    model.load_state_dict(state)
    assert_close(model.lm_head(model.hidden(ids)), OFFICIAL["ar.logits"])
