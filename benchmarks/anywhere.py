"""Tries small networks of every system in every form in which one graph serves all sizes, and prints the errors.

    uv run --extra export python benchmarks/anywhere.py                       # every system and form
    uv run --extra export python benchmarks/anywhere.py 'swin*' --forms export onnx --dense

The table shows the largest difference from eager, relative to the largest output, over ten sizes (odd, prime, tall,
wide, below and above 224 px) and batches of one and two; for `compile` also the number of graphs. The networks are the
published ones with fewer and narrower layers, as in the tests. A failure is printed with its reason below the table.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from anyres.export.capture import GRAPH_MINIMUM, capture
from anyres.models._backbone import Backbone
from tests.contract.small import image, small

NAMES = [
    "resformer_tiny", "deit_tiny", "uvit_tiny", "gpvit_l1", "dynamicvit_deit_small", "dynamicvit_lvvit_small",
    "dynamicvit_convnext_tiny", "dynamicvit_swin_tiny", "swin_tiny", "swin_mlp_tiny_c24_256", "cswin_tiny",
    "msg_transformer_tiny", "pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li", "p2t_tiny", "twins_pcpvt_small", "twins_svt_small",
    "mvitv2_tiny", "mvitv2_small_16x4", "cvt_13", "cmt_tiny", "mpvit_tiny", "shunted_tiny", "scalablevit_small",
    "regionvit_tiny", "hatnet_tiny", "dat_tiny", "dat_pp_tiny",
]  # fmt: skip
SIZES = [
    (224, 224), (97, 131), (65, 448), (160, 96), (131, 97), (80, 72), (66, 200), (127, 113), (260, 300), (224, 256),
]  # fmt: skip

Run = Callable[[Tensor], Sequence[Tensor]]
Program = Callable[[], torch.export.ExportedProgram]


def outputs(result: Any) -> list[Tensor]:
    return [result] if torch.is_tensor(result) else list(result)


def compiled(model: Backbone, program: Program, graphs: list[int]) -> Run:
    from torch._inductor.compile_fx import compile_fx

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return compile_fx(module, inputs)

    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    return lambda x: outputs(call(x))


def exported(model: Backbone, program: Program, graphs: list[int]) -> Run:
    # torch's guards ask for the example's kind of batch (of several images); the graph does not.
    call = program().module(check_guards=False)
    return lambda x: outputs(call(x))


def onnx(model: Backbone, program: Program, graphs: list[int]) -> Run:
    import onnxruntime

    converted = torch.onnx.export(program(), dynamo=True, verbose=False)
    assert converted is not None
    file = io.BytesIO()
    converted.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]


def openvino(model: Backbone, program: Program, graphs: list[int]) -> Run:
    import openvino

    converted = openvino.convert_model(program())
    network = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [torch.from_numpy(out) for out in network(x.numpy()).values()]


def aot_inductor(model: Backbone, program: Program, graphs: list[int]) -> Run:
    package = torch._inductor.aoti_compile_and_package(program())
    call = torch._inductor.aoti_load_package(package)
    return lambda x: outputs(call(x))


FORMS = {"compile": compiled, "export": exported, "onnx": onnx, "openvino": openvino, "aot": aot_inductor}


@torch.no_grad()
def cell(name: str, form: str, model: Backbone, program: Program) -> tuple[str, str]:
    """Return the table's cell and, if something is wrong, what."""
    graphs: list[int] = []
    worst = 0.0
    began = time.process_time()
    try:
        run = FORMS[form](model, program, graphs)
        for number, size in enumerate(SIZES):
            x = image(1 + number % 2 if form != "compile" else 2, size, model, number)
            for ours, expected in zip(run(x), outputs(model(x)), strict=True):
                if ours.shape != expected.shape:
                    raise ValueError(f"{size}: {tuple(ours.shape)} instead of {tuple(expected.shape)}")
                error = float((ours - expected).abs().max() / expected.abs().max())
                worst = worst if error <= worst else error  # not `max`, which would drop a NaN
    except Exception as failure:  # whatever a runtime raises is a result here
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return "fails", f"{name}, {form}: {type(failure).__name__}: {' '.join(lines)[:600]}"
    count = f" ({len(graphs)} graphs)" if graphs else ""
    print(f"{name} {form}: {worst:.1e}{count}, {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    return f"{worst:.0e}{count}", f"{name}, {form}: an error of {worst:.1e}" if not worst <= 1e-4 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["compile", "export", "onnx", "openvino"])
    parser.add_argument("--dense", action="store_true", help="feature maps instead of logits")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    notes = []
    print(f"| network | {' | '.join(args.forms)} |\n|---|{'---|' * len(args.forms)}", flush=True)
    for name in NAMES:
        if any(fnmatchcase(name, pattern) for pattern in args.names):
            model = small(name, **({"dense": True} if args.dense else {}))
            program = cache(partial(capture, model, image(2, (160, 288), model)))
            cells = [cell(name, form, model, program) for form in args.forms]
            print(f"| {name} | {' | '.join(text for text, _ in cells)} |", flush=True)
            for _, note in cells:
                if note:
                    notes.append(note)
                    print(note, file=sys.stderr, flush=True)
    print(f"\nSides from {GRAPH_MINIMUM} px.", *notes, sep="\n")


if __name__ == "__main__":
    main()
