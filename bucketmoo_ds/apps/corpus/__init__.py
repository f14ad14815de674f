"""Text, tokenizers and datasets: where multilingual text comes from and how it becomes sequences of one language.

    sources     text for the quickstart: `gnome` (Debian), `django` (PyPI), `folder` (the user's)
    load        the user's data for `bucketmoo train`
    pages       the type they share, held-out split, statistics
    tokenizer   a byte-level BPE trained on the text
    packing     sequences of one length and one language, as a `datasets.Dataset`
    evaluate    bits per byte on held-out text

Knows nothing of DeepSpeed, process groups or the engine.
"""
