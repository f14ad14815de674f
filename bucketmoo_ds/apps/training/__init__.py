"""Training a language model with a DeepSpeed engine: what `bucketmoo train` and `bucketmoo quickstart` run.

It uses the package as any user does, through the DeepSpeed JSON; nothing below it knows of it.
"""
