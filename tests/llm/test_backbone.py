"""Loading LLMs: families, hub ids, and every way a directory can be wrong."""

import copy
import json
import pickle
import shutil

import pytest
import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from espnet_llm_plugin.llm.backbone import FrozenLLM, LLMIdentity, load_causal_lm, resolve_llm
from espnet_llm_plugin.llm.weights import fingerprint
from tests.llm.tiny import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny_model("llama", tied=False).save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(llama, tmp_path):
    """A copy of the directory to damage."""
    return shutil.copytree(llama, tmp_path / "llm")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_load_frozen_with_equal_logits(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    # Gemma 2 has no SDPA in transformers (soft-capped attention): eager is the fall-back
    assert loaded.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.tensor([[3, 5, 7, 1]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_attention_implementation(llama):
    eager = load_causal_lm(llama, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_dtype(llama):
    assert load_causal_lm(llama, dtype="bfloat16").dtype == torch.bfloat16
    assert load_causal_lm(llama, dtype="auto").dtype == torch.float32
    with pytest.raises(UserError, match="unknown LLM dtype 'int4'.*bfloat16"):
        load_causal_lm(llama, dtype="int4")


def test_sharded_weights(tmp_path):
    model = tiny_model("llama", tied=False)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    ids = torch.tensor([[3, 5, 7, 1]])
    loaded = load_causal_lm(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    shards[1].unlink()
    with pytest.raises(
        UserError, match=f"lacks 1 of the {len(shards)} weight files.*{shards[1].name}"
    ):
        load_causal_lm(tmp_path)


def test_loading_prints_nothing(llama, capfd):
    load_causal_lm(llama)
    out, err = capfd.readouterr()
    assert out == err == ""


class TestHub:
    @pytest.fixture
    def hub(self, llama, tmp_path, monkeypatch):
        """A cache with one downloaded model, and no network."""
        from huggingface_hub import constants

        repo = tmp_path / "models--Org--tiny"
        shutil.copytree(llama, repo / "snapshots" / "abc123")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc123")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return tmp_path

    def test_hub_id_from_the_cache(self, hub, llama):
        llm = FrozenLLM("Org/tiny")
        assert llm.directory.name == "abc123"
        assert llm.fingerprint == fingerprint(llama)
        assert llm.model().config.vocab_size == 37

    def test_unknown_hub_id(self, hub):
        with pytest.raises(
            UserError, match="(?s)Org/absent is neither.*HF_HUB_OFFLINE is set"
        ) as e:
            FrozenLLM("Org/absent")
        assert "\n" not in str(e.value)

    def test_client_failure_is_one_line(self, monkeypatch):
        import huggingface_hub

        def fail(*args, **kwargs):
            raise RuntimeError("401 Client Error\n" + 40 * "more\n")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match="401 Client Error.*gated") as error:
            resolve_llm("Org/gated")
        assert "\n" not in str(error.value)

    def test_pickled_weights_only_where_there_are_no_others(self, monkeypatch, tmp_path):
        import huggingface_hub

        patterns = []

        def download(hub_id, allow_patterns):
            patterns.append(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        resolve_llm("Org/pickled")
        assert ["*.bin" in p for p in patterns] == [False, True]
        (tmp_path / "model.safetensors").touch()
        resolve_llm("Org/safe")
        assert ["*.bin" in p for p in patterns] == [False, True, False]

    @pytest.mark.parametrize("name", ["./llm", "/no/such/llm", "~/llm", "a/b/c", "exp/llm", "exp/"])
    def test_paths_never_reach_the_hub(self, name, monkeypatch, tmp_path):
        (tmp_path / "exp").mkdir()
        monkeypatch.chdir(tmp_path)
        if name == "exp/":
            (tmp_path / "exp").rmdir()

        def never(hub_id):
            raise AssertionError("asked the hub")

        monkeypatch.setattr(backbone, "_download", never)
        with pytest.raises(UserError, match="does not exist") as error:
            FrozenLLM(name)
        assert name in str(error.value)


class TestBadDirectories:
    def test_file(self, llama):
        with pytest.raises(UserError, match="is a file; expected the directory"):
            FrozenLLM(llama / "model.safetensors")

    def test_its_config_stands_for_a_directory(self, llama):
        """ESPnet's unpack gives files their new places, not directories."""
        assert FrozenLLM(llama / "config.json").directory == llama

    def test_empty_directory(self, tmp_path):
        with pytest.raises(UserError, match="has no config.json"):
            FrozenLLM(tmp_path)

    def test_broken_config(self, damaged):
        (damaged / "config.json").write_text('{"model_type": "lla')
        with pytest.raises(UserError, match="config.json is not valid JSON"):
            FrozenLLM(damaged)

    def test_unknown_model_type(self, damaged):
        (damaged / "config.json").write_text('{"model_type": "llamma"}')
        with pytest.raises(UserError, match="config.json: transformers cannot read it"):
            FrozenLLM(damaged)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]},
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        ],
    )
    def test_not_a_causal_lm(self, damaged, config):
        (damaged / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"not a causal .*{config['architectures'][0]}"):
            FrozenLLM(damaged)

    def test_no_weights(self, damaged):
        (damaged / "model.safetensors").unlink()
        with pytest.raises(UserError, match="has no weights; expected model.safetensors"):
            FrozenLLM(damaged)

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_truncated_weights(self, damaged, keep):
        file = damaged / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:keep])
        with pytest.raises(UserError, match="model.safetensors is damaged.*copy the model again"):
            FrozenLLM(damaged)

    def test_garbage_header(self, damaged):
        (damaged / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 100)
        with pytest.raises(UserError, match="header is not readable"):
            FrozenLLM(damaged)

    @pytest.mark.parametrize("keep", [0, -100])
    def test_truncated_pickled_weights(self, damaged, keep):
        (damaged / "model.safetensors").unlink()
        file = damaged / "pytorch_model.bin"
        torch.save({"a": torch.zeros(100)}, file)
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UserError, match="pytorch_model.bin is damaged"):
            FrozenLLM(damaged)

    def test_broken_index(self, damaged):
        (damaged / "model.safetensors").rename(damaged / "model-1.safetensors")
        (damaged / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(UserError, match="not a weight index"):
            FrozenLLM(damaged)

    def test_weights_of_another_config(self, damaged):
        config = json.loads((damaged / "config.json").read_text())
        config["num_hidden_layers"] = 3
        (damaged / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="lack 9 tensors.*layers.2"):
            FrozenLLM(damaged).model()

    def test_other_shapes(self, damaged):
        config = json.loads((damaged / "config.json").read_text())
        config["intermediate_size"] = 32
        (damaged / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"in another shape.*mlp.*\(.*24.*\)"):
            FrozenLLM(damaged).model()


class TestFingerprint:
    def test_is_of_the_content(self, llama, damaged):
        assert fingerprint(damaged) == fingerprint(llama)
        assert len(fingerprint(llama)) == 32

    def test_how_it_was_written_does_not_count(self, llama, damaged):
        config = json.loads((damaged / "config.json").read_text())
        config.update(transformers_version="1.0", _name_or_path="/elsewhere")
        (damaged / "config.json").write_text(json.dumps(config))
        (damaged / "README.md").write_text("hello")
        assert fingerprint(damaged) == fingerprint(llama)

    def test_config_counts(self, llama, damaged):
        config = json.loads((damaged / "config.json").read_text())
        config["rms_norm_eps"] = 1e-3
        (damaged / "config.json").write_text(json.dumps(config))
        assert fingerprint(damaged) != fingerprint(llama)

    def test_one_byte_counts(self, llama, damaged):
        file = damaged / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert fingerprint(damaged) != fingerprint(llama)

    def test_large_files_are_sampled_to_both_ends(self, damaged, monkeypatch):
        monkeypatch.setattr("espnet_llm_plugin.llm.weights._BLOCK", 64)
        monkeypatch.setattr("espnet_llm_plugin.llm.weights._BLOCKS_PER_FILE", 8)
        file = damaged / "model.safetensors"
        data = file.read_bytes()
        assert len(data) > 64 * 8
        before = fingerprint(damaged)
        for changed in (0, len(data) // 7 + 10, len(data) - 1):
            file.write_bytes(data[:changed] + bytes([data[changed] ^ 1]) + data[changed + 1 :])
            assert fingerprint(damaged) != before


class TestFrozenLLM:
    def test_construction_loads_no_weights(self, llama, monkeypatch):
        def never(*args, **kwargs):
            raise AssertionError("loaded the weights")

        monkeypatch.setattr(backbone, "load_causal_lm", never)
        llm = FrozenLLM(llama)
        assert llm.vocab_size == 37 and len(llm.fingerprint) == 32
        assert not llm.is_loaded and "not loaded" in repr(llm)
        with pytest.raises(AssertionError, match="loaded the weights"):
            llm.model()

    def test_loads_once(self, llama):
        llm = FrozenLLM(llama)
        assert llm.model("cpu") is llm.model("cpu") and llm.is_loaded

    def test_copies_share_the_weights(self, llama):
        llm = FrozenLLM(llama)
        assert copy.deepcopy({"a": llm})["a"] is llm and copy.copy(llm) is llm

    def test_pickles_without_weights(self, llama):
        llm = FrozenLLM(llama, dtype="bfloat16")
        llm.model()
        data = pickle.dumps(llm)
        again = pickle.loads(data)
        assert not again.is_loaded and llm.is_loaded
        assert again.model().dtype == torch.bfloat16
        assert again.fingerprint == llm.fingerprint

    def test_is_invisible_in_a_module(self, llama):
        module = torch.nn.Linear(2, 2)
        module.llm = FrozenLLM(llama)
        module.llm.model()
        assert set(module.state_dict()) == {"weight", "bias"}


class TestIdentity:
    @pytest.fixture
    def other(self, tmp_path):
        tiny_model("llama", tied=False, seed=1).save_pretrained(tmp_path / "other")
        return tmp_path / "other"

    @pytest.mark.parametrize("strict", [True, False])
    def test_same_llm_loads_and_another_does_not(self, llama, other, strict):
        saved = LLMIdentity(FrozenLLM(llama)).state_dict()
        assert set(saved) == {"fingerprint"}
        LLMIdentity(FrozenLLM(llama)).load_state_dict(saved, strict=strict)
        with pytest.raises(UserError, match="not the one recorded in the checkpoint") as error:
            LLMIdentity(FrozenLLM(other)).load_state_dict(saved, strict=strict)
        assert str(other) in str(error.value)
        assert fingerprint(llama).hex()[:12] in str(error.value)

    def test_checkpoint_without_record(self, llama):
        with pytest.raises(UserError, match="fingerprint is missing"):
            LLMIdentity(FrozenLLM(llama)).load_state_dict({}, strict=False)

    def test_survives_averaging_and_half_precision(self, llama):
        identity = LLMIdentity(FrozenLLM(llama))
        saved = identity.state_dict()["fingerprint"]
        average = saved
        for _ in range(9):  # as ESPnet averages ten checkpoints
            average = average + saved
        identity.load_state_dict({"fingerprint": average / 10})
        for dtype in (torch.float16, torch.bfloat16):
            identity.load_state_dict({"fingerprint": saved.to(dtype)})
