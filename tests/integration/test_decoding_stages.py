"""Stages 12 and 13 of asr_llm.sh with a Python that only notes what it is asked for."""

import pytest

from tests.integration.test_recipes import run

pytestmark = pytest.mark.integration

# Notes its words and its GPU; leaves the files that the next command needs.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\t' "${2##*.}" "${CUDA_VISIBLE_DEVICES-all}" "${@:3}" >> "${CALLS}"
echo >> "${CALLS}"
while [ $# -gt 0 ]; do
    case $1 in
        *.split_data) echo 3 ;;
        *.merge_data) merges=yes ;;
        --output_dir) output=$2 ;;
    esac
    shift
done
[ -z "${merges-}" ] || { mkdir -p "${output}/1best_recog" && touch "${output}/1best_recog/text"; }
"""


@pytest.fixture
def stages(root, tmp_path, monkeypatch):
    """Run stages 12 and 13 of a trained model; returns (command, GPU, options) of each call."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    files = ["exp/asr_x/.done", "exp/lm_x/llm/config.json", "grid.yaml", "train.yaml"]
    files += [f"dump/raw/{name}/text" for name in ("dev", "test")]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    command = [root / "egs2/TEMPLATE/asr1/asr_llm.sh", "--stage", 12, "--python", "./python"]
    command += ["--token_type", "char", "--asr_tag", "x", "--asr_config", "train.yaml"]
    command += ["--inference_tag", "decode", "--tune_config", "grid.yaml"]

    def run_stages(*options, model="factorized_transducer"):
        (tmp_path / "calls").write_text("")
        (tmp_path / "exp/asr_x/config.yaml").write_text(f"model: {model}\n")
        result = run([*command, *options], tmp_path)
        assert result.returncode == 0, result.stderr
        calls = []
        for line in (tmp_path / "calls").read_text().splitlines():
            name, gpu, *words = line.split("\t")[:-1]
            calls.append((name, gpu, " ".join(words)))
        return calls

    return run_stages


def of(calls, name):
    return [(gpu, options) for found, gpu, options in calls if found == name]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], None),  # the default, float32
        (["--ngpu", 4], "bfloat16"),
        (["--ngpu", 1, "--swap_dtype", "float16"], "float16"),
        (["--swap_dtype", "auto"], "auto"),
    ],
)
def test_precision_of_a_swapped_llm(stages, options, dtype):
    calls = stages("--swap_llm", "exp/lm_x/llm", *options)
    for name in ("tune_scales", "asr_inference", "evaluate_nll"):
        assert of(calls, name)
        for _, words in of(calls, name):
            assert "--predictor llm --predictor_conf llm=exp/lm_x/llm" in words
            assert ("dtype=" in words) == (dtype is not None)
            assert dtype is None or f"--predictor_conf dtype={dtype}" in words


def test_another_precision_is_decoded_again(stages):
    swap = ["--swap_llm", "exp/lm_x/llm"]
    assert of(stages(*swap), "asr_inference")
    assert not of(stages(*swap, "--swap_dtype", "float32"), "asr_inference")
    assert len(of(stages(*swap, "--swap_dtype", "bfloat16"), "asr_inference")) == 3
    # and the precision of nothing changes nothing
    assert of(stages(), "asr_inference")
    assert not of(stages("--swap_dtype", "bfloat16", "--ngpu", 1), "asr_inference")


def test_gpus_of_tuning_decoding_and_likelihood(stages):
    calls = stages("--ngpu", 2, "--inference_nj", 3)
    ((gpus, tuning),) = of(calls, "tune_scales")
    assert gpus == "4,6" and "--nj 3 --ngpu 1" in tuning  # of which it gives one to each process
    decoding = of(calls, "asr_inference")
    assert sorted(gpu for gpu, _ in decoding) == ["4", "4", "6"]
    assert all("--ngpu 1" in words and "--predictor" not in words for _, words in decoding)
    ((gpu, likelihood),) = of(calls, "evaluate_nll")
    assert gpu == "4" and "--ngpu 1 --batch_size 16" in likelihood


def test_everything_on_the_cpu(stages):
    calls = stages()
    assert {gpu for _, gpu, _ in calls} == {"4,6"}
    for name in ("tune_scales", "asr_inference", "evaluate_nll"):
        assert all("--ngpu 0" in words for _, words in of(calls, name))
    assert "--batch_size 1 " in of(calls, "evaluate_nll")[0][1]


def test_likelihood_of_an_rnnt_one_by_one(stages):
    """Its joint network's output is (B, T, U+1, V)."""
    calls = stages("--ngpu", 1, model="transducer")
    assert "--ngpu 1 --batch_size 1 " in of(calls, "evaluate_nll")[0][1]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--swap_dtype", "half", "expected float32, bfloat16, float16 or auto"),
        ("--jobs_per_gpu", "0", "expected 1 or more"),
    ],
)
def test_wrong_values_are_refused(root, tmp_path, option, value, message):
    result = run([root / "egs2/TEMPLATE/asr1/asr_llm.sh", option, value], tmp_path)
    assert result.returncode == 2
    assert f"{option} is '{value}'; {message}" in result.stderr
