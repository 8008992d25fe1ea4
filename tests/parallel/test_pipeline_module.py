"""A user's own layers as a pipeline: the numbers of one process on every cut and schedule, nothing built elsewhere, and
errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megazero
from megazero import (
    LayerSpec,
    PipeDataParallelTopology,
    PipelineModule,
    PipeModelDataParallelTopology,
    TiedLayerSpec,
    Topology,
)
from megazero.base.errors import ConfigError
from megazero.config.schema import OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megazero.engine.engine import Engine
from tests.parity.measure import assemble

STEPS, MICRO_BATCHES, ROWS, LENGTH, VOCABULARY, WIDTH = 3, 8, 2, 5, 19, 8
SCHEDULES = {
    "gpipe": None,
    "1f1b": None,
    "interleaved-1f1b": 2,
    "interleaved-zero-bubble": 2,
    "zbv": 2,
    "dualpipev": 2,
}
BUILT: list[int] = []


class Residual(nn.Module):
    """Passes a mask along, as user code does, and keeps a list of who was built for real."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        if not self.inner.weight.is_meta:
            BUILT.append(number)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, mask = x
        return hidden + torch.tanh(self.inner(hidden)) * mask.unsqueeze(-1), mask


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.word(tokens) + self.place.weight, tokens != 0


def project(module: Embed, x: tuple[Tensor, Tensor]) -> Tensor:
    return F.linear(x[0], module.word.weight)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def language_model(**settings: Any) -> PipelineModule:
    """Tied at both ends, a tuple with a mask that has no gradient between all layers."""
    tied = partial(TiedLayerSpec, "embed", Embed, tied_weight_attr="word.weight")
    blocks = [LayerSpec(Residual, WIDTH, number) for number in range(6)]
    return PipelineModule([tied(), *blocks, tied(forward_fn=project)], loss_fn=token_loss, **settings)


def classifier(**settings: Any) -> PipelineModule:
    """Modules, functions and views between layers."""
    layers = [
        LayerSpec(nn.Linear, 12, 16),
        torch.relu,
        LayerSpec(nn.Linear, 16, 16),
        nn.Tanh(),
        lambda x: x.unflatten(1, (4, 4)).transpose(1, 2),
        LayerSpec(nn.LayerNorm, 4),
        nn.Flatten(),
        LayerSpec(nn.Linear, 16, 5),
    ]
    return PipelineModule(layers, loss_fn=F.cross_entropy, **settings)


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def views(**settings: Any) -> PipelineModule:
    """Four stages of three layers, each of which begins and ends with a view."""
    layers = [layer for _ in range(4) for layer in (swap, LayerSpec(nn.Linear, 4, 4), swap)]
    return PipelineModule(layers, loss_fn=lambda out, label: F.cross_entropy(out.flatten(1), label), **settings)


MODELS = {"classifier": classifier, "language model": language_model, "views": views}


def data(kind: str, step: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(step)
    if kind != "language model":
        shape, classes = {"classifier": ((12,), 5), "views": ((4, 3), 12)}[kind]
        return [
            (torch.randn(ROWS, *shape, generator=draw), torch.randint(classes, (ROWS,), generator=draw))
            for _ in range(MICRO_BATCHES)
        ]
    texts = [torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=draw) for _ in range(MICRO_BATCHES)]
    return [(text[:, :-1], text[:, 1:]) for text in texts]


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    validation: float
    gradients: dict[str, Tensor]
    """Of the last step, whole, by logical name."""
    weights: dict[str, Tensor]
    built: list[int]
    """The blocks that this rank built for real."""


def train(kind: str, zero: int = 1, axes: tuple[int, int, int] | None = None, **settings: Any) -> Trained:
    """Some steps of a model; `settings` are PipelineModule's."""
    BUILT.clear()
    torch.manual_seed(5)
    if axes is not None:
        settings["topology"] = PipeModelDataParallelTopology(*axes)
    module = MODELS[kind](**settings)
    config = RunConfig(
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        training=TrainingConfig(precision="fp32", non_finite="raise"),
        parallel=ParallelConfig(zero_stage=zero),
    )
    engine = Engine(module, module.topology, config, torch.device("cpu"), module.units)
    dp = module.topology.group("dp")
    count = MICRO_BATCHES // dp.size
    if len(module.cut) > 1:
        example = module.micro_batch(*data(kind, 0)[0])
        make = partial(module.pipeline, micro_batches=count, example=example, device=torch.device("cpu"))
        engine.use_pipeline(make)
    losses, norms = [], []
    for step in range(STEPS):
        mine = data(kind, step)[dp.rank :: dp.size]
        batches = [module.micro_batch(*pair) for pair in mine]
        result = engine.train_step(batches, PipelineModule.loss, float(count), lr=1e-2)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    buckets = [(b, b.owned[0], b.reduced) for b in engine.zero.buckets]
    gradients = assemble(engine, buckets)
    total, tokens = engine.evaluate([module.micro_batch(*data(kind, 9)[0])], PipelineModule.loss, 1.0)
    weights = assemble(engine, engine.zero.masters())
    return Trained(losses, norms, total / tokens, gradients, weights, list(BUILT))


def assert_same(one: Trained, other: Trained) -> None:
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    assert other.norms == pytest.approx(one.norms, rel=1e-4)
    assert other.validation == pytest.approx(one.validation, rel=1e-5)
    assert other.weights.keys() == one.weights.keys() == one.gradients.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=0, atol=2e-5, msg=name)
        gradient = one.gradients[name]
        assert (other.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.fixture(scope="module")
def alone() -> Any:
    return {kind: train(kind, num_stages=1) for kind in ("classifier", "language model")}


class TestNumbers:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_tied_language_model_on_two_ranks(self, ranks: Any, alone: Any, schedule: str) -> None:
        for result in ranks.run(train, 2, "language model", num_stages=2, schedule=schedule):
            assert_same(alone["language model"], result)

    @pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
    def test_tied_language_model_on_four_ranks(self, ranks: Any, alone: Any, schedule: str) -> None:
        for result in ranks.run(train, 4, "language model", num_stages=4, schedule=schedule):
            assert_same(alone["language model"], result)

    @pytest.mark.parametrize(
        ("world", "schedule", "method"),
        [
            (2, "1f1b", "cost"),
            (2, "zbv", "cost"),
            (2, "interleaved-zero-bubble", "uniform"),
            (2, "dualpipev", "uniform"),  # a stage of views alone beside one with weights
            (4, "gpipe", "type:linear|norm"),
        ],
    )
    def test_classifier(self, ranks: Any, alone: Any, world: int, schedule: str, method: str) -> None:
        settings = {"num_stages": world, "schedule": schedule, "partition_method": method}
        for result in ranks.run(train, world, "classifier", **settings):
            assert_same(alone["classifier"], result)

    def test_stages_that_begin_and_end_with_views(self, ranks: Any) -> None:
        """Gradients that are not contiguous, and outputs that torch cannot detach in place."""
        one = train("views", num_stages=1)
        for schedule in ("1f1b", "zbv"):
            for result in ranks.run(train, 2, "views", num_stages=2, schedule=schedule, partition_method="uniform"):
                assert_same(one, result)

    @pytest.mark.parametrize("zero", [0, 1])
    def test_with_data_parallel(self, ranks: Any, alone: Any, zero: int) -> None:
        for result in ranks.run(train, 4, "language model", num_stages=2, zero=zero):
            assert_same(alone["language model"], result)

    def test_tied_copies_on_tensor_parallel_ranks_count_once(self, ranks: Any, alone: Any) -> None:
        for result in ranks.run(train, 4, "language model", axes=(2, 2, 1)):
            assert_same(alone["language model"], result)

    def test_recomputed_activations(self, ranks: Any, alone: Any) -> None:
        assert_same(alone["language model"], train("language model", num_stages=1, activation_checkpoint_interval=3))
        for result in ranks.run(
            train, 2, "language model", num_stages=2, schedule="zbv", activation_checkpoint_interval=1
        ):
            assert_same(alone["language model"], result)

    def test_seed_layers(self, ranks: Any) -> None:
        one = train("language model", num_stages=1, seed_layers=True, base_seed=7)
        for result in ranks.run(train, 2, "language model", num_stages=2, seed_layers=True, base_seed=7):
            assert_same(one, result)


class TestBuilding:
    def test_only_the_stages_own_layers_are_built(self, ranks: Any) -> None:
        held = [result.built for result in ranks.run(train, 2, "language model", num_stages=2)]
        assert held == [[0, 1, 2], [3, 4, 5]]
        held = [result.built for result in ranks.run(train, 2, "language model", num_stages=2, schedule="zbv")]
        assert held == [[], [0, 1, 2, 3, 4, 5]], "the embedding costs as much as three blocks"

    def test_initial_values_do_not_depend_on_what_was_built_before(self) -> None:
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        one = PipelineModule([LayerSpec(nn.Linear, 3, 3), LayerSpec(nn.Linear, 3, 3)], 1, seed_layers=True)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(1234 + 1)  # as DeepSpeed seeds layer 1
        assert torch.equal(one.layers["1"].weight, nn.Linear(3, 3).weight)
        torch.manual_seed(3)
        first, second = (PipelineModule([LayerSpec(nn.Linear, 3, 3)], 1).layers["0"].weight for _ in range(2))
        assert not torch.equal(first, second), "two models in a row are not the same"
        torch.manual_seed(3)
        assert torch.equal(PipelineModule([LayerSpec(nn.Linear, 3, 3)], 1).layers["0"].weight, first)

    def test_tied_weights_are_one_parameter_on_one_rank(self) -> None:
        module = language_model(num_stages=1)
        names = [name for name, _ in module.named_parameters()]
        assert names[0] == "tied.0"
        assert module.layers["0"].module.word.weight is module.layers["7"].module.word.weight
        assert module.layers["0"].module.place.weight is not module.layers["7"].module.place.weight
        specs = [parameter.shard_spec.name for parameter in module.tied.values()]
        assert specs == ["tied.embed.word.weight"]

    def test_the_cut_is_shown(self) -> None:
        module = PipelineModule([LayerSpec(nn.Linear, 30, 40), torch.relu], num_stages=1)
        assert "stage 0 on pp rank 0: layers 0-1, 1,240 parameters" in repr(module)

    def test_a_layer_may_return_a_list_or_a_tuple_of_one(self) -> None:
        module = PipelineModule([lambda x: [x, x], lambda pair: (pair[0] + pair[1],), LayerSpec(nn.Linear, 2, 2)], 1)
        assert module(torch.ones(1, 2)).shape == (1, 2)


def make(layers: list[Any], **settings: Any) -> None:
    module = PipelineModule(layers, **settings)
    example = module.micro_batch(torch.zeros(2, 4), torch.zeros(2))
    module.pipeline(lambda stage: None, micro_batches=1, example=example, device=torch.device("cpu"))


def refused(layers: list[Any], **settings: Any) -> str:
    """What a rank is told."""
    with pytest.raises(ConfigError) as caught:
        make(layers, **settings)
    return str(caught.value)


def linear(*sizes: int) -> LayerSpec:
    return LayerSpec(nn.Linear, *(sizes or (4, 4)))


def refused_shared() -> str:
    shared = nn.Linear(4, 4)
    return refused([shared, linear(), linear(), shared], num_stages=2)


def refused_values() -> str:
    return refused([linear(), lambda x: x[x > 0], linear()], num_stages=2)


def refused_result() -> str:
    return refused([linear(), lambda x: (x, 3), linear(), linear()], num_stages=2, partition_method="uniform")


class TestErrors:
    def test_of_one_process(self) -> None:
        assert "needs num_stages or a topology" in refused([linear()])
        assert "num_stages=2 on 1 ranks" in refused([linear(), linear()], num_stages=2)
        assert "num_stages=0 on 1 ranks" in refused([linear()], num_stages=0)
        assert "contradict each other" in refused([linear()], num_stages=2, topology=Topology.single())
        assert "schedule 'zb' is none of gpipe, 1f1b" in refused([linear()], num_stages=1, schedule="zb")
        assert "pp rank 0 would hold nothing to train: relu" in refused([torch.relu], num_stages=1)
        tied = [TiedLayerSpec("t", nn.Linear, 4, 4), TiedLayerSpec("t", nn.Embedding, 9, 4)]
        assert "layers 0 and 1 are tied and their weights have shapes [(4, 4)] and [(9, 4)]" in refused(
            tied, num_stages=1
        )
        spec = TiedLayerSpec("t", nn.Linear, 4, 4, tied_weight_attr="wait")
        assert "tied_weight_attr 'wait' is no parameter of it. Name one of its parameters: weight, bias" in refused(
            [spec], num_stages=1
        )
        assert "layer 0 (Linear) cannot be built on torch's meta device" in refused([linear(-1, 2)], num_stages=1)

    def test_of_two_ranks(self, ranks: Any) -> None:
        def said(function: Any, *arguments: Any, **settings: Any) -> str:
            first, second = ranks.run(function, 2, *arguments, **settings)
            assert first == second, "all ranks find it, so that none waits for another"
            return first

        two = [linear(), linear()]
        assert "num_stages=4 on 2 ranks" in said(refused, two, num_stages=4)
        assert "2 layers do not make 4 stages" in said(refused, two, num_stages=2, schedule="zbv")
        assert "virtual_stages=3 with schedule 'zbv': it takes exactly 2" in said(
            refused, two, num_stages=2, schedule="zbv", virtual_stages=3
        )
        assert "it takes 2 or more" in said(refused, two, num_stages=2, schedule="interleaved-1f1b", virtual_stages=1)
        assert "virtual_stages=2 with schedule '1f1b': it takes 1" in said(refused, two, num_stages=2, virtual_stages=2)
        assert "pp rank 1 would hold nothing to train: relu" in said(refused, [linear(), torch.relu], num_stages=2)
        many = {"num_stages": 2, "schedule": "dualpipev"}
        assert "1 micro-batches a step with schedule 'dualpipev' and 4 stages" in said(refused, two * 2, **many)
        assert "layers 0 and 3 (Linear) share a parameter" in said(refused_shared)
        assert "layer 1 (<lambda>) cannot run on torch's meta device" in said(refused_values)
        assert "the last of its stage, returns a int" in said(refused_result)


class GPT2PipelineModel(PipelineModule):
    """As the DeepSpeed tutorials write it."""

    def __init__(self, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        layers = [LayerSpec(nn.Embedding, vocab_size, hidden_size)]
        for _ in range(num_layers):
            layers.append(LayerSpec(nn.TransformerEncoderLayer, hidden_size, 2, 16, 0.0, batch_first=True))  # noqa: PERF401
        layers.append(LayerSpec(nn.Linear, hidden_size, vocab_size))
        super().__init__(
            layers=layers,
            loss_fn=token_loss,
            num_stages=2,
            topology=PipeDataParallelTopology(num_pp=2, num_dp=2),
        )


def train_tutorial() -> list[float]:
    module = GPT2PipelineModel(4, WIDTH, VOCABULARY)
    config = RunConfig(training=TrainingConfig(precision="fp32"))
    engine = Engine(module, module.topology, config, torch.device("cpu"), module.units)
    example = module.micro_batch(*data("language model", 0)[0])
    engine.use_pipeline(partial(module.pipeline, micro_batches=4, example=example, device=torch.device("cpu")))
    dp = module.topology.group("dp").rank
    batches = [module.micro_batch(*pair) for pair in data("language model", 0)[dp::2]]
    return [engine.train_step(batches, PipelineModule.loss, 4.0, lr=1e-2).loss for _ in range(5)]


def test_the_tutorials_model_trains(ranks: Any) -> None:
    results = ranks.run(train_tutorial, 4)
    assert results[0] == results[3], "the last stage's loss is every rank's"
    assert results[0][-1] < 0.9 * results[0][0]


def test_import_megazero_is_cheap_and_knows_its_names() -> None:
    code = "import sys, megazero; assert 'torch' not in sys.modules; megazero.LayerSpec; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert all(getattr(megazero, name) for name in megazero.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        megazero.Nonsense  # noqa: B018
