"""`headroom fit`: what it asks of the trainer, and the job file that it writes."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from fakes import trainer

from jobs import spec
from jobs.records import Fit, FitChange, FitPoint
from runner.cli import main
from runner.fit_file import FitFileError, fit_text, write
from runner.fit_table import answer
from runner.planning import FitAsked, fit_argv
from runner.terminal import World

GIB = 2**30
ROOT = Path(__file__).parents[1]
SOP = ROOT / "jobs" / "sop_bs32_len1024.yaml"
SCHEMA = json.loads((ROOT / "jobs" / "job.schema.json").read_text())
NEW = {
    "update.design": "layer_major",
    "update.host_offload": ["momentum", "lo"],
    "train.micro_batch_size": 8,
    "rollout.engine": "naive",
}
PROGRAM = {
    "arguments_bytes": GIB,
    "outputs_bytes": 0,
    "reserved_bytes": GIB,
    "code_bytes": 0,
    "free_bytes_at_load": 20 * GIB,
    "code_assumed": False,
    "estimated": False,
}


def planned(job):
    return {
        "job": job.name,
        "job_sha256": job.digest,
        "accelerator": "v4-8",
        "verdict": "fits",
        "usable_bytes": 30 * GIB,
        "peak_bytes": 17 * GIB,
        "headroom_bytes": 13 * GIB,
        "deciding_phase": "update",
        "deciding_owner": "moments",
        "phases": {"update": {"moments": 17 * GIB}},
        "programs": {"update": PROGRAM},
        "host_bytes": 0,
    }


def change(key, old, new):
    return FitChange(
        key=key, old=old, new=new, why=f"{key} why", saves_bytes=GIB, saves_s=-0.5, price="dear"
    )


def found(file, *overrides, new=NEW, plan=True):
    """What the trainer would say of a job file: those changes."""
    asked = spec.load(file, overrides=overrides)
    settings = [f"{key}={json.dumps(value)}" for key, value in new.items()]
    then = spec.load(file, overrides=(*overrides, *settings))
    tree = asked.model_dump(mode="json")
    old = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in new}
    return Fit(
        job=asked.name,
        accelerator=asked.accelerator,
        margin_bytes=12 * GIB,
        changes=[change(key, old[key], value) for key, value in new.items()] if plan else [],
        plan=planned(then) if plan else None,
        step={"update_compute_s": 3.0, "decode_s": 4.5},
        asked_step_s=15.0,
        front=[
            FitPoint(
                settings=['update.host_offload=["lo"]'],
                step_s=7.5,
                peak_bytes=17 * GIB,
                fits=True,
                exact=False,
                runs=False,
            )
        ],
        shortfall_bytes=None if plan else 2 * GIB,
        smallest_accelerator=None if plan else "v5p-8",
        notes=["times are a model"],
    )


WRITES = (
    "import pathlib, sys\n"
    "print('update on v4-8: compiling ...', flush=True)\n"
    "(pathlib.Path(sys.argv[2]).parent / 'fit.json').write_text({text!r})\n"
    "raise SystemExit({code})\n"
)


def call(fit, *arguments, code=0):
    world = World(trainer=trainer(WRITES.format(text=fit.model_dump_json(), code=code)))
    return CliRunner().invoke(main, ["fit", *map(str, arguments)], obj=world)


def test_the_file_is_the_job_that_was_planned_and_obeys_the_schema(tmp_path):
    file = tmp_path / "sop.fit.yaml"
    ran = call(found(SOP), SOP, "--out", file)
    assert ran.exit_code == 0
    assert f"headroom: wrote {file}" in ran.stderr
    assert "headroom: update on v4-8: compiling ..." in ran.stderr
    jsonschema.validate(yaml.safe_load(file.read_text()), SCHEMA)
    made, asked = spec.load(file), spec.load(SOP)
    assert made == spec.load(SOP, overrides=[f"{k}={json.dumps(v)}" for k, v in NEW.items()])
    assert made.container == asked.container  # keys of the user that nothing touched
    first = file.read_text().splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / schema).resolve() == ROOT / "jobs" / "job.schema.json"


def test_each_changed_key_has_its_comment_on_its_line_and_no_other_key_has(tmp_path):
    fit = found(SOP)
    text = fit_text(yaml.safe_load(SOP.read_text()), fit, folder=tmp_path, asked=SOP.name)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    commented = [line for line in lines if "  # " in line]
    assert {re.match(r" *(\w+):", line)[1] for line in commented} == {
        key.split(".")[1] for key in NEW
    }
    [design] = [line for line in commented if line.startswith("  design:")]
    assert design == (
        "  design: layer_major  # was reference: update.design why; saves 1.00 GiB of the peak by "
        "formulas; 0.50 s a step slower by the model; price: dear"
    )


def test_what_was_set_is_in_the_file_and_odd_texts_survive(tmp_path):
    asked = tmp_path / "a job.yaml"
    # The same text for Python and for YAML.
    odd = "two\nlines: # 'and' \"quotes\" \u2028 \U0001f600 {x}"
    written = r"""two\nlines: # 'and' \"quotes\" \u2028 \U0001f600 {x}"""
    asked.write_text(f'{SOP.read_text()}system_prompt: "{written}"\n')
    sets = ("train.learning_rate=1e-7", "data.source=arithmetic")
    write(asked, sets, found(asked, *sets), to=tmp_path / "x.yaml", force=False)
    made = spec.load(tmp_path / "x.yaml")
    assert (made.system_prompt, made.train.learning_rate) == (odd, 1e-7)
    assert made.data.source == "arithmetic"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_there_is_kept_unless_force_is_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    refused = call(found(SOP), SOP, "--out", file)
    assert refused.exit_code == 1
    assert "is there already" in refused.stderr
    assert "compiling" not in refused.stderr  # said before any work
    assert file.read_text() == "mine"
    assert call(found(SOP), SOP, "--out", file, "--force").exit_code == 0
    assert spec.load(file).update.design == "layer_major"


def test_the_default_name_lies_beside_the_job(tmp_path):
    job = tmp_path / "a.yaml"
    job.write_text(SOP.read_text())
    assert call(found(job), job).exit_code == 0
    assert (tmp_path / "a.fit.yaml").is_file()


def test_another_job_than_was_planned_is_not_written(tmp_path):
    fit = found(SOP)
    other = fit.model_copy(update={"plan": fit.plan.model_copy(update={"job_sha256": "0"})})
    with pytest.raises(FitFileError, match="another job than was planned"):
        write(SOP, (), other, to=tmp_path / "x.yaml", force=False)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_fits_the_code_is_3_and_no_file_is_written(tmp_path):
    fit = found(SOP, plan=False)
    ran = call(fit, SOP, "--out", tmp_path / "x.yaml", code=3)
    assert ran.exit_code == 3
    assert "short by 2.00 GiB, 12.00 GiB to be left" in ran.stdout
    assert "would: v5p-8" in ran.stdout
    assert list(tmp_path.iterdir()) == []
    assert "larger accelerator" in answer(fit.model_copy(update={"smallest_accelerator": None}))


def test_json_is_the_record_and_the_table_says_that_times_are_modelled(tmp_path):
    fit = found(SOP)
    ran = call(fit, SOP, "--out", tmp_path / "x.yaml", "--json")
    assert Fit.model_validate_json(ran.stdout) == fit
    shown = call(fit, SOP, "--out", tmp_path / "y.yaml").stdout
    assert '["lo"]' in shown
    assert "does not run in this version" in shown
    assert "modelled, not measured: 7.50 s a step" in shown


def test_the_child_is_asked_for_exactly_what_the_user_asked():
    asked = FitAsked(
        margin_gib=2.5, exact=True, quick=True, engine_weights="replicated", limit_s=9.0
    )
    assert fit_argv(("t",), Path("/a b/job.json"), asked) == [
        *("t", "fit", "/a b/job.json", "--limit", "9", "--engine-weights", "replicated"),
        *("--margin", "2.5", "--quick", "--exact"),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--margin", "-1"), "--margin -1"), (("--set", "nmae=1"), "unknown key")],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, arguments, says):
    ran = call(found(SOP), SOP, "--out", tmp_path / "x.yaml", *arguments)
    assert ran.exit_code == 1
    assert says in ran.stderr


OOM = (
    "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Error loading program 'jit_training_step': "
    "Attempting to reserve 7.82G at the bottom of memory. That was not possible. There are 5.68G "
    "free, 0B reserved, and 5.68G reservable."
)
# A trainer that fits as it is told, and runs out of HBM in any setting but the fitted one.
RUNS_WHEN_FITTED = (
    "import json, pathlib, sys\n"
    "verb, file = sys.argv[1], pathlib.Path(sys.argv[2])\n"
    "if verb == 'fit':\n"
    "    (file.parent / 'fit.json').write_text({text!r})\n"
    "    raise SystemExit({code})\n"
    "if json.loads(file.read_text())['update']['design'] != 'layer_major':\n"
    "    print({says!r})\n"
    "    raise SystemExit(70)\n"
)


def run_with_refit(folder, fit, *, code=0, says=OOM):
    program = RUNS_WHEN_FITTED.format(text=fit.model_dump_json(), code=code, says=says)
    world = World(trainer=trainer(program))
    argv = ["run", SOP, "--where", "process", "--runs", folder / "runs", "--refit"]
    done = CliRunner().invoke(main, list(map(str, argv)), obj=world)
    manifests = [json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/manifest.json"))]
    return done, manifests


def test_a_job_out_of_hbm_is_run_once_more_as_it_fits_and_both_runs_are_kept(tmp_path):
    done, (first, second) = run_with_refit(tmp_path, found(SOP))
    assert done.exit_code == 0, done.output
    assert (first["exit_status"]["code"], second["exit_status"]["code"]) == (70, 0)
    assert second["retry_of"] == first["run"]
    [ran] = tmp_path.glob(f"runs/{second['run']}/job.json")
    settings = [f"{key}={json.dumps(value)}" for key, value in NEW.items()]
    assert spec.load(ran) == spec.load(SOP, overrides=settings)
    assert (tmp_path / "runs" / first["run"] / "refit.yaml").is_file()
    assert "refit: update.design = layer_major" in done.stderr


@pytest.mark.parametrize(
    ("fit", "code", "says", "told"),
    [
        (found(SOP, plan=False), 3, OOM, "no refit: nothing fits v4-8: short by 2.00 GiB"),
        (found(SOP, new={}), 0, OOM, "no refit: by the plan it fits as it is"),
        (found(SOP), 5, OOM, "no refit: "),
        (found(SOP), 0, "ValueError: no memory of HBM", None),
    ],
)
def test_nothing_is_run_again_where_no_other_setting_is_found(tmp_path, fit, code, says, told):
    done, manifests = run_with_refit(tmp_path, fit, code=code, says=says)
    assert len(manifests) == 1
    assert done.exit_code in (4, 5)
    assert ("refit" in done.stderr) == (told is not None)
    assert told is None or told in done.stderr
