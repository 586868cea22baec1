"""The paper: diffusion, losses, one training step, sampling and editing, as pure functions."""
