"""
The chunk autoencoder (paper section 2): K tokens -> one continuous vector -> the same K tokens.

    python autoencoder.py                 # how faithful, how robust is the latent space of out/stdlib/autoencoder.pt?
    python autoencoder.py --out_dir out/mine --json

A chunk is encoded on its own: no attention, no context. What makes the vectors a space that a generative model can hit
is the regularisation of the loss: a clipped KL term, dropout on the vector, and masked input tokens, so that a vector
near the right one still decodes to the right K tokens.

Shapes: K tokens in a chunk, V vocabulary, H width, L latent size; (...) any leading dimensions.
"""
import json
import math
import os
import statistics
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.prepare import Parser, fail, fingerprint_tokenizer, get_tokenizer, load_data, within


@dataclass
class AutoencoderConfig:
    vocab_size: int = 257      # V: bytes and end-of-text
    chunk_size: int = 4        # K: tokens in a chunk
    latent_dim: int = 128      # L: the paper uses 32 K
    n_embd: int = 512          # H: width
    n_ff: int = 1280           # width of the SwiGLU
    n_layer: int = 2           # blocks a side: the first half sees single tokens, the second half the whole chunk
    dropout: float = 0.15      # of latent dimensions
    kl_weight: float = 1e-3    # beta: of the KL term
    kl_clip: float = 0.5       # nats a dimension below which the KL term does not push: no dimension collapses
    token_mask: float = 0.15   # share of input tokens that are masked

    def __post_init__(self):
        check_sizes(self)
        for name, most in (("dropout", 1), ("token_mask", 1), ("kl_weight", float("inf")), ("kl_clip", float("inf"))):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must be in [0, {most}), not {getattr(self, name)}")


def check_sizes(config):
    """Every whole number in a config counts something; where the default is none, none will do."""
    for f in fields(config):
        least = 0 if f.default == 0 else 1
        if f.type is int and getattr(config, f.name) < least:
            raise ValueError(f"{f.name} must be at least {least}, not {getattr(config, f.name)}")


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in float32, also under autocast (CUDA does so by itself, CPU does not)."""
    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return super().forward(x.float())


class SwiGLU(nn.Module):
    """W_o (silu(W_g x) * (W_u x)), without biases."""
    def __init__(self, n_embd, n_ff):
        super().__init__()
        self.gate_proj = nn.Linear(n_embd, n_ff, bias=False)
        self.up_proj = nn.Linear(n_embd, n_ff, bias=False)
        self.down_proj = nn.Linear(n_ff, n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)): all that the autoencoder is made of."""
    def __init__(self, config):
        super().__init__()
        self.layernorm = RMSNorm(config.n_embd)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x):
        return x + self.mlp(self.layernorm(x))


class Encoder(nn.Module):
    """K tokens -> mean, log_std. The first half of the blocks sees single tokens, the second half the whole chunk."""
    def __init__(self, config):
        super().__init__()
        H = config.n_embd
        self.mask_prob, self.half = config.token_mask, config.n_layer // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        self.encoder_layers = nn.Sequential(*[ResidualBlock(config) for _ in range(config.n_layer)])
        self.squeeze_layer = nn.Linear(config.chunk_size * H, H)
        self.norm = RMSNorm(H)
        self.hidden_to_latent = nn.Linear(H, 2 * config.latent_dim)

    def forward(self, chunks):
        x = self.embed_tokens(chunks)                                         # (..., K, H)
        if self.training and self.mask_prob:
            # Masked tokens become the zero vector, which no token has. (The authors use token 0, a real token.)
            x = x * (torch.rand(chunks.shape, device=x.device) >= self.mask_prob).unsqueeze(-1)
        x = self.encoder_layers[:self.half](x)
        x = self.squeeze_layer(x.flatten(-2))                                 # (..., K*H) -> (..., H)
        x = self.encoder_layers[self.half:](x)
        mean, log_std = self.hidden_to_latent(self.norm(x)).chunk(2, dim=-1)  # (..., L) each
        return mean, log_std


class Decoder(nn.Module):
    """The encoder's mirror image. Its output layer is the encoder's embedding (tied)."""
    def __init__(self, config):
        super().__init__()
        K, H = config.chunk_size, config.n_embd
        self.K, self.half = K, config.n_layer - config.n_layer // 2
        self.latent_to_hidden = nn.Linear(config.latent_dim, H)
        self.decoder_layers = nn.Sequential(*[ResidualBlock(config) for _ in range(config.n_layer)])
        self.expand_layer = nn.Linear(H, K * H)
        self.norm = RMSNorm(H)

    def forward(self, z, embedding):
        x = self.decoder_layers[:self.half](self.latent_to_hidden(z))         # (..., L) -> (..., H)
        x = self.expand_layer(x).unflatten(-1, (self.K, -1))                  # (..., K, H)
        x = self.norm(self.decoder_layers[self.half:](x))
        return F.linear(x, embedding)                                         # logits (..., K, V)


class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_weights)

    def encode(self, chunks):
        """Token ids (..., K) -> mean, log_std (..., L) of the posterior N(mean, std^2) over the chunk's vector."""
        return self.encoder(chunks)

    def decode(self, z):
        """Vectors z (..., L) -> logits (..., K, V)."""
        return self.decoder(z, self.encoder.embed_tokens.weight)

    def loss(self, tokens):
        """The training objective (section 2.2) for token ids (..., T*K) -> scalar, metrics.

        K * cross-entropy + beta * KL: both terms are sums over one chunk, averaged over chunks, in nats.
        """
        c = self.config
        chunks = tokens.unflatten(-1, (-1, c.chunk_size))                     # (..., T, K)
        mean, log_std = (v.float() for v in self.encode(chunks))
        z = mean + log_std.exp() * torch.randn_like(mean)                     # z ~ q(z | chunk)
        z = F.dropout(z, c.dropout, self.training)
        logits = self.decode(z).float()
        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), chunks.flatten())
        kl = kl_to_normal(mean, log_std).clamp_min(c.kl_clip).sum(-1).mean()
        loss = reconstruction + c.kl_weight * kl
        accuracy = (logits.argmax(-1) == chunks).float().mean()
        return loss, {"loss": loss.detach(), "kl": kl.detach(), "accuracy": accuracy}


def kl_to_normal(mean, log_std):
    """KL_i of N(mean_i, std_i^2) against N(0, 1) in nats (section 2.2): (..., L) -> (..., L)."""
    return (mean ** 2 + (2 * log_std).exp() - 1 - 2 * log_std) / 2


def init_weights(module):
    """Normal(0, 0.02) for matrices, zero biases: the initialisation of every model here."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- What the scripts share: a device, a precision, its speed and memory, checkpoints ----------------------------------

def select_device(name="auto"):
    """`auto` -> cuda, mps or cpu, whichever is there first; or the named device, if it is there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in there if there[d])
    if not there.get(name.split(":")[0], False):
        fail(f"no device {name!r} here: use --device auto or one of {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def select_dtype(name, device):
    """`auto` -> bfloat16 where the processor multiplies it fast (4 x float32 on one with AVX512-BF16), else float32
    (float16 on an older CUDA card)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """Mixed precision: matrix products in `dtype`, weights and losses in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def median_seconds(function, device, seconds):
    """Median time of a call after a warm-up, over at least 3 calls and about `seconds`."""
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def peak_flops(device, dtype, n=8192):
    """FLOPs a second that this card reaches on one large matrix product: what MFU is measured against."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / median_seconds(lambda: a @ b, device, 0.1)


def peak_memory_gb(device):
    """The most that was allocated on a CUDA device so far, elsewhere by the whole process (0 on Windows, which does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def save_checkpoint(path, checkpoint):
    """Write to a temporary file, then rename: `path` is whole at every moment, also when the disk is full. The checkpoint
    before it stays under another name."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            with suppress(OSError):   # a file system without hard links keeps no previous one
                previous(path).unlink(missing_ok=True)
                os.link(path, previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch's writer reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "the previous checkpoint is intact" if path.exists() else "nothing was saved"
        fail(f"could not save {path} ({str(error).splitlines()[0]}); {kept}: free some space, then --resume")


def previous(path):
    return path.with_name(f"{path.stem}.previous.pt")


def load_checkpoint(path, kind=None):
    """Read what save_checkpoint wrote -> dict. Data only (`weights_only`): a checkpoint cannot run code."""
    path = Path(path)
    if not path.is_file():
        fail(f"no checkpoint at {path}: train one with `python train.py --model {path.stem} --out_dir {path.parent}`")
    try:
        with zipfile.ZipFile(path) as archive:   # what torch.save writes, with a checksum of every part
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
    except Exception as error:
        way_out = (f"rename {previous(path).name} to {path.name} to go on from the one before" if previous(path).is_file() else
                   "delete it and train again")
        fail(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: "
             f"{' '.join(str(error).split())[:150]}): {way_out}")
    if kind and found != kind:
        fail(f"{path} holds a model of kind {found!r}, expected {kind!r}")
    return checkpoint


def read_published(folder):
    """A directory as the authors publish a model, config.json with model.safetensors or pytorch_model.bin (in one file or
    several) -> its config, {their name: tensor}. The tensors are mapped from the files, not read."""
    try:
        config, tensors = json.loads((folder / "config.json").read_text()), {}
        for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
            tensors |= (read_safetensors(path) if path.suffix == ".safetensors" else
                        torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError("no weights")
        return dict(config), tensors
    except Exception as error:   # whatever is wrong in a file from elsewhere
        fail(f"{folder} is not a published model, config.json with model.safetensors or pytorch_model.bin "
             f"({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def read_safetensors(path):
    """{name: tensor}: 8 bytes are the length of a JSON header, which says where in the bytes behind it each tensor lies."""
    size = path.stat().st_size
    raw = torch.from_file(str(path), size=size, dtype=torch.uint8)   # a private map: writing to it changes no file
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
        tensors[name] = (part if part.data_ptr() % dtype.itemsize == 0 else part.clone()).view(dtype).view(entry["shape"])
    return tensors


def load_tokenizer(checkpoint):
    """The tokenizer a checkpoint was trained with -> tiktoken.Encoding."""
    tokenizer = get_tokenizer(checkpoint["data"]["tokenizer"])
    if fingerprint_tokenizer(tokenizer) != checkpoint["data"]["tokenizer_fingerprint"]:
        fail(f"the tokenizer {checkpoint['data']['tokenizer']} is not the one this checkpoint was trained with")
    return tokenizer


def check_tokenizer(checkpoint, data):
    """A model reads only the vocabulary that it was trained on."""
    if checkpoint["data"]["tokenizer_fingerprint"] != fingerprint_tokenizer(data.tokenizer):
        wanted = checkpoint["data"]["tokenizer"]
        fail(f"the checkpoint was trained with the tokenizer {wanted}, but the data {data.meta['name']!r} has "
             f"{data.meta['tokenizer']}: prepare it with --tokenizer {wanted}")


def load_autoencoder(checkpoint):
    """A checkpoint of kind "autoencoder" -> the model, in eval mode."""
    model = Autoencoder(AutoencoderConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


# --- What is this latent space like? ----------------------------------------------------------------------------------

@torch.no_grad()
def accuracy(model, chunks, noise):
    """Decode chunks (..., K) from vectors near their means -> (share of tokens right, share of whole chunks right).

    noise: a standard deviation around the mean, or "posterior" for the encoder's own."""
    right = []
    for part in chunks.view(-1, chunks.shape[-1]).split(4096):
        mean, log_std = model.encode(part)
        z = mean + (log_std.exp() if noise == "posterior" else noise) * torch.randn_like(mean)
        right.append(model.decode(z).argmax(-1) == part)
    right = torch.cat(right).float()
    return right.mean().item(), right.prod(-1).mean().item()


def show(tokenizer, chunk):
    return repr(tokenizer.decode_bytes(chunk.tolist()).decode("utf-8", "replace"))


@torch.no_grad()
def report_neighbours(model, chunks, tokenizer, count):
    """For a few chunks, the five different chunks whose vectors lie nearest: are nearby points similar phrases?"""
    different = chunks.unique(dim=0)[:20_000]
    means = model.encode(different)[0].float()
    for chunk in chunks[torch.linspace(0, len(chunks) - 1, count).long()]:
        distance = torch.cdist(model.encode(chunk[None])[0].float(), means)[0]
        order = distance.argsort()[1:6]   # the nearest is the chunk itself
        print(f"  {show(tokenizer, chunk):>12}  " + "  ".join(f"{show(tokenizer, different[i])} {distance[i]:.1f}" for i in order))


@torch.no_grad()
def report_path(model, chunks, tokenizer, steps=11):
    """Decode points on the straight line from one chunk's vector to another's."""
    first, last = (model.encode(chunk)[0] for chunk in chunks)
    for t in torch.linspace(0, 1, steps):
        print(f"  {t:.1f}  {show(tokenizer, model.decode(torch.lerp(first, last, t.item())).argmax(-1))}")


def main():
    parser = Parser(description="How faithful, how robust is the latent space of an autoencoder?")
    parser.add_argument("--out_dir", default="out/stdlib", help="the run's folder, with autoencoder.pt")
    parser.add_argument("--data", help="data set under data/; None: the one it was trained on")
    parser.add_argument("--windows", type=within(1), default=256, help="validation windows of 512 tokens to measure on")
    parser.add_argument("--neighbours", type=within(0), default=5, help="chunks to show the nearest neighbours of")
    parser.add_argument("--seed", type=within(0), default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    args = parser.parse_args()
    device = select_device(args.device)
    checkpoint = load_checkpoint(Path(args.out_dir) / "autoencoder.pt", "autoencoder")
    model = load_autoencoder(checkpoint).to(device)
    data = load_data(args.data or checkpoint["data"]["name"])
    check_tokenizer(checkpoint, data)
    K, L = model.config.chunk_size, model.config.latent_dim
    length = 512 // K * K
    chunks = data.batch("val", data.even_offsets("val", args.windows, length), length).view(-1, K).to(device)

    torch.manual_seed(args.seed)
    results = {}
    print(f"held-out {data.meta['name']}: {chunks.numel():,} tokens in chunks of {K}, vectors of {L}\n")
    print("vector             tokens right  chunks right")
    for noise in (0.0, "posterior", *(i / 10 for i in range(1, 11))):
        name = {0.0: "mean", "posterior": "posterior"}.get(noise, f"sigma_{noise}")
        results[name], whole = accuracy(model, chunks, noise)
        print(f"{name:18} {100 * results[name]:11.3f}% {100 * whole:12.3f}%")
    with torch.no_grad():
        mean, log_std = model.encode(chunks)
    kl = kl_to_normal(mean, log_std).flatten(0, -2).mean(0)                   # of each dimension, (L,)
    active, sigma = int((kl > 0.1).sum()), log_std.exp().mean().item()
    print(f"\nmean sigma of the posterior {sigma:.3f}; active dimensions (KL above 0.1 nats) {active} of {L}; "
          f"KL {kl.sum():.1f} nats a chunk")
    if args.neighbours:
        print("\nnearest neighbours, with their distance (two random chunks lie "
              f"{torch.cdist(mean[:500], mean[500:1000]).mean():.1f} apart):")
        report_neighbours(model, chunks, data.tokenizer, args.neighbours)
        print("\nthe straight line between two chunks, decoded:")
        report_path(model, chunks[[len(chunks) // 3, len(chunks) // 2]], data.tokenizer)
    if args.json:
        kept = {name: results[name] for name in ("mean", "posterior", "sigma_0.3")}
        print(json.dumps({"accuracy": kept, "sigma": sigma, "active_dims": active, "latent_dim": L}))


if __name__ == "__main__":
    main()
