"""What the makers of GPUs publish of them: what MFU is a share of, and what `unite-fast plan` reckons with.

Rates are dense (datasheets often give twice that, "with sparsity") and for bfloat16 products with float32 sums. Links
are per GPU and direction: half of what datasheets call the bandwidth of NVLink or PCIe.
"""

from dataclasses import dataclass

from unite_fast.errors import UserError

NDR, HDR, ETHERNET = 50.0, 25.0, 12.5
"""Networks: InfiniBand NDR (400 Gbit/s) and HDR (200 Gbit/s), Ethernet of 100 Gbit/s; GB/s and direction."""


@dataclass(frozen=True)
class GPU:
    key: str
    """As `--gpu` calls it."""
    names: tuple[str, ...]
    """As `torch.cuda.get_device_name` calls it, without the leading "NVIDIA "."""
    tflops: float
    """Dense bfloat16 peak, TFLOP/s."""
    memory: float
    """GB, as published; a driver keeps a little of it."""
    bandwidth: float
    """Of the memory, TB/s."""
    link: float
    """To the other GPUs of a node, GB/s and direction."""
    network: float
    """To other nodes, GB/s, GPU and direction: an assumption, what such machines are usually sold with."""
    source: str


GPUS = (
    GPU("a100", ("A100-SXM4-80GB",), 312, 80, 2.039, 300, HDR, "NVIDIA A100 datasheet (SXM, 80 GB)"),
    GPU("a100-40gb", ("A100-SXM4-40GB",), 312, 40, 1.555, 300, HDR, "NVIDIA A100 datasheet, 2020 (SXM, 40 GB)"),
    GPU("a100-pcie", ("A100 80GB PCIe",), 312, 80, 1.935, 32, HDR, "NVIDIA A100 datasheet (PCIe, 80 GB)"),
    GPU("h100", ("H100 80GB HBM3",), 989, 80, 3.35, 450, NDR, "NVIDIA H100 datasheet (SXM)"),
    GPU("h100-pcie", ("H100 PCIe",), 756, 80, 2.0, 64, HDR, "NVIDIA H100 datasheet, 2022 (PCIe)"),
    GPU("h100-nvl", ("H100 NVL",), 835, 94, 3.9, 300, HDR, "NVIDIA H100 datasheet (NVL)"),
    GPU("h200", ("H200",), 989, 141, 4.8, 450, NDR, "NVIDIA H200 datasheet (SXM)"),
    GPU("h200-nvl", ("H200 NVL",), 835, 141, 4.8, 450, HDR, "NVIDIA H200 datasheet (NVL)"),
    GPU("b200", ("B200",), 2250, 180, 8.0, 900, NDR, "NVIDIA DGX B200 and HGX datasheets (a GPU of eight)"),
    GPU("gb200", ("GB200",), 2500, 186, 8.0, 900, NDR, "NVIDIA GB200 NVL72 datasheet (a GPU of 72)"),
    GPU("l4", ("L4",), 121, 24, 0.3, 32, ETHERNET, "NVIDIA L4 datasheet"),
    GPU("l40s", ("L40S",), 362, 48, 0.864, 32, ETHERNET, "NVIDIA L40S datasheet"),
    GPU("a10", ("A10",), 125, 24, 0.6, 32, ETHERNET, "NVIDIA A10 datasheet"),
    GPU("rtx3090", ("GeForce RTX 3090",), 71, 24, 0.936, 32, ETHERNET, "NVIDIA GA102 whitepaper, appendix A"),
    GPU("rtx4090", ("GeForce RTX 4090",), 165.2, 24, 1.008, 32, ETHERNET, "NVIDIA Ada whitepaper, appendix A"),
    GPU("rtx5090", ("GeForce RTX 5090",), 209.5, 32, 1.792, 64, ETHERNET, "NVIDIA RTX Blackwell whitepaper, appendix"),
)


def find_gpu(key: str) -> GPU:
    """A GPU by its key.

    Raises:
        UserError: not in the table.
    """
    for gpu in GPUS:
        if gpu.key == key.lower():
            return gpu
    raise UserError(f"there is no GPU {key!r} in the table; known: {', '.join(gpu.key for gpu in GPUS)}")


def recognise(device_name: str) -> GPU | None:
    """The GPU that torch calls so. Only whole names count: parts of a GPU (MIG), laptops' and other variants have other
    rates than the card they are named after."""
    name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS if name in gpu.names), None)
