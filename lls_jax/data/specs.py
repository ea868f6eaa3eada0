"""The data sets, one entry each."""

import dataclasses
import difflib
import pathlib
import shlex
from typing import Any, Literal


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
        image_shape: of the prepared images, ``(height, width, channels)``; of a user's own arrays
            any.
        class_names: names of the classes, in label order.
        mean: of each channel, for normalisation; pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        train_size: number of training images; 0 where only the prepared set knows.
        test_size: number of test images, likewise.
        layout: of the official archive; ``"embedded"`` needs none.
        downloads: the files of that archive.
        crop: height and width of the random window of an image that is trained on, and of the
            middle one that is evaluated; None for all of it.
    """

    name: str
    version: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    layout: Literal["cifar10", "cifar100", "idx", "embedded", "folder", "tiny_imagenet", "coco"]
    downloads: tuple[Download, ...] = ()
    crop: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what a network gets: ``(height, width, channels)``, or as the prepared examples."""
        if self.crop is None:
            return self.image_shape
        channels = self.image_shape[-1]
        return (self.crop, self.crop, channels)

    @property
    def is_resolved(self) -> bool:
        """Whether sizes and classes are known before the set is prepared."""
        return self.train_size > 0

    def with_side(self, side: int) -> "DatasetSpec":
        """Of square images of this side; windows are cut where they are larger than a window."""
        crop = None if self.crop is None or self.crop >= side else self.crop
        return dataclasses.replace(self, image_shape=(side, side, self.image_shape[-1]), crop=crop)

    def prepare_command(self, data_dir: pathlib.Path, *more: str) -> str:
        """The command that prepares it.

        Args:
            data_dir: folder of prepared sets.
            *more: further arguments.

        >>> get_spec("mnist").prepare_command(pathlib.Path("my data"), "--archive", "PATH")
        "python -m experiments.prepare_data mnist --data-dir 'my data' --archive PATH"
        """
        command = ["python", "-m", "experiments.prepare_data", self.name]
        return shlex.join([*command, "--data-dir", str(data_dir), *more])


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

_CIFAR100 = DatasetSpec(
    name="cifar100",
    version="3.0.2",
    image_shape=(32, 32, 3),
    class_names=(
        *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle"),
        *("bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle"),
        *("caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch"),
        *("crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest"),
        *("fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower"),
        *("leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
        *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear"),
        *("pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit"),
        *("raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk"),
        *("skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower"),
        *("sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train"),
        *("trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
    ),
    # The published recipe has CIFAR-10's.
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    train_size=50_000,
    test_size=10_000,
    layout="cifar100",
    downloads=(
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
)

# ImageNet's, which the published recipe has for all of these.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def _photographs(name: str, layout: Any, side: int, crop: int | None, *files: Download) -> Any:
    """A set of photographs: sizes and classes come from its folders."""
    return DatasetSpec(
        name=name,
        version="1.0.0",
        image_shape=(side, side, 3),
        class_names=(),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        train_size=0,
        test_size=0,
        layout=layout,
        downloads=files,
        crop=crop,
    )


_IMAGENETTE = _photographs(
    "imagenette",
    "folder",
    160,
    128,
    Download(
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
    ),
)
_TINY_IMAGENET = _photographs("tiny_imagenet", "tiny_imagenet", 64, None)
_VISUAL_WAKE_WORDS = _photographs("visual_wake_words", "coco", 132, 128)
_IMAGE_FOLDER = _photographs("image_folder", "folder", 132, 128)

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

SPECS = {
    spec.name: spec
    for spec in (
        *(_CIFAR10, _CIFAR100, _FASHION_MNIST, _MNIST, _DIGITS_SET),
        *(_IMAGENETTE, _TINY_IMAGENET, _VISUAL_WAKE_WORDS, _IMAGE_FOLDER),
    )
}


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
