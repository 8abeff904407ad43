"""Random crops, flips and rotations of whole batches on their own device, each image with draws of its own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError


def augment(images: Tensor, *, crop: int = 0, flip: bool = False, rotation: float = 0.0) -> Tensor:
    """Randomly changed copies of normalised images, drawn from the global CPU generator, so equal on every device.

    The fine-tuning recipe of Foster, Schoepf, Brintrup 2024 crops by 4 pixels, flips and rotates by 15 degrees before
    it resizes. What comes in from outside the image is zero here, the mean colour; there it is black.

    Args:
        images: (N, channels, height, width).
        crop: shift by up to this many pixels in each direction: padding by it, then a random crop.
        flip: mirror horizontally with probability 1/2.
        rotation: turn about the centre by up to this many degrees, to the nearest pixel.

    Raises:
        UsageError: ``crop`` or ``rotation`` is negative.
    """
    if crop < 0 or not 0 <= rotation <= 180:
        raise UsageError(f"crop must be >= 0 pixels and rotation in [0, 180] degrees, not {crop} and {rotation}")
    count, device = len(images), images.device
    if crop:
        images = _shifted(images, torch.randint(2 * crop + 1, (2, count)).to(device), crop)
    if flip:
        mirrored = (torch.rand(count) < 0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if rotation:
        images = _turned(images, (torch.rand(count).to(device) * 2 - 1) * math.radians(rotation))
    return images


def _shifted(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """The window of each padded image that starts at its offset, (2, N) rows and columns."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    number = torch.arange(len(images), device=images.device)
    # Advanced indices around a slice put their dimensions first: (N, height, width, channels).
    return padded[number[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _turned(images: Tensor, angles: Tensor) -> Tensor:
    """Each image turned by its angle in radians, anticlockwise."""
    height, width = images.shape[-2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # affine_grid's coordinates run from -1 to 1 in both directions, whatever the sides are.
    rows = (torch.stack([cos, -sin * height / width, zero], -1), torch.stack([sin * width / height, cos, zero], -1))
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)
