"""Bytes on one rank, component by component and home by home, from a resolved configuration.

Parameters, of P elements on a rank (its stages, its part over tp), N = dp · cp ranks in the ZeRO group:

    bytes a parameter   16-bit weights   gradients, fp32    fp32 master and     together    with 16-bit gradients
                                         (fp32 default)     Adam's m, v
    ZeRO 0              2                4                  12                  18          16
    ZeRO 1              2                4                  12/N                6 + 12/N    4 + 12/N
    ZeRO 2              2                4/N                12/N                2 + 16/N    2 + 14/N
    ZeRO 3              2/N              4/N                12/N                18/N        16/N
    fp32 weights, ZeRO 1: 4 + 4 + 8/N, the master being the weights; ZeRO 0: 16

(Rajbhandari et al., arXiv 1910.02054; what zero/buckets.py allocates.) On top come buffers that live for moments: whole
gradients of buckets that are being filled and reduced (stages 2, 3) and whole weights of units in use (stage 3).
Offload moves master, moments and, in stages 2 and 3, reduced gradients to CPU memory (nvme: gradients there, the rest
into files), and stage 3's weights likewise (Ren et al., 2101.06840; Rajbhandari et al., 2104.07857). Activations are
formulas in `plan/activations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megazero.config.schema import RunConfig
from megazero.plan.parameters import Bucket, Parameter

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 2}
"""By precision; auto is planned as on a GPU."""
STATE_BYTES = {"adam": 8, "sgd": 4, "adagrad": 4, "lamb": 8, "lion": 4, "muon": 4, "adam8bit": 2}
"""Of the optimizer's state, for each element (Muon: of a matrix; what it gives to Adam has 8)."""
IN_FLIGHT = 2
"""Reductions of stages 2 and 3 that are under way at once, as in zero/reduction.py."""


def gradient_bytes(config: RunConfig) -> int:
    """Bytes of a gradient as it is kept and reduced."""
    return WEIGHT_BYTES[config.training.precision] if config.parallel.grad_accum_dtype == "model" else 4


def state_bytes(config: RunConfig) -> float:
    """Bytes of the optimizer's state for each element (Muon: of a matrix)."""
    momentum = config.optimizer.optimizer != "sgd" or config.optimizer.sgd_momentum
    return STATE_BYTES[config.optimizer.optimizer] if momentum else 0


@dataclass
class Homes:
    """Bytes by component: in the device's memory, the CPU's, and in files."""

    device: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    nvme: dict[str, float] = field(default_factory=dict)

    def add(self, home: str, component: str, count: float) -> None:
        """`home` is none (the device), cpu or nvme, as the settings call them."""
        if count:
            components = {"none": self.device, "cpu": self.cpu, "nvme": self.nvme}[home]
            components[component] = components.get(component, 0.0) + float(count)


def parameter_bytes(config: RunConfig, elements: int, group: int, whole: int = 0, adam: float = 0.0) -> Homes:
    """Bytes of weights, gradients, fp32 masters and optimizer states of `elements` elements (padding included, if it
    is to count) on one of `group` ranks of a ZeRO group. Components that need no memory are left out.

    Args:
        whole: elements among them that stage 3 keeps whole. adam: share of them that muon gives to Adam.
    """
    stage, offload = config.parallel.zero_stage, config.offload
    weight, gradient, homes = WEIGHT_BYTES[config.training.precision], gradient_bytes(config), Homes()
    owned = elements / (group if stage >= 1 else 1)
    moved = offload.offload_ratio if offload.offload_optimizer != "none" else 0.0
    if stage < 3:
        homes.add("none", "weights", weight * elements)
    else:
        shard = (elements - whole) / group
        in_cpu = min(shard, offload.offload_max_in_cpu) if offload.offload_param == "nvme" else 0.0
        homes.add("none", "weights", weight * whole)
        homes.add("cpu", "weights", weight * in_cpu)
        homes.add(offload.offload_param, "weights", weight * (shard - in_cpu))
    if stage < 2:
        homes.add("none", "gradients", gradient * elements)
    else:
        homes.add("none", "gradients", gradient * owned * (1 - moved))
        homes.add("cpu", "gradients", gradient * owned * moved)
    state = state_bytes(config) + (4 * adam if config.optimizer.optimizer == "muon" else 0)
    homes.add("none", "master weights", 0 if weight == 4 else 4 * owned * (1 - moved))
    homes.add("none", "optimizer state", state * owned * (1 - moved))
    homes.add(offload.offload_optimizer, "master weights", 4 * owned * moved)
    homes.add(offload.offload_optimizer, "optimizer state", state * owned * moved)
    return homes


def transient_bytes(config: RunConfig, listed: Sequence[Parameter], buckets: Sequence[Bucket], group: int) -> Homes:
    """Largest bytes of what lives for moments, from a rank's parameters and the buckets that they make."""
    parallel, offload, homes = config.parallel, config.offload, Homes()
    stage, sizes = parallel.zero_stage, [bucket.elements for bucket in buckets]
    reduced = sum(sizes)
    if shards_gradients(config, group):
        # one more bucket is being filled; without overlap all are, before the first is reduced
        whole = _most(sizes, IN_FLIGHT + 1) if parallel.overlap_grad_reduce else sum(sizes)
        homes.add("none", "gradient buckets", gradient_bytes(config) * whole)
        reduced = _most(sizes, IN_FLIGHT)
    homes.add("none", "reduction buffers", reduction_bytes(config, reduced, group))
    if stage == 3 and (group > 1 or offload.offload_param != "none"):
        homes.add("none", "gathered weights", WEIGHT_BYTES[config.training.precision] * gathered(config, listed))
    owned = max(sizes) / (group if stage else 1)
    if offload.offload_optimizer != "none" or gradient_bytes(config) == 2:  # the update goes bucket by bucket
        homes.add("none" if offload.offload_optimizer == "none" else "cpu", "update buffers", 4 * owned)
    if offload.offload_optimizer == "nvme":
        ways = 3 if offload.offload_pipeline_read or offload.offload_pipeline_write else 1  # read, update, write
        homes.add("cpu", "file buffers", ways * (4 + state_bytes(config)) * owned)
    if offload.offload_param == "nvme":
        count = min(offload.offload_param_buffer_count * owned, sum(sizes) / group)
        homes.add("cpu", "file buffers", WEIGHT_BYTES[config.training.precision] * count)
    return homes


def shards_gradients(config: RunConfig, group: int) -> bool:
    """Whether gradients are whole only until they are reduced: stages 2 and 3, unless one rank has them all."""
    return config.parallel.zero_stage >= 2 and (group > 1 or config.offload.offload_optimizer != "none")


def gathered(config: RunConfig, listed: Sequence[Parameter]) -> int:
    """Most elements of weights that stage 3 holds whole at once: a unit in use and what is fetched ahead of the next,
    what is outside all units, and the units that stay whole between forward and backward."""
    parallel = config.parallel
    threshold, ahead = parallel.stage3_param_persistence_threshold or 0, parallel.stage3_prefetch_bucket_size
    units: dict[str, int] = {}
    for parameter in listed:
        if parameter.elements >= threshold:
            units[parameter.unit] = units.get(parameter.unit, 0) + parameter.elements
    outside = units.pop("", 0)
    sizes = list(units.values())
    if ahead is None:  # the next unit's, of forward or backward
        following = [max([0, *sizes[index + 1 : index + 2], *sizes[:index][-1:]]) for index in range(len(sizes))]
    else:
        following = [min(ahead, max(sum(sizes[index + 1 :]), sum(sizes[:index]))) for index in range(len(sizes))]
    most = max(map(sum, zip(sizes, following, strict=True)), default=0)
    return outside + min(most + sum(reused(config, listed).values()), sum(sizes))


def reused(config: RunConfig, listed: Sequence[Parameter]) -> dict[str, int]:
    """The last units, which stay whole from forward to backward, with their elements: each comes back after twice what
    follows it."""
    limit = min(config.parallel.stage3_max_reuse_distance, 2 * config.parallel.stage3_max_live_parameters)
    units: dict[str, int] = {}
    for parameter in reversed(listed):
        units[parameter.unit] = units.get(parameter.unit, 0) + parameter.elements
    kept: dict[str, int] = {}
    for unit, size in units.items():
        if 2 * (sum(kept.values()) + size) > limit:
            break
        kept[unit] = size
    return kept


def _most(sizes: Sequence[int], neighbours: int) -> int:
    """Largest sum of so many that follow each other."""
    return max((sum(sizes[at : at + neighbours]) for at in range(len(sizes))), default=0)


def reduction_bytes(config: RunConfig, elements: int, group: int) -> float:
    """Largest bytes of copies that travel while gradients of `elements` elements are on their way at once.

    NCCL reduces in place and needs a bf16 copy for bf16 on the wire; gloo receives every other rank's slice.
    """
    if group == 1:
        return 0.0
    kept = gradient_bytes(config)
    wire = wire_bytes(config)
    if config.parallel.distributed_backend == "gloo":
        return elements * wire * (group - 1) / group + (elements * wire if wire < kept else 0)
    return elements * wire * (1 + 1 / group) if wire < kept else 0.0


def wire_bytes(config: RunConfig) -> int:
    """Bytes of a gradient on its way between ranks."""
    return min(gradient_bytes(config), 2 if config.parallel.grad_reduce_in_bf16 else 4)


def fits(components: Mapping[str, float], device_memory: int) -> bool:
    """Whether all components together are at most the device's memory."""
    return sum(components.values()) <= device_memory
