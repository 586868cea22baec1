"""A trained model from Python: load, sample, edit, export, and the bundled models."""
