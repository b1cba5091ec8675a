"""A pytest plugin (``-p bench.logged``) that writes a line of JSON when a test ends, so that a run that is
cut off loses nothing.
"""

import json
import os


def pytest_collection_finish(session):
    slow = [item.nodeid for item in session.items if item.get_closest_marker("slow")]
    _write({"collected": [item.nodeid for item in session.items], "slow": slow})


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        reason = None if report.passed else str(report.longrepr)[-2000:]
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "reason": reason,
        }
        _write(line | ({"properties": dict(report.user_properties)} if report.user_properties else {}))


def pytest_collectreport(report):
    if report.failed:
        _write(
            {
                "test": report.nodeid,
                "outcome": "failed",
                "seconds": 0.0,
                "reason": str(report.longrepr)[-2000:],
            }
        )


def _write(line):
    with open(os.environ["CODA_FAST_TEST_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
