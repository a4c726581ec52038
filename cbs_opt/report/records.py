"""The record that each step of a plan leaves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from solvers import Solution


@dataclass(frozen=True)
class DistillRecord:
    """What a distillation did; see `cbs_opt.engine.distill`.

    Attributes
    ----------
    loss : str
        The divergence that was lowered.
    parameters : str
    steps : int
        Of each try.
    steps_kept : int
        After how many of them the weights were best; 0 where nothing was gained and they are as before.
    lr : float
        Length of the first step of the try that was kept; nan without one.
    loss_before, loss_after : float
        Mean divergence on the held-out share.
    n_samples, n_held_out : int
        Samples that steps were taken on, and those that judged them.
    evaluations : int
        How often the held-out divergence was taken.
    seconds : float
    notes : tuple of str
    """

    loss: str
    parameters: str
    steps: int
    steps_kept: int
    lr: float
    loss_before: float
    loss_after: float
    n_samples: int
    n_held_out: int
    evaluations: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FineTuneRecord:
    """What a fine-tuning did; see `cbs_opt.engine.tuning`.

    Attributes
    ----------
    optimizer : str
    lr : float
        Longest step; nan where the optimiser has its own.
    steps, steps_taken, steps_kept : int
        Planned; taken, which may be fewer; and those after which the state was best and is kept, of all parts.
    epochs : float
        Passes over the samples that the steps taken are.
    parts : int
        1, or one for each stage.
    loss_before, loss_after : float
        Mean loss on the held-out samples before the first step and in the state kept; in stages before the first
        training, at the sparsity of the first stage.
    n_samples, n_held_out : int
        Samples that steps were taken on, and those that judged them.
    evaluations : int
        How often the held-out loss was taken.
    seconds : float
    notes : tuple of str
    """

    optimizer: str
    lr: float
    steps: int
    steps_taken: int
    steps_kept: int
    epochs: float
    parts: int
    loss_before: float
    loss_after: float
    n_samples: int
    n_held_out: int
    evaluations: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageRecord:
    """What a step of a plan did; nan, or nothing, where a figure does not exist.

    Attributes
    ----------
    stage : int
        From 1.
    kind : {"prune", "polish", "train"}
    n_kept : int
    sparsity : float
        After the stage.
    loss_gradients : float
        Mean loss of the batches the gradients were taken over, before the step.
    loss_before, loss_masked, loss_after : float
        Loss before the step, with the mask and no update, and after it: in stages on held-out training data, in one
        shot the calibration loss.
    damping : float
        λ of the update.
    step : float
        Length of the update; 0 where no step lowered the loss and the weights were left alone.
    momentum : float
        Share of the last step in it.
    evaluations : int
        Losses taken by the searches.
    first_order : bool
        Whether the choice saw the gradient.
    method : str
        How gradients were taken.
    n_regrown : int
        Removed weights that came back.
    n_images : int
        Samples whose gradients were taken.
    solver : str
        Empty where nothing was to be chosen.
    objective, refit_objective, bound, gap : float
    status, reason : str
        Of the solver's mask, as in `solvers.Solution`.
    seconds_gradients, seconds_solve, seconds_update, seconds_batch_norm, seconds_train : float
    steps, steps_taken, steps_kept : int
        Of a training, as in `FineTuneRecord`.
    repairs : tuple of str
    """

    stage: int
    kind: str
    n_kept: int
    sparsity: float
    loss_gradients: float
    loss_before: float
    loss_masked: float
    loss_after: float
    damping: float
    step: float
    evaluations: int
    n_regrown: int
    n_images: int
    solver: str
    objective: float
    seconds_gradients: float
    seconds_solve: float
    seconds_update: float
    seconds_batch_norm: float
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    momentum: float = 0.0
    first_order: bool = False
    refit_objective: float = math.nan
    bound: float = -math.inf
    gap: float = math.inf
    status: str = ""
    reason: str = ""
    method: str = ""
    seconds_train: float = 0.0
    steps: int = 0
    steps_taken: int = 0
    steps_kept: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def of(solution: Solution | None) -> dict[str, Any]:
        """The fields that a solution fills, if a solver was asked."""
        if solution is None:
            return {"solver": "", "objective": math.nan}
        names = ("solver", "objective", "refit_objective", "bound", "gap")
        figures = {name: getattr(solution, name) for name in names}
        return {**figures, "status": solution.status.value, "reason": solution.reason.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StageRecord:
        """The inverse of `as_dict`; entries that are not known are left out."""
        known = {entry.name for entry in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        for name in ("repairs", "warnings"):
            chosen[name] = tuple(chosen.get(name, ()))
        return cls(**chosen)

    def as_json(self) -> dict[str, Any]:
        """JSON has no nan and no infinity: they become text."""
        values = self.as_dict()
        return {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StageRecord:
        """The inverse of `as_json`."""
        return cls.from_dict({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in values.items()})
