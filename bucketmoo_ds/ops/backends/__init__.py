"""Implementations of the ops, one module each, with the same names:

    DEVICES: tuple of str                   where the automatic choice tries it: types of devices, () for every one
    PRIORITY: int                           it tries the highest first
    unavailable(device) -> str              why it cannot run on this device here; "" if it can
    gram(rows, spans, cells, num_cells) -> [C, K, K]
    accumulate_gram(rows, incoming, targets, scales, fresh, spans, cells, num_cells) -> [C, K, K]
    min_norm(gram, mask, max_weight) -> [B, K], [B]
    combine(rows, weights, spans, cells, out) -> None
    resolve(rows, mask, max_weight, spans, cells, out) -> [C, K, K], [C, K], [C]

Their input is checked (`checks`), and weights lie on the rows' device. `bucketmoo_ds.ops` says what they compute. A new
backend is one file with these names: every file that has `DEVICES` is found.
"""
