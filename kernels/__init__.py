"""Triton kernels of the ops, installed as `bucketmoo_ds.kernels` (see setup.py for why not as `kernels`)."""
