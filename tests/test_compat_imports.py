"""Each piece of start-up work that is put off, and that it is done, in full, when it is needed."""

import gc
import importlib
import inspect
import pickle
import subprocess
import sys

import pytest
import typeguard
from typeguard import TypeCheckError

from espnet_llm_plugin import compat_imports


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_g2p_is_imported_when_it_is_used():
    run_python(
        "import sys\n"
        "from espnet_llm_plugin.compat import import_quietly\n"
        "tokenizer = import_quietly('espnet2.text.phoneme_tokenizer')\n"
        "assert 'nltk' not in sys.modules\n"
        "try:\n"
        "    tokenizer.g2p_en.G2p()\n"
        "except LookupError:\n"
        "    pass  # offline: the real one looks for its NLTK data\n"
        "assert 'nltk' in sys.modules and hasattr(sys.modules['g2p_en'], 'g2p')\n"
    )


def test_tacotron_cleaner_spells_numbers_as_before():
    run_python(
        "import sys\n"
        "from espnet_llm_plugin.compat import import_quietly\n"
        "cleaner = import_quietly('espnet2.text.cleaner').TextCleaner('tacotron')\n"
        "assert cleaner('No numbers.') == 'NO NUMBERS.'\n"
        "assert not hasattr(sys.modules['inflect'], '__file__')\n"
        "text = 'On the 21st, 1,234 of 2005 cost $2.50 or 3.14, not 10000000.'\n"
        "deferred = cleaner(text)\n"
        "assert 'TWENTY FIRST' in deferred and 'TEN MILLION' in deferred, deferred\n"
        "import inflect, tacotron_cleaner.numbers\n"
        "assert hasattr(inflect, '__file__')\n"
        "tacotron_cleaner.numbers._inflect = inflect.engine()\n"
        "assert cleaner(text) == deferred\n"
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_left_as_it_was(enabled):
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ImportError), compat_imports.cheap_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_is_imported_at_the_start_is_not_searched_for_garbage():
    run_python(
        "import gc\n"
        "from espnet_llm_plugin.compat import import_quietly\n"
        "import_quietly('espnet2.layers.utterance_mvn')\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "class Model: pass\n"
        "model = Model()\n"
        "import_quietly('espnet2.layers.global_mvn')\n"
        "assert any(found is model for found in gc.get_objects())\n"
    )


MODULE = '''
import abc
import functools
from typing import List, Optional

from typeguard import typechecked


@typechecked
def add(number: int, more: Optional[List[int]] = None, *, scale: int = 1) -> int:
    """Return the sum."""
    return scale * (number + sum(more or []))


@typechecked
def wrong_result(number: int) -> str:
    return number


@typechecked
def count(stop: int):
    yield from range(stop)


@typechecked()
def with_options(number: int) -> int:
    return number


@typechecked
class Whole:
    def method(self, number: int) -> int:
        return number


class Base(abc.ABC):
    @typechecked
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    @abc.abstractmethod
    @typechecked
    def abstract(self, number: int) -> int:
        raise NotImplementedError

    @typechecked
    def method(self, number: int) -> int:
        return self.number + number


class Derived(Base):
    @typechecked
    def __init__(self, number: int, name: str):
        super().__init__(number)
        self.name = name

    @classmethod
    @typechecked
    def made(cls, number: int) -> "Derived":
        return cls(number, "made")

    @staticmethod
    @typechecked
    def static(number: int) -> int:
        return number

    @typechecked
    @staticmethod
    def outer_static(number: int) -> int:
        return number

    @property
    @typechecked
    def length(self) -> int:
        return self.name

    @typechecked
    def abstract(self, number: int) -> int:
        return number
'''


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The same code imported in the context (lazily checked) and outside (checked at once)."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lazy_module", "eager_module"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    with compat_imports.lazy_typechecked():
        lazy = importlib.import_module("lazy_module")
    eager = importlib.import_module("eager_module")
    yield lazy, eager
    del sys.modules["lazy_module"], sys.modules["eager_module"]


GOOD = [
    lambda m: m.add(1, [2, 3], scale=2),
    lambda m: list(m.count(3)),
    lambda m: m.with_options(1),
    lambda m: m.Whole().method(1),
    lambda m: m.Derived(1, "a").method(2),
    lambda m: m.Derived(1, "a").abstract(2),
    lambda m: m.Derived.made(1).name,
    lambda m: m.Derived.static(1),
    lambda m: m.Derived.outer_static(1),
]
WRONG_TYPES = [
    lambda m: m.add("1"),
    lambda m: m.add(1, ["2"]),
    lambda m: m.add(1, scale=None),
    lambda m: m.wrong_result(1),
    lambda m: list(m.count("3")),
    lambda m: m.with_options("1"),
    lambda m: m.Whole().method("1"),
    lambda m: m.Derived("1", "a"),
    lambda m: m.Derived(1, 2),
    lambda m: m.Derived(1, "a").method("2"),
    lambda m: m.Derived(1, "a").abstract("2"),
    lambda m: m.Derived(1, "a").length,
    lambda m: m.Derived.made("1"),
    lambda m: m.Derived.static("1"),
    lambda m: m.Derived.outer_static("1"),
]


@pytest.mark.parametrize("call", GOOD)
def test_right_types_give_the_same_result(modules, call):
    lazy, eager = modules
    assert call(lazy) == call(lazy) == call(eager)


@pytest.mark.parametrize("call", WRONG_TYPES)
def test_wrong_types_give_the_same_error_at_every_call(modules, call):
    lazy, eager = modules
    messages = []
    for module in (lazy, lazy, eager):
        with pytest.raises(TypeCheckError) as error:
            call(module)
        messages.append(str(error.value).replace("lazy_module", "eager_module"))
    assert messages[0] == messages[1] == messages[2]


def test_functions_look_as_they_did(modules):
    lazy, eager = modules
    for name in ("add", "Base.__init__", "Derived.made", "Derived.static", "Derived"):
        one, other = lazy, eager
        for part in name.split("."):
            one, other = getattr(one, part), getattr(other, part)
        assert inspect.signature(one) == inspect.signature(other)
        assert (one.__doc__, one.__qualname__) == (other.__doc__, other.__qualname__)
    assert pickle.loads(pickle.dumps(lazy.add)) is lazy.add
    assert inspect.isgeneratorfunction(lazy.count)
    with pytest.raises(TypeError, match="abstract"):
        lazy.Base(1)


@pytest.fixture
def instrumented(monkeypatch):
    """Names of the functions that the real ``typechecked`` has been applied to."""
    names, original = [], typeguard.typechecked

    def typechecked(target=None, **options):
        names.append(getattr(target, "__qualname__", None))
        return original(target, **options)

    monkeypatch.setattr(typeguard, "typechecked", typechecked)
    return names


def test_plain_functions_are_instrumented_once_when_called(instrumented, modules):
    lazy, _ = modules
    del instrumented[:]
    for _ in range(2):
        lazy.add(1)
        lazy.Derived.static(1)
    assert instrumented == ["add", "Derived.static"]


def test_methods_are_instrumented_when_an_object_is_made(instrumented, modules):
    """Else every loader process that takes the object along would do it again."""
    lazy, _ = modules
    del instrumented[:]
    object_ = lazy.Derived(1, "a")
    made = {"Base.__init__", "Base.method", "Derived.__init__", "Derived.abstract"}
    assert made <= set(instrumented)
    assert len(instrumented) == len(set(instrumented))
    del instrumented[:]
    object_.method(1)
    lazy.Derived(2, "b").abstract(1)
    assert instrumented == []


def test_typeguard_is_left_as_it_was():
    original = typeguard.typechecked
    with compat_imports.lazy_typechecked():
        assert typeguard.typechecked is not original
    assert typeguard.typechecked is original


def test_options_of_espnet_are_checked():
    run_python(
        "import typeguard\n"
        "from espnet_llm_plugin.compat import import_quietly\n"
        "tokenizer = import_quietly('espnet2.text.char_tokenizer').CharTokenizer\n"
        "assert hasattr(tokenizer.__init__, '__wrapped__')  # lazy\n"
        "tokenizer(space_symbol='_')\n"
        "try:\n"
        "    tokenizer(space_symbol=3)\n"
        "except typeguard.TypeCheckError as error:\n"
        "    assert 'space_symbol' in str(error)\n"
        "else:\n"
        "    raise AssertionError('not checked')\n"
    )
