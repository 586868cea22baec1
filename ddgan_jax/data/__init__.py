"""From files of data to uint8 batches [B, H, W, C], a pure function of (seed, step, process).

`sources` decodes a set of images once into memory, `batches` takes batches from it, `digits` is the one tfds builder
of our own. Scaling to [-1, 1] and flips happen on the device, in the train step.
"""
