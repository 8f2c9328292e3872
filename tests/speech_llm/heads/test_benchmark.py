"""The benchmark of the transducer head measures what it says."""

import importlib
import sys

import pytest


@pytest.fixture
def module(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield importlib.import_module("auxiliary_rnnt")
    for name in ("measuring", "auxiliary_rnnt"):
        sys.modules.pop(name, None)


def options(module, *more):
    small = ["--frames", "6", "--labels", "3", "--width", "8", "--joint_dim", "5"]
    return module.get_parser().parse_args([*small, "--predictor_dim", "4", *more])


def test_both_dense_joints_have_one_loss(module):
    args = options(module)
    losses = {kind: module.make_step(kind, 20, args)() for kind in module.ROWS}
    assert losses["dense"] == pytest.approx(losses["full"], rel=1e-5)
    assert losses["factorized"] > 0


def test_what_does_not_fit_is_said_with_its_size(module):
    # 2 x 6 x 4 cells, 2 tensors of 4 bytes
    rows = module.make_rows(options(module, "--vocab", "10", "1000", "--memory_limit_gb", "1e-4"))
    skipped = {row["vocab"]: row.get("skipped") for row in rows if row["kind"] == "full"}
    assert skipped == {10: None, 1000: "does not fit (about 0.0 GB)"}
    rows[0] |= {"median_s": 1.0, "best_s": 0.5, "memory_bytes": 2e6, "result": 3.0}
    page = module.table(rows[:1] + [row for row in rows if "skipped" in row])
    assert (
        "| 10 | dense joint written out, torchaudio's loss | 1.000 | 0.500 | 2 | 3.0000 |" in page
    )
    assert "| 1,000 | dense joint written out, torchaudio's loss | does not fit" in page
