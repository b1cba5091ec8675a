"""The exact explanation of a picture in onnxruntime, without PyTorch and without coda_fast:

coda-fast export coda_xs_digits --explain                           # writes coda_xs_digits.onnx
python examples/onnx_explanation.py coda_xs_digits.onnx digit.png   # writes digit_contributions.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_picture(path: Path, rules: dict) -> np.ndarray:
    """[1, C, H, W], float32 in [0, 1], by the rules in the file of the network: upright, transparency on
    white, the shorter side resized, the middle cropped. (16-bit grey is not supported here.)
    """
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if rules["channels"] == 1 else "RGB")
    shorter, resize, crop = min(picture.size), rules["resize"], rules["crop"]
    if resize and shorter != resize:
        size = [resize if length == shorter else int(resize * length / shorter) for length in picture.size]
        picture = picture.resize(size, Image.Resampling[rules["interpolation"].upper()])
    if crop:
        left, top = (round((length - crop) / 2) for length in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(picture, np.float32) / 255
    return pixels.reshape(*pixels.shape[:2], rules["channels"]).transpose(2, 0, 1)[None]


def main(network: str, picture: Path) -> None:
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    image, bias = read_picture(picture, json.loads(about["preprocessing"])), float(about["logit_bias"])
    target = 0
    for _ in range(2):  # the first call finds the most likely class, the second explains it
        logits, maps = session.run(None, {"images": image, "target": np.array([target])})
        target = int(logits.argmax())
    logit, total = float(logits[0, target]), float(maps.sum(dtype=np.float64))
    name = json.loads(about["class_names"])[target] if "class_names" in about else f"class {target}"
    print(f"{picture}: {name}, probability {1 / (1 + np.exp(-logit)):.1%}")
    print(f"logit          {logit:+.6f}")
    print(f"map + bias     {total + bias:+.6f}  ({total:+.6f} of {maps[0].size} pixels, {bias:+.6f})")
    print(f"difference     {abs(total + bias - logit):.1e}")
    # red speaks for the class, blue against it; the colour scale covers 99.5 % of the pixels
    strength = np.clip(maps[0] / (np.percentile(np.abs(maps), 99.5) or 1), -1, 1)[..., None]
    colours = 255 + np.abs(strength) * (np.where(strength < 0, [0, 0, 255], [255, 0, 0]) - 255)
    output = f"{picture.stem}_contributions.png"
    Image.fromarray(np.rint(colours).astype(np.uint8)).save(output)
    print(f"picture        {output}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
