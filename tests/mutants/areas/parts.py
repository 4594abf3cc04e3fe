"""Mutants of data, kernels, model, sampling and scores. See ../run.py."""

CHANGES = [
    (
        "unite_fast/evaluation/metrics.py",
        ("tests/evaluation/test_metrics.py", "tests/evaluation/test_fid.py"),
        [
            ("KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000", "KID_SUBSETS, KID_SUBSET_SIZE = 50, 1000"),
            ("kthvalue(neighbours + 1)", "kthvalue(neighbours)"),
        ],
    ),
    (
        "unite_fast/evaluation/metrics.py",
        (
            "tests/evaluation/test_metrics.py",
            "tests/evaluation/test_fid.py",
            "tests/evaluation/test_reconstruction.py",
        ),
        [
            ("SSIM_WINDOW, SSIM_SIGMA = 11, 1.5", "SSIM_WINDOW, SSIM_SIGMA = 11, 1.6"),
        ],
    ),
    (
        "unite_fast/flow.py",
        ("tests/test_flow.py", "tests/training/test_train_step.py", "tests/training/test_restated.py"),
        [
            ("MIN_TIME_LEFT = 0.05", "MIN_TIME_LEFT = 0.04"),
        ],
    ),
    (
        "unite_fast/flow.py",
        ("tests/test_flow.py",),
        [
            ("(1 + (shift - 1) * s)", "(1 + (shift + 1) * s)"),
        ],
    ),
    (
        "unite_fast/sampling/solvers.py",
        ("tests/sampling/test_solvers.py",),
        [
            ("x = x + step / 2 * (slope", "x = x + step * (slope"),
        ],
    ),
    (
        "unite_fast/sampling/sampler.py",
        ("tests/sampling/test_sampler.py",),
        [
            ("(low == 0 or t > low)", "t > low"),
            ("return unconditional + self.config.guidance", "return conditional + self.config.guidance"),
        ],
    ),
    (
        "unite_fast/randomness.py",
        ("tests/test_randomness.py",),
        [
            ("_ROUNDS = 10", "_ROUNDS = 9"),
        ],
    ),
    (
        "unite_fast/model/layers.py",
        ("tests/model/test_layers.py",),
        [
            ("theta: float = 10000.0", "theta: float = 1000.0"),
        ],
    ),
    (
        "unite_fast/model/decoder.py",
        ("tests/model/test_decoder.py",),
        [
            ("LAYER_NORM_EPS = 1e-12", "LAYER_NORM_EPS = 1e-5"),
            ("*weights, branch_bias, wide=True), left", "*weights, wide=True), left"),
            ("branch_bias)[1][:, 1:]", "branch_bias)[1][:, :-1]"),
        ],
    ),
    (
        "kernels/swiglu.py",
        ("tests/kernels/test_swiglu.py",),
        [
            ("F.silu(u)", "F.gelu(u)"),
        ],
    ),
    (
        "kernels/triton_kernels/swiglu.py",
        ("tests/kernels/test_swiglu.py", "tests/kernels/test_linear.py"),
        [
            ("b_sum_w += b_d_w", "b_sum_w += b_d_u"),
        ],
    ),
    (
        "kernels/triton_kernels/gelu.py",
        ("tests/kernels/test_gelu.py", "tests/kernels/test_linear.py"),
        [
            ("0.3989422804014327", "0.3889422804014327"),
            ("(b_u * b_phi).to(out", "(b_u + b_phi).to(out"),
            ("b_sum += b_d_u", "b_sum += b_g"),
        ],
    ),
    (
        "kernels/triton_kernels/qk_norm_rope.py",
        ("tests/kernels/test_qk_norm_rope.py",),
        [
            ("b_sum_v += b_d_v.to(tl.float32)", "b_sum_v += b_d_k"),
        ],
    ),
    (
        "kernels/triton_kernels/adaln.py",
        ("tests/kernels/test_linear.py",),
        [
            ("b_d_y_sum * b_gate", "b_d_y_sum"),
            ("b_sum *= 1 + load(scale", "b_sum *= load(scale"),
        ],
    ),
    (
        "kernels/triton_kernels/layer_norm.py",
        ("tests/kernels/test_linear.py",),
        [
            ("b_d_branch_bias += b_d_x", "b_d_branch_bias += b_g"),
            ("o_row + EACH, o_2, end, D)", "o_row, o_2, end, D)"),
        ],
    ),
    (
        "kernels/linear.py",
        ("tests/kernels/test_linear.py",),
        [
            ("(bias.detach(), bias) if", "(bias, bias) if"),
        ],
    ),
    (
        "kernels/tap_distance.py",
        ("tests/test_lpips.py",),
        [
            ("EPS = 1e-10", "EPS = 1e-2"),
            ("(2 * keep)", "keep"),
        ],
    ),
    (
        "kernels/triton_kernels/tap_distance.py",
        ("tests/kernels/test_tap_distance.py",),
        [
            ("b_weight *= 2.0  # of the elements that dropout keeps\n", "pass\n"),
            ("m_larger = (b_y > b_max)", "m_larger = (b_y >= b_max)"),
            ("(row + 1 < height) & (column + 1 < width)", "(row < height) & (column < width)"),
            ("tl.where(b_y <= 0, 0.0, b_d_y)", "b_d_y"),
        ],
    ),
    (
        "kernels/triton_kernels/bias_relu.py",
        ("tests/kernels/test_bias_relu.py",),
        [
            ("load(out, o, m) <= 0", "load(out, o, m) < 0"),
        ],
    ),
    (
        "unite_fast/planning/lpips.py",
        ("tests/planning/test_lpips.py", "tests/planning/test_memory.py"),
        [
            ("bias_relu += 3 * convolutions", "bias_relu += 2 * convolutions"),
            ("+ 2 * taps)", "+ taps)"),
        ],
    ),
    (
        "unite_fast/planning/flops.py",
        ("tests/planning/test_flops.py",),
        [
            ("return Flops(2 * once, once)", "return Flops(once, once)"),
        ],
    ),
    (
        "data_pipeline/pinning.py",
        ("tests/data_pipeline/test_pinning.py",),
        [
            ("self.ahead = max(1, inner.ahead)", "self.ahead = 0"),
            ("while self.queued and self.begun <= self.inner.ahead:", "while self.queued:"),
            ("        self.inner.close()\n", ""),
            ("return self.pin(batch), broken", "return self.pin(batch), []"),
            ("with torch.cuda.device(device):", "if True:"),
        ],
    ),
    (
        "data_pipeline/choose_loader.py",
        ("tests/data_pipeline/test_pinning.py",),
        [
            ('pinned(open_reader, device) if device.type == "cuda"', "pinned(open_reader, device) if True"),
        ],
    ),
    (
        "data_pipeline/choose_loader.py",
        ("tests/data_pipeline/test_choose_loader.py",),
        [
            ("elif name in source.loaders:", "elif name:"),
            ("return loaders[0], _REASONS[loaders[0]]", "return 'memory', _REASONS['memory']"),
        ],
    ),
    (
        "data_pipeline/open_source.py",
        ("tests/data_pipeline/test_open_source.py",),
        [
            ("image_size or opener.image_size", "image_size or 256"),
            ("if path and not opener.needs_path:", "if False:"),
            ("    if kind in _KINDS:\n", "    if False:\n"),
            ('return "idx" if', 'return "folder" if'),
            ("source, not _same_images(source, training)", "source, True"),
        ],
    ),
    (
        "data_pipeline/splits.py",
        ("tests/data_pipeline/test_splits.py",),
        [
            ("if _are_both(splits) or len(splits) == len(names):", "if splits:"),
            ("return (*VALIDATION, *TEST)", "return (*TEST, *VALIDATION)"),
            ("if len(set(words)) == 1 else", "if words else"),
            ("if (path / training).samefile(path / name):", "if False:"),
            ("if list(classes) == list(training):", "if set(classes) <= set(training):"),
            ("if name.lower() in WORDS and folders and not holds_images:", "if name.lower() in WORDS and folders:"),
            ("[list(within), *around.values()] if all(within.values()) else around.values()", "[list(within)]"),
        ],
    ),
    (
        "data_pipeline/image_folder.py",
        ("tests/data_pipeline/test_image_folder.py",),
        [
            ("_check_distinct(\n            self.root, classes,", "_check_distinct(\n            self.root, [],"),
            ("labels = renumber(classes, self.class_names, self.root, place.training)", "pass"),
            ("elif entry.is_symlink() or entry.is_file():", "else:"),
            ("return SplitFolder(path, training=_training_beside(path))", "return SplitFolder(path)"),
            ("return same_size and file.read(_SAMPLED_BYTES) == second.read(_SAMPLED_BYTES)", "return same_size"),
        ],
    ),
    (
        "data_pipeline/shards/tar_files.py",
        ("tests/data_pipeline/shards/test_tar_files.py",),
        [
            ("path = main_image(key[1], list(group), contents.left_out)", "path = next(iter(group))"),
            ("name = choose_split(splits, split, place)", 'name = choose_split(splits, "train", place)'),
            ("_data(first, tars) == _data(image, tars)", "True"),
            ("around = _strip_folder_of_all(images)", 'around = ""'),
            ("if len(plain) > len(by_key) // 2:", "if False:"),
            ("if first.label != image.label:", "if False:"),
        ],
    ),
    (
        "data_pipeline/shards/tar_contents.py",
        ("tests/data_pipeline/shards/test_tar_files.py",),
        [
            ("contents.images[place_of[path]] = image", "pass"),
            ('if extension.endswith(".cls"):', "if False:"),
            ("if type(first) is type(label) and first != label:", "if first != label:"),
        ],
    ),
    (
        "data_pipeline/shards/tar_members.py",
        ("tests/data_pipeline/shards/test_tar_files.py",),
        [
            ("elif any(after[: tarfile.BLOCKSIZE]):", "elif False:"),
            (" and member.offset < end", ""),
            ("if any(map(is_clutter, parts[:-1])):", "if False:"),
        ],
    ),
    (
        "data_pipeline/shards/parts.py",
        ("tests/data_pipeline/shards/test_parts.py",),
        [
            ("if 0 < missing < len(found):", "if 0 < missing:"),
            ("first = int(total in found)", "first = 0"),
        ],
    ),
    (
        "data_pipeline/shards/listed.py",
        ("tests/data_pipeline/shards/test_listed.py", "tests/data_pipeline/shards/test_tar_files.py"),
        [
            ("return text.isascii() and not _OF_A_LIST.search(text)", "return text.isascii()"),
            ("if self.read(number) == training.read(other):", "if True:"),
        ],
    ),
    (
        "data_pipeline/shards/parquet_files.py",
        ("tests/data_pipeline/shards/test_parquet_files.py",),
        [
            ("places.append((number, offset, size))", "places.append((number, size * row, size))"),
            ("if names != first:", "if False:"),
            ("check_same_classes(class_names, of_training, place, training[0])", "pass"),
            ("{status.st_mtime_ns}", ""),
        ],
    ),
    (
        "data_pipeline/shards/label_file.py",
        ("tests/data_pipeline/shards/test_label_file.py",),
        [
            ("row[0] in name_of and bool(row[1])", "row[0] in name_of"),
            ("classes[number] = line", "classes[number] = lines[number]"),
            ("if all(name.isdecimal() for name in classes) and", "if False and"),
        ],
    ),
    (
        "unite_fast/sampling/pipeline.py",
        ("tests/sampling/test_pipeline.py",),
        [
            (
                "sampler.tokenize(self.network, images, seed, batch, first)",
                "sampler.tokenize(self.network, images, seed, batch)",
            ),
            ("latents.dim() != 3 or latents.shape[1:] != shape", "latents.dim() != 3"),
        ],
    ),
    (
        "unite_fast/utils/pretrained.py",
        ("tests/utils/test_pretrained.py",),
        [
            ("weights_only=True", "weights_only=False"),
            ("if not digest.startswith(expected):", "if False:"),
            ("if actual != shape:", "if False:"),
            ("return self.key if path else self.variable", "return self.variable if path else self.key"),
        ],
    ),
    (
        "unite_fast/utils/files.py",
        ("tests/utils/test_files.py",),
        [
            ("            partial.unlink(missing_ok=True)\n", "            pass\n"),
            (
                "            os.replace(partial, path)\n            if durable:\n                flush(path",
                "            if durable:\n                flush(path",
            ),
            ("if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"),
        ],
    ),
    (
        "unite_fast/utils/rows.py",
        ("tests/utils/test_rows.py", "tests/training/test_metrics.py"),
        [
            ('if row and row["step"] <= step:', 'if row and row["step"] < step:'),
            ("return [*rows[:MOST_ROWS:2], *rows[MOST_ROWS:]]", "return rows[::2]"),
            ("file.readline(LONGEST_LINE)  # the rest of a line", "pass"),
            ("if size <= WHOLE:", "if True:"),
            ('type(row.get("step")) is not int', "False"),
        ],
    ),
    (
        "data_pipeline/synthetic.py",
        ("tests/data_pipeline/test_synthetic.py",),
        [
            ("return index % len", "return index // len"),
            ("self.noise[index : index + image.size]", "self.noise[: image.size]"),
            ("Philox(seed, 0,", "Philox(0, 0,"),
        ],
    ),
    (
        "kernels/attention_backends.py",
        ("tests/kernels/test_attention_backends.py",),
        [
            ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"),
            ("if device.type != home:", "if False:"),
            ("if dtype == torch.float32 and name not in TAKES_FLOAT32:", "if False:"),
        ],
    ),
    (
        "kernels/attention.py",
        ("tests/kernels/test_linear.py",),
        [
            ('name == "sdpa_float32"\n', "in_float32(qkv)\n"),
        ],
    ),
    (
        "kernels/casts.py",
        ("tests/kernels/test_casts.py",),
        [
            ("copy.version == weight._version", "True"),
            ("_copies = before\n", "pass\n"),
        ],
    ),
]
