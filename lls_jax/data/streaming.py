"""Batches of a data set that stays on the host: read ahead by Grain, augmented on the device."""

from collections.abc import Iterator

import numpy as np

from lls_jax.data.storage import Split

_THREADS = 4
_READ_AHEAD = 8


class _Batches:
    """Grain's view of an epoch: item `i` is batch `i`, gathered."""

    def __init__(self, split: Split, permutation: np.ndarray, batch_size: int) -> None:
        self._split = split
        self._permutation = permutation
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._permutation) // self._batch_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        chosen = self._permutation[index * self._batch_size : (index + 1) * self._batch_size]
        mirrored = chosen < 0
        chosen = np.where(mirrored, ~chosen, chosen)
        # In the file's order: images of a mapped file are then read from front to back.
        order = np.argsort(chosen)
        images = np.empty((len(chosen), *self._split.images.shape[1:]), self._split.images.dtype)
        images[order] = self._split.images[chosen[order]]
        if mirrored.any():
            images[mirrored] = images[mirrored][:, :, ::-1]
        return {"image": images, "label": self._split.labels[chosen]}


def stream(
    split: Split, permutation: np.ndarray, batch_size: int, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """An epoch's batches in the order of a permutation, read ahead in threads.

    Args:
        split: images and labels on the host; the images may be a mapped file.
        permutation: the epoch's order; ``~i``, a negative number, is example `i` mirrored.
        batch_size: examples a batch; the last partial batch is dropped.
        start: first batch, from 0.

    Yields:
        ``image``, ``[batch, ...]`` in the split's dtype, and ``label``, int32 ``[batch]``.
    """
    import grain

    batches = grain.MapDataset.source(_Batches(split, permutation, batch_size))[start:]
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READ_AHEAD)
    yield from batches.to_iter_dataset(options)
