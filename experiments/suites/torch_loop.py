"""The training loop that a PyTorch user would write, as a program of its own that is told to step.

It needs nothing but PyTorch: the network, the rule and the images' shape come as JSON, from
:mod:`experiments.suites.against_torch`. Its standard input and output are lines, one answer each:

- the description: ``{"torch": version, "threads": number}``, or ``{"missing": reason}``;
- a number of steps: ``{"seconds": [of each step]}``.

It ends with its input.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

_EPOCH_BATCHES = 4


def local_loss(
    activation: Any, basis: Any, modulation: Any, labels: Any, pool_size: int, temperature: float
) -> Any:
    """LLS, LLS-M or LLS-MxM of one block, the mean over the batch.

    Args:
        activation: ``[batch, channels, height, width]`` or ``[batch, features]``.
        basis: ``[rows, latents]``.
        modulation: None, ``[classes]`` or ``[rows, classes]``.
        labels: integers ``[batch]``.
        pool_size: bins along each spatial axis, or along the features.
        temperature: divides the logits.
    """
    from torch.nn import functional

    if activation.dim() == 4:
        pooled = functional.adaptive_avg_pool2d(activation, pool_size).flatten(1)
    else:
        pooled = functional.adaptive_avg_pool1d(activation, pool_size)
    scores = functional.normalize(pooled.float()) @ basis.T
    if modulation is not None:
        scores = scores @ modulation if modulation.dim() == 2 else scores * modulation
    return functional.cross_entropy(scores / temperature, labels)


def make_layers(block: dict[str, Any]) -> Any:
    """A block's layers: an ``nn.Sequential``.

    Args:
        block: its ``kind`` (``conv``, ``depthwise_separable`` or ``dense``), ``inputs``,
            ``features`` and ``stride``.
    """
    from torch import nn

    inputs, features, stride = block["inputs"], block["features"], block["stride"]
    if block["kind"] == "dense":
        layers: list[Any] = [nn.Linear(inputs, features), nn.BatchNorm1d(features)]
    elif block["kind"] == "conv":
        layers = [nn.Conv2d(inputs, features, 3, stride, padding=1), nn.BatchNorm2d(features)]
    else:
        layers = [
            # Padded by its stride, as the published MobileNets are.
            nn.Conv2d(inputs, inputs, 3, stride, padding=stride, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv2d(inputs, features, 1, bias=False),
            nn.BatchNorm2d(features),
        ]
    return nn.Sequential(*layers, nn.LeakyReLU(0.01, inplace=True))


class Block:
    """One block: its layers, its loss, and what follows it.

    Args:
        block: its description.
        rule: the rule's: ``modulation``, ``temperature``, ``num_classes``.
        device: that its arrays lie on.
    """

    def __init__(self, block: dict[str, Any], rule: dict[str, Any], device: str) -> None:
        import torch
        from torch import nn

        self.layers = make_layers(block).to(device)
        self._spec = block
        self._temperature = rule["temperature"]
        self._basis = None
        self.modulation = None
        if rule["local"]:
            self._basis = torch.tensor(block["basis"], dtype=torch.float32, device=device)
            rows, classes = self._basis.shape[0], rule["num_classes"]
            shape = {"none": None, "vector": (classes,), "matrix": (rows, classes)}
            if (wanted := shape[rule["modulation"]]) is not None:
                self.modulation = nn.Parameter(0.01 * torch.randn(wanted, device=device))

    def parameters(self) -> list[Any]:
        """All that the block learns."""
        modulation = [] if self.modulation is None else [self.modulation]
        return [*self.layers.parameters(), *modulation]

    def loss(self, activation: Any, labels: Any) -> Any:
        """Its local loss."""
        return local_loss(
            activation,
            self._basis,
            self.modulation,
            labels,
            self._spec["pool_size"],
            self._temperature,
        )

    def transition(self, x: Any) -> Any:
        """From its activation to the next block's input."""
        from torch.nn import functional

        if self._spec["max_pool"]:
            x = functional.max_pool2d(x, 2)
        if self._spec["average_pool"] is not None:
            x = functional.adaptive_avg_pool2d(x, self._spec["average_pool"])
        return x.flatten(1) if self._spec["flatten"] else x


class Loop:
    """A training loop on random images, a step at a time.

    Args:
        description: from :func:`experiments.suites.against_torch.describe`.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        import torch
        from torch import nn

        torch.manual_seed(description["seed"])
        self._device = description["device"]
        self._local = description["rule"]["local"]
        self._bfloat16 = description["precision"] == "bfloat16"
        self._batch_size = description["batch_size"]
        self.blocks = [
            Block(block, description["rule"], self._device) for block in description["blocks"]
        ]
        classes = description["rule"]["num_classes"]
        features = description["features"]
        self.classifier = nn.Linear(features, classes).to(self._device)

        def optimizer(parameters: list[Any]) -> Any:
            rate, decay = description["learning_rate"], description["weight_decay"]
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)

        own = [block.parameters() for block in self.blocks]
        last = list(self.classifier.parameters())
        if self._local:
            self._optimizers = [optimizer(parameters) for parameters in (*own, last)]
        else:
            self._optimizers = [optimizer(list(itertools.chain(*own, last)))]
        height, width, channels = description["image_shape"]
        count = _EPOCH_BATCHES * self._batch_size
        self._images = torch.randint(
            256, (count, channels, height, width), dtype=torch.uint8, device=self._device
        )
        self._labels = torch.randint(classes, (count,), device=self._device)
        self._permutation = torch.randperm(count, device=self._device)
        per_channel = (1, channels, 1, 1)
        self._mean = torch.tensor(description["mean"], device=self._device).view(per_channel)
        self._std = torch.tensor(description["std"], device=self._device).view(per_channel)
        losses = len(self._optimizers) if self._local else 1
        self.losses = torch.zeros(losses, device=self._device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self.correct5 = torch.zeros((), dtype=torch.int64, device=self._device)
        self._index = 0

    def batch(self) -> tuple[Any, Any]:
        """The next batch, some of its images mirrored, normalised."""
        import torch

        start = self._index % _EPOCH_BATCHES * self._batch_size
        chosen = self._permutation[start : start + self._batch_size]
        images = self._images[chosen]
        flips = torch.rand((self._batch_size, 1, 1, 1), device=self._device) < 0.5
        images = torch.where(flips, images.flip(3), images)
        x = images.float().div_(255).sub_(self._mean).div_(self._std)
        return x, self._labels[chosen]

    def _run(self, layers: Any, x: Any) -> Any:
        """Layers on their input, in the loop's precision; what they learn is float32."""
        import torch

        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._bfloat16):
            return layers(x)

    def _train_locally(self, x: Any, labels: Any) -> tuple[list[Any], Any]:
        losses = []
        for block, optimizer in zip(self.blocks, self._optimizers):
            activation = self._run(block.layers, x)
            loss = block.loss(activation, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            x = block.transition(activation.detach())
        loss, logits = self._train_with_classifier(x, labels)
        return [*losses, loss], logits

    def _train_whole(self, x: Any, labels: Any) -> tuple[list[Any], Any]:
        for block in self.blocks:
            x = block.transition(self._run(block.layers, x))
        loss, logits = self._train_with_classifier(x, labels)
        return [loss], logits

    def _train_with_classifier(self, features: Any, labels: Any) -> tuple[Any, Any]:
        """Update what the classifier's loss reaches: it alone, or all that is below it too."""
        from torch.nn import functional

        optimizer = self._optimizers[-1]
        logits = self._run(self.classifier, features).float()
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    def step(self) -> None:
        """All that training does for a batch: drawing it, the update, and the running totals."""
        import torch

        x, labels = self.batch()
        losses, logits = (self._train_locally if self._local else self._train_whole)(x, labels)
        self.losses += torch.stack(losses)
        self.correct += (logits.argmax(1) == labels).sum()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.correct5 += (best == labels[:, None]).sum()
        self._index += 1
        if self._device != "cpu":
            torch.cuda.synchronize()


def seconds_of(loop: Loop, steps: int) -> Iterator[float]:
    """Step, and yield the seconds of each step."""
    for _ in range(steps):
        start = time.perf_counter()
        loop.step()
        yield time.perf_counter() - start


def serve(lines: TextIO, answers: TextIO) -> None:
    """Answer each line with a line, until there are no more: see the module's docstring."""

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    description = json.loads(lines.readline())
    try:
        import torch
    except ImportError as error:
        answer({"missing": str(error)})
        return
    loop = Loop(description)
    answer({"torch": str(torch.__version__), "threads": torch.get_num_threads()})
    for line in lines:
        answer({"seconds": list(seconds_of(loop, int(line)))})


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
