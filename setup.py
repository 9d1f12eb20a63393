"""Packages of two source roots, and the native library, which CMake builds where there is a compiler.

REPRDPO_NATIVE = auto (build where cmake, a C++ compiler and torch >= 2.11 are found; otherwise install without,
saying so), on (an error where it cannot be built) or off.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libreprdpo_cpu.so"
ISOLATED = "pip install --no-build-isolation, in an environment with torch, cmake and setuptools, builds it"


def native_request() -> str:
    request = os.environ.get("REPRDPO_NATIVE", "auto")
    if request not in ("auto", "on", "off"):
        raise SystemExit(f"REPRDPO_NATIVE must be auto, on or off, not {request!r}")
    return request


def missing_tool() -> str | None:
    """What the native build lacks here, in words; None where nothing is missing."""
    if sys.platform == "win32":
        return "it is not built on Windows"
    if shutil.which("cmake") is None:
        return "cmake is not on PATH"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")):
        return "no C++ compiler is on PATH"
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return f"torch is not in the build environment ({ISOLATED})"
    version = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (2, 11):
        return "the torch of the build environment is older than 2.11"
    return None


def native_extensions() -> list[Extension]:
    request = native_request()
    reason = "REPRDPO_NATIVE=off" if request == "off" else missing_tool()
    if reason is None:
        return [Extension("reprdpo.lib.libreprdpo_cpu", sources=[], optional=request == "auto")]
    if request == "on":
        raise SystemExit(f"REPRDPO_NATIVE=on, but the native library cannot be built: {reason}")
    print(f"reprdpo: installing without the native library, on the reference backend: {reason}", file=sys.stderr)
    return []


class CMakeBuild(build_ext):
    """Build the native library with CMake, for an editable install in build/native, where `make native` goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / "native" if self.editable_mode else Path(self.build_temp).resolve() / "native"
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DREPRDPO_TESTS={'ON' if self.editable_mode else 'OFF'}"]
        configure += [
            f"-D{name}={os.environ[name]}" for name in ("REPRDPO_CUDA", "REPRDPO_CUDA_ARCHS") if name in os.environ
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        prefix = str(target.parent.parent.parent)
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
            subprocess.run(["cmake", "--install", str(build), "--prefix", prefix], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise SystemExit(f"REPRDPO_NATIVE=on, but the native build failed: {error}") from error
            print(f"reprdpo: the native build failed; installing on the reference backend: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        (ROOT / "reprdpo" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PythonIndependentWheel(bdist_wheel):
    """The library knows no Python, so that one wheel serves them all; only the platform is in its tag."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    packages=find_packages(include=["reprdpo", "reprdpo.*"]) + find_packages("kernels"),
    package_dir={"reprdpo_kernels": "kernels/reprdpo_kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PythonIndependentWheel},
)
