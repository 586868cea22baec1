"""Sets that are made up: a mixture of 25 Gaussians, and random pixels."""

import numpy as np

SYNTHETIC_IMAGES = 256
NUM_POINTS = 100_000
GRID_SIDE, GRID_SPACING, GRID_STD = 5, 2.0, 0.05  # of the 25 Gaussians: means -4, -2, ..., 4 in both coordinates


def gaussians() -> np.ndarray:
    """A mixture of 25 equal Gaussians on a grid, float32 [100,000, 2], always the same points."""
    axis = (np.arange(GRID_SIDE) - (GRID_SIDE - 1) / 2) * GRID_SPACING
    means = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)[np.arange(NUM_POINTS) % GRID_SIDE**2]
    return (means + GRID_STD * np.random.RandomState(0).randn(NUM_POINTS, 2)).astype(np.float32)


def pixels(image_size: int, channels: int) -> np.ndarray:
    """Random pixels, uint8 [256, image_size, image_size, channels], always the same."""
    return np.random.default_rng(0).integers(0, 256, (SYNTHETIC_IMAGES, image_size, image_size, channels), np.uint8)
