"""RoPE against its formula, complex rotation, and the frequencies of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megazero.ops.rope import apply_rope, apply_rope_reference, rope_frequencies, rope_table
from tests.ops.against import DTYPES, assert_equals_reference


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 6, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)  # [b, s, heads, d]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
def test_equals_the_formula(rotary_dim: int, dtype: torch.dtype) -> None:
    table = rope_table(torch.arange(6).unsqueeze(0), rope_frequencies(rotary_dim, 100.0))
    assert_equals_reference(lambda x: apply_rope(x, table), lambda x: apply_rope_reference(x, table), example(dtype))


def test_is_a_rotation_of_complex_numbers() -> None:
    """Pairs are (i, i + rotary_dim / 2); channels beyond rotary_dim stay."""
    x, positions = example(), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 70]])
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    angles = positions[..., None, None] * frequencies  # [b, s, 1, 4]
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag, x[..., 8:]], dim=-1)
    got = apply_rope(x, rope_table(positions, rope_frequencies(8, 10000.0)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    q, k = example()[:, :1], example()[:, 1:2]

    def score(at_q: int, at_k: int) -> Tensor:
        tables = [rope_table(torch.tensor([[at]]), rope_frequencies(16, 100.0)) for at in (at_q, at_k)]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum(-1)

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert (score(7, 3) - score(7, 4)).abs().max() > 0.1


def test_a_view_of_a_larger_tensor_is_left_alone() -> None:
    whole = example()
    before = whole.clone()
    part = whole[:, :, 1:2]
    table = rope_table(torch.arange(6).unsqueeze(0), rope_frequencies(16, 100.0))
    torch.testing.assert_close(apply_rope(part, table), apply_rope_reference(part.contiguous(), table))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_llama31_scaling_is_transformers(dim: int, factor: float) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters=parameters)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    got = rope_frequencies(dim, 500000.0, factor)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    plain = rope_frequencies(dim, 500000.0)
    kept, stretched = got == plain, torch.isclose(got, plain / factor, rtol=1e-6)
    assert kept[0] and stretched[-1] and not (kept | stretched).all()  # all three regimes occur


def test_frequencies_by_hand() -> None:
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(rope_frequencies(8, 10000.0), expected)
    cos, sin = rope_table(torch.tensor([[0, 10]]), rope_frequencies(8, 10000.0))
    assert cos.shape == sin.shape == (1, 2, 1, 4)
    assert cos[0, 0, 0].tolist() == [1.0] * 4 and sin[0, 1, 0, 1].item() == pytest.approx(math.sin(1.0))
