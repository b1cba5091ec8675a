"""The parts of the benchmark: peers, timing in turns, memory, error, rows, guard, tables."""

import dataclasses
import itertools
import json
import time

import pytest
import torch
from support import LAYERS, Golden

from bench import (
    cases,
    guard,
    laboratory,
    layers,
    measure,
    peers,
    plots,
    providers,
    results,
    tables,
    yardsticks,
)
from bench.measure import Measurement, Runner
from coda_fast.functional import dau_conv2d
from tools import documents

CPU = torch.device("cpu")
SMALL = cases.Layer("X1", 3, 4, 5, 3, 2, 6, 2)
ENVIRONMENT = {
    "device": "a machine",
    "driver": None,
    "torch": "2",
    "triton": "3",
    "python": "3",
    "threads": 2,
    "commit": "c",
    "date": "d",
}


# -- peers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", providers.PEERS)
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if Golden(name).meta["bias"] and Golden(name).meta["norm"] == "squash"]
)
def test_peers_compute_the_published_layer(name, peer):
    """Output and all gradients equal those of the published implementation."""
    golden = Golden(name)
    meta, function = golden.meta, providers.PEERS[peer].layer
    tensors = [t.requires_grad_() for t in (golden["input"], *golden.layer("param"))]
    y = function(*tensors, meta["s"], meta["p"])
    grads = torch.autograd.grad(y, tensors, golden["grad_output"])
    for found, expected in zip(
        (y, *grads), (golden["output"], golden["grad/x"], *golden.layer("grad")), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("peer", providers.PEERS)
def test_peers_explain(peer):
    """The gradient in explanation mode equals that of the layer in explanation mode."""
    x, B, A, b, upstream = (t.detach().double() for t in layers.layer_inputs(SMALL, torch.float32, CPU)[0])
    x.requires_grad_()
    expected = torch.autograd.grad(
        dau_conv2d(x, B, A, b, 2, 1, detach=True, backend="reference"), [x], upstream
    )[0]
    found = torch.autograd.grad(providers.PEERS[peer].layer(x, B, A, b, 2, 1, True), [x], upstream)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def toy(x, B, A, b, stride=1, padding=0, detach=False):
    """The formula, once more."""
    return peers.materialising(x, B, A, b, stride, padding, detach)


@pytest.fixture
def registered():
    """A peer that is registered for one test."""
    peers.peer("toy", family="toyish", style=("#009E73", "d", "a toy"))(toy)
    yield
    del peers.PEERS["toy"]


def test_a_registered_peer_is_found_everywhere(registered, tmp_path):
    """The decorator alone adds a peer to the measurements of layers, networks and growth, eager and compiled,
    to rows, tables and plots, and to the documents.
    """
    gpu, preset = torch.device("cuda"), cases.preset("gpu", int(80e9))
    for case, mode in ((preset.layers[5], cases.FORWARD), (preset.networks[0], cases.STEP)):
        compiled = preset.compiled_in(case, mode)
        assert {"toy", "toy compiled"} < set(providers.names(case, mode, gpu, compiled))
    assert "toy" in providers.names(dataclasses.replace(SMALL, axis="batch"), cases.TRAINING, CPU)
    assert "toy" in cases.preset("smoke").compiled[cases.TRAINING]

    lab, names = laboratory.Laboratory(CPU, "float32", 0.0, (1, 1)), ["toy", providers.CODA]
    lab._copy = Measurement([1.0], [1.0])
    network = cases.Network("coda_s_cifar10", 1, 8)
    rows = lab.rows(SMALL, cases.TRAINING, lab.measure(SMALL, cases.TRAINING, names))
    rows += lab.rows(network, cases.STEP, lab.measure(network, cases.STEP, names))
    for row in rows:
        assert row["error"] < 1e-4
        assert row["provider"] == "toy" or list(row["speedup"]) == ["toy"]
    text = tables.everything(rows)
    assert "| layer | C, n, r, k, stride, size | toy | coda_fast |" in " ".join(text.split())
    assert "on the fastest algebraic or toyish" in text
    # the row of the network
    assert len([line for line in text.splitlines() if line.startswith("| toy ")]) == 1
    assert plots.styles()["toy"] == ("#009E73", "d", "a toy")
    assert "| toy | The formula, once more. |" in documents.peers().splitlines()
    assert "docs/benchmark.md" in documents.stale()


def undescribed(x, B, A, b, stride=1, padding=0, detach=False):
    return x


@pytest.mark.parametrize(
    ("name", "layer", "error", "message"),
    [
        (providers.ALGEBRAIC, toy, ValueError, "name: expected one that is not taken and not of ours"),
        ("coda_fast too", toy, ValueError, "name: expected one that is not taken and not of ours"),
        ("toy compiled", toy, ValueError, "name: expected one that is not taken and not of ours"),
        ("toy", undescribed, ValueError, "toy: expected a function with a docstring, got none"),
        ("toy", lambda x, B, A, b: x, TypeError, "toy: expected the arguments {'x': None, .*, got .x, B, A"),
    ],
)
def test_what_a_peer_lacks_is_said(name, layer, error, message):
    before = dict(peers.PEERS)
    with pytest.raises(error, match=message):
        peers.peer(name, family="toyish")(layer)
    assert peers.PEERS == before


def test_what_a_yardstick_lacks_is_said():
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'ResNet-50'"):
        yardsticks.yardstick(yardsticks.RESNET)
    with pytest.raises(ValueError, match="Net: expected a function with a docstring, got none"):
        yardsticks.yardstick("Net")(lambda case, mode, dtype, device: ([], None))
    assert "Net" not in yardsticks.YARDSTICKS


@pytest.mark.parametrize("mode", cases.LAYER_MODES)
def test_truth_in_pieces(mode):
    inputs = layers.layer_inputs(SMALL, torch.float32, CPU)[0]
    whole, pieces = (layers.layer_truth(SMALL, mode, inputs, limit) for limit in (1 << 30, 1))
    exact = [t.detach().double().requires_grad_() for t in inputs[:4]]
    y = peers.materialising(*exact, 2, 1, mode == cases.EXPLANATION)
    torch.testing.assert_close(whole[0], y)
    assert len(whole) == {cases.FORWARD: 1, cases.TRAINING: 5, cases.EXPLANATION: 2}[mode]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_providers_share_their_inputs():
    names = providers.names(SMALL, cases.TRAINING, CPU)
    sets = [
        providers.setup(name, SMALL, cases.TRAINING, torch.float32, CPU)[0]
        for name in names
        if name != providers.PRODUCT
    ]
    assert len(sets) == len([peer for peer in peers.PEERS.values() if not peer.recomputes]) + 1 > 2
    # a second call gives the same numbers
    sets.append(layers.layer_inputs.__wrapped__(SMALL, torch.float32, CPU))
    for other in sets[1:]:
        for a, b in zip(sets[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(sets[0][0][0], sets[0][1][0])  # each set has different images


def test_the_preset_of_a_gpu():
    """S-CoDA is measured at batch 256, L-CoDA at 64, or at 16 on a small device. Every provider is named
    once.
    """
    large, small = cases.preset("gpu", int(80e9)), cases.preset("gpu", int(40e9))
    assert [(n.name, n.batch) for n in large.networks] == [
        ("coda_s_cifar10", 256),
        ("coda_l_imagenet100", 64),
    ]
    assert [n.batch for n in small.networks] == [256, 16]
    assert {c.batch for c in large.layers if c.name.startswith("L")} == {64}
    gpu = torch.device("cuda")
    # the first is computed in the generated form
    for case in (large.layers[0], large.layers[5], large.networks[0]):
        for mode in cases.LAYER_MODES if isinstance(case, cases.Layer) else cases.NETWORK_MODES:
            names = providers.names(case, mode, gpu, large.compiled_in(case, mode))
            assert len(set(names)) == len(names)
            assert {
                "algebraic compiled",
                "materialising compiled",
                "coda_fast compiled",
                "coda_fast factored",
            } <= set(names)
            assert ("coda_fast save_contraction" in names) == (
                mode in (cases.TRAINING, cases.STEP) and case != large.layers[0]
            )


@pytest.mark.parametrize("name", [*providers.PEERS, providers.CODA])
def test_providers_compile_whole(name):
    """Forward and backward compile to one graph, as max-autotune on a GPU requires, and give the values of
    the eager function.
    """
    inputs, eager = providers.setup(name, SMALL, cases.TRAINING, torch.float32, CPU)
    function = providers.OURS[name] if name in providers.OURS else providers.PEERS[name].layer
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    x, *parameters, upstream = inputs[0]
    y = compiled(x, *parameters, SMALL.stride, SMALL.padding)
    found = [y, *torch.autograd.grad(y, [x, *parameters], upstream)]
    torch._dynamo.reset()
    for a, b in zip(found, eager(*inputs[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_published_layers():
    found = cases.distinct(cases.layers({"S": 256, "L": 64}))
    assert [c.name for c in found[:7]] == ["S1", "S2", "S3", "S4, S5", "S6", "S7, S8", "S9"]
    assert sum(len(c.name.split(", ")) for c in found) == 18
    s7, l1 = found[5], found[7]
    assert (s7.depth, s7.pixels, l1.depth, l1.pixels) == (576, 16384, 294, 409600)


# -- measuring
# ------------------------------------------------------------------------------------------------------------


def test_in_turn():
    order = []
    runners = {
        "slow": Runner([(0.03,)], lambda seconds: (order.append("slow"), time.sleep(seconds))),
        "broken": Runner([()], lambda: [][1]),
        "fast": Runner([(0.021,)], lambda seconds: (order.append("fast"), time.sleep(seconds))),
    }
    found = measure.in_turn(runners, CPU, 0.0, (3, 5))
    assert found["broken"].missing.startswith("IndexError")
    assert not found["broken"].device_us
    assert order[-6:] == ["slow", "fast"] * 3
    assert all(30e3 <= us for us in found["slow"].device_us)
    assert all(21e3 <= us for us in found["fast"].device_us)
    low, middle, high = measure.ratios(found["slow"], found["fast"])
    assert low <= middle <= high


def test_a_provider_that_fails_later_is_out():
    """A provider that fails after the warm-up loses its measurements, and the others get all their turns."""
    calls = itertools.count()

    def fails_late():
        time.sleep(0.021)
        assert next(calls) < 8, "at last"

    runners = {"late": Runner([()], fails_late), "fine": Runner([()], lambda: time.sleep(0.021))}
    found = measure.in_turn(runners, CPU, 0.0, (9, 9))
    assert (found["late"].missing, found["late"].device_us) == ("AssertionError: at last", [])
    assert len(found["fine"].device_us) == 9
    assert list(runners) == ["fine"]


def test_a_group_that_fails_is_not_measured_again(monkeypatch):
    calls = []
    lab = laboratory.Laboratory(CPU, "float32", 0.0)
    monkeypatch.setattr(lab, "_measure", lambda *a: calls.append(a) or [][1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
            lab.measure(SMALL, cases.FORWARD, [])
    assert len(calls) == 1


def test_no_speedup_where_the_error_is_not_known(monkeypatch):
    """No speed-up is shown if the truth does not fit into memory."""

    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(layers, "layer_truth", full)
    monkeypatch.setattr(laboratory, "COPY_BYTES", {"cpu": 1 << 20})
    lab = laboratory.Laboratory(CPU, "float32", 0.0, (1, 1))
    found = lab.measure(SMALL, cases.FORWARD, [providers.MATERIALISING, providers.CODA, providers.PRODUCT])
    rows = {row["provider"]: row for row in lab.rows(SMALL, cases.FORWARD, found)}
    assert rows[providers.CODA]["p50_us"]
    assert rows[providers.CODA]["speedup"] is None


def test_a_wrong_variant_hides_its_own_speedup_only():
    found = {
        providers.MATERIALISING: Measurement([200.0], [1.0], 1000, 1e-7),
        providers.CODA: Measurement([100.0], [1.0], 100, 1e-7),
        providers.FACTORED: Measurement([50.0], [1.0], 100, 1e-3),
    }
    assert list(laboratory.wrong(found)) == [providers.FACTORED]
    lab = laboratory.Laboratory(CPU, "float32", 0.0)
    lab._copy = Measurement([1e-3], [1e-3])
    rows = {row["provider"]: row for row in lab.rows(SMALL, cases.TRAINING, found)}
    assert rows[providers.CODA]["speedup"][providers.MATERIALISING] == [2.0, 2.0, 2.0]
    assert rows[providers.FACTORED]["speedup"] is None
    # nothing to compare with
    assert laboratory.wrong({providers.CODA: Measurement([1.0], [1.0], 1, 0.5)}) == {}


@pytest.mark.parametrize("mode", cases.NETWORK_MODES)
def test_networks_are_compared_with_float64(mode, monkeypatch):
    """coda_fast and the peers give the results of the network, and a layer that is off by a thousandth is
    found.
    """
    case = cases.Network("coda_s_cifar10", 3, 8)
    lab = laboratory.Laboratory(CPU, "float32", 0.0, (1, 1))
    found = lab.measure(case, mode, [providers.MATERIALISING, providers.CODA])
    assert 0 < found[providers.MATERIALISING].error < 1e-4
    assert 0 < found[providers.CODA].error < 1e-4
    assert not laboratory.wrong(found, 4.0)
    monkeypatch.setitem(providers.OURS, providers.CODA, lambda *a, **k: 1.001 * providers.coda_fast(*a, **k))
    broken = laboratory.Laboratory(CPU, "float32", 0.0, (1, 1)).measure(
        case, mode, [providers.MATERIALISING, providers.CODA]
    )
    assert list(laboratory.wrong(broken, 4.0)) == [providers.CODA]


def test_replace_keeps_other_providers_of_the_same_code(tmp_path):
    """A second pass that measures fewer providers does not remove the rows of the others."""
    path, rows = tmp_path / "machine.jsonl", fake()
    results.replace(path, rows)
    again = [dict(row, p50_us=1.0) for row in rows if row["provider"] in (providers.CODA, providers.PRODUCT)]
    results.replace(path, again)
    found = {row["provider"]: row["p50_us"] for row in results.read(path)}
    assert set(found) == {row["provider"] for row in rows}
    assert (found[providers.CODA], found[providers.MATERIALISING]) == (1.0, 210.0)


@pytest.mark.parametrize("bound", [providers.PRODUCT, providers.COPY])
def test_the_ceiling_is_the_slower_of_two(monkeypatch, bound):
    monkeypatch.setattr(laboratory, "COPY_BYTES", {"cpu": 1 << 20})
    lab = laboratory.Laboratory(CPU, "float32", 0.0, (1, 1))
    least = laboratory.least_bytes(SMALL, cases.FORWARD, 4)
    copy = 1.0 if bound == providers.PRODUCT else 100.0  # microseconds to move the fewest possible bytes
    lab._copy = Measurement([copy * 2 * (1 << 20) / least], [1.0])
    found = {providers.CODA: Measurement([200.0], [200.0]), providers.PRODUCT: Measurement([50.0], [50.0])}
    row = lab.rows(SMALL, cases.FORWARD, found)[0]
    assert (row["bound"], row["ceiling"]) == (bound, {providers.PRODUCT: 0.25, providers.COPY: 0.5}[bound])
    row = lab.copy_row()
    # GB/s
    assert 2e-3 * row["shape"]["bytes"] / row["p50_us"] == pytest.approx(least / copy * 1e-3, rel=1e-3)
    assert all(field in row for field in results.FIELDS)


def test_inputs_rotate():
    seen = []
    runner = Runner([(1,), (2,), (3,)], seen.append)
    for _ in range(6):
        runner()
    assert sorted(seen) == [1, 1, 2, 2, 3, 3]
    assert all(a != b for a, b in itertools.pairwise(seen))


def test_peak_bytes():
    """A temporary tensor of 10 MB, then one of 20 MB that is returned together with 5 MB."""
    float32 = 4

    def function():
        gone = torch.empty(10_000_000 // float32)
        del gone
        kept = [torch.empty(20_000_000 // float32), torch.empty(5_000_000 // float32)]
        return kept

    assert measure.peak_bytes(function, CPU)[0] == pytest.approx(25e6, abs=1e5)
    assert measure.peak_bytes(lambda: 7, CPU)[1] == 7
    assert measure.peak_bytes(lambda: None, CPU)[0] < 1e5


def test_quantiles():
    assert measure.quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert measure.quantiles(list(range(11))) == (2, 5, 8)


def test_error():
    truth = [torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)]
    assert measure.error([torch.ones(4), torch.full((4,), 2.0)], truth) == 0
    assert measure.error([torch.ones(4), torch.full((4,), 2.2)], truth) == pytest.approx(0.1, rel=1e-6)
    assert measure.error([torch.ones(4), torch.tensor([2.0, 2.0, float("nan"), 2.0])], truth) == float("inf")


# -- rows
# ------------------------------------------------------------------------------------------------------------


def fake(verified=True, error=1e-7):
    """A laboratory with one measured group: coda_fast takes half the time of the formula, and a third more
    than the product.
    """
    lab = laboratory.Laboratory(CPU, "float32", 0.0, verified=lambda: verified)
    lab._copy = Measurement([1e-3], [1e-3])  # practically no time
    found = {
        providers.MATERIALISING: Measurement([200.0, 220.0, 210.0], [1.0] * 3, 1000, 1e-7),
        providers.ALGEBRAIC: Measurement(missing="out of memory"),
        providers.CODA: Measurement([100.0, 110.0, 105.0], [1.0] * 3, 100, error),
        providers.PRODUCT: Measurement([75.0, 82.5, 78.75], [1.0] * 3),
    }
    return lab.rows(SMALL, cases.TRAINING, found)


def test_rows():
    rows = {row["provider"]: row for row in fake()}
    assert all(field in row for row in rows.values() for field in results.FIELDS)
    ours = rows[providers.CODA]
    assert ours["speedup"] == {providers.MATERIALISING: [2.0, 2.0, 2.0]}
    assert ours["ceiling"] == pytest.approx(0.75)
    assert (ours["p50_us"], ours["peak_bytes"], ours["verified"]) == (105.0, 100, True)
    assert rows[providers.ALGEBRAIC]["p50_us"] is None
    assert rows[providers.ALGEBRAIC]["missing"] == "out of memory"
    assert json.loads(json.dumps(list(rows.values()))) == list(rows.values())


@pytest.mark.parametrize(("verified", "error"), [(False, 1e-7), (True, 1e-5), (True, float("inf"))])
def test_no_speedup_without_correctness(verified, error):
    rows = {row["provider"]: row for row in fake(verified, error)}
    assert rows[providers.CODA]["speedup"] is None
    assert rows[providers.CODA]["verified"] is False
    text = tables.everything(list(rows.values()))
    assert "not shown" in text
    assert "2.00x" not in text
    assert "2.00x" in tables.everything(fake())


def test_least_bytes():
    once = 2 * 3 * 36 + 2 * 4 * 9 + 27 * (5 + 4 * 6)
    assert laboratory.least_bytes(SMALL, cases.FORWARD, 2) == 2 * once
    assert laboratory.least_bytes(SMALL, cases.TRAINING, 2) == 4 * once
    assert laboratory.least_bytes(SMALL, cases.EXPLANATION, 2) == 2 * (once + 2 * 3 * 36 + 2 * 4 * 9)


def test_replace_keeps_other_groups(tmp_path):
    path = tmp_path / "new" / "machine.jsonl"
    first, other = fake(), [dict(row, mode=cases.FORWARD) for row in fake()]
    results.replace(path, [*first, *other])
    results.replace(path, [dict(row, commit="later") for row in first[:2]])
    found = results.read(path)
    assert [row["commit"] for row in found if row["mode"] == cases.TRAINING] == ["later", "later"]
    assert [row for row in found if row["mode"] == cases.FORWARD] == other
    assert list(path.parent.iterdir()) == [path]


def test_replace_leaves_the_old_rows_when_it_fails(tmp_path):
    path = tmp_path / "machine.jsonl"
    results.replace(path, fake())
    before = path.read_text()
    with pytest.raises(TypeError):
        results.replace(path, [dict(fake()[0], commit=object())])
    assert path.read_text() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"op": "S1"}'])
def test_a_line_that_is_no_row(tmp_path, line):
    path = tmp_path / "machine.jsonl"
    path.write_text(json.dumps(fake()[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"machine.jsonl, line 2: expected a row"):
        results.read(path)


def test_path_of_a_device():
    assert results.path_of("NVIDIA H100 80GB HBM3", results.FOLDER).name == "nvidia-h100-80gb-hbm3.jsonl"


# -- guard
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "slower"), [([1.0, 1.1, 1.2], True), ([1.2, 1.3, 1.6], False), ([2.0, 2.1, 2.2], False)]
)
def test_guard(now, slower):
    def row(speedup):
        return {
            "op": "S1",
            "mode": "forward",
            "dtype": "float32",
            "shape": {},
            "provider": providers.CODA,
            "speedup": speedup,
        }

    stored = [row({providers.ALGEBRAIC: [1.5, 1.6, 1.7]})]
    found = guard.compare([row({providers.ALGEBRAIC: now, "algebraic compiled": [9, 9, 9]})], stored)
    assert [f["slower"] for f in found] == [slower]
    assert ("SLOWER" in guard.report([row({providers.ALGEBRAIC: now})], stored)) == slower
    assert guard.compare([row(None)], stored) == guard.compare([row({"x": [1, 1, 1]})], stored) == []
    assert "no stored ratios" in guard.report(stored, [])


# -- tables
# ------------------------------------------------------------------------------------------------------------


def test_documents_show_the_stored_rows():
    """``make tables`` was run after the last ``make bench``."""
    assert documents.stale() == []


def test_stale_documents_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    found = documents.documents(tmp_path)
    assert any(path.read_text(encoding="utf-8") != text for path, text in found.items())


def test_tables_do_not_mix():
    """Rows of two dtypes and of two batch sizes are in separate tables, and the copy is in the footer."""
    narrow = [dict(row, dtype="bfloat16") for row in fake()]
    large = [
        dict(row, shape={**row["shape"], "batch": 64}, p50_us=row["p50_us"] and 10 * row["p50_us"])
        for row in fake()
    ]
    copy = dict(fake()[0], op=providers.COPY, mode=providers.COPY, shape={"bytes": 1_000_000}, p50_us=2.0)
    found = tables.variants([*fake(), *narrow, *large, copy])
    kinds = [{(row["dtype"], row["shape"]["batch"]) for row in rows} for rows in found]
    assert kinds == [{("float32", 2)}, {("float32", 64)}, {("bfloat16", 2)}]
    text = tables.everything([*fake(), *large, copy])
    assert text.count("A copy reads and writes 1000 GB/s.") == 2
    assert len([line for line in text.splitlines() if line.startswith("| X1")]) == 4


def test_nothing_measured_has_a_footer():
    rows = [
        dict(row, p20_us=None, p50_us=None, p80_us=None, speedup=None, missing="out of memory")
        for row in fake()
    ]
    assert "no memory" in tables.everything(rows)


def test_sum_counts_layers_of_one_shape():
    rows = [dict(row, op="S4, S5") for row in fake()]
    line = next(line for line in tables.times(rows).splitlines() if "all of S" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:6] == ["0.42", "", "0.21"]


def test_block():
    assert (
        documents.block("a <!-- x: begin -->old<!-- x: end --> b", "x", "new")
        == "a <!-- x: begin -->\nnew\n<!-- x: end --> b"
    )
    with pytest.raises(ValueError, match="expected <!-- x: begin -->"):
        documents.block("nothing", "x", "new")


def test_plot_knows_its_rows(tmp_path):
    rows = []
    for axis in cases.AXES:
        for factor in (1, 2):
            case = dataclasses.replace(SMALL, axis=axis, **{axis: getattr(SMALL, axis) * factor})
            for provider in plots.styles():
                numbers = {"p20_us": 1.0, "p50_us": 2.0 * factor, "p80_us": 3.0 * factor, "peak_bytes": 1000}
                common = {
                    "op": f"scaling {axis}",
                    "provider": provider,
                    "mode": cases.TRAINING,
                    "dtype": "float32",
                    "shape": case.shape,
                }
                rows.append(common | numbers | ENVIRONMENT)
    path = plots.scaling(rows, tmp_path / "scaling.png")
    assert plots.shows(path, rows)
    assert not plots.shows(path, [dict(row, p50_us=9.0) for row in rows])
    assert not plots.shows(tmp_path / "none.png", rows)
