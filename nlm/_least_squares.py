"""RegMean's least squares on arrays, for :mod:`nlm.merge` and :mod:`nlm.streaming`.

The merged weight of a linear layer is W = (sum_t W_t G_t) (sum_t G_t)^-1, row by row: any rows may
be solved alone. In float64; products go through BLAS, whose last bits depend on their shapes.
Imports no torch.
"""

from collections.abc import Sequence

import numpy as np


class LeastSquares:
    """The merged rows of one linear layer.

    Parameters
    ----------
    name : of its weight, for messages.
    grams : the Gram matrix ``[inputs, inputs]`` of each expert, float64.
    alpha : the factor on their off-diagonal entries.

    Raises
    ------
    ValueError
        The Gram matrices are not finite, or singular in sum.
    """

    def __init__(self, name: str, grams: Sequence[np.ndarray], alpha: float) -> None:
        from scipy import linalg  # a quarter of a second to import

        self.grams = [_scaled(gram, alpha) for gram in grams]
        total = np.sum(self.grams, axis=0)
        diagonal = np.einsum("ii->i", total)
        if not np.isfinite(total).all():
            raise ValueError(
                f"nlm.merge.regmean: Gram matrices are finite, got NaN or inf in those of {name!r}"
            )
        noise = np.finfo(np.float64).eps * len(total) * diagonal.max(initial=0)
        diagonal[diagonal == 0] = 1  # inputs that are 0 everywhere keep the mean's weights
        try:
            self._factor = linalg.cho_factor(total, lower=True, overwrite_a=True)
            is_singular = not np.square(self._factor[0].diagonal()).min(initial=np.inf) > noise
        except linalg.LinAlgError:
            is_singular = True
        if is_singular:
            raise ValueError(
                f"nlm.merge.regmean: inputs that depend on one another take a smaller alpha, got "
                f"{len(total)} of {name!r} whose Gram matrices are singular in sum"
            )

    def rows(self, weights: Sequence[np.ndarray]) -> np.ndarray:
        """The merged rows of the experts' rows ``[rows, inputs]``, float64."""
        from scipy import linalg

        mean = np.sum(weights, axis=0, dtype=np.float64) / len(weights)
        wanted = np.zeros_like(mean)
        for weight, gram in zip(weights, self.grams, strict=True):
            wanted += (weight - mean) @ gram
        return mean + linalg.cho_solve(self._factor, wanted.T).T


def _scaled(gram: np.ndarray, alpha: float) -> np.ndarray:
    made = gram * alpha
    np.einsum("ii->i", made)[:] = np.einsum("ii->i", gram)
    return made
