"""The training commands' presets: what a data set is trained with unless told otherwise."""

from experiments.config import TrainConfig

PRESETS = {
    preset.dataset: preset
    for preset in (
        TrainConfig(dataset="cifar10"),
        TrainConfig(dataset="cifar100"),
        # A mirrored digit is another sign, or none.
        TrainConfig(dataset="digits", epochs=30, batch_size=64, augmentation="none"),
        TrainConfig(dataset="fashion_mnist", epochs=20),
        TrainConfig(dataset="image_folder"),
        TrainConfig(dataset="imagenette", model="vgg8", epochs=300, augmentation="full"),
        TrainConfig(dataset="mnist", epochs=20, augmentation="none"),
        TrainConfig(dataset="tiny_imagenet", model="vgg8", epochs=300, augmentation="flip_erase"),
        TrainConfig(dataset="visual_wake_words", model="mobilenet_v1", epochs=300),
    )
}
