"""
CALM: a language model that predicts the next vector in place of the next token (Shao et al., arXiv 2510.27688).

Read from top to bottom: the Transformer; the energy head and its loss; temperature from samples alone; the two models
(CALM and its token-by-token baseline AR); generation; what it costs in FLOPs; loading a checkpoint.

A training step in five lines:
    chunks of K tokens      -> one input vector each     (CALM.compress)
    input vectors           -> hidden states h_t         (Transformer)
    h_t and noise           -> N samples of z_{t+1}      (EnergyHead: one step, no likelihood)
    chunk t+1               -> M samples of z_{t+1}      (the frozen autoencoder's posterior)
    the two sets of samples -> loss                      (energy_score)

Shapes: B sequences, T chunks in a sequence, K tokens in a chunk, V vocabulary, D width, L latent size, N head samples,
M target samples, P positions (B and T flattened). tokens (B, T*K), h (B, T, D), z (..., L).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import Autoencoder, AutoencoderConfig, RMSNorm, SwiGLU, check_sizes, init_weights, load_checkpoint
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
    input_mode: str = "discrete"   # what the Transformer reads: discrete (token embeddings), continuous (latents), both
    head: str = "energy"           # generative head
    aux_weight: float = 0.0        # departure from the paper: weight of a next-chunk cross-entropy read from h; unused at inference

    def __post_init__(self):
        check_heads(self)
        if self.num_samples < 2:
            fail(f"num_samples must be at least 2 (the energy score compares samples), not {self.num_samples}")
        if not 0 < self.alpha < 2:
            fail(f"alpha must be in (0, 2), where the energy score is strictly proper, not {self.alpha}")


@dataclass
class ARConfig:
    vocab_size: int = 257
    n_embd: int = 768
    n_ff: int = 2048
    n_layer: int = 12
    n_head: int = 16
    block_size: int = 2048         # context in tokens

    def __post_init__(self):
        check_heads(self)


def check_heads(config):
    check_sizes(config)
    if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
        fail(f"n_embd {config.n_embd} must be divisible by n_head {config.n_head}, into heads of an even width")


# --- The Transformer (section 3.3), LLaMA's: RMSNorm, rotary positions, causal attention, SwiGLU, no biases -----------

def rotary_tables(head_dim, positions, theta=10000.0):
    """cos and sin of position * frequency, (positions, head_dim): the half-rotation layout."""
    frequency = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)   # (hs/2,)
    angle = torch.outer(torch.arange(positions).float(), frequency)           # (T, hs/2)
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
        self.layers = {}    # layer -> (2, B, nh, block_size, hs)

    def update(self, layer, k, v, position=None):
        """Store k, v (B, nh, T, hs) of `layer` -> keys and values to attend to, and a mask of them or None.

        After the filled positions; or, for one position given as a tensor (1,), there: with all block_size positions to
        attend to, the empty ones masked off, so that every step has the same shapes (what a CUDA graph needs)."""
        B, nh, T, hs = k.shape
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(2, B, nh, self.block_size, hs)   # not empty: a NaN stays one under a mask
        store = self.layers[layer]
        if position is not None:
            store.index_copy_(3, position, torch.stack([k, v]))
            return store[0], store[1], torch.arange(self.block_size, device=k.device)[None] <= position
        end = self.length + T
        store[0, :, :, self.length:end], store[1, :, :, self.length:end] = k, v
        mask = None
        if 1 < T < end:   # several new positions after cached ones: row i sees the cached and the first i new
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(end - T)
        return store[0, :, :, :end], store[1, :, :, :end], mask


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, cos, sin, cache=None, position=None):
        q, k, v = (proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)   # (B, nh, T, hs)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if x.device.type == "cpu":
            v = v.float()   # attention on a CPU is no slower in float32 than in bfloat16, and for a single query several times faster
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v, position)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and x.shape[1] > 1)
        return self.o_proj(y.transpose(1, 2).flatten(-2))                     # (B, T, D)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd)
        self.mlp = SwiGLU(config.n_embd, config.n_ff)

    def forward(self, x, cos, sin, cache=None, position=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, position)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Vectors in, hidden states out: (B, T, D) -> (B, T, D). CALM feeds it chunks, AR feeds it tokens."""
    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd)
        cos, sin = rotary_tables(config.n_embd // config.n_head, config.block_size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, cache=None, position=None):
        """`position`: where a single vector stands, as a tensor (1,); then it is the caller who counts cache.length."""
        if position is None:
            start = cache.length if cache is not None else 0
            end = start + x.shape[1]
            if end > self.block_size:
                raise ValueError(f"{end} positions, but the context is {self.block_size}")
        where = position if position is not None else slice(start, end)
        for block in self.blocks:
            x = block(x, self.cos[where], self.sin[where], cache, position)
        if cache is not None and position is None:
            cache.length = end
        return self.norm(x)


# --- The energy head (section 3.2): h and noise -> z, in one step -----------------------------------------------------

class EnergyBlock(nn.Module):
    """x + Linear4(silu(g) * u), where g, u come from a three-layer MLP on [LayerNorm(x), c]."""
    def __init__(self, D):
        super().__init__()
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.linear1 = nn.Linear(2 * D, D)
        self.linear2 = nn.Linear(D, D)
        self.linear3 = nn.Linear(D, 2 * D)
        self.linear4 = nn.Linear(D, D)

    def forward(self, x, c):
        # linear1([LayerNorm(x), c]) in two halves: c (..., D) is the same for all N samples of x (N, ..., D), so its
        # half is computed once and not N times.
        of_x, of_c = self.linear1.weight.chunk(2, dim=1)                      # (D, D) each
        y = F.linear(self.norm(x), of_x) + F.linear(c, of_c, self.linear1.bias)
        g, u = self.linear3(F.silu(self.linear2(F.silu(y)))).chunk(2, dim=-1)
        return x + self.linear4(F.silu(g) * u)


class EnergyHead(nn.Module):
    """Draws z_{t+1} given h_t. Two verbs, as every head: a loss and a sample."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.n_embd
        self.noise_embed = nn.Linear(config.n_noise, D)
        self.noise_norm = nn.LayerNorm(D, eps=1e-6)
        self.context_embed = nn.Linear(D, D)
        self.context_norm = nn.LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList([EnergyBlock(D) for _ in range(config.n_head_layer)])
        self.out_norm = nn.LayerNorm(D, eps=1e-6)
        self.out1 = nn.Linear(D, D)
        self.out2 = nn.Linear(D, config.latent_dim)

    def sample(self, h, n, noise=None):
        """n samples given h (..., D) -> z (n, ..., L). `noise` (n, ..., n_noise): default U[-0.5, 0.5]."""
        if noise is None:
            noise = torch.rand(n, *h.shape[:-1], self.config.n_noise, device=h.device) - 0.5
        x = self.noise_norm(self.noise_embed(noise))                          # (n, ..., D)
        c = self.context_norm(self.context_embed(h))                          # (..., D)
        for block in self.blocks:
            x = block(x, c)
        return self.out2(F.silu(self.out1(self.out_norm(x))))                 # (n, ..., L)

    def loss(self, h, mean, log_std):
        """Energy loss of each position: h (P, D), posterior mean and log_std (P, L) of the chunk to come -> (P,)."""
        x = self.sample(h, self.config.num_samples).float() - mean            # (N, P, L)
        y = half_of_targets(log_std, self.config.num_targets)                 # (M/2, P, L)
        # Both minus the mean: distances stay, and float32 keeps more digits.
        return energy_score(x, y, self.config.alpha, mirrored=True)


def half_of_targets(log_std, M):
    """M/2 (rounded up) draws from N(0, std^2) for log_std (P, L) -> (M/2, P, L). The other half are their mirror images:
    -y is as fair a draw as y, so the loss stays unbiased, with half the random numbers and less variance."""
    P, L = log_std.shape
    return (torch.randn(P, (M + 1) // 2, L, device=log_std.device) * log_std.exp()[:, None]).transpose(0, 1)


def distances(x, y, alpha):
    """|x_n - y_m|^alpha for x (P, N, L), y (P, M, L) -> (P, N, M), by matrix products: |x|^2 + |y|^2 - 2 x.y.

    Never a tensor (P, N, M, L). The floor under the square keeps the gradient finite (zero) where two points meet.
    """
    x2, y2 = (torch.linalg.vector_norm(v, dim=-1) ** 2 for v in (x, y))       # (P, N), (P, M)
    squares = torch.baddbmm(x2[:, :, None] + y2[:, None, :], x, y.transpose(1, 2), alpha=-2)
    return squares.clamp_min(1e-10) ** (alpha / 2)


def energy_score(x, y, alpha=1.0, mirrored=False):
    """The energy loss (equation 12) of samples x (N, P, L) for targets y (M, P, L), or y and -y -> (P,). In float32.

    2 E|x - y|^alpha - E|x - x'|^alpha, estimated without bias. For 0 < alpha < 2 its expectation is smallest exactly
    where x and y have the same distribution (a strictly proper score): the first term pulls samples to the target, the
    second keeps them apart.
    """
    N, M = len(x), len(y)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float().transpose(0, 1), y.float().transpose(0, 1)           # (P, N, L), (P, M, L)
        to_targets = distances(x, y, alpha).sum((1, 2)) / (N * M)
        if mirrored:   # |x - (-y)| = |-x - y|
            to_targets = (to_targets + distances(-x, y, alpha).sum((1, 2)) / (N * M)) / 2
        others = 1 - torch.eye(N, device=x.device)                            # n != k
        to_each_other = (distances(x, x, alpha) * others).sum((1, 2)) / (N * (N - 1))
        return 2 * to_targets - to_each_other


# --- Temperature without likelihoods (section 5) ----------------------------------------------------------------------

def temperature_batch(samples, temperature):
    """Algorithm 2: from N samples of a chunk, pick one as if drawn from P^(1/T).

    samples (N, batch, K), temperature in (0, 1] -> tokens (batch, K).
    With s = 1/T = n, a chunk seen c times has C(c, n) ways of being drawn n times running, which is what P^n weighs. If
    no chunk was seen n times, the algorithm tries n - 1, n - 2, ...: that is, n is cut to the largest count. Each of a
    chunk's c copies carries C(c, s) / c, so that drawing a copy draws the chunk; C is taken through the Gamma function.
    """
    N, batch, _ = samples.shape
    same = (samples[:, None] == samples[None]).all(-1)                        # (N, N, batch)
    count = same.sum(0).float()                                               # c of each copy's chunk, (N, batch)
    s = count.amax(0).clamp_max(1 / temperature)                              # (batch,)
    log_ways = (count + 1).lgamma() - (s + 1).lgamma() - (count - s + 1).lgamma() - count.log()
    log_ways = log_ways.masked_fill(count < s, -math.inf)
    pick = torch.multinomial(log_ways.softmax(0).T, 1).squeeze(1)             # (batch,)
    return samples[pick, torch.arange(batch, device=samples.device)]


# --- The two models ---------------------------------------------------------------------------------------------------

class CALM(nn.Module):
    def __init__(self, config, autoencoder):
        super().__init__()
        c, K, D = config, config.chunk_size, config.n_embd
        ae = autoencoder.config
        for name in ("vocab_size", "chunk_size", "latent_dim"):
            if getattr(c, name) != getattr(ae, name):
                fail(f"the model's {name} is {getattr(c, name)}, but its autoencoder's is {getattr(ae, name)}")
        self.config, self.chunk_size = config, K
        self.autoencoder = autoencoder.requires_grad_(False)
        if c.input_mode in ("discrete", "both"):
            self.embed = nn.Embedding(c.vocab_size, D)
            self.compress = nn.Sequential(nn.Linear(K * D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D),
                                          nn.LayerNorm(D, eps=1e-6))
        if c.input_mode in ("continuous", "both"):
            self.latent_in = nn.Linear(c.latent_dim, D)
        self.transformer = Transformer(c)
        self.head = EnergyHead(c)
        if c.aux_weight:
            self.aux = nn.Linear(D, K * c.vocab_size)
        for module in self.children():
            if module is not self.autoencoder:
                module.apply(init_weights)
        nn.init.zeros_(self.head.out2.weight)   # the first samples are all zero, and so are their gradients into h

    def train(self, mode=True):
        super().train(mode)
        self.autoencoder.eval()   # frozen: no dropout, no masking
        return self

    def inputs(self, tokens):
        """tokens (B, T*K) -> one vector a chunk (B, T, D)."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))                   # (B, T, K)
        x = 0
        if self.config.input_mode in ("discrete", "both"):
            x = self.compress(self.embed(chunks).flatten(-2))                 # (B, T, K*D) -> (B, T, D)
        if self.config.input_mode in ("continuous", "both"):
            x = x + self.latent_in(self.autoencoder.encode(chunks)[0])
        return x

    def hidden(self, tokens, cache=None, position=None):
        """tokens (B, T*K) -> h (B, T, D): h_t has seen chunks up to and with t, and predicts chunk t+1."""
        return self.transformer(self.inputs(tokens), cache, position)

    def loss(self, tokens):
        """tokens (B, (T+1)*K): chunk t+1 from h_t, for T positions -> scalar, metrics."""
        chunks = tokens.unflatten(1, (-1, self.chunk_size))                   # (B, T+1, K)
        h = self.hidden(tokens[:, :-self.chunk_size]).flatten(0, 1)           # (P, D), P = B*T
        targets = chunks[:, 1:].flatten(0, 1)                                 # (P, K)
        with torch.no_grad():
            mean, log_std = (v.float() for v in self.autoencoder.encode(targets))
        energy = self.head.loss(h, mean, log_std).mean()
        loss, metrics = energy, {"energy": energy.detach()}
        if self.config.aux_weight:
            logits = self.aux(h).unflatten(-1, (self.chunk_size, -1)).float()  # (P, K, V)
            aux = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss, metrics["aux"] = energy + self.config.aux_weight * aux, aux.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def sample_chunks(self, h, n):
        """n next chunks given h (..., D) -> tokens (n, ..., K). Decoded in slices: of the logits only the argmax is kept."""
        z = self.head.sample(h, n)                                            # (n, ..., L)
        slice_size = 2 ** (27 if z.is_cuda else 23)   # logits at a time: on a CPU, what its cache holds
        rows = max(1, slice_size // (self.chunk_size * self.config.vocab_size))
        tokens = [self.autoencoder.decode(part).max(-1).indices for part in z.flatten(0, -2).split(rows)]   # argmax: slower
        return torch.cat(tokens).view(*z.shape[:-1], self.chunk_size)

    def draw(self, h, temperature=1.0, num_candidates=200):
        """One next chunk for each h (B, D) -> tokens (B, K)."""
        if temperature == 1:
            return self.sample_chunks(h, 1)[0]
        return temperature_batch(self.sample_chunks(h, num_candidates), temperature)


class AR(nn.Module):
    """The token-by-token baseline: the same Transformer between an embedding and a softmax."""
    def __init__(self, config):
        super().__init__()
        self.config, self.chunk_size = config, 1
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(init_weights)

    def hidden(self, tokens, cache=None, position=None):
        """tokens (B, T) -> h (B, T, D)."""
        return self.transformer(self.embed(tokens), cache, position)

    def loss(self, tokens):
        """tokens (B, T+1): cross-entropy of token t+1 given the ones before, in nats -> scalar, metrics."""
        logits = self.lm_head(self.hidden(tokens[:, :-1])).float()            # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"loss": loss.detach()}

    def draw(self, h, temperature=1.0, num_candidates=None):
        """One next token for each h (B, D) -> tokens (B, 1), by softmax temperature."""
        return torch.multinomial((self.lm_head(h).float() / temperature).softmax(-1), 1)


# --- Generation -------------------------------------------------------------------------------------------------------

def pad_front(prompt, chunk_size, eot):
    """Prompt (B, P) -> (B, P') with P' a positive multiple of K: end-of-text in front, as before any document, so that
    the chunk border falls at the prompt's end. (The authors pad behind it, inside the text.)"""
    padding = -prompt.shape[1] % chunk_size if prompt.shape[1] else chunk_size
    if padding and eot is None:
        raise ValueError("a prompt that does not fill its last chunk needs eot, the id to pad with")
    return F.pad(prompt, (padding, 0), value=eot) if padding else prompt


@torch.inference_mode()
def stream(model, prompt, max_new_tokens, temperature=1.0, num_candidates=200, eot=None, cache=None, compiled=False):
    """Continue prompt (B, P) of any length, P = 0 included; yields tokens (B, K) as they are drawn (AR: K = 1).

    After a sequence's first end-of-text it yields only that token; when all sequences have ended it stops. A text that
    outgrows the context goes on with the last half of it, encoded anew. cache: one of an earlier call with the same B, to
    use again. compiled: one compiled step of constant shapes (a CUDA graph on CUDA), which pays for long texts.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature {temperature} is not in (0, 1]")
    if temperature < 1 and num_candidates < 1 / temperature:
        raise ValueError(f"temperature {temperature} needs at least {math.ceil(1 / temperature)} candidates")
    K, context = model.chunk_size, model.config.block_size
    text = pad_front(prompt, K, eot)
    cache = cache or KVCache(context)
    cache.length = 0

    def step(tokens, position=None):
        """Read chunks (B, T*K), draw the next one (B, K)."""
        return model.draw(model.hidden(tokens, cache, position)[:, -1], temperature, num_candidates)

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
    """{"train": x, "inference": x}: FLOPs a token with the paper's accounting (table 1), for any of the three configs.

    A multiplication and an addition are two. Attention is counted at full context, 4*T*D a layer; training is three
    forward passes; CALM's head runs N samples in training and one in inference, and its frozen autoencoder encodes in
    training and decodes in inference.
    """
    c = config
    if isinstance(c, AutoencoderConfig):
        K, H, half = c.chunk_size, c.n_embd, c.n_layer // 2
        block = 3 * H * c.n_ff
        side = half * K * block + K * H * H + (c.n_layer - half) * block      # the same matrices on both sides
        encode, decode = 2 * (side + 2 * H * c.latent_dim), 2 * (side + H * c.latent_dim + K * H * c.vocab_size)
        return {"train": 3 * (encode + decode) / K, "encode": encode / K, "decode": decode / K}
    D = c.n_embd
    backbone = c.n_layer * (2 * (4 * D * D + 3 * D * c.n_ff) + 4 * c.block_size * D)
    if isinstance(c, ARConfig):
        forward = backbone + 2 * D * c.vocab_size
        return {"train": 3 * forward, "inference": forward}
    K, ae = c.chunk_size, flops_per_token(autoencoder)
    if c.input_mode != "continuous":
        backbone += 2 * (K * D * 2 * D + 2 * D * D)
    if c.input_mode != "discrete":
        backbone += 2 * c.latent_dim * D + K * ae["encode"]
    head = 2 * (c.n_noise * D + D * D + 6 * c.n_head_layer * D * D + D * D + D * c.latent_dim)
    aux = 2 * D * K * c.vocab_size if c.aux_weight else 0
    return {"train": 3 * (backbone + c.num_samples * head + aux) / K + ae["encode"],
            "inference": (backbone + head) / K + ae["decode"]}


# --- Loading ----------------------------------------------------------------------------------------------------------

def load_model(out_dir, kind, device="cpu", dtype=torch.float32):
    """The "calm" or "ar" of a run -> (model in eval mode, checkpoint). Run it under autocast to `dtype`."""
    checkpoint = load_checkpoint(Path(out_dir) / f"{kind}.pt", kind)
    if kind == "ar":
        model = AR(ARConfig(**checkpoint["config"]))
    else:
        model = CALM(CALMConfig(**checkpoint["config"]), Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"])))
    model.load_state_dict(checkpoint["model"])
    return cast_matrices(model.to(device).eval(), dtype), checkpoint


def cast_matrices(model, dtype):
    """Cast once the weights that autocast would cast at every call: the same results, in less time."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name == "autoencoder.encoder.embed":
            module.to(dtype)
    return model
