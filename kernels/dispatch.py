"""Which form of a kernel runs: the Triton one on a GPU, its PyTorch twin everywhere else.

    POSE_KERNELS=auto     (default) Triton for CUDA tensors on compute capability 8.0 or newer, else PyTorch
    POSE_KERNELS=torch    always PyTorch, also on a GPU
    POSE_KERNELS=triton   always Triton; CPU tensors need TRITON_INTERPRET=1, Triton's (slow) interpreter, too
    POSE_KERNELS=plain    every formula as it is written, in PyTorch, and no fast form of it in a method file

Read      plain, use_triton → choose
Used by   the bodies of the custom operators in deform_attn.py and selective_scan.py, so that torch.compile,
          which does not look into an operator, never meets an environment variable

A kernel file imports `triton` and `tl` from here. Where Triton is not installed (macOS, Windows) they are
stand-ins with which the `@triton.jit` functions can be defined, but not run.

`auto` falls back to PyTorch in exactly three cases, the last two with one printed line: no Triton is
installed, the GPU is too old, Triton cannot compile the kernel (no C compiler, a kernel too large for the GPU).
Any other exception is an error and is shown as one: a wrong launch must not turn into a slow, silent run.
"""
import os
import subprocess
from functools import lru_cache
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor

from common.errors import UserError

OLDEST = (8, 0)                 # compute capability of the A100: the oldest that the tests compile for
MODES = ("auto", "triton", "torch", "plain")

try:
    import triton
    import triton.language as tl
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    HAS_TRITON = True
    COMPILE_ERRORS = (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError)
except ModuleNotFoundError:
    triton, tl = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=object)
    HAS_TRITON = False
    COMPILE_ERRORS = ()

gave_up: set[str] = set()       # kernels that Triton could not compile: not tried again in this process


def mode() -> str:
    """The value of POSE_KERNELS. Raises UserError for a word that is none of the four."""
    word = os.environ.get("POSE_KERNELS", "auto")
    if word not in MODES:
        raise UserError(f"POSE_KERNELS={word} is unknown: use one of {', '.join(MODES)}")
    return word


def plain() -> bool:
    """Whether every formula is to run as it is written."""
    return mode() == "plain"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors; set before Python starts."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(*tensors: Tensor) -> bool:
    """Whether a kernel on these tensors, which lie on one device, is to be run by Triton.

    Raises UserError if POSE_KERNELS=triton asks for what cannot be: no Triton, or no interpreter on a CPU.
    """
    word, on_gpu = mode(), tensors[0].is_cuda
    if word in ("torch", "plain"):
        return False
    if word == "triton":
        if not HAS_TRITON:
            raise UserError("POSE_KERNELS=triton needs Triton: pip install triton, or unset POSE_KERNELS")
        if not on_gpu and not interpreting():
            raise UserError("POSE_KERNELS=triton with CPU tensors needs TRITON_INTERPRET=1, too: "
                            "set it, or unset POSE_KERNELS")
        return True
    return on_gpu and HAS_TRITON and new_enough(tensors[0].device)


@lru_cache
def new_enough(device: torch.device) -> bool:
    """Whether the GPU has compute capability 8.0; says so, once, where it has not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        print(f"kernels: PyTorch instead of Triton: {torch.cuda.get_device_name(device)} has compute "
              f"capability {capability[0]}.{capability[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}")
    return capability >= OLDEST


def choose(name: str, triton_form: Callable, torch_form: Callable, *arguments):
    """`triton_form(*arguments)` or `torch_form(*arguments)`, whichever `use_triton` says for the tensors there.

    With POSE_KERNELS=auto, a kernel that does not compile is replaced by its twin for the rest of the process,
    after one printed line. With POSE_KERNELS=triton the compiler's error is raised.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not use_triton(*tensors) or name in gave_up:
        return torch_form(*arguments)
    try:
        return triton_form(*arguments)
    except Exception as error:
        if mode() == "triton" or not is_compile_error(error):
            raise
        gave_up.add(name)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"kernels: PyTorch instead of Triton for {name}, which did not compile: {reason}")
        return torch_form(*arguments)


def is_compile_error(error: Exception) -> bool:
    """Whether Triton failed to make the kernel, rather than the kernel to run (which must not be hidden)."""
    no_c_compiler = isinstance(error, RuntimeError) and "C compiler" in str(error)      # for Triton's launcher
    return no_c_compiler or isinstance(error, COMPILE_ERRORS)
