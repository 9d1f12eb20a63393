"""The native library as it is built and loaded, and what the build says where it cannot."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reprdpo.ops import native

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(not native.loaded(), reason=f"native: {native.status()}")
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


@needs_native
def test_status_names_the_file_and_the_instruction_set():
    assert native.status().endswith(f"({torch.ops.reprdpo_native.cpu_capability()})")
    assert torch.ops.reprdpo_native.cpu_capability() in ("portable", "avx2", "avx512", "avx512bf16")


@needs_native
@pytest.mark.parametrize("capability", ["portable"])
def test_a_lower_instruction_set_gives_the_same_reward(capability):
    program = (
        "import torch; from reprdpo import ops; torch.manual_seed(0);"
        "h, w, v = torch.randn(2, 3, 37).half(), *torch.randn(2, 3, 37);"
        "r = ops.probe_reward(h, None, w, w[:, 0], v, v[:, 0]).reward;"
        "print(torch.ops.reprdpo_native.cpu_capability(), *r.tolist())"
    )
    environment = {**os.environ, "REPRDPO_CPU_CAPABILITY": capability, "REPRDPO_BACKEND": "native"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    used, *rewards = done.stdout.split()
    torch.manual_seed(0)
    h, w, v = torch.randn(2, 3, 37).half(), *torch.randn(2, 3, 37)
    here = torch.ops.reprdpo_native.probe_reward(
        [h], None, w, w[:, 0].contiguous(), v, v[:, 0].contiguous(), "softmax", False, None, False, None, False
    )
    assert used in ("portable", capability)
    torch.testing.assert_close(torch.tensor([float(r) for r in rewards]), here[0], rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: [torch.zeros(2, 5, 4)] * 2 + [torch.zeros(2, 5, 3)]}, "one device, one dtype and one shape"),
        ({0: [torch.zeros(2, 5, 4).double()] * 3}, "float32, bfloat16 or float16"),
        ({0: []}, "at least one layer"),
        ({1: torch.zeros(3, dtype=torch.int64)}, "index"),
        ({1: torch.zeros(2, dtype=torch.int32)}, "index"),
        ({2: torch.zeros(3, 5)}, "probe_weight"),
        ({2: torch.zeros(4, 3).T}, "probe_weight"),
        ({3: torch.zeros(2)}, "probe_bias"),
        ({4: None}, "gate_weight"),
        ({6: "mean"}, "gate must be"),
    ],
)
def test_native_op_reads_no_memory_that_is_not_there(changes, words):
    index = torch.zeros(2, dtype=torch.int64)
    arguments = [[torch.zeros(2, 5, 4)] * 3, index, *torch.zeros(1, 3, 4), torch.zeros(3), torch.zeros(3, 4)]
    arguments += [torch.zeros(3), "softmax", True, 7.5, False, None, False]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.reprdpo_native.probe_reward(*arguments)


@needs_source
def test_a_library_of_other_schemas_is_refused(monkeypatch):
    monkeypatch.setattr(native, "_wanted_build", lambda: "0.0.9 0123456789ab")
    native._load.cache_clear()
    try:
        assert not native.loaded()
        words = "was built for .* not for 0.0.9 0123456789ab: run `make native`|is not built"
        assert re.search(words, native.status())
    finally:
        native._load.cache_clear()


@needs_native
def test_a_library_that_cannot_serve_this_machine_says_why(monkeypatch):
    built = native._build("cpu")
    monkeypatch.setattr(
        native, "_build", lambda device: f"{built}; it needs a driver for CUDA 13, this one serves 12.8"
    )
    native._load.cache_clear()
    try:
        assert not native.loaded()
        assert native.status().endswith("cannot serve here: it needs a driver for CUDA 13, this one serves 12.8")
    finally:
        native._load.cache_clear()


def test_status_gives_the_reason_that_the_installation_wrote_down(monkeypatch, tmp_path):
    (tmp_path / "build.txt").write_text("libreprdpo_cpu.so: its build failed: no space\n", encoding="utf-8")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native._load.cache_clear()
    try:
        assert native.status("cpu") == "libreprdpo_cpu.so is not built: its build failed: no space"
        assert native.status("cuda") == native.status("cpu")
    finally:
        native._load.cache_clear()


def cuobjdump():
    triton = importlib.util.find_spec("triton")
    places = [Path(folder) / "backends/nvidia/bin" for folder in triton.submodule_search_locations] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))


def test_no_cuda_kernel_spills():
    library = native._path("cuda")
    if not library.exists() or cuobjdump() is None:
        pytest.skip("no CUDA library built here, or no cuobjdump to read it")
    done = subprocess.run([cuobjdump(), "-res-usage", library], capture_output=True, text=True, check=True)
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    assert kernels
    assert [name for name, _, stack, local in kernels if int(stack) or int(local)] == []
    assert max(int(registers) for _, registers, _, _ in kernels) <= 128  # two blocks of 256 threads


def configured(folder, nvcc):
    """What CMake says of CUDA, with this script as nvcc."""
    (folder / "nvcc").write_text(nvcc, encoding="utf-8")
    (folder / "nvcc").chmod(0o755)
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder / "build",
        "-DREPRDPO_TESTS=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    environment = os.environ | {"CUDACXX": str(folder / "nvcc")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "build" / "cuda_status.txt").read_text(encoding="utf-8")


needs_cmake = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None, reason="no source tree, or no cmake"
)


@needs_cmake
def test_an_nvcc_that_does_not_work_leaves_the_cpu_library(tmp_path):
    status = configured(tmp_path, "#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    assert status == "off: no working nvcc on PATH, in CUDACXX or under CUDA_HOME"


# As CUDA 12.6's: it stops at the architectures that came after it.
OLD_NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_80; echo compute_90; exit ;;
  *_100*) echo "Unsupported gpu architecture 'compute_100'" >&2; exit 1 ;;
esac
exec NVCC "$@"
"""


@needs_cmake
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_an_nvcc_that_does_not_know_every_architecture_compiles_for_the_others(tmp_path):
    status = configured(tmp_path, OLD_NVCC.replace("NVCC", shutil.which("nvcc")))
    assert status.startswith("libreprdpo_cuda for 80;90, nvcc")


def setup_py(*command, **variables):
    environment = {"PATH": "", "HOME": os.environ.get("HOME", "/"), **variables}
    command = [sys.executable, "setup.py", *(command or ("--name",))]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_source
@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ("NATIVE=auto", 0, "installing without the native library, on the reference backend: cmake is not on PATH"),
        ("NATIVE=off", 0, "installing without the native library, on the reference backend: REPRDPO_NATIVE=off"),
        ("CUDA=on", 1, "REPRDPO_CUDA=on, but the native library cannot be built: cmake is not on PATH"),
        ("NATIVE=on", 1, "REPRDPO_NATIVE=on, but the native library cannot be built: cmake is not on PATH"),
        ("NATIVE=yes", 1, "REPRDPO_NATIVE must be auto, on or off, not 'yes'"),
    ],
)
def test_setup_says_what_it_leaves_out(asked, status, words):
    variable, value = asked.split("=")
    done = setup_py(**{f"REPRDPO_{variable}": value})
    assert done.returncode == status, done.stderr
    assert words in done.stderr


@needs_source
def test_a_source_distribution_holds_the_tree(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no history to list the tree from")
    assert setup_py("-q", "egg_info", "--egg-base", str(tmp_path)).returncode == 0
    packed = set((tmp_path / "reprdpo.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    there = {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}
    assert there <= packed
    assert not [path for path in packed if path.endswith((".so", ".pyc"))]


@needs_source
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_a_compiler_that_fails_is_told_in_a_line(tmp_path):
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path))
    done = setup_py("-q", "build_ext", *folders, PATH=os.environ["PATH"], CC="false", CXX="false")
    assert done.returncode == 0, done.stderr
    reason = "its build failed: cmake --fresh ended with status 1; `pip install -v` shows its words"
    assert (tmp_path / "lib/reprdpo/lib/build.txt").read_text() == f"libreprdpo_cpu.so: {reason}\n"
