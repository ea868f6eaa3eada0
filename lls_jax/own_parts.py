"""A part of a user's own, by ``package.module:function``: found, asked what it takes, called."""

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


def is_own(name: str) -> bool:
    """Whether a name is that of a user's own part.

    >>> is_own("mypackage.mymodule:make"), is_own("small_conv")
    (True, False)
    """
    return ":" in name


class Source(NamedTuple):
    """A file of Python.

    Attributes:
        module: its name.
        path: where it lies.
    """

    module: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class OwnPart:
    """A function that makes a part of a run.

    Attributes:
        kind: what it makes, for errors: ``"rule"``, ``"model"``, ``"data set"``, ``"optimizer"``.
        name: ``package.module:function``.
        function: it; a class will do, or anything else that can be called.
        parameters: by name.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    def takes(self, options: Iterable[str]) -> frozenset[str]:
        """Those of `options` that the function has a parameter for."""
        kinds = [parameter.kind for parameter in self.parameters.values()]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return frozenset(options)
        return frozenset(options) & self._by_keyword()

    def _by_keyword(self) -> frozenset[str]:
        keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return frozenset(name for name, p in self.parameters.items() if p.kind in keyword)

    def check_used(self, given: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first, unless the function takes all that a person asks for.

        Args:
            given: values by option.
        """
        taken = self.takes(given)
        for option, value in given.items():
            if option not in taken:
                raise ValueError(
                    f"`{option}` is {value!r}; {self.kind} {self.name!r} has no use for it: leave "
                    "it out, or give the function a parameter of that name."
                )

    def make(self, options: Mapping[str, Any], kind: type, expected: str) -> Any:
        """Call the function with those of `options` that it takes.

        Args:
            options: values by name.
            kind: the type of what it is to return.
            expected: that type in words, for errors.

        Raises:
            ValueError: it needs something else, or returns something else.
        """
        taken = self.takes(options)
        for name, parameter in self.parameters.items():
            variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            needed = parameter.default is parameter.empty and parameter.kind not in variadic
            if needed and name not in taken & self._by_keyword():
                raise ValueError(
                    f"{self.kind} {self.name!r} needs `{name}`; it can be given "
                    f"{', '.join(sorted(options)) or 'nothing'}, by name: give `{name}` a default."
                )
        made = self.function(**{name: options[name] for name in options if name in taken})
        if not isinstance(made, kind):
            raise ValueError(
                f"{self.kind} {self.name!r} is a {type(made).__name__}, which is no {expected}"
            )
        return made

    def make_hashable(self, options: Mapping[str, Any], kind: type, expected: str) -> Any:
        """Likewise, of what is a constant of compiled programs.

        Raises:
            ValueError: it cannot be hashed either.
        """
        made = self.make(options, kind, expected)
        try:
            hash(made)
        except TypeError as error:
            raise ValueError(
                f"{self.kind} {self.name!r} cannot be hashed ({error}); give its fields immutable "
                "values, like numbers, strings and tuples."
            ) from None
        return made

    def source(self) -> "Source | None":
        """Where the function is written; None where that is not in Python."""
        module = importlib.import_module(self.name.partition(":")[0])
        for of in (inspect.unwrap(self.function), module):
            try:
                found = inspect.getsourcefile(of)
            except TypeError:
                continue
            if found is not None and pathlib.Path(found).is_file():
                owner = inspect.getmodule(of) or module
                return Source(owner.__name__, pathlib.Path(found))
        return None


def find(kind: str, name: str) -> OwnPart:
    """Import a user's own part.

    Args:
        kind: what it makes, for errors.
        name: ``package.module:function``; the module is looked for as Python's ``import`` does.

    Raises:
        ValueError: there is no such function.

    >>> sorted(find("optimizer", "optax:sgd").takes(["learning_rate", "momentum", "speed"]))
    ['learning_rate', 'momentum']
    """
    module_name, _, function_name = name.partition(":")
    # A module of a package that is not named, like .mine, is none.
    if not module_name or not function_name or module_name.startswith("."):
        raise ValueError(f"{kind} {name!r} is not of the form package.module:function.")
    try:
        imported = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{kind} {name!r}: module {module_name!r} cannot be imported ({error}); is its folder "
            "the current one, or on PYTHONPATH?"
        ) from error
    try:
        function = getattr(imported, function_name)
    except AttributeError:
        raise ValueError(f"{kind} {name!r}: {module_name} has no {function_name!r}.") from None
    if not callable(function):
        raise ValueError(
            f"{kind} {name!r} is a {type(function).__name__}; expected a function that makes it."
        )
    return OwnPart(kind, name, function, inspect.signature(function).parameters)
