"""Parameters that have no gradient in some steps: torch skips them, and an engine equals torch for every optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.engine.engine import Engine
from megazero.engine.manifest import read_manifest, to_json, write_file, write_manifest
from megazero.engine.optimizers import Lamb, Lion, Muon
from tests.engine.fronts import WIDTH, assert_like, batch_of, config_of, engine_of, parts_of

STEPS = 7
IDLE = (0, 1, 4)  # steps without the branch
WITHOUT_GAIN = 3
LR = 1e-2


class Branching(nn.Module):
    """Two layers, and between them a branch that some steps leave out, and a gain that another leaves out after steps
    in which its bucket was whole; `never` is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.never = nn.Linear(10, 10)  # of a size that leaves `gain` to the second of two ranks
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, target: Tensor, step: int) -> Tensor:
        x = torch.tanh(self.first(x)) + self.shift
        if self.takes_branch(step):
            x = x + self.branch(x)
        if step != WITHOUT_GAIN:
            x = x * self.gain
        return (self.last(x).squeeze(-1) - target).square().mean()

    def takes_branch(self, step: int) -> bool:
        return step not in IDLE


def make(kind: type[Branching] = Branching) -> Branching:
    torch.manual_seed(5)
    return kind()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without and with another learning rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]


ONES: dict[str, Any] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=LR),
    "Adam": lambda m: torch.optim.Adam(groups_of(m), lr=LR),
    "amsgrad": lambda m: torch.optim.AdamW(groups_of(m), lr=LR, amsgrad=True, foreach=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=LR, lr_decay=0.1),
    "SGD": lambda m: torch.optim.SGD(groups_of(m), lr=LR, momentum=0.9, dampening=0.3),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=LR),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=LR),
    "Lion": lambda m: Lion(groups_of(m), lr=LR / 10),
    "Lamb": lambda m: Lamb(m.parameters(), lr=LR, weight_decay=0.1),
    "Muon": lambda m: Muon(m.named_parameters(), lr=LR),
}
NAMED: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": LR},
    "Adam": {"lr": LR, "weight_decay": 0.1},
    "Adagrad": {"lr": LR},
    "SGD": {"lr": LR, "momentum": 0.9, "dampening": 0.3},
    "RAdam": {"lr": LR},
}


def plain(optimizer_of: Any, steps: int = STEPS) -> nn.Module:
    model = make()
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(*batch_of(step), step).backward()
        optimizer.step()
    return model


def train(engine: Engine, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        for x, target in parts_of(step, engine):
            engine.backward(engine(x, target, step))
            engine.step()


def build(stage: int, kind: str, gas: int = 1, **more: Any) -> Engine:
    """With an optimizer of the script's, or one that the configuration names."""
    config = config_of(stage, gas=gas, **more)
    model = make()
    if kind.startswith("named "):
        name = kind.removeprefix("named ")
        return engine_of(model, config | {"optimizer": {"type": name, "params": NAMED[name]}})
    del config["optimizer"]
    return engine_of(model, config, optimizer=ONES[kind](model))


def wanted(kind: str) -> nn.Module:
    if not kind.startswith("named "):
        return plain(ONES[kind])
    name = kind.removeprefix("named ")
    return plain(lambda m: getattr(torch.optim, name)(m.parameters(), **NAMED[name]))


def check_equals_torch(kinds: list[str], stages: list[int]) -> None:
    for kind in kinds:
        for stage in stages:
            engine = build(stage, kind)
            train(engine)
            assert_like(engine, wanted(kind), 2e-3 if kind == "Muon" else 1e-6)


KINDS = [*ONES, *(f"named {name}" for name in NAMED)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_equals_torch(ranks: Any, size: int, stage: int) -> None:
    ranks.run(check_equals_torch, size, KINDS, [stage])


def check_homes(folder: Path, kinds: list[str]) -> None:
    """Bucket by bucket, where states are elsewhere: in CPU memory, in files, and some here, some there."""
    homes = {
        "cpu": {"device": "cpu"},
        "nvme": {"device": "nvme", "nvme_path": str(folder)},
        "pipelined": {"device": "nvme", "nvme_path": str(folder), "pipeline_read": True, "pipeline_write": True},
        "partly": {"device": "cpu", "ratio": 0.5},
    }
    for kind in kinds:
        for home, stage in [("cpu", 1), ("nvme", 2), ("nvme", 3), ("pipelined", 3), ("partly", 3)]:
            zero = {"stage": stage, "offload_optimizer": homes[home], "reduce_bucket_size": 200}
            if stage == 3 and home == "nvme":
                zero["offload_param"] = homes["nvme"]
            engine = build(stage, kind, gas=2, zero_optimization=zero)
            train(engine)
            assert_like(engine, wanted(kind), 1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_states_that_live_elsewhere(ranks: Any, tmp_path: Path, size: int) -> None:
    ranks.run(check_homes, size, tmp_path, ["AdamW", "amsgrad", "named SGD", "Lamb"])


def check_usual_run(stage: int) -> None:
    """Cuts are divided when a parameter is idle, not before, and no more than that asks for."""
    engine = build(stage, "AdamW")
    assert engine.shards is not None
    buckets = [bucket for bucket in engine.zero.buckets if list(bucket.parts(*bucket.owned))]
    held = sum(cut.flat.numel() for cut in engine.shards.cuts)
    assert len(engine.shards.cuts) == len(buckets)
    train(engine, 2, 3)  # `never` alone
    once = len(engine.shards.cuts)
    assert len(buckets) <= once <= len(buckets) + 2
    train(engine, 3, 7)
    places = [place for cut in engine.shards.cuts for place in cut.places()]
    assert once <= len(engine.shards.cuts) <= len(places) and len(engine.shards.cuts) <= once + 2  # `gain`
    assert sum(cut.flat.numel() for cut in engine.shards.cuts) == held
    for cut in engine.shards.cuts:  # in the memory where they were
        assert cut.flat.data_ptr() == cut.part_of(cut.bucket.master).data_ptr()
        assert cut.flat.grad is None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_usual_run_is_not_cut(ranks: Any, stage: int) -> None:
    ranks.run(check_usual_run, 2, stage)


class OneSided(Branching):
    """The branch runs on the last rank alone in a step that leaves it out elsewhere."""

    rank = 0

    def takes_branch(self, step: int) -> bool:
        return self.rank == 1 or super().takes_branch(step)


def check_one_sided(stage: int) -> None:
    """What has a gradient on one rank is not idle on any: Adam's moments decay with the others' zeros."""
    model, reference = make(OneSided), make(OneSided)
    config = config_of(stage)
    del config["optimizer"]
    engine = engine_of(model, config, optimizer=ONES["AdamW"](model))
    model.rank = engine.global_rank
    train(engine)
    optimizer = ONES["AdamW"](reference)
    for step in range(STEPS):
        optimizer.zero_grad()
        halves = zip(*(tensor.chunk(2) for tensor in batch_of(step)), strict=True)
        for reference.rank, half in enumerate(halves):
            (reference(*half, step) / 2).backward()
        optimizer.step()
    assert_like(engine, reference, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])  # stage 3 needs the same modules on all ranks
def test_idle_on_one_rank_only_is_not_idle(ranks: Any, stage: int) -> None:
    ranks.run(check_one_sided, 2, stage)


def check_overflow(stage: int) -> None:
    """fp16: a step that is skipped divides nothing and counts for nobody; the others go on from it."""
    config = config_of(stage, fp16={"enabled": True, "initial_scale_power": 4})
    engines = []
    for bad in (False, True):
        engine = engine_of(make(), config)
        for step in range(STEPS):
            for broken in [True, False] if bad and step == 3 else [False]:
                x, target = parts_of(step, engine)[0]
                loss = engine(x.half(), target.half(), 4 if broken else step)
                engine.backward(loss * torch.inf if broken else loss)
                engine.step()
        engines.append(engine)
    assert engines[1].skipped_steps == 1
    numbers = [engine.shards.numbers() for engine in engines]  # type: ignore[union-attr]
    assert numbers[0] == numbers[1]
    assert {None if n is None else n["step"] for n in numbers[0].values()} <= {None, 4.0, 6.0, 7.0}
    for (_, _, one), (_, _, other) in zip(engines[0].zero.masters(), engines[1].zero.masters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # another loss scale rounds otherwise


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_counts_for_nobody(ranks: Any, stage: int) -> None:
    ranks.run(check_overflow, 2, stage)


def check_save(folder: Path, kind: str, stage: int, tag: str, **more: Any) -> None:
    engine = build(stage, kind, **more)
    train(engine, 0, 2)  # the branch has no state yet
    engine.save_checkpoint(folder, f"{tag}-2")
    train(engine, 2, 5)
    engine.save_checkpoint(folder, f"{tag}-5")


def check_resume(folder: Path, kind: str, stage: int, tag: str, again: bool = False, **more: Any) -> None:
    for step in (2, 5):
        engine = build(stage, kind, **more)
        if again:  # over states that are there already
            train(engine, 0, 4)
        engine.load_checkpoint(folder, f"{tag}-{step}")
        train(engine, step)
        assert_like(engine, wanted(kind), 1e-6)


@pytest.mark.parametrize("kind", ["AdamW", "amsgrad", "NAdam", "SGD", "Rprop", "Lamb", "named Adagrad", "named SGD"])
def test_resumes_on_other_ranks_and_stages(ranks: Any, tmp_path: Path, kind: str) -> None:
    layouts = [(1, 0), (2, 1), (2, 3)]
    for size, stage in layouts:
        ranks.run(check_save, size, tmp_path, kind, stage, f"{size}-{stage}")
    for saved in ("2-1", "1-0", "2-3"):
        for size, stage in layouts:
            ranks.run(check_resume, size, tmp_path, kind, stage, saved)
    ranks.run(check_resume, 2, tmp_path, kind, 2, "2-1", again=True)


def check_resume_nvme(folder: Path) -> None:
    offload = {"device": "nvme", "nvme_path": str(folder)}
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": offload, "reduce_bucket_size": 300}}
    check_save(folder, "AdamW", 3, "nvme", **zero)
    check_resume(folder, "AdamW", 3, "nvme", again=True, **zero)
    check_resume(folder, "AdamW", 1, "nvme")


def test_resumes_with_states_in_files(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_resume_nvme, 2, tmp_path)


def check_record(folder: Path) -> None:
    """The record names what differs, whichever rank holds it."""
    engine = build(1, "AdamW")
    train(engine, 0, 3)
    engine.save_checkpoint(folder, "three")
    train(engine, 3, 4)
    engine.save_checkpoint(folder, "four")


def test_what_a_checkpoint_says_of_them(ranks: Any, tmp_path: Path) -> None:
    ranks.run(check_record, 2, tmp_path)
    three, four = (json.loads((tmp_path / tag / "state.json").read_text())["optimizer"] for tag in ("three", "four"))
    branch = {f"branch.{layer}.{name}": {"step": 1.0} for layer in (0, 1) for name in ("weight", "bias")}
    assert three["family"] == ["AdamW", "Adam"] and three["states"] == ["exp_avg", "exp_avg_sq"]
    assert (three["scalars"], three["apart"]) == ({"step": 3.0}, branch)
    assert four["scalars"] == {"step": 4.0} and four["apart"].keys() == {*branch, "gain"}
    assert four["apart"]["gain"] == {"step": 3.0}
    assert sorted(three["without"]) == sorted(four["without"]) == ["never.bias", "never.weight"]


def test_checkpoints_of_before(tmp_path: Path) -> None:
    """One number for all, and every parameter with states."""
    engine = build(1, "AdamW")
    engine.shards.prepare(["exp_avg", "exp_avg_sq"], {"step": 3.0})  # type: ignore[union-attr]
    engine.save_checkpoint(tmp_path, "a")
    path = tmp_path / "a" / "state.json"
    state = json.loads(path.read_text())
    assert (state["optimizer"].pop("apart"), state["optimizer"].pop("without")) == ({}, [])
    del state["optimizer"]["family"]
    files = read_manifest(tmp_path / "a", "a")
    write_manifest(tmp_path / "a", "a", files | {"state.json": write_file(path, to_json(state))})
    other = build(1, "AdamW")
    other.load_checkpoint(tmp_path)
    assert {numbers["step"] for numbers in other.shards.numbers().values()} == {3.0}  # type: ignore[union-attr,index]


class Blockwise(torch.optim.SGD):
    """Keeps a number for every four elements, as 8-bit optimizers keep scales of blocks."""

    element_wise = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("scales", torch.zeros(-(-parameter.numel() // 4)))
        super().step()


def test_states_that_cannot_be_divided() -> None:
    """Said with the parameters' names; what is idle from the first step on needs no dividing."""
    model = make()
    config = config_of(0)
    del config["optimizer"]
    engine = engine_of(model, config, optimizer=Blockwise(model.parameters(), lr=LR))
    train(engine, 2, 3)
    assert all(n is None for name, n in engine.shards.numbers().items() if "never" in name)  # type: ignore[union-attr]
    with pytest.raises(
        ConfigError, match=r"'scales' of Blockwise is not one number.*among last\.bias, .*AdamW instead"
    ):
        train(engine, 3, 4)
