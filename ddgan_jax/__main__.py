"""`python -m ddgan_jax`: the same as `ddgan-jax`, and as main.py in a checkout."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of Ctrl-C during the imports; `main` handles the rest

from ddgan_jax.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
