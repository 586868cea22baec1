"""The 1,797 handwritten digits that ship inside scikit-learn, as a tfds dataset: real data without a download.

Importing this file imports TensorFlow: `sources` does so only to prepare the data, never to read it.
"""

import contextlib
import io

import tensorflow as tf
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey images of digits with labels, one split 'train'; scikit-learn's 0..16 become 0..255."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Optical recognition of handwritten digits, as embedded in scikit-learn (load_digits).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=tf.uint8, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            yield i, {"image": image, "label": int(label)}


def prepare(data_dir: str) -> None:
    """Write the dataset as array_record below `data_dir`; tfds does so in a folder aside, which it renames at the end.

    A killed process thus leaves at most a folder `incomplete.*`, which nothing reads. OSError if the disk is full, or
    if another process got there first: then its copy is as good.
    """
    try:
        tf.config.set_visible_devices([], "GPU")  # they belong to JAX
    except RuntimeError:
        pass  # TensorFlow already runs in this process: too late to hide them
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it is "downloading"
        Digits(data_dir=data_dir).download_and_prepare(file_format="array_record")
