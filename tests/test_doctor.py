"""What the doctor says of weights that are missing, right or wrong, of versions, and of the arithmetic."""

import hashlib
from dataclasses import replace
from importlib.metadata import version

import pytest

from stepdistill.metrics import doctor
from stepdistill.metrics.frechet import Reference
from stepdistill.metrics.weights import KNOWN, VARIABLE


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", VARIABLE):
        monkeypatch.setenv(variable, str(tmp_path))


def test_weights_are_missing_right_or_wrong(tmp_path, monkeypatch):
    def inception():
        return next(row for row in doctor.weights() if row.name == "inception")

    assert inception().state == "missing"
    assert KNOWN["inception"].url in inception().detail
    (tmp_path / KNOWN["inception"].name).write_bytes(b"right")
    digest = hashlib.sha256(b"right").hexdigest()
    assert inception().state == "wrong"
    assert digest in inception().detail
    assert KNOWN["inception"].sha256 in inception().detail
    monkeypatch.setitem(KNOWN, "inception", replace(KNOWN["inception"], sha256=digest))
    assert inception().state == "ok"


def test_the_report_has_a_row_for_every_file_package_and_test():
    rows = doctor.report()
    assert [row.name for row in rows if row.kind == "weights"] == [*KNOWN]
    assert [row.name for row in rows if row.kind == "version"] == [*doctor.PACKAGES]
    assert [row.state for row in rows if row.kind == "test"] == ["ok", "ok"]


def test_versions_are_said_and_missing_packages_too(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert [(row.state, row.detail) for row in doctor.versions()] == [
        ("ok", version("torch")),
        ("missing", "pip install no-such-package"),
    ]


def test_a_wrong_distance_is_found(monkeypatch):
    distance = Reference.distance
    monkeypatch.setattr(Reference, "distance", lambda self, other: distance(self, other) + 1e-6)
    assert [row.state for row in doctor.self_test()] == ["wrong", "wrong"]
