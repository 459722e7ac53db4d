"""Which dialect reads which folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nybble.core.errors import CheckpointError
from nybble.formats.dialects.awq import read_awq
from nybble.formats.dialects.bnb import read_bnb
from nybble.formats.dialects.compressed import read_compressed
from nybble.formats.dialects.gptq import read_gptq
from nybble.formats.dialects.logical import Logical, Tensors
from nybble.formats.safetensors import SafeTensor

Reader = Callable[[Mapping[str, object], Tensors, str], list[Logical]]
READERS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "bitsandbytes": read_bnb,
    "compressed-tensors": read_compressed,
}
# What belongs to a quantised matrix, besides its codes.
_PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
    ".SCB", ".weight_format", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point",
    ".weight_g_idx", ".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale",
)  # fmt: skip


def read_dialect(
    config: Mapping[str, object], tensors: Tensors, where: str
) -> tuple[dict[str, SafeTensor], dict[str, Logical]]:
    """The folder's ordinary tensors, and its quantised matrices by the names that an ordinary folder has for them.

    config: the quantisation config.

    Raises:
        CheckpointError: the method is not known, or the folder is not as it should be.
    """
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # as its first version wrote it
    reader = READERS.get(str(method))
    if reader is None:
        raise CheckpointError(
            f"{where}: folders quantised with {str(method)!r} are not supported (supported: {', '.join(READERS)}): use "
            "the full-precision folder or a GGUF"
        )
    packed = {logical.name: logical for logical in reader(config, tensors, where)}
    used = {stored.name for logical in packed.values() for stored in logical.parts}
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not name.endswith(_PARTS) and ".quant_state." not in name
    }
    return plain, packed
