"""Play with a model in the browser: draw faces, mix two, redo a part of one, turn a picture into one.

    python -m animeface_pipeline.app
    python -m animeface_pipeline.app anime-faces
    python -m animeface_pipeline.app user/anime-faces --server_port 8000

Without a model, the small one is taken that comes with the package. It needs the extra: pip install
"animeface-pipeline[demo]". The page is at http://127.0.0.1:7860, in English or Chinese as the browser prefers. Only
this machine can open it, unless --server_name says otherwise (0.0.0.0: everyone who can reach it). Requests wait in a
queue for their turn; uploads and results are in a temporary folder that goes with the page.

As a Hugging Face Space: this file as app.py, a requirements.txt that installs this package with [demo], and a variable
ANIMEFACE_MODEL with the model's name on the Hub (without it: the small model).
"""

import argparse
import importlib.util
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from animeface_pipeline import EMBEDDED_MODEL
from animeface_pipeline.cli import BadInput, OneLineParser, command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    from animeface_pipeline.generate import DTYPES, MODEL_HELP, parse_device

    parser = OneLineParser(description=__doc__, prog="python -m animeface_pipeline.app")
    model = os.environ.get("ANIMEFACE_MODEL") or str(EMBEDDED_MODEL)
    parser.add_argument("model", nargs="?", default=model, help=MODEL_HELP)
    parser.add_argument("--server_name", help="the address to listen on (default: 127.0.0.1, or GRADIO_SERVER_NAME)")
    parser.add_argument(
        "--server_port", type=parse_port, help="default: the first free one from 7860, or GRADIO_SERVER_PORT"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="the network's precision; default: float32")
    parser.add_argument("--device", type=parse_device, help="cpu, cuda, mps, … (default: the best one there is)")
    parser.set_defaults(compile=False, scheduler=None, num_inference_steps=1)
    return parser.parse_args(argv)


def parse_port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, not {text}")
    return int(text)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise BadInput('the package gradio is missing: pip install "animeface-pipeline[demo]"')
    with tempfile.TemporaryDirectory(prefix="animeface-") as folder:
        # Read when Gradio is imported: everything that it writes goes there, and nothing is reported to anyone.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        serve(args, Path(folder))


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the model and answer until Ctrl-C or SIGTERM, either of which leaves nothing behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from PIL import Image

    from animeface_pipeline.generate import load_pipeline
    from animeface_pipeline.page import LAUNCH, build_page
    from animeface_pipeline.picture_rules import MAX_PIXELS

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many: for what Gradio itself decodes
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    page = build_page(pipe, name, folder)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        page.launch(server_name=args.server_name, server_port=args.server_port, **LAUNCH)
    except OSError as error:
        raise BadInput(f"--server_port {args.server_port}: {error}") from error


if __name__ == "__main__":
    main()
