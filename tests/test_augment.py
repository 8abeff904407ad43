"""Augmentation of batches: every image is one that torchvision's transform of a single image could have made."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from distruction import UsageError
from distruction.augment import _turned, augment


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(64, 3, 6, 5)


def test_crops_are_torchvisions(images):
    out = augment(images, crop=2)
    assert out.shape == images.shape
    found = set()
    for image, result in zip(images, out, strict=True):
        padded = tv.pad(image, [2, 2, 2, 2])
        matches = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(tv.crop(padded, top, left, 6, 5), result)
        ]
        assert len(matches) == 1
        found.update(matches)
    # 64 draws of 25 offsets leave two or so out.
    assert len(found) > 15


def test_flips_are_torchvisions(images):
    out = augment(images, flip=True)
    flipped = [torch.equal(r, tv.horizontal_flip(i)) for i, r in zip(images, out, strict=True)]
    kept = [torch.equal(r, i) for i, r in zip(images, out, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    # Binomial(64, 1/2), four standard deviations.
    assert 16 <= sum(flipped) <= 48


@pytest.mark.parametrize("shape", [(9, 9), (9, 13)])
def test_rotations_are_torchvisions(shape):
    torch.manual_seed(0)
    images = torch.randn(8, 3, *shape)
    degrees = torch.linspace(-170, 170, 8)
    expected = torch.stack([tv.rotate(i, d) for i, d in zip(images, degrees.tolist(), strict=True)])
    differs = (_turned(images, degrees.deg2rad()) != expected).any(dim=1)
    # A pixel whose source is half-way between two may go to either.
    assert differs.double().mean() < 0.01


def test_rotation_stays_in_its_range():
    # The one bright pixel right of the centre tells the angle.
    images = torch.zeros(500, 1, 201, 201)
    images[:, :, 100, 190:194] = 1
    torch.manual_seed(0)
    out = augment(images, rotation=15)
    weights, place = out.flatten(1), torch.arange(201) - 100.0
    y, x = (place[:, None].expand(201, 201).flatten(), place.expand(201, 201).flatten())
    angles = torch.atan2(-(weights @ y), weights @ x).rad2deg()
    assert angles.abs().max() <= 15.5
    assert angles.std().item() == pytest.approx(15 / 3**0.5, rel=0.1)
    assert angles.mean().item() == pytest.approx(0, abs=4 * 15 / 3**0.5 / 500**0.5)


def test_draws_come_from_the_global_generator(images):
    settings = {"crop": 4, "flip": True, "rotation": 15.0}
    torch.manual_seed(5)
    first = augment(images, **settings)
    torch.manual_seed(5)
    assert torch.equal(augment(images, **settings), first)
    assert not torch.equal(augment(images, **settings), first)
    assert augment(images) is images


def test_errors(images):
    with pytest.raises(UsageError, match=r"crop must be >= 0 pixels .* not -1 and 0"):
        augment(images, crop=-1)
    with pytest.raises(UsageError, match="not 0 and 200"):
        augment(images, rotation=200)
