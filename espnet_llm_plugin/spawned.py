"""What a spawned child process runs instead of its parent's ``__main__``.

ESPnet starts one process per GPU with the ``spawn`` method. Python does not re-import a package's
``__main__.py`` in such children, so the runner names this module as the main one: importing it
registers the plugin, and repeats the definitions of a script that was given by path.
"""

import os
import runpy

from espnet_llm_plugin import registry
from espnet_llm_plugin.spawn_name import SCRIPT_VARIABLE

registry.register()
if os.environ.get(SCRIPT_VARIABLE):
    globals().update(runpy.run_path(os.environ[SCRIPT_VARIABLE], run_name="__mp_main__"))
