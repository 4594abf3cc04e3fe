"""How a native body becomes an op with a gradient.

A call goes one of two ways. In eager mode it is a `torch.autograd.Function` around the C++ call, about 20 us dearer
than the C++ alone, where a dispatcher op written in Python costs about 95. While torch.compile or a fake tensor looks
on, it is the dispatcher op `unite_fast::NAME`, which they can see: its gradient is `unite_fast::NAME_backward`.
Both ways run the same code on the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_library = torch.library.Library("unite_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)

Results = tuple[Tensor, ...]


class NativeOp:
    """An op from its forward and backward passes.

    Args:
        name: of the op.
        inputs, outputs: their types as PyTorch's operator schemas write them. Gradients go to the first inputs, one for
            each result of `backward`. The first `results` outputs are the caller's, the others are for `backward`.
        forward: takes the inputs, gives the outputs, none of which is an input or shares its memory.
        like_forward: the same on tensors without numbers: shapes, types and strides.
        backward_inputs, backward_outputs, backward, like_backward: the same for the backward pass. It takes the
            gradient of each of the `results`, None for one that was not used, and then what `saved` gave.
        saved: what of (inputs, outputs) the backward pass needs.
        eager_forward: takes the place of `forward` in eager mode, where an output may be a view of an input.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: str,
        outputs: str,
        results: int,
        forward: Callable[..., Results],
        like_forward: Callable[..., Results],
        backward_inputs: str,
        backward_outputs: str,
        backward: Callable[..., Results],
        like_backward: Callable[..., Results],
        saved: Callable[[tuple, Results], tuple[Tensor | None, ...]],
        eager_forward: Callable[..., Results] | None = None,
    ):
        self.results = results
        self.saved = saved
        for op, schema, body, like in (
            (name, f"({inputs}) -> ({outputs})", forward, like_forward),
            (f"{name}_backward", f"({backward_inputs}) -> ({backward_outputs})", backward, like_backward),
        ):
            _library.define(op + schema)
            _library.impl(op, _as_declared(body), "CPU")
            torch.library.register_fake(f"unite_fast::{op}", _as_declared(like), lib=_library)
        self.op = getattr(torch.ops.unite_fast, name).default
        self.backward_op = getattr(torch.ops.unite_fast, f"{name}_backward").default
        run = eager_forward or forward

        def gradients(body, ctx, incoming):
            found = _as_tuple(body(*incoming[:results], *ctx.saved_tensors))
            needed = ctx.needs_input_grad
            found += (None,) * (len(needed) - len(found))
            # A weight that is None has an empty gradient here: an op can give no None.
            return tuple(g if n else None for g, n in zip(found, needed, strict=True))

        def setup_context(ctx, inputs, output):
            output = _as_tuple(output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[results:])
            ctx.save_for_backward(*saved(inputs, output))

        torch.library.register_autograd(
            f"unite_fast::{name}",
            lambda ctx, *incoming: gradients(self.backward_op, ctx, incoming),
            setup_context=setup_context,
            lib=_library,
        )

        def eager(ctx, *inputs):
            outputs = run(*inputs)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*saved(inputs, outputs))
            return outputs[:results] if results > 1 else outputs[0]

        @once_differentiable
        def eager_backward(ctx, *incoming):
            return gradients(backward, ctx, incoming)

        # Made by hand for its name, which a profile shows.
        methods = {"forward": staticmethod(eager), "backward": staticmethod(eager_backward)}
        self.function = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *inputs):
        # Not a plain tensor: fake, or under trace. The address of such a one means nothing.
        if torch.compiler.is_compiling() or type(inputs[0]) not in _PLAIN:
            outputs = _as_tuple(self.op(*inputs))
            return outputs[: self.results] if self.results > 1 else outputs[0]
        return self.function.apply(*inputs)


def _as_declared(body: Callable[..., Results]) -> Callable:
    """A body as an operator schema wants it: one result alone is no tuple."""

    def run(*inputs):
        results = body(*inputs)
        return results if len(results) > 1 else results[0]

    return run


def _as_tuple(results: Tensor | Results) -> Results:
    return results if isinstance(results, tuple) else (results,)
