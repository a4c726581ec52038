"""The 1,797 handwritten 8x8 digits bundled with scikit-learn: the data set which is always there."""

from __future__ import annotations

import numpy as np
import torch

from experiments.datasets.images import Dataset, ImageSet

N_TEST = 360
SPLIT_SEED = 0


def load_digits() -> Dataset:
    """1,437 training and 360 test images ``(1, 8, 8)`` with values 0 to 16; the split is fixed."""
    from sklearn.datasets import load_digits as bundled

    raw = bundled()
    images = torch.from_numpy(np.ascontiguousarray(raw.images, dtype=np.uint8))[:, None]
    labels = torch.from_numpy(np.ascontiguousarray(raw.target, dtype=np.int64))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    # Rounded mean and deviation of all pixels: constants, so that no split can change the scale.
    everything = ImageSet(images, labels, mean=(0.305,), std=(0.376,), scale=16.0)
    return Dataset(
        "digits",
        train=everything.subset(order[N_TEST:]),
        test=everything.subset(order[:N_TEST]),
        source="embedded in scikit-learn",
    )
