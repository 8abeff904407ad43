"""Models with pretrained weights from a file, and inputs resized on the device."""

import ast
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import InterpolationMode, resize

from distruction import UsageError, models

OF_DATA = {"num_classes": 7, "in_chans": 3, "img_size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    folder = tmp_path_factory.mktemp("weights")
    save_file(model.state_dict(), folder / "w.safetensors")
    torch.save(model.state_dict(), folder / "w.pth")
    return folder, model


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_pretrained_weights_from_a_file(weights, name):
    folder, original = weights
    model = models.create("test_vit", **OF_DATA, pretrained=folder / name)
    for key, value in original.blocks.state_dict().items():
        assert torch.equal(model.blocks.state_dict()[key], value)
    assert model.head.weight.shape == (7, 64)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_pretrained_errors(weights, tmp_path):
    folder, _ = weights
    with pytest.raises(UsageError, match="no pretrained weights at"):
        models.create("test_vit", **OF_DATA, pretrained=tmp_path / "none.pth")
    with pytest.raises(UsageError, match="vit-micro has no pretrained weights"):
        models.create("vit-micro", **OF_DATA, pretrained=folder / "w.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(UsageError, match="cannot be used"):
        models.create("test_vit", **OF_DATA, pretrained=tmp_path / "bad.pth")
    with pytest.raises(UsageError, match="cannot be used"):
        models.create("test_vit2", **OF_DATA, pretrained=folder / "w.pth")


class Marks:
    """What a pickle may run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("side", [8, 27, 28, 32, 33])
def test_a_convolutional_stem_makes_as_many_tokens_as_there_are_positions(side, tmp_path):
    config = {"name": "vit-micro-conv", "num_classes": 10, "in_chans": 3, "img_size": side}
    torch.manual_seed(0)
    model = models.create(**config).eval()
    images = torch.randn(2, 3, side, side)
    tokens = model.patch_embed(images)
    assert tokens.shape == (2, model.pos_embed.shape[1] - 1, 64)
    # A token sees 15 pixels: the last corner is nothing to the first token, and the first corner is.
    changed = images.clone()
    changed[..., -1, -1] += 1
    if side > 15:
        assert torch.equal(model.patch_embed(changed)[:, 0], tokens[:, 0])
    changed = images.clone()
    changed[..., 0, 0] += 1
    assert not torch.equal(model.patch_embed(changed)[:, 0], tokens[:, 0])
    models.save(model, tmp_path / "m.safetensors", config)
    loaded, _ = models.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.eval()(images), model(images))


def test_pretrained_weights_run_nothing(tmp_path):
    torch.save({"head.weight": Marks(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="cannot be used"):
        models.create("test_vit", **OF_DATA, pretrained=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_readers_of_pickles_say_that_they_read_weights_alone():
    """No call leaves it to a default of torch, timm or NumPy, which differ between versions."""
    root = Path(__file__).parents[1]
    wanted = {"torch.load": "weights_only", "load_state_dict": "weights_only", "np.load": "allow_pickle"}
    for path in [
        p for folder in ("distruction", "kernels", "benchmarks", "examples") for p in root.glob(f"{folder}/**/*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            option = wanted.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
            assert option is None or option in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"


def test_inputs_are_resized_as_torchvision_does():
    model = torch.nn.Identity()
    models.resize_inputs(model, 20)
    x = torch.rand(2, 3, 8, 8)
    expected = resize(x, [20, 20], interpolation=InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(model(x), expected)
