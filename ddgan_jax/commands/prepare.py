"""The command `prepare`: downloads and decodes what a training needs, for instance on a host with internet."""

import dataclasses
from typing import Any

import jax

from ddgan_jax.commands.setup import that_fits
from ddgan_jax.data.batches import evenly_spaced
from ddgan_jax.data.resolve import resolve_from_data
from ddgan_jax.data.sources import directory, open_data
from ddgan_jax.devices.processes import say
from ddgan_jax.method.build import build, init_state
from ddgan_jax.metrics.feature_networks import check_last_evaluation, check_weights
from ddgan_jax.model.loading import load_initial_networks

READ = 256  # images that are read, of all parts of a dataset


def prepare(config: Any) -> None:
    """Prepares the dataset of `config`, or the copy of a folder, and the weights that training and evaluation need.

    Raises UserError or Fault if something is missing that cannot be downloaded, or cannot be used, as a training would.
    """
    c = that_fits(config)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, in_memory_mib=0))
    data = open_data(c.data)
    c, _ = resolve_from_data(c, data)
    method = build(c)
    data.images[evenly_spaced(len(data.images), READ)]
    shape = "x".join(map(str, data.images.shape[1:]))
    say(f"the data is ready: {len(data.images):,} examples of {shape}; copies are in {directory(c.data.dir)}")
    if c.eval.features == "inception" and (c.eval.every or c.eval.at_end):
        files = check_weights(c)
        say(f"the weights of the feature networks are ready: {', '.join(filter(None, files))}")
    if c.eval.at_end:
        check_last_evaluation(c, data, opened=True)
    if c.train.init_from:
        load_initial_networks(c, jax.eval_shape(lambda: init_state(method, c.seed)))
        say(f"the initial networks are ready: {c.train.init_from}")
    say("next: the same command without --mode=prepare, here or where these folders are shared, without a network")
