"""The command `vsod`: flags, progress bars and what is printed live here and nowhere else."""

from .app import app, main

__all__ = ["app", "main"]
