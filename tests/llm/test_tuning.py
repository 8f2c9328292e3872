"""The LLM of a speech model: what is trained, saved, loaded, copied and merged."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.llm import backbone
from espnet_llm_plugin.llm.backbone import load_causal_lm
from espnet_llm_plugin.llm.lora import lora_options, merge_lora
from espnet_llm_plugin.llm.tuning import TunedLLM
from tests.contracts.checkpoint_contract import CheckpointContract
from tests.llm.tiny import FAMILIES, tiny_model
from tests.processes import run_joined

IDS = torch.tensor([[3, 5, 7, 1, 9], [2, 2, 4, 11, 6]])
LORA = {"r": 3, "alpha": 6}


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """Directories of tiny random LLMs by name, written when first asked for."""
    made = {}

    def get(family="llama", tied=True, seed=0):
        key = (family, tied, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            tiny_model(family, tied=tied, seed=seed).save_pretrained(made[key])
        return str(made[key])

    return get


def logits(llm, ids=IDS):
    return llm.model("cpu")(input_ids=ids, use_cache=False).logits


def moved(llm, scale=0.3):
    """``llm`` after a training that changed every trained parameter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return llm


def training_loss(llm, ids=IDS, prefix=None):
    """Next-token loss after a prefix of embeddings (B, P, D), as a speech LLM has it."""
    embeddings = llm.embed(ids)
    if prefix is not None:
        embeddings = torch.cat([prefix.to(embeddings.dtype), embeddings], dim=1)
    output = llm.model("cpu")(inputs_embeds=embeddings, use_cache=False).logits.float()
    text = output[:, -ids.shape[1] : -1]
    return torch.nn.functional.cross_entropy(text.transpose(1, 2), ids[:, 1:])


# --- what is trained ---


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_at_the_start_is_the_llm_in_every_family(llms, family):
    llm = TunedLLM(llms(family), tuning="lora", lora_conf=LORA).eval()
    assert not llm.is_loaded
    plain = load_causal_lm(llms(family))
    torch.testing.assert_close(logits(llm), plain(input_ids=IDS).logits)
    embeddings = llm.embed(IDS)
    assert embeddings.shape[-1] == llm.hidden_size
    assert logits(llm).shape[-1] == llm.vocab_size
    assert llm.context == plain.config.max_position_embeddings
    training_loss(llm).backward()
    for name, parameter in llm.named_parameters():
        # A gets none as long as B is zero
        assert (parameter.grad.abs().max() > 0) == ("lora_B" in name), name
    assert not torch.allclose(logits(moved(llm)), plain(input_ids=IDS).logits, atol=1e-2)


def test_what_each_tuning_trains(llms):
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def trained(**conf):
        return {name for name, _ in TunedLLM(llms(tied=False), **conf).named_parameters()}

    def lora(*names):
        return {
            f"weights.model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}.{matrix}"
            for i in range(2)
            for name in names
            for matrix in ("lora_A.weight", "lora_B.weight")
        }

    tables = {"weights.model.embed_tokens.weight", "weights.lm_head.weight"}
    everything = {f"weights.{n}" for n, _ in load_causal_lm(llms(tied=False)).named_parameters()}
    assert trained(tuning="frozen") == set()
    assert trained(tuning="frozen", train_embeddings=True) == tables
    assert trained(tuning="lora") == lora(*layers[:4])
    assert trained(tuning="lora", lora_conf={"targets": "all-linear"}) == lora(*layers)
    some = {"targets": ["v_proj", "up_proj"]}
    assert trained(tuning="lora", lora_conf=some) == lora("v_proj", "up_proj")
    assert trained(tuning="lora", lora_conf={"targets": "layers.1.mlp.up_proj"}) == {
        name for name in lora("up_proj") if "layers.1" in name
    }
    assert trained(tuning="lora", train_embeddings=True) == lora(*layers[:4]) | tables
    assert trained(tuning="full") == everything
    assert trained(tuning="full", train_embeddings=False) == everything - tables
    tied = TunedLLM(llms(), tuning="frozen", train_embeddings=True)
    assert {name for name, _ in tied.named_parameters()} == {"weights.model.embed_tokens.weight"}


@pytest.mark.parametrize("rslora, scaling", [(False, 6 / 4), (True, 6 / 2)])
def test_lora_is_its_equation(llms, rslora, scaling):
    """x -> W x + scaling B A x, with one layer's weight replaced by hand."""
    conf = {"r": 4, "alpha": 6, "rslora": rslora, "targets": "layers.1.self_attn.k_proj"}
    llm = moved(TunedLLM(llms(), lora_conf=conf))
    matrices = dict(llm.named_parameters())
    prefix = "weights.model.layers.1.self_attn.k_proj"
    a, b = (matrices[f"{prefix}.lora_{m}.weight"].detach() for m in "AB")
    assert a.shape[0] == b.shape[1] == 4
    plain = load_causal_lm(llms())
    plain.model.layers[1].self_attn.k_proj.weight += scaling * b @ a
    torch.testing.assert_close(logits(llm), plain(input_ids=IDS).logits)


def test_dropout_is_for_training(llms):
    llm = moved(TunedLLM(llms(), lora_conf={"dropout": 0.5}))
    assert not torch.equal(logits(llm.train()), logits(llm.train()))
    without = TunedLLM(llms(), lora_conf={"dropout": 0.0})
    without.load_state_dict(llm.state_dict())
    assert torch.equal(logits(llm.eval()), logits(without))


def test_dropout_of_the_llm_itself_is_for_an_llm_that_is_trained(llms):
    """OPT comes with dropout 0.1; a frozen LLM computes the same in training and decoding."""
    for tuning_, differs in (("frozen", False), ("lora", True), ("full", True)):
        llm = TunedLLM(llms("opt"), tuning=tuning_).train()
        assert torch.equal(logits(llm), logits(llm)) is not differs
        llm.eval()
        assert torch.equal(logits(llm), logits(llm))


# --- gradients ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "conf",
    [
        {"tuning": "frozen"},
        {"tuning": "lora", "lora_conf": {"targets": "all-linear"}},
        {"tuning": "lora", "train_embeddings": True},
        {"tuning": "full"},
    ],
    ids=["frozen", "lora", "embeddings", "full"],
)
def test_gradient_checkpointing_gives_the_same_gradients(llms, family, conf):
    """For trained tensors and the audio; each layer is computed again in the backward pass."""

    def gradients(llm):
        prefix = torch.randn(2, 3, llm.hidden_size, generator=torch.Generator().manual_seed(1))
        prefix.requires_grad_(True)
        loss = training_loss(llm, prefix=prefix)
        loss.backward()
        return {"prefix": prefix.grad, **{n: p.grad for n, p in llm.named_parameters()}}

    def make(**more):
        torch.manual_seed(0)
        llm = TunedLLM(llms(family), **conf, **more)
        for module in llm.model("cpu").modules():  # GPT-2's own dropout would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return moved(llm, 0.1).train()

    plain, recomputing = make(), make(gradient_checkpointing=True)
    calls = []
    for module in recomputing.model("cpu").modules():
        if type(module).__name__.endswith("MLP"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = gradients(plain), gradients(recomputing)
    assert len(calls) == 4  # two layers, twice
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
    calls.clear()
    recomputing.eval()
    gradients(recomputing)
    assert len(calls) == 2


def test_lora_with_checkpointing_and_without_any_input_that_needs_gradients(llms):
    """The trap of reentrant checkpointing: LoRA would silently get no gradient."""
    llm = moved(TunedLLM(llms(), gradient_checkpointing=True)).train()
    embeddings = llm.embed(IDS)
    assert not embeddings.requires_grad
    before = float(training_loss(llm))
    optimizer = torch.optim.Adam(llm.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        training_loss(llm).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in llm.parameters())
        optimizer.step()
    assert float(training_loss(llm)) < before - 0.5
    with torch.inference_mode():
        logits(llm)


def distributed(rank, directory, llm):
    """Two updates, the first of which leaves LoRA as it is, of two processes."""
    from espnet_llm_plugin.optimizers import AdamWGroups

    states = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = SpeechLike(TunedLLM(llm, gradient_checkpointing=True))
        groups = {"llm": {"freeze_updates": 1, "lr_factor": 0.5}}
        optimizer = AdamWGroups(model.named_parameters(), groups=groups, lr=0.05)
        # find_unused_parameters=False
        run = torch.nn.parallel.DistributedDataParallel(model) if parallel else model
        for update in range(2):
            optimizer.zero_grad()
            rows = IDS[rank : rank + 1] if parallel else IDS
            run(rows).backward()
            optimizer.step()
            lora = [p for n, p in model.llm.named_parameters() if "lora_B" in n]
            assert all((p.abs().max() > 0) == (update == 1) for p in lora)
        states.append(model.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, atol=1e-4, rtol=1e-3, msg=name)


class SpeechLike(torch.nn.Module):
    """A trained part before the LLM."""

    def __init__(self, llm):
        super().__init__()
        self.llm = llm.train()
        self.audio = torch.nn.Parameter(torch.randn(1, 3, llm.hidden_size))

    def forward(self, ids):
        return training_loss(self.llm, ids, self.audio.expand(len(ids), -1, -1))


def test_two_processes_train_as_one(llms, tmp_path):
    run_joined(distributed, tmp_path, llms())


def test_family_without_checkpointing(llms, monkeypatch):
    from transformers import LlamaForCausalLM, LlamaPreTrainedModel

    for cls in (LlamaForCausalLM, LlamaPreTrainedModel):
        monkeypatch.setattr(cls, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="set `gradient_checkpointing: false`"):
        TunedLLM(llms(), gradient_checkpointing=True).model()


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_half_precision_base_with_full_precision_training(llms, targets):
    conf = {"tuning": "lora", "lora_conf": {"targets": targets}}
    exact = TunedLLM(llms(), **conf)
    half = TunedLLM(llms(), dtype="bfloat16", **conf)
    half.load_state_dict(moved(exact).state_dict())
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    own = {p.data_ptr() for p in half.parameters()}
    rest = [p for p in half.model().parameters() if p.data_ptr() not in own]
    assert rest and {p.dtype for p in rest} == {torch.bfloat16}
    assert half.embed(IDS).dtype == torch.bfloat16
    expected, found = logits(exact), logits(half).float()
    assert (expected - found).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(expected, found)
    gradients = []
    for llm in (exact, half):
        training_loss(llm.train()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in llm.parameters()]))
    assert gradients[1].dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert similarity > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits(half)).all()


def test_dtype_as_stored(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert TunedLLM(str(tmp_path), dtype="auto").model().dtype == torch.bfloat16
    assert TunedLLM(str(tmp_path), dtype="float32").model().dtype == torch.float32
    # float32 is what is trained, also where bfloat16 is stored
    assert {p.dtype for p in TunedLLM(str(tmp_path), tuning="full").parameters()} == {torch.float32}


# --- loading, moving, copying ---


def test_weights_are_loaded_once_and_only_when_needed(llms, monkeypatch):
    loads = []

    def load(*args, **kwargs):
        loads.append(args)
        return load_causal_lm(*args, **kwargs)

    monkeypatch.setattr(backbone, "load_causal_lm", load)
    for conf, at_once in (
        ({"tuning": "frozen"}, 0),
        ({"tuning": "lora", "dtype": "bfloat16"}, 0),
        ({"tuning": "lora", "train_embeddings": True}, 1),
        ({"tuning": "full"}, 1),
    ):
        loads.clear()
        llm = TunedLLM(llms(), **conf)
        llm.train()
        llm.eval()
        llm.double().float()
        llm.load_state_dict(llm.state_dict())
        sizes = (llm.hidden_size, llm.vocab_size, llm.context)
        assert sizes == (16, 37, 64) and len(loads) == at_once
        logits(llm)
        logits(llm)
        assert len(loads) == 1 and llm.is_loaded


@pytest.mark.parametrize("conf", [{"tuning": "frozen"}, {"tuning": "lora"}, {"tuning": "full"}])
@pytest.mark.parametrize("loaded", [False, True])
def test_copies(llms, conf, loaded):
    llm = moved(TunedLLM(llms(), **conf, dtype="float32")).eval()
    if loaded:
        logits(llm)
    twin = copy.deepcopy(llm)
    pickled = pickle.loads(pickle.dumps(llm))
    assert twin.is_loaded == llm.is_loaded and not pickled.is_loaded
    expected = logits(llm)
    assert torch.equal(logits(twin), expected) and torch.equal(logits(pickled), expected)
    # frozen weights are shared, trained ones are not
    moved(twin)
    assert torch.equal(logits(llm), expected)
    if list(llm.parameters()):
        assert not torch.allclose(logits(twin), expected)
    if loaded:
        own = {p.data_ptr() for p in llm.parameters()}
        frozen = {p.data_ptr() for p in llm.model().parameters()} - own
        other = {p.data_ptr() for p in twin.model().parameters()}
        assert frozen <= other and not own & other
        assert bool(frozen) == (conf["tuning"] != "full")


def test_registered_parameters_stay_those_of_the_llm_when_torch_replaces_them(llms):
    llm = moved(TunedLLM(llms())).eval()
    expected = logits(llm)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        llm.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert torch.equal(logits(llm), expected)
    assert not torch.equal(logits(moved(llm)), expected)


def test_mode_follows_a_model_that_was_loaded_before_or_after(llms):
    llm = TunedLLM(llms())
    llm.eval()
    assert not llm.model().training
    llm.train()
    assert llm.model().training
    holder = torch.nn.Sequential(llm).eval()
    assert not holder[0].model().training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("conf", [{"tuning": "frozen"}, {"tuning": "lora"}, {"tuning": "full"}])
def test_on_an_accelerator(llms, conf):
    llm = moved(TunedLLM(llms(), **conf)).eval()
    expected = logits(llm)
    twin = copy.deepcopy(llm)
    llm.cuda()
    found = llm.model("cuda")(input_ids=IDS.cuda(), use_cache=False).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(logits(twin), expected)
    for parameter in llm.parameters():
        assert parameter.is_cuda and any(parameter is p for p in llm.model("cuda").parameters())


# --- checkpoints ---


class TestCheckpoints(CheckpointContract):
    @pytest.fixture(
        autouse=True,
        params=[
            {"tuning": "frozen"},
            {"tuning": "frozen", "train_embeddings": True},
            {"tuning": "lora", "lora_conf": {"r": 3, "rslora": True}},
            {"tuning": "lora", "dtype": "bfloat16"},
            {"tuning": "lora", "train_embeddings": True},
            {"tuning": "full"},
            {"tuning": "full", "train_embeddings": False},
        ],
        ids=["frozen", "tables", "lora", "lora-bf16", "lora-tables", "full", "full-but-tables"],
    )
    def _conf(self, request, llms):
        self.llms, self.conf = llms, request.param

    def make(self):
        return TunedLLM(self.llms(), **self.conf)

    def run(self, model):
        return logits(model.eval()).detach()

    def frozen_tensors(self, model):
        if self.conf == {"tuning": "full"}:
            return []
        own = {p.data_ptr() for p in model.parameters()}
        return [p for p in model.model().parameters() if p.data_ptr() not in own]

    def make_with_other_llm(self):
        if self.conf == {"tuning": "full"}:
            return None
        return TunedLLM(self.llms(seed=1), **self.conf)


def test_lora_checkpoint_is_small_and_of_stable_names(llms, tmp_path):
    llm = TunedLLM(llms(), lora_conf={"r": 2})
    names = sorted(llm.state_dict())
    logits(llm)
    assert sorted(llm.state_dict()) == names
    assert names[0] == "identity.fingerprint" and len(names) == 1 + 2 * 4 * 2
    assert all(".lora_" in name for name in names[1:])
    numbers = sum(tensor.numel() for tensor in llm.state_dict().values())
    assert numbers == 32 + sum(p.numel() for p in llm.parameters())


def test_checkpoints_of_another_tuning_or_rank(llms):
    def state(**conf):
        return TunedLLM(llms(), **conf).state_dict()

    lora = TunedLLM(llms(), lora_conf={"r": 2, "targets": ["q_proj"]})
    with pytest.raises(UserError, match="lacks 4 of the 4 trained tensors.*tuning: lora"):
        lora.load_state_dict(state(tuning="frozen"), strict=False)
    with pytest.raises(UserError, match="has 4 tensors of the LLM that are not trained here"):
        other = state(lora_conf={"r": 2, "targets": ["q_proj", "v_proj"]})
        lora.load_state_dict(other, strict=False)
    with pytest.raises(UserError, match=r"is of shape \(3, 16\), expected \(2, 16\)"):
        other = state(lora_conf={"r": 3, "targets": ["q_proj"]})
        lora.load_state_dict(other, strict=False)
    assert torch.equal(lora.identity.fingerprint, TunedLLM(llms()).identity.fingerprint)


def test_two_stages_as_two_runs(llms, tmp_path):
    """--init_param: what was trained beside the frozen LLM goes on beside LoRA."""
    from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

    first = SpeechLike(TunedLLM(llms(), tuning="frozen"))
    torch.save(first.state_dict(), tmp_path / "1.pth")
    second = SpeechLike(TunedLLM(llms(), tuning="lora"))
    load_pretrained_model(str(tmp_path / "1.pth"), second, False)
    assert torch.equal(first.audio, second.audio)
    assert float(first(IDS)) == pytest.approx(float(second(IDS)), abs=1e-5)
    other = SpeechLike(TunedLLM(llms(seed=1), tuning="lora"))
    with pytest.raises(UserError, match="not the one recorded"):
        load_pretrained_model(str(tmp_path / "1.pth"), other, False)


def test_training_goes_on_as_if_it_had_not_stopped(llms):
    """Model and optimizer state saved and loaded in the middle, with checkpointing."""
    from espnet_llm_plugin.optimizers import AdamWGroups

    def build():
        torch.manual_seed(0)
        llm = TunedLLM(llms(), gradient_checkpointing=True, train_embeddings=True).train()
        groups = {"*.lora_*": {"freeze_updates": 2}, "weights": {"lr_factor": 0.1}}
        return llm, AdamWGroups(llm.named_parameters(), groups=groups, lr=0.02)

    def train(llm, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            training_loss(llm).backward()
            optimizer.step()

    llm, optimizer = build()
    train(llm, optimizer, 3)
    saved = copy.deepcopy((llm.state_dict(), optimizer.state_dict()))
    train(llm, optimizer, 3)
    resumed = build()
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    train(*resumed, 3)
    assert torch.equal(logits(llm.eval()), logits(resumed[0].eval()))


# --- merged ---


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(llms, family):
    conf = {"r": 3, "targets": "all-linear", "rslora": True, "dropout": 0.2}
    llm = moved(TunedLLM(llms(family), lora_conf=conf)).eval()
    expected = logits(llm)
    plain = load_causal_lm(llms(family))
    assert not torch.allclose(expected, plain(input_ids=IDS).logits, atol=1e-2)
    merged = copy.deepcopy(llm).model()
    merge_lora(merged)
    found = merged(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(logits(llm), expected)  # the shared weights are as they were


@pytest.mark.parametrize("loaded", [False, True])
def test_merged_for_decoding(llms, loaded):
    llm = moved(TunedLLM(llms(), lora_conf={"dropout": 0.3, "targets": "all-linear"}))
    twin = copy.deepcopy(llm).eval()
    saved = {name: value.clone() for name, value in llm.state_dict().items()}
    expected = logits(twin)
    if loaded:
        logits(llm)
    llm.merge()
    torch.testing.assert_close(logits(llm), expected, atol=1e-4, rtol=1e-4)
    assert not [m for m in llm.model().modules() if hasattr(m, "lora_A")]
    assert llm.model() is llm.model()
    for copied in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), llm.double().float()):
        torch.testing.assert_close(logits(copied), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(llm.state_dict()[name], saved[name]) for name in saved)
    with pytest.raises(RuntimeError, match="merged for decoding"):
        llm.train()
    # other weights take the place of those that were merged
    other = moved(twin)
    llm.load_state_dict(other.state_dict())
    assert not torch.allclose(logits(other), expected, atol=1e-2)
    torch.testing.assert_close(logits(llm), logits(other), atol=1e-4, rtol=1e-4)
    for conf in ({"tuning": "frozen"}, {"tuning": "full"}):
        plain = TunedLLM(llms(), **conf)
        plain.merge()
        assert torch.equal(logits(plain), logits(TunedLLM(llms(), **conf).eval()))
        plain.train()


def test_loaded_while_decoding_and_trained_afterwards(llms):
    llm = TunedLLM(llms(), tuning="lora").eval()
    with torch.inference_mode():
        expected = logits(llm).clone()
    training_loss(llm.train()).backward()
    assert all(parameter.grad is not None for parameter in llm.parameters())
    assert torch.equal(logits(llm.eval()), expected)


def test_merging_what_is_not_finite(llms):
    llm = TunedLLM(llms())
    next(llm.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="LoRA of model.layers.0.* cannot be merged"):
        merge_lora(llm.model())


# --- bad input ---


@pytest.mark.parametrize(
    "family, targets, message",
    [
        ("llama", ["c_attn"], "'c_attn' matches nothing.*are: down_proj, gate_proj, k_proj"),
        ("llama", ["q_proj", "k"], "target 'k' matches nothing"),
        ("mamba", "attention", "'attention' matches nothing.*are: dt_proj, in_proj.*all-linear"),
        ("gpt2", ["q_proj"], "'q_proj' matches nothing.*are: c_attn, c_fc, c_proj.*all-linear"),
        ("llama", ["input_layernorm"], "'input_layernorm' matches a LlamaRMSNorm"),
        ("llama", "lm_head", "one and the same at input and output.*would untie.*train_embeddings"),
        ("llama", ["embed_tokens"], "would untie"),
    ],
)
def test_lora_targets_that_match_no_layer(llms, family, targets, message):
    with pytest.raises(UserError, match=message):
        TunedLLM(llms(family), lora_conf={"targets": targets})


def test_lora_at_the_output_layer_of_untied_embeddings(llms):
    with pytest.raises(UserError, match="an embedding table .set train_embeddings"):
        TunedLLM(llms(tied=False), lora_conf={"targets": ["lm_head"]})


@pytest.mark.parametrize(
    "conf, message",
    [
        ({"r": 0}, "r .the rank. must be a positive integer, got 0.*tuning: frozen"),
        ({"r": 8.0}, "must be a positive integer"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"alpha": "16"}, "alpha must be a number"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"targets": []}, "targets must be one of attention, all-linear or a list"),
        ({"targets": [3]}, "targets must be one of"),
        ({"rank": 8}, "unknown option 'rank'; valid options: r, alpha, targets, rslora, dropout"),
        (["r"], "must be a mapping"),
    ],
)
def test_bad_lora_options(conf, message):
    with pytest.raises(UserError, match=message):
        lora_options(conf)


def test_bad_combinations(llms):
    for conf, message in (
        ({"tuning": "half"}, "unknown tuning 'half'; expected one of frozen, lora, full"),
        ({"tuning": "full", "lora_conf": {"r": 8}}, "lora_conf is for `tuning: lora`"),
        ({"tuning": "full", "dtype": "bfloat16"}, "leave it at float32.*use_amp"),
        ({"train_embeddings": True, "dtype": "auto"}, "dtype auto is for weights that are not"),
        ({"dtype": "int8"}, "unknown LLM dtype"),
    ):
        with pytest.raises(UserError, match=message):
            TunedLLM(llms(), **conf)


def test_tied_configuration_with_untied_weights(llms, tmp_path):
    """What an adaptation leaves that changed one of the two tables only."""
    directory = shutil.copytree(llms(), tmp_path / "llm")
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="tied by its config.json.*different embeddings"):
        TunedLLM(str(directory)).model()
    config = json.loads((directory / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config))
    assert TunedLLM(str(directory)).model().lm_head.weight.mean() > 0.9
