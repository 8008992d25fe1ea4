"""Parameter counts and FLOPs against published numbers and formulas written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megazero.config.layout import padded_vocab_size
from megazero.config.schema import TransformerConfig
from megazero.plan.flops import flops_per_token, parameter_count


def gpt2(layers: int = 12, hidden: int = 768, heads: int = 12, **changes) -> TransformerConfig:
    """GPT-2's architecture, resolved; 124M by default."""
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "max_position_embeddings": 1024,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "activation": "gelu_tanh",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": False,
        "vocab_size": 50257,
    }
    return TransformerConfig(**{**sizes, **changes})


LLAMA3_8B = TransformerConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    max_position_embeddings=8192,
    vocab_size=128256,
)

QWEN3_0_6B = TransformerConfig(  # heads wider than hidden / heads, qk-norm, tied
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    max_position_embeddings=40960,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=False,
    vocab_size=151936,
)

QWEN2_0_5B = replace(  # biases on q, k, v alone
    QWEN3_0_6B,
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    kv_channels=64,
    qk_layernorm=False,
    add_qkv_bias=True,
)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (gpt2(), 124_439_808),
        (gpt2(24, 1024, 16), 354_823_168),
        (gpt2(36, 1280, 20), 774_030_080),
        (gpt2(48, 1600, 25), 1_557_611_200),
        (LLAMA3_8B, 8_030_261_248),
        (QWEN3_0_6B, 596_049_920),
        (QWEN2_0_5B, 494_032_768),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama3-8b", "qwen3-0.6b", "qwen2-0.5b"],
)
def test_published_parameter_counts(model, count):
    assert parameter_count(model) == count


def test_padding_adds_embedding_rows():
    assert padded_vocab_size(50257, 128) == 50304
    assert padded_vocab_size(50304, 128) == 50304
    assert parameter_count(gpt2(), padded=True) - parameter_count(gpt2()) == 47 * 768
    untied = gpt2(untie_embeddings_and_output_weights=True)
    assert parameter_count(untied) - parameter_count(gpt2()) == 50257 * 768
    assert parameter_count(untied, padded=True) - parameter_count(untied) == 2 * 47 * 768


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"position_embedding_type": "rope"}, -1024 * 768),
        ({"normalization": "RMSNorm"}, -(2 * 12 + 1) * 768),
        ({"qk_layernorm": True}, 12 * 2 * 2 * 64),
        ({"add_bias_linear": False}, -12 * (3 * 768 + 768 + 3072 + 768)),
        ({"add_bias_linear": False, "add_qkv_bias": True}, -12 * (768 + 3072 + 768)),
        ({"add_qkv_bias": True}, 0),
        ({"activation": "swiglu"}, 12 * (768 * 3072 + 3072)),
        ({"num_query_groups": 1}, -12 * 2 * 11 * 64 * 769),
    ],
)
def test_each_variant_counts_its_own_parameters(change, difference):
    assert parameter_count(gpt2(**change)) - parameter_count(gpt2()) == difference


def test_flops_of_llama3_8b_by_hand():
    attention = 2 * 4096 * (4096 + 2 * 1024) + 2 * 4096 * 4096  # q, k, v; output
    core = 2 * 8192 * 4096  # scores and values, half of the square
    mlp = 3 * 2 * 4096 * 14336
    logits = 2 * 4096 * 128256
    assert flops_per_token(LLAMA3_8B, 8192) == 3 * (32 * (attention + core + mlp) + logits)


def test_the_vocabulary_is_padded_and_the_core_grows_with_the_sequence():
    assert flops_per_token(gpt2(), 1024) == flops_per_token(gpt2(vocab_size=50304), 1024)
    assert flops_per_token(gpt2(), 2048) - flops_per_token(gpt2(), 1024) == 3 * 12 * 2 * 1024 * 768


# SC21, Table 1 (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473): s = 2048, V = 51200, GPT-3's architecture.
SC21 = [  # heads, hidden, layers, batch, GPUs, TFLOP/s per GPU -> billions of parameters, seconds an iteration
    (24, 2304, 24, 512, 32, 137, 1.65, 3.53),
    (32, 4096, 36, 512, 128, 142, 7.47, 3.70),
    (64, 8192, 48, 1536, 512, 138, 39.10, 14.45),
    (96, 12288, 80, 2304, 1536, 148, 145.62, 24.82),
    (160, 25600, 128, 3072, 3072, 163, 1008.04, 102.63),
]


@pytest.mark.parametrize(("heads", "h", "layers", "batch", "gpus", "tflops", "billions", "seconds"), SC21)
def test_sc21_formulas(heads, h, layers, batch, gpus, tflops, billions, seconds):
    s, vocab = 2048, 51200
    model = gpt2(layers, h, heads, max_position_embeddings=s, vocab_size=vocab)
    paper = 12 * layers * h**2 * (1 + 13 / (12 * h) + (vocab + s) / (12 * layers * h))
    assert parameter_count(model) == pytest.approx(paper + 2 * h, rel=1e-12)  # the paper leaves out the last norm
    assert parameter_count(model) / 1e9 == pytest.approx(billions, abs=0.006)

    other_half_of_the_core = 3 * layers * 2 * s * h
    whole = flops_per_token(model, s) + other_half_of_the_core
    assert whole == pytest.approx(72 * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h)), rel=1e-12)

    logits = 6 * h * vocab
    recomputed = (whole - logits) * 4 / 3 + logits  # one more forward of every block
    assert recomputed * batch * s / (gpus * tflops * 1e12) == pytest.approx(seconds, abs=0.006)


def test_an_unresolved_model_is_an_internal_error():
    with pytest.raises(AssertionError, match="resolve the configuration first"):
        parameter_count(TransformerConfig())
