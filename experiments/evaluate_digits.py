"""The paper's evaluation on a small scale, on a CPU: networks trained on scikit-learn's digits at a low and a
high temperature, with every attribution method, localisation and pixel removal (some minutes on two cores).

    python -m experiments.evaluate_digits
        bench/results/evaluation_digits.json

DeepLIFT and GB are left out: on a CoDA-Net they are IxG and Grad (tests/test_baselines.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from bench import results
from coda_fast import baselines, create_model, demo
from coda_fast.evaluation.runner import Evaluation, Settings, summary

RESULTS = results.FOLDER / "evaluation_digits.json"
TEMPERATURES, SEEDS, EPOCHS = (1.0, 40.0), (0, 1, 2), 30
# A digit has 8 x 8 pixels, and the published windows of 5 and 9 of 32 pixels would cover most of it, so that
# Occ5 and Occ9 use 2 and 3 pixels
SETTINGS = {"Occ5": {"size": 2, "stride": 1}, "Occ9": {"size": 3, "stride": 1}, "RISE": {"masks": 1000}}
METRICS = {
    "localisation": Settings("localisation", side=2, grids=100),
    "removal": Settings("removal", points=17),
}
IMAGES = {"localisation": None, "removal": 200}


def methods() -> list[str]:
    """All registered methods, but only one of two that are the same on a CoDA-Net."""
    return [name for name in baselines.METHODS if name not in baselines.TWINS]


def evaluate(model, data, folder: Path) -> dict:
    """{metric: {method: summary}}."""
    found = {}
    for metric, settings in METRICS.items():
        images, labels = data.test_images[: IMAGES[metric]], data.test_labels[: IMAGES[metric]]
        evaluation = Evaluation(model, images, labels, settings, folder / metric)
        measured = {}
        for name in methods():
            start = time.perf_counter()
            attribution = baselines.create(name, model, **SETTINGS.get(name, {}))
            measured[name] = evaluation.measure(name, attribution, attribution.settings)
            print(
                f"  {metric} {name}: {summary(measured[name])['mean']:.4f} "
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
        found[metric] = {
            name: {k: round(v, 5) for k, v in summary(value).items()} for name, value in measured.items()
        }
    return found


def measure() -> dict:
    rows = []
    for seed in SEEDS:
        data = demo.digits(seed)
        for temperature in TEMPERATURES:
            torch.manual_seed(seed)
            model = create_model(demo.MODEL, temperature=temperature, class_names=data.class_names)
            demo.train(model, data, epochs=EPOCHS, seed=seed)
            with torch.no_grad():
                accuracy = float((model(data.test_images).argmax(1) == data.test_labels).double().mean())
            print(f"seed {seed}, T = {temperature:g}: accuracy {accuracy:.4f}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                rows.append(
                    {
                        "seed": seed,
                        "temperature": temperature,
                        "accuracy": accuracy,
                        **evaluate(model, data, Path(folder)),
                    }
                )
    stamp = results.environment(torch.device("cpu"))
    return {
        "data": "scikit-learn digits, 8 x 8, a quarter for testing",
        "model": demo.MODEL,
        "epochs": EPOCHS,
        "grids": "2 x 2",
        "settings": SETTINGS,
        **stamp,
        "rows": rows,
    }


def table() -> str:
    """Markdown of the stored results: a row for each method, with the mean over the seeds (smallest to
    largest).
    """
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = stored["rows"]
    measured = rows[0]["localisation"]
    columns = [(t, m) for m in METRICS for t in TEMPERATURES]
    titles = {"localisation": "localisation", "removal": "removal, area"}
    lines = [
        "| method | " + " | ".join(f"{titles[m]}, T = {t:g}" for t, m in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    values = {
        (n, t, m): [r[m][n]["mean"] for r in rows if r["temperature"] == t]
        for n in measured
        for t, m in columns
    }
    for name in sorted(measured, key=lambda n: -sum(values[n, TEMPERATURES[-1], "localisation"])):
        cells = (
            f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})"
            for v in (values[name, t, m] for t, m in columns)
        )
        label = f"Occ, {SETTINGS[name]['size']} px" if name.startswith("Occ") else name
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    accuracy = ", ".join(
        f"T = {t:g}: {min(a):.1%} to {max(a):.1%}"
        for t in TEMPERATURES
        if (a := [r["accuracy"] for r in rows if r["temperature"] == t])
    )
    legend = (
        f"{stored['data']}; {stored['model']}, {stored['epochs']} epochs; 2 x 2 grids (chance 0.25); "
        "removal: least important first, mean "
        f"probability over 0 to 25 %; mean over {len({r['seed'] for r in rows})} seeds (least to most). "
        "Occlusion: windows of 2 "
        f"and 3 pixels in place of the published 5 and 9 of 32; RISE with 1,000 masks. "
        f"Test accuracy {accuracy}. {stored['device']}, torch {stored['torch']}; commit "
        f"{stored['commit']}, {stored['date']}."
    )
    return "\n".join([*lines, "", legend])


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(table())
