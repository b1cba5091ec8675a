"""Does the matrix regulariser make maps sparser? Networks are trained on scikit-learn's digits with several
weights (lambda).

python -m experiments.matrix_regulariser     bench/results/matrix_regulariser.json (minutes on two cores)
"""

from __future__ import annotations

import json

import torch

from bench import results
from coda_fast import create_model, demo
from coda_fast.data.digits import digit_tensors
from coda_fast.losses import DynamicMatrixLoss

RESULTS = results.FOLDER / "matrix_regulariser.json"
WEIGHTS, SEEDS, EPOCHS, TEMPERATURE = (0.0, 2.0, 10.0), (0, 1, 2), 8, 40.0


def train(model, data, weight, seed):
    """demo.train with another loss."""
    generator = torch.Generator().manual_seed(seed)
    loss = DynamicMatrixLoss(weight, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, EPOCHS * -(-len(data.train_labels) // 64)
    )
    for _ in range(EPOCHS):
        for index in torch.randperm(len(data.train_labels), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model, data.train_images[index], data.train_labels[index]).total.backward()
            optimizer.step()
            schedule.step()


def gini(values):
    """Inequality of the absolute values of each row, from 0 (all equal) to 1 (one value has everything); [N,
    M] -> mean.
    """
    ranked = values.abs().double().sort(1).values
    count = ranked.shape[1]
    place = torch.arange(1, count + 1, dtype=torch.float64)
    return float(((2 * place - count - 1) * ranked).sum(1).div(count * ranked.sum(1)).mean())


def measure():
    rows = []
    for weight in WEIGHTS:
        for seed in SEEDS:
            data = digit_tensors(seed)
            torch.manual_seed(seed)
            model = create_model(demo.MODEL, temperature=TEMPERATURE)
            train(model, data, weight, seed)
            explained = model.explain(data.test_images, data.test_labels)
            row = {
                "weight": weight,
                "seed": seed,
                "accuracy": float((explained.logits.argmax(1) == data.test_labels).double().mean()),
                "mean_entry": float(explained.dynamic_weight.abs().mean()),
                "gini_linear_map": gini(explained.dynamic_weight.flatten(1)),
                "gini_contribution_map": gini(explained.contribution_map.flatten(1)),
            }
            print(row, flush=True)
            rows.append(row)
    return {
        "model": demo.MODEL,
        "temperature": TEMPERATURE,
        "epochs": EPOCHS,
        **results.environment(torch.device("cpu")),
        "rows": rows,
    }


def table() -> str:
    """Markdown of the stored results: mean over the seeds (smallest to largest)."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    keys = {
        "accuracy": "accuracy",
        "mean_entry": "mean absolute entry of W",
        "gini_linear_map": "Gini index of W",
    }
    keys["gini_contribution_map"] = "Gini index of the contribution map"
    lines = ["| lambda | " + " | ".join(keys.values()) + " |", "|---" * (1 + len(keys)) + "|"]
    for weight in dict.fromkeys(row["weight"] for row in stored["rows"]):
        rows = [row for row in stored["rows"] if row["weight"] == weight]
        cells = ([row[key] for row in rows] for key in keys)
        lines.append(
            f"| {weight:g} | "
            + " | ".join(f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in cells)
            + " |"
        )
    legend = (
        f"{stored['model']} on digits, T = {stored['temperature']:g}, {stored['epochs']} epochs, the true "
        "class of all test images; mean "
        f"over {len({row['seed'] for row in stored['rows']})} seeds (least to most). {stored['device']}, "
        f"torch {stored['torch']}; commit "
        f"{stored['commit']}, {stored['date']}."
    )
    return "\n".join([*lines, "", legend])


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(table())
