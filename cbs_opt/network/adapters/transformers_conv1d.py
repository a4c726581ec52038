"""The ``Conv1D`` of the transformers package (GPT-2): a linear layer with its weight the other way round, y = Wᵀ x."""

from __future__ import annotations

from torch import nn

from cbs_opt.network.adapters.base import MatrixView, shape_of
from cbs_opt.network.adapters.linear import LinearAdapter


class TransformersConv1DAdapter(LinearAdapter):
    """Known by its name and its ``nf``, so that transformers need not be installed; the weight is (d, R)."""

    types = ()

    def matches(self, module: nn.Module) -> bool:
        """Whether it is a class of that name, or made from one, with outputs ``nf`` and a matrix."""
        named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
        return named and hasattr(module, "nf") and getattr(getattr(module, "weight", None), "ndim", 0) == 2

    def kind(self, module: nn.Module) -> str:
        """Always ``Conv1D``."""
        return "Conv1D"

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """The weight transposed."""
        shape = shape_of(module, attribute)
        return MatrixView(shape, rows=shape[1], order=(1, 0))
