"""Start-up work of other packages, put off until something uses it.

Importing an ESPnet task costs 9.4 CPU seconds, most of it for text front-ends of TTS and for type
checks of functions that a process never calls. Part of :mod:`espnet_llm_plugin.compat`, whose
``import_quietly`` applies all of it; each function says why it exists and has a test in
``tests/test_compat_imports.py``.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import sys
import types
from typing import Callable, Iterator, Optional


@contextlib.contextmanager
def cheap_imports() -> Iterator[None]:
    """Import ESPnet in this context, without what it does not need yet."""
    defer_g2p()
    defer_inflect()
    with paused_garbage_collector(), lazy_typechecked():
        yield


@contextlib.contextmanager
def paused_garbage_collector() -> Iterator[None]:
    """Do not search for garbage: imports make 750,000 objects, of which 98 % stay.

    At the start of a process these are also left out of all later searches, of which training does
    many and the end of the process one: 0.4 s each.
    """
    enabled = gc.isenabled()
    # Later, a discarded model might be among the objects that are never looked at again.
    at_start = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            if at_start:
                gc.freeze()


def defer_g2p() -> None:
    """Let ``g2p_en`` be imported when a phonemiser is made, not whenever ESPnet is imported.

    Every ESPnet task imports it, which costs 2.7 s and tries to download NLTK data, with alarming
    messages when offline. Only ``--g2p g2p_en`` ever uses it.
    """
    stand_in = _stand_in("g2p_en")
    if stand_in is not None:
        stand_in.G2p = lambda: _replace(stand_in).G2p()


def defer_inflect() -> None:
    """Let ``inflect`` be imported when a number is spelt out, not whenever ESPnet is imported.

    Every ESPnet task imports ``tacotron_cleaner``, which makes an engine at once: 2.6 s. Only
    ``--cleaner tacotron`` ever uses it.
    """
    stand_in = _stand_in("inflect")
    if stand_in is None:
        return

    def make_engine():
        with lazy_typechecked():  # the 2.6 s are type checks, of which an engine uses few
            return _replace(stand_in).engine()

    stand_in.engine = lambda: _deferred(make_engine)


def _deferred(make: Callable[[], object]) -> object:
    """Return an object which is made when one of its attributes is first asked for."""
    made = functools.cache(make)

    class Deferred:
        def __getattr__(self, name: str):
            return getattr(made(), name)

    return Deferred()


def _stand_in(name: str) -> Optional[types.ModuleType]:
    """Put an empty module in place of ``name``; None if that is imported or not installed."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    stand_in = types.ModuleType(name)
    stand_in.__spec__ = spec  # transformers asks whether a package is installed
    sys.modules[name] = stand_in
    return stand_in


def _replace(stand_in: types.ModuleType) -> types.ModuleType:
    """Import the module that ``stand_in`` stands for, and return it."""
    name = stand_in.__name__
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
    return importlib.import_module(name)


@contextlib.contextmanager
def lazy_typechecked() -> Iterator[None]:
    """Let modules imported in this context be type-checked by typeguard as they are used.

    ``@typechecked`` reads, rewrites and compiles its function's whole module when it decorates,
    which costs ESPnet's tasks 3 s for 200 functions. Here it does so at the function's first call;
    the checks themselves are the same. Classes, generators, functions within functions, and
    whatever else typeguard accepts, are left to it at once.
    """
    import typeguard

    original = typeguard.typechecked

    def typechecked(target=None, **options):
        if options or not _is_plain_function(target):
            return original(target, **options)
        return _check_at_first_call(target, original)

    typeguard.typechecked = typechecked
    try:
        yield
    finally:
        typeguard.typechecked = original


def _is_plain_function(target) -> bool:
    return (
        inspect.isfunction(target)
        # Typeguard resolves the annotations of these in the frame that decorates them.
        and "<locals>" not in target.__qualname__
        and not hasattr(target, "__wrapped__")
        and not inspect.isgeneratorfunction(target)
        and not inspect.iscoroutinefunction(target)
        and not inspect.isasyncgenfunction(target)
    )


# (module, qualified name of a class) -> what instruments each of its methods, until it is made.
_waiting: dict[tuple[str, str], list[Callable[[], None]]] = {}


def _check_at_first_call(function: Callable, typechecked: Callable) -> Callable:
    """Return ``function`` as ``typechecked(function)`` would, but instrumented when called.

    With a class's ``__init__``, all its methods are instrumented: a dataset or preprocessor is
    made once and then taken along by every loader process of every epoch, each of which would
    have to repeat the work.
    """
    checked = None

    def instrument() -> None:
        nonlocal checked
        checked = checked or typechecked(function)

    owner = (function.__module__, function.__qualname__.rpartition(".")[0])
    _waiting.setdefault(owner, []).append(instrument)

    # Attributes of the function (`updated`) do not survive the real decorator either.
    @functools.wraps(function, updated=())
    def check_and_call(*args, **kwargs):
        if checked is None:
            for method in _waiting.pop(owner, ()) if function.__name__ == "__init__" else ():
                method()
            instrument()
        return checked(*args, **kwargs)

    return check_and_call
