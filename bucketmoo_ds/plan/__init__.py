"""What is fixed before the first step: buckets, blocks and segments, how shards are laid out, what settings come to.
Knows no gradients and no frameworks."""
