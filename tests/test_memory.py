"""Peak memory, as the system counts it, at the end of trainings only."""

import re
import subprocess
import sys

import numpy as np
import pytest

from espnet_llm_plugin import __main__ as runner
from espnet_llm_plugin import memory


def test_the_peak_stays_when_the_memory_is_free_again():
    before = memory.peak_resident_bytes()
    size = before + 200_000_000
    held = np.ones(size, dtype=np.uint8)
    peak = memory.peak_resident_bytes()
    assert before + 150_000_000 < peak < before + 2 * size
    del held
    assert memory.peak_resident_bytes() == peak


def test_the_largest_child_counts():
    size = memory.peak_resident_bytes() + 100_000_000
    subprocess.run([sys.executable, "-c", f"bytearray(b'1' * {size})"], check=True)
    assert size < memory.peak_resident_bytes() < 3 * size


@pytest.mark.parametrize("name, reported", [("lm_train", True), ("aggregate_stats_dirs", False)])
def test_trainings_report_it_at_their_end(name, reported, monkeypatch, capsys):
    module = __import__(f"espnet2.bin.{name}", fromlist=["main"])
    monkeypatch.setattr(module, "main", lambda: 3)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert runner.run_module(f"espnet2.bin.{name}", []) == 3
    found = re.search(rf"^{memory.PEAK} (\d+) bytes$", capsys.readouterr().err, re.MULTILINE)
    assert bool(found) == reported
    assert not reported or int(found[1]) > 1e8
