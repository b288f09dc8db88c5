"""What vendors publish about GPUs, and how many blocks fit on one of their multiprocessors.

Products without sparsity and with float32 accumulation, at boost clocks, of the fastest form of a
card (SXM, OAM). Sources: NVIDIA's data sheets of A100 80GB, L40S, H100 and H200, its architecture
papers of Ada (RTX 4090), RTX Blackwell (RTX 5090) and Blackwell (B200); AMD's data sheet of MI300X.
Limits of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; for gfx942 LLVM's AMDGPU backend guide.
"""

from dataclasses import dataclass

import torch

_REGISTERS = 65_536
# Registers are handed to warps in pieces of this many.
_REGISTER_PIECE = 256
_QUARTERS = 4
# Shared memory that CUDA takes for itself in each block, from compute capability 8.0 on.
_RESERVED = 1024
_SHARED_PIECE = 128


@dataclass(frozen=True)
class Device:
    """FLOP/s of dense matrix products by type, and bytes/s of memory."""

    name: str
    architecture: str
    multiprocessors: int
    bandwidth: float
    bf16: float
    fp16: float
    tf32: float
    fp32: float

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """FLOP/s of products of this type; tf32: float32 operands are rounded to TF32."""
        if dtype == torch.float32:
            return self.tf32 if tf32 else self.fp32
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}[dtype]


DEVICES = {
    device.name: device
    for device in (
        Device("A100", "sm_80", 108, 2.039e12, 312e12, 312e12, 156e12, 19.5e12),
        Device("L40S", "sm_89", 142, 0.864e12, 362.05e12, 362.05e12, 183e12, 91.6e12),
        Device("RTX 4090", "sm_89", 128, 1.008e12, 165.2e12, 165.2e12, 82.6e12, 82.6e12),
        Device("RTX 5090", "sm_120", 170, 1.792e12, 209.5e12, 209.5e12, 104.8e12, 104.8e12),
        Device("H100", "sm_90", 132, 3.35e12, 989.4e12, 989.4e12, 494.7e12, 66.9e12),
        Device("H200", "sm_90", 132, 4.8e12, 989.4e12, 989.4e12, 494.7e12, 66.9e12),
        Device("B200", "sm_100", 148, 8.0e12, 2250e12, 2250e12, 1100e12, 80e12),
        Device("MI300X", "gfx942", 304, 5.3e12, 1307.4e12, 1307.4e12, 653.7e12, 163.4e12),
    )
}


def find_device(name: str) -> Device:
    """A device by its name in `DEVICES`."""
    if name not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]


@dataclass(frozen=True)
class _Multiprocessor:
    threads: int
    blocks: int
    shared: int
    warp: int = 32


_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": _Multiprocessor(1536, 16, 100 * 1024),
    "sm_89": _Multiprocessor(1536, 24, 100 * 1024),
    "sm_90": _Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": _Multiprocessor(2048, 32, 228 * 1024),
    "sm_120": _Multiprocessor(1536, 24, 100 * 1024),
    "gfx942": _Multiprocessor(2048, 32, 64 * 1024, warp=64),
}


def resident_blocks(
    architecture: str, warps: int, registers: int | None, shared: int
) -> tuple[int, str]:
    """Blocks that fit on a multiprocessor at once, and what limits them.

    registers: of a thread; None (unknown, as on AMD) leaves their limit out. shared: bytes of a
    block. The tensor memory of sm_100 is not counted.
    """
    room = _MULTIPROCESSORS[architecture]
    limits = {"blocks": room.blocks, "threads": room.threads // (warps * room.warp)}
    reserved = 0 if architecture.startswith("gfx") else _RESERVED
    taken = _round_up(shared + reserved, _SHARED_PIECE)
    if taken:
        limits["shared memory"] = room.shared // taken
    if registers is not None:
        # Each quarter of a multiprocessor has its own registers and whole warps.
        of_warp = _round_up(max(registers, 1) * room.warp, _REGISTER_PIECE)
        limits["registers"] = _REGISTERS // _QUARTERS // of_warp * _QUARTERS // warps
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _round_up(value: int, piece: int) -> int:
    return -(-value // piece) * piece
