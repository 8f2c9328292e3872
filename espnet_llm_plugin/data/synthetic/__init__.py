"""A synthetic speech corpus: sentences by a grammar, voices by espeak-ng, noise."""
