"""The exact explanation of a picture in onnxruntime, without PyTorch and without coda_fast:

    coda-fast demo                                                       # or any checkpoint of yours
    coda-fast export coda_demo/coda_demo.safetensors --explain           # writes coda_demo.onnx
    python examples/onnx_explanation.py coda_demo.onnx picture.png       # writes picture_contributions.png

Needs onnxruntime, numpy and pillow. Prints the class, its logit, and the sum of the map with the network's
constant bias: the same number, since the map is the logit, pixel by pixel.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps


def read_picture(path: Path, preprocessing: dict, fixed: tuple[int | str, ...]) -> np.ndarray:
    """[1, C, H, W], float32 in [0, 1], as the network's file says: upright, transparency on white, the
    shorter side resized, the middle cropped; H x W where the network takes that alone. (Grey of 16 bits,
    which Pillow cuts off at 255, is left out here.)
    """
    picture, channels = ImageOps.exif_transpose(Image.open(path)), preprocessing["channels"]
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    method, resize, crop = (
        Image.Resampling[preprocessing["interpolation"].upper()],
        preprocessing["resize"],
        preprocessing["crop"],
    )
    if resize and min(picture.size) != resize:
        shorter = min(picture.size)
        picture = picture.resize(
            [resize if length == shorter else int(resize * length / shorter) for length in picture.size],
            method,
        )
    if crop:
        left, top = (round((length - crop) / 2) for length in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    if all(isinstance(length, int) for length in fixed) and picture.size != fixed[::-1]:
        picture = ImageOps.fit(picture, fixed[::-1], method)
    pixels = np.asarray(picture, np.float32) / 255
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)[None]


def colours(values: np.ndarray, scale: float) -> np.ndarray:
    """Blue (against) over white (nothing) to red (for), saturated at +-``scale``, as RGB bytes."""
    strength = np.clip(values / scale, -1, 1)[..., None]
    full = np.where(strength < 0, [0, 0, 255], [255, 0, 0])
    return np.rint(255 + np.abs(strength) * (full - 255)).astype(np.uint8)


def enlarged(pixels: np.ndarray, height: int) -> Image.Image:
    """Bytes [H, W] or [H, W, 3] as a picture of this height, every pixel a rectangle."""
    width = round(pixels.shape[1] * height / pixels.shape[0])
    return Image.fromarray(pixels).convert("RGB").resize((width, height), Image.Resampling.NEAREST)


def figure(image: np.ndarray, contributions: np.ndarray, title: str, height: int = 320) -> Image.Image:
    """The picture, its contribution map, and the scale of colours, in logits a pixel."""
    # single pixels must not bleach the map: the scale ends where 99.5 % of them do
    scale = float(np.percentile(np.abs(contributions), 99.5)) or 1.0
    pixels = np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    photo = enlarged(pixels[..., 0] if pixels.shape[2] == 1 else pixels, height)
    drawn = enlarged(colours(contributions, scale), height)
    bar = enlarged(colours(np.linspace(scale, -scale, height)[:, None].repeat(20, 1), scale), height)
    gap, top, right = 16, 48, 110
    page = Image.new(
        "RGB", (photo.width + drawn.width + bar.width + 4 * gap + right, height + top + gap), "white"
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    pen.text((gap, gap), title, "black", font)
    x = gap
    for part in (photo, drawn, bar):
        page.paste(part, (x, top))
        pen.rectangle((x - 1, top - 1, x + part.width, top + height), outline="grey")
        x += part.width + gap
    for value, y in ((scale, 0), (0.0, height // 2), (-scale, height - 1)):
        pen.line((x - gap, top + y, x - gap + 5, top + y), "black")
        pen.text((x - gap + 9, top + y), f"{value:+.2g}" if value else "0", "black", font, "lm")
    pen.text((x - gap + 9, top + height // 4), "logits", "black", font, "lm")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", type=Path, help="what coda-fast export --explain wrote")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--target", type=int, help="the class to explain; default: the most likely")
    parser.add_argument("--output", type=Path, help="default: PICTURE_contributions.png, here")
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.network, providers=["CPUExecutionProvider"])
    if [output.name for output in session.get_outputs()] != ["logits", "contribution_map"]:
        parser.error(f"{options.network}: expected a file of coda-fast export --explain")
    about = session.get_modelmeta().custom_metadata_map
    image = read_picture(
        options.picture, json.loads(about["preprocessing"]), tuple(session.get_inputs()[0].shape[2:])
    )

    def explain(target: int) -> tuple[np.ndarray, np.ndarray]:
        logits, contributions = session.run(None, {"images": image, "target": np.array([target], np.int64)})
        return logits[0], contributions[0]

    logits, contributions = explain(options.target or 0)
    if options.target is None:
        logits, contributions = explain(int(logits.argmax()))
    target = int(logits.argmax()) if options.target is None else options.target
    if not 0 <= target < len(logits):
        parser.error(f"--target: expected a class from 0 to {len(logits) - 1}, got {target}")
    name = json.loads(about["class_names"])[target] if "class_names" in about else f"class {target}"
    logit, total, bias = (
        float(logits[target]),
        float(contributions.sum(dtype=np.float64)),
        float(about["logit_bias"]),
    )
    print(f"{options.picture}: {name}, probability {1 / (1 + np.exp(-logit)):.1%}")
    print(f"logit          {logit:+.6f}")
    print(f"map + bias     {total + bias:+.6f}  ({total:+.6f} of {contributions.size} pixels, {bias:+.6f})")
    print(f"difference     {abs(total + bias - logit):.1e}")
    output = options.output or Path(f"{options.picture.stem}_contributions.png")
    figure(
        image, contributions, f"{name}: {total:+.3f} from the pixels {bias:+.3f} bias = logit {logit:+.3f}"
    ).save(output)
    print(f"picture        {output}")


if __name__ == "__main__":
    main()
