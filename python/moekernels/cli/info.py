"""`moekernels info`: what is installed, and what it can use here."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from moekernels import build_info, cmake_dir, include_dir
from moekernels._library import _C
from moekernels.cli.table import listing


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, compilers, instruction sets and devices",
        description="Print what this build is made of and what it can use on this machine.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs and bug reports")
    parser.add_argument("--cmake-dir", action="store_true", help="only where find_package(moekernels) finds it")
    parser.add_argument("--include-dir", action="store_true", help="only where the C++ headers are")
    parser.set_defaults(run=run)


def devices() -> list[dict[str, Any]]:
    """The devices models can run on."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "arch": f"sm_{properties.major}{properties.minor}",
                "code": code_for(properties.major, properties.minor),
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def code_for(major: int, minor: int) -> str:
    """Which CUDA kernels of this build a GPU of this compute capability runs: ``sm_90a``, ``PTX of sm_89`` or none."""
    return _C.cuda_code_for(" ".join(build_info()["cuda_archs"]), 10 * major + minor)


def run(args: argparse.Namespace) -> int:
    if args.cmake_dir or args.include_dir:
        print(cmake_dir() if args.cmake_dir else include_dir())
        return 0
    build = build_info()
    if args.json:
        print(json.dumps({**build, "devices": devices()}, indent=2))
        return 0
    cuda = f"{', '.join(build['cuda_archs'])} ({build['cuda_compiler']})"
    print(
        listing(
            {
                "moekernels": f"{build['version']} (git {build['git_revision']})",
                "torch": f"{build['torch_running']} (built against {build['torch_built']})",
                "python": platform.python_version(),
                "C++ compiler": build["cxx_compiler"],
                "CPU kernels": f"{build['cpu_isa']} in use, of {', '.join(build['cpu_isas'])}",
                "CUDA kernels": cuda if build["cuda_archs"] else f"none: {build['cuda_reason']}",
                "devices": "\n".join(_described(device) for device in devices()),
            }
        )
    )
    return 0


def _described(device: dict[str, Any]) -> str:
    if device["device"] == "cpu":
        return f"cpu: {device['name']}, {device['threads']} threads"
    code = f"runs {device['code']}" if device["code"] else "no CUDA kernels for it in this build"
    return f"{device['device']}: {device['name']}, {device['arch']}, {device['memory_gib']} GiB, {code}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
