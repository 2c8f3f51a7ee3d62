"""What tests of decoding share: parameters of models that are never trained."""

import asyncio
import contextlib
import functools

import jax
import numpy as np
import pytest

from puna.models import transformer
from puna.models.parallel import sharding


@pytest.fixture(scope="session")
def drawn():
    """A function of a config and a spread: parameters that compile nothing, the same each time."""

    @functools.cache
    def parameters(config, spread=0.5):
        rng = np.random.default_rng(0)

        def draw(path, shape):
            x = rng.normal(size=shape.shape)
            x = 1 + 0.1 * x if "norm" in str(path[-2]) else spread * x
            return jax.device_put(np.float32(x).astype(shape.dtype))

        return jax.tree.map_with_path(draw, sharding.unbox(transformer.abstract_params(config)))

    return parameters


@pytest.fixture(scope="session")
def asking():
    """A context of an engine behind a server: a function that asks about pictures or parts."""
    httpx = pytest.importorskip("httpx", reason="a client")
    app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")
    from puna.models.decode.server.worker import Worker

    @contextlib.contextmanager
    def running(engine):
        with Worker(engine) as worker:
            served = app.Server(worker, "tiny").app

            def post(*given):
                parts = [
                    {"type": "image_url", "image_url": {"url": x}} if isinstance(x, str) else x
                    for x in given
                ]
                content = [*parts, {"type": "text", "text": "what is it"}]
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5}

                async def request():
                    transport = httpx.ASGITransport(served)
                    async with httpx.AsyncClient(transport=transport, base_url="http://a") as http:
                        return await http.post("/v1/chat/completions", json=body, timeout=120)

                return asyncio.run(request())

            yield post

    return running
