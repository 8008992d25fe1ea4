"""Which optimizers can step on ZeRO's flat cuts: torch's, subclasses, and home-made ones that couple elements."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megazero.engine import optimizers as ours
from megazero.engine.optimizers import element_wise_problem, is_element_wise, repoint


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]


class MyAdamW(torch.optim.AdamW):
    """A subclass with another constructor."""

    def __init__(self, model: nn.Module, warmup: int) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.warmup, self.calls = model, warmup, 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


class Plain(torch.optim.Optimizer):
    """Steps by `change` of each gradient."""

    def __init__(self, params: Any, **attributes: Any) -> None:
        super().__init__(params, {"lr": 1e-3})
        vars(self).update(attributes)

    def change(self, gradient: Tensor) -> Tensor:
        return gradient

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * self.change(parameter.grad))


class ByNorm(Plain):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


class ByRow(Plain):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient - gradient.mean(-1, keepdim=True)


class Shared(Plain):
    """Couples parameters with one another, not only the elements of one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        total = sum(p.grad.abs().sum() for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad / total)


class PositionNoise(Plain):
    def change(self, gradient: Tensor) -> Tensor:
        random.random()
        return gradient + torch.randn_like(gradient)


class NeedsClosure(Plain):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class Declared(ByNorm):
    element_wise = True


class Denied(Plain):
    element_wise = False


class Wrapper:
    """As accelerate's, which forwards to an inner optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


GOOD = [
    *(getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax")),
    *(getattr(torch.optim, name) for name in ("NAdam", "RAdam", "Rprop", "ASGD")),
    *(ours.SGD, ours.Adam, ours.AdamW, ours.Adagrad, ours.FusedAdam, ours.CPUAdam, ours.Lion, Plain, Declared),
]


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}")
def test_element_wise(kind: Any) -> None:
    assert (
        element_wise_problem(kind(parameters(), lr=1e-3) if kind not in (Plain, Declared) else kind(parameters()))
        is None
    )
    tried = type("Derived", (kind,), {})  # a subclass is tried, not believed
    assert is_element_wise(tried(parameters()))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "LBFGS is not element-wise: it keeps a history"),
        (torch.optim.SparseAdam, "SparseAdam is not element-wise: it takes sparse gradients"),
        (torch.optim.Adafactor, "Adafactor is not element-wise: .* rows and columns"),
        (lambda params: torch.optim.Muon(params[:1]), "Muon is not element-wise: .*megazero's own Muon"),
        (ours.Lamb, "Lamb is not element-wise: it steps on whole parameters"),
        (lambda params: ours.Muon(params[:1]), "Muon is not element-wise: it steps on whole parameters"),
        (ByNorm, r"ByNorm is not element-wise: a \[4, 6\] parameter and two flat cuts of it differ by [0-9.e-]+ after"),
        (ByRow, "ByRow is not element-wise"),
        (Shared, "Shared is not element-wise"),
        (PositionNoise, "PositionNoise is not element-wise"),
        (NeedsClosure, r"NeedsClosure.step needs arguments \(a closure\?\)"),
        (Denied, "Denied says of itself that it is not"),
        (lambda params: Wrapper(ByNorm(params)), "ByNorm is not element-wise"),
        (lambda params: Plain(params, lock=threading.Lock()), "Plain .* 'lock' cannot be copied .TypeError"),
        (
            lambda params: Plain(params, change=lambda g: 1 / 0),
            "Plain .* its step on small tensors failed .ZeroDivision",
        ),
    ],
)
def test_not_element_wise(optimizer: Any, message: str) -> None:
    made = optimizer(parameters())
    with pytest.raises(ValueError, match=message + ".*Take an element-wise optimizer .* set element_wise = True"):
        raise ValueError(element_wise_problem(made))
    assert not is_element_wise(made)


def test_other_kinds_of_groups_are_tried_too() -> None:
    class Mixed(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * (p.grad / p.grad.norm() if group.get("normed") else p.grad))

    first, second = parameters()
    assert is_element_wise(Mixed([first, second]))
    assert not is_element_wise(Mixed([{"params": [first]}, {"params": [second], "normed": True}]))


def test_a_learning_rate_of_zero_hides_nothing() -> None:
    optimizer = ByNorm(parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    assert not is_element_wise(optimizer)


def test_the_users_things_are_left_alone() -> None:
    model = nn.Linear(4, 3)
    optimizer = MyAdamW(model, warmup=10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # wraps optimizer.step
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *given: seen.append(given))
    handle = register_optimizer_step_pre_hook(lambda *given: seen.append(given))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    torch.manual_seed(3)
    random.seed(3)
    draws = torch.get_rng_state(), random.getstate()
    try:
        assert is_element_wise(optimizer)
        optimizer.zero_grad()
        optimizer.step()
        assert len(seen) >= 2  # hooks of this optimizer and of all optimizers are there again
        seen.clear()
        assert not is_element_wise(PositionNoise(parameters()))
    finally:
        handle.remove()
    assert not seen and optimizer.calls == 2 and scheduler.last_epoch == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[p][k], v) for p, state in states.items() for k, v in state.items())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert torch.equal(torch.get_rng_state(), draws[0]) and random.getstate() == draws[1]


@pytest.mark.parametrize(
    "kind", [torch.optim.Adagrad, ours.Adagrad, torch.optim.AdamW, ours.AdamW, ours.Lion, torch.optim.SGD]
)
def test_repointed_at_cuts(kind: Any) -> None:
    """An optimizer that has stepped is pointed at flat cuts and trains them as a new one trains the whole."""
    whole = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    given = [torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    optimizer = kind([("w", whole)], lr=1e-2)
    whole.grad = torch.ones_like(whole)
    optimizer.step()
    reference = nn.Parameter(whole.detach().clone())
    other = kind([reference], lr=1e-2)
    flat = whole.detach().clone().flatten()
    cuts = [nn.Parameter(flat[:5]), nn.Parameter(flat[5:])]
    repoint(optimizer, [cuts])
    assert "param_names" not in optimizer.param_groups[0]
    for gradient in given:
        reference.grad = gradient.clone()
        cuts[0].grad, cuts[1].grad = gradient.flatten()[:5].clone(), gradient.flatten()[5:].clone()
        other.step()
        optimizer.step()
    torch.testing.assert_close(flat, reference.detach().flatten(), rtol=0, atol=1e-7)
    repoint(optimizer, [[]])
    optimizer.step()


def test_repointing_finds_the_fused_kernel() -> None:
    optimizer = ours.AdamW([nn.Parameter(torch.zeros(2, device="meta"))])
    repoint(optimizer, [[nn.Parameter(torch.zeros(2))]])
    assert optimizer.param_groups[0]["fused"] is True
    plain = ours.AdamW([nn.Parameter(torch.zeros(2))], foreach=True)
    repoint(plain, [[nn.Parameter(torch.zeros(2))]])
    assert plain.param_groups[0]["fused"] is None
