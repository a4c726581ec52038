"""Accuracies from the literature, to print beside ours.

MP = magnitude, WF = WoodFisher (Singh and Alistarh, 2020), CBS = the combinatorial brain surgeon (Yu et al., ICML
2022), C = CHITA one-shot and C++ = CHITA with many stages (Benbaki et al., ICML 2023); none of them trains after
pruning. They are quoted and may be a digit off; MLPNet's MP column reproduces exactly.
"""

from __future__ import annotations

_COLUMNS = ("MP", "WF", "CBS", "C", "C++")

_ROWS: dict[str, dict[float, tuple[float, ...]]] = {
    "mlpnet-mnist": {
        0.5: (93.93, 94.02, 93.96, 93.97, 95.97),
        0.6: (93.78, 93.82, 93.96, 93.94, 95.93),
        0.7: (93.62, 93.77, 93.98, 93.80, 95.89),
        0.8: (92.89, 93.57, 93.90, 93.59, 95.80),
        0.9: (90.30, 91.69, 93.14, 92.46, 95.55),
        0.95: (83.64, 85.54, 88.92, 88.09, 94.70),
        0.98: (32.25, 38.26, 55.45, 46.25, 90.73),
    },
    "resnet20-cifar10": {
        0.3: (90.77, 91.37, 91.35, 91.37, 91.25),
        0.4: (89.98, 91.15, 91.21, 91.19, 91.20),
        0.5: (88.44, 90.23, 90.58, 90.60, 91.04),
        0.6: (85.24, 87.96, 88.88, 89.22, 90.78),
        0.7: (78.79, 81.05, 81.84, 84.12, 90.38),
        0.8: (54.01, 62.63, 51.28, 57.90, 88.72),
        0.9: (11.79, 11.49, 13.68, 15.60, 79.32),
    },
}

NAMES = {
    "MP": "magnitude",
    "WF": "WoodFisher",
    "CBS": "combinatorial brain surgeon",
    "C": "CHITA, one shot",
    "C++": "CHITA, many stages",
}


def columns(experiment: str) -> dict[str, dict[float, float]]:
    """Accuracy in percent by method and sparsity; empty where the literature has no such experiment."""
    rows = _ROWS.get(experiment, {})
    return {name: {s: row[i] for s, row in rows.items()} for i, name in enumerate(_COLUMNS)} if rows else {}
