r"""Features of images: the last hidden layer of a small classifier trained on the data themselves.

A perceptron with rectified units learns the classes of the training images from brightness in
[0, 1]. Its last hidden layer, :math:`f(x) = \max(0, W_L h_{L-1}(x) + b_L)`, holds what tells one
class from another; the Fréchet distance is taken there, as between the activations of an Inception
network for photographs.

Where the images have no classes (static binarised MNIST), the network learns the cluster that
k-means puts a training image in: such features know about the shapes of groups of similar images,
less about what makes two of a group different.

Distances compare only in the features of one network: the same data, arguments and seed.

References:
    Heusel et al. 2017 (arXiv 1706.08500), distances between activations; Lloyd 1982, k-means.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.data.splits import DataSet
from vadd_pyro.process import check_size

__all__ = ["ImageFeatures"]

_BATCH = 200


class ImageFeatures:
    """A small classifier of images, and what its last hidden layer makes of any of them.

    Trained when it is made: a second for digits, a few for MNIST.

    Args:
        data: images, grey or in colour. Their classes ``data.labels`` are learned or, without any,
            clusters of the training images (:attr:`clustered`).
        hidden_dims: widths of the hidden layers; the last is the number of features ``F``.
        num_rows: training images used at most, drawn at random.
        num_updates: steps of Adam, of 200 images each, rounded up to whole passes.
        num_clusters: how many clusters stand for the classes where there are none.
        seed: of the images drawn, the clusters and the network. The same seed gives the same
            features on one machine; elsewhere sums may round differently.

    Attributes:
        accuracy: share of the validation images whose class (or cluster) is told right.
        clustered: whether the classes are clusters.

    Raises:
        TypeError: if ``data`` is no :class:`vadd_pyro.data.DataSet`.
        ValueError: if its rows are no images, or for sizes that do not fit.

    Example:
        >>> from vadd_pyro import data
        >>> network = ImageFeatures(data.digits())
        >>> network.features(data.digits().rows("test")).shape
        (359, 64)
    """

    def __init__(
        self,
        data: DataSet,
        *,
        hidden_dims: Sequence[int] = (128, 64),
        num_rows: int = 20_000,
        num_updates: int = 1000,
        num_clusters: int = 10,
        seed: int = 0,
    ) -> None:
        if not isinstance(data, DataSet):
            raise TypeError(f"data must be a vadd_pyro.data.DataSet, got {type(data).__name__}")
        if data.shape is None:
            raise ValueError(f"data must be images, but the rows of {data.name} have no shape")
        widths = tuple(hidden_dims)
        if not widths:
            raise ValueError("hidden_dims must name at least one width, got none")
        for width in widths:
            check_size("hidden_dims", width)
        check_size("num_updates", num_updates)
        check_size("num_clusters", num_clusters, least=2)
        check_size("num_rows", num_rows, least=num_clusters if data.labels is None else 2)
        check_size("seed", seed, least=0)
        self.name = data.name
        self.clustered = data.labels is None
        self._process = data.process()
        if len(data.train) < num_clusters and self.clustered:
            raise ValueError(
                f"num_clusters must be at most {len(data.train)}, the training images, "
                f"got {num_clusters}"
            )
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(rng.permutation(len(data.train))[:num_rows])
        state = int(rng.integers(2**31))
        pixels, held_out = self._brightness(data.train[chosen]), self._brightness(data.valid)
        if data.labels is None:
            classes, expected = _clusters(pixels, held_out, num_clusters, state)
        else:
            classes = data.labels["train"][chosen].numpy()
            expected = data.labels["valid"].numpy()
        network = _trained(pixels, classes, widths, num_updates, state)
        self.accuracy = float((network.predict(held_out) == expected).mean())
        self.num_features = widths[-1]
        self._weights = [w.astype(np.float32) for w in network.coefs_[:-1]]
        self._biases = [b.astype(np.float32) for b in network.intercepts_[:-1]]

    def _brightness(self, x: Tensor) -> np.ndarray:
        """Pixels in [0, 1], ``(N, D)`` in single precision."""
        return x.cpu().numpy().astype(np.float32) / np.float32(self._process.vocab_size - 1)

    def features(self, x: Tensor) -> np.ndarray:
        """Activations of the last hidden layer.

        Args:
            x: images as tokens, ``(N, D)``.

        Returns:
            ``(N, F)`` in single precision, none below zero.

        Raises:
            TypeError, ValueError: unless ``x`` holds tokens of such images; the mask id is none.
        """
        hidden = self._brightness(self._process.check_tokens(x, "x"))
        for weight, bias in zip(self._weights, self._biases, strict=True):
            hidden = np.maximum(hidden @ weight + bias, 0)
        return hidden

    __call__ = features

    def __repr__(self) -> str:
        kind = "clusters" if self.clustered else "classes"
        return (
            f"<ImageFeatures of {self.name}: {self.num_features} features, "
            f"{self.accuracy:.1%} of validation {kind} told right>"
        )


def _clusters(
    pixels: np.ndarray, held_out: np.ndarray, num_clusters: int, state: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of the training images, and the nearest of them for those held out."""
    from sklearn.cluster import KMeans

    means = KMeans(num_clusters, n_init=1, random_state=state).fit(pixels)
    return means.labels_, means.predict(held_out)


def _trained(
    pixels: np.ndarray, classes: np.ndarray, widths: tuple[int, ...], num_updates: int, state: int
) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    size = min(_BATCH, len(pixels))
    passes = math.ceil(num_updates / math.ceil(len(pixels) / size))
    network = MLPClassifier(
        widths,
        batch_size=size,
        max_iter=passes,
        n_iter_no_change=passes + 1,  # never stops early
        random_state=state,
    )
    with warnings.catch_warnings():  # the number of steps is ours
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(pixels, classes)
