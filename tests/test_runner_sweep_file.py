"""A sweep file: the cells that it makes, and everything that can be wrong with it."""

import itertools
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from fakes import write_job
from hypothesis import given
from hypothesis import strategies as st

from jobs import spec
from jobs.source import MAX_FILE_BYTES
from jobs.spec import load
from runner import sweep_schema
from runner.matrix import named, places
from runner.sweep_file import SweepError, expand

JOBS = Path(spec.__file__).parent
HEAD = "name: s\njob: job.yaml\n"


def write(folder, text):
    write_job(folder)
    path = folder / "s.yaml"
    path.write_text(text)
    return path


def refused(folder, text):
    with pytest.raises(SweepError) as caught:
        expand(write(folder, text))
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_named_cells_come_first_then_the_matrix_its_last_axis_changing_fastest(tmp_path):
    text = (
        f"{HEAD}cells:\n  base: {{}}\n  cold: {{set: {{rollout.temperature: 0}}}}\n"
        "matrix:\n  seed: [1, 2]\n  rollout.group_size: [2, 4, 8]\n"
        "exclude: [{seed: 2, rollout.group_size: 4}]\nmonotone: [rollout.group_size]\n"
    )
    found = expand(write(tmp_path, text))
    expected = [(a, b) for a, b in itertools.product([1, 2], [2, 4, 8]) if (a, b) != (2, 4)]
    assert [cell.name for cell in found.cells] == [
        "base",
        "cold",
        *(f"seed-{a}_group_size-{b}" for a, b in expected),
    ]
    assert found.cells[1].settings == {"rollout.temperature": 0}
    assert found.cells[1].place == {}
    last = found.cells[-1]
    assert last.place == last.settings == {"seed": 2, "rollout.group_size": 8}
    # The user's keys, with the changes and the cell's name on top; no default is spelled out.
    own = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert last.tree == own | {"name": last.name, "seed": 2, "rollout": {"group_size": 8}}
    assert found.axes == {"seed": [1, 2], "rollout.group_size": [2, 4, 8]}
    # The base job is on a CPU: there is no HBM to plan.
    assert {cell.planned_for for cell in found.cells} == {None}
    found = expand(write(tmp_path, f"{text}plan_for: v4-8\n"))
    assert {cell.planned_for for cell in found.cells} == {"v4-8"}


def test_a_cell_has_a_base_of_its_own_and_one_without_hbm_alone_is_planned_for_another(tmp_path):
    (tmp_path / "sub").mkdir()
    job = "name: t\naccelerator: v5e-8\nmodel: tiny\n"
    (tmp_path / "sub" / "tpu.yaml").write_text(job)
    text = f"{HEAD}plan_for: v4-8\ncells: {{a: {{}}, b: {{job: sub/tpu.yaml}}}}\n"
    a, b = expand(write(tmp_path, text)).cells
    assert (a.planned_for, b.planned_for) == ("v4-8", "v5e-8")
    assert b.tree == yaml.safe_load(job) | {"name": "b"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("job: job.yaml\ncells: {a: {}}", "s.yaml: the sweep has no 'name'; add it: Names the"),
        ("name: s\ncells: {a: {}}", "the sweep has no 'job'; add it: The base job's file"),
        (f"{HEAD}cels: {{}}", "unknown key 'cels'; did you mean 'cells'?; known keys: name, job"),
        (HEAD, "there are no cells: write some below cells, or axes below matrix"),
        (
            f"{HEAD}cells: {{a: {{sett: {{}}}}}}",
            "unknown key 'cells.a.sett'; did you mean 'cells.a",
        ),
        (f"{HEAD}cells: {{a: 3}}", "cells.a = 3 is not a group of keys"),
        (f"{HEAD}cells: [a]", "cells = ['a'] is not keys and values"),
        (f"{HEAD}cells: {{'../a': {{}}}}", "may hold 1 to 64 letters"),
        (f"{HEAD}cells: {{a: {{job: no.yaml}}}}", "job no.yaml: no.yaml: there is no such file"),
        (f"{HEAD}cells: {{a: {{set: {{stepz: 1}}}}}}", "cells.a.set: unknown key 'stepz'; did you"),
        (f"{HEAD}cells: {{a: {{set: {{steps: x}}}}}}", "cells.a.set: steps = x is not a whole"),
        (
            f"{HEAD}cells: {{a: {{set: {{rollout: {{}}}}}}}}",
            "rollout sets a group of keys: set them",
        ),
        (f"{HEAD}cells: {{a: {{set: {{rollout: 5}}}}}}", "rollout = 5 is not a group of keys"),
        (f"{HEAD}cells: {{a: {{set: {{name.x: 5}}}}}}", "name is a value, not a group of keys"),
        (f"{HEAD}cells: {{a: {{set: {{a..b: 5}}}}}}", "'a..b' is not of the form key.path"),
        (f"{HEAD}matrix: {{seed: []}}", "matrix: seed has no values"),
        (f"{HEAD}matrix: {{seed: 3}}", "matrix.seed = 3 is not a list"),
        (f"{HEAD}matrix: {{seed: [1, 1]}}", "matrix: seed has 1 twice: leave one out"),
        (f"{HEAD}matrix: {{seed: [-1]}}", "matrix: seed = -1 is below 0, the least it can be"),
        (f"{HEAD}matrix: {{seeed: [1]}}", "matrix: unknown key 'seeed'; did you mean 'seed'?"),
        (
            f"{HEAD}matrix: {{seed: [{', '.join(map(str, range(101)))}], "
            f"steps: [{', '.join(map(str, range(100)))}]}}",
            "10100 cells (0 named, matrix 101 (seed) x 100 (steps)): 10000 at most",
        ),
        # What is too much is not looked at further.
        (
            f"{HEAD}matrix: {{seed: [{', '.join(['1'] * 10_001)}]}}",
            "10001 cells (0 named, matrix 10001 (seed)): 10000 at most",
        ),
        (f"{HEAD}matrix: {{name: [a, b]}}", "matrix: name is the cell's own"),
        (f"{HEAD}cells: {{a: {{set: {{name: b}}}}}}", "cells.a.set: name is the cell's own"),
        (f"{HEAD}matrix: {{seed: [1]}}\nexclude: [{{sed: 1}}]", "exclude: 'sed' is no axis"),
        (f"{HEAD}matrix: {{seed: [1]}}\nexclude: [{{seed: 2}}]", 'exclude: {"seed": 2} matches no'),
        (f"{HEAD}matrix: {{seed: [1]}}\nexclude: [{{}}]", "exclude: {} is every cell"),
        (f"{HEAD}matrix: {{seed: [1]}}\nexclude: [{{seed: 1}}]", "exclude leaves none of the 1"),
        (f"{HEAD}matrix: {{seed: [1]}}\nmonotone: [steps]", "monotone: 'steps' is no axis of the"),
        (f"{HEAD}matrix: {{model: [a]}}\nmonotone: [model]", 'model has the value "a": only numb'),
        (f"{HEAD}matrix: {{seed: [1]}}\ncells: {{SEED-1: {{}}}}", "the name SEED-1 is seed-1's al"),
        (f"{HEAD}cells: {{a: {{}}, A: {{}}}}", "cells: the name A is a's already"),
        (f"{HEAD}cells: {{a: {{}}, a: {{}}}}", "key 'a' stands twice (line 3): leave one out"),
        (f"{HEAD}cells: {{a: {{}}}}\nplan_for: v9", "plan_for = v9 is no accelerator we know"),
        (f"{HEAD}cells: {{a: {{}}}}\nplan_for: cpu", "plan_for = cpu has no HBM: name a TPU type"),
        (f"{HEAD}cells: {{a: {{}}}}\nrun_set: [steps]", "run_set: steps: is not of the form"),
        (f"{HEAD}cells: {{a: {{}}}}\nrun_set: [steps=-1]", "run_set: steps=-1: steps = -1 is bel"),
        ("[]", "holds list, not keys and values"),
        ("a: [", "is not YAML"),
        ("#" * (MAX_FILE_BYTES + 1), "not a sweep file"),
    ],
)
def test_a_bad_sweep_says_what_is_wrong_on_one_line(tmp_path, text, says):
    [line] = refused(tmp_path, text)
    assert says in line
    assert line.startswith("s.yaml: ")


def test_a_sweep_file_that_is_not_there_is_no_job_that_is_not_there(tmp_path):
    with pytest.raises(SweepError, match=r"no\.yaml: there is no such file$"):
        expand(tmp_path / "no.yaml")


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    lines = refused(
        tmp_path, f"{HEAD}matrix: {{seed: [-1, x], steps: [0]}}\nrun_set: [bad]\nplan_for: tpu\n"
    )
    assert len(lines) == 4


def test_values_that_contradict_each_other_are_no_mistake_of_the_sweep(tmp_path):
    # 4 prompts of 4 completions: 16 sequences do not make micro-batches of 5.
    found = expand(write(tmp_path, f"{HEAD}matrix: {{train.micro_batch_size: [4, 5]}}\n"))
    assert [cell.name for cell in found.cells] == ["micro_batch_size-4", "micro_batch_size-5"]


@pytest.mark.parametrize("path", sorted(JOBS.glob("*_sweep.yaml")), ids=lambda p: p.stem)
def test_every_sweep_that_comes_along_has_the_sops_runs_first_and_jobs_that_load(path, tmp_path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=sweep.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), json.loads(sweep_schema.SCHEMA_FILE.read_text()))
    found = expand(path)
    assert found.name == path.stem
    assert {cell.planned_for for cell in found.cells} == {"v4-8"}
    # The keys are the job files' own, under another name.
    sops = ["sop_smoke", "sop_bs32_len1024", "sop_bs32_len1024_kv1536", "sop_bs32_len1024_mem035"]
    for cell, sop in zip(found.cells, sops, strict=False):
        asked = yaml.safe_load((JOBS / f"{sop}.yaml").read_text())
        assert cell.tree == asked | {"name": cell.name}
    for cell in found.cells:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(cell.tree))
        assert load(tmp_path / "job.yaml").name == cell.name
        assert load(tmp_path / "job.yaml", overrides=found.run_set).steps >= 1


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=80), st.lists(st.integers())
)


@given(
    matrix=st.dictionaries(
        st.sampled_from(
            ["seed", "rollout.group_size", "engine.page_size", "x.group_size", "model"]
        ),
        st.lists(values, min_size=1, max_size=4, unique_by=json.dumps),
        min_size=1,
        max_size=4,
    )
)
def test_names_are_safe_and_no_two_are_alike_in_any_case(matrix):
    names = named(list(places(matrix, ())))
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) for name in names)


def test_the_committed_schema_is_current_and_knows_what_the_model_knows():
    text = sweep_schema.SCHEMA_FILE.read_text()
    assert text == sweep_schema.schema_text(), "run: make schema"
    good = {"name": "x", "job": "j.yaml", "cells": {"a": {"set": {"steps": 1}}}}
    jsonschema.validate(good, json.loads(text))
    with pytest.raises(jsonschema.ValidationError, match="sett"):
        jsonschema.validate(good | {"cells": {"a": {"sett": {}}}}, json.loads(text))
