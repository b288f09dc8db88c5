"""`mimdit-demo`: a page to restore pictures in the browser."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mimdit.cli.arguments import add_device, add_model, new_parser, number
from mimdit.cli.interrupts import Interrupts
from mimdit.cli.model import StopError, load
from mimdit.cli.studio import Stopped, Studio, sentence
from mimdit.errors import first_line
from mimdit.image_io import READ_SUFFIXES

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MOST_STEPS = 100
# Seconds between cleanings of uploads and results, and how old they become.
_CLEANING = (300, 1800)
# Fonts of the visitor's system: a page that is safe by default fetches nothing from elsewhere.
_FONTS = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
_INTRO = "# Restore a photograph\nBlur, noise, haze, rain, low light, and mixtures of them."
_ALONE = " Pictures stay on this computer."


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mimdit-demo`."""
    p = new_parser(
        "mimdit-demo", "A page to restore pictures in the browser: upload, compare, download."
    )
    add = p.add_argument
    add_model(add)
    add_device(add)
    add(
        "--host",
        type=_address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this computer alone); 0.0.0.0 lets "
        "everyone on the network use the page",
    )
    add(
        "--port",
        type=number(int, 0, 65535),
        default=7860,
        metavar="N",
        help="0: any that is free (default: 7860)",
    )
    add(
        "--max-megapixels",
        type=number(float, 0.01, 1000),
        default=16,
        metavar="N",
        help="larger pictures are refused (default: 16)",
    )
    add(
        "--max-file-mb",
        type=number(float, 0.01, 10_000),
        default=64,
        metavar="N",
        help="larger files are refused (default: 64)",
    )
    add(
        "--queue",
        type=number(int, 1, 10_000),
        default=32,
        metavar="N",
        help="requests that may wait; more are told to come back (default: 32)",
    )
    add("--open", action="store_true", help="open the page in a browser")
    # What loading a model reads besides.
    p.set_defaults(engine=None, experts=None, accelerate=True)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    args = build_parser().parse_args(argv)
    with Interrupts() as interrupts:
        try:
            with tempfile.TemporaryDirectory(prefix="mimdit-demo-") as folder:
                page = serve(args, Path(folder))
                try:
                    interrupts.check()
                    page.block_thread()
                finally:
                    page.close(verbose=False)
        # The latter of a disk without room for uploads.
        except (StopError, OSError) as error:
            if not interrupts.asked:
                print(f"mimdit-demo: {first_line(error)}", file=sys.stderr)
                return 1
        except KeyboardInterrupt:
            pass
    return 0


def serve(args: argparse.Namespace, folder: Path) -> Any:
    """The page, answering already. folder: for uploads and results.

    Raises StopError where Gradio, the model or the port cannot be had.
    """
    # Read when Gradio is loaded, or at each upload.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "page")
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise StopError(
            f"the page needs Gradio ({first_line(error)}); pip install 'mimdit[demo]'"
        ) from error
    pipe = load(args)
    pipe.set_progress_bar_config(disable=True)
    # Not where the page keeps its files: what lies there is not copied when it is shown.
    work = folder / "work"
    work.mkdir()
    studio = Studio(pipe, work, int(args.max_megapixels * 1e6), _MOST_STEPS)
    page = build_page(studio, args)
    page.queue(max_size=args.queue, default_concurrency_limit=1)
    theme = gradio.themes.Default(font=_FONTS, font_mono=_MONO)
    try:
        page.launch(
            server_name=args.host,
            # Without a port Gradio would take the next free one, silently.
            server_port=args.port or _free_port(args.host),
            inbrowser=args.open,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=int(args.max_file_mb * 1e6),
            theme=theme,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise StopError(
            f"{args.host}:{args.port}: cannot listen there ({first_line(error)}); use another "
            "--port or --host"
        ) from error
    print(f"mimdit-demo: {page.local_url} (Ctrl-C stops it)", flush=True)
    if args.host not in _LOOPBACK:
        print(
            f"mimdit-demo: --host {args.host}: everyone who reaches this computer can use the page",
            file=sys.stderr,
        )
    return page


def build_page(studio: Studio, args: argparse.Namespace) -> Any:
    """The page, not yet answering: a `gradio.Blocks`."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    def failed(path: str | None, error: Exception) -> Exception:
        if args.debug:
            import traceback

            traceback.print_exception(error)
        return gr.Error(sentence(path, error), duration=None, print_exception=False)

    def look(path: str | None) -> Iterator[tuple[Any, ...]]:
        if path is None:
            yield None, ""
            return
        try:
            for shown, text in studio.look(path):
                yield (shown, shown), text
        except Exception as error:
            raise failed(path, error) from None

    def restore(
        path: str | None,
        strength: float,
        steps: int,
        seed: int | None,
        color_fix: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, ...]]:
        if path is None:
            raise gr.Error("Choose a picture first.", print_exception=False)

        def passed(done: int, total: int) -> None:
            progress((done, total), desc="restoring", unit="passes")

        # An emptied field has no seed.
        options = (int(steps), float(strength), int(seed or 0), color_fix)
        visitor = str(request.session_hash)
        try:
            for out in studio.restore(path, visitor, passed, *options):
                download = gr.DownloadButton(value=out.result, interactive=True)
                yield out.shown, out.facts, download, out.weights, out.chart
        except Stopped:
            raise gr.Error("Stopped.", duration=5, print_exception=False) from None
        except Exception as error:
            raise failed(path, error) from None

    def stop(request: gr.Request) -> str:
        studio.stop(str(request.session_hash))
        return "Stopped."

    def leave(request: gr.Request) -> None:
        studio.stop(str(request.session_hash))

    with gr.Blocks(
        title="mimdit", analytics_enabled=False, delete_cache=_CLEANING, fill_width=True
    ) as page:
        gr.Markdown(_INTRO + (_ALONE if args.host in _LOOPBACK else ""))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.File(
                    label=f"Picture, up to {args.max_megapixels:g} megapixels and "
                    f"{args.max_file_mb:g} MB",
                    file_types=sorted(READ_SUFFIXES),
                    type="filepath",
                    height=140,
                    elem_id="picture",
                )
                strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", info="0 keeps the input")
                steps = gr.Slider(
                    0, _MOST_STEPS, 0, step=1, label="Steps", info="0: what the model recommends"
                )
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                colours = gr.Radio(
                    ["none", "adain", "wavelet"], value="none", label="Take the input's colours"
                )
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", min_width=90, elem_id="restore")
                    cancel = gr.Button("Cancel", min_width=90, elem_id="cancel")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(
                    label="Before and after",
                    type="filepath",
                    interactive=False,
                    elem_id="slider",
                    max_height=720,
                )
                facts = gr.Markdown(elem_id="facts")
                download = gr.DownloadButton(
                    "Download the whole picture", interactive=False, elem_id="download"
                )
                bars = gr.Label(
                    label="How much each group of experts counts",
                    show_heading=False,
                    elem_id="experts",
                )
                with gr.Accordion("Which experts, block by block", open=False):
                    chart = gr.Image(type="filepath", show_label=False, elem_id="chart")
        picture.change(look, picture, [slider, facts], api_visibility="private")
        running = go.click(
            restore,
            [picture, strength, steps, seed, colours],
            [slider, facts, download, bars, chart],
            api_name="restore",
            show_progress_on=[slider],
        )
        cancel.click(stop, None, facts, cancels=[running], queue=False, api_visibility="private")
        page.unload(leave)
    return page


def _address(text: str) -> str:
    """An argparse type; none at all would be every address of this computer."""
    if not text:
        raise argparse.ArgumentTypeError(f"expected an address, got {text!r}")
    return text


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
