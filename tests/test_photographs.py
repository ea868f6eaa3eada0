"""Folders of photographs: found, prepared, streamed, trained on; and CIFAR-100."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import pickle
import shutil
import stat
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from seeds import random_generator

from experiments import data_sets, evaluate, prepare_data, train
from experiments.config import TrainConfig
from lls_jax.data import batches, get_spec, photographs, prepare, storage, streaming
from lls_jax.data.order import epoch_permutation
from lls_jax.data.storage import Split
from lls_jax.errors import DatasetError
from lls_jax.runs import folder as folders

SIZE = 12


def picture(path, color, size=(20, 14), kind="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(kind, size, color).save(path)


def class_folder(root, classes=("cat", "dog", "owl"), train=6, test=2):
    for split, count in (("train", train), ("val", test)):
        for label, name in enumerate(classes):
            for index in range(count):
                ending = ("jpg", "png", "JPEG")[index % 3]
                picture(root / split / name / f"{index}.{ending}", (80 * label, 10 * index, 5))
    return root


def tiny_imagenet(root):
    for name in ("n01", "n02"):
        for index in range(3):
            picture(root / "train" / name / "images" / f"{name}_{index}.JPEG", (9, 9, 9), (64, 64))
    lines = []
    for index, name in enumerate(("n02", "n01")):
        picture(root / "val" / "images" / f"val_{index}.JPEG", (7, 7, 7), (64, 64))
        lines.append(f"val_{index}.JPEG\t{name}\t0\t0\t9\t9")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def coco(root, as_lists_by_image):
    (root / "annotations").mkdir(parents=True)
    for name, ids in (("instances_train.json", (1, 2, 3)), ("instances_val.json", (4, 5))):
        images = [{"id": i, "file_name": f"COCO_{i:04d}.jpg"} for i in ids]
        for image in images:
            picture(root / "all2014" / image["file_name"], (3, 3, 3), (150, 140))
        found = [{"image_id": i, "category_id": i % 2} for i in ids]
        grouped = {str(one["image_id"]): [one] for one in found}
        content = {"images": images, "annotations": grouped if as_lists_by_image else found}
        (root / "annotations" / name).write_text(json.dumps(content))
    return root


def prepared(spec_name, archive, data_dir, **options):
    """By the command."""
    config = prepare_data.PrepareConfig(
        spec_name, str(archive), str(data_dir), progress=False, **options
    )
    assert prepare_data.prepare_data(config) == 0
    return storage.resolve(get_spec(spec_name), data_dir)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_classes_is_imported(packed, tmp_path):
    archive = class_folder(tmp_path / "pictures")
    if packed:
        with tarfile.open(tmp_path / "pictures.tgz", "w:gz") as file:
            file.add(archive, "pictures")
        archive = tmp_path / "pictures.tgz"
    spec = prepared("image_folder", archive, tmp_path / "data", image_size=SIZE)
    assert spec.class_names == ("cat", "dog", "owl")
    assert (spec.train_size, spec.test_size) == (18, 6)
    assert spec.image_shape == (SIZE, SIZE, 3)
    assert spec.input_shape == (SIZE, SIZE, 3)
    data = storage.load(spec, "train", tmp_path / "data")
    again = storage.load(spec, "train", tmp_path / "data")
    assert isinstance(again.images, np.memmap)
    np.testing.assert_array_equal(data.images, again.images)
    assert sorted(data.labels) == [0] * 6 + [1] * 6 + [2] * 6
    red = data.images[:, SIZE // 2, SIZE // 2, 0].astype(int)
    # JPEG moves a flat colour by a little.
    assert (np.abs(red - 80 * data.labels) < 12).all()
    assert len(storage.load(spec, "test", tmp_path / "data", limit=4).labels) == 4
    # No window of an image is all of it: there is none, and crops pad.
    assert spec.crop is None and get_spec("image_folder").with_side(160).crop == 128


def pack(archive, target):
    """A folder as an archive, with what must not come out of one, and what systems leave in it."""
    litter = (
        *("__MACOSX/pictures/train/cat/._0.jpg", "pictures/.DS_Store"),
        *("pictures/train/.ipynb_checkpoints/0.jpg", "pictures/train/cat/._0.jpg"),
    )
    for name in litter:
        picture(archive.parent / name, (1, 1, 1)) if name.endswith("g") else None
    (archive / ".DS_Store").write_bytes(b"x")
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as file:
            for path in archive.parent.rglob("*"):
                file.write(path, path.relative_to(archive.parent))
            link = zipfile.ZipInfo("pictures/train/cat/link.jpg")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(link, "/etc/passwd")
        return target
    with tarfile.open(target, "w:gz") as file:
        for path in sorted(archive.parent.iterdir()):
            if path != target:
                file.add(path, path.name)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"pictures/train/cat/special-{kind.decode()}.jpg")
            member.type, member.linkname = kind, "../../../../etc/passwd"
            file.addfile(member)
    return target


def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path):
    archive = class_folder(tmp_path / "pictures")
    scan = archive / "train" / "owl" / "1.png"
    Image.fromarray(np.full((14, 20), 0x40FF, np.uint16)).save(scan)
    with Image.open(scan) as image:
        assert image.mode == "I;16"
    spec = prepared("image_folder", archive, tmp_path / "data", image_size=SIZE)
    data = storage.load(spec, "train", tmp_path / "data")
    assert [(image == 0x40).all() for image in data.images].count(True) == 1


@pytest.mark.parametrize("ending", [".tgz", ".zip"])
def test_only_images_come_out_of_an_archive(ending, tmp_path):
    archive = class_folder(tmp_path / "pack" / "pictures")
    packed = pack(archive, tmp_path / f"pictures{ending}")
    unpacked = photographs._unpack(packed, tmp_path / "unpacked")
    assert all(path.is_dir() or path.is_file() for path in unpacked.rglob("*"))
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    assert not list(unpacked.rglob("special*")) and not list(unpacked.rglob("link*"))
    spec = prepared("image_folder", packed, tmp_path / "data", image_size=SIZE)
    assert spec.class_names == ("cat", "dog", "owl")
    assert (spec.train_size, spec.test_size) == (18, 6)
    # And out of the folder as it lies there.
    spec = prepared("image_folder", archive, tmp_path / "data", image_size=SIZE)
    assert (spec.class_names, spec.train_size) == (("cat", "dog", "owl"), 18)


@pytest.mark.parametrize("ending", [".tgz", ".zip"])
def test_an_archive_is_bounded_before_anything_is_written(ending, tmp_path, monkeypatch):
    archive = class_folder(tmp_path / "pictures")
    packed = pack(archive, tmp_path / f"pictures{ending}")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3000))
        with pytest.raises(DatasetError, match=r"unpacks to more .* room for 3000"):
            photographs._unpack(packed, tmp_path / "unpacked")
        assert not list((tmp_path / "unpacked").iterdir())
    for name in ("../outside.jpg", "/outside.jpg"):
        if ending == ".zip":
            with zipfile.ZipFile(packed, "w") as file:
                file.writestr(name, b"x")
        else:
            with tarfile.open(packed, "w:gz") as file:
                file.addfile(tarfile.TarInfo(name), io.BytesIO())
        shutil.rmtree(tmp_path / "unpacked")
        with pytest.raises(DatasetError, match="outside of its folder"):
            photographs._unpack(packed, tmp_path / "unpacked")


def test_a_data_folder_may_be_read_only(tmp_path, monkeypatch, capsys):
    """Decoded images are kept in the user's own cache, and found there again."""
    spec = prepared(
        "image_folder", class_folder(tmp_path / "pictures"), tmp_path / "data", image_size=SIZE
    )
    expected = storage.load(spec, "train", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "lls_jax_decoded")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mkdir = pathlib.Path.mkdir

    def read_only(path, *arguments, **options):
        if (tmp_path / "data") in path.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
    first = storage.load(spec, "train", tmp_path / "data")
    assert "decoded images are kept in" in capsys.readouterr().err
    monkeypatch.setattr(storage, "_records", None)
    again = storage.load(spec, "train", tmp_path / "data")
    for data in (first, again):
        assert isinstance(data.images, np.memmap)
        np.testing.assert_array_equal(data.images, expected.images)
        np.testing.assert_array_equal(data.labels, expected.labels)
    assert not (tmp_path / "data" / "lls_jax_decoded").exists()
    # Beside the two files nothing is left of the making.
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 2


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_decodes(monkeypatch, first):
    events = []
    monkeypatch.setattr(data_sets.processes, "is_first", lambda: first)
    monkeypatch.setattr(data_sets.processes, "wait_for_all", lambda name: events.append("all wait"))
    monkeypatch.setattr(data_sets, "load_split", lambda config, opened, split: events.append(split))
    data_sets.load_splits(TrainConfig(), None)
    loads = [["train", "all wait"], ["test", "all wait"]]
    assert events == [event for pair in loads for event in (pair if first else pair[::-1])]


@pytest.mark.parametrize("grouped", [False, True])
def test_visual_wake_words_marks_persons(grouped, tmp_path):
    spec = prepared("visual_wake_words", coco(tmp_path / "coco", grouped), tmp_path / "data")
    assert spec.class_names == ("background", "person")
    assert spec.input_shape == (128, 128, 3)
    assert sorted(storage.load(spec, "train", tmp_path / "data").labels) == [0, 1, 1]
    assert sorted(storage.load(spec, "test", tmp_path / "data").labels) == [0, 1]


def test_tiny_imagenet_takes_labels_from_its_list(tmp_path):
    spec = prepared("tiny_imagenet", tiny_imagenet(tmp_path / "tiny"), tmp_path / "data")
    assert spec.class_names == ("n01", "n02")
    assert (spec.train_size, spec.test_size) == (6, 2)
    assert spec.input_shape == (64, 64, 3)


@pytest.mark.parametrize("write", [b"", b"not an image", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_corrupt_files_are_named_counted_and_stop_it_unless_skipped(write, tmp_path, capsys):
    archive = class_folder(tmp_path / "pictures")
    bad = [archive / "train/cat/x.jpg", archive / "val/owl/y.png"]
    for path in bad:
        path.write_bytes(write)
    with pytest.raises(DatasetError, match=r"2 image file\(s\).*--skip-corrupt") as caught:
        prepared("image_folder", archive, tmp_path / "data", image_size=SIZE)
    for path in bad:
        assert str(path) in str(caught.value)
    assert not (tmp_path / "data" / "image_folder").exists()
    spec = prepared("image_folder", archive, tmp_path / "data", image_size=SIZE, skip_corrupt=True)
    assert (spec.train_size, spec.test_size) == (18, 6)
    assert "left out: 2 image file(s)" in capsys.readouterr().err
    # Where nothing else is left of a part, tfds has nothing to write.
    for path in archive.glob("val/*/*"):
        path.write_bytes(write)
    with pytest.raises(DatasetError, match=r"8 image file\(s\).*, all of a part; nothing was kept"):
        prepared("image_folder", archive, tmp_path / "data", image_size=SIZE, skip_corrupt=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val").rename(root / "elsewhere"), "lacks a folder `train` or `val`"),
        (lambda root: picture(root / "val/cow/1.jpg", (1, 1, 1)), "has class 'cow'"),
        (lambda root: [f.unlink() for f in root.glob("val/*/*")], "has no test images"),
        (
            lambda root: picture(root / os.fsdecode(b"train/caf\xe9/1.jpg"), (1, 1, 1)),
            r"has class 'caf\\udce9', which is no UTF-8",
        ),
    ],
)
def test_wrong_folders_are_reported(spoil, message, tmp_path):
    archive = class_folder(tmp_path / "pictures")
    spoil(archive)
    with pytest.raises(DatasetError, match=message):
        prepared("image_folder", archive, tmp_path / "data", image_size=SIZE)


def test_what_is_not_prepared_or_not_packed_is_reported(tmp_path):
    with pytest.raises(DatasetError, match=r"image_folder --data-dir .*` \(--archive PATH\)"):
        storage.resolve(get_spec("image_folder"), tmp_path)
    with pytest.raises(DatasetError, match="cannot be downloaded by itself"):
        prepare.prepare(get_spec("tiny_imagenet"), tmp_path)
    (tmp_path / "broken.tgz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        prepare.prepare(get_spec("imagenette"), tmp_path / "data", tmp_path / "broken.tgz")


def test_streamed_batches_are_those_of_the_device():
    spec = dataclasses.replace(get_spec("cifar10"), image_shape=(16, 16, 3), crop=12)
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (50, 16, 16, 3), np.uint8), rng.integers(0, 10, 50).astype(np.int32)
    )
    permutation = epoch_permutation(jax.random.key(0), 0, 50)
    read = batches.make_reader(spec, "full", 8)
    for start in (0, 4):
        here = list(read(batches.to_device(split), permutation, start, jax.random.key(1), 7))
        there = list(read(split, permutation, start, jax.random.key(1), 7))
        assert len(here) == len(there) == 6 - start
        for a, b in zip(here, there):
            assert a["image"].shape == (8, 12, 12, 3)
            np.testing.assert_array_equal(a["label"], b["label"])
            np.testing.assert_array_equal(a["image"], b["image"])
    judged = [
        np.concatenate(
            [np.asarray(image) for image, _, _ in batches.evaluation_batches(spec, d, 20)]
        )
        for d in (batches.to_device(split), split)
    ]
    np.testing.assert_array_equal(judged[0], judged[1])
    middle = (split.images[:, 2:14, 2:14] / 255 - spec.mean) / spec.std
    np.testing.assert_allclose(judged[0][:50], middle, atol=1e-5)
    batch = next(streaming.stream(split, np.arange(50)[::-1], 3, 1))
    np.testing.assert_array_equal(batch["image"], split.images[[46, 45, 44]])
    np.testing.assert_array_equal(batch["label"], split.labels[[46, 45, 44]])


def test_training_on_a_folder_is_the_same_from_device_and_host(tmp_path, capsys):
    prepared(
        "image_folder", class_folder(tmp_path / "pictures"), tmp_path / "data", image_size=SIZE
    )
    accuracies = []
    for where in ("yes", "no"):
        config = TrainConfig(
            dataset="image_folder", data_dir=str(tmp_path / "data"), data_on_device=where,
            rule="lls", epochs=2, batch_size=6, eval_batch_size=4, progress=False,
            workdir=str(tmp_path / where),
        )  # fmt: skip
        assert train.train_and_evaluate(config) == 0
        records = folders.read_metrics(tmp_path / where)
        accuracies.append([(r["train_loss"], r["test_loss"], r["test_accuracy"]) for r in records])
    assert accuracies[0] == accuracies[1]
    capsys.readouterr()
    evaluate.evaluate(evaluate.EvaluateConfig(str(tmp_path / "no"), json=True))
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracies[1][-1][2]


@pytest.mark.parametrize("binary", [True, False])
def test_cifar100_takes_its_fine_labels(binary, tmp_path):
    spec = dataclasses.replace(get_spec("cifar100"), train_size=7, test_size=3)
    rng = random_generator()
    archive = tmp_path / "archive"
    archive.mkdir()
    kept = {}
    for name, count in (("train", 7), ("test", 3)):
        planes = rng.integers(0, 256, (count, 3 * 32 * 32), np.uint8)
        fine = rng.integers(0, 100, count).astype(np.uint8)
        coarse = rng.integers(0, 20, count).astype(np.uint8)
        kept[name] = (planes.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1), fine)
        if binary:
            rows = np.hstack([coarse[:, None], fine[:, None], planes])
            (archive / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {
                b"data": planes,
                b"fine_labels": [int(x) for x in fine],
                b"coarse_labels": [int(x) for x in coarse],
            }
            (archive / name).write_bytes(pickle.dumps(content, protocol=2))
    prepare.prepare(spec, tmp_path / "data", archive, progress=False)
    for name, (images, labels) in kept.items():
        loaded = storage.load(spec, name, tmp_path / "data")
        order = [np.flatnonzero((loaded.images == image).all((1, 2, 3)))[0] for image in images]
        np.testing.assert_array_equal(loaded.labels[order], labels)
    assert len(set(spec.class_names)) == 100
