"""tune_fusion for a model with an attention decoder: against ESPnet's search at every point."""

import json

import jiwer
import pytest
import torch
import yaml

from espnet_llm_plugin.bin import asr_inference, tune_fusion, tune_scales
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.fusion.joint_sum import JointWeights, joint_grid
from espnet_llm_plugin.fusion.mini_lstm import MiniLSTMILM
from espnet_llm_plugin.inference import tune_joint
from espnet_llm_plugin.inference.loading import load_model
from espnet_llm_plugin.inference.options import parse_with_configs
from tests.inference.tiny_asr import TOKENS, make_asr, make_audio, read_scp
from tests.llm.tiny import save_adapted_dir, save_llm_dir

SECONDS = {"utt-a": 0.4, "utt-b": 0.6, "utt-c": 0.5, "utt-d": 0.02}  # the last is too short
TEXT = {"utt-a": "a a a a a", "utt-b": "a a a a a ad", "utt-c": "a a a a a a a", "utt-d": "a"}
SUM = ["--ctc_weights", "0.3", "0.6", "--lm_weights", "0", "0.5", "--ilm_weights", "0", "0.4"]
SUM += ["--label_bonuses", "0", "3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    made = {kind: make_asr(directory / kind, kind) for kind in ("attention", "ctc")}
    weights = torch.load(made["attention"].model)
    weights["decoder.output_layer.bias"][-1] += 4.0  # hypotheses end
    weights["decoder.output_layer.bias"][2] += 2.0  # and have words
    torch.save(weights, made["attention"].model)
    ilm = MiniLSTMILM.new(load_model(made["attention"].config, made["attention"].model)[0])
    torch.nn.init.normal_(ilm.mini_lstm.output.weight, std=3.0)
    ilm.save(directory / "mini_lstm.pth")
    adapted = save_adapted_dir(directory / "adapted", TOKENS)
    made["own"] = ["--fusion_llm", str(save_llm_dir(directory / "llm")), "--lm_eos", "none"]
    made["pieces"] = ["--lm_train_config", str(adapted / "espnet_lm.yaml")]
    made["pieces"] += ["--lm_file", str(adapted / "espnet_lm.pth")]
    made["ilm"] = ["--ilm", "mini_lstm", "--ilm_file", str(directory / "mini_lstm.pth")]
    made["wav"] = make_audio(directory / "wav", SECONDS)
    made["text"] = directory / "text"
    made["text"].write_text("".join(f"{utt} {line}\n" for utt, line in TEXT.items()))
    return made


def options_of(files, output, *options, kind="attention"):
    return [
        *files[kind].asr_options(),
        *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
        *("--text", str(files["text"]), "--output_dir", str(output)),
        *("--beam_size", "3", *options),
    ]


def tune(*of, **more):
    tune_fusion.main(options_of(*of, **more))
    return json.loads((of[1] / "scales.json").read_text())


def wer_of_decoding(files, output, *options):
    """Of what ESPnet's search writes."""
    asr_inference.main(
        [
            *files["attention"].asr_options(),
            *("--data_path_and_name_and_type", f"{files['wav']},speech,sound"),
            *("--output_dir", str(output), "--num_workers", "0", *options),
        ]
    )
    found = read_scp(output / "1best_recog/text")
    found["utt-d"] = ""  # ESPnet writes a space
    return 100 * jiwer.wer([TEXT[utt] for utt in TEXT], [found.get(utt, "") for utt in TEXT])


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """Two cells in two rounds, of an LLM in its own vocabulary and a mini-LSTM."""
    output = tmp_path_factory.mktemp("tuned")
    options = [*SUM, *files["own"], *files["ilm"], "--rounds", "2", "--cells", "2"]
    return output, tune(files, output, *options), options


def test_what_is_written(tuned, files):
    output, content, _ = tuned
    assert len(content["points"]) == 16 and list(content["failed"]) == ["utt-d"]
    searched = [point for point in content["points"] if "reranked" not in point]
    assert 1 <= len(searched) <= 5
    assert content["best"] in searched
    # the middle of the grid, and the same with the least LM
    axes = ("ctc_weight", "lm_weight", "ilm_weight", "penalty")
    first = {(0.6, 0.5, 0.4, 3.0), (0.6, 0.0, 0.0, 3.0)}
    assert first <= {tuple(point[axis] for axis in axes) for point in searched}
    assert content["best"]["wer"] == min(point["wer"] for point in searched)
    lists = [json.loads(line) for line in (output / "nbest.jsonl").read_text().splitlines()]
    assert {one["utt"] for one in lists} == set(TEXT) - {"utt-d"}
    assert "~" in (output / "table.txt").read_text()
    assert (output / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["search"] == "espnet" and best["beam_size"] == 3 and best["ilm"] == "mini_lstm"


def test_best_yaml_decodes_with_the_word_errors_that_it_says(tuned, files, tmp_path):
    output, content, _ = tuned
    found = wer_of_decoding(files, tmp_path / "out", "--config", str(output / "best.yaml"))
    assert found == pytest.approx(content["best"]["wer"])


def test_searched_points_are_those_of_espnets_search(files, tmp_path):
    """All of a small grid, whose points differ."""
    grid = ["--ctc_weights", "0.5", "--lm_weights", "0.3", "--label_bonuses", "0", "4"]
    options = [*grid, *files["pieces"], "--rounds", "9", "--cells", "9"]
    content = tune(files, tmp_path / "tuned", *options)
    searched = [point for point in content["points"] if "reranked" not in point]
    weights = ["ctc_weight", "lm_weight", "penalty"]
    for n, point in enumerate(searched):
        chosen = [word for name in weights for word in (f"--{name}", str(point[name]))]
        options = ["--search", "espnet", "--beam_size", "3", *files["pieces"], *chosen]
        assert wer_of_decoding(files, tmp_path / str(n), *options) == pytest.approx(point["wer"])


def total(weights, candidate):
    return sum(weight * part for weight, part in zip(weights.vector(), candidate.parts()))


def test_scores_of_candidates_sum_up_to_espnets(files, tmp_path):
    """At the searched point, and so at every other."""
    args = parse_with_configs(
        tune_fusion.get_parser(),
        options_of(files, tmp_path, *SUM, *files["own"], *files["ilm"]),
    )
    held_out = tune_joint.JointHeldOut(args)
    weights = JointWeights(0.3, 0.5, 0.4, 1.5)
    found = tune_joint.search_part(held_out, 0, 1, args, [weights])
    search = tune_joint.search_with(held_out.speech2text, held_out.added, weights.by_scorer())
    compared = 0

    def compare(utts, encoded):
        nonlocal compared
        for utt, encoder_out in zip(utts, encoded):
            ended = search(x=encoder_out)
            assert found.texts[utt] == [next(iter(found.candidates[utt].values())).text]
            for hyp in ended:
                if float(hyp.score) < -1e6:  # impossible for CTC: ESPnet's log 0 swallows the rest
                    continue
                candidate = found.candidates[utt][tuple(t for t in hyp.yseq[1:-1].tolist() if t)]
                if candidate.length_bonus == hyp.scores["length_bonus"]:
                    assert total(weights, candidate) == pytest.approx(float(hyp.score), abs=1e-3)
                    assert abs(0.4 * candidate.ilm) > 0.1
                    compared += 1

    with torch.no_grad():
        held_out.for_each_batch(compare)
    assert compared >= 5


def test_processes(tuned, files, tmp_path):
    _, content, options = tuned
    found = tune(files, tmp_path, *options, "--nj", "2")
    assert found["points"] == content["points"] and found["best"] == content["best"]


def test_a_finished_tuning_is_not_repeated(tuned, files, monkeypatch):
    output, content, options = tuned
    monkeypatch.setattr(tune_joint, "workers", None)
    assert tune(files, output, *options) == content


def test_lists_are_ranked_by_the_score_per_token(files, tmp_path):
    """--normalize_length true: as ESPnet ranks what has ended."""
    grid = ["--ctc_weights", "0.3", "--label_bonuses", "0", "1"]
    options = [*grid, "--normalize_length", "true", "--rounds", "3", "--cells", "3"]
    content = tune(files, tmp_path / "tuned", *options)
    chosen = ["--config", str(tmp_path / "tuned/best.yaml")]
    assert wer_of_decoding(files, tmp_path / "out", *chosen) == pytest.approx(
        content["best"]["wer"]
    )
    args = parse_with_configs(tune_fusion.get_parser(), options_of(files, tmp_path, *options))
    held_out = tune_joint.JointHeldOut(args)
    weights = joint_grid([0.3], [0.0], [0.0], [1.0])[0]
    found = tune_joint.search_part(held_out, 0, 1, args, [weights])
    for utt, (text,) in found.texts.items():
        candidates = found.candidates[utt].values()
        assert max(candidates, key=lambda one: total(weights, one)).text == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("OWN", "an external LM is given: add --lm_weights"),
        ("--ilm zero_context", "an internal LM .--ilm. is given: add --ilm_weights"),
        ("--ctc_weights 1", "ctc_weight 1.0: expected a number from 0 to below 1"),
        ("--fusion delayed OWN --lm_weights 1", "--fusion delayed: it is for CTC models"),
        ("--lm_eos none", "--lm_eos none: it needs --fusion_llm"),
        ("--predictor lstm", "this model has an attention decoder"),
        ("--chunk_ms 320", "ESPnet's search does not know it"),
        ("--nbest_files x", "is searched by ESPnet: leave them out"),
        ("--rounds 0", "--rounds 0: at least 1"),
        ("OWN PIECES --lm_weights 1", "is another LM: give one"),
    ],
)
def test_mistakes(files, tmp_path, options, message):
    known = {"OWN": files["own"], "PIECES": files["pieces"]}
    words = [given for word in options.split() for given in known.get(word, [word])]
    with pytest.raises(UserError, match=message):
        tune(files, tmp_path, *words)


def test_the_full_grid_is_not_for_these_models(files, tmp_path):
    with pytest.raises(UserError, match="tune_fusion"):
        tune_scales.main(options_of(files, tmp_path))
