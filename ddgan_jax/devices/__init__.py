"""Devices and processes, and how programs are compiled.

Only `parallel` places arrays on devices and has the collectives of a training step. Only `processes` joins processes,
and exchanges values between them outside of a step. Other subpackages may ask JAX how many devices or processes there
are.
"""
