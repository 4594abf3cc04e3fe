"""Mutants of molecules: data, batches, model, sampling, scores. See ../run.py."""

CHANGES = [
    (
        "unite_fast/training/molecule_batches.py",
        ("tests/training/test_molecule_batches.py",),
        [
            ("atoms = torch.where(real_tokens(sizes, one.atoms)[..., None], atoms, 0.0)", "pass"),
            ("divisor=mean_atoms / sizes.sum() if", "divisor=mean_atoms / len(sizes) if"),
            ("(1 - 2 * (y * y + z * z), 2 * (x * y", "(2 * (y * y + z * z) - 1, 2 * (x * y"),
            ("real_tokens(sizes, atoms.shape[1]), keys, 2**32)", "real_tokens(sizes, atoms.shape[1]), keys, 0)"),
            ("lengths=sizes if self.padded else None", "lengths=None"),
            ("Philox(config.seed, 0, positions[one.rows])", "Philox(config.seed, 0, positions[: len(sizes)])"),
        ],
    ),
    (
        "unite_fast/training/molecule_batches.py",
        ("tests/training/test_molecule_runs.py",),
        [
            ("torch.float32)) / ranks.world", "torch.float32))"),
        ],
    ),
    (
        "unite_fast/objective.py",
        ("tests/training/test_molecule_batches.py",),
        [
            ("values, 0.0).sum() / lengths.sum()", "values, 0.0).sum(1).div(lengths).mean()"),
            ("return (losses * lengths).sum() / lengths.sum()", "return losses.mean() * len(draws.flow_time)"),
            (
                "decoded = model.decode(noise_decoder_input(z, draws), lengths)",
                "decoded = model.decode(noise_decoder_input(z, draws))",
            ),
            ("draws.registers, draws.recon_time, lengths)", "draws.registers, draws.recon_time)"),
        ],
    ),
    (
        "unite_fast/training/train_step.py",
        ("tests/training/test_molecule_batches.py",),
        [
            ("batch.labels, batch.draws, batch.lengths)", "batch.labels, batch.draws)"),
        ],
    ),
    (
        "unite_fast/model/unite.py",
        ("tests/model/test_molecules.py", "tests/training/test_molecule_batches.py"),
        [
            ("norm.eps, lengths)", "norm.eps)"),
            ("labels.flatten(), lengths=all_lengths)", "labels.flatten())"),
            ('("weight", torch.ones(channels))', '("weight", torch.zeros(channels))'),
        ],
    ),
    (
        "unite_fast/model/molecules.py",
        ("tests/model/test_molecules.py",),
        [
            ("atoms[..., 1:] / self.scale", "atoms[..., 1:]"),
            ("self.scale * centred(positions, lengths)", "centred(positions, lengths)"),
            ("self.scale * centred(positions, lengths)", "self.scale * centred(positions, None)"),
            ("with torch.autocast(z.device.type, enabled=False):", "if True:"),
            ("with torch.autocast(atoms.device.type, enabled=False):", "if True:"),
            (
                "branch, branch_bias = layer(x, branch, branch_bias, mask)",
                "branch, branch_bias = layer(x, branch, branch_bias)",
            ),
            ("else x + table[:, : x.shape[1]]", "else x + table[:, -x.shape[1] :]"),
            ("torch.ones(shape), torch.zeros(shape)", "torch.zeros(shape), torch.ones(shape)"),
        ],
    ),
    (
        "unite_fast/sampling/molecules.py",
        ("tests/sampling/test_molecules.py",),
        [
            ("* cumulative[-1], right=True)", "* cumulative[-1], right=True) - 1"),
            ("torch.arange(first, first + count)", "torch.arange(count)"),
            (
                "real = np.arange(array.shape[1]) < sizes_array[:, None]",
                "real = np.arange(array.shape[1]) <= sizes_array[:, None]",
            ),
            ("torch.zeros(len(part), device=device), lengths)", "torch.zeros(len(part), device=device))"),
            ("torch.arange(first + start, first + start + len(part)", "torch.arange(first, first + len(part)"),
            ("config.guidance == 1,", "True,"),
        ],
    ),
    (
        "unite_fast/sampling/sample_parts.py",
        ("tests/sampling/test_sample_parts.py",),
        [
            (
                "sizes.get(self.path(b).name) == len(self.samples(b)) * self.sample_bytes",
                "sizes.get(self.path(b).name, 0) >= len(self.samples(b)) * self.sample_bytes",
            ),
            ("for key in self.manifest | saved:", "for key in ():"),
            ("min((number + 1) * self.batch, len(self.labels))", "(number + 1) * self.batch"),
        ],
    ),
    (
        "data_pipeline/molecules/source.py",
        ("tests/data_pipeline/molecules/test_source.py", "tests/data_pipeline/molecules/test_of_config.py"),
        [
            (
                "molecules.take(molecules.split == SPLITS.index(name))",
                "molecules.take(molecules.split <= SPLITS.index(name))",
            ),
            ("few = molecules.heavy <= heavy", "few = molecules.heavy < heavy"),
            (
                "[groups[groups < self._full], groups[groups >= self._full]]",
                "[groups[groups >= self._full], groups[groups < self._full]]",
            ),
            ('molecules[np.argsort(self.sizes[molecules], kind="stable")]', "np.argsort(self.sizes)"),
            (
                "np.bincount(source.sizes, minlength=source.atoms + 1)",
                "np.bincount(source.sizes - 1, minlength=source.atoms + 1)",
            ),
            ("np.arange(len(self.elements))", "np.arange(len(self.elements))[::-1]"),
        ],
    ),
    (
        "data_pipeline/molecules/of_config.py",
        ("tests/data_pipeline/molecules/test_of_config.py",),
        [
            ("molecules.heavy, molecules.group)", "0, molecules.group)"),
            ("molecules.heavy, molecules.group)", "molecules.heavy)"),
            ("path = path or data.path", "path = data.path or path"),
        ],
    ),
    (
        "unite_fast/evaluation/molecules/scores.py",
        ("tests/evaluation/molecules/test_scores.py",),
        [
            ("known = {without_stereo(name) for name in known}", "known = set(known)"),
            ("sum(name not in known for name in inchi)", "sum(name in known for name in inchi)"),
        ],
    ),
    (
        "unite_fast/evaluation/molecules/evaluate.py",
        ("tests/evaluation/molecules/test_evaluate.py",),
        [
            ("np.flatnonzero(molecules.split == TRAIN", "np.flatnonzero(molecules.split != TRAIN"),
            ("truth.take(order[:count])", "truth.take(np.arange(len(truth))[:count])"),
            ("unpack(atoms[order],", "unpack(atoms,"),
            ('molecules_of(config, "test", data), HELD_OUT', 'molecules_of(config, "train", data), HELD_OUT'),
        ],
    ),
    (
        "unite_fast/evaluation/molecules/report.py",
        ("tests/evaluation/molecules/test_report.py",),
        [
            (
                "{number(name, made[name]):>8} {number(name, true[name]):>8}",
                "{number(name, true[name]):>8} {number(name, made[name]):>8}",
            ),
            ("key=lambda key: (len(key), key)", "key=lambda key: key"),
        ],
    ),
    (
        "unite_fast/training/molecule_validation.py",
        ("tests/training/test_molecule_validation.py",),
        [
            ('rdkit("Chem")', "pass"),
            ("[order]", ""),
            ("{name: row[name] for name in SHOWN}", "{name: row[SHOWN[0]] for name in SHOWN}"),
        ],
    ),
    (
        "unite_fast/training/pictures.py",
        ("tests/training/test_pictures.py",),
        [
            ("molecules_of(config, HELD_OUT_SPLIT), HELD_OUT", 'molecules_of(config, "train"), HELD_OUT'),
            ("MOLECULE_ROWS * MOLECULE_COLUMNS, config.seed)", "MOLECULE_ROWS * MOLECULE_COLUMNS, 0)"),
        ],
    ),
    (
        "unite_fast/planning/flops.py",
        ("tests/planning/test_flops.py",),
        [
            (
                "matmul(n, 3, width, input_needs_grad=False) + matmul(n, width, width)",
                "matmul(n, 3, width) + matmul(n, width, width)",
            ),
            ("* model.atom_order]", "]"),
        ],
    ),
]
