"""`FusedOp`: one differentiable op made of its fast backends, `native` and `triton`.

An eager call runs a `torch.autograd.Function` around the backend, which adds about 20 us; a dispatcher op written in
Python would add about 95. Under torch.compile, fake tensors or a dispatch mode, a call runs the dispatcher op
`unite_fast::NAME`, with the gradient `unite_fast::NAME_backward`, because only that is visible to them. Both paths run
the same code on the same numbers.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unite_fast.kernels import backend, native, tensors

_library = torch.library.Library("unite_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_NOT_PASSED = (torch.dtype, type(None))

Results = tuple[Tensor, ...]


class Backend(NamedTuple):
    """One implementation of an op. All backends of an op save the same tensors for backward."""

    forward: Callable[..., Results]
    """(*inputs) -> outputs. No output may be an input or a view of one. Small outputs may share one allocation."""
    backward: Callable[..., Results]
    """(gradient of each result, None if unused; *saved) -> gradients of the first inputs."""
    backward_recompute: Callable[..., Results] | None = None
    """`backward` that also recomputes the op's result, for an op that does not save it: gradients, then result."""


_triton_module = cache(lambda name: importlib.import_module(f"unite_fast.kernels.triton_kernels.{name}"))


def triton_function(module: str, name: str) -> Callable[..., Results]:
    """A function of kernels/triton_kernels/MODULE.py. The module is imported by the first call: Triton is not on every
    machine."""

    def call(*inputs):
        return getattr(_triton_module(module), name)(*inputs)

    return call


def triton_backend(module: str, name: str | None = None, recompute: bool = False) -> Backend:
    """The functions NAME_forward, NAME_backward and, with `recompute`, NAME_backward_recompute of
    kernels/triton_kernels/MODULE.py; NAME is MODULE by default."""
    name = name or module
    return Backend(
        triton_function(module, f"{name}_forward"),
        triton_function(module, f"{name}_backward"),
        backward_recompute=triton_function(module, f"{name}_backward_recompute") if recompute else None,
    )


def native_backend(name: str, fake_forward: Callable[..., Results], fake_backward: Callable[..., Results]) -> Backend:
    """The C++ functions NAME_forward and NAME_backward of an op whose first output and first gradient are [B, T, D].

    Their arguments are B, T and D, the inputs and the outputs in the order of the op, as `native.run` passes them;
    dtypes and None are left out. An incoming gradient that is None is passed as zeros [B, T, D].
    """

    def converted(inputs: Iterable) -> list:
        return [tensors.as_input(v) if isinstance(v, Tensor) else v for v in inputs if not isinstance(v, _NOT_PASSED)]

    def forward(*inputs):
        outputs = fake_forward(*inputs)
        native.run(f"{name}_forward", *outputs[0].shape, *converted(inputs), *outputs)
        return outputs

    def backward(*inputs):
        gradients = fake_backward(*inputs)
        shape, like = gradients[0].shape, gradients[0]
        inputs = (tensors.gradient_or_zeros(None, shape, like) if value is None else value for value in inputs)
        native.run(f"{name}_backward", *shape, *converted(inputs), *gradients)
        return gradients

    return Backend(forward, backward)


class FusedOp:
    """A differentiable op with several backends. docs/adding-a-kernel.md builds one step by step.

    Args:
        name: name in `torch.ops.unite_fast`.
        inputs: the arguments in PyTorch's schema syntax. By default, each parameter of `fake_forward` is a Tensor.
        outputs: number of tensors that `forward` returns.
        results: number of outputs that the caller gets, the first ones; the others are only saved for backward.
        views: (*inputs) -> further results, which are views of the inputs. A dispatcher op must not return them.
        fake_forward: `forward` on tensors without data: allocates outputs of the right shape, dtype and strides.
        backward_inputs: gradients of the results, then what `saved` returns. By default, each parameter of
            `fake_backward` is a Tensor.
        backward_outputs: number of gradients that `backward` returns, one for each of the first inputs.
        fake_backward: `backward` on tensors without data.
        saved: (inputs, outputs) -> what backward needs.
        backends: by name, "native" or "triton".
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: str | None = None,
        outputs: int = 1,
        results: int = 1,
        views: Callable[..., Results] | None = None,
        fake_forward: Callable[..., Results],
        backward_inputs: str | None = None,
        backward_outputs: int,
        fake_backward: Callable[..., Results],
        saved: Callable[[tuple, Results], tuple],
        backends: dict[str, Backend],
    ):
        inputs, backward_inputs = inputs or _tensors(fake_forward), backward_inputs or _tensors(fake_backward)
        self.name = name
        self.results = results
        self.views = views
        self.fake_forward = fake_forward
        self.fake_backward = fake_backward
        self.saved = saved
        self.backends = {key: _without_autocast(implementation) for key, implementation in backends.items()}
        for op, arguments, returns, direction, fake in (
            (name, inputs, outputs, "forward", fake_forward),
            (f"{name}_backward", backward_inputs, backward_outputs, "backward", fake_backward),
        ):
            _library.define(f"{op}({arguments}) -> ({', '.join(['Tensor'] * returns)})")
            runs = {key: _unpacked(_unshared(getattr(b, direction))) for key, b in self.backends.items()}
            for device in ("cpu", "cuda"):
                _library.impl(op, _choose_by_device(runs, torch.device(device)), device.upper())
            torch.library.register_fake(f"unite_fast::{op}", _unpacked(fake), lib=_library)
        self.op = getattr(torch.ops.unite_fast, name).default
        self.backward_op = getattr(torch.ops.unite_fast, f"{name}_backward").default

        def setup_context(ctx, inputs, output):
            output = as_tuple(output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[results:])
            _save(ctx, saved(inputs, output))

        def op_backward(ctx, *incoming):
            views = len(self.backward_op._schema.arguments) - len(ctx.others) - results
            return _gradients(self.backward_op, ctx, (*incoming[:results], *[None] * views))

        torch.library.register_autograd(f"unite_fast::{name}", op_backward, setup_context=setup_context, lib=_library)
        self.functions = {key: self._function(b) for key, b in self.backends.items()}
        self.function_of_operators = self._function(Backend(lambda *x: as_tuple(self.op(*x)), self.backward_op))

    def _function(self, implementation: Backend) -> type[torch.autograd.Function]:
        def forward(ctx, *inputs):
            outputs = implementation.forward(*inputs)
            ctx.set_materialize_grads(False)
            _save(ctx, self.saved(inputs, outputs))
            results = self.all_results(inputs, outputs)
            return results[0] if len(results) == 1 else results

        def first_order(ctx, *incoming):
            return _gradients(implementation.backward, ctx, incoming)

        guarded = once_differentiable(first_order)

        def backward(ctx, *incoming):
            # The guard takes 10 us. Without create_graph there is nothing to guard.
            return (guarded if torch.is_grad_enabled() else first_order)(ctx, *incoming)

        # A class of the op's own name: profiles show it.
        return type(
            self.name,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward)},
        )

    def all_results(self, inputs: tuple, outputs: Results) -> Results:
        """What the caller gets."""
        return outputs[: self.results] if self.views is None else (*outputs[: self.results], *self.views(*inputs))

    def __call__(self, chosen: str, *inputs) -> Any:
        """Run the backend that `backend.choose` returned for these inputs."""
        if not torch.compiler.is_compiling() and not needs_dispatcher(inputs[0]):
            return self.functions[chosen].apply(*inputs)
        if self.views is not None:
            return self.function_of_operators.apply(*inputs)
        outputs = as_tuple(self.op(*inputs))
        return outputs[: self.results] if self.results > 1 else outputs[0]


def needs_dispatcher(x: Tensor) -> bool:
    """Whether a call on x must go through the dispatcher: x is fake or traced, so that it has no address, or a dispatch
    mode is active."""
    return type(x) not in _PLAIN or bool(torch._C._len_torch_dispatch_stack())


def _tensors(fake: Callable[..., Results]) -> str:
    return ", ".join(f"Tensor {name}" for name in inspect.signature(fake).parameters)


def _without_autocast(implementation: Backend) -> Backend:
    """The backend with autocast off in its forward pass, where autocast would cast the inputs of PyTorch's operators a
    second time."""

    def wrap(run: Callable[..., Results]) -> Callable[..., Results]:
        def call(*inputs):
            device = inputs[0].device.type
            if not torch.is_autocast_enabled(device):
                return run(*inputs)
            # What torch.autocast(device, enabled=False) does, without the 10 us that it takes.
            torch.set_autocast_enabled(device, False)
            try:
                return run(*inputs)
            finally:
                torch.set_autocast_enabled(device, True)

        return call

    return implementation._replace(forward=wrap(implementation.forward))


def _save(ctx, values: tuple) -> None:
    """Save values for backward. `save_for_backward` takes tensors only; the others become an attribute."""
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in values])
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]


def _gradients(backward: Callable[..., Results], ctx, incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    saved = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    gradients = as_tuple(backward(*incoming, *saved))
    needed = ctx.needs_input_grad
    gradients += (None,) * (len(needed) - len(gradients))
    # An op cannot return None, so a weight that is None has an empty gradient here.
    return tuple([g if n else None for g, n in zip(gradients, needed, strict=True)])


def _choose_by_device(runs: dict[str, Callable], device: torch.device) -> Callable:
    return lambda *inputs: runs[backend.fused_backend_on(device)](*inputs)


def _unshared(run: Callable[..., Results]) -> Callable[..., Results]:
    """`run`, with a copy of each result that shares its allocation with another: the dispatcher forbids sharing."""
    return lambda *inputs: tuple(r.clone() if r.untyped_storage().nbytes() > r.nbytes else r for r in run(*inputs))


def _unpacked(run: Callable[..., Results]) -> Callable:
    """`run`, with a single result returned without its tuple, as operator schemas have it."""

    def call(*inputs):
        results = run(*inputs)
        return results[0] if len(results) == 1 else results

    return call


def as_tuple(results: Tensor | Results) -> Results:
    return results if isinstance(results, tuple) else (results,)
