"""Telling modules that mix tokens by attention from all others, whatever their class is called.

Nothing is run and no source is read. Looked at are the class's name, what the module holds (projections for queries
and keys, heads), and the names in the compiled code of its forward and of what that calls, also by attributes, defaults
and partials: softmax, products of matrices, scaled_dot_product_attention. None of these is enough by itself: a gate
over channels may be called attention, a router has a softmax, a convolution may be a product. What a softmax weighs is
not known, so that a mixture of experts counts which is a product with its weights.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# "Attention", "attn", "WindowMSA", "E_MHSA", "LiteMLA"; not "MSAConv" of another thing, where a small letter follows.
_NAME = re.compile(r"[Aa]ttention|ATTENTION|[Aa]ttn|ATTN|(?:MSA|MHA|MHSA|SHSA|MQA|GQA|MLA)(?![a-z])")
# What attends in one call. By name alone they would be confused with the masks that they take.
_ATTENDS = re.compile(
    r"scaled_dot_product\w*attention|multi_head_attention_forward|memory_efficient_attention|flex_attention"
    r"|flash_attn\w*func|flash_attn_\w+|_flash_attention_forward|eager_attention_forward|dispatch_attention_fn|sageattn"
    r"|ALL_ATTENTION_FUNCTIONS"
)
_CALLED_ATTENTION = re.compile(r"(?:attention|attn)(?!\w*(?:mask|bias|output|pos))", re.IGNORECASE)
_SOFTMAX = re.compile(r"(?<!log_)(?<!log)softmax", re.IGNORECASE)
_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "mm", "einsum", "tensordot", "__matmul__"))
_PACKED = re.compile(r"qkv|query_key_value|^c_attn$", re.IGNORECASE)
_QUERIES = frozenset(("q", "query", "queries", "wq", "qs", "toq"))
_KEYS = frozenset(("k", "key", "keys", "wk", "ks", "tok", "kv", "kvs", "tokv", "wkv"))
_HEADS = re.compile(r"^n_?heads?$|num_(?:\w+_)?heads?$|^heads$|^head_dim$|^dim_head$|^attention_head_size$|^nhead$")
_Function = FunctionType | BuiltinFunctionType
_CALLED = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, dict, list, tuple)
_OWN = frozenset(vars(nn.Module()))
"""What every module has, hooks among them."""
# A limit on what is followed, for code that is generated or that calls half of its package.
_MOST_FUNCTIONS = 100


@dataclass(frozen=True)
class _Code:
    """What the compiled code of a class's forward speaks of."""

    attends: bool = False
    softmax: bool = False
    product: bool = False
    calls_attention: bool = False
    """A function whose name says attention, which may do anything."""

    def __or__(self, other: _Code) -> _Code:
        return _Code(**{name: value or vars(other)[name] for name, value in vars(self).items()})


_NOTHING = _Code()
_known: WeakKeyDictionary[type, _Code] = WeakKeyDictionary()


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module itself, and not only what it holds, mixes tokens by attention. Never raises.

    Modules of this library do not count: they run on its ops already.
    """
    code = _code(module)
    called_so = _NAME.search(_class_name(module)) is not None
    if (code == _NOTHING and not called_so) or _ours(type(module)):
        return False
    held = _held(module)
    softmax = code.softmax or any(type(child) is nn.Softmax for child in held.values())
    if code.attends or (softmax and code.product):
        return True
    if _projects(held):
        return called_so or softmax or code.product or code.calls_attention
    return called_so and (code.product or code.calls_attention or any(_HEADS.search(name) for name in module.__dict__))


def _ours(kind: type) -> bool:
    return any(base.__module__.startswith(("mvkernels.", "mvmodels.")) for base in kind.__mro__)


def _class_name(module: nn.Module) -> str:
    """The class's name; of a scripted module that of what it was scripted from."""
    name = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    return name if isinstance(name, str) else type(module).__name__


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The children by name, also of a module that was never initialised (none) or is scripted."""
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_children())
    held = module.__dict__.get("_modules") or {}
    return {name: child for name, child in held.items() if child is not None}


def _held(module: nn.Module) -> dict[str, Any]:
    """Children and parameters by name."""
    return {**(module.__dict__.get("_parameters") or {}), **children(module)}


def _projects(held: dict[str, Any]) -> bool:
    """Whether there are projections for queries and keys."""
    if any(_PACKED.search(name) for name in held):
        return True
    words = {word for name in held for word in name.lower().split("_")}
    return not words.isdisjoint(_QUERIES) and not words.isdisjoint(_KEYS)


def _code(module: nn.Module) -> _Code:
    kind = type(module)
    known = _known.get(kind)
    if known is None:
        # Of forward only, all that the bases define: super().forward names none of them.
        known = _known[kind] = _read(kind, _written(kind, "forward", every=True))
    kept = [value for name, value in module.__dict__.items() if isinstance(value, _CALLED) and name not in _OWN]
    return known | _read(kind, _unwrapped(*kept)) if kept else known


def _read(kind: type, functions: Sequence[_Function]) -> _Code:
    attends = softmax = product = calls_attention = False
    for function in _followed(kind, functions):
        names = {function.__name__}
        for code, known in _compiled(function):
            # getattr(F, "scaled_dot_product_attention")
            names |= {each for each in code.co_consts if isinstance(each, str) and _ATTENDS.fullmatch(each)}
            product = product or _multiplies_matrices(code)
            for name in code.co_names:
                called = _whole(known.get(name))
                # What was imported under another name has its own beside it.
                said = {name, getattr(called, "__name__", name)}
                names |= said
                if isinstance(called, FunctionType) and any(map(_CALLED_ATTENTION.search, said)):
                    calls_attention = True
        attends = attends or any(map(_ATTENDS.fullmatch, names))
        softmax = softmax or any(map(_SOFTMAX.search, names))
        product = product or not names.isdisjoint(_PRODUCTS)
    return _Code(attends, softmax, product, calls_attention)


def _followed(kind: type, functions: Sequence[_Function]) -> Iterator[_Function]:
    """These, and what they may come to call: methods of the class, defaults, and functions of their package."""
    waiting = [*functions]
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST_FUNCTIONS:
        function = waiting.pop(0)
        mark = getattr(function, "__code__", function)
        if mark in seen:
            continue
        seen.add(mark)
        yield function
        if not isinstance(function, FunctionType):
            continue
        package = _package(function)
        for code, known in _compiled(function):
            for name in code.co_names:
                if name != "forward":
                    waiting += _written(kind, name)
                called = _whole(known.get(name))
                if isinstance(called, FunctionType) and package != "torch" and _package(called) == package:
                    waiting += _unwrapped(called)
        waiting += _unwrapped(*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def _compiled(function: _Function) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """The code of a function and of what is in it, each with the names of its module; none if it is built in."""
    if isinstance(function, FunctionType):
        for code in _parts(function.__code__):
            yield code, function.__globals__


def _package(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _whole(value: Any) -> Any:
    """What a partial is of, or a bound method; of an autograd Function its forward."""
    while isinstance(value, (functools.partial, functools.partialmethod, MethodType)):
        value = value.__func__ if isinstance(value, MethodType) else value.func
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        forward = inspect.getattr_static(value, "forward")
        return getattr(forward, "__func__", forward)
    return value


def _written(kind: type, name: str, every: bool = False) -> list[_Function]:
    """The methods of this name along the bases, below nn.Module: the first, or every one."""
    found: list[_Function] = []
    for base in kind.__mro__:
        if base is nn.Module or base is object:
            continue
        method = base.__dict__.get(name)
        if method is not None:
            found += _unwrapped(method)
            if not every:
                break
    return found


def _unwrapped(*methods: Any) -> list[_Function]:
    """Functions, those in a dict, list or tuple, and what decorators have put around them: by functools.wraps, or by a
    closure."""
    found: list[_Function] = []
    waiting: list[Any] = []
    for one in methods:
        held = list(one.values()) if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else [one]
        waiting += held[:_MOST_FUNCTIONS]
    while waiting and len(found) < _MOST_FUNCTIONS:
        one = _whole(waiting.pop())
        if isinstance(one, (staticmethod, classmethod)):
            one = _whole(one.__func__)
        elif isinstance(one, property):
            one = one.fget
        if not isinstance(one, (FunctionType, BuiltinFunctionType)) or one in found:
            continue
        found.append(one)
        if isinstance(one, FunctionType):
            waiting.append(one.__dict__.get("__wrapped__"))
            for cell in one.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    waiting.append(cell.cell_contents)
    return found


def _parts(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the lambdas and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _multiply(a: Any, b: Any) -> Any:
    a @= b
    return a @ b


_MULTIPLICATIONS = frozenset(
    (i.opcode, i.arg or 0) for i in dis.get_instructions(_multiply) if i.opname.startswith(("BINARY_", "INPLACE_"))
)


def _multiplies_matrices(code: CodeType) -> bool:
    """Whether the operator ``@`` is used."""
    return not _MULTIPLICATIONS.isdisjoint(zip(code.co_code[::2], code.co_code[1::2]))
