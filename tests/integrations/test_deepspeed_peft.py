"""peft at stage 3 as transformers' Trainer uses it: adapters are saved by the first rank alone, from a whole state
dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megazero.integrations import deepspeed_names
from megazero.zero import safe_get_full_fp32_param
from tests.zero.test_hugging_face import SETTINGS, configuration


def check_saved(folder: str) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configuration("llama"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    engine = deepspeed_names.initialize(model=get_peft_model(model, lora), config=SETTINGS)[0]
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    whole = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    saved = load_file(f"{folder}/adapter_model.safetensors")
    trained = {
        name.replace(".default", "").replace("modules_to_save.", ""): safe_get_full_fp32_param(p)
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    assert saved.keys() == trained.keys() and len(saved) == 2 * 2 + 1
    for name, value in saved.items():
        assert torch.equal(value, trained[name]), name
    dist.destroy_process_group()  # a single process has one only here


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_and_whole_modules_are_saved(ranks: Any, tmp_path: Path, size: int) -> None:
    ranks.run(check_saved, size, str(tmp_path))
