"""Where decoded images are kept, and how long."""

import contextlib
import glob
import hashlib
import os
import pathlib


def own_cache(cache: pathlib.Path) -> pathlib.Path:
    """Where the user keeps what cannot be kept beside the sets.

    Args:
        cache: where it would be kept there.
    """
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    place = hashlib.sha256(str(cache.parent.absolute()).encode()).hexdigest()[:16]
    return home / "lls_jax" / "decoded" / place / cache.name


def remove_stale(cache: pathlib.Path) -> None:
    """Remove what was decoded of the same part of a set before that was prepared again.

    Args:
        cache: what is decoded now, of whatever ending; its name ends in the set's stamp,
            ``-number-number``.
    """
    part = cache.stem.rsplit("-", 2)[0]
    for path in cache.parent.glob(f"{glob.escape(part)}-*"):
        if not path.name.startswith(f"{cache.stem}."):
            # It may be somebody else's.
            with contextlib.suppress(OSError):
                path.unlink()
