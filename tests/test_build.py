"""The build: what a wheel holds, what its libraries lean on, and how a build refuses."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import saesteer_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saesteer_fast"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout; the compiled objects of the build folder are used again."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, "-w", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_file_list(wheel):
    got = {name for name in wheel.namelist() if ".dist-info/" not in name}
    compiled = {name for name in got if name.endswith(".so")}
    sources = {f"saesteer_fast/{p.relative_to(PACKAGE).as_posix()}" for p in PACKAGE.rglob("*.py")}
    kernels = {f"saesteer_fast/triton_kernels/{p.name}" for p in ROOT.glob("triton_kernels/*.py")}
    assets = {
        f"saesteer_fast/{p.relative_to(PACKAGE).as_posix()}"
        for p in (PACKAGE / "mini/assets").rglob("*")
        if p.is_file()
    }
    data = {"saesteer_fast/py.typed", "saesteer_fast/recipe/schema.json"}
    assert got - compiled == sources | kernels | assets | data
    assert "saesteer_fast/triton_kernels/__init__.py" in got
    names = {re.sub(r"\.cpython.*", "", Path(name).name) for name in compiled}
    assert {"libsaesteer_ops.so", "_build"} <= names
    assert names <= {"libsaesteer_ops.so", "libsaesteer_cuda.so", "_build"}


def test_sdist_file_list(tmp_path):
    """All that is in the repository, less what belongs to git alone."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist"]
    done = subprocess.run([*command, "--dist-dir", tmp_path], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        got = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no history in this checkout")
    missing = set(listed.stdout.split()) - got
    assert missing == {".ci/run", ".gitignore"}


def test_wheel_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert f"\nVersion: {saesteer_fast.__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "saesteer = saesteer_fast.cli:main" in wheel.read(name).decode()


def test_libraries_hold_no_path_of_the_building_machine(wheel):
    for name in wheel.namelist():
        if name.endswith(".so"):
            content = wheel.read(name)
            for path in (ROOT, Path(torch.__file__).parent):
                assert str(path).encode() not in content, (name, path)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_libraries_use_the_stable_abi_alone():
    for library in PACKAGE.glob("libsaesteer_*.so"):
        command = ["nm", "--dynamic", "--undefined-only", library]
        undefined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "aoti_torch" in undefined
        assert not re.findall(r" U (_ZN\w*(?:2at|3c10|5torch)\w*|Py\w+)", undefined)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_instruction_sets_do_not_leak():
    """Of a template that several files instantiate the linker keeps one copy: were it one compiled
    for AVX-512, a lesser processor would die in code that it chose for itself."""
    objects = list(ROOT.glob("build/cmake-*/CMakeFiles/saesteer_ops.dir/csrc/cpu/kernels_*.o"))
    if not objects:
        pytest.skip("no build folder in this checkout")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r" [WVu] \w+", symbols), path.name


ARM = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(ARM is None, reason="aarch64-linux-gnu-g++ is not installed")
def test_kernels_compile_for_arm():
    """What needs no PyTorch for Arm: the rest of csrc/cpu is portable if its inner loops are."""
    sources = [f"csrc/cpu/{name}.cpp" for name in ("isa", "kernels", "kernels_plain")]
    command = [ARM, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *sources]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_keeps_what_users_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = [".venv/bin", "saesteer-mini", "saesteer-demo"]
    for folder in ("csrc", "build", "saesteer_fast/__pycache__", ".venv/__pycache__", *made):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "saesteer_fast" / "libsaesteer_ops.so").touch()

    def left(target: str) -> set[str]:
        subprocess.run(["make", "-C", tmp_path, target], check=True, capture_output=True)
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}

    kept = {"Makefile", "csrc", "saesteer_fast"}
    assert left("clean") == kept | {*made, ".venv", ".venv/__pycache__"}
    assert left("distclean") == kept


def build_error(tmp_path, **environment) -> str:
    """What `setup.py build_ext` says when it refuses, which is before it compiles anything."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def test_missing_torch_is_explained(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    assert "pip install --no-build-isolation ." in build_error(tmp_path, PYTHONPATH=tmp_path)


def test_bad_architecture_is_named(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    message = build_error(
        tmp_path, CUDACXX=nvcc, SAESTEER_NO_CUDA=0, TORCH_CUDA_ARCH_LIST="8.0;Hopper"
    )
    assert "TORCH_CUDA_ARCH_LIST: got 'Hopper'" in message
    assert "10.0+PTX" in message


@pytest.mark.parametrize(
    ("listed", "given"),
    [
        ("8.0 9.0a 10.0+PTX", "80-real 90a-real 100"),
        ("9.0", "90-real"),
        ("8.0 9.0 9.0a", "80-real 90a-real"),
        ("9.0+PTX 9.0a", "90-virtual 90a-real"),
        ("9.0 9.0a+PTX", "90a"),
    ],
)
def test_hopper_has_one_code(listed, given):
    """Which of two a driver would load, nobody says."""
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["cmake_architectures"](listed.split()) == given.split()


@pytest.mark.parametrize("is_source", [True, False])
def test_a_package_without_its_library_says_how_to_get_it(tmp_path, is_source):
    (tmp_path / "saesteer_fast").mkdir()
    for file in (ROOT / "saesteer_fast").glob("*.py"):
        (tmp_path / "saesteer_fast" / file.name).write_text(file.read_text())
    if is_source:
        (tmp_path / "setup.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import saesteer_fast.ops"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "build them with `pip install --no-build-isolation .` under this PyTorch" in done.stderr
    assert ("leave it, or install with -e" in done.stderr) == is_source
