"""Mutants of the commands, benchmarks and tuning. See ../run.py."""

CHANGES = [
    (
        "unite_fast/commands/images.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            (
                "= generate_with_progress(model, labels, seed, batch, changes)",
                "= generate_with_progress(model, labels, 0, batch, changes)",
            ),
            (
                "= generate_with_progress(model, labels, seed, batch, changes)",
                "= generate_with_progress(model, labels, seed, 64, changes)",
            ),
            ("model.sampling_config(**changes),", "model.config.sampling,"),
            ("save_pairs(originals, reconstructions, out)", "save_pairs(reconstructions, originals, out)"),
        ],
    ),
    (
        "unite_fast/cli.py",
        ("tests/test_cli.py::test_the_first_rank_of_a_machine_prints_first",),
        [
            ("time.sleep(FIRST_RANK_SECONDS)", "pass"),
            ("if not _in_process_group() and ranks.local_rank:", "if not _in_process_group():"),
        ],
    ),
    (
        "unite_fast/commands/evaluation.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            ("        seed=seed,\n", ""),
            ("        count=count,\n", ""),
            ('        precision=precision or "",\n', ""),
            ("        reconstructions=reconstructions,\n", ""),
            ("folder = out or default\n", "folder = default\n"),
        ],
    ),
    (
        "unite_fast/commands/guidance.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            ("many if final_count is None else final_count", "many"),
            ("search(grid, objective, confirm)", "search(grid, objective, 3)"),
        ],
    ),
    (
        "unite_fast/commands/gallery.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            ("data=data if real else None", "data=data"),
        ],
    ),
    (
        "unite_fast/commands/training.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            (
                "load_config(recipe, tuple(words[1:] if recipe else words), tuned)",
                "load_config(recipe, tuple(words[1:]), tuned)",
            ),
            ("exit_status(outcome.stopped_by)", "0"),
        ],
    ),
    (
        "unite_fast/commands/planning.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            ("Cluster(card, nodes, gpus_per_node)", "Cluster(card, gpus_per_node, nodes)"),
            ('"gpus": str(nodes * gpus_per_node)', '"gpus": str(gpus_per_node)'),
        ],
    ),
    (
        "unite_fast/commands/checkpoints.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            (
                "if not run(trace, backend, choose_device(device)):",
                "if run(trace, backend, choose_device(device)) is None:",
            ),
        ],
    ),
    (
        "unite_fast/commands/data.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            (
                "Settings(format, image_size, quality, seed, per_shard)",
                "Settings(format, image_size, quality, 0, per_shard)",
            ),
        ],
    ),
    (
        "unite_fast/sampling/pipeline.py",
        ("tests/commands/test_forwarding.py",),
        [
            ("return precision or self.config.train.network_precision,", "return self.config.train.network_precision,"),
            ("on_cuda if compile is None else compile", "compile is not None"),
        ],
    ),
    (
        "unite_fast/commands/options.py",
        ("tests/commands/test_forwarding.py", "tests/commands/test_options.py"),
        [
            ("use_threads(model.config.train.threads)", "pass"),
            ('"interval": parse_interval(interval), ', ""),
        ],
    ),
    (
        "unite_fast/benchmarking/measure.py",
        ("tests/commands/test_bench.py",),
        [
            ("shutil.rmtree(folder, ignore_errors=True)", "pass"),
            ("first_step = first_step or seconds", "first_step = seconds if step else 0.0"),
            ("max(1, min(", "max(2, min("),
            ("trainer.speed.clock.start()\n", "pass\n"),
            ('"evaluate_every": 0, "evaluate_epochs": 0.0, "picture_every": 0, ', ""),
        ],
    ),
    (
        "unite_fast/benchmarking/figures.py",
        ("tests/commands/test_bench.py",),
        [
            ("rate / world * flops / measurement.matmul_rate", "rate * flops / measurement.matmul_rate / world / 2"),
            ('"images_per_s_slow": batch / slow', '"images_per_s_slow": batch / fast'),
            ('"images_per_s_per_gpu": rate / world', '"images_per_s_per_gpu": rate'),
        ],
    ),
    (
        "unite_fast/planning/predict.py",
        ("tests/commands/test_bench.py",),
        [
            ("config.model == sizes and config.objective.flow_draws == 3", "config.model == sizes"),
        ],
    ),
    (
        "unite_fast/benchmarking/csv_file.py",
        ("tests/benchmarking/test_csv_file.py",),
        [
            ("fcntl.lockf(file, fcntl.LOCK_EX)", "pass"),
            ("if missing:", "if not columns:"),
        ],
    ),
    (
        "unite_fast/recipes.py",
        ("tests/commands/test_bench.py",),
        [
            ("require(key in TUNABLE,", "require(True,"),
        ],
    ),
    (
        "unite_fast/benchmarking/tune.py",
        ("tests/benchmarking/test_tune.py",),
        [
            ("> MARGIN * result.best.images_per_s", "> result.best.images_per_s"),
            ("attempt(result.best.settings | {axis.key: value})", "attempt({axis.key: value})"),
            ("climbed.add(axis.key)", "pass"),
            ("if walls and seconds < min(walls):", "if seconds < 0:"),
            ("[axis for axis in every if axis.smaller] +", "[axis for axis in every if axis.climbs][:1] +"),
        ],
    ),
    (
        "unite_fast/benchmarking/candidate.py",
        ("tests/benchmarking/test_tune.py",),
        [
            ("return OUT_OF_MEMORY, ", "return FAILED, "),
        ],
    ),
    (
        "unite_fast/planning/predict.py",
        ("tests/planning/test_predict.py",),
        [
            ("memory.FLOAT * total - activations", "memory.FLOAT * total + activations"),
        ],
    ),
]
