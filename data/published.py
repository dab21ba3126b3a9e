"""
A model as the authors publish it -> our names and sizes. `load_official` in sample.py makes a
model of them.

Get config.json and pytorch_model.bin of CALM-M and CALM-Autoencoder from
huggingface.co/cccczshao into folders of these names, and into CALM-M also
llama3_tokenizer/tokenizer.model of github.com/shaochenze/calm. Then (never run yet):

    python data/prepare.py wikitext103-test --name wikitext \\
        --tokenizer CALM-M/tokenizer.model
    python eval_brier.py --official CALM-M    # the paper: 5.72
    python sample.py --official CALM-M --start "The history of"
"""
import json
import re

import torch

# Names of tensors, theirs -> ours, where they differ: regular expressions, in this order.
TENSOR_NAMES = {
    r"^(.*\.)?(?=(en|de)coder\.)": "autoencoder.",
    r"transformer\.embed_tokens": "embed_tokens",
    # Their energy head has two names: a file may have either, or both.
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
    "noise_size": "n_noise",
    "num_samples": "num_samples",
    "beta": "alpha",
}


def read_official(folder):
    """A published CALM -> fields of CALMConfig, fields of AutoencoderConfig, {our name: tensor}.

    Its autoencoder is in the same file, or in a directory beside it, CALM-Autoencoder.
    """
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    if not any("decoder." in name for name in tensors):
        tensors |= read_tensors(folder.parent / "CALM-Autoencoder")
    state = {our_name(name): tensor for name, tensor in tensors.items()
             if not name.endswith("inv_freq")}   # rotary tables, which are computed here
    # The autoencoder's embedding is stored under either of two names, or both: keep ours.
    output = state.pop("autoencoder.decoder.lm_head_weight", None)
    embedding = state.setdefault("autoencoder.encoder.embed_tokens.weight", output)   # (V, H)

    sizes = {ours: config[theirs] for theirs, ours in SIZE_NAMES.items() if theirs in config}
    sizes["block_size"] = min(2048, config.get("max_position_embeddings", 2048))
    gate = state["autoencoder.encoder.encoder_layers.0.mlp.gate_proj.weight"]
    layers = [name for name in state if re.search(r"encoder_layers\.\d+\.layernorm", name)]
    autoencoder_sizes = {
        "vocab_size": embedding.shape[0],
        "n_embd": embedding.shape[1],
        "n_ff": gate.shape[0],
        "n_layer": len(layers),
        "chunk_size": sizes["chunk_size"],
        "latent_dim": sizes["latent_dim"],
    }
    return sizes, autoencoder_sizes, state


def our_name(name):
    """The name of a tensor in the authors' files -> its name here."""
    for theirs, ours in TENSOR_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def read_tensors(folder):
    """The weights in a directory, mapped into memory -> {their name: tensor}."""
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise SystemExit(f"no weights at {path}: put config.json and pytorch_model.bin of a "
                         "published CALM there, and CALM-Autoencoder's in a folder beside it")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
