"""CheckpointContract: what is in a checkpoint, and which checkpoints are refused."""

import pytest
import torch

from espnet_llm_plugin.errors import UserError


class CheckpointContract:
    """Mix in and define :meth:`make` and :meth:`run`; the rest where it applies."""

    def make(self) -> torch.nn.Module:
        """The model as a training script builds it, randomly initialised."""
        raise NotImplementedError

    def run(self, model) -> torch.Tensor:
        """Deterministic outputs."""
        raise NotImplementedError

    def frozen_tensors(self, model) -> list[torch.Tensor]:
        """Weights of the frozen LLM, which must not be in the checkpoint."""
        return []

    def make_with_other_llm(self):
        """The model around another frozen LLM, or ``None`` if it has none."""
        return None

    def _trained(self):
        model = self.make()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def test_save_load_gives_identical_outputs(self, tmp_path):
        model = self._trained()
        torch.save(model.state_dict(), tmp_path / "model.pth")
        fresh = self.make()
        if list(model.parameters()):
            assert not torch.allclose(self.run(model), self.run(fresh))
        fresh.load_state_dict(torch.load(tmp_path / "model.pth"), strict=True)
        assert torch.equal(self.run(model), self.run(fresh))

    def test_frozen_weights_are_not_in_the_checkpoint(self):
        model = self.make()
        self.run(model)  # the LLM is in memory now
        frozen = self.frozen_tensors(model)
        saved = model.state_dict()
        pointers = {tensor.data_ptr() for tensor in frozen}
        assert not [name for name, tensor in saved.items() if tensor.data_ptr() in pointers]
        assert not [p for p in model.parameters() if p.data_ptr() in pointers]
        if frozen:
            trained = sum(p.numel() for p in model.parameters())
            assert sum(t.numel() for t in saved.values()) <= trained + 64

    def test_every_missing_trainable_tensor_is_an_error_that_names_it(self):
        model = self._trained()
        saved = model.state_dict()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rest = {key: value for key, value in saved.items() if key != name}
            # as ESPnet's build_model_from_file loads
            with pytest.raises(UserError, match=name):
                self.make().load_state_dict(rest, strict=False)

    def test_another_llm_is_an_error_that_names_it(self):
        other = self.make_with_other_llm()
        if other is None:
            assert not self.frozen_tensors(self.make())
            return
        with pytest.raises(UserError, match="LLM .* is not the one recorded"):
            other.load_state_dict(self.make().state_dict(), strict=False)

    def test_average_of_checkpoints_loads(self):
        """ESPnet sums state dicts, divides float tensors and leaves integer ones summed."""
        model = self._trained()
        saved = [model.state_dict() for _ in range(3)]
        average = {}
        for name in saved[0]:
            average[name] = saved[0][name] + saved[1][name] + saved[2][name]
            if not str(average[name].dtype).startswith("torch.int"):
                average[name] = average[name] / 3
        fresh = self.make()
        fresh.load_state_dict(average, strict=True)
        torch.testing.assert_close(self.run(fresh), self.run(model))
