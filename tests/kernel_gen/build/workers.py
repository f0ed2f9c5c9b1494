"""What workers do in the pool's tests. A spec's number of stages says what happens to it."""

import os
import signal
import time

from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.gate import CodeFacts
from kernel_gen.kernels import KernelSpec
from kernel_gen.pool import Outcome

DIES, IS_KILLED, HANGS, FULL_DISK, IS_A_BUG = 21, 22, 23, 24, 25


def finish(spec: KernelSpec, cache: KernelCache) -> Outcome:
    match spec.config.num_stages:
        case 21:
            os._exit(7)
        case 22:
            os.kill(os.getpid(), signal.SIGKILL)
        case 23:
            time.sleep(600)
        case 24:
            raise OSError(28, "No space left on device", str(cache.root))
        case 25:
            raise ZeroDivisionError("a bug in a kernel")
    return Artifact(spec=spec, object_path=cache.root / str(os.getpid()), code=NO_CODE, compile_seconds=0.1)


NO_CODE = CodeFacts(registers_per_thread=32, static_smem_bytes=0, stack_bytes=0, spill_bytes=0, mma_instructions=())
