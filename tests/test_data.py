"""Archives, preparation, loading, and batches made on the device."""

import dataclasses
import fcntl
import gzip
import io
import os
import pathlib
import pickle
import socket
import tarfile
import tracemalloc
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import random_generator

from lls_jax.data import archives, augment, batches, get_spec, prepare, storage
from lls_jax.data.order import epoch_permutation
from lls_jax.data.storage import Split
from lls_jax.errors import DatasetError

CIFAR = dataclasses.replace(get_spec("cifar10"), train_size=50, test_size=10)
MNIST = dataclasses.replace(get_spec("mnist"), train_size=12, test_size=7)


def random_splits(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {
        split: Split(
            rng.integers(0, 256, (size, *spec.image_shape), np.uint8),
            rng.integers(0, 10, size).astype(np.int32),
        )
        for split, size in (("train", spec.train_size), ("test", spec.test_size))
    }


def cifar_parts(splits):
    train = [Split(*(a[i * 10 : (i + 1) * 10] for a in splits["train"])) for i in range(5)]
    names = [f"data_batch_{i}" for i in range(1, 6)]
    return {**dict(zip(names, train)), "test_batch": splits["test"]}


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar_binary(folder, splits):
    folder.mkdir(parents=True)
    for name, part in cifar_parts(splits).items():
        labels = part.labels.astype(np.uint8)[:, None]
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, planes(part.images)]).tobytes())


def write_cifar_python(folder, splits, protocol=2):
    folder.mkdir(parents=True)
    for name, part in cifar_parts(splits).items():
        batch = {
            b"data": np.ascontiguousarray(planes(part.images)),
            b"labels": part.labels.tolist(),
            b"batch_label": b"of 5",
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))


def write_idx(folder, splits, compress):
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, axes, array in (
            ("images-idx3", 3, splits[split].images[..., 0]),
            ("labels-idx1", 1, splits[split].labels.astype(np.uint8)),
        ):
            header = bytes((0, 0, 8, axes)) + np.array(array.shape, ">u4").tobytes()
            content = header + array.tobytes()
            name = f"{prefix}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def pack(folder, target):
    with tarfile.open(target, "w:gz") as archive:
        archive.add(folder, folder.name)
    return target


def assert_equal(ours, expected):
    for split, data in expected.items():
        for a, b in zip(ours[split], data):
            np.testing.assert_array_equal(a, b)


def assert_same_examples(ours, expected):
    """Equal but for the order, which TensorFlow Datasets shuffles when it writes."""
    for split, data in expected.items():
        both = []
        for images, labels in (ours[split], data):
            both.append(sorted((i.tobytes(), int(label)) for i, label in zip(images, labels)))
        assert both[0] == both[1]


@pytest.mark.parametrize("write", [write_cifar_binary, write_cifar_python])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_archives(tmp_path, write, packed):
    splits = random_splits(CIFAR)
    folder = tmp_path / "cifar-10-batches"
    write(folder, splits)
    path = pack(folder, tmp_path / "archive.tar.gz") if packed else folder
    assert_equal(archives.read_archive(CIFAR, path), splits)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path, compress):
    splits = random_splits(MNIST)
    write_idx(tmp_path / "idx", splits, compress)
    assert_equal(archives.read_archive(MNIST, tmp_path / "idx"), splits)


def no_archive(tmp_path):
    return CIFAR, tmp_path / "nothing"


def truncated_tar(tmp_path):
    write_cifar_binary(tmp_path / "c", random_splits(CIFAR))
    path = pack(tmp_path / "c", tmp_path / "c.tar.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return CIFAR, path


def not_a_tar(tmp_path):
    (tmp_path / "c.tar.gz").write_text("<html>404</html>")
    return CIFAR, tmp_path / "c.tar.gz"


def short_batch(tmp_path):
    write_cifar_binary(tmp_path / "c", random_splits(CIFAR))
    path = tmp_path / "c" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return CIFAR, tmp_path / "c"


def missing_batch(tmp_path):
    write_cifar_binary(tmp_path / "c", random_splits(CIFAR))
    (tmp_path / "c" / "data_batch_3.bin").unlink()
    return CIFAR, tmp_path / "c"


def wrong_label(tmp_path):
    splits = random_splits(CIFAR)
    splits["test"].labels[4] = 11
    write_cifar_binary(tmp_path / "c", splits)
    return CIFAR, tmp_path / "c"


def wrong_pickle_label(tmp_path):
    splits = random_splits(CIFAR)
    splits["test"].labels[4] = -3
    write_cifar_python(tmp_path / "c", splits)
    return CIFAR, tmp_path / "c"


def wrong_header(tmp_path):
    write_idx(tmp_path / "i", random_splits(MNIST), False)
    path = tmp_path / "i" / "train-labels-idx1-ubyte"
    path.write_bytes(b"\x00\x00\x0d\x01" + path.read_bytes()[4:])
    return MNIST, tmp_path / "i"


def truncated_gzip(tmp_path):
    write_idx(tmp_path / "i", random_splits(MNIST), True)
    path = tmp_path / "i" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return MNIST, tmp_path / "i"


def wrong_count(tmp_path):
    write_idx(tmp_path / "i", random_splits(MNIST), True)
    return dataclasses.replace(MNIST, train_size=13), tmp_path / "i"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_archive, "nothing does not exist"),
        (truncated_tar, "truncated or not a gzipped archive"),
        (not_a_tar, "truncated or not a gzipped archive"),
        (short_batch, "data_batch_3 has 30729 bytes; expected 30730, 10 records of 3073"),
        (missing_batch, "lacks data_batch_3"),
        (wrong_label, "test example 4 has label 11; labels must lie between 0 and 9"),
        (wrong_pickle_label, "test example 4 has label -"),
        (wrong_header, r"starts with b'\\x00\\x00\\r\\x01'; expected"),
        (truncated_gzip, "truncated or not a gzipped archive"),
        (wrong_count, "train holds 12 images and 12 labels; expected 13"),
    ],
)
def test_damaged_archives_are_refused_with_the_reason(tmp_path, make, message):
    spec, path = make(tmp_path)
    with pytest.raises(DatasetError, match=message):
        archives.read_archive(spec, path)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "payload",
    [
        Malicious(os.system, "touch executed"),
        Malicious(eval, "open('executed', 'w')"),
        Malicious(np.load, "x"),
        Malicious(getattr, "text", "join"),
        {b"data": np.array([os.system], object), b"labels": []},
        {b"data": {1, 2}},
    ],
)
def test_pickles_execute_nothing(tmp_path, monkeypatch, payload, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"not a pickle of plain arrays|does not hold `data`"):
        archives._parse_cifar_python(CIFAR, "batch", pickle.dumps(payload, protocol), 10)
    assert not list(tmp_path.iterdir())


def test_a_damaged_pickle_is_of_whatever_set_was_asked_for():
    with pytest.raises(DatasetError, match=r"not a pickle .*; fetch the Python version again, or"):
        archives.load_restricted_pickle(b"nothing", "cifar-100-python/train")


def test_a_pickle_of_ten_bytes_takes_no_gigabytes():
    tracemalloc.start()
    with pytest.raises(DatasetError, match="entry 200000000 of its memo"):
        archives.load_restricted_pickle(
            b"\x80\x02K\x01r" + (200_000_000).to_bytes(4, "little") + b".", "x"
        )
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flipped_and_cut_pickles_fail_cleanly(data):
    array = np.arange(10 * 3072, dtype=np.uint8).reshape(10, 3072)
    content = bytearray(pickle.dumps({b"data": array, b"labels": list(range(10))}, 2))
    head_or_tail = st.integers(0, 200) | st.integers(len(content) - 100, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(head_or_tail)] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        split = archives._parse_cifar_python(CIFAR, "batch", content, 10)
        assert split.images.shape == (10, 32, 32, 3)
    except DatasetError:
        pass


# --- preparing and loading ---------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "write"), [(CIFAR, write_cifar_binary), (MNIST, None)])
def test_prepared_sets_are_read_by_us_and_by_the_stock_reader(tmp_path, spec, write):
    splits = random_splits(spec)
    if write:
        write(tmp_path / "archive", splits)
    else:
        write_idx(tmp_path / "archive", splits, True)
    folder = tmp_path / "data"
    target = prepare.prepare(spec, folder, tmp_path / "archive", progress=False)
    assert target == folder / spec.name / spec.version
    assert [p.name for p in folder.iterdir()] == [spec.name]
    for _ in range(2):  # The second time from the decoded images.
        loaded = {split: storage.load(spec, split, folder) for split in splits}
        assert_same_examples(loaded, splits)
    few = storage.load(spec, "train", folder, limit=3)
    np.testing.assert_array_equal(few.images, loaded["train"].images[:3])
    source = tfds.data_source(spec.name, split="test", data_dir=folder, download=False)
    assert len(source) == spec.test_size
    np.testing.assert_array_equal(source[2]["image"], loaded["test"].images[2])
    assert source[2]["label"] == loaded["test"].labels[2]
    # Preparing again replaces the set, and what was decoded from the old one.
    other = random_splits(spec, seed=1)
    write_again = write or (lambda f, s: write_idx(f, s, False))
    write_again(tmp_path / "other", other)
    prepare.prepare(spec, folder, tmp_path / "other", progress=False)
    assert_same_examples({"test": storage.load(spec, "test", folder)}, {"test": other["test"]})


@pytest.mark.parametrize("mapped", [False, True])
def test_what_was_decoded_of_an_older_set_is_removed(tmp_path, monkeypatch, mapped):
    data, part = random_splits(MNIST)["test"], f"mnist-{MNIST.version}-test"
    others = {f"mnist-{MNIST.version}-train-1-2.npz", f"fashion_{part}-1-2.npy"}
    for name in (*others, f"{part}-1-2.npz", f"{part}-1-2.npy", f"{part}-1-2.labels.npy"):
        (tmp_path / name).touch()
    cache = tmp_path / f"{part}-aa-bb.npz"
    monkeypatch.setattr(storage, "_records", lambda *arguments: zip(*data))
    if mapped:
        storage._decode_to(MNIST, "test", tmp_path, cache)
    else:
        storage._write_cache(cache, data)
    kept = {f"{cache.stem}.npy", f"{cache.stem}.labels.npy"} if mapped else {cache.name}
    assert {path.name for path in tmp_path.iterdir()} == others | kept


def test_a_failed_preparation_leaves_the_old_set_and_nothing_else(tmp_path, monkeypatch):
    splits = random_splits(MNIST)
    write_idx(tmp_path / "archive", splits, True)
    prepare.prepare(MNIST, tmp_path / "data", tmp_path / "archive", progress=False)

    def cut_short(data):
        yield next(iter(zip(data.images, map(int, data.labels))))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "examples", cut_short)
    with pytest.raises(OSError, match="No space left"):
        prepare.prepare(MNIST, tmp_path / "data", tmp_path / "archive", progress=False)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mnist"]
    monkeypatch.undo()
    loaded = storage.load(MNIST, "test", tmp_path / "data")
    assert_same_examples({"test": loaded}, {"test": splits["test"]})


def test_only_what_a_killed_preparation_left_here_is_cleared(tmp_path):
    here = f".lls_jax_preparing-mnist-{socket.gethostname()}-"
    names = {
        "killed": here + "one",
        "running": here + "two",
        "another machine's": ".lls_jax_preparing-mnist-elsewhere-three",
        "another set's": f".lls_jax_preparing-cifar10-{socket.gethostname()}-four",
    }
    for name in names.values():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / ".lock").touch()
    write_idx(tmp_path / "archive", random_splits(MNIST), True)
    with (tmp_path / "data" / names["running"] / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        prepare.prepare(MNIST, tmp_path / "data", tmp_path / "archive", progress=False)
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"mnist", *names.values()} - {names["killed"]}


@pytest.mark.parametrize("killed_at", range(3))
def test_a_kill_while_a_set_is_replaced_loses_neither(tmp_path, monkeypatch, killed_at):
    """At every rename; what a kill leaves is read, by others too, and replaced by the next."""
    splits, other = random_splits(MNIST), random_splits(MNIST, seed=1)
    write_idx(tmp_path / "archive", splits, True)
    write_idx(tmp_path / "other", other, True)
    data = tmp_path / "data"
    prepare.prepare(MNIST, data, tmp_path / "archive", progress=False)
    replace, renames = os.replace, iter(range(9))

    class KilledError(BaseException):
        pass

    def killed(source, target):
        ours = "preparing" in str(source) or "replaced" in str(target)
        if ours and next(renames) == killed_at:
            raise KilledError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", killed)
        try:
            prepare.prepare(MNIST, data, tmp_path / "other", progress=False)
            expected = other
        except KilledError:
            expected = splits
    assert (killed_at == 2) == (expected is other)
    assert storage.is_prepared(MNIST, data)
    loaded = {split: storage.load(MNIST, split, data) for split in splits}
    assert_same_examples(loaded, expected)
    prepare.prepare(MNIST, data, tmp_path / "other", progress=False)
    assert_same_examples({"test": storage.load(MNIST, "test", data)}, {"test": other["test"]})
    assert [path.name for path in (data / "mnist").iterdir()] == [MNIST.version]


def test_no_network_is_reported_with_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DatasetError) as caught:
        prepare.prepare(get_spec("cifar10"), tmp_path, progress=False)
    command = f"experiments.prepare_data cifar10 --data-dir {tmp_path} --archive PATH`"
    for part in ("Name or service", command, "experiments.digits"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_replaced_download_is_refused(tmp_path, monkeypatch):
    class Response(io.BytesIO):
        headers = {"Content-Length": "3"}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Response(b"abc"))
    with pytest.raises(DatasetError, match="has SHA-256 ba7816bf"):
        prepare.prepare(get_spec("mnist"), tmp_path, progress=False)


def test_missing_and_damaged_sets_are_reported(tmp_path):
    with pytest.raises(DatasetError, match=rf"--data-dir {tmp_path}` .*experiments\.digits"):
        storage.load(CIFAR, "train", tmp_path)
    write_cifar_binary(tmp_path / "archive", random_splits(CIFAR))
    target = prepare.prepare(CIFAR, tmp_path, tmp_path / "archive", progress=False)
    with pytest.raises(DatasetError, match="51 train examples asked for"):
        storage.load(CIFAR, "train", tmp_path, limit=51)
    for file in target.glob("*train*"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DatasetError, match=rf"cannot be read.*cifar10 --data-dir {tmp_path}`"):
        storage.load(CIFAR, "train", tmp_path)


def test_digits_are_scikit_learns():
    theirs = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(theirs.target))
    for split, part in (("train", order[:1437]), ("test", order[1437:])):
        ours = storage.load(get_spec("digits"), split, pathlib.Path("nowhere"))
        np.testing.assert_array_equal(ours.labels, theirs.target[part])
        np.testing.assert_array_equal(
            ours.images[..., 0], np.rint(theirs.images[part] * (255 / 16))
        )


def test_digits_are_the_embedded_set():
    spec = get_spec("digits")
    train, test = (storage.load(spec, split, pathlib.Path("/none")) for split in ("train", "test"))
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.max() == 255
    np.testing.assert_allclose(np.mean(train.images / 255), spec.mean[0], atol=1e-3)
    np.testing.assert_allclose(np.std(train.images / 255), spec.std[0], atol=1e-3)
    with pytest.raises(DatasetError, match="embedded"):
        prepare.prepare(spec, pathlib.Path("/none"), pathlib.Path("/"))
    with pytest.raises(ValueError, match=r"'cifar11'.*Did you mean 'cifar10'"):
        get_spec("cifar11")


# --- batches -----------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    key = jax.random.key(3)
    first, again, second = (np.asarray(epoch_permutation(key, e, 40)) for e in (0, 0, 1))
    np.testing.assert_array_equal(np.sort(first), np.arange(40))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


@pytest.mark.parametrize("augmentation", augment.AUGMENTATIONS)
def test_batches_hold_the_images_that_the_permutation_says(augmentation):
    splits = random_splits(CIFAR)
    data = batches.to_device(splits["train"])
    permutation = epoch_permutation(jax.random.key(0), 0, 50)
    sample = batches.make_sampler(CIFAR, augmentation, 8)
    batch = sample(data, permutation, 2, jax.random.key(1))
    chosen = np.asarray(permutation)[16:24]
    np.testing.assert_array_equal(batch["label"], splits["train"].labels[chosen])
    expected = (splits["train"].images[chosen] / 255 - CIFAR.mean) / CIFAR.std
    image = np.asarray(batch["image"])
    assert image.shape == (8, 32, 32, 3)
    if augmentation == "none":
        np.testing.assert_allclose(image, expected, atol=1e-5)
    if augmentation == "flip":
        plain = np.isclose(image, expected, atol=1e-5).all((1, 2, 3))
        mirrored = np.isclose(image, expected[:, :, ::-1], atol=1e-5).all((1, 2, 3))
        assert (plain | mirrored).all()
        assert plain.any()
        assert mirrored.any()
    again = sample(data, permutation, 2, jax.random.key(1))
    np.testing.assert_array_equal(image, again["image"])


def draw_key():
    rng = random_generator()
    return rng, jax.random.key(int(rng.integers(2**31)))


def test_crops_equal_an_oracle():
    """Window by window, cut in NumPy at the offsets that the key gives."""
    rng, key = draw_key()
    images = rng.integers(1, 256, (200, 6, 7, 2)).astype(np.uint8)
    crops = np.asarray(augment.random_crop(key, images, 2))
    offsets = np.asarray(jax.random.randint(key, (200, 2), 0, 5))
    expected = np.zeros_like(images)
    for image, crop, (top, left) in zip(images, expected, offsets):
        for row in range(6):
            for column in range(7):
                y, x = row + top - 2, column + left - 2
                if 0 <= y < 6 and 0 <= x < 7:
                    crop[row, column] = image[y, x]
    np.testing.assert_array_equal(crops, expected)
    # Every offset is drawn, and none beyond the padding.
    assert set(offsets.ravel()) == set(range(5))


def test_erasing_equals_an_oracle():
    """Rectangle by rectangle, in float64 from the same uniform numbers."""
    rng, key = draw_key()
    count, height, width = 400, 20, 14
    images = rng.uniform(1.0, 2.0, (count, height, width, 3))
    images = images.astype(np.float32)
    erased = np.asarray(augment.random_erase(key, jnp.asarray(images)))
    keys = jax.random.split(key, 5)
    chosen = np.asarray(jax.random.bernoulli(keys[0], 0.2, (count,)))
    area, aspect, top, left = (
        np.asarray(jax.random.uniform(k, (count,)), np.float64) for k in keys[1:]
    )
    area = height * width * (0.02 + (0.33 - 0.02) * area)
    aspect = np.exp(np.log(0.3) + (np.log(3.3) - np.log(0.3)) * aspect)
    expected, borderline = images.copy(), 0
    for index in np.flatnonzero(chosen):
        sides = np.sqrt(area[index] * aspect[index]), np.sqrt(area[index] / aspect[index])
        spans = []
        for side, size, start in zip(sides, (height, width), (top[index], left[index])):
            length = int(np.clip(np.round(side), 1, size))
            first = start * (size - length + 1)
            spans.append(slice(int(first), int(first) + length))
            # Where rounding in float32 may fall to the other side.
            borderline += abs(side % 1 - 0.5) < 1e-4 or abs(first - np.round(first)) < 1e-4
        expected[index][tuple(spans)] = 0.0
    wrong = sum(not np.array_equal(a, b) for a, b in zip(erased, expected))
    assert wrong <= borderline
    assert 0.1 < chosen.mean() < 0.3
    sizes = (expected[chosen] == 0).all(-1).mean((1, 2))
    # The published range of areas, 0.02 to 0.33, is filled; a thin rectangle is cut off at the
    # border, and whole pixels make the largest up to 0.04 larger.
    assert sizes.min() < 0.06 and 0.22 < sizes.max() < 0.38


def test_cutout_equals_an_oracle():
    """Square by square, in NumPy from the same uniform numbers; a short axis is cut whole."""
    rng, key = draw_key()
    images = rng.uniform(1.0, 2.0, (300, 12, 5, 3)).astype(np.float32)
    cut = np.asarray(augment.random_cutout(key, jnp.asarray(images), 6))
    tops = np.floor(np.asarray(jax.random.uniform(jax.random.split(key)[0], (300,))) * 7)
    expected = images.copy()
    for image, top in zip(expected, tops.astype(int)):
        image[top : top + 6] = 0.0
    np.testing.assert_array_equal(cut, expected)
    # Every place inside the image is drawn.
    assert set(tops) == set(range(7))


def test_evaluation_batches_weigh_what_fills_up_with_zero():
    data = batches.to_device(random_splits(CIFAR)["test"])
    parts = list(batches.evaluation_batches(CIFAR, data, 4))
    assert [image.shape[0] for image, _, _ in parts] == [4, 4, 4]
    weights = np.concatenate([weight for _, _, weight in parts])
    labels = np.concatenate([label for _, label, _ in parts])
    assert weights.sum() == 10
    np.testing.assert_array_equal(labels[weights == 1], data.labels)


def test_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="'mixup'; expected one of none, flip, crop"):
        batches.make_sampler(CIFAR, "mixup", 4)
