"""The files around the code agree with it."""

import json
import re
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import ROOT

import cli
import evaluate
import sample
import settings
from evaluate import EvaluateConfig
from sample import SampleConfig
from train import DEMO, Config, check_config

README = (ROOT / "README.md").read_text()
TOUR = json.loads((ROOT / "ddpm_test.ipynb").read_text())["cells"]
PROSE = "\n".join([README, *("".join(cell["source"]) for cell in TOUR)])
BASH = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"\b((?:train|sample|evaluate)\.py .*)", BASH.replace("\\\n", " "))


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith(("-r", "#")))


def test_requirements_and_pyproject_list_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["project"]["dependencies"]) == requirements("requirements.txt")
    assert sorted(project["dependency-groups"]["dev"]) == requirements("requirements-test.txt")


def test_each_module_imports_only_what_the_design_allows():
    ours = {p.stem for p in ROOT.glob("*.py")}
    allowed = {
        "group_norm_cpu": set(),
        "unet": {"group_norm_cpu"},
        "diffusion": set(),
        "ema": set(),
        "errors": set(),
        "settings": {"errors"},
        "synthetic": set(),
        "device": set(),
        "files": {"errors"},
        "images": {"files"},
        "cli": {"errors"},
        "log": {"files", "images"},
        "utils": {"ema", "errors", "files", "log", "settings", "unet"},
        "safety": {"errors", "files"},
        "sources": {"errors"},
        "dataset": {"errors", "images", "sources", "synthetic"},
        "likelihood": {"dataset", "diffusion", "images"},
        "metrics": {"dataset", "errors", "images"},
        "generate": {"device", "diffusion", "errors", "images", "unet", "utils"},
        "sample": ours - {"train", "evaluate", "sample", "safety", "metrics", "likelihood"},
        "train": ours - {"train", "evaluate", "sample", "metrics"},
        "evaluate": ours - {"train", "evaluate", "sample", "safety", "unet", "ema"},
    }
    assert set(allowed) == ours
    for name, may in allowed.items():
        text = (ROOT / f"{name}.py").read_text()
        imported = re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE)
        assert set(imported) & ours <= may, name


def test_readme_holds_the_table_of_constants_that_the_code_gives():
    """python -c "import settings, train; print(settings.markdown(train.Config))" writes it."""
    assert settings.markdown(Config) in README


def test_every_flag_in_the_readme_and_the_tour_exists():
    known = {
        field.name for cls in (Config, SampleConfig, EvaluateConfig) for field in fields(cls)
    } | {
        "demo",
        "help",
    }
    known |= {f"no_{field.name}" for field in fields(Config) if field.type in ("bool", bool)}
    others = {"logdir", "num_processes", "cpu", "num_machines", "machine_rank"}  # of other programs
    others |= {"main_process_ip", "main_process_port", "nproc_per_node", "inplace"}
    assert set(re.findall(r"(?<![\w-])--([a-z_]+)", PROSE)) <= known | others


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_understood(command):
    script, *flags = shlex.split(command.partition(" && ")[0], comments=True)
    if script == "sample.py":
        sample.check_config(cli.parse(SampleConfig, flags, ""))
    elif script == "evaluate.py":
        evaluate.check_config(cli.parse(EvaluateConfig, flags, ""))
    else:
        default = replace(Config(), **DEMO) if "--demo" in flags else Config()
        flags = [flag for flag in flags if flag != "--demo"]
        check_config(cli.parse(Config, flags, "", default))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:\]\(|src=\")([^)#\"]+)", PROSE))))
def test_every_link_to_a_file_exists(target):
    assert target.startswith("https://") or (ROOT / target).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.(?:py|ipynb|toml|cff))`", PROSE))))
def test_every_file_that_is_named_exists(name):
    assert [path for path in (ROOT, ROOT / "tests", ROOT / "benchmarks") if (path / name).exists()]


def test_every_module_and_picture_is_in_the_readme():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert f"`{path.name}`" in README, path.name
    for path in (ROOT / "assets").iterdir():
        assert f'src="assets/{path.name}"' in README and path.stat().st_size < 300_000, path.name


def test_demo_changes_only_what_config_has():
    names = {field.name for field in fields(Config)}
    assert set(DEMO) <= names
    for name, value in DEMO.items():
        assert value != getattr(Config(), name), f"{name} is no change"


def test_nothing_happens_at_import(tmp_path):
    """No parsing of arguments, no files, no CUDA call."""
    import subprocess
    import sys

    modules = sorted(p.stem for p in ROOT.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--bad']\n"
    code += f"import {', '.join(modules)}, torch; print(torch.cuda.is_initialized())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "False\n", result.stderr
    assert not list(Path(tmp_path).iterdir())
