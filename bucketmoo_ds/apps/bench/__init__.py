"""Measurements of the kernels on the machine at hand (`bucketmoo bench kernels`), and where a result came from.

    cases      what is measured, and how many bytes it must move
    inputs     rows, Grams and segments, and the call of an op on them
    peers      the same in plain torch, torch.compile and TorchJD
    timing     turns, percentiles, an empty cache before each call
    bandwidth  the copy that every op is compared with
    sweep      all of it, case by case
    table, plot, files  what is shown and written
"""
