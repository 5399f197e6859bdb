"""Loads chosen modules of a big package from its files; everything else of the package is an empty stand-in, so that
its dependencies (CUDA among them) are never imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class _AnyClass(type):
    """A class with every attribute, that can be subscripted, called, derived from and used as a decorator."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Any:
        return iter(())


def _anything(name: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _anything("value")()

    def attribute(self: Any, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        return _anything(key)()

    body = {
        "__init__": lambda self, *args, **kwargs: None,
        "__call__": call,
        "__getattr__": attribute,
        "__class_getitem__": classmethod(lambda cls, item: cls),
        "__init_subclass__": classmethod(lambda cls, **kwargs: None),
        "__bool__": lambda self: False,
    }
    return _AnyClass(name, (), body)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _anything(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(
        self, package: str, base: Path, real: Sequence[str], given: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.package, self.base, self.real, self.given = package, base, real, given

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        place = self.base.joinpath(*name.split("."))
        if any(name == r or name.startswith(f"{r}.") for r in self.real):
            if place.with_suffix(".py").exists():
                return importlib.util.spec_from_file_location(name, place.with_suffix(".py"))
            if name in self.real and (place / "__init__.py").exists():
                return importlib.util.spec_from_file_location(
                    name, place / "__init__.py", submodule_search_locations=[str(place)]
                )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = [str(self.base.joinpath(*spec.name.split(".")))]
        for name, value in self.given.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(package: str, base: Path, real: Sequence[str], given: Mapping[str, Mapping[str, Any]]) -> None:
    """From now on `package` comes from `base`: the modules `real` (and what lies below them) as they are, the rest as
    stand-ins that hold `given[module]`."""
    sys.meta_path.insert(0, _Finder(package, base, real, given))
