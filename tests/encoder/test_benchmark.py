"""The benchmark of streaming encoders runs and names all encoders."""

import os
import subprocess
import sys


def test_tiny_run(root):
    command = [sys.executable, str(root / "benchmarks" / "streaming_encoders.py")]
    command += ["--layers", "1", "--width", "16", "--heads", "2", "--linear_units", "8"]
    command += ["--seconds", "1", "--turns", "1", "--stream_seconds", "110"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    for name in ("espnet conformer", "espnet contextual_block_conformer"):
        assert result.stdout.count(f"| {name} |") == 1
    for name in ("streaming_conformer 160 ms", "emformer 160 + 40 ms"):
        assert result.stdout.count(f"| {name} |") == 2
