"""summary.md: results as tables for docs/performance.md."""


def make(lines: list[dict]) -> str:
    """The text of summary.md from the lines of results.jsonl."""
    text = [head(lines), *wrong(lines), "| part | seconds | right | wrong | measured |", "|---|---|---|---|---|"]
    for part in dict.fromkeys(line["part"] for line in lines if line["part"] not in ("start", "end")):
        own = [line for line in lines if line["part"] == part]
        right, bad = (sum(line["ok"] is value for line in own) for value in (True, False))
        seconds = next((line["seconds"] for line in own if line["name"] == "part ended"), None)
        skipped = next((f"skipped: {line['why']}" for line in own if line["name"] == "skipped"), "")
        text.append(
            f"| {part} | {'' if seconds is None else seconds} | {right} | {bad} | {skipped or note(part, own)} |"
        )
    for title, table in (
        ("Steps", steps(lines)),
        ("Memory", memory(lines)),
        ("Ops", ops(lines)),
        ("Products", products(lines)),
        ("Attention", sdpa(lines)),
        ("Parts of a step", parts(lines)),
        ("Kernels of a step", kernels(lines)),
    ):
        if len(table) > 2:
            text += ["", f"### {title}", "", *table]
    return "\n".join(text) + "\n"


def head(lines: list[dict]) -> str:
    machine = find(lines, "env", "machine") or {}
    copy, product = find(lines, "env", "copy") or {}, find(lines, "env", "bfloat16 product") or {}
    start = lines[0]
    facts = [
        f"{machine.get('card', 'unknown card')}, {start.get('date')}, commit {machine.get('commit')}",
        f"torch {machine.get('torch')}, triton {machine.get('triton')}, CUDA {machine.get('cuda')}, cuDNN "
        f"{machine.get('cudnn')}, driver {machine.get('driver')}, Python {machine.get('python')}",
        f"copy {copy.get('tb_per_s')} TB/s, bfloat16 product {product.get('tflops')} TFLOP/s",
        f"`python {' '.join(start.get('argv', []))}`",
    ]
    return "\n".join(f"{fact}  " for fact in facts) + "\n"


def wrong(lines: list[dict]) -> list[str]:
    errors = [line for line in lines if line["ok"] is False and line["part"] != "end"]
    if not errors:
        return ["Nothing was wrong.", ""]
    text = [f"**{len(errors)} results are wrong:**", ""]
    for line in errors[:40]:
        why = line.get("error") or ", ".join(
            f"{key} {value}" for key, value in line.items() if key not in ("at", "part", "name", "ok")
        )
        text.append(f"- {line['part']}: {line['name']}: {' '.join(str(why).split())[-300:]}")
    return [*text, ""]


def find(lines: list[dict], part: str, name: str) -> dict | None:
    return next((line for line in lines if line["part"] == part and line["name"] == name), None)


def note(part: str, own: list[dict]) -> str:
    """The most informative figure of a part."""
    if part == "digits":
        row = find(own, part, "first steps agree") or {}
        return f"first steps {max(row['apart'].values()):.1e} apart" if row else ""
    if part == "profile":
        host, waits = find(own, part, "host") or {}, find(own, part, "host waits") or {}
        step = find(own, part, "step") or {}
        asked, places = host.get("ms_to_ask"), waits.get("places")
        return f"{step.get('kernels')} kernels, busy {step.get('busy_share')}, host {asked} ms, waits {places}"
    if part == "graphs":
        return "graphs " + ", ".join(str(line["graphs"]) for line in own if "graphs" in line)
    return ""


def number(value: object, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def table(header: str, rows: list[list[str]]) -> list[str]:
    columns = header.split("|")
    return [
        "| " + header.replace("|", " | ") + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def steps(lines: list[dict]) -> list[str]:
    rows = []
    for line in lines:
        if "images_per_s" not in line or not line["part"].startswith("bench"):
            continue
        low, high = line.get("predicted_images_per_s_slow"), line.get("predicted_images_per_s_fast")
        predicted = f"{low:.0f} to {high:.0f}" if low else ""
        of_sheet = line.get("mfu_of_datasheet")
        rows.append(
            [
                line["name"],
                number(line["images_per_s"]),
                predicted,
                *(number(line.get(f"{part}_ms")) for part in ("step", "forward", "backward", "optimizer")),
                f"{line['mfu_of_product']:.1%}",
                f"{of_sheet:.1%}" if of_sheet else "",
                number(line["memory_gb"], 2),
                number(line.get("first_step_s")),
            ]
        )
    columns = "UNITE-B, F = 3, LPIPS|images/s|predicted|step ms|forward|backward|optimizer|MFU of product|of datasheet"
    return table(f"{columns}|GB|first step s", rows)


def memory(lines: list[dict]) -> list[str]:
    rows = [
        [
            line["name"].removeprefix("memory, "),
            number(line["measured_gb"], 2),
            number(line["predicted_gb"], 2),
            number(line["measured_of_predicted"], 3),
        ]
        for line in lines
        if "measured_of_predicted" in line
    ]
    return table("peak of tensors|measured GB|predicted GB|share", rows)


def ops(lines: list[dict]) -> list[str]:
    rows = []
    for line in lines:
        if line["part"] != "op_times" or "forward" not in line:
            continue
        columns = (("us", 1), ("mb", 1), ("share_of_copy", 2), ("predicted_share", 2), ("times_eager", 2))
        rows.append([line["name"], *(both_passes(line, key, digits) for key, digits in columns)])
    return table("op, forward / backward|us|MB|share of copy|predicted|times eager", rows)


def products(lines: list[dict]) -> list[str]:
    rows = []
    for line in lines:
        if "linear" in line:
            rates = [number(line[name]["tflops"]) for name in ("forward", "d_x", "d_weight")]
            shape = " x ".join(map(str, line["shape"]))
            rows.append([line["linear"], shape, *rates, number(line["d_bias"]["tb_per_s"], 2)])
    return table("Linear|rows x inputs x outputs|forward TFLOP/s|d_x|d_weight|d_bias TB/s", rows)


def both_passes(line: dict, key: str, digits: int) -> str:
    figures = [line[name].get(key) for name in ("forward", "backward")]
    return "" if None in figures else " / ".join(number(figure, digits) for figure in figures)


def sdpa(lines: list[dict]) -> list[str]:
    rows = [
        [
            line["name"],
            line["layout"],
            line["backend"],
            number(line.get("ms"), 3),
            number(line.get("tflops")),
            str(line.get("error", line.get("refused", "")))[:60],
        ]
        for line in lines
        if line["part"] == "sdpa" and "layout" in line
    ]
    return table("attention, both passes|layout|backend|ms|TFLOP/s|error", rows)


def parts(lines: list[dict]) -> list[str]:
    rows = [
        [
            line["name"].removeprefix("part "),
            number(line["wall_ms"], 2),
            number(line["busy_ms"], 2),
            str(line["kernels"]),
            ", ".join(f"{key} {value['ms']:.2f} ({value['kernels']})" for key, value in line["kinds"].items()),
        ]
        for line in lines
        if "kinds" in line
    ]
    return table("part|wall ms|busy ms|kernels|ms (kernels) by kind", rows)


def kernels(lines: list[dict]) -> list[str]:
    rows = [
        [
            f"`{line['kernel'][:80]}`".replace("|", "/"),
            line["kind"],
            str(line["calls"]),
            number(line["ms"], 3),
            f"{line['share']:.1%}",
        ]
        for line in lines
        if "kernel" in line
    ]
    return table("kernel|kind|calls|ms|share", rows)
