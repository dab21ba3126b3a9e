"""
CALM (arXiv 2510.27688): a language model that predicts the next vector, not the next token.

A training step in five lines (`python calm.py` takes a line of text through them):

    chunks of K tokens        -> one input vector each       CALM.inputs
    input vectors             -> hidden states h_t           Transformer
    h_t and noise             -> N samples z of a vector     EnergyHead.sample
    the true chunk t+1        -> M samples y of its vector   the frozen autoencoder's posterior
    the samples z and y       -> loss                        energy_score

Read it from here to AR, the token-by-token baseline. Two slower heads, and all costs, come after.

Shapes: B sequences, T chunks in a sequence, K tokens in a chunk, V vocabulary, D width, N samples
of the head, M samples of the posterior, L numbers in a chunk's vector, P positions (B and T
flattened), nh attention heads of width hs. tokens (B, T*K), chunks (B, T, K), h (B, T, D), z
(..., L). Layers have the names that they have in the authors' checkpoints.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (Autoencoder, AutoencoderConfig, RMSNorm, SwiGLU, init_weights,
                         posterior_samples)   # samples of N(mean, std^2), the encoder's output


@dataclass
class CALMConfig:
    """Sizes of a CALM. The defaults are the paper's CALM-S, but for the vocabulary: bytes."""
    vocab_size: int = 257          # V: 256 bytes and end-of-text
    chunk_size: int = 4            # K: tokens in a chunk
    latent_dim: int = 128          # L: size of a chunk's vector
    n_embd: int = 768              # D: width
    n_ff: int = 2048               # width of the SwiGLU
    n_layer: int = 12              # blocks of the Transformer
    n_head: int = 16               # attention heads
    n_head_layer: int = 3          # blocks of the generative head; the paper takes n_layer / 4
    n_noise: int = 64              # size of the energy head's noise
    block_size: int = 2048         # context in chunks
    num_samples: int = 8           # N: samples of the head per position in training
    num_targets: int = 100         # M: samples of the posterior per position; more make less noise
    alpha: float = 1.0             # exponent of the energy score, in (0, 2)
    input_mode: Literal["discrete", "continuous", "both"] = "discrete"   # tokens, latents, both
    head: str = "energy"           # generative head, a name in HEADS
    num_evals: int = 0             # network evaluations per sample; 0: the head's default
    aux_weight: float = 0.0        # weight of CALM.auxiliary_loss, which is ours, not the paper's

    def __post_init__(self):
        check_attention_heads(self.n_embd, self.n_head)
        if self.head not in HEADS:   # HEADS is below the heads
            raise ValueError(f"head must be one of {', '.join(HEADS)}, not {self.head!r}")
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, for pairs, not {self.num_samples}")
        if not 0 < self.alpha < 2:
            raise ValueError(f"alpha must be in (0, 2), not {self.alpha}")
        self.num_evals = self.num_evals or HEADS[self.head].default_evals


@dataclass
class ARConfig:
    """Sizes of the token-by-token baseline. The defaults are the paper's Transformer-S."""
    vocab_size: int = 257
    n_embd: int = 768
    n_ff: int = 2048
    n_layer: int = 12
    n_head: int = 16
    block_size: int = 2048         # context in tokens

    def __post_init__(self):
        check_attention_heads(self.n_embd, self.n_head)


def check_attention_heads(n_embd, n_head):
    """Raise ValueError unless all heads get the same width, an even one: `rotate` turns pairs."""
    if n_embd % (2 * n_head) != 0:
        raise ValueError(f"n_embd {n_embd} must be divisible by 2 n_head = {2 * n_head}")


# --- The Transformer (section 3.3): LLaMA's, with RMSNorm, rotary positions, SwiGLU, no biases


def rotary_tables(head_dim, positions, theta=10000.0):
    """cos and sin of position * frequency, (positions, hs) each, as for LLaMA's rotate_half."""
    # No checkpoint has these tables: on the CPU even where the model is built on "meta", empty.
    frequency = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    angle = torch.outer(torch.arange(positions, device="cpu").float(), frequency)
    angle = angle.repeat(1, 2)                                     # (positions, hs)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + hs/2}) of x (B, nh, T, hs) by the angle of its position."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class KVCache:
    """Keys and values of the positions so far, for generation. Memory is taken once, in full."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0     # filled positions; to set it lower is to forget the last ones
        self.layers = {}    # layer -> keys and values (2, B, nh, block_size, hs)

    def write(self, layer, k, v):
        """Append k, v (B, nh, T, hs) -> all keys and all values so far (B, nh, end, hs)."""
        if layer not in self.layers:
            B, nh, _, hs = k.shape
            self.layers[layer] = k.new_zeros(2, B, nh, self.block_size, hs)
        end = self.length + k.shape[2]
        self.layers[layer][..., self.length:end, :] = torch.stack([k, v])    # length moves later
        return self.layers[layer][..., :end, :]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, D), cos and sin (T, hs) -> (B, T, D)."""
        heads = (self.n_head, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)    # (B, nh, T, hs)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        q = rotate(q, cos, sin).type_as(v)                         # cos and sin are float32
        k = rotate(k, cos, sin).type_as(v)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                   # (B, nh, end, hs)
        T = q.shape[2]
        end = k.shape[2]
        mask = None   # x is all positions so far (T = end: causal), or a single new one (T = 1)
        if 1 < T < end:   # or several new ones: each attends to cached and to earlier new ones
            mask = torch.ones(T, end, dtype=torch.bool, device=x.device).tril(end - T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=(T == end))
        return self.o_proj(x.transpose(1, 2).flatten(-2))          # (B, T, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Vectors in, hidden states out. CALM feeds it chunks, AR feeds it tokens."""

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd, eps=1e-6)
        cos, sin = rotary_tables(config.n_embd // config.n_head, config.block_size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, cache=None):
        """x (B, T, D) -> h (B, T, D). With a cache, x goes on where the cache ends."""
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} positions, but the context is {self.block_size}")
        for layer in self.layers:
            x = layer(x, self.cos[start:end], self.sin[start:end], cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)


# --- The energy head (section 3.2): a hidden state and noise -> a vector, in one step ------


class EnergyBlock(nn.Module):
    """x + down_proj(silu(g) * u), where g and u are the halves of an MLP of [LayerNorm(x), c]."""

    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(),
                                     nn.Linear(D, 2 * D))
        self.down_proj = nn.Linear(D, D)

    def forward(self, x, c):
        """x (N, ..., D), one per sample; c (..., D), the condition, one for all N samples."""
        # W [norm(x), c] + b = W_x norm(x) + (W_c c + b). The bracket is the same for all samples.
        first = self.linears[0]
        W_x, W_c = first.weight.chunk(2, dim=1)                    # (D, D) each
        mixed = F.linear(self.in_ln(x), W_x) + F.linear(c, W_c, first.bias)
        g, u = self.linears[1:](mixed).chunk(2, dim=-1)            # (N, ..., D) each
        return x + self.down_proj(F.silu(g) * u)


class FinalLayer(nn.Module):
    """LayerNorm, then a two-layer MLP from the width D to the latent size L."""

    def __init__(self, D, L):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, L))

    def forward(self, x):
        return self.linears(self.in_ln(x))


class EnergyHead(nn.Module):
    """Draws the next vector given h_t. Like every head it has two methods: a loss and a sample."""
    default_evals = 1     # network evaluations per sample

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.noise_scale = 1.0   # ours: sample.py lowers it, for likelier, less varied vectors
        if config.num_evals != 1:
            raise ValueError(f"num_evals must be 1 for the energy head, not {config.num_evals}")
        self.noise_embd = nn.Linear(config.n_noise, D)
        self.norm_noise = nn.LayerNorm(D, eps=1e-6)
        self.hidden_embd = nn.Linear(D, D)
        self.norm_hidden = nn.LayerNorm(D, eps=1e-6)
        self.mlp_blocks = nn.ModuleList([EnergyBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = FinalLayer(D, config.latent_dim)
        self.apply(init_weights)
        nn.init.zeros_(self.final_layer.linears[2].weight)         # every z is 0 before training

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L). noise (n, ..., n_noise): tests give it."""
        if noise is None:
            noise = torch.rand(n, *h.shape[:-1], self.config.n_noise, device=h.device) - 0.5
        x = self.noise_scale * self.norm_noise(self.noise_embd(noise))    # (n, ..., D)
        c = self.norm_hidden(self.hidden_embd(h))                  # (..., D)
        for block in self.mlp_blocks:
            x = block(x, c)
        return self.final_layer(x)                                 # (n, ..., L)

    def loss(self, h, mean, log_std):
        """Equation 12: h (P, D); mean, log_std (P, L) of the next chunk's posterior -> (P,)."""
        z = self.sample(h, self.config.num_samples)                # (N, P, L)
        y = posterior_samples(mean, log_std, self.config.num_targets)     # (M, P, L)
        return energy_score(z, y, self.config.alpha)


def energy_score(z, y, alpha=1.0):
    """The energy loss of samples z (N, P, L) for targets y (M, P, L) -> (P,) (equation 12):

        2/(N M) sum_{n,m} |z_n - y_m|^alpha  -  1/(N (N-1)) sum_{n != i} |z_n - z_i|^alpha

    The first term pulls the samples to the targets, the second keeps them apart from each other.
    The text shows one next chunk after each h, but similar h are followed by different chunks.
    Averaged over the text, the loss is lowest exactly if z, given h, has the distribution of y over
    all chunks that can follow (0 < alpha < 2).
    """
    N = len(z)
    with torch.autocast(z.device.type, enabled=False):
        z = z.float().transpose(0, 1)                              # (P, N, L)
        y = y.float().transpose(0, 1)                              # (P, M, L)
        to_targets = distances(z, y, alpha).mean((1, 2))           # (P,)
        pairs = distances(z, z, alpha).triu(1).sum((1, 2))         # (P,): each pair once
        return 2 * to_targets - 2 * pairs / (N * (N - 1))


def distances(x, y, alpha):
    """|x_n - y_m|^alpha: x (P, N, L), y (P, M, L) -> (P, N, M).

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is one baddbmm: no (P, N, M, L) is built. Its price: distances
    below about |x| / 1000 are mostly rounding. Those below 1e-5 count as 1e-5, with a gradient of
    0, not infinite.
    """
    x2 = torch.linalg.vector_norm(x, dim=-1) ** 2                  # (P, N), less memory than x ** 2
    y2 = torch.linalg.vector_norm(y, dim=-1) ** 2                  # (P, M)
    squares = torch.baddbmm(x2[:, :, None] + y2[:, None, :], x, y.transpose(1, 2), alpha=-2)
    return squares.clamp_min(1e-10) ** (alpha / 2)


# --- The two models: the same Transformer, over chunks and over tokens ---------------------


class CALM(nn.Module):
    """Reads chunks, draws the vector of the next one, decodes it with the frozen autoencoder."""

    def __init__(self, config, autoencoder):
        super().__init__()
        for name in ("vocab_size", "chunk_size", "latent_dim"):
            size = getattr(config, name)
            expected = getattr(autoencoder.config, name)
            if size != expected:
                raise ValueError(f"{name} is {size}, but the autoencoder's is {expected}")
        self.config = config
        self.chunk_size = config.chunk_size
        K = config.chunk_size
        D = config.n_embd
        if config.input_mode != "continuous":
            self.embed_tokens = nn.Embedding(config.vocab_size, D)
            self.embed_proj = nn.Sequential(nn.Linear(K * D, 2 * D), nn.SiLU(),
                                            nn.Linear(2 * D, D), nn.LayerNorm(D, eps=1e-6))
        if config.input_mode != "discrete":
            self.latent_proj = nn.Linear(config.latent_dim, D)
        self.transformer = Transformer(config)
        if config.aux_weight > 0:                                  # ours: see auxiliary_loss
            self.aux = nn.Linear(D, K * config.vocab_size)
            self.aux_every = math.ceil(config.vocab_size / 4096)   # at one of so many positions
        self.apply(init_weights)                                   # all of the above
        self.head = HEADS[config.head](config)                     # it initialises itself
        self.autoencoder = autoencoder.requires_grad_(False)       # it is trained already

    def train(self, mode=True):
        """As nn.Module.train, but the frozen autoencoder always stays in eval mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def inputs(self, tokens):
        """tokens (B, T*K) -> one vector per chunk (B, T, D) (section 3.3), by default from token
        embeddings: the paper found the autoencoder's vectors to be a worse input."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))        # (B, T, K)
        x = 0
        if self.config.input_mode != "continuous":
            embedded = self.embed_tokens(chunks).flatten(-2)       # (B, T, K*D)
            x = self.embed_proj(embedded)                          # (B, T, D)
        if self.config.input_mode != "discrete":
            mean, _ = self.autoencoder.encode(chunks)              # (B, T, L)
            x = x + self.latent_proj(mean)
        return x

    def hidden(self, tokens, cache=None):
        """tokens (B, T*K) -> h (B, T, D): h_t has seen chunks up to t, and predicts chunk t+1."""
        return self.transformer(self.inputs(tokens), cache)

    def loss(self, tokens):
        """tokens (B, (T+1)*K) -> loss, metrics: chunk t+1 from h_t, at P = B*T positions."""
        K = self.chunk_size
        h = self.hidden(tokens[:, :-K]).flatten(0, 1)              # (P, D)
        targets = tokens[:, K:].reshape(-1, K)                     # (P, K): the chunks to come
        mean, log_std = self.autoencoder.encode(targets)           # (P, L) each: its posterior
        head_loss = self.head.loss(h, mean, log_std).mean()
        if self.config.aux_weight == 0:
            return head_loss, {"loss": head_loss.detach(), self.config.head: head_loss.detach()}

        aux = self.auxiliary_loss(h, targets)
        loss = head_loss + self.config.aux_weight * aux
        return loss, {"loss": loss.detach(), self.config.head: head_loss.detach(),
                      "aux": aux.detach()}

    def forward(self, tokens):
        """The loss: what torch.compile and DistributedDataParallel call."""
        return self.loss(tokens)

    def sample_chunks(self, h, n):
        """n next chunks given each h (..., D) -> tokens (n, ..., K)."""
        return self.autoencoder.tokens(self.sample_vectors(h, n))

    def sample_vectors(self, h, n):
        """n next vectors given each h (..., D) -> z (n, ..., L), in slices that bound memory."""
        at_once = max(1, 2**14 // h.shape[:-1].numel())            # 2^14 vectors, or one of each h
        z = [self.head.sample(h, min(at_once, n - done)) for done in range(0, n, at_once)]
        return torch.cat(z)

    def auxiliary_loss(self, h, targets):
        """Ours, not the paper's, only in training: h (P, D) also predicts each token of the next
        chunk, targets (P, K), by a softmax -> mean cross-entropy in nats. For large V this is done
        at one of aux_every positions, drawn at random, which bounds the memory of the logits."""
        if self.aux_every > 1:
            some = torch.randperm(len(h), device=h.device)[::self.aux_every]
            h = h[some]
            targets = targets[some]
        logits = self.aux(h).unflatten(-1, (self.chunk_size, -1)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class AR(nn.Module):
    """The token-by-token baseline: the same Transformer between an embedding and a softmax."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.chunk_size = 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(init_weights)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> h (B, T, D)."""
        return self.transformer(self.embed_tokens(tokens), cache)

    def loss(self, tokens):
        """tokens (B, T+1) -> loss, metrics: cross-entropy of token t+1 from h_t, in nats."""
        logits = self.lm_head(self.hidden(tokens[:, :-1])).float()        # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"loss": loss.detach()}

    def forward(self, tokens):
        """The loss: what torch.compile and DistributedDataParallel call."""
        return self.loss(tokens)

    def probabilities(self, h, temperature=1.0):
        """The probabilities of the next token given h (..., D), at a temperature -> (..., V)."""
        return (self.lm_head(h).float() / temperature).softmax(-1)

    def sample_chunks(self, h, n, temperature=1.0):
        """n next tokens, chunks of one, given each h (B, D) -> tokens (n, B, 1)."""
        p = self.probabilities(h, temperature)                     # (B, V)
        return torch.multinomial(p, n, replacement=True).T[..., None]


# --- Two slower heads (section 3.2, figure 8): many steps from noise to a vector -------------


class AdaLNBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), all three made from the condition c."""

    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class TimeNet(nn.Module):
    """(x_t, t, h) -> `out` numbers: the network of FlowHead and DiffusionHead. It was designed for
    MAR, a generator of images without vector quantisation (Li et al., 2024)."""

    def __init__(self, config, out):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.time_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.cond_embed = nn.Linear(D, D)
        self.input_proj = nn.Linear(config.latent_dim, D)
        self.res_blocks = nn.ModuleList([AdaLNBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = nn.ModuleDict({
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)),
            "linear": nn.Linear(D, out),
        })
        # First weights as the authors': at first no block does anything, and the output is zero.
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)
            elif "time_embed" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x, t, h):
        """x (..., L), t (...) from 0 to 999, h (..., D) -> (..., out), in float32."""
        frequency = 10000.0 ** (-torch.arange(128, device=x.device) / 128)
        angle = t[..., None] * frequency                           # (..., 128)
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        c = time + self.cond_embed(h)                              # the condition (..., D)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x).float()


class FlowHead(TimeNet):
    """Flow matching: a velocity carries noise x_0 to z along the line x_t = (1 - t) x_0 + t z."""
    default_evals = 20

    def __init__(self, config):
        super().__init__(config, config.latent_dim)
        if config.num_evals % 2 != 0:
            raise ValueError(f"num_evals must be even, two a step, not {config.num_evals}")

    def velocity(self, x, t, h):
        """t (...) is in [0, 1]; the network gets floor(1000 t), as that of the authors does."""
        return self(x, (1000 * t).floor(), h)

    def loss(self, h, mean, log_std):
        """Mean squared error of the velocity z - x_0 at N random times per position -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)     # (N, P, L)
        x_0 = torch.randn_like(z)
        t = torch.rand(z.shape[:2], device=z.device)               # (N, P)
        x_t = torch.lerp(x_0, z, t[..., None])
        error = self.velocity(x_t, t, h) - (z - x_0)               # (N, P, L)
        return error.square().mean(-1).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals / 2 midpoint steps from
        noise (n, ..., L)."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        times = torch.linspace(0, 1, self.config.num_evals // 2 + 1, device=h.device)
        for t, step in zip(times[:-1], times.diff()):
            middle = x + step / 2 * self.velocity(x, t.expand(shape[:-1]), h)
            x = x + step * self.velocity(middle, (t + step / 2).expand(shape[:-1]), h)
        return x


class DiffusionSchedule(nn.Module):
    """The constants of a diffusion:

        x_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise

    alpha_bar (steps,) falls from about 1 to about 0. Each buffer has one number for each step.
    """

    def __init__(self, alpha_bar):
        super().__init__()
        alpha_bar_before = F.pad(alpha_bar[:-1], (1, 0), value=1.0)       # alpha_bar_{t-1}
        beta = 1 - alpha_bar / alpha_bar_before                    # variance of q(x_t | x_{t-1})

        # The diffusion's posterior q(x_{t-1} | x_t, z) is a Gaussian, with the mean
        # z_weight * z + x_weight * x_t and this variance:
        z_weight = alpha_bar_before.sqrt() * beta / (1 - alpha_bar)
        x_weight = (1 - beta).sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar)
        posterior_variance = beta * (1 - alpha_bar_before) / (1 - alpha_bar)
        # At t = 0 this variance is 0, which has no logarithm: that of t = 1 takes its place.
        posterior_variance[0] = posterior_variance[1] if len(beta) > 1 else beta[0]

        self.keep("signal", alpha_bar.sqrt())
        self.keep("noise", (1 - alpha_bar).sqrt())
        self.keep("z_weight", z_weight)
        self.keep("x_weight", x_weight)
        self.keep("log_posterior_variance", posterior_variance.log())
        self.keep("log_beta", beta.log())

    def keep(self, name, numbers):
        self.register_buffer(name, numbers.float(), persistent=False)

    def predict_z(self, x_t, noise, t):
        """Solve x_t = signal z + noise_t noise for z: x_t, noise (..., L), step t (...)."""
        return (x_t - self.noise[t][..., None] * noise) / self.signal[t][..., None]

    def posterior_mean(self, z, x_t, t):
        """The mean of q(x_{t-1} | x_t, z): z and x_t (..., L), step t (...) -> (..., L)."""
        return self.z_weight[t][..., None] * z + self.x_weight[t][..., None] * x_t

    def log_variance(self, v, t):
        """v (..., L) -> (..., L): the posterior's log-variance at v = -1, log beta at v = 1."""
        low = self.log_posterior_variance[t][..., None]
        high = self.log_beta[t][..., None]
        return torch.lerp(low, high, (v + 1) / 2)


class DiffusionHead(TimeNet):
    """Diffusion: noise becomes z step by step, t = 999 .. 0. The network predicts the noise in
    x_t and, between two bounds, the log-variance of a step back (Nichol and Dhariwal, 2021)."""
    default_evals = 100

    def __init__(self, config):
        super().__init__(config, 2 * config.latent_dim)
        if config.num_evals > 1000:
            raise ValueError(f"num_evals must be at most 1000, not {config.num_evals}")
        # The cosine schedule: alpha_bar falls as cos^2, but no step has a beta above 0.999.
        time = torch.arange(1001, dtype=torch.float64, device="cpu") / 1000
        angle = (time + 0.008) / 1.008 * math.pi / 2
        beta = (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp_max(0.999)
        self.alpha_bar = (1 - beta).cumprod(0)                     # (1000,)
        # Samples take num_evals of the 1000 steps, evenly spaced: a shorter chain of its own.
        steps = torch.linspace(0, 999, config.num_evals, device="cpu").round().long()
        self.sample_steps = steps.tolist()
        self.train_schedule = DiffusionSchedule(self.alpha_bar)
        self.sample_schedule = DiffusionSchedule(self.alpha_bar[steps])

    def terms(self, z, noise, t, h):
        """Both parts of the loss at times t (...), averaged over L -> (...), (...).

        The first is the squared error of the predicted noise. The second is the KL divergence of
        the step back, in bits. It trains the variance alone: there the predicted noise is detached.
        """
        schedule = self.train_schedule
        x_t = schedule.signal[t][..., None] * z + schedule.noise[t][..., None] * noise
        predicted, v = self(x_t, t, h).chunk(2, dim=-1)            # (..., L) each
        squared_error = (noise - predicted).square().mean(-1)

        # The step back: as the network makes it, and as it is in truth.
        mean = schedule.posterior_mean(schedule.predict_z(x_t, predicted.detach(), t), x_t, t)
        log_variance = schedule.log_variance(v, t)
        true_mean = schedule.posterior_mean(z, x_t, t)
        true_log_variance = schedule.log_posterior_variance[t][..., None]
        kl = (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
              + (true_mean - mean) ** 2 / log_variance.exp()) / 2
        # At t = 0 the step back ends at z: its negative log-likelihood.
        nll = (math.log(2 * math.pi) + log_variance + (z - mean) ** 2 / log_variance.exp()) / 2
        bits = torch.where((t == 0)[..., None], nll, kl).mean(-1) / math.log(2)
        return squared_error, bits

    def loss(self, h, mean, log_std):
        """The sum of both terms, as the authors do, at N random times per position -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)     # (N, P, L)
        t = torch.randint(1000, z.shape[:2], device=z.device)      # (N, P)
        squared_error, bits = self.terms(z, torch.randn_like(z), t, h)
        return (squared_error + bits).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals steps back from noise
        (n, ..., L)."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        schedule = self.sample_schedule
        # i counts the steps of this chain; the network is told which of the 1000 it is.
        for i, step in reversed(list(enumerate(self.sample_steps))):
            t = torch.full(shape[:-1], step, device=h.device)
            predicted, v = self(x, t, h).chunk(2, dim=-1)
            z = schedule.predict_z(x, predicted, i).clamp(-10, 10)    # t = 999 divides by 5e-5
            x = schedule.posterior_mean(z, x, i)
            if i > 0:
                x = x + (schedule.log_variance(v, i) / 2).exp() * torch.randn_like(x)
        return x


HEADS = {"energy": EnergyHead, "flow": FlowHead, "diffusion": DiffusionHead}


# --- What everything costs -----------------------------------------------------------------


def flops_per_token(config, autoencoder_config=None):
    """FLOPs per token as the paper counts them (table 1).

    config: an AutoencoderConfig, an ARConfig, or a CALMConfig with the config of its autoencoder
    -> {"train": x, "inference": x}, and for some also the forward pass of each part, by name.

    A multiply-add is two FLOPs. Attention counts as if every position saw the whole context.
    Training costs three forward passes. What a chunk costs is shared by its K tokens. Inference is
    at T = 1, with one sample per chunk; each more, for a lower temperature, adds "candidate".
    """
    with torch.device("meta"):   # tensors of shapes without numbers: nothing is computed
        if isinstance(config, AutoencoderConfig):
            return autoencoder_flops(config)
        if isinstance(config, ARConfig):
            return ar_flops(config)
        return calm_flops(config, autoencoder_config)


def count_flops(function, *inputs):
    """FLOPs of function(*inputs)."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def autoencoder_flops(config):
    K = config.chunk_size
    model = Autoencoder(config)
    encode = count_flops(model.encode, torch.zeros(1, K).long()) / K
    decode = count_flops(model.decode, torch.zeros(1, config.latent_dim)) / K
    return {"train": 3 * (encode + decode), "inference": encode + decode,
            "encode": encode, "decode": decode}


def ar_flops(config):
    T = config.block_size
    model = AR(config).to("meta")   # the rotary tables, too
    hidden = count_flops(model.hidden, torch.zeros(1, T).long()) / T
    logits = count_flops(model.lm_head, torch.zeros(1, config.n_embd))
    return {"train": 3 * (hidden + logits), "inference": hidden + logits}


def calm_flops(config, autoencoder_config):
    K = config.chunk_size
    tokens = torch.zeros(1, config.block_size * K).long()          # a whole context
    h = torch.zeros(1, config.n_embd)                              # a hidden state
    autoencoder = autoencoder_flops(autoencoder_config)
    # A slow head needs up to 100 evaluations of its network: counting two, and halving, is quicker.
    evals = min(config.num_evals, 2)
    model = CALM(replace(config, num_evals=evals), Autoencoder(autoencoder_config)).to("meta")

    inputs = count_flops(model.inputs, tokens) / tokens.numel()
    hidden = count_flops(model.hidden, tokens) / tokens.numel()    # inputs and Transformer
    one = count_flops(model.head.sample, h, 1) / evals / K
    samples = count_flops(model.head.sample, h, config.num_samples) / evals / K
    aux = count_flops(model.aux, h) / model.aux_every / K if config.aux_weight > 0 else 0.0

    return {"train": 3 * (hidden + samples + aux) + autoencoder["encode"],
            "inference": hidden + config.num_evals * one + autoencoder["decode"],
            "candidate": config.num_evals * one + autoencoder["decode"],
            "inputs": inputs, "transformer": hidden - inputs, "samples": samples, "aux": aux,
            "encode": autoencoder["encode"]}


# --- Run it: one line of text through the forward half of a training step ------------------

TEXT = b"def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"


@torch.no_grad()
def show_step(model, chunks):
    """Print each thing that a training step on chunks (1, T+1, K) makes, and what it costs."""
    c = model.config
    x = model.inputs(chunks[:, :-1].flatten(1))                    # (1, T, D)
    h = model.transformer(x)                                       # (1, T, D)
    z = model.head.sample(h[0], c.num_samples)                     # (N, T, L)
    mean, log_std = model.autoencoder.encode(chunks[0, 1:])        # (T, L) each
    y = posterior_samples(mean, log_std, c.num_targets)            # (M, T, L)
    score = energy_score(z, y, c.alpha)                            # (T,)

    flops = flops_per_token(c, model.autoencoder.config)
    rows = [(f"text in chunks of K = {c.chunk_size} tokens", chunks[0], "section 2", 0),
            ("x: an input vector for each but the last", x[0], "section 3.3", 3 * flops["inputs"]),
            ("h: hidden states", h[0], "section 3.3", 3 * flops["transformer"]),
            ("z: N samples of each next vector", z, "section 3.2", 3 * flops["samples"]),
            ("mean, log_std: each true chunk's posterior", mean, "section 2.2", flops["encode"]),
            ("y: M samples of that posterior", y, "equation 12", 0),
            ("energy loss at each position", score, "equation 12", 0)]
    if c.aux_weight > 0:
        rows.append(("auxiliary targets, a softmax for each", chunks[0, 1:], "ours",
                     3 * flops["aux"]))
    print(f"{'step':44}{'shape':16}{'paper':13}of training FLOPs")
    for step, value, paper, cost in rows:
        share = f"{cost / flops['train']:6.1%}" if cost else ""
        print(f"{step:44}{str(tuple(value.shape)):16}{paper:13}{share}".rstrip())

    metrics = model.loss(chunks.flatten(1))[1]
    print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"FLOPs per token: training {flops['train']:.3e}, inference {flops['inference']:.3e}")


def main():
    from pathlib import Path

    from data.checkpoint import DEFAULT_RUN, load_tokenizer
    from data.console import clean_end
    from data.prepare import encode, get_tokenizer
    from sample import load_model, show
    from train import make_model, parse_args

    with clean_end():
        torch.manual_seed(0)
        if Path(DEFAULT_RUN, "calm.pt").is_file():
            model, checkpoint = load_model(DEFAULT_RUN, "calm")
            tokenizer = load_tokenizer(checkpoint)
        else:
            print("random weights, whose samples are all zero: `python train.py` trains some\n")
            model = make_model("calm", parse_args(["--preset", "nano", "--device", "cpu"])).eval()
            tokenizer = get_tokenizer("bytes")

        K = model.chunk_size
        T = min(model.config.block_size, 18)                       # chunks to read, before the last
        text = encode(tokenizer, TEXT * K)[:(T + 1) * K]           # long enough for any K
        chunks = torch.tensor(text).view(1, T + 1, K)
        show_step(model, chunks)

        with torch.no_grad():
            h = model.hidden(chunks[:, :-1].flatten(1))[:, -1]     # (1, D)
            draws = model.sample_chunks(h, 6)[:, 0]                # (6, K)
        texts = [repr(show(tokenizer, chunk.tolist())) for chunk in draws]
        print(f"\nsix draws of the last chunk: {' '.join(texts)}\n"
              f"the last chunk itself:       {show(tokenizer, chunks[0, -1].tolist())!r}")


if __name__ == "__main__":
    main()
