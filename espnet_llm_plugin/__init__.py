"""LLMs in speech recognition, as a plugin of ESPnet2."""

__version__ = "0.1.0"
