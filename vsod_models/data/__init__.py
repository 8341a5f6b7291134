"""Datasets, clips and augmentation."""

from __future__ import annotations

from .records import Record, Records
from .synthetic import open_synthetic

__all__ = ["Record", "Records", "open_dataset"]


def open_dataset(name, root, split, **options):
    return open_synthetic(split, **options)
