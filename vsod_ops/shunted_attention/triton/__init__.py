"""Shunted attention on GPUs, in Triton.

forward    its kernels: what is computed, and how
backward   the same
tiles      what the kernels of both directions share
plan       which programs there are: order of the groups, splits of the query loop, tile sizes
launch     forward and backward of the op: scratch memory, timing of tiles, launches

docs/attention.md has the figures.
"""
