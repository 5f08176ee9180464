"""Specifications: permuting, composing, files, and the errors of each."""

import pytest
import torch
from _networks import convnet, images, mlp, vectors

import nlm
from nlm.symmetry import AxisGroup, PermutationSpec, parse


def make(groups: dict[str, tuple[int, tuple[str, ...]]], params: dict[str, list[str]], **more):
    return PermutationSpec(
        {name: AxisGroup(name, size, parents) for name, (size, parents) in groups.items()},
        {name: tuple(parse(text) for text in dims) for name, dims in params.items()},
        **more,
    )


ATTENTION = make(
    {"h": (3, ()), "d": (4, ("h",)), "m": (5, ())},
    {"qkv": ["3 x h:3 x d:4", "m:5"], "out": ["m:5", "h:3 x d:4"]},
)


@pytest.fixture(scope="module")
def traced():
    return nlm.trace(convnet(), images())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("build", "data"), [(mlp, vectors), (convnet, images)])
def test_a_permuted_network_computes_the_same(build, data, seed):
    model, inputs = build(seed), data(seed=seed + 9)
    spec = nlm.trace(model, inputs[:8])
    moved = build(seed + 1)
    moved.load_state_dict(spec.apply(spec.random(seed), model.state_dict()))
    assert not torch.equal(moved[0].weight, model[0].weight)
    with torch.no_grad():
        expected, found = model(inputs), moved(inputs)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_permuted_state_goes_into_another_model(traced):
    """Tied entries and a layout that the kernel does not write to included."""
    model, permutation = convnet(), traced.random(3)
    expected = traced.apply(permutation, model.state_dict())
    other = convnet(1)
    other[4].weight.data = other[4].weight.data.to(memory_format=torch.channels_last)
    found = traced.apply(permutation, model.state_dict(), out=other.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(found[name], expected[name])

    spec = make({"g": (4, ())}, {"a": ["g:4", "3"], "b": ["g:4", "3"], "c": ["3", "g:4"]})
    tied = torch.arange(12.0).view(4, 3)
    state, out = {"a": tied, "b": tied, "c": torch.arange(12.0).view(3, 4)}, torch.zeros(4, 3)
    moved = spec.apply(spec.random(0), state, out={"a": out, "b": out, "c": torch.zeros(3, 4)})
    assert torch.equal(moved["b"], spec.apply(spec.random(0), state)["a"])
    again = spec.apply(
        spec.random(0),
        dict(moved) | {"b": moved["b"].clone()},
        out=state | {"c": torch.zeros(3, 4)},
    )
    assert torch.equal(again["b"], spec.apply(spec.random(0), moved)["a"])
    negative = torch._neg_view(torch.zeros(3, 4))
    spec.apply(spec.random(0), moved, out={**again, "c": negative})
    assert torch.equal(negative, spec.apply(spec.random(0), moved)["c"])


X = torch.zeros(1000)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda out, state: out.pop("0.bias"), ValueError, "1 missing and 0 extra.*'0.bias'"),
        (lambda out, state: out.update(x=out["0.bias"]), ValueError, "0 missing and 1 extra.*'x'"),
        (
            lambda out, state: out.update({"0.bias": out["0.bias"].double()}),
            TypeError, "got torch.float64 and torch.float32 for '0.bias'",
        ),
        (
            lambda out, state: out.update({"0.bias": out["0.bias"][1:]}),
            ValueError, r"got \[7\] on cpu and \[8\] on cpu for '0.bias'",
        ),
        (
            lambda out, state: out.update({"0.bias": state["0.bias"]}),
            ValueError, r"overlap of out\['0.bias'\] with '0.bias' of the state dict",
        ),
        (
            lambda out, state: out.update({"1.bias": out["1.weight"]}),
            ValueError, r"overlap of out\['1.\w+'\] with out\['1.\w+'\]",
        ),
        (
            lambda out, state: out.update({"8.weight": torch.as_strided(X, (20, 48), (1, 4))}),
            ValueError, r"each element once in memory, got out\['8.weight'\] of shape \(20, 48\)",
        ),
        (
            lambda out, state: out.update({"0.bias": torch.zeros(1).expand(8)}),
            ValueError, r"each element once in memory, got out\['0.bias'\]",
        ),
        (
            lambda out, state: out.update({"0.bias": torch.zeros(8, requires_grad=True)}),
            ValueError, r"out\['0.bias'\] is written to and must not require a gradient",
        ),
    ],
)  # fmt: skip
def test_a_state_dict_that_cannot_be_written_to(traced, change, error, message):
    state, other = convnet().state_dict(), convnet(1)
    out, before = dict(other.state_dict()), {n: x.clone() for n, x in other.state_dict().items()}
    change(out, state)
    with pytest.raises(error, match=message):
        traced.apply(traced.random(0), state, out=out)
    assert all(torch.equal(x, before[n]) for n, x in other.state_dict().items())


@pytest.mark.parametrize("spec", ["traced", "attention"])
def test_inverse_and_composition(spec, traced):
    spec = traced if spec == "traced" else ATTENTION
    first, second = spec.random(1), spec.random(2)
    state = {
        name: torch.randn([layout.size for layout in layouts])
        for name, layouts in spec.params.items()
    }
    both = spec.apply(second, spec.apply(first, state))
    at_once = spec.apply(spec.compose(first, second), state)
    back = spec.apply(spec.inverse(first), spec.apply(first, state))
    for name in state:
        assert torch.equal(both[name], at_once[name])
        assert torch.equal(back[name], state[name])


def test_an_inner_permutation_follows_its_head():
    permutation = ATTENTION.random(0)
    state = {"qkv": torch.arange(36.0)[:, None].expand(36, 5), "out": torch.zeros(5, 12)}
    moved = ATTENTION.apply(permutation, state)["qkv"][:, 0].reshape(3, 3, 4)
    for head in range(3):
        source = int(permutation["h"][head])
        expected = source * 4 + permutation["d"][head]
        for third in range(3):
            assert moved[third, head].tolist() == (third * 12 + expected).tolist()


def test_parents_on_another_axis_of_the_parameter():
    spec = make(
        {"e": (3, ()), "f": (4, ("e",)), "m": (5, ())},
        {"up": ["e:3", "f:4", "m:5"], "down": ["e:3", "m:5", "f:4"], "gate": ["e:3", "m:5"]},
    )
    p = spec.random(3)
    state = {name: torch.randn([part.size for part in dims]) for name, dims in spec.params.items()}
    moved = spec.apply(p, state)
    for new in range(3):
        old = p["e"][new]
        assert torch.equal(moved["up"][new], state["up"][old][p["f"][new]][:, p["m"]])
        assert torch.equal(moved["down"][new], state["down"][old][p["m"]][:, p["f"][new]])


def test_sums_and_families():
    spec = make(
        {"g": (4, ()), "a": (2, ()), "b": (2, ())},
        {"joined": ["(g:4 + 3 + g:4)"], "chosen": ["s:2 x s<a:2 | b:2>"]},
        pinned={"s": "selector"},
    )
    p = spec.random(5)
    state = {"joined": torch.arange(11), "chosen": torch.arange(4)}
    moved = spec.apply(p, state)
    assert moved["joined"].tolist() == [*p["g"].tolist(), 4, 5, 6, *(7 + p["g"]).tolist()]
    assert moved["chosen"].tolist() == [*p["a"].tolist(), *(2 + p["b"]).tolist()]


def test_a_random_permutation_never_stays_in_place():
    spec = make({"g": (2, ())}, {"w": ["g:2"]})
    assert all(spec.random(seed)["g"].tolist() == [1, 0] for seed in range(20))
    assert torch.equal(spec.random(4)["g"], spec.random(4)["g"])


def test_restriction_leaves_the_other_groups_in_place(traced):
    part = traced.restrict(["g1"])
    assert list(part.groups) == ["g1"] and part.pinned["g0"] == "left out by restrict"
    state = convnet().state_dict()
    moved = part.apply(part.random(0), state)
    assert torch.equal(moved["0.weight"], state["0.weight"])
    assert not torch.equal(moved["4.weight"], state["4.weight"])
    with pytest.raises(ValueError, match=r"restrict keeps groups of the specification.*'g9'"):
        traced.restrict(["g9"])


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files(traced, tmp_path, suffix):
    path = tmp_path / f"spec.{suffix}"
    traced.save(path)
    assert PermutationSpec.load(path) == traced
    with pytest.raises(FileExistsError, match="overwritten only with force"):
        traced.save(path)
    traced.save(path, force=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a specification is (JSON or YAML|a mapping)"):
        PermutationSpec.load(path)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_proof_of_an_edited_file_is_dropped(tmp_path, suffix):
    path = tmp_path / f"spec.{suffix}"
    nlm.trace(mlp(), vectors(8)).save(path)
    assert PermutationSpec.load(path).proven
    text = path.read_text()
    assert text.count("g1:24") > 1
    path.write_text(text.replace("g1:24", "24", 1))
    with pytest.warns(UserWarning, match="changed since in .* it is not verified"):
        assert PermutationSpec.load(path).verified is None


def test_a_restriction_of_a_proven_specification_is_proven(traced):
    assert traced.restrict(["g1"]).proven
    changed = nlm.trace(mlp(), vectors(8))
    changed.sites.pop("1")
    assert not changed.proven and not changed.restrict(["g1"]).proven
    assert "not verified" in changed.show()
    other = nlm.trace(mlp(), vectors(8))
    other.outputs = ()  # the proof compares these
    assert not other.proven


def test_a_specification_without_groups_is_saved_as_json(tmp_path):
    spec = nlm.trace(torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(2, 4))
    assert spec.groups == {} and spec.verified.control is None and "verified in" in spec.show()
    spec.save(tmp_path / "spec.json")
    assert "Infinity" not in (tmp_path / "spec.json").read_text()
    assert PermutationSpec.load(tmp_path / "spec.json") == spec


@pytest.mark.parametrize("name", ["P/1", "1", "a b", ""])
def test_a_name_that_no_file_could_hold_is_refused(name):
    with pytest.raises(ValueError, match="a group's name is made of letters"):
        PermutationSpec.from_axes_to_perm({"w": (name,)}, {"w": torch.zeros(4)})


def test_what_is_permuted_keeps_no_graph(traced):
    state = convnet().state_dict(keep_vars=True)
    assert any(tensor.requires_grad for tensor in state.values())
    moved = traced.apply(traced.random(0), state)
    assert not any(tensor.requires_grad for tensor in moved.values())


def test_tables_of_git_re_basin():
    model = mlp()
    spec = nlm.trace(model, vectors(8))
    table = spec.to_axes_to_perm()
    assert table["2.weight"] == ("g1", "g0") and table["4.bias"] == (None,)
    again = PermutationSpec.from_axes_to_perm(table, model.state_dict())
    assert again.params == spec.params and again.verified is None
    again.verify(model, vectors(8))
    assert again.verified is not None
    with pytest.raises(ValueError, match=r"depends on no other, got 'g1:12 x 4'"):
        nlm.trace(convnet(), images(8)).to_axes_to_perm()
    grid = {"w": (parse("h:4"), parse("d:8")), "b": (parse("h:4"),)}
    heads = AxisGroup("h", 4, fixed=True)
    still = PermutationSpec({"h": heads, "d": AxisGroup("d", 8)}, grid)
    assert still.to_axes_to_perm() == {"w": (None, "d"), "b": (None,)}
    with pytest.raises(ValueError, match=r"depends on no other, got 'd:8 per h' on dimension 1"):
        PermutationSpec({"h": heads, "d": AxisGroup("d", 8, ("h",))}, grid).to_axes_to_perm()
    with pytest.warns(UserWarning, match=r"left? ?out.*4\.bias|4\.bias"):
        PermutationSpec.from_axes_to_perm(
            {name: axes for name, axes in table.items() if name != "4.bias"}, model.state_dict()
        )
    with pytest.raises(ValueError, match="a permutation has one size, got 24 units of 'P' in"):
        PermutationSpec.from_axes_to_perm({**table, "0.weight": ("P", "P")}, model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "got missing '0.bias'"),
        (lambda s: s.update(more=torch.zeros(1)), "got .*extra 'more'"),
        (
            lambda s: s.update({"0.bias": torch.zeros(7)}),
            r"'0.bias' must have the shape .* got \[7\]",
        ),
        (lambda s: s.update({"0.bias": torch.zeros(8, 1)}), r"got \[8, 1\]"),
    ],
)
def test_a_state_dict_that_does_not_fit(traced, change, message):
    state = dict(convnet().state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        traced.apply(traced.identity(), state)


def test_a_head_of_other_classes_follows_the_features(traced):
    state = dict(convnet(classes=9).state_dict())
    p = traced.random(0)
    assert torch.equal(traced.apply(p, state)["10.weight"], state["10.weight"][:, p["g2"]])


def test_a_dimension_without_groups_may_have_another_size():
    spec = make({"g": (4, ())}, {"places": ["8", "g:4"]})
    p, longer = spec.random(0), torch.randn(11, 4)
    assert torch.equal(spec.apply(p, {"places": longer})["places"], longer[:, p["g"]])


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        ({"g9": torch.arange(8)}, "names groups of its specification"),
        ({"g0": torch.arange(7)}, r"must be int64 of shape \[8\], got torch.int64 of shape \[7\]"),
        ({"g0": torch.zeros(8)}, "got torch.float32"),
        ({"g0": torch.zeros(8, dtype=torch.int64)}, "must hold each of 0 to 7 once"),
    ],
)
def test_what_is_no_permutation_is_refused(traced, permutation, message):
    with pytest.raises(ValueError, match=message):
        traced.apply(permutation, convnet().state_dict())


def test_reading(traced):
    assert traced.permutation_count == 3 and ATTENTION.permutation_count == 1 + 3 + 1
    assert traced.observation_sites() == {"g0": "3", "g1": "6", "g2": "9"}
    assert "verified in float64" in traced.show() and "g1:12 x 4" in traced.show()
