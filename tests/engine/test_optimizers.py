"""Optimizer classes against torch's over several steps, and optimizers by name with every error."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from megazero.base import optional
from megazero.base.errors import ConfigError
from megazero.engine import optimizers as ours
from megazero.engine.optimizers import eight_bit
from megazero.engine.optimizers.muon import takes_muon
from megazero.ops.lamb import lamb_reference
from megazero.ops.lion import lion_reference
from tests.engine.sliced import gradient, train_whole, weights

make = ours.make_optimizer
LR = {"lr": 1e-2}


def trained(kind: Any, steps: int = 5, **arguments: Any) -> dict[str, nn.Parameter]:
    whole = weights()
    train_whole(kind(list(whole.values()), **arguments), whole, steps)
    return whole


def assert_same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter], tolerance: float = 1e-6) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("kind", "reference", "arguments"),
    [
        (ours.Adam, torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
        (ours.AdamW, torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
        (ours.AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
        (ours.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (ours.Adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
        (ours.FusedAdam, torch.optim.AdamW, {}),
        (ours.CPUAdam, torch.optim.AdamW, {}),
    ],
)
def test_equals_torch(kind: Any, reference: Any, arguments: dict[str, Any]) -> None:
    assert_same(trained(kind, lr=1e-2, **arguments), trained(reference, lr=1e-2, fused=False, **arguments))
    optimizer = kind(weights().values(), lr=1e-2, **arguments)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert all(group["fused"] and not group["foreach"] for group in optimizer.param_groups)


def test_fused_adam_has_torchs_defaults() -> None:
    for kind in (ours.FusedAdam, ours.CPUAdam):
        assert_same(trained(kind), trained(torch.optim.AdamW, fused=True), 0.0)
    assert_same(trained(ours.FusedAdam, adam_w_mode=False), trained(torch.optim.Adam, fused=True), 0.0)
    decayed = trained(ours.CPUAdam, adamw_mode=False, weight_decay=0.1)
    assert_same(decayed, trained(torch.optim.Adam, weight_decay=0.1, fused=True), 0.0)


def test_a_whole_models_parameters_named_and_in_groups() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours.FusedAdam(model.parameters(), lr=1e-3)
    named = ours.AdamW(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].weight}]
    made = ours.AdamW(groups)
    assert [(group["lr"], len(group["params"])) for group in made.param_groups] == [(1.0, 2), (1e-3, 1)]
    with pytest.raises(TypeError, match="Put it into a list"):
        ours.AdamW(model[0].weight)
    with pytest.raises(ValueError, match="empty parameter list"):
        ours.AdamW([])


def test_the_users_kernel_and_unfusable_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert ours.AdamW([parameter], foreach=True).param_groups[0]["fused"] is None
    assert ours.AdamW([parameter], fused=False).param_groups[0]["fused"] is False
    assert ours.AdamW([nn.Parameter(torch.zeros(2, device="meta"))]).param_groups[0]["fused"] is None


def test_zero_grad_keeps_or_forgets() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    for forgets in (True, False):
        optimizer = ours.FusedAdam([parameter], set_grad_none=forgets)
        parameter.grad = torch.ones(2)
        optimizer.zero_grad()
        assert (parameter.grad is None) is forgets
    optimizer.zero_grad(set_to_none=True)
    assert parameter.grad is None


def test_lion_equals_its_formula() -> None:
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    found = trained(ours.Lion, **arguments)
    for name, start in weights().items():
        weight, momentum = start.detach(), torch.zeros_like(start)
        for step in range(5):
            weight, momentum = lion_reference(weight, gradient(name, step), momentum, **arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=1e-6)


def test_lamb_equals_its_formula() -> None:
    arguments: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    bounds = {"min_coeff": 0.5, "max_coeff": 1.5}
    found = trained(ours.Lamb, **arguments, **bounds)
    for name, start in weights().items():
        weight, first, second = start.detach(), torch.zeros_like(start), torch.zeros_like(start)
        for step in range(5):
            given = gradient(name, step)
            weight, first, second = lamb_reference(weight, given, first, second, step + 1, **arguments, **bounds)
        torch.testing.assert_close(found[name].detach(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "momentum": 0.5}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_muon_equals_torchs_muon_and_adamw(settings: dict[str, Any]) -> None:
    found, one = weights(), weights()
    optimizer = ours.Muon(found.items(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), **settings)
    hidden = [name for name in one if name.startswith("layer") and name.endswith("weight")]
    muon = torch.optim.Muon([one[name] for name in hidden], lr=1e-2, weight_decay=0.1, **settings)
    rest = [parameter for name, parameter in one.items() if name not in hidden]
    adam = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(4):
        for name in one:
            found[name].grad, one[name].grad = gradient(name, step), gradient(name, step)
        for each in (optimizer, muon, adam):
            each.step()
    for name in one:
        torch.testing.assert_close(found[name], one[name], rtol=0, atol=0 if name in hidden else 1e-6, msg=name)


def test_muon_sorts_by_name_attribute_and_group() -> None:
    hidden, other = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    for name in ("model.layers.0.mlp.up_proj.weight", "attention.output.dense.weight", "h.0.attn.c_attn.weight", ""):
        assert takes_muon(name, hidden), name
    names = ["model.embed_tokens.weight", "wte.weight", "transformer.wpe.weight", "lm_head.weight", "score.weight"]
    names += ["bert.embeddings.word_embeddings.weight", "output_layer.weight", "output.weight", "classifier.weight"]
    for name in names:
        assert not takes_muon(name, hidden), name
    assert not takes_muon("layer.weight", nn.Parameter(torch.zeros(3)))
    other.use_muon = False  # type: ignore[attr-defined]
    optimizer = ours.Muon([("layer.weight", hidden), ("layer.other", other)], muon_lr=0.02, adam_lr=1e-4)
    assert [(g["use_muon"], g["lr"], g["param_names"]) for g in optimizer.param_groups] == [
        (True, 0.02, ["layer.weight"]),
        (False, 1e-4, ["layer.other"]),
    ]
    groups = [{"params": [hidden], "use_muon": False, "lr": 0.5}, {"params": [other], "use_muon": True}]
    optimizer = ours.Muon(groups, lr=0.1)
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(False, 0.5), (True, 0.1)]


def test_muon_without_names_takes_matrices_and_warns_of_embeddings() -> None:
    matrix, vector = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match=r"Give it model.named_parameters\(\), or groups with use_muon"):
        optimizer = ours.Muon([matrix, vector])
    assert [g["use_muon"] for g in optimizer.param_groups] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.Muon([matrix])
        ours.Muon([("w", matrix), ("b", vector)])


def test_muon_takes_stacks_and_filters_when_told() -> None:
    for shape in ((3, 4, 5), (6, 2, 3, 3)):
        stack = nn.Parameter(torch.zeros(shape))
        stack.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ours.Muon([{"params": [stack], "use_muon": True}], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        for at, matrix in enumerate(stack.detach() if len(shape) == 3 else [stack.detach().flatten(1)]):
            alone = nn.Parameter(torch.zeros(matrix.shape))
            alone.grad = (stack.grad[at] if len(shape) == 3 else stack.grad.flatten(1)).clone()
            torch.optim.Muon([alone], lr=1.0, weight_decay=0.0, momentum=0.0).step()
            torch.testing.assert_close(matrix, alone.detach(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"use_muon, and a parameter of shape \(3,\).*use_muon False"):
        ours.Muon([{"params": [nn.Parameter(torch.zeros(3))], "use_muon": True}])


@pytest.mark.parametrize(
    "kind", [ours.Adam, ours.AdamW, ours.SGD, ours.Adagrad, ours.FusedAdam, ours.CPUAdam, ours.Lion, ours.Lamb]
)
def test_groups_are_the_dicts_that_were_given(kind: Any) -> None:
    """As in torch: an optimizer over another one's groups follows the schedule of that one."""
    one, two = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    groups: list[dict[str, Any]] = [{"params": iter([one])}, {"params": two, "lr": 0.5}]
    optimizer = kind(groups, lr=1e-2)
    assert all(mine is given for mine, given in zip(optimizer.param_groups, groups, strict=True))
    assert groups[0]["params"][0] is one and groups[1]["params"][0] is two
    groups[0]["lr"] = 0.0
    one.grad, two.grad = torch.ones(2, 3), torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(one.detach(), torch.ones(2, 3)) and not torch.equal(two.detach(), torch.ones(2, 3))


def test_muon_shares_the_groups_that_say_whose_they_are() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2, 3))], "use_muon": use} for use in (True, False)]
    optimizer = ours.Muon(groups, lr=1e-2, adam_lr=1e-3)
    assert all(mine is given for mine, given in zip(optimizer.param_groups, groups, strict=True))
    assert [group["lr"] for group in groups] == [1e-2, 1e-3]


@pytest.mark.parametrize("kind", [ours.Lion, ours.Lamb, ours.Muon])
def test_closures_unused_parameters_and_saved_states(kind: Any) -> None:
    used, unused = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = kind([used, unused], lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    assert torch.equal(unused.detach(), torch.ones(2, 3)) and not torch.equal(used.detach(), torch.ones(2, 3))
    twin = nn.Parameter(used.detach().clone())
    other = copy.deepcopy(kind([twin, nn.Parameter(torch.ones(2, 3))], lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    copied = other.param_groups[0]["params"][0]
    copied.grad = 2 * copied.detach()
    other.step()
    optimizer.step(closure)
    assert torch.equal(copied, used)


def test_lamb_wants_contiguous_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3).T)
    parameter.grad = torch.ones(3, 4)
    with pytest.raises(ConfigError, match=r"parameter 0 of group 0 is not contiguous.*Make it contiguous"):
        ours.Lamb([parameter]).step()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ours.FusedAdam, {"bias_correction": False}, "FusedAdam with bias_correction False.*Leave it out"),
        (ours.CPUAdam, {"fp32_optimizer_states": False}, "fp32_optimizer_states False.*Leave it out"),
        (ours.Lion, {"lr": -1.0}, "Lion with lr -1.0"),
        (ours.Lion, {"betas": (0.9, 1.0)}, "each must be at least 0 and below 1"),
        (ours.Lion, {"weight_decay": -1.0}, "Lion with weight_decay -1.0"),
        (ours.Lamb, {"lr": -1.0}, "Lamb with lr -1.0"),
        (ours.Lamb, {"betas": (1.5, 0.9)}, "each must be at least 0 and below 1"),
        (ours.Lamb, {"min_coeff": 2.0, "max_coeff": 1.0}, "0 <= min_coeff <= max_coeff"),
        (ours.Muon, {"adam_lr": -1.0}, "Muon with adam_lr -1.0"),
        (ours.Muon, {"momentum": 1.0}, "Muon with momentum 1.0"),
        (ours.Muon, {"adjust_lr_fn": "rms"}, "give one of original, match_rms_adamw"),
    ],
)
def test_bad_values(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.zeros(2, 2))], **arguments)


@pytest.mark.parametrize(
    ("name", "kind", "decoupled"),
    [
        ("Adam", ours.Adam, False),
        ("adamw", ours.AdamW, True),
        ("ADAM_W", ours.AdamW, True),
        ("FusedAdam", ours.FusedAdam, True),
        ("DeepSpeedCPUAdam", ours.CPUAdam, True),
        ("cpuadam", ours.CPUAdam, True),
        ("adagrad", ours.Adagrad, None),
        ("Lamb", ours.Lamb, None),
        ("lion", ours.Lion, None),
        ("SGD", ours.SGD, None),
        ("muon", ours.Muon, None),
        ("RMSprop", torch.optim.RMSprop, None),
        ("nadam", torch.optim.NAdam, False),
        ("LBFGS", torch.optim.LBFGS, None),
    ],
)
def test_by_name(name: str, kind: Any, decoupled: bool | None) -> None:
    made = make(name, [nn.Parameter(torch.zeros(2, 2))], LR)
    assert type(made) is kind and made.param_groups[0]["lr"] == 1e-2
    if decoupled is not None:
        assert made.param_groups[0]["decoupled_weight_decay"] is decoupled


def test_arguments_reach_the_class() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    made = make("AdamW", parameters, {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.3})
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.9, 0.95), 1e-6, 0.3)
    assert type(make("Adam", parameters, {"adam_w_mode": True, "torch_adam": True})) is ours.AdamW
    assert type(make("Adam", parameters, {"adam_w_mode": False, "bias_correction": True})) is ours.Adam
    given = {"lr": 1e-3, "betas": [0.9, 0.99]}
    make("Adam", parameters, given)
    assert given == {"lr": 1e-3, "betas": [0.9, 0.99]}
    make("Adafactor", parameters, {"eps": [None, 1e-3], "lr": torch.tensor(1e-3)})
    make("CPUAdam", parameters, {"weight_decay": None})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdmaW", {}, r"type 'AdmaW' is unknown. Did you mean 'AdamW'\?.* There are .*Lion.*Muon"),
        ("Optimizer", {}, "type 'Optimizer' is unknown"),
        ("OneBitAdam", {}, "compresses communication.*Use AdamW"),
        ("OneBitLamb", {}, "Use Lamb"),
        ("AdamW", {"wieght_decay": 0.1}, r"AdamW has no argument 'wieght_decay'. Did you mean 'weight_decay'\?"),
        ("Lion", {"eps": 1e-8}, "Lion has no argument 'eps'.*It takes betas, lr, weight_decay"),
        ("SGD", {"momentun": 1}, r"Did you mean 'momentum'\?"),
        ("AdamW", {"max_grad_norm": 1.0}, "max_grad_norm 1.0.*Write it as gradient_clipping"),
        ("AdamW", {"lr": "auto"}, "lr 'auto': a number is needed, and auto was not resolved. State one"),
        ("AdamW", {"lr": "3e-4"}, "lr '3e-4': a number is needed. Leave the quotes out"),
        ("AdamW", {"lr": None}, "AdamW with lr None: a number is needed. State one, or leave it out"),
        ("SGD", {"lr": True, "momentum": [1]}, r"SGD with lr True: a num.*\n.*SGD with momentum \[1\]: a number is"),
        ("AdamW", {"betas": [0.9, 0.95, 0.99]}, r"betas \[0.9, 0.95, 0.99\]: two numbers.*Write \[0.9, 0.999\]"),
        ("Lion", {"betas": ["auto", "auto"]}, r"Lion with betas \['auto', 'auto'\]: two numbers"),
        ("Adam", {"betas": 0.9}, "Adam with betas 0.9: two numbers are needed"),
        ("AdamW", {"lr": -1.0}, "AdamW with lr -1.0: Invalid learning rate"),
        ("AdamW", {"adam_w_mode": False}, "AdamW with adam_w_mode False.*give type Adam"),
        ("Adam", {"bias_correction": False}, "Adam with bias_correction False.*Leave it out"),
        ("FusedAdam", {"bias_correction": False}, "FusedAdam with bias_correction False"),
        ("Lamb", {"min_coeff": 3.0, "max_coeff": 2.0}, "0 <= min_coeff <= max_coeff"),
    ],
)
def test_errors_by_name(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, [nn.Parameter(torch.zeros(2, 2))], arguments)


def test_eight_bit_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "available", lambda package: False)
    with pytest.raises(
        optional.MissingPackageError, match=r"for AdamW8bit. Install it: pip install bitsandbytes, or take"
    ):
        make("adamw8bit", [nn.Parameter(torch.zeros(2))], LR)
    with pytest.raises(ConfigError, match="Adam8bit with backend 'apex': give one of bitsandbytes, torchao"):
        make("Adam8bit", [nn.Parameter(torch.zeros(2))], {"backend": "apex"})


def test_eight_bit_takes_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        Adam8bit, AdamW8bit = torch.optim.Adam, torch.optim.AdamW

    asked = []
    monkeypatch.setattr(eight_bit, "available", lambda package: package == "torchao")
    monkeypatch.setattr(eight_bit, "require", lambda *given: asked.append(given) or Package)
    for name, kind in (("Adam8bit", torch.optim.Adam), ("AdamW8bit", torch.optim.AdamW)):
        made = make(name, [nn.Parameter(torch.zeros(2))], {"lr": 0.1, "betas": [0.5, 0.6]})
        assert type(made) is kind and made.param_groups[0]["betas"] == (0.5, 0.6)
        assert asked[-1] == ("torchao.optim", "torchao", f"for {name}")
    make("Adam8bit", [nn.Parameter(torch.zeros(2))], {"backend": "bitsandbytes"})
    assert asked[-1][0] == "bitsandbytes.optim"
    with pytest.raises(ConfigError, match="Adam8bit with lr 1, blocks 3"):
        make("Adam8bit", [nn.Parameter(torch.zeros(2))], {"lr": 1, "blocks": 3})


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_eight_bit_follows_adamw(package: str) -> None:
    """Where the package is installed: within 8 bits of AdamW."""
    if not optional.available(package):
        pytest.skip(f"{package} is not installed")
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(128, 64, generator=generator))
    exact = nn.Parameter(weight.detach().clone())
    pair = [(weight, make("AdamW8bit", [weight], LR | {"backend": package})), (exact, make("AdamW", [exact], LR))]
    for _ in range(3):
        given = torch.randn(128, 64, generator=generator)
        for parameter, optimizer in pair:
            parameter.grad = given.clone()
            optimizer.step()
    assert 0 < (weight - exact).abs().max() < 5e-3 and math.isfinite(float(weight.sum()))
