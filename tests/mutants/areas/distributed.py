"""Mutants of how ranks meet, watch each other and end together. See ../run.py."""

FOLDER = "tests/distributed"
CHANGES = [
    (
        "unite_fast/distributed/agent.py",
        (f"{FOLDER}/test_agent.py",),
        [
            ("while process > 1 and _has_run_id(process):", "while False:"),
            ("if process and restarts_left() and", "if process and"),
            ("os.kill(process, signal.SIGTERM)", "pass"),
            ("os.kill(process, signal.SIGKILL)", "os.kill(process, signal.SIGTERM)"),
            ("if not answers_within(*place, CUT_OFF) and", "if"),
            ('option.replace("_", "-")', "option"),
            ("return agent_process() == 1 and not _may_be_torchrun(1)", "return not _may_be_torchrun(1)"),
            ('return b"libtorch" in maps if maps else', "return True if maps else"),
        ],
    ),
    (
        "unite_fast/distributed/reach.py",
        (f"{FOLDER}/test_reach.py",),
        [
            ('        if answer == "refused":\n            answered = now\n', ""),
            ('Error:\n                answer = "refused"', "Error:\n                pass"),
            ("now - start > timeout or", ""),
            ('while probe(host, port) == "silent":', 'while probe(host, port) != "accepted":'),
        ],
    ),
    (
        "unite_fast/distributed/joining.py",
        (f"{FOLDER}/test_joining.py",),
        [
            ("if rank in self.known and text != self.known[rank]:", "if True:"),
            ("if now - heard > EARLY_SILENCE]", "if False]"),
            ("MISTAKE_SECONDS if trouble.mistake else 0", "0"),
            ("self.heard = dict.fromkeys(list(self.heard), time.monotonic())", "pass"),
            ("note_mistake_seen(self.store, SILENCE / 2)", "pass"),
            ("_joining.closed.set()", "pass"),
        ],
    ),
    (
        "unite_fast/distributed/hosts.py",
        (f"{FOLDER}/test_hosts.py",),
        [
            ("if len(set(hosts)) < 2:", "if True:"),
            ("ranks[-1] - ranks[0] == len(ranks) - 1", "True"),
        ],
    ),
    (
        "unite_fast/distributed/interface.py",
        (f"{FOLDER}/test_interface.py",),
        [
            ("if address and not is_loopback(address):", "if address:"),
            ("if os.environ.get(GLOO_INTERFACE):", "if False:"),
        ],
    ),
    (
        "unite_fast/distributed/start_check.py",
        (f"{FOLDER}/test_start_check.py", "tests/training/test_setup.py"),
        [
            ("if digest != digests[0]]", "if False]"),
            ("for key in {**first, **values}:", "for key in values:"),
            ("parts[:MOST_NAMED]", "parts"),
        ],
    ),
    (
        "unite_fast/distributed/store.py",
        (f"{FOLDER}/test_store.py",),
        [
            ("if all(answer == proposal for answer in answers):", "if True:"),
            ("if mistake := announced_mistake(store):", "if mistake := '':"),
            ('store.set(f"{name}/{rank}", value)', 'store.set(f"{name}/{rank}", "")'),
        ],
    ),
    (
        "unite_fast/distributed/peers.py",
        (f"{FOLDER}/test_peers.py", f"{FOLDER}/test_watchdog.py"),
        [
            ("if now - heard > SILENCE]", "if False]"),
            ("if not self.last_beats or beat != self.last_beats[rank]:", "if True:"),
            ("if trouble is None or trouble.lost is None:", "if True:"),
            ("(agent_process() != self.agent or is_orphan())", "agent_process() != self.agent"),
            ("(agent_process() != self.agent or is_orphan())", "is_orphan()"),
            ("self.heard_at = [time.monotonic()] * self.world\n\n    def announce", "pass\n\n    def announce"),
        ],
    ),
    (
        "unite_fast/distributed/watchdog.py",
        (f"{FOLDER}/test_watchdog.py",),
        [
            ("time.monotonic() - self.last_contact > SILENCE:", "False:"),
            ("self.peers.announce(Trouble(silent))", "pass"),
            ("self.end_all(MistakeElsewhere(trouble.mistake))", "pass"),
            ("quiet=read_environment().local_rank > 0", "quiet=False"),
            ("self.peers.announce(Trouble(mistake=f", "print((f"),
            ("if self.peers.orphaned and not self.stop_asked:", "if False:"),
        ],
    ),
    (
        "unite_fast/training/network_share.py",
        ("tests/training/test_network_share.py",),
        [
            ("calls * self.latency + max", "self.latency + max"),
            ("large - self.latency) * parameters / numbers", "large - self.latency)"),
            ("if self.told or share", "if share"),
            ("collective.across_nodes or collective.group > ranks.per_node", "True"),
        ],
    ),
    (
        "unite_fast/training/metrics.py",
        ("tests/training/test_network_share.py",),
        [
            ("seconds[ranks.rank] = own", "seconds[0] = own"),
            ("int(seconds.argmax())", "int(seconds.argmin())"),
            ("< STRAGGLER_RATIO:", "> STRAGGLER_RATIO:"),
        ],
    ),
    (
        "unite_fast/distributed/signals.py",
        (f"{FOLDER}/test_signals.py",),
        [
            ("2 * self.waited, MOST_STEPS)", "MOST_STEPS)"),
            ("proposed = steps if self.peers.rank == 0 else 0", "proposed = steps"),
            ("bool(save), orphan - 1 if orphan else None", "False, orphan - 1 if orphan else None"),
            ("bool(save), orphan - 1 if orphan else None", "bool(save), None"),
            ("orphan = self.peers.rank + 1 if self.peers.orphaned else 0", "orphan = 0"),
        ],
    ),
    (
        "unite_fast/training/run_folder.py",
        ("tests/training/test_run_folder.py",),
        [
            ("if ranks.nodes == 1:\n        return", "return"),
            ('if name == "status" and read_status(folder).startswith(FAILED):', "if False:"),
            ("lock_run(folder := choose_folder(config))", "suppress(folder := choose_folder(config))"),
            ('or status.endswith(f"; was {running_status()}")', ""),
        ],
    ),
]
