"""The model against Hugging Face's of the same family: logits, loss, every gradient; weights taken name by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megazero.config.presets import PRESETS
from megazero.config.schema import TransformerConfig
from megazero.models.gpt import GPT, Inputs
from megazero.ops.dropout import Randomness
from megazero.parallel.topology import Topology
from megazero.plan.flops import parameter_count
from tests.models.tiny import GPT2, LLAMA, QWEN2, QWEN3, VOCAB, gradients, with_weights

B, S = 3, 12


def sizes(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attn_implementation": "eager",
    }


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(LLAMA)))


LLAMA31 = replace(LLAMA, kv_channels=64, rotary_base=500000.0, use_rope_scaling=True, rope_scaling_factor=8.0)


def llama31() -> nn.Module:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes(LLAMA31) | {"rope_parameters": rope})))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes(QWEN3)))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes(QWEN2)))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


FAMILIES: dict[str, tuple[TransformerConfig, Callable[[], nn.Module]]] = {
    "llama": (LLAMA, llama),
    "llama 3.1": (LLAMA31, llama31),
    "qwen3": (QWEN3, qwen3),
    "qwen2": (QWEN2, qwen2),
    "gpt2": (GPT2, gpt2),
}


def our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under our names: its Conv1D is transposed and joins q, k and v. Others keep their names."""
    if "transformer.wte.weight" not in tensors:
        return tensors
    pairs = [("wte", "embed_tokens"), ("ln_f", "norm"), ("ln_1", "input_layernorm"), ("h.", "layers.")]
    pairs += [
        ("ln_2", "post_attention_layernorm"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
    ]
    pairs += [("mlp.c_fc", "mlp.up_proj"), ("transformer.", "model."), ("wpe.weight", "embed_positions")]
    found = {}
    for name, tensor in tensors.items():
        if ".c_" in name and name.endswith("weight"):
            tensor = tensor.t()
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        if "attn.c_attn" in name:
            for one, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("attn.c_attn", f"self_attn.{one}_proj")] = part
        else:
            found[name] = tensor
    return found


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """Norms and biases too, so that a missing one is seen."""
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
    return model


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, VOCAB, (B, S + 1), generator=generator)
    return text[:, :-1], text[:, 1:], (torch.rand(B, S, generator=generator) < 0.7).float()


def inputs(tokens: Tensor, **more: Any) -> Inputs:
    return Inputs(tokens, Randomness(0, 0, torch.arange(len(tokens))), **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_faces(family: str) -> None:
    config, make = FAMILIES[family]
    theirs = randomised(make)
    ours, zero = with_weights(config, our_names(dict(theirs.named_parameters())))
    tokens, labels, mask = example()
    logits = theirs(input_ids=tokens).logits
    got = ours(inputs(tokens))
    assert got.shape == (B, S, VOCAB)
    torch.testing.assert_close(got, logits.detach(), rtol=1e-5, atol=1e-5)

    loss = (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    loss.backward()
    wanted = our_names({name: p.grad for name, p in theirs.named_parameters()})
    ours_loss = ours(inputs(tokens), labels, mask)
    ours_loss.backward()
    assert ours_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    found = gradients(zero)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        if gradient.shape != wanted[name].shape:
            assert not gradient[VOCAB:].any()
            gradient = gradient[:VOCAB]
        error = (gradient - wanted[name]).norm() / max(wanted[name].norm(), 1e-3 * loss.item())
        assert error < 1e-5, f"{name}: {error:.2g}"


def test_without_a_mask_every_token_counts() -> None:
    ours, _ = with_weights(LLAMA, dict(randomised(llama).named_parameters()))
    tokens, labels, _ = example()
    wanted = F.cross_entropy(ours(inputs(tokens)).flatten(0, 1), labels.flatten(), reduction="sum")
    assert ours(inputs(tokens), labels).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_equal_themselves_alone(family: str) -> None:
    config, make = FAMILIES[family]
    ours, _ = with_weights(config, our_names(dict(randomised(make).named_parameters())))
    tokens, _, _ = example()
    documents = torch.tensor([[0] * 5 + [1] * 7]).expand(B, S)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(B, S)
    packed = ours(inputs(tokens, document_ids=documents, position_ids=positions))
    for part in (slice(0, 5), slice(5, S)):
        torch.testing.assert_close(packed[:, part], ours(inputs(tokens[:, part])), rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[:, :5] = (changed[:, :5] + 1) % VOCAB
    again = ours(inputs(changed, document_ids=documents, position_ids=positions))
    assert torch.equal(again[:, 5:], packed[:, 5:]) and not torch.equal(again[:, :5], packed[:, :5])


def test_dropout_is_for_training_and_repeats() -> None:
    config = replace(LLAMA, hidden_dropout=0.2, attention_dropout=0.2)
    weights = dict(randomised(llama).named_parameters())
    ours, _ = with_weights(config, weights)
    plain, _ = with_weights(LLAMA, weights)
    tokens, labels, _ = example()

    def loss(step: int) -> float:
        return ours(Inputs(tokens, Randomness(0, step, torch.arange(B))), labels).item()

    assert loss(1) == loss(1) != loss(2)
    ours.eval()
    assert loss(1) == plain(inputs(tokens), labels).item()


VARIANTS: dict[str, TransformerConfig] = {
    **{name: config for name, (config, _) in FAMILIES.items()},
    "mqa": replace(LLAMA, num_query_groups=1),
    "no positions": replace(LLAMA, position_embedding_type="none"),
    "gated with biases": replace(LLAMA, add_bias_linear=True),
    "gpt2 untied": replace(GPT2, untie_embeddings_and_output_weights=True),
    "gpt2 squared relu, no bias": replace(GPT2, activation="squared_relu", add_bias_linear=False),
    "layer norm on heads": replace(QWEN3, normalization="LayerNorm"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_models(variant: str) -> None:
    config = VARIANTS[variant]
    model = GPT(config, Topology.single())
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, padded=True)
    assert all(p.is_meta for p in model.parameters())


def test_every_preset_builds_on_meta_at_once() -> None:
    start = time.monotonic()
    for name, values in PRESETS.items():
        config = TransformerConfig(**values)
        model = GPT(config, Topology.single())
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config, padded=True), name
    assert time.monotonic() - start < 30


def test_405b_on_its_share_of_64_ranks() -> None:
    config = TransformerConfig(**PRESETS["llama3.1-405b"])
    topology = Topology.fake(64, rank=13, tp=8)
    try:
        local = sum(p.numel() for p in GPT(config, topology).parameters())
    finally:
        torch.distributed.destroy_process_group()
    norms = (2 * config.num_layers + 1) * config.hidden_size
    assert local == (parameter_count(config, padded=True) - norms) // 8 + norms
