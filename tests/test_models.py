"""Models with pretrained weights from a file, and inputs resized on the device."""

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


def test_inputs_are_resized_as_torchvision_does():
    model = torch.nn.Identity()
    models.resize_inputs(model, 20)
    x = torch.rand(2, 3, 8, 8)
    expected = resize(x, [20, 20], interpolation=InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(model(x), expected)
