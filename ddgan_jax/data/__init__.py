"""From files of data to batches, a pure function of (seed, step, process).

`sources` opens a set by name: `folder` and `archives` find the images of a folder, zip or LMDB and `prepared` decodes
them once, `tfds` reads datasets of tensorflow-datasets, `digits` and `synthetic` need no files. `batches` takes
batches, `decoding` makes pixels of one file, and `resolve` chooses what a configuration leaves to the data. Images are
uint8 [B, H, W, C]: scaling to [-1, 1] and flips happen on the device, in the train step.
"""
