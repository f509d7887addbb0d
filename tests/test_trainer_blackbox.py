"""When memory runs out the run leaves who held it, by the arrays that are alive."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from jobs import spec
from jobs.aftermath import BlackBox
from runner.cli import main
from tests.test_trainer_main import CACHE, failure, run, write
from trainer import blackbox
from trainer.architecture import leaf_shapes
from trainer.mesh import make_mesh
from trainer.phases import residents
from trainer.rollout.naive import NaiveRollout
from trainer.update.masters import Split
from trainer.update.program import make_update
from trainer.weights import TINY_ARCHITECTURE, load_params, open_model

ELEMENTS = sum(math.prod(shape) for shape in leaf_shapes(TINY_ARCHITECTURE).values())
# Keys and values of so many completions are 2 TB: no machine has them.
MUCH = {"prompts_per_step": 2, "group_size": 2**22, "max_completion_tokens": 128}


def box(folder):
    return BlackBox.model_validate_json((folder / "blackbox.json").read_text())


def test_a_run_that_runs_out_of_memory_leaves_who_held_it(tmp_path):
    (tmp_path / "runs").mkdir()
    asked = {"steps": 1, "rollout": MUCH, "train": {"optimizer": "lion"}}
    code, out, err = run("train", write(tmp_path, **asked, update={"design": "layer_major"}))
    assert code == 70, out + err
    assert failure(tmp_path).phase == "rollout"
    found = box(tmp_path)
    assert (found.phase, found.step) == ("rollout", 0)
    assert "Out of memory allocating" in found.error
    assert found.error == failure(tmp_path).message
    owners = {one.owner: one for one in found.live}
    # bf16 and 16 bits more of each parameter, one bf16 moment, and the sampler's own bf16 copy.
    for owner in ("parameters hi", "parameters lo", "moments", "sampler weights"):
        assert owners[owner].size_bytes == 2 * ELEMENTS
        assert owners[owner].known_by == "identity"
    # What no one claims: the request, and what the program should have filled.
    assert "1 x uint32[8388608]: 0.03 GiB" in owners["other"].largest
    assert any("int32[8388608,128]" in kind for kind in owners["other"].largest)
    assert found.live_bytes == sum(one.size_bytes for one in found.live)
    # The CPU tells no HBM, and the plan has nothing to say of it.
    assert (found.memory_stats, found.planned, found.notes) == ([], {}, [])
    assert "black box: " in out


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A job for two devices, its state and its sampler, as the loop has them."""
    path = write(
        tmp_path_factory.mktemp("held"), accelerator="cpu-2", update={"design": "layer_major"}
    )
    job = spec.load(path)
    model = open_model(job.model)
    mesh = make_mesh(job, jax.devices()[:2])
    update = make_update(job, model.architecture, mesh)
    state = update.init(load_params(model, lambda _, leaf: leaf))
    rollout = NaiveRollout(job, model.architecture, mesh, eos_ids=model.eos_ids)
    rollout.hand_over(update.params(state))
    return job, state, rollout


def of(job, holds, error="RESOURCE_EXHAUSTED: no"):
    made = blackbox.record(job, RuntimeError(error), phase="update", step=3, holds=holds)
    return made, {one.owner: one for one in made.live}


def on(device, tree):
    """Bytes of a tree's shards on one device, by the shards themselves."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if str(shard.device) == device
    )


def test_bytes_are_those_of_the_fullest_chip(held):
    job, state, rollout = held
    extra = jax.device_put(jnp.ones((64, 1024), jnp.float32), jax.devices()[1])
    made, owners = of(job, lambda: {"state": state, "mine": extra, **rollout.held()})
    # The second has an array more, and half of everything else.
    assert made.device == str(jax.devices()[1])
    assert owners["mine"].size_bytes == 64 * 1024 * 4
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Split))
    masters = [x for x in leaves if isinstance(x, Split)]
    assert owners["parameters hi"].size_bytes == on(made.device, [one.hi for one in masters])
    assert owners["parameters lo"].size_bytes == on(made.device, [one.lo for one in masters])
    assert owners["sampler weights"].size_bytes == on(made.device, rollout.weights)
    assert (made.phase, made.step) == ("update", 3)


def test_what_a_broken_update_left_of_the_state_is_known_by_its_shapes(held):
    job, state, _ = held
    new = jnp.zeros((2, 128, 256), jnp.int16)  # a new `lo` of gate, not yet anybody's
    _, owners = of(job, lambda: {"state": state})
    before = owners.get("state (by shape)")
    del owners
    _, owners = of(job, lambda: {"state": state})
    assert owners["state (by shape)"].known_by == "shape"
    assert before is not None
    assert owners["state (by shape)"].size_bytes == before.size_bytes >= new.nbytes


def test_what_is_the_states_own_is_counted_once(held):
    job, state, _ = held
    hi = [leaf.master.hi for leaf in (state["embed"], state["head"])]
    _, without = of(job, lambda: {"state": state})
    _, owners = of(job, lambda: {"state": state, "engine weights": hi})
    assert "engine weights" not in owners
    assert owners["parameters hi"].size_bytes == without["parameters hi"].size_bytes


def test_the_plan_stands_beside_it_where_there_is_hbm(tmp_path):
    path = write(tmp_path, accelerator="v4-8", rollout={"prompts_per_step": 2})
    job = spec.load(path)
    made, _ = of(job, dict)
    assert made.planned == residents(job, TINY_ARCHITECTURE, build="sharded").phases["update"]
    assert sum(made.planned.values()) > 4 * ELEMENTS / 4


def test_nothing_that_goes_wrong_in_it_hides_the_error(tmp_path, held, caplog):
    job, _, _ = held

    def broken():
        raise AttributeError("half made")

    made, _ = of(job, broken)
    assert made.notes == ["what the loop holds is not known: AttributeError: half made"]
    where = SimpleNamespace(phase="load", step=-1, holds=dict)
    blackbox.write(job, tmp_path / "not" / "there", MemoryError(), where=where)
    assert "no black box: FileNotFoundError" in caplog.text


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("Not enough memory. Please try to increase --mem-fraction-static."), True),
        (ValueError("RESOURCE_EXHAUSTED: Error allocating device buffer"), True),
        (ValueError("a batch of 5"), False),
    ],
)
def test_errors_of_memory_are_known_by_their_words(error, is_one):
    assert blackbox.is_of_memory(error) is is_one
    outer = KeyError("outer")
    outer.__cause__ = error
    assert blackbox.is_of_memory(outer) is is_one


def test_the_cpus_own_error_is_one_of_them():
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jax.block_until_ready(jnp.zeros((10**7, 10**7), jnp.float32))
    assert blackbox.is_of_memory(caught.value)


def test_the_runner_tells_it_in_a_line(tmp_path):
    more = f"steps: 1\nrollout: {json.dumps(MUCH)}\nsystem_prompt: ''\n"
    (tmp_path / "job.yaml").write_text(
        f"name: full\naccelerator: cpu\nmodel: tiny\ncache_dir: {json.dumps(str(CACHE))}\n{more}"
    )
    argv = ["run", str(tmp_path / "job.yaml"), "--where", "process", "--retries", "2"]
    done = CliRunner().invoke(main, [*argv, "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 4, done.output
    [folder] = (tmp_path / "runs").iterdir()
    told = json.loads((folder / "diagnosis.json").read_text())
    assert told["cause"] == "host_oom"
    said = told["advice"][0]
    assert "of arrays were alive on TFRT_CPU_0 in rollout: " in said
    assert "sampler weights 0.00 GiB, " in said
    assert said.endswith("(blackbox.json).")
    assert said in CliRunner().invoke(main, ["show", str(folder)]).stdout
    assert Path(folder / "blackbox.json").is_file()
    assert np.isclose(box(folder).live_bytes, sum(one.size_bytes for one in box(folder).live))
