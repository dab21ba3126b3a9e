"""
A directory as the authors publish a model (config.json and weights) -> our names, our sizes.
`load_official` in sample.py makes a model of them. Nothing here is needed to understand CALM.
"""
import json
import re

import torch

from data.console import fail

# Names of tensors, theirs -> ours, where they differ: regular expressions, applied in this order.
TENSOR_NAMES = {
    r"^(.*\.)?(?=(en|de)coder\.)": "autoencoder.",
    r"transformer\.embed_tokens": "embed_tokens",
    # Their energy model has its head under two names, and a saved file may have either, or both.
    r"mlp_generator|generative_head(\.net)?": "head",
    r"time_embed\.mlp": "time_embed",
}
# Names of sizes in config.json, theirs -> ours in CALMConfig.
SIZE_NAMES = {
    "vocab_size": "vocab_size",
    "patch_size": "chunk_size",
    "latent_size": "latent_dim",
    "hidden_size": "n_embd",
    "intermediate_size": "n_ff",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_mlp_layers": "n_head_layer",
}
# Settings in config.json that have no counterpart here: with another value it is another model.
FIXED = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


def is_published(folder):
    """Is this a directory as the authors publish a model? (A run's folder has checkpoints.)"""
    return (folder / "config.json").is_file()


def read_official(folder):
    """A published CALM -> fields of CALMConfig, fields of AutoencoderConfig, {our name: tensor}.

    Its autoencoder is in the same files, or in a directory of its own: the ae_path of
    config.json, or CALM-Autoencoder beside the model.
    """
    config, tensors = read_directory(folder)
    if not any("decoder." in name for name in tensors):
        place = folder / str(config.get("ae_path", ""))
        if place == folder or not (place / "config.json").is_file():
            place = folder.parent / "CALM-Autoencoder"
        tensors |= read_directory(place)[1]
    try:
        state = {our_name(name): tensor for name, tensor in tensors.items()
                 if not name.endswith("inv_freq")}   # rotary tables, which are computed here
        tie_embedding(state)
        return calm_sizes(config), autoencoder_sizes(config, state), state
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        fail(f"{folder} is not a published CALM with its autoencoder ({what})")


def our_name(name):
    """The name of a tensor in the authors' files -> its name here."""
    for theirs, ours in TENSOR_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def tie_embedding(state):
    """The autoencoder's embedding is stored under either of two names, or both: keep ours."""
    output = state.pop("autoencoder.decoder.lm_head_weight", None)
    embedding = state.setdefault("autoencoder.encoder.embed_tokens.weight", output)   # (V, H)
    if output is not None and not torch.equal(embedding, output):
        raise ValueError("decoder.lm_head_weight is not encoder.embed_tokens.weight")


def calm_sizes(config):
    """config.json -> fields of CALMConfig."""
    expected = {**FIXED, "num_key_value_heads": config["num_attention_heads"]}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]}, expected {value}")
    sizes = {ours: int(config[theirs]) for theirs, ours in SIZE_NAMES.items()}
    sizes["n_noise"] = int(config.get("noise_size", 64))
    sizes["num_samples"] = int(config.get("num_samples", 8))
    sizes["alpha"] = float(config.get("beta", 1.0))
    sizes["block_size"] = min(2048, int(config.get("max_position_embeddings", 2048)))
    return sizes


def autoencoder_sizes(config, state):
    """config.json of the CALM, and the tensors -> fields of AutoencoderConfig."""
    embedding = state["autoencoder.encoder.embed_tokens.weight"]   # (V, H)
    gate = state["autoencoder.encoder.encoder_layers.0.mlp.gate_proj.weight"]
    layer = re.compile(r"encoder\.encoder_layers\.\d+\.layernorm")
    return {
        "vocab_size": embedding.shape[0],
        "n_embd": embedding.shape[1],
        "n_ff": gate.shape[0],
        "n_layer": sum(1 for name in state if layer.search(name)),
        "chunk_size": int(config["patch_size"]),
        "latent_dim": int(config["latent_size"]),
    }


# --- The files -----------------------------------------------------------------------------


def read_directory(folder):
    """config.json, and the weights, mapped into memory -> config, {their name: tensor}."""
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= read_safetensors(path)
        if not tensors:
            for path in sorted(folder.glob("pytorch_model*.bin")):
                tensors |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError("no weights")
        return config, tensors
    except Exception as error:   # whatever is wrong in a file from elsewhere
        fail(f"{folder} is not a published model ({' '.join(repr(error).split())[:200]})")


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}.

    It holds 8 bytes, the length of a JSON header; the header, which says where in the bytes
    behind it each tensor lies; and those bytes.
    """
    size = path.stat().st_size
    # A private map: what is written to a tensor does not change the file.
    raw = torch.from_file(str(path), size=size, dtype=torch.uint8)
    length = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

    tensors = {}
    for name, entry in header.items():
        dtype = dtypes[entry["dtype"]]
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if not 8 + length <= begin <= end <= size:
            raise ValueError(f"{name} does not lie in the file")
        part = raw[begin:end]
        if part.data_ptr() % dtype.itemsize != 0:   # not aligned: it cannot be used where it lies
            part = part.clone()
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors
