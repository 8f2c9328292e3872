"""AdamW with learning rates by parameter name, whatever ESPnet's scheduler does to them.

Also the two stages of speech LLM training: the new parts alone first, then with the LLM.
[LLMs and Speech: Integration vs. Combination, arXiv 2603.15045]
"""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Iterable, Mapping, Optional

import torch

from espnet_llm_plugin.errors import UserError
from espnet_llm_plugin.options import refuse_unknown

_REST = "*"


@dataclass(frozen=True)
class GroupOptions:
    """How the parameters of one group are trained.

    Attributes:
        lr_factor: Times the learning rate of the scheduler; 0 or more.
        freeze_updates: Updates in which they stay as they are.
        weight_decay: In place of the optimizer's.

    Raises:
        UserError: A value out of range.
    """

    lr_factor: float = 1.0
    freeze_updates: int = 0
    weight_decay: Optional[float] = None

    def __post_init__(self):
        for name, value in asdict(self).items():
            whole = name == "freeze_updates"
            if value is None and name == "weight_decay":
                continue
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 1e12:
                raise UserError(
                    f"optim_conf.groups: {name} must be "
                    f"{'a whole number' if whole else 'a number'} of 0 or more, got {value!r}."
                )


class AdamWGroups(torch.optim.AdamW):
    """AdamW (``optim: adamw_groups``) with options for groups of parameters.

    The factors are applied in the step itself and so survive every scheduler, also those that set
    one learning rate for all groups (``CosineAnnealingWarmupRestarts``), and resuming. The
    learning rates in ESPnet's log are the scheduler's, before the factors.

    Parameters of a frozen group get no gradient (clipping sees those of the others alone), no
    weight decay, and no statistics of Adam. Their gradient is computed nevertheless, so that
    distributed training need not know of it; to save that too, train with ``tuning: frozen``
    first and go on with ``--init_param``. Statistics of batch normalisation are no parameters: they
    follow the data in these updates too.

    Args:
        params: ``model.named_parameters()``.
        groups: Pattern of names -> :class:`GroupOptions`, e.g.
            ``{decoder.llm: {lr_factor: 0.1, freeze_updates: 5000}}``. A pattern is the name of a
            module or parameter, or has the wildcards of a shell. A parameter belongs to the first
            that matches; what none matches is trained as without groups.
        lr: Learning rate.
        betas: Of Adam.
        eps: Of Adam.
        weight_decay: Decoupled weight decay.

    Raises:
        UserError: Unknown options, values out of range, a pattern that matches nothing; in
            ``load_state_dict`` other groups than in the checkpoint.
    """

    takes_named_parameters = True

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        groups: Optional[Mapping[str, Mapping[str, Any]]] = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        named = list(params)
        if not all(isinstance(entry, tuple) for entry in named):
            raise UserError(
                "adamw_groups needs the names of the parameters: give model.named_parameters()."
            )
        self.options = _group_options(groups)
        members = _members(named, list(self.options))
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        made = []
        for pattern, options in self.options.items():
            if not members[pattern]:
                continue  # the rest, if there is none
            made.append({"params": members[pattern], "pattern": pattern, "updates": 0})
            if options.weight_decay is not None:
                made[-1]["weight_decay"] = options.weight_decay
        super().__init__(made, **defaults)
        for group in self.param_groups:
            if self.options[group["pattern"]].freeze_updates:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        parameter.register_hook(self._hide_while_frozen(group["pattern"]))

    def _is_frozen(self, group: Mapping[str, Any]) -> bool:
        return group["updates"] < self.options[group["pattern"]].freeze_updates

    def _hide_while_frozen(self, pattern: str):
        # found by its pattern: load_state_dict makes new groups
        def hide(gradient: torch.Tensor) -> Optional[torch.Tensor]:
            group = next(g for g in self.param_groups if g["pattern"] == pattern)
            return torch.zeros_like(gradient) if self._is_frozen(group) else None

        return hide

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scheduled = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * self.options[group["pattern"]].lr_factor
                if self._is_frozen(group):
                    for parameter in group["params"]:
                        parameter.grad = None
            super().step()
        finally:
            for group, lr in zip(self.param_groups, scheduled):
                group["lr"] = lr
        for group in self.param_groups:
            group["updates"] += 1
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As usual; the options of the groups are those given now, not those saved."""
        saved = [(g.get("pattern"), len(g["params"])) for g in state_dict["param_groups"]]
        own = [(g["pattern"], len(g["params"])) for g in self.param_groups]
        if saved != own:
            raise UserError(
                f"the optimizer state to resume from has the groups {_show(saved)}, optim_conf and "
                f"the model give {_show(own)}. Resume with the same optimizer and groups, or start "
                "a new run from the model with --init_param."
            )
        weight_decays = [group["weight_decay"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, weight_decay in zip(self.param_groups, weight_decays):
            group["weight_decay"] = weight_decay


def _group_options(groups: Optional[Mapping[str, Mapping[str, Any]]]) -> dict[str, GroupOptions]:
    """Options by pattern; last those of what no other pattern matches."""
    groups = {} if groups is None else groups
    if not isinstance(groups, Mapping) or not all(isinstance(v, Mapping) for v in groups.values()):
        raise UserError(
            "optim_conf.groups must map patterns of parameter names to options, such as "
            f"{{decoder.llm: {{lr_factor: 0.1}}}}; got {groups!r}."
        )
    for pattern, conf in groups.items():
        refuse_unknown(f"optim_conf.groups of {pattern!r}", conf, GroupOptions)
    options = {str(pattern): GroupOptions(**conf) for pattern, conf in groups.items()}
    options.setdefault(_REST, GroupOptions())
    return options


def _members(
    named: list[tuple[str, torch.nn.Parameter]], patterns: list[str]
) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    members: dict[str, list[tuple[str, torch.nn.Parameter]]] = {p: [] for p in patterns}
    for name, parameter in named:
        pattern = next(
            (p for p in patterns if fnmatchcase(name, p) or name.startswith(f"{p}.")), _REST
        )
        members[pattern].append((name, parameter))
    for pattern, found in members.items():
        if not found and pattern != _REST:
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in named})
            raise UserError(
                f"optim_conf.groups: {pattern!r} matches no parameter (that no pattern before it "
                f"matches); the model has: {', '.join(parts)}."
            )
    return members


def _show(groups: list[tuple[Optional[str], int]]) -> str:
    return ", ".join(f"{p or 'without a pattern'} ({n} tensors)" for p, n in groups)
