"""The decoder of the native core, on the tensors of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from owl2.runtime import _native
from owl2.runtime.bundle import Manifest
from owl2.runtime.errors import BundleCorruptError
from owl2.runtime.open_file import OpenFile
from owl2.runtime.tensors import StoredTensor


@dataclass(frozen=True)
class OpenWeights:
    """A decoder and what it reads: as long as this object is referred to, so is the memory behind the decoder.

    Attributes:
        decoder: of the native core.
        mapped: the data file.
        views: of the weights.
    """

    decoder: _native.Decoder
    mapped: _native.MappedFile
    views: list[_native.View]


class _Reader:
    """Makes linear layers of tensors by name, and keeps the views."""

    def __init__(self, tensors: Mapping[str, StoredTensor], mapped: _native.MappedFile, group_size: int) -> None:
        self._tensors, self._mapped, self._group_size = tensors, mapped, group_size
        self.views: list[_native.View] = []
        self._orders: dict[str, _native.View] = {}

    def tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise BundleCorruptError(f"the decoder's graph has no tensor {name}; copy or export the bundle again")
        return self._tensors[name]

    def view(self, name: str) -> _native.View:
        entry = self.tensor(name)
        if entry.offset is None:
            view = _native.View.of(entry.data or b"")
        else:
            view = _native.View(self._mapped, entry.offset, entry.size)
        self.views.append(view)
        return view

    def optional(self, name: str) -> _native.View | None:
        return self.view(name) if name in self._tensors else None

    def _order(self, name: str) -> _native.View | None:
        """The order of a layer's columns: one view for all layers that share it, so that the core orders rows once."""
        if name not in self._tensors:
            return None
        shared = self._tensors[name].name
        if shared not in self._orders:
            self._orders[shared] = self.view(name)
        return self._orders[shared]

    def linear(self, name: str, outputs: int, inputs: int) -> _native.Linear:
        bias, columns = self.optional(f"{name}.bias"), self._order(f"{name}.columns")
        if f"{name}.weight" in self._tensors:
            half = self.tensor(f"{name}.weight").type == "float16"
            return _native.Linear.floats(outputs, inputs, half, self.view(f"{name}.weight"), bias, columns)
        codes, scales = self.tensor(f"{name}.codes"), self.tensor(f"{name}.scales")
        bits, group = _packing(codes, inputs, self._group_size)
        zeros = self.optional(f"{name}.zero_points")
        views = self.view(codes.name), self.view(scales.name)
        return _native.Linear.integers(outputs, inputs, bits, group, *views, zeros, bias, columns)


def _packing(codes: StoredTensor, inputs: int, group_size: int) -> tuple[int, int]:
    """Bits and group size of codes [N, G, group * bits / 8] for K ``inputs``."""
    if len(codes.shape) == 3 and group_size > 0 and codes.shape[1] == -(-inputs // group_size):
        bits, rest = divmod(8 * codes.shape[2], group_size)
        if bits in (4, 8) and not rest:
            return bits, group_size
    raise BundleCorruptError(f"{codes.name} has the shape {list(codes.shape)}, which no layer of {inputs} inputs has")


def open_weights(tensors: Mapping[str, StoredTensor], file: OpenFile, manifest: Manifest, threads: int) -> OpenWeights:
    """Map the data file and build the decoder; nothing is read.

    Raises:
        BundleCorruptError: tensors are missing or have other sizes than the model's.
    """
    beyond = f"layers.{manifest.model.decoder.num_hidden_layers}."
    if any(name.startswith(beyond) for name in tensors):
        raise BundleCorruptError(f"the decoder's graph has {beyond[:-1]}, beyond the model's last; export it again")
    config, mapped = manifest.model.decoder, _native.MappedFile(file.descriptor, file.size)
    reader = _Reader(tensors, mapped, manifest.weights.group_size)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    decoder = _native.Decoder(width, inner, heads, config.vocab_size, config.rms_norm_eps, threads)
    try:
        for index in range(config.num_hidden_layers):
            layer = f"layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            routed = [f"{attention}.{name}_proj.multiway.{branch}" for name in "kv" for branch in (0, 1)]
            square = [f"{attention}.q_proj", *routed, f"{attention}.o_proj"]
            linears = [reader.linear(name, width, width) for name in square]
            linears += [reader.linear(f"{mlp}.{name}_proj", inner, width) for name in ("gate", "up")]
            linears.append(reader.linear(f"{mlp}.down_proj", width, inner))
            gains = [reader.view(f"{layer}.{norm}.gains") for norm in ("input_layernorm", "post_attention_layernorm")]
            decoder.add_layer(gains[0], gains[1], linears)
        decoder.finish(reader.view("norm.weight"), reader.linear("lm_head", config.vocab_size, width))
    except ValueError as error:
        raise BundleCorruptError(f"the decoder's tensors do not fit the model: {error}; export it again") from error
    return OpenWeights(decoder, mapped, reader.views)
