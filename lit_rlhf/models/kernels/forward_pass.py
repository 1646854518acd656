"""A forward pass for sampling from GPT-2-, Llama- and Qwen-style models, over the weights of transformers'.

Where a step is small, transformers' modules spend most of it between the matrix products, on Python and elementwise
operations. Here queries, keys and values come from one product, scales and the gains of RMSNorm are multiplied into
the matrices, rotary positions are one complex product, and residuals are added by the products themselves. The
function is the same, to rounding. It holds no gradients: training runs through transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.adapters import effective_bias, effective_weight, wrapped_module
from lit_rlhf.models.gathering import full
from lit_rlhf.models.kernels.attention import SDPA, has_window
from lit_rlhf.models.kernels.gelu import gelu_tanh
from lit_rlhf.models.kernels.onednn import has_onednn, rows_up_to, with_rows_added
from lit_rlhf.models.quantization import is_quantized

# (layer, queries (N, Hq, D), keys and values (N, 2, Hkv, D)) -> what was attended to (N, Hq * D)
Attend = Callable[[int, Tensor, Tensor], Tensor]
LARGE = 2**17  # elements of a matrix from where on oneDNN's own layout of it pays
ROWS = 4  # of which their number is a multiple then: answers end one by one, and each number would be another product


class Product(NamedTuple):
    """A matrix to multiply with, and a bias to add."""

    matrix: Tensor  # (in, out), or, where `packed`, laid out as oneDNN wants it
    bias: Tensor | None  # (out,)
    packed: bool

    @staticmethod
    def of(matrix: Tensor, bias: Tensor | None) -> Product:
        """The product with one matrix (in, out), used many times: then oneDNN is faster than ``mm`` on a CPU."""
        kind, large = matrix.device.type, matrix.dtype == torch.float32 and matrix.numel() >= LARGE
        if not large or not has_onednn() or kind not in ("cpu", "meta"):
            return Product(matrix, bias, False)
        turned = matrix.t().contiguous()
        packed = turned if kind == "meta" else torch.ops.mkldnn._reorder_linear_weight(turned, None)
        return Product(packed, bias, True)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x @ matrix + bias + residual``."""
        if self.packed:
            y = with_rows_added(self._by_onednn, x, rows_up_to(ROWS, len(x)))
            return y if residual is None else y.add_(residual)
        if residual is None:
            return x @ self.matrix if self.bias is None else torch.addmm(self.bias, x, self.matrix)
        return torch.addmm(residual if self.bias is None else residual + self.bias, x, self.matrix)

    def _by_onednn(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")
        return found


class Layer(NamedTuple):
    """One block; E is the width of the model, I that of its MLP."""

    norm: tuple[Tensor, Tensor] | None  # LayerNorm's gain and bias; None: RMSNorm, its gain is in the matrices
    qkv: Product  # (E, (Hq + 2 Hkv) * D); queries are scaled by D^-1/2
    q_norm: Tensor | None  # (D,) gain of a norm on queries (Qwen3), scaled as above
    k_norm: Tensor | None
    out: Product  # (Hq * D, E)
    mlp_norm: tuple[Tensor, Tensor] | None
    up: Product  # (E, I), or (E, 2 I) where gated: gate and up
    down: Product  # (I, E)


class ForwardPass:
    """The model between token ids and its last hidden states.

    ``ForwardPass.of`` makes one, or None for what is not known here: other families, a window on attention, positions
    that are scaled while a text grows, attention other than "sdpa" (whoever chose it had a reason)."""

    def __init__(
        self,
        embedding: Tensor,
        positions: Tensor,
        layers: list[Layer],
        norm: tuple[Tensor, Tensor] | Tensor,
        activation: Callable[[Tensor], Tensor],
        heads: tuple[int, int, int],
        epsilon: float,
        head: Product,
    ) -> None:
        self.embedding = embedding  # (V, E)
        self.positions = positions  # (S, E) learned, or (S, D / 2) complex rotations
        self.layers, self.norm, self.activation = layers, norm, activation
        self.query_heads, self.kv_heads, self.head_size = heads
        self.epsilon = epsilon
        self.head = head  # (E, V), the output embedding

    @staticmethod
    def knows(model: PreTrainedModel) -> bool:
        """Whether this class supports the architecture and settings of ``model``."""
        config = model.config
        if config._attn_implementation not in SDPA or has_window(model):
            return False
        if is_quantized(model):  # numbers of a whole model are what it was to do without
            return False
        if config.model_type == "gpt2":
            return config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        return config.model_type in ("llama", "qwen2", "qwen3") and rope in ("default", "linear", "llama3")

    @staticmethod
    def of(model: PreTrainedModel, length: int, dtype: torch.dtype | None = None) -> ForwardPass | None:
        """The pass of ``model`` for texts of at most ``length`` tokens, in ``dtype`` (None: the model's own)."""
        if not ForwardPass.knows(model):
            return None
        make = _gpt2 if model.config.model_type == "gpt2" else _llama
        return make(model, length, dtype or model.dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend, at: Tensor | None = None) -> Tensor:
        """Hidden states (N, E), ready for the output embedding, of ``tokens`` (N,) at ``positions`` (N,).

        ``at`` (M,): those of these tokens alone, (M, E), behind a last layer that computes no others."""
        x = self.embedding[tokens]
        rotation = None
        if self.positions.is_complex():
            rotation = self.positions[positions][:, None]
        else:
            x = x + self.positions[positions]
        for i, layer in enumerate(self.layers):
            attended = self._attention(i, layer, self._normed(x, layer.norm), rotation, attend)
            if at is not None and i == len(self.layers) - 1:
                x, attended = x[at], attended[at]
            x = layer.out(attended, x)
            x = layer.down(self.activation(layer.up(self._normed(x, layer.mlp_norm))), x)
        if isinstance(self.norm, tuple):
            return F.layer_norm(x, x.shape[-1:], *self.norm, self.epsilon)
        return _rms(x, self.epsilon) * self.norm

    def _normed(self, x: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        return _rms(x, self.epsilon) if norm is None else F.layer_norm(x, x.shape[-1:], *norm, self.epsilon)

    def _attention(self, i: int, layer: Layer, x: Tensor, rotation: Tensor | None, attend: Attend) -> Tensor:
        heads = layer.qkv(x).view(len(x), -1, self.head_size)
        turned = heads[:, : self.query_heads + self.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            turned[:, : self.query_heads] = _rms(turned[:, : self.query_heads], self.epsilon) * layer.q_norm
            turned[:, self.query_heads :] = _rms(turned[:, self.query_heads :], self.epsilon) * layer.k_norm
        if rotation is not None:
            _turn(turned, rotation)
        return attend(i, turned[:, : self.query_heads], torch.unflatten(heads[:, self.query_heads :], 1, (2, -1)))


def _turn(heads: Tensor, rotation: Tensor) -> None:
    """Turn ``heads`` (N, H, D) in place; complex numbers have no half precision."""
    if heads.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(torch.unflatten(heads, -1, (-1, 2))).mul_(rotation)
    else:
        turned = torch.view_as_complex(torch.unflatten(heads.float(), -1, (-1, 2))) * rotation
        heads.copy_(torch.view_as_real(turned).flatten(-2))


def _rms(x: Tensor, epsilon: float) -> Tensor:
    """RMSNorm without a gain, in float32 at least (arXiv:1910.07467)."""
    wide = x if x.dtype == torch.float64 else x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * torch.rsqrt(size.square().div_(x.shape[-1]).add_(epsilon))).to(x.dtype)


def _matrix(module: nn.Module) -> Tensor:
    """The matrix (in, out) of a linear module, with its adapters where it has any."""
    weight = _weight(module)
    return weight if isinstance(wrapped_module(module), Conv1D) else weight.t()


def _weight(module: nn.Module) -> Tensor:
    return full(effective_weight(module).detach())


def _bias(module: nn.Module) -> Any:
    bias = effective_bias(module)
    return None if bias is None else full(bias.detach())


def _head(model: PreTrainedModel, dtype: torch.dtype) -> Product:
    module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    bias = _bias(module)
    return Product.of(_weight(module).t().to(dtype), None if bias is None else bias.to(dtype))


def _gpt2(model: PreTrainedModel, length: int, dtype: torch.dtype) -> ForwardPass:
    backbone: Any = model.base_model
    config = model.config
    size = config.n_embd // config.n_head

    def norm(module: nn.Module) -> tuple[Tensor, Tensor]:
        return _weight(module).to(dtype), _bias(module).to(dtype)

    def product(module: nn.Module, scaled: bool = False) -> Product:
        matrix, bias = _matrix(module), _bias(module)
        if scaled:
            scale = torch.ones(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            scale[: config.n_embd] = size**-0.5
            matrix, bias = matrix * scale, bias * scale
        return Product.of(matrix.to(dtype), bias.to(dtype))

    layers = [
        Layer(
            norm(block.ln_1),
            product(block.attn.c_attn, scaled=True),
            None,
            None,
            product(block.attn.c_proj),
            norm(block.ln_2),
            product(block.mlp.c_fc),
            product(block.mlp.c_proj),
        )
        for block in backbone.h
    ]
    smooth = config.activation_function in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function, three names
    activation = gelu_tanh if smooth else backbone.h[0].mlp.act
    positions = _weight(backbone.wpe)[:length].to(dtype)
    embedding = _weight(backbone.wte).to(dtype)
    heads, epsilon = (config.n_head, config.n_head, size), config.layer_norm_epsilon
    return ForwardPass(
        embedding, positions, layers, norm(backbone.ln_f), activation, heads, epsilon, _head(model, dtype)
    )


def _paired(x: Tensor, size: int) -> Tensor:
    """Columns (..., H * D), D the ``size``, with pairs (i, i + D/2) of a head side by side: rotation turns each pair,
    which is a complex number then."""
    pairs = torch.arange(size, device=x.device).view(2, -1).t().flatten()
    return torch.unflatten(x, -1, (-1, size))[..., pairs].flatten(-2)


def _side_by_side(
    modules: list[nn.Module], gain: Tensor | None, dtype: torch.dtype, size: int = 0, factors: tuple[float, ...] = ()
) -> Product:
    """``modules`` as one product, their inputs times the ``gain``; the first ones times a factor each, and paired."""
    parts, biases = [], []
    for i, module in enumerate(modules):
        matrix, bias = _matrix(module), _bias(module)
        if i < len(factors):
            matrix = _paired(matrix, size) * factors[i]
            bias = None if bias is None else _paired(bias, size) * factors[i]
        parts.append(matrix)
        biases.append(bias)
    matrix = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if gain is not None:
        matrix = gain[:, None] * matrix
    if all(bias is None for bias in biases):
        return Product.of(matrix.to(dtype), None)
    zeros = [torch.zeros_like(part[0]) if bias is None else bias for part, bias in zip(parts, biases)]
    return Product.of(matrix.to(dtype), torch.cat(zeros).to(dtype))


def _llama(model: PreTrainedModel, length: int, dtype: torch.dtype) -> ForwardPass:
    backbone: Any = model.base_model
    config = model.config
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    layers = []
    for block in backbone.layers:
        attention, mlp = block.self_attn, block.mlp
        normed = hasattr(attention, "q_norm")
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        factors = 1.0 if normed else size**-0.5, 1.0
        layers.append(
            Layer(
                None,
                _side_by_side(heads, _weight(block.input_layernorm), dtype, size, factors),
                (_paired(_weight(attention.q_norm), size) * size**-0.5).to(dtype) if normed else None,
                _paired(_weight(attention.k_norm), size).to(dtype) if normed else None,
                _side_by_side([attention.o_proj], None, dtype),
                None,
                _side_by_side([mlp.gate_proj, mlp.up_proj], _weight(block.post_attention_layernorm), dtype),
                _side_by_side([mlp.down_proj], None, dtype),
            )
        )
    inner, function = config.intermediate_size, backbone.layers[0].mlp.act_fn
    norm = _weight(backbone.norm)
    cos, sin = backbone.rotary_emb(norm.float(), torch.arange(length, device=norm.device)[None])
    half, precise = size // 2, torch.complex128 if dtype == torch.float64 else torch.complex64
    return ForwardPass(
        _weight(backbone.embed_tokens).to(dtype),
        torch.complex(cos[0, :, :half], sin[0, :, :half]).to(precise),
        layers,
        norm.to(dtype),
        lambda x: function(x[:, :inner]).mul_(x[:, inner:]),
        (queries, keys, size),
        config.rms_norm_eps,
        _head(model, dtype),
    )
