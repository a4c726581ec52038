"""A network, its data and its loss from names: ``package.module:attribute``, those of the current folder included."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from solvers.errors import CBSError, DataError, ModelError, OptionError, UnknownNameError

#: Losses of (output, target) that are known by name.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "nll_loss": F.nll_loss,
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "poisson_nll_loss": F.poisson_nll_loss,
}
#: The name of the loss that a network gives itself.
OWN_LOSS = "output.loss"


def network(name: str) -> nn.Module:
    """The network that ``package.module:factory`` names or returns, in eval mode; raises ModelError, OptionError."""
    found = _made("--model", name, ModelError, keep=(nn.Module,))
    if not isinstance(found, nn.Module):
        raise ModelError(f"--model {name} gives a {type(found).__name__}; it must be or return a torch.nn.Module")
    return found.eval()


def data(name: str) -> Any:
    """What ``package.module:loader`` names or returns; raises DataError, OptionError."""
    return _made("--data", name, DataError, keep=(Dataset, DataLoader, Mapping, Sequence, Tensor))


def loss(name: str) -> Callable[..., Tensor]:
    """A loss by its name in torch.nn.functional, ``output.loss``, or ``package.module:function``."""
    if name in LOSSES:
        return LOSSES[name]
    if name == OWN_LOSS:
        return own_loss
    if ":" not in name:
        raise UnknownNameError.of("loss", name, (*LOSSES, OWN_LOSS), "Or one of your own: package.module:function.")
    found = _named("--loss", name)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise OptionError(f"--loss {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise OptionError(f"--loss {name} is a {type(found).__name__} and no function of (output, target)")
    return found  # type: ignore[no-any-return]


def own_loss(output: Any, batch: Any) -> Tensor:
    """The loss that networks of transformers put beside their logits where the batch has labels."""
    value = getattr(output, "loss", None)
    if not isinstance(value, Tensor):
        raise DataError("the network's output has no loss; give batches with labels, or --loss package.module:function")
    return value


def _made(flag: str, name: str, kind: type[CBSError], keep: tuple[type, ...]) -> Any:
    found = _named(flag, name)
    if isinstance(found, keep) or not callable(found):
        return found
    try:
        return found()
    except CBSError:
        raise
    except Exception as error:
        raise kind(f"{flag} {name} raised {type(error).__name__}: {error}") from error


def _named(flag: str, name: str) -> Any:
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise OptionError(f"{flag} takes package.module:attribute, not {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptionError(
            f"{flag} {name}: {error}; modules are looked for in {here} and among those installed"
        ) from error
    except CBSError:
        raise
    except Exception as error:
        raise OptionError(f"{flag} {name}: importing {module_name} raised {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise UnknownNameError.of(f"attribute of {module_name} for {flag}", part, public)
        found = getattr(found, part)
    return found
