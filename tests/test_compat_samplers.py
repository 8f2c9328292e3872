"""ESPnet's language-balanced batches, through ESPnet's own factory of iterators."""

from collections import Counter

import numpy as np
import pytest
import soundfile

from espnet_llm_plugin.compat_samplers import patch_category_samplers
from espnet_llm_plugin.data.filter import filter_data_dir

# Utterances by language; all of 0.1 s.
SIZES = {"de": 30, "en": 240, "pl": 10}


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """A training set as stage 4 leaves it, with the shape files of stage 10."""
    path = tmp_path_factory.mktemp("dump")
    org, target = path / "org", path / "train"
    org.mkdir()
    keys = [f"{lang}_{i:03d}" for lang, size in SIZES.items() for i in range(size)]
    soundfile.write(path / "a.wav", np.zeros(1600), 16000)
    rows = {"wav.scp": path / "a.wav", "text": "a", "utt2num_samples": 1600}
    for name, value in rows.items():
        (org / name).write_text("".join(f"{key} {value}\n" for key in keys))
    for name in ("utt2spk", "utt2lang"):
        (org / name).write_text("".join(f"{key} {key[:2]}\n" for key in keys))
    filter_data_dir(org, target, fs=16000, min_duration=0.01)
    (path / "speech_shape").write_text("".join(f"{key} 1600\n" for key in keys))
    (path / "text_shape").write_text("".join(f"{key} 1,30\n" for key in keys))
    return path


def epoch_of(dump, *options, epoch=1):
    """Languages of the utterances of one epoch, and the number of batches."""
    from espnet_llm_plugin.compat import import_quietly

    task = import_quietly("espnet2.tasks.asr").ASRTask
    alone = import_quietly("espnet2.train.distributed_utils").DistributedOption()
    wav, text = (f"{dump}/train/{name}" for name in ("wav.scp", "text"))
    arguments = ["--train_data_path_and_name_and_type", f"{wav},speech,sound"]
    arguments += ["--train_data_path_and_name_and_type", f"{text},text,text"]
    arguments += ["--train_shape_file", f"{dump}/speech_shape"]
    arguments += ["--train_shape_file", f"{dump}/text_shape", "--use_preprocessor", "false"]
    arguments += ["--output_dir", str(dump), "--token_type", "char", "--num_workers", "0"]
    args = task.get_parser().parse_args([*arguments, *options])
    factory = task.build_iter_factory(args, alone, "train")
    batches = list(factory.build_iter(epoch).batch_sampler)
    return Counter(key[:2] for batch in batches for key in batch), len(batches)


CATPOW = ["--iterator_type", "category", "--batch_type", "catpow", "--batch_bins", "16000"]


def test_espnet_itself_refuses_two_shape_files():
    """The fault that is worked around."""
    from espnet2.samplers.category_power_sampler import CategoryPowerSampler

    patch_category_samplers()
    original = CategoryPowerSampler.__init__.__wrapped__
    with pytest.raises(AssertionError, match="Only one shape file is supported"):
        original(
            CategoryPowerSampler.__new__(CategoryPowerSampler),
            batch_bins=1,
            shape_files=["speech_shape", "text_shape"],
            category2utt_file="never read",
        )


def test_the_exponent_balances_languages(dump):
    patch_category_samplers()
    patch_category_samplers()
    plain, _ = epoch_of(dump, "--batch_type", "sorted", "--batch_size", "10")
    assert plain == SIZES
    scale = ["--dataset_scaling_factor", "10"]
    for exponent in (0.0, 0.5, 1.0):
        counts, batches = epoch_of(dump, *CATPOW, *scale, "--upsampling_factor", str(exponent))
        total = sum(SIZES.values())
        weights = {lang: (size / total) ** exponent for lang, size in SIZES.items()}
        assert counts.total() == 10 * total
        for lang, weight in weights.items():
            share = weight / sum(weights.values())
            # 2,800 independent draws: four standard deviations
            margin = 4 * (share * (1 - share) / counts.total()) ** 0.5
            assert counts[lang] / counts.total() == pytest.approx(share, abs=margin)
        assert batches == pytest.approx(counts.total() / 11, abs=1)


def test_every_epoch_draws_anew(dump):
    patch_category_samplers()
    first, again, second = (epoch_of(dump, *CATPOW, epoch=e)[0] for e in (1, 1, 2))
    assert first == again and first != second


def test_without_languages_the_error_names_the_file(dump, tmp_path):
    patch_category_samplers()
    (tmp_path / "train").mkdir()
    for name in ("wav.scp", "text"):
        (tmp_path / "train" / name).write_text((dump / "train" / name).read_text())
    for name in ("speech_shape", "text_shape"):
        (tmp_path / name).write_text((dump / name).read_text())
    with pytest.raises(ValueError, match="category2utt mandatory"):
        epoch_of(tmp_path, *CATPOW)
