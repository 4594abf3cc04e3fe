"""How the fast bodies of an op, `native` and `triton`, become one op with a gradient.

A call goes one of two ways. In eager mode it is a `torch.autograd.Function` around the body, about 20 us dearer than
the body alone, where a dispatcher op written in Python costs about 95. While torch.compile, a fake tensor or a dispatch
mode looks on, it is the dispatcher op `unite_fast::NAME`, which they can see: its gradient is
`unite_fast::NAME_backward`. Both ways run the same code on the same numbers.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unite_fast.kernels import backend

_library = torch.library.Library("unite_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)

Results = tuple[Tensor, ...]


class Body(NamedTuple):
    """The two passes of an op. All bodies of an op save the same tensors for the backward pass."""

    forward: Callable[..., Results]
    """Takes the inputs, gives the outputs, none of which is an input or shares its memory. Small ones may be parts of
    one piece of memory."""
    backward: Callable[..., Results]
    """Takes the gradient of each result that the caller sees, None for one that was not used, and what was saved."""
    eager_forward: Callable[..., Results] | None = None
    """Takes the place of `forward` in eager mode, where an output may be a view of an input."""
    backward_again: Callable[..., Results] | None = None
    """For an op that makes its result again: takes the place of both, and gives the gradients, then the result."""


def triton_body(module: str, name: str, again: bool = False) -> Body:
    """The body made of NAME_forward and NAME_backward, and with `again` NAME_backward_again, in
    kernels/triton_bodies/MODULE.py, which is imported when it first runs: Triton is not on every machine."""

    def run(way: str) -> Callable[..., Results]:
        def call(*inputs):
            return getattr(importlib.import_module(f"unite_fast.kernels.triton_bodies.{module}"), f"{name}_{way}")(
                *inputs
            )

        return call

    return Body(run("forward"), run("backward"), backward_again=run("backward_again") if again else None)


class FusedOp:
    """An op from its bodies.

    Args:
        name: of the op.
        inputs, outputs: their types as PyTorch's operator schemas write them. Gradients go to the first inputs, one for
            each result of a backward pass. The first `results` outputs are the caller's, the others are for `backward`.
        like_forward, like_backward: the passes on tensors without numbers: shapes, types and strides.
        backward_inputs, backward_outputs: as `inputs` and `outputs`.
        saved: what of (inputs, outputs) the backward pass needs.
        bodies: by name.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: str,
        outputs: str,
        results: int,
        like_forward: Callable[..., Results],
        backward_inputs: str,
        backward_outputs: str,
        like_backward: Callable[..., Results],
        saved: Callable[[tuple, Results], tuple],
        bodies: dict[str, Body],
    ):
        self.results = results
        self.saved = saved
        self.bodies = bodies = {body: _uncast(both) for body, both in bodies.items()}
        for op, schema, way, like in (
            (name, f"({inputs}) -> ({outputs})", "forward", like_forward),
            (f"{name}_backward", f"({backward_inputs}) -> ({backward_outputs})", "backward", like_backward),
        ):
            _library.define(op + schema)
            passes = {body: _as_declared(_apart(getattr(both, way))) for body, both in bodies.items()}
            for device in ("cpu", "cuda"):
                _library.impl(op, _choosing(passes, torch.device(device)), device.upper())
            torch.library.register_fake(f"unite_fast::{op}", _as_declared(like), lib=_library)
        self.op = getattr(torch.ops.unite_fast, name).default
        self.backward_op = getattr(torch.ops.unite_fast, f"{name}_backward").default

        def setup_context(ctx, inputs, output):
            output = _as_tuple(output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[results:])
            _keep(ctx, saved(inputs, output))

        torch.library.register_autograd(
            f"unite_fast::{name}",
            lambda ctx, *incoming: _gradients(self.backward_op, ctx, incoming[:results]),
            setup_context=setup_context,
            lib=_library,
        )
        self.functions = {body: self._function(name, both) for body, both in bodies.items()}

    def _function(self, name: str, body: Body) -> type[torch.autograd.Function]:
        run = body.eager_forward or body.forward

        def forward(ctx, *inputs):
            outputs = run(*inputs)
            ctx.set_materialize_grads(False)
            _keep(ctx, self.saved(inputs, outputs))
            return outputs[: self.results] if self.results > 1 else outputs[0]

        @once_differentiable
        def backward(ctx, *incoming):
            return _gradients(body.backward, ctx, incoming)

        # Made by hand for its name, which a profile shows.
        return type(
            name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        )

    def __call__(self, body: str, *inputs):
        """Run a body that `backend.choose` gave for the inputs."""
        if torch.compiler.is_compiling() or seen_by_dispatcher(inputs[0]):
            outputs = _as_tuple(self.op(*inputs))
            return outputs[: self.results] if self.results > 1 else outputs[0]
        return self.functions[body].apply(*inputs)


def seen_by_dispatcher(x: Tensor) -> bool:
    """Whether x is no plain tensor but fake or under trace, where an address means nothing, or a mode looks on."""
    return type(x) not in _PLAIN or bool(torch._C._len_torch_dispatch_stack())


def _uncast(body: Body) -> Body:
    """The body with autocast off in its forward pass: that would cast again what it hands to PyTorch's operators."""

    def uncast(run: Callable[..., Results] | None) -> Callable[..., Results] | None:
        def call(*inputs):
            device = inputs[0].device.type
            if not torch.is_autocast_enabled(device):
                return run(*inputs)
            with torch.autocast(device, enabled=False):
                return run(*inputs)

        return run and call

    return body._replace(forward=uncast(body.forward), eager_forward=uncast(body.eager_forward))


def _keep(ctx, values: tuple) -> None:
    """Autograd looks after tensors alone."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]


def _gradients(backward: Callable[..., Results], ctx, incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    kept = (other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True))
    found = _as_tuple(backward(*incoming, *kept))
    needed = ctx.needs_input_grad
    found += (None,) * (len(needed) - len(found))
    # A weight that is None has an empty gradient here: an op can give no None.
    return tuple(g if n else None for g, n in zip(found, needed, strict=True))


def _choosing(passes: dict[str, Callable], device: torch.device) -> Callable:
    return lambda *inputs: passes[backend.fused_body_on(device)](*inputs)


def _apart(body: Callable[..., Results]) -> Callable[..., Results]:
    """A body whose results share no memory with one another, as the dispatcher wants it."""
    return lambda *inputs: tuple(r.clone() if r.untyped_storage().nbytes() > r.nbytes else r for r in body(*inputs))


def _as_declared(body: Callable[..., Results]) -> Callable:
    """A body as an operator schema wants it: one result alone is no tuple."""

    def run(*inputs):
        results = body(*inputs)
        return results if len(results) > 1 else results[0]

    return run


def _as_tuple(results: Tensor | Results) -> Results:
    return results if isinstance(results, tuple) else (results,)
