"""
The chunk autoencoder (section 2 of the paper): K tokens -> one vector -> the same K tokens.

    python autoencoder.py --out_dir out/stdlib    # how robust are its vectors?

Each chunk is encoded on its own, without context. Its posterior, a Gaussian over vectors,
depends on its K tokens alone. So it is a fixed target for CALM (calm.py).

A generative model never hits a vector exactly, so a vector *near* the right one must decode
to the right tokens, too. Three regularisers in training see to that: a clipped KL term,
dropout on the vector, and masked input tokens.

Shapes: K tokens in a chunk, V vocabulary, H width (not that of CALM), L latent size; (...) is
any leading dimensions. Layers are named as in the authors' checkpoints.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class AutoencoderConfig:
    """Sizes and regularisers. The defaults are the paper's, except the vocabulary: bytes."""
    vocab_size: int = 257      # V: 256 bytes and end-of-text
    chunk_size: int = 4        # K: tokens in a chunk
    latent_dim: int = 128      # L: size of a chunk's vector; the paper uses 32 * K
    n_embd: int = 512          # H: width
    n_ff: int = 1280           # width of the SwiGLU
    n_layer: int = 2           # blocks per side: half see single tokens, half the whole chunk
    dropout: float = 0.15      # share of the vector's numbers that are dropped in training
    token_mask: float = 0.15   # share of the input tokens that are masked in training
    kl_weight: float = 1e-3    # beta: weight of the KL term
    kl_clip: float = 0.5       # nats: a dimension with a smaller KL is not pushed further down


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
        self.n_token_layers = config.n_layer // 2  # these see single tokens, the rest chunks
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        blocks = [ResidualBlock(config) for _ in range(config.n_layer)]
        self.encoder_layers = nn.Sequential(*blocks)
        self.squeeze_layer = nn.Linear(K * H, H)
        self.norm = RMSNorm(H, eps=1e-6)
        self.hidden_to_latent = nn.Linear(H, 2 * config.latent_dim)

    def forward(self, chunks):
        """Tokens (..., K) -> mean (..., L), log_std (..., L)."""
        x = self.embed_tokens(chunks)                     # (..., K, H)
        if self.training and self.token_mask > 0:
            # A masked token becomes the zero vector, which no token has.
            # (The authors replace it by token 0, which is a real one.)
            kept = torch.rand(chunks.shape, device=x.device) >= self.token_mask
            x = x * kept.unsqueeze(-1)

        x = self.encoder_layers[:self.n_token_layers](x)  # (..., K, H)
        x = self.squeeze_layer(x.flatten(-2))             # (..., K*H) -> (..., H)
        x = self.encoder_layers[self.n_token_layers:](x)  # (..., H)
        mean, log_std = self.hidden_to_latent(self.norm(x)).chunk(2, dim=-1)
        return mean, log_std


class Decoder(nn.Module):
    """The encoder's mirror image. Its output layer is the encoder's embedding."""

    def __init__(self, config):
        super().__init__()
        self.chunk_size = config.chunk_size
        H = config.n_embd
        self.n_chunk_layers = config.n_layer - config.n_layer // 2  # these see the whole chunk
        self.latent_to_hidden = nn.Linear(config.latent_dim, H)
        blocks = [ResidualBlock(config) for _ in range(config.n_layer)]
        self.decoder_layers = nn.Sequential(*blocks)
        self.expand_layer = nn.Linear(H, config.chunk_size * H)
        self.norm = RMSNorm(H, eps=1e-6)

    def forward(self, z, embedding):
        """Vectors z (..., L) and the embedding (V, H) -> logits (..., K, V)."""
        x = self.latent_to_hidden(z)                      # (..., L) -> (..., H)
        x = self.decoder_layers[:self.n_chunk_layers](x)  # (..., H)
        x = self.expand_layer(x)                          # (..., K*H)
        x = x.unflatten(-1, (self.chunk_size, -1))        # (..., K, H)
        x = self.decoder_layers[self.n_chunk_layers:](x)  # (..., K, H)
        return F.linear(self.norm(x), embedding)          # (..., K, V)


class Autoencoder(nn.Module):
    """Encoder and decoder, and the objective that trains them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_weights)

    def encode(self, chunks):
        """Tokens (..., K) -> mean, log_std (..., L) of the posterior, in float32."""
        mean, log_std = self.encoder(chunks)
        return mean.float(), log_std.float()

    def decode(self, z):
        """Vectors z (..., L) -> logits (..., K, V)."""
        return self.decoder(z, self.encoder.embed_tokens.weight)

    def tokens(self, z):
        """Vectors z (..., L) -> their most likely tokens (..., K)."""
        # In slices of at most 2^26 logits: with a large vocabulary all of them take gigabytes.
        rows = max(1, 2**26 // (self.config.chunk_size * self.config.vocab_size))
        slices = z.flatten(0, -2).split(rows)
        tokens = torch.cat([self.decode(part).argmax(-1) for part in slices])
        return tokens.view(*z.shape[:-1], self.config.chunk_size)

    def loss(self, tokens):
        """The training objective (section 2.2): tokens (..., T*K) -> loss (a scalar), metrics.

        K * cross-entropy, which is a mean over tokens, + beta * KL: nats for a chunk.

        The KL term pulls every posterior towards N(0, 1), which keeps the space of vectors
        smooth. But a dimension that is pulled all the way *is* N(0, 1), for every chunk: it has
        collapsed, says nothing about the tokens, and CALM would have to imitate pure noise. So
        a dimension whose KL is below kl_clip counts as kl_clip, and is pulled no further.
        """
        c = self.config
        chunks = tokens.unflatten(-1, (-1, c.chunk_size))  # (..., T, K)
        mean, log_std = self.encode(chunks)                # (..., T, L) each
        z = posterior_samples(mean, log_std, 1)[0]         # (..., T, L)
        z = F.dropout(z, c.dropout, self.training)
        logits = self.decode(z).float()                    # (..., T, K, V)

        cross_entropy = F.cross_entropy(logits.flatten(0, -2), chunks.flatten())
        reconstruction = c.chunk_size * cross_entropy
        kl = kl_to_normal(mean, log_std)                   # (..., T, L)
        clipped_kl = kl.clamp_min(c.kl_clip).sum(-1).mean()
        loss = reconstruction + c.kl_weight * clipped_kl

        tokens_right = (logits.argmax(-1) == chunks).float().mean()
        return loss, {"loss": loss.detach(), "clipped_kl": clipped_kl.detach(),
                      "tokens_right": tokens_right}

    forward = loss   # what torch.compile and DistributedDataParallel call


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


# --- Run it: how robust are the vectors? ---


@torch.no_grad()
def describe_vectors(model, chunks):
    """Move the vectors of held-out chunks (P, K), decode them, and print the share of tokens
    and of chunks that come out right."""
    mean, log_std = model.encode(chunks)      # (P, L) each
    noise = torch.randn_like(mean)
    vectors = {"the posterior's mean": mean,
               "drawn from the posterior": mean + log_std.exp() * noise}
    for sigma in (0.3, 0.5, 0.7, 1.0):
        vectors[f"the mean, moved by sigma = {sigma}"] = mean + sigma * noise

    print(f"{'vector':30} {'tokens right':>14} {'chunks right':>14}")
    for name, z in vectors.items():
        right = model.tokens(z) == chunks     # (P, K)
        tokens = right.float().mean()
        whole = right.all(-1).float().mean()
        print(f"{name:30} {tokens:14.3%} {whole:14.3%}")

    kl = kl_to_normal(mean, log_std).mean(0)  # of each dimension, (L,)
    print(f"\nKL {kl.sum():.1f} nats a chunk; {(kl > 0.1).sum()} of the {len(kl)} dimensions have "
          f"over 0.1; the posterior's mean sigma: {log_std.exp().mean():.3f}")


def main():
    import argparse   # here, since the method above needs torch alone
    from pathlib import Path

    from data.machine import load_checkpoint
    from data.prepare import DEFAULT_DATA, TokenData

    parser = argparse.ArgumentParser(description="How robust are the vectors of an autoencoder?")
    parser.add_argument("--out_dir", default=f"out/{DEFAULT_DATA}", help="a run's folder")
    args = parser.parse_args()

    checkpoint = load_checkpoint(Path(args.out_dir, "autoencoder.pt"))
    model = Autoencoder(AutoencoderConfig(**checkpoint["config"])).eval()
    model.load_state_dict(checkpoint["model"])
    data = TokenData(checkpoint["data"]["name"])
    length = 128 * model.config.chunk_size
    tokens = data.batch("val", data.even_offsets(256, length), length)
    torch.manual_seed(0)
    describe_vectors(model, tokens.view(-1, model.config.chunk_size))


if __name__ == "__main__":
    main()
