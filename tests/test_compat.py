"""Each work-around, and the fault it works around."""

import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from espnet_llm_plugin import compat
from espnet_llm_plugin.errors import UserError


def test_installed_espnet_is_supported():
    assert compat.check_espnet_version() in compat.SUPPORTED_ESPNET


def test_unsupported_espnet_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda package: "202301")
    with pytest.raises(UserError, match=r"ESPnet 202301 is installed.*202511"):
        compat.check_espnet_version()


def test_missing_espnet_is_named(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(UserError, match="not installed.*pip install espnet=="):
        compat.check_espnet_version()


@pytest.mark.filterwarnings("always")
def test_quiet_imports_drops_only_the_harmless_lines(capsys):
    with compat.quiet_imports():
        print("Failed to import Flash Attention, using ESPnet default: x")
        print("something that matters")
        warnings.warn_explicit("old torch", FutureWarning, "espnet2/x.py", 1, module="espnet2.x")
        warnings.warn_explicit("ours", FutureWarning, "mine.py", 1, module="mine")
        print("also this", file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == "something that matters\n"
    assert "also this\n" in captured.err
    assert "old torch" not in captured.err


def test_importing_the_tasks_prints_nothing():
    code = (
        "from espnet_llm_plugin.compat import import_quietly\n"
        "import_quietly('espnet2.tasks.asr'); import_quietly('espnet2.tasks.lm')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def _reporter():
    """Three epochs; the later the better."""
    from espnet2.train.reporter import Reporter

    reporter = Reporter()
    for epoch in (1, 2, 3):
        reporter.set_epoch(epoch)
        with reporter.observe("valid") as observer:
            observer.register({"loss": 1.0 / epoch, "acc": float(epoch)})
            observer.next()
    return reporter


@pytest.fixture
def epochs(tmp_path):
    for epoch in (1, 2, 3):
        torch.save({"weight": torch.tensor([float(epoch)])}, tmp_path / f"{epoch}epoch.pth")
    return tmp_path


def _average(average, directory, nbest):
    criteria = [("valid", "loss", "min"), ("valid", "acc", "max"), ("absent", "x", "min")]
    average(directory, _reporter(), criteria, nbest)
    return {
        path.name: float(torch.load(path)["weight"]) for path in directory.glob("valid.*best.pth")
    }


def test_espnet_still_averages_wrongly(epochs):
    """When this fails, ESPnet has mended its averaging: remove our wrapper."""
    from espnet2.main_funcs.average_nbest_models import average_nbest_models

    values = _average(average_nbest_models, epochs, [2, 3])
    assert values["valid.loss.ave_3best.pth"] != pytest.approx(2.0)


@pytest.mark.parametrize("nbest", [[3, 2], [2, 3], 3, [1, 2, 3, 10]])
def test_averages_are_right_for_every_n_and_criterion(epochs, nbest):
    trainer = compat.import_quietly("espnet2.train.trainer")
    compat.patch_espnet_trainer()
    compat.patch_espnet_trainer()
    values = _average(trainer.average_nbest_models, epochs, nbest)
    right = {1: 3.0, 2: 2.5, 3: 2.0}
    wanted = [n for n in ([nbest] if isinstance(nbest, int) else nbest) if n <= 3]
    assert values == {
        f"valid.{key}.ave_{n}best.pth": pytest.approx(right[n])
        for key in ("loss", "acc")
        for n in wanted
    }
    assert (epochs / "valid.loss.ave.pth").resolve().name == "valid.loss.ave_3best.pth"


def test_averaging_fewer_epochs_than_asked_falls_back_to_the_best(epochs):
    trainer = compat.import_quietly("espnet2.train.trainer")
    compat.patch_espnet_trainer()
    _average(trainer.average_nbest_models, epochs, 10)
    assert (epochs / "valid.loss.ave.pth").resolve().name == "3epoch.pth"


class _DiskFull:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    compat.patch_espnet_trainer()
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 1}, path)
    with pytest.raises(OSError, match="No space left"):
        torch.save({"epoch": 2, "rest": _DiskFull()}, path)
    assert torch.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("decoder, tuning", [("speech_llm", "frozen"), ("other", "full")])
def test_statistics_are_collected_without_training_an_llm(monkeypatch, decoder, tuning):
    from argparse import Namespace

    asr = compat.import_quietly("espnet2.tasks.asr")

    class Task:
        @classmethod
        def build_model(cls, args):
            return cls, dict(args.decoder_conf)

    monkeypatch.setattr(asr, "ASRTask", Task)
    compat.patch_asr_statistics()
    compat.patch_asr_statistics()
    conf = {"llm": "x", "tuning": "full", "train_embeddings": True}
    args = Namespace(decoder=decoder, decoder_conf=conf, collect_stats=True)
    cls, built = Task.build_model(args)
    assert cls is Task and built["tuning"] == tuning and args.decoder_conf is conf
    assert set(built) == ({"llm", "tuning"} if tuning == "frozen" else set(conf))
    args.collect_stats = False
    assert Task.build_model(args)[1] == conf


def test_gradient_checkpointing_under_its_old_and_new_name():
    """Both names of transformers; embeddings keep needing no gradient."""

    class Model:
        def __init__(self):
            self.calls = []

        def gradient_checkpointing_enable(self, kwargs):
            self.calls.append(("old", kwargs))

        def disable_input_require_grads(self):
            self.calls.append("disable")

    class NewModel(Model):
        def activation_checkpointing_enable(self, kwargs):
            self.calls.append(("new", kwargs))

    for cls, name in ((Model, "old"), (NewModel, "new")):
        model = cls()
        compat.enable_gradient_checkpointing(model)
        assert model.calls == [(name, {"use_reentrant": False}), "disable"]

    from tests.llm.tiny import tiny_model

    model = tiny_model("llama")
    compat.enable_gradient_checkpointing(model)
    assert model.is_gradient_checkpointing
    assert not model.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_chat_templates_see_the_same_day_always():
    """The prompt of a speech LLM uses it (tests/speech_llm/test_prompt.py)."""
    from transformers.utils import chat_template_utils

    before = chat_template_utils.datetime
    with pytest.raises(RuntimeError), compat.same_day_in_chat_templates():
        assert chat_template_utils.datetime.now().strftime("%d %b %Y") == "26 Jul 2024"
        raise RuntimeError
    assert chat_template_utils.datetime is before


def test_lm_task_takes_an_llms_own_tokens():
    from espnet2.tasks.lm import LMTask

    def choices():
        (action,) = (a for a in LMTask.get_parser()._actions if a.dest == "token_type")
        return action.choices

    compat.patch_lm_token_types()
    compat.patch_lm_token_types()
    assert choices() == ["bpe", "char", "word", "hugging_face"]
