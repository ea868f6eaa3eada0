"""The periodic basis: the fixed vectors, one a class, that LLS projects a block's latents onto."""

import functools

import numpy as np

from pallas_kernels.local_loss import latent_dim

WAVEFORMS = ("square", "cosine")

_LOWEST_FREQUENCY = 50
_HIGHEST_FREQUENCY = 512


def check_waveform(waveform: str) -> None:
    """Raise ValueError for a waveform that is none."""
    if waveform not in WAVEFORMS:
        raise ValueError(f"unknown waveform {waveform!r}; expected one of {', '.join(WAVEFORMS)}.")


def check_latents(activation_shape: tuple[int, ...], pool_size: int) -> None:
    """Raise ValueError for a block with one latent, at which every periodic vector is 0."""
    if latent_dim(activation_shape, pool_size) == 1:
        raise ValueError(
            f"a block of shape {tuple(activation_shape)} with `pool_size` {pool_size} has one "
            "latent, and there sin(0) is all of the periodic basis: nothing would be learned; "
            "give it a larger `pool_size`."
        )


def _frequencies(rows: int) -> np.ndarray:
    """Evenly spaced frequencies, float32 ``[rows]``, with the rounding of PyTorch's `linspace`.

    That `linspace` counts from the lower end in its first half and from the upper end in its
    second, with one rounding a multiply-add. float64 holds each of them exactly, so that rounding
    is the conversion to float32.
    """
    if rows == 1:
        return np.array([_LOWEST_FREQUENCY], np.float32)
    step = np.float64(np.float32((_HIGHEST_FREQUENCY - _LOWEST_FREQUENCY) / (rows - 1)))
    row = np.arange(rows)
    rising = _LOWEST_FREQUENCY + step * row
    falling = _HIGHEST_FREQUENCY - step * (rows - 1 - row)
    return np.where(row < rows // 2, rising, falling).astype(np.float32)


@functools.lru_cache(maxsize=256)
def periodic_basis(rows: int, dim: int, waveform: str = "square") -> np.ndarray:
    """The fixed projection of LLS: one periodic vector a row.

    ``W[r, d] = sin(f[r] d)`` with `rows` frequencies ``f`` evenly spaced from 50 to 512, phases
    rounded to float32; ``"square"`` is its sign.

    Args:
        rows: number of vectors: the classes, or fewer for a reduced basis.
        dim: number of latents.
        waveform: ``"square"`` or ``"cosine"``. (The latter is the sine above: the name is the
            authors'.)

    Returns:
        float32 ``[rows, dim]``, read-only: a constant, never trained, never saved.

    Raises:
        ValueError: `rows` or `dim` is below 1, or the waveform is unknown.

    References:
        Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 3.2.

    >>> periodic_basis(2, 3)
    array([[ 0., -1., -1.],
           [ 0.,  1., -1.]], dtype=float32)
    """
    if rows < 1 or dim < 1:
        raise ValueError(f"A basis of {rows} rows by {dim} latents; both must be at least 1.")
    check_waveform(waveform)
    phase = _frequencies(rows)[:, None] * np.arange(dim, dtype=np.float32)
    basis = np.sin(phase.astype(np.float64)).astype(np.float32)
    if waveform == "square":
        basis = np.sign(basis)
    basis.setflags(write=False)
    return basis
