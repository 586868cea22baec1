"""StackedMNIST at length: is the KL of the paper's table reached? Small networks, T = 4, two classifiers.

    python -m experiments.stacked_long --at_once=2              # three seeds, 4 to 5 hours; --seeds 0 trains one

Trains and evaluates configs/stacked_mnist.py:small with T = 4 and 40,000 steps in runs/experiments/stacked_long;
finished runs are not repeated, and with --seeds, the others keep committed results. The KL depends on the classifier
that reads the samples, so a second one is trained with PyTorch, apart from the project's, and reads the same samples,
and those of the bundled model.
"""

import argparse
import functools
import json
import pathlib
import zlib
from typing import Any

import numpy as np
from tqdm import tqdm

import ddgan_jax
from ddgan_jax.commands import figures
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data.sources import open_data
from ddgan_jax.metrics.modes import mode_report
from ddgan_jax.model.loading import PRETRAINED
from experiments import common
from experiments.stacked_mnist import MEASURES

NAME, BUNDLED = "stacked_long", "stacked_mnist"
FIELDS = {"diffusion.num_steps": 4, "train.num_steps": 40_000, "eval.every": 10_000}
FLAGS = ["--config=configs/stacked_mnist.py:small", *common.flags_of(FIELDS)]
OURS = "T = 4"
METHODS: dict[str, list[str]] = {OURS: []}
PAPER_KL, SHOWN = 0.071, 64
EPOCHS, BATCH = 6, 128


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate the seeds, and let the second classifier read the samples."""
    seeds = args.seeds or common.SEEDS
    runs = common.sweep(NAME, FLAGS, METHODS, args.at_once, [(OURS, seed) for seed in seeds])
    for run in runs:
        workdir = common.workdir(NAME, METHODS, OURS, run["seed"])
        run["second_classifier"] = second_reading(str(workdir), workdir / "second_classifier.json")
    checksum = zlib.crc32((PRETRAINED / f"{BUNDLED}.safetensors").read_bytes())
    kept = common.workdir(NAME, METHODS, OURS, 0).with_name(f"bundled_{checksum:08x}.json")
    bundled = second_reading(BUNDLED, kept)
    if common.SEEDS[0] in seeds:
        common.keep(NAME, "samples", common.samples(NAME, METHODS, SHOWN))
    return {"runs": common.with_committed(NAME, runs), "bundled": bundled}


def second_reading(model: str, file: pathlib.Path) -> dict[str, Any]:
    """Modes, KL and the frequency of each digit by the second classifier, of a model's samples; kept in `file`."""
    if not file.exists():
        classify, accuracy = second_classifier()
        images = ddgan_jax.load(model).sample(25_600)
        channels = np.stack([classify(images[..., i]) for i in range(3)], axis=-1)
        report = mode_report(channels @ [100, 10, 1], 1_000)
        shares = np.bincount(channels.ravel(), minlength=10) / channels.size
        found = {"modes": report.modes, "kl": report.kl, "test_accuracy": accuracy, "shares": shares.tolist()}
        file.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(file.read_text())


@functools.cache
def second_classifier() -> tuple[Any, float]:
    """A function from uint8 images [N, 32, 32] to digits [N], and the fraction of MNIST's test digits that it reads.

    Four convolutions and two dense layers with PyTorch, trained once on MNIST's 60,000 digits, each rotated, scaled,
    sheared and shifted at random.
    """
    import torch
    from torch import nn
    from torchvision.transforms import v2

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width_in, width in ((1, 16), (16, 32)):
        for inputs in (width_in, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 8 * 8, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)
    )
    as_input = lambda images: torch.from_numpy(images[:, None].astype(np.float32)) / 127.5 - 1  # noqa: E731

    def classify(images: np.ndarray) -> np.ndarray:
        network.eval()
        with torch.inference_mode():
            parts = [network(as_input(part)).argmax(1).numpy() for part in np.array_split(images, len(images) // 500)]
        return np.concatenate(parts)

    weights = common.ROOT / "runs" / "experiments" / NAME / "second_classifier.pt"
    if not weights.exists():
        x, y = single_digits("train")
        distort = v2.RandomAffine(10, translate=(0.07, 0.07), scale=(0.85, 1.15), shear=8, fill=-1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        steps = EPOCHS * (len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        order = np.random.RandomState(0)
        network.train()
        for _ in tqdm(range(steps), desc="second classifier"):
            chosen = order.randint(0, len(x), BATCH)
            # Images of a part share one distortion, which is drawn on the CPU for each part
            inputs = torch.cat([distort(part) for part in as_input(x[chosen]).split(4)])
            loss = nn.functional.cross_entropy(network(inputs), torch.from_numpy(y[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.save(network.state_dict(), weights)
    network.load_state_dict(torch.load(weights, weights_only=True))
    test_x, test_y = single_digits("test")
    return classify, float((classify(test_x) == test_y).mean())


def single_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's digits, uint8 [N, 32, 32], and their labels, int64 [N]."""
    data = open_data(DataConfig("mnist", split, None, 32, 1))
    assert data.labels
    return data.images[np.arange(len(data.images))][..., 0], data.labels().astype(np.int64)


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measures of each seed, and last those of the bundled model, with the `name` of the training."""
    bundled = common.read_results("pretrained")["models"][BUNDLED]
    about = {"name": "T = 3, bundled", "seed": 0, "steps": bundled["step"], "second_classifier": results["bundled"]}
    return [{"name": OURS} | run["judged"] | run for run in common.of_method(results, OURS)] + [bundled | about]


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each seed, and one for the bundled model."""
    headings = ("training", "seed", *MEASURES, "KL by the second classifier", "training, min")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in rows(results):
        cells = [f"{row['name']}, {row['steps']:,} steps", str(row["seed"])]
        cells += [measure(row) for measure in MEASURES.values()]
        cells += [f"{row['second_classifier']['kl']:.3f}", f"{row['train_seconds'] / 60:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the distance during training, the KL by both classifiers, the digits' frequencies, and samples."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, 4, figsize=(19, 4.8), layout="constrained")
    for row in rows(results):
        way, second, label = row.get("on_the_way", []), row["second_classifier"], f"{row['name']}, seed {row['seed']}"
        if way:  # the bundled model's is not kept
            panels[0].plot([w["step"] for w in way], [w["classifier_frechet"] for w in way], ".-", label=label)
        panels[1].plot(["the project's", "the second"], [row["kl"], second["kl"]], "o", label=label)
        panels[2].plot(range(10), np.array(second["shares"]) * 100, ".-", label=label)
    panels[0].set(title="classifier distance, of 5,000 samples", xlabel="step", yscale="log")
    panels[1].set(title="KL, nats, by classifier", ylim=(0, None), xlim=(-0.5, 1.5))
    panels[1].axhline(PAPER_KL, linestyle="--", color="k", label="the paper, by its classifier")
    panels[1].axhline(999 / (2 * 25_600), linestyle=":", color="0.5", label="exact samples")
    panels[2].set(title="% of each digit, by the second classifier", xlabel="digit", xticks=range(10), ylim=(0, None))
    panels[2].axhline(10, linestyle=":", color="0.5", label="uniform")
    for axis in panels[:3]:
        axis.legend(fontsize=8)
    with np.load(path.parent / "samples.npz") as arrays:
        panels[3].imshow(figures.grid(arrays[OURS]))
    panels[3].set_title("samples of seed 0, not selected")
    panels[3].axis("off")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    common.run(__file__, experiment, trains=True, seeds=common.SEEDS)
