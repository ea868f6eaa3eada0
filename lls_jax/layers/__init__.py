"""Layers as functions: arrays in, arrays out, no Flax."""
