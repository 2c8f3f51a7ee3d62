"""What tests of the server share: one that listens."""

import contextlib
import threading

import pytest


@pytest.fixture(scope="session")
def listening():
    """A context manager of a `Server`: it listens on a free port; gives its URL."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
    app = pytest.importorskip("puna.models.decode.server.app", reason="needs the extra serve")

    @contextlib.contextmanager
    def listen(served):
        with app.listen("127.0.0.1", 0) as listener:
            config = uvicorn.Config(served.app, log_level="error", lifespan="off")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
            thread.join()

    return listen
