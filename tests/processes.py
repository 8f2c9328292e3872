"""Two processes that work as one, for tests of distributed training."""

import os
import sys

import torch

SIZE = 2


def _joined(rank, work, directory, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=SIZE
    )
    work(rank, directory, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Models that refer to the group outlive it, and with them threads of gloo, whose destruction
    # when the interpreter ends is sometimes an abort ("terminate called without an active
    # exception"; pytorch/pytorch#179291). Nothing is left to be done by that end.
    os._exit(0)


def run_joined(work, directory, *args):
    """Calls ``work(rank, directory, *args)`` in each process; raises what one of them raises."""
    torch.multiprocessing.spawn(_joined, (work, str(directory), args), nprocs=SIZE)
