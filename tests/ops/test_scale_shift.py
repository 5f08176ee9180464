"""scale_shift beyond the rules of all operators."""

import math

import numpy as np
import pytest
import torch

from nlm.ops import scale_shift


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape, dim", [((6, 5), 1), ((6, 5, 7), 1), ((6, 7, 5), 2)])
def test_one_task_for_all_is_that_task(shape: tuple[int, ...], dim: int) -> None:
    x, scale, shift = random(*shape), random(3, 5, seed=1), random(3, 5, seed=2)
    for task in range(3):
        ids = torch.full((6,), task)
        expected = scale_shift(x, scale[task], shift[task], dim=dim)
        assert torch.equal(scale_shift(x, scale, shift, task, dim), expected)
        assert torch.equal(scale_shift(x, scale, shift, ids, dim), expected)


def test_mixed_batch_is_the_samples_one_by_one() -> None:
    x, scale, shift = random(9, 4, 3, 3), random(3, 4, seed=1), random(3, 4, seed=2)
    ids = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1])
    y = scale_shift(x, scale, shift, ids)
    for n, task in enumerate(ids.tolist()):
        assert torch.equal(y[n : n + 1], scale_shift(x[n : n + 1], scale, shift, task))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """All 65536 bit patterns: subnormals, infinities, NaN; ties and overflow of the results."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).reshape(-1, 1)
    for scale, shift in ((1.0, 0.0), (0.50048828125, 0.0), (1.5, 1e-8), (-3.0, 6.1e-5)):
        y = scale_shift(x, torch.tensor([scale]), torch.tensor([shift]))
        expected = (x.float() * scale + shift).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(y[~y.isnan()]), torch.signbit(expected[~y.isnan()]))


def test_layout_of_the_result_is_that_of_the_input() -> None:
    x = random(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    y = scale_shift(x, random(8), random(8))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "x, dim",
    [
        (random(6, 33), 1),
        (random(33, 6).T, 1),
        (random(6, 7, 40), 2),
        (random(6, 33, 14, 14), 1),
        (random(6, 33, 14, 14).contiguous(memory_format=torch.channels_last), 1),
    ],
)
def test_out_may_be_the_input(dtype: torch.dtype, x: torch.Tensor, dim: int) -> None:
    x = x.to(dtype, copy=True)
    scale, shift = random(2, x.shape[dim], seed=1), random(2, x.shape[dim], seed=2)
    ids = torch.tensor([1, 0, 0, 1, 1, 0])
    expected = scale_shift(x, scale, shift, ids, dim)
    assert scale_shift(x, scale, shift, ids, dim, out=x) is x
    assert torch.equal(x, expected)


def test_out_takes_no_part_in_a_graph() -> None:
    x, one, out = random(4, 3), torch.ones(3), torch.zeros(4, 3)
    for args in (
        (x.clone().requires_grad_(), one, one, out),
        (x, one, one.clone().requires_grad_(), out),
        (x, one, one, out.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match=r"nlm\.scale_shift: .*got requires_grad True"):
            scale_shift(*args[:3], out=args[3])
        with torch.no_grad():
            assert scale_shift(*args[:3], out=args[3]) is args[3]
    with pytest.raises(TypeError, match=r"nlm\.scale_shift: .* that is being differentiated"):
        torch.func.grad(lambda x: scale_shift(x, one, one, out=out).sum())(x)
    with pytest.raises(TypeError, match=r"nlm\.scale_shift: out must be a tensor, got list"):
        scale_shift(x, one, one, out=[0.0])
    with pytest.raises(ValueError, match=r"nlm\.scale_shift: .* got \(4, 3\) .* strides \(0, 1\)"):
        scale_shift(one.expand(4, 3), one, one, out=one.expand(4, 3))
    version = out._version
    torch.compile(scale_shift, backend="eager", fullgraph=True)(x, one, one, out=out)
    assert torch.equal(out, x + 1) and out._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_expression(dtype: torch.dtype) -> None:
    ids = torch.tensor([1, 0, 1, 1])
    leaves = [random(4, 3, 6, 6).to(dtype), random(2, 3, seed=1), random(2, 3, seed=2)]
    x, scale, shift = (leaf.requires_grad_() for leaf in leaves)
    weight = random(4, 3, 6, 6, seed=3)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((y.float() * weight).sum(), (x, scale, shift))

    wide = x.float() * scale[ids][:, :, None, None] + shift[ids][:, :, None, None]
    for ours, plain in zip(
        gradients(scale_shift(x, scale, shift, ids)), gradients(wide.to(dtype)), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5)


def test_gradient_of_the_input_alone() -> None:
    x = random(4, 3).requires_grad_()
    scale = random(3, seed=1)
    scale_shift(x, scale, torch.zeros(3)).sum().backward()
    assert torch.equal(x.grad, scale.expand(4, 3))


def test_compiled_is_the_plain_expression() -> None:
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x, scale, shift = random(4, 3, 5), random(2, 3, seed=1), random(2, 3, seed=2)
    ids = torch.tensor([0, 1, 1, 0])
    compiled = torch.compile(scale_shift, backend=keep, fullgraph=True)
    assert torch.equal(compiled(x, scale, shift, ids), scale_shift(x, scale, shift, ids))
    assert len(graphs) == 1
    assert not any("nlm" in str(node.target) for node in graphs[0].graph.nodes)


def test_exported_is_the_plain_expression() -> None:
    class Correction(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return scale_shift(x, scale, scale)

    program = torch.export.export(Correction(), (random(4, 3), random(3)))
    assert not any("nlm" in str(node.target) for node in program.graph.nodes)


def test_nothing_is_left_unwritten() -> None:
    """Freed memory full of NaN is what the result is most likely to be placed in."""
    for shape in ((1, 1), (3, 5), (7, 33), (5, 3, 17), (2, 130, 3, 3)):
        junk = torch.full(shape, math.nan)
        del junk
        y = scale_shift(torch.zeros(shape), torch.ones(shape[1]), torch.ones(shape[1]))
        assert (y == 1).all()


def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 elements apart; only their pages of the 4 GiB are ever touched."""
    rows = torch.empty((1 << 31) + 4, dtype=torch.float16).as_strided((2, 4), (1 << 31, 1))
    rows[0], rows[1] = 1, 3
    y = scale_shift(rows, torch.full((4,), 2.0), torch.ones(4))
    assert y.tolist() == [[3.0] * 4, [7.0] * 4]


def _plain(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return x * scale + shift


def test_transforms_of_torch_func_agree_with_the_plain_expression() -> None:
    x, scale, shift = random(4, 3), random(3, seed=1), random(3, seed=2)
    tangents = random(4, 3, seed=3), random(3, seed=4), random(3, seed=5)
    ours, plain = (torch.func.jvp(f, (x, scale, shift), tangents)[1] for f in (scale_shift, _plain))
    torch.testing.assert_close(ours, plain)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        ours, plain = (
            transform(f, argnums=(0, 1, 2))(x, scale, shift) for f in (scale_shift, _plain)
        )
        torch.testing.assert_close(ours, plain)


def test_forward_mode_differentiation() -> None:
    x, tangent = random(4, 3), random(4, 3, seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = scale_shift(dual, torch.full((3,), 2.0), torch.zeros(3))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(y).tangent, 2 * tangent)


def test_task_out_of_range_gives_nan_where_it_is_compiled() -> None:
    torch.compiler.reset()
    x, scale, shift = random(5, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    ids = torch.tensor([0, -1, 1, 2, 1 << 40])
    known = torch.tensor([True, False, True, False, False])

    class Correction(torch.nn.Module):
        def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            return scale_shift(x, scale, shift, task)

    compiled = torch.compile(Correction(), backend="eager", fullgraph=True)
    exported = torch.export.export(Correction(), (x, torch.zeros(5, dtype=torch.int64))).module()
    for correct in (compiled, exported):
        y = correct(x, ids)
        assert y[~known].isnan().all()
        assert torch.equal(y[known], scale_shift(x[known], scale, shift, ids[known]))


def test_task_of_any_integer_type_and_no_other() -> None:
    x, scale, shift = random(4, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    assert torch.equal(scale_shift(x, scale, shift, np.int64(1)), scale_shift(x, scale, shift, 1))
    for task in (True, np.True_, [0, 1, 1, 0], 1.0, "1"):
        with pytest.raises(TypeError, match=r"nlm\.scale_shift: task must be None, an int or"):
            scale_shift(x, scale, shift, task)
    with pytest.raises(TypeError, match=r"nlm\.scale_shift: x must be a tensor, got ndarray"):
        scale_shift(x.numpy(), scale, shift, 1)
