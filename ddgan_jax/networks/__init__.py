"""The networks, as flax.linen modules."""
