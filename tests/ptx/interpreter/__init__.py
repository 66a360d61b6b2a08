"""An interpreter for the PTX that nvcc makes of CUDA kernels, on numpy: it runs them where there is no GPU,
and finds their faults.

    module = parse(ptx)
    memory = GlobalMemory()
    memory.add(tensor.data_ptr(), tensor.nbytes, "weight")
    launch(module, kernel, grid, block, dynamic_shared, params, memory)

A PtxFault names the kernel, the source lines (`nvcc -ptx -lineinfo`), block and thread of: accesses out of
bounds or misaligned, reads of uninitialised shared memory (and global memory added with `initialised=False`),
races in shared and global memory, barriers that not all threads reach, cp.async data used before its wait,
warp instructions whose lanes are not together, and instructions that are not known.

What is not modelled: the values of approximate functions beyond the correctly rounded ones, payloads of NaNs,
order between blocks by fences and atomics (it is reported as a race), and threads that spin until others let
them go.
"""

from .coverage import Missed, missed
from .faults import PtxFault
from .machine import launch
from .memory import GlobalMemory
from .module import Module, Param
from .parser import parse

__all__ = ["GlobalMemory", "Missed", "Module", "Param", "PtxFault", "launch", "missed", "parse"]
