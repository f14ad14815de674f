"""The DeepSpeed adapter, for ZeRO-0 to ZeRO-3: switched on by the JSON's `bucket_moo` section once this is imported."""

from bucketmoo_ds.adapters.deepspeed.attach import attach, initialize, install, read_section

__all__ = ["attach", "initialize", "install", "read_section"]

install()
