"""Peak memory of a training, for the tables of results."""

import resource
import sys

# What asr_llm.sh looks for in the log of a training.
PEAK = "peak resident memory:"
TRAININGS = ("espnet2.bin.asr_train", "espnet2.bin.lm_train")


def peak_resident_bytes() -> int:
    """Most memory that this process, or the largest of the children it has waited for, ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(kind).ru_maxrss for kind in kinds)


def report_peak(module: str) -> None:
    """Say at the end of a training how much memory it took."""
    if module in TRAININGS:
        print(f"{PEAK} {peak_resident_bytes()} bytes", file=sys.stderr)
