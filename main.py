"""Denoising Diffusion GANs: `python main.py` trains on digits; see --help for the flags and docs/ for the rest."""

import sys

from ddgan_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
