"""One decoder layer: each linear layer is quantized with the rows of its own branch, on the quantized prefix."""

from dataclasses import replace

import pytest
import torch

from owl2.quant.config import Method, QuantConfig
from owl2.quant.gptq import gptq
from owl2.quant.grid import rtn
from owl2.quant.layer import LINEARS, quantize_layer
from owl2.quant.models.mplug_owl2 import DecoderLayer, Routing, rotary_tables
from owl2.quant.models.mplug_owl2.decoder import rotate
from owl2.quant.stream import Calibration, HiddenStates, Stream
from owl2.runtime.config import DecoderConfig
from owl2.runtime.errors import CalibrationError, QuantizationError

CONFIG = DecoderConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
QUANT = QuantConfig(group_size=32, asymmetry=0.0)
MODALITIES = ([0, 0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 12, [1, 1, 1, 0, 0])


def make_layer() -> DecoderLayer:
    torch.manual_seed(1)
    layer = DecoderLayer(CONFIG).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def make_stream(modalities: tuple[list[int], ...] = MODALITIES, repeats: int = 12) -> Stream:
    """Rows before the first layer."""
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for modality in modalities * repeats:
        rows = torch.randn(len(modality), CONFIG.hidden_size, generator=generator)
        # Image rows live in other directions than text rows, as they do in the real model.
        rows[torch.tensor(modality) == 1] *= torch.linspace(0.1, 3.0, CONFIG.hidden_size)
        sequences.append(HiddenStates.of(rows, torch.tensor(modality)))
    return Stream(CONFIG, sequences)


def second_moment(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (2.0 / weights.sum()) * (weights[:, None] * rows).T @ rows


def normalised(layer: DecoderLayer, rows: torch.Tensor, routing: Routing, name: str) -> torch.Tensor:
    """RMSNorm written out."""
    scaled = rows / (rows.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()
    gains = torch.stack([layer.get_parameter(f"{name}.multiway.{branch}.weight") for branch in range(2)])
    modality = torch.zeros(len(rows), dtype=torch.int64)
    modality[routing.image] = 1
    return scaled * gains[modality]


def attended(layer: DecoderLayer, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The input of o_proj, head by head, query by query."""
    attention, tokens, width = layer.self_attn, len(rows), CONFIG.head_dim
    q, k, v = attention.q_proj(rows), attention.k_proj(rows, routing), attention.v_proj(rows, routing)
    cos, sin = rotary_tables(CONFIG, tokens, tokens)
    out = torch.empty_like(q)
    for head in range(CONFIG.num_attention_heads):
        part = slice(head * width, (head + 1) * width)
        turned_q, turned_k = (rotate(x[None, None, :, part], cos, sin)[0, 0] for x in (q, k))
        for position in range(tokens):
            scores = turned_k[: position + 1] @ turned_q[position] / width**0.5
            out[position, part] = scores.softmax(0) @ v[: position + 1, part]
    return out


@torch.no_grad()
def test_each_weight_is_gptq_of_its_own_rows_after_the_quantized_ones() -> None:
    """Everything is computed again from the definition, with the layer as it stands after each step."""
    layer, stream = make_layer(), make_stream()
    made = quantize_layer(layer, make_layer(), Calibration(stream.copy()), QUANT, "layers.0")
    slow = make_layer()

    def check(name: str, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        hessian = second_moment(rows, torch.ones(len(rows)) if weights is None else weights)
        expected, _ = gptq(slow.get_parameter(f"{name}.weight"), hessian, QUANT)
        different = (made[name].weight.codes != expected.codes).float().mean()
        assert different < 0.005, name  # sums in another order move a few values that lie between two codes
        slow.get_parameter(f"{name}.weight").copy_(made[name].weight.dequantize())

    pairs = [(sequence.rows, sequence.routing) for sequence in stream.sequences]
    normed = [normalised(slow, rows, routing, "input_layernorm") for rows, routing in pairs]
    text = torch.cat([rows[routing.text] for rows, (_, routing) in zip(normed, pairs)])
    image = torch.cat([rows[routing.image] for rows, (_, routing) in zip(normed, pairs)])
    # Where both modalities come in, an image row counts less.
    weights = torch.cat([torch.ones(len(rows)).index_fill(0, r.image, QUANT.image_weight) for rows, r in pairs])
    check("self_attn.q_proj", torch.cat(normed), weights)
    for name in ("k_proj", "v_proj"):
        check(f"self_attn.{name}.multiway.0", text)
        check(f"self_attn.{name}.multiway.1", image)
    contexts = [attended(slow, rows, routing) for rows, (_, routing) in zip(normed, pairs)]
    check("self_attn.o_proj", torch.cat(contexts), weights)
    hidden = [rows + slow.self_attn.o_proj(context) for (rows, _), context in zip(pairs, contexts)]
    normed = [normalised(slow, rows, routing, "post_attention_layernorm") for rows, (_, routing) in zip(hidden, pairs)]
    for name in ("gate_proj", "up_proj"):
        check(f"mlp.{name}", torch.cat(normed), weights)
    gated = [torch.nn.functional.silu(slow.mlp.gate_proj(rows)) * slow.mlp.up_proj(rows) for rows in normed]
    check("mlp.down_proj", torch.cat(gated), weights)


def test_the_layer_computes_with_the_stored_weights_afterwards() -> None:
    layer = make_layer()
    made = quantize_layer(layer, make_layer(), Calibration(make_stream()), QUANT, "layers.0")
    assert set(made) == set(LINEARS)
    for name, quantized in made.items():
        torch.testing.assert_close(layer.get_parameter(f"{name}.weight").detach(), quantized.weight.dequantize())
        assert quantized.report is not None
        assert quantized.report.error < quantized.report.rtn_error


def test_the_branches_do_not_share_a_hessian() -> None:
    """With only text rows in its Hessian, the image branch loses more on image rows."""
    layer, stream = make_layer(), make_stream()
    made = quantize_layer(layer, make_layer(), Calibration(stream.copy()), QUANT, "layers.0")
    name = "self_attn.k_proj.multiway.1"
    fresh = make_layer()
    with torch.no_grad():
        rows = [normalised(fresh, s.rows, s.routing, "input_layernorm") for s in stream.sequences]
        text = torch.cat([r[s.routing.text] for r, s in zip(rows, stream.sequences)])
        image = torch.cat([r[s.routing.image] for r, s in zip(rows, stream.sequences)])
        weight = fresh.get_parameter(f"{name}.weight")
        mistaken, _ = gptq(weight, second_moment(text, torch.ones(len(text))), QUANT)
        errors = [float((image @ (weight - w.dequantize()).T).pow(2).mean()) for w in (made[name].weight, mistaken)]
    assert errors[0] < 0.8 * errors[1]


@torch.no_grad()
def test_quantizing_moves_no_rows_and_changes_no_original() -> None:
    calibration, original, before = Calibration(make_stream()), make_layer(), make_layer()
    quantize_layer(make_layer(), original, calibration, QUANT, "layers.0")
    for stream in (calibration.quantized, calibration.original):
        for sequence, old in zip(stream.sequences, make_stream().sequences):
            assert torch.equal(sequence.rows, old.rows)
    for parameter, unchanged in zip(original.parameters(), before.parameters()):
        assert torch.equal(parameter, unchanged)


@torch.no_grad()
def test_each_stream_moves_through_its_own_layer() -> None:
    calibration, layer = Calibration(make_stream()), make_layer()
    quantize_layer(layer, make_layer(), calibration, QUANT, "layers.0")
    calibration.advance(layer, make_layer())
    for stream, through in ((calibration.quantized, layer), (calibration.original, make_layer())):
        expected = make_stream()
        expected.advance(through)
        for moved, wanted in zip(stream.sequences, expected.sequences):
            torch.testing.assert_close(moved.rows, wanted.rows)


@torch.no_grad()
def test_aiming_at_the_original_output_brings_the_layer_closer_to_it() -> None:
    """Two layers: what the second makes of rows that the first has changed, against the original model."""
    errors = []
    for share in (0.0, 0.5):
        calibration, config = Calibration(make_stream()), replace(QUANT, asymmetry=share)
        for index in range(2):
            layer = make_layer()
            quantize_layer(layer, make_layer(), calibration, config, f"layers.{index}")
            calibration.advance(layer, make_layer())
        pairs = zip(calibration.quantized.sequences, calibration.original.sequences)
        errors.append(sum(float((quantized.rows - original.rows).pow(2).sum()) for quantized, original in pairs))
    assert errors[1] < 0.97 * errors[0]


def test_no_image_rows_is_an_error_and_not_silent_rounding() -> None:
    stream = make_stream(([0, 0, 0, 0],))
    with pytest.raises(
        CalibrationError, match=r"layers\.7 keys and values, image rows: the calibration data has no such rows"
    ):
        quantize_layer(make_layer(), make_layer(), Calibration(stream), QUANT, "layers.7")


def test_gptq_without_rows_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"layers.3: GPTQ needs calibration rows; .* method rtn on purpose"):
        quantize_layer(make_layer(), None, None, QUANT, "layers.3")


def test_rounding_needs_no_rows() -> None:
    layer, config = make_layer(), QuantConfig(group_size=32, method="rtn")
    original = {name: layer.get_parameter(f"{name}.weight").detach().clone() for name in LINEARS}
    for name, quantized in quantize_layer(layer, None, None, config, "layers.0").items():
        assert torch.equal(quantized.weight.codes, rtn(original[name], config).codes)
        assert quantized.report is None


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_skipped_weights_stay_and_the_others_see_their_outputs(method: Method) -> None:
    skipped = {"self_attn.k_proj.multiway.1", "mlp.gate_proj", "mlp.up_proj"}
    layer, whole, config = make_layer(), make_layer(), QuantConfig(group_size=32, method=method)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    made = quantize_layer(layer, make_layer(), Calibration(make_stream()), config, "layers.0", skipped)
    assert set(made) == set(LINEARS) - skipped
    for name in skipped:
        assert torch.equal(layer.get_parameter(f"{name}.weight"), before[f"{name}.weight"])
    everything = quantize_layer(whole, make_layer(), Calibration(make_stream()), config, "layers.0")
    for name in made:
        same = torch.equal(made[name].weight.codes, everything[name].weight.codes)
        # Everything after the image keys sees other inputs where these were not rounded.
        assert same == (method == "rtn" or name.startswith(("self_attn.q", "self_attn.k", "self_attn.v")))


def test_nothing_left_to_quantize_needs_no_rows() -> None:
    assert quantize_layer(make_layer(), None, None, QUANT, "layers.0", LINEARS) == {}


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers.2 mlp.up_proj: 1 of the weight's 6144 values are NaN"):
        quantize_layer(layer, make_layer(), Calibration(make_stream()), QUANT, "layers.2")


@torch.no_grad()
def test_a_stream_moves_as_a_forward_pass_does() -> None:
    layer, stream = make_layer(), make_stream(repeats=1)
    expected = [
        layer(s.rows, s.routing, (1, len(s.rows)), rotary_tables(CONFIG, len(s.rows), len(s.rows)))[0]
        for s in stream.sequences
    ]
    copy = stream.copy()
    stream.advance(layer)
    for sequence, rows, old in zip(stream.sequences, expected, copy.sequences):
        torch.testing.assert_close(sequence.rows, rows)
        assert not torch.equal(sequence.rows, old.rows)


@torch.no_grad()
def test_the_report_has_an_error_for_each_modality() -> None:
    """Each figure is the error of the layer's output over its energy, on the rows of one modality."""
    layer, stream = make_layer(), make_stream()
    made = quantize_layer(layer, make_layer(), Calibration(stream.copy()), QUANT, "layers.0")
    fresh = make_layer()
    rows = [normalised(fresh, s.rows, s.routing, "input_layernorm") for s in stream.sequences]
    text = torch.cat([r[s.routing.text] for r, s in zip(rows, stream.sequences)])
    image = torch.cat([r[s.routing.image] for r, s in zip(rows, stream.sequences)])

    def error(name: str, seen: torch.Tensor) -> float:
        weight = fresh.get_parameter(f"{name}.weight")
        difference = seen @ (weight - made[name].weight.dequantize()).T
        return float(difference.pow(2).sum() / (seen @ weight.T).pow(2).sum())

    reports = {name: quantized.report for name, quantized in made.items()}
    for name, seen in (("q_proj", (text, image)), ("k_proj.multiway.0", (text,)), ("v_proj.multiway.1", (image,))):
        report = reports[f"self_attn.{name}"]
        assert report is not None
        given = [e for e in (report.text_error, report.image_error) if e is not None]
        assert given == pytest.approx([error(f"self_attn.{name}", s) for s in seen], rel=1e-4)
    assert all(
        r is not None and r.text_error is not None and r.image_error is not None
        for name, r in reports.items()
        if "multiway" not in name
    )


def test_image_rows_that_count_more_lose_less() -> None:
    errors = []
    for weight in (0.01, 100.0):
        made = quantize_layer(
            make_layer(), make_layer(), Calibration(make_stream()), replace(QUANT, image_weight=weight), "layers.0"
        )
        report = made["self_attn.q_proj"].report
        assert report is not None
        assert report.text_error is not None
        assert report.image_error is not None
        errors.append((report.text_error, report.image_error))
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]
