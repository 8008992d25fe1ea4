"""Hugging Face models: built in slices by `Init`, from a configuration and from local files, and trained at stage 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megazero
from megazero.zero import Init, safe_get_full_fp32_param
from megazero.zero import init as init_module

SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6}},
    "zero_optimization": {"stage": 3},
}


def configuration(family: str) -> Any:
    from transformers import GPT2Config, LlamaConfig

    if family == "gpt2":  # tied embeddings, Conv1D
        return GPT2Config(
            vocab_size=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def check_family(family: str, folder: str | None) -> None:
    from transformers import AutoModelForCausalLM

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = configuration(family)
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(config)
    if folder is not None:
        if rank == 0:
            plain.save_pretrained(folder)
        if ranks > 1:
            dist.barrier()
    torch.manual_seed(1)
    before, init_module.LIVE_ELEMENTS = init_module.LIVE_ELEMENTS, 1000
    try:
        with Init(config_dict_or_path=SETTINGS):
            if folder is not None:
                model = AutoModelForCausalLM.from_pretrained(folder)
            else:
                model = AutoModelForCausalLM.from_config(config)
    finally:
        init_module.LIVE_ELEMENTS = before
    assert all(p.isnan().all() for p in model.parameters()), "every parameter is in slices"
    engine, *_ = megazero.initialize(model=model, config=SETTINGS)
    reference = dict(plain.named_parameters())
    for name, p in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(p), reference[name]), name
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-6)
    engine.train()
    plain.train()
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        ids = torch.randint(0, 128, (2 * ranks, 12), generator=generator)
        mine = ids[2 * rank : 2 * rank + 2]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
        optimizer.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-4)
    whole = engine.consolidated_state_dict()
    if rank == 0:
        for name, wanted in plain.state_dict().items():
            torch.testing.assert_close(whole[name], wanted, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    else:
        assert whole == {}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_built_in_slices_and_trained_as_one_process(ranks: Any, tmp_path: Path, family: str, size: int) -> None:
    ranks.run(check_family, size, family, None)
    ranks.run(check_family, size, family, str(tmp_path / "model"))


def check_submodules() -> None:
    """Parts called by themselves, whose small norms are in no unit: the numbers of the whole model on one process."""
    from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    plain = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    how = {"input_ids": ids, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted = plain.generate(**how)
    hidden = plain.get_encoder()(input_ids=ids).last_hidden_state.detach()
    engine, *_ = megazero.initialize(model=plain, config=SETTINGS)
    engine.eval()
    with torch.no_grad():
        torch.testing.assert_close(engine.module.get_encoder()(input_ids=ids).last_hidden_state, hidden)
    assert torch.equal(wanted, engine.module.generate(**how))

    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(configuration("llama"))
    torch.manual_seed(1)
    engine, *_ = megazero.initialize(model=AutoModelForCausalLM.from_config(configuration("llama")), config=SETTINGS)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-6)
    for _ in range(2):
        logits = [each.lm_head(each.model(input_ids=ids).last_hidden_state) for each in (engine.module, plain)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
        engine.backward(logits[0].square().mean())
        engine.step()
        optimizer.zero_grad()
        logits[1].square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-4)


def test_parts_that_are_called_by_themselves(ranks: Any) -> None:
    ranks.run(check_submodules, 2)
