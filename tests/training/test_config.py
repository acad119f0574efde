"""Options: types, ranges, recipes, and one sentence for every mistake."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import yaml

from anyres.data import Augmentation, Mixing, SizeSchedule
from anyres.data.clips import Sampling
from anyres.data.detection_views import DetectionViews
from anyres.data.segmentation_views import SegmentationViews
from anyres.errors import UserError
from anyres.evaluation.cost import count_flops
from anyres.models._registry import create_model, list_models
from anyres.options import Options, option
from anyres.tasks import TASKS
from anyres.training.config import config_of
from anyres.training.recipe import RECIPES, field_help, list_recipes, load_config


def test_text_from_yaml_and_command_lines_becomes_the_option_type() -> None:
    config = load_config(
        {"lr": "1e-3", "sizes": "128,224,160x256", "distillation": None, "resume": False, "teacher": "none"}
    )
    assert config.lr == 1e-3
    assert config.shapes == [(224, 224), (160, 256), (128, 128)]
    assert (config.distillation, config.resume, config.teacher) == ("none", "no", None)
    nothings: tuple[Any, ...] = ("", "none", "[]", [], None)
    for nothing in nothings:
        assert load_config({"decay": "linear", "drops": nothing}, "detection").drops == []
    assert load_config({"drops": "3,4.5"}, "detection").drops == [3, 4.5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epcohs": 3}, "'epcohs' does not exist; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": "many"}, "epochs is 'many'; it must be a whole number"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"lr": "fast"}, "lr is 'fast'; it must be a number or none"),
        ({"lr": float("inf")}, "lr is inf; it must be a number"),
        ({"mode": "both"}, "mode is 'both'; it must be one of replicate, sample"),
        ({"sizes": [0]}, "size '0'"),
        ({"sizes": "small"}, "size 'small'"),
        ({"sizes": []}, "size ''"),
        ({"sizes_per_step": 4}, "sizes_per_step is 4; it must not exceed the number of sizes, 3"),
        ({"wandb": "maybe"}, "wandb is 'maybe'; it must be true or false"),
        ({"model_args": 3}, "model_args is 3"),
        ({"crop_scale": [1.0, 0.5]}, "crop_scale is"),
        ({"precision": "bf16"}, "precision is 'bf16', which is now spelled 'bfloat16'"),
        ({"drop_path": 1.0}, "drop_path is 1; it must be at least 0 and below 1"),
        ({"batch_size": 10, "accumulation": 3}, "batch_size 10 must be a multiple of accumulation, 3"),
        ({"epochs": 3}, "warmup_epochs is 5; it must be less than epochs, 3"),
        ({"distillation": "kl"}, "set distillation_target logit"),
        ({"fsdp": True, "ema_decay": 0.9}, "set ema_decay 0 or fsdp false"),
    ],
)
def test_mistakes_get_one_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_recipe_files_with_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'resformer_small'"):
        load_config("resformer_smal")
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    wrong = (("a: [", "cannot be read as YAML"), ("- 1", "must contain options"), ("batchsize: 3", "'batch_size'"))
    for text, sentence in wrong:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("task", TASKS)
def test_every_option_has_a_help_line(task: str) -> None:
    texts = field_help(task)
    assert texts.keys() == config_of(task).model_fields.keys()
    assert all(text.endswith(".") and "\n" not in text and len(text) > 10 for text in texts.values())
    assert config_of(task)().task == task


def test_arguments_of_a_recipe_are_changed_one_by_one() -> None:
    recipe = {"model": "resformer_tiny", "model_args": {"position": "rlpe", "depth": 3}}
    assert load_config(recipe).model_args == recipe["model_args"]
    for given in ("depth=4,embed_dim=96", {"depth": 4, "embed_dim": 96}):
        found = load_config(recipe, model_args=given).model_args
        assert found == {"position": "rlpe", "depth": 4, "embed_dim": 96}
    assert load_config({**recipe, "model_args": "depth=3"}, model_args="depth=4").model_args == {"depth": 4}
    assert load_config(recipe, model="resformer_small").model_args == recipe["model_args"]
    # Those of another system or head would not fit.
    assert load_config(recipe, model="swin_tiny").model_args == {}
    assert load_config(recipe, model="swin_tiny", model_args="depth=4").model_args == {"depth": 4}
    dense = {"model": "pvt_v2_b0", "head": "upernet", "head_args": {"channels": 64}}
    assert load_config(dense, "segmentation", head_args="pools=1").head_args == {"channels": 64, "pools": 1}
    assert load_config(dense, "segmentation", head="semantic_fpn").head_args == {}
    with pytest.raises(UserError, match="model_args"):
        load_config(recipe, model_args="depth")


def test_a_recipe_of_another_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config(task="segmentation").to_dict()))
    assert load_config(tmp_path / "config.yaml", "segmentation") == load_config(task="segmentation")
    with pytest.raises(UserError, match="for segmentation, not for classification"):
        load_config(tmp_path / "config.yaml")


def test_a_saved_config_is_a_recipe(tmp_path: Path) -> None:
    config = load_config({"sizes": [32, "24x16"], "lr": 1e-5, "model_args": {"depth": 2}, "distillation": "none"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_file_of_a_run_may_be_in_an_earlier_spelling_but_no_recipe(tmp_path: Path) -> None:
    text = yaml.safe_dump(load_config(precision="float16").to_dict()).replace("float16", "fp16")
    for name in ("config.yaml", "mine.yaml"):
        (tmp_path / name).write_text(text)
    assert load_config(tmp_path / "config.yaml").precision == "float16"
    with pytest.raises(UserError, match="precision is 'fp16', which is now spelled 'float16'"):
        load_config(tmp_path / "mine.yaml")


class Renamed(Options):
    """Options that were renamed once."""

    renamed: ClassVar = {"sides": "sizes"}
    renamed_values: ClassVar = {"mode": {"all": "replicate"}}
    sizes: int = option(1, "Sizes.")
    mode: Literal["replicate", "sample"] = option("sample", "Mode.")


def test_renamed_options_and_values_name_the_new_one() -> None:
    old: dict[str, Any] = {"sides": 3}
    with pytest.raises(UserError, match="option 'sides' is now called 'sizes'"):
        Renamed(**old)
    with pytest.raises(UserError, match="mode is 'all', which is now spelled 'replicate'"):
        Renamed(mode="all")  # type: ignore[arg-type]  # on purpose
    assert Renamed(**Renamed.translated({"sides": 3, "mode": "all"})) == Renamed(sizes=3, mode="replicate")


def test_published_recipes() -> None:
    sizes = {name: load_config(name).shapes for name in list_recipes()}
    for name in ("resformer_tiny", "resformer_small", "resformer_base"):
        assert sizes[name] == [(224, 224), (160, 160), (128, 128)]
    assert sizes["resformer_small_128_224_384"] == [(384, 384), (224, 224), (128, 128)]
    for side in (128, 160, 224):
        assert sizes[f"resformer_small_{side}"] == [(side, side)]
    peaks = {"tiny": 1e-3, "small": 1e-3, "base": 1.6e-3}  # resformer.md, section 6: 8 x 128 images
    for variant, peak in peaks.items():
        assert load_config(f"resformer_{variant}").peak_lr == pytest.approx(peak)
    assert load_config("deit_small").peak_lr == pytest.approx(1e-3)
    assert load_config("deit_base_384").peak_lr == pytest.approx(5e-6)
    base = load_config("resformer_base")
    assert (base.epochs, base.warmup_epochs, base.drop_path, base.clip_grad) == (200, 20, 0.2, 5)


def test_drop_paths_of_published_dense_recipes() -> None:
    published = {
        "segmentation": {"upernet_160k": 0.3},
        "detection": {
            "swin_mask_rcnn_1x": 0.1,
            "swin_mask_rcnn_3x": 0.2,
            "swin_cascade_3x": 0.2,
            "dat_mask_rcnn_3x": 0.3,
            "mvitv2_cascade_3x": 0.2,
            "mpvit_mask_rcnn_1x": 0.2,
            "regionvit_mask_rcnn_1x": 0.2,
            "pvt_mask_rcnn_1x": 0.1,
        },
    }
    for task, rates in published.items():
        assert {name: load_config(name, task).drop_path for name in rates} == rates
    mpvit = load_config("mpvit_mask_rcnn_1x", "detection")
    assert (mpvit.batch_norm, mpvit.warmup_lr) == ("sync", pytest.approx(0.01 * mpvit.lr))
    pvt = load_config("pvt_mask_rcnn_1x", "detection")
    assert pvt.warmup_lr == pytest.approx(0.001 * pvt.lr)
    steps = [epochs * 117266 / 16 for epochs in load_config("regionvit_mask_rcnn_1x", "detection").drops]
    assert steps == [pytest.approx(60_000, rel=0.01), pytest.approx(80_000, rel=0.01)]


IMAGES: list[Callable[..., Any]] = [Augmentation, Mixing, SizeSchedule]
COMPONENTS: dict[str, list[Callable[..., Any]]] = {
    "classification": IMAGES,
    "segmentation": [SegmentationViews, SizeSchedule],
    "detection": [DetectionViews, SizeSchedule],
    "video": [*IMAGES, Sampling],
}
FROM_DATA = {"mean", "std", "flip_pairs", "num_classes", "max_pixels"}
"""Parameters of components that follow from the data."""


@pytest.mark.parametrize("task", COMPONENTS)
def test_what_a_component_takes_is_an_option_of_the_same_name(task: str) -> None:
    for component in COMPONENTS[task]:
        own = inspect.signature(component).parameters.keys() - FROM_DATA - {"segments"}  # a clip's other kind
        assert own <= config_of(task).model_fields.keys(), component


def test_components_are_built_from_the_options_of_their_names() -> None:
    options = {"crop_scale": "0.2,0.9", "separate_aug": False, "mix_prob": 0.25, "smoothing": 0, "seed": 3}
    config = load_config(options | {"separate_mix": True, "frames": 4, "stride": 2.5}, "video")
    augmentation, mixing = config.build(Augmentation), config.build(Mixing, num_classes=7)
    assert (augmentation.crop_scale, augmentation.separate_aug) == ((0.2, 0.9), False)
    assert augmentation.interpolation == "bilinear"  # the option's default, not the component's
    assert (mixing.num_classes, mixing.mix_prob, mixing.smoothing, mixing.separate_mix) == (7, 0.25, 0, True)
    assert mixing.seed == 3
    assert config.build(Sampling, stride=9) == Sampling(4, 9)


def test_the_demo_compares_at_equal_cost() -> None:
    def cost(recipe: str) -> float:
        config = load_config(recipe)
        model: Any = create_model(config.model, **config.model_args, img_size=config.shapes[0], num_classes=10).eval()
        forward = [count_flops(model, torch.zeros(1, 3, *shape)) for shape in config.shapes]
        assert config.build(SizeSchedule, sizes=config.shapes).mode == "sample" or len(config.shapes) == 1
        return config.epochs * sum(forward) / len(forward)

    several, single = TASKS["classification"].demo.runs.values()
    assert 0.95 < cost(several) / cost(single) <= 1


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_name_a_model_and_say_what_to_expect(name: str) -> None:
    config = load_config(name)
    assert config.model in list_models()
    text = (RECIPES / "classification" / f"{name}.yaml").read_text()
    for words in ("# Command:", "# Hardware:", "# Published:"):
        assert words in text
    if "distilled" in name:
        assert (config.teacher, config.teacher_kind, config.teacher_alpha) == ("regnety_160", "hard", 0.5)
