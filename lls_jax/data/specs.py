"""The data sets, one entry each."""

import dataclasses
import difflib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Download:
    """A file of a data set's official archive.

    Attributes:
        url: where it is.
        sha256: its checksum, in hexadecimal.
    """

    url: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What a data set is.

    Attributes:
        name: its name, TensorFlow Datasets' where that has it.
        version: of TensorFlow Datasets' builder.
        image_shape: ``(height, width, channels)``.
        class_names: names of the classes, in label order.
        mean: of each channel, for normalisation; pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        train_size: number of training images.
        test_size: number of test images.
        layout: of the official archive; ``"embedded"`` needs none.
        downloads: the files of that archive.
    """

    name: str
    version: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    layout: Literal["cifar10", "idx", "embedded"]
    downloads: tuple[Download, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


_DIGITS = tuple(str(digit) for digit in range(10))

_CIFAR10 = DatasetSpec(
    name="cifar10",
    version="3.0.2",
    image_shape=(32, 32, 3),
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    # The standard deviations are those of the published recipe.
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    train_size=50_000,
    test_size=10_000,
    layout="cifar10",
    downloads=(
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
)

_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_MNIST = DatasetSpec(
    name="mnist",
    version="3.0.1",
    image_shape=(28, 28, 1),
    class_names=_DIGITS,
    mean=(0.1307,),
    std=(0.3081,),
    train_size=60_000,
    test_size=10_000,
    layout="idx",
    downloads=(
        Download(
            _MNIST_URL + "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Download(
            _MNIST_URL + "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Download(
            _MNIST_URL + "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Download(
            _MNIST_URL + "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
)

_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MNIST = DatasetSpec(
    name="fashion_mnist",
    version="3.0.1",
    image_shape=(28, 28, 1),
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    mean=(0.2860,),
    std=(0.3530,),
    train_size=60_000,
    test_size=10_000,
    layout="idx",
    downloads=(
        Download(
            _FASHION_MNIST_URL + "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Download(
            _FASHION_MNIST_URL + "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Download(
            _FASHION_MNIST_URL + "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Download(
            _FASHION_MNIST_URL + "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
)

_DIGITS_SET = DatasetSpec(
    name="digits",
    version="1.0.0",
    image_shape=(8, 8, 1),
    class_names=_DIGITS,
    mean=(0.3053,),
    std=(0.3760,),
    train_size=1_437,
    test_size=360,
    layout="embedded",
)

SPECS = {spec.name: spec for spec in (_CIFAR10, _FASHION_MNIST, _MNIST, _DIGITS_SET)}


def get_spec(name: str) -> DatasetSpec:
    """The entry of a data set.

    Raises:
        ValueError: there is none of that name.

    >>> get_spec("cifar10").num_classes
    10
    """
    if name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(name, SPECS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(SPECS)}.{hint}")
