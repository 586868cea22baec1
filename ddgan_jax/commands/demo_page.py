"""Gradio components of the demo's tabs, and conversion of the images that they show and return."""

import dataclasses
import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ddgan_jax.commands import figures, generate
from ddgan_jax.config.types import MAX_SEED
from ddgan_jax.data import decoding
from ddgan_jax.errors import UserError
from ddgan_jax.model.model import Model

CANVAS = 512  # px, side of the drawing area
ALL_CLASSES = "all in turn"


def enlarged(images: np.ndarray) -> list[np.ndarray]:
    """uint8 [N, H, W, C] as RGB images, which are enlarged as in an animation."""
    return list(figures.enlarged(images))


def captioned_frames(
    model: Model, seed: int, label: int | None = None, first: int = 0, num: int = 1
) -> list[tuple[np.ndarray, str]]:
    """The denoising of samples as (image, caption): x_T, x0_hat, x_{T-1}, x0_hat, ..., x_0."""
    captions = [
        name
        for t in generate.shown_steps(model)
        for name in (f"x_{t + 1}", f"x_{generate.predicted_step(model, t)} as predicted from x_{t + 1}")
    ]
    frames = generate.denoising_frames(model, num, seed=seed, label=label, first=first)
    images = [enlarged(frame)[0] for frame in frames] if frames[0].ndim == 4 else figures.as_frames(frames)
    return list(zip(images, [*captions, "x_0"], strict=True))


def drawing(model: Model, drawn: dict[str, Any] | None) -> np.ndarray:
    """The contents of an editor, on black, as an image of the model. Raises UserError if the editor is empty."""
    if drawn is None or drawn["composite"] is None or not np.any(drawn["composite"][..., :3]):
        raise UserError("Draw something or upload an image first.")
    image = Image.fromarray(drawn["composite"]).convert("RGBA")
    size, _, channels = model.denoiser.image_shape
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return decoding.fit(flat.convert("RGB"), size, channels)


def image_and_hole(model: Model, drawn: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """The image in an editor as an image of the model, and where it was painted over, bool [H, W].

    Raises:
        UserError: there is no image, or nothing was painted.
    """
    if drawn is None or drawn["background"] is None or not np.any(drawn["background"][..., :3]):
        raise UserError("Upload an image or take a sample first.")
    size = model.denoiser.image_shape[0]
    painted = np.zeros((size, size), bool)
    for layer in drawn["layers"]:
        painted |= decoding.fit(Image.fromarray(layer[..., 3]), size, 1)[..., 0] > 63
    if not painted.any():
        raise UserError("Paint over the part to fill in first.")
    return drawing(model, {"composite": drawn["background"]}), painted


def class_choices(model: Model) -> list[tuple[str, str]]:
    """The classes of a model as (name, index); the index also stands for an empty name."""
    return [(figures.printable(name) or str(i), str(i)) for i, name in enumerate(model.classes)]


def contents(image: np.ndarray) -> dict[str, Any]:
    """The value of an editor that contains an image, with nothing drawn on it."""
    return {"background": image, "layers": [], "composite": image}


def zipped(images: np.ndarray, folder: str) -> str:
    """A zip in `folder` of the images uint8 [N, H, W, C] as PNGs; returns its path."""
    path = os.path.join(tempfile.mkdtemp(dir=folder), "images")
    generate.save(images, path)
    return shutil.make_archive(path, "zip", path)


def parse_integer(number: Any, what: str = "The seed", high: int = MAX_SEED) -> int:
    """A number that was typed in. Raises UserError unless it is an integer from 0 to `high`."""
    if number is None or not 0 <= number <= high or number != int(number):  # NaN is in no range
        raise UserError(f"{what} must be an integer from 0 to {high:,}.")
    return int(number)


@dataclasses.dataclass(frozen=True)
class Page:
    """Makes the components of the tabs, and connects them to functions."""

    gr: Any
    model: Model
    folder: str  # for files
    parsers: dict[int, Callable] = dataclasses.field(default_factory=dict)  # of components' values, by id(component)

    def on(self, event: Callable, function: Callable, inputs: list[Any], outputs: Any) -> Any:
        """Call a function or generator function at an event, one call at a time; the page shows its UserErrors."""

        @functools.wraps(function)
        def guarded(*values: Any) -> Iterator[Any]:
            try:
                parsers = [self.parsers.get(id(component), lambda value: value) for component in inputs]
                parsed = [parse(value) for parse, value in zip(parsers, values, strict=False)]
                result = function(*parsed, *values[len(inputs) :])  # Gradio adds the event's data
                yield from result if inspect.isgenerator(result) else [result]
            except UserError as error:
                raise self.gr.Error(str(error), print_exception=False) from error

        return event(guarded, inputs, outputs, concurrency_id="model", concurrency_limit=1)

    def image(self, **options: Any) -> Any:
        """An image that the page shows."""
        return self.gr.Image(interactive=False, elem_classes="pixels", **options)

    def gallery(self, label: str, columns: int = 4, **options: Any) -> Any:
        """A grid of images."""
        look = dict(format="png", object_fit="contain", elem_classes="pixels", buttons=["download", "fullscreen"])
        return self.gr.Gallery(label=label, columns=columns, **look, **options)

    def integer(self, value: int, label: str, what: str, high: int) -> Any:
        """A field for an integer from 0 to `high`."""
        field = self.gr.Number(value, label=label, precision=0, minimum=0)
        self.parsers[id(field)] = functools.partial(parse_integer, what=what, high=high)
        return field

    def seed(self) -> Any:
        """A field for the seed."""
        return self.integer(0, "Seed", "The seed", MAX_SEED)

    def label(self, all_in_turn: bool = True) -> Any:
        """A choice of the class, hidden for an unconditional model."""
        choices = [(ALL_CLASSES, ALL_CLASSES)] * all_in_turn + class_choices(self.model)
        first = choices[0][1] if self.model.num_classes else None
        field = self.gr.Dropdown(choices, value=first, label="Class", visible=self.model.num_classes > 0)
        self.parsers[id(field)] = lambda choice: int(choice) if choice and choice != ALL_CLASSES else None
        return field

    def denoising(self, label: str) -> tuple[Any, Any, Any]:
        """A slider over captioned frames, and the frame that it is at: (frames, slider, frame)."""
        gr, last = self.gr, 2 * len(generate.shown_steps(self.model))
        frames, at = gr.State([]), gr.Slider(0, last, last, step=1, label=label, elem_id="at")
        frame = self.image(label="x_0", format="png", buttons=["download", "fullscreen"], elem_id="frame")

        def show(frames: list, at: int) -> Any:
            return gr.Image(frames[at][0], label=frames[at][1]) if frames else gr.skip()

        at.change(show, [frames, at], frame, queue=False, show_progress="hidden")
        return frames, at, frame

    def last_frame(self, frames: list[tuple[np.ndarray, str]]) -> tuple[Any, Any, Any]:
        """Values for `denoising` that show the last of the frames."""
        image, caption = frames[-1]
        return frames, len(frames) - 1, self.gr.Image(image, label=caption)

    def editor(self, label: str, elem_id: str, brush: Any) -> Any:
        """A drawing area."""
        return self.gr.ImageEditor(
            contents(np.zeros((CANVAS, CANVAS, 3), np.uint8)),
            label=label,
            elem_id=elem_id,
            brush=brush,
            eraser=self.gr.Eraser(40),
            layers=False,
            transforms=(),
            sources=(),
            buttons=["fullscreen"],
            canvas_size=(CANVAS, CANVAS),
            format="png",
            image_mode="RGBA",
        )

    def upload(self, editor: Any, elem_id: str) -> None:
        """A button that puts an uploaded image into an editor."""

        def put(path: str) -> dict[str, Any]:
            try:
                with open(path, "rb") as file:
                    return contents(decoding.decode(file.read(), CANVAS, 3))
            except (OSError, ValueError) as error:
                raise UserError(f"This image cannot be read: {error}.") from error

        button = self.gr.UploadButton("Upload an image", file_types=["image"], elem_id=elem_id)
        self.on(button.upload, put, [button], editor)
