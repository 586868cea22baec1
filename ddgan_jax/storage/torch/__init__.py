"""Weights of the PyTorch reference implementation: its files, its arguments as settings, and conversion."""
