"""The local loss, convolutions and BatchNorm in float64 NumPy, each written from its definition."""

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


def convolve(x, kernel, stride=1):
    """``[batch, height, width, channels]`` with a kernel of 3x3, padded by one, or of 1x1."""
    edge = kernel.shape[0] // 2
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    height, width = ((side - 1) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            out += padded[:, rows, columns] @ kernel[i, j]
    return out


def normalize(x, p):
    """BatchNorm of the last axis with a batch's own statistics; `p` has ``scale`` and ``bias``."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * p["scale"] + p["bias"]
