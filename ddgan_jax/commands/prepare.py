"""The command `prepare`: downloads and decodes what a training needs, for instance on a host with internet."""

import dataclasses
from typing import Any

from ddgan_jax.config.settings import read
from ddgan_jax.data.sources import directory, open_data
from ddgan_jax.devices.processes import say
from ddgan_jax.metrics.feature_networks import weights_files


def prepare(config: Any) -> None:
    """Prepares the dataset of `config`, or the copy of a folder, and the weights that its evaluations need.

    Raises UserError or Fault if something is missing that cannot be downloaded, as a training would.
    """
    c = read(config)
    data = open_data(dataclasses.replace(c.data, in_memory_mib=0))
    shape = "x".join(map(str, data.images.shape[1:]))
    say(f"the data is ready: {len(data.images):,} examples of {shape}; copies are in {directory(c.data.dir)}")
    if c.eval.features == "inception" and (c.eval.every or c.eval.at_end):
        found = [file for file in weights_files(c, manifolds=True) if file]
        say(f"the weights of the feature networks are ready: {', '.join(found)}")
    say("next: the same command without --mode=prepare, here or where these folders are shared, without a network")
