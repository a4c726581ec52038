"""What is compared on networks that are pruned layer by layer: the solver, the layers' shares, the loss afterwards."""

from __future__ import annotations

from dataclasses import replace

from cbs_opt import Distill
from experiments.networks.experiment import Comparison, Method

MAGNITUDE = Method("magnitude", "magnitude", "none")
WANDA = Method("Wanda (obd, rows)", "obd", "none", allocation="rows")
SWEEP = Method("SparseGPT (sweep + own)", "sweep", "own")
ADMM = Method("ALPS (admm + combinatorial)", "admm", "combinatorial")
#: Equal, by one threshold, by measured curves, or half way between two of these, by what is held out.
CHOSEN = "uniform,surgeon,measured"


def comparisons(distill: Distill, allocation: str = CHOSEN) -> tuple[Comparison, ...]:
    """The three tables; shares are chosen among those of `allocation`."""
    pairs = [(m, replace(m, label=f"{m.solver}, shares chosen", allocation=allocation)) for m in (SWEEP, ADMM)]
    chosen = [method for pair in pairs for method in pair]
    distilled = [(m, replace(m, label=f"{m.label}, distilled", distill=distill)) for m in chosen]
    return (
        Comparison("The solver: equal shares of all layers", (MAGNITUDE, WANDA, SWEEP, ADMM)),
        Comparison("The shares of the layers: equal, or chosen on held-out calibration data", tuple(chosen)),
        Comparison(
            "The loss: kept weights moved towards the dense outputs, on the calibration data",
            tuple(method for pair in distilled for method in pair),
        ),
    )
