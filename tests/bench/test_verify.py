"""Verdicts on test runs that pass, fail, crash or are killed (bench/verify.py)."""

import time

import pytest

from bench import verify
from bench.verify import Verdict

PASSING = "def test_a():\n    pass\n\ndef test_b():\n    pass\n"
MIXED = (
    "import pytest\n\ndef test_a():\n    assert 0\n\ndef test_b():\n    pass\n\ndef test_c():\n    "
    "pytest.skip('no')\n"
)
CRASHING = (
    "import os\n\ndef test_a():\n    pass\n\ndef test_b():\n    os._exit(9)\n\ndef test_c():\n    pass\n"
)
HANGING = (
    "import time\n\ndef test_a():\n    pass\n\ndef test_b():\n    time.sleep(600)\n\ndef test_c():\n    "
    "pass\n"
)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "test_it.py"
        path.write_text(text)
        return str(path)

    return write


def test_passing(file):
    verdict = verify.run(file(PASSING))
    assert verdict == Verdict(passes=2)
    assert verdict.passed
    assert str(verdict) == "2 tests of the op ran here, all passed"


def test_failing(file):
    verdict = verify.run(file(MIXED))
    assert (verdict.passes, verdict.skipped, len(verdict.failures)) == (1, 1, 1)
    assert "test_a" in str(verdict)
    assert not verdict.passed


def test_what_had_no_time_is_unfinished(file):
    verdict = verify.run(
        file("import pytest\n\ndef test_a():\n    pytest.skip('no time left')\n\ndef test_b():\n    pass\n")
    )
    assert verdict == Verdict(passes=1, unfinished=1)
    assert verdict.good
    assert not verdict.passed


def test_a_shard_that_breaks_off_has_failed(file, tmp_path):
    verdict = verify.shards(
        verify.collect(file(CRASHING), root=tmp_path), 1, time.monotonic() + 60, tmp_path / "logs", tmp_path
    )
    assert (verdict.passes, verdict.unfinished, verdict.failures) == (1, 2, ("shard0 ended with status 9",))


@pytest.mark.parametrize("text", [CRASHING, "syntax error", "x = 1\n"])
def test_what_breaks_off_has_not_passed(file, text):
    verdict = verify.run(file(text))
    assert not verdict.passed
    assert verdict.failures
    assert verdict.unfinished == (2 if text is CRASHING else 0)


def test_nothing_is_not_passed():
    assert not Verdict().passed
    assert not Verdict(skipped=3).passed
    assert not Verdict(passes=3, unfinished=1).passed
    assert Verdict(passes=1) + Verdict(skipped=1, failures=("x",)) == Verdict(1, 1, ("x",), 0)


def test_shards(file, tmp_path):
    tests = verify.collect(file(MIXED), root=tmp_path)
    assert [name.split("::")[1] for name in tests] == ["test_a", "test_b", "test_c"]
    verdict = verify.shards(tests, 2, time.monotonic() + 60, tmp_path, tmp_path)
    assert (verdict.passes, verdict.skipped, len(verdict.failures), verdict.unfinished) == (1, 1, 1, 0)


@pytest.mark.slow
def test_shards_are_cut_off(file, tmp_path):
    tests = verify.collect(file(HANGING), root=tmp_path)
    start = time.monotonic()
    verdict = verify.shards(tests, 1, start + 12, tmp_path, tmp_path)
    assert time.monotonic() - start < 30
    assert (verdict.passes, verdict.unfinished, verdict.failures) == (1, 2, ())


def test_collect_refuses_nothing(file):
    with pytest.raises(RuntimeError, match="expected tests from"):
        verify.collect(file("x = 1\n"))


def test_verdict_on_disk(tmp_path):
    verdict = Verdict(3, 1, ("a::b",), 2)
    path = tmp_path / "verdict.json"
    verdict.write(path, commit="c", device="d")
    assert Verdict.load(path) == Verdict.load(path, commit="c") == verdict
    with pytest.raises(
        ValueError, match="expected a verdict about {'commit': 'other'}, got one about {'commit': 'c'}"
    ):
        Verdict.load(path, commit="other")
