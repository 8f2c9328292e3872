"""Preparation of speech corpora as Kaldi data directories, with lhotse's recipes underneath."""
