"""The page: its tabs, and what their buttons do. The work itself is in the modules beside this one."""

from __future__ import annotations

import html
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial, wraps
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from gradio_client.utils import is_http_url_like
from PIL import Image
from starlette.middleware import Middleware
from torch import Tensor

from srl_utils.app.attacking import ATTACKS, Outcome, amplified, attack_of, compare
from srl_utils.app.editing import LONGEST_PROMPT, Edits, Request, edit_of, protect_and_edit
from srl_utils.app.purifying import PURIFIERS, purify
from srl_utils.app.serving import BodyLimit
from srl_utils.app.tables import HEADERS, KINDS, MAX_REPORTS, in_order, read_table, results_among
from srl_utils.app.uploads import KEEP, MAX_BYTES, MAX_FILES, MAX_PIXELS, MAX_TOTAL, checked, in_use, read_square
from srl_utils.app.watching import Cancelled, Report, Stoppable, WatchedBar
from srl_utils.app.world import Visitors, World
from srl_utils.errors import UserError
from srl_utils.images.decoding import decode_rgb
from srl_utils.images.pixels import to_pil
from srl_utils.resources import explained

logger = logging.getLogger(__name__)

TITLE = "SRL-VAE"
PROGRESS = gr.Progress()
ONE_AT_A_TIME = "computation"
"""Computations share the machine, and an edit changes the VAE of a pipeline meanwhile."""
PURIFY, ATTACK, EDIT = "Purify", "Attack and compare", "Edit"
"""Tabs that compute."""
SWEEP = 60
"""Seconds between two deletions of old files."""
NOT_UPLOADED = "upload the file; URLs and other places are not read"
LEVELS = 255
AS_READ = "order of the file"
EXAMPLES = files("srl_utils.app") / "examples"
EXAMPLE_PROMPT = "a large checkered yellow triangle on a gray background"
CSS = """
.pictures img, .slider img { image-rendering: pixelated; }
.slider img { width: 100%; }
.pictures .grid-wrap { min-height: 0; max-height: none; overflow: visible; padding-top: 2.5rem; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(200px, 45%), 1fr)); }
.pictures .thumbnail-item { aspect-ratio: auto; height: auto; }
.pictures .caption-label { position: static; max-width: 100%; white-space: normal; border: none; }
button:focus-visible, input:focus-visible, a:focus-visible { outline: 3px solid #2563eb; outline-offset: 2px; }
"""
"""Small pictures are enlarged without blur; captions are shown in full; the focus of the keyboard is visible."""
HEAD = """<script>
new MutationObserver(() => document.querySelectorAll(".status:not([aria-live])").forEach(
    (element) => element.setAttribute("aria-live", "polite"))).observe(document, {childList: true, subtree: true});
</script>"""
"""Screen readers announce what the computations say."""

Pictures = list[tuple[Image.Image, str]]
Answer = Iterator[Any]


def build_page(world: World, visitors: Visitors) -> gr.Blocks:
    """Return the page; `launch` serves it.

    Args:
        world: the models that visitors choose from.
        visitors: gets their computations.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP, KEEP)) as page:
        gr.Markdown(
            f"# {TITLE}\nClean images with a robust VAE, attack one and compare, edit protected images, look at results. "
            f"Images may have {MAX_BYTES // 2**20} MB and {MAX_PIXELS / 1e6:.0f} million pixels, animations in "
            f"all their frames together. Files are deleted {KEEP // 60} minutes after their last use."
        )
        with gr.Tab(PURIFY):
            purify_tab(world, visitors)
        with gr.Tab(ATTACK):
            attack_tab(world, visitors)
        with gr.Tab(EDIT):
            edit_tab(world, visitors)
        with gr.Tab("Results"):
            results_tab()

        def leave(request: gr.Request) -> None:
            visitors.stop(str(request.session_hash))

        page.unload(leave)
    return page


def launch_settings() -> dict[str, Any]:
    """Return arguments of `launch` that hold wherever the page is served: no traceback, no large file, no request elsewhere."""
    return {
        "show_error": False, "max_file_size": MAX_BYTES, "footer_links": [], "ssr_mode": False, "css": CSS, "head": HEAD,
        "app_kwargs": {"middleware": [Middleware(BodyLimit, most=MAX_TOTAL)]},
        "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    }  # fmt: skip


# --- tabs ---


def purify_tab(world: World, visitors: Visitors) -> None:
    """Lay out the tab that cleans images."""
    with gr.Row():
        with gr.Column():
            sources = gr.File(label=f"Images, {MAX_FILES} at most", file_count="multiple", file_types=["image"])
            cleaned = gr.State([])  # the images of the results; the visitor may have chosen others since
            example("protected.png", sources, "a protected scene", several=True)
            vae = vae_choice(world, "VAE", last=True)
            purifier = gr.Dropdown(list(PURIFIERS), value=PURIFIERS[0], label="Purifier; + joins several")
            start, cancel = buttons("Purify")
        with gr.Column():
            slider = gr.ImageSlider(
                label="Before and after", format="png", elem_classes="slider", buttons=["fullscreen"], interactive=False
            )
            divide = gr.Slider(0, 100, 50, step=1, label="Border between them, in percent")
            shown = gr.Dropdown([], label="Image to show", type="index", visible=False)
            results = gr.File(label="Cleaned images, PNG of the same size", file_count="multiple", interactive=False)
            status = status_line()

    refuse_urls(sources, results)

    @answering
    def run(paths: list[str], name: str, chosen: str, request: gr.Request, progress: gr.Progress = PROGRESS) -> Answer:
        uploads, codec = checked(paths), world.codec(name)

        def report(number: int) -> None:
            progress((number, len(uploads)), desc=uploads[number].name)

        with in_use(uploads, every=SWEEP), TemporaryDirectory() as folder:  # the page copies what is yielded
            with visitors.computing(str(request.session_hash), PURIFY) as stop, Stoppable(stop):
                made = purify(uploads, codec, chosen, Path(folder), report)
            lost = [f"{each.source.name}: {'; '.join(each.lost)}" for each in made if each.lost]
            names = [each.result.name for each in made]
            yield (
                before_and_after(made[0].source, made[0].result),
                gr.Dropdown(names, value=names[0], visible=len(names) > 1),
                [str(each.result) for each in made],
                [str(each.source) for each in made],
                said(f"Images cleaned: {len(made)}.", *(["Lost in the PNG:", *lost] if lost else [])),
            )

    @answering
    def show(number: int | None, before: list[str], after: list[str]) -> Answer:
        yield before_and_after(*checked([before[number or 0], after[number or 0]]))

    running = compute(start, run, [sources, vae, purifier], [slider, shown, results, cleaned, status], name="purify")
    cancel_with(cancel, running, visitors, PURIFY, status)
    shown.input(show, [shown, cleaned, results], slider, api_visibility="private")
    divide.input(
        lambda share: gr.ImageSlider(slider_position=share), divide, slider, queue=False, show_progress="hidden",
        trigger_mode="always_last", api_visibility="private",
    )  # fmt: skip


def attack_tab(world: World, visitors: Visitors) -> None:
    """Lay out the tab that attacks an image and compares two VAEs."""
    with gr.Row():
        with gr.Column():
            picture = image_choice(world)
            attack = gr.Dropdown(list(ATTACKS), value=next(iter(ATTACKS)), label="Attack")
            victim = vae_choice(world, "VAE that is attacked")
            other = vae_choice(world, "VAE to compare with", last=True)
            epsilon = gr.Slider(1, 32, 8, step=1, label="Epsilon, in levels of 255")
            steps = gr.Slider(1, 200, 40, step=1, label="Steps")
            factor = gr.Slider(1, 50, 10, step=1, label="Amplification of the difference")
            start, cancel = buttons("Attack")
        with gr.Column(scale=2):
            pictures = gallery("The image, attacked and reconstructed")
            table = gr.Dataframe(
                headers=["VAE", "clean (dB)", "attacked (dB)"], datatype=["str", "number", "number"], interactive=False,
                label="PSNR of the reconstruction to the image", buttons=[],
            )  # fmt: skip
            status = status_line()

    @answering
    def run(
        path: str, named: str, attacked: str, compared: str, levels: float, count: float, times: float,
        request: gr.Request, progress: gr.Progress = PROGRESS,
    ) -> Answer:  # fmt: skip
        clean = read_square(path, world.resolution)
        perturbation = attack_of(named, epsilon=levels / LEVELS, steps=int(count))
        codecs = world.codec(attacked), world.codec(compared)
        with visitors.computing(str(request.session_hash), ATTACK) as stop:
            outcome = compare(clean, *codecs, perturbation, WatchedBar(reporting(progress), stop))
        lines = [[name, *(round(psnr[name], 2) for psnr in (outcome.clean_psnr, outcome.attacked_psnr))]
                 for name in outcome.reconstructions]  # fmt: skip
        yield outcome_pictures(outcome, times), lines, said(f"{perturbation.name} on {attacked} is done.")

    inputs = [picture, attack, victim, other, epsilon, steps, factor]
    running = compute(start, run, inputs, [pictures, table, status], name="attack")
    cancel_with(cancel, running, visitors, ATTACK, status)


def edit_tab(world: World, visitors: Visitors) -> None:
    """Lay out the tab that edits protected images."""
    if not world.pipelines:
        gr.Markdown("There is no pipeline. Start the app with `--pipeline` to edit images.")
        return
    with gr.Row():
        with gr.Column():
            picture = image_choice(world)
            prompt = gr.Textbox(EXAMPLE_PROMPT, label="Prompt", max_length=LONGEST_PROMPT)
            pipeline = gr.Dropdown(list(world.pipelines), value=next(iter(world.pipelines)), label="Pipeline")
            robust = vae_choice(world, "Robust VAE", last=True)
            strength = gr.Slider(0.1, 1, 0.3, step=0.05, label="Strength of the edit")
            epsilon = gr.Slider(1, 32, 16, step=1, label="Epsilon of the protection (PhotoGuard), in levels of 255")
            with gr.Accordion("More settings", open=False):
                inference_steps = gr.Slider(1, 50, 20, step=1, label="Denoising steps")
                guidance = gr.Slider(1, 15, 2.5, step=0.5, label="Guidance")
                protection_steps = gr.Slider(1, 200, 50, step=1, label="Steps of the protection")
            start, cancel = buttons("Edit")
        with gr.Column(scale=2):
            pictures = gallery("The image, protected and edited")
            status = status_line()

    @answering
    def run(
        path: str, text: str, name: str, replacing: str, amount: float, levels: float, denoising: float, scale: float,
        count: float, request: gr.Request, progress: gr.Progress = PROGRESS,
    ) -> Answer:  # fmt: skip
        wanted = Request(
            prompt=text, strength=amount, inference_steps=int(denoising), guidance=scale, epsilon=levels / LEVELS,
            protection_steps=int(count),
        )  # fmt: skip
        clean, edit = read_square(path, world.resolution), edit_of(world.pipeline(name), wanted)
        original, codec = next(iter(world.codecs.values())), world.codec(replacing)
        with visitors.computing(str(request.session_hash), EDIT) as stop:
            edits = protect_and_edit(clean, edit, original, codec, wanted, WatchedBar(reporting(progress), stop))
        yield edit_pictures(clean, edits, replacing), said("PSNR is that to the edit of the image.")

    inputs = [picture, prompt, pipeline, robust, strength, epsilon, inference_steps, guidance, protection_steps]
    running = compute(start, run, inputs, [pictures, status], name="edit")
    cancel_with(cancel, running, visitors, EDIT, status)


def results_tab() -> None:
    """Lay out the tab that shows results."""
    with gr.Row():
        single = gr.File(label="results.json, one or several", file_count="multiple", file_types=[".json"], height=160)
        folder = gr.File(label="A report folder", file_count="directory", height=160)
    refuse_urls(single, folder)
    example("results.json", single, "results of make demo", several=True)
    with gr.Row():
        column = gr.Dropdown([AS_READ, *HEADERS], value=AS_READ, label="Sort by")
        descending = gr.Checkbox(label="Largest first")
    status = status_line()
    table = gr.Dataframe(
        headers=list(HEADERS), datatype=list(KINDS), interactive=False, label="Rows", show_search="filter", max_height=640,
        buttons=["copy", "fullscreen"],
    )  # fmt: skip

    @answering
    def run(given: list[str] | None, report: list[str] | None, name: str, reverse: bool) -> Answer:
        paths = [*results_among(given or ()), *results_among(report or ())]  # the limits hold for these alone
        lines = read_table(checked(paths, most=MAX_REPORTS)) if paths else []
        yield lines if name == AS_READ else in_order(lines, name, descending=reverse), said(f"Rows: {len(lines)}.")

    inputs = [single, folder, column, descending]
    gr.on(  # one table at a time, but not behind computations that take minutes
        [each.change for each in inputs], run, inputs, [table, status], concurrency_limit=1, api_name="results",
    )  # fmt: skip


# --- parts of tabs ---


def image_choice(world: World) -> gr.Image:
    """Return an input for one image, with an example below it."""
    side = world.resolution
    picture = gr.Image(
        label=f"Image; its centre, {side} px", type="filepath", image_mode=None,
        sources=["upload", "clipboard"], height=240,
    )  # fmt: skip
    refuse_urls(picture)
    picture.preprocess = partial(uploaded, Path(picture.GRADIO_CACHE))
    example("scene.png", picture, "a drawn scene")
    return picture


def uploaded(folder: Path, picture: ImageData | None) -> str | None:
    """Return the path of an image in the folder of uploads, unread.

    In place of it, gradio would open the image before any limit holds, decode one that stands in the request, and read
    from any path that the request gives without the mark of a file.
    """
    if picture is None:
        return None
    if picture.path is None or folder.resolve() not in Path(picture.path).resolve().parents:
        raise message(NOT_UPLOADED)
    return picture.path


def refuse_urls(*components: gr.components.Component) -> None:
    """Let inputs of files refuse URLs, whose files gradio would fetch whatever their size.

    Methods of the objects are replaced: gradio writes a stub beside the source of a subclass.
    """
    for component in components:
        component.async_move_resource_to_block_cache = partial(kept, component.async_move_resource_to_block_cache)


async def kept(keep: Callable[[str], Awaitable[str]], place: str) -> str:
    """Return the path of an uploaded file, which `keep` notes for deletion."""
    if is_http_url_like(str(place)):
        raise message(NOT_UPLOADED)
    return await keep(place)


def example(name: str, component: gr.components.Component, title: str, *, several: bool = False) -> None:
    """Add a button that puts a file of the examples into a component, which may take several files."""
    path = str(EXAMPLES / name)
    gr.Examples([[[path] if several else path]], [component], label="Example", example_labels=[title])


def status_line() -> gr.Markdown:
    """Return the place for what a computation says."""
    return gr.Markdown(elem_classes="status")


def vae_choice(world: World, label: str, *, last: bool = False) -> gr.Dropdown:
    """Return a choice among the VAEs; the first is chosen at the start, or the last."""
    names = list(world.codecs)
    return gr.Dropdown(names, value=names[-1 if last else 0], label=label)


def gallery(label: str) -> gr.Gallery:
    """Return an output for pictures with captions."""
    return gr.Gallery(
        label=label, columns=3, object_fit="contain", format="png", elem_classes="pictures", interactive=False,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def buttons(title: str) -> tuple[gr.Button, gr.Button]:
    """Return the buttons that start and cancel a computation."""
    with gr.Row():
        return gr.Button(title, variant="primary"), gr.Button("Cancel", variant="secondary")


def compute(button: gr.Button, run: Callable, inputs: list, outputs: list, *, name: str) -> Any:
    """Let a button start a computation, and return the event."""
    return button.click(
        run,
        inputs,
        outputs,
        concurrency_id=ONE_AT_A_TIME,
        concurrency_limit=1,
        show_progress_on=outputs[0],
        api_name=name,
    )


def cancel_with(button: gr.Button, running: Any, visitors: Visitors, tab: str, status: gr.Markdown) -> None:
    """Let a button cancel a visitor's computation of its tab, whether it waits or runs."""

    def stop(request: gr.Request) -> str:
        visitors.stop(str(request.session_hash), tab)
        return said("Cancelled.")

    button.click(stop, None, status, cancels=[running], queue=False, api_visibility="private")


# --- answers ---


def answering(work: Callable[..., Answer]) -> Callable[..., Answer]:
    """Return `work` with its errors as messages on the page. What is nobody's mistake is logged with its traceback."""

    @wraps(work)
    def answer(*arguments: Any) -> Answer:
        try:
            yield from work(*arguments)
        except Cancelled:
            raise message("cancelled", title="Cancelled") from None
        except Exception as error:
            told = error if isinstance(error, UserError) else explained(error)
            if told is None:
                logger.exception("an error in %s", work.__qualname__)
                raise message("something went wrong; the log of the app has the details") from None
            raise message(told.problem) from None

    return answer


def message(problem: str, *, title: str = "Error") -> gr.Error:
    """Return an error that the page shows, as plain text."""
    text = problem.replace("`", "")
    return gr.Error(html.escape(text[:1].upper() + text[1:]), title=title, print_exception=False)


def said(*lines: str) -> str:
    """Return lines of plain text as Markdown: names of files come from visitors."""
    return "<br>".join(map(html.escape, lines))


def reporting(progress: gr.Progress) -> Report:
    """Return a function that shows on the page how much is done, and what."""
    return lambda share, title: progress(share, desc=title)


def before_and_after(before: Path, after: Path) -> tuple[Image.Image, Image.Image]:
    """Return both pictures in RGB, upright, transparent parts over white."""
    return decode_rgb(before, max_pixels=MAX_PIXELS), decode_rgb(after, max_pixels=MAX_PIXELS)


def outcome_pictures(outcome: Outcome, factor: float) -> Pictures:
    """Return the pictures of an attack with their captions."""
    difference = amplified(outcome.clean, outcome.attacked, factor)
    reconstructed = [
        (image, f"reconstruction by {name}, {outcome.attacked_psnr[name]:.1f} dB")
        for name, image in outcome.reconstructions.items()
    ]
    return shown_as([
        (outcome.clean, "image"), (outcome.attacked, "attacked"), (difference, f"difference, {factor:g} times"),
        *reconstructed,
    ])  # fmt: skip


def edit_pictures(clean: Tensor, edits: Edits, robust: str) -> Pictures:
    """Return the pictures of the edits with their captions."""
    return shown_as([
        (clean, "image"), (edits.protected, "protected"), (edits.of_clean, "edit of the image"),
        (edits.of_protected, f"edit of the protected image, {edits.psnr(edits.of_protected):.1f} dB"),
        (edits.through_robust, f"the same through {robust}, {edits.psnr(edits.through_robust):.1f} dB"),
    ])  # fmt: skip


def shown_as(images: Sequence[tuple[Tensor, str]]) -> Pictures:
    """Return images `[1,3,H,W]` in [-1,1] as pictures, with their captions."""
    return [(to_pil(image[0]), caption) for image, caption in images]
