"""Compiles the CPU kernels while the package is installed, if there is a C++ compiler. All else: pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Not imported as part of its package, which needs jax.
_spec = importlib.util.spec_from_file_location("build_kernels", Path(__file__).parent / "cpu_kernels" / "build.py")
kernels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)


class BuildLibrary(build_ext):
    """Hands the whole library to cpu_kernels.build; a failure leaves the package without it."""

    def get_ext_filename(self, fullname: str) -> str:
        try:
            return kernels.library_name(kernels.ffi_version(kernels.headers()))
        except kernels.BuildError:
            return kernels.library_name((0, 0))

    def build_extension(self, ext: Extension) -> None:
        try:
            folder = Path(self.get_ext_fullpath(ext.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            kernels.build_library(folder)
        except kernels.BuildError as error:
            # `optional` below makes this a warning.
            raise CompileError(f"native CPU kernels not built, the slow path will be used: {error}") from error


setup(
    ext_modules=[Extension("cpu_kernels._spqr_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
)
