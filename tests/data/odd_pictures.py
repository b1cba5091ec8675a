"""Images as users have them: rotated by EXIF in all eight ways, of every depth and colour mode, transparent,
tiny, very long, damaged.
"""

import io

import numpy as np
from PIL import Image

UPRIGHT = np.zeros((24, 40, 3), np.uint8)  # its corners differ, so that they show every rotation
UPRIGHT[:12, :20], UPRIGHT[:12, 20:], UPRIGHT[12:, :20], UPRIGHT[12:, 20:] = (
    (200, 40, 40),
    (40, 200, 40),
    (40, 40, 200),
    (220, 220, 60),
)
# how the pixels are stored for each EXIF orientation, according to EXIF's definition of where row 0 and
# column 0 are seen
STORED = {
    1: lambda p: p,  # row 0 at the top, column 0 at the left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.transpose(1, 0, 2),  # left, top
    6: lambda p: p[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda p: p[::-1].transpose(1, 0, 2),  # left, bottom
}


def file_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation, format="JPEG", tag=None, pixels=UPRIGHT):
    """The bytes of an image that shows ``pixels`` when its EXIF orientation is applied; ``tag`` is written
    instead of the orientation.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation if tag is None else tag
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](pixels)))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    return file_of(stored, format, exif=exif.tobytes(), **options.get(format, {}))


def odd_files(seed=0):
    """{name: bytes} with an image of each kind. Those that cannot be read have names that start with
    ``broken``.
    """
    generator = np.random.default_rng(seed)

    def noise(height, width, channels=3):
        coarse = generator.integers(0, 256, (4, 5, channels), dtype=np.uint8)
        image = Image.fromarray(coarse.squeeze() if channels == 1 else coarse)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

    colour, grey = noise(50, 70), noise(40, 60, 1)
    alpha = np.linspace(0, 255, 70).astype(np.uint8)[None].repeat(50, 0)
    palette = Image.fromarray(colour).quantize(16)
    found = {f"turned_{i}.jpg": turned(i, "JPEG", pixels=noise(44, 60)) for i in range(1, 9)}
    found |= {
        "plain.jpg": file_of(Image.fromarray(colour), "JPEG", quality=90),
        "progressive.jpg": file_of(Image.fromarray(noise(90, 64)), "JPEG", progressive=True, quality=90),
        "large.jpg": file_of(Image.fromarray(noise(300, 400)), "JPEG", quality=90),
        "cmyk.jpg": file_of(Image.fromarray(colour).convert("CMYK"), "JPEG", quality=95),
        "grey.jpg": file_of(Image.fromarray(grey), "JPEG", quality=90),
        "grey16.png": file_of(Image.fromarray(grey.astype(np.uint16) * 257)),
        "deep.tiff": file_of(Image.fromarray(grey.astype(np.uint16) * 251), "TIFF"),
        "float.tif": file_of(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "clear.png": file_of(Image.fromarray(np.dstack([colour, alpha]))),
        "clear_grey.png": file_of(Image.fromarray(np.dstack([colour[..., 0], alpha]))),
        "palette.png": file_of(palette),
        "palette_clear.png": file_of(palette, transparency=3),
        "one_bit.png": file_of(Image.fromarray(grey).convert("1")),
        "moving.gif": file_of(
            palette, "GIF", save_all=True, append_images=[Image.fromarray(noise(50, 70)).quantize(16)]
        ),
        "moving.webp": file_of(
            Image.fromarray(colour),
            "WEBP",
            save_all=True,
            append_images=[Image.fromarray(noise(50, 70))],
            lossless=True,
        ),
        "speck.png": file_of(Image.fromarray(noise(1, 1))),
        "strip.png": file_of(Image.fromarray(noise(3, 900))),
        "tower.bmp": file_of(Image.fromarray(noise(700, 2)), "BMP"),
        "small.ppm": file_of(Image.fromarray(noise(9, 7)), "PPM"),
        "broken_truncated.jpg": file_of(Image.fromarray(noise(200, 300)), "JPEG", quality=95)[:4000],
        "broken_text.png": b"not a picture",
    }
    return found
