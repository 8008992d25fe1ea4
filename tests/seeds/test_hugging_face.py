"""The blocks that use transformers' Trainer, accelerate or peft: each a script of its own, run under the alias by
`python -m megazero.integrations.deepspeed` in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seeds import tiny
from tests.seeds.blocks import code, settings

ROOT = Path(__file__).resolve().parents[2]


def script(folder: Path, *parts: str) -> str:
    """What a script of these parts prints, run in this folder."""
    (folder / "train.py").write_text("\n".join(parts))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "megazero.integrations.deepspeed", "train.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


GPT2 = """
import torch
from transformers import GPT2LMHeadModel
from tests.seeds.tiny import examples
model = GPT2LMHeadModel.from_pretrained("./tiny-gpt2")
train_dataset, eval_dataset = examples(64), examples(8)
"""


PLAIN = """
def plain_losses(batches, lr, every, clip=1.0):
    # the same training with torch alone, in fp32: the mean of `every` batches a step
    plain = GPT2LMHeadModel.from_pretrained("./tiny-gpt2")
    optimizer, losses = torch.optim.AdamW(plain.parameters(), lr=lr), []
    for number, batch in enumerate(batches, 1):
        losses.append(plain(**batch).loss)
        (losses[-1] / 8).backward()
        if number % every == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return [loss.item() for loss in losses]
"""


def test_trainer(tmp_path: Path) -> None:
    tiny.gpt2(tmp_path)
    (tmp_path / "ds_config.json").write_text(json.dumps(settings("S2 4.1")))
    after = """
import json
from torch.utils.data import DataLoader
mean = trainer.state.log_history[-1]["train_loss"]
plain = plain_losses(list(DataLoader(train_dataset, batch_size=4)) * 3, 5e-5, 8)
print(json.dumps([trainer.state.global_step, mean, sum(plain) / len(plain), trainer.evaluate()["eval_loss"]]))
"""
    steps, mean, plain, evaluated = json.loads(script(tmp_path, GPT2, PLAIN, code("S2 5.3"), after).splitlines()[-1])
    assert steps == 3 * 64 / (4 * 8)
    assert mean == pytest.approx(plain, rel=2e-3) and evaluated < plain


STAGE_3 = """
import json
from pathlib import Path
from transformers import Trainer, TrainingArguments
training_args = TrainingArguments(
    output_dir="./results", num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_steps=4, seed=1,
    deepspeed="ds_config.json", use_cpu=not torch.cuda.is_available(),
)
model = GPT2LMHeadModel.from_pretrained("./tiny-gpt2")
held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
trainer = Trainer(model=model, args=training_args, train_dataset=train_dataset[:32], eval_dataset=eval_dataset)
last = Path("results/checkpoint-4")
trainer.train(resume_from_checkpoint=str(last) if last.exists() else None)
trainer.save_model("./final")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
GPT2LMHeadModel.from_pretrained("./final")
print(json.dumps([held, losses, trainer.evaluate()["eval_loss"]]))
"""


def test_trainer_at_stage_3_and_its_resume(tmp_path: Path) -> None:
    """Beyond the documents' own blocks: what the Trainer asks of DeepSpeed at stage 3, one process."""
    tiny.gpt2(tmp_path)
    auto = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    config = settings("S2 2.3") | dict.fromkeys(auto, "auto")
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    before = GPT2.replace("model = ", "# ")  # after the arguments, as the Trainer wants it for stage 3
    runs = [json.loads(script(tmp_path, before, STAGE_3).splitlines()[-1]) for _ in range(2)]
    (held, losses, evaluated), resumed = runs
    assert held < 1000 and len(losses) == 8 and losses[-1] < losses[0] and evaluated < losses[0]
    assert resumed[1:] == [losses, evaluated]


AGAIN = """
import json
from pathlib import Path
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments
stage = int(Path("stage").read_text())
given = dict(
    output_dir="./results", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
    lr_scheduler_type="constant", logging_steps=1, seed=1, deepspeed={
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage}}, use_cpu=not torch.cuda.is_available(),
)
def trained(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
data = dict(train_dataset=train_dataset[:32], eval_dataset=eval_dataset)
trainer = Trainer(model=model, args=TrainingArguments(**given), **data)
evaluated = [trainer.evaluate()["eval_loss"]] if stage == 3 else []
first = trained(trainer)
trainer.save_model("./first")
evaluated.append(trainer.evaluate()["eval_loss"])
second = trained(trainer)
AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one with DeepSpeed
training_args = TrainingArguments(**given)
fresh = Trainer(model=GPT2LMHeadModel.from_pretrained("./first"), args=training_args, **data)
print(json.dumps([first, second, trained(fresh), evaluated]))
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_trainer_trains_again(tmp_path: Path, stage: int) -> None:
    """The second train() starts from the weights of the first, or the first after an evaluation."""
    tiny.gpt2(tmp_path)
    (tmp_path / "stage").write_text(str(stage))
    first, second, fresh, evaluated = json.loads(script(tmp_path, GPT2, AGAIN).splitlines()[-1])
    assert len(first) == 4 and second[0] < first[0] - 0.01 and evaluated[-1] < first[0]
    assert second == pytest.approx(fresh, rel=1e-6)


def test_accelerate(tmp_path: Path) -> None:
    tiny.gpt2(tmp_path)
    before = """
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
AcceleratorState._reset_state()
model = GPT2LMHeadModel.from_pretrained("./tiny-gpt2")
train_dataloader = DataLoader(train_dataset, batch_size=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
seen = []
model.register_forward_hook(lambda module, args, output: seen.append(output.loss.item()))
"""
    after = """
import json
plain = plain_losses(DataLoader(train_dataset, batch_size=2), 1e-2, every)
print(json.dumps([model.global_steps, model.skipped_steps, seen, plain]))
"""
    block = code("S2 5.4")
    head, loop = block.split("for batch in train_dataloader:\n")
    body = loop.replace("    ", "        ")
    accumulated = f"{head}for batch in train_dataloader:\n    with accelerator.accumulate(model):\n{body}"
    printed = script(tmp_path, GPT2, PLAIN, before, block, "every = 1", after, before, accumulated, "every = 8", after)
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    for expected, (steps, skipped, losses, plain) in zip((32, 4), results, strict=True):
        assert (steps, skipped) == (expected, 0)
        assert losses == pytest.approx(plain, rel=0.01) and len(losses) == 32


def test_lora(tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    tiny.alpaca(tmp_path)
    (tmp_path / "ds_zero2_config.json").write_text(json.dumps(settings("S2 12.1 json")))
    script(tmp_path, code("S2 12.1"))
    saved = tmp_path / "llama2-finetuned-final"
    assert (saved / "adapter_model.safetensors").exists()
    from safetensors.torch import load_file

    adapters = load_file(saved / "adapter_model.safetensors")
    moved = [name for name, value in adapters.items() if "lora_B" in name and value.abs().sum() > 0]
    assert len(moved) == 2 * 4  # two layers, four projections; they start at zero


def check_zero_init(folder: str) -> None:
    """Block 2.3: a model that is built sharded has the values of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.seeds.blocks import place, run

    whole = AutoModelForCausalLM.from_pretrained(f"{folder}/tiny-llama")
    with place(folder, ds_config=settings("S2 2.3")):
        names = run("S2 2.3 code", {})
        model, zero = names["model"], names["deepspeed"].zero
        with zero.GatheredParameters(model.parameters()):
            for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert torch.equal(ours.float(), theirs.float()), name
        held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        assert held < sum(p.untyped_storage().nbytes() for p in whole.parameters())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_built_sharded(world_size: int, ranks: object, tmp_path: Path) -> None:
    tiny.llama(tmp_path)
    ranks.run(check_zero_init, world_size, str(tmp_path))  # type: ignore[attr-defined]
