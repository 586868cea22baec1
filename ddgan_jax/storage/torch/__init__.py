"""Weights of the PyTorch reference implementation: the table of its names and ours, conversion, its files."""
