"""Where things are kept: `paths` are local or in a bucket (gs://), `checkpoint` knows Orbax, `log` a run's metrics."""
