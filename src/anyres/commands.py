"""The commands: typed functions whose signature is the interface and whose docstring is the help.

Nothing heavy is imported before a command runs, so that `anyres --help` answers at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from anyres.errors import UserError
from anyres.terminal import (
    note,
    number,
    print_files,
    print_scores,
    print_sweep,
    print_table,
    say,
    show_progress,
    write_csv,
)

_DEMO = """

    Takes minutes on two CPU cores, downloads nothing, and continues where it was if interrupted.

    Args:
        output: folder for the runs, the pictures and the report; otherwise runs/demo and the task
        epochs: epochs of the multi-resolution runs instead of the demo's own number
        seed: seed of everything random
        device: auto, cpu, cuda, …
"""


def _demo_command(task: str, about: str) -> Callable[..., None]:
    def demo(*, output: str | None = None, epochs: int | None = None, seed: int = 0, device: str = "auto") -> None:
        from anyres.demo import run_demo

        folder = output or ("runs/demo" if task == "classification" else f"runs/demo_{task}")
        result = run_demo(task, Path(folder), epochs, seed, device)
        print_sweep(result.rows)
        print()
        say(result.finding.headline)
        print()
        print_files(result.files)

    demo.__doc__ = about + _DEMO
    return demo


demo = _demo_command(
    "classification",
    "Train a multi-resolution ResFormer and an ordinary DeiT on built-in digits, and compare them at many sizes.",
)
segment_demo = _demo_command(
    "segmentation",
    "Train a multi-resolution ResFormer and an ordinary DeiT to segment composed scenes, and compare at many sizes.",
)
detect_demo = _demo_command(
    "detection",
    "Train a detector at three sizes and one at a single size on composed scenes, and compare them at many sizes.",
)
video_demo = _demo_command(
    "video",
    "Train a multi-resolution ResFormer and an ordinary DeiT to tell how digits move, and compare them at many sizes.",
)
_TRAIN = """

    Options come from the recipe, then from the command line. A second start with the same output folder continues the
    run.

    Args:
        model: architecture, a name from `anyres models`
        recipe: name of a recipe that comes with anyres, or a YAML file (such as RUN/config.yaml)
"""


def _training_command(task: str, about: str, measure: str) -> Callable[..., None]:
    """The command that trains for a task; `measure` is what its score is called."""

    def train(model: str | None = None, *, recipe: str | None = None, **options: Any) -> None:
        from anyres.training import load_config
        from anyres.training import train as run

        if model is not None:
            options["model"] = model  # also `--model`, as in a recipe
        for name in ("model_args", "head_args"):
            if name in options:
                options[name] = _key_values(name, options[name])
        result = run(load_config(recipe, task, **options))
        best = f"best {measure} {number(result.score)} % over the training sizes; weights in {result.folder / 'best'}"
        stopped = result.status in ("signal", "time limit")
        say(
            f"{result.status}: {'stopped before the first validation' if result.score is None else best}"
            + "; the same command continues the run" * stopped
        )
        if result.bad_images:
            say(f"{len(result.bad_images)} unreadable files were skipped; {result.folder / 'summary.json'} names them.")

    train.__doc__ = about + _TRAIN
    train.more_options = lambda: _train_options(task)  # type: ignore[attr-defined]
    return train


def _train_options(task: str) -> dict[str, tuple[Any, Any, str]]:
    """The options of a recipe, as (type, default, help) by name."""
    from anyres.training.config import CONFIGS

    found = {}
    for name, field in CONFIGS[task].model_fields.items():
        default = field.default
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        note = "" if default in (None, {}, "") or isinstance(default, bool) or not shown else f" (default {shown})"
        found[name] = (field.annotation, default, f"{field.description}{note}")
    return found


train = _training_command(
    "classification", "Train a classifier at several resolutions at once, or continue a run.", "accuracy"
)


segment_train = _training_command(
    "segmentation", "Train a segmentation network on any backbone, at one or several resolutions, or continue.", "mIoU"
)
detect_train = _training_command(
    "detection", "Train a detector on any backbone, at one or several resolutions, or continue.", "box AP"
)
video_train = _training_command(
    "video", "Train a network on clips, at one or several resolutions, or continue.", "accuracy"
)


def sweep(
    models: list[str],
    *,
    data: str = "digits",
    split: Literal["val", "train", "all"] = "val",
    sizes: str = "96:640:32",
    aspect: str = "1:1",
    names: str | None = None,
    bit_depth: int | None = None,
    output: str = "runs/sweep",
    batch_size: int | None = None,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
    cost: bool = True,
) -> None:
    """Evaluate one or several models at many sizes and aspect ratios; write a table, pictures and a report.

    Models of any task, but of one: top-1 of classifiers and of clips, mIoU of segmentation, AP of detection. A size is
    the short side of the image in segmentation and detection. For classification images are resized (bicubic) so that
    the short side is int(size/crop_pct), then the centre is cropped; for a size that is not square the resized image
    covers the box (height/crop_pct, width/crop_pct).

    Args:
        models: runs, saved models, published weights files, names, timm:NAME; LABEL:=MODEL gives a label of your own
        data: digits, an image folder, hf:NAME, hf-stream:NAME or wds:PATTERN, or what the task's training takes
        split: part of the data
        sizes: sides and HEIGHTxWIDTH, with ranges FIRST:LAST:STEP, such as 96:640:32,224x320
        names: file of the models' class names, one on a line, instead of those that they come with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        aspect: ratios WIDTH:HEIGHT at which every square size is evaluated, at the same area
        output: folder of sweep.csv, sweep.png, pareto.png and report.html
        batch_size: images per pass; otherwise 64, of clips 8, in segmentation and detection 1
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
        cost: also measure images/s, GFLOPs and peak memory
    """
    from anyres.data import parse_sizes
    from anyres.evaluation import parse_aspects, sizes_at_aspects
    from anyres.evaluation import sweep as run
    from anyres.evaluation.measure import open_test_source
    from anyres.evaluation.sweep import check_output
    from anyres.modelspec import open_model
    from anyres.tasks import task_of

    check_output(output)
    place = _device(device)
    if batch_size is not None:
        _check_batch_size(batch_size)
    wanted = parse_sizes(sizes)
    squares = [height for height, width in wanted if height == width]
    wanted += sizes_at_aspects(squares, parse_aspects(aspect))
    shapes = list(dict.fromkeys(wanted))
    opened: dict[str, Any] = {}
    for spec in models:
        name, model = open_model(spec, names)
        while name in opened:
            name += "'"
        opened[name] = model
    tasks = {task_of(model): name for name, model in opened.items()}
    if len(tasks) > 1:
        pairs = ", ".join(f"{name} ({task})" for task, name in tasks.items())
        raise UserError(f"{pairs} are for different tasks; sweep the models of one task at a time.")
    task = next(iter(tasks))
    batch_size = batch_size or {"classification": 64, "video": 8}.get(task, 1)
    first, *others = opened.values()
    source = open_test_source(first, data, split, others=others, bit_depth=bit_depth)
    result = run(
        opened,
        source,
        shapes,
        output,
        batch_size=batch_size,
        device=place,
        precision=precision,
        workers=workers,
        cost=cost,
        command=shlex.join(["anyres", *sys.argv[1:]]),
        progress=show_progress,
    )
    print_sweep(result.rows)
    print_files(result.files)


def predict(
    model: str,
    files: list[str],
    *,
    size: str | None = None,
    names: str | None = None,
    bit_depth: int | None = None,
    topk: int = 5,
    threshold: float = 0.5,
    batch_size: int = 32,
    device: str = "auto",
    layout: Literal["table", "csv"] = "table",
    output: str | None = None,
    pictures: str = "runs/predict",
) -> None:
    """Print what a model sees in images or clips, at any size: classes, segments, or objects.

    Models for segmentation, detection and video also write a picture for every file.

    Args:
        model: a run, a saved model, a published weights file, a name, or timm:NAME
        files: image files (for video models clips), or folders of them
        size: side or HEIGHTxWIDTH that images are prepared for; otherwise the largest training size
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        topk: classes per image
        threshold: smallest score of objects
        batch_size: images per pass of a classifier
        device: auto, cpu, cuda, …
        layout: a table for people or CSV for programs
        output: a CSV file to write instead of printing
        pictures: folder of the pictures
    """
    from anyres.data import Item, parse_sizes
    from anyres.data.decode import with_depth
    from anyres.files import check_file
    from anyres.modelspec import open_model
    from anyres.predict import default_size, find_files
    from anyres.predict import predict as run
    from anyres.tasks import task_of

    place = _device(device)
    shape = None
    if size is not None:
        shapes = parse_sizes(size)
        if len(shapes) != 1:
            raise UserError(f"size is {size!r}, but predict takes one: a side or HEIGHTxWIDTH.")
        shape = shapes[0]
    if topk < 1:
        raise UserError(f"topk is {topk}; it must be at least 1.")
    _check_batch_size(batch_size)
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must be between 0 and 1.")
    if output is not None:
        check_file(output, "predictions")
    network = open_model(model, names)[1]
    task = task_of(network)
    paths = find_files(files, "video" if task == "video" else "image")
    rows: list[list[str]] = []
    problems: list[str] = []
    if task == "classification":
        columns = ["rank", "label", "probability"]
        for item in run(network, paths, shape, topk, batch_size, place, bit_depth):
            problems += [item.problem] if item.problem else []
            cells = [
                [str(i), *pair]
                for i, pair in enumerate(zip(item.labels, map("{:.4f}".format, item.probabilities), strict=True), 1)
            ]
            rows += [[str(item.file), *line, item.problem] for line in cells or ([[""] * 3] if item.problem else [])]
    else:
        from anyres.overlay import COLUMNS, check_folder, overlays

        check_folder(Path(pictures), paths)
        columns = [*COLUMNS[task], "picture"]
        shape = shape or default_size(network)
        items = [Item(str(path), with_depth(path, bit_depth), None) for path in paths]
        for found in overlays(network, items, Path(pictures), shape, topk=topk, threshold=threshold, device=place):
            problems += [found.problem] if found.problem else []
            lines = found.cells or [[""] * len(COLUMNS[task])]
            rows += [[found.name, *line, str(found.picture or ""), found.problem] for line in lines]
    header = ["image", *columns, "problem"]
    if layout == "csv" or output is not None:
        write_csv(header, rows, output)
    else:
        shown = len(header) if problems else len(header) - 1
        print_table(header[:shown], [row[:shown] for row in rows])
    if problems:
        if len(problems) == len(paths):
            raise UserError(f"None of the {len(paths)} files could be read, the first because: {problems[0]}.")
        note(f"{len(problems)} of {len(paths)} files could not be read.")


def segment_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    bit_depth: int | None = None,
    size: int = 512,
    scales: str = "1.0",
    flip: bool = False,
    window: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
    classes: bool = True,
) -> None:
    """Measure the mIoU of a segmentation network: whole images or a sliding window, one scale or several.

    Args:
        model: a run or a saved model
        data: digits, a folder in ADE20K's layout, or hf:NAME
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        size: short side of the images; the long side is at most four times as long
        scales: factors at which every image is seen, such as 0.5,0.75,1,1.25,1.5,1.75
        flip: see every image mirrored, too
        window: side of a sliding window, instead of whole images
        batch_size: images of one size per pass
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
        classes: print the IoU of every class, too
    """
    from anyres.evaluation.measure import fitting_of
    from anyres.evaluation.segmentation import evaluate_segmentation

    place, network, source = _open_for_test("segmentation", model, data, split, device, names, bit_depth)
    measured = evaluate_segmentation(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        scales=_numbers("scales", scales),
        flip=flip,
        window=window,
        **fitting_of(network),
    )
    if classes:
        rows = [[name, "–" if value is None else f"{value:.1f}"] for name, value in measured.iou.items()]
        print_table(["class", "IoU (%)"], rows)
    print_scores(measured)


def detect_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    bit_depth: int | None = None,
    size: int = 800,
    results: str | None = None,
    batch_size: int = 1,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
) -> None:
    """Measure the AP of a detector as COCO does: boxes, and masks or keypoints where it gives them.

    Args:
        model: a run or a saved model
        data: digits, or a folder in COCO's layout
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        bit_depth: bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones
        size: short side of the images; the long side is at most 1333/800 of that
        results: a file for all detections, in COCO's layout
        batch_size: images per pass; they are padded to one size
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode images
    """
    from anyres.evaluation.detection import evaluate_detection
    from anyres.evaluation.measure import fitting_of
    from anyres.files import check_file

    if results is not None:
        check_file(results, "detections")
    place, network, source = _open_for_test("detection", model, data, split, device, names, bit_depth)
    measured = evaluate_detection(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        results=results,
        **fitting_of(network),
    )
    print_scores(measured)


def video_test(
    model: str,
    *,
    data: str = "digits",
    split: Literal["val", "train"] = "val",
    names: str | None = None,
    size: int = 224,
    clips: int = 1,
    crops: int = 1,
    crop_pct: float | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 0,
) -> None:
    """Measure the accuracy of a video network over one or several views of each clip.

    Args:
        model: a run or a saved model
        data: digits, or a folder in Kinetics' layout
        split: part of the data
        names: file of the model's class names, one on a line, instead of those that it comes with
        size: side of the views
        clips: clips of each video, evenly spread
        crops: 1 (centre) or 3 (along the long side) of each clip
        crop_pct: centre crop / resized short side; otherwise the model's, and 1 with three crops
        batch_size: videos per pass
        device: auto, cpu, cuda, …
        precision: of the arithmetic, under autocast
        workers: processes that decode videos
    """
    from anyres.evaluation.video import evaluate_video

    place, network, source = _open_for_test("video", model, data, split, device, names)
    measured = evaluate_video(
        network,
        source,
        (size, size),
        batch_size,
        place,
        precision,
        workers=workers,
        clips=clips,
        crops=crops,
        crop_pct=crop_pct,
    )
    print_scores(measured)


def _open_for_test(
    task: str, model: str, data: str, split: str, device: str, names: str | None, bit_depth: int | None = None
) -> tuple[str, Any, Any]:
    """(device, network, data), after making sure that the network is for the task."""
    from anyres.evaluation.measure import open_test_source
    from anyres.modelspec import open_model
    from anyres.tasks import task_of

    place = _device(device)
    network: Any = open_model(model, names)[1]
    if task_of(network) != task:
        raise UserError(f"{model} is a model for {task_of(network)}, not for {task}; use the command of its task.")
    return place, network, open_test_source(network, data, split, bit_depth=bit_depth)


def models(pattern: str = "*", *, layout: Literal["table", "csv"] = "table") -> None:
    """List the models, with their published numbers.

    Args:
        pattern: part of a name, or a shell pattern such as deit_*_384
        layout: a table for people or CSV for programs
    """
    from anyres.registry import list_models, model_info

    names = list_models(pattern)
    if not names:
        raise UserError(f"No model matches {pattern!r}; `anyres models` lists them all.")
    rows = []
    for name in names:
        info = model_info(name)
        native = info["native_size"]
        trained = ", ".join(map(str, info["train_sizes"]))
        best = info["top1"].get(native[0])
        rows.append(
            [name, f"{info['parameters'] / 1e6:.2f}", trained, "" if best is None else f"{best:.1f}", info["licence"]]
        )
    header = ["model", "parameters (M)", "trained at", "top-1 (%)", "licence"]
    if layout == "csv":
        write_csv(header, rows, None)
    else:
        print_table(header, rows)


def info(model: str, *, sizes: str = "96,224,384") -> None:
    """Tell what is known of a model: sizes, parameters, arithmetic, published numbers, licence and paper.

    Args:
        model: a name from `anyres models`
        sizes: sizes at which GFLOPs are counted
    """
    from anyres.data import parse_sizes
    from anyres.evaluation.accuracy import check_size
    from anyres.evaluation.cost import count_flops, random_input
    from anyres.registry import create_model, model_info

    facts = model_info(model)
    network = create_model(facts["name"]).eval()
    gflops = []
    for height, width in parse_sizes(sizes):
        check_size(network, (height, width))
        amount = count_flops(network, random_input(network, 1, (height, width))) / 1e9
        gflops.append(f"{amount:.2f} at {height if height == width else f'{height}x{width}'}")
    lines = {
        "model": facts["name"],
        "published as": facts["published_name"],
        "parameters": f"{facts['parameters']:,}",
        "GFLOPs (2 x MACs, as run)": ", ".join(gflops),
        "trained at": ", ".join(map(str, facts["train_sizes"])),
        "smallest side": str(facts["minimum_size"]),
        "other sizes": facts["size_policy"],
        "top-1 by size (%)": ", ".join(f"{size}: {value:.2f}" for size, value in facts["top1"].items()),
        "paper": facts["paper"],
        "published code": facts["repository"],
        "licence": facts["licence"],
        "weights": facts["download"]
        or "no direct address; give your copy of the file as MODEL=FILE to a command, or as checkpoint_path in Python",
        "notes": facts["notes"],
    }
    for key, value in lines.items():
        if value:
            say(f"{key + ':':28}{value}")


def convert(file: str, output: str, *, model: str | None = None, to: Literal["anyres", "published"] = "anyres") -> None:
    """Convert a weights file: published names to ours, or back.

    Args:
        file: a published weights file (.pth, .safetensors), or with to=published also a saved model's folder
        output: FILE.safetensors or FILE.pth for weights alone, or a folder for config.json and weights
        model: the architecture; otherwise the one registered model that the file fits
        to: whose parameter names the output has
    """
    from anyres.backbone import Backbone
    from anyres.checkpoints import save_weights
    from anyres.files import check_file
    from anyres.hub import check_target
    from anyres.modelspec import from_file, open_model

    is_file = Path(output).suffix in (".safetensors", ".pth")
    if not is_file and to == "published":
        raise UserError(
            f"{output} is a folder's name, but published layouts are single files: end it in .pth or .safetensors."
        )
    if Path(file).exists() and Path(output).exists() and Path(file).samefile(output):
        raise UserError(f"{output} is the input itself: choose another output.")
    if is_file:
        check_file(output, "weights")
    else:
        check_target(output)
    network = open_model(file)[1] if Path(file).is_dir() else None
    if network is None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no weights file {file}: check the path.")
        network = from_file(Path(file), model)
    assert isinstance(network, Backbone)
    state = network.state_dict()
    if to == "published":
        state = network.to_published(state)
    if is_file:
        save_weights(state, output)
    else:
        network.save_pretrained(output)
    say(f"wrote {output}: {len(state)} tensors of {str(network.architecture).removeprefix('anyres_')}")


def _numbers(name: str, text: str) -> list[float]:
    import math

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} is {text!r}; write numbers with commas between them, such as 0.5,1,1.5.")
    return numbers


def _check_batch_size(number: int) -> None:
    if number < 1:
        raise UserError(f"batch_size is {number}; it must be at least 1.")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:1, mps, …") from None
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, ImportError):  # each kind of device has its own way to say so
            raise UserError(f"device is {name!r}, but this machine does not offer it: choose cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}, but this machine offers {torch.cuda.device_count()} CUDA devices: choose cpu."
        )
    return name


def _key_values(name: str, text: str) -> dict[str, Any]:
    """`embed_dim=96,depth=4` or a YAML mapping → a dictionary."""
    import re

    from anyres.parsing import parse_yaml

    pair = r"(^|,)\s*(\w+)\s*="
    mapping = re.sub(pair, r"\1 \2: ", text)
    found = parse_yaml(f"{{{mapping}}}" if re.match(pair, text) else text, name)
    if not isinstance(found, dict):
        raise UserError(f"{name} is {text!r:.80}; write it as embed_dim=96,depth=4.")
    return found


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "segment demo": segment_demo,
    "segment train": segment_train,
    "segment test": segment_test,
    "detect demo": detect_demo,
    "detect train": detect_train,
    "detect test": detect_test,
    "video demo": video_demo,
    "video train": video_train,
    "video test": video_test,
    "sweep": sweep,
    "predict": predict,
    "models": models,
    "info": info,
    "convert": convert,
}
