"""Devices and processes, and how programs are compiled.

Only `parallel` places arrays on devices and averages over them, and only `processes` communicates between processes.
Other subpackages may ask JAX how many devices or processes there are.
"""
