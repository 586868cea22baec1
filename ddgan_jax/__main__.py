"""`python -m ddgan_jax`: the same as `ddgan-jax`, and as main.py in a checkout."""

import sys

from ddgan_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
