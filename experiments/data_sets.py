"""From a config to images: prepared sets by name, and a user's own by its function."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from experiments.config import TrainConfig
from lls_jax import data, own_parts, processes
from lls_jax.data import batches, prepare, storage
from lls_jax.data.own import load_own
from lls_jax.errors import DatasetError
from lls_jax.runs.source import first_examples, hold_out, place

Examples = batches.DeviceSplit | data.Split


class Opened(NamedTuple):
    """A data set that is there.

    Attributes:
        spec: what it is.
        load: ``load(split, limit)``: a part of it, and only its first `limit` examples, or all.
    """

    spec: data.DatasetSpec
    load: Callable[[str, int | None], data.Split]


def folder(config: TrainConfig) -> pathlib.Path:
    """Where the prepared data sets lie."""
    if config.data_dir is None:
        return storage.default_data_dir()
    return pathlib.Path(config.data_dir)


def sketch(config: TrainConfig) -> data.DatasetSpec:
    """What is known of a data set before it is there; where its classes are not, any will do.

    Raises:
        ValueError: an unknown name.
    """
    unknown = ("one", "other")
    if own_parts.is_own(config.dataset):
        own_parts.find("data set", config.dataset)
        return data.DatasetSpec(
            name=config.dataset,
            version="",
            image_shape=(1, 1, 1),
            class_names=unknown,
            mean=(0.0,),
            std=(1.0,),
            train_size=0,
            test_size=0,
            layout="embedded",
        )
    spec = data.get_spec(config.dataset)
    return spec if spec.is_resolved else dataclasses.replace(spec, class_names=unknown)


def download(config: TrainConfig) -> None:
    """Download the data set where it is missing and can be had.

    Raises:
        ValueError: an unknown name.
    """
    if own_parts.is_own(config.dataset):
        return
    spec = data.get_spec(config.dataset)
    if spec.downloads and not storage.is_prepared(spec, folder(config)):
        # What answers in JSON does so alone on standard output.
        said = f"note: data set {spec.name!r} is not in {folder(config)}; downloading it"
        print(said, file=sys.stderr, flush=True)
        prepare.prepare(spec, folder(config), progress=config.progress)


def open_data(config: TrainConfig) -> Opened:
    """A data set that is prepared, or what a user's own function gives.

    Raises:
        ValueError: an unknown name, or a function that gives something else.
        DatasetError: the set is not prepared, or damaged.
    """
    if own_parts.is_own(config.dataset):
        own = load_own(config.dataset, folder(config))

        def cut(split: str, limit: int | None) -> data.Split:
            size = len(own.splits[split].labels)
            if limit is not None and limit > size:
                raise DatasetError(
                    f"{limit} {split} examples asked for, but {config.dataset!r} has {size}; ask "
                    "for fewer."
                )
            return first_examples(own.splits[split], size if limit is None else limit)

        return Opened(own.spec, cut)
    spec = storage.resolve(data.get_spec(config.dataset), folder(config))
    return Opened(spec, lambda split, limit: data.load(spec, split, folder(config), limit))


def load_split(config: TrainConfig, opened: Opened, split: str) -> Examples:
    """One part of the data set, on the device or, where it is large, on the host."""
    limit = config.train_examples if split == "train" else config.eval_examples
    held_out = config.validation_examples if split == "train" else None
    loaded = opened.load(split, None if held_out else limit)
    places = {"yes": batches.to_device, "auto": place, "no": lambda split: split}
    return places[config.data_on_device](loaded)


def load_splits(config: TrainConfig, opened: Opened) -> list[Examples]:
    """Training and test images; of several processes the first decodes what is not decoded yet."""
    splits = []
    for split in ("train", "test"):
        if processes.is_first():
            splits.append(load_split(config, opened, split))
        processes.wait_for_all(f"the {split} images are decoded")
        if not processes.is_first():
            splits.append(load_split(config, opened, split))
    return splits


def held_out(config: TrainConfig, train: Examples) -> tuple[Examples, Examples | None]:
    """The training images, and those of them that are held out: the last of the whole set.

    Raises:
        ValueError: there are not so many.
    """
    if config.validation_examples is None:
        return train, None
    train, validation = hold_out(train, config.validation_examples)
    left = train.labels.shape[0]
    count = config.train_examples or left
    if count > left:
        raise ValueError(
            f"--train-examples is {count}, and {left} are left beside the "
            f"{config.validation_examples} of --validation-examples; give fewer."
        )
    return first_examples(train, count), validation
