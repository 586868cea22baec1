"""Measures of samples: feature networks, distances between sets of features, their manifolds, modes."""
