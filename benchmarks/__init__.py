"""How fast it is: each a command, `python -m benchmarks.NAME`."""
