"""Processes that tune: how many there are, and which GPU each of them sees."""

import argparse
import os
import time
from pathlib import Path

import pytest

from espnet_llm_plugin.inference import held_out


class Stand:
    """In place of a model and its utterances."""

    def __init__(self, args):
        self.directory = Path(args.output_dir)


def gpu_of_part(model, part, parts):
    """The GPU of the process, once all parts have begun: each in a process of its own."""
    (model.directory / str(part)).touch()
    deadline = time.monotonic() + 120
    while len(list(model.directory.iterdir())) < parts and time.monotonic() < deadline:
        time.sleep(0.05)
    return part, parts, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def run(tmp_path, **options):
    args = argparse.Namespace(output_dir=str(tmp_path), log_level="INFO", **options)
    with held_out.workers(args, 5, Stand) as work:
        return work(gpu_of_part)


def test_every_process_has_a_gpu(tmp_path, monkeypatch):
    """Those of CUDA_VISIBLE_DEVICES, which are fewer than the processes asked for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-7")
    results = run(tmp_path, ngpu=1, nj=4)
    assert [result[:2] for result in results] == [(0, 2), (1, 2)]
    assert {gpu for _, _, gpu, _ in results} == {"3", "MIG-7"}
    assert len({pid for *_, pid in results} - {os.getpid()}) == 2


@pytest.mark.parametrize(("gpus", "nj"), [("3", 4), ("3,5", 1), ("", 4)])
def test_one_process_is_this_one(tmp_path, monkeypatch, gpus, nj):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert run(tmp_path, ngpu=1, nj=nj) == [(0, 1, gpus, os.getpid())]


def test_all_gpus_are_visible_unless_some_are_given(monkeypatch):
    monkeypatch.setattr(held_out.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert held_out.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert held_out.visible_gpus() == []
