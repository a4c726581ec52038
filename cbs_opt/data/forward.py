"""How a network is called on a batch and its loss taken; see `cbs_opt.data.calibration` for what a batch is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cbs_opt.data.trees import Tree
from solvers.errors import DataError

LossFunction = Callable[[Any, Any], Tensor]


class Forward:
    """How a network is called on a batch and its loss taken; see the module's docstring.

    Parameters
    ----------
    model : nn.Module
        Only the signature of its ``forward`` is looked at.
    loss_fn : callable
        (output, target or dict batch) → mean loss, a scalar.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        self.loss_fn = loss_fn
        # What torch.compile and DataParallel put around a network takes anything.
        while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module) and (
            "_orig_mod" in model._modules or isinstance(model, nn.DataParallel)
        ):
            model = inner
        parameters = inspect.signature(model.forward).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.names = None if takes_all else frozenset(parameters)

    def output(self, call: Callable[..., Any], inputs: Tree, targets: Tree | None) -> Any:
        """The network's output; `call` is the network."""
        if not isinstance(inputs, dict):
            return call(inputs)
        if targets is not None or self.names is None:
            return call(**inputs)
        named = {key: value for key, value in inputs.items() if key in self.names}
        if not named:
            raise DataError(
                f"no entry of the dict batch ({', '.join(inputs)}) is an argument of the network's forward "
                f"({', '.join(sorted(self.names))}); rename the entries or pass (dict, target) pairs"
            )
        return call(**named)

    def loss(self, output: Any, inputs: Tree, targets: Tree | None) -> Tensor:
        """The loss of an output."""
        return self.loss_fn(output, inputs if targets is None else targets)
