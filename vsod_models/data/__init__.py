"""Datasets, clips and augmentation.  This file imports no torch: readers do without."""

from .readers import open_dataset
from .records import Record, Records

__all__ = ["Record", "Records", "open_dataset"]
