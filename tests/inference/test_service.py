"""The request server of docs/deploy.md."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import anyres

pytest.importorskip("litserve")
PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the pages stand in the repository only")
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}


@pytest.fixture
def code() -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    return str(found)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made: Any = anyres.create_model("resformer_tiny", num_classes=3, **SMALL)
    nn.init.normal_(made.head.weight)
    made.pretrained_cfg |= {"label_names": ["cat", "dog", "owl"], "train_sizes": [[24, 24]]}
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def requests(count: int) -> list[dict[str, str]]:
    """Images of several shapes, and one that cannot be read at every fifth place."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (*rng.choice([16, 24, 40], 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, format="PNG")
        made.append({"image": base64.b64encode(b"no image" if number % 5 == 4 else file.getvalue()).decode()})
    return made


def check(answers: list[dict[str, Any]], sent: list[dict[str, str]], model: Path) -> None:
    alone = anyres.Predictor(model, "native", batch_size=1)
    for number, (answer, request) in enumerate(zip(answers, sent, strict=True)):
        if number % 5 == 4:
            assert "not an image" in answer.pop("problem")
            assert not answer
            continue
        expected = alone(base64.b64decode(request["image"])).values()
        assert [list(row) for row in answer["rows"]] == [["rank", "label", "probability"]] * 3
        for row, (rank, label, probability) in zip(answer["rows"], expected, strict=True):
            assert (row["rank"], row["label"]) == (rank, label)
            assert row["probability"] == pytest.approx(probability, abs=1e-5)


def test_its_steps_answer_a_batch_of_mixed_requests(code: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(model))
    names: dict[str, Any] = {"__name__": "serve"}
    exec(code, names)
    service = names["Service"](max_batch_size=4, batch_timeout=0.01)
    service.setup("cpu")
    sent = requests(10)
    answers = [service.encode_response(result) for result in service.predict(list(map(service.decode_request, sent)))]
    check(json.loads(json.dumps(answers)), sent, model)
    wrong = [{}, {"image": None}, {"image": "ä"}, {"image": "YQ="}]
    assert all(service.encode_response(result)["problem"] for result in service.predict(
        list(map(service.decode_request, wrong))))  # fmt: skip


@pytest.mark.slow
def test_the_server_answers_concurrent_requests(code: str, model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    (tmp_path / "serve.py").write_text(code.replace("port=8000", f"port={port}"))
    environment = {**os.environ, "MODEL": str(model)}
    server = subprocess.Popen([sys.executable, "serve.py"], cwd=tmp_path, env=environment, start_new_session=True)

    def ask(path: str, request: Any = None) -> Any:
        data = None if request is None else json.dumps(request).encode()
        address = f"http://127.0.0.1:{port}/{path}"
        call = urllib.request.Request(address, data, {"content-type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.read()

    try:
        for _ in range(240):
            try:
                assert ask("health") == b"ok"
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        sent = requests(30)
        with ThreadPoolExecutor(8) as threads:
            answers = [json.loads(each) for each in threads.map(lambda request: ask("predict", request), sent)]
        check(answers, sent, model)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it has processes of its own
        server.wait(30)
