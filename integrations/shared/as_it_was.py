"""Leave a model as it was where what was to be made of it is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CONFIGURATIONS = ("config", "generation_config")


@contextmanager
def left_as_it_was(model: Any = None, *_: Any, **__: Any) -> Iterator[None]:
    """Undo on an error what a trainer's construction has done to a model; call with its arguments.

    TRL puts adapters into the model that it is given, sets its forward and freezes weights; a
    trainer of this library attaches to it and adds a teacher's adapter.  Who corrects a mistake
    passes the same model again.  A name, from which TRL loads a model, needs nothing.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    holders: list[Any] = list(model.modules())
    holders += [vars(model)[name] for name in CONFIGURATIONS if name in vars(model)]
    # Modules, parameters, hooks and adapters' settings lie in dicts, which change in place.
    held = [(vars(one), _copies(vars(one))) for one in holders]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        for now, before in held:
            for name in set(now) - set(before):
                del now[name]
            for name, value in before.items():
                if isinstance(value, dict) and isinstance(now.get(name), dict):
                    now[name].clear()
                    now[name].update(value)
                elif now.get(name) is not value:
                    now[name] = value
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def _copies(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in attributes.items()
    }
