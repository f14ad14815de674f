"""The DeepSpeed adapter: ZeRO-1 and ZeRO-2, switched on by the JSON's `bucket_moo` section once this is imported."""

from bucketmoo_ds.adapters.deepspeed.attach import attach, initialize, install, read_section

__all__ = ["attach", "initialize", "install", "read_section"]

install()
