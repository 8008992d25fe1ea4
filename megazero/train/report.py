"""What a finished run leaves behind: samples.txt, loss.png, and a summary with where to look next."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megazero.inference.generate import generate
from megazero.models.gpt import Inputs
from megazero.ops.dropout import Randomness
from megazero.train.metrics import Metrics
from megazero.train.setup import Run


def finish_report(run: Run, metrics: Metrics) -> None:
    """Write samples.txt (every rank computes, rank 0 writes) and let the metrics plot and sum up. Collective."""
    text = continue_prompt(run)
    if text is not None and run.launch.rank == 0:
        assert run.config.logging.output_dir is not None
        Path(run.config.logging.output_dir, "samples.txt").write_text(text, encoding="utf-8")
    metrics.finish(sample=text)


def continue_prompt(run: Run) -> str | None:
    """The prompt and its continuation by the model; None without a prompt or a tokenizer."""
    prompt, tokenizer = run.config.training.sample_prompt, run.tokenizer
    if prompt is None or tokenizer is None:
        return None
    run.model.eval()
    nobody = Randomness(0, 0, torch.zeros(1, dtype=torch.int64))  # no dropout in eval

    def logits(tokens: Tensor) -> Tensor:
        result: Tensor = run.model(Inputs(tokens, nobody))
        return result

    ids = generate(
        logits,
        tokenizer.encode(prompt),
        new_tokens=run.config.training.sample_tokens,
        window=run.config.data.seq_length,
        stop=tokenizer.eod,
        seed=run.config.training.seed,
        device=run.device,
    )
    run.model.train()
    return tokenizer.decode(ids)
