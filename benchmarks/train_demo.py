"""Trains the demo networks: ``python -m benchmarks.train_demo --seed 0 --out DIR``.

Needs scikit-learn for its digits (``pip install nrm-plugin[train]``). The same seed gives the same bytes on the same
machine and PyTorch release; other releases may round differently.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from nrm_plugin.demo.model import DATA, WEIGHTS, DigitsCNN, DigitsVGG, enlarge

NETS: dict[str, tuple[type[nn.Module], str]] = {
    "vgg": (DigitsVGG, WEIGHTS),
    "cnn5": (DigitsCNN, "digits_cnn5.safetensors"),
}
EPOCHS = 60
BATCH = 64
HELD_OUT = 450


class Digits(NamedTuple):
    """Raw digits: images ``(N, 8, 8)``, uint8 from 0 to 16, and labels ``(N,)``, uint8."""

    images: Tensor
    labels: Tensor


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Splits scikit-learn's digits into a training and a held-out part, drawn by ``seed``.

    Both parts contain the same writers, so the held-out accuracy does not measure generalization to new writers.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    images, labels = _sklearn_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[training], labels[training]), Digits(images[held_out], labels[held_out])


def shift(images: Tensor, most: int = 2) -> Tensor:
    """Shifts each image by its own random offset of at most ``most`` pixels per axis, padded with zeros.

    Args:
        images: ``(N, C, H, W)``.
        most: Largest offset.

    Returns:
        ``(N, C, H, W)``.
    """
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (most,) * 4)
    offsets = torch.randint(2 * most + 1, (count, 2)).tolist()
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
    return torch.stack(moved)


def train(model: nn.Module, digits: Digits, epochs: int) -> None:
    """Fits ``model`` in place by Adam with a one-cycle learning rate, on shifted copies of the digits."""
    images, labels = enlarge(digits.images), digits.labels.to(torch.int64)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(labels)), BATCH):
                loss = nn.functional.cross_entropy(model(shift(images[batch])), labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                progress.update()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Returns the fraction of ``digits`` that ``model`` classifies correctly."""
    predicted: Tensor = model(enlarge(digits.images)).argmax(1)
    return (predicted == digits.labels).double().mean().item()


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds PyTorch, with one thread and deterministic kernels; restores the previous state afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(1)
            torch.use_deterministic_algorithms(True)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one network, prints its held-out accuracy, and writes its weights and the held-out digits."""
    options = _parser().parse_args(arguments)
    architecture, file = NETS[options.net]
    training, held_out = split_digits(options.seed)
    with reproducible(options.seed):
        model = architecture()
        train(model, training, options.epochs)
        print(f"{options.net}: held-out accuracy {accuracy(model, held_out):.4f} on {HELD_OUT} digits")
    options.out.mkdir(parents=True, exist_ok=True)
    # save_file makes files that only their owner can read, but these are packaged.
    (options.out / file).write_bytes(save(model.state_dict()))
    (options.out / DATA).write_bytes(save(held_out._asdict()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_demo", description=main.__doc__)
    parser.add_argument("--net", choices=NETS, default="vgg", help="architecture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the digits (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the safetensors files")
    return parser


def _sklearn_digits() -> Digits:
    """Returns all 1797 digits in scikit-learn's order."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Training the demo needs scikit-learn's digits, and scikit-learn is not installed.\n"
            "Install it with: pip install 'nrm-plugin[train]'. Using the embedded model does not need it."
        ) from error
    bunch = datasets.load_digits()
    return Digits(torch.from_numpy(bunch.images).to(torch.uint8), torch.from_numpy(bunch.target).to(torch.uint8))


if __name__ == "__main__":
    main()
