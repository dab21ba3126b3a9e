"""Temperature from samples alone, generation, loading: what sample.py does.

Statistical claims are tested five standard errors wide, or at a p-value of 1e-5.
"""
import math
import re
from types import SimpleNamespace

import pytest
import torch

import data.prepare
import sample
from helpers import BOTH, EOT, V, assert_one_line, tiny_ar, tiny_calm
from sample import (NEAR, algorithm_2, cast_matrices, counts, generate, less_noise, nearest_chunk,
                    next_chunks, stream, temperature_as_needed, temperature_batch,
                    temperature_exact, whole_chunks)


def draw_chunks(p, N, batch):
    """N x batch samples of an outcome with probabilities p, written as chunks of two tokens."""
    return torch.multinomial(p, N * batch, replacement=True).view(N, batch, 1).expand(-1, -1, 2)


def power(p, temperature):
    return p ** (1 / temperature) / (p ** (1 / temperature)).sum()


# --- Algorithm 2 ---------------------------------------------------------------------------
def frequencies(p, N, temperature, batch, repeats=1):
    picks = [temperature_batch(draw_chunks(p, N, batch), temperature)[:, 0]
             for _ in range(repeats)]
    return torch.cat(picks).bincount(minlength=len(p)).double() / (repeats * batch)


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.4])
def test_batch_sampling_converges_to_the_power_of_the_distribution(temperature):
    torch.manual_seed(0)
    p = 1 / torch.arange(1, 21).double()
    p /= p.sum()
    few, many = (frequencies(p, N, temperature, 1000, repeats=20) for N in (5, 1000))
    far = total_variation(few, power(p, temperature))
    near = total_variation(many, power(p, temperature))
    assert near < 0.02 and near < far   # 20,000 draws of 20 outcomes: an error of about 0.01


def test_batch_sampling_has_the_law_of_algorithm_2():
    """Two outcomes, N = 4, T = 1/2: the law, by enumeration of all counts."""
    torch.manual_seed(0)
    batch = 100_000
    law = 0
    for c in range(5):   # how often the first outcome occurs, and in how many ways twice
        ways = math.comb(c, 2)
        ways_of_the_other = math.comb(4 - c, 2)
        chance = math.comb(4, c) * 0.7 ** c * 0.3 ** (4 - c)
        law += chance * ways / (ways + ways_of_the_other)
    found = frequencies(torch.tensor([0.7, 0.3]).double(), 4, 0.5, batch)[0]
    assert abs(found - law) < 5 * math.sqrt(law * (1 - law) / batch)


def test_batch_sampling_falls_back_to_smaller_orders():
    samples = torch.tensor([[1, 1], [2, 2], [1, 1], [3, 3]])[:, None]     # none is there 4 times
    assert all(temperature_batch(samples, 0.25).tolist() == [[1, 1]] for _ in range(20))
    different = torch.arange(4).view(4, 1, 1).expand(-1, 2000, 2)         # all once: uniform
    seen = temperature_batch(different, 0.5)[:, 0].bincount(minlength=4)
    assert (seen - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


def test_many_candidates_keep_their_weights(monkeypatch):
    """Of 2^20 candidates 60 % are one chunk, 40 % another: at T = 1/2 the first has 9/13."""
    weights = []

    def keep(p, n):
        weights.append(p)
        return torch.zeros(len(p), n, dtype=torch.long)

    monkeypatch.setattr(torch, "multinomial", keep)
    first = torch.arange(2 ** 20) < 0.6 * 2 ** 20
    temperature_batch(first.long().view(-1, 1, 1), 0.5)
    assert weights[0][0, first].sum().item() == pytest.approx(9 / 13, rel=1e-4)


def test_candidates_are_drawn_until_a_chunk_has_come_often_enough():
    """At T = 1/2 a sure row stops at 16 candidates, one without a repetition at the limit."""
    torch.manual_seed(0)
    seen = []

    def draw(m, rows):
        seen.append((m, rows.tolist()))
        sure = torch.full((m, 1, 2), 7)
        different = torch.randint(2 ** 40, (m, 1, 2))
        return torch.cat([sure, different], dim=1)[:, rows]

    tokens, calls = temperature_as_needed(draw, 2, 0.5, num_candidates=40)
    assert tokens[0].tolist() == [7, 7] and calls.tolist() == [16, 40]
    assert seen == [(16, [0, 1]), (16, [1]), (8, [1])]


def test_counts_are_how_often_a_chunk_occurs():
    samples = torch.randint(3, (50, 7, 4))
    assert torch.equal(counts(samples), (samples[:, None] == samples[None]).all(-1).sum(0))


# --- The nearest of m ----------------------------------------------------------------------
def test_the_nearest_sample_is_the_one_that_lies_nearest_to_the_mean_of_its_chunk():
    """Chunk i has the mean 4 e_i. Also when there is not memory for all rows at once."""
    corners = 4 * torch.eye(8)
    vectors = torch.stack([
        torch.stack([corners[1] + 0.5, corners[2] + 0.6 * corners[3], corners[4]]),   # distances
        torch.stack([corners[5], corners[6] + 0.1, corners[4] + 0.1])])   # 1.4, 2.4, 0; 0, 0.3, 0.3
    model = SimpleNamespace(
        autoencoder=SimpleNamespace(tokens=lambda z: z.argmax(-1, keepdim=True),
                                    encode=lambda chunks: (corners[chunks[..., 0]], None)),
        sample_vectors=lambda h, m: vectors[:m, h[:, 0].long()], head=SimpleNamespace())
    h = torch.arange(3.0)[:, None]                                 # row i asks for column i
    assert nearest_chunk(model, h, 1).tolist() == [[1], [2], [4]]
    assert nearest_chunk(model, h, 2).tolist() == [[5], [6], [4]]
    calls = []
    tokens = next_chunks(model, h.repeat(5000, 1), n=2, nearest_of=2, calls=calls)
    assert tokens.shape == (2, 15_000, 1) and set(calls[0].tolist()) == {2}
    assert torch.equal(tokens, torch.tensor([5, 6, 4]).repeat(10_000).view(2, 15_000, 1))


# --- Less noise ----------------------------------------------------------------------------
def test_without_noise_the_energy_head_draws_one_vector_for_each_h():
    """With it, it draws many; and as before, once the scale is back. The scale stands behind
    norm_noise: before it, without a bias, half the noise would be the same as all."""
    model = tiny_calm()
    torch.nn.init.zeros_(model.head.noise_embd.bias)
    h = torch.randn(3, model.config.n_embd)
    noise = torch.rand(5, 3, model.config.n_noise) - 0.5
    usual = model.head.sample(h, 5, noise)
    with less_noise(model.head, 0.0):
        for z in model.head.sample(h, 5).unbind(1):                # (5, L)
            assert torch.allclose(z, z[:1].expand(5, -1), atol=1e-6)
    with less_noise(model.head, 0.5):
        assert not torch.allclose(model.head.sample(h, 5, noise), usual, atol=0.01)
    assert torch.equal(model.head.sample(h, 5, noise), usual)


def test_writing_between_two_steps_does_not_make_a_compiled_model_compile_again():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = tiny_calm()
    faster = torch.compile(model, backend=backend)
    tokens = torch.randint(V, (2, 32))
    faster(tokens)
    graphs = len(compiled)
    generate(model, tokens[:, :8], 8, **NEAR)
    faster(tokens)
    torch.compiler.reset()   # else it remembers these shapes in other tests
    assert graphs == len(compiled) > 0


# --- Algorithm 1 ---------------------------------------------------------------------------
def exact_draws(p, temperature, batch, max_calls=1_000_000):
    return temperature_exact(lambda n: draw_chunks(p, n, batch), batch, temperature, max_calls)


def expected_calls(p, temperature):
    """Theorem 2, but sample j + 1 of the first n is only drawn if the first j are equal."""
    s = 1 / temperature
    first = 1 + sum((p ** j).sum() for j in range(1, math.floor(s)))
    more = (p ** (s - 1)).sum() if s % 1 else 0
    return (first + more) / (p ** s).sum()


@pytest.mark.parametrize("outcomes", [10, 200])
@pytest.mark.parametrize("temperature", [0.9, 0.75, 0.5, 0.4, 1 / 3])
def test_exact_sampling_draws_from_the_power_of_the_distribution(temperature, outcomes):
    torch.manual_seed(0)
    batch = 3000
    p = 1 / torch.arange(1, outcomes + 1).double()
    p /= p.sum()
    tokens, calls = exact_draws(p, temperature, batch)
    expected = batch * power(p, temperature)
    seen = tokens[:, 0].bincount(minlength=outcomes).double()
    often = expected >= 10                                         # the rare ones are one class
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    classes = expected > 0
    chi2 = ((seen - expected) ** 2 / expected)[classes].sum()
    assert torch.special.gammaincc((classes.sum() - 1) / 2, chi2 / 2) > 1e-5   # the p-value
    error = calls.double().std() / batch ** 0.5
    assert abs(calls.double().mean() - expected_calls(p, temperature)) < 5 * error


def test_exact_sampling_hands_over_to_batch_sampling_past_its_cap():
    torch.manual_seed(0)
    p = torch.full((200,), 1 / 200).double()
    with pytest.warns(UserWarning, match="over 50 samples"):
        tokens, calls = exact_draws(p, 0.25, 100, max_calls=50)
    assert tokens.shape == (100, 2) and (calls == 50 + 200).all()  # Theorem 2 expects 32 million
    calls = exact_draws(torch.tensor([0.5, 0.5]).double(), 0.5, 100, max_calls=50)[1]
    assert (calls < 50).all()


# --- Of a model ----------------------------------------------------------------------------
@torch.no_grad()
def test_both_algorithms_give_a_model_the_same_frequencies():
    torch.manual_seed(0)
    model = tiny_calm(K=1)
    h = torch.randn(32).expand(2000, -1)
    exact = next_chunks(model, h, 0.7, sampler=temperature_exact)[0, :, 0]
    exact = exact.bincount(minlength=V) / 2000
    paper = algorithm_2(300, "batch")
    batch = next_chunks(model, h, 0.7, sampler=paper)[0, :, 0].bincount(minlength=V) / 2000
    assert (exact - batch).abs().max() < 5 * (0.25 * 2 / 2000) ** 0.5 and exact.max() < 0.9


@torch.no_grad()
def test_ar_temperature_sharpens_the_softmax():
    model = tiny_ar()
    h = torch.randn(1, 32).expand(100_000, -1)
    p = (model.lm_head(h[0]) / 0.5).softmax(-1)
    found = next_chunks(model, h, 0.5)[0, :, 0].bincount(minlength=V) / len(h)
    assert ((found - p).abs() < 5 * (p * (1 - p) / len(h)).sqrt() + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["discrete", "continuous", "both", "ar"])
def test_casting_matrices_once_equals_autocast(kind):
    tokens = torch.arange(32)[None] % V
    model = tiny_ar() if kind == "ar" else tiny_calm(input_mode=kind)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            h = model.hidden(tokens)
            torch.manual_seed(0)
            found.append((h, next_chunks(model, h[:, -1])[0]))
        cast_matrices(model, torch.bfloat16)
    assert model.transformer.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# --- Generation ----------------------------------------------------------------------------
def test_a_chunk_ends_where_the_prompt_ends_and_nothing_is_put_before_it():
    """Only what is shorter than a chunk is filled up."""
    assert whole_chunks(torch.tensor([[1, 2, 3, 4, 5, 6]]), 4, EOT).tolist() == [[3, 4, 5, 6]]
    assert whole_chunks(torch.tensor([[1, 2, 3, 4]]), 4, EOT).tolist() == [[1, 2, 3, 4]]
    assert whole_chunks(torch.tensor([[1]]), 4, EOT).tolist() == [[EOT, EOT, EOT, 1]]
    assert whole_chunks(torch.zeros(1, 0).long(), 4, EOT).tolist() == [[EOT] * 4]


def test_a_text_that_begins_with_nothing_begins_as_a_document_does(write, trained, monkeypatch):
    """The model reads the end of a document and a border; it prints neither."""
    read = []

    def remember(model, tokens, *_, **__):
        read.append(tokens[0].tolist())
        return iter([])

    monkeypatch.setattr(sample, "stream", remember)
    assert write().out == "\n" and write("--start", "x").out == "x\n"
    assert write("--start", r"a word\n").out == "a word\n\n"
    empty, short, whole = read
    text = data.prepare.load_data(trained / "foxes4").train
    assert empty == [*text[-31:].tolist(), 256]        # half of the context of 64
    assert short == [*empty, ord("x")]
    assert bytes(whole) == b"a word\n"


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("length", [0, 3, 5, 8])
def test_prompts_of_any_length_are_continued(make, temperature, length):
    model = make()
    prompt = torch.randint(V - 1, (3, length))
    texts = []
    for _ in range(2):   # the same seed, the same text
        torch.manual_seed(1)
        texts.append(generate(model, prompt, 10, temperature, EOT))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:, :length], prompt)
    assert length < texts[0].shape[1] <= length + 10


@pytest.mark.parametrize("make", BOTH)
def test_after_end_of_text_comes_only_end_of_text(make):
    torch.manual_seed(0)
    text = generate(make(), torch.randint(V - 1, (50, 4)), 40, eot=EOT)[:, 4:]
    ended = (text == EOT).cumsum(1) > 0
    assert ended.any() and not ended.all()
    assert (text[ended] == EOT).all()


def test_generation_stops_when_every_text_has_ended(monkeypatch):
    monkeypatch.setattr(sample, "next_chunks", lambda model, h, *_: torch.full((1, len(h), 1), EOT))
    assert len(list(stream(tiny_ar(), torch.randint(V - 1, (2, 4)), 30, eot=EOT))) == 1


@pytest.mark.parametrize("make", BOTH)
def test_a_text_that_outgrows_the_context_goes_on_with_the_last_half_of_it(make, monkeypatch):
    model = make()
    K = model.chunk_size
    context = model.config.block_size
    seen = []

    def remember(model, h, *_):
        seen.append(h)
        return torch.randint(V, (1, len(h), K))

    monkeypatch.setattr(sample, "next_chunks", remember)
    text = generate(model, torch.randint(V, (1, K)), (context + 3) * K)
    assert text.shape[1] == (context + 4) * K
    # Draw i sees i + 1 chunks; draw number `context` is the first after the cache was full.
    half = text[:, (context + 1 - context // 2) * K:(context + 1) * K]
    expected = model.hidden(half)[:, -1]
    torch.testing.assert_close(seen[context], expected, rtol=1e-4, atol=1e-5)


# --- python sample.py ----------------------------------------------------------------------
@pytest.fixture
def write(run, trained):
    """Run sample.py on the trained model."""

    def write(*flags, **how):
        return run(sample, "--out_dir", trained / "out", "--device", "cpu", *flags, **how)

    return write


def test_a_prompt_comes_from_the_command_line_or_stdin_or_is_empty(write):
    few = ["--max_new_tokens", 9]
    assert write(*few).code == 0
    assert write(*few, "--start", "the quick").out.startswith("the quick")
    assert write(*few, "--start", "-", stdin=b"the quick").out.startswith("the quick")
    result = write(*few, "--start", "-", stdin=b"\xff\0 any \xed\xa0\x80 bytes")
    assert result.code == 0 and result.out.startswith("\ufffd\0 any ")


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_a_prompt_longer_than_the_context_goes_on_from_its_last_part_and_says_so(model, write):
    flags = ["--model", model, "--max_new_tokens", 20]
    part = ("the quick brown fox jumps over the lazy dog. " * 2)[:64]
    whole = write(*flags, "--start", "x" * 36 + part)
    short = write(*flags, "--start", part)
    assert whole.code == short.code == 0 and whole.out == short.out
    assert "[a prompt of 100 tokens: going on from its last 64]" in whole.err
    assert "a prompt of" not in short.err


def test_same_seed_same_text_another_seed_another(write):
    flags = ["--model", "ar", "--max_new_tokens", 30]
    first, again, other = (write(*flags, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("model", ["calm", "ar"])
def test_several_texts_are_drawn_side_by_side(model, write):
    """Each begins with the prompt and is whole; the same seed draws the same texts."""
    flags = ["--model", model, "--start", "the quick", "--max_new_tokens", 39, "--texts", 3]
    result = write(*flags)
    texts = re.split(r"--- text \d -+\n", result.out)[1:]
    assert len(texts) == 3 and len(set(texts)) > 1
    assert all(text.startswith("the quick") and len(text) == 9 + 39 + 1 for text in texts)
    assert "[117 tokens in" in result.err
    assert write(*flags).out == result.out
    barred = write(*flags, "--chunks").out
    assert barred.replace("|", "") == result.out and barred.count("|") >= 30


def test_a_bar_stands_before_each_chunk(write):
    """Between two bars are at most K tokens, and without the bars it is the same text."""
    flags = ["--start", "the quick", "--max_new_tokens", 40]
    plain = write(*flags).out
    barred = write(*flags, "--chunks").out
    assert "|" not in plain and barred.replace("|", "") == plain
    chunks = barred.removeprefix("the quick").strip("\n").split("|")[1:]
    assert len(chunks) == 10 and max(map(len, chunks)) <= 4


def test_a_bar_tears_no_character(write, monkeypatch):
    """A character of several bytes may begin in a chunk and end in the next."""
    text = "é, ü: naïve café. 日本語と、漢字。"
    tokens = torch.tensor([list(text.encode())])
    monkeypatch.setattr(sample, "stream", lambda *_, **__: tokens.split(4, dim=1))
    plain = write().out
    assert text in plain and write("--chunks").out.replace("|", "") == plain


def test_the_baseline_takes_no_notice_of_calms_flags(write):
    cold = ["--temperature", 0.004, "--max_new_tokens", 8]   # 250 candidates, if they were needed
    assert write(*cold, "--model", "ar", "--num_evals", 4, "--sampler", "exact",
                 "--noise", 0.5).code == 0
    assert write(*cold).code == 2


@pytest.mark.filterwarnings("ignore:a chunk took over")
def test_the_cost_of_a_temperature_is_said(write):
    flags = ["--temperature", 0.5, "--max_new_tokens", 8]
    assert " samples per chunk]" in write(*flags).err
    assert ", 2 samples per chunk]" in write("--sampler", "near", "--max_new_tokens", 8).err
    assert_one_line(write(*flags, "--sampler", "near"), "--sampler near has no temperature")
    paper = write(*flags, "--sampler", "batch", "--num_candidates", 50)
    assert ", 50 samples per chunk]" in paper.err
    exact = write(*flags, "--sampler", "exact", "--max_calls", 1).err
    assert ", 201 samples per chunk, 100% of them left to Algorithm 2]" in exact
