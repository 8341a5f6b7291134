"""Datasets, clips and augmentation."""
