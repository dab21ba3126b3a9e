"""
The chunk autoencoder (paper, section 2): K tokens -> one continuous vector -> the same K tokens.

    python autoencoder.py --out_dir out/stdlib   # how faithful, how robust is this latent space?

A chunk is encoded on its own: no attention, no context. So its posterior depends on its K tokens alone,
and is a fixed target for CALM. What makes the vectors a space that a generative model can hit is the
regularisation in training: a clipped KL term, dropout on the vector, and masked input tokens. A vector near
the right one then still decodes to the right K tokens.
Shapes: K tokens in a chunk, V vocabulary, H width, L latent size; (...) any leading dimensions.
"""
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoint import DEFAULT_RUN, load_checkpoint, load_tokenizer, select_device
from data.prepare import Parser, load_data, script, within

@dataclass
class AutoencoderConfig:
    vocab_size: int = 257      # V: bytes and end-of-text
    chunk_size: int = 4        # K: tokens in a chunk
    latent_dim: int = 128      # L: size of a chunk's vector; the paper uses 32 K
    n_embd: int = 512          # H: width
    n_ff: int = 1280           # width of the SwiGLU
    n_layer: int = 2           # blocks a side: half of them see single tokens, half the whole chunk
    dropout: float = 0.15      # share of the vector's numbers that are dropped
    token_mask: float = 0.15   # share of input tokens that are masked
    kl_weight: float = 1e-3    # beta: weight of the KL term
    kl_clip: float = 0.5       # nats below which a dimension's KL term does not push

    def __post_init__(self):
        check_numbers(self)
        for name in ("dropout", "token_mask"):
            check(getattr(self, name) < 1, f"{name} must be below 1, not {getattr(self, name)}")

def check(fine, message):
    """Of a config's field, whose name the message begins with: train.py makes it a flag."""
    if not fine:
        raise ValueError(message)
def check_numbers(config):
    """A config's whole numbers are from 1, or from 0 where that is the default, the others from 0."""
    for f in (f for f in fields(config) if f.type in (int, float)):
        least, value = int(f.type is int and f.default != 0), getattr(config, f.name)
        check(least <= value < 1 << 31, f"{f.name} must be at least {least} and finite, not {value}")

class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in float32, also under autocast (CUDA does so by itself, CPU does not)."""
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
    """x + SwiGLU(RMSNorm(x)): the block of the encoder and the decoder."""
    def __init__(self, config):
        super().__init__()
        self.layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x):
        return x + self.mlp(self.layernorm(x))

class Encoder(nn.Module):
    """K tokens -> mean, log_std. Half of the blocks see single tokens, half the whole chunk."""
    def __init__(self, config):
        super().__init__()
        H = config.n_embd
        self.token_mask, self.half = config.token_mask, config.n_layer // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        self.encoder_layers = nn.Sequential(*[ResidualBlock(config) for _ in range(config.n_layer)])
        self.squeeze_layer = nn.Linear(config.chunk_size * H, H)
        self.norm = RMSNorm(H, eps=1e-6)
        self.hidden_to_latent = nn.Linear(H, 2 * config.latent_dim)

    def forward(self, chunks):
        x = self.embed_tokens(chunks)                                  # (..., K, H)
        if self.training and self.token_mask:
            # A masked token is the zero vector, which no token has. (The authors use token 0, a real one.)
            kept = torch.rand(chunks.shape, device=x.device) >= self.token_mask
            x = x * kept.unsqueeze(-1)
        x = self.encoder_layers[:self.half](x)
        x = self.squeeze_layer(x.flatten(-2))                          # (..., K*H) -> (..., H)
        x = self.encoder_layers[self.half:](x)
        mean, log_std = self.hidden_to_latent(self.norm(x)).chunk(2, dim=-1)   # (..., L) each
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
        self.norm = RMSNorm(H, eps=1e-6)

    def forward(self, z, embedding):
        x = self.decoder_layers[:self.half](self.latent_to_hidden(z))  # (..., L) -> (..., H)
        x = self.expand_layer(x).unflatten(-1, (self.K, -1))           # (..., K, H)
        x = self.norm(self.decoder_layers[self.half:](x))
        return F.linear(x, embedding)                                  # logits (..., K, V)

class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_weights)

    def encode(self, chunks):
        """Tokens (..., K) -> mean, log_std (..., L): the posterior N(mean, std^2) of the chunk's vector."""
        return self.encoder(chunks)

    def decode(self, z):
        """Vectors z (..., L) -> logits (..., K, V)."""
        return self.decoder(z, self.encoder.embed_tokens.weight)

    def loss(self, tokens):
        """The training objective (section 2.2) for token ids (..., T*K) -> scalar, metrics.
        K * cross-entropy + beta * KL: both are sums over a chunk, averaged over chunks, in nats."""
        c = self.config
        chunks = tokens.unflatten(-1, (-1, c.chunk_size))              # (..., T, K)
        mean, log_std = (v.float() for v in self.encode(chunks))       # (..., T, L)
        z = mean + log_std.exp() * torch.randn_like(mean)              # z ~ q(z | chunk)
        z = F.dropout(z, c.dropout, self.training)
        logits = self.decode(z).float()                                # (..., T, K, V)
        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), chunks.flatten())
        kl = kl_to_normal(mean, log_std).clamp_min(c.kl_clip).sum(-1).mean()
        loss = reconstruction + c.kl_weight * kl
        accuracy = (logits.argmax(-1) == chunks).float().mean()
        return loss, {"loss": loss.detach(), "kl": kl.detach(), "accuracy": accuracy}
    def forward(self, tokens):   # what torch.compile and DistributedDataParallel call
        return self.loss(tokens)

def posterior_samples(mean, log_std, n):
    """n draws from N(mean, std^2): mean, log_std (..., L) -> (n, ..., L)."""
    return mean + log_std.exp() * torch.randn(n, *mean.shape, device=mean.device)
def kl_to_normal(mean, log_std):
    """KL_i of N(mean_i, std_i^2) from N(0, 1) in nats (section 2.2): (..., L) -> (..., L)."""
    return (mean ** 2 + (2 * log_std).exp() - 1 - 2 * log_std) / 2

def init_weights(module):
    """Normal(0, 0.02) for matrices, zero biases: the initialisation of every model here."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

# --- Run it: what is this latent space like? ------------------------------------------------------------
def accuracy(model, chunks, noise):
    """Decode chunks (P, K) from vectors near their means -> share of tokens, of whole chunks that are right.
    noise: a standard deviation around the mean, or "posterior" for the encoder's own."""
    right = []
    for part in chunks.split(4096):
        mean, log_std = model.encode(part)
        z = mean + (log_std.exp() if noise == "posterior" else noise) * torch.randn_like(mean)
        right.append(model.decode(z).argmax(-1) == part)
    right = torch.cat(right).float()                                   # (P, K)
    return right.mean().item(), right.prod(-1).mean().item()

@script("lower --windows")
@torch.no_grad()
def main():
    parser = Parser(description="How faithful, how robust is the latent space of an autoencoder?")
    add = parser.add_argument
    add("--out_dir", default=DEFAULT_RUN, help="the run's folder, with autoencoder.pt")
    add("--data", help="data set under data/; None: the one it was trained on")
    add("--windows", type=within(1), default=256, help="validation windows of 512 tokens to measure on")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--json", action="store_true", help="end with one JSON object on a line")
    args = parser.parse_args()
    checkpoint = load_checkpoint(Path(args.out_dir) / "autoencoder.pt", "autoencoder")
    model = Autoencoder(AutoencoderConfig(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    data = load_data(args.data or checkpoint["data"]["name"])
    load_tokenizer(checkpoint, data)   # which must be the same
    K, L = model.config.chunk_size, model.config.latent_dim
    length = max(min(512, len(data.val)) // K, 1) * K
    tokens = data.batch("val", data.even_offsets("val", args.windows, length), length)
    device = select_device(args.device)
    model, chunks = model.to(device), tokens.view(-1, K).to(device)    # (P, K)
    torch.manual_seed(0)
    print(f"held-out {data.meta['name']}: {chunks.numel():,} tokens in chunks of {K}, vectors of {L}\n\n"
          "vector             tokens right  chunks right")
    found = {}
    for noise in (0.0, "posterior", *(i / 10 for i in range(1, 11))):
        name = {0.0: "mean", "posterior": "posterior"}.get(noise, f"sigma_{noise}")
        found[name], whole = accuracy(model, chunks, noise)
        print(f"{name:18} {100 * found[name]:11.3f}% {100 * whole:12.3f}%")
    mean, log_std = model.encode(chunks)
    kl = kl_to_normal(mean, log_std).mean(0)                           # of each dimension, (L,)
    active, sigma = int((kl > 0.1).sum()), log_std.exp().mean().item()
    print(f"\nmean sigma of the posterior {sigma:.3f}; KL {kl.sum():.1f} nats a chunk; "
          f"active dimensions (KL above 0.1 nats) {active} of {L}")
    if args.json:
        found = {name: found[name] for name in ("mean", "posterior", "sigma_0.3")}
        print(json.dumps({"accuracy": found, "sigma": sigma, "active_dims": active, "latent_dim": L}))

if __name__ == "__main__":
    main()
