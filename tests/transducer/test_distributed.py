"""Distributed training: every process gives every parameter a gradient, whatever its batch."""

import torch
from espnet2.torch_utils.recursive_op import recursive_average
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_joined
from tests.transducer.tiny import batch, factorized, rnnt, save_llm

KINDS = ("rnnt", "stateless", "lstm", "llm", "rnnt mwer", "lstm mwer", "llm mwer")


def make(kind, llm):
    kind, *mwer = kind.split()
    conf = {"mwer_weight": 1.0, "mwer_conf": {"nbest": 3}} if mwer else {}
    if kind == "rnnt":
        return rnnt(acoustic_residual=True, ctc_weight=0.3, **conf)
    if kind == "llm":
        return factorized(predictor="llm", predictor_conf={"llm": llm}, model_conf=conf)
    conf |= {"ctc_weight": 0.3, "ilm_weight": 0.1}
    return factorized(predictor=kind, acoustic_blank=False, model_conf=conf)


def data(rank):
    if rank == 0:
        return batch()
    return batch(frames=(2, 1), labels=((1, 2, 3), (2, 3)))  # nothing of it can be trained on


def worker(rank, directory, llm):
    for kind in KINDS:
        model = DistributedDataParallel(make(kind, llm))  # find_unused_parameters=False
        names = None
        for _ in range(2):  # DDP notices a parameter without a gradient at the next forward
            loss, stats, weight = model(*data(rank))
            assert names is None or list(stats) == names
            names = list(stats)
            # as ESPnet's trainer: statistics are summed over processes by name
            gathered = [None, None]
            torch.distributed.all_gather_object(gathered, names)
            assert gathered[0] == gathered[1]
            loss.sum().backward()
        if rank == 0:
            grads = {k: p.grad for k, p in model.module.named_parameters()}
            torch.save(grads, f"{directory}/{kind}.pth")
    for usable in (True, False):  # of process 0
        model = make("rnnt", llm)
        loss, stats, weight = model(*data(0 if usable and rank == 0 else 1))
        # as ESPnet's trainer
        loss = (loss * weight.type(loss.dtype)).sum()
        stats, total = recursive_average(stats, weight, distributed=True)
        loss /= total
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        if rank == 0 and usable:
            expected, expected_stats, expected_weight = model(*data(0))
            torch.testing.assert_close(loss, expected[0])
            assert total == expected_weight[0]
            for name, value in expected_stats.items():
                torch.testing.assert_close(stats[name], value[0])


def test_one_process_without_a_usable_utterance(tmp_path):
    (tmp_path / "llm").mkdir()
    llm = save_llm(tmp_path / "llm")
    run_joined(worker, tmp_path, llm)
    for kind in KINDS:
        model = make(kind, llm)
        for _ in range(2):
            model(*data(0))[0].sum().backward()
        for name, value in torch.load(tmp_path / f"{kind}.pth").items():
            # the mean over two processes of which one adds zero
            expected = dict(model.named_parameters())[name].grad / 2
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=name)
