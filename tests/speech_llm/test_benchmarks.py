"""The benchmarks of decoding measure what they say."""

import argparse
import importlib
import sys

import pytest


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    yield importlib.import_module
    for name in ("measuring", "joint_ctc_decode", "speech_llm_decode"):
        sys.modules.pop(name, None)


def test_joint_search_needs_both_and_reductions_cost_nothing_here(benchmark):
    module = benchmark("joint_ctc_decode")
    sizes = dict(vocab=200, batch=4, beam=4, frames=80, top_k=60, threshold=0.9, seed=0)
    rates = {
        worker: module.make_run(argparse.Namespace(worker=worker, ctc_weight=0.5, **sizes))()
        for worker in module.ROWS
    }
    assert rates["espnet"] == rates["none"]
    joint = [rates[name] for name in ("none", "top_k", "compress", "both")]
    assert max(joint) < rates["decoder"] - 5


@pytest.mark.parametrize(
    "beam, ends, family, wanted",
    [
        (1, "together", "llama", [5, 5]),
        (3, "together", "llama", [5, 5]),
        (1, "apart", "llama", [5, 3]),
        (3, "together", "bloom", [5, 5]),
    ],
)
def test_all_searches_do_the_same_work(benchmark, tmp_path, beam, ends, family, wanted):
    module = benchmark("speech_llm_decode")
    args = argparse.Namespace(
        vocab=40, hidden=16, layers=2, heads=2, kv_heads=1, audio=6, tokens=5,
        batch=2, beam=beam, device="cpu", dtype="float32", ends=ends, family=family,
    )  # fmt: skip
    llm = str(module.make_llm(tmp_path / "llm", args))
    expected = module.ours(llm, args)()
    assert [len(tokens) for tokens in expected] == wanted
    last = slice(None) if ends == "together" else slice(-1)  # which may be the end symbol
    for peer in (module.generate, module.espnet):
        for tokens, mine in zip(peer(llm, args)(), expected):
            assert tokens[: len(mine)][last] == mine[last]
