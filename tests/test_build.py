"""What setup.py decides, and the errors it stops with. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
NVCC_13 = ["75", "80", "86", "89", "90", "100", "120"]


def run(*command, **environment):
    return subprocess.run(list(map(str, command)), env={**os.environ, **environment}, cwd=ROOT, text=True,
                          capture_output=True)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_compiler(folder, **macros):
    lines = [f'echo "#define {name} {value}"' for name, value in macros.items()]
    return script(folder / "c++", "\n".join(lines))


def fake_toolkit(folder, release="13.0", known=NVCC_13):
    """A CUDA folder whose nvcc answers the questions that setup.py asks, and no others."""
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64" / "libcudart_static.a").touch()
    script(folder / "bin" / "nvcc", f"""case "$1" in
        --version) echo "Cuda compilation tools, release {release}, V{release}.88";;
        --dryrun) echo "#\\$ TOP={folder}/bin/..";;
        --list-gpu-arch) printf 'compute_%s\\n' {" ".join(known)};;
        *) exit 1;;
    esac""")
    return folder


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in an environment without the variables it reads and without a CUDA toolkit."""
    for name in ("CXX", "CUDA_PATH", "BNN_FAST_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("bnn_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_torch_the_error_names_the_pip_flag():
    done = run(sys.executable, "-c", "import runpy, sys; sys.modules['torch'] = None;"
               "runpy.run_path('setup.py', run_name='__main__')")
    assert done.returncode != 0
    assert "cannot import torch" in done.stderr and "--no-build-isolation" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_compiler_stops_the_build_before_anything_is_compiled(tmp_path):
    done = run(sys.executable, "setup.py", "build_ext", CXX=str(fake_compiler(tmp_path, __GNUC__=9)))
    assert done.returncode != 0
    assert "g++ 9, too old" in done.stderr and "CXX=g++-12" in done.stderr
    assert "Traceback" not in done.stderr and "ninja" not in done.stdout


@pytest.mark.parametrize("macros, problem", [
    ({"__GNUC__": 10}, "g++ 10, too old"),
    ({"__clang_major__": 13, "__GNUC__": 4}, "clang 13, too old"),
    ({}, "no C++ compiler was found"),
])
def test_a_compiler_that_will_not_do(build, monkeypatch, tmp_path, macros, problem):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, **macros)))
    with pytest.raises(SystemExit, match="install g.. 11 or clang 14") as error:
        build.check_compiler()
    assert problem in str(error.value)


def test_no_compiler_at_all(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler was found as `no-such-compiler`"):
        build.check_compiler()


@pytest.mark.parametrize("macros", [{"__GNUC__": 11}, {"__clang_major__": 14, "__GNUC__": 4}])
def test_compilers_that_do(build, monkeypatch, tmp_path, macros):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, **macros)))
    build.check_compiler()


@pytest.mark.parametrize("version, good", [("2.9.1", False), ("2.10.0+cu128", False), ("2.11.0", True),
                                           ("3.0.0a0", True)])
def test_the_oldest_torch(build, monkeypatch, version, good):
    monkeypatch.setattr(torch, "__version__", version)
    if good:
        build.check_torch()
    else:
        with pytest.raises(SystemExit, match=r"too old.*\nRemedy: pip install 'torch>=2.11'"):
            build.check_torch()


def test_no_ninja(build, monkeypatch):
    monkeypatch.setattr(build.cpp_extension, "is_ninja_available", lambda: False)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # check_ninja prepends to it
    with pytest.raises(SystemExit, match="pip install ninja"):
        build.check_ninja()


def test_cuda_wanted_but_no_nvcc(build, monkeypatch):
    monkeypatch.setenv("BNN_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"/nonexistent/bin/nvcc(.|\n)*CUDA_HOME(.|\n)*BNN_FAST_CUDA=0"):
        build.find_cuda()


def test_auto_without_nvcc_builds_without_cuda_and_says_so(build, capsys):
    assert build.find_cuda() is None
    assert "without CUDA kernels (BNN_FAST_CUDA=auto, nvcc was not found)" in capsys.readouterr().out


@pytest.mark.parametrize("torch_cuda", [None, "13.2"])
def test_auto_with_nvcc_builds_with_cuda_and_says_so(build, monkeypatch, tmp_path, capsys, torch_cuda):
    toolkit = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.find_cuda() == toolkit
    assert "with CUDA kernels (BNN_FAST_CUDA=auto, nvcc 13.0" in capsys.readouterr().out


def test_zero_ignores_nvcc(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("BNN_FAST_CUDA", "0")
    assert build.find_cuda() is None


def test_a_wrapper_on_path_leads_to_the_toolkit_behind_it(build, monkeypatch, tmp_path):
    toolkit = fake_toolkit(tmp_path / "cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert build.find_cuda() == toolkit


@pytest.mark.parametrize("value", ["yes", "", "2"])
def test_a_bad_value_lists_the_choices(build, monkeypatch, value):
    monkeypatch.setenv("BNN_FAST_CUDA", value)
    with pytest.raises(SystemExit, match=f"BNN_FAST_CUDA='{value}' is not understood(.|\n)*auto, 0 or 1"):
        build.find_cuda()


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_cuda_major_versions_that_differ(build, monkeypatch, tmp_path, wanted):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("BNN_FAST_CUDA", wanted)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(SystemExit, match=r"nvcc is CUDA 13.0(.|\n)*CUDA 12.8: the major ver") as error:
        build.find_cuda()
    assert "CUDA_HOME at a CUDA 12 toolkit" in str(error.value) and "BNN_FAST_CUDA=0" in str(error.value)


@pytest.mark.parametrize("given, known, expected", [
    (None, NVCC_13, DEFAULT),
    (None, ["70", "80", "86", "89", "90"], ["8.0", "8.6", "8.9", "9.0+PTX"]),
    ("9.0", NVCC_13, ["9.0"]),
    ("8.0 9.0a+PTX", NVCC_13, ["8.0", "9.0a+PTX"]),
])
def test_architectures(build, monkeypatch, tmp_path, given, known, expected):
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    nvcc = fake_toolkit(tmp_path / "cuda", known=known) / "bin" / "nvcc"
    assert build.cuda_architectures(str(nvcc)) == expected


@pytest.mark.parametrize("given", ["Hopper", "9.0;3.5", "90"])
def test_an_unknown_architecture_names_those_known(build, monkeypatch, tmp_path, given):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    nvcc = fake_toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    with pytest.raises(SystemExit, match=r"does not know(.|\n)*7\.5, 8\.0, 8\.6"):
        build.cuda_architectures(str(nvcc))


def test_code_generation_flags(build):
    assert build.code_generation_flags(["8.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def command(build, build_temp):
    extension = build.Extension("bnn_fast._C", sources=["csrc/module.cpp"])
    builder = build.BuildExtension(setuptools.Distribution({"version": "1.2.3"}))
    builder.build_temp = str(build_temp)
    return builder, extension


def test_cuda_adds_its_library_and_flags_and_the_rest_adds_none(build, tmp_path):
    builder, extension = command(build, tmp_path)
    builder.configure(extension, None)
    assert not any("CUDA" in flag and flag != '-DBNN_FAST_CUDA_ARCHITECTURES=""'
                   for flag in extension.extra_compile_args["cxx"])
    assert "cudart_static" not in extension.libraries
    builder, extension = command(build, tmp_path)
    builder.configure(extension, fake_toolkit(tmp_path / "cuda"))
    assert extension.libraries[0] == "cudart_static"
    assert {"-DUSE_CUDA", "-DBNN_FAST_WITH_CUDA"} <= set(extension.extra_compile_args["cxx"])
    assert "--fmad=false" in extension.extra_compile_args["nvcc"]


@pytest.mark.parametrize("flag", ["-march=native", "-ffast-math", "--use_fast_math"])
def test_no_flag_ties_the_binary_to_this_machine_or_loosens_the_arithmetic(build, tmp_path, flag):
    builder, extension = command(build, tmp_path)
    builder.configure(extension, fake_toolkit(tmp_path / "cuda"))
    assert not any(flag in flags for flags in extension.extra_compile_args.values())
    assert "-ffp-contract=off" in extension.extra_compile_args["cxx"]


def test_no_static_cuda_runtime(build, tmp_path):
    toolkit = fake_toolkit(tmp_path / "cuda")
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    builder, extension = command(build, tmp_path)
    with pytest.raises(SystemExit, match="libcudart_static.a is missing(.|\n)*BNN_FAST_CUDA=0"):
        builder.configure(extension, toolkit)


def test_sources_whose_objects_would_collide(build, tmp_path):
    builder, extension = command(build, tmp_path)
    extension.sources += ["csrc/module.cu"]
    with pytest.raises(SystemExit, match="differ only in their suffix: csrc/module"):
        builder.configure(extension, None)


def test_a_changed_header_rebuilds_the_cuda_objects(build, tmp_path):
    builder, _ = command(build, tmp_path)
    for name, age in (("old", 0), ("new", 2**33)):
        (tmp_path / f"{name}.o").touch()
        os.utime(tmp_path / f"{name}.o", (age, age))
    builder.remove_stale_cuda_objects(["old.cu", "new.cu"])
    assert not (tmp_path / "old.o").exists() and (tmp_path / "new.o").exists()
