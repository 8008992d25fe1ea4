"""Which optimizer of the schema a ds_config's has the state of, element for element: what a plan counts.

    RMSprop with momentum   two numbers   adam             Adagrad, Lion, SGD with momentum   one
    SGD                     none          sgd, momentum 0  Adam8bit                           two of one byte

(torch.optim's classes for those that the schema has not.)
"""

from __future__ import annotations

from megazero.config.deepspeed_optimizers import Named
from megazero.config.deepspeed_pretrain import TYPES
from megazero.config.layers import Setting

_LIKE = {
    **dict.fromkeys(("adadelta", "adamax", "nadam", "radam", "rprop"), "adam"),
    "asgd": "adagrad",
    "adafactor": "sgd",  # a row and a column of a matrix are next to nothing
}


def optimizer_settings(named: Named) -> dict[str, Setting]:
    """The settings that make a plan count this optimizer's state."""
    momentum = named.params.get("momentum")
    moving = isinstance(momentum, int | float) and momentum > 0
    if named.folded == "rmsprop":
        name = "adam" if moving or named.params.get("centered") is True else "adagrad"
    else:
        name = _LIKE.get(named.folded) or TYPES[named.folded][0]
    found = {"optimizer.optimizer": Setting(name, named.type)}
    return found | ({"optimizer.sgd_momentum": Setting(0.9 if moving else 0.0, named.type)} if name == "sgd" else {})


def uncounted(named: Named) -> str:
    """What a plan leaves out of this optimizer's state, in words; empty for nothing."""
    return " (amsgrad's 4 bytes a parameter not counted)" if named.params.get("amsgrad") is True else ""
