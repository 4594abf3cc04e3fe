import pytest
import torch

from unite_fast.kernels.gradients import added_at_once


@pytest.fixture
def parameters(draw):
    return [draw(3, 4).requires_grad_(), draw(5).requires_grad_(), draw(2).requires_grad_()]


def loss(parameters, power):
    return sum(p.pow(power).sum() for p in parameters)


def test_the_sums_are_those_of_autograd(parameters):
    for at_once in (False, True):
        for p in parameters:
            p.grad = None
        # The last gets its first gradient in the second pass, the one before it none there.
        loss(parameters[:2], 2).backward()
        second = loss([parameters[0], parameters[2]], 3)
        if at_once:
            kept = parameters[0].grad
            with added_at_once(parameters):
                second.backward()
            assert parameters[0].grad is kept
            assert all(torch.equal(p.grad, w) for p, w in zip(parameters, want, strict=True))
        else:
            second.backward()
            want = [p.grad.clone() for p in parameters]


def test_an_error_loses_no_gradient(parameters):
    loss(parameters, 2).backward()
    want = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="on purpose"), added_at_once(parameters):
        raise RuntimeError("on purpose")
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, want, strict=True))
