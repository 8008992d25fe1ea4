"""The code of docs/rlhf.md runs, on two ranks, as it stands there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from tests.harness import ROOT
from tests.rlhf.tiny import language_model, tokenizer

PAIRS = [(torch.tensor([[5, 6, 7], [5, 7, 0]]), torch.tensor([[5, 6, 8], [5, 8, 8]]))] * 3
PROMPTS = [["5 6 7", "9"], ["7 8", "11 12 13"]]


def check(folder: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "rlhf.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    os.chdir(folder)
    names: dict[str, Any] = {"pairs": PAIRS, "prompts": PROMPTS}
    for block in blocks:
        exec(compile(block, "<docs/rlhf.md>", "exec"), names)
    assert names["reward"].global_steps == 3 and names["trainer"].experiences == 2
    assert names["actor_loss"].isfinite() and names["critic_loss"].isfinite()
    os.chdir(ROOT)


def test_the_page_runs(ranks: Any, tmp_path: Path) -> None:
    model = language_model("llama", 0, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "my-sft-model")
    tokenizer().save_pretrained(tmp_path / "my-sft-model")
    ranks.run(check, 2, str(tmp_path))
