from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyres.errors import UserError
from anyres.io import hub
from anyres.models._backbone import Backbone
from anyres.models._registry import create_model, entries
from anyres.tasks.segmentation.heads import HEADS, SegFormerHead, SemanticFPN, UPerNet, resize
from anyres.tasks.segmentation.network import (
    Segmenter,
    levels_of,
    predict_probabilities,
    segment,
    segmentation_loss,
    slide,
)
from tests.contract.small import distinct_models, image, small, small_args
from tests.typed import as_a

CLASSES = 5
NETWORKS = list(
    {entries()[name].family.model: name for name in distinct_models() if not fnmatchcase(name, "*x?")}.values()
)
"""One image model of each class."""
INFO = [{"num_chs": 8 * 2**i, "reduction": 4 * 2**i} for i in range(4)]


def maps(sizes: list[tuple[int, int]], batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, level["num_chs"], *size) for level, size in zip(INFO, sizes, strict=True)]


PYRAMID = [(19, 26), (10, 13), (5, 7), (3, 4)]


# Whole networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name: str) -> None:
    backbone = small(name, dense=True).train()
    model = Segmenter(backbone, CLASSES, channels=16).train()
    view = image(2, (75, 101), backbone)
    labels = torch.randint(CLASSES, (2, 75, 101), generator=torch.Generator().manual_seed(1))
    outputs = model.forward_train(view, ("gap",))
    assert outputs["gap"].shape == (2, levels_of(backbone)[-1]["num_chs"])
    segmentation_loss(outputs, labels).backward()
    for key, parameter in model.named_parameters():
        if any(part in key for part in backbone.unused):
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_any_size_gives_logits_of_that_size(name: str) -> None:
    backbone = small(name, dense=True)
    for head in HEADS:
        model = Segmenter(backbone, CLASSES, head, channels=16).eval()
        for size in ((64, 96), (75, 101)):
            logits = model(image(1, size, backbone))
            assert logits.shape == (1, CLASSES, *size)
            assert logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@torch.inference_mode()
def test_logits_are_those_of_training_resized_and_images_do_not_mix(head: str) -> None:
    backbone = small("swin_tiny", dense=True)
    model = Segmenter(backbone, CLASSES, head, channels=16).eval()
    x = image(2, (75, 101), backbone)
    coarse = model.forward_train(x)["logits"]
    assert coarse.shape == (2, CLASSES, 19, 26)
    logits = F.interpolate(coarse, (75, 101), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_plain_models_hand_over_raw_maps() -> None:
    """Four evenly spaced blocks, no final norm, no class token; GPViT's last map keeps its norm."""
    backbone = small("resformer_small", dense=True, depth=8)
    model = Segmenter(backbone, CLASSES, channels=16)
    x = image(1, (64, 96), backbone)
    whole = small("resformer_small", depth=8)
    whole.load_state_dict(model.backbone.state_dict(), strict=False)
    expected = whole.forward_intermediates(x, [1, 3, 5, 7], intermediates_only=True)
    assert all(torch.equal(ours, raw) for ours, raw in zip(model.backbone(x), expected, strict=True))
    assert not [name for name, _ in model.named_parameters() if name.startswith("backbone.norm")]
    assert isinstance(Segmenter(small("gpvit_l1", dense=True), CLASSES).backbone.norm, nn.LayerNorm)


@pytest.mark.parametrize(("name", "level"), [("swin_tiny", 2), ("deit_small", -1), ("gpvit_l1", -1), ("cvt_13", 2)])
def test_the_auxiliary_head_reads_the_third_map_or_the_last_of_equals(name: str, level: int) -> None:
    backbone = small(name, dense=True)
    model = Segmenter(backbone, CLASSES, channels=16).eval()
    x = image(1, (64, 96), backbone)
    assert model.auxiliary is not None
    torch.testing.assert_close(model.forward_train(x)["aux"], model.auxiliary(backbone(x)[level]))


def test_only_upernet_has_an_auxiliary_head_unless_told() -> None:
    backbone = small("swin_tiny", dense=True)
    assert [Segmenter(backbone, CLASSES, head, 16).auxiliary is not None for head in HEADS] == [True, False, False]
    assert Segmenter(backbone, CLASSES, "upernet", 16, auxiliary=False).auxiliary is None
    assert Segmenter(backbone, CLASSES, "segformer", 16, auxiliary=True).auxiliary is not None


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_restores_the_network(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Segmenter.build("deit_small", CLASSES, small_args("deit_small"), head=head, channels=16).eval()
    model.pretrained_cfg["label_names"] = ["a", "b", "c", "d", "e"]
    restored = Segmenter.from_config(*hub.read_folder(model.save_pretrained(tmp_path / "model")))
    x = torch.randn(1, 3, 50, 70)
    assert torch.equal(restored(x), model(x))
    assert restored.options == model.options
    assert restored.pretrained_cfg["label_names"] == ["a", "b", "c", "d", "e"]


def test_mistakes_are_one_sentence() -> None:
    backbone = small("swin_tiny", dense=True)
    with pytest.raises(UserError, match="did you mean 'upernet'"):
        Segmenter(backbone, CLASSES, "upernett")
    for channels in (1, 0, -3, "abc", 2.5):
        with pytest.raises(UserError, match=f"channels is {channels!r}; it must be a whole number of at least 2"):
            Segmenter(backbone, CLASSES, channels=channels)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="swin_tiny does not return feature maps"):
        Segmenter(small("swin_tiny"), CLASSES)
    video = as_a(Backbone, create_model("mvitv2_small_16x4", dense=True, **small_args("mvitv2_small_16x4")))
    with pytest.raises(UserError, match="mvitv2_small_16x4 does not return feature maps of images"):
        Segmenter(video, CLASSES)
    with pytest.raises(UserError, match="batch of 1"):
        Segmenter(backbone, CLASSES, channels=16).train().forward_train(image(1, (64, 64), backbone))


# Heads ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_semantic_fpn_takes_a_step_for_each_halving() -> None:
    head = SemanticFPN(INFO, CLASSES, 16)
    assert head.paths == [[0], [0], [1, 0], [2, 1, 0]]
    assert [len(as_a(nn.ModuleList, tower)) for tower in head.towers] == [1, 1, 2, 3]
    equal = SemanticFPN([{"num_chs": 8, "reduction": 16}] * 4, CLASSES, 16)
    assert equal.paths == [[0]] * 4


@torch.inference_mode()
def test_semantic_fpn_is_the_sum_of_its_levels() -> None:
    """At sizes that halve: ×2 after every convolution, as published."""
    head = SemanticFPN(INFO, CLASSES, 16).eval()
    inputs = maps([(16, 24), (8, 12), (4, 6), (2, 3)])
    total = torch.zeros(2, 8, 16, 24)
    for tower, level in zip(head.towers, head.fpn({str(i): x for i, x in enumerate(inputs)}).values(), strict=True):
        x = level
        for conv in as_a(nn.ModuleList, tower):
            x = conv(x)
            if x.shape[-1] < 24:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total += x
    torch.testing.assert_close(head(inputs), head.classify(total))


@torch.inference_mode()
def test_upernet_sums_top_down_and_fuses_at_the_first_size() -> None:
    head = UPerNet(INFO, CLASSES, 16).eval()
    inputs = maps(PYRAMID)

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    last = inputs[3]
    averages = [F.adaptive_avg_pool2d(last, side) for side in (1, 2, 3, 6)]
    pooled = [up(conv(average), last) for conv, average in zip(head.pooled, averages, strict=True)]
    p3 = head.top(torch.cat([last, *pooled], 1))
    p2 = head.laterals[2](inputs[2]) + up(p3, inputs[2])
    p1 = head.laterals[1](inputs[1]) + up(p2, inputs[1])
    p0 = head.laterals[0](inputs[0]) + up(p1, inputs[0])
    levels = [head.smooth[0](p0), *(up(x, p0) for x in (head.smooth[1](p1), head.smooth[2](p2), p3))]
    torch.testing.assert_close(head(inputs), head.classify(head.fuse(torch.cat(levels, 1))))


@torch.inference_mode()
def test_the_segformer_head_equals_concatenation_at_the_first_size() -> None:
    head = SegFormerHead(INFO, CLASSES, 16).eval()
    inputs = maps(PYRAMID)
    wide = torch.cat([resize(linear(x), PYRAMID[0]) for linear, x in zip(head.linears, inputs, strict=True)], 1)
    torch.testing.assert_close(head(inputs), head.classify(head.norm(head.fuse(wide)).relu()))


@pytest.mark.parametrize("head", HEADS)
@torch.inference_mode()
def test_heads_keep_the_layout_of_channels_last_maps(head: str) -> None:
    model = HEADS[head][0](INFO, CLASSES, 16).eval()
    out = model([x.to(memory_format=torch.channels_last) for x in maps(PYRAMID)])
    assert out.is_contiguous(memory_format=torch.channels_last)


# Loss ----------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 8, 8), 255)
    labels[0, :2, :3] = 1
    labels[1, 5, 5] = 2
    outputs = {"logits": logits, "aux": logits[..., :2]}
    expected = []
    for value in outputs.values():
        log = F.interpolate(value, (8, 8), mode="bilinear", align_corners=False).log_softmax(1)
        expected.append(-(log[0, 1, :2, :3].sum() + log[1, 2, 5, 5]) / 7)
    torch.testing.assert_close(segmentation_loss(outputs, labels), expected[0] + 0.4 * expected[1])
    torch.testing.assert_close(segmentation_loss(outputs, labels.byte(), 0.1), expected[0] + 0.1 * expected[1])
    torch.testing.assert_close(segmentation_loss({"logits": logits}, labels), expected[0])


def test_loss_of_nothing_is_zero() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss({"logits": logits}, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


# Inference -----------------------------------------------------------------------------------------------------------


class Pixelwise(nn.Module):
    """Classes from the colours of the pixel alone; its logits are the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Brightness(nn.Module):
    """Adds the mean of what it sees: windows differ."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True)


def picture(height: int = 20, width: int = 31) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_scales_and_mirror_images_of_a_constant_image_change_nothing() -> None:
    constant = torch.tensor([0.3, -1.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 20, 31).clone()
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    many = predict_probabilities(Pixelwise(), constant, (50, 70), scales, flip=True)
    torch.testing.assert_close(many, predict_probabilities(Pixelwise(), constant, (50, 70)))
    torch.testing.assert_close(many, constant.softmax(1)[..., :1, :1].expand(1, 3, 50, 70))


def test_probabilities_of_the_views_are_averaged() -> None:
    """A model that is not symmetric: the mirror image is mirrored back before the mean is taken."""

    class Lopsided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linspace(0, 2, x.shape[-1])

    x = picture()
    ramp = torch.linspace(0, 2, 31)
    expected = ((x * ramp).softmax(1) + (x * ramp.flip(0)).softmax(1)) / 2
    torch.testing.assert_close(predict_probabilities(Lopsided(), x, flip=True), expected)
    small_view = F.interpolate(x, (10, 16), mode="bilinear", align_corners=False, antialias=True)
    halves = F.interpolate(small_view, (20, 31), mode="bilinear", align_corners=False).softmax(1)
    two = predict_probabilities(Pixelwise(), x, scales=(1.0, 0.5))
    torch.testing.assert_close(two, (x.softmax(1) + halves) / 2)
    torch.testing.assert_close(two.sum(1), torch.ones(1, 20, 31))
    assert torch.equal(segment(Pixelwise(), x, scales=(1.0, 0.5)), two.argmax(1))


def test_no_scale_goes_below_the_models_minimum() -> None:
    model = Segmenter(small("deit_small", dense=True), CLASSES, channels=16).eval()
    assert predict_probabilities(model, picture(), scales=(0.1,)).shape == (1, CLASSES, 20, 31)


@pytest.mark.parametrize("window", [31, (20, 31), 64])
def test_a_window_that_holds_the_image_is_the_whole_image(window: int | tuple[int, int]) -> None:
    x = picture()
    whole = predict_probabilities(Brightness(), x, (40, 40), (1.0,), True)
    assert torch.equal(predict_probabilities(Brightness(), x, (40, 40), (1.0,), True, window), whole)


def test_windows_average_where_they_overlap_and_end_at_the_border() -> None:
    x = picture(20, 31)
    torch.testing.assert_close(slide(Pixelwise(), x, (8, 12), (5, 7)), x)
    seen: list[tuple[int, ...]] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[-2:]))
            return torch.full_like(x, float(len(seen)))

    out = slide(Counting(), picture(20, 10), (8, 10), (6, 10))
    assert seen == [(8, 10)] * 3  # rows 0-7, 6-13, 12-19
    rows = torch.tensor([1.0] * 6 + [1.5] * 2 + [2.0] * 4 + [2.5] * 2 + [3.0] * 6)
    assert torch.equal(out, rows.view(1, 1, 20, 1).expand(1, 3, 20, 10))
    seen.clear()
    out = slide(Counting(), picture(1, 11), (1, 4), (1, 4))  # columns 0-3, 4-7, 7-10
    assert torch.equal(out[0, 0, 0], torch.tensor([1.0] * 4 + [2] * 3 + [2.5] + [3.0] * 3))


def test_a_segmenter_on_windows() -> None:
    model = Segmenter(small("swin_tiny", dense=True), CLASSES, channels=16).eval()
    x = picture(75, 101)
    out = predict_probabilities(model, x, (150, 200), window=64)
    assert out.shape == (1, CLASSES, 150, 200)
    torch.testing.assert_close(out.sum(1), torch.ones(1, 150, 200))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"stride": 4}, "without a window"),
        ({"window": 8, "stride": 9}, "at most the window's side"),
        ({"window": 8, "stride": 0}, "at least 1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_tests_that_make_no_sense_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        predict_probabilities(Pixelwise(), picture(), **options)  # type: ignore[arg-type]
