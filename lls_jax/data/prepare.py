"""Writing data sets in TensorFlow Datasets' format, without TensorFlow, all or nothing."""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import io
import pathlib
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from lls_jax.data import archives, photographs, storage
from lls_jax.data.specs import DatasetSpec, Download
from lls_jax.data.storage import MAPPED_LAYOUTS, prepared_folder
from lls_jax.errors import DatasetError

_CONNECT_SECONDS = 5.0
_ASIDE = ".lls_jax_preparing-"
_LOCK = ".lock"


def prepare(
    spec: DatasetSpec,
    data_dir: pathlib.Path,
    archive: pathlib.Path | None = None,
    *,
    image_size: int | None = None,
    skip_corrupt: bool = False,
    progress: bool = True,
) -> pathlib.Path:
    """Import a data set into `data_dir`, from an archive or by downloading it.

    The set is written into a folder aside, which takes its place by a rename: another process
    sees all of it or nothing, and a set that was there before is not lost at any moment. What an
    earlier, killed attempt on this machine left aside is removed; attempts of other machines that
    share the disk are left alone.

    Args:
        spec: the data set.
        data_dir: folder of prepared sets; made where it does not exist.
        archive: the official archive; None downloads it.
        image_size: of photographs: height and width that they are brought to; None for the data
            set's own.
        skip_corrupt: whether files that are no images are left out; otherwise they stop it.
        progress: whether to show progress bars where there is a terminal.

    Returns:
        The folder of the prepared set.

    Raises:
        DatasetError: the archive is not what it should be, or cannot be had; files are corrupt.
        OSError: `data_dir` cannot be written, or the disk is full.
    """
    if spec.layout == "embedded":
        raise DatasetError(
            f"data set {spec.name!r} is embedded and needs no preparation; run "
            f"`python -m experiments.{spec.name}`."
        )
    if archive is None and not spec.downloads:
        raise DatasetError(
            f"data set {spec.name!r} cannot be downloaded by itself; fetch it and give --archive "
            "PATH, the folder or the packed file."
        )
    if image_size is not None:
        if spec.layout not in MAPPED_LAYOUTS:
            raise DatasetError(f"the images of data set {spec.name!r} have one size already.")
        spec = spec.with_side(image_size)
    data_dir.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(data_dir, spec)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=_aside_prefix(spec), dir=data_dir))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        # Held while this process lives, which tells others that it does.
        lock = stack.enter_context((aside / _LOCK).open("w"))
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        source = archive or _download(spec, data_dir, aside / "download", progress)
        if spec.layout in MAPPED_LAYOUTS:
            spec = _write_photographs(spec, aside, source, skip_corrupt, progress)
        else:
            splits = archives.read_archive(spec, source)
            parts = {name: _Part(len(s.labels), archives.examples(s)) for name, s in splits.items()}
            _write(spec, aside, parts, progress)
        target = prepared_folder(spec, data_dir)
        storage.put_in_place(prepared_folder(spec, aside), target)
        return target


def _aside_prefix(spec: DatasetSpec) -> str:
    return f"{_ASIDE}{spec.name}-{socket.gethostname()}-"


def _remove_abandoned(data_dir: pathlib.Path, spec: DatasetSpec) -> None:
    for folder in data_dir.glob(f"{glob.escape(_aside_prefix(spec))}*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as lock:
            # Fails where the one who made it still has it, or where nobody can tell.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _download(
    spec: DatasetSpec, data_dir: pathlib.Path, folder: pathlib.Path, progress: bool
) -> pathlib.Path:
    folder.mkdir()
    for file in spec.downloads:
        target = folder / file.url.rsplit("/", 1)[1]
        try:
            _fetch(file, target, progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise DatasetError(
                f"data set {spec.name!r} is not prepared and {file.url} cannot be reached "
                f"({reason}); fetch it elsewhere and run "
                f"`{spec.prepare_command(data_dir, '--archive', 'PATH')}`, or run the embedded "
                "set: `python -m experiments.digits`."
            ) from error
    only_file = len(spec.downloads) == 1
    return next(folder.iterdir()) if only_file else folder


def _fetch(file: Download, target: pathlib.Path, progress: bool) -> None:
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(file.url, timeout=_CONNECT_SECONDS) as response,
        target.open("wb") as out,
        tqdm.tqdm(
            desc=target.name,
            total=int(response.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: on a terminal only
        ) as bar,
    ):
        while chunk := response.read(2**16):
            out.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != file.sha256:
        raise DatasetError(
            f"{file.url} has SHA-256 {digest.hexdigest()}; expected {file.sha256}. The download is "
            "damaged or has been replaced: try again, or give --archive PATH."
        )


class _Part(NamedTuple):
    """What goes into one part of a data set, and how much at most."""

    size: int
    examples: Iterator[tuple[np.ndarray, int]]


def _write_photographs(
    spec: DatasetSpec,
    aside: pathlib.Path,
    source: pathlib.Path,
    skip_corrupt: bool,
    progress: bool,
) -> DatasetSpec:
    """Write what a folder of photographs holds; returns the entry with its classes."""
    found = photographs.find(spec, source, aside / "unpacked")
    spec = dataclasses.replace(spec, class_names=found.class_names)
    corrupt: list[pathlib.Path] = []
    parts = {
        name: _Part(len(files.paths), photographs.examples(spec, files, corrupt))
        for name, files in found.splits.items()
    }
    try:
        _write(spec, aside, parts, progress)
    except AssertionError as error:
        # What tfds raises where a part has no example left.
        if not corrupt:
            raise
        raise DatasetError(
            photographs.corrupt_message(corrupt)
            + ", all of a part; nothing was kept. Mend or replace them."
        ) from error
    if corrupt and not skip_corrupt:
        raise DatasetError(
            photographs.corrupt_message(corrupt)
            + "; nothing was kept. Mend or remove them, or leave them out with --skip-corrupt."
        )
    if corrupt:
        print(f"left out: {photographs.corrupt_message(corrupt)}", file=sys.stderr)
    return spec


def _write(
    spec: DatasetSpec, data_dir: pathlib.Path, parts: dict[str, _Part], progress: bool
) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    counts = dict.fromkeys(parts, 0)
    builder = _make_builder(spec, data_dir, parts, counts, progress)
    # It announces the folder aside, which is not where the set will be.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    for split, count in counts.items():
        written = builder.info.splits[split].num_examples
        if written != count or not count:
            raise DatasetError(f"{written} of {count} {split} examples were written.")


def _make_builder(
    spec: DatasetSpec,
    data_dir: pathlib.Path,
    parts: dict[str, _Part],
    counts: dict[str, int],
    progress: bool,
) -> Any:
    """A TensorFlow Datasets builder of the stock name and features.

    The stock builders need TensorFlow to read their archives; what they write, and what reads it,
    does not.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = spec.name
        VERSION = tfds.core.Version(spec.version)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=spec.image_shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(spec.class_names)),
            }
            if spec.layout in ("cifar10", "cifar100"):
                features["id"] = tfds.features.Text()
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {split: self._generate_examples(split) for split in parts}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            bar = tqdm.tqdm(
                parts[split].examples,
                desc=f"{spec.name} {split}",
                total=parts[split].size,
                unit="img",
                disable=None if progress else True,  # None: on a terminal only
            )
            for index, (pixels, label) in enumerate(bar):
                png = io.BytesIO()
                Image.fromarray(pixels.squeeze()).save(png, "png", compress_level=1)
                example = {"image": io.BytesIO(png.getvalue()), "label": label}
                counts[split] += 1
                if spec.layout in ("cifar10", "cifar100"):
                    example["id"] = f"{split}_{index:05d}"
                yield index, example

    return Builder(data_dir=str(data_dir))
