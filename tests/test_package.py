"""The installed package: console scripts, optional dependencies, extras."""

import importlib
import subprocess
import sys
from importlib.metadata import entry_points, metadata

import pytest

SCRIPTS = [e for e in entry_points(group="console_scripts") if "espnet_llm_plugin" in e.value]


def test_console_scripts_are_declared():
    assert {script.name for script in SCRIPTS} >= {
        "espnet-llm-plugin",
        "espnet-llm-adapt-vocabulary",
        "espnet-llm-asr-inference",
        "espnet-llm-score",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_console_scripts_exist(script):
    assert callable(script.load())


def test_every_command_line_has_an_entry_point_for_scripts(root):
    for path in sorted((root / "espnet_llm_plugin" / "bin").glob("[a-z]*.py")):
        module = importlib.import_module(f"espnet_llm_plugin.bin.{path.stem}")
        assert path.stem == "data_options" or callable(module.cli), path


def test_extras_and_pins_are_declared():
    declared = metadata("espnet_llm_plugin")
    assert {"demo", "dev", "microphone"} <= set(declared.get_all("Provides-Extra"))
    requirements = [r.replace(" ", "") for r in declared.get_all("Requires-Dist")]
    assert "espnet==202511" in requirements
    assert any(r.startswith("torch") and "<2.12" in r for r in requirements)


BLOCKED = """
import importlib, pkgutil, sys
OPTIONAL = ("espeakng_loader", "pytest", "matplotlib", "sounddevice", "submitit")
OPTIONAL += ("pyarrow", "kaldialign", "whisper_normalizer")
for name in OPTIONAL:
    sys.modules[name] = None
import espnet_llm_plugin
from espnet_llm_plugin import compat
for module in pkgutil.walk_packages(espnet_llm_plugin.__path__, "espnet_llm_plugin."):
    if not module.name.endswith(("__main__", "spawned")):
        compat.import_quietly(module.name)
"""


def test_everything_imports_without_optional_packages():
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_pip_install_into_another_place(root, tmp_path):
    """What `pip install .` puts there, without its dependencies, starts and names itself."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    installed = subprocess.run(
        [*command, "--target", str(tmp_path), str(root)], capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport espnet_llm_plugin as p\n"
    code += "import espnet_llm_plugin.bin.score, espnet_llm_plugin.data.synthetic.text\n"
    code += "print(p.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip().startswith(str(tmp_path)), result.stderr
