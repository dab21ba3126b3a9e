"""
What a run leaves on disk; the directories in which the authors publish their models; device and precision.
A checkpoint is a dict of tensors and plain values, read with `weights_only=True`: it cannot run code.
"""
import ctypes
import json
import math
import os
import re
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from data.prepare import fail, fingerprint_tokenizer, get_tokenizer

DEFAULT_RUN = "out/site-packages" if torch.cuda.is_available() else "out/stdlib"   # train.py's, without flags
FORMAT = 2   # of checkpoints; the earlier ones, which have no number, hold other models

# --- Device and precision -------------------------------------------------------------------------------
def select_device(name="auto"):
    """`auto` -> cuda if it is there, else cpu; or the named device. MPS, never tried, only by its name."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    if not there.get(name.split(":")[0]):
        fail(f"no device {name!r} here: use --device auto, or {', '.join(filter(there.get, there))}")
    if name == "cpu":
        keep_memory()
    return torch.device(name)

def keep_memory():
    """On a CPU: glibc gives freed blocks of megabytes back to the system, and the next step has them anew,
    page by page, a fifth of its time at width 512. From now on it keeps them."""
    with suppress(OSError):   # no glibc here
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)                # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, (1 << 31) - 1)    # M_TRIM_THRESHOLD: none is given back

def select_dtype(name, device):
    """`auto` -> bfloat16 where the processor multiplies it fast; else float32, on CUDA float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and device.type == "cpu" else torch.float32

def autocast(device, dtype):
    """Mixed precision: matrix products in `dtype`, weights and losses in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

def cast_matrices(model, dtype):
    """For inference: cast once the weights that autocast casts at every call -> the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "autoencoder.encoder.embed_tokens":
            module.to(dtype)
    return model

# --- A run's checkpoints and its log --------------------------------------------------------------------
def save_checkpoint(path, checkpoint):
    """Write to a temporary file, then rename: `path` is whole at every moment, also when the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch's writer reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "the previous checkpoint is intact" if path.exists() else "nothing was saved"
        fail(f"could not save {path} ({str(error).splitlines()[0]}); {kept}: free some space, then --resume")

def load_checkpoint(path, kind):
    """Read what save_checkpoint wrote -> dict. kind: what it must hold, autoencoder, calm or ar."""
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: `python train.py --model {kind} --out_dir {path.parent}` trains one")
    try:
        with zipfile.ZipFile(path) as archive:   # what torch.save writes, with a checksum of every part
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, version = checkpoint["kind"], checkpoint.get("format")
    except Exception as error:   # whatever is wrong in the file
        fail(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: "
             f"{' '.join(str(error).split())[:150]}): move it away and train again")
    if version != FORMAT:
        fail(f"{path} is of an earlier version of this project: use that, or another --out_dir")
    if found != kind:
        fail(f"{path} holds a model of kind {found!r}, expected {kind!r}")
    return checkpoint

def open_checkpoint(path, kind, model, data, resume, wanted):
    """Load the weights at `path`, if any, into a model to train -> the checkpoint, or None. One that does not
    fit or that nobody asked to go on with is an error. wanted: whether the run is for this model."""
    if not path.exists():
        return None
    checkpoint, elsewhere = load_checkpoint(path, kind), "use another --out_dir"
    if checkpoint["data"]["fingerprint"] != data.meta["fingerprint"]:
        fail(f"{path} was trained on other data than {data.folder} holds now: {elsewhere}")
    for name, value in asdict(model.config).items():
        trained = checkpoint["config"][name]
        if trained != value:
            fail(f"{path} has {name} {trained}, this run asks for {value}: {elsewhere}, or drop the flag")
    if not resume and (wanted or not checkpoint["done"]):
        state = "already trained" if checkpoint["done"] else "unfinished"
        fail(f"{path} is {state} (step {checkpoint['step']:,}): add --resume to go on, or {elsewhere}")
    model.load_state_dict(checkpoint["model"])
    return checkpoint

def saved_settings(out_dir, kinds):
    """The flags of the run that --resume goes on from: those in the first checkpoint that is there."""
    kind = next((kind for kind in kinds if (out_dir / f"{kind}.pt").is_file()), None)
    if kind is None:
        fail(f"nothing to resume in {out_dir}: start with `python train.py --out_dir {out_dir}`")
    settings = load_checkpoint(out_dir / f"{kind}.pt", kind)["settings"]
    own = ("resume", "out_dir", "device", "model", "match_flops")   # the resumed run has its own
    return {name: value for name, value in settings.items() if name not in own}

def write_log(path, mode, *entries):
    """Write to a run's log.jsonl, a JSON object a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    except OSError as error:
        fail(f"could not write {path} ({error.strerror}): --out_dir must be a folder on a disk with space")

def read_log(path):
    """The entries of a log.jsonl, without the last line of a killed run, which may be torn."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

def rewind_log(path, stage, step):
    """Drop what the log says of `stage` after `step`, which will be written anew -> its seconds so far."""
    entries = read_log(path) if path.exists() else []
    entries = [entry for entry in entries if entry["stage"] != stage or entry["step"] <= step]
    write_log(path, "w", *entries)
    return max((entry["seconds"] for entry in entries if entry["stage"] == stage), default=0.0)

def load_tokenizer(checkpoint, data=None):
    """The tokenizer of a checkpoint, or of data for it, which must be the same -> tiktoken.Encoding."""
    theirs = checkpoint["data"]
    tokenizer = data.tokenizer if data else get_tokenizer(theirs["tokenizer"])
    if fingerprint_tokenizer(tokenizer) != theirs["tokenizer_fingerprint"]:
        fail(f"the model was trained with the tokenizer {theirs['tokenizer']}, and {tokenizer.name} is not, "
             f"or no longer, that one: prepare the data with --tokenizer {theirs['tokenizer']}")
    return tokenizer

# --- Directories as the authors publish them ------------------------------------------------------------
# Names and sizes, theirs -> ours, where they differ.
OFFICIAL_NAMES = {r"^(.*\.)?(?=(en|de)coder\.)": "autoencoder.", r"transformer\.embed_tokens": "embed_tokens",
                  r"mlp_generator|generative_head\.net": "head", r"time_embed\.mlp": "time_embed"}
OFFICIAL_SIZES = {"vocab_size": "vocab_size", "patch_size": "chunk_size", "latent_size": "latent_dim",
                  "hidden_size": "n_embd", "intermediate_size": "n_ff", "num_hidden_layers": "n_layer",
                  "num_attention_heads": "n_head", "num_mlp_layers": "n_head_layer"}

def our_name(name):
    for theirs, ours in OFFICIAL_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name

def read_official(folder):
    """A published CALM -> fields of CALMConfig, fields of AutoencoderConfig, {our name: tensor}.
    Its autoencoder is in the same files, where config.json's ae_path says, or in CALM-Autoencoder beside."""
    config, tensors = read_published(folder)
    if not any("decoder." in name for name in tensors):
        places = [folder / str(config.get("ae_path", "")), folder.parent / "CALM-Autoencoder"]
        found = [place for place in places if place != folder and (place / "config.json").is_file()]
        tensors |= read_published((found or places[1:])[0])[1]
    state = {our_name(name): tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    try:
        # The autoencoder's embedding is stored under either of two names, or both.
        output = state.pop("autoencoder.decoder.lm_head_weight", None)
        embedding = state.setdefault("autoencoder.encoder.embed_tokens.weight", output)   # (V, H)
        if output is not None and not torch.equal(embedding, output):
            raise ValueError("decoder.lm_head_weight is not encoder.embed_tokens.weight")
        n_head = config["num_attention_heads"]
        if config.get("num_key_value_heads", n_head) != n_head or config.get("rope_theta", 10000) != 10000:
            raise ValueError("expected num_key_value_heads to be num_attention_heads, and rope_theta 10000")
        sizes = {ours: int(config[theirs]) for theirs, ours in OFFICIAL_SIZES.items()}
        sizes["n_noise"] = int(config.get("noise_size", 64))
        sizes["num_samples"] = int(config.get("num_samples", 8))
        sizes["block_size"] = min(2048, int(config.get("max_position_embeddings", 2048)))
        layers = [name for name in state if re.search(r"encoder\.encoder_layers\.\d+\.layernorm", name)]
        autoencoder = {"vocab_size": len(embedding), "n_embd": embedding.shape[1], "n_layer": len(layers),
                       "n_ff": len(state["autoencoder.encoder.encoder_layers.0.mlp.gate_proj.weight"]),
                       "chunk_size": sizes["chunk_size"], "latent_dim": sizes["latent_dim"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(f"{folder} is not a published CALM with its autoencoder ({type(error).__name__}: {error})")
    return sizes, autoencoder, state

def read_published(folder):
    """Such a directory's config.json and weights, which are mapped, not read -> config, {name: tensor}."""
    try:
        config, tensors = json.loads((folder / "config.json").read_text()), {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= read_safetensors(path)
        for path in sorted(folder.glob("pytorch_model*.bin")) if not tensors else ():
            tensors |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError("no weights")
        return dict(config), tensors
    except Exception as error:   # whatever is wrong in a file from elsewhere
        fail(f"{folder} is not a published model, config.json with model.safetensors or pytorch_model.bin "
             f"({type(error).__name__}: {' '.join(str(error).split())[:200]})")

def read_safetensors(path):
    """A file -> {name: tensor}. It holds 8 bytes, the length of a JSON header; the header, which says where
    in the bytes behind it each tensor lies; and those bytes."""
    size = path.stat().st_size
    raw = torch.from_file(str(path), size=size, dtype=torch.uint8)   # a private map: writes change no file
    length = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
        begin, before = entry["data_offsets"][0], end
        end = begin + math.prod(entry["shape"]) * dtype.itemsize
        if entry["data_offsets"][1] != end or not before <= begin <= end <= size - 8 - length:
            raise ValueError(f"{name} does not lie where the header says")
        part = raw[8 + length + begin:8 + length + end]
        aligned = part.data_ptr() % dtype.itemsize == 0   # else it cannot be used where it lies
        tensors[name] = (part if aligned else part.clone()).view(dtype).view(entry["shape"])
    return tensors
