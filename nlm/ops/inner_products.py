"""The inner products of tensors, or of their differences from a base: a Gram matrix.

With vectors v_k = x_k, or x_k - b with a base b, of tensors of any float types,

    products[i, j] = sum over all entries of v_i v_j

in float64. Norms, cosines and distances follow, and so the coefficients of merges that interpolate
on a sphere or towards a base; `weighted_sum` then applies them. The products of tensors that are
taken in chunks are the sums of the chunks'.

Bytes: one read of the base and of each tensor. Flops: K^2 per entry for K tensors.
Numerics: differences, products and sums are float64, with fma where the instruction set has it;
sums of fixed blocks are added in a fixed order, so that the bits do not depend on the number of
threads. The product of two float32 numbers is exact.
Source: the angles of Model Stock (Jang et al., arXiv:2403.19522) and of SLERP are made of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlm import _native
from nlm._registry import register
from nlm.ops._arguments import check_tensor, check_vectors, compute_dtype, without_gradient


def reference(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    start = None if base is None else base.double()
    vectors = torch.stack(
        [(x.double() if start is None else x.double() - start).flatten() for x in tensors]
    )
    return vectors @ vectors.T


def _out(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    check_vectors("inner_products", base, tensors, 1)
    return tensors[0].new_empty((len(tensors), len(tensors)), dtype=torch.float64)


def _cpu(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    out = _out(base, tensors)
    packed = [x.contiguous() for x in tensors]
    start = out if base is None else base.contiguous()
    _native.cpu.inner_products(
        0 if base is None else start.data_ptr(), _native.DTYPES[start.dtype],
        [(x.data_ptr(), _native.DTYPES[x.dtype]) for x in packed], packed[0].numel(),
        out.data_ptr(), _native.threads(),
    )  # fmt: skip
    return out


def _cuda(base: Tensor | None, tensors: list[Tensor]) -> Tensor:
    out = _out(base, tensors)
    models = [*tensors] if base is None else [*tensors, base]
    kind = models[0].dtype
    if any(x.dtype != kind for x in models):
        kind = compute_dtype(models)
    packed = [x.to(kind).contiguous() for x in models]
    number, size = _native.DTYPES[kind], packed[0].numel()
    partial = out.new_zeros((_native.cuda.inner_products_rows(size, number), *out.shape))
    _native.cuda.inner_products(
        0 if base is None else packed[-1].data_ptr(), number,
        [(x.data_ptr(), number) for x in packed[: len(tensors)]], size, partial.data_ptr(),
        _native.stream(out),
    )  # fmt: skip
    upper = partial.sum(0)
    return torch.triu(upper) + torch.triu(upper, 1).T


_INNER_PRODUCTS = register(
    "inner_products(Tensor? base, Tensor[] tensors) -> Tensor",
    stem="inner_products",
    reference=reference,
    out=_out,
    cpu=_cpu,
    cuda=_cuda,
    missing={"cpu": _native.cpu_missing, "cuda": _native.cuda_missing},
)


def inner_products(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """The inner products of tensors with each other; with a base, of their differences from it.

    Not differentiable: the result does not require gradients.

    Parameters
    ----------
    tensors : sequence of Tensor
        1 to 128 of one shape on one device, each float16, bfloat16, float32 or float64, in any
        layout. What is not contiguous is copied.
    base : Tensor, optional
        Of that shape; of any of these types.

    Returns
    -------
    Tensor, float64, shape [tensors, tensors]
        Symmetric.

    Examples
    --------
    >>> import torch
    >>> one, two = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    >>> inner_products([one, two]).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    >>> inner_products([one], base=two).tolist()
    [[20.0]]
    """
    for k, x in enumerate(tensors):
        check_tensor("inner_products", f"tensor {k}", x)
    if base is not None:
        check_tensor("inner_products", "base", base)
        base = without_gradient("inner_products", base)
    check_vectors("inner_products", base, tensors, 1)
    return _INNER_PRODUCTS.default(base, [without_gradient("inner_products", x) for x in tensors])
