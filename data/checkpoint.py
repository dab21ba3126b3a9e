"""
What a run leaves on disk; the directories in which the authors publish their models; device and precision.
A checkpoint is a dict of tensors and plain values, read with `weights_only=True`: it cannot run code.
"""
import ctypes
import json
import os
import re
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from data.prepare import fail, tokenizer_from

DEFAULT_RUN = "out/site-packages" if torch.cuda.is_available() else "out/stdlib"   # train.py's, without flags
FORMAT = 3   # of checkpoints; one with another number, or none, is of an earlier version

# --- Device and precision -------------------------------------------------------------------------------
def select_device(name="auto"):
    """`auto` -> cuda if it is there, else cpu; or the named device. MPS, never tried, only by its name. For a
    CPU it also tells the allocator to keep memory."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = ("cuda" if there["cuda"] else "cpu") if name == "auto" else name
    kind, _, index = name.partition(":")
    if not there.get(kind) or index not in ("", "0", *map(str, range(torch.cuda.device_count()))):
        fail(f"no device {name!r} here: use --device auto, or {', '.join(filter(there.get, there))}")
    if kind == "cpu":   # else glibc gives freed blocks back: a fifth of a step's time at width 512
        with suppress(OSError):   # no glibc here
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)                # M_MMAP_MAX: no block is mapped by itself
            mallopt(-1, (1 << 31) - 1)    # M_TRIM_THRESHOLD: none is given back
    return torch.device(name)
def select_dtype(name, device):
    """`auto` -> bfloat16 where the processor multiplies it fast; else float32, on CUDA float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capped = torch.backends.cpu.get_cpu_capability() != "AVX512"   # by ATEN_CPU_CAPABILITY
    return torch.bfloat16 if fast and not capped and device.type == "cpu" else torch.float32

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")   # another run may save here, too
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
    """Load the weights at `path`, if any, into a model to train, if they fit -> the checkpoint, or None. One
    that is not to be gone on with is an error, but for a finished autoencoder. wanted: --model names it."""
    if not path.exists():
        return None
    checkpoint, elsewhere = load_checkpoint(path, kind), "use another --out_dir"
    if any(checkpoint["data"][name] != data.meta[name] for name in ("fingerprint", "vocabulary")):
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
def saved_settings(out_dir, kinds, leave_out):
    """The flags of a run, but leave_out: from the first of its checkpoints, by `kinds`, that is there."""
    kind = next((kind for kind in kinds if (out_dir / f"{kind}.pt").is_file()), kinds[0])
    settings = load_checkpoint(out_dir / f"{kind}.pt", kind)["settings"]
    leave_out = leave_out | {"flops", "match_flops"} if kind != "autoencoder" else leave_out   # in max_steps
    return {name: value for name, value in settings.items() if name not in leave_out}

def write_log(path, mode, *entries):
    """Write to a run's log.jsonl, a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode) as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
def read_log(path):
    """The entries of a log.jsonl, without the last line of a killed run, which may be torn."""
    try:
        lines = path.read_text().splitlines()
        entries = [json.loads(line) for line in lines[:-1] + [x for x in lines[-1:] if x.endswith("}")]]
        for entry in entries:
            entry["stage"], entry["step"] - entry["seconds"]
            sum(entry.get(name, 0) for name in ("flops", "inference_flops", "brierlm"))
        return entries
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path} is not the log of a run, or damaged: move it away ({type(error).__name__}: {error})")
def rewind_log(path, stage, step):
    """Drop what the log says of `stage` after `step`, which will be written anew -> its seconds so far."""
    entries = read_log(path) if path.exists() else []
    entries = [entry for entry in entries if entry["stage"] != stage or entry["step"] <= step]
    write_log(temporary := path.with_name(f".{path.name}.{os.getpid()}.tmp"), "w", *entries)
    temporary.replace(path)
    return max((entry["seconds"] for entry in entries if entry["stage"] == stage), default=0.0)

def load_tokenizer(checkpoint, data=None):
    """The tokenizer of a checkpoint, which data for it must have been prepared with -> tiktoken.Encoding."""
    theirs = checkpoint["data"]
    if data and data.meta["vocabulary"] != theirs["vocabulary"]:
        fail(f"the model was trained with the tokenizer {theirs['tokenizer']}, and {data.meta['name']} was "
             "prepared with another: prepare it again with the model's")
    return tokenizer_from(theirs)

# --- Directories as the authors publish them ------------------------------------------------------------
# Names and sizes, theirs -> ours, where they differ.
OFFICIAL_NAMES = {r"^(.*\.)?(?=(en|de)coder\.)": "autoencoder.", r"transformer\.embed_tokens": "embed_tokens",
                  r"mlp_generator|generative_head\.net": "head", r"time_embed\.mlp": "time_embed"}
OFFICIAL_SIZES = {"vocab_size": "vocab_size", "patch_size": "chunk_size", "latent_size": "latent_dim",
                  "hidden_size": "n_embd", "intermediate_size": "n_ff", "num_hidden_layers": "n_layer",
                  "num_attention_heads": "n_head", "num_mlp_layers": "n_head_layer"}

def read_official(folder):
    """A published CALM -> fields of CALMConfig, fields of AutoencoderConfig, {our name: tensor}.
    Its autoencoder is in the same files, where config.json's ae_path says, or in CALM-Autoencoder beside."""
    config, tensors = read_published(folder)
    if not any("decoder." in name for name in tensors):
        places = [folder / str(config.get("ae_path", "")), folder.parent / "CALM-Autoencoder"]
        found = [place for place in places if place != folder and (place / "config.json").is_file()]
        tensors |= read_published((found or places[1:])[0])[1]
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    for theirs, ours in OFFICIAL_NAMES.items():
        state = {re.sub(theirs, ours, name): tensor for name, tensor in state.items()}
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
        fail(f"{folder} is not a published model ({' '.join(repr(error).split())[:200]})")

def read_safetensors(path):
    """A file -> {name: tensor}. It holds 8 bytes, the length of a JSON header; the header, which says where
    in the bytes behind it each tensor lies; and those bytes."""
    size = path.stat().st_size
    raw = torch.from_file(str(path), size=size, dtype=torch.uint8)   # a private map: writes change no file
    length = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    header = json.loads(raw[8:8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if not 8 + length <= begin <= end <= size:
            raise ValueError(f"{name} does not lie in the file")
        part = raw[begin:end]
        aligned = part.data_ptr() % dtype.itemsize == 0   # else it cannot be used where it lies
        tensors[name] = (part if aligned else part.clone()).view(dtype).view(entry["shape"])
    return tensors
