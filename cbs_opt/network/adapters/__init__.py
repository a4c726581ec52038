"""What is known of each kind of layer, one file a kind, and the register of them."""

from __future__ import annotations

from torch import nn

from cbs_opt.network.adapters.attention import AttentionAdapter
from cbs_opt.network.adapters.base import LayerAdapter, MatrixView, Replayed, Rows, layer_name
from cbs_opt.network.adapters.convolution import ConvolutionAdapter
from cbs_opt.network.adapters.embedding import EmbeddingAdapter
from cbs_opt.network.adapters.linear import LinearAdapter
from cbs_opt.network.adapters.recurrent import RecurrentAdapter
from cbs_opt.network.adapters.transformers_conv1d import TransformersConv1DAdapter
from cbs_opt.network.adapters.transposed_convolution import TransposedConvolutionAdapter
from solvers.errors import OptionError

__all__ = ["LayerAdapter", "MatrixView", "Replayed", "Rows", "adapter_of", "layer_name", "register_layer", "registered"]

#: Asked in turn.
_ADAPTERS: list[LayerAdapter] = [
    LinearAdapter(),
    ConvolutionAdapter(),
    TransposedConvolutionAdapter(),
    TransformersConv1DAdapter(),
    AttentionAdapter(),
    RecurrentAdapter(),
    EmbeddingAdapter(),
]


def register_layer(adapter: LayerAdapter) -> None:
    """Make a kind of layer known: from now on its weights are found, measured and pruned like those of the others.

    The package's own adapters are not special; the last one that was registered is asked first, so it can replace one.

    Parameters
    ----------
    adapter : LayerAdapter
        For most kinds `view`, `input_rows` and `output_gradient_rows` are all there is to write; see
        `cbs_opt.network.adapters.linear` for the shortest, and `docs/writing_a_layer.md`.

    Raises
    ------
    OptionError
        If it is not an instance of `LayerAdapter`.
    """
    if not isinstance(adapter, LayerAdapter):
        raise OptionError(f"register_layer takes an instance of cbs_opt.LayerAdapter, not {adapter!r}")
    _ADAPTERS.insert(0, adapter)


def adapter_of(module: nn.Module) -> LayerAdapter | None:
    """The adapter that answers for a module, or None."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)


def registered() -> tuple[LayerAdapter, ...]:
    """All adapters, in the order in which they are asked."""
    return tuple(_ADAPTERS)
