"""Detectors: every head on every kind of backbone, what is taken from papers, files, sizes and padding.

One file, though long: every head, neck and style has its case.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from anyres.errors import UserError
from anyres.layers.attention import Attention
from anyres.layers.positions import LocalPositionEmbedding
from anyres.models._checkpoints import load_checkpoint, save_weights
from anyres.models._registry import create_model, entries
from anyres.tasks.detection.heads import Anchors, ProposalHead, Proposals, RegionPool
from anyres.tasks.detection.network import HEADS, DetectionView, Detector, paste_masks
from tests.contract.small import small_args
from tests.typed import as_a

QUICK = {
    "channels": 16, "hidden": 32, "rpn_pre_nms": [60, 60], "rpn_post_nms": 20, "rpn_batch": 32, "box_batch": 8,
    "num_keypoints": 2, "detections": 10,
}  # fmt: skip
PLAIN: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "mlp_ratio": 2.0}


def detector(name: str, head: str, **options: Any) -> Detector:
    torch.manual_seed(0)
    args = PLAIN if name.startswith(("resformer", "deit")) else SWIN if name == "swin_tiny" else small_args(name)
    return Detector.build(name, 4, args, head=head, **{**QUICK, **options})


def objects(boxes: list[list[float]], labels: list[int], size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    """Filled rectangles, with two of their corners as keypoints."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    x1, y1, x2, y2 = corners[:, :, None, None].unbind(1)
    points = F.pad(corners.view(-1, 2, 2), (0, 1), value=2.0)
    masks = ((x > x1) & (x < x2) & (y > y1) & (y < y2)).to(torch.uint8)
    return {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks, "keypoints": points}


def view() -> DetectionView:
    """Three images, the last two padded, the second empty."""
    found = [objects([[8, 8, 40, 40], [50, 20, 90, 60]], [3, 0]), objects([], []), objects([[4, 4, 40, 30]], [1])]
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    return DetectionView(images, [(64, 96), (50, 96), (64, 60)], found)


CASES = [("swin_tiny", head) for head in HEADS] + [
    ("resformer_tiny", "retinanet"), ("resformer_tiny", "cascade_mask_rcnn"), ("gpvit_l1", "retinanet"),
    ("gpvit_l1", "mask_rcnn"), ("uvit_tiny", "retinanet"), ("uvit_tiny", "faster_rcnn"), ("cvt_13", "retinanet"),
    ("cvt_13", "faster_rcnn"), ("mvitv2_tiny", "cascade_rcnn"), ("dynamicvit_deit_small", "faster_rcnn"),
    ("pvt_v2_b0", "retinanet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "head"), CASES)
def test_heads_train_and_detect(name: str, head: str) -> None:
    model = detector(name, head).train()
    batch = view()
    losses = model.forward_train(batch, ("gap",))
    gap = losses.pop("gap")
    assert gap.shape == (3, model.backbone.feature_info[-1]["num_chs"])
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    missed = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missed
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]

    model.zero_grad()
    empty = DetectionView(batch.images, batch.sizes, [objects([], [])] * 3)
    losses = model.forward_train(empty)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]

    with torch.no_grad():
        found = model.eval()(batch.images, batch.sizes)
    for detections, (height, width) in zip(found, batch.sizes, strict=True):
        boxes, count = detections["boxes"], len(detections["boxes"])
        assert count <= 10
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert detections["labels"].shape == detections["scores"].shape == (count,)
        assert ((detections["labels"] >= 0) & (detections["labels"] < 4)).all()
        assert (detections["scores"].diff() <= 0).all()
        if "mask" in head:
            assert detections["masks"].shape == (count, 1, 28, 28)
        if "keypoint" in head:
            assert detections["keypoints"].shape == (count, 2, 3)
            assert detections["keypoint_scores"].shape == (count, 2)


@pytest.mark.parametrize("name", ["swin_tiny", "resformer_tiny", "gpvit_l1"])
@pytest.mark.parametrize("size", [(33, 95), (16, 16), (70, 41)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = detector(name, "faster_rcnn").train()
    size = max(size[0], model.minimum_size), max(size[1], model.minimum_size)
    found = objects([[2, 2, 14, 12]], [1], size)
    batch = DetectionView(torch.randn(2, 3, *size), [size] * 2, [found] * 2)  # batch norm cannot do with one pixel
    assert all(loss.isfinite() for loss in model.forward_train(batch).values())
    with torch.no_grad():
        model.eval()(batch.images)


def test_two_images_are_learnt() -> None:
    """Masks of bright rectangles on dark ground, told apart by colour."""
    torch.manual_seed(0)
    model = detector("swin_tiny", "mask_rcnn", anchor_scale=4.0, box_batch=16, channels=24).train()
    found = [
        objects([[6, 6, 30, 30], [34, 30, 60, 58]], [2, 0], (64, 64)),
        objects([[20, 8, 52, 26]], [0], (64, 64)),
    ]
    colours = torch.tensor([[2.0, -1.0, 0.0], [0.0] * 3, [-1.0, 1.0, 2.0]])
    images = torch.stack([torch.einsum("nc,nhw->chw", colours[x["labels"]], x["masks"].float()) for x in found])
    batch = DetectionView(images - 0.5, [(64, 64)] * 2, found)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=100, pct_start=0.2)
    losses = []
    for _ in range(100):
        loss = sum(model.forward_train(batch).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())  # type: ignore[union-attr]
    assert sum(losses[-10:]) / 10 < 0.4 * losses[0]
    with torch.no_grad():
        detections = model.eval()(batch.images)
    for found_in, truth in zip(detections, found, strict=True):
        overlaps, best = box_iou(truth["boxes"], found_in["boxes"]).max(1)
        assert (overlaps > 0.6).all()
        assert (found_in["labels"][best] == truth["labels"]).all()
        masks = paste_masks(found_in["masks"][best], found_in["boxes"][best], (64, 64))
        same = (masks & truth["masks"].bool()).sum((1, 2)) / (masks | truth["masks"].bool()).sum((1, 2))
        assert (same > 0.6).all()


# What is asked for wrongly --------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    with pytest.raises(UserError, match="head='mask_rnn' is not known"):
        detector("swin_tiny", "mask_rnn")
    with pytest.raises(UserError, match="style='vit'"):
        detector("swin_tiny", "mask_rcnn", style="vit")
    with pytest.raises(UserError, match="did you mean 'box_batch'"):
        detector("swin_tiny", "mask_rcnn", box_batches=3)
    for name, value, words in (
        ("channels", -3, "channels is -3; it must be a whole number of at least 1"),
        ("channels", 0, "channels is 0;"),
        ("channels", "abc", "channels is 'abc';"),
        ("detections", 1.5, "detections is 1.5;"),
        ("rpn_pre_nms", 100, "rpn_pre_nms is 100; it must be two whole numbers"),
        ("rpn_pre_nms", [100], "must be two whole numbers"),
        ("anchor_scale", -1, "anchor_scale is -1; it must be a number above 0"),
        ("nms_threshold", "high", "nms_threshold is 'high'; it must be a number from 0 to 1"),
    ):
        with pytest.raises(UserError, match=words):
            detector("swin_tiny", "mask_rcnn", **{name: value})
    model = detector("swin_tiny", "mask_rcnn").train()
    with pytest.raises(UserError, match="training mode"):
        model(torch.zeros(1, 3, 64, 64))
    batch = view()
    for found in batch.targets:
        del found["masks"]
    with pytest.raises(UserError, match="masks, but the data have none"):
        model.forward_train(batch)


@pytest.mark.parametrize(("name", "tables"), [("mvitv2_tiny", "rel_pos_"), ("dat_pp_tiny", "rpb")])
def test_detectors_do_not_decay_tables_that_classifiers_decay(name: str, tables: str) -> None:
    model = Detector.build(name, 4, small_args(name), **QUICK)
    names = {key for key, _ in model.named_parameters() if tables in key}
    assert names
    assert names <= model.no_weight_decay()
    assert not {key.removeprefix("backbone.") for key in names} & model.backbone.no_weight_decay()


# Parts ----------------------------------------------------------------------------------------------------------------


def test_regions_come_from_the_level_of_their_size() -> None:
    levels = [torch.randn(2, 3, 128 // 2**i, 128 // 2**i) for i in range(4)]
    corner = torch.rand(40, 2) * 300
    boxes = torch.cat((corner, corner + torch.rand(40, 2) ** 3 * 400 + 1), dim=1).split([25, 15])
    out = RegionPool((4, 8, 16, 32), 7)(levels, boxes)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 0)
    names = {str(i): level for i, level in enumerate(levels)}
    theirs(names, list(boxes), [(512, 512)] * 2)
    which = theirs.map_levels(list(boxes))
    assert len(which.unique()) >= 3
    rois = torch.cat([F.pad(part, (1, 0), value=i) for i, part in enumerate(boxes)])
    for roi, level, pooled in zip(rois, which, out, strict=True):
        expected = roi_align(levels[level], roi[None], 7, 1 / 2 ** (2 + int(level)), 0, aligned=True)[0]
        torch.testing.assert_close(pooled, expected)


def test_a_region_of_whole_cells_is_their_mean() -> None:
    """Without the half-pixel shift of the old sampling."""
    level = torch.arange(64.0).view(1, 1, 8, 8)
    out = RegionPool((4,), 2)([level], [torch.tensor([[8.0, 8.0, 24.0, 24.0]])])
    torch.testing.assert_close(out[0, 0], F.avg_pool2d(level[:, :, 2:6, 2:6], 2)[0, 0])


def test_anchors() -> None:
    levels = [torch.zeros(2, 1, 7, 13), torch.zeros(2, 1, 4, 7)]
    first, second = Anchors((8, 16), (8.0,))(ImageList(torch.zeros(2, 3, 50, 100), [(50, 100)] * 2), levels)
    assert first.shape == ((7 * 13 + 4 * 7) * 3, 4)
    assert second is first
    size = first[:, 2:] - first[:, :2]
    torch.testing.assert_close(size.prod(1)[: 7 * 13 * 3], torch.full((7 * 13 * 3,), 64.0**2))
    torch.testing.assert_close(size[:3, 1] / size[:3, 0], torch.tensor([0.5, 1.0, 2.0]))
    centres = (first[:, :2] + first[:, 2:])[::3] / 2
    torch.testing.assert_close(centres[13], torch.tensor([0.0, 8.0]))
    torch.testing.assert_close(centres[7 * 13 + 1], torch.tensor([16.0, 0.0]))
    retina = Anchors((8,), [4 * 2 ** (i / 3) for i in range(3)]).cell_anchors[0]
    sides = ((retina[:, 2:] - retina[:, :2]).prod(1).sqrt() / 8).view(3, 3)
    torch.testing.assert_close(sides[0], torch.tensor([4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)]))


def test_padding_proposes_nothing() -> None:
    """Where maps are zero in the padding and anchors stay in their place, an image proposes in a larger batch what it
    proposes alone."""
    torch.manual_seed(0)
    head = ProposalHead(32, 3, 1)
    for layer in (head.conv[0][0], head.cls_logits):
        nn.init.normal_(layer.weight, std=0.2)
    nn.init.zeros_(head.bbox_pred.weight)
    numbers = {"training": 100, "testing": 100}
    rpn = Proposals(Anchors((8, 16), (2.0,)), head, 0.7, 0.3, 64, 0.5, numbers, numbers, 0.7, 1e-30).eval()
    levels = [torch.randn(1, 32, 8, 6), torch.randn(1, 32, 4, 3)]
    alone, _ = rpn(ImageList(torch.zeros(1, 3, 64, 48), [(64, 48)]), dict(enumerate(levels)))
    padded = [F.pad(level, (0, 10 // 2**i, 0, 8 // 2**i)) for i, level in enumerate(levels)]
    among, _ = rpn(ImageList(torch.zeros(1, 3, 128, 128), [(64, 48)]), dict(enumerate(padded)))
    torch.testing.assert_close(among[0], alone[0])
    assert len(alone[0]) > 10


def test_masks_are_pasted_at_pixel_borders() -> None:
    masks = torch.ones(4, 1, 28, 28)
    masks[1, :, :, 14:] = 0
    boxes = torch.tensor([[3.0, 2.0, 9.0, 7.0], [2.0, 2.0, 10.0, 6.0], [-4.0, -4.0, 3.0, 30.0], [5.0, 5.0, 5.0, 9.0]])
    first, second, third, fourth = paste_masks(masks, boxes, (12, 16))
    expected = torch.zeros(12, 16, dtype=torch.bool)
    expected[2:7, 3:9] = True
    assert torch.equal(first, expected)
    assert second.nonzero().amin(0).tolist() == [2, 2]
    assert second.nonzero().amax(0).tolist() == [5, 5]
    assert third.sum() == 12 * 3
    assert not fourth.any()
    assert paste_masks(masks[:0], boxes[:0], (12, 16)).shape == (0, 12, 16)


def test_a_view_goes_to_a_device_as_it_is() -> None:
    moved = send_to_device(view(), torch.device("cpu"))
    assert isinstance(moved, DetectionView)
    assert moved.sizes == view().sizes
    assert moved.targets[0].keys() == view().targets[0].keys()


@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_bfloat16_keeps_coordinates_exact(head: str) -> None:
    model = detector("swin_tiny", head, score_threshold=0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.forward_train(view())
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()  # type: ignore[union-attr]
        with torch.no_grad():
            found = model.eval()(view().images)
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32
    boxes = found[0]["boxes"]
    assert (boxes != boxes.bfloat16().float()).any()


# Backbones ------------------------------------------------------------------------------------------------------------


def explicit_windows(layer: Attention, x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Window by window: zeros fill up the last ones, and are keys like all others."""
    (h, w), C = grid, x.shape[-1]
    qkv = layer.qkv(F.pad(x.unflatten(1, grid), (0, 0, 0, -w % side, 0, -h % side)))
    out = torch.empty(*qkv.shape[:3], C)
    for top in range(0, h, side):
        for left in range(0, w, side):
            place = (slice(None), slice(top, top + side), slice(left, left + side))
            q, k, v = qkv[place].flatten(1, 2).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)
            out[place] = (weights @ v).transpose(1, 2).reshape(*qkv[place].shape[:3], C)
    out = out[:, :h, :w].flatten(1, 2)
    if layer.local is not None:
        v = qkv[:, :h, :w, 2 * C :].reshape(len(x), h * w, layer.num_heads, -1).permute(0, 2, 3, 1)
        local = layer.local.conv(v.flatten(0, 1).unflatten(2, grid))
        out = out + local.unflatten(0, (len(x), -1)).flatten(1, 2).flatten(2).transpose(1, 2)
    return layer.proj(out)


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (3, 2)])
@pytest.mark.parametrize("local", [True, False])
@torch.no_grad()
def test_windows_of_a_fixed_side(grid: tuple[int, int], local: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, local=LocalPositionEmbedding(4) if local else None, window=4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, grid[0] * grid[1], 12)
    torch.testing.assert_close(layer(x, grid), explicit_windows(layer, x, grid, 4), atol=1e-5, rtol=1e-4)


def test_plain_backbones_have_windows_but_in_the_last_block_of_each_quarter() -> None:
    with torch.device("meta"):
        model: Any = Detector.dense_backbone("resformer_small", {}, {})
        other: Any = Detector.dense_backbone("deit_tiny_distilled", {"depth": 8, "window_size": 0}, {})
    assert [block.attn.window for block in model.blocks] == [14, 14, None] * 4
    assert [block.attn.window for block in other.blocks] == [None] * 8
    assert model.num_prefix_tokens == other.num_prefix_tokens == 0
    for wrong in ({"windows": "constant"}, {"position": "rope"}, {"prefix_tokens": ("cls_token",)}):
        with pytest.raises(ValueError, match="window_size=14 needs"):
            Detector.dense_backbone("resformer_tiny", {**PLAIN, **wrong}, {})


@pytest.mark.parametrize("name", ["resformer_tiny", "deit_tiny", "deit_tiny_distilled"])
@pytest.mark.parametrize("native", [224, 64])
@torch.no_grad()
def test_classifiers_fill_the_plain_backbone(name: str, native: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    whole: Any = create_model(name, **PLAIN, img_size=64)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_weights(whole.to_published(whole.state_dict()), tmp_path / "x.pth")
    model: Any = Detector.dense_backbone(name, {**PLAIN, "img_size": native}, {})
    report = load_checkpoint(model, tmp_path / "x.pth")
    assert report.resized == (["position.table"] if name.startswith("deit") else [])
    x = torch.randn(1, 3, 64, 64)
    expected = whole.embed(x)[0][:, whole.num_prefix_tokens :]
    if native == 64:
        torch.testing.assert_close(model.embed(x)[0], expected)
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight, whole.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize(
    ("prefix", "protocol"),
    [("backbone.", 2), ("module.backbone.", 2), ("backbone.bottom_up.", 2), ("backbone.bottom_up.", 5)],
)
def test_published_detectors_fill_the_backbone(prefix: str, protocol: int, tmp_path: Any) -> None:
    torch.manual_seed(1)
    source: Any = create_model("swin_tiny", **SWIN, dense=True)
    state = {f"{prefix}{key}": value for key, value in source.to_published(source.state_dict()).items()}
    outer = prefix.removesuffix("backbone.bottom_up.").removesuffix("backbone.")
    others = ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.bias", "roi_head.bbox_head.0.fc_cls.weight")
    state |= {f"{outer}{key}": torch.zeros(3) for key in others}
    state["backbone.fpn_lateral2.weight"] = torch.zeros(3)
    if "bottom_up" not in prefix:
        del state["backbone.fpn_lateral2.weight"]
    if "bottom_up" in prefix:  # detectron2's files
        file = tmp_path / "x.pkl"
        arrays = {key: value.numpy() for key, value in state.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "Third"}, protocol=protocol))
    else:
        file = tmp_path / "x.pth"
        torch.save({"state_dict": state, "meta": {"epoch": 36}}, file)
    model = detector("swin_tiny", "mask_rcnn")
    assert load_checkpoint(model.backbone, file).complete
    for key, value in source.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key])


def test_a_damaged_detector_is_still_refused(tmp_path: Any) -> None:
    source: Any = create_model("swin_tiny", **SWIN, dense=True)
    state = {f"backbone.{key}": value for key, value in source.to_published(source.state_dict()).items()}
    del state["backbone.norm2.weight"]
    torch.save({"state_dict": {**state, "neck.x": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"out_norms\.2\.weight"):
        load_checkpoint(detector("swin_tiny", "mask_rcnn").backbone, tmp_path / "x.pth")


def test_a_scaled_start_leaves_the_head_its_own() -> None:
    model = detector("swin_tiny", "faster_rcnn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_scaled()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("backbone."))
    layer = as_a(nn.Linear, model.backbone.get_submodule("stages.3.blocks.0.mlp.fc1"))
    assert before["backbone.stages.3.blocks.0.mlp.fc1.weight"].std() < 0.03
    assert layer.weight.detach().std() == pytest.approx(layer.in_features**-0.5, rel=0.1)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Any) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit",)

    for number, content in enumerate([{"model": Harm()}, {"model": {"a": Harm()}}]):
        file = tmp_path / f"{number}.pkl"
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"holds no weights, but objects of builtins\.exec"):
            load_checkpoint(detector("swin_tiny", "mask_rcnn").backbone, file)
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"model": {"a": torch.zeros(9).numpy()}})[:60])
    with pytest.raises(UserError, match=r"cut\.pkl (cannot be read|is damaged)"):
        load_checkpoint(detector("swin_tiny", "mask_rcnn").backbone, tmp_path / "cut.pkl")


@torch.no_grad()
def test_gpvit_for_retinanet_leaves_out_what_only_stride_4_needs() -> None:
    torch.manual_seed(0)
    whole: Any = create_model("gpvit_l1", **small_args("gpvit_l1"), adapter=True).eval()
    coarse: Any = create_model("gpvit_l1", **small_args("gpvit_l1"), adapter=True, finest=8).eval()
    report = coarse.load_state_dict(whole.state_dict(), strict=False)
    assert not report.missing_keys
    assert {key.split(".")[1] for key in report.unexpected_keys} == {"prior", "up", "norms"}
    x = torch.randn(1, 3, 70, 100)
    for a, b in zip(coarse(x), whole(x)[1:], strict=True):
        torch.testing.assert_close(a, b)
    assert [map_.shape[-2:] for map_ in coarse(x)] == coarse.feature_sizes(70, 100)


@pytest.mark.parametrize(
    ("name", "head"), [("swin_tiny", "retinanet"), ("resformer_tiny", "mask_rcnn"), ("gpvit_l1", "retinanet")]
)
def test_a_folder_brings_the_detector_back(name: str, head: str, tmp_path: Any) -> None:
    model = detector(name, head, score_threshold=0.0).eval()
    model.save_pretrained(tmp_path / "model")
    from anyres.tasks import load_pretrained

    other = load_pretrained(tmp_path / "model")
    assert isinstance(other, Detector)
    assert other.options == model.options
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        a, b = model(x)[0], other(x)[0]
    assert len(a["boxes"]) > 0
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def one_of_each_family() -> list[str]:
    names: dict[type, str] = {}
    for name, (family, variant) in entries().items():
        if "num_frames" not in variant.args:
            names.setdefault(family.model, name)
    return list(names.values())


@pytest.mark.parametrize("name", one_of_each_family())
@torch.no_grad()
def test_detections_alone_and_among_others(name: str) -> None:
    """A batch finds what its images hold one by one, padded as far as each needs and no further."""
    model = detector(name, "faster_rcnn", score_threshold=0.0).eval()
    sizes = [(64, 96), (50, 96), (64, 60), (30, 33)]
    images = torch.zeros(4, 3, 64, 96)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width].normal_(generator=torch.Generator().manual_seed(height + width))
    together = model(images, sizes)
    for image, size, found in zip(images, sizes, together, strict=True):
        height, width = (-(-side // 32) * 32 for side in size)
        (alone,) = model(image[None, :, :height, :width], [size])
        torch.testing.assert_close(found["boxes"], alone["boxes"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found["scores"], alone["scores"], atol=1e-5, rtol=1e-4)
        assert torch.equal(found["labels"], alone["labels"])
    assert not torch.equal(together[0]["scores"], together[1]["scores"])
