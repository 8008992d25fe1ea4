"""init_inference(): the same logits and the same greedy tokens as the plain model, however its weights are spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megazero
from megazero.base.errors import CheckpointError, ConfigError
from megazero.inference.engine import InferenceEngine
from megazero.parallel.collectives import barrier
from megazero.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from tests.parallel.foreign_models import ids_of, make

NEW = 6
POLICIES = {
    "Llama": {"LlamaDecoderLayer": ("self_attn.o_proj", "mlp.down_proj")},
    "OPT": {"OPTDecoderLayer": ("self_attn.out_proj", "fc2")},
    "GPT2": {"GPT2Block": ("attn.c_proj", "mlp.c_proj")},
}


def tokens(model: Any) -> Tensor:
    """Greedy."""
    ids = ids_of(0, rows=2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)


def assert_equal(engine: InferenceEngine, plain: nn.Module, tolerance: float = 1e-5) -> float:
    """Logits and greedy tokens; returns the largest difference of logits."""
    ids = ids_of(1)
    with torch.no_grad():
        wanted = plain.eval()(input_ids=ids).logits
    found = engine(input_ids=ids).logits
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert torch.equal(tokens(engine), tokens(plain)) and torch.equal(tokens(engine.module), tokens(plain))
    return float((found - wanted).abs().max())


def check(family: str, settings: dict[str, Any]) -> float:
    return assert_equal(megazero.init_inference(make(family), **settings), make(family))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
def test_tensor_parallel_by_the_models_plan(family: str, world: int, ranks: Any) -> None:
    assert max(ranks.run(check, world, family, {"mp_size": world, "replace_with_kernel_inject": True})) < 1e-5


@pytest.mark.parametrize("family", list(POLICIES))
def test_tensor_parallel_by_a_policy(family: str, ranks: Any) -> None:
    settings = {"tensor_parallel": {"tp_size": 2}, "injection_policy": POLICIES[family]}
    assert max(ranks.run(check, 2, family, settings)) < 1e-5


def check_parts() -> None:
    engine = megazero.init_inference(make("Llama"), mp_size=2, injection_policy=POLICIES["Llama"])
    layer = engine.module.model.layers[0]
    assert isinstance(layer.mlp.gate_proj, ColumnParallelLinear) and isinstance(layer.mlp.down_proj, RowParallelLinear)
    assert isinstance(engine.lm_head, nn.Linear)  # falls through to the module; in no policy
    whole = engine.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in make("Llama").state_dict().items())


def test_a_policy_splits_what_it_says(ranks: Any) -> None:
    ranks.run(check_parts, 2)


def zero_of(device: str, folder: Path) -> dict[str, Any]:
    offload = {"none": {}, "cpu": {"device": "cpu"}, "nvme": {"device": "nvme", "nvme_path": str(folder)}}[device]
    offload |= {"max_in_cpu": 0} if device == "nvme" else {}
    return {"zero": {"stage": 3} | ({"offload_param": offload} if offload else {})}


def check_streamed(family: str, settings: dict[str, Any], files: bool) -> tuple[float, int]:
    engine = megazero.init_inference(make(family), config=settings)
    difference = assert_equal(engine, make(family))
    zero = engine.engine.zero
    assert zero.gatherer is not None and not zero.buckets and zero.frozen
    assert not any(bucket.values is not None for bucket in zero.frozen), "weights are let go after use"
    stored = Path(settings["zero"]["offload_param"]["nvme_path"]).rglob("*") if files else []
    size = sum(path.stat().st_size for path in stored if path.is_file())
    barrier(engine.engine.topology.group("world"))  # the files of all ranks are counted
    zero.homes.close()
    return difference, size


@pytest.mark.parametrize(("world", "device"), [(1, "cpu"), (1, "nvme"), (2, "none"), (2, "cpu"), (2, "nvme")])
def test_weights_that_come_as_they_are_used(world: int, device: str, ranks: Any, tmp_path: Path) -> None:
    found = ranks.run(check_streamed, world, "Qwen2", zero_of(device, tmp_path), device == "nvme")
    assert max(difference for difference, _ in found) < 1e-5
    if device == "nvme":
        total = sum(p.numel() * p.element_size() for p in make("Qwen2").parameters())
        assert found[0][1] >= total, "the files hold all weights"


def test_both_splits_at_once(ranks: Any, tmp_path: Path) -> None:
    settings = zero_of("cpu", tmp_path) | {"tensor_parallel": {"tp_size": 2}}
    ranks.run(check_streamed, 4, "Llama", settings, False)


def check_uneven() -> list[int]:
    """Ranks with prompts of their own, whose answers end at different times."""
    import torch.distributed as dist

    engine = megazero.init_inference(make("Llama"), config={"zero": {"stage": 3}})
    ids = ids_of(dist.get_rank(), rows=1)
    wanted = make("Llama").generate(ids, max_new_tokens=2 + 5 * dist.get_rank(), do_sample=False)
    found = engine.generate(ids, max_new_tokens=2 + 5 * dist.get_rank(), do_sample=False)
    assert torch.equal(found, wanted)
    return list(found.shape)


def test_answers_of_different_lengths(ranks: Any) -> None:
    assert ranks.run(check_uneven, 2) == [[1, 12], [1, 17]]


def check_sampling() -> list[int]:
    import torch.distributed as dist

    engine = megazero.init_inference(make("Llama"), mp_size=2)
    torch.manual_seed(dist.get_rank())
    return engine.generate(ids_of(0, rows=1), max_new_tokens=12, do_sample=True, temperature=2.0).flatten().tolist()


def test_ranks_draw_the_same_tokens(ranks: Any) -> None:
    first, second = ranks.run(check_sampling, 2)
    assert first == second


# types


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", torch.bfloat16])
def test_the_type_of_the_weights(name: Any) -> None:
    engine = megazero.init_inference(make("Llama"), dtype=name)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16} and engine.dtype == torch.bfloat16
    assert engine.module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert_equal(engine, make("Llama").to(torch.bfloat16), tolerance=0.02)


def test_the_models_own_type_by_default() -> None:
    assert megazero.init_inference(make("Llama").half()).dtype == torch.float16
    with pytest.raises(ConfigError, match=r"the model's weights are torch.float64. Give dtype, one of torch.float32"):
        megazero.init_inference(make("Llama").double())


# generate


def test_the_limit_of_tokens() -> None:
    engine = megazero.init_inference(make("Llama"), max_tokens=16)
    assert tokens(engine).shape == (2, 16)
    ids = ids_of(0)
    message = r"7 tokens after a prompt of 10: 17 in all, and max_tokens is 16. Ask for at most 6 \(max_new_tokens\)"
    with pytest.raises(ConfigError, match=message):
        engine.generate(ids, max_new_tokens=7)
    with pytest.raises(ConfigError, match="max_tokens is 16"):
        engine.module.generate(input_ids=ids, max_length=17)
    with pytest.raises(ConfigError, match="a prompt of 10: 30 in all"):
        engine.generate(ids)
    with pytest.raises(ConfigError, match="Shorten the prompt, or raise max_tokens"):
        engine.generate(torch.cat([ids, ids], dim=1), max_new_tokens=1)
    again = megazero.init_inference(engine.module, max_tokens=17)
    assert again.generate(ids, max_new_tokens=7, do_sample=False).shape == (4, 17)


def test_a_module_without_generate() -> None:
    engine = megazero.init_inference(nn.Sequential(nn.Linear(4, 2)))
    assert engine(torch.ones(1, 4)).shape == (1, 2) and engine.training is False
    with pytest.raises(ConfigError, match=r"Sequential has no generate\(\). Call engine\(ids\)"):
        engine.generate(torch.ones(1, 4))
    with pytest.raises(AttributeError, match="no_such"):
        _ = engine.no_such


# checkpoints


def saved(folder: Path, form: str) -> Any:
    """The weights of a Llama of another seed, in one of the forms."""
    model = make("Llama", seed=8)
    if form == "folder":
        model.save_pretrained(folder)
        return str(folder)
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="4KB")
        assert (folder / "model.safetensors.index.json").exists()
        return folder
    if form == "state dict":
        return model.state_dict()
    names = list(model.state_dict())
    parts = [{n: model.state_dict()[n] for n in half} for half in (names[:9], names[9:])]
    torch.save({"module": parts[0], "step": 3} if form == "wrapped" else parts[0], folder / "one.pt")
    torch.save(parts[1], folder / "two.bin")
    (folder / "files.json").write_text(json.dumps({"type": "x", "checkpoints": ["one.pt", "two.bin"]}))
    return "files.json"


def check_checkpoint(folder: str, form: str, settings: dict[str, Any]) -> float:
    """Built with other values, which the checkpoint replaces."""
    given = Path(folder) if form == "shards" else "files.json" if form in ("list", "wrapped") else folder
    base = folder if form in ("list", "wrapped") else None
    engine = megazero.init_inference(make("Llama"), checkpoint=given, base_dir=base, **settings)
    return assert_equal(engine, make("Llama", seed=8))


@pytest.mark.parametrize(
    ("world", "form", "settings"),
    [
        (1, "folder", {}),
        (1, "wrapped", {}),
        (2, "shards", {"mp_size": 2}),
        (2, "list", {"zero": {"stage": 3, "offload_param": {"device": "cpu"}}}),
    ],
)
def test_weights_of_a_checkpoint(world: int, form: str, settings: dict[str, Any], ranks: Any, tmp_path: Path) -> None:
    saved(tmp_path, form)
    assert max(ranks.run(check_checkpoint, world, str(tmp_path), form, settings)) < 1e-5


def test_a_state_dict_as_checkpoint(tmp_path: Path) -> None:
    state = saved(tmp_path, "state dict")
    assert_equal(megazero.init_inference(make("Llama"), checkpoint=state), make("Llama", seed=8))
    tied = {name: value for name, value in make("Qwen2", seed=8).state_dict().items() if name != "lm_head.weight"}
    assert_equal(megazero.init_inference(make("Qwen2"), checkpoint=tied), make("Qwen2", seed=8))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_checkpoints_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make("Llama").state_dict()
    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is no such file")
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "absent.json").write_text('{"checkpoints": ["gone.pt"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "latest").write_text("global_step1")
    for given, message in {
        str(tmp_path / "gone"): "does not exist. Give a file or a folder of this machine",
        str(tmp_path / "empty"): "holds no weights: none of model.safetensors, pytorch_model.bin",
        str(tmp_path / "training"): r"a checkpoint of a training.*engine.save_16bit_model\(\)",
        str(tmp_path / "evil.pt"): "cannot be read as weights alone",
        str(tmp_path / "text.bin"): "cannot be read as weights alone",
        str(tmp_path / "text.safetensors"): "is no safetensors file, or damaged",
        str(tmp_path / "no.json"): "is not valid JSON",
        str(tmp_path / "empty.json"): "does not list its files",
        str(tmp_path / "absent.json"): "gone.pt, which does not exist. Give base_dir",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            megazero.init_inference(make("Llama"), checkpoint=given)
    assert "executed" not in capsys.readouterr().out
    for wrong, message in (
        ({k: v for k, v in state.items() if "q_proj" not in k}, "the checkpoint lacks model.layers.0.self_attn.q_proj"),
        (state | {"extra": torch.ones(1)}, "the checkpoint has extra that the model has not"),
        (state | {"model.norm.weight": torch.ones(3)}, r"model.norm.weight has shape \(3,\), in the model \(16,\)"),
        ({"step": 3}, "checkpoint is not a state dict: names and tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            megazero.init_inference(make("Llama"), checkpoint=wrong)


# what is said, and refused


def test_kernels_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    model = make("Llama", attn_implementation="eager")
    settings = {"replace_with_kernel_inject": True, "replace_method": "auto", "enable_cuda_graph": True}
    engine = megazero.init_inference(model, **settings)
    said = capfd.readouterr().out
    assert "attention runs torch's scaled_dot_product_attention" in said
    assert "replace_method has no effect: deprecated" in said
    assert torch.cuda.is_available() or "enable_cuda_graph has no effect on cpu: calls run op by op" in said
    assert engine.module.config._attn_implementation == "sdpa"
    assert_equal(engine, make("Llama", attn_implementation="eager"))
    megazero.init_inference(nn.Linear(2, 2), replace_with_kernel_inject=True)
    assert "Linear does not say which attention it runs" in capfd.readouterr().out
    policy = POLICIES["Llama"]
    megazero.init_inference(make("Llama"), replace_with_kernel_inject=True, injection_policy=policy)
    assert "the policy is followed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"dtype": "fp16"}, {"dtype": "fp32"}, "got config dtype='fp16' and dtype='fp32', which mean the same"),
        ({"tensor_parallel": {"tp_size": 2}}, {"mp_size": 4}, "config tensor_parallel.tp_size=2 and mp_size=4"),
        (None, {"mp_sizes": 2}, "mp_sizes: unknown key. Did you mean 'mp_size'?"),
        (
            {"tensor_parallel": {"tp_sise": 2}},
            {},
            "config tensor_parallel.tp_sise: unknown key. Did you mean 'tensor_parallel.tp_size'?",
        ),
        (None, {"dtype": "int8"}, r"dtype='int8' is not available. Give one of torch.float32 \(fp32\)"),
        (None, {"mp_size": "two"}, "mp_size='two': expected a whole number"),
        (None, {"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        (None, {"tensor_parallel": 2}, "tensor_parallel is a section"),
        (None, {"quant": {"enabled": True}}, "quant={'enabled': True} is not available; give dtype torch.bfloat16"),
        (None, {"moe": True}, "moe=True is not available; leave it out"),
        (None, {"zero": {"stage": 2}}, "zero.stage=2: stages 1 and 2 divide optimizer state"),
        (None, {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "there is no optimizer here"),
        (None, {"zero": {"stage": 3, "offload_params": {}}}, r"init_inference\(\): zero.offload_params: unknown key"),
        (None, {"zero": {"stage": 3}, "enable_cuda_graph": True}, "enable_cuda_graph with zero.stage 3"),
        (None, {"mp_size": 2, "enable_cuda_graph": True}, "enable_cuda_graph with several tensor-parallel ranks"),
        (None, {"mp_size": 2}, "world size 1 does not fit .*Start 2 ranks"),
    ],
)
def test_settings_that_cannot_be_followed(config: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        megazero.init_inference(make("Llama"), config, **arguments)


def test_what_asks_for_nothing_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(json.dumps({"dtype": "fp32", "quant": {"enabled": False}, "moe": False, "checkpoint": None}))
    engine = megazero.init_inference(make("Llama"), str(path), dtype="fp32", mp_size=1, tp={"enabled": False})
    assert engine.settings.tp_size == 1
    with pytest.raises(ConfigError, match="needs model=…, the module to ask, not NoneType"):
        megazero.init_inference()


@pytest.mark.gpu
def test_a_forward_as_a_graph() -> None:
    plain = make("Llama").cuda().eval()
    engine = megazero.init_inference(make("Llama"), enable_cuda_graph=True)
    for step in range(2):
        ids = ids_of(step).cuda()
        with torch.no_grad():
            wanted = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(engine(input_ids=ids, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
