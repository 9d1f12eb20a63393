"""Packages of two source roots, and the native libraries, which CMake builds where there is a compiler.

REPRDPO_NATIVE = auto (build where cmake, a C++ compiler and torch >= 2.11 are found; otherwise install without,
saying so), on (an error where it cannot be built) or off. REPRDPO_CUDA = auto | on | off says the same of the CUDA
library and nvcc. What was left out, and why, is written to reprdpo/lib/build.txt, a line each, for `reprdpo doctor`.
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
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "libreprdpo_cpu.so", "cuda": "libreprdpo_cuda.so"}
ISOLATED = "pip install --no-build-isolation, in an environment with torch, cmake and setuptools, builds it"


def request(variable: str) -> str:
    asked = os.environ.get(variable, "auto")
    if asked not in ("auto", "on", "off"):
        raise SystemExit(f"{variable} must be auto, on or off, not {asked!r}")
    return asked


def demanding() -> str | None:
    """The variable by which nothing may be left out."""
    return next((name for name in ("REPRDPO_NATIVE", "REPRDPO_CUDA") if request(name) == "on"), None)


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
    reason = "REPRDPO_NATIVE=off" if request("REPRDPO_NATIVE") == "off" else missing_tool()
    if reason is None:
        return [Extension("reprdpo.lib.libreprdpo_cpu", sources=[], optional=demanding() is None)]
    if demanding():
        raise SystemExit(f"{demanding()}=on, but the native library cannot be built: {reason}")
    print(f"reprdpo: installing without the native library, on the reference backend: {reason}", file=sys.stderr)
    LEFT_OUT["cpu"] = reason
    return []


# Why a library is not built; BuildNotes installs it beside those that are.
LEFT_OUT: dict[str, str] = {}


def write_notes(library_folder: Path) -> None:
    if not LEFT_OUT:
        return
    library_folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{LIBRARIES[device]}: {' '.join(reason.split())}\n" for device, reason in LEFT_OUT.items()]
    (library_folder / "build.txt").write_text("".join(lines), encoding="utf-8")


def in_a_line(error: OSError | subprocess.CalledProcessError) -> str:
    """What failed; a command's own words are in pip's log."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(error.cmd[:2])} ended with status {error.returncode}; `pip install -v` shows its words"
    return str(error)


class BuildNotes(build_py):
    """Where nothing native is built, the installed package says why."""

    def run(self) -> None:
        super().run()
        write_notes((ROOT if self.editable_mode else Path(self.build_lib)) / "reprdpo" / "lib")


class CMakeBuild(build_ext):
    """Build the native libraries with CMake, for an editable install in build/native, where `make native` goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARIES["cpu"])

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / "native" if self.editable_mode else Path(self.build_temp).resolve() / "native"
        try:
            self.configure(build)
            self.install(build, "cpu", target.parent)
        except (OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise SystemExit(f"{demanding()}=on, but the native build failed: {in_a_line(error)}") from error
            reason = in_a_line(error)
            print(f"reprdpo: the native build failed; installing on the reference backend: {reason}", file=sys.stderr)
            LEFT_OUT["cpu"] = f"its build failed: {reason}"
        else:
            self.build_cuda(build, target.parent)
        write_notes(target.parent)

    def configure(self, build: Path) -> None:
        command = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        command += ["-DCMAKE_BUILD_TYPE=Release", f"-DREPRDPO_TESTS={'ON' if self.editable_mode else 'OFF'}"]
        command += [
            f"-D{name}={os.environ[name]}" for name in ("REPRDPO_CUDA", "REPRDPO_CUDA_ARCHS") if name in os.environ
        ]
        if shutil.which("ninja"):
            command += ["-G", "Ninja"]
        subprocess.run(command, check=True)

    def build_cuda(self, build: Path, folder: Path) -> None:
        status = (build / "cuda_status.txt").read_text(encoding="utf-8")
        if status.startswith("off"):
            LEFT_OUT["cuda"] = status.removeprefix("off: ")
            return
        try:
            self.install(build, "cuda", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            if request("REPRDPO_CUDA") == "on":
                raise SystemExit(f"REPRDPO_CUDA=on, but the CUDA build failed: {in_a_line(error)}") from error
            reason = in_a_line(error)
            print(f"reprdpo: the CUDA build failed; installing without the CUDA library: {reason}", file=sys.stderr)
            LEFT_OUT["cuda"] = f"its build failed: {reason}"

    def install(self, build: Path, device: str, folder: Path) -> None:
        """Build the library of ``device``, and the C++ tests with the CPU's, and install it into ``folder``."""
        target = f"reprdpo_{device}"
        tests = ["tests"] if device == "cpu" and self.editable_mode else []
        subprocess.run(["cmake", "--build", str(build), "--parallel", "--target", target, *tests], check=True)
        prefix = str(folder.parent.parent)
        subprocess.run(["cmake", "--install", str(build), "--prefix", prefix, "--component", device], check=True)

    def copy_extensions_to_source(self) -> None:
        built, folder = Path(self.build_lib) / "reprdpo" / "lib", ROOT / "reprdpo" / "lib"
        folder.mkdir(exist_ok=True)
        for name in (*LIBRARIES.values(), "build.txt"):
            (folder / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copy2(built / name, folder / name)


class PythonIndependentWheel(bdist_wheel):
    """The library knows no Python, so that one wheel serves them all; only the platform is in its tag."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    packages=find_packages(include=["reprdpo", "reprdpo.*"]) + find_packages("kernels"),
    package_dir={"reprdpo_kernels": "kernels/reprdpo_kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildNotes, "bdist_wheel": PythonIndependentWheel},
)
