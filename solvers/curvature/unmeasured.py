"""No curvature: for rules that look at the weights alone, so that nothing needs to be measured for them."""

from __future__ import annotations

import torch

from solvers.curvature.base import Curvature
from solvers.errors import CapabilityError


class Unmeasured(Curvature):
    """No curvature at all: for rules that look at the weights alone. Everything about H is refused.

    Raises
    ------
    CapabilityError
        By every method that needs H.
    """

    rank = 0

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._device = torch.device(device)

    @property
    def measured(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _refuse(self) -> CapabilityError:
        return CapabilityError(
            "no curvature was measured for this problem; use a rule that needs none (magnitude, random), or measure one"
        )

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refuse()

    def project(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refuse()

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        raise self._refuse()

    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        raise self._refuse()

    @property
    def ridge(self) -> torch.Tensor:
        raise self._refuse()

    def with_damping(self, damping: float) -> Curvature:
        raise self._refuse()

    def select(self, index: torch.Tensor) -> Curvature:
        return Unmeasured(int(index.numel()), self._device)

    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        return ()
