"""Configurations of the recipes' speech LLMs build models that fit what they start from."""

import subprocess

import pytest
import yaml

from espnet_llm_plugin import registry
from espnet_llm_plugin.speech_llm.recipe import recipe_options
from espnet_llm_plugin.training_config import read_training_config
from tests.llm.tiny import save_adapted_dir

TOKENS = ["<blank>", "<unk>", *(f"t{i}" for i in range(297)), "<sos/eos>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a token list and an LLM over it, as wide as that of egs2/stories."""
    registry.register()
    directory = tmp_path_factory.mktemp("conf")
    (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    save_adapted_dir(directory / "llm", TOKENS, hidden_size=192, num_attention_heads=6)
    return directory


@pytest.fixture(scope="module")
def build(place, root):
    """(arguments, ESPnet's model) of a configuration and further options."""
    from espnet2.tasks.asr import ASRTask
    from espnet2.tasks.lm import LMTask

    def make(name, *options, task=ASRTask):
        arguments = ["--config", str(root / "conf" / name), "--output_dir", str(place)]
        arguments += ["--token_list", str(place / "tokens.txt"), *options]
        args = task.get_parser().parse_args(arguments)
        return args, task.build_model(args)

    make.LMTask, make.ASRTask = LMTask, ASRTask
    return make


def options_of(root, model, llm):
    """(configuration, training options) that egs2/stories gives a model of its table."""
    shell = (
        f". local/speech_llm.sh; options=''; describe_speech_llm {model}; echo $settings $options"
    )
    found = subprocess.run(
        ["bash", "-euc", f"size=full data=d exp=e; config() {{ :; }}; {shell}"],
        cwd=root / "egs2/stories/asr1",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return found[0], [*found[1:], "--decoder_conf", f"llm={llm}"]


def models(root):
    with open(root / "egs2/stories/asr1/local/speech_llm_rows.txt") as rows:
        found = {row.split("|")[2].strip() for row in rows if not row.startswith("#")}
    # sl_native and sl_adapted differ in their LLM alone
    return sorted(name for name in found if name.startswith("sl_"))


def shapes(model, prefix):
    return {n: tuple(v.shape) for n, v in model.state_dict().items() if n.startswith(prefix)}


def test_rows_of_stories_build_what_they_say(build, place, root):
    _, ctc = build("stories/train_ctc.yaml")
    found = {}
    for name in models(root):
        settings, options = options_of(root, name, place / "llm")
        args, model = build(f"stories/{settings}.yaml", *options)
        for part in ("encoder.", "ctc."):
            assert shapes(model, part) == shapes(ctc, part), name
        found[name] = model
        # every pattern of the optimizer's groups is that of some parameters
        if name != "sl_two_stage":
            build.ASRTask.build_optimizers(args, model)
    base = found["sl_lora8"].decoder
    assert (base.llm.tuning, base.adapter.stack) == ("lora", 2)
    trained = {
        name: sum(p.numel() for p in model.decoder.llm.parameters())
        for name, model in found.items()
    }
    assert trained["sl_frozen"] == 0 < trained["sl_lora8"]
    assert trained["sl_lora32"] == 4 * trained["sl_lora8"] < trained["sl_full"]
    assert [found[f"sl_stack{n}"].decoder.adapter.stack for n in (1, 4)] == [1, 4]
    assert found["sl_compression"].decoder.adapter.name == "ctc_compression"
    assert found["sl_ctc_embedding"].decoder.adapter.name == "ctc_embedding"
    assert found["sl_bidirectional"].decoder.interface.mask == "bidirectional"
    assert found["sl_mask"].text_mask == 0.25 and base.interface.mask == "causal"
    for name, kind in (("sl_merged", "MergedInterface"), ("sl_cross", "CrossAttentionInterface")):
        assert type(found[name].decoder.interface).__name__ == kind


def test_two_stages(build, place, root):
    settings, options = options_of(root, "sl_two_stage", place / "llm")
    args, model = build(f"stories/{settings}.yaml", *options)
    (optimizer,) = build.ASRTask.build_optimizers(args, model)
    frozen = {
        pattern: group.freeze_updates
        for pattern, group in optimizer.options.items()
        if group.freeze_updates
    }
    assert frozen == {"decoder.llm": 376}  # two epochs of 3,000 utterances in batches of 16
    one, two = (
        yaml.safe_load((root / f"conf/stories/train_speech_llm{end}.yaml").read_text())
        for end in ("", "_two_stage")
    )
    del two["optim_conf"]["groups"]["decoder.llm"]
    assert one == two


@pytest.mark.parametrize("corpus", ["indic", "librispeech", "mls"])
def test_mini(build, place, root, corpus):
    pieces = place / "pieces"
    pieces.mkdir(exist_ok=True)
    (pieces / "tokens.txt").write_text("<blank>\n<unk>\nword\n<sos/eos>\n")
    name = f"{corpus}/mini/train_speech_llm.yaml"
    config = read_training_config(root / "conf" / name)
    options = recipe_options(config, ["te", "pl"], str(pieces / "bpe.model"))
    _, model = build(name, "--decoder_conf", f"llm={place / 'llm'}", *options)
    _, ctc = build(f"{corpus}/mini/train_ctc.yaml")
    assert shapes(model, "encoder.") == shapes(ctc, "encoder.")
    assert model.decoder.adapter.stack == 2
    if corpus != "librispeech":
        assert model.decoder.soft_prompt.languages.codes == ("te", "pl")
        assert model.auxiliary.llm_prefix_rnnt.vocabulary.size == 4


@pytest.mark.parametrize(
    "name",
    [
        *("stories/train_copy_llama", "stories/finetune_copy_llama"),
        *("mls/mini/train_copy_llama", "librispeech/mini/train_copy_llama"),
        "indic/mini/train_copy_llama",
    ],
)
def test_copying_llms(build, place, root, name):
    from espnet_llm_plugin.llm.copy_model import CopyLanguageModel

    options = []
    if "finetune" in name:
        options = ["--lm_conf", f"llm={place / 'llm'}"]
    args, model = build(f"{name}.yaml", *options, task=build.LMTask)
    assert isinstance(model, CopyLanguageModel)
    text = (root / f"conf/{name}.yaml").read_text()
    if name == "stories/train_copy_llama":
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert f"of {millions:.1f} M parameters" in text
    if args.num_iters_per_epoch:
        steps = args.max_epoch * args.num_iters_per_epoch
        assert args.scheduler_conf["first_cycle_steps"] == steps


def test_grids_are_options_of_tuning(root):
    """Every grid of the recipes is one that tune_scales takes."""
    from espnet_llm_plugin.bin.tune_scales import get_parser
    from espnet_llm_plugin.inference.options import parse_with_configs

    grids = [path for path in (root / "conf").glob("**/*tune_speech_llm*.yaml")]
    assert len(grids) >= 9
    given = ["--output_dir", "o", "--text", "t", "--data_path_and_name_and_type", "a,speech,sound"]
    for path in grids:
        args = parse_with_configs(get_parser(), ["--config", str(path), *given])
        conf = yaml.safe_load(path.read_text())
        assert {name: getattr(args, name) for name in conf} == conf


def test_decoding_options(root):
    from espnet_llm_plugin.bin.asr_inference import get_parser
    from espnet_llm_plugin.inference.options import parse_with_configs

    for path in (root / "conf").glob("*/decode_speech_llm*.yaml"):
        given = ["--output_dir", "o", "--data_path_and_name_and_type", "a,speech,sound"]
        args = parse_with_configs(get_parser(), ["--config", str(path), *given])
        conf = yaml.safe_load(path.read_text())
        assert {name: getattr(args, name) for name in conf} == conf


def test_cosines_of_the_full_corpus(root):
    """3,000 utterances in batches of 16: 188 updates an epoch."""
    conf = yaml.safe_load((root / "conf/stories/train_speech_llm.yaml").read_text())
    assert conf["scheduler_conf"]["first_cycle_steps"] == conf["max_epoch"] * 188
    assert conf["optim_conf"]["lr"] == conf["scheduler_conf"]["max_lr"]
