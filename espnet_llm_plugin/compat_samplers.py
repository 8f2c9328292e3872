"""Work-around for ESPnet's samplers of categories (languages); see :mod:`compat`."""

import functools
import importlib


def patch_category_samplers() -> None:
    """Let ``batch_type: catpow`` be used with the shape files of a recipe. Idempotent.

    ESPnet 202511's power samplers stop with an assertion unless there is exactly one shape file,
    but every ASR recipe, its own ``asr.sh`` included, passes two (speech and text) and an option
    given twice cannot be taken back. They count batches in the first file only: give them that.
    """
    module = importlib.import_module("espnet2.samplers.category_power_sampler")
    for cls in (module.CategoryPowerSampler, module.CategoryDatasetPowerSampler):
        original = cls.__init__
        if getattr(original, "takes_first_shape_file", False):
            continue

        def __init__(self, *args, _original=original, shape_files, **kwargs):
            _original(self, *args, shape_files=shape_files[:1], **kwargs)

        functools.update_wrapper(__init__, original)
        __init__.takes_first_shape_file = True
        cls.__init__ = __init__
