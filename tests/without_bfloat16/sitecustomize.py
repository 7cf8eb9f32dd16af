"""A processor without bfloat16 instructions, for tests on one that has them: Python imports this in
each process that starts with PYTHONPATH=tests/without_bfloat16, before anything else."""

import sys
from importlib.machinery import PathFinder


class WithoutBfloat16:
    """Finds torch.cpu, and lets it answer that the processor has no AVX512-BF16."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        """The module as it is found anyway, with one answer changed once it is loaded."""
        if name != "torch.cpu":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_change(module) -> None:
            execute(module)
            module._is_avx512_bf16_supported = lambda: False

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, WithoutBfloat16)
