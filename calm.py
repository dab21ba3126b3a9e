"""
CALM (arXiv 2510.27688): a language model that predicts the next vector, not the next token.

A training step in five lines (`python calm.py` takes a line of text through them):

    chunks of K tokens        -> one input vector each       CALM.inputs
    input vectors             -> hidden states h_t           Transformer
    h_t and noise             -> N samples z of a vector     EnergyHead.sample
    the true chunk t+1        -> M samples y of its vector   the frozen encoder's Gaussian
    the samples z and y       -> loss                        energy_score

Read it from here to AR, the token-by-token baseline. Two slower heads and costs come after.

Shapes: B sequences, T chunks in a sequence, K tokens in a chunk, V vocabulary, D width, N samples
of the head, M samples of the posterior, L numbers in a chunk's vector, P positions (B and T
flattened), nh attention heads of width hs. tokens (B, T*K), chunks (B, T, K), h (B, T, D), z
(..., L). Layers have the names that they have in the authors' checkpoints.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (Autoencoder, AutoencoderConfig, RMSNorm, SwiGLU, init_weights,
                         posterior_samples)   # draws from the encoder's Gaussian


@dataclass
class CALMConfig:
    """Sizes of a CALM. The defaults are the paper's CALM-S, except the vocabulary: bytes.
    Presets in train.py have others, also for N, M, alpha; its --help shows these comments."""
    vocab_size: int = 257     # V: 256 bytes and end-of-text
    chunk_size: int = 4       # K: tokens in a chunk
    latent_dim: int = 128     # L: size of a chunk's vector
    n_embd: int = 768         # D: width
    n_ff: int = 2048          # width of the SwiGLU
    n_layer: int = 12         # blocks of the Transformer
    n_head: int = 16          # attention heads
    n_head_layer: int = 3     # blocks of the generative head; in the paper n_layer / 4
    n_noise: int = 64         # size of the energy head's noise
    block_size: int = 2048    # context in chunks
    num_samples: int = 8      # N: samples of the head per position in training
    num_targets: int = 100    # M: samples of the posterior per position
    alpha: float = 1.0        # exponent of the energy score, in (0, 2)
    input_mode: Literal["discrete", "continuous", "both"] = "discrete"   # tokens, latents, both
    head: str = "energy"      # generative head, a name in HEADS
    num_evals: int = 0        # network calls a sample takes; 0: 20 (flow), 100 (diffusion)
    aux_weight: float = 0.0   # weight of CALM.auxiliary_loss: ours, not the paper's


@dataclass
class ARConfig:
    """Sizes of the token-by-token baseline. The defaults are the paper's Transformer-S."""
    vocab_size: int = 257     # V
    n_embd: int = 768         # D
    n_ff: int = 2048
    n_layer: int = 12
    n_head: int = 16
    block_size: int = 2048    # context in tokens


# --- The Transformer (section 3.3), which is LLaMA's ---


def rotary_tables(head_dim, positions, theta=10000.0):
    """cos and sin of position * frequency, (positions, hs) each, as for LLaMA's rotate_half."""
    # On the CPU even where a model is made on "meta" (sample.py): no checkpoint has these.
    frequency = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    angle = torch.outer(torch.arange(positions, device="cpu").float(), frequency)
    angle = angle.repeat(1, 2)  # (positions, hs)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + hs/2}) of x (B, nh, T, hs) by the angle of its position."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class KVCache:
    """Keys and values of the positions so far. Memory is taken once, in full."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0     # filled positions; Transformer.forward moves it; set it lower to forget
        self.layers = {}    # layer -> keys and values (2, B, nh, block_size, hs)

    def write(self, layer, k, v):
        """Append k, v (B, nh, T, hs) -> all keys and all values so far (B, nh, end, hs)."""
        if layer not in self.layers:
            B, nh, _, hs = k.shape
            self.layers[layer] = k.new_zeros(2, B, nh, self.block_size, hs)
        end = self.length + k.shape[2]
        self.layers[layer][..., self.length:end, :] = torch.stack([k, v])
        return self.layers[layer][..., :end, :]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        if D % (2 * config.n_head) != 0:   # each head turns pairs: its width is even
            raise ValueError(f"n_embd {D} must be a multiple of 2 n_head = {2 * config.n_head}")
        self.layer = layer
        self.n_head = config.n_head
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, D), cos and sin (T, hs) -> (B, T, D)."""
        heads = (self.n_head, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        q = rotate(q, cos, sin).type_as(v)                 # cos and sin are float32
        k = rotate(k, cos, sin).type_as(v)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)           # (B, nh, end, hs)
        # Either x is all positions so far, or one new position, which may look at them all.
        T = q.shape[2]
        end = k.shape[2]
        assert T in (1, end), "a cache takes a whole prompt, then one position at a time"
        x = F.scaled_dot_product_attention(q, k, v, is_causal=(T == end))
        return self.o_proj(x.transpose(1, 2).flatten(-2))  # (B, T, D)


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
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd, eps=1e-6)
        cos, sin = rotary_tables(config.n_embd // config.n_head, config.block_size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, cache=None):
        """x (B, T, D) -> h (B, T, D). With a cache, x goes on where the cache ends."""
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        assert end <= len(self.cos), f"{end} positions, but the context is {len(self.cos)}"
        for layer in self.layers:
            x = layer(x, self.cos[start:end], self.sin[start:end], cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)


# --- The energy head (section 3.2) ---


class EnergyBlock(nn.Module):
    """x + down_proj(silu(g) * u), with g and u the halves of MLP([LayerNorm(x), c])."""

    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(),
                                     nn.Linear(D, 2 * D))
        self.down_proj = nn.Linear(D, D)

    def forward(self, x, c):
        """x (N, ..., D), one per sample; c (..., D), the condition, one for all N samples."""
        # W [norm(x), c] + b = W_x norm(x) + W_c c + b, where W_c c + b is made once for all N.
        first = self.linears[0]
        W_x, W_c = first.weight.chunk(2, dim=1)          # (D, D) each
        mixed = F.linear(self.in_ln(x), W_x) + F.linear(c, W_c, first.bias)
        g, u = self.linears[1:](mixed).chunk(2, dim=-1)  # (N, ..., D) each
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
    """Draws the next vector, from h_t and noise. A head has two methods: loss and sample."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.noise_embd = nn.Linear(config.n_noise, D)
        self.norm_noise = nn.LayerNorm(D, eps=1e-6)
        self.hidden_embd = nn.Linear(D, D)
        self.norm_hidden = nn.LayerNorm(D, eps=1e-6)
        self.mlp_blocks = nn.ModuleList([EnergyBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = FinalLayer(D, config.latent_dim)
        self.apply(init_weights)
        nn.init.zeros_(self.final_layer.linears[2].weight)  # at first z is 0, whatever the noise

    def sample(self, h, n, noise=None, noise_scale=1.0):
        """n samples given h (..., D) -> z (n, ..., L).

        noise (n, ..., n_noise): uniform in [-0.5, 0.5], drawn here unless given. noise_scale,
        0 to 1, is ours: in x + f(LayerNorm(x), c) it leaves f as it is, but makes the noise in x
        smaller. The text gets likelier and less varied, as at a low temperature, for free.
        """
        if noise is None:
            noise = torch.rand(n, *h.shape[:-1], self.config.n_noise, device=h.device) - 0.5
        x = noise_scale * self.norm_noise(self.noise_embd(noise))  # (n, ..., D)
        c = self.norm_hidden(self.hidden_embd(h))  # (..., D)
        for block in self.mlp_blocks:
            x = block(x, c)
        return self.final_layer(x)                 # (n, ..., L)

    def loss(self, h, mean, log_std):
        """Equation 12: h (P, D); mean, log_std (P, L) of the next chunk's posterior -> (P,).

        The gradient flows through the samples: from the score into each z, and from z into
        the weights of the head. So it needs no likelihood.
        """
        z = self.sample(h, self.config.num_samples)  # (N, P, L)
        y = posterior_samples(mean, log_std, self.config.num_targets)  # (M, P, L)
        return energy_score(z, y, self.config.alpha)


def energy_score(z, y, alpha=1.0):
    """The energy loss of samples z (N, P, L) for targets y (M, P, L) -> (P,) (equation 12):

        2/(N M) sum_{n,m} |z_n - y_m|^alpha  -  1/(N (N-1)) sum_{n != i} |z_n - z_i|^alpha

    The first term pulls the samples to the targets, the second keeps them apart. Why this
    trains a distribution: its mean, less a constant, is, where z', y' are other draws,

        2 E|z - y|^alpha - E|z - z'|^alpha - E|y - y'|^alpha,

    the energy distance between the distributions of z and of y: for 0 < alpha < 2 at least 0,
    and 0 only if the two are equal. One position shows one next chunk, but similar h stand
    before different chunks: over the text y is distributed over all chunks that can follow h.
    """
    N = len(z)
    with torch.autocast(z.device.type, enabled=False):
        z = z.float().transpose(0, 1)                       # (P, N, L)
        y = y.float().transpose(0, 1)                       # (P, M, L)
        to_targets = distances(z, y, alpha).mean((1, 2))    # (P,)
        pairs = distances(z, z, alpha).triu(1).sum((1, 2))  # (P,): each pair once
        return 2 * to_targets - 2 * pairs / (N * (N - 1))


def distances(x, y, alpha):
    """|x_n - y_m|^alpha: x (P, N, L), y (P, M, L) -> (P, N, M).

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is one baddbmm: no (P, N, M, L) is built. Its price:
    distances below |x| / 1000 are inaccurate; those below 1e-5 count as 1e-5, with gradient 0.
    """
    x2 = torch.linalg.vector_norm(x, dim=-1) ** 2  # (P, N), less memory than x ** 2
    y2 = torch.linalg.vector_norm(y, dim=-1) ** 2  # (P, M)
    squares = torch.baddbmm(x2[:, :, None] + y2[:, None, :], x, y.transpose(1, 2), alpha=-2)
    return squares.clamp_min(1e-10) ** (alpha / 2)


# --- The two models, over chunks and over tokens ---


class CALM(nn.Module):
    """Reads chunks, draws the vector of the next one, decodes it by the autoencoder."""

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
        if config.input_mode != "discrete":                   # the paper's ablation
            self.latent_proj = nn.Linear(config.latent_dim, D)
        self.transformer = Transformer(config)
        if config.aux_weight > 0:                             # ours: see auxiliary_loss
            self.aux = nn.Linear(D, K * config.vocab_size)
        self.apply(init_weights)                              # all of the above
        self.head = HEADS[config.head](config)                # (below) initialises itself
        self.autoencoder = autoencoder.requires_grad_(False)  # frozen

    def train(self, mode=True):
        """As nn.Module.train, but the frozen autoencoder always stays in eval mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def inputs(self, tokens):
        """tokens (B, T*K) -> a vector for each chunk (B, T, D), from token embeddings (section
        3.3). The paper found the autoencoder's vectors to be a worse input."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))  # (B, T, K)
        if self.config.input_mode != "discrete":
            return self.latent_inputs(chunks)
        return self.embed_proj(self.embed_tokens(chunks).flatten(-2))  # (B, T, K*D) -> (B, T, D)

    def hidden(self, tokens, cache=None):
        """tokens (B, T*K) -> h (B, T, D): h_t has read chunks up to t, and predicts t+1."""
        return self.transformer(self.inputs(tokens), cache)

    def loss(self, tokens):
        """tokens (B, (T+1)*K) -> loss, metrics: chunk t+1 from h_t, at P = B*T positions."""
        K = self.chunk_size
        h = self.hidden(tokens[:, :-K]).flatten(0, 1)     # (P, D)
        targets = tokens[:, K:].reshape(-1, K)            # (P, K): the chunks to come
        mean, log_std = self.autoencoder.encode(targets)  # (P, L) each: their posteriors
        head_loss = self.head.loss(h, mean, log_std).mean()
        loss = head_loss
        if self.config.aux_weight > 0:
            loss = head_loss + self.config.aux_weight * self.auxiliary_loss(h, targets)
        return loss, {"loss": loss.detach(), "head_loss": head_loss.detach()}

    forward = loss   # what torch.compile and DistributedDataParallel call

    def sample_chunks(self, h, n, noise_scale=1.0):
        """n next chunks given each h (..., D) -> tokens (n, ..., K)."""
        scale = {} if noise_scale == 1 else {"noise_scale": noise_scale}   # others take none
        return self.autoencoder.tokens(self.head.sample(h, n, **scale))

    def latent_inputs(self, chunks):
        """The paper's ablation: chunks (B, T, K) -> (B, T, D), from the chunks' vectors, with
        input_mode "both" also from their token embeddings."""
        mean, _ = self.autoencoder.encode(chunks)  # (B, T, L)
        x = self.latent_proj(mean)                 # (B, T, D)
        if self.config.input_mode == "both":
            x = x + self.embed_proj(self.embed_tokens(chunks).flatten(-2))
        return x

    def auxiliary_loss(self, h, targets):
        """Ours, not the paper's, in training: h (P, D) also predicts each token of the next
        chunk, targets (P, K), by a softmax -> mean cross-entropy in nats. With a large
        vocabulary at fewer positions, which bounds the memory of the logits."""
        every = math.ceil(self.config.vocab_size / 4096)
        logits = self.aux(h[::every]).unflatten(-1, (self.chunk_size, -1)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets[::every].flatten())


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
        logits = self.lm_head(self.hidden(tokens[:, :-1])).float()  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"loss": loss.detach()}

    forward = loss

    def sample_chunks(self, h, n, temperature=1.0):
        """n next tokens, chunks of one, given each h (B, D) -> tokens (n, B, 1)."""
        p = (self.lm_head(h).float() / temperature).softmax(-1)  # (B, V)
        return torch.multinomial(p, n, replacement=True).T[..., None]


# --- Two slower heads, for comparison (section 3.2, figure 8): to be skipped at first ---


class AdaLNBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), all three made from c."""

    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x, c):
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class TimeNet(nn.Module):
    """(x_t, t, h) -> `out` numbers: the network of FlowHead and DiffusionHead, designed for MAR,
    a generator of images without vector quantisation (Li et al., 2024)."""

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
        # First weights as the authors': no block does anything, and the output is zero.
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
        angle = t[..., None] * frequency  # (..., 128)
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        c = time + self.cond_embed(h)     # the condition (..., D)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x).float()


class FlowHead(TimeNet):
    """Flow matching: a velocity carries noise x_0 to z along the line x_t = (1 - t) x_0 + t z."""

    def __init__(self, config):
        super().__init__(config, config.latent_dim)
        self.steps = max(1, (config.num_evals or 20) // 2)  # a step calls the network twice

    def velocity(self, x, t, h):
        """t (...) is in [0, 1]; the network gets floor(1000 t), as the authors' does."""
        return self(x, (1000 * t).floor(), h)

    def loss(self, h, mean, log_std):
        """Mean squared error of the velocity z - x_0 at N random times -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)  # (N, P, L)
        x_0 = torch.randn_like(z)
        t = torch.rand(z.shape[:2], device=z.device)  # (N, P)
        x_t = torch.lerp(x_0, z, t[..., None])
        error = self.velocity(x_t, t, h) - (z - x_0)  # (N, P, L)
        return error.square().mean(-1).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by midpoint steps from noise."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        times = torch.linspace(0, 1, self.steps + 1, device=h.device)
        for t, step in zip(times[:-1], times.diff()):
            middle = x + step / 2 * self.velocity(x, t.expand(shape[:-1]), h)
            x = x + step * self.velocity(middle, (t + step / 2).expand(shape[:-1]), h)
        return x


class DiffusionHead(TimeNet):
    """Diffusion: noise becomes z step by step, t = 999 .. 0, where

        x_t = sqrt(a_t) z + sqrt(1 - a_t) noise

    and a_t (alpha_bar) falls from about 1 to about 0. The network predicts the noise in x_t and,
    between two bounds, the log-variance of a step back (Nichol and Dhariwal, 2021).
    """

    def __init__(self, config):
        super().__init__(config, 2 * config.latent_dim)
        # The cosine schedule: a_t falls as cos^2, but no step has a beta above 0.999.
        time = torch.arange(1001, dtype=torch.float64, device="cpu") / 1000
        angle = (time + 0.008) / 1.008 * math.pi / 2
        beta = (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp_max(0.999)
        self.register_buffer("alpha_bar", (1 - beta).cumprod(0), persistent=False)  # (1000,)

    def predict_z(self, x_t, noise, a):
        """Solve x_t = sqrt(a) z + sqrt(1 - a) noise for z: x_t, noise (..., L), a (..., 1)."""
        return (x_t - (1 - a).sqrt().float() * noise) / a.sqrt().float()

    def step_back(self, z, x_t, v, a, a_before):
        """The Gaussian q(x_{t-1} | x_t, z) -> its mean (..., L), its log-variance (..., L).

        a, a_before (..., 1), in float64: a_t and a_{t-1}, or, in a chain that takes only some
        of the steps, that of the step before. v (..., L), from the network: at -1 the
        log-variance is that of q above, at 1 that of the step forward, log beta.
        """
        beta = 1 - a / a_before                     # variance of q(x_t | x_{t-1})
        z_weight = a_before.sqrt() * beta / (1 - a)
        x_weight = (1 - beta).sqrt() * (1 - a_before) / (1 - a)
        mean = z_weight.float() * z + x_weight.float() * x_t

        variance = beta * (1 - a_before) / (1 - a)  # of the posterior
        # At t = 0 it is 0, which has no logarithm: that of t = 1 takes its place.
        a_0, a_1 = self.alpha_bar[:2]
        variance = variance.clamp_min((1 - a_1 / a_0) * (1 - a_0) / (1 - a_1))
        return mean, torch.lerp(variance.log().float(), beta.log().float(), (v + 1) / 2)

    def terms(self, z, noise, t, h):
        """Both parts of the loss at times t (...), averaged over L -> (...), (...).

        The first is the squared error of the predicted noise. The second, in bits, is the KL
        divergence of the step back. It trains the variance alone: its noise is detached.
        """
        a = self.alpha_bar[t][..., None]                 # (..., 1)
        a_before = F.pad(self.alpha_bar, (1, 0), value=1.0)[t][..., None]
        x_t = a.sqrt().float() * z + (1 - a).sqrt().float() * noise
        predicted, v = self(x_t, t, h).chunk(2, dim=-1)  # (..., L) each
        squared_error = (noise - predicted).square().mean(-1)

        # The step back: as the network makes it, and as it is in truth.
        predicted_z = self.predict_z(x_t, predicted.detach(), a)
        mean, log_variance = self.step_back(predicted_z, x_t, v, a, a_before)
        true_mean, true_log_variance = self.step_back(z, x_t, -torch.ones_like(v), a, a_before)
        kl = (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
              + (true_mean - mean) ** 2 / log_variance.exp()) / 2
        # At t = 0 the step back ends at z: its negative log-likelihood.
        nll = (math.log(2 * math.pi) + log_variance + (z - mean) ** 2 / log_variance.exp()) / 2
        bits = torch.where((t == 0)[..., None], nll, kl).mean(-1) / math.log(2)
        return squared_error, bits

    def loss(self, h, mean, log_std):
        """The sum of both terms, as the authors do, at N random times -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)  # (N, P, L)
        t = torch.randint(1000, z.shape[:2], device=z.device)  # (N, P)
        squared_error, bits = self.terms(z, torch.randn_like(z), t, h)
        return (squared_error + bits).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals of the 1000 steps, evenly
        spaced, from noise (n, ..., L)."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        steps = torch.linspace(999, 0, self.config.num_evals or 100).round().long()
        a = F.pad(self.alpha_bar[steps], (0, 1), value=1.0)  # at the end x is z
        for i, step in enumerate(steps):
            t = step.to(h.device).expand(shape[:-1])
            predicted, v = self(x, t, h).chunk(2, dim=-1)
            z = self.predict_z(x, predicted, a[i]).clamp(-10, 10)  # t = 999 divides by 5e-5
            x, log_variance = self.step_back(z, x, v, a[i], a[i + 1])
            if i + 1 < len(steps):
                x = x + (log_variance / 2).exp() * torch.randn_like(x)
        return x


HEADS = {"energy": EnergyHead, "flow": FlowHead, "diffusion": DiffusionHead}


# --- What everything costs ---


def flops_per_token(config, autoencoder_config=None):
    """FLOPs per token as the paper counts them (table 1) -> {"train": x, "inference": x}.

    config: an AutoencoderConfig, an ARConfig, or a CALMConfig with that of its autoencoder. A
    multiply-add is two FLOPs. Attention counts as if every position saw the whole context.
    Training costs three forward passes. Inference is at temperature 1: one sample per chunk.
    """
    with torch.device("meta"):   # tensors of shapes without numbers: nothing is computed
        if isinstance(config, AutoencoderConfig):
            encode, decode = autoencoder_flops(config)
            return {"train": 3 * (encode + decode), "inference": encode + decode}
        if isinstance(config, ARConfig):
            model = AR(config).to("meta")   # the rotary tables, too
            forward = count_flops(model.loss, torch.zeros(1, config.block_size + 1).long())
            forward /= config.block_size
            return {"train": 3 * forward, "inference": forward}

        encode, decode = autoencoder_flops(autoencoder_config)
        model = CALM(config, Autoencoder(autoencoder_config)).to("meta")
        chunks = torch.zeros(config.block_size, config.chunk_size).long()  # a context
        hidden = count_flops(model.hidden, chunks.view(1, -1)) / chunks.numel()
        aux = 0.0
        if config.aux_weight > 0:
            h = torch.zeros(config.block_size, config.n_embd)
            aux = count_flops(model.auxiliary_loss, h, chunks) / config.block_size

    head = HEADS[config.head](config)   # with numbers: a head of your own may look at them
    h = torch.zeros(1, config.n_embd)   # one position
    mean = torch.zeros(1, config.latent_dim)
    loss = (count_flops(head.loss, h, mean, mean) + aux) / config.chunk_size
    sample = count_flops(head.sample, h, 1) / config.chunk_size
    # `hidden` counts as 3 encoder passes for inputs, but 1 is run: 2 less. Targets: 1 more.
    frozen = encode if config.input_mode == "discrete" else encode - 2 * encode
    return {"train": 3 * (hidden + loss) + frozen, "inference": hidden + sample + decode}


def count_flops(function, *inputs):
    """FLOPs of function(*inputs)."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def autoencoder_flops(config):
    """FLOPs per token of encode and of decode."""
    K = config.chunk_size
    model = Autoencoder(config)
    encode = count_flops(model.encode, torch.zeros(1, K).long()) / K
    decode = count_flops(model.decode, torch.zeros(1, config.latent_dim)) / K
    return encode, decode


# --- Run it: the shapes of a training step ---


@torch.no_grad()
def main():
    torch.manual_seed(0)
    sizes = dict(chunk_size=4, latent_dim=32, n_embd=128)
    autoencoder = Autoencoder(AutoencoderConfig(**sizes, n_ff=64))
    config = CALMConfig(**sizes, n_ff=344, n_layer=4, n_head=2, n_head_layer=1, block_size=128)
    model = CALM(config, autoencoder).eval()   # untrained

    text = b"def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"
    tokens = torch.tensor([list(text)])
    chunks = tokens.unflatten(1, (-1, 4))
    x = model.inputs(tokens[:, :-4])
    h = model.transformer(x)
    z = model.head.sample(h[0], config.num_samples)
    mean, log_std = autoencoder.encode(chunks[0, 1:])
    y = posterior_samples(mean, log_std, config.num_targets)
    loss = energy_score(z, y, config.alpha)

    for step, value, shape in [
            ("text in chunks of K = 4 tokens", chunks, "(1, T+1, K)"),
            ("x: an input vector for each but the last", x, "(1, T, D)"),
            ("h: hidden states", h, "(1, T, D)"),
            ("z: N samples of each next vector", z, "(N, T, L)"),
            ("mean, log_std: each true chunk's posterior", mean, "(T, L)"),
            ("y: M samples of that posterior", y, "(M, T, L)"),
            ("energy loss at each position", loss, "(T,)")]:
        print(f"{step:44} {shape:12} {tuple(value.shape)}")


if __name__ == "__main__":
    main()
