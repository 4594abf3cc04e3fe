"""What RDKit perceives of typed molecules, of nonsense, and of QM9 as specified."""

import numpy as np
import pytest

from unite_fast.errors import UserError
from unite_fast.evaluation.molecules import perception
from unite_fast.evaluation.molecules.perception import atoms_of, edm_molecule, graph, perceive, without_stereo

pytest.importorskip("rdkit", reason="RDKit is not installed")

SMILES = ["O", "C", "C#N", "O=C=O", "C=C", "OCF"]
INCHI = ["H2O/h1H2", "CH4/h1H4", "CHN/c1-2/h1H", "CO2/c2-1-3", "C2H4/c1-2/h1-2H2", "CH3FO/c2-1-3/h3H,1H2"]


def embed(smiles: str) -> tuple[np.ndarray, np.ndarray]:
    """A conformer by RDKit, hydrogens written out."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=7)
    AllChem.MMFFOptimizeMolecule(molecule)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    return numbers, molecule.GetConformer().GetPositions()


def test_typed_molecules_have_their_names(few):
    found = [perceive(*atoms) for atoms in atoms_of(few)]
    assert all(each.valid and each.connected for each in found)
    assert [each.smiles for each in found] == SMILES
    assert [each.inchi for each in found] == [f"InChI=1S/{name}" for name in INCHI]
    assert [atom.GetAtomicNum() for atom in found[5].molecule.GetAtoms()] == [6, 9, 8, 1, 1, 1]


def test_edm_finds_the_same_molecules(few):
    found = [edm_molecule(*atoms) for atoms in atoms_of(few)]
    assert all(each.valid and each.connected for each in found)
    assert [each.smiles for each in found] == SMILES


@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1", "C[C@H](N)C(=O)O", "C/C=C/C", "C[N+](=O)[O-]", "CC(=O)C#N"])
def test_embedded_molecules_are_found_again(smiles):
    from rdkit import Chem

    found = perceive(*embed(smiles))
    assert Chem.CanonSmiles(found.smiles) == Chem.CanonSmiles(smiles)
    assert found.inchi == without_stereo(Chem.MolToInchi(Chem.MolFromSmiles(smiles)))


def test_a_mirror_image_has_another_smiles_and_the_same_inchi():
    numbers, positions = embed("C[C@H](N)C(=O)O")
    one, other = perceive(numbers, positions), perceive(numbers, -positions)
    assert one.smiles != other.smiles and one.inchi == other.inchi
    assert graph(numbers, positions) == graph(numbers, -positions)


def test_bonds_are_pairs_of_indices(few):
    water, methane, cyanide = ({(0, neighbour) for neighbour in range(1, size)} for size in (3, 5, 3))
    assert [graph(*atoms) for atoms in atoms_of(few)][:3] == [water, methane, cyanide]


def test_two_molecules_are_valid_but_not_connected(few):
    (numbers, positions), (more, others) = list(atoms_of(few))[:2]
    both = np.concatenate([numbers, more]), np.concatenate([positions, others + 10])
    for found in (perceive(*both), edm_molecule(*both)):
        assert found.valid and not found.connected
    assert perceive(*both).smiles == "C.O"
    assert edm_molecule(*both).smiles == "C", "the largest piece"
    assert not perception.in_one_piece(perception.connect(*both))


def test_edm_lets_an_atom_have_too_few_bonds_and_not_too_many(few):
    numbers, positions = list(atoms_of(few))[1]
    assert edm_molecule(numbers[:4], positions[:4]).valid
    assert not perceive(numbers[:4], positions[:4]).valid
    crowded = np.append(numbers, 1), np.append(positions, [[0, 0, 1.0]], axis=0)
    assert not edm_molecule(*crowded).valid


def test_nonsense_is_invalid_and_raises_nothing(capfd):
    numbers, positions = np.array([8, 1, 1]), np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]])
    nonsense = [
        (numbers, np.where(positions == 0.757, value, positions)) for value in (np.nan, np.inf, -np.inf, 1e30, 5000)
    ]
    nonsense += [(np.array([8, 1, number]), positions) for number in (0, 119, 255)]
    assert not perceive(numbers[:1], positions[:1]).valid, "an atom by itself"
    nonsense += [(numbers[:0], positions[:0]), (np.ones(600, int), np.random.default_rng(0).normal(size=(600, 3)))]
    for atoms in nonsense:
        assert graph(*atoms) is None
        assert not perceive(*atoms).valid and not edm_molecule(*atoms).valid
    for same_place in (np.zeros((3, 3)), positions / 10, positions * 100):
        assert not perceive(numbers, same_place).connected and graph(numbers, same_place) is not None
    assert not edm_molecule(np.array([16, 1, 1]), positions).valid, "sulphur is not in EDM's table"
    assert capfd.readouterr() == ("", "")


def test_the_search_for_valences_is_bounded(monkeypatch):
    atoms = embed("Cn1cnc2c1c(=O)n(C)c(=O)n2C")
    assert perceive(*atoms).valid
    monkeypatch.setattr(perception, "MAX_ITERATIONS", 1)
    assert not perceive(*atoms).valid


def test_stereo_layers_are_removed():
    whole = "InChI=1S/C7H9NO/c1-4-2-5(4)9-7(8)3-6/h4-5,8H,2-3H2,1H3/b8-7+/t4-,5+,6-/m0/s1"
    assert without_stereo(whole) == "InChI=1S/C7H9NO/c1-4-2-5(4)9-7(8)3-6/h4-5,8H,2-3H2,1H3"
    assert without_stereo(without_stereo(whole)) == without_stereo(whole)
    assert without_stereo("InChI=1S/Br2/c1-2") == "InChI=1S/Br2/c1-2"
    assert without_stereo("InChI=1S/C2H4/c1-2/h1-2H2/q+1/p-1") == "InChI=1S/C2H4/c1-2/h1-2H2/q+1/p-1"
    assert without_stereo("") == ""


def test_without_rdkit_the_message_names_the_extra(monkeypatch, few):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(perception.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"unite-fast\[molecules\]"):
        perceive(*next(atoms_of(few)))


def test_qm9_has_its_bonds_and_names(qm9):
    some = qm9.take(range(300))
    assert sum(len(graph(*atoms)) for atoms in atoms_of(qm9)) == 18_669
    found = [perceive(*atoms) for atoms in atoms_of(some)]
    assert sum(each.valid for each in found) == 287
    # The column of QM9 has no stereo layers.
    assert sum(each.inchi == name for each, name in zip(found, some.inchi, strict=True)) == 287
