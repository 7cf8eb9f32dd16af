"""The files around the code agree with it, and the code keeps the rules of its layout."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from conftest import ROOT

from convert import ConvertConfig
from convert import check_config as check_convert
from evaluate import EvaluateConfig
from evaluate import check_config as check_evaluate
from sample import SampleConfig
from sample import check_config as check_sample
from system import flags
from train import DEMO, Config
from train import check_config as check_train

DOCUMENTS = ["README.md", "RESULTS.md", "benchmarks/README.md", "weights/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXTS["README.md"]
TOUR = json.loads((ROOT / "ddpm_test.ipynb").read_text(encoding="utf-8"))["cells"]
PROSE = "\n".join([*TEXTS.values(), *("".join(cell["source"]) for cell in TOUR)])
COMMANDS = {
    "train.py": (Config, check_train),
    "sample.py": (SampleConfig, check_sample),
    "evaluate.py": (EvaluateConfig, check_evaluate),
    "convert.py": (ConvertConfig, check_convert),
}
OURS = {path.stem for path in ROOT.glob("*.py")}
OURS |= {path.parent.name for path in ROOT.glob("*/__init__.py")}


# The layout --------------------------------------------------------------------------------------

MODEL = {"unet", "diffusion", "samplers", "ema", "optimizers", "utils"}
PARTS = {"dataset", "formats", "engine", "metrics", "generate", "editing"}


def imported(path: Path) -> set[str]:
    """What of ours a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {name.split(".")[0] for name in names} & OURS


def test_each_module_imports_only_what_stands_before_it():
    """The four rules of docs/developing.md."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        part = path.stem if path.parent == ROOT else path.parent.name
        if part == "system":
            assert imported(path) <= {"system"}, path
        elif part in MODEL:
            assert imported(path) <= {"system"} | MODEL, path
        elif part in PARTS:
            assert imported(path) <= {"system"} | MODEL | PARTS, path
        elif part in OURS:  # a command
            assert "train" not in imported(path), path
            assert imported(path) & {"evaluate", "convert", "app"} == set(), path


def test_nothing_happens_at_import(tmp_path):
    """No parsing of arguments, no files, no CUDA call, no circle."""
    modules = sorted(name for name in OURS if name != "app")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--bad']\n"
    code += f"import {', '.join(modules)}, torch; print(torch.cuda.is_initialized())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout == "False\n", result.stderr
    assert not list(tmp_path.iterdir())


# The documents -----------------------------------------------------------------------------------


def test_each_guarantee_names_its_test():
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    lines = TEXTS["docs/guarantees.md"].splitlines()
    promises = "\n".join(lines).split("\n- ")[1:]
    assert len(lines) <= 32 and promises
    for promise in promises:
        named = re.findall(r"`(test_\w+)`", promise)
        assert named and set(named) <= tests, promise


def commands() -> list[str]:
    """The commands of the documents: lines of bash blocks, and code in the text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PROSE, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PROSE, flags=re.M | re.S))
    lines = "\n".join([*blocks, *inline]).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("  #")[0].split(" && ")]
    return [re.sub(r"^(\w+=\S+ +)+", "", part) for part in parts]  # OMP_NUM_THREADS=1 before it


def test_every_command_in_the_documents_is_understood():
    found = 0
    for command in commands():
        starts = re.match(r"python |accelerate |torchrun ", command)
        words = shlex.split(command, comments=True) if starts else []
        script = next((word for word in words if word.endswith(".py")), "")
        if script in COMMANDS and "--help" not in words:
            cls, check = COMMANDS[script]
            given = words[words.index(script) + 1 :]
            check(flags.parse(cls, given, "", {"demo": ("", DEMO)} if cls is Config else None))
            found += 1
        assert not script or (ROOT / script).exists(), command
    assert found > 10


def test_every_flag_in_the_text_exists():
    known = {"demo", "help", "inplace", "num_machines", "machine_rank", "max_restarts"}
    known |= {"main_process_ip", "main_process_port", "num_processes", "nproc_per_node"}
    for cls, _ in COMMANDS.values():
        known |= {prefix + name for name in cls.__dataclass_fields__ for prefix in ("", "no_")}
    for path in [*ROOT.glob("benchmarks/*.py"), ROOT / "app.py"]:
        known |= set(re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`--([a-z_]+)", PROSE)) <= known


def test_every_link_and_every_file_that_is_named_exists():
    for document, text in TEXTS.items():
        for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            if target.startswith("https://"):
                continue
            assert file.exists(), (document, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                assert anchor in slugs, (document, target)
    for name in set(re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|toml|cff|md))`", PROSE)):
        assert [folder for folder in (ROOT, ROOT / "tests") if (folder / name).exists()], name


def test_readme_names_every_module_document_and_asset():
    assert len(README.splitlines()) <= 150
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert path.name in README, path.name
    for name in DOCUMENTS[1:]:
        assert f"]({name}" in README, name
    for path in (ROOT / "assets").iterdir():
        assert path.name in PROSE and path.stat().st_size < 300_000, path.name


def test_snippet_of_the_readme_samples_from_a_checkpoint(run):
    run.rename("my_first_diffusion")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    values = {}
    exec(snippet, values)
    assert values["images"].shape == (16, 3, 8, 8) and Path("faces.png").stat().st_size > 0


# The installation --------------------------------------------------------------------------------


def test_requirements_and_pyproject_list_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def listed(name: str) -> list[str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return sorted(line for line in lines if line and not line.startswith(("-r", "#")))

    assert sorted(project["project"]["dependencies"]) == listed("requirements.txt")
    assert sorted(project["dependency-groups"]["dev"]) == listed("requirements-test.txt")


def test_workflow_runs_the_two_commands_on_three_systems_from_the_oldest_python_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert ">=" + matrix["python"][0] == project["project"]["requires-python"]
    steps = " ".join(step.get("run", "") for step in workflow["jobs"]["test"]["steps"])
    for line in re.findall(r"^pip install .*&& python .*", README, flags=re.MULTILINE):
        assert all(command in steps for command in line.split(" && "))
