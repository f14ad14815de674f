"""Adapters: each knows one framework, hands buckets to the engine and writes combined shards back."""
