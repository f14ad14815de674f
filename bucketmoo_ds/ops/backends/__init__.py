"""Implementations of the ops, one module each, with the same names:

    DEVICES: tuple of str                   where the automatic choice tries it: types of devices, () for every one
    PRIORITY: int                           it tries the highest first
    unavailable(device) -> str              why it cannot run on this device here; "" if it can
    gram(rows, spans, blocks, num_blocks) -> [B, K, K]
    accumulate_gram(rows, incoming, languages, scales, fresh, spans, blocks, num_blocks) -> [B, K, K]
    solve(gram, mask, max_weight) -> [B, K], [B]
    combine(rows, weights, spans, blocks, out) -> None
    resolve(rows, mask, max_weight, spans, blocks, out) -> [B, K, K], [B, K], [B]

Their input is checked (`checks`), and weights lie on the rows' device. `bucketmoo_ds.ops` says what they compute. A new
backend is one file with these names: every file that has `DEVICES` is found.
"""
