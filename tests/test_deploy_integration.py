"""ansible/ for real: two stand-in VMs, deployed to, run on, broken and mended, over pinned ssh.

One pair of VMs serves the whole file, in any order of the tests: `checked` is a check of bare VMs,
`deployed` the first deployment, `again` the second. A test that changes a VM puts it back.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import stand_in_vms
from docker_fixtures import REPOSITORY
from stand_in_vms import Vm

pytestmark = pytest.mark.docker

ROOT = "/opt/headroom"
LOCK = "/tmp/libtpu_lockfile"  # noqa: S108 - where libtpu puts it
# Two sessions may share an engine.
OURS = f"headroom-test-{os.getpid()}"
SHELL = f"headroom-test/shell:{os.getpid()}"
# A trainer of a few lines, in a file that each VM has its own of.
SHELL_JOB = f"""\
name: told
accelerator: cpu
model: tiny
container:
  image: {SHELL}
  network: none
  binds: ['/told:/told:ro']
  pass_env: [HF_TOKEN]
"""
# Three cells that the planner finds room for, and one whose rollout it does not.
SWEPT_JOB = """\
name: swept
accelerator: cpu
model: tiny
steps: 1
system_prompt: ""
rollout: {prompts_per_step: 2, group_size: 2, max_prompt_tokens: 128, max_completion_tokens: 8}
container:
  network: none
  binds: ['/told:/told:ro']
"""
SWEEP = """\
name: swept
job: base.yaml
plan_for: v4-8
cells:
  a: {}
  b: {set: {seed: 1}}
  c: {set: {seed: 2}}
  big: {set: {rollout.prompts_per_step: 2097152}}
"""
UNTIL_TOLD = "trap 'exit 143' TERM; echo step=0; while :; do sleep 0.1; done"


@dataclass(frozen=True)
class Played:
    """What ansible-playbook said."""

    rc: int
    text: str

    def count(self, what: str) -> dict[str, int]:
        """A column of the recap, by host."""
        found = re.findall(rf"^(w\d) +: .*\b{what}=(\d+)", self.text, re.MULTILINE)
        return {host: int(number) for host, number in found}


@dataclass(frozen=True)
class Site:
    """The controller: a clone, an inventory, and the VMs that it tells of."""

    clone: Path
    inventory: Path
    scratch: Path
    vms: list[Vm]

    def start(self, name: str, *more: str, **variables: object) -> subprocess.Popen[str]:
        argv = [str(Path(sys.executable).with_name("ansible-playbook")), name]
        argv += ["-i", str(self.inventory), "-e", json.dumps(variables), *more]
        environment = {
            **os.environ,  # noqa: TID251
            "DOCKER_HOST": self.vms[0].engine.host,
            "ANSIBLE_HOME": str(self.scratch / "ansible"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.scratch),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_SSH_RETRIES": "0",
            "LC_ALL": "C.UTF-8",
        }
        return subprocess.Popen(
            argv, cwd=self.clone / "ansible", env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def play(self, name: str, *more: str, **variables: object) -> Played:
        with self.start(name, *more, **variables) as process:
            try:
                text, _ = process.communicate(timeout=600)
            finally:
                process.kill()
        return Played(process.returncode, text)

    def head(self) -> str:
        return git(self.clone, "rev-parse", "HEAD")

    def fetched(self, job_id: str) -> Path:
        return self.clone / "fetched" / job_id


def git(folder: Path, *argv: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *argv],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout.strip()  # fmt: skip


def clean_clone(folder: Path) -> Path:
    """The working tree under test, as a commit of a repository of its own."""
    listed = git(REPOSITORY, "ls-files", "-co", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (source := REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=the working tree under test")
    return folder


def inventory(folder: Path, vms: list[Vm], images: list[str], channel: str) -> Path:
    folder.mkdir()
    (folder / "known_hosts").write_text("".join(f"{vm.host_key}\n" for vm in vms))
    variables = {
        "ansible_user": stand_in_vms.USER,
        "ansible_ssh_private_key_file": str(folder.parent / "keys" / "id"),
        "vm_environment": {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"},
        "conda_channels": [channel],
        "headroom_image_from": "ship",
        "tpu_vm_disk_gib": {ROOT: 5},
        "tpu_vm_ram_gib": 2,
    }
    hosts = {
        f"w{number}": {"ansible_host": vm.address, "headroom_image": image}
        for number, (vm, image) in enumerate(zip(vms, images, strict=True))
    }
    # JSON is YAML.
    (folder / "hosts.yaml").write_text(json.dumps({"tpu": {"vars": variables, "hosts": hosts}}))
    return folder / "hosts.yaml"


@pytest.fixture(scope="module")
def bare(headroom_image, tmp_path_factory):
    """Two VMs with nothing of ours on them, and a controller that knows their keys."""
    engine, base = headroom_image.engine, headroom_image.base
    folder = tmp_path_factory.mktemp("site")
    shell = f'FROM {base}\nENTRYPOINT ["/bin/sh", "/told/job.sh"]\n'
    (folder / "shell").mkdir()
    (folder / "shell" / "Dockerfile").write_text(shell)
    engine.docker("build", "--quiet", "--tag", SHELL, str(folder / "shell"))
    channel = stand_in_vms.conda_channel(engine, base, folder / "channel")
    stand_in_vms.ssh_keygen(folder / "keys" / "id")
    image = stand_in_vms.build(engine, base)
    # A path of its own in /tmp: sockets of ssh have short ones.
    scratch = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    vms, before = [], stand_in_vms.hierarchies()
    try:
        for number in range(2):
            name = f"{OURS}-w{number}"
            keys = folder / "keys"
            vms.append(
                stand_in_vms.start(engine, image, name=name, keys=keys, mount=folder / "channel")
            )
        # The whole image for one, a small one for the other: a second 2 GiB would test nothing new.
        listed = inventory(folder / "inventory", vms, [headroom_image.tag, SHELL], channel)
        yield Site(clean_clone(folder / "clone"), listed, scratch, vms)
    finally:
        for vm in vms:
            engine.run("docker", "rm", "--force", "--volumes", vm.name)
        engine.run("docker", "image", "rm", "--force", SHELL)
        stand_in_vms.forget(stand_in_vms.hierarchies() - before, folder / "cgroup")
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def checked(bare):
    """A check before anything was deployed, and what it left on the VMs."""
    played = bare.play("deploy.yml", "--check", "--diff")
    return played, [vm.run("ls", ROOT, "/root/miniconda3").stdout for vm in bare.vms]


@pytest.fixture(scope="module")
def deployed(bare, checked):
    """The first deployment, and after it the image of the told trainer on both VMs."""
    assert checked
    played = bare.play("deploy.yml")
    assert played.rc == 0, played.text[-6000:]
    for vm in bare.vms:
        save = f"docker save {SHELL} | docker exec -i {vm.name} docker load"
        assert vm.engine.run("sh", "-c", save).returncode == 0
    return replace(bare), played


@pytest.fixture(scope="module")
def site(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def again(site):
    """The second deployment, and the bytes that each VM received for it."""

    def received() -> list[int]:
        return [int(vm.says("cat", "/sys/class/net/eth0/statistics/rx_bytes")) for vm in site.vms]

    before = received()
    played = site.play("deploy.yml")
    return played, [now - then for then, now in zip(before, received(), strict=True)]


def told(site: Site, *scripts: str) -> Path:
    """Gives each VM its own trainer; the job file for all."""
    for vm, text in zip(site.vms, scripts, strict=True):
        vm.says("mkdir", "-p", "/told")
        stand_in_vms.put(vm.engine, vm.name, "told/job.sh", f"{text}\n".encode(), mode=0o644)
    path = site.scratch / "told.yaml"
    path.write_text(SHELL_JOB)
    return path


@contextmanager
def lock_holder(vm: Vm):
    """A process on the VM that has libtpu's file locked as libtpu locks it; its process id."""
    code = (
        f"import fcntl,sys,time;f=open({LOCK!r},'w');fcntl.lockf(f,fcntl.LOCK_EX);"
        "open('/run/holder','w').write(str(__import__('os').getpid()));time.sleep(600)"
    )
    vm.says("rm", "-f", "/run/holder")
    vm.engine.docker("exec", "--detach", vm.name, "python3", "-c", code)
    until = "until [ -s /run/holder ]; do sleep 0.05; done; cat /run/holder"
    pid = vm.says("timeout", "20", "sh", "-c", until)
    try:
        yield pid
    finally:
        vm.run("kill", "-KILL", pid)


def test_a_check_tells_what_would_change_and_changes_nothing(checked):
    played, left = checked
    assert played.rc == 0, played.text[-4000:]
    assert min(played.count("changed").values()) >= 8
    assert "would be made of python=3.12" in played.text
    assert "would be shipped" in played.text
    assert "+++ after" in played.text
    assert left == ["", ""]


def test_a_deployed_vm_has_the_commit_the_environment_and_the_very_image(site, headroom_image):
    content = "{{json .RootFS.Layers}} {{json .Config.Labels}}"
    inspect = ("docker", "image", "inspect", "--format", content)
    wanted = [headroom_image.engine.docker(*inspect[1:], i) for i in (headroom_image.tag, SHELL)]
    for vm, image in zip(site.vms, wanted, strict=True):
        assert vm.says("git", "-C", f"{ROOT}/current", "rev-parse", "HEAD") == site.head()
        assert vm.says("readlink", f"{ROOT}/current") == f"{ROOT}/releases/{site.head()}"
        assert vm.says(*inspect, "headroom:cpu") == image
        python = "/root/miniconda3/envs/mllm-jax/bin/python"
        assert vm.says(python, "-c", "import sys; print(sys.prefix)") == python[:-11]
        assert "python-3.12" in vm.says("ls", "/root/miniconda3/envs/mllm-jax/conda-meta")
        # As the lock says, and no JAX: the trainer is in the image.
        lock = (site.clone / "docker" / "runner.txt").read_text()
        pinned = re.search(r"^pydantic==(\S+)", lock, re.MULTILINE)[1]
        ask = "import importlib.metadata as m, importlib.util as u; "
        assert (
            vm.says(python, "-c", f"{ask}print(m.version('pydantic'), u.find_spec('jax'))")
            == f"{pinned} None"
        )
        assert vm.says("headroom", "status", "--json") == "[]"
        assert vm.says("ls", f"{ROOT}/incoming") == ""
        assert '"live-restore": true' in vm.says("cat", "/etc/docker/daemon.json")


def test_a_second_deployment_changes_nothing_and_ships_nothing(again):
    played, received = again
    assert played.rc == 0, played.text[-4000:]
    assert played.count("changed") == {"w0": 0, "w1": 0}
    # What Ansible itself sends to look at a VM; the smallest thing of ours, uv, has 58 MB.
    assert max(received) < 15_000_000


def test_the_smoke_job_ends_with_0_and_its_log_and_run_directory_are_here(site):
    played = site.play("smoke.yml", "--limit", "w0", run_job_id="smoke")
    assert played.rc == 0, played.text[-6000:]
    assert "exit_status=0 on 1 of 1 workers" in played.text
    [run] = (site.fetched("smoke") / "w0" / "runs").iterdir()
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["where"], manifest["commit"]) == ("docker", site.head())
    assert manifest["exit_status"]["code"] == 0
    assert manifest["host"]["name"] == site.vms[0].name
    log = (run / "run.log").read_text()
    assert re.search(r"^step=0 loss=\S+ entropy=\S+ reward_mean=\S+ dt=\S+s", log, re.MULTILINE)
    assert log.endswith("exit_status=0\n")
    assert (site.fetched("smoke") / "w0" / "logs" / "smoke_latest.log").read_text() == log
    # Compiled programs and the hub's files outlast the container.
    assert site.vms[0].says("ls", f"{ROOT}/cache")


def test_two_workers_run_at_once_and_a_secret_is_in_no_artefact(site, tmp_path):
    # Made here: a constant would stand in the clone of these very files.
    secret = secrets.token_hex(8)
    env_file = tmp_path / "env"
    env_file.write_text(f"HF_TOKEN={secret}\n")
    env_file.chmod(0o644)
    job = told(site, *["date +%s; sleep 5; echo token of ${#HF_TOKEN}; date +%s"] * 2)
    asked = {"run_job_file": str(job), "run_job_id": "both", "run_job_env_file": str(env_file)}
    refused = site.play("run.yml", **asked)
    assert refused.rc != 0
    assert "has mode 0644, 0600 wanted" in refused.text
    env_file.chmod(0o600)
    played = site.play("run.yml", "-vvv", "--diff", **asked)
    assert played.rc == 0, played.text[-6000:]
    assert "exit_status=0 on 2 of 2 workers" in played.text
    times = []
    for worker in ("w0", "w1"):
        [run] = (site.fetched("both") / worker / "runs").iterdir()
        began, said, ended, status = (run / "run.log").read_text().splitlines()
        assert (said, status) == (f"token of {len(secret)}", "exit_status=0")
        times.append((int(began), int(ended)))
    assert max(began for began, _ in times) < min(ended for _, ended in times)
    needle = secret.encode()
    assert needle not in played.text.encode()
    for folder in (site.clone, site.scratch, site.inventory.parent):
        assert not [p for p in folder.rglob("*") if p.is_file() and needle in p.read_bytes()]
    for vm in site.vms:
        places = f"{ROOT} /run /tmp /var/log /etc /home /root"
        grep = f"grep -rlsF {secret} {places}; journalctl --quiet | grep -F {secret}; "
        units = f"systemctl show 'headroom-job*' | grep -F {secret}; true"
        assert vm.says("sh", "-c", grep + units) == ""


def test_a_worker_that_fails_ends_the_job_on_all_with_the_first_cause_and_every_log(site):
    words = "OSError: [Errno 28] No space left on device: '/data/checkpoint'"
    job = told(site, UNTIL_TOLD, f"echo step=0; sleep 2; echo {shlex.quote(words)}; exit 70")
    played = site.play("run.yml", run_job_file=str(job), run_job_id="fails")
    assert played.rc != 0
    assert re.search(r"w0: exit_status=143 interrupted", played.text), played.text[-4000:]
    assert re.search(r"w1: exit_status=70 failed", played.text)
    assert "w1: disk_full:" in played.text
    assert "0 of 2 workers ended with exit_status=0; w1 was first" in played.text
    for worker, last in (("w0", "exit_status=143"), ("w1", "exit_status=70")):
        [run] = (site.fetched("fails") / worker / "runs").iterdir()
        lines = (run / "run.log").read_text().splitlines()
        assert (lines[0], lines[-1]) == ("step=0", last)
    # Nothing is left that would stand in the next job's way.
    assert site.vms[0].says("docker", "ps", "--all", "--quiet") == ""


def test_a_sweep_is_shared_out_survives_its_play_and_comes_back_as_one_page(site):
    """Planned by the TPU compiler, run on both hosts; the play is killed, and given again."""
    oom = (
        "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_step': "
        "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are "
        "5.68G free, 0B reserved, and 5.68G reservable."
    )
    until_go = "until [ -e /told/go ]; do sleep 0.1; done"
    told(site, "exit 1", f"echo step=0; {until_go}; echo {shlex.quote(oom)}; exit 70")
    (site.scratch / "base.yaml").write_text(SWEPT_JOB)
    (site.scratch / "sweep.yaml").write_text(SWEEP)
    swept = {"sweep_file": str(site.scratch / "sweep.yaml"), "sweep_out": str(site.scratch / "out")}
    w1 = site.vms[1]
    first = site.start("oom_sweep.yml", **swept)
    try:
        while not w1.says("docker", "ps", "--quiet"):
            assert first.poll() is None, first.communicate(timeout=60)[0][-6000:]
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        # Its connections outlive it, and hold what it wrote to.
        first.stdout.close()
        first.wait(timeout=60)
    assert w1.says("docker", "ps", "--quiet")
    with site.start("oom_sweep.yml", **swept) as second:
        lines: list[str] = []
        for line in second.stdout:
            lines.append(line)
            if "TASK [Wait for the sweep's end" in line or "run_job : Wait for the end" in line:
                w1.says("touch", "/told/go")
    text = "".join(lines)
    assert second.returncode == 0, text[-6000:]
    report = [Path(sys.executable).with_name("headroom"), "sweep", "report", swept["sweep_out"]]
    done = subprocess.run([*report, "--json"], capture_output=True, text=True, check=True)
    rows = {row["cell"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name: (row["planned"], row["outcome"]) for name, row in rows.items()} == {
        "a": ("fits", "fits"),
        "b": ("fits", "out_of_hbm"),
        "c": ("fits", "fits"),
        "big": ("does_not_load", None),
    }
    assert rows["big"]["skipped"] == "planned not to fit"
    assert rows["b"]["diagnosis"]["numbers"]["free_bytes"] == round(5.68 * 2**30)
    assert len(rows["a"]["steps"]) == 1
    hosts = {name: rows[name]["manifest"]["host"]["name"] for name in ("a", "b", "c")}
    assert hosts == {"a": site.vms[0].name, "b": w1.name, "c": site.vms[0].name}
    # No cell ran twice, on no host; the page and the table of the play are of all of them.
    assert len(list((site.scratch / "out").glob("cells/*/runs/*/manifest.json"))) == 3
    assert "hbm_program_load" in (site.scratch / "out.html").read_text()
    assert "ran 2 fits, 1 out of HBM; 1 skipped" in text


def test_a_live_foreign_holder_of_the_lock_stops_everything_before_a_change(site):
    with lock_holder(site.vms[1]) as pid:
        site.vms[0].says("touch", LOCK)
        played = site.play("deploy.yml", vm_root="/opt/other")
        assert played.rc != 0
        assert f"process {pid} (python3 -c import fcntl" in played.text
        assert f"holds {LOCK} and is not ours" in played.text
        assert played.count("changed") == {"w0": 0, "w1": 0}
        for vm in site.vms:
            assert vm.run("ls", "/opt/other").returncode != 0
            assert vm.run("ls", LOCK).returncode == 0, "the lock file was removed"
        assert site.vms[1].run("kill", "-0", pid).returncode == 0
    # The holder is dead, its file is there: now it goes, on both.
    played = site.play("free.yml")
    assert played.rc == 0, played.text[-4000:]
    assert played.count("changed") == {"w0": 1, "w1": 1}
    assert all(vm.run("ls", LOCK).returncode != 0 for vm in site.vms)


def test_a_job_of_ours_that_runs_is_a_reason_to_refuse_and_is_stopped_when_told(site):
    vm = site.vms[0]
    told(site, UNTIL_TOLD, UNTIL_TOLD)
    label = [*("--label", "headroom=1"), *("--label", f"headroom.run_dir={ROOT}/jobs/x/runs/r")]
    bystander = ["--label", "headroom=1", "--label", "headroom.run_dir=/home/other/runs/r"]
    for name, labels in (("ours", label), ("theirs", bystander)):
        run = ("docker", "run", "--detach", "--init", "--network=none", "--volume=/told:/told:ro")
        vm.says(*run, "--name", name, *labels, SHELL)
    try:
        refused = site.play("free.yml", "--limit", "w0")
        assert refused.rc != 0
        assert "container ours of ours still runs" in refused.text
        freed = site.play("free.yml", "--limit", "w0", tpu_vm_stop_ours=True)
        assert (freed.rc, freed.count("changed")) == (0, {"w0": 1}), freed.text[-4000:]
        running = vm.says("docker", "ps", "--format", "{{.Names}}")
        assert running == "theirs"
    finally:
        vm.run("docker", "rm", "--force", "ours", "theirs")


def test_a_wrong_host_key_is_refused(site):
    known = site.inventory.parent / "wrong_known_hosts"
    lines = [vm.host_key for vm in site.vms]
    # Each VM under the other's key.
    pairs = zip(lines, reversed(lines), strict=True)
    swapped = [f"{mine.split()[0]} {other.split(maxsplit=1)[1]}" for mine, other in pairs]
    known.write_text("\n".join(swapped) + "\n")
    sockets = site.scratch / "wrong"
    played = replace(site, scratch=sockets).play("deploy.yml", known_hosts_file=str(known))
    assert played.rc != 0
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in played.text
    assert played.count("unreachable") == {"w0": 1, "w1": 1}


def test_a_full_disk_is_refused_with_its_numbers(site):
    vm = site.vms[1]
    vm.says("mkdir", "-p", "/opt/small")
    vm.says("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/opt/small")
    try:
        wish = {"/opt/small/headroom": 5}
        played = site.play("deploy.yml", vm_root="/opt/small/headroom", tpu_vm_disk_gib=wish)
        assert played.rc != 0
        assert "w1: 0.06 GiB free at /opt/small/headroom, 5 wanted" in played.text
        assert played.count("changed") == {"w0": 0, "w1": 0}
    finally:
        vm.says("umount", "/opt/small")


def test_a_tree_that_differs_from_its_commit_is_refused(site):
    stray = site.clone / "stray.txt"
    stray.write_text("not of the commit\n")
    try:
        played = site.play("deploy.yml")
    finally:
        stray.unlink()
    assert played.rc != 0
    assert "differs from its commit" in played.text
    assert "?? stray.txt" in played.text


def test_a_half_done_deployment_heals_and_a_rollback_goes_back(site):
    first, vm = site.head(), site.vms[1]
    (site.clone / "jobs" / "another.yaml").write_text("# another commit\n")
    git(site.clone, "add", "--all")
    git(site.clone, "commit", "--all", "--quiet", "--message=another")
    second = site.head()
    try:
        # As a broken connection leaves it: half a checkout, half an environment.
        vm.says("mkdir", "-p", f"{ROOT}/releases/{second}.unfinished/.git")
        vm.says("rm", f"{ROOT}/tools/rattler/lock.txt")
        prefix = "/root/miniconda3/envs/mllm-jax"
        vm.says("touch", f"{prefix}/conda-meta/headroom-unfinished")
        vm.says("rm", f"{prefix}/bin/python3.12")
        # The packages of release two are those of one: what is shipped is tested above.
        played = site.play("deploy.yml", "--limit", "w1", headroom_image_from="none")
        assert played.rc == 0, played.text[-4000:]
        assert vm.says("git", "-C", f"{ROOT}/current", "rev-parse", "HEAD") == second
        assert vm.says("headroom", "status", "--json") == "[]"
        back = site.play("rollback.yml", "--limit", "w1")
        assert back.rc == 0, back.text[-4000:]
        assert vm.says("git", "-C", f"{ROOT}/current", "rev-parse", "HEAD") == first
        assert vm.says("readlink", f"{ROOT}/previous") == f"{ROOT}/releases/{second}"
        assert vm.says("headroom", "status", "--json") == "[]"
    finally:
        git(site.clone, "reset", "--quiet", "--hard", first)
