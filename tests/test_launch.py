"""The launch files and their page: they parse, agree with each other, and call valid commands."""

import re
import shutil
import subprocess
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


def test_the_slurm_script_is_bash():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    checked = subprocess.run([bash, "-n", SLURM], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_slurm_script_calls_torchrun_with_valid_options():
    text = SLURM.read_text()
    assert "#SBATCH --signal=USR1@300" in text
    body = text.split('torchrun" ', 1)[1].split("\n}", 1)[0]
    words = body.replace("\\\n", " ").replace('"$@"', "imagenet256_b").split()
    words = [re.sub(r"\$GPUS_PER_NODE|\$SLURM_NNODES", "8", word.strip('"')) for word in words]
    options = get_args_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "unite_fast")
    assert {"SIGUSR1", "SIGTERM"} <= set(options.signals_to_handle.split(","))
    # Less than the five minutes' warning. A variable, because older versions of torchrun have no option for it.
    assert 30 < int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)[1]) < 300
    assert options.training_script_args[:2] == ["train", "imagenet256_b"]
    assert options.training_script_args[-1] == "--resume"


def test_the_kubernetes_example_is_consistent():
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    shell, flag, _, program, *arguments = container["command"]
    assert (shell, flag) == ("bash", "-c") and "train.out=/runs/imagenet256_b" in arguments
    options = get_args_parser().parse_args(arguments)
    assert program == "torchrun" and (options.module, options.training_script) == (True, "unite_fast")
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(options.nnodes)
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first Pod of an indexed Job is JOB-0.SUBDOMAIN, and the Service gives it that name.
    host, port = options.rdzv_endpoint.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == int(port)
    timeout = {entry["name"]: entry["value"] for entry in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert 30 < int(timeout) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    command, recipe, *settings = options.training_script_args
    assert command == "train" and settings.pop() == "--resume"
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


@pytest.mark.parametrize(("ends", "signalled", "succeeds"), [("finished", False, True), ("stopped", True, False)])
def test_a_pod_succeeds_only_when_the_run_has_finished(ends, signalled, succeeds, tmp_path):
    """A script in place of torchrun writes the status of a run."""
    *_, job = yaml.safe_load_all(KUBERNETES.read_text())
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    status = tmp_path / "status"
    script = script.replace("/runs/imagenet256_b/status", str(status))
    program = tmp_path / "torchrun"
    wait = "trap 'echo stopped > $1; exit 0' TERM; touch $1.began; while :; do sleep 0.05; done"
    program.write_text(f"#!/bin/bash\n{wait if signalled else 'echo finished at step 3 > $1'}\n")
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    pod = subprocess.Popen(["bash", "-c", script, "torchrun", str(status)], env=path)
    if signalled:
        end = time.monotonic() + 30
        while not status.with_name("status.began").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        pod.terminate()
    assert (pod.wait(30) == 0) == succeeds
    assert status.read_text().startswith(ends)
