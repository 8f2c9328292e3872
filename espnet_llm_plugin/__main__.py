"""Run an ESPnet module, or a Python script, with the plugin registered.

    python -m espnet_llm_plugin -m espnet2.bin.asr_train --config train.yaml ...
    python -m espnet_llm_plugin some/script.py ...

The module is imported and its ``main()`` called. ``runpy`` must not replace
``sys.modules["__main__"]``: the children that multi-GPU training spawns start from it.
"""

import importlib
import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Optional, Sequence

from espnet_llm_plugin import __version__, compat, registry
from espnet_llm_plugin.errors import UserError, run_cli
from espnet_llm_plugin.memory import report_peak
from espnet_llm_plugin.spawn_name import SCRIPT_VARIABLE, SPAWNED_MODULE

USAGE = """usage: python -m espnet_llm_plugin -m MODULE [ARGUMENT ...]
       python -m espnet_llm_plugin SCRIPT.py [ARGUMENT ...]
       python -m espnet_llm_plugin --list | --version | --help

Run an ESPnet module (espnet2.bin.asr_train, espnet2.bin.asr_inference, ...) or a script with the
names of espnet_llm_plugin registered; arguments and exit code are passed through.

  --list     print every registered name
  --version  print the versions of the plugin and of what it stands on
"""


def main(cmd: Optional[Sequence[str]] = None) -> Optional[int]:
    """Dispatch; returns the exit code of what was run (None for success)."""
    arguments = list(sys.argv[1:] if cmd is None else cmd)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--list":
        print(registry.table())
        return 0
    if arguments[0] == "--version":
        print(f"espnet_llm_plugin {__version__}")
        for package in ("espnet", "torch", "transformers", "peft"):
            print(f"{package} {version(package)}")
        return 0
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise UserError("-m needs a module, e.g. `-m espnet2.bin.asr_train`")
        return run_module(arguments[1], arguments[2:])
    if arguments[0].startswith("-"):
        raise UserError(f"unknown option {arguments[0]}; see `python -m espnet_llm_plugin --help`")
    return run_script(arguments[0], arguments[1:])


def run_module(name: str, arguments: list[str]) -> Optional[int]:
    """Import module ``name`` and call its ``main()`` with ``sys.argv`` set to ``arguments``."""
    compat.check_espnet_version()
    # Inherited if a script run by us started this: our children must not repeat that script.
    os.environ.pop(SCRIPT_VARIABLE, None)
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"there is no module {name}. Expected e.g. espnet2.bin.asr_train, "
            f"espnet2.bin.asr_inference or espnet2.bin.lm_train"
        )
    _become_spawnable()
    sys.argv = [spec.origin, *arguments]
    module = compat.import_quietly(name)
    if not hasattr(module, "main"):
        raise UserError(f"{name} has no main() to run; give a script by its path instead")
    # Light tools (launch, tokenize_text, ...) never import a task: do not make them wait for it.
    tasks = {kind for kind, (task, _) in registry.CHOICES.items() if task in sys.modules}
    if tasks or not name.startswith("espnet2.bin."):
        registry.register(tuple(tasks) or tuple(registry.CHOICES))
    code = module.main()
    report_peak(name)
    return code


def run_script(path: str, arguments: list[str]) -> None:
    """Run a Python file as ``__main__`` with the plugin registered."""
    if not Path(path).is_file():
        raise UserError(f"there is no script {path}; to run a module, write `-m MODULE`")
    registry.register()
    _become_spawnable()
    os.environ[SCRIPT_VARIABLE] = str(Path(path).resolve())
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    # The script's definitions must be found in `__main__` when they are pickled for a child.
    namespace = sys.modules["__main__"].__dict__
    namespace["__file__"] = path
    exec(compile(Path(path).read_bytes(), path, "exec"), namespace)


def _become_spawnable() -> None:
    """Name the module that spawned children import as their ``__main__``."""
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(SPAWNED_MODULE)


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
