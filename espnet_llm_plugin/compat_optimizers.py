"""Work-around for the optimizers that ESPnet builds; see :mod:`compat`."""

import functools
import importlib

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown


def patch_build_optimizers() -> None:
    """Give optimizers that want them the names of the parameters. Idempotent.

    ESPnet 202511 passes ``model.parameters()``, in which nothing tells the parts of a model apart;
    torch takes ``model.named_parameters()`` as well. Classes that set ``takes_named_parameters``
    get that.
    """
    module = importlib.import_module("espnet2.tasks.abs_task")
    original = module.AbsTask.__dict__["build_optimizers"].__func__
    if getattr(original, "gives_names", False):
        return

    @functools.wraps(original)
    def build_optimizers(cls, args, model):
        optim_class = module.optim_classes.get(args.optim)
        if not getattr(optim_class, "takes_named_parameters", False):
            return original(cls, args, model)
        for option in ("exclude_weight_decay", "sharded_ddp"):
            if getattr(args, option, False):
                raise UserError(
                    f"`{option}: true` cannot be used with `optim: {args.optim}`; set "
                    "weight_decay in its groups, or use another optimizer."
                )
        where = f"optim_conf of {args.optim!r}"
        refuse_unknown(where, args.optim_conf, optim_class.__init__, ("self", "params"))
        return [optim_class(model.named_parameters(), **args.optim_conf)]

    build_optimizers.gives_names = True
    module.AbsTask.build_optimizers = classmethod(build_optimizers)
