import pytest
import torch

from unite_fast.training.gradients import foreach_accumulation


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 4), (5,), (2,))]


def loss(parameters, power):
    return sum(p.pow(power).sum() for p in parameters)


def test_accumulated_gradients_equal_autograds(parameters):
    def second_pass():
        """In this pass the third parameter gets its first gradient and the second gets none."""
        for p in parameters:
            p.grad = None
        loss(parameters[:2], 2).backward()
        return loss([parameters[0], parameters[2]], 3)

    second_pass().backward()
    expected = [p.grad.clone() for p in parameters]
    second = second_pass()
    first_gradient = parameters[0].grad
    with foreach_accumulation(parameters):
        second.backward()
    assert parameters[0].grad is first_gradient
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, expected, strict=True))


def test_gradients_survive_an_error(parameters):
    loss(parameters, 2).backward()
    expected = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="on purpose"), foreach_accumulation(parameters):
        raise RuntimeError("on purpose")
    assert all(torch.equal(p.grad, w) for p, w in zip(parameters, expected, strict=True))
