"""The Gauss-Newton update against closed forms; the matrix of backends is in test_ops_matrix."""

import torch

from distruction import ops


def update(std, grad, evidence, counters=None):
    """One update of ``std``, in place, by the reference; returns the sample and the counters."""
    mean, param = torch.zeros_like(std), torch.empty_like(std)
    counters = torch.zeros(3, dtype=torch.int64) if counters is None else counters
    state, draws = ops.State([mean], [std]), ops.Draws([0], [0], 3, counters)
    ops.gauss_newton([param], [grad], state, draws, evidence, backend="reference")
    return param, counters


def test_precisions_add_up():
    generator = torch.Generator().manual_seed(0)
    std = 0.1 * torch.rand(500, generator=generator, dtype=torch.float64) + 1e-3
    grads = torch.randn(20, 500, generator=generator, dtype=torch.float64)
    precision = std**-2 + 7.0 * (grads**2).sum(0)
    for grad in grads:
        _, counters = update(std, grad, 7.0, counters=torch.tensor([4, 3, 0]))
    assert counters.tolist() == [5, 0, 0]
    torch.testing.assert_close(std, precision**-0.5, rtol=1e-13, atol=0)


def test_sampled_targets_and_signs_give_the_posterior_of_linear_regression():
    # y = theta * x + noise of std 1: the exact posterior has the precision 1 / std**2 + the sum of x**2 over the data.
    parameters, batch, steps, data_per_step = 4000, 8, 25, 30.0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(parameters, batch, generator=generator, dtype=torch.float64)
    std = torch.full((parameters,), 0.2, dtype=torch.float64)
    exact = std**-2 + steps * data_per_step * (x**2).mean(1)
    counters = torch.zeros(3, dtype=torch.int64)
    theta = torch.zeros_like(std)
    for _ in range(steps):
        prediction = theta[:, None] * x
        targets = prediction + torch.randn(x.shape, generator=generator, dtype=torch.float64)
        signs = torch.randint(2, x.shape, generator=generator) * 2.0 - 1.0
        grad = (signs * (prediction - targets) * x).sum(1) / batch**0.5
        theta, _ = update(std, grad, data_per_step, counters)
    ratio = (std**-2 - 25.0) / (exact - 25.0)
    # Each is a sum of `steps` squared normals: relative variance 2 / steps.
    assert abs(ratio.mean() - 1.0) < 4.5 * (2 / steps / parameters) ** 0.5
    assert abs(ratio.var() / (2 / steps) - 1.0) < 0.15
