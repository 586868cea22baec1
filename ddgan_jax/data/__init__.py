"""From files to batches, as a pure function of (seed, step, process).

`sources` opens a dataset by name. For a folder, zip or LMDB of images, `folder` and `archives` find the files and
`prepared` decodes them once; `tfds` reads datasets of tensorflow-datasets; `digits` and `synthetic` need no files.
`batches` forms batches, `decoding` turns the content of one file into pixels, and `resolve` chooses the settings that
follow from the dataset. Images are uint8 [B, H, W, C]: the training step scales them to [-1, 1] and flips them.
"""
