"""The table of names and what happens when ESPnet disagrees with it."""

import pytest

from espnet_llm_plugin import registry
from espnet_llm_plugin.errors import UserError


def test_register_is_idempotent_and_checks_types():
    from espnet_llm_plugin.compat import import_quietly

    registry.register()
    registry.register()
    for entry in registry.ENTRIES:
        module, attribute = registry.CHOICES[entry.kind]
        choices = getattr(import_quietly(module), attribute)
        found = choices[entry.name] if entry.kind == "optim" else choices.get_class(entry.name)
        assert found is entry.load()


def test_every_kind_has_a_name():
    assert {entry.kind for entry in registry.ENTRIES} == set(registry.CHOICES)


def test_names_are_lower_case_because_espnet_lower_cases_them():
    assert all(entry.name == entry.name.lower() for entry in registry.ENTRIES)


def test_every_class_is_constructible_by_its_dotted_path():
    for entry in registry.ENTRIES:
        assert isinstance(entry.load(), type)


class _Choices:
    def __init__(self, base_type=None):
        self.classes = {}
        self.base_type = base_type


def test_name_clash_names_both_classes():
    choices = _Choices()
    choices.classes["dict"] = list
    with pytest.raises(UserError, match=r"builtins:dict.*already\s+has builtins\.list"):
        registry.add(choices, registry.Entry("decoder", "dict", "builtins:dict", ""))


def test_wrong_base_class():
    with pytest.raises(UserError, match="is not a int"):
        registry.add(_Choices(int), registry.Entry("decoder", "dict", "builtins:dict", ""))
