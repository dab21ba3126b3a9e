"""The authors' modules, in numbers: their weights, inputs and outputs (official.npz) against ours, to
1e-4 relative.

CALM_PARITY names a folder with another official.npz and official.json: other K, other sizes, the same
claims. The weights go through `load_official`, from directories written as the authors publish theirs.
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

import data.checkpoint
import eval_brier
import sample
from autoencoder import Autoencoder, AutoencoderConfig, kl_to_normal
from calm import AR, CALM, ARConfig, CALMConfig, energy_score, load_official
from data.checkpoint import OFFICIAL_NAMES
from data.prepare import prepare
from eval_brier import brier_ngram

FOLDER = Path(os.environ.get("CALM_PARITY", Path(__file__).parent))
SIZES = json.loads((FOLDER / "official.json").read_text())
with np.load(FOLDER / "official.npz") as arrays:
    OFFICIAL = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
HEADS = ("energy", "flow", "diffusion")


def weights(part):
    prefix = f"{part}.weights/"
    return {k.removeprefix(prefix): v for k, v in OFFICIAL.items() if k.startswith(prefix)}


def write_safetensors(path, tensors):
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [end, end + len(raw)]}
        parts.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # the numbers are aligned
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def publish(folder, tensors, config, form="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def together(head="energy", autoencoder="ae_model."):
    """The tensors of a published model that has its autoencoder inside, the tied embedding twice."""
    return weights(head) | {autoencoder + k: v for k, v in weights("autoencoder").items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    publish(folder / "CALM-Autoencoder", weights("autoencoder"), SIZES["ae"])
    return {head: load_official(publish(folder / head, weights(head), SIZES["lm"])) for head in HEADS}


def error(ours, theirs):
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def assert_close(ours, theirs):
    assert error(ours, theirs) <= 1e-4


@torch.no_grad()
def test_autoencoder_is_theirs(models):
    ae = models["energy"].autoencoder
    mean, log_std = ae.encode(OFFICIAL["input_ids"].unflatten(1, (-1, SIZES["ae"]["patch_size"])))
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
    noise, h = OFFICIAL["energy.noise"], OFFICIAL["energy.hidden"][:, :-1].flatten(0, 1)
    assert_close(models["energy"].head.sample(h, len(noise), noise), OFFICIAL["energy.samples"])


@pytest.mark.parametrize("name", [k for k in OFFICIAL if k.startswith("energy.score_alpha_")])
def test_energy_score_is_minus_theirs(name):
    mean, log_std = OFFICIAL["energy.target_mean"], OFFICIAL["energy.target_log_std"]
    y = mean + log_std.exp() * OFFICIAL["energy.target_noise"]
    alpha = float(name.removeprefix("energy.score_alpha_"))
    assert_close(-energy_score(OFFICIAL["energy.samples"], y, alpha), OFFICIAL[name])


@torch.no_grad()
def test_flow_head_is_theirs(models):
    head, x, t, h = models["flow"].head, *(OFFICIAL[f"flow.{k}"] for k in ("x", "t", "context"))
    assert_close(head.velocity(x, t, h), OFFICIAL["flow.velocity"])
    assert_close(head.sample(h, 1, x[None])[0], OFFICIAL["flow.midpoint20"])


@torch.no_grad()
def test_diffusion_head_is_theirs(models):
    head, x, t, h = models["diffusion"].head, *(OFFICIAL[f"diffusion.{k}"] for k in ("x", "t", "context"))
    assert_close(head(x, t, h), OFFICIAL["diffusion.net_out"])
    previous = torch.nn.functional.pad(head.a[:-1], (1, 0), value=1.0)
    assert_close(1 - head.a / previous, OFFICIAL["diffusion.betas"])
    mse, bits = head.terms(OFFICIAL["diffusion.x_start"], OFFICIAL["diffusion.noise"], t, h)
    assert_close(mse, OFFICIAL["diffusion.mse"])
    assert_close(bits, OFFICIAL["diffusion.vb"])
    assert_close(mse + bits, OFFICIAL["diffusion.loss"])


def test_brier_estimate_is_theirs():
    a, b, y = (OFFICIAL[f"brier.{k}"].flatten(0, 1) for k in ("sample_a", "sample_b", "target"))
    assert_close(brier_ngram(torch.stack([a, b]), y).mean(0), OFFICIAL["brier.n1_to_n4"])


@torch.no_grad()
def test_ar_baseline_is_theirs():
    theirs, ids = weights("ar"), OFFICIAL["input_ids"]
    vocab_size, width = theirs["model.embed_tokens.weight"].shape
    layers = sum(k.endswith("q_proj.weight") for k in theirs)
    model = AR(ARConfig(vocab_size, width, len(theirs["model.layers.0.mlp.gate_proj.weight"]), layers,
                        SIZES["lm"]["num_attention_heads"], ids.shape[1]))
    theirs = {name.replace("model.", "transformer."): tensor for name, tensor in theirs.items()}
    for pattern, ours in OFFICIAL_NAMES.items():
        theirs = {re.sub(pattern, ours, name): tensor for name, tensor in theirs.items()}
    model.load_state_dict(theirs)
    assert_close(model.lm_head(model.hidden(ids)), OFFICIAL["ar.logits"])


# --- Directories as the authors publish them ----------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["ae_model.", "autoencoder."])
def test_a_published_directory_loads_in_both_formats(tmp_path, form, prefix):
    model = load_official(publish(tmp_path / "m", together(autoencoder=prefix), SIZES["lm"], form))
    assert_close(model.hidden(OFFICIAL["input_ids"]), OFFICIAL["energy.hidden"])
    logits = model.autoencoder.decode(OFFICIAL["autoencoder.z"]).flatten(1, 2)
    assert_close(logits, OFFICIAL["autoencoder.logits"])
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


@torch.no_grad()
def test_bfloat16_weights_in_several_files_load(tmp_path):
    tensors = {k: v.bfloat16() for k, v in together().items()}
    del tensors["ae_model.decoder.lm_head_weight"]   # tied weights may be stored once
    folder = publish(tmp_path / "m", {}, SIZES["lm"])
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        write_safetensors(folder / f"model-0000{i}-of-00002.safetensors", {k: tensors[k] for k in part})
    assert error(load_official(folder).hidden(OFFICIAL["input_ids"]), OFFICIAL["energy.hidden"]) < 0.05


def test_the_autoencoder_is_found_where_the_config_says(tmp_path):
    place = publish(tmp_path / "elsewhere" / "ae", weights("autoencoder"), SIZES["ae"], "bin")
    model = load_official(publish(tmp_path / "m", weights("energy"), SIZES["lm"] | {"ae_path": str(place)}))
    theirs = OFFICIAL["autoencoder.weights/encoder.embed_tokens.weight"]
    assert torch.equal(model.autoencoder.encoder.embed_tokens.weight, theirs)


def test_float32_weights_stay_mapped(tmp_path):
    """The weights of the model are the bytes of the file: a private map, which writes nothing back."""
    folder = publish(tmp_path / "m", together(), SIZES["lm"])
    before = (folder / "model.safetensors").read_bytes()
    read, wanted = [], data.checkpoint.read_safetensors
    data.checkpoint.read_safetensors = lambda path: read.append(wanted(path)) or read[0]
    try:
        model = load_official(folder)
    finally:
        data.checkpoint.read_safetensors = wanted
    mapped = {t.untyped_storage().data_ptr() for t in read[0].values()}
    assert all(p.untyped_storage().data_ptr() in mapped for p in model.parameters())
    with torch.no_grad():
        model.transformer.norm.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


BROKEN = {
    "missing": (
        lambda t: t.pop("transformer.layers.0.self_attn.q_proj.weight"),
        'Missing key(s) in state_dict: "transformer.layers.0.self_attn.q_proj.weight"'),
    "missing in the autoencoder": (
        lambda t: t.pop("ae_model.decoder.expand_layer.bias"),
        'Missing key(s) in state_dict: "autoencoder.decoder.expand_layer.bias"'),
    "extra": (
        lambda t: t.update(surprise=torch.zeros(2)),
        'Unexpected key(s) in state_dict: "surprise"'),
    "misshapen": (
        lambda t: t.update({"mlp_generator.noise_embd.bias": torch.zeros(3)}),
        "size mismatch for head.noise_embd.bias: copying a param with shape torch.Size([3])"),
    "untied": (
        lambda t: t.update({
            "ae_model.decoder.lm_head_weight": t["ae_model.encoder.embed_tokens.weight"] + 1}),
        "decoder.lm_head_weight is not encoder.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_tensors_are_named(tmp_path, capsys, case):
    change, message = BROKEN[case]
    tensors = together()
    change(tensors)
    with pytest.raises(SystemExit, match="2"):
        load_official(publish(tmp_path / "m", tensors, SIZES["lm"]))
    assert message in capsys.readouterr().err


def mangled(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("raw", [
    b"", b"\0" * 4, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 4) + b"nope", mangled([1, 2]),
    mangled({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),               # out of range
    mangled({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}, b"\0" * 16),
    mangled({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 16),    # not its size
    mangled({k: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for k in "ab"},    # overlapping
            b"\0" * 16),
    mangled({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8)])
def test_a_broken_safetensors_file_is_one_clear_line(tmp_path, capsys, raw):
    folder = publish(tmp_path / "m", {}, SIZES["lm"])
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(SystemExit, match="2"):
        load_official(folder)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("case", [
    "nothing", "no weights", "no autoencoder", "an autoencoder",
    "other positions", "a list", "no sizes",
    "weights that are code"])
def test_a_directory_that_is_not_a_published_model_is_one_clear_line(tmp_path, capsys, case):
    folder = tmp_path / "m"
    if case == "no weights":
        publish(folder, {}, SIZES["lm"])
        (folder / "model.safetensors").unlink()
    elif case == "no autoencoder":
        publish(folder, weights("energy"), SIZES["lm"])
    elif case == "an autoencoder":
        publish(folder, weights("autoencoder"), SIZES["ae"])
    elif case == "other positions":
        publish(folder, together(), SIZES["lm"] | {"rope_theta": 500_000})
    elif case == "a list":
        publish(folder, together(), [1, 2])
    elif case == "no sizes":
        publish(folder, together(), SIZES["lm"] | {"hidden_size": "wide"})
    elif case == "weights that are code":
        publish(folder, {"trap": Trap()}, SIZES["lm"], "bin")
    with pytest.raises(SystemExit, match="2"):
        load_official(folder)
    said = capsys.readouterr()
    line = said.err.strip()
    assert "code ran" not in said.out + line
    assert line.startswith("error: ") and "\n" not in line and str(tmp_path) in line


def test_a_published_model_writes_and_is_evaluated(tmp_path, run, data_dir):
    """From directory to text and BrierLM, with a tokenizer file: 256 bytes and 256 special tokens, and
    [PAD] in the model."""
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    torch.manual_seed(0)
    ae, c = AutoencoderConfig(513, 4, 8, 16, 24), CALMConfig(513, 4, 8, 32, 48, 2, 4, 1, 10, 16)
    ours = CALM(c, Autoencoder(ae))
    theirs = {"embed_tokens": "transformer.embed_tokens", "head": "mlp_generator", "autoencoder": "ae_model"}
    tensors = {re.sub(r"^\w+", lambda part: theirs.get(part[0], part[0]), name): t
               for name, t in ours.state_dict().items()}
    config = {"vocab_size": 513, "patch_size": 4, "latent_size": 8,
              "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_mlp_layers": 1, "noise_size": 10,
              "max_position_embeddings": 16}
    folder = publish(tmp_path / "m", tensors, config)
    text = tmp_path / "text.txt"
    text.write_text("A published model reads this sentence again and again. " * 60)
    prepare([text], "mine", str(ranks), out_root=data_dir)

    done = run(sample, "--official", folder, "--tokenizer", ranks,
               "--start", "A model", "--max_new_tokens", 8)
    assert done.code == 0 and done.out.startswith("A model")
    done = run(eval_brier, "--official", folder, "--data", "mine", "--windows", 4, "--json")
    assert done.code == 0 and json.loads(done.out.splitlines()[-1])["positions"] == 4 * 15
    prepare([text], "bytes", out_root=data_dir)
    wrong = run(eval_brier, "--official", folder, "--data", "bytes")
    assert wrong.code == 2 and "vocabulary of 513" in wrong.err
    missing = run(sample, "--official", folder)
    assert missing.code == 2 and "tokenizer.model" in missing.err
