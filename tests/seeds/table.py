"""What is run of the three documents, how, and what is changed in a block before it runs.

`python -m tests.seeds.table > docs/seeds.md` writes the table that readers see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One text of the block replaced by another."""

    old: str
    new: str
    why: str


@dataclass(frozen=True)
class Row:
    """One block of the documents."""

    ran: str
    """How; empty: not at all, and `why` says why."""
    changes: tuple[Change, ...] = ()
    added: dict[str, Any] = field(default_factory=dict)
    """Keys that a JSON block gets on top."""
    why: str = ""


BATCH = {"train_micro_batch_size_per_gpu": 2}
A_PART = "part of a configuration: the batch size is added, model and optimizer are the test's"
TINY_LLAMA = Change("meta-llama/Llama-2-7b-hf", "./tiny-llama", "no download: a local tiny model with its tokenizer")
LAUNCH, ALIAS = "megazero launch", "megazero.integrations.deepspeed"
UNDER_THE_ALIAS = "the launcher's name; the script runs under the alias"
LOOP = """inputs, labels = batch
inputs = inputs.to(model_engine.local_rank) # Move data to the correct device
labels = labels.to(model_engine.local_rank)
outputs = model_engine(inputs)
loss = calculate_loss(outputs, labels) # Your loss calculation
model_engine.backward(loss)
model_engine.step()"""
INDENTED_LOOP = "    " + LOOP.replace("\n", "\n    ").replace("local_rank", "device")

ROWS: dict[str, Row] = {
    "S0 snippet 1": Row("1 and 2 ranks, then a training step"),
    "S0 snippet 2": Row("1 and 2 ranks, after snippet 1"),
    "S0 snippet 3": Row("1 process"),
    "S1 loop": Row(
        "2 ranks; a linear model and 3 batches",
        (
            Change(
                LOOP,
                INDENTED_LOOP,
                "the document lost its indentation; `.to(local_rank)` means GPU number local_rank, which a CPU has "
                "not: `.device`",
            ),
        ),
    ),
    "S2 1.2": Row("2 ranks; MyModel and ds_config.json (that of 4.1) are the test's"),
    "S2 1.3": Row("", why="installs DeepSpeed; `megazero report` is tested for what ds_report is for"),
    "S2 2.1": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 2.2": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 2.3": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 2.3 code": Row("1 and 2 ranks; ds_config.json is that of 2.3", (TINY_LLAMA,)),
    "S2 3.1": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 3.1 parameters": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 3.2": Row(
        "2 ranks, 3 steps",
        (Change("/local_nvme", "local_nvme", "a folder that is there"),),
        added=BATCH,
        why=A_PART,
    ),
    "S2 4.1": Row("2 ranks, 3 steps; every auto resolved without the Trainer"),
    "S2 4.2 fp16": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 4.2 bf16": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 4.3": Row(
        "2 ranks, a step of 64 accumulated micro-batches; unchanged, the error names batch sizes that work",
        (Change("2048", "512", "4 × 64 × 2 ranks; 2048 is for 8 GPUs"),),
    ),
    "S2 4.4": Row("2 ranks, 3 steps, rates by DeepSpeed's formula", added=BATCH, why=A_PART),
    "S2 5.1": Row(
        "2 ranks, main(); train_dataset and ds_config.json (that of 4.1) are the test's",
        (Change('"gpt2"', '"./tiny-gpt2"', "no download: a local tiny model"),),
    ),
    "S2 5.2": Row(
        "2 ranks, stage 3, after 2 steps; the file is whole and loads with torch",
        (
            Change("global_steps % 1000", "global_steps % 2", "two steps are trained, not 1000"),
            Change('tag="step_1000"', 'tag="step_2"', "two steps are trained, not 1000"),
        ),
    ),
    "S2 5.3": Row("1 process; GPT-2 of 2 layers; ds_config.json is that of 4.1"),
    "S2 5.3 launch": Row(
        "dry run of the launcher",
        (Change("deepspeed --num_gpus=8", f"{LAUNCH} --num_gpus=8 -m {ALIAS}", UNDER_THE_ALIAS),),
    ),
    "S2 5.4": Row(
        "1 process; GPT-2 of 2 layers",
        why="accelerate steps at every batch outside `accelerator.accumulate(model)`; also run with that around the "
        "loop's body: every 8th",
    ),
    "S2 6.2": Row(
        "4 ranks; layers and loss are the test's",
        (
            Change("num_stages=4", "num_stages=2", "4 ranks, not 8"),
            Change("num_pp=4", "num_pp=2", "4 ranks, not 8"),
            Change(
                '"train_batch_size": 64',
                '"train_batch_size": 32',
                "2 × 8 × 2 data-parallel ranks is 32, not 64, in the document's own layout too; the error says so",
            ),
        ),
    ),
    "S2 6.3": Row(
        "4 ranks, the model of 6.2",
        (
            Change(
                "model=pipeline_model,",
                "model=pipeline_model, optimizer=optimizer, training_data=training_data,",
                "the block has neither an optimizer nor data; unchanged, the error says so",
            ),
        ),
    ),
    "S2 7.1": Row("the layout is checked: 4 × 2 × 4 = 32 ranks"),
    "S2 7.1 json": Row("read"),
    "S2 7.1 launch": Row(
        "dry run of the launcher, then of pretrain_gpt.py with these flags: 32 ranks, tp 4, pp 4, dp 2",
        (
            Change(
                "deepspeed --num_nodes=4",
                "megazero launch --hostfile hosts --num_nodes=4",
                "the launcher's name; DeepSpeed, too, needs a hostfile for several machines (it looks in /job); the "
                "second dry run adds data and the vocabulary's size, which the document leaves out",
            ),
        ),
    ),
    "S2 8.1": Row("2 ranks, 3 steps, with the layer of the next block", added=BATCH, why=A_PART),
    "S2 8.1 code": Row("2 ranks; the layer's attention and norm are the test's"),
    "S2 9.1": Row("4 ranks, 3 steps; attention and feed-forward are the test's"),
    "S2 9.2": Row(
        "4 ranks, 3 steps, with the block of 9.1: one expert on each",
        added=BATCH,
        why=A_PART,
    ),
    "S2 9.2 code": Row("4 ranks, 3 steps, on the block of 9.1"),
    "S2 10.1": Row(
        "1 process; 200 tokens are drawn, in fp16",
        (TINY_LLAMA, Change('.to("cuda")', ".to(ds_engine.device)", "the test's machine has no GPU")),
    ),
    "S2 10.2": Row("4 ranks, a Llama of 4 heads; logits against one process"),
    "S2 10.3": Row("1 and 2 ranks, the model of 10.1; greedy tokens against the plain model's"),
    "S2 11.2": Row(
        "", why="runs the main.py of DeepSpeed-Chat's first step on a model and a data set to be downloaded"
    ),
    "S2 11.3": Row("1 and 2 ranks; a tiny Llama learns to tell 8 pairs apart"),
    "S2 11.4": Row("2 ranks, stages 0 and 3; the four engines, 4 batches of prompts and the arguments are the test's"),
    "S2 12.1": Row(
        "1 process; Llama of 2 layers",
        (
            TINY_LLAMA,
            Change(
                'load_dataset("tatsu-lab/alpaca", split="train")',
                'load_dataset("json", data_files="alpaca.jsonl", split="train")',
                "no download: 32 rows of the same columns",
            ),
            Change("max_length=512", "max_length=32", "size"),
            Change('report_to="wandb"', 'report_to="none"', "no network"),
            Change("bf16=True,", "bf16=True, use_cpu=True,", "the Trainer wants this for bf16 on a CPU; not on a GPU"),
        ),
    ),
    "S2 12.1 json": Row(
        "as the configuration of the block before; without the Trainer it is asked for total_num_steps"
    ),
    "S2 12.1 launch": Row(
        "dry run of the launcher",
        (Change("deepspeed --num_gpus=8", f"{LAUNCH} --num_gpus=8 -m {ALIAS}", UNDER_THE_ALIAS),),
    ),
    "S2 13.1": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 13.1 json": Row("2 ranks, 3 steps", added=BATCH, why=A_PART),
    "S2 13.1 code": Row("2 ranks, stage 3"),
    "S2 13.2": Row(
        "2 ranks, stage 3, 3 steps",
        (Change("torch.compile(model)", 'torch.compile(model, backend="aot_eager")', "compiles in seconds"),),
    ),
}


def table() -> Iterator[str]:
    """The lines of docs/seeds.md."""
    yield "# The documents' own code, run"
    yield ""
    yield "Every code block of the three documents that megazero is held to, under the alias of `deepspeed`. Kept as"
    yield "tests in `tests/seeds/`; made by `python -m tests.seeds.table`."
    yield ""
    yield "| block | ran | changed | why |"
    yield "|---|---|---|---|"
    for name, row in ROWS.items():
        changed = [f"`{_short(change.old)}` → `{_short(change.new)}`" for change in row.changes]
        changed += [f"added `{key}: {value}`" for key, value in row.added.items()]
        reasons = [*dict.fromkeys(change.why for change in row.changes), *([row.why] if row.why else [])]
        yield f"| {name} | {row.ran or 'no'} | {'; '.join(changed) or 'nothing'} | {'; '.join(reasons)} |"


def _short(text: str) -> str:
    """The first line of it."""
    first, _, more = text.strip().partition("\n")
    return first + (" …" if more else "")


if __name__ == "__main__":
    print("\n".join(table()))
