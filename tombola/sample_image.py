"""A picture to try the server with: a ship on the sea, drawn rather than shipped as a file."""

import io

from PIL import Image, ImageDraw

SIDE = 256


def draw_sample() -> bytes:
    """PNG, 256x256. The same bytes each time."""
    image = Image.new("RGB", (SIDE, SIDE), "#b9d3e6")
    draw = ImageDraw.Draw(image)
    for row in range(150, SIDE):  # the sea, darker towards us
        shade = (row - 150) // 4
        draw.line((0, row, SIDE, row), fill=(52 - shade, 96 - shade, 140 - shade))
    draw.polygon(((24, 138), (236, 138), (206, 184), (52, 184)), fill="#7a1f1b")
    draw.polygon(((24, 138), (236, 138), (232, 148), (30, 148)), fill="#e8e4da")
    draw.rectangle((92, 98, 188, 138), fill="#f4f1e8")
    draw.rectangle((112, 70, 160, 98), fill="#e3ded0")
    draw.rectangle((126, 34, 146, 70), fill="#20262c")
    draw.line((60, 138, 60, 62), fill="#3a3a3a", width=4)
    for left in range(100, 180, 16):
        draw.rectangle((left, 110, left + 8, 120), fill="#2d4a63")
    draw.line((20, 188, 240, 188), fill="#dfe9ef", width=3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
