"""Drawing of random edits of a model, and what they say of its block: whether it may still be fused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.swap.drawn import Draw, Drawn, Model
from tests.swap.random_models import DRAW

HALF = (torch.bfloat16, torch.float16)

# Edits: of the model and a number that says where. They return the model, which a copy may have taken the place of, and
# the name of the part of the block that they touched, or None.
Edited = tuple[Model, str | None]
Edit = Callable[[Model, int], Edited]


class Adapter(nn.Module):
    """As LoRA: the layer itself, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.base = base
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(base.weight.dtype))
            for shape in ((base.in_features, 2), (2, base.out_features))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


class Scaled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 1.5 * value


def scaled(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(scaled(item) for item in value)
    return 1.5 * value if isinstance(value, Tensor) else value


def after_forward(module: nn.Module, given: Any, result: Any) -> Any:
    return scaled(result)


def before_forward(module: nn.Module, given: Any) -> Any:
    return scaled(given)


def after_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return scaled(grad_input)


def pick(model: Model, where: int, wanted: Callable[[nn.Module], bool] = lambda module: True) -> tuple[str, Any]:
    """One of the block's modules, the block among them, and its name."""
    parts = [
        (name, m)
        for name, m in model.block.named_modules()
        if wanted(m) and not isinstance(m, (nn.ModuleList, parametrize.ParametrizationList))
    ]
    return parts[where % len(parts)] if parts else reject()


def weighted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not parametrize.is_parametrized(module)


def hook(model: Model, where: int) -> Edited:
    name, module = pick(model, where)
    module.register_forward_hook(after_forward)
    return model, name


def pre_hook(model: Model, where: int) -> Edited:
    name, module = pick(model, where)
    module.register_forward_pre_hook(before_forward)
    return model, name


def backward_hook(model: Model, where: int) -> Edited:
    # PyTorch's batch norm with such a hook is wrong on one sample in channels last whose gradient is contiguous.
    name, module = pick(model, where, lambda m: not isinstance(m, nn.BatchNorm2d))
    module.register_full_backward_hook(after_backward)
    return model, name


def weight_norm(model: Model, where: int) -> Edited:
    name, module = pick(model, where, weighted)
    parametrizations.weight_norm(module)
    return model, name


def parametrization(model: Model, where: int) -> Edited:
    name, module = pick(model, where, lambda m: any(p is not None for p in m._parameters.values()))
    names = [name for name, value in module._parameters.items() if value is not None]
    parametrize.register_parametrization(module, names[where % len(names)], Scaled())
    return model, name


def no_bias(model: Model, where: int) -> Edited:
    name, module = pick(model, where, lambda m: m._parameters.get("bias") is not None)
    module.bias = None
    return model, name


def adapter(model: Model, where: int) -> Edited:
    name, linear = pick(model, where, lambda m: type(m) is nn.Linear)
    model.block.set_submodule(name, Adapter(linear))
    return model, name


def a_copy(model: Model, where: int) -> Edited:
    return copy.deepcopy(model), None


def pickled(model: Model, where: int) -> Edited:
    return pickle.loads(pickle.dumps(model)), None


def loaded(model: Model, where: int) -> Edited:
    state = model.state_dict()
    model.load_state_dict({n: 0.9 * v if v.is_floating_point() else v for n, v in state.items()})
    return model, None


def frozen(model: Model, where: int) -> Edited:
    pick(model, where)[1].requires_grad_(False)
    return model, None


def rounded(model: Model, where: int) -> Edited:
    """There and back: the numbers are another's."""
    return model.float().double(), None


def in_float32(model: Model, where: int) -> Edited:
    return model.float(), None


def in_bfloat16(model: Model, where: int) -> Edited:
    return model.bfloat16(), None


def in_float16(model: Model, where: int) -> Edited:
    return model.half(), None


def other_mode(model: Model, where: int) -> Edited:
    pick(model, where)[1].train(bool(where % 2))
    return model, None


EDITS = (
    hook,
    pre_hook,
    backward_hook,
    weight_norm,
    parametrization,
    no_bias,
    adapter,
    a_copy,
    pickled,
    loaded,
    frozen,
    rounded,
    in_float32,
    in_bfloat16,
    in_float16,
    other_mode,
)
# What the fused form does the work of may not be listened to, nor be another module.
STRICT = (hook, pre_hook, backward_hook, adapter)
BEFORE, AFTER, USED = "before the swap", "after it", "after a call"


@dataclass
class Case:
    """A model, what it is given, and what happens to it."""

    drawn: Drawn
    batch: int
    channels_last: bool
    training: bool
    dtype: torch.dtype
    swaps: list[tuple[str | None, bool]]
    """Backend, and whether norms are folded: of the first swap, and of those after the edits of each stage."""
    order: list[int]
    """In which the swaps are undone."""
    edits: list[tuple[str, Edit, int]]
    shard: str | None
    """Whether fully_shard comes last: over the block, or over the model too."""

    def fused(self, block: nn.Module, done: list[tuple[Edit, str | None]]) -> bool | None:
        """Whether a call has to be fused, or to be the original's; None where both may be.

        ``block`` is as the edits left it, ``done`` are they and the parts that they touched.
        """
        told: bool | None = True
        for edit, part in done:
            if part is None:
                continue
            free = part == "" or any(f"{part}.".startswith(f"{name}.") for name in self.drawn.free)
            if edit in STRICT and not free:
                return False
            # Other parameters are read, or declined: two may have to be alike. A hook on a bridge may want its scores.
            if edit not in STRICT or part == "":
                told = None
        listened = self.shard is not None and self.drawn.tokens is not None  # fully_shard does it by hooks
        return None if listened or self.draws(block) or self._ambiguous() else told

    def draws(self, block: nn.Module) -> bool:
        """Whether random numbers may be drawn: other ones in another dtype."""
        rates = [
            (m, getattr(m, name, None)) for m in block.modules() for name in ("p", "drop_prob", "attention_dropout")
        ]
        return any(m.training for m in block.modules()) and any(isinstance(r, float) and r > 0 for _, r in rates)

    def _ambiguous(self) -> bool:
        """Of ml-cvnets' norms: as many patches as features."""
        block: Any = self.drawn.block
        if not hasattr(block, "patch_h"):
            return False
        (h, w), (ph, pw) = self.drawn.sides, (block.patch_h, block.patch_w)
        return -(-h // ph) * -(-w // pw) == 8


@st.composite
def cases(draw: Draw, family: str, shards: bool = True, edits: bool = True) -> Case:
    count = draw(st.sampled_from((0, 1, 1, 1, 2))) if edits else 0
    edit = st.tuples(st.sampled_from((BEFORE, AFTER, USED, USED)), st.sampled_from(EDITS), st.integers(0, 40))
    dtypes = (torch.float64, torch.float64, torch.float64, torch.float32, *HALF) if edits else (torch.float64,)
    swaps = draw(st.sampled_from((1, 1, 2, 3))) if edits else 1
    one = st.tuples(st.sampled_from((None, None, "reference", "auto")), st.booleans())
    return Case(
        DRAW[family](draw),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(dtypes)),
        draw(st.lists(one, min_size=swaps, max_size=swaps)),
        draw(st.permutations(range(swaps))),
        draw(st.lists(edit, min_size=count, max_size=count)),
        draw(st.sampled_from((None, None, None, "block", "model"))) if shards else None,
    )
