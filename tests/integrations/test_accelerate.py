"""accelerate under the alias: run by `python -m megazero.integrations.deepspeed` in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
plain = torch.nn.Linear(8, 8)
plain.load_state_dict(model.state_dict())
batches = DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=2)
optimizer, alone = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, plain))
warm_up = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: min(1, step / 4)) for each in (optimizer, alone)]
plugin = DeepSpeedPlugin(zero_stage=int(sys.argv[1]), offload_optimizer_device="cpu")
accelerator = Accelerator(deepspeed_plugin=plugin)
model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, warm_up[0])
for (x,) in batches:
    accelerator.backward(model(x).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    plain(x).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    alone.step()
    warm_up[1].step()
    alone.zero_grad()
trained = accelerator.get_state_dict(model)
apart = max(float((trained[name].float() - weight).abs().max()) for name, weight in plain.state_dict().items())
print(json.dumps([optimizer.param_groups[0]["lr"], scheduler.get_last_lr()[0], apart]))
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_the_scripts_scheduler_with_offload(stage: int, tmp_path: Path) -> None:
    """accelerate makes a CPUAdam of the script's AdamW and leaves its scheduler with the latter."""
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "megazero.integrations.deepspeed", "train.py", str(stage)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    rate, scheduled, apart = json.loads(done.stdout.splitlines()[-1])
    assert rate == scheduled == 1e-2
    assert apart < 2e-5
