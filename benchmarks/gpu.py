"""Everything that only a GPU can tell, by one command: whether it is right, then how fast it is.

    python benchmarks/gpu.py                       # again and again, until it says that all is done
    python benchmarks/gpu.py --wheels wheels       # no network: what is missing from that folder
    python benchmarks/gpu.py --parts curves speed  # these anew
    python benchmarks/gpu.py --toy --out toy       # every part at a size for a CPU

The parts, the most important first, take 40 minutes together on an H100, by guess, and an hour at
most. Each has a process of its own, and what it found is kept in --out at once: stopped, or when
--minutes are over, the same command goes on with the parts that are left. --out then holds
gpu.json, gpu.md with all the tables, and what each part printed.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What a machine with torch may lack: modules and their packages.
PACKAGES = {
    "tyro": ["tyro", "docstring-parser", "typeguard"],
    "simplejpeg": ["simplejpeg"],
    "diffusers": ["diffusers", "importlib-metadata", "zipp"],
    "denoising_diffusion_pytorch": ["denoising-diffusion-pytorch", "ema-pytorch", "pytorch-fid"],
}


def install_missing(wheels: Path) -> None:
    """Install what cannot be imported from a folder of wheels, package by package and without what
    they depend on: a big dependency that is there is not to be touched."""
    for module, packages in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            for package in packages:
                command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
                subprocess.run([*command, "--find-links", str(wheels), package], check=False)


if __name__ == "__main__" and "--wheels" in sys.argv[:-1]:  # before they are imported
    install_missing(Path(sys.argv[sys.argv.index("--wheels") + 1]))

from benchmarks.common import find_device, machine
from benchmarks.gpu_parts import PARTS, GpuConfig, draw_pictures
from system import flags
from system.errors import UsageError
from system.files import save_json
from system.flags import check_ranges
from system.terminal import say, table


def run_part(config: GpuConfig, name: str, seconds: float) -> dict:
    """Let a process of its own do a part; what it printed is in NAME.txt. Returns what it found, or
    that it "failed"."""
    folder = Path(config.out)
    found = folder / f"{name}.json"
    found.unlink(missing_ok=True)
    flags = ["--out", str(folder), "--parts", name, "--child", *(["--toy"] if config.toy else [])]
    flags += ["--device", config.device] if config.device else []
    started = time.monotonic()
    with open(folder / f"{name}.txt", "w") as output:
        command = [sys.executable, str(Path(__file__).resolve()), *flags]
        options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(command, **options)
        failed = ""
        try:
            code = process.wait(seconds)
            failed = f"exit code {code}, see {name}.txt" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it and what it started
                process.wait()
    result = json.loads(found.read_text()) if found.exists() and not failed else {}
    return {**result, "failed": failed, "seconds": round(time.monotonic() - started, 1)}


def page(result: dict) -> str:
    """All that was found, in markdown."""
    lines = ["# On a GPU", "", result["machine"], ""]
    for name, part in result["parts"].items():
        lines += [f"## {name}", "", f"{PARTS[name].find_out.__doc__} ({part['seconds']} s)", ""]
        lines += [f"- FAILED: {part['failed']}"] if part["failed"] else []
        lines += [f"- {key}: {value}" for key, value in part.get("facts", {}).items()]
        for rows in part.get("tables", []):
            cells = [[str(cell) for cell in row.values()] for row in rows]
            lines += ["", table([str(column) for column in rows[0]], cells)] if rows else []
        lines.append("")
    return "\n".join(lines)


def run_parts(config: GpuConfig) -> bool:
    """Do the parts that are left, as far as the minutes go. Returns whether none is left."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path, started = folder / "gpu.json", time.monotonic()
    result = {"machine": machine(find_device(config.device)), "parts": {}}
    if path.exists():
        result["parts"] = json.loads(path.read_text())["parts"]
    wanted = config.parts or [name for name in PARTS if name not in result["parts"]]
    for name in wanted:
        left = config.minutes * 60 - (time.monotonic() - started)
        if left < min(PARTS[name].seconds, config.minutes * 50) and not config.toy:
            say(f"{name} and what follows wait for the next time: the same command again")
            return False
        say(f"{name} ...")
        found = run_part(config, name, left)
        result["parts"][name] = found
        save_json(path, result)
        (folder / "gpu.md").write_text(page(result))
        again = f"; --parts {name} tries it anew" if found["failed"] else ""
        say(f"{name}: {found['failed'] or 'done'}, {found['seconds']} s{again}")
    return True


def main() -> None:
    """The command line."""
    description = "Everything that only a GPU can tell. Parts: " + ", ".join(PARTS)
    config = flags.parse(GpuConfig, sys.argv[1:], description)
    check_ranges(config)
    if unknown := [name for name in config.parts if name not in PARTS]:
        raise UsageError("--parts", f"{unknown[0]!r} is none", f"choose of {', '.join(PARTS)}")
    if not config.child:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: its part ends with it
        if run_parts(config):
            say(f"all parts are done: {config.out}/gpu.md")
        return
    work = Path(config.out).resolve() / "work" / config.parts[0]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = (Path(config.out) / f"{config.parts[0]}.json").resolve()
    os.chdir(work)
    if config.toy:
        draw_pictures()
    save_json(found, PARTS[config.parts[0]].find_out(config))
    os.chdir(found.parent)
    shutil.rmtree(work)  # gigabytes of checkpoints


if __name__ == "__main__":
    flags.run(main)
