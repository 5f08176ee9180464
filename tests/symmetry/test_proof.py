"""What a proof sees: where tables are wrong, small effects, other shapes, rounding."""

import pytest
import torch
from torch import nn

import nlm
from nlm.symmetry import AxisGroup, PermutationSpec, VacuousError, parse


def make(groups: dict[str, tuple], params: dict[str, list[str]]) -> PermutationSpec:
    return PermutationSpec(
        {name: AxisGroup(name, *of) for name, of in groups.items()},
        {name: tuple(parse(text) for text in dims) for name, dims in params.items()},
    )


class Pooled(nn.Module):
    """Two convolutions of one width, so that sizes alone tell nothing apart."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def norm_of(name: str, group: str) -> dict[str, tuple]:
    entries = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{entry}": (group,) for entry in entries} | {f"{name}.num_batches_tracked": ()}


TABLE = {
    "conv1.weight": ("P1", None, None, None), "conv1.bias": ("P1",), **norm_of("bn1", "P1"),
    "conv2.weight": ("P2", "P1", None, None), "conv2.bias": ("P2",), **norm_of("bn2", "P2"),
    "fc.weight": (None, "P2"), "fc.bias": (None,),
}  # fmt: skip
IMAGES = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))
TEXT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def pooled_spec(**changes: tuple) -> PermutationSpec:
    table = TABLE | {name.replace("__", "."): axes for name, axes in changes.items()}
    return PermutationSpec.from_axes_to_perm(table, Pooled().state_dict())


def test_a_true_table_is_proven():
    spec = pooled_spec()
    proof = spec.verify(Pooled(), IMAGES)
    assert spec.proven and proof.dtype == "float64" and proof.shapes == 2
    assert proof.max_error < 1e-12 and proof.control > 1e-3
    assert nlm.align(Pooled(), Pooled(), spec).permutation["P1"].shape == (8,)


@pytest.mark.parametrize(
    ("changes", "groups", "where"),
    [
        (
            {"fc__weight": ("logits", "P2"), "fc__bias": ("logits",)},
            ("logits",),
            r"'logits' .* it stands on 'fc.weight' dimension 0, 'fc.bias' dimension 0",
        ),
        (
            {"conv2__weight": ("P2", "P2", None, None)},
            ("P1", "P2"),
            r"'P1' .* it is missing on 'conv2.weight' dimension 1, with which they stay",
        ),
        (
            {"bn1__running_mean": (None,)},
            ("P1",),
            r"it is missing on 'bn1.running_mean' dimension 0, with which they stay",
        ),
        (
            norm_of("bn1", None),
            ("P1",),
            r"it is missing on 'bn1.weight' dimension 0, 'bn1.bias' dimension 0, 'bn1.running_mean",
        ),
        (
            {"conv1__weight": ("P1", "P1", None, None)},
            ("P1",),
            r"it stands on 'conv1.weight' dimension 1, without which they stay",
        ),
        (
            {"fc__weight": ("P2", None)},
            ("P2",),
            r"it stands on 'fc.weight' dimension 0 instead of dimension 1",
        ),
    ],
)
def test_a_wrong_table_is_refused_with_the_place(changes, groups, where, tmp_path):
    spec = pooled_spec(**changes)
    with pytest.raises(nlm.SymmetryError, match=where) as raised:
        spec.verify(Pooled(), IMAGES)
    assert raised.value.groups == groups and not isinstance(raised.value, VacuousError)
    with pytest.raises(nlm.SymmetryError, match="proven before anything is matched"):
        nlm.align(Pooled(), Pooled(), spec)
    spec.save(tmp_path / "by_hand.yaml")
    with pytest.raises(nlm.SymmetryError, match=where):
        nlm.align(
            Pooled(), Pooled(), PermutationSpec.load(tmp_path / "by_hand.yaml"),
            example_inputs=IMAGES,
        )  # fmt: skip


class Attention(nn.Module):
    """Two heads of four features."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(10, 8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(*ids.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(x + self.out(y.reshape(x.shape))).mean(1)


def attention_spec(heads: dict[str, tuple], qkv: str, values: str) -> PermutationSpec:
    return make(
        {"r": (8,), **heads},
        {
            "embed.weight": ["10", "r:8"], "qkv.weight": [qkv, "r:8"], "qkv.bias": [qkv],
            "out.weight": ["r:8", values], "out.bias": ["r:8"],
            "head.weight": ["3", "r:8"], "head.bias": ["3"],
        },
    )  # fmt: skip


def test_features_are_permuted_within_heads_and_not_across():
    nested = {"h": (2,), "k": (4, ("h",)), "v": (4, ("h",))}
    right = attention_spec(nested, "(h:2 x k:4 + h:2 x k:4 + h:2 x v:4)", "h:2 x v:4")
    proof = right.verify(Attention(), TEXT)
    assert proof.max_error < 1e-12 and proof.control > 1e-3 and proof.shapes == 3
    flat = attention_spec({"p": (8,)}, "(p:8 + p:8 + p:8)", "p:8")
    with pytest.raises(nlm.SymmetryError, match=r"'p' .*no single place .* 'qkv.weight' dim") as e:
        flat.verify(Attention(), TEXT)
    assert e.value.groups == ("p",)
    joined = attention_spec({"p": (24,)}, "p:24", "8")
    with pytest.raises(nlm.SymmetryError, match=r"'p' .* it stands on 'qkv.weight' dimension 0"):
        joined.verify(Attention(), TEXT)


class Scaled(nn.Module):
    """A block behind a LayerScale, as it is before training."""

    def __init__(self, scale: float):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        nn.init.zeros_(self.up.bias)
        self.scale = nn.Parameter(torch.full((6,), scale))

    def forward(self, x):
        return x + self.scale * self.down(self.up(x).relu())


def scaled_spec(bias: str) -> PermutationSpec:
    return make(
        {"g": (8,)},
        {
            "up.weight": ["g:8", "6"], "up.bias": [bias], "down.weight": ["6", "g:8"],
            "down.bias": ["6"], "scale": ["6"],
        },
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0])
def test_small_scales_and_even_biases_hide_nothing(scale):
    x = torch.randn(4, 6)
    assert scaled_spec("g:8").verify(Scaled(scale), x).control > 1e-3
    with pytest.raises(nlm.SymmetryError, match=r"it is missing on 'up.bias' dimension 0"):
        scaled_spec("8").verify(Scaled(scale), x)


class InFloat32(Scaled):
    def forward(self, x):
        return x + self.scale * self.down(self.up(x).float().relu().to(x.dtype))


class WithConstants(Scaled):
    def forward(self, x):
        return super().forward(x) * torch.arange(6, dtype=torch.float32).cos()


class Float32Only(Scaled):
    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("only float32")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "dtype", "error"),
    [
        (InFloat32, "float32 inside", 3e-6),
        (WithConstants, "float64", 1e-12),
        (Float32Only, "float32", 3e-6),
    ],
)
def test_the_error_that_is_allowed_follows_from_what_is_computed_in(model, dtype, error):
    proof = scaled_spec("g:8").verify(model(1.0), torch.randn(4, 6))
    assert proof.dtype == dtype and proof.max_error <= error
    with pytest.raises(nlm.SymmetryError, match=r"'up.bias'"):
        scaled_spec("8").verify(model(1.0), torch.randn(4, 6))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(10, 4), nn.Parameter(torch.randn(8, 4))

    def forward(self, ids):
        return (self.token(ids) + self.place[: ids.shape[1]]).mean(1)


def test_a_group_that_holds_for_one_length_only_is_refused():
    params = {"token.weight": ["10", "4"]}
    first = make({"rows": (5,)}, {"place": ["(rows:5 + 3)", "4"], **params})
    with pytest.raises(nlm.SymmetryError, match=r"'rows' .* for inputs of another shape") as raised:
        first.verify(Positions(), TEXT)
    assert raised.value.groups == ("rows",)
    unused = make({"rows": (3,)}, {"place": ["(5 + rows:3)", "4"], **params})
    with pytest.raises(VacuousError, match="can be proven only where its units matter") as raised:
        unused.verify(Positions(), TEXT)
    assert raised.value.groups == ("rows",)


def test_other_inputs_may_be_given():
    spec, model = attention_spec({}, "24", "8"), Attention()
    assert spec.verify(model, TEXT, more_inputs=[TEXT[:, :2], TEXT[:1]]).shapes == 3
    assert spec.verify(model, (), {"ids": TEXT}, more_inputs=[{"ids": TEXT[:1]}]).shapes == 2
    assert spec.verify(model, TEXT, more_inputs=[TEXT]).shapes == 1
    with pytest.raises(IndexError):
        spec.verify(model, TEXT, more_inputs=[TEXT + 10])


class Ordered(nn.Module):
    """Two vectors: the order of either may change, but not that of both."""

    def __init__(self, root: bool):
        super().__init__()
        self.root = root
        self.w, self.v = (nn.Parameter(torch.tensor([1.0, 1e2, 1e4])) for _ in range(2))

    def forward(self, x):
        steps = torch.stack([self.w.diff(), self.v.diff()]).amin(1)
        y = x * (self.w.log().sum() + self.v.log().sum())
        return y * steps.sqrt().isfinite().any() if not self.root else y + 0 * steps.sqrt().sum()


def test_groups_that_hold_only_alone_are_refused():
    spec = make({"w": (3,), "v": (3,)}, {"w": ["w:3"], "v": ["v:3"]})
    with pytest.raises(nlm.SymmetryError, match=r"all groups at once .* none without one of w, v"):
        spec.verify(Ordered(root=False), torch.ones(2))


def test_a_nan_after_a_permutation_is_a_failure():
    spec = make({"w": (3,)}, {"w": ["w:3"], "v": ["3"]})
    with pytest.raises(nlm.SymmetryError, match="got a relative change of inf"):
        spec.verify(Ordered(root=True), torch.ones(2))


def test_shared_parameters_are_permuted_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(6, 8, bias=False)
            self.decode = nn.Linear(6, 8, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.encode(x).relu() @ self.decode.weight

    names = ("encode.weight", "decode.weight")
    spec = make({"g": (8,)}, {name: ["g:8", "6"] for name in names})
    proof = spec.verify(Tied(), torch.randn(3, 6))
    assert proof.max_error < 1e-12 and proof.control > 1e-3


def test_a_model_that_counts_its_calls_is_left_alone():
    class Counting(Scaled):
        def __init__(self):
            super().__init__(1.0)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model = Counting().train()
    spec = make(
        {"g": (8,)},
        {**{n: list(map(str, d)) for n, d in scaled_spec("g:8").params.items()}, "calls": []},
    )
    assert spec.verify(model, torch.randn(3, 6)).max_error < 1e-12
    assert model.calls == 0 and model.training


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="got one on the meta device"):
        scaled_spec("g:8").verify(Scaled(1.0).to("meta"), torch.randn(3, 6))


def test_a_dead_network_proves_nothing():
    model = Scaled(1.0)
    nn.init.constant_(model.up.bias, -1e3)  # no unit ever fires
    spec = scaled_spec("g:8")
    with pytest.raises(VacuousError, match="can be proven only where its units matter") as raised:
        spec.verify(model, torch.randn(4, 6))
    assert raised.value.groups == ("g",) and spec.verified is None
    assert str(raised.value).endswith("for 'g'")  # of which nobody said where it was found


def test_weights_that_are_not_finite_are_named():
    model, x = Scaled(1.0), torch.randn(4, 6)
    with torch.no_grad():
        model.down.weight[2, 3] = float("nan")
    for prove in (scaled_spec("g:8").verify, nlm.trace):
        with pytest.raises(nlm.SymmetryError, match=r"of inf, with NaN or inf in 'down.weight'$"):
            prove(model, x)
    with pytest.raises(nlm.SymmetryError, match=r"not all zero, got a largest output of 0.0$"):
        nlm.trace(nn.Linear(4, 3, bias=False), torch.zeros(2, 4))
