"""Datasets that are computed: a mixture of 25 Gaussians, and random pixels."""

import numpy as np

NUM_IMAGES, NUM_POINTS = 256, 100_000
GRID_SIDE, GRID_SPACING, GRID_STD = 5, 2.0, 0.05  # the 25 Gaussians have means -4, -2, ..., 4 in both coordinates


def gaussians() -> np.ndarray:
    """Points float32 [100000, 2] of a mixture of 25 equal Gaussians on a grid. They are the same in every call."""
    axis = (np.arange(GRID_SIDE) - (GRID_SIDE - 1) / 2) * GRID_SPACING
    means = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)[np.arange(NUM_POINTS) % GRID_SIDE**2]
    return (means + GRID_STD * np.random.RandomState(0).randn(NUM_POINTS, 2)).astype(np.float32)


def random_pixels(image_size: int, channels: int) -> np.ndarray:
    """Random images uint8 [256, image_size, image_size, channels]. They are the same in every call."""
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, image_size, image_size, channels), np.uint8)
