"""
The chunk autoencoder (section 2 of the paper): K tokens -> one vector -> the same K tokens.

    python autoencoder.py --out_dir out/stdlib    # how faithful, how robust is this latent space?

Each chunk is encoded on its own, without context. Its posterior, a Gaussian over vectors,
depends on its K tokens alone and is therefore a fixed target for CALM (calm.py).

A generative model never hits a vector exactly, so a vector *near* the right one must decode to
the right tokens too. Three regularisers in training see to that: a clipped KL term, dropout on
the vector, and masked input tokens.

Shapes: K tokens in a chunk, V vocabulary, H width, L latent size; (...) stands for any leading
dimensions. Layers are named as in the authors' checkpoints.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class AutoencoderConfig:
    """Sizes and regularisers. The defaults are the paper's, but for the vocabulary: bytes."""
    vocab_size: int = 257      # V: 256 bytes and end-of-text
    chunk_size: int = 4        # K: tokens in a chunk
    latent_dim: int = 128      # L: size of a chunk's vector; the paper uses 32 K
    n_embd: int = 512          # H: width
    n_ff: int = 1280           # width of the SwiGLU
    n_layer: int = 2           # blocks per side: half see single tokens, half the whole chunk
    dropout: float = 0.15      # share of the vector's numbers that are dropped in training
    token_mask: float = 0.15   # share of the input tokens that are masked in training
    kl_weight: float = 1e-3    # beta: weight of the KL term
    kl_clip: float = 0.5       # nats: a dimension with a smaller KL is not pushed further down

    def __post_init__(self):
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, not {self.dropout}")
        if self.token_mask >= 1:
            raise ValueError(f"token_mask must be below 1, not {self.token_mask}")


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in float32, also under autocast (CUDA does that by itself, the CPU does not)."""

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
    """x + SwiGLU(RMSNorm(x)): the block of the encoder and of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x):
        return x + self.mlp(self.layernorm(x))


class Encoder(nn.Module):
    """K tokens -> mean and log_std of the posterior."""

    def __init__(self, config):
        super().__init__()
        K = config.chunk_size
        H = config.n_embd
        self.token_mask = config.token_mask
        self.n_token_layers = config.n_layer // 2     # these see single tokens, the rest chunks
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        blocks = [ResidualBlock(config) for _ in range(config.n_layer)]
        self.encoder_layers = nn.Sequential(*blocks)
        self.squeeze_layer = nn.Linear(K * H, H)
        self.norm = RMSNorm(H, eps=1e-6)
        self.hidden_to_latent = nn.Linear(H, 2 * config.latent_dim)

    def forward(self, chunks):
        """Tokens (..., K) -> mean (..., L), log_std (..., L)."""
        x = self.embed_tokens(chunks)                                  # (..., K, H)
        if self.training and self.token_mask > 0:
            # A masked token becomes the zero vector, which no token has.
            # (The authors replace it by token 0, which is a real one.)
            kept = torch.rand(chunks.shape, device=x.device) >= self.token_mask
            x = x * kept.unsqueeze(-1)

        x = self.encoder_layers[:self.n_token_layers](x)               # (..., K, H)
        x = self.squeeze_layer(x.flatten(-2))                          # (..., K*H) -> (..., H)
        x = self.encoder_layers[self.n_token_layers:](x)               # (..., H)
        mean, log_std = self.hidden_to_latent(self.norm(x)).chunk(2, dim=-1)
        return mean, log_std


class Decoder(nn.Module):
    """The encoder's mirror image. Its output layer is the encoder's embedding (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.chunk_size = config.chunk_size
        H = config.n_embd
        self.n_chunk_layers = config.n_layer - config.n_layer // 2    # these see the whole chunk
        self.latent_to_hidden = nn.Linear(config.latent_dim, H)
        blocks = [ResidualBlock(config) for _ in range(config.n_layer)]
        self.decoder_layers = nn.Sequential(*blocks)
        self.expand_layer = nn.Linear(H, config.chunk_size * H)
        self.norm = RMSNorm(H, eps=1e-6)

    def forward(self, z, embedding):
        """Vectors z (..., L) and the embedding (V, H) -> logits (..., K, V)."""
        x = self.latent_to_hidden(z)                                   # (..., L) -> (..., H)
        x = self.decoder_layers[:self.n_chunk_layers](x)               # (..., H)
        x = self.expand_layer(x)                                       # (..., K*H)
        x = x.unflatten(-1, (self.chunk_size, -1))                     # (..., K, H)
        x = self.decoder_layers[self.n_chunk_layers:](x)               # (..., K, H)
        return F.linear(self.norm(x), embedding)                       # (..., K, V)


class Autoencoder(nn.Module):
    """Encoder and decoder, and the objective that trains them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_weights)

    def encode(self, chunks):
        """Tokens (..., K) -> mean, log_std (..., L) of the chunk's posterior N(mean, std^2), in
        float32 under autocast, too."""
        mean, log_std = self.encoder(chunks)
        return mean.float(), log_std.float()

    def decode(self, z):
        """Vectors z (..., L) -> logits (..., K, V)."""
        return self.decoder(z, self.encoder.embed_tokens.weight)

    def tokens(self, z):
        """The most likely tokens of vectors z (..., L) -> (..., K), made in slices, so that the
        memory of the logits stays bounded."""
        K = self.config.chunk_size
        rows = max(1, 2**26 // (K * self.config.vocab_size))           # 2^26 logits
        tokens = [self.decode(part).max(-1).indices                    # on a CPU faster than argmax
                  for part in z.flatten(0, -2).split(rows)]
        return torch.cat(tokens).view(*z.shape[:-1], K)

    def loss(self, tokens):
        """The training objective (section 2.2): tokens (..., T*K) -> loss (a scalar), metrics.

        K * cross-entropy + beta * KL, where a dimension's KL counts as kl_clip, if it is less. Both
        are sums over a chunk and means over chunks, in nats.
        """
        c = self.config
        chunks = tokens.unflatten(-1, (-1, c.chunk_size))              # (..., T, K)
        mean, log_std = self.encode(chunks)                            # (..., T, L) each
        z = posterior_samples(mean, log_std, 1)[0]                     # (..., T, L)
        z = F.dropout(z, c.dropout, self.training)
        logits = self.decode(z).float()                                # (..., T, K, V)

        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), chunks.flatten())
        kl = kl_to_normal(mean, log_std)                               # (..., T, L)
        clipped_kl = kl.clamp_min(c.kl_clip).sum(-1).mean()
        loss = reconstruction + c.kl_weight * clipped_kl

        accuracy = (logits.argmax(-1) == chunks).float().mean()
        return loss, {"loss": loss.detach(), "clipped_kl": clipped_kl.detach(),
                      "accuracy": accuracy}

    def forward(self, tokens):
        """The loss: what torch.compile and DistributedDataParallel call."""
        return self.loss(tokens)


def posterior_samples(mean, log_std, n):
    """n draws from N(mean, std^2): mean, log_std (..., L) -> (n, ..., L)."""
    noise = torch.randn(n, *mean.shape, device=mean.device)
    return mean + log_std.exp() * noise


def kl_to_normal(mean, log_std):
    """KL divergence of N(mean, std^2) from N(0, 1) in nats, of each dimension (section 2.2).

    mean, log_std (..., L) -> (..., L)
    """
    return (mean ** 2 + (2 * log_std).exp() - 1 - 2 * log_std) / 2


def init_weights(module):
    """Normal(0, 0.02) for matrices, zero for biases: how every model here begins."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- Run it: what is the latent space of a trained autoencoder like? -----------------------


def accuracy(model, chunks, noise):
    """Decode chunks (P, K) from vectors near their means -> share of tokens, of chunks right.

    noise: a standard deviation around the mean, or "posterior" for the encoder's own.
    """
    right = []
    for part in chunks.split(4096):
        mean, log_std = model.encode(part)
        std = log_std.exp() if noise == "posterior" else noise
        z = mean + std * torch.randn_like(mean)
        right.append(model.decode(z).argmax(-1) == part)
    right = torch.cat(right).float()                                   # (P, K)
    return right.mean().item(), right.prod(-1).mean().item()


@torch.no_grad()
def describe_latent_space(model, chunks):
    """Print how robust the model is on held-out chunks (P, K) -> a dict of the figures."""
    torch.manual_seed(0)
    tokens_right = {}
    print("vector             tokens right  chunks right")
    levels = {"mean": 0.0, "posterior": "posterior"}
    for tenths in range(1, 11):
        levels[f"sigma_{tenths / 10}"] = tenths / 10
    for name, noise in levels.items():
        tokens_right[name], chunks_right = accuracy(model, chunks, noise)
        print(f"{name:18} {tokens_right[name]:12.3%} {chunks_right:13.3%}")

    mean, log_std = model.encode(chunks)
    kl = kl_to_normal(mean, log_std).mean(0)                           # of each dimension, (L,)
    active = int((kl > 0.1).sum())
    sigma = log_std.exp().mean().item()
    print(f"\nmean sigma of the posterior {sigma:.3f}; KL {kl.sum():.1f} nats per chunk; "
          f"active dimensions (KL above 0.1 nats) {active} of {len(kl)}")

    shown = {name: tokens_right[name] for name in ("mean", "posterior", "sigma_0.3")}
    return {"accuracy": shown, "sigma": sigma, "active_dims": active, "latent_dim": len(kl)}


def main():
    import json
    from pathlib import Path

    from data.checkpoint import DEFAULT_RUN, check_tokenizer, load_checkpoint
    from data.console import Parser, clean_end, within
    from data.machine import select_device
    from data.prepare import load_data

    with clean_end(when_memory_is_full="lower --windows"):
        parser = Parser(description="How faithful, how robust is an autoencoder's latent space?")
        add = parser.add_argument
        add("--out_dir", default=DEFAULT_RUN, help="the run's folder, with autoencoder.pt")
        add("--data", help="data set under data/; None: the one it was trained on")
        add("--windows", type=within(1), default=256, help="validation windows of 512 tokens")
        add("--device", default="auto", help="auto, cuda, mps or cpu")
        add("--json", action="store_true", help="end with one JSON object on a line")
        args = parser.parse_args()

        checkpoint = load_checkpoint(Path(args.out_dir) / "autoencoder.pt", "autoencoder")
        model = Autoencoder(AutoencoderConfig(**checkpoint["config"])).eval()
        model.load_state_dict(checkpoint["model"])
        data = load_data(args.data or checkpoint["data"]["name"])
        check_tokenizer(checkpoint, data)

        K = model.config.chunk_size
        length = max(min(512, len(data.val)) // K, 1) * K
        tokens = data.batch("val", data.even_offsets("val", args.windows, length), length)
        device = select_device(args.device)
        chunks = tokens.view(-1, K).to(device)                         # (P, K)
        print(f"held-out {data.meta['name']}: {chunks.numel():,} tokens in chunks of {K}, "
              f"vectors of {model.config.latent_dim}\n")
        figures = describe_latent_space(model.to(device), chunks)
        if args.json:
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
