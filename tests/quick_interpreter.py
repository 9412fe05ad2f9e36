"""Triton's interpreter at four times its speed.

It wraps all functions of `triton.language` whenever a device function is called, and unwraps them
when it returns: also inside of another one, where they are wrapped already. And it looks for an
overflow at every sum and product of integers; a wrong address shows in what it reads and writes.
"""

from dataclasses import replace

from triton import language
from triton.runtime import interpreter

_wrapped: set[str] = set()  # names of the modules that are
_modules: dict[str, set[str]] = {}  # of `triton.language`, that a module has


def _modules_of(function) -> set[str]:
    place = function.__globals__
    name = place["__name__"]
    if name not in _modules:
        both = (language, language.core)
        _modules[name] = {x.__name__ for x in place.values() if any(x is y for y in both)}
    return _modules[name]


def install() -> None:
    """Wrap nothing twice, if this version of Triton does, and leave integers alone."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    wrap = interpreter._patch_lang

    def patch_lang(function):
        missing = _modules_of(function) - _wrapped
        if not missing and _wrapped:
            return interpreter._LangPatchScope()
        scope = wrap(function)
        unwrap = scope.restore

        def restore():
            unwrap()
            _wrapped.difference_update(missing)

        scope.restore = restore
        _wrapped.update(missing)
        return scope

    interpreter._patch_lang = patch_lang
