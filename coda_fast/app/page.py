"""The page and what it answers: a column for the input, and one for the view of ``coda_fast.viewer``."""

from __future__ import annotations

import base64
import functools
import html
import importlib.util
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coda_fast import baselines, plot, pretrained, report, viewer
from coda_fast._classes import class_name
from coda_fast.app.uploads import Uploads
from coda_fast.data import decode
from coda_fast.data.photographs import example_photographs
from coda_fast.network import Network
from coda_fast.video import VideoError, explain_video

METHODS = ("IxG", "GCam")  # the default choice
MOST_METHODS = 2
# Those that take a few passes of the network; the others take hundreds or thousands.
CHEAP = ("IxG", "GCam", "IntGrad", "Grad", "GB", "DeepLIFT")
MOST_SECONDS = 10.0  # of a video; what follows is not explained
MOST_FRAMES = 300
WAITING = 16  # requests in the queue; the next one is refused

BY_SIZE = "by the size of the picture"  # a choice beside the networks, if all of the package are there

TITLE = "Why does the network see this?"
_INTRODUCTION = """# Why does the network see this?
Each score of this network is exactly a sum of contributions of pixels. Give a picture, and choose a class to
see which pixels speak for it (red) and against it (blue)."""
_EMPTY = '<p class="coda-empty">The picture that you give appears here, with what the network sees.</p>'
CSS = """
.gradio-container > main { max-width: 90rem; margin: auto; padding: 1rem !important; }
.coda-empty { color: #555; border: 1px dashed #bbb; background: #fff; border-radius: 6px; padding: 4rem 1rem;
  text-align: center; }
#coda-view { background: #fff; border-radius: 6px; padding: .8rem; overflow: visible; }
@media (max-width: 40rem) {
  .gradio-container, .gradio-container > main { padding: .3rem !important; }
  #coda-view { padding: .8rem 0; }
}
#coda-view { color: #1a1a1a; }
#coda-methods .icon-wrap { min-width: 1.1rem; }
#coda-view h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
#coda-view video { max-width: 100%; border: 1px solid #ccc; }
#coda-credits, #coda-credits * { font-size: .78rem !important; color: var(--neutral-500); }
"""
# On a phone, the answer is below the input.
_SHOW = """() => {
  if (innerWidth < 700) document.getElementById("coda-view").scrollIntoView({behavior: "smooth"});
}"""
_UNCHANGED = {"__type__": "update"}  # gradio's word for a component that stays as it is
# The report goes straight into a file of the browser, so that the server keeps none.
_SAVE = """(page) => {
  if (!page) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([page], {type: "text/html"}));
  link.download = "coda_report.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""


class Answers:
    """What the page asks of the networks. Nothing of a request is kept: the browser holds the picture that is
    shown, and sends it again when another network or other methods are chosen.
    """

    def __init__(self, networks: Mapping[str, Network], uploads: Uploads):
        self.networks, self.uploads = networks, uploads
        self._busy, self._ended = threading.Lock(), False

    def end(self) -> None:
        """Wait for the answer under way; there is none after it. If the program ended while a thread of the
        server still computes, PyTorch would abort it.
        """
        self._ended = True
        with self._busy:
            pass

    def in_words(self, function: Callable, source: Any) -> Callable:
        """``function``, whose expected errors become messages of the page; others are logged. ``source`` is
        the component that its first argument comes from.
        """
        import gradio

        @functools.wraps(function)
        def answer(*arguments):
            source.temp_files.clear()  # gradio remembers the name of every file for as long as it runs
            try:
                with self._busy:
                    self._check_open()
                    return function(*arguments)
            except (ValueError, ImportError) as error:
                message = str(error)
            except (MemoryError, torch.OutOfMemoryError):
                message = "not enough memory for this picture"
            except RuntimeError as error:
                if "allocate memory" not in str(error):  # torch's message on a CPU
                    raise
                message = "not enough memory for this picture"
            raise gradio.Error(
                html.escape(" ".join(message.split())),
                duration=None,  # until it is closed
                print_exception=False,
                title="Not explained",
            )

        return answer

    def _check_open(self):
        if self._ended:
            raise ValueError("the page is being closed")

    def picture(self, sent: dict | None, network: str, methods: list[str]) -> tuple[dict, str]:
        """The picture as the browser is to hold it, and its view; a hint if it was taken away."""
        if not sent:  # the browser may be sending another one already, which must stay
            return _UNCHANGED, _EMPTY
        with self.uploads.opened(sent) as (name, source):
            data = source if isinstance(source, bytes) else source.read_bytes()
            return _held(name, data), self._view(network, name, data, methods)

    def again(self, sent: dict | None, network: str, methods: list[str]) -> tuple[dict, str | dict]:
        """The same for another choice. Without a picture, what is shown stays."""
        return self.picture(sent, network, methods) if sent else (_UNCHANGED, _UNCHANGED)

    def example(self, index: int, network: str, methods: list[str]) -> tuple[dict, str]:
        """The same for one of the example photographs."""
        photographs = example_photographs()
        if not isinstance(index, int) or not 0 <= index < len(photographs):
            raise ValueError(f"example: expected a number below {len(photographs)}, got {index!r}")
        path, credit = photographs[index]
        shown, _, author = credit.partition(": ")
        name, data = f"{shown} ({author})", path.read_bytes()
        return _held(name, data), self._view(network, name, data, methods)

    def report(self, sent: dict | None, network: str, methods: list[str]) -> str:
        """The page of ``coda_fast.report`` for the picture."""
        with self.uploads.opened(sent) as (name, source):
            data = source if isinstance(source, bytes) else source.read_bytes()
            model, picture = self._picture(network, name, data)
            return "".join(report.stream(model, [picture], methods=_chosen(methods)))

    def video(self, sent: dict | None, network: str) -> tuple[dict | None, str]:
        """Nothing for the input, whose file is deleted, and the frames beside their maps."""
        if not sent:
            return _UNCHANGED, _EMPTY
        with self.uploads.opened(sent) as (name, source):
            if not isinstance(source, Path):
                raise ValueError(f"{name}: expected a video, got other data; send it again")
            network = self._named(network, source)
            model, target = self.networks[network], source.parent / "explained.mp4"
            left = 3 * MOST_FRAMES  # explain_video reads a video three times

            def count(frames: int, total: int | None) -> None:
                nonlocal left
                self._check_open()
                left -= frames
                if left < 0 or (total or 0) > 3 * MOST_FRAMES:
                    raise VideoError(f"expected a video of at most {MOST_FRAMES} frames, got more")

            try:
                found = explain_video(model, source, target, end=MOST_SECONDS, progress=count)
            except ValueError as error:
                raise ValueError(f"{name}: {_without(source, error)}") from None
            seen = html.escape(class_name(model.class_names, found.target))
            verdict = html.escape(found.verdict(model.class_names, network))
            data = base64.b64encode(target.read_bytes()).decode()
            return None, (
                f"<h2>{html.escape(name)}: {verdict}</h2>"
                "<video controls autoplay loop muted playsinline "
                f'src="data:video/mp4;base64,{data}"></video>'
                f"<p>{found.frames} frames, at most the first {MOST_SECONDS:g} seconds, beside the "
                f"contributions of their pixels to {seen}. Colours end at {found.scale:.3g} logits a pixel; "
                f"largest completeness error {found.completeness_error:.1e} logits.</p>"
            )

    def _named(self, choice, source):
        """The name of the network for a file or its content: the choice, or by the size of the picture."""
        known = choices(self.networks)
        if not isinstance(choice, str) or choice not in known:
            raise ValueError(f"network: expected one of {', '.join(known)}, got {str(choice)[:50]!r}")
        return pretrained.for_file(source) if choice == BY_SIZE else choice

    def _view(self, network, name, data, methods):
        model, picture = self._picture(network, name, data)
        return viewer.element(viewer.describe(model, picture, methods=_chosen(methods)))

    def _picture(self, network, name, data):
        """The network for a picture, and the picture as it is to be shown."""
        network = self._named(network, data)
        model, image = self.networks[network], decode(data, name=name)
        seen = model.transform(decode(data, model.image_channels, name=name))
        return model, viewer.Picture(name, seen, plot.View.of(image, model.transform), network)


def choices(networks: Mapping[str, Network]) -> list[str]:
    """What one chooses from: the networks, and first, if all of the package are among them, the one for the
    size of the picture.
    """
    return [*([BY_SIZE] if set(pretrained.names()) <= set(networks) else []), *networks]


def _chosen(methods):
    known = isinstance(methods, list) and all(method in CHEAP for method in methods)
    if not known or len(methods) > MOST_METHODS:
        raise ValueError(
            f"methods: expected at most {MOST_METHODS} of {', '.join(CHEAP)}, got {str(methods)[:100]}"
        )
    return methods


def _held(name, data):
    """A value of gradio's Image that has all of the picture in it, instead of the address of a file."""
    # Browsers recognise the format of a picture by its content, whatever is written here.
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {
        "path": None,
        "url": url,
        "orig_name": name,
        "size": len(data),
        "meta": {"_type": "gradio.FileData"},
    }


def _without(path, message):
    """The message without the path of a temporary file."""
    return str(message).replace(f"{path}: ", "").replace(str(path), "the file")


def blocks(networks: Mapping[str, Network], default: str, uploads: Uploads) -> Any:
    """The page as a ``gradio.Blocks``; files that are sent to it must lie in ``uploads``.

    Raises:
        ImportError: gradio is missing.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("the app needs gradio: pip install 'coda-fast[app]'") from None

    answers, photographs = Answers(networks, uploads), example_photographs()
    captum, video = (importlib.util.find_spec(name) is not None for name in ("captum", "av"))
    # With preprocess and postprocess off, no file meets a decoder of gradio. The networks are shared, and
    # work for one request at a time, whoever asks. A request that comes while another of the same page is
    # answered is not dropped.
    plain: dict[str, Any] = dict(preprocess=False, postprocess=False)
    plain |= dict(concurrency_limit=1, concurrency_id="networks", trigger_mode="multiple")
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Picture"):
                        picture = gr.Image(
                            sources=["upload", "clipboard", "webcam"],
                            type="filepath",
                            image_mode=None,
                            show_label=False,
                            height=280,
                            buttons=[],
                            elem_id="coda-picture",
                        )
                        if photographs:
                            examples = gr.Dataset(
                                components=[gr.Image(render=False)],
                                samples=[[str(path)] for path, _ in photographs],
                                type="index",
                                label="Examples",
                                elem_id="coda-examples",
                            )
                            gr.Markdown("; ".join(c for _, c in photographs) + ".", elem_id="coda-credits")
                    with gr.Tab("Video"):
                        if video:
                            film = gr.Video(
                                sources=["upload", "webcam"],
                                show_label=False,
                                height=280,
                                buttons=[],
                                elem_id="coda-video",
                            )
                            gr.Markdown(
                                f"Its first {MOST_SECONDS:g} seconds are explained, at most {MOST_FRAMES} "
                                "frames."
                            )
                        else:
                            gr.Markdown("Videos need PyAV: pip install 'coda-fast[video]'")
                network = gr.Dropdown(
                    choices(networks), value=default, label="Network", visible=len(networks) > 1 or "hidden",
                    elem_id="coda-network",
                )  # fmt: skip
                methods = gr.Dropdown(
                    [name for name in CHEAP if name in baselines.METHODS] if captum else [],
                    value=list(METHODS) if captum else [],
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    interactive=captum,
                    label="Other methods, for comparison",
                    info=f"At most {MOST_METHODS}."
                    if captum
                    else "They need captum: pip install 'coda-fast[evaluation]'",
                    elem_id="coda-methods",
                )
                save = gr.Button("Save the report of this picture", elem_id="coda-report")
                saved = gr.Textbox(visible="hidden")
            with gr.Column(scale=3, min_width=300):
                view = gr.HTML(_EMPTY, js_on_load=None, apply_default_css=False, elem_id="coda-view")
        plain["show_progress_on"] = view
        inputs, outputs = [picture, network, methods], [picture, view]
        forget = f"() => [null, {json.dumps(_EMPTY)}]"  # what was shown before is of another picture
        explain = answers.in_words(answers.picture, picture)
        given = picture.input(explain, inputs, outputs, api_name="explain", **plain)
        given.success(None, js=_SHOW)
        given.failure(None, None, outputs, js=forget)  # the file has been deleted
        for choice in (network, methods):
            again = answers.in_words(answers.again, picture)
            choice.input(again, inputs, outputs, api_visibility="private", **plain)
        if photographs:
            chosen = [examples, network, methods]
            example = answers.in_words(answers.example, examples)
            examples.click(example, chosen, outputs, api_name="example", **plain).success(None, js=_SHOW)
        if video:
            shown = answers.in_words(answers.video, film)
            given = film.input(shown, [film, network], [film, view], api_name="video", **plain)
            given.success(None, js=_SHOW)
            given.failure(None, None, [film, view], js=forget)
        report_of = answers.in_words(answers.report, picture)
        save.click(report_of, inputs, saved, api_name="report", **plain).success(None, saved, None, js=_SAVE)
    page.answers = answers
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page
