"""2:4 weights as NVIDIA's sparse tensor cores take them, by ``torch.sparse.to_sparse_semi_structured``.

Two of every four consecutive inputs of an output are zero; the device keeps the other two and two bits for each, and
multiplies in half the operations. It exists from compute capability 8.0 (Ampere) on, for float16 and bfloat16 linear
layers with sizes that its kernels take.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from solvers.errors import CapabilityError, ModelError

_LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16)
#: Rows and columns must be multiples of these.
_ROWS, _COLUMNS = 32, 64


def is_2_of_4(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive inputs of each output are not zero; (R, d), d a multiple of 4."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())


def check_device(place: torch.device) -> None:
    """Raise CapabilityError where there are no sparse tensor cores."""
    if place.type != "cuda":
        raise CapabilityError(
            f"2:4 products are made by CUDA devices of compute capability 8.0 and later, and the network is on "
            f"{place.type}, where zeros make nothing faster; move it to such a device, or use format 'packed' or 'onnx'"
        )
    capability = torch.cuda.get_device_capability(place)
    if capability < _LEAST_CAPABILITY:
        raise CapabilityError(
            f"{torch.cuda.get_device_name(place)} has compute capability {capability[0]}.{capability[1]} and no sparse "
            "tensor cores, which begin with 8.0; use format 'packed' or 'onnx'"
        )


def to_semi_structured(model: nn.Module) -> tuple[int, int, tuple[str, ...]]:
    """Turn the 2:4 weights of linear layers of a plain network into sparse ones, in place.

    Returns
    -------
    (int, int, tuple of str)
        How many there are, bytes that they save, and for each linear layer that stays dense, why.

    Raises
    ------
    CapabilityError
        Where the device has no such products.
    ModelError
        If there is no linear layer that fits.
    """
    found, saved, left = 0, 0, []
    weights = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    place = next(iter(weights.values())).weight.device if weights else torch.device("cpu")
    check_device(place)
    for name, module in weights.items():
        if why := _unfit(module.weight):
            left.append(f"{name} stays dense: {why}")
            continue
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
        found += 1
        # Half of the values stay, with two bits for each.
        saved += sparse.numel() * sparse.element_size() // 2 - sparse.numel() // 8
    if not found:
        raise ModelError(f"no linear layer can be stored as 2:4: {'; '.join(left) or 'there is none'}")
    return found, saved, tuple(left)


def _unfit(weight: Tensor) -> str:
    if weight.dtype not in _DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"{weight.shape[0]} × {weight.shape[1]} are not multiples of {_ROWS} × {_COLUMNS}"
    return "" if is_2_of_4(weight) else "more than 2 of 4 weights are kept; prune it with budget='2:4'"
