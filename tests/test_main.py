"""The runner: real command lines in real processes."""

import os
import subprocess
import sys

import pytest

from espnet_llm_plugin.spawn_name import SCRIPT_VARIABLE

RUNNER = [sys.executable, "-m", "espnet_llm_plugin"]


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [*RUNNER, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_list_names_every_entry_with_a_description():
    from espnet_llm_plugin.registry import ENTRIES

    lines = run("--list").stdout.splitlines()
    assert len(lines) == len(ENTRIES)
    for entry, line in zip(ENTRIES, lines):
        assert line.split()[:2] == [entry.kind, entry.name]
        assert entry.description in line


def test_version_names_the_packages_it_stands_on():
    printed = [line.split()[0] for line in run("--version").stdout.splitlines()]
    assert printed == ["espnet_llm_plugin", "espnet", "torch", "transformers", "peft"]


def test_no_arguments_prints_usage_and_fails():
    result = run()
    assert result.returncode == 2
    assert "usage:" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-m", "espnet2.bin.no_such_tool"], "there is no module espnet2.bin.no_such_tool"),
        (["-m", "nothing.at.all"], "there is no module nothing.at.all"),
        (["-m"], "-m needs a module"),
        (["no_such_script.py"], "there is no script no_such_script.py"),
        (["--frobnicate"], "unknown option --frobnicate"),
        (["-m", "espnet2.utils.types"], "has no main()"),
    ],
)
def test_mistakes_get_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


RUN_PL = """#!/bin/sh
# As Kaldi's run.pl: [--option value ...] LOG COMMAND ...
while [ "${1#--}" != "$1" ]; do shift 2; done
log=$1; shift
"$@" > "$log" 2>&1
"""


@pytest.mark.parametrize("code", [0, 3])
def test_launch_passes_arguments_and_failure(tmp_path, code):
    log, child = tmp_path / "log", tmp_path / "child.py"
    child.write_text(f"import sys; print(sys.argv[1:3]); sys.exit({code})")
    (tmp_path / "run.sh").write_text(RUN_PL)
    result = run(
        *["-m", "espnet2.bin.launch", "--cmd", f"sh {tmp_path}/run.sh", "--log", log],
        *["--ngpu", "0", "--num_nodes", "1", "--", sys.executable, child, "--one", "two"],
    )
    assert (result.returncode != 0) == (code != 0), result.stderr
    assert "['--one', 'two']" in log.read_text()


def test_tokenize_text(tmp_path):
    (tmp_path / "text").write_text("a b\nab\n")
    result = run(
        *["-m", "espnet2.bin.tokenize_text", "--token_type", "char", "--input", tmp_path / "text"],
        *["--output", "-", "--write_vocabulary", "true", "--add_symbol", "<blank>:0"],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["<blank>", "a", "b", "<space>"]


def test_aggregate_stats_dirs_fails_as_espnet_does(tmp_path):
    result = run(
        "-m", "espnet2.bin.aggregate_stats_dirs", "--input_dir", tmp_path / "absent",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 1


@pytest.mark.parametrize("module", ["asr_train", "asr_inference", "lm_train", "lm_calc_perplexity"])
def test_help_of_espnet_tools_shows_our_names_and_no_noise(module):
    result = run("-m", f"espnet2.bin.{module}", "--help")
    assert result.returncode == 0, result.stderr
    # ESPnet itself prints the command line there.
    assert len(result.stderr.splitlines()) <= 1
    assert "--help" in result.stderr or result.stderr == ""
    assert "nltk" not in result.stdout
    assert "Flash Attention" not in result.stdout
    if module == "asr_train":
        assert "factorized_transducer" in result.stdout
    if module == "lm_train":
        assert "causal_llm" in result.stdout


SCRIPT = """
import sys
import torch.multiprocessing

def child(queue):
    from espnet2.tasks.asr import decoder_choices, model_choices
    from espnet2.tasks.lm import lm_choices
    queue.put([name in choices.classes for choices, name in (
        (decoder_choices, "factorized_transducer"),
        (model_choices, "transducer"),
        (lm_choices, "causal_llm"),
    )])

if __name__ == "__main__":
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=120) == [True, True, True]
    process.join()
    print(sys.argv[1:])
    sys.exit(7)
"""


def test_script_by_path_and_its_spawned_child_see_the_registrations(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = run("script.py", "--one", "two", cwd=tmp_path)
    assert result.returncode == 7, result.stderr
    assert result.stdout.splitlines()[-1] == "['--one', 'two']"


MODULE = """
import torch.multiprocessing
from espnet2.tasks.asr import ASRTask, model_choices

def child(queue):
    queue.put(sorted({"transducer", "factorized_transducer"} & set(model_choices.classes)))

def main():
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=120))
    process.join()
"""


def test_spawned_child_of_a_module_sees_the_registrations(tmp_path):
    """As ESPnet's multi-GPU training does: the target lives in an importable module."""
    (tmp_path / "spawning_module.py").write_text(MODULE)
    # As if started by a script that the runner runs: the child is not to repeat that script.
    (tmp_path / "outer.py").write_text("open('repeated', 'w')")
    outer = {SCRIPT_VARIABLE: str(tmp_path / "outer.py")}
    result = run("-m", "spawning_module", cwd=tmp_path, **outer)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "repeated").exists()
    assert "['factorized_transducer', 'transducer']" in result.stdout
