"""The benchmark of fusion runs and names all methods."""

import json
import os
import subprocess
import sys

from tests.llm.tiny import TEXT, save_llm_dir

METHODS = (
    "no LM",
    "label-wise",
    *(
        f"{method} ({vocabulary} vocabulary)"
        for method in ("delayed, n = 1", "delayed, n = 5", "delayed, shortest", "rescoring")
        for vocabulary in ("ASR", "own")
    ),
    "ESPnet BeamSearchTimeSync",
    "ESPnet BatchBeamSearch",
)


def test_tiny_run(root, tmp_path):
    llm = save_llm_dir(tmp_path / "llm")
    words = " ".join(TEXT).split()[:12]
    (tmp_path / "text").write_text("".join(f"{a} {b}\n" for a, b in zip(words, words[1:])))
    command = [sys.executable, str(root / "benchmarks" / "fusion.py")]
    command += ["--llm", str(llm), "--text", str(tmp_path / "text"), "--utterances", "3"]
    command += ["--beams", "3", "--intervals", "1", "5", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    for name in METHODS:
        assert result.stdout.count(f"|3|{name}|") == 1
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["no LM"]["lm_calls"] == 0
    for name in METHODS[1:]:
        assert rows[name]["lm_calls"] > 0 and rows[name]["seconds"] > 0
