"""A Hugging Face module becomes one of ours in place: its class is replaced by one with our mixins before it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["become", "parameters_of"]


@functools.cache
def _sharded_class(cls: type, mixins: tuple[type, ...], before: bool) -> type:
    bases = mixins if cls in mixins[0].__mro__ else (*mixins, cls) if before else (cls, *mixins)
    # The names stay Hugging Face's: config.architectures, output recording and kernels look classes up by name.
    namespace: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if before and "forward" in vars(mixins[0]):
        namespace["forward"] = _with_signature_of(cls, mixins[0].forward)  # type: ignore[attr-defined]
    return type(cls.__name__, bases, namespace)


def _with_signature_of(cls: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that still shows the original's signature: generate() and the HF Trainer read it."""

    def sharded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    functools.update_wrapper(sharded_forward, cls.forward)  # type: ignore[attr-defined]
    return sharded_forward


def _on_object(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(forward, "__func__", forward))
    def of_class(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return of_class


def become(module: nn.Module, *mixins: type, before: bool = True) -> None:
    """Makes `module` an instance of its own class behind (or before) the mixins, in place: parameters, hooks and
    attributes stay the objects they are."""
    cls: Any = type(module)  # Module's metaclass hides from mypy that classes are hashable
    own = vars(module).pop("forward", None)
    if own is not None:  # a kernel library put it on the object, where it would hide the mixin's
        cls = type(
            cls.__name__,
            (cls,),
            {"forward": _on_object(own), "__module__": cls.__module__, "__qualname__": cls.__qualname__},
        )
    module.__class__ = _sharded_class(cls, mixins, before)


@functools.cache
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of its arguments, without self. Asking takes as long as launching ten kernels."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")
