"""LibriSpeech from a Kaldi directory to decoded text: formats and lengths as they really are."""

import json

import pytest

from espnet_llm_plugin.bin import asr_inference
from espnet_llm_plugin.data.format import format_data_dir
from tests.inference.tiny_asr import KINDS, make_asr, read_scp

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def librispeech(shared_data, tmp_path_factory):
    target = tmp_path_factory.mktemp("librispeech") / "dump"
    format_data_dir(shared_data / "speech" / "librispeech", target, fs=16000, nj=1)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_librispeech_decodes_without_failures(librispeech, tmp_path, kind):
    keys = list(read_scp(librispeech / "wav.scp"))[::10]
    (tmp_path / "keys").write_text("".join(f"{key}\n" for key in keys))
    asr_inference.main(
        [
            *make_asr(tmp_path / kind, kind).asr_options(),
            *["--data_path_and_name_and_type", f"{librispeech}/wav.scp,speech,sound"],
            *["--key_file", str(tmp_path / "keys"), "--beam_size", "2", "--num_workers", "0"],
            *["--output_dir", str(tmp_path / "out")],
        ]
    )
    decoded = (tmp_path / "out/1best_recog/text").read_text().splitlines()
    assert [line.split()[0] for line in decoded] == keys
    assert json.loads((tmp_path / "out/rtf.json").read_text())["failed"] == {}
