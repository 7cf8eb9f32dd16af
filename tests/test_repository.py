"""The files around the code agree with it."""

import importlib
import inspect
import json
import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny, write_pictures

import convert
import evaluate
import sample
from convert import ConvertConfig
from evaluate import EvaluateConfig
from sample import SampleConfig
from system import flags
from train import DEMO, Config, check_config, train

DOCUMENTS = ["README.md", "RESULTS.md", "benchmarks/README.md", "weights/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXTS["README.md"]
TOUR = json.loads((ROOT / "ddpm_test.ipynb").read_text(encoding="utf-8"))["cells"]
TEXTS["ddpm_test.ipynb"] = "\n".join("".join(cell["source"]) for cell in TOUR)
PROSE = "\n".join(TEXTS.values())
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = "\n".join(code for language, code in FENCED.findall(PROSE) if language == "bash")
INLINE = re.findall(r"`([^`\n]+)`", FENCED.sub("", PROSE))
PROGRAMS = "python|pip|uv|accelerate|torchrun|tensorboard|jupyter|ruff|bash|pytest"
COMMANDS = [
    re.sub(r"^(\w+=\S+ +)+", "", part.strip())  # OMP_NUM_THREADS=1 before it
    for line in [*BLOCKS.replace("\\\n", " ").splitlines(), *INLINE]
    for part in line.partition("  #")[0].split(" && ")
    if re.match(rf"(\w+=\S+ +)*({PROGRAMS}) ", part.strip())
]
SCRIPTS = sorted({c for c in COMMANDS if re.search(r"^(?!.*pytest).*\.py\b(?! --help)", c)})
LINKS = sorted(
    {
        (name, target)
        for name, text in TEXTS.items()
        for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text)
    }
)


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith(("-r", "#")))


def test_requirements_and_pyproject_list_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["project"]["dependencies"]) == requirements("requirements.txt")
    assert sorted(project["dependency-groups"]["dev"]) == requirements("requirements-test.txt")


def test_workflow_runs_the_two_commands_on_three_systems_from_the_oldest_python_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert ">=" + matrix["python"][0] == project["project"]["requires-python"]
    steps = " ".join(step.get("run", "") for step in workflow["jobs"]["test"]["steps"])
    for line in re.findall(r"^pip install .*&& python .*", README, flags=re.MULTILINE):
        for command in line.split(" && "):
            assert command in steps


def test_each_module_imports_only_what_the_design_allows():
    ours = {p.stem for p in ROOT.glob("*.py")}
    under = ours - {"train", "evaluate", "convert"}
    allowed = {
        "group_norm_cpu": set(),
        "unet": {"group_norm_cpu"},
        "samplers": set(),
        "diffusion": {"samplers"},
        "safe_files": {"errors", "files"},
        "diffusers_config": {"diffusion", "errors", "safe_files", "unet"},
        "diffusers_format": {"diffusers_config", "errors", "files", "safe_files", "unet"},
        "pretrained": {"diffusers_format", "errors", "state", "terminal", "unet", "utils"},
        "ema": set(),
        "optimizers": set(),
        "errors": set(),
        "settings": {"errors"},
        "synthetic": set(),
        "threads": set(),
        "device": {"errors"},
        "terminal": set(),
        "processes": {"errors"},
        "files": {"errors", "terminal"},
        "images": {"files"},
        "cli": {"errors", "terminal"},
        "log": {"files", "images", "terminal"},
        "utils": {"errors", "files", "terminal"},
        "state": {"device", "ema", "errors", "optimizers", "settings", "terminal", "unet"}
        | {"utils"},
        "safety": {"errors", "files", "utils"},
        "decoding": {"errors", "images"},
        "celeba": {"errors", "terminal"},
        "prepared": {"errors", "files", "terminal"},
        "sources": {"celeba", "decoding", "errors", "synthetic"},
        "dataset": {"errors", "images", "prepared", "sources"},
        "likelihood": {"dataset", "diffusion", "images"},
        "metrics": {"errors", "images", "prepared", "terminal"},
        "generate": {"device", "diffusion", "errors", "files", "images", "pretrained"}
        | {"unet", "utils"},
        "editing": {"dataset", "decoding", "diffusion", "errors", "generate", "images", "samplers"},
        "run": under - {"run", "sample", "metrics", "cli"},
        "sample": under - {"run", "sample", "safety", "metrics", "likelihood"},
        "train": under - {"sample", "metrics"},
        "evaluate": under - {"run", "sample", "safety", "unet", "ema"},
        "convert": under - {"run"},
    }
    assert set(allowed) == ours
    for name, may in allowed.items():
        text = (ROOT / f"{name}.py").read_text()
        imported = re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE)
        assert set(imported) & ours <= may, name


def test_table_of_constants_is_what_the_code_gives():
    """python -c "import settings, train; print(flags.markdown(train.Config))" writes it."""
    assert flags.markdown(Config) in TEXTS["docs/constants.md"]


def test_readme_is_short_and_its_constants_are_rows_of_the_table():
    assert len(README.splitlines()) <= 150
    rows = [line for line in README.splitlines() if line.startswith("| `--")]
    assert len(rows) == 10 and set(rows) <= set(TEXTS["docs/constants.md"].splitlines())


def flag_names(cls: type) -> set[str]:
    names = {field.name for field in fields(cls)}
    return names | {f"no_{field.name}" for field in fields(cls) if field.type in ("bool", bool)}


def benchmark_config(name: str) -> type:
    """The dataclass of flags of a script in benchmarks/."""
    module = importlib.import_module(f"benchmarks.{name}")
    cls = re.findall(r"cli\.parse\((\w+)", inspect.getsource(module))[-1]  # main's
    assert is_dataclass(getattr(module, cls))
    return getattr(module, cls)


def test_every_flag_in_the_documents_exists():
    commands = (Config, SampleConfig, EvaluateConfig, ConvertConfig)
    known = set.union(*map(flag_names, commands)) | {"demo", "help"}
    for path in ROOT.glob("benchmarks/*.py"):
        if "flags.parse(" in path.read_text(encoding="utf-8"):
            known |= flag_names(benchmark_config(path.stem))
    others = {"logdir", "num_processes", "cpu", "num_machines", "machine_rank"}  # of other programs
    others |= {"nnodes", "node_rank", "master_addr", "master_port", "max_restarts", "multi_gpu"}
    others |= {
        "main_process_ip",
        "main_process_port",
        "nproc_per_node",
        "inplace",
        "index",
        "python",
    }
    assert set(re.findall(r"(?<![\w-])--([a-z_]+)", PROSE)) <= known | others


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_of_a_script_is_understood(command):
    words = shlex.split(command, comments=True)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[at], words[at + 1 :]
    if script == "sample.py":
        sample.check_config(flags.parse(SampleConfig, flags, ""))
    elif script == "evaluate.py":
        evaluate.check_config(flags.parse(EvaluateConfig, flags, ""))
    elif script == "convert.py":
        convert.check_config(flags.parse(ConvertConfig, flags, ""))
    elif script.startswith("benchmarks/"):
        flags.parse(benchmark_config(Path(script).stem), flags, "")
    else:
        assert script == "train.py"
        default = replace(Config(), **DEMO) if "--demo" in flags else Config()
        check_config(flags.parse(Config, [f for f in flags if f != "--demo"], "", default))


def test_other_commands_name_files_that_exist():
    others = sorted(set(COMMANDS) - set(SCRIPTS))
    assert "pip install -r requirements.txt" in others and "bash .ci/run" in others
    for command in others:
        for word in shlex.split(command):
            if re.search(r"\.(py|txt|ipynb)$|^\.ci/", word):
                assert (ROOT / word).exists(), command


@pytest.mark.parametrize("document,target", LINKS)
def test_every_link_leads_somewhere(document, target):
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    file = (ROOT / document).parent / path if path else ROOT / document
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in slugs


NAMED = sorted(set(re.findall(r"`((?:\w+/)?\w+\.(?:py|ipynb|toml|cff|md))`", PROSE)))


@pytest.mark.parametrize("name", NAMED)
def test_every_file_that_is_named_exists(name):
    assert [folder for folder in (ROOT, ROOT / "tests") if (folder / name).exists()]


def test_every_module_document_and_asset_is_named():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert f"`{path.name}`" in README, path.name
    for name in DOCUMENTS[1:]:
        assert f"]({name}" in README, name
    sources = [Path(target).name for _, target in LINKS]
    for path in (ROOT / "assets").iterdir():
        assert path.name in sources and path.stat().st_size < 300_000, path.name


def test_snippet_of_the_readme_samples_from_a_checkpoint(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, 22)
    train(tiny(experiment_name="my_first_diffusion", num_training_steps=1))
    values = {}
    exec(snippet, values)
    assert values["images"].shape == (16, 3, 8, 8)
    assert Path("faces.png").stat().st_size > 0


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
