"""The parts of DeepSpeed that the adapter builds on, by version, checked at start-up.

What a release lacks, or has in another form, is looked for where it is used, so that no other file knows versions.
"""

from __future__ import annotations

import inspect

from packaging.version import Version

from bucketmoo_ds.errors import ConfigError

# The first version of the range, and the first one beyond it.
OLDEST = "0.18.4"
BEYOND = "0.20"

# The parameters of the methods that the adapter overrides, wraps or calls, in the first version that has them so; None
# where there is no such method yet.
Forms = dict[str, tuple[str, ...] | None]

SEAMS: dict[str, dict[str, Forms]] = {
    "engine": {
        "_backward_prologue": {OLDEST: ("self",)},
        "_backward_epilogue": {OLDEST: ("self",)},
        "is_gradient_accumulation_boundary": {OLDEST: ("self",)},
        "buffered_allreduce_fallback": {OLDEST: ("self", "grads", "elements_per_buffer")},
        "_take_model_step": {OLDEST: ("self", "lr_kwargs", "block_eigenvalue"), "0.19.8": ("self", "lr_kwargs")},
    },
    "ZeRO-1/2": {
        "process_gradients": {OLDEST: ("self", "param", "i")},
        "independent_gradient_partition_epilogue": {OLDEST: ("self",)},
        "_update_scale": {OLDEST: ("self", "has_overflow")},
        "step": {OLDEST: ("self", "closure")},
        # Later ones keep a group's gradient in one piece, which its optimizer takes without another copy.
        "_build_compact_grad_partition_buffer": {OLDEST: None, "0.19.8": ("self", "group_idx")},
        "clear_backward_seen_flag": {OLDEST: None, "0.18.5": ("self",)},
    },
    # A profiler's decorator hides the parameters of some.
    "ZeRO-3": {
        "reduce_independent_p_g_buckets_and_remove_grads": {OLDEST: ("self", "param")},
        "independent_gradient_partition_epilogue": {OLDEST: ("args", "kwargs")},
        "_update_scale": {OLDEST: ("self", "has_overflow")},
        "partition_grads": {OLDEST: ("args", "kwargs")},
        "step": {OLDEST: ("args", "kwargs")},
        "clear_backward_seen_flag": {OLDEST: None, "0.18.5": ("self",)},
    },
}


def expected(forms: Forms, version: str) -> tuple[str, ...] | None:
    """Returns the parameters that a version of the range gives a method, or None where it has none."""
    since = [first for first in forms if Version(first) <= Version(Version(version).base_version)]
    return forms[max(since, key=Version)]


def check_seams(version: str, engine_class: type, zero12_class: type, zero3_class: type) -> None:
    """Raises `ConfigError` where DeepSpeed's version is not in the range, or it lacks a method that the adapter builds
    on, or gives it other parameters than its version should.

    Args:
        version: DeepSpeed's own, such as "0.19.8" or "0.18.9+a1b2c3".
        engine_class, zero12_class, zero3_class: the classes that the adapter extends.
    """
    way_out = f'install "deepspeed>={OLDEST},<{BEYOND}", or use "mode": "mixed", which builds on nothing private'
    if not Version(OLDEST) <= Version(Version(version).base_version) < Version(BEYOND):
        raise ConfigError(
            f"bucket_moo works with DeepSpeed {OLDEST} and later, before {BEYOND}; {version} is installed: {way_out}"
        )
    for owner, methods in zip((engine_class, zero12_class, zero3_class), SEAMS.values(), strict=True):
        for name, forms in methods.items():
            method = getattr(owner, name, None)
            found = tuple(inspect.signature(method).parameters) if method is not None else None
            wanted = expected(forms, version)
            if found != wanted:
                raise ConfigError(
                    f"{owner.__name__}.{name} of DeepSpeed {version} has parameters {found}, expected {wanted}: "
                    f"somebody has changed it; {way_out}"
                )
