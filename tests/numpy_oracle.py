"""The local loss in float64 NumPy, written from its definition and from nothing else."""

import math

import numpy as np


def pool(activation: np.ndarray, bins: int) -> np.ndarray:
    """Latents, channel-major."""

    def edges(i, size):
        return i * size // bins, math.ceil((i + 1) * size / bins)

    a = np.asarray(activation, np.float64)
    if a.ndim == 2:
        spans = [edges(i, a.shape[1]) for i in range(bins)]
        return np.stack([a[:, lo:hi].mean(1) for lo, hi in spans], axis=1)
    batch, height, width, channels = a.shape
    latents = np.empty((batch, channels * bins * bins))
    for i in range(bins):
        for j in range(bins):
            (top, bottom), (left, right) = edges(i, height), edges(j, width)
            window = a[:, top:bottom, left:right].mean((1, 2))
            for c in range(channels):
                latents[:, c * bins * bins + i * bins + j] = window[:, c]
    return latents


def local_loss(
    activation,
    projection,
    modulation,
    labels,
    *,
    pool_size,
    temperature,
    label_smoothing,
    normalize,
):
    z = pool(activation, pool_size)
    if normalize:
        z = z / np.maximum(np.sqrt((z**2).sum(1, keepdims=True)), 1e-12)
    logits = z @ np.asarray(projection, np.float64).T
    if modulation is not None:
        m = np.asarray(modulation, np.float64)
        logits = logits * m if m.ndim == 1 else logits @ m
    logits = logits / temperature
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.full_like(log_p, label_smoothing / log_p.shape[1])
    target[np.arange(len(labels)), labels] += 1 - label_smoothing
    return -(target * log_p).sum(1)
