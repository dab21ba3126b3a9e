"""
CALM: a language model that predicts the next vector in place of the next token (Shao et al., arXiv 2510.27688).

Read from top to bottom: the Transformer, with a lookup; the energy head and its loss; two heads that take many steps;
temperature from samples alone; the two models (CALM and its token-by-token baseline AR); generation; what it costs in FLOPs;
loading a checkpoint, and the weights that the authors published (layers have the names of theirs). A first reading may skip
the lookup and the head's hints, the two slow heads, and all after generation.

A training step in five lines:
    chunks of K tokens      -> one input vector each     (CALM.inputs)
    input vectors           -> hidden states h_t         (Transformer)
    h_t and noise           -> N samples of z_{t+1}      (EnergyHead: one step, no likelihood)
    chunk t+1               -> M samples of z_{t+1}      (the frozen autoencoder's posterior)
    the two sets of samples -> loss                      (energy_score)

Shapes: B sequences, T chunks in a sequence, K tokens in a chunk, V vocabulary, D width, L latent size, N head samples,
M target samples, R retrieved chunks, P positions (B and T flattened). tokens (B, T*K), h (B, T, D), z (..., L).
"""
import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (Autoencoder, AutoencoderConfig, RMSNorm, SwiGLU, check_sizes, init_weights, load_checkpoint,
                         read_published)
from data.prepare import fail


@dataclass
class CALMConfig:
    vocab_size: int = 257          # V: bytes and end-of-text
    chunk_size: int = 4            # K: tokens in a chunk
    latent_dim: int = 128          # L: size of a chunk's vector
    n_embd: int = 768              # D: width
    n_ff: int = 2048               # width of the SwiGLU
    n_layer: int = 12              # blocks of the Transformer
    n_head: int = 16               # attention heads
    n_head_layer: int = 3          # blocks of the generative head: the paper takes n_layer / 4
    n_noise: int = 64              # size of the head's noise
    block_size: int = 2048         # context in chunks
    num_samples: int = 8           # N: head samples a position
    num_targets: int = 100         # M: target samples a position
    alpha: float = 1.0             # exponent of the energy score, in (0, 2)
    input_mode: Literal["discrete", "continuous", "both"] = "discrete"   # what it reads: embeddings, latents
    head: Literal["energy", "flow", "diffusion"] = "energy"   # generative head
    num_evals: int = 0             # network evaluations a sample; 0: the paper's, 1 (energy), 20 (flow) or 100 (diffusion)
    aux_weight: float = 0.0        # departure: weight of a next-chunk cross-entropy read from h; unused at inference
    kernel_weight: float = 0.0     # departure: weight of a Gaussian kernel beside the distance in the energy score
    kernel_width: float = 5.0      # its standard deviation
    brier_weight: float = 0.0      # departure: weight of the samples' Brier score beside the energy score (energy head only)
    head_init: float = 0.0         # departure: first standard deviation of the head's matrices, times sqrt(inputs); 0: 0.02
    embed_std: float = 0.02        # departure where not 0.02: standard deviation of the first embeddings
    qk_norm: float = 0.0           # departure: root mean square that queries and keys are scaled to; 0: left as they are
    lookup: int = 0                # departure: tokens by whose likeness earlier places in the text are looked up; 0: none
    retrieved: int = 0             # departure: R, places of the lookup that the energy head's samples draw from; 0: none

    def __post_init__(self):
        self.num_evals = self.num_evals or {"energy": 1, "flow": 20, "diffusion": 100}[self.head]
        if not self.lookup or self.head != "energy":
            self.retrieved = 0
        check_backbone(self)
        if self.num_evals > (1 if self.head == "energy" else 1000) or self.head == "flow" and self.num_evals % 2:
            raise ValueError(f"num_evals {self.num_evals}: energy takes 1, flow an even number, diffusion up to 1000")
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2 (the energy score compares samples), not {self.num_samples}")
        if not 0 < self.alpha < 2:
            raise ValueError(f"alpha must be in (0, 2), where the energy score is strictly proper, not {self.alpha}")
        for name in ("aux_weight", "kernel_weight", "brier_weight", "head_init"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if not 0 < self.kernel_width < math.inf:
            raise ValueError(f"kernel_width must be a number above 0, not {self.kernel_width}")


@dataclass
class ARConfig:
    vocab_size: int = 257
    n_embd: int = 768
    n_ff: int = 2048
    n_layer: int = 12
    n_head: int = 16
    block_size: int = 2048         # context in tokens
    embed_std: float = 0.02
    qk_norm: float = 0.0
    lookup: int = 0

    def __post_init__(self):
        check_backbone(self)


def check_backbone(config):
    check_sizes(config)
    for name in ("embed_std", "qk_norm"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be a number from 0 on, not {getattr(config, name)}")
    if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
        raise ValueError(f"n_embd {config.n_embd} must be divisible by n_head {config.n_head}, into heads of an even width")


def init_embeddings(model, std):
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)


# --- The Transformer (section 3.3), LLaMA's: RMSNorm, rotary positions, causal attention, SwiGLU, no biases -----------

def rotary_tables(head_dim, positions, theta=10000.0):
    """cos and sin of position * frequency, (positions, head_dim): the half-rotation layout."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)   # (hs/2,)
    angle = torch.outer(torch.arange(positions, device="cpu").float(), frequency)           # (T, hs/2)
    angle = torch.cat([angle, angle], dim=-1)                                 # (T, hs)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + hs/2}) of x (B, nh, T, hs) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class KVCache:
    """Keys and values of the positions so far, preallocated for `block_size` positions at the first write."""
    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0     # positions filled; setting it lower forgets the positions after it
        self.layers = {}    # layer -> keys and values (2, B, nh, block_size, hs); of the lookup, text and keys (B, block_size, ...)

    def write(self, layer, at, new):
        """Store what is new (..., T, hs) in `layer` at positions `at` (T,) -> all that is there, the empty ones too."""
        if layer not in self.layers:   # zeros: what happens to be in memory may be NaN, and stays NaN under a mask
            self.layers[layer] = new.new_zeros(*new.shape[:-2], self.block_size, new.shape[-1])
        return self.layers[layer].index_copy_(-2, at, new)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x, cos, sin, cache=None, at=None, mask=None):
        """x (B, T, D), cos and sin (T, hs) -> (B, T, D). With a cache: positions `at` (T,), and a mask (T, end) of whom they see."""
        q, k, v = (proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)   # (B, nh, T, hs)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:   # no score above qk_norm^2 sqrt(hs): attention cannot harden too early
            q, k = (self.qk_norm * F.rms_norm(heads.float(), heads.shape[-1:]) for heads in (q, k))
        if x.device.type == "cpu":
            v = v.float()   # a CPU's attention is no slower in float32 than in bfloat16, for a single query much faster
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        if cache is not None:
            k, v = cache.write(self.layer, at, torch.stack([k, v]))[..., :mask.shape[1], :]
        with torch.autocast("cpu", enabled=False):   # which would make it bfloat16 again
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(-2))                     # (B, T, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x, cos, sin, cache=None, at=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, at, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Lookup(nn.Module):
    """A departure: how did the text go on where it read as it reads now? A Transformer over tokens learns to look that up
    (the induction heads of Olsson et al., 2022), but late; one over chunks hardly does (README, "Copying").

    The last `lookup` tokens of a chunk are compared with those before every earlier place: the likeness of the tokens,
    place by place, the latest counting most, is the score. The answer is the K tokens behind each place, weighted by the
    softmax of the scores. A constant score for nothing at all takes part: where no place is like it, the answer is near 0.

    An average of chunks is no chunk. For the head, which draws one, there are also the chunks themselves: those behind R
    places, which stand for the distribution that the weights are."""
    def __init__(self, config, K):
        super().__init__()
        self.K, self.size, self.retrieved = K, config.lookup, getattr(config, "retrieved", 0)
        self.vocab_size = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, 16)                      # what makes tokens alike: their angle
        self.value = nn.Embedding(config.vocab_size, 64)
        # Weights of the places, the latest first, and the constant score. They begin near what models that had begun with
        # equal weights came to: three equal tokens at the end (5 + 3.0 + 2.2) just outweigh the constant.
        self.scale = nn.Parameter(5 * torch.arange(1, self.size + 1) ** -0.75)
        self.nothing = nn.Parameter(torch.tensor(10.0))
        self.out_proj = nn.Linear(64 * K, config.n_embd, bias=False)

    def forward(self, chunks, position, end, cache=None):
        """chunks (B, T, K) at `position` (T,) -> (B, T, D), retrieved chunks (B, T, R, K) or None. With a cache: of the
        text up to chunk `end`, held there."""
        K, B = self.K, len(chunks)
        within, past = torch.arange(K, device=chunks.device), torch.arange(self.size, device=chunks.device)
        new = position[:, None] * K + within                                  # (T, K): the new tokens' places in the text
        recent = new.flatten()[:, None] - past                                # (T*K, lookup): those of their windows
        text = chunks if cache is None else cache.write("text", position, chunks)[:, :end]
        text = text.flatten(1)                                                # (B, n), n = end*K
        likeness = F.pad(F.normalize(self.embed.weight, dim=-1), (0, 0, 1, 0))   # (V + 1, 16); row 0: before the text
        windows = F.embedding((text[:, recent.clamp_min(0)] + 1) * (recent >= 0), likeness).flatten(2)   # (B, T*K, lookup*16)
        queries = windows[:, K - 1::K] * self.scale.repeat_interleave(16)     # (B, T, lookup*16): the chunks' last tokens'
        keys = windows.view(B, len(position), -1)
        keys = (keys if cache is None else cache.write("lookup", position, keys)[:, :end]).view(B, -1, windows.shape[2])
        known = torch.arange(text.shape[1], device=text.device) + K <= new[:, -1:]   # (T, n): the K tokens behind were read
        bias = torch.zeros(known.shape, device=text.device).masked_fill(~known, -math.inf)
        scores = torch.baddbmm(bias.expand(B, -1, -1), queries, keys.transpose(1, 2))                  # (B, T, n): sums of cosines
        weights = torch.cat([self.nothing.expand(*scores.shape[:2], 1), scores], dim=-1).softmax(-1)   # (B, T, 1 + n)
        value = self.value(text)                                              # (B, n, 64)
        answer = [weights[..., 1:-k] @ value[:, k:] for k in range(1, K + 1)]   # (B, T, 64) each: of the token k places behind
        retrieved = self.retrieve(text, weights) if self.retrieved else None
        return self.out_proj(torch.cat(answer, dim=-1)), retrieved            # (B, T, 64*K) -> (B, T, D)

    def retrieve(self, text, weights):
        """The K tokens behind R places -> (B, T, R, K). The places are quantiles of the weights (B, T, 1 + n), so that one
        of the R drawn evenly is a place drawn by its weight, to within 1 / R. Nothing: K times the id V, which no token has."""
        levels = (torch.arange(self.retrieved, device=text.device) + 0.5) / self.retrieved
        cumulative = weights.detach().float().cumsum(-1)
        place = torch.searchsorted(cumulative, levels.expand(*weights.shape[:2], -1).contiguous())[..., None]   # (B, T, R, 1)
        # Weight 0 is that of nothing, weight i that of place i - 1: behind it stand the tokens i to i + K - 1.
        behind = place + torch.arange(self.K, device=text.device)             # (B, T, R, K)
        tokens = text[torch.arange(len(text), device=text.device)[:, None, None, None], behind]
        return tokens.masked_fill(place == 0, self.vocab_size)


class Transformer(nn.Module):
    """Vectors in, hidden states out: (B, T, D) -> (B, T, D). CALM feeds it chunks, AR feeds it tokens (chunks of one)."""
    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd)
        self.lookup = Lookup(config, getattr(config, "chunk_size", 1)) if config.lookup else None
        cos, sin = rotary_tables(config.n_embd // config.n_head, config.block_size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, chunks, cache=None, position=None):
        """x: read from `chunks` (B, T, K) -> h, and what the lookup retrieved, or None. With a cache, it goes on where the
        cache ends. `position`: where a single vector stands, as a tensor (1,): the step then has the same shapes everywhere
        (what a CUDA graph needs), and it is the caller who counts cache.length."""
        if position is None:
            start = cache.length if cache is not None else 0
            end = start + x.shape[1]                                          # attend to positions 0 .. end - 1
            if end > self.block_size:
                raise ValueError(f"{end} positions, but the context is {self.block_size}")
            position = torch.arange(start, end, device=x.device)              # (T,)
            if cache is not None:
                cache.length = end
        else:
            end = self.block_size
        mask = None if cache is None else torch.arange(end, device=x.device) <= position[:, None]   # (T, end)
        retrieved = None
        if self.lookup is not None:
            answer, retrieved = self.lookup(chunks, position, end, cache)
            x = x + answer
        for layer in self.layers:
            x = layer(x, self.cos[position], self.sin[position], cache, position, mask)
        return self.norm(x), retrieved


# --- The energy head (section 3.2): h and noise -> z, in one step -----------------------------------------------------

class EnergyBlock(nn.Module):
    """x + down_proj(silu(g) * u), where g, u come from a three-layer MLP on [LayerNorm(x), c]."""
    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(2 * D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 2 * D))
        self.down_proj = nn.Linear(D, D)

    def forward(self, x, c):
        # The first linear of [LayerNorm(x), c] in two halves: c (..., D) is the same for all N samples of x (N, ..., D),
        # so its half is computed once and not N times.
        first, *rest = self.linears
        of_x, of_c = first.weight.chunk(2, dim=1)                             # (D, D) each
        y = F.linear(self.in_ln(x), of_x) + F.linear(c, of_c, first.bias)
        for layer in rest:
            y = layer(y)
        g, u = y.chunk(2, dim=-1)
        return x + self.down_proj(F.silu(g) * u)


class EnergyHead(nn.Module):
    """Draws z_{t+1} given h_t. Two verbs, as every head: a loss and a sample."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.noise_embd = nn.Linear(config.n_noise, D)
        self.norm_noise = nn.LayerNorm(D, eps=1e-6)
        self.hidden_embd = nn.Linear(D, D)
        self.norm_hidden = nn.LayerNorm(D, eps=1e-6)
        self.mlp_blocks = nn.ModuleList([EnergyBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = nn.Sequential(OrderedDict(
            in_ln=nn.LayerNorm(D, eps=1e-6),
            linears=nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, config.latent_dim))))
        if config.retrieved:   # a departure: each sample has a hint, a chunk that the lookup retrieved
            self.hint = nn.Embedding(config.vocab_size + 1, 32)               # the last one: of nothing
            self.hint_in = nn.Linear(32 * config.chunk_size, D)
            self.hint_out = nn.Linear(32 * config.chunk_size, config.latent_dim)
            self.hint_gate = nn.Linear(D, 1)
        if config.brier_weight:   # a second, linear decoder, for training only: cheap enough to read every sample
            self.readout = nn.Linear(config.latent_dim, config.chunk_size * config.vocab_size)

    def start_at_zero(self):
        for last in (self.final_layer.linears[2], getattr(self, "hint_out", None)):
            if last is not None:   # the first samples are zero, and so are their gradients into h
                nn.init.zeros_(last.weight)

    def sample(self, h, n, noise=None, noise_scale=1.0):
        """n samples given h (..., D) -> z (n, ..., L). `noise` (n, ..., n_noise): default U[-0.5, 0.5] * noise_scale.
        Behind h there may be what the lookup retrieved, (..., D + R*K): each sample draws one of the R, beside its noise."""
        h, retrieved = h[..., :self.config.n_embd], h[..., self.config.n_embd:]
        if noise is None:
            noise = noise_scale * (torch.rand(n, *h.shape[:-1], self.config.n_noise, device=h.device) - 0.5)
        x = self.norm_noise(self.noise_embd(noise))                           # (n, ..., D)
        c = self.norm_hidden(self.hidden_embd(h))                             # (..., D)
        if retrieved.shape[-1]:
            retrieved = retrieved.long().unflatten(-1, (-1, self.config.chunk_size))            # (..., R, K)
            pick = torch.randint(retrieved.shape[-2], (n, *h.shape[:-1], 1, 1), device=h.device)
            hint = self.hint(torch.take_along_dim(retrieved[None], pick, dim=-2)).flatten(-3)   # (n, ..., 32*K)
            x = x + self.hint_in(hint)
        for block in self.mlp_blocks:
            x = block(x, c)
        z = self.final_layer(x)                                               # (n, ..., L)
        if retrieved.shape[-1]:
            z = z + self.hint_gate(x).sigmoid() * self.hint_out(hint)         # how far to follow the hint: (n, ..., 1)
        return z

    def loss(self, h, mean, log_std, targets=None):
        """Energy loss of each position: h (P, D), posterior mean and log_std (P, L) of the chunk to come -> (P,).
        With a brier_weight also the Brier score; it takes the chunk itself, targets (P, K)."""
        c = self.config
        x = self.sample(h, c.num_samples).float()                             # (N, P, L)
        y = half_of_targets(log_std, c.num_targets)                           # (M/2, P, L)
        # Both minus the mean: distances stay, and float32 keeps more digits.
        loss = energy_score(x - mean, y, c.alpha, mirrored=True, kernel_weight=c.kernel_weight, kernel_width=c.kernel_width)
        return loss + self.brier(x, mean + y[0], targets) if c.brier_weight else loss

    def brier(self, x, z, targets):
        """A departure: brier_weight times the Brier score of samples x (N, P, L), as the readout reads them, plus the
        cross-entropy by which the readout learns, from vectors z (P, L) of the true chunks, targets (P, K) -> (P,).
        The Brier score's gradient goes through the readout, not into it: it would learn to call the samples right."""
        V, weight, bias = self.config.vocab_size, self.readout.weight, self.readout.bias
        read = F.linear(x, weight.detach(), bias.detach()).unflatten(-1, (-1, V))           # (N, P, K, V)
        logits = self.readout(z).view(-1, V).float()                                        # (P*K, V)
        learn = F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).mean(-1)
        return self.config.brier_weight * brier_score(read, targets) + learn


def half_of_targets(log_std, M):
    """M/2 (rounded up) draws from N(0, std^2) for log_std (P, L) -> (M/2, P, L). The other half are their mirror images:
    -y is as fair a draw as y, so the loss stays unbiased, with half the random numbers and less variance."""
    P, L = log_std.shape
    return (torch.randn(P, (M + 1) // 2, L, device=log_std.device) * log_std.exp()[:, None]).transpose(0, 1)


def distances(x, y, alpha, kernel_weight=0.0, kernel_width=5.0):
    """|x_n - y_m|^alpha for x (P, N, L), y (P, M, L) -> (P, N, M), by matrix products: |x|^2 + |y|^2 - 2 x.y.

    Never a tensor (P, N, M, L). The floor under the square keeps the gradient finite (zero) where two points meet.
    A departure adds kernel_weight (1 - exp(-|x_n - y_m|^2 / (2 kernel_width^2))), which hardly changes between points that
    are far apart: a sample then hears most of the targets near it.
    """
    x2, y2 = (torch.linalg.vector_norm(v, dim=-1) ** 2 for v in (x, y))       # (P, N), (P, M)
    squares = torch.baddbmm(x2[:, :, None] + y2[:, None, :], x, y.transpose(1, 2), alpha=-2)
    powers = squares.clamp_min(1e-10) ** (alpha / 2)
    return powers - kernel_weight * torch.expm1(-squares / (2 * kernel_width ** 2)) if kernel_weight else powers


def energy_score(x, y, alpha=1.0, mirrored=False, **kernel):
    """The energy loss (equation 12) of samples x (N, P, L) for targets y (M, P, L), or y and -y -> (P,). In float32.

    2 E|x - y|^alpha - E|x - x'|^alpha, estimated without bias. For 0 < alpha < 2 its expectation is smallest exactly
    where x and y have the same distribution (a strictly proper score): the first term pulls samples to the target, the
    second keeps them apart. kernel: of `distances`; the sum of two strictly proper scores is one.
    """
    N, M = len(x), len(y)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float().transpose(0, 1), y.float().transpose(0, 1)           # (P, N, L), (P, M, L)
        to_targets = distances(x, y, alpha, **kernel).sum((1, 2)) / (N * M)
        if mirrored:   # |x - (-y)| = |-x - y|
            to_targets = (to_targets + distances(-x, y, alpha, **kernel).sum((1, 2)) / (N * M)) / 2
        others = 1 - torch.eye(N, device=x.device)                            # n != k
        to_each_other = (distances(x, x, alpha, **kernel) * others).sum((1, 2)) / (N * (N - 1))
        return 2 * to_targets - to_each_other


def brier_score(logits, targets):
    """A departure: BrierLM's own score as a loss. Token logits (N, P, K, V) of N samples, the true chunk (P, K) -> minus
    the sum of Brier-1 to Brier-K of each position (P,).

    Where Brier-n asks whether the first n tokens are right, and whether those of two samples are equal, this asks with what
    probability. Least where the tokens read from the samples have, on average, the true chunk's distribution: proper."""
    N, hit, same, loss = len(logits), 1.0, 1.0, 0.0
    others = 1 - torch.eye(N, device=logits.device)[..., None]                # n != m
    with torch.autocast(logits.device.type, enabled=False):
        for k in range(targets.shape[1]):
            p = logits[:, :, k].float().softmax(-1)                           # (N, P, V)
            hit = hit * p.gather(-1, targets[:, k].expand(N, -1)[..., None])[..., 0]   # (N, P): tokens 0 .. k are right
            same = same * torch.einsum("npv,mpv->nmp", p, p)                  # (N, N, P): they are the same in two samples
            loss = loss + (same * others).sum((0, 1)) / (N * (N - 1)) - 2 * hit.mean(0)
    return loss


# --- Two heads that take many steps (section 3.2, figure 8): noise is carried to z by a network of the time t ---------

class AdaLNBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), where the condition y gives shift, scale and gate."""
    def __init__(self, D):
        super().__init__()
        self.in_ln = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 3 * D))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class TimeNet(nn.Module):
    """(x_t, t, h) -> `out` numbers: the network of both heads, the design of MAR's diffusion head (Li et al., 2024)."""
    def __init__(self, config, out):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.time_embed = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.cond_embed = nn.Linear(D, D)
        self.input_proj = nn.Linear(config.latent_dim, D)
        self.res_blocks = nn.ModuleList([AdaLNBlock(D) for _ in range(config.n_head_layer)])
        self.final_layer = nn.ModuleDict({"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)),
                                          "linear": nn.Linear(D, out)})

    def start_at_zero(self):
        for name, parameter in self.named_parameters():   # at first no block does anything, and the output is zero
            if "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)

    def forward(self, x, t, h):
        """x (..., L), t (...) in 0 .. 999, h (..., D) -> (..., out), in float32"""
        frequency = 10000.0 ** (-torch.arange(128, device=x.device) / 128)
        angle = t[..., None] * frequency                                      # (..., 128)
        y = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1)) + self.cond_embed(h)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x).float()

    def start(self, h, n, noise, noise_scale):
        """Where a sample starts: N(0, noise_scale^2), unless `noise` is given."""
        shape = (n, *h.shape[:-1], self.config.latent_dim)
        return noise_scale * torch.randn(shape, device=h.device) if noise is None else noise


class FlowHead(TimeNet):
    """Flow matching: a velocity that carries noise x_0 to z along the straight line x_t = (1 - t) x_0 + t z."""
    def __init__(self, config):
        super().__init__(config, config.latent_dim)

    def velocity(self, x, t, h):
        return self(x, (1000 * t).floor(), h)   # the network counts time in thousandths, as the authors' does

    def loss(self, h, mean, log_std, targets=None):
        """Squared error of the velocity z - x_0 at N random times of each position, averaged over dimensions -> (P,)."""
        z = mean + log_std.exp() * torch.randn(self.config.num_samples, *mean.shape, device=h.device)   # (N, P, L)
        noise, t = torch.randn_like(z), torch.rand(z.shape[:2], device=z.device)
        x_t = torch.lerp(noise, z, t[..., None])
        return (self.velocity(x_t, t, h) - (z - noise)).square().mean(-1).mean(0)

    def sample(self, h, n, noise=None, noise_scale=1.0):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals / 2 midpoint steps. `noise` (n, ..., L): default N(0, 1)."""
        x = self.start(h, n, noise, noise_scale)
        times = torch.linspace(0, 1, self.config.num_evals // 2 + 1, device=h.device)
        for t, step in zip(times[:-1], times.diff()):
            middle = x + step / 2 * self.velocity(x, t.expand(x.shape[:-1]), h)
            x = x + step * self.velocity(middle, (t + step / 2).expand(x.shape[:-1]), h)
        return x


class DiffusionHead(TimeNet):
    """Diffusion: undo, step by step, the noise of x_t = sqrt(a_t) z + sqrt(1 - a_t) noise, t = 0 .. 999.

    The network predicts the noise and, between two bounds, the log-variance of each step (Nichol and Dhariwal, 2021)."""
    def __init__(self, config):
        super().__init__(config, 2 * config.latent_dim)
        angle = (torch.arange(1001, dtype=torch.float64, device="cpu") / 1000 + 0.008) / 1.008 * math.pi / 2
        beta = (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp_max(0.999)   # the cosine schedule
        self.a = (1 - beta).cumprod(0)                                        # (1000,): how much of z is left
        self.register_buffer("table", self.coefficients(self.a), persistent=False)

    @staticmethod
    def coefficients(a):
        """Of each step t with a_t (steps,), as rows: sqrt(a), sqrt(1 - a), the weights of z and x_t in the mean of
        q(x_{t-1} | x_t, z), the log-variance of q(x_{t-1} | x_t, z) and of q(x_t | x_{t-1}) -> (6, steps)."""
        before = F.pad(a[:-1], (1, 0), value=1.0)                             # a_{t-1}
        beta = 1 - a / before
        variance = beta * (1 - before) / (1 - a)
        variance[0] = variance[min(1, len(a) - 1)] or beta[0]                 # the last step's is 0: it has no logarithm
        return torch.stack([a.sqrt(), (1 - a).sqrt(), before.sqrt() * beta / (1 - a),
                            (1 - beta).sqrt() * (1 - before) / (1 - a), variance.log(), beta.log()]).float()

    def step_back(self, x_t, z, v, row):
        """p(x_{t-1} | x_t) -> mean, log-variance; `row` of the coefficients, (6, ..., 1)."""
        return row[2] * z + row[3] * x_t, torch.lerp(row[4], row[5], (v + 1) / 2)

    def terms(self, z, noise, t, h):
        """The two parts of the loss (...) at times t (...): the squared error of the noise, and the bits of the step
        back, through which only the variance learns."""
        row = self.table[:, t][..., None]                                     # (6, ..., 1)
        x_t = row[0] * z + row[1] * noise
        predicted, v = self(x_t, t, h).chunk(2, dim=-1)
        true_mean = row[2] * z + row[3] * x_t
        mean, log_var = self.step_back(x_t, (x_t - row[1] * predicted.detach()) / row[0], v, row)
        kl = (log_var - row[4] - 1 + (row[4] - log_var).exp() + (true_mean - mean) ** 2 * (-log_var).exp()) / 2
        nll = (math.log(2 * math.pi) + log_var + (z - mean) ** 2 * (-log_var).exp()) / 2   # the last step: the density of z
        bits = torch.where((t == 0)[..., None], nll, kl).mean(-1) / math.log(2)
        return (noise - predicted).square().mean(-1), bits

    def loss(self, h, mean, log_std, targets=None):
        """Both terms at N random times of each position -> (P,)."""
        z = mean + log_std.exp() * torch.randn(self.config.num_samples, *mean.shape, device=h.device)   # (N, P, L)
        t = torch.randint(1000, z.shape[:2], device=z.device)
        return sum(self.terms(z, torch.randn_like(z), t, h)).mean(0)

    def sample(self, h, n, noise=None, noise_scale=1.0):
        """n samples given h (..., D) -> z (n, ..., L), by num_evals steps spread over the 1000. `noise` (n, ..., L)."""
        x = self.start(h, n, noise, noise_scale)
        times = torch.linspace(999, 0, self.config.num_evals).round().long().flip(0)
        table = self.coefficients(self.a[times]).to(h.device)
        for i in reversed(range(len(times))):
            row, t = table[:, i], times[i].to(h.device)
            predicted, v = self(x, t.expand(x.shape[:-1]), h).chunk(2, dim=-1)
            z = ((x - row[1] * predicted) / row[0]).clamp(-10, 10)            # at t = 999 row[0] is 5e-5: no z is so far out
            x, log_var = self.step_back(x, z, v, row)
            if i:
                x = x + noise_scale * (log_var / 2).exp() * torch.randn_like(x)
        return x


HEADS = {"energy": EnergyHead, "flow": FlowHead, "diffusion": DiffusionHead}


# --- Temperature without likelihoods (section 5) ----------------------------------------------------------------------

def temperature_batch(samples, temperature):
    """Algorithm 2: from N samples of a chunk, pick one as if drawn from P^(1/T).

    samples (N, batch, K), temperature in (0, 1] -> tokens (batch, K).
    With s = 1/T = n, a chunk seen c times has C(c, n) ways of being drawn n times running, which is what P^n weighs. If
    no chunk was seen n times, the algorithm tries n - 1, n - 2, ...: that is, s is cut to the largest count. For any T, C
    is taken through the Gamma function: C(c, s) = G(c+1) / (G(s+1) G(c-s+1)) grows as c^s / G(s+1), and c / N goes to P,
    so the choice goes to P^s as N grows. Each of a chunk's c copies carries C(c, s) / c: drawing a copy draws the chunk.
    """
    count = counts(samples).float()                                           # c of each copy's chunk, (N, batch)
    s = count.amax(0).clamp_max(1 / temperature)                              # (batch,)
    log_ways = (count + 1).lgamma() - (s + 1).lgamma() - (count - s + 1).lgamma() - count.log()
    log_ways = log_ways.masked_fill(count < s.floor(), -math.inf)
    pick = torch.multinomial(log_ways.softmax(0).T, 1).squeeze(1)             # (batch,)
    return samples[pick, torch.arange(samples.shape[1], device=samples.device)]


def counts(samples):
    """How often the chunk of each sample occurs among the N of its row: (N, batch, K) -> (N, batch)."""
    key = samples[..., 0].T.contiguous()
    for k in range(1, samples.shape[2]):
        key = key * 1_000_003 + samples[..., k].T                             # chunks compare by a 64-bit hash, (batch, N)
    ordered = key.sort(dim=-1).values
    return (torch.searchsorted(ordered, key, right=True) - torch.searchsorted(ordered, key)).T


def temperature_exact(draw, batch, temperature, max_calls=1_000_000):
    """Algorithm 1: draw exactly from P^(1/T) / Z with nothing but a sampler of P.

    draw(n) -> n samples of each row (n, batch, K); temperature in (0, 1) -> tokens (batch, K), sampler calls (batch,).
    1/T = n + a. n equal samples in a row are a draw from P^n. To weigh it by P^a too, sample on: at sample i accept if it
    is the same chunk again, else start over with probability a/i. Every row walks through its own samples at its own pace.
    One that is not done after max_calls takes Algorithm 2's choice of 200 more: it is told by calls > max_calls.
    """
    n = math.floor(1 / temperature)
    a = 1 / temperature - n
    samples = draw(n)
    candidate = chosen = torch.zeros_like(samples[0])                         # (batch, K)
    calls, age, agreed, done = (torch.full((batch,), start, device=chosen.device) for start in (0, 0, True, False))
    while True:
        for x in samples:
            active = ~done & (calls < max_calls)
            calls, age = calls + active, age + 1                              # age: samples in this attempt
            candidate = torch.where((age == 1)[:, None], x, candidate)
            equal = (x == candidate).all(-1)
            agreed = (agreed | (age == 1)) & equal
            i = age - n                                                       # above 0 in the second part
            accept = active & ((i > 0) & equal if a else (i == 0) & agreed)
            start_over = (i == 0) & ~agreed | (i > 0) & ~equal & (torch.rand(batch, device=x.device) < a / i)
            chosen, done = torch.where(accept[:, None], candidate, chosen), done | accept
            age = age.masked_fill(start_over, 0)
        if (done | (calls >= max_calls)).all():
            break
        samples = draw(min(2 * len(samples), 256))   # fewer, larger calls for the rows that need many
    if not done.all():
        chosen = torch.where(done[:, None], chosen, temperature_batch(draw(200), temperature))
        calls = calls + 200 * ~done
    return chosen, calls


def expected_calls(samples, temperature):
    """Theorem 2: what a draw by Algorithm 1 costs, (n + 1[a > 0] sum_x P(x)^(s-1)) / sum_x P(x)^s with s = 1/T = n + a, if
    P is how often each chunk occurs in samples (N, batch, K) -> (batch,). Chunks too rare to occur twice cost more."""
    s = 1 / temperature
    p = counts(samples).float() / len(samples)                                # of each copy: 1/p of them make a chunk's sum
    second = (p ** (s - 2)).mean(0) if s % 1 else 0
    return (math.floor(s) + second) / (p ** (s - 1)).mean(0)


# --- The two models ---------------------------------------------------------------------------------------------------

class CALM(nn.Module):
    def __init__(self, config, autoencoder):
        super().__init__()
        c, K, D = config, config.chunk_size, config.n_embd
        for name in ("vocab_size", "chunk_size", "latent_dim"):
            if getattr(c, name) != getattr(autoencoder.config, name):
                raise ValueError(f"{name} is {getattr(c, name)}, but the autoencoder's is {getattr(autoencoder.config, name)}")
        self.config, self.chunk_size = c, K
        if c.input_mode != "continuous":
            self.embed_tokens = nn.Embedding(c.vocab_size, D)
            self.embed_proj = nn.Sequential(nn.Linear(K * D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D),
                                            nn.LayerNorm(D, eps=1e-6))
        if c.input_mode != "discrete":
            self.latent_proj = nn.Linear(c.latent_dim, D)
        self.transformer = Transformer(c)
        self.head = HEADS[c.head](c)
        if c.aux_weight:
            self.aux = nn.Linear(D, K * c.vocab_size)
        self.apply(init_weights)
        init_embeddings(self, c.embed_std)
        for module in self.head.modules():
            if c.head_init and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=c.head_init * module.in_features ** -0.5)
        self.head.start_at_zero()
        self.autoencoder = autoencoder.requires_grad_(False)
        self.part = "all"

    def learn_only(self, part):
        """A departure: one part after the other, "transformer" from the auxiliary loss, then "head" on a Transformer that
        stands still. The paper trains "all" of it at once."""
        self.part = part
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("head.") == (part == "head") and not name.startswith("autoencoder."))

    def train(self, mode=True):
        super().train(mode)
        self.autoencoder.eval()   # frozen: no dropout, no masking
        return self

    def inputs(self, tokens):
        """tokens (B, T*K) -> one vector a chunk (B, T, D)."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))                   # (B, T, K)
        x = 0
        if self.config.input_mode != "continuous":
            x = self.embed_proj(self.embed_tokens(chunks).flatten(-2))        # (B, T, K*D) -> (B, T, D)
        if self.config.input_mode != "discrete":
            x = x + self.latent_proj(self.autoencoder.encode(chunks)[0])
        return x

    def hidden(self, tokens, cache=None, position=None):
        """tokens (B, T*K) -> h (B, T, D): h_t has seen chunks up to and with t, and predicts chunk t+1. What the lookup
        retrieved for the energy head stands behind it, (B, T, D + R*K)."""
        h, retrieved = self.transformer(self.inputs(tokens), tokens.unflatten(1, (-1, self.chunk_size)), cache, position)
        return h if retrieved is None else torch.cat([h, retrieved.flatten(-2).float()], dim=-1)   # float32: ids stay exact

    def loss(self, tokens):
        """tokens (B, (T+1)*K): chunk t+1 from h_t, for T positions -> scalar, metrics."""
        K = self.chunk_size
        h = self.hidden(tokens[:, :-K]).flatten(0, 1)                         # (P, D), or with hints (P, D + R*K); P = B*T
        targets = tokens[:, K:].reshape(-1, K)                                # (P, K)
        loss, metrics = 0.0, {}
        if self.part != "transformer":
            with torch.no_grad():
                mean, log_std = (v.float() for v in self.autoencoder.encode(targets))
            loss = self.head.loss(h, mean, log_std, targets).mean()
            metrics[self.config.head] = loss.detach()
        if self.part != "head" and self.config.aux_weight:
            logits = self.aux(h[:, :self.config.n_embd]).unflatten(-1, (K, -1)).float()   # (P, K, V)
            aux = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss, metrics["aux"] = loss + self.config.aux_weight * aux, aux.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def sample_chunks(self, h, n, noise_scale=1.0):
        """n next chunks given h (..., D) -> tokens (n, ..., K). In slices; of the logits only the argmax is kept."""
        at_once = max(1, 2 ** 14 * h.shape[-1] // h.numel())
        z = torch.cat([self.head.sample(h, min(at_once, n - i), noise_scale=noise_scale) for i in range(0, n, at_once)])
        slice_size = 2 ** (27 if z.is_cuda else 23)   # logits at a time: on a CPU, what its cache holds
        rows = max(1, slice_size // (self.chunk_size * self.config.vocab_size))
        tokens = [self.autoencoder.decode(part).max(-1).indices for part in z.flatten(0, -2).split(rows)]   # argmax: slower
        return torch.cat(tokens).view(*z.shape[:-1], self.chunk_size)

    def draw(self, h, temperature=1.0, n=1, num_candidates=200, noise_scale=1.0, sampler="batch", max_calls=10_000, calls=None):
        """n next chunks for each h (B, D) at a temperature (section 5) -> tokens (n, B, K).

        sampler: "batch" (Algorithm 2 on num_candidates) or "exact" (Algorithm 1, which adds the calls it used, (n * B,), to
        the list `calls`). noise_scale below 1 shrinks the head's noise, a heuristic in place of a temperature."""
        if temperature == 1:
            return self.sample_chunks(h, n, noise_scale)
        rows = n * len(h)
        draw = lambda count: self.sample_chunks(h, count * n, noise_scale).view(count, rows, -1)
        if sampler == "batch":
            tokens = temperature_batch(draw(num_candidates), temperature)
        else:
            tokens, used = temperature_exact(draw, rows, temperature, max_calls)
            if calls is not None:
                calls.append(used)
        return tokens.view(n, len(h), -1)


class AR(nn.Module):
    """The token-by-token baseline: the same Transformer between an embedding and a softmax."""
    def __init__(self, config):
        super().__init__()
        self.config, self.chunk_size = config, 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(init_weights)
        init_embeddings(self, config.embed_std)

    def hidden(self, tokens, cache=None, position=None):
        """tokens (B, T) -> h (B, T, D)."""
        return self.transformer(self.embed_tokens(tokens), tokens[..., None], cache, position)[0]

    def loss(self, tokens):
        """tokens (B, T+1): cross-entropy of token t+1 given the ones before, in nats -> scalar, metrics."""
        logits = self.lm_head(self.hidden(tokens[:, :-1])).float()            # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"loss": loss.detach()}

    def probabilities(self, h, temperature=1.0):
        """Of the next token given h (..., D) -> (..., V), by softmax temperature."""
        return (self.lm_head(h).float() / temperature).softmax(-1)

    def draw(self, h, temperature=1.0, n=1, **unused):
        """n next tokens for each h (B, D) -> tokens (n, B, 1). A softmax needs none of CALM's other arguments."""
        return torch.multinomial(self.probabilities(h, temperature), n, replacement=True).T[..., None]


# --- Generation -------------------------------------------------------------------------------------------------------

def pad_front(prompt, chunk_size, eot):
    """Prompt (B, P) -> (B, P') with P' a positive multiple of K: end-of-text in front, as before any document, so that
    the chunk border falls at the prompt's end. (The authors pad behind it, inside the text.)"""
    padding = -prompt.shape[1] % chunk_size if prompt.shape[1] else chunk_size
    if padding and eot is None:
        raise ValueError("a prompt that does not fill its last chunk needs eot, the id to pad with")
    return F.pad(prompt, (padding, 0), value=eot) if padding else prompt


@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=1.0, eot=None, cache=None, compiled=False, **sampling):
    """Continue prompt (B, P) of any length, P = 0 included; yields tokens (B, K) as they are drawn (AR: K = 1).

    After a sequence's first end-of-text it yields only that token; when all sequences have ended it stops. A text that
    outgrows the context goes on with the last half of it, encoded anew. cache: one of an earlier call with the same B, to
    use again. compiled: one compiled step of constant shapes (a CUDA graph on CUDA), which pays for long texts. sampling:
    the other arguments of `CALM.draw`.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature {temperature} is not in (0, 1]")
    if temperature < 1 and sampling.get("num_candidates", math.inf) < 1 / temperature:
        raise ValueError(f"temperature {temperature} needs at least {math.ceil(1 / temperature)} candidates")
    K, context = model.chunk_size, model.config.block_size
    text = pad_front(prompt, K, eot)
    cache = cache or KVCache(context)
    cache.length = 0

    def step(tokens, position=None):
        """Read chunks (B, T*K), draw the next one (B, K)."""
        return model.draw(model.hidden(tokens, cache, position)[:, -1], temperature, **sampling)[0]

    new = step(text)
    if compiled:
        for store in cache.layers.values():
            torch._dynamo.mark_static_address(store)   # a CUDA graph writes where it wrote when it was recorded
        one_step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for made in range(K, max_new_tokens + K, K):
        if eot is not None:
            is_eot = new == eot
            after = ended[:, None] | (is_eot.cumsum(1) - is_eot.long() > 0)   # behind the first end-of-text
            new = new.masked_fill(after, eot)
            ended = ended | is_eot.any(1)
        yield new
        if made >= max_new_tokens or eot is not None and ended.all():
            return
        text = torch.cat([text, new], dim=1)
        if cache.length == context:
            cache.length = 0
            new = step(text[:, -max(context // 2, 1) * K:])
        elif compiled:
            new = one_step(new, torch.full((1,), cache.length, device=text.device)).clone()
            cache.length += 1
        else:
            new = step(new)


def generate(model, prompt, max_new_tokens, *args, **kwargs):
    """Prompt (B, P) -> tokens (B, P + new): the prompt and up to max_new_tokens more. The rest is as in `stream`."""
    new = list(stream(model, prompt, max_new_tokens, *args, **kwargs))
    return torch.cat([prompt, *new], dim=1)[:, :prompt.shape[1] + max_new_tokens]


CALM.generate = AR.generate = generate   # one loop, as a method of both


# --- Cost -------------------------------------------------------------------------------------------------------------

def flops_per_token(config, autoencoder=None):
    """{"train": x, "inference": x}: FLOPs a token with the paper's accounting (table 1), for any of the three configs; of
    CALM also what it costs to train a part of it, "transformer" or "head".

    PyTorch's counter watches one pass over tensors without memory: a multiplication and an addition are two, attention
    counts in full, 4*T*D a layer. Training is three forward passes; CALM's head then draws N samples, and its frozen
    autoencoder encodes. In inference the head draws one (in num_evals evaluations), and the autoencoder decodes.
    """
    def cost(function, *shape, dtype=torch.float, **kwargs):
        with FlopCounterMode(display=False) as counter:
            function(torch.zeros(shape, dtype=dtype, device="meta"), **kwargs)
        return counter.get_total_flops() / K

    c, K = config, getattr(config, "chunk_size", 1)
    evals = 2 if getattr(c, "head", None) == "flow" else 1                    # the fewest that this head can sample with
    with torch.device("meta"):
        model = (Autoencoder(c) if isinstance(c, AutoencoderConfig) else AR(c) if isinstance(c, ARConfig) else
                 CALM(replace(c, num_evals=evals), Autoencoder(autoencoder))).to("meta")
    if isinstance(c, AutoencoderConfig):
        encode, decode = cost(model.encode, 1, K, dtype=torch.long), cost(model.decode, 1, c.latent_dim)
        return {"train": 3 * (encode + decode), "encode": encode, "decode": decode}
    backbone = cost(model.hidden, 1, c.block_size * K, dtype=torch.long) / c.block_size
    if isinstance(c, ARConfig):
        forward = backbone + cost(model.lm_head, 1, c.n_embd)
        return {"train": 3 * forward, "inference": forward}
    ae, aux = flops_per_token(autoencoder), cost(model.aux, 1, c.n_embd) if c.aux_weight else 0
    width = c.n_embd + c.retrieved * K                                        # of h, with what was retrieved
    one, several = (cost(model.head.sample, 1, width, n=n) / evals for n in (1, c.num_samples))   # of one evaluation
    if hasattr(model.head, "readout"):   # it reads the N samples, and a true vector to learn from
        several += (c.num_samples + 1) * cost(model.head.readout, 1, c.latent_dim)
    return {"train": 3 * (backbone + several + aux) + ae["encode"], "inference": backbone + c.num_evals * one + ae["decode"],
            "transformer": 3 * (backbone + aux), "head": backbone + 3 * several + ae["encode"]}


# --- Loading a run's checkpoint, or the authors' weights ---------------------------------------------------------------

def load_model(out_dir, kind, device="cpu", dtype=torch.float32, **changes):
    """The "calm" or "ar" of a run -> (model in eval mode, checkpoint). Run it under autocast to `dtype`.

    changes: fields of CALM's config to read otherwise than trained (num_evals)."""
    path = Path(out_dir) / f"{kind}.pt"
    checkpoint = load_checkpoint(path, kind)
    try:
        if kind == "ar":
            model = AR(ARConfig(**checkpoint["config"]))
        else:
            autoencoder = Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"]))
            model = CALM(CALMConfig(**{**checkpoint["config"], **changes}), autoencoder)
    except (TypeError, ValueError) as error:   # TypeError: a field that this version does not have
        fail(f"{path}: {error}")
    model.load_state_dict(checkpoint["model"])
    return cast_matrices(model.to(device).eval(), dtype), checkpoint


def cast_matrices(model, dtype):
    """Cast once the weights that autocast would cast at every call: the same results, in less time."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "autoencoder.encoder.embed_tokens":
            module.to(dtype)
    return model


# theirs -> ours, where they differ
OFFICIAL_NAMES = {r"^(.*\.)?(?=(en|de)coder\.)": "autoencoder.", r"transformer\.embed_tokens": "embed_tokens",
                  r"mlp_generator|generative_head\.net": "head", r"time_embed\.mlp": "time_embed"}
OFFICIAL_SIZES = {"vocab_size": "vocab_size", "patch_size": "chunk_size", "latent_size": "latent_dim", "hidden_size": "n_embd",
                  "intermediate_size": "n_ff", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                  "num_mlp_layers": "n_head_layer"}


def our_name(name):
    for theirs, ours in OFFICIAL_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def load_official(folder, device="cpu", dtype=torch.float32, **changes):
    """The model in a directory as the authors published it -> CALM in eval mode, with its matrices in `dtype`.

    Its autoencoder is looked for in the same files, then in the directory that config.json calls `ae_path`, then in one
    named like CALM-Autoencoder beside `folder`. On a CPU what lies in the files in the right type stays there: nothing is
    copied. changes: as in `load_model`."""
    folder = Path(folder)
    config, tensors = read_published(folder)
    if not any("decoder." in name for name in tensors):
        path = Path(str(config.get("ae_path", "")))
        places = [folder / path, folder.parent / path.name, *sorted(folder.parent.glob("*[Aa]utoencoder*"))]
        place = next((p for p in places if p != folder and (p / "config.json").is_file()), folder.parent / "CALM-Autoencoder")
        tensors |= read_published(place)[1]
    state = {our_name(name): tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    try:
        # The autoencoder's embedding is stored under either of two names, or both.
        output = state.pop("autoencoder.decoder.lm_head_weight", None)
        embedding = state.setdefault("autoencoder.encoder.embed_tokens.weight", output)
        if output is not None and not torch.equal(embedding, output):
            raise ValueError("decoder.lm_head_weight is not encoder.embed_tokens.weight")
        if (config.get("num_key_value_heads", config["num_attention_heads"]) != config["num_attention_heads"]
                or config.get("rope_theta", 10000) != 10000):
            raise ValueError("expected num_key_value_heads to be num_attention_heads, and rope_theta 10000")
        sizes = {ours: int(config[theirs]) for theirs, ours in OFFICIAL_SIZES.items()}
        out = len(state.get("head.final_layer.linear.bias", ()))              # only the slow heads have this one
        c = CALMConfig(**sizes, n_noise=int(config.get("noise_size", 64)), num_samples=int(config.get("num_samples", 8)),
                       block_size=min(2048, int(config.get("max_position_embeddings", 2048))),
                       head={0: "energy", sizes["latent_dim"]: "flow", 2 * sizes["latent_dim"]: "diffusion"}[out], **changes)
        ae = AutoencoderConfig(len(embedding), c.chunk_size, c.latent_dim, embedding.shape[1],
                               len(state["autoencoder.encoder.encoder_layers.0.mlp.gate_proj.weight"]),
                               sum("encoder.encoder_layers." in name and "layernorm" in name for name in state))
        with torch.device("meta"):   # no memory for weights that are replaced
            model = cast_matrices(CALM(c, Autoencoder(ae)), dtype)
        types = {name: value.dtype for name, value in model.state_dict().items()}
        model.load_state_dict({name: t.to(types.get(name, t.dtype)) for name, t in state.items()}, assign=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:   # load_state_dict names the tensors
        what = " ".join(str(error).split())[:500]
        fail(f"{folder} is not a published CALM with its autoencoder ({type(error).__name__}: {what})")
    return model.to(device).eval()


def check_vocabulary(model, tokenizer):
    """A published model has one id more than its tokenizer: [PAD]."""
    if model.config.vocab_size - tokenizer.n_vocab not in (0, 1):
        fail(f"the model has a vocabulary of {model.config.vocab_size:,}, but the tokenizer {tokenizer.name} one of "
             f"{tokenizer.n_vocab:,}")
