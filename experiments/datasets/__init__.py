"""Data sets: images and text from parquet files as the Hugging Face hub serves them, and embedded digits."""

from __future__ import annotations

from experiments.datasets.images import Dataset, ImageSet
from experiments.datasets.load import DATASETS, load_dataset

__all__ = ["DATASETS", "Dataset", "ImageSet", "load_dataset"]
