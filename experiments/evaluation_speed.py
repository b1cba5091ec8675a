"""Evaluation in batches compared with one image and one class at a time, on the same device, in turns.

python -m experiments.evaluation_speed       bench/results/evaluation_speed.json
"""

from __future__ import annotations

import json

import torch

from bench import measure, results
from coda_fast import create_model
from coda_fast.evaluation import pixel_removal
from coda_fast.evaluation.localisation import canvases, cell_shares

RESULTS = results.FOLDER / "evaluation_speed.json"


def localisation_in_batches(model, grids, classes, side):
    return cell_shares(model.explain(grids, classes).contribution_map, side)


def localisation_one_by_one(model, grids, classes, side):
    """As in the published implementation: every class of every grid separately."""
    rows = []
    for grid, row in zip(grids, classes, strict=True):
        rows.append(torch.stack([model.explain(grid[None], int(c)).contribution_map[0, 0] for c in row]))
    return cell_shares(torch.stack(rows), side)


def removal_in_batches(model, images, targets, points):
    return pixel_removal(model, images, targets, points=points).probabilities


def removal_one_by_one(model, images, targets, points):
    """Every mask of every image separately."""
    rows = []
    for image, target in zip(images, targets, strict=True):
        rows.append(
            pixel_removal(
                model, image[None], target[None], points=points, batch_size=1, attribution_batch=1
            ).probabilities
        )
    return torch.cat(rows)


def cases(device):
    """(name, batched, one by one, arguments): the digits network, and S-CoDA with fewer images. Random
    weights take as long as trained ones.
    """
    torch.manual_seed(0)
    for name, side, size, channels, grids, points in (
        ("coda_xs_digits", 2, 8, 1, 32, 17),
        ("coda_s_cifar10", 3, 32, 3, 1, 17),
    ):
        model = create_model(name).to(device).eval()
        images = torch.rand(grids, side**2, channels, size, size, device=device)
        classes = torch.stack([torch.randperm(10)[: side**2] for _ in range(grids)]).to(device)
        canvas = canvases(images, side)
        yield (
            f"localisation {side} x {side}, {name}",
            localisation_in_batches,
            localisation_one_by_one,
            (model, canvas, classes, side),
        )
        yield (
            f"pixel removal, {name}",
            removal_in_batches,
            removal_one_by_one,
            (model, images[:, 0], classes[:, 0], points),
        )


def run() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, batched, single, arguments in cases(device):
        # both give the same numbers
        torch.testing.assert_close(batched(*arguments), single(*arguments), rtol=1e-3, atol=1e-5)
        runners = {
            key: measure.Runner([arguments], function)
            for key, function in (("batched", batched), ("single", single))
        }
        found = measure.in_turn(runners, device, 3.0)
        low, middle, high = measure.ratios(found["single"], found["batched"])
        ms = {f"{key}_ms": round(measure.quantiles(m.host_us)[1] / 1e3, 2) for key, m in found.items()}
        rows.append({"case": name, **ms, "speedup": [round(v, 2) for v in (low, middle, high)]})
        print(rows[-1], flush=True)
    return {**results.environment(device), "rows": rows}


def table() -> str:
    """Markdown of the stored results."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| | one at a time, ms | batched, ms | faster by |", "|---|---|---|---|"]
    for row in stored["rows"]:
        low, middle, high = row["speedup"]
        lines.append(
            f"| {row['case']} | {row['single_ms']} | {row['batched_ms']} | {middle:.1f}x ({low:.1f} to "
            f"{high:.1f}) |"
        )
    where = (
        f"{stored['device']}, {stored['threads']} threads, torch {stored['torch']}; commit "
        f"{stored['commit']}, {stored['date']}."
    )
    return "\n".join([*lines, "", f"Median turn by turn (20 to 80 %). {where}"])


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    print(table())
