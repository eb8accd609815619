"""The process behind decoding.py: reads pictures from its standard input, writes pixels to its standard output.

python -m mim_ray.serving.decode_child MAX_MEMORY_BYTES
"""

from __future__ import annotations

import resource
import sys

from mim_ray.data.transforms import BadImage, PictureFormat, decode_image
from mim_ray.serving.decoding import receive, send


def main() -> None:
    """Answer until the other side is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    send(sink, {}, b"")  # ready
    while (message := receive(source)) is not None:
        header, data = message
        picture = PictureFormat.from_json(header["picture"])
        try:
            pixels = decode_image(data, picture, header["max_bytes"], header["max_pixels"])
            send(sink, {}, pixels.tobytes())
        except BadImage as error:
            send(sink, {"reason": error.reason, "detail": error.detail}, b"")
        except MemoryError:
            send(sink, {"reason": "image too large", "detail": "decoding it takes more memory than a picture may"}, b"")


if __name__ == "__main__":
    main()
