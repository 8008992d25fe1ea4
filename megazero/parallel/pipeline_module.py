"""A user's own model as a pipeline: a list of layers, called one after the other, cut into stages.

    PipelineModule([LayerSpec(Embed, …), LayerSpec(Block, …), …, LayerSpec(Head, …)], num_stages=4, loss_fn=loss)

      inputs ─► layer 0 ─► … ─┊─► layer i ─► … ─┊─► last layer ─► loss_fn(outputs, labels)     ┊ = end of a stage

As in DeepSpeed's pipeline API: a layer gets what the one before returned, a tensor or a tuple of tensors. A rank builds
the layers of its stages and no others. Every layer is built from a seed of its own, so that initial values do not
depend on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.base.device import device_type
from megazero.base.errors import ConfigError
from megazero.config.pipeline import V_SCHEDULES, place_of
from megazero.parallel.collectives import gather_objects
from megazero.parallel.layer_spec import Layer, LayerSpec, MetaLayer, TiedLayerSpec, name_of, partition, plain
from megazero.parallel.pipeline import MULTI, SINGLE, LocalStage, Pipeline
from megazero.parallel.recompute import checkpoint
from megazero.parallel.tied_layers import TiedLayer, tie
from megazero.parallel.topology import Topology

LossFunction = Callable[[Any, Any], Tensor]


class PipelineModule(nn.Module):
    """This rank's stages of a model that is a list of layers. With one stage, the whole model. Collective.

    Args:
        layers: LayerSpecs, modules that are ready (equal on all ranks; all ranks pay for all of them), or functions.
        num_stages: pipeline ranks; the world's other ranks are data parallel.
        topology: instead of num_stages.
        loss_fn: (outputs, labels) -> scalar mean loss of a micro-batch. Without one the last layer gives the loss.
        partition_method: see `partition`.
        seed_layers: build layer i from seed base_seed + i, whatever torch's generator says. Otherwise from that
            generator (rank 0's) and i.
        activation_checkpoint_interval: compute each run of so many layers again in backward; 0: keep all.
        schedule, virtual_stages: --pipeline-schedule's names; how many stages a rank holds (the interleaved and V
            schedules: 2 by default, others 1).

    Raises ConfigError for what cannot be cut, tied or placed so.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        num_stages: int | None = None,
        topology: Topology | None = None,
        loss_fn: LossFunction | None = None,
        partition_method: str = "cost",
        seed_layers: bool = False,
        base_seed: int = 1234,
        activation_checkpoint_interval: int = 0,
        *,
        schedule: str = "1f1b",
        virtual_stages: int | None = None,
    ) -> None:
        super().__init__()
        self.topology = _topology(num_stages, topology)
        self.schedule, self.seed_layers = schedule, seed_layers
        self._layers = list(layers)
        self._metas = [MetaLayer(layer, index) for index, layer in enumerate(self._layers)]
        pp = self.topology.size("pp")
        stages = pp * _virtual_stages(schedule, virtual_stages, pp)
        counts = [meta.parameters for meta in self._metas]
        ends = torch.tensor(partition(partition_method, self._layers, counts, stages)).cumsum(0).tolist()
        self.cut = [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        """The layers of each stage."""
        self.places = [place_of(stage, pp, schedule).rank for stage in range(stages)]
        """The pp rank of each stage."""
        self._base_seed = base_seed
        self._seeds = _seeds(len(self._layers), base_seed if seed_layers else None, self.topology)
        self._dtype, self._shapes = torch.float32, dict[Any, list[tuple[Tensor, ...]]]()

        mine = [stage for stage in range(stages) if self.places[stage] == self.topology.group("pp").rank]
        self._check_ranks()
        built = {index: self._build(index) for stage in mine for index in self.cut[stage]}
        self.tied = nn.ParameterDict()  # first, so that all ranks meet shared weights in the same order
        for weight in tie(self._metas, built, self._build, self.rank_of, self.topology):
            self.tied[str(len(self.tied))] = weight
        self.layers = nn.ModuleDict({str(i): layer for i, layer in built.items() if isinstance(layer, nn.Module)})
        self._stages = [
            LocalStage(stage, _Run([built[i] for i in self.cut[stage]], activation_checkpoint_interval))
            for stage in mine
        ]
        self.loss_fn: LossFunction | None
        if mine[-1] == stages - 1:
            self.loss_fn = loss_fn  # a module with parameters is trained, and saved, where it is called
        else:
            self.__dict__["loss_fn"] = loss_fn

    @property
    def units(self) -> list[str]:
        """Names of the layers, each of which is one unit of ZeRO."""
        return [f"layers.{name}" for name in self.layers]

    def set_activation_checkpoint_interval(self, interval: int) -> None:
        """Compute each run of so many layers again in backward from now on; 0: keep all."""
        for stage in self._stages:
            assert isinstance(stage.module, _Run)
            stage.module.interval = interval

    @torch.no_grad()
    def reseed(self) -> bool:
        """Give the layers the values of seed_layers=True now, in place. False, with nothing changed, when some rank's
        are no longer as they were built: loaded, say. Collective."""
        as_built = all(_alike(layer, again) for layer, again in self._rebuilt())
        if not all(gather_objects(as_built, self.topology.group("world"))):
            return False
        self._seeds, self.seed_layers = _seeds(len(self._layers), self._base_seed, self.topology), True
        for layer, again in self._rebuilt():
            values = _tensors(again)
            for name, tensor in _tensors(layer).items():
                tensor.copy_(values[name])
        return True

    def extra_repr(self) -> str:
        return "\n".join(
            f"stage {stage} on pp rank {self.places[stage]}: layers {part.start}-{part.stop - 1}, "
            f"{sum(self._metas[i].parameters for i in part):,} parameters"
            for stage, part in enumerate(self.cut)
        )

    # running

    def forward(self, *inputs: Any) -> Any:
        """`inputs` through all layers; for one that is not a pipeline (see `pipeline` for one that is)."""
        assert len(self._stages) == len(self.cut), "this rank does not hold all stages: use pipeline()"
        x = plain(inputs)
        for stage in self._stages:
            x = stage.module(x)
        return x

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of a micro-batch that `micro_batch` made, without a pipeline."""
        return self._loss(self(plain(_named(batch, "input"))), batch)

    @staticmethod
    def micro_batch(inputs: Any, labels: Any = None) -> dict[str, Tensor]:
        """A micro-batch of (inputs, labels), each a tensor or a tuple of tensors with samples along dim 0, as named
        tensors, which all stages get."""
        named: dict[str, Tensor] = {}
        for kind, value in (("input", inputs), ("label", labels)):
            parts = value if isinstance(value, list | tuple) else () if value is None else (value,)
            named |= {f"{kind}{index}": part for index, part in enumerate(parts)}
        return named

    def pipeline(
        self,
        weights_done: Callable[[nn.Module], None],
        *,
        micro_batches: int,
        example: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """The pipeline of this model's stages, for `engine.use_pipeline(partial(module.pipeline, micro_batches=…, …))`.

        Args:
            example: one micro-batch as `micro_batch` makes it; only shapes and types matter.
            dtype: of the parameters, once ZeRO has taken them.

        Raises ConfigError when a layer does not run on meta, where shapes come from, or for too few micro-batches.
        """
        if dtype != self._dtype:
            self._shapes.clear()
        self._dtype = dtype
        few = self.schedule == "1f1b" and micro_batches < len(self.cut)  # which torch refuses; the order is GPipe's
        try:
            return Pipeline(
                self._stages,
                self.places,
                self.topology.group("pp"),
                schedule="gpipe" if few else self.schedule,
                micro_batches=micro_batches,
                example=example,
                received=self._received,
                forward=self._run_stage,
                weights_done=weights_done,
                device=device,
            )
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"{micro_batches} micro-batches a step with schedule {self.schedule!r} and {len(self.cut)} stages on "
                f"{self.topology.size('pp')} ranks: {str(error).rstrip('.')}. Change the number of micro-batches, or "
                "use 'gpipe'."
            ) from error

    def _run_stage(self, stage: nn.Module, inputs: Mapping[str, Tensor], hidden: Any) -> Any:
        """How the pipeline calls a stage."""
        out = stage(plain(_named(inputs, "input")) if hidden is None else hidden)
        if stage is not self._stages[-1].module or self._stages[-1].number < len(self.cut) - 1:
            return plain([_own(tensor, hidden) for tensor in _tuple(out)])
        return self._loss(out, inputs) if self.loss_fn is None or "label0" in inputs else out

    def _loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return outputs if self.loss_fn is None else self.loss_fn(outputs, plain(_named(batch, "label")))

    def _received(self, inputs: Mapping[str, Tensor], stage: int) -> tuple[Tensor, ...]:
        """Meta tensors like those that a stage gets from the one before."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self._shapes:
            with torch.enable_grad():
                self._shapes[key] = self._trace(inputs)
        return self._shapes[key][stage - 1]

    def _trace(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """What comes out of every stage but the last."""
        x, found = plain([tensor.detach().to("meta") for tensor in _named(inputs, "input")]), []
        for part in self.cut[:-1]:
            for index in part:
                x = self._metas[index](x, self._dtype)
            for value in _tuple(x):
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        f"layer {part[-1]} ({name_of(self._layers[part[-1]])}), the last of its stage, returns a "
                        f"{type(value).__name__}: only tensors go from one stage to the next. Return a tensor or a "
                        "tuple of tensors, or let the stage end elsewhere with partition_method."
                    )
            leaves = [
                torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad) for t in _tuple(x)
            ]
            found.append(tuple(leaves))
            x = plain(leaves)
        return found

    # building

    def _build(self, index: int) -> Layer:
        """Layer `index` for real, from its own seed, whatever was built before."""
        layer = self._layers[index]
        if not isinstance(layer, LayerSpec):
            return layer
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(self._seeds[index])
            module = layer.build()
        return TiedLayer(layer, module) if isinstance(layer, TiedLayerSpec) else module

    def _rebuilt(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each of this rank's layers from LayerSpecs, and the same built once more."""
        firsts: dict[str, int] = {}
        for index, spec in enumerate(self._layers):
            if isinstance(spec, TiedLayerSpec):
                firsts.setdefault(spec.key, index)
            if isinstance(spec, LayerSpec) and str(index) in self.layers:
                again = self._build(index)
                assert isinstance(again, nn.Module)
                if isinstance(again, TiedLayer):
                    first = self._build(firsts[again.spec.key])
                    assert isinstance(first, TiedLayer)
                    again.share(first.spec.weights(first.module))
                yield self.layers[str(index)], again

    def rank_of(self, index: int) -> int:
        """The pp rank of a layer."""
        return next(place for place, part in zip(self.places, self.cut, strict=True) if index in part)

    def _check_ranks(self) -> None:
        """Each rank has something to train, and ready modules share no parameters across ranks, where they would
        drift apart."""
        for rank in sorted(set(self.places)):
            held = [meta for meta in self._metas if self.rank_of(meta.index) == rank]
            if not any(p.requires_grad for meta in held if meta.module is not None for p in meta.module.parameters()):
                raise ConfigError(
                    f"pp rank {rank} would hold nothing to train: {', '.join(name_of(meta.layer) for meta in held)}. "
                    "Use fewer stages, or another partition_method."
                )
        first: dict[nn.Parameter, int] = {}
        for index, layer in enumerate(self._layers):
            for parameter in layer.parameters() if isinstance(layer, nn.Module) else ():
                if self.rank_of(index) != self.rank_of(first.setdefault(parameter, index)):
                    raise ConfigError(
                        f"layers {first[parameter]} and {index} ({name_of(layer)}) share a parameter and are on "
                        "different ranks. Describe them as TiedLayerSpecs of one key."
                    )


class _Run(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[Any], interval: int) -> None:
        super().__init__()
        self.calls, self.interval = layers, interval
        self.held = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))

    def forward(self, x: Any) -> Any:
        if not self.interval or not torch.is_grad_enabled():
            return _through(self.calls, x)
        for start in range(0, len(self.calls), self.interval):
            x = checkpoint(partial(_through, self.calls[start : start + self.interval]), x)
        return x


def _through(calls: Sequence[Callable[[Any], Any]], x: Any) -> Any:
    for call in calls:
        x = plain(call(x))
    return x


def _seeds(layers: int, base: int | None, topology: Topology) -> list[int]:
    """A seed for each layer, the same on all ranks."""
    if base is not None:
        return [base + index for index in range(layers)]
    drawn = gather_objects(int(torch.randint(2**31, ())), topology.group("world"))[0]
    return [crc32(f"{drawn} {index}".encode()) for index in range(layers)]


def _topology(num_stages: int | None, topology: Topology | None) -> Topology:
    if topology is not None and not isinstance(topology, Topology):
        raise ConfigError(
            f"PipelineModule(topology={topology!r}): takes a megazero.Topology, which has process groups. Make one "
            "with PipeDataParallelTopology(num_pp, num_dp) or Topology.build(pp=…)."
        )
    if topology is None and num_stages is None:
        raise ConfigError("PipelineModule needs num_stages or a topology. Give num_stages=1 for a model in one piece.")
    if topology is None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        assert num_stages is not None
        if num_stages < 1 or world % num_stages:
            raise ConfigError(
                f"num_stages={num_stages} on {world} ranks: each replica takes one rank a stage. Start a multiple of "
                f"{max(num_stages, 1)} ranks (with torchrun, and the process group initialised), or use a divisor of "
                f"{world}."
            )
        device = "cpu" if world == 1 or dist.get_backend() == "gloo" else device_type()
        return Topology.build(pp=num_stages, device_type=device)
    if num_stages is not None and num_stages != topology.size("pp"):
        raise ConfigError(
            f"num_stages={num_stages} and a topology with pp={topology.size('pp')} contradict each other. Give one."
        )
    return topology


def _virtual_stages(schedule: str, given: int | None, pp: int) -> int:
    """Stages on each rank."""
    if schedule not in (*SINGLE, *MULTI):
        raise ConfigError(f"schedule {schedule!r} is none of {', '.join((*SINGLE, *MULTI))}. Use one of these.")
    if pp == 1:
        return 1
    if schedule in SINGLE:
        number, fits, rule = given or 1, given in (None, 1), "1"
    else:
        number = 2 if given is None else given
        fits, rule = (number == 2, "exactly 2") if schedule in V_SCHEDULES else (number >= 2, "2 or more")
    if not fits:
        raise ConfigError(f"virtual_stages={given} with schedule {schedule!r}: it takes {rule}. Change one of them.")
    return number


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether they hold the same, up to type and device."""
    mine, others = _tensors(module), _tensors(other)
    return mine.keys() == others.keys() and all(
        tensor.shape == others[name].shape and torch.equal(tensor, others[name].to(tensor))
        for name, tensor in mine.items()
    )


def _named(batch: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """The tensors `kind`0, `kind`1, …"""
    return [batch[f"{kind}{index}"] for index in range(sum(name.startswith(kind) for name in batch))]


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _own(tensor: Tensor, received: Any) -> Tensor:
    """A tensor that the pipeline may detach in place and send: contiguous, no view, not what the stage received."""
    tensor = tensor.contiguous()
    is_input = received is not None and any(tensor is other for other in _tuple(received))
    return tensor.clone() if is_input or tensor._is_view() else tensor


def PipeDataParallelTopology(num_pp: int, num_dp: int) -> Topology:
    """DeepSpeed's name for a topology with pipeline and data axes."""
    return Topology.build(pp=num_pp, dp=num_dp)


def PipeModelDataParallelTopology(num_pp: int, num_mp: int, num_dp: int) -> Topology:
    """DeepSpeed's name for one with pipeline, tensor ("model") and data axes."""
    return Topology.build(pp=num_pp, tp=num_mp, dp=num_dp)
