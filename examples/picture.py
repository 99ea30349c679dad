"""What the examples ask about: an image of coloured letters with codes, and questions whose answers are known."""

from __future__ import annotations

import argparse
import base64
import io

from PIL import Image

from vlcache_sgl.evaluation.tasks.receipts import Receipt, make_receipt


def draw(seed: int = 7) -> Receipt:
    """An image of 24 x 24 cells, which the bundled model sees as 576 tokens; put yours in its place."""
    return make_receipt(seed, 24, 24)


def data_url(image: Image.Image) -> str:
    """The image as a URL that holds it, which is how the OpenAI protocol takes images that are not on the web."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def server_url() -> str:
    """`--url` of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of a server started with --kv-policy")
    url: str = parser.parse_args().url
    return url
