# shellcheck shell=bash
# Sourced by the recipes: finds the repository and its Python.
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export REPOSITORY
# `make` installs into .venv; in your own environment, whatever `python3` is already runs us.
if ! python3 -c 'import espnet_llm_plugin' 2>/dev/null && [ -x "${REPOSITORY}/.venv/bin/python3" ]; then
    PATH="${REPOSITORY}/.venv/bin:${PATH}"
    export PATH
fi
export PYTHONUNBUFFERED=1
