"""Writing data sets in TensorFlow Datasets' format, without TensorFlow, all or nothing."""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import tqdm

from lls_jax.data import archives
from lls_jax.data.specs import DatasetSpec, Download
from lls_jax.data.storage import DatasetError, Split, prepared_folder

_CONNECT_SECONDS = 5.0
_ASIDE = ".lls_jax_preparing-"


def prepare(
    spec: DatasetSpec,
    data_dir: pathlib.Path,
    archive: pathlib.Path | None = None,
    *,
    progress: bool = True,
) -> pathlib.Path:
    """Import a data set into `data_dir`, from an archive or by downloading it.

    The set is written into a folder aside, which takes its place by one rename: another process
    sees all of it or nothing. What an earlier, killed attempt left aside is removed.

    Args:
        spec: the data set.
        data_dir: folder of prepared sets; made where it does not exist.
        archive: the official archive; None downloads it.
        progress: whether to show progress bars where there is a terminal.

    Returns:
        The folder of the prepared set.

    Raises:
        DatasetError: the archive is not what it should be, or cannot be had.
        OSError: `data_dir` cannot be written, or the disk is full.
    """
    if spec.layout == "embedded":
        archives.read_archive(spec, data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(data_dir, spec)
    aside = pathlib.Path(
        tempfile.mkdtemp(prefix=f"{_ASIDE}{spec.name}-{os.getpid()}-", dir=data_dir)
    )
    try:
        source = archive or _download(spec, aside / "download", progress)
        splits = archives.read_archive(spec, source)
        _write(spec, aside, splits, progress)
        target = prepared_folder(spec, data_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            os.replace(target, aside / "replaced")
        os.replace(prepared_folder(spec, aside), target)
        return target
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(data_dir: pathlib.Path, spec: DatasetSpec) -> None:
    for folder in data_dir.glob(f"{_ASIDE}{spec.name}-*"):
        process = folder.name.removeprefix(f"{_ASIDE}{spec.name}-").split("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _download(spec: DatasetSpec, folder: pathlib.Path, progress: bool) -> pathlib.Path:
    folder.mkdir()
    for file in spec.downloads:
        _fetch(file, folder / file.url.rsplit("/", 1)[1], spec, progress)
    only_file = len(spec.downloads) == 1
    return next(folder.iterdir()) if only_file else folder


def _fetch(file: Download, target: pathlib.Path, spec: DatasetSpec, progress: bool) -> None:
    digest = hashlib.sha256()
    try:
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
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DatasetError(
            f"data set {spec.name!r} is not prepared and {file.url} cannot be reached ({reason}); "
            f"fetch it elsewhere and run `python -m experiments.prepare_data {spec.name} "
            "--archive PATH`, or run the embedded set: `python -m experiments.digits`."
        ) from error
    if digest.hexdigest() != file.sha256:
        raise DatasetError(
            f"{file.url} has SHA-256 {digest.hexdigest()}; expected {file.sha256}. The download is "
            "damaged or has been replaced: try again, or give --archive PATH."
        )


def _write(
    spec: DatasetSpec, data_dir: pathlib.Path, splits: dict[str, Split], progress: bool
) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = _make_builder(spec, data_dir, splits, progress)
    # It announces the folder aside, which is not where the set will be.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    for split, data in splits.items():
        written = builder.info.splits[split].num_examples
        if written != len(data.labels):
            raise DatasetError(f"{written} of {len(data.labels)} {split} examples were written.")


def _make_builder(
    spec: DatasetSpec, data_dir: pathlib.Path, splits: dict[str, Split], progress: bool
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
            if spec.layout == "cifar10":
                features["id"] = tfds.features.Text()
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            data = splits[split]
            bar = tqdm.tqdm(
                archives.examples(data),
                desc=f"{spec.name} {split}",
                total=len(data.labels),
                unit="img",
                disable=None if progress else True,  # None: on a terminal only
            )
            for index, (pixels, label) in enumerate(bar):
                png = io.BytesIO()
                Image.fromarray(pixels.squeeze()).save(png, "png", compress_level=1)
                example = {"image": io.BytesIO(png.getvalue()), "label": label}
                if spec.layout == "cifar10":
                    example["id"] = f"{split}_{index:05d}"
                yield index, example

    return Builder(data_dir=str(data_dir))
