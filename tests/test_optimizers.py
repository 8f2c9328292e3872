"""Learning rates and frozen updates by parameter name, under every scheduler of ESPnet."""

import argparse
import copy

import pytest
import torch

from espnet_llm_plugin.compat import import_quietly
from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.optimizers import AdamWGroups

# With options under which the learning rate moves within a few steps; all others have defaults.
SCHEDULERS = {
    "reducelronplateau": {"patience": 0},
    "lambdalr": {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    "steplr": {"step_size": 2},
    "multisteplr": {"milestones": [1, 3]},
    "exponentiallr": {"gamma": 0.7},
    "cosineannealinglr": {"T_max": 5},
    "noamlr": {"model_size": 4, "warmup_steps": 2},
    "warmuplr": {"warmup_steps": 2},
    "piecewiselinearwarmuplr": {
        "warmup_steps_list": [0, 2, 4],
        "warmup_lr_list": [0.001, 0.01, 0.02],
    },
    "warmupsteplr": {"warmup_steps": 2, "steps_per_epoch": 2, "step_size": 1, "gamma": 0.5},
    "warmupreducelronplateau": {"warmup_steps": 2, "patience": 0},
    "cycliclr": {"base_lr": 0.001, "max_lr": 0.01, "step_size_up": 2, "cycle_momentum": False},
    "onecyclelr": {"max_lr": 0.01, "total_steps": 20},
    "cosineannealingwarmrestarts": {"T_0": 3},
    "cosineannealingwarmuprestarts": {
        "first_cycle_steps": 6,
        "warmup_steps": 2,
        "max_lr": 0.01,
        "min_lr": 0.001,
    },
    "tristagelr": {"max_steps": 20, "warmup_ratio": 0.2, "hold_ratio": 0.2, "decay_ratio": 0.6},
    "exponentialdecaywarmup": {
        "max_lr": 0.01,
        "min_lr": 0.001,
        "total_steps": 20,
        "warmup_steps": 2,
    },
}


class TwoParts(torch.nn.Module):
    """Two equal parts with equal gradients: what differs is what the optimizer does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.new = torch.nn.Linear(3, 2)
        self.llm = copy.deepcopy(self.new)

    def forward(self, x):
        return self.new(x).pow(2).sum() + self.llm(x).pow(2).sum()


def positions(model):
    return [
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model.new, model.llm)
    ]


def train(model, optimizer, scheduler=None, steps=1, seed=0):
    """Random gradients, the same for both parts. Returns (moved of new, moved of llm) per step."""
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for _ in range(steps):
        before = positions(model)
        optimizer.zero_grad()
        for pair in zip(model.new.parameters(), model.llm.parameters()):
            gradient = torch.randn(pair[0].shape, generator=generator)
            sum((parameter * gradient).sum() for parameter in pair).backward()
        optimizer.step()
        if scheduler is not None:
            plateau = "plateau" in type(scheduler).__name__.lower()
            batch_wise = type(scheduler).__name__ == "WarmupReduceLROnPlateau"
            scheduler.step(*((1.0,) if plateau and not batch_wise else ()))
        moved.append(tuple(b - a for a, b in zip(before, positions(model))))
    return moved


def adamw(model, **conf):
    return AdamWGroups(model.named_parameters(), **{"lr": 0.01, "weight_decay": 0.0, **conf})


def scheduler_class(name):
    return import_quietly("espnet2.tasks.abs_task").scheduler_classes[name]


def test_every_scheduler_of_espnet_is_tried():
    assert set(SCHEDULERS) == set(import_quietly("espnet2.tasks.abs_task").scheduler_classes)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_factor_survives_every_scheduler_and_resuming(name):
    """Adam's step is proportional to the learning rate: the ratio is the factor, in each step."""

    def build():
        model = TwoParts()
        optimizer = adamw(model, groups={"llm": {"lr_factor": 0.25}})
        return model, optimizer, scheduler_class(name)(optimizer, **SCHEDULERS[name])

    model, optimizer, scheduler = build()
    moved = train(model, optimizer, scheduler, steps=4)
    saved = copy.deepcopy([o.state_dict() for o in (model, optimizer, scheduler)])
    rest = train(model, optimizer, scheduler, steps=4, seed=1)
    resumed = build()
    for new, state in zip(resumed, saved):
        new.load_state_dict(state)
    again = train(*resumed, steps=4, seed=1)
    for new, llm in moved + rest:
        torch.testing.assert_close(llm, 0.25 * new, rtol=1e-3, atol=2e-7)
    assert max(float(new.abs().max()) for new, _ in moved) > 1e-5
    assert all(torch.equal(a, b) for x, y in zip(rest, again) for a, b in zip(x, y))


def test_without_groups_it_is_adamw():
    ours, theirs = TwoParts(), TwoParts()
    conf = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    train(ours, AdamWGroups(ours.named_parameters(), **conf), steps=5)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **conf), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(positions(ours), positions(theirs)))


def test_frozen_updates_leave_no_trace():
    """After them the group starts as if it had been added then; clipping never saw it."""
    model = TwoParts()
    optimizer = adamw(model, groups={"llm": {"freeze_updates": 3}}, weight_decay=0.1)
    moved = train(model, optimizer, steps=2)
    assert all(new.abs().min() > 0 and llm.abs().max() == 0 for new, llm in moved)
    assert all(not optimizer.state[p] for p in model.llm.parameters())

    optimizer.zero_grad()
    model(torch.randn(4, 3)).backward()
    alone = torch.nn.utils.clip_grad_norm_(model.new.parameters(), 1e9)
    both = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert alone == both > 0

    # resumed in the middle: one more frozen update
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    model = TwoParts()
    optimizer = adamw(model, groups={"llm": {"freeze_updates": 3}}, weight_decay=0.1)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    moved = train(model, optimizer, steps=2, seed=1)
    assert moved[0][1].abs().max() == 0 and moved[1][1].abs().min() > 0
    fresh = TwoParts()
    reference = torch.optim.AdamW(fresh.llm.parameters(), lr=0.01, weight_decay=0.1)
    assert all(optimizer.state[p]["step"] == 1 for p in model.llm.parameters())
    # the first step of a new AdamW with the gradients of that update
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for parameter in fresh.llm.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = positions(fresh)[1]
    reference.step()
    torch.testing.assert_close(moved[1][1], positions(fresh)[1] - before)


def test_frozen_with_gradient_scaler_and_closure():
    model = TwoParts()
    optimizer = adamw(model, groups={"llm": {"freeze_updates": 2}})
    scaler = torch.amp.GradScaler("cpu")
    x = torch.randn(4, 3)
    for _ in range(2):
        start = positions(model)
        optimizer.zero_grad()
        scaler.scale(model(x)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(positions(model)[1], start[1])
        assert not torch.equal(positions(model)[0], start[0])

    def closure():
        optimizer.zero_grad()
        loss = model(x)
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert not torch.equal(positions(model)[1], start[1])


def test_weight_decay_of_a_group():
    model = TwoParts()
    optimizer = adamw(model, groups={"*.weight": {"weight_decay": 0.5}}, weight_decay=0.0)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.01 * 0.5 if name.endswith("weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_first_matching_pattern_wins_and_options_are_those_given_now():
    model = TwoParts()
    groups = {"llm.weight": {"lr_factor": 0.5}, "llm": {"lr_factor": 0.0}}
    optimizer = adamw(model, groups=groups)
    (new, llm), *_ = train(model, optimizer)
    torch.testing.assert_close(llm[:6], 0.5 * new[:6])
    assert llm[6:].abs().max() == 0
    other = {
        "llm.weight": {"lr_factor": 0.5},
        "llm": {"lr_factor": 1.0, "weight_decay": 0.7},
    }
    changed = adamw(model, groups=other)
    changed.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in changed.param_groups] == [0.0, 0.7, 0.0]
    (new, llm), *_ = train(model, changed, seed=5)
    assert llm[6:].abs().min() > 0


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"decoder.llm": {}}, "'decoder.llm' matches no parameter.*llm.bias, llm.weight, new.bias"),
        ({"llm": {}, "llm.weight": {}}, "'llm.weight' matches no parameter"),
        ({"llm": {"lr": 0.1}}, "unknown option 'lr'; valid options: lr_factor"),
        ({"llm": 0.1}, "must map patterns"),
        (["llm"], "must map patterns"),
        ({"llm": {"lr_factor": -1}}, "lr_factor must be a number of 0 or more, got -1"),
        ({"llm": {"lr_factor": "0.1"}}, "lr_factor must be a number"),
        ({"llm": {"freeze_updates": 1.5}}, "freeze_updates must be a whole number"),
        ({"llm": {"weight_decay": float("nan")}}, "weight_decay must be a number"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(UserError, match=message):
        adamw(TwoParts(), groups=groups)


def test_other_groups_than_in_the_checkpoint():
    model = TwoParts()
    saved = adamw(model, groups={"llm": {}}).state_dict()
    with pytest.raises(UserError, match=r"groups llm \(2 tensors\), \* \(2 tensors\).*give new"):
        adamw(model, groups={"new": {}}).load_state_dict(saved)
    plain = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(UserError, match="without a pattern"):
        adamw(model).load_state_dict(plain)


def test_names_are_needed():
    with pytest.raises(UserError, match="give model.named_parameters"):
        AdamWGroups(TwoParts().parameters())


# --- as ESPnet builds it ---


def build(**options):
    from espnet_llm_plugin import registry

    registry.register(("optim",))
    registry.register(("optim",))  # idempotent
    task = import_quietly("espnet2.tasks.abs_task").AbsTask
    usual = {"sharded_ddp": False, "exclude_weight_decay": False}
    args = argparse.Namespace(**{**usual, **options})
    model = TwoParts()
    (optimizer,) = task.build_optimizers(args, model)
    return model, optimizer


def test_espnet_builds_it_with_names():
    conf = {"lr": 0.1, "betas": [0.9, 0.98], "groups": {"llm": {"lr_factor": 0.5}}}
    _, optimizer = build(optim="adamw_groups", optim_conf=conf)
    assert isinstance(optimizer, AdamWGroups)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["llm.weight", "llm.bias"],
        ["new.weight", "new.bias"],
    ]
    _, plain = build(optim="adam", optim_conf={"lr": 0.1})
    assert type(plain) is torch.optim.Adam


def test_options_of_espnet_that_exclude_it():
    for option in ("exclude_weight_decay", "sharded_ddp"):
        with pytest.raises(UserError, match=f"`{option}: true` cannot be used"):
            build(optim="adamw_groups", optim_conf={}, **{option: True})
    with pytest.raises(UserError, match="unknown option 'momentum'"):
        build(optim="adamw_groups", optim_conf={"momentum": 0.9})
