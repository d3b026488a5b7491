"""The paper's Q-network, noisy layers (section 3.2), with its gradient and Adam: by hand, in numpy.

At this size autograd costs five times the arithmetic. A test checks each of them against torch.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np


class NoisyMLP:
    """Q-network: two hidden ReLU layers, every layer with learned, factorised Gaussian noise (Fortunato et al., 2018).

    A layer computes ``y = x (W + W_sigma * f(e_in)^T f(e_out)) + b + b_sigma * f(e_out)``, f(e) = sign(e) sqrt(|e|).
    W and b are one (inputs + 1, outputs) matrix, b its last row, and all layers lie end to end in one vector of P
    numbers: `parameters` is (2, P), the means and the sigmas, and a noisy network is ``mean + sigma * noise``.

    The output layer's mean starts at zero. Q is then f(e_out) times something that both actions share, so that a
    fresh draw makes the greedy action of the untrained network a fair coin, whatever is observed.
    """

    def __init__(self, n_features: int, hidden: int, sigma: float, rng: np.random.Generator) -> None:
        sizes = (n_features, hidden, hidden, 2)
        self.shapes = [(inputs + 1, outputs) for inputs, outputs in pairwise(sizes)]
        ends = np.cumsum([0, *(rows * outputs for rows, outputs in self.shapes)]).tolist()
        self.places = [slice(begin, end) for begin, end in pairwise(ends)]
        self.parameters = np.zeros((2, ends[-1]), np.float32)
        means, sigmas = (self.layers(vector) for vector in self.parameters)
        for inputs, mean, deviation in zip(sizes, means, sigmas, strict=False):
            mean[:] = rng.uniform(-1, 1, mean.shape) / math.sqrt(inputs)
            deviation[:] = sigma / math.sqrt(inputs)
        means[-1][:] = 0

    def layers(self, vector: np.ndarray) -> list[np.ndarray]:
        """The matrices (inputs + 1, outputs) that lie in a vector of P numbers, as views of it."""
        return [vector[place].reshape(shape) for place, shape in zip(self.places, self.shapes, strict=True)]

    def noise(self, rng: np.random.Generator) -> np.ndarray:
        """(P,) factorised noise: f(e_in) f(e_out) for weights, f(e_out) for biases."""
        draw = rng.standard_normal(sum(map(sum, self.shapes)), np.float32)
        draw = np.sign(draw) * np.sqrt(np.abs(draw))
        noise, used = np.empty_like(self.parameters[0]), 0
        for layer in self.layers(noise):
            rows, outputs = layer.shape
            e_in, e_out = draw[used : used + rows], draw[used + rows : used + rows + outputs]
            e_in[-1] = 1  # the bias
            np.multiply.outer(e_in, e_out, out=layer)
            used += rows + outputs
        return noise


def forward(layers: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(B, F) -> Q-values (B, 2), and the input (B, inputs) of every layer."""
    inputs = []
    for i, layer in enumerate(layers):
        x = np.maximum(x, 0) if i else x
        inputs.append(x)
        x = x @ layer[:-1] + layer[-1]
    return x, inputs


def backward(
    layers: list[np.ndarray], inputs: list[np.ndarray], delta: np.ndarray, gradients: list[np.ndarray]
) -> None:
    """Write the gradient of every layer, given the inputs from `forward` and delta (B, 2), the gradient of Q."""
    for layer, x, gradient in zip(layers[::-1], inputs[::-1], gradients[::-1], strict=True):
        np.matmul(x.T, delta, out=gradient[:-1])
        delta.sum(axis=0, out=gradient[-1])
        delta = (delta @ layer[:-1].T) * (x > 0)


class Adam:
    """Adam (Kingma and Ba, 2014) on one array, in place."""

    def __init__(self, parameters: np.ndarray, learning_rate: float) -> None:
        self.parameters, self.learning_rate, self.steps = parameters, learning_rate, 0
        self.m, self.v = np.zeros_like(parameters), np.zeros_like(parameters)

    def step(self, gradient: np.ndarray) -> None:
        self.steps += 1
        self.m += 0.1 * (gradient - self.m)
        self.v += 0.001 * (gradient * gradient - self.v)
        rate, v_hat = self.learning_rate / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        self.parameters -= rate * self.m / (np.sqrt(v_hat) + 1e-8)
