"""Names and types of what the kernels are given at run time, the same in each of them.

Triton compiles a kernel anew for integers of 1 and for integers and addresses that are multiples of 16, unless it is
told not to. It is told so of all of them: what is compiled ahead of time (`bucketmoo_ds.kernels.aot`) is what runs.
"""

ARGUMENTS = {
    "addresses": "*i64",
    "count": "i32",
    "tiles": "*i64",
    "runs": "*i64",
    "partials": "*fp64",
    "first": "*i64",
    "parts": "i32",
    "cells": "i32",
    "gram": "*fp64",
    "owners": "*i64",
    "updates": "*i64",
    "mask": "*i8",
    "cap_bits": "i64",
    "weights": "*fp64",
    "finite": "*i8",
}
