"""Published figures of GPUs: the denominator of MFU, and the inputs of `unite-fast plan`.

Rates are dense (datasheets often give twice that, "with sparsity"), for bfloat16 matmuls with float32 accumulation.
Links are per GPU and direction: half of what datasheets call the bandwidth of NVLink or PCIe.
"""

from dataclasses import dataclass

from unite_fast.errors import UserError

NDR, HDR, ETHERNET = 50.0, 25.0, 12.5
"""Networks: InfiniBand NDR (400 Gbit/s) and HDR (200 Gbit/s), Ethernet (100 Gbit/s); GB/s per direction."""


@dataclass(frozen=True)
class GPU:
    key: str
    """Its name for `--gpu`."""
    names: tuple[str, ...]
    """Its names in `torch.cuda.get_device_name`, without the leading "NVIDIA "."""
    tflops: float
    """Dense bfloat16 peak, TFLOP/s."""
    memory: float
    """Memory as published, GB; the driver keeps a little of it."""
    bandwidth: float
    """Memory bandwidth, TB/s."""
    link: float
    """To the other GPUs of the node, GB/s per direction."""
    network: float
    """To other nodes, GB/s per GPU and direction. Assumed: what such machines are usually sold with."""
    source: str
    float8: bool = True
    """Whether it multiplies float8 numbers; the datasheets of all that do give twice the bfloat16 rate."""

    @property
    def float8_tflops(self) -> float:
        """Dense float8 peak, TFLOP/s; 0: none."""
        return 2 * self.tflops if self.float8 else 0.0


GPUS = (
    GPU("a100", ("A100-SXM4-80GB",), 312, 80, 2.039, 300, HDR, "NVIDIA A100 datasheet (SXM, 80 GB)", False),
    GPU("a100-40gb", ("A100-SXM4-40GB",), 312, 40, 1.555, 300, HDR, "NVIDIA A100 datasheet, 2020 (SXM, 40 GB)", False),
    GPU("a100-pcie", ("A100 80GB PCIe",), 312, 80, 1.935, 32, HDR, "NVIDIA A100 datasheet (PCIe, 80 GB)", False),
    GPU("h100", ("H100 80GB HBM3",), 989, 80, 3.35, 450, NDR, "NVIDIA H100 datasheet (SXM)"),
    GPU("h100-pcie", ("H100 PCIe",), 756, 80, 2.0, 64, HDR, "NVIDIA H100 datasheet, 2022 (PCIe)"),
    GPU("h100-nvl", ("H100 NVL",), 835, 94, 3.9, 300, HDR, "NVIDIA H100 datasheet (NVL)"),
    GPU("h200", ("H200",), 989, 141, 4.8, 450, NDR, "NVIDIA H200 datasheet (SXM)"),
    GPU("h200-nvl", ("H200 NVL",), 835, 141, 4.8, 450, HDR, "NVIDIA H200 datasheet (NVL)"),
    GPU("b200", ("B200",), 2250, 180, 8.0, 900, NDR, "NVIDIA DGX B200 and HGX datasheets (one GPU of eight)"),
    GPU("gb200", ("GB200",), 2500, 186, 8.0, 900, NDR, "NVIDIA GB200 NVL72 datasheet (one GPU of 72)"),
    GPU("l4", ("L4",), 121, 24, 0.3, 32, ETHERNET, "NVIDIA L4 datasheet"),
    GPU("l40s", ("L40S",), 362, 48, 0.864, 32, ETHERNET, "NVIDIA L40S datasheet"),
    GPU("a10", ("A10",), 125, 24, 0.6, 32, ETHERNET, "NVIDIA A10 datasheet", False),
    GPU("rtx3090", ("GeForce RTX 3090",), 71, 24, 0.936, 32, ETHERNET, "NVIDIA GA102 whitepaper, appendix A", False),
    GPU("rtx4090", ("GeForce RTX 4090",), 165.2, 24, 1.008, 32, ETHERNET, "NVIDIA Ada whitepaper, appendix A"),
    GPU("rtx5090", ("GeForce RTX 5090",), 209.5, 32, 1.792, 64, ETHERNET, "NVIDIA RTX Blackwell whitepaper, appendix"),
)


def find_gpu(key: str) -> GPU:
    """The GPU with this key.

    Raises:
        UserError: not in the table.
    """
    for gpu in GPUS:
        if gpu.key == key.lower():
            return gpu
    raise UserError(f"there is no GPU {key!r} in the table; known: {', '.join(gpu.key for gpu in GPUS)}")


def recognise(device_name: str) -> GPU | None:
    """The GPU with this name in torch, None if unknown. Only full names match: slices of a GPU (MIG), laptop GPUs and
    other variants have other rates than the card they are named after."""
    name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS if name in gpu.names), None)
