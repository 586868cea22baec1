"""A web page to try a model: samples, their denoising, variations, edited strokes, inpainting and interpolation.

Needs Gradio (`pip install "ddgan_jax[demo]"`). By default the page is reachable from this computer alone. It loads
nothing from other servers, and keeps uploads in a temporary folder that is removed when the page ends.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ddgan_jax.commands import figures
from ddgan_jax.commands.demo_page import (
    CANVAS,
    Page,
    captioned_frames,
    contents,
    drawing,
    enlarged,
    image_and_hole,
    zipped,
)
from ddgan_jax.commands.generate import default_start_step
from ddgan_jax.errors import UserError
from ddgan_jax.model.model import MAX_INDEX, Model
from ddgan_jax.model.sampler import Sampler
from ddgan_jax.storage import paths

BATCH = 16  # samples that appear together
MAX_SAMPLES, NUM_SAMPLES = 256, 32
MAX_POINTS, NUM_POINTS = 20_000, 4_096
VARIANTS = 12
MAX_UPLOAD = "8mb"
MAX_PIXELS = 32_000_000  # of an uploaded image
COLOURS = ["#ffffff", "#000000", "#e03131", "#2f9e44", "#1971c2", "#f08c00", "#ffd8a8", "#868e96"]
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: auto}
.pixels img, .pixels canvas {image-rendering: pixelated}
"""


def samples_tab(page: Page) -> None:
    """Samples by seed and class; the denoising of a chosen one, and its variations."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, label = page.seed(), page.label()
        count = gr.Slider(1, MAX_SAMPLES, NUM_SAMPLES, step=1, label="How many")
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    samples = page.gallery("Samples: choose one to see more of it", 8, elem_id="samples", allow_preview=False)
    download = gr.DownloadButton("Download all", interactive=False, elem_id="download")
    drawn, index = gr.State(None), gr.State(None)  # (seed, label) of the samples, and which one is chosen
    with gr.Row():
        with gr.Column():
            frames, at, frame = page.denoising("From noise to the sample")
        with gr.Column():
            t = gr.Slider(1, model.num_steps, -(-model.num_steps // 2), step=1, label="Step", elem_id="t")
            varied = page.gallery("x_t at this step, and what the generator sees in it by z alone", elem_id="varied")

    def sample(seed: int, label: int | None, count: int) -> Iterator[Any]:
        labels, chunks, images, shown = model.labels(label, count), [], [], 0
        yield [], (seed, label), None, [], gr.DownloadButton(interactive=False)
        for chunk in Sampler(model.denoiser, BATCH).chunks(model.params, seed, count, labels):
            chunks.append(chunk)
            images += enlarged(chunk)
            if len(images) >= min(count, 2 * shown or BATCH):  # all are sent each time: after 16, 32, 64, ...
                shown = len(images)
                yield images, *[gr.skip()] * 4
        archive = zipped(np.concatenate(chunks), page.folder)
        yield *[gr.skip()] * 4, gr.DownloadButton(value=archive, interactive=True)

    def choose(drawn: tuple[int, int | None], event: gr.SelectData) -> Any:  # type: ignore[name-defined]
        return event.index, *page.last_frame(captioned_frames(model, *drawn, first=event.index))

    def vary(drawn: tuple[int, int | None] | None, index: int | None, t: int) -> Any:
        if drawn is None or index is None:
            raise UserError("Generate samples and choose one first.")
        seed, label = drawn
        labels = model.labels(label, 1, first=index)
        own = None if labels is None else int(labels[0])
        x_t, images = model.vary(VARIANTS - 1, t - 1, seed=seed, label=own, index=index)
        return enlarged(np.concatenate([np.asarray(model.to_images(x_t[None])), images]))

    page.on(button.click, sample, [seed, label, count], [samples, drawn, index, frames, download])
    chosen = page.on(samples.select, choose, [drawn], [index, frames, at, frame])
    for event in (chosen.then, t.release):
        page.on(event, vary, [drawn, index, t], varied)


def points_tab(page: Page) -> None:
    """A scatter plot of a model of points, and its denoising."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, count = page.seed(), gr.Slider(1, MAX_POINTS, NUM_POINTS, step=1, label="How many")
    button = gr.Button("Sample", variant="primary", elem_id="sample")
    outputs = page.denoising("From noise to the samples")

    def sample(seed: int, count: int) -> Any:
        return page.last_frame(captioned_frames(model, seed, num=count))

    page.on(button.click, sample, [seed, count], [*outputs])


def draw_tab(page: Page) -> None:
    """Strokes or an uploaded image, diffused to x_s and denoised again."""
    gr, model = page.gr, page.model
    with gr.Row():
        with gr.Column():
            editor = page.editor("Draw, or upload an image", "stroke", gr.Brush(40, COLOURS, "#ffffff", "fixed"))
            page.upload(editor, "bring_to_draw")
            label = "Diffuse to this step: a later one changes more"
            start = gr.Slider(0, model.num_steps, default_start_step(model), step=1, label=label, elem_id="start")
            with gr.Row():
                seed, label = page.seed(), page.label()
            button = gr.Button("Make images of it", variant="primary", elem_id="edit")
        with gr.Column():
            edited = page.gallery("Variants", elem_id="edited")

    def edit(drawn: Any, start: int, seed: int, label: int | None) -> Any:
        return enlarged(model.edit(drawing(model, drawn), start, VARIANTS, seed=seed, label=label))

    page.on(button.click, edit, [editor, start, seed, label], edited)


def fill_in_tab(page: Page) -> None:
    """An image with a part painted over, which is filled in."""
    gr, model = page.gr, page.model
    with gr.Row():
        with gr.Column():
            brush = gr.Brush(60, ["#ff00c8"], "#ff00c8", "fixed")
            editor = page.editor("Paint over the part to fill in", "hole", brush)
            with gr.Row():
                seed, label = page.seed(), page.label()
                rounds = gr.Slider(1, 10, 3, step=1, label="Rounds: more match old and new better")
            with gr.Row():
                take = gr.Button("Take a sample", elem_id="take")
                page.upload(editor, "bring_to_fill")
                button = gr.Button("Fill in", variant="primary", elem_id="fill")
        with gr.Column():
            filled = page.gallery("Variants", elem_id="filled")

    def take_sample(seed: int, label: int | None) -> dict[str, Any]:
        (image,) = enlarged(model.sample(1, seed, label=label))
        return contents(np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.NEAREST)))

    def inpaint(drawn: Any, seed: int, label: int | None, rounds: int) -> Any:
        image, hole = image_and_hole(model, drawn)
        return enlarged(model.inpaint(image, ~hole, VARIANTS, rounds, seed, label=label))

    page.on(take.click, take_sample, [seed, label], editor)
    page.on(button.click, inpaint, [editor, seed, label, rounds], filled)


def between_tab(page: Page) -> None:
    """The images between two samples."""
    gr, model = page.gr, page.model
    with gr.Row():
        seed, label = page.seed(), page.label(all_in_turn=False)
        first, last = (page.integer(i, f"{end} sample", "A sample", MAX_INDEX) for i, end in enumerate(("From", "To")))
        count = gr.Slider(2, 64, 16, step=1, label="How many")
    button = gr.Button("Interpolate", variant="primary", elem_id="go")
    between = page.gallery("Between them", 8, elem_id="between")
    film = page.image(label="There and back", format="gif", type="filepath")

    def interpolate(seed: int, label: int | None, first: int, last: int, count: int) -> Any:
        images = enlarged(model.interpolate(count, first, last, seed, label=label))
        path = os.path.join(tempfile.mkdtemp(dir=page.folder), "between.gif")
        figures.save_gif(paths.path(path), [*images, *images[-2:0:-1]])
        return images, path

    page.on(button.click, interpolate, [seed, label, first, last, count], [between, film])


TABS = {"Samples": samples_tab, "Draw": draw_tab, "Fill in": fill_in_tab, "Between": between_tab}


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


def demo(model: Model, name: str, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page of a model until Ctrl-C. Raises UserError if Gradio is missing, or the port cannot be used."""
    with tempfile.TemporaryDirectory(prefix="ddgan_jax_demo", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
        except ModuleNotFoundError as error:
            raise UserError(f"the page needs {error.name}: run `pip install gradio`") from error
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice this number
        blocks = build(gr, model, name, folder)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from the web
        for number in (signal.SIGTERM, signal.SIGINT):  # both end the page and remove the folder
            signal.signal(number, signal.default_int_handler)
        try:
            blocks.queue(max_size=64, api_open=False).launch(
                server_name=host,
                server_port=port,
                share=False,
                max_file_size=MAX_UPLOAD,
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
