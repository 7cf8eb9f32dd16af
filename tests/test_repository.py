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

import convert
import evaluate
import sample
import train
from system import flags


def read(name: str | Path) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


README = read("README.md")
OTHERS = ["RESULTS.md", "benchmarks/README.md", "weights/README.md"]
OTHERS += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
TEXTS = {"README.md": README} | {name: read(name) for name in OTHERS}
TOUR = json.loads(read("ddpm_test.ipynb"))["cells"]
PROSE = "\n".join([*TEXTS.values(), *("".join(cell["source"]) for cell in TOUR)])
COMMANDS = {
    "train.py": (train.Config, train.check_config),
    "sample.py": (sample.SampleConfig, sample.check_config),
    "evaluate.py": (evaluate.EvaluateConfig, evaluate.check_config),
    "convert.py": (convert.ConvertConfig, convert.check_config),
}
OURS = {path.stem for path in ROOT.glob("*.py")}
OURS |= {path.parent.name for path in ROOT.glob("*/__init__.py")}


# The layout --------------------------------------------------------------------------------------

MODEL = {"unet", "diffusion", "samplers", "ema", "optimizers", "utils"}
PARTS = {"dataset", "formats", "engine", "metrics", "generate", "editing"}


def imported(path: Path) -> set[str]:
    """What of ours a file imports."""
    names = set()
    for node in ast.walk(ast.parse(read(path))):
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
            assert not imported(path) & {"train", "evaluate", "convert", "app"}, path


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
    text = "\n".join(map(read, ROOT.glob("tests/**/test_*.py")))
    tests = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    _, *promises = TEXTS["docs/guarantees.md"].split("\n- ")
    assert promises and len(TEXTS["docs/guarantees.md"].splitlines()) <= 32
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
            presets = {"demo": ("", train.DEMO)} if script == "train.py" else None
            check(flags.parse(cls, given, "", presets))
            found += 1
        assert not script or (ROOT / script).exists(), command
    assert found > 10


def test_every_flag_in_the_text_exists():
    known = {"demo", "help", "inplace", "num_machines", "machine_rank", "max_restarts"}
    known |= {"main_process_ip", "main_process_port", "num_processes", "nproc_per_node"}
    for cls, _ in COMMANDS.values():
        known |= {prefix + name for name in cls.__dataclass_fields__ for prefix in ("", "no_")}
    for path in [*ROOT.glob("benchmarks/*.py"), ROOT / "app.py"]:
        known |= set(re.findall(r"^    (\w+): ", read(path), re.MULTILINE))
    assert set(re.findall(r"`--([a-z_]+)", PROSE)) <= known


def test_every_link_and_every_file_that_is_named_exists():
    for document, text in TEXTS.items():
        for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            assert file.exists(), (document, target)
            headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE) if anchor else [""]
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, (document, target)
    for name in set(re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb|toml|cff|md))`", PROSE)):
        assert [folder for folder in (ROOT, ROOT / "tests") if (folder / name).exists()], name


def test_readme_names_every_module_document_and_asset():
    assert len(README.splitlines()) <= 150
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.ipynb")]:
        assert path.name in README, path.name
    for name in OTHERS:
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


def test_requirements_pyproject_and_the_workflow_agree():
    project = tomllib.loads(read("pyproject.toml"))
    for name, expected in (
        ("requirements.txt", project["project"]["dependencies"]),
        ("requirements-test.txt", project["dependency-groups"]["dev"]),
    ):
        listed = [line for line in read(name).splitlines() if line and line[:1] not in "-#"]
        assert sorted(listed) == sorted(expected), name
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    oldest = job["strategy"]["matrix"]["python"][0]
    assert project["project"]["requires-python"] == f">={oldest}"
    steps = " ".join(step.get("run", "") for step in job["steps"])
    for line in re.findall(r"^pip install .*&& python .*", README, flags=re.MULTILINE):
        assert all(command in steps for command in line.split(" && "))
