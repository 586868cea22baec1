"""Measures of samples: feature networks, distances between sets of features, manifolds, modes, and the evaluator."""
