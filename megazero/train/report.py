"""What a finished run leaves behind: samples.txt, loss.png, and a summary with where to look next."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megazero.inference.generate import generate
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
    run.engine.module.eval()
    ids = generate(
        partial(logits, run),
        tokenizer.encode(prompt),
        new_tokens=run.config.training.sample_tokens,
        window=run.config.data.seq_length,
        stop=tokenizer.eod,
        seed=run.config.training.seed,
        device=run.device,
    )
    run.engine.module.train()
    return tokenizer.decode(ids)


def logits(run: Run, tokens: Tensor) -> Tensor:
    """tokens [1, s] -> logits [1, s, vocab] on every rank: all tokens go through every rank, or stage, of a replica."""
    length, parts = tokens.shape[1], run.topology.size("tp")
    padded = F.pad(tokens, (0, -length % parts))  # sequence parallelism splits evenly; causality hides what follows
    pipeline, through = run.engine.pipeline, run.forward.through
    if pipeline is None:
        return through(run.engine.module, {"tokens": padded}, None)[:, :length]
    found = pipeline.forward([{"tokens": padded}])
    vocab = run.config.model.vocab_size
    assert vocab is not None
    whole = found[0] if found else torch.empty(1, padded.shape[1], vocab, device=run.device)
    return pipeline.from_last(whole.contiguous())[:, :length]
