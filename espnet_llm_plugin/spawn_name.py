"""Names that the runner and its spawned children agree on (importing this has no effect)."""

SPAWNED_MODULE = "espnet_llm_plugin.spawned"
SCRIPT_VARIABLE = "ESPNET_LLM_PLUGIN_SCRIPT"
