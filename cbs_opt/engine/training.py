"""The one training loop: steps on batches, a look at held-out samples now and then, the best state kept.

    for t = 0 … T − 1:  gradient over the pieces of a batch, a step (`masked_training`);  after some: the held-out loss

It ends after T steps, after some looks that found nothing better, or where values are not finite. What it holds between
two steps (`state`) is all there is to it: put back, it goes on to the same bits, given the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbs_opt.data.calibration import Batch
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.engine.masked_training import MaskedOptimiser, TrainedWeights

#: (a piece of a batch, number of the step) → sum of what is to be lowered, differentiable, and what to divide it by.
Part = Callable[[Batch, int], tuple[Tensor, float]]


def looks(steps: int, evaluations: int) -> frozenset[int]:
    """After which steps the held-out loss is taken, the last included."""
    return frozenset(-(-steps * i // evaluations) for i in range(1, evaluations + 1))


@dataclass(eq=False)
class Descent:
    """A training under way.

    Attributes
    ----------
    weights : TrainedWeights
    optimiser : MaskedOptimiser
    part : Part
    judge : callable
        The held-out loss.
    steps : int
    looks : set of int
        After which steps it is taken.
    best : float
        The held-out loss that is to be beaten; the best one found.
    patience : int, optional
        Looks in a row without a better one, after which it ends.
    values : list of Tensor, optional
        The state that had the best; None where that of the start was none the worse.
    at, done : int
        After how many steps that was; steps taken.
    broken : bool
        Whether there were values that are not finite.
    """

    weights: TrainedWeights
    optimiser: MaskedOptimiser
    part: Part
    judge: Callable[[], float]
    steps: int
    looks: frozenset[int]
    best: float
    patience: int | None = None
    values: list[Tensor] | None = None
    at: int = 0
    done: int = 0
    broken: bool = False
    waited: int = 0

    def run(self, batches: Iterator[list[Batch]], after: Callable[[Descent], None] = lambda descent: None) -> None:
        """Take the steps that are left, on batches from there on; `after` is called after each."""
        while self.done < self.steps and not self.exhausted:
            if not self._step(next(batches)):
                self.broken = True
                return
            self.done += 1
            if self.done in self.looks:
                self._look()
            after(self)

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def _look(self) -> None:
        loss = self.judge()
        self.broken = self.broken or not math.isfinite(loss)
        self.waited += 1
        if loss < self.best:
            self.best, self.values, self.at, self.waited = loss, self.weights.kept(), self.done, 0

    def _step(self, group: list[Batch]) -> bool:
        """Gradients over the pieces of a step, and the step."""
        total, finite = 0.0, True
        with self.weights.differentiable():
            for batch in group:
                part, weight = self.part(batch, self.done)
                finite = finite and bool(torch.isfinite(part))
                if finite and weight:
                    with typed_failures(*batch[:2]):
                        (part * self.optimiser.scale).backward()  # type: ignore[no-untyped-call]
                total += weight
            # A batch of padding alone says nothing.
            return finite and (total == 0.0 or self.optimiser.step(total))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) of all there is between two steps."""
        tensors, numbers = self.optimiser.state()
        found = {f"optimiser/{name}": value for name, value in tensors.items()}
        found |= {f"now/{i}": value for i, value in enumerate(self.weights.kept())}
        found |= {f"best/{i}": value for i, value in enumerate(self.values or ())}
        own = {name: getattr(self, name) for name in _NUMBERS}
        return found, {**own, "kept": self.values is not None, "optimiser": numbers}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from a state."""
        parts: dict[str, dict[str, Tensor]] = {"optimiser": {}, "now": {}, "best": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = value
        self.optimiser.restore(parts["optimiser"], numbers["optimiser"])
        now, best = parts["now"], parts["best"]
        self.weights.restore([now[str(i)] for i in range(len(now))])
        self.values = [best[str(i)] for i in range(len(best))] if numbers["kept"] else None
        for name in _NUMBERS:
            setattr(self, name, numbers[name])


#: What of a descent is no tensor.
_NUMBERS = ("best", "at", "done", "broken", "waited")
