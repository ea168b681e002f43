"""The embedded demo: its model and digits work, the digits were held out, and both can be reproduced."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.train_demo import accuracy, main, shift, split_digits
from nrm_plugin.demo import DigitsCNN, DigitsVGG, load_digits, load_model
from nrm_plugin.demo.model import DATA, WEIGHTS, enlarge

EMBEDDED = Path(str(files("nrm_plugin.demo")))


def rows(images: Tensor) -> set[bytes]:
    """Each image as bytes, so that equal images are equal elements."""
    return {image.numpy().tobytes() for image in images}


def test_the_embedded_model_classifies_the_held_out_digits():
    images, labels = load_digits()
    with torch.no_grad():
        predicted = load_model()(images).argmax(1)
    assert (predicted == labels).double().mean() >= 0.97


def test_the_embedded_digits_have_the_documented_form():
    images, labels = load_digits()
    assert images.shape == (450, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.shape == (450,)
    assert labels.dtype == torch.int64
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.unique().tolist() == list(range(10))


def test_the_embedded_files_are_small():
    assert sum((EMBEDDED / name).stat().st_size for name in (WEIGHTS, DATA)) < 1_000_000


def test_the_embedded_weights_match_the_model():
    weights = load_file(EMBEDDED / WEIGHTS)
    DigitsVGG().load_state_dict(weights, strict=True)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())


def test_the_loaded_model_is_in_evaluation_mode_on_the_cpu():
    model = load_model()
    assert not any(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in model.parameters())


def test_loading_leaves_the_random_state_unchanged():
    before = torch.get_rng_state()
    load_model()
    load_digits()
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_models_share_no_memory():
    zeroed = load_model()
    with torch.no_grad():
        for weight in zeroed.parameters():
            weight.zero_()
    assert all(weight.any() for weight in load_model().parameters())


def test_enlarging_preserves_the_value_of_a_constant_image():
    assert torch.equal(enlarge(torch.full((2, 8, 8), 4, dtype=torch.uint8)), torch.full((2, 1, 16, 16), 0.25))


def test_the_embedded_digits_are_the_held_out_part_and_disjoint_from_the_training_part():
    pytest.importorskip("sklearn")
    training, held_out = split_digits(seed=0)
    embedded = load_file(EMBEDDED / DATA)
    assert torch.equal(embedded["images"], held_out.images)
    assert torch.equal(embedded["labels"], held_out.labels)
    assert not rows(embedded["images"]) & rows(training.images)


def test_the_split_is_a_partition_of_the_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    training, held_out = split_digits(seed=0)
    everything = torch.from_numpy(datasets.load_digits().images).to(torch.uint8)
    assert len(training.labels) + len(held_out.labels) == len(everything)
    assert rows(training.images) | rows(held_out.images) == rows(everything)


def test_another_seed_gives_another_split():
    pytest.importorskip("sklearn")
    assert not torch.equal(split_digits(seed=0)[1].images, split_digits(seed=1)[1].images)


def test_a_shift_moves_a_pixel_and_preserves_it():
    dots = torch.zeros(200, 1, 7, 7)
    dots[:, :, 3, 3] = 1
    with torch.random.fork_rng(devices=[]):
        positions = shift(dots, most=2).nonzero()
    assert len(positions) == 200
    assert {(y - 3, x - 3) for _, _, y, x in positions.tolist()} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "architecture", "name"), [("vgg", DigitsVGG, WEIGHTS), ("cnn5", DigitsCNN, "digits_cnn5.safetensors")]
)
def test_two_runs_of_one_epoch_write_identical_loadable_files(
    net: str, architecture: type[nn.Module], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sklearn")
    for run in ("first", "second"):
        main(["--net", net, "--epochs", "1", "--out", str(tmp_path / run)])
        torch.rand(3)
    model = architecture().eval()
    model.load_state_dict(load_file(tmp_path / "first" / name), strict=True)
    written = accuracy(model, split_digits(seed=0)[1])
    assert capsys.readouterr().out.count(f"held-out accuracy {written:.4f}") == 2
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / DATA).read_bytes() == (EMBEDDED / DATA).read_bytes()


@pytest.mark.medium
def test_training_restores_the_state_of_torch(tmp_path: Path):
    pytest.importorskip("sklearn")
    before = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    main(["--net", "cnn5", "--epochs", "1", "--out", str(tmp_path)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before[1:]


def test_without_scikit_learn_training_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nrm-plugin\[train\]'"):
        split_digits(seed=0)
