"""Photographs in folders: found, labelled, and brought to one size when they are read."""

import functools
import json
import pathlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lls_jax.data.specs import DatasetSpec
from lls_jax.errors import DatasetError

_ENDINGS = (".jpg", ".jpeg", ".png")
# Names of corrupt files that a message has room for.
_SHOWN = 10
_TEST_FOLDERS = ("val", "test", "validation")


class Photographs(NamedTuple):
    """Files of one part of a data set, not read yet.

    Attributes:
        paths: image files.
        labels: int32 ``[count]``.
    """

    paths: tuple[pathlib.Path, ...]
    labels: np.ndarray


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        class_names: in label order.
        splits: ``{"train": ..., "test": ...}``.
    """

    class_names: tuple[str, ...]
    splits: dict[str, Photographs]


def find(spec: DatasetSpec, path: pathlib.Path, unpack_to: pathlib.Path) -> Found:
    """List the images of an archive, or of a folder, with their labels.

    Args:
        spec: the data set, for its layout: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``
            (``"folder"``); Tiny ImageNet's own; or COCO's images beside annotations that mark
            persons (``"coco"``).
        path: the folder, or a ``.tar``, ``.tgz`` or ``.zip`` of it.
        unpack_to: where an archive is unpacked.

    Raises:
        DatasetError: something that the layout asks for is missing.
    """
    if not path.exists():
        raise DatasetError(f"archive {path} does not exist; give the file or folder itself.")
    folder = path if path.is_dir() else _unpack(path, unpack_to)
    find_in = {"folder": _find_classes, "tiny_imagenet": _find_tiny_imagenet, "coco": _find_coco}
    found = find_in[spec.layout](_root(folder), path)
    for split, files in found.splits.items():
        if not files.paths:
            raise DatasetError(f"{path} has no {split} images ({', '.join(_ENDINGS)}).")
    if len(found.class_names) < 2:
        raise DatasetError(f"{path} has {len(found.class_names)} class; two or more are needed.")
    return found


# More files than any data set of photographs has; what has more is none.
_MOST_FILES = 20_000_000


class _Member(NamedTuple):
    """A regular file of an archive: where it goes, its bytes when unpacked, and how it is read."""

    path: pathlib.PurePosixPath
    size: int
    open: Callable[[], Any]


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    """The regular files of an archive; links, devices and the like are none."""
    if isinstance(archive, zipfile.ZipFile):
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if not entry.is_dir() and kind in (0, stat.S_IFREG):
                read = functools.partial(archive.open, entry)
                yield _Member(pathlib.PurePosixPath(entry.filename), entry.file_size, read)
        return
    for member in archive:
        if member.isreg():
            path = pathlib.PurePosixPath(member.name)
            yield _Member(path, member.size, functools.partial(archive.extractfile, member))


def _unpack(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write an archive's regular files into a new folder, and nothing outside it.

    Raises:
        DatasetError: it is damaged, larger than the room on the disk, or leads out of the folder.
    """
    folder.mkdir(parents=True)
    try:
        opened: Any = zipfile.ZipFile if zipfile.is_zipfile(path) else tarfile.open
        with opened(path) as archive:
            members = []
            size, room = 0, shutil.disk_usage(folder).free
            for member in _members(archive):
                size += member.size
                members.append(member)
                # Before anything is written: what unpacks to this much is no data set.
                if size > room or len(members) > _MOST_FILES:
                    raise DatasetError(
                        f"archive {path} unpacks to more than {size} bytes in {len(members)} "
                        f"files, and there is room for {room}; make room, or give the unpacked "
                        "folder."
                    )
                if member.path.is_absolute() or ".." in member.path.parts:
                    raise DatasetError(f"archive {path} has {member.path}, outside of its folder.")
            for member in members:
                _write_member(member, folder / member.path)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DatasetError(
            f"archive {path} cannot be unpacked ({error}); fetch it again."
        ) from error
    return folder


def _write_member(member: _Member, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _is_hidden(path: pathlib.Path) -> bool:
    """Whether an operating system or an editor has put it there: it is no image and no class."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(child for child in folder.iterdir() if not _is_hidden(child))


def _root(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the only one in it, which is how archives are packed."""
    inside = _visible(folder)
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    found = []
    for child in _visible(folder):
        if child.is_dir():
            found += _images(child)
        elif child.suffix.lower() in _ENDINGS:
            found.append(child)
    return sorted(found)


def _by_class(folder: pathlib.Path, names: tuple[str, ...]) -> Photographs:
    paths, labels = [], []
    for label, name in enumerate(names):
        files = _images(folder / name)
        paths += files
        labels += [label] * len(files)
    return Photographs(tuple(paths), np.asarray(labels, np.int32))


def _classes(folder: pathlib.Path) -> tuple[str, ...]:
    names = tuple(child.name for child in _visible(folder) if child.is_dir())
    for name in names:
        # What is no UTF-8 in a path, Python keeps as halves of pairs: no file takes them.
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DatasetError(
                f"{folder} has class {name!r}, which is no UTF-8; rename its folder."
            )
    return names


def _find_classes(folder: pathlib.Path, path: pathlib.Path) -> Found:
    test = next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), None)
    train = folder / "train"
    if not train.is_dir() or test is None:
        raise DatasetError(
            f"{path} lacks a folder `train` or `val`; expected train/CLASS/*.jpg and "
            "val/CLASS/*.jpg."
        )
    names = _classes(train)
    if unknown := sorted(set(_classes(test)) - set(names)):
        raise DatasetError(f"{test} has class {unknown[0]!r}, which {train} has not.")
    return Found(names, {"train": _by_class(train, names), "test": _by_class(test, names)})


def _find_tiny_imagenet(folder: pathlib.Path, path: pathlib.Path) -> Found:
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        # Some copies have their validation images sorted into classes already.
        return _find_classes(folder, path)
    names = _classes(folder / "train") if (folder / "train").is_dir() else ()
    labels = {name: label for label, name in enumerate(names)}
    paths, test_labels = [], []
    for line in annotations.read_text().splitlines():
        file, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if name not in labels:
            raise DatasetError(f"{annotations} names class {name!r}, which `train` has not.")
        paths.append(folder / "val" / "images" / file)
        test_labels.append(labels[name])
    test = Photographs(tuple(paths), np.asarray(test_labels, np.int32))
    return Found(names, {"train": _by_class(folder / "train", names), "test": test})


def _find_coco(folder: pathlib.Path, path: pathlib.Path) -> Found:
    """Visual Wake Words: whether a person is in an image of COCO."""
    splits = {}
    for split, name in (("train", "instances_train.json"), ("test", "instances_val.json")):
        files = sorted(file for file in folder.rglob(name) if not _is_hidden(file.parent))
        if not files:
            raise DatasetError(
                f"{path} lacks {name}; expected COCO's images and the annotations that the "
                "Visual Wake Words scripts write, instances_train.json and instances_val.json."
            )
        splits[split] = _read_coco(folder, files[0])
    return Found(("background", "person"), splits)


def _read_coco(folder: pathlib.Path, annotations: pathlib.Path) -> Photographs:
    places = {file.name: file for file in _images(folder)}
    try:
        content = json.loads(annotations.read_text())
        persons = _images_with_persons(content["annotations"])
        paths, labels = [], []
        for image in content["images"]:
            name = pathlib.PurePosixPath(image["file_name"]).name
            if name not in places:
                raise DatasetError(f"{annotations} names {name}, which {folder} does not hold.")
            paths.append(places[name])
            labels.append(int(image["id"] in persons))
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{annotations} is not what the Visual Wake Words scripts write "
            f"({type(error).__name__}: {error}); expected `images` and `annotations`."
        ) from error
    return Photographs(tuple(paths), np.asarray(labels, np.int32))


def _images_with_persons(annotations: Any) -> set[int]:
    """Identifiers of images with an annotation of category 1; a list, or lists by image."""
    groups = annotations.values() if isinstance(annotations, dict) else [annotations]
    return {one["image_id"] for group in groups for one in group if one["category_id"] == 1}


def examples(
    spec: DatasetSpec, data: Photographs, corrupt: list[pathlib.Path]
) -> Iterator[tuple[np.ndarray, int]]:
    """Each image with its label: the shorter side scaled to the set's size, the middle cut out.

    (The published recipe cuts its random windows from the whole scaled image, whose longer side
    varies; here they come from the middle square, so that all images have one shape.)

    Args:
        spec: the data set, for its image size.
        data: the files.
        corrupt: gets the files that are no images, which are left out.

    Yields:
        ``(uint8 [height, width, 3], label)``.
    """
    from PIL import Image, ImageOps

    height, width = spec.image_shape[:2]
    for path, label in zip(data.paths, data.labels):
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(_in_bytes(image), (width, height), Image.Resampling.BILINEAR)
                pixels = np.asarray(fitted)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            # What Pillow raises for files that are not what they seem.
            corrupt.append(path)
            continue
        yield pixels, int(label)


def _in_bytes(image: Any) -> Any:
    """A Pillow image in red, green and blue; of 16 bits the upper eight.

    Raises:
        ValueError: its pixels are numbers of which nobody knows the largest.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no range to be scaled from.")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts at 255: all of it white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def corrupt_message(corrupt: list[pathlib.Path]) -> str:
    """How many files are corrupt, and which."""
    shown = ", ".join(str(path) for path in corrupt[:_SHOWN])
    more = f" and {len(corrupt) - _SHOWN} more" if len(corrupt) > _SHOWN else ""
    return f"{len(corrupt)} image file(s) cannot be decoded: {shown}{more}"
