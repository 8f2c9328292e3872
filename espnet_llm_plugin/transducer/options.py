"""The package's option check under the name that the transducers use."""

from espnet_llm_plugin.options import refuse_unknown, valid_options

__all__ = ["refuse_unknown", "valid_options"]
