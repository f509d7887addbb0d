"""The README tells the truth: what it names exists, and every command and target is in it."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import spec
from runner import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme_and_has_help_with_an_example():
    for name, command in cli.main.commands.items():
        assert f"| `headroom {name}" in README, name
        shown = CliRunner().invoke(cli.main, [name, "--help"])
        assert shown.exit_code == 0
        assert f"headroom {name} " in f"{command.help} "


def test_every_command_in_the_readme_exists():
    named = set(re.findall(r"(?:^|`)headroom ([a-z]+)", README, re.MULTILINE))
    assert named == set(cli.main.commands)


def test_every_make_target_is_in_the_readme():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE))
    assert {"smoke", "test", "image"} <= targets
    for target in targets:
        assert f"make {target}" in README or f"`{target}`" in README, target


def test_every_job_is_in_the_readme():
    for path in (ROOT / "jobs").glob("*.yaml"):
        if path.name.endswith(".fit.yaml"):  # what `headroom fit` wrote here: a user's own
            continue
        assert f"`jobs/{path.name}`" in README


def test_the_map_has_every_file_and_no_other():
    text, folder = README.partition("## File map")[2].partition("`runner`")[0], ""
    named = set()
    for line in text.splitlines():
        if begins := re.match(r"(\w[\w/]*/) ", line):
            folder = begins[1]
        named |= {f"{folder}{name}" for name in re.findall(r"\w+\.(?:py|md)\b", line)}
    found = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("jobs/*.py", "runner/*.py", "trainer/**/*.py", "benchmarks/*.py", "docs/*")
        for path in ROOT.glob(pattern)
        if path.name != "__init__.py"
    }
    assert named == found


@pytest.mark.parametrize("design", ["layer_major", "reference"])
def test_the_losses_and_designs_it_names_are_the_jobs(design):
    assert f"`{design}`" in README
    losses = spec.Train.model_fields["loss"].annotation.__args__
    assert all(f"`{loss}`" in README for loss in losses)


def test_the_mistakes_it_shows_are_what_a_person_sees(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "nmae: x\nname: x\naccelerator: cpu\nmodel: tiny\n"
        "rollout: {group_size: 8}\ntrain: {micro_batch_size: 5}\n"
    )
    with pytest.raises(spec.JobError) as caught:
        spec.load(path)
    said = {str(p).replace(str(path), "jobs/x.yaml") for p in caught.value.problems}
    shown = re.findall(r"^Error: (jobs/x.yaml: .*?)(?: \.\.\.)?$", README, re.MULTILINE)
    assert len(shown) == 2
    assert all(any(line.startswith(text) for line in said) for text in shown)
