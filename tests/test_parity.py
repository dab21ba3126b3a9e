"""The authors' modules, in numbers: their weights, inputs and outputs (official.npz) against ours,
to 1e-4 relative.

CALM_PARITY names a folder with another official.npz and official.json: other K, other sizes, the
same claims. The weights go through `load_official`, from directories written as the authors publish
theirs.
"""
import base64
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_brier
import sample
import train
from autoencoder import Autoencoder, AutoencoderConfig, kl_to_normal
from calm import AR, CALM, ARConfig, CALMConfig, energy_score
from data.prepare import prepare
from data.published import our_name
from eval_brier import brier_ngram
from helpers import assert_one_line, checkpoint_of, last_line
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


def safetensors(header, data=b""):
    """The bytes of a .safetensors file."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # so that the numbers are aligned
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path, tensors):
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(safetensors(header, data))


def publish(folder, tensors, config, form="safetensors"):
    """Write a directory as the authors do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def together(head="energy", prefix="ae_model."):
    """The tensors of a published model with its autoencoder inside, the tied embedding twice."""
    inside = {prefix + name: tensor for name, tensor in weights("autoencoder").items()}
    return weights(head) | inside


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{head: model}, with the autoencoder in a directory beside them."""
    folder = tmp_path_factory.mktemp("published")
    publish(folder / "CALM-Autoencoder", weights("autoencoder"), SIZES["ae"])
    return {head: load_official(publish(folder / head, weights(head), SIZES["lm"]))
            for head in HEADS}


def error(ours, theirs):
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def assert_close(ours, theirs):
    assert error(ours, theirs) <= 1e-4


# --- Module by module ----------------------------------------------------------------------
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


# --- Directories as the authors publish them -----------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["ae_model.", "autoencoder."])
def test_a_published_directory_loads_in_both_formats(tmp_path, form, prefix):
    model = load_official(publish(tmp_path / "m", together(prefix=prefix), SIZES["lm"], form))
    assert_close(model.hidden(OFFICIAL["input_ids"]), OFFICIAL["energy.hidden"])
    logits = model.autoencoder.decode(OFFICIAL["autoencoder.z"]).flatten(1, 2)
    assert_close(logits, OFFICIAL["autoencoder.logits"])
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("names", [["generative_head"], ["mlp_generator", "generative_head"]])
def test_the_energy_head_loads_under_either_of_its_names_or_both(tmp_path, names):
    """In the authors' energy model generative_head is mlp_generator: a file may have both."""
    theirs = {}
    for name, tensor in together().items():
        for alias in names if name.startswith("mlp_generator.") else [""]:
            theirs[name.replace("mlp_generator", alias)] = tensor
    assert any(name.startswith("generative_head.") for name in theirs)
    config = SIZES["lm"] | {"beta": 0.5}
    one = load_official(publish(tmp_path / "one", theirs, config, "bin"))
    other = load_official(publish(tmp_path / "other", together(), config, "bin"))
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in one.state_dict().items())
    assert one.config.alpha == 0.5   # which they call beta


@torch.no_grad()
def test_bfloat16_weights_in_several_files_load(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in together().items()}
    del tensors["ae_model.decoder.lm_head_weight"]   # tied weights may be stored once
    folder = publish(tmp_path / "m", {}, SIZES["lm"])
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in (0, 1):
        part = {name: tensors[name] for name in names[i::2]}
        write_safetensors(folder / f"model-0000{i + 1}-of-00002.safetensors", part)
    hidden = load_official(folder).hidden(OFFICIAL["input_ids"])
    assert error(hidden, OFFICIAL["energy.hidden"]) < 0.05


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


EMBEDDING = "ae_model.decoder.lm_head_weight"
NOT_PUBLISHED = {   # tensors, config.json, what is said
    "no autoencoder": (weights("energy"), SIZES["lm"], "CALM-Autoencoder is not a published model"),
    "an autoencoder": (weights("autoencoder"), SIZES["ae"], "KeyError"),
    "other positions": (together(), SIZES["lm"] | {"rope_theta": 500_000}, "expected 10000"),
    "another norm": (together(), SIZES["lm"] | {"rms_norm_eps": 1e-5}, "expected 1e-06"),
    "no sizes": (together(), SIZES["lm"] | {"hidden_size": "wide"}, "ValueError"),
    "a list": (together(), [1, 2], "TypeError"),
    "a tensor too many": (together() | {"odd": torch.zeros(2)}, SIZES["lm"], 'Unexpected key(s)'),
    "a tensor missing": (weights("autoencoder"), SIZES["lm"], "Missing key(s)"),
    "another output": (together() | {EMBEDDING: torch.zeros(2)}, SIZES["lm"], "is not encoder."),
    "code": ({"trap": Trap()}, SIZES["lm"], "Weights only load failed"),
}


@pytest.mark.parametrize("case", NOT_PUBLISHED)
def test_a_directory_that_is_not_a_published_model_is_one_clear_line(tmp_path, capsys, case):
    tensors, config, message = NOT_PUBLISHED[case]
    with pytest.raises(SystemExit, match="2"):
        load_official(publish(tmp_path / "m", tensors, config, "bin"))
    said = capsys.readouterr()
    assert "code ran" not in said.out + said.err
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err and str(tmp_path) in said.err


def test_a_published_model_writes_and_is_evaluated(tmp_path, run, data_dir):
    """From directory to text and BrierLM, with a tokenizer file: 256 bytes, 256 special tokens; and
    [PAD] in the model."""
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    config = CALMConfig(513, 4, 8, n_embd=32, n_ff=48, n_layer=2, n_head=4, n_head_layer=1,
                        n_noise=10, block_size=16)
    model = CALM(config, Autoencoder(AutoencoderConfig(513, 4, 8, n_embd=16, n_ff=24)))
    theirs = {"embed_tokens": "transformer.embed_tokens", "head": "mlp_generator",
              "autoencoder": "ae_model"}
    tensors = {re.sub(r"^\w+", lambda part: theirs.get(part[0], part[0]), name): tensor
               for name, tensor in model.state_dict().items()}
    sizes = {"vocab_size": 513, "patch_size": 4, "latent_size": 8, "hidden_size": 32,
             "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_mlp_layers": 1, "noise_size": 10, "max_position_embeddings": 16}
    folder = publish(tmp_path / "m", tensors, sizes)
    text = tmp_path / "text.txt"
    text.write_text("A published model reads this sentence again and again. " * 60)
    prepare([text], "mine", str(ranks), out_root=data_dir)
    prepare([text], "bytes", out_root=data_dir)

    done = run(sample, "--official", folder, "--tokenizer", ranks, "--start", "A model",
               "--max_new_tokens", 8)
    assert done.code == 0 and done.out.startswith("A model")
    score = last_line(run(eval_brier, "--official", folder, "--data", "mine", "--windows", 4,
                          "--json"))
    assert score["positions"] == 4 * 15
    wrong = run(eval_brier, "--official", folder, "--data", "bytes")
    assert_one_line(wrong, "vocabulary of 513")
    assert_one_line(run(sample, "--official", folder), "tokenizer.model")

    # Fine-tuned at a rate near 0, on other text of the same tokenizer, it is the same model.
    tuned = tmp_path / "tuned"
    slow = ["--max_steps", 1, "--lr", 1e-12, "--muon_lr", 1e-12, "--batch_size", 2]
    done = run(train, "--init_from", folder, "--data", "mine", "--out_dir", tuned, *slow)
    assert done.code == 0, done.err
    weights = checkpoint_of(tuned, "calm")["model"]
    assert all(torch.allclose(weights[name], tensor, atol=1e-6)
               for name, tensor in model.state_dict().items())
    done = run(train, "--resume", "--data", "mine", "--out_dir", tuned, "--max_steps", 2)
    assert done.code == 0 and checkpoint_of(tuned, "calm")["step"] == 2, done.err
    assert_one_line(run(train, "--init_from", folder, "--data", "bytes", "--out_dir",
                        tmp_path / "other"), "vocabulary of 513")
