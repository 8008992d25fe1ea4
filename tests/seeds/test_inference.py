"""The blocks about inference: an engine from a module, its linears over ranks, its weights streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.parallel.foreign_models import ids_of, make
from tests.seeds import tiny
from tests.seeds.blocks import place, run


def test_an_engine_that_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama(tmp_path)
    with place(str(tmp_path)):
        names = run("S2 10.1", {"torch": torch})
    assert names["outputs"].shape[1] <= names["inputs"]["input_ids"].shape[1] + 200
    assert names["model"].dtype == torch.float16 and names["model"] is names["ds_engine"].module
    said = capsys.readouterr().out
    assert "replace_with_kernel_inject: attention runs torch's" in said and "replace_method has no effect" in said


def check_policy(folder: str) -> float:
    """fp16 logits of 4 tensor-parallel ranks against those of one process."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, plain = (make("Llama", num_key_value_heads=4) for _ in range(2))
    with place(folder):
        import deepspeed

        names: dict[str, Any] = {"model": model, "LlamaDecoderLayer": LlamaDecoderLayer}
        engine = run("S2 10.2", names | {"deepspeed": deepspeed, "torch": torch})["ds_engine"]
        assert engine.topology.size("tp") == 4 and engine.dtype == torch.float16
        assert tuple(engine.module.model.layers[0].mlp.down_proj.weight.shape) == (16, 6)
        with torch.no_grad():
            wanted = plain.half().eval()(input_ids=ids_of(0)).logits
        return float((engine(input_ids=ids_of(0)).logits - wanted).abs().max())


def test_tensor_parallel_by_a_policy(ranks: Ranks, tmp_path: Path) -> None:
    assert max(ranks.run(check_policy, 4, str(tmp_path))) < 5e-3


def check_streaming(folder: str) -> None:
    with place(folder):
        import deepspeed
        from transformers import AutoModelForCausalLM

        model, plain = (AutoModelForCausalLM.from_pretrained("./tiny-llama") for _ in range(2))
        engine = run("S2 10.3", {"model": model, "deepspeed": deepspeed})["ds_engine"]
        zero = engine.engine.zero
        assert zero.stage == 3 and zero.homes.param == "cpu" and engine.dtype == torch.float16
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        wanted = plain.half().generate(ids_of(0), **settings)
        assert torch.equal(engine.generate(ids_of(0), **settings), wanted)
        assert all(bucket.values is None for bucket in zero.frozen)  # none stays whole


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_are_streamed(world_size: int, ranks: Ranks, tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    ranks.run(check_streaming, world_size, str(tmp_path))
