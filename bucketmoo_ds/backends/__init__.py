"""Implementations of the ops, one module each; `bucketmoo_ds.ops` chooses among them."""
