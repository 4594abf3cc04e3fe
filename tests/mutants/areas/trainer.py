"""Mutants of the trainer and the modules it uses. See ../run.py."""

CHANGES = [
    (
        "unite_fast/checkpoint/reader.py",
        ("tests/checkpoint/test_reader.py", "tests/checkpoint/test_manager.py"),
        [
            ("if sum(prod(part.shape) for part in parts) != prod(_whole_shape(parts)):", "if False:"),
            ("tuple(map(slice, part.offsets, part.ends))", "tuple(map(slice, part.shape))"),
            ("(0,) * len(shape)", "(1,) * len(shape)"),
            ("if name.startswith(prefixes)}", "if True}"),
            ("pairwise(filled) if len(divided) == 1 else", "pairwise(filled) if divided else"),
            ('raise ValueError(f"parts of {name} overlap")', "pass"),
            ("if attempt == TRIES - 1 or folders.candidates(path) == before:", "if True:"),
        ],
    ),
    (
        "unite_fast/checkpoint/format.py",
        ("tests/checkpoint/test_format.py", "tests/checkpoint/test_manager.py"),
        [
            ('config = _with_values(config, dict.fromkeys(PLACES, ""))', "pass"),
            ("            _check_link(path / shard.name)", "            pass"),
            ("if twice := [name for name, count in names.items() if count > 1]:", "if False:"),
        ],
    ),
    (
        "unite_fast/checkpoint/folders.py",
        ("tests/checkpoint/test_folders.py", "tests/checkpoint/test_manager.py"),
        [
            ("if os.path.realpath(path) == newest]", "if path == newest]"),
        ],
    ),
    (
        "data_pipeline/shards/manifest.py",
        ("tests/data_pipeline/shards/test_source.py",),
        [
            ('tree["sha256"] != _own_hash(tree)', "False"),
            ("if shard.index_sha256 and hashlib", "if False and hashlib"),
            ("(places[:, 0] < ends[:-1] + _BLOCK).any()", "False"),
            ("or ends[-1] > shard.bytes:", "or False:"),
            ("(table[:, 2] != table[:, 5]).any()", "False"),
        ],
    ),
    (
        "unite_fast/utils/npz.py",
        ("tests/utils/test_npz.py",),
        [
            ("if length > size or file.tell() + length != size:", "if False:"),
            ('order="F" if fortran_order else "C"', 'order="C"'),
            ("if info.file_size > max(FREE_BYTES, MOST_RATIO * info.compress_size):", "if False:"),
        ],
    ),
    (
        "unite_fast/distributed/process_group.py",
        ("tests/distributed/test_process_group.py", "tests/checkpoint/test_manager_on_ranks.py"),
        [
            ('outcome = (False, RuntimeError(f"{type(error).__name__}: {error}"))', "outcome = (False, error)"),
            ("lambda: work() if self.main else None", "work"),
        ],
    ),
    (
        "unite_fast/model/unite.py",
        ("tests/model/test_unite.py", "tests/training/test_parallelize.py"),
        [("if local(tensor)._version == versions[name]:", "if False:")],
    ),
    (
        "unite_fast/training/trainer.py",
        ("tests/training/test_restated.py", "tests/training/test_trainer.py", "tests/training/test_steps.py"),
        [
            (
                "self.state, config, batch_slice, micro_batch, lpips,",
                "self.state, config, slice(0, batch_slice.stop - batch_slice.start), micro_batch, lpips,",
            ),
            ("self.state, config, batch_slice, micro_batch, lpips,", "self.state, config, batch_slice, 0, lpips,"),
            ('"lr": self.state.last_learning_rate,', '"lr": self.state.learning_rate,'),
            (
                '"epoch": self.state.step * self.config.train.batch_size / len(self.source),',
                '"epoch": self.state.step / len(self.source),',
            ),
            (
                "self.averages.add(state.step, losses, grad_norm)",
                "self.averages.add(state.step - 1, losses, grad_norm)",
            ),
            ("speed = self.speed.row(steps)", "speed = self.speed.row(self.config.train.log_every + 1)"),
            (
                "steps, self.logged_step = self.state.step - self.logged_step, self.state.step",
                "steps = self.state.step - self.logged_step",
            ),
            ("if state.step % config.log_every == 0:", "if state.step % config.log_every == 1:"),
            ("if self.checkpoint_schedule.due(state.step) or stop_vote.save_now:", "if stop_vote.save_now:"),
            (
                "if self.checkpoint_schedule.due(state.step) or stop_vote.save_now:",
                "if self.checkpoint_schedule.due(state.step):",
            ),
            (
                "if self.checkpoint_schedule.saved_step != state.step:",
                "if state.step == self.first_step:",
            ),
            ("if config.picture_every and state.step % config.picture_every == 0:", "if False:"),
            ("if not stopped_by and not (config", "if False and not (config"),
            (
                "(state.step - self.first_step) * config.batch_size / seconds",
                "state.step * config.batch_size / seconds",
            ),
            ('"averages": self.averages.state_dict(),', '"averages": Averages(self.device).state_dict(),'),
            (
                '"skipped_steps": int(self.state.skipped_steps),\n        }\n        tensors',
                '"skipped_steps": 0,\n        }\n        tensors',
            ),
            ('self.loader.load_state_dict(checkpoint.progress["loader"])', "pass"),
            ('self.averages.load_state_dict(checkpoint.progress["averages"])', "pass"),
            (
                'self.state.skipped_steps.fill_(checkpoint.progress["skipped_steps"])',
                'checkpoint.progress["skipped_steps"]',
            ),
            ("self.state.resume_at(checkpoint.step)", "self.state.resume_at(checkpoint.step + 1)"),
            ('if self.config.optim.nonfinite == "skip":', 'if self.config.optim.nonfinite == "stop":'),
            ("if bad_step is not None:", "if False:"),
        ],
    ),
    (
        "unite_fast/training/trainer.py",
        (
            "tests/training/test_restated.py",
            "tests/training/test_trainer.py",
            "tests/training/test_steps.py",
            "tests/test_faults.py",
        ),
        [
            ("if not self.checkpoints.all_finite(tensors):", "if False:"),
        ],
    ),
    (
        "unite_fast/training/trainer.py",
        ("tests/data_pipeline/test_dali.py", "tests/data_pipeline/test_training.py", "tests/training/test_trainer.py"),
        [
            ("saved_decoder == self.choice.decoder,", "True,"),
        ],
    ),
    (
        "unite_fast/training/trainer.py",
        ("tests/test_torchrun.py",),
        [
            (
                "final_status(state.step, stopped_by) if",
                "final_status(state.step, 0) if",
            ),
            ("if outcome.orphan is not None:", "if False:"),
        ],
    ),
    (
        "unite_fast/training/trainer.py",
        ("tests/training/test_attention_precision.py",),
        [
            ('"attention": backend.attention_on(self.device),', '"attention": "sdpa",'),
        ],
    ),
    (
        "unite_fast/training/setup.py",
        (
            "tests/training/test_attention_precision.py",
            "tests/training/test_setup.py",
            "tests/training/test_trainer.py",
        ),
        [
            (
                "ranks.run_on_first(lambda: attention_precision.choose(config, saved))",
                "attention_precision.choose(config, saved)",
            ),
            ('config.attention != "sdpa"', "False"),
            ("classes == model.num_classes,", "True,"),
        ],
    ),
    (
        "unite_fast/training/data_record.py",
        ("tests/training/test_data_record.py",),
        [
            ("if name != old:", "if False:"),
            ("if count != old_count:", "if False:"),
            ("if self.samples != before.samples:", "if False:"),
            ("self.listing == before.listing else", "True else"),
            ("    if not allowed:\n", "    if False:\n"),
            ("[*changes, change]", "[change]"),
            ("records = ranks.run_on_all(lambda: cls._of_own(source))", "records = [cls._of_own(source)]"),
        ],
    ),
    (
        "unite_fast/read_yaml.py",
        ("tests/test_read_yaml.py",),
        [
            ("if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:", "if False:"),
            ('re.fullmatch(r"[-+]?0[0-9_]+", value)', "False"),
            ("size <= LARGEST_TREE", "True"),
            ("known[id(node)] = math.inf", "known[id(node)] = 0"),
        ],
    ),
    (
        "data_pipeline/shards/remote.py",
        ("tests/data_pipeline/shards/test_remote.py",),
        [
            ("if path.read_bytes() == content:", "if True:"),
            ("if out.tell() > most:\n                            #", "if False:\n                            #"),
        ],
    ),
    (
        "unite_fast/training/attention_precision.py",
        ("tests/training/test_attention_precision.py",),
        [
            ("if saved in ON_CPU:", "if False:"),
            ("if config.train.deterministic:", "if False:"),
            ("passes * best[shape, name]", "best[shape, name]"),
            ("] += passes", "] += 1"),
            ("torch.set_num_threads(threads)", "pass"),
        ],
    ),
    (
        "unite_fast/training/setup.py",
        ("tests/utils/test_device.py",),
        [
            ("use_numerics(config.train.precision, config.train.deterministic)", "pass"),
        ],
    ),
    (
        "unite_fast/utils/device.py",
        ("tests/utils/test_device.py",),
        [
            ('if precision == "float32":', 'if precision == "bfloat16":'),
            ("torch.use_deterministic_algorithms(deterministic)", "torch.use_deterministic_algorithms(False)"),
            (
                "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False\n    try",
                "pass\n    try",
            ),
        ],
    ),
    (
        "unite_fast/distributed/strategy.py",
        ("tests/training/test_restated.py", "tests/distributed/test_strategy.py"),
        [
            (
                "return slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank), micro",
                "return slice(0, per_rank), micro",
            ),
        ],
    ),
    (
        "unite_fast/training/parallelize.py",
        ("tests/training/test_parallelize.py",),
        [
            ("model.set_requires_gradient_sync(others)", "model.set_requires_gradient_sync(True)"),
        ],
    ),
    (
        "unite_fast/checkpoint/model_file.py",
        ("tests/interop", "tests/checkpoint/test_model_file.py"),
        [
            (
                "save_model(out, as_recorded(model.config), model.step, model.averages, model.class_names)",
                "save_model(out, as_recorded(model.config), model.step, model.weights, model.class_names)",
            ),
            ("if _digest_of(file, written)[0] != written:", "if False:"),
            ("require(bool(tensor.isfinite().all()),", "require(True,"),
            ("require(tensor.dtype == dtype,", "require(True,"),
        ],
    ),
    (
        "unite_fast/checkpoint/manager.py",
        ("tests/checkpoint/test_manager.py", "tests/checkpoint/test_format.py"),
        [
            ("files.check_sizes(partial, manifest.shards)", "pass"),
        ],
    ),
    (
        "unite_fast/checkpoint/manager.py",
        ("tests/checkpoint/test_manager_on_ranks.py", "tests/checkpoint/test_replicas.py"),
        [
            ("check_replicas(tensors, self.ranks, step)", "pass"),
            ("for name in plan.staged(self.ranks.rank)}", "for name in tensors}"),
            ("ranks.run_on_all(allocate)", "allocate()"),
            (
                "copy_(self.copies[entry.name] if member == writer else _receive(part, member, ranks))",
                "copy_(_receive(part, member, ranks) if member != writer else part)",
            ),
        ],
    ),
    (
        "unite_fast/checkpoint/save_plan.py",
        ("tests/checkpoint/test_save_plan.py", "tests/checkpoint/test_manager.py"),
        [
            ("writing = min(replicas, max(1, MOST_FILES // shards))", "writing = replicas"),
            ("[i * replicas // writing for i in range(writing)]", "list(range(writing))"),
            ("per_file = -(-shards // MOST_FILES)", "per_file = 1"),
            ("entry.sizes[index] or not index]", "entry.sizes[index]]"),
            ("if first and not sum(sizes):", "if not sum(sizes):"),
            ("            if first:\n                continue\n", ""),
            ("(-layouts[name].bytes, name)", "name"),
            ("min(range(parts), key=filled.__getitem__)", "0"),
        ],
    ),
    (
        "unite_fast/checkpoint/replicas.py",
        ("tests/checkpoint/test_replicas.py",),
        [
            ("+ start * total])", "])"),
            ("(chunk * positions[: len(chunk)]).sum()", "chunk.sum()"),
            ("tensor.view(INTEGERS[tensor.element_size()]).flatten()", "tensor.flatten()"),
            ("if replicas > 1 else {}", "if replicas > 2 else {}"),
            ("of_sharded[shard::shards]", "of_sharded[::shards]"),
            ("[everyone[shard::shards] for shard in range(shards)]", "[everyone]"),
            ("majority = 2 * count > len(group)", "majority = True"),
            ("if len(set(of_plain)) == 1 and all", "if all"),
            (
                "class ReplicasDiffer(TemporaryError):",
                'class ReplicasDiffer(__import__("unite_fast.errors").errors.UserError):',
            ),
        ],
    ),
    (
        "unite_fast/training/checkpoint_schedule.py",
        ("tests/training/test_checkpoint_schedule.py",),
        [
            ("return self.every > 0 and step % self.every == 0", "return step % self.every == 0"),
            ("60 * config.checkpoint_minutes", "config.checkpoint_minutes"),
            ("self.saved_step, self.saved_at = step, now", "self.saved_step = step"),
            ("self.seconds > 0 and now", "now"),
        ],
    ),
]
