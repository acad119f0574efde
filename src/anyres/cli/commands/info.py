"""`anyres info`."""

from __future__ import annotations

from anyres.cli.terminal import (
    say,
)


def info(model: str, *, sizes: str = "96,224,384") -> None:
    """Show the sizes, parameters, FLOPs, published results, licence and paper of a model.

    Args:
        model: a name from `anyres models`
        sizes: sizes at which to count GFLOPs
    """
    from anyres.data import parse_sizes
    from anyres.data.config import DataConfig
    from anyres.evaluation.cost import count_flops, random_input
    from anyres.models._registry import create_model, model_info

    facts = model_info(model)
    network = create_model(facts["name"]).eval()
    gflops = []
    for height, width in parse_sizes(sizes):
        DataConfig.of(network).check_size((height, width))
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
        f"{facts['benchmark']} top-1 (%)": ", ".join(f"{size}: {value:.2f}" for size, value in facts["top1"].items()),
        "paper": facts["paper"],
        "published code": facts["repository"],
        "licence": facts["licence"],
        **{f"weights ({tag})": where for tag, where in facts["weights"].items()},
        "notes": facts["notes"],
    }
    for key, value in lines.items():
        if value:
            say(f"{key + ':':28}{value}")
