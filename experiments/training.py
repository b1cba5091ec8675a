"""The cost of training on this machine: decoding compared with the network that consumes the images, and a
training step compared with the peers.

python -m experiments.training
    bench/results/training.json (a minute)
"""

from __future__ import annotations

import functools
import io
import json
import time

import numpy as np
import torch
import torch.nn.functional as F

from bench import measure, peers, results
from coda_fast import create_model

RESULTS = results.FOLDER / "training.json"
BATCH = 64
PROVIDERS = {"coda_fast": None, "materialising": peers.materialising, "algebraic": peers.algebraic}


def photograph() -> bytes:
    """A JPEG of the size and detail of an ImageNet photograph: noise at all scales, 500 x 375 pixels, quality
    90.
    """
    from PIL import Image

    generator, pixels = np.random.default_rng(0), np.zeros((375, 500, 3))
    for octave in range(1, 8):
        coarse = generator.normal(size=(2**octave, 2**octave, 3)) / octave
        coarse = torch.from_numpy(coarse).permute(2, 0, 1)[None]
        pixels += F.interpolate(coarse, (375, 500), mode="bilinear")[0].permute(1, 2, 0).numpy()
    pixels = np.clip(128 + 40 * pixels, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decoding(seconds: float = 3.0) -> list[dict]:
    """Images per second of one core, for each kind of decoding."""
    # imported here, because the tables are also printed without the extra "train"
    from coda_fast.data import Preprocessing
    from coda_fast.train.augmentation import Augmentation

    photo, rows, wanted = photograph(), [], Preprocessing(3, 256, 240)
    decoders = {
        "decode, resize 256, crop 240": lambda generator: wanted.pixels(photo),
        "the same, a random crop, RandAugment (n = 2)": functools.partial(
            Augmentation(wanted, randaugment=(2, 10)).pixels, photo
        ),
        "crop of 25 to 100 % of the area, RandAugment": functools.partial(
            Augmentation(wanted, (0.25, 1.0), (2, 10)).pixels, photo
        ),
    }
    for name, decode in decoders.items():
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            decode(np.random.default_rng(count))
            count += 1
        rows.append(
            {"work": name, "images_per_second_per_core": round(count / (time.perf_counter() - begun), 1)}
        )
    return [*rows, {"photograph_bytes": len(photo)}]


def step(recipe_name: str, batch: int, providers=PROVIDERS):
    """(runners by provider, parameters): a whole training step on uint8 images, as the recipe does it."""
    from coda_fast.train.recipes import load_recipe

    recipe, runners = load_recipe(recipe_name), {}
    for provider, layer in providers.items():
        torch.manual_seed(0)
        model = create_model(recipe.model.name, **recipe.model.arguments())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
        size = model.image_size

        def train(images, labels, model=model, optimizer=optimizer, layer=layer):
            x = images.float().div_(255)
            if layer is None:
                logits = model(x)
            else:
                x = model.encoder(x)
                for m in model.layers:
                    x = layer(x, m.reduction_weight, m.weight, m.bias, m.stride, m.padding)
                logits = model.head(x)
            loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, model.num_classes).float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(model.num_classes, (batch,), generator=generator)
        runners[provider] = measure.Runner([(images, labels)], train)
    return runners, sum(p.numel() for p in model.parameters())


def run() -> dict:
    device = torch.device("cpu")
    rows = []
    for name, batch, seconds in (("cifar10-xs", BATCH, 4.0), ("cifar10-s", 4, 4.0)):
        runners, parameters = step(name, batch)
        first = {provider: float(runner()) for provider, runner in runners.items()}
        if max(first.values()) - min(first.values()) > 1e-4 * abs(first["materialising"]):
            raise RuntimeError(f"{name}: expected the same loss of all, got {first}")
        found = measure.in_turn(runners, device, seconds)
        medians = {provider: measure.quantiles(m.host_us)[1] for provider, m in found.items()}
        row = {"recipe": name, "batch": batch, "parameters": parameters}
        row["images_per_second"] = {provider: round(1e6 * batch / us, 1) for provider, us in medians.items()}
        for peer in ("materialising", "algebraic"):
            row[f"speedup_on_{peer}"] = [round(v, 2) for v in measure.ratios(found[peer], found["coda_fast"])]
        rows.append(row)
        print(row, flush=True)
    runners, _ = step("imagenet100-l", 1, {"coda_fast": None})
    found = measure.in_turn(runners, device, 4.0)["coda_fast"]
    consumed = round(1e6 / measure.quantiles(found.host_us)[1], 2)
    return {
        **results.environment(device),
        "rows": rows,
        "decoding": decoding(),
        "imagenet100_l_images_per_second": consumed,
    }


def table() -> str:
    """Markdown of the stored results."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [
        "| training step, images/s | coda_fast | as published (w materialised) | algebraic | faster than "
        "published | than algebraic |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in stored["rows"]:
        rates = " | ".join(f"{row['images_per_second'][p]:.4g}" for p in PROVIDERS)
        gains = []
        for peer in ("materialising", "algebraic"):
            low, middle, high = row[f"speedup_on_{peer}"]
            gains.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        lines.append(
            f"| {row['recipe']}, batch {row['batch']}, {row['parameters']:,} parameters | {rates} | "
            f"{gains[0]} | {gains[1]} |"
        )
    lines += ["", "| decoding a JPEG of 500 x 375, one core | images/s |", "|---|---|"]
    lines += [
        f"| {row['work']} | {row['images_per_second_per_core']:.0f} |"
        for row in stored["decoding"]
        if "work" in row
    ]
    lines += [
        "",
        f"imagenet100-l consumes {stored['imagenet100_l_images_per_second']} images/s on this CPU. Median "
        "turn by turn (20 to 80 %); "
        f"{stored['device']}, {stored['threads']} threads, torch {stored['torch']}; commit "
        f"{stored['commit']}, {stored['date']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    print(table())
