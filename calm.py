"""
CALM: a language model that predicts the next vector in place of the next token (arXiv 2510.27688).

A training step in five lines (`python calm.py` takes a line of text through them, and prints each shape):

    chunks of K tokens      -> one input vector each     (CALM.inputs)
    input vectors           -> hidden states h_t         (Transformer)
    h_t and noise           -> N samples of z_{t+1}      (EnergyHead: one step, no likelihood)
    chunk t+1               -> M samples of z_{t+1}      (the frozen autoencoder's posterior)
    the two sets of samples -> loss                      (energy_score)

Shapes: B sequences, T chunks in a sequence, K tokens in a chunk, V vocabulary, D width, L latent size,
N head samples, M target samples, P positions (B and T flattened), nh attention heads of width hs.
tokens (B, T*K), chunks (B, T, K), h (B, T, D), z (..., L). Layers are named as in the authors' checkpoints.
"""
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (Autoencoder, AutoencoderConfig, RMSNorm, SwiGLU, check, check_numbers, init_weights,
                         posterior_samples)
from data.checkpoint import DEFAULT_RUN, cast_matrices, load_checkpoint, load_tokenizer, read_official
from data.prepare import encode, fail, get_tokenizer, script

warnings.filterwarnings("ignore", "TensorFloat32")   # torch.compile advises it: too coarse for `distances`

@dataclass
class CALMConfig:
    vocab_size: int = 257          # V: bytes and end-of-text
    chunk_size: int = 4            # K: tokens in a chunk
    latent_dim: int = 128          # L: size of a chunk's vector
    n_embd: int = 768              # D: width
    n_ff: int = 2048               # width of the SwiGLU
    n_layer: int = 12              # blocks of the Transformer
    n_head: int = 16               # attention heads
    n_head_layer: int = 3          # blocks of the generative head; the paper takes n_layer / 4
    n_noise: int = 64              # size of the generative head's noise
    block_size: int = 2048         # context in chunks
    num_samples: int = 8           # N: head samples a position in training
    num_targets: int = 100         # M: target samples a position
    alpha: float = 1.0             # exponent of the energy score, in (0, 2)
    input_mode: Literal["discrete", "continuous", "both"] = "discrete"   # reads embeddings, latents, both
    head: str = "energy"           # generative head, a name in HEADS
    num_evals: int = 0             # evaluations of it a sample; 0: as many as the paper takes
    aux_weight: float = 0.0        # departure: weight of the auxiliary loss, see CALM.loss; 0: none

    def __post_init__(self):
        check_backbone(self)
        check(self.head in HEADS, f"head must be one of {', '.join(HEADS)}, not {self.head!r}")
        head = HEADS[self.head]
        self.num_evals = self.num_evals or head.default_evals
        check(self.num_evals in head.evals, f"num_evals must be in {head.evals}, not {self.num_evals}")
        check(self.num_samples > 1, f"num_samples must be at least 2, to compare, not {self.num_samples}")
        check(0 < self.alpha < 2, f"alpha must be in (0, 2), where the score is proper, not {self.alpha}")
        self.aux_every = math.ceil(self.vocab_size / 4096)   # of so many positions one has the auxiliary loss

@dataclass
class ARConfig:
    vocab_size: int = 257          # the other defaults are the paper's Transformer-S
    n_embd: int = 768
    n_ff: int = 2048
    n_layer: int = 12
    n_head: int = 16
    block_size: int = 2048         # context in tokens

    def __post_init__(self):
        check_backbone(self)

def check_backbone(config):
    check_numbers(config)
    D, heads = config.n_embd, config.n_head
    check(D % (2 * heads) == 0, f"n_embd {D} must be divisible by n_head {heads}, into an even width each")

# --- The Transformer (section 3.3), LLaMA's: RMSNorm, rotary positions, SwiGLU, no biases ---------------
def rotary_tables(head_dim, positions, theta=10000.0):
    """cos and sin of position * frequency, (positions, hs): the half-rotation layout."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)   # (hs/2,)
    angle = torch.outer(torch.arange(positions, device="cpu").float(), frequency).repeat(1, 2)   # (T, hs)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + hs/2}) of x (B, nh, T, hs) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin

class KVCache:
    """Keys and values of the positions so far, preallocated for `block_size` positions."""
    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0     # positions filled; setting it lower forgets the positions after it
        self.layers = {}    # layer -> (2, B, nh, block_size, hs)

    def write(self, layer, k, v):
        """k, v (B, nh, T, hs) -> with those before, (2, B, nh, end, hs). The Transformer moves the length."""
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(2, *k.shape[:2], self.block_size, k.shape[-1])
        end = self.length + k.shape[2]
        self.layers[layer][..., self.length:end, :] = torch.stack([k, v])
        return self.layers[layer][..., :end, :]

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x, cos, sin, cache=None, mask=None):
        """x (B, T, D), cos and sin (T, hs) -> (B, T, D). The rest is as in Transformer.forward."""
        q, k, v = (proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)   # (B, nh, T, hs)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)   # cos is float32
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                              # (B, nh, end, hs)
        causal = mask is None and q.shape[2] == k.shape[2]   # else the mask rules, or one query sees all keys
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(-2))                     # (B, T, D)

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, eps=1e-6)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x, *args):
        x = x + self.self_attn(self.input_layernorm(x), *args)
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
        T, end = x.shape[1], start + x.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} positions, but the context is {self.block_size}")
        mask = None   # whom each sees, (T, end); needed only where several go on behind others
        if start and T > 1:
            mask = torch.ones(T, end, dtype=torch.bool, device=x.device).tril(start)
        for layer in self.layers:
            x = layer(x, self.cos[start:end], self.sin[start:end], cache, mask)
        if cache is not None:
            cache.length = end
        return self.norm(x)

# --- The energy head (section 3.2): h and noise -> z, in one step ---------------------------------------
class EnergyBlock(nn.Module):
    """x + down_proj(silu(g) * u), where g, u come from a three-layer MLP on [LayerNorm(x), c]."""
    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(),
                                     nn.Linear(D, 2 * D))
        self.down_proj = nn.Linear(D, D)

    def forward(self, x, c):
        # W [a, c] = W_a a + W_c c, and W_c c is computed once: c (..., D) is the same for all N samples.
        of_x, of_c = self.linears[0].weight.chunk(2, dim=1)               # (D, D) each
        y = F.linear(self.in_ln(x), of_x) + F.linear(c, of_c, self.linears[0].bias)
        g, u = self.linears[1:](y).chunk(2, dim=-1)                       # (N, ..., D) each, of the rest
        return x + self.down_proj(F.silu(g) * u)

class EnergyHead(nn.Module):
    """Draws z_{t+1} given h_t. Two verbs, as every head: a loss (called by CALM.loss, below), a sample."""
    default_evals, evals = 1, range(1, 2)   # network evaluations a sample

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.noise_embd = nn.Linear(config.n_noise, D)
        self.norm_noise = nn.LayerNorm(D, eps=1e-6)
        self.hidden_embd = nn.Linear(D, D)
        self.norm_hidden = nn.LayerNorm(D, eps=1e-6)
        self.mlp_blocks = nn.ModuleList([EnergyBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = nn.Sequential(OrderedDict(in_ln=nn.LayerNorm(D, eps=1e-6), linears=nn.Sequential(
            nn.Linear(D, D), nn.SiLU(), nn.Linear(D, config.latent_dim))))
        self.apply(init_weights)
        nn.init.zeros_(self.final_layer.linears[2].weight)   # samples begin at 0, and part as this moves

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L). noise (n, ..., n_noise): default U[-1/2, 1/2]."""
        if noise is None:
            noise = torch.rand(n, *h.shape[:-1], self.config.n_noise, device=h.device) - 0.5   # epsilon
        x = self.norm_noise(self.noise_embd(noise))                       # (n, ..., D)
        c = self.norm_hidden(self.hidden_embd(h))                         # (..., D)
        for block in self.mlp_blocks:
            x = block(x, c)
        return self.final_layer(x)

    def loss(self, h, mean, log_std):
        """Equation 12: h (P, D); mean, log_std (P, L) of the posterior of the chunk to come -> (P,)."""
        z = self.sample(h, self.config.num_samples)                       # (N, P, L)
        y = posterior_samples(mean, log_std, self.config.num_targets)     # (M, P, L)
        return energy_score(z, y, self.config.alpha)

def energy_score(x, y, alpha=1.0):
    """The energy loss of samples x (N, P, L) for targets y (M, P, L) -> (P,), in float32 (equation 12):

        2/(N M) sum_{n,m} |x_n - y_m|^alpha  -  1/(N (N-1)) sum_{n != k} |x_n - x_k|^alpha

    An unbiased estimate of a strictly proper score (0 < alpha < 2), least exactly where x and y have the same
    distribution: the first term pulls the samples to the targets, the second keeps them apart."""
    N = len(x)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float().transpose(0, 1), y.float().transpose(0, 1)       # (P, N, L), (P, M, L)
        to_targets = distances(x, y, alpha).mean((1, 2))                  # (P,)
        pairs = 2 * distances(x, x, alpha).triu(1).sum((1, 2))            # (P,): n < k, and as many n > k
        return 2 * to_targets - pairs / (N * (N - 1))

def distances(x, y, alpha):
    """|x_n - y_m|^alpha for x (P, N, L), y (P, M, L) -> (P, N, M), as |x|^2 + |y|^2 - 2 x.y (-2 is baddbmm's
    alpha): never (P, N, M, L). The floor keeps the gradient finite (zero) where two points meet."""
    x2, y2 = (torch.linalg.vector_norm(v, dim=-1) ** 2 for v in (x, y))   # (P, N), (P, M)
    squares = torch.baddbmm(x2[:, :, None] + y2[:, None, :], x, y.transpose(1, 2), alpha=-2)
    return squares.clamp_min(1e-10) ** (alpha / 2)

# --- Two heads that take many steps (section 3.2, figure 8): a network of time t carries noise to z ----
class AdaLNBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), where the condition y gives shift, scale, gate."""
    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)

class TimeNet(nn.Module):
    """(x_t, t, h) -> `out` numbers: the network of both heads, the design of MAR's (Li et al., 2024)."""
    def __init__(self, config, out):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.time_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.cond_embed = nn.Linear(D, D)
        self.input_proj = nn.Linear(config.latent_dim, D)
        self.res_blocks = nn.ModuleList([AdaLNBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = nn.ModuleDict({
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)), "linear": nn.Linear(D, out)})
        self.apply(init_weights)
        for name, parameter in self.named_parameters():   # at first no block does anything; the output is 0
            if "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)

    def forward(self, x, t, h):
        """x (..., L), t (...) in 0 .. 999, h (..., D) -> (..., out), in float32"""
        frequency = 10000.0 ** (-torch.arange(128, device=x.device) / 128)
        angle = t[..., None] * frequency                                  # (..., 128)
        y = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1)) + self.cond_embed(h)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x).float()

class FlowHead(TimeNet):
    """Flow matching: a velocity carries noise x_0 to z along the straight line x_t = (1 - t) x_0 + t z."""
    default_evals, evals = 20, range(2, 1001, 2)

    def __init__(self, config):
        super().__init__(config, config.latent_dim)

    def velocity(self, x, t, h):
        return self(x, (1000 * t).floor(), h)   # the network counts time in thousandths, as the authors' does

    def loss(self, h, mean, log_std):
        """Squared error of the velocity z - x_0 at N random times a position, a mean over L -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)     # (N, P, L)
        x_0, t = torch.randn_like(z), torch.rand(z.shape[:2], device=z.device)
        x_t = torch.lerp(x_0, z, t[..., None])
        return (self.velocity(x_t, t, h) - (z - x_0)).square().mean(-1).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals / 2 midpoint steps from noise, x_0."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        times = torch.linspace(0, 1, self.config.num_evals // 2 + 1, device=h.device)
        for t, step in zip(times[:-1], times.diff()):
            middle = x + step / 2 * self.velocity(x, t.expand(shape[:-1]), h)
            x = x + step * self.velocity(middle, (t + step / 2).expand(shape[:-1]), h)
        return x

class DiffusionHead(TimeNet):
    """Diffusion: undo the noise of x_t = sqrt(a_t) z + sqrt(1 - a_t) noise step by step, t = 999 .. 0. The
    network predicts that noise and, between two bounds, each step's log-variance (Nichol, Dhariwal, 2021)."""
    default_evals, evals = 100, range(1, 1001)

    def __init__(self, config):
        super().__init__(config, 2 * config.latent_dim)
        angle = (torch.arange(1001, dtype=torch.float64, device="cpu") / 1000 + 0.008) / 1.008 * math.pi / 2
        beta = (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp_max(0.999)   # the cosine schedule
        self.a = (1 - beta).cumprod(0)                                    # (1000,): z's share of the variance
        self.times = torch.linspace(999, 0, config.num_evals, device="cpu").round().long().flip(0)
        self.register_buffer("table", self.coefficients(self.a), persistent=False)   # to train and to sample
        self.register_buffer("steps", self.coefficients(self.a[self.times]), persistent=False)

    @staticmethod
    def coefficients(a):
        """Of each step t with a_t (steps,), as rows: sqrt(a), sqrt(1 - a), the weights of z and x_t in the
        mean of q(x_{t-1} | x_t, z), the log-variances of that and of q(x_t | x_{t-1}) -> (6, steps)."""
        before = F.pad(a[:-1], (1, 0), value=1.0)                         # a_{t-1}
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a)
        variance[0] = variance[1] if len(a) > 1 else beta[0]              # the last step's is 0: no logarithm
        return torch.stack([a.sqrt(), (1 - a).sqrt(), before.sqrt() * beta / (1 - a),
                            (1 - beta).sqrt() * (1 - before) / (1 - a), variance.log(), beta.log()]).float()

    def terms(self, z, noise, t, h):
        """Both parts of the loss (...) at times t (...): the squared error of the noise, and the bits of the
        step back, through which only the variance learns."""
        root_a, root_1_a, of_z, of_x, log_low, log_high = self.table[:, t][..., None]   # (..., 1) each
        x_t = root_a * z + root_1_a * noise
        predicted, v = self(x_t, t, h).chunk(2, dim=-1)                   # (..., L) each
        log_var = torch.lerp(log_low, log_high, (v + 1) / 2)
        true_mean = of_z * z + of_x * x_t
        mean = of_z * (x_t - root_1_a * predicted.detach()) / root_a + of_x * x_t
        kl = (log_var - log_low - 1 + (log_low - log_var).exp() + (true_mean - mean) ** 2 / log_var.exp()) / 2
        nll = (math.log(2 * math.pi) + log_var + (z - mean) ** 2 / log_var.exp()) / 2   # of z, at t = 0
        bits = torch.where((t == 0)[..., None], nll, kl).mean(-1) / math.log(2)
        return (noise - predicted).square().mean(-1), bits

    def loss(self, h, mean, log_std):
        """The sum of both terms at N random times a position, a mean over L -> (P,)."""
        z = posterior_samples(mean, log_std, self.config.num_samples)     # (N, P, L)
        t = torch.randint(1000, z.shape[:2], device=z.device)
        squared_error, bits = self.terms(z, torch.randn_like(z), t, h)
        return (squared_error + bits).mean(0)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals of the 1000 steps from noise, x_999."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        x = torch.randn(shape, device=h.device) if noise is None else noise
        for i in reversed(range(len(self.times))):
            root_a, root_1_a, of_z, of_x, log_low, log_high = self.steps[:, i]
            t = torch.full(shape[:-1], int(self.times[i]), device=h.device)
            predicted, v = self(x, t, h).chunk(2, dim=-1)
            z = ((x - root_1_a * predicted) / root_a).clamp(-10, 10)   # root_a is 5e-5 at first: errors grow
            x = of_z * z + of_x * x
            if i:
                log_var = torch.lerp(log_low, log_high, (v + 1) / 2)
                x = x + (log_var / 2).exp() * torch.randn_like(x)
        return x

HEADS = {"energy": EnergyHead, "flow": FlowHead, "diffusion": DiffusionHead}

# --- Temperature without likelihoods (section 5) --------------------------------------------------------
def temperature_batch(samples, temperature):
    """Algorithm 2: of N candidates, samples (N, batch, K) of P, pick one about as from P^(1/T) / Z, T <= 1
    -> tokens (batch, K).
    With s = 1/T = n, a chunk seen c times has C(c, n) ways of being drawn n times running, which is what
    P^n weighs. If none was seen n times, the algorithm tries n - 1, n - 2, ...: s is cut to the largest c.
    For any T, C comes from the Gamma function, C(c, s) = G(c+1) / (G(s+1) G(c-s+1)) for c from floor(s) on,
    and grows as c^s: the choice goes to P^s with N. Each of a chunk's c copies carries C(c, s) / c."""
    count = counts(samples).float()                                       # c of each copy's chunk, (N, batch)
    s = count.amax(0).clamp_max(1 / temperature)                          # (batch,)
    log_ways = (count + 1).lgamma() - (count - s + 1).lgamma() - count.log()   # G(s+1) is the same for all
    log_ways = log_ways.masked_fill(count < s.floor(), -math.inf)
    pick = torch.multinomial(log_ways.softmax(0).T, 1).squeeze(1)         # (batch,)
    return samples[pick, torch.arange(samples.shape[1], device=samples.device)]

def counts(samples):
    """How often the chunk of each sample occurs among the N of its row: (N, batch, K) -> (N, batch)."""
    key = samples[..., 0].T.contiguous()
    for k in range(1, samples.shape[2]):
        key = key * 1_000_003 + samples[..., k].T                         # a 64-bit hash, (batch, N)
    ordered = key.sort(dim=-1).values
    return (torch.searchsorted(ordered, key, right=True) - torch.searchsorted(ordered, key)).T

def temperature_exact(draw, batch, temperature, max_calls=1_000_000):
    """Algorithm 1: draw exactly from P^(1/T) / Z with nothing but a sampler of P.
    draw(n) -> n samples of each row (n, batch, K); T in (0, 1) -> tokens (batch, K), samples used (batch,).
    1/T = n + a. n equal samples in a row are a draw from P^n. To accept it with chance P^a too, sample
    on: at sample i accept if it is the same chunk again, else start over with chance a/i (the binomial
    series P^a = sum_i P (1-P)^(i-1) prod_(j<i) (1 - a/j)). Every row walks through samples of its own; one
    that is not done after max_calls of them takes Algorithm 2's choice of 200 more."""
    n = math.floor(1 / temperature)
    a = 1 / temperature - n
    samples = draw(min(n, 256))
    candidate = chosen = torch.zeros_like(samples[0])                     # (batch, K)
    calls = age = torch.zeros(batch, dtype=torch.long, device=chosen.device)   # age: samples of this attempt
    agreed = done = torch.zeros_like(calls, dtype=torch.bool)
    while True:
        for x in samples:                                                 # (batch, K)
            active = ~done & (calls < max_calls)
            calls, age = calls + active, age + 1
            candidate = torch.where((age == 1)[:, None], x, candidate)
            equal = (x == candidate).all(-1)
            agreed = (agreed | (age == 1)) & equal                        # all of the first part, so far
            i = age - n                                                   # above 0: in the second part
            accept = active & equal & (i > 0) if a else active & agreed & (i == 0)
            chosen, done = torch.where(accept[:, None], candidate, chosen), done | accept
            unlucky = (i > 0) & ~equal & (torch.rand(batch, device=x.device) < a / i)
            age = age.masked_fill(((i == 0) & ~agreed) | unlucky, 0)
        if (done | (calls >= max_calls)).all():
            break
        samples = draw(min(2 * len(samples), 256))   # fewer, larger calls for rows that need many
    if done.all():
        return chosen, calls
    warnings.warn(f"a chunk took over {max_calls:,} calls: drawn by Algorithm 2")   # said once
    fallback = temperature_batch(draw(200), temperature)
    return torch.where(done[:, None], chosen, fallback), calls + 200 * ~done

# --- The two models: the same Transformer, over chunks and over tokens ----------------------------------
class CALM(nn.Module):
    def __init__(self, config, autoencoder):
        super().__init__()
        c, K, D = config, config.chunk_size, config.n_embd
        for name in ("vocab_size", "chunk_size", "latent_dim"):
            ours, theirs = getattr(c, name), getattr(autoencoder.config, name)
            check(ours == theirs, f"{name} is {ours}, but the autoencoder's is {theirs}")
        self.config, self.chunk_size = c, K
        if c.input_mode != "continuous":
            self.embed_tokens = nn.Embedding(c.vocab_size, D)
            self.embed_proj = nn.Sequential(nn.Linear(K * D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D),
                                            nn.LayerNorm(D, eps=1e-6))
        if c.input_mode != "discrete":
            self.latent_proj = nn.Linear(c.latent_dim, D)
        self.transformer = Transformer(c)
        if c.aux_weight:
            self.aux = nn.Linear(D, K * c.vocab_size)
        self.apply(init_weights)
        self.head = HEADS[c.head](c)   # which initialises itself
        self.autoencoder = autoencoder.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.autoencoder.eval()   # frozen: no dropout, no masking
        return self

    def inputs(self, tokens):
        """tokens (B, T*K) -> one vector a chunk (B, T, D) (section 3.3)."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))               # (B, T, K)
        x = 0
        if self.config.input_mode != "continuous":
            x = self.embed_proj(self.embed_tokens(chunks).flatten(-2))    # (B, T, K*D) -> (B, T, D)
        if self.config.input_mode != "discrete":
            x = x + self.latent_proj(self.autoencoder.encode(chunks)[0])
        return x

    def hidden(self, tokens, cache=None):
        """tokens (B, T*K) -> h (B, T, D): h_t has seen chunks up to and with t, and predicts chunk t+1."""
        return self.transformer(self.inputs(tokens), cache)

    def loss(self, tokens):
        """tokens (B, (T+1)*K): chunk t+1 from h_t, at P = B*T positions -> scalar, metrics."""
        c, K = self.config, self.chunk_size
        h = self.hidden(tokens[:, :-K]).flatten(0, 1)                     # (P, D)
        targets = tokens[:, K:].reshape(-1, K)                            # (P, K): chunk t+1 of each h_t
        mean, log_std = (v.float() for v in self.autoencoder.encode(targets))   # (P, L): its posterior
        loss = self.head.loss(h, mean, log_std).mean()
        metrics = {c.head: loss.detach()}
        if c.aux_weight:   # ours, not the paper's: h also learns from a softmax over each of the K tokens
            logits = self.aux(h[::c.aux_every]).view(-1, c.vocab_size).float()   # (P*K, V); fewer if V > 4096
            aux = F.cross_entropy(logits, targets[::c.aux_every].flatten())
            loss, metrics["aux"] = loss + c.aux_weight * aux, aux.detach()
        return loss, {"loss": loss.detach(), **metrics}
    def forward(self, tokens):   # what torch.compile and DistributedDataParallel call
        return self.loss(tokens)

    def sample_chunks(self, h, n):
        """n next chunks given h (..., D) -> tokens (n, ..., K). In slices, which keep memory bounded."""
        at_once = max(1, 2 ** 14 * h.shape[-1] // h.numel())              # samples of each h: 2^14 vectors
        z = torch.cat([self.head.sample(h, min(at_once, n - i)) for i in range(0, n, at_once)])
        logits_at_once = 2 ** (27 if z.is_cuda else 23)   # on a CPU, what its cache holds
        rows = logits_at_once // (self.chunk_size * self.config.vocab_size) or 1
        tokens = [self.autoencoder.decode(part).argmax(-1) for part in z.flatten(0, -2).split(rows)]
        return torch.cat(tokens).view(*z.shape[:-1], self.chunk_size)

    def draw(self, h, temperature=1.0, n=1, num_candidates=200, exact=None):
        """n next chunks for each h (B, D) at a temperature (section 5) -> tokens (n, B, K). By Algorithm 2 on
        num_candidates, or by a function `exact`, used as temperature_exact."""
        if temperature == 1:
            return self.sample_chunks(h, n)
        rows = n * len(h)
        def candidates(count):
            return self.sample_chunks(h, count * n).view(count, rows, -1)
        if exact:
            return exact(candidates, rows, temperature)[0].view(n, len(h), -1)
        return temperature_batch(candidates(num_candidates), temperature).view(n, len(h), -1)

class AR(nn.Module):
    """The token-by-token baseline: the same Transformer between an embedding and a softmax."""
    def __init__(self, config):
        super().__init__()
        self.config, self.chunk_size = config, 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(init_weights)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) -> h (B, T, D)."""
        return self.transformer(self.embed_tokens(tokens), cache)

    def loss(self, tokens):
        """tokens (B, T+1): cross-entropy of token t+1 given those before, in nats -> scalar, metrics."""
        logits = self.lm_head(self.hidden(tokens[:, :-1])).float()        # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"loss": loss.detach()}
    def forward(self, tokens):   # what torch.compile and DistributedDataParallel call
        return self.loss(tokens)

    def probabilities(self, h, temperature=1.0):
        """Of the next token given h (..., D) -> (..., V), by softmax temperature."""
        return (self.lm_head(h).float() / temperature).softmax(-1)

    def draw(self, h, temperature=1.0, n=1, **unused):
        """n next tokens for each h (B, D) -> tokens (n, B, 1). CALM's other arguments are unused."""
        return torch.multinomial(self.probabilities(h, temperature), n, replacement=True).T[..., None]

# --- Cost -----------------------------------------------------------------------------------------------
def flops_per_token(config, autoencoder_config=None):
    """FLOPs a token as the paper counts them (table 1), for any of the three configs; CALM's needs its
    autoencoder's -> {"train": x, "inference": x}, and of CALM a forward pass of each part. Training is three
    forward passes, with N samples of the head, and one of the encoder; in inference the decoder follows."""
    c, K = config, getattr(config, "chunk_size", 1)
    def count(function, *inputs):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        return counter.get_total_flops() / K

    with torch.device("meta"):   # shapes without memory
        if isinstance(c, AutoencoderConfig):
            model = Autoencoder(c).to("meta")
            there = count(model.encode, torch.zeros(1, K).long())
            back = count(model.decode, torch.zeros(1, c.latent_dim))
            return {"train": 3 * (there + back), "inference": there + back, "encode": there, "decode": back}
        text, h = torch.zeros(1, c.block_size * K).long(), torch.zeros(1, c.n_embd)   # a whole context, one h
        if isinstance(c, ARConfig):
            model = AR(c).to("meta")
            forward = count(model.hidden, text) / c.block_size + count(model.lm_head, h)
            return {"train": 3 * forward, "inference": forward}
        fewest = HEADS[c.head].evals[0]   # evaluations
        model = CALM(replace(c, num_evals=fewest), Autoencoder(autoencoder_config)).to("meta")
        inputs, hidden = (count(part, text) / c.block_size for part in (model.inputs, model.hidden))
        one, several = (count(model.head.sample, h, n) / fewest for n in (1, c.num_samples))
        aux = count(model.aux, h) / c.aux_every if c.aux_weight else 0.0
        ae = flops_per_token(autoencoder_config)
    return {"train": 3 * (hidden + several + aux) + ae["encode"],
            "inference": hidden + c.num_evals * one + ae["decode"], "encode": ae["encode"],
            "inputs": inputs, "transformer": hidden - inputs, "samples": several, "aux": aux}

# --- Loading a run's checkpoint, or the authors' weights ------------------------------------------------
def load_model(out_dir, kind, device="cpu", dtype=torch.float32, **changes):
    """The "calm" or "ar" of a run -> model in eval mode, with its matrices in `dtype`, and its checkpoint.
    changes: fields of CALMConfig in place of the run's."""
    checkpoint = load_checkpoint(Path(out_dir) / f"{kind}.pt", kind)
    if kind == "ar":
        model = AR(ARConfig(**checkpoint["config"]))
    else:
        autoencoder = Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"]))
        model = CALM(CALMConfig(**checkpoint["config"] | changes), autoencoder)
    model.load_state_dict(checkpoint["model"])
    return cast_matrices(model.to(device).eval(), dtype), checkpoint

def load_official(folder, device="cpu", dtype=torch.float32, **changes):
    """A directory as the authors publish a model -> CALM in eval mode, with its matrices in `dtype`."""
    sizes, autoencoder_sizes, state = read_official(Path(folder))

    def tensors_that_fit(head):
        expected = HEADS[head](CALMConfig(**sizes, head=head)).state_dict()
        return sum(state.get(f"head.{name}", t[:0]).shape == t.shape for name, t in expected.items())
    try:
        with torch.device("meta"):   # no memory for weights that are replaced
            config = CALMConfig(**sizes | changes, head=max(HEADS, key=tensors_that_fit))
            model = cast_matrices(CALM(config, Autoencoder(AutoencoderConfig(**autoencoder_sizes))), dtype)
        ours = model.state_dict()
        model.load_state_dict({name: t.to(ours.get(name, t).dtype) for name, t in state.items()}, assign=True)
    except (RuntimeError, ValueError) as error:   # load_state_dict names the tensors that do not fit
        fail(f"{folder} is not a published CALM: {' '.join(str(error).split())[:500]}")
    return model.to(device).eval()

# --- Run it: one line of text through the forward half of a training step -------------------------------
TEXT = b"def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"
NANO = dict(n_embd=128, n_ff=344, n_layer=4, n_head=2, n_head_layer=1, block_size=128, latent_dim=32,
            num_samples=4, num_targets=32, alpha=0.5, aux_weight=0.5)   # CALM's part of train.py's preset

@script()
@torch.no_grad()
def main():
    torch.manual_seed(0)
    if Path(DEFAULT_RUN, "calm.pt").is_file():
        model, checkpoint = load_model(DEFAULT_RUN, "calm")
        tokenizer = load_tokenizer(checkpoint)
    else:
        print("random weights, whose samples are all zero: `python train.py` trains some\n")
        autoencoder = Autoencoder(AutoencoderConfig(latent_dim=NANO["latent_dim"], n_embd=128, n_ff=64))
        model, tokenizer = CALM(CALMConfig(**NANO), autoencoder).eval(), get_tokenizer("bytes")
    c, K = model.config, model.chunk_size
    text = encode(tokenizer, TEXT * K)[:(min(c.block_size, 18) + 1) * K]  # 19 chunks, if the context holds 18
    chunks = torch.tensor([text]).unflatten(1, (-1, K))                   # (1, T+1, K)
    x = model.inputs(chunks[:, :-1].flatten(1))                           # (1, T, D)
    h = model.transformer(x)                                              # (1, T, D)
    z = model.head.sample(h[0], c.num_samples)                            # (N, T, L)
    mean, log_std = model.autoencoder.encode(chunks[0, 1:])               # (T, L) each
    y = posterior_samples(mean, log_std, c.num_targets)                   # (M, T, L)
    flops = flops_per_token(c, model.autoencoder.config)
    print(f"{'step':40}{'shape':16}{'paper':13}training FLOPs")
    for step, value, paper, cost in (
            (f"text in chunks of K = {K} tokens", chunks, "section 2", 0),
            ("x: a vector for each, but the last", x, "section 3.3", 3 * flops["inputs"]),
            ("h: hidden states", h, "section 3.3", 3 * flops["transformer"]),
            ("z: N samples of each next vector", z, "section 3.2", 3 * flops["samples"]),
            ("mean, log_std: its posterior", mean, "section 2.2", flops["encode"]),
            ("y: M samples of the posterior", y, "equation 12", 0),
            ("energy loss at each position", energy_score(z, y, c.alpha), "equation 12", 0),
            ("auxiliary loss at each token of those", chunks[0, 1:], "ours", 3 * flops["aux"])):
        share = f"{cost / flops['train']:6.1%}" if cost else ""
        print(f"{step:40}{str(tuple(value.shape)):16}{paper:13}{share}")
    print(", ".join(f"{name} {value:.3f}" for name, value in model.loss(chunks.flatten(1))[1].items()))
    print(f"FLOPs a token: training {flops['train']:.3e}, inference {flops['inference']:.3e}\n")
    drawn = [*model.draw(h[:, -1], n=6)[:, 0], chunks[0, -1]]
    print("six draws of the last chunk, and it: ", *(repr(tokenizer.decode(c.tolist())) for c in drawn))

if __name__ == "__main__":
    main()
