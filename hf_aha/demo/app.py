"""The demo's page: layout and wiring in Gradio; everything that is computed or drawn comes from the other modules.

Gradio is imported when a page is built, so that the package can be looked at without it.
"""

from __future__ import annotations

import html
import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modeling_aha import AhaExplainer
from .engine import REFERENCES, DemoEngine
from .handlers import Handlers
from .pictures import COLORMAPS, VIEWS


if TYPE_CHECKING:
    import gradio as gr

MAX_UPLOAD_BYTES = 50 * 2**20
STEPS = (1, 40)
DEFAULT_STEPS = 10
DEFAULT_SHARE = 20

_EMPTY = '<p class="aha-empty">Drop a photograph, or pick a sample: its explanation appears here.</p>'
# For those who hear the page or have no mouse. Gradio writes the title of a group of radio buttons beside the group
# without naming it, makes every radio button a group of its own, so that arrow keys do nothing, gives all reset
# buttons one name, and has icons read aloud. What is inserted together with its own live region is not read by every
# screen reader, so the place that stays is the live region. The chooser of files shows pictures first, but other files
# are taken too: it is the server that says what is wrong with them, in a line that stays.
_MEND_PAGE = """() => {
    const all = (selector, mend) => document.querySelectorAll(selector).forEach(mend);
    const mend = () => {
        all("fieldset:not([aria-label])", (group) => {
            const title = group.querySelector("[data-testid='block-info']");
            if (title) group.setAttribute("aria-label", title.innerText);
            group.setAttribute("role", "radiogroup");
        });
        all("fieldset[id] input[type='radio']", (button) => {
            const name = button.closest("fieldset").id;
            if (button.name !== name) button.name = name;
        });
        all("[data-testid='reset-button']", (button) => {
            const title = button.closest(".block").querySelector("[data-testid='block-info']");
            if (title) button.setAttribute("aria-label", `Reset: ${title.innerText}`);
        });
        all(".aha-sample img", (icon) => { icon.alt = ""; });
        all("svg:not([role]):not([aria-hidden])", (icon) => icon.setAttribute("aria-hidden", "true"));
        all("#photograph input[type='file']", (input) => { input.accept = "image/*"; });
        all("#status .html-container, #probability .html-container", (place) => {
            place.setAttribute("role", "status");
            place.setAttribute("aria-atomic", "true");
        });
    };
    mend();
    // Gradio names radio buttons anew whenever one is chosen.
    const watched = { childList: true, subtree: true, attributeFilter: ["name"] };
    new MutationObserver(mend).observe(document.body, watched);
}"""
_LIMITS = (
    "A map orders the pixels by how much they count for this classifier's answer. It does not say that the answer is "
    "right, nor why the world is so, and it holds for this classifier alone. What the striped or dimmed border shows, "
    "the classifier never saw."
)


def import_gradio() -> Any:
    """Gradio, with its telemetry off.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return importlib.import_module("gradio")


def build_app(
    engine: DemoEngine,
    *,
    name: str = "",
    samples: Sequence[Path] = (),
    record: dict[str, Any] | None = None,
) -> gr.Blocks:
    """The page for one engine; `server.serve` shows it.

    Args:
        engine: asked by all visitors.
        name: of the explainer, for the page's first lines.
        samples: photographs to pick, named by their files.
        record: facts about explainer and versions that the JSON download holds.

    Raises:
        ImportError: Gradio is not installed.
    """
    gr = import_gradio()
    handlers = Handlers(engine, gr, record or {})
    with gr.Blocks(title="AHA: which pixels?", analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        page = _Page(gr, engine, name, samples)
        app.load(None, js=_MEND_PAGE)
        _wire(page, handlers, samples)
    app.queue(default_concurrency_limit=4, max_size=64)
    return app


class _Page:
    """The components; every one that people use or read has an `elem_id` of its own."""

    def __init__(self, gr: Any, engine: DemoEngine, name: str, samples: Sequence[Path]) -> None:
        self.session = gr.State(None)
        explained = _describe(engine.explainer, name)
        gr.HTML(f"<h1>Which pixels made it say that?</h1><p>{explained}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.upload = gr.File(
                    label="Photograph (JPEG, PNG, WebP, ...; up to 50 MB)",
                    file_count="single",
                    type="filepath",
                    height=170,
                    elem_id="photograph",
                )
                with gr.Row(elem_id="samples"):
                    self.samples = [
                        gr.Button(
                            _spoken(path.stem),
                            icon=path,
                            size="sm",
                            elem_id=f"sample-{path.stem}",
                            elem_classes="aha-sample",
                        )
                        for path in samples
                    ]
                self.top = gr.Radio(
                    choices=[],
                    label="Most probable classes: choose one to explain it",
                    elem_id="top-classes",
                    interactive=True,
                )
                self.other = gr.Dropdown(
                    choices=engine.labels,
                    value=None,
                    label="Another class",
                    info="Type a part of its name.",
                    allow_custom_value=True,
                    elem_id="other-class",
                )
                self.against = gr.Dropdown(
                    choices=engine.labels,
                    value=None,
                    label="Why that class rather than ...",
                    info="Leave it empty to explain the class alone.",
                    allow_custom_value=True,
                    elem_id="rather-than",
                )
                self.alone = gr.Button("Explain the class alone again", size="sm", visible=False, elem_id="alone")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML("", elem_id="status")
                self.picture = gr.HTML(_EMPTY, elem_id="picture")
                self.view = gr.Radio(
                    [(view.capitalize(), view) for view in VIEWS], value=VIEWS[0], label="View", elem_id="view"
                )
                with gr.Row():
                    self.opacity = gr.Slider(0, 100, value=60, step=5, label="Opacity in %", elem_id="opacity")
                    self.colormap = gr.Dropdown(
                        list(COLORMAPS), value=COLORMAPS[0], label="Colours", elem_id="colormap"
                    )
                with gr.Row():
                    self.downloads = [
                        gr.DownloadButton(f"Download {what}", interactive=False, size="sm", elem_id=f"download-{kind}")
                        for kind, what in (
                            ("png", "picture (PNG)"),
                            ("npy", "scores (npy)"),
                            ("json", "record (JSON)"),
                        )
                    ]
        gr.HTML(
            "<h2>Does the map hold?</h2><p>If these pixels made the classifier say so, its answer must go when they "
            "are removed, and come when only they are shown.</p>",
            elem_id="test-title",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.share = gr.Slider(
                    0, 100, value=DEFAULT_SHARE, step=1, label="The most important pixels, in %", elem_id="share"
                )
                self.mode = gr.Radio(
                    [("Remove them (deletion)", "deletion"), ("Show only them (insertion)", "insertion")],
                    value="deletion",
                    label="What to do with them",
                    elem_id="mode",
                )
                self.reference = gr.Radio(
                    [
                        ({"blur": "Blurred", "black": "Black", "mean": "Mean colour"}[kind], kind)
                        for kind in REFERENCES
                    ],
                    value=REFERENCES[0],
                    label="A removed pixel becomes",
                    elem_id="reference",
                )
                self.readout = gr.HTML("", elem_id="probability")
                self.curves = gr.HTML("", elem_id="curves")
            with gr.Column(scale=2, min_width=300):
                self.perturbed = gr.HTML("", elem_id="perturbed")
        gr.HTML(
            "<h2>Refine</h2><p>A few gradient steps on this photograph's own curves; the best map met is kept, so it "
            "never gets worse.</p>",
            elem_id="refine-title",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.steps = gr.Slider(*STEPS, value=DEFAULT_STEPS, step=1, label="Steps", elem_id="refine-steps")
                with gr.Row():
                    self.refine = gr.Button("Refine", variant="primary", elem_id="refine")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="refine-stop")
                self.use_refined = gr.Checkbox(
                    False, label="Use the refined map above", interactive=False, elem_id="use-refined"
                )
            with gr.Column(scale=3, min_width=300):
                self.refined = gr.HTML("", elem_id="refined")
        gr.HTML(
            "<h2>Beside other methods</h2><p>Integrated gradients and Grad-CAM for the same class.</p>",
            elem_id="compare-title",
        )
        self.compare = gr.Button("Compare", elem_id="compare")
        self.comparison = gr.HTML("", elem_id="comparison")
        gr.HTML(f"<p class='aha-soft'>{_LIMITS}</p>", elem_id="limits")


def _wire(page: _Page, handlers: Handlers, samples: Sequence[Path]) -> None:
    drawing = [page.view, page.opacity, page.colormap]
    asking = [page.share, page.mode, page.reference]
    tested = [page.perturbed, page.readout, page.curves]
    # What every new question writes anew.
    asked = [
        page.session,
        page.status,
        page.picture,
        page.top,
        page.other,
        page.against,
        page.alone,
        page.use_refined,
        page.refined,
        page.comparison,
        *page.downloads,
        page.upload,
    ]

    def then_test(event: Any, name: str) -> None:
        """Let the slider, then the curves, then the files follow a new map."""
        event.then(
            handlers.perturb, [page.session, *asking], tested, show_progress="hidden", api_name=f"{name}_perturb"
        ).then(
            handlers.measure, [page.session, *asking], page.curves, show_progress="minimal", api_name=f"{name}_curves"
        ).then(handlers.files, page.session, page.downloads, show_progress="hidden", api_name=f"{name}_files")

    def on(listen: Callable[..., Any], handle: Callable[..., Any], inputs: list[Any], name: str) -> None:
        event = listen(handle, [page.session, *inputs, *drawing], asked, show_progress="minimal", api_name=name)
        then_test(event, name)

    on(page.upload.upload, handlers.open_upload, [page.upload], "photograph")
    for button, path in zip(page.samples, samples, strict=True):
        on(button.click, partial(handlers.open_sample, path), [], f"sample_{path.stem}")
    on(page.top.input, handlers.choose_top, [page.top], "top_class")
    on(page.other.input, handlers.choose_other, [page.other], "other_class")
    on(page.against.input, handlers.choose_against, [page.against], "rather_than")
    on(page.alone.click, handlers.choose_alone, [], "alone")

    for control, listen in ((page.view, "input"), (page.opacity, "input"), (page.colormap, "input")):
        getattr(control, listen)(
            handlers.draw,
            [page.session, *drawing],
            page.picture,
            show_progress="hidden",
            trigger_mode="always_last",
            api_name=f"draw_{control.elem_id}",
        )
    page.share.input(
        handlers.perturb,
        [page.session, *asking],
        tested,
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="perturb",
    )
    for control in (page.mode, page.reference):
        control.input(
            handlers.perturb, [page.session, *asking], tested, show_progress="hidden", api_name=control.elem_id
        ).then(
            handlers.measure,
            [page.session, *asking],
            page.curves,
            show_progress="minimal",
            api_name=f"{control.elem_id}_curves",
        )

    page.refine.click(
        handlers.refine,
        [page.session, page.steps, *drawing],
        [page.status, page.refined, page.use_refined, page.refine, page.stop],
        show_progress="hidden",
        concurrency_limit=1,
        api_name="refine",
    )
    # Not by `cancels`: what the refinement wrote last could arrive after what the stopping wrote.
    page.stop.click(handlers.stop, page.session, None, show_progress="hidden", api_name="stop")
    used = page.use_refined.input(
        handlers.use_refined,
        [page.session, page.use_refined, *drawing],
        [page.status, page.picture],
        show_progress="hidden",
        api_name="use_refined",
    )
    then_test(used, "use_refined")
    page.compare.click(
        handlers.compare,
        [page.session, *drawing],
        [page.status, page.comparison],
        show_progress="minimal",
        concurrency_limit=1,
        api_name="compare",
    )


def _describe(explainer: AhaExplainer, name: str) -> str:
    config = explainer.config
    classifier = config.base_model_name_or_path or "a classifier of your own"
    parts = [
        f"Explainer <strong>{html.escape(name or 'of your own')}</strong> for the classifier "
        f"<strong>{html.escape(Path(classifier).name if os.path.isabs(classifier) else classifier)}</strong>",
        f"{config.num_labels} classes",
        "one map costs one pass of the classifier"
        if config.passes_per_explanation == 1
        else f"one map costs {config.passes_per_explanation} passes of the classifier",
    ]
    return "; ".join(parts) + "."


def _spoken(stem: str) -> str:
    return stem.replace("-", " ").replace("_", " ")
