"""From files of data to batches, a pure function of (seed, step, process).

`sources` opens a set by name, `batches` takes batches from it; `image_folder` makes an array of anyone's images,
`decoding` pixels of one file, and `embedded` has the digits that lie inside packages. Images are uint8 [B, H, W, C]:
scaling to [-1, 1] and flips happen on the device, in the train step.
"""
