import json
from pathlib import Path

import numpy as np
import pytest
import torch

from unite_fast.config import Config, ModelConfig
from unite_fast.interop.official import our_name
from unite_fast.interop.parity import Trace
from unite_fast.model.unite import UNITE
from unite_fast.optim.param_groups import split_parameters
from unite_fast.recipes import load_config

TRACE = Path(__file__).parents[1] / "data" / "official_tiny_a.npz"


def test_the_split_matches_the_released_code():
    meta = json.loads(bytes(np.load(TRACE)["meta_json"]))
    config: Config = Trace(TRACE).config()
    with torch.device("meta"):
        muon, adamw = split_parameters(UNITE(config.model))

    def ours(names: list[str]) -> set[str]:
        return {our_name(name) for name in names} - {None}  # None: a tensor without a counterpart here

    assert set(muon) == ours(meta["muon_params"])
    assert set(adamw) == ours(meta["adamw_params"])


def test_every_parameter_is_in_one_group_and_muon_gets_matrices():
    with torch.device("meta"):
        model = UNITE(ModelConfig())
    muon, adamw = split_parameters(model)
    assert not muon.keys() & adamw.keys()
    assert {id(p) for p in (muon | adamw).values()} == {id(p) for p in model.parameters()}
    assert all(p.dim() == 2 for p in muon.values())


def test_tables_and_embeddings_of_atoms_belong_to_adamw():
    with torch.device("meta"):
        model = UNITE(load_config("qm9_tiny").model)
    muon, adamw = split_parameters(model)
    assert all(p.dim() == 2 for p in muon.values())
    assert not [name for name in muon if "atom" in name or "latent_tokens" in name]
    tables = {"encoder.latent_tokens", "decoder.atom_table", "encoder.atom_embed.element.weight"}
    assert tables | {"encoder.atom_embed.fc2.weight", "encoder.atom_embed.none"} <= adamw.keys()
    assert {"encoder.blocks.0.attn.qkv.weight", "encoder.label_embed.weight", "decoder.pred.weight"} <= muon.keys()


@pytest.mark.parametrize("frozen", ["encoder.label_embed.weight", "latent_norm.bias"])
def test_a_frozen_parameter_is_in_no_group(frozen, tiny_model):
    tiny_model.get_parameter(frozen).requires_grad_(False)
    muon, adamw = split_parameters(tiny_model)
    assert frozen not in muon | adamw
