"""Target modules: the original modules of a model under canonical paths, and how to wrap them.

A target module's path names the *original* module, whatever already wraps it: `blocks.1.attn` stays
`blocks.1.attn` when the block or the attention is wrapped. Wrappers keep what they wrap in `inner`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from flax import nnx


class Wrapper(nnx.Module):
    """Base class of what patches put around a target module.

    A wrapper gets everything it needs in its constructor and remembers only in `State` variables.
    It does not delegate attributes to `inner`: that would bypass wrappers in between.

    Attributes:
        replaces_internals: True if the wrapper uses the parts of the original module instead of
            only calling it. Such a wrapper goes innermost, and a target module can have only one.
        united: attributes, tuples of what a layer may do, of which scanned layers take the union.
        apart: True if states keep a name for each layer though the layers are scanned, because
            others ask for them by name.
    """

    replaces_internals: ClassVar[bool] = False
    united: ClassVar[tuple[str, ...]] = ()
    apart: ClassVar[bool] = False

    @property
    def scans(self) -> bool:
        """Whether this call may be one of scanned layers."""
        return True

    def __init__(self, inner: nnx.Module):
        self.inner = inner


# What a layer with weights is for. The model says so when it builds the layer.
Role = Literal[
    "qkv",  # queries, keys and values of self-, joint or causal attention
    "out",  # what leaves such an attention
    "cross_qkv",  # the same of attention to a text
    "cross_out",
    "up",  # into the hidden channels of a feed-forward layer, gates included
    "down",  # and out of them
    "modulation",  # shifts, scales and gates from a time or a pooled text
    "embedding",  # times, patches and texts to tokens
    "router",  # tokens to scores of experts
    "head",  # tokens to patches, logits or a projection
    "convolution",
]
ROLES: tuple[Role, ...] = get_args(Role)

# What an attention attends to: its own tokens, another sequence, both in one, the past, or its own
# scale and the coarser ones.
AttentionKind = Literal["self", "cross", "joint", "causal", "scales"]

BLOCK_LAYERS = "role:qkv|out|up|down"


class TargetModule(NamedTuple):
    """One original module and its canonical path, such as `blocks.1.attn`."""

    path: str
    module: nnx.Module

    @property
    def role(self) -> Role | None:
        """What the layer is for; None for a module without a role."""
        return getattr(self.module, "role", None)


def original(module: nnx.Module) -> nnx.Module:
    """The original module below its wrappers."""
    while isinstance(module, Wrapper):
        module = module.inner
    return module


def canonical(path: tuple) -> str:
    """Join the parts of a path in a (wrapped) module to a canonical one: `inner` has no name."""
    return ".".join(str(part) for part in path if part != "inner")


def _children(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    items = enumerate(module) if isinstance(module, nnx.List) else sorted(vars(module).items())
    for name, child in items:
        if isinstance(child, nnx.Module):
            yield str(name), child


def target_modules(
    module: nnx.Module, kind: type | tuple[type, ...] = nnx.Module, pattern: str = ".*"
) -> tuple[TargetModule, ...]:
    """List the target modules below a module, in the order of its attributes.

    Args:
        module: a model, possibly patched.
        kind: type of the original modules to list.
        pattern: regular expression that the whole canonical path must match.
    """

    def walk(module: nnx.Module, path: str) -> Iterator[TargetModule]:
        module = original(module)
        if path and isinstance(module, kind) and re.fullmatch(pattern, path):
            yield TargetModule(path, module)
        for name, child in _children(module):
            yield from walk(child, f"{path}.{name}" if path else name)

    return tuple(walk(module, ""))


_BY_ROLE = "role:"


def check_selector(selector: str) -> None:
    """Check what names layers: `role:qkv|out`, or a regular expression for whole paths.

    Raises:
        ValueError: for roles that there are not, and for what is no regular expression.
    """
    if selector.startswith(_BY_ROLE):
        named = selector.removeprefix(_BY_ROLE).split("|")
        if unknown := [role for role in named if role not in ROLES]:
            raise ValueError(
                f"{selector!r} names roles {unknown} that there are not; roles are "
                f"{', '.join(ROLES)}"
            )
        return
    try:
        re.compile(selector)
    except re.error as error:
        raise ValueError(f"{selector!r} is no regular expression: {error}") from None


def selects(selector: str, target: TargetModule) -> bool:
    """Whether a selector names a layer, by its role or by its path."""
    if selector.startswith(_BY_ROLE):
        return target.role in selector.removeprefix(_BY_ROLE).split("|")
    return re.fullmatch(selector, target.path) is not None


def check_selected(selector: str, targets: Sequence[TargetModule]) -> None:
    """Check that a selector finds layers, and layers of every role that it names.

    Raises:
        ValueError: if it does not, with what there is.
    """
    if not any(selects(selector, target) for target in targets):
        roles = {target.role for target in targets} - {None}
        raise ValueError(
            f"the pattern {selector!r} matches no layer; there are layers with the roles "
            f"{', '.join(sorted(map(str, roles))) or 'none'}: {_few([t.path for t in targets])}"
        )
    if not selector.startswith(_BY_ROLE):
        return
    named = selector.removeprefix(_BY_ROLE).split("|")
    found = [role for role in named if any(target.role == role for target in targets)]
    if missing := [role for role in named if role not in found]:
        raise ValueError(
            f"this model has no layers with the role {', '.join(missing)}; give "
            f"{_BY_ROLE}{'|'.join(found)} for those that it has"
        )


def wrap(module: nnx.Module, path: str, wrapper: type[Wrapper], *args: Any, **options: Any) -> None:
    """Wrap the target module at a canonical path, in place, in `wrapper(inner, *args, **options)`.

    A wrapper that only calls `inner` goes outermost; one that replaces internals goes next to it.

    Raises:
        ValueError: if there is no such target module, or if two wrappers want to replace its
            internals.
    """
    parent = original(module)
    *parents, last = path.split(".")
    try:
        for part in parents:
            parent = original(_get(parent, part))
        outermost = _get(parent, last)
    except (AttributeError, IndexError, TypeError, ValueError):
        known = [target.path for target in target_modules(module)]
        raise ValueError(
            f"{type(original(module)).__name__} has no target module {path!r}; it has {_few(known)}"
        ) from None
    innermost = outermost
    while isinstance(innermost, Wrapper) and isinstance(innermost.inner, Wrapper):
        innermost = innermost.inner
    if not wrapper.replaces_internals or not isinstance(innermost, Wrapper):
        _set(parent, last, wrapper(outermost, *args, **options))
    elif innermost.replaces_internals:
        raise ValueError(
            f"{wrapper.__name__} and {type(innermost).__name__} both replace the internals of "
            f"{path!r}, "
            f"which only one patch can do. Give each its own target modules, or use one of them."
        )
    else:
        innermost.inner = wrapper(innermost.inner, *args, **options)


def _get(module: nnx.Module, part: str) -> Any:
    child = module[int(part)] if isinstance(module, nnx.List) else getattr(module, part)
    if not isinstance(child, nnx.Module):
        raise TypeError(part)
    return child


def _set(module: nnx.Module, part: str, child: nnx.Module) -> None:
    if isinstance(module, nnx.List):
        module[int(part)] = child
    else:
        setattr(module, part, child)


def _few(names: list[str], at_most: int = 12) -> str:
    shown = ", ".join(names[:at_most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > at_most else "")
