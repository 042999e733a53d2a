"""This library against its peers, and other dtypes against float32, side by side in one run.

    python -m experiments.peers              all parts, about 25 minutes (needs 8 GB of memory)
    python -m experiments.peers dit products

Every row is a ratio of programs that take turns, best time of each. Models have the shapes of real
ones and random weights. Peers are diffusers, transformers and torch (the `torch` extra); where they
are missing, the rows that need none are measured. On a GPU both run there; attention
is compared with torch's by `experiments.kernels.gpu` instead.
"""
