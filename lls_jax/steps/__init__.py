"""Training steps: what a block learns from, and in which order. The local one needs no Flax."""
