"""A page in the browser to play with a model: samples, how they come about, variations, strokes, holes, ways between.

Needs Gradio (`pip install "ddgan_jax[demo]"`). The page answers this machine alone unless it is told another host,
loads nothing from elsewhere, and keeps what people bring in a folder of its own, which goes when it ends.
"""

import dataclasses
import functools
import io
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ddgan_jax.commands import figures
from ddgan_jax.commands.generate import default_start_step, denoising_frames, shown_steps
from ddgan_jax.config.types import MAX_SEED
from ddgan_jax.data import decoding
from ddgan_jax.errors import UserError
from ddgan_jax.model.model import Model
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import paths

CANVAS = 512  # px, of what one draws on
SHOWN = 192  # px, at least, of an image on the page
AT_ONCE = 16  # samples that appear together
MOST = 256  # samples that one may ask for
NUM_POINTS = 4_096
VARIANTS = 12
LARGEST_FILE = "8mb"  # that one may bring
LARGEST_IMAGE = 32_000_000  # pixels
ALL_CLASSES = "all in turn"
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: auto}
.pixels img, .pixels canvas {image-rendering: pixelated}
"""

# --- What is shown ------------------------------------------------------------------------------------------------


def enlarged(images: np.ndarray) -> list[np.ndarray]:
    """uint8 [N, H, W, C] as RGB pictures that are large enough to be seen, pixel by pixel."""
    zoom = max(1, -(-SHOWN // images.shape[1]))
    large = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return list(large.repeat(3, axis=-1) if large.shape[-1] == 1 else large)


def steps_of(
    model: Model, seed: int, label: int | None = None, first: int = 0, num: int = 1
) -> list[tuple[np.ndarray, str]]:
    """How samples come about: (picture, name) of x_T, x0_hat, x_{T-1}, x0_hat, ..., x_0."""
    names = [name for t in shown_steps(model) for name in (f"x_{t + 1}", f"x_0 as predicted from x_{t + 1}")]
    frames = denoising_frames(model, num, seed=seed, label=label, first=first)
    pictures = [enlarged(frame)[0] if frame.ndim == 4 else figures.as_image(frame) for frame in frames]
    return list(zip(pictures, [*names, "x_0"], strict=True))


def drawing(model: Model, drawn: dict[str, Any] | None) -> np.ndarray:
    """What an editor holds, on black, as an image of the model. UserError if that is nothing."""
    if drawn is None or drawn["composite"] is None or not np.any(drawn["composite"][..., :3]):
        raise UserError("Draw something, or bring a picture, first.")
    picture = Image.fromarray(drawn["composite"]).convert("RGBA")
    size, _, channels = model.denoiser.image_shape
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return decoding.fit(flat.convert("RGB"), size, channels)


def picture_and_hole(model: Model, drawn: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """(the picture of an editor as an image of the model, where it was painted over, bool [H, W]).

    UserError if there is no picture, or nothing was painted.
    """
    if drawn is None or drawn["background"] is None or not np.any(drawn["background"][..., :3]):
        raise UserError("Bring a picture, or take a sample, first.")
    size = model.denoiser.image_shape[0]
    painted = np.zeros((size, size), bool)
    for layer in drawn["layers"]:
        painted |= decoding.fit(Image.fromarray(layer[..., 3]), size, 1)[..., 0] > 63
    if not painted.any():
        raise UserError("Paint over what is to be filled in, first.")
    return drawing(model, {"composite": drawn["background"]}), painted


def zipped(images: np.ndarray, folder: str) -> str:
    """A zip in `folder` of the images uint8 [N, H, W, C] as PNGs; returns its path."""
    path = os.path.join(tempfile.mkdtemp(dir=folder), "images.zip")
    with zipfile.ZipFile(path, "w") as file:
        for i, image in enumerate(images):
            content = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG")
            file.writestr(f"{i:04d}.png", content.getvalue())
    return path


def whole(number: Any, what: str, high: int = MAX_SEED) -> int:
    """A number that was typed in, from 0 to `high`. UserError if it is none."""
    if number is None or not 0 <= number <= high or number != int(number):  # NaN is in no range
        raise UserError(f"{what} must be a whole number from 0 to {high:,}.")
    return int(number)


# --- The page -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Page:
    """What the tabs are made with."""

    gr: Any
    model: Model
    folder: str  # for files

    def on(self, event: Callable, function: Callable, inputs: Any, outputs: Any) -> Any:
        """Call a generator function at an event, one at a time; a user's mistake becomes a sentence on the page."""

        @functools.wraps(function)
        def told(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except UserError as error:
                raise self.gr.Error(str(error), print_exception=False) from error

        return event(told, inputs, outputs, concurrency_id="model", concurrency_limit=1)

    def gallery(self, label: str, columns: int = 4, **options: Any) -> Any:
        """Pictures in a grid."""
        return self.gr.Gallery(
            label=label,
            columns=columns,
            format="png",
            object_fit="contain",
            elem_classes="pixels",
            buttons=["download", "fullscreen"],
            **options,
        )

    def seed(self) -> Any:
        """A field for the seed."""
        return self.gr.Number(0, label="Seed", precision=0, minimum=0)

    def label(self, all_in_turn: bool = True) -> Any:
        """A choice of the class; an unconditional model has none."""
        choices = [ALL_CLASSES] * all_in_turn + [str(i) for i in range(self.model.num_classes)]
        first = choices[0] if choices else None
        return self.gr.Dropdown(choices, value=first, label="Class", visible=bool(self.model.num_classes))

    def chosen_label(self, choice: str | None) -> int | None:
        """The class that was chosen with `label`."""
        return int(choice) if self.model.num_classes and choice not in (None, ALL_CLASSES) else None


def samples_tab(page: Page) -> None:
    """Samples by seed and class; of the one that is chosen, how it came about, and its variations."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, label = page.seed(), page.label()
        count = gr.Slider(1, MOST, 32, step=1, label="How many")
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    samples = page.gallery("Samples: choose one to see more of it", 8, elem_id="samples", allow_preview=False)
    download = gr.DownloadButton("Download all", interactive=False, elem_id="download")
    drawn, index, frames = gr.State(None), gr.State(None), gr.State([])
    with gr.Row():
        with gr.Column():
            last = 2 * len(shown_steps(model))
            at = gr.Slider(0, last, last, step=1, label="From noise to the sample", elem_id="at")
            frame = gr.Image(
                label="x_0",
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
                elem_classes="pixels",
                elem_id="frame",
            )
        with gr.Column():
            t = gr.Slider(1, model.num_steps, -(-model.num_steps // 2), step=1, label="Step", elem_id="t")
            varied = page.gallery("x_t at this step, and what the generator sees in it by z alone", elem_id="varied")

    def sample(seed: Any, choice: str, count: int) -> Iterator[Any]:
        seed, label = whole(seed, "The seed"), page.chosen_label(choice)
        labels, chunks, pictures, shown = model.labels(label, count), [], [], 0
        yield [], (seed, label), None, [], gr.DownloadButton(interactive=False)
        for chunk in Sampler(model.denoiser, AT_ONCE).chunks(model.params, seed, count, labels):
            chunks.append(chunk)
            pictures += enlarged(chunk)
            if len(pictures) >= min(count, 2 * shown or AT_ONCE):  # all are sent each time: after 16, 32, 64, ...
                shown = len(pictures)
                yield pictures, *[gr.skip()] * 4
        archive = zipped(np.concatenate(chunks), page.folder)
        yield *[gr.skip()] * 4, gr.DownloadButton(value=archive, interactive=True)

    def choose(drawn: tuple[int, int | None], event: gr.SelectData) -> Iterator[Any]:  # type: ignore[name-defined]
        frames = steps_of(model, *drawn, first=event.index)
        yield event.index, frames, last, gr.Image(frames[-1][0], label=frames[-1][1])

    def vary(drawn: tuple[int, int | None] | None, index: int | None, t: int) -> Iterator[Any]:
        if drawn is None or index is None:
            raise UserError("Draw samples, and choose one, first.")
        seed, label = drawn
        labels = model.labels(label, 1, first=index)
        own = None if labels is None else int(labels[0])
        x_t, images = model.vary(VARIANTS - 1, t - 1, seed=seed, label=own, index=index)
        yield enlarged(np.concatenate([np.asarray(model.to_images(x_t[None])), images]))

    page.on(button.click, sample, [seed, label, count], [samples, drawn, index, frames, download])
    choice = page.on(samples.select, choose, drawn, [index, frames, at, frame])
    for event in (choice.then, t.release):
        page.on(event, vary, [drawn, index, t], varied)
    _slide(page, at, frames, frame)


def points_tab(page: Page) -> None:
    """A model of points: its scatter, and how it came about."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, count = page.seed(), gr.Slider(1, 20_000, NUM_POINTS, step=1, label="How many")
    button, frames = gr.Button("Sample", variant="primary", elem_id="sample"), gr.State([])
    last = 2 * len(shown_steps(model))
    at = gr.Slider(0, last, last, step=1, label="From noise to the samples", elem_id="at")
    frame = gr.Image(label="x_0", interactive=False, format="png", buttons=["download", "fullscreen"], elem_id="frame")

    def sample(seed: Any, count: int) -> Iterator[Any]:
        frames = steps_of(model, whole(seed, "The seed"), num=count)
        yield frames, last, gr.Image(frames[-1][0], label=frames[-1][1])

    page.on(button.click, sample, [seed, count], [frames, at, frame])
    _slide(page, at, frames, frame)


def _slide(page: Page, at: Any, frames: Any, frame: Any) -> None:
    """Show the step that a slider is at."""

    def show(frames: list, at: int) -> Any:
        return page.gr.Image(frames[at][0], label=frames[at][1]) if frames else page.gr.skip()

    at.change(show, [frames, at], frame, queue=False, show_progress="hidden")


def stroke_tab(page: Page) -> None:
    """Strokes, or a picture, become images: diffused to x_s and denoised again."""
    gr, model = page.gr, page.model
    with gr.Row():
        with gr.Column():
            colours = ["#ffffff", "#000000", "#e03131", "#2f9e44", "#1971c2", "#f08c00", "#ffd8a8", "#868e96"]
            editor = _editor(page, "Draw, or bring a picture", "stroke", gr.Brush(40, colours, "#ffffff", "fixed"))
            _bring(page, editor, "bring_to_draw")
            start = gr.Slider(
                0,
                model.num_steps,
                default_start_step(model),
                step=1,
                label="Diffuse to step: the more, the freer",
                elem_id="start",
            )
            with gr.Row():
                seed, label = page.seed(), page.label()
            button = gr.Button("Make images of it", variant="primary", elem_id="edit")
        with gr.Column():
            edited = page.gallery("What it may be", elem_id="edited")

    def edit(drawn: Any, start: int, seed: Any, choice: str) -> Iterator[Any]:
        given, seed = drawing(model, drawn), whole(seed, "The seed")
        yield enlarged(model.edit(given, start, VARIANTS, seed=seed, label=page.chosen_label(choice)))

    page.on(button.click, edit, [editor, start, seed, label], edited)


def inpaint_tab(page: Page) -> None:
    """What was painted over in a picture is filled in."""
    gr, model = page.gr, page.model
    with gr.Row():
        with gr.Column():
            editor = _editor(
                page, "Paint over what is to be new", "hole", gr.Brush(60, ["#ff00c8"], "#ff00c8", "fixed")
            )
            with gr.Row():
                seed, label = page.seed(), page.label()
                rounds = gr.Slider(1, 10, 3, step=1, label="Rounds: the more, the better old and new agree")
            with gr.Row():
                take = gr.Button("Take a sample", elem_id="take")
                _bring(page, editor, "bring_to_fill")
                button = gr.Button("Fill in", variant="primary", elem_id="fill")
        with gr.Column():
            filled = page.gallery("Ways to fill it in", elem_id="filled")

    def take_sample(seed: Any, choice: str) -> Iterator[Any]:
        image = model.sample(1, whole(seed, "The seed"), label=page.chosen_label(choice))
        yield _holding(
            np.asarray(Image.fromarray(enlarged(image)[0]).resize((CANVAS, CANVAS), Image.Resampling.NEAREST))
        )

    def inpaint(drawn: Any, seed: Any, choice: str, rounds: int) -> Iterator[Any]:
        (given, painted), seed = picture_and_hole(model, drawn), whole(seed, "The seed")
        label = page.chosen_label(choice)
        yield enlarged(model.inpaint(given, ~painted, VARIANTS, rounds, seed, label=label))

    page.on(take.click, take_sample, [seed, label], editor)
    page.on(button.click, inpaint, [editor, seed, label, rounds], filled)


def interpolate_tab(page: Page) -> None:
    """The way from one sample to another."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, label = page.seed(), page.label(all_in_turn=False)
        first, last = (gr.Number(i, label=f"{end} sample", precision=0) for i, end in enumerate(("From", "To")))
        count = gr.Slider(2, 64, 16, step=1, label="How many")
    button = gr.Button("Go from one to the other", variant="primary", elem_id="go")
    between = page.gallery("Between them", 8, elem_id="between")
    film = gr.Image(label="There and back", interactive=False, format="gif", type="filepath", elem_classes="pixels")

    def interpolate(seed: Any, choice: str, first: Any, last: Any, count: int) -> Iterator[Any]:
        ends = [whole(i, "A sample", 2**31 - 1) for i in (first, last)]
        images = model.interpolate(count, ends[0], ends[1], whole(seed, "The seed"), label=page.chosen_label(choice))
        pictures = enlarged(images)
        path = os.path.join(tempfile.mkdtemp(dir=page.folder), "between.gif")
        figures.save_gif(paths.path(path), [*pictures, *pictures[-2:0:-1]])
        yield pictures, path

    page.on(button.click, interpolate, [seed, label, first, last, count], [between, film])


def _holding(picture: np.ndarray) -> dict[str, Any]:
    """The value of an editor that holds a picture, with nothing drawn on it."""
    return {"background": picture, "layers": [], "composite": picture}


def _bring(page: Page, editor: Any, name: str) -> Any:
    """A button that puts a picture of the visitor's into an editor."""
    gr = page.gr
    button = gr.UploadButton("Bring a picture", file_types=["image"], elem_id=name)

    def bring(path: str) -> Iterator[Any]:
        try:
            with open(path, "rb") as file:
                picture = decoding.decode(file.read(), CANVAS, 3)
        except (OSError, ValueError) as error:
            raise UserError(f"This picture cannot be read: {error}.") from error
        yield _holding(picture)

    page.on(button.upload, bring, button, editor)
    return button


def _editor(page: Page, label: str, name: str, brush: Any) -> Any:
    return page.gr.ImageEditor(
        _holding(np.zeros((CANVAS, CANVAS, 3), np.uint8)),
        label=label,
        elem_id=name,
        brush=brush,
        eraser=page.gr.Eraser(40),
        layers=False,
        transforms=(),
        sources=(),
        buttons=["fullscreen"],
        canvas_size=(CANVAS, CANVAS),
        format="png",
        image_mode="RGBA",
    )


def build(gr: Any, model: Model, name: str, folder: str) -> Any:
    """The page of a model, as Gradio's Blocks; its files go into `folder`."""
    page, shape = Page(gr, model, folder), model.denoiser.image_shape
    images = f"{shape[0]}x{shape[1]}, {'grey' if shape[2] == 1 else 'colour'}" if len(shape) == 3 else "points"
    about = model.about.get("summary", f"{images}, in {model.num_steps} network calls; step {model.step:,}")
    with gr.Blocks(title=f"{name}, ddgan_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {name}\n{about}")
        if len(shape) < 3:
            points_tab(page)
        else:
            for title, tab in TABS.items():
                with gr.Tab(title):
                    tab(page)
    return blocks


TABS = {"Samples": samples_tab, "Draw": stroke_tab, "Fill in": inpaint_tab, "Between": interpolate_tab}


def demo(model: Model, name: str, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page of a model until Ctrl-C. UserError if Gradio is missing, or the port is taken."""
    folder = tempfile.mkdtemp(prefix="ddgan_jax_demo")
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}: run `pip install gradio`") from error
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE // 2  # Pillow refuses twice as many
    blocks = build(gr, model, name, folder)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from the web
    for number in (signal.SIGTERM, signal.SIGINT):  # both end the page and remove the folder
        signal.signal(number, signal.default_int_handler)
    try:
        try:
            blocks.queue(max_size=64, api_open=False).launch(
                server_name=host,
                server_port=port,
                share=False,
                max_file_size=LARGEST_FILE,
                footer_links=[],
                theme=theme,
                css=CSS,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
            )
        except OSError as error:
            raise UserError(f"--port={port} of {host} cannot be used: {error}") from error
        print(f"open {blocks.local_url} in a browser; Ctrl-C ends it", flush=True)
        blocks.block_thread()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
