"""Several processes: the same numbers as one, and a word on who is missing or different."""

import contextlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from puna.configs.errors import LOST, MachineError, UserError
from puna.models.parallel.roll_call import roll_call

CONFIG = """
from puna.configs import base

def get_config():
    config = base.get_config()
    config.model.update(
        vocab_size=264, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=24, compute_dtype="float32", moe_interval=2, num_experts=4, expert_dim=16,
        load_balance_weight=0.01,
    )
    config.data.update(train="{folder}/train/*.txt", validation="{folder}/validation/*.txt",
                       seq_len=32)
    config.optimizer.update(warmup_steps=2, learning_rate=3e-3, eps=1e-3)
    config.train.update(steps=6, batch_size=8, log_every=1, save_every=3, eval_every=3)
    config.eval.batch_size = 8
    return config
"""


def puna(*arguments, processes=1, devices=1):
    """Run the command line, in several processes through `puna launch`."""
    launch = [] if processes == 1 else ["launch", "-n", processes, f"--devices={devices}", "--"]
    command = [sys.executable, "-m", "puna", *map(str, [*launch, *arguments])]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    if processes == 1:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def mesh(text):
    return [f"--config.mesh.{part}" for part in text.split()]


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    names = ("loss", "grad_norm", "router_entropy", "validation_loss")
    return np.array([[json.loads(line).get(n, 0.0) for n in names] for line in lines])


def call_all(abouts, timeout=5.0, num_processes=None, late=()):
    """The roll call of processes that say these things; what each gets to hear."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    heard, kinds = {}, {}

    def one(i, about):
        try:
            roll_call(f"127.0.0.1:{port}", num_processes or len(abouts), i, about, timeout).close()
        except (UserError, MachineError) as e:
            heard[i], kinds[i] = str(e), type(e)

    threads = [threading.Thread(target=one, args=item) for item in abouts.items()]
    for i, thread in zip(abouts, threads, strict=True):
        if i in late:
            time.sleep(1.0)
        thread.start()
    for thread in threads:
        thread.join()
    # That a process is missing can be the machine's fault; that it is different cannot.
    for i, text in heard.items():
        assert kinds[i] is (MachineError if "did not" in text else UserError)
    return heard


def test_all_there_and_alike(capsys):
    assert call_all({i: {"host": f"h{i}", "jax": "1"} for i in range(4)}) == {}
    assert "4 processes on 4 hosts: jax 1" in capsys.readouterr().out


def test_a_missing_process_is_named():
    abouts = {i: {"host": f"h{i}", "jax": "1"} for i in (0, 2)}
    heard = call_all(abouts, timeout=1.0, num_processes=4)
    assert heard.keys() == {0, 2}
    for text in heard.values():
        assert "processes 1, 3 of 4 did not come within 1 s" in text


def test_a_different_process_is_named():
    abouts = {i: {"host": f"h{i}", "jax": "1"} for i in range(3)}
    abouts[2]["jax"] = "2"
    heard = call_all(abouts)
    assert "process 2 on h2 differs from process 0 on h0: jax 2 and 1" in heard[0]
    assert set(heard.values()) == {heard[0]} and heard.keys() == {0, 1, 2}


def test_one_that_comes_late_hears_of_a_difference():
    abouts = {0: {"host": "h0", "jax": "1"}, 2: {"host": "h2", "jax": "2"}}
    abouts[1] = {"host": "h1", "jax": "1"}
    heard = call_all(abouts, late={1}, timeout=20.0)
    assert "process 2 on h2 differs" in heard[0] == heard[1] == heard[2]


def test_the_first_is_missing():
    heard = call_all({1: {"host": "h"}}, timeout=1.0, num_processes=2)
    assert "process 0 did not answer at 127.0.0.1" in heard[1]


def test_strangers_on_the_port_are_passed_over():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    about = {"host": "h", "jax": "1"}
    result = []

    def first():
        result.append(roll_call(f"127.0.0.1:{port}", 2, 0, about, 20).close())

    thread = threading.Thread(target=first)
    thread.start()
    strangers = (
        *(b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n", b'{"process": "x"}\n'),
        b'{"process": "x", "of": 2, "about": {}}\n',
        b'{"process": 1, "of": 2, "about": 3}\n',
    )
    for garbage in strangers:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as line:
                    line.sendall(garbage)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.05)
    roll_call(f"127.0.0.1:{port}", 2, 1, about, 20).close()
    thread.join()
    assert result == [None]


def test_the_first_word_may_come_with_the_answer():
    """As it does where this process is slow to read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls = []

        def first():
            line, _ = server.accept()
            calls.append(line)
            line.recv(4096)
            line.sendall(b'{"go": true, "host": "h0"}\n{"beat": 1}\n{"bye": "no space"}\n')

        thread = threading.Thread(target=first)
        thread.start()
        peers = roll_call(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, {"host": "h1"}, 5)
        assert hear({1: peers})[1].get(timeout=10) == "process 0 on h0 ended: no space"
        thread.join()
        peers.close()
        calls[0].close()


def test_a_process_that_comes_twice_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    heard = queue.Queue()

    def one(process, host):
        try:
            roll_call(address, 3, process, {"host": host}, 10).close()
        except UserError as e:
            heard.put(str(e))

    threads = [threading.Thread(target=one, args=x) for x in ((0, "a"), (1, "b"), (1, "c"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = {heard.get() for _ in range(3)}
    assert len(said) == 1 and "process 1 came twice: from " in said.pop()


def three_peers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    peers = {}

    def one(i):
        peers[i] = roll_call(address, 3, i, {"host": f"h{i}"}, 10)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [peers[i] for i in range(3)]


def hear(peers, heartbeat=30.0):
    """Let some watch; what each says on ending, as it comes."""
    said = {i: queue.Queue() for i in peers}
    for i, peer in peers.items():
        peer.watch(heartbeat, said[i].put)
    return said


@pytest.mark.parametrize("gone,left", [(2, (0, 1)), (0, (1, 2))])
def test_who_is_gone_is_said_by_all_others(gone, left):
    peers = three_peers()
    said = hear({i: peers[i] for i in left})
    peers[gone].close()  # as the system does for a process that is killed
    for i in left:
        assert said[i].get(timeout=10).startswith(f"process {gone} on h{gone} was lost; the run")


def test_a_watcher_with_many_open_files(request):
    """Descriptors from 1024 on, which `select.select` refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1400 and hard != resource.RLIM_INFINITY:
        pytest.skip(f"at most {hard} open files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    with contextlib.ExitStack() as stack:
        for _ in range(1200):
            stack.enter_context(socket.socket())
        peers = three_peers()
        said = hear({i: peers[i] for i in (0, 1)})
        peers[2].close()
        for i in (0, 1):
            assert said[i].get(timeout=10).startswith("process 2 on h2 was lost")
        for peer in peers[:2]:
            peer.close()


def test_who_is_silent_is_gone():
    peers = three_peers()
    said = hear({i: peers[i] for i in (0, 1)}, heartbeat=1.0)  # 2 is stopped: it says nothing
    for i in (0, 1):
        assert said[i].get(timeout=10).startswith("process 2 on h2 has been silent for 1 s")


def test_who_leaves_as_it_should_is_not_missed():
    peers = three_peers()
    said = hear(dict(enumerate(peers)))
    for peer in reversed(peers):
        peer.leave()
    time.sleep(0.5)
    assert all(q.empty() for q in said.values())
    for peer in peers:
        peer.close()


def test_the_reason_of_an_error_is_told():
    peers = three_peers()
    said = hear({i: peers[i] for i in (0, 1)})
    peers[2].leave("no space")
    for i in (0, 1):
        assert said[i].get(timeout=10) == "process 2 on h2 ended: no space"


@pytest.mark.slow
def test_several_processes_are_one_run(corpus, tmp_path):
    """Two and four processes, three meshes; four go on as one and as two on other meshes."""
    config = tmp_path / "experiment.py"
    config.write_text(CONFIG.format(folder=corpus))

    def train(name, mesh_text, *more, **where):
        folder = tmp_path / name
        arguments = ["train", f"--config={config}", f"--workdir={folder}", *mesh(mesh_text), *more]
        status, out, err = puna(*arguments, **where)
        assert status == 0, err
        return folder, out

    one, _ = train("one", "data=1")
    want = losses(one)
    assert len(want) == 6 and want[-1, 3] > 0

    two, out = train("two", "data=1 fsdp=2 expert=2", processes=2, devices=2)
    assert "2 processes of 2 devices each" in out and out.count("step 1/6") == 1
    np.testing.assert_allclose(losses(two), want, rtol=1e-5)

    half = "--config.train.steps=3", "--config.optimizer.schedule=constant"
    rest = "--config.train.steps=6", "--config.optimizer.schedule=constant"
    whole, _ = train("whole", "data=1", *rest)
    four, _ = train("four", "data=2 tensor=2", *half, processes=4)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", four, copy], check=True)
    train("four", "data=1", *rest)
    np.testing.assert_allclose(losses(four), losses(whole), rtol=1e-5)
    train("copy", "data=1 context=2", *rest, processes=2)
    np.testing.assert_allclose(losses(copy), losses(whole), rtol=1e-5)

    # A release is loaded by two processes, each reading its own part, and is the same model.
    release = tmp_path / "release"
    status, _, err = puna("convert", two, release, "--to=hf")
    assert status == 0, err
    results = []
    for name, mesh_text, where in (
        ("eval1", "data=1", {}),
        ("eval2", "data=1 fsdp=2 tensor=2", {"processes": 2, "devices": 2}),
    ):
        arguments = ["eval", f"--config={config}", f"--checkpoint={release}"]
        # A release has no rule that ends a text; the run's documents end with EOS.
        arguments += ["--config.data.add_eos=always"]
        status, _, err = puna(*arguments, f"--workdir={tmp_path / name}", *mesh(mesh_text), **where)
        assert status == 0, err
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(results[0]["loss"], want[-1, 3], rtol=1e-5)
    texts = []
    for name, where in (("say1", {}), ("say2", {"processes": 2})):
        extra = ["--mesh=data=1,fsdp=2"] if where else []
        status, _, err = puna(
            "generate", f"--checkpoint={release}", "--prompt=t1: the", "--max_tokens=8",
            f"--workdir={tmp_path / name}", *extra, **where,
        )  # fmt: skip
        assert status == 0, err
        texts.append(json.loads((tmp_path / name / "results.json").read_text())["text"])
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.slow
def test_a_users_mistake_ends_all_processes(corpus, tmp_path):
    config = tmp_path / "experiment.py"
    config.write_text(CONFIG.format(folder=corpus))
    status, _, err = puna(
        "train", f"--config={config}", f"--workdir={tmp_path / 'x'}", "--config.mesh.tensor=3",
        processes=2,
    )  # fmt: skip
    assert status == 2
    assert "puna: mesh.tensor=3 = 3 does not divide the 2 devices" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number,how", [(signal.SIGKILL, "was lost"), (signal.SIGSTOP, "silent")])
def test_a_process_that_is_killed_or_stuck_is_named(corpus, tmp_path, number, how):
    """And the launcher, told to, starts the run again, which resumes from its checkpoint."""
    config = tmp_path / "experiment.py"
    config.write_text(CONFIG.format(folder=corpus))
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "puna", "launch", "-n", "2", "--restarts=1", "--", "train"),
        *(f"--config={config}", f"--workdir={run}", "--heartbeat=10", "--config.train.steps=160"),
        *("--config.optimizer.schedule=constant", "--config.train.eval_every=0"),
        "--config.train.save_every=20",
    ]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env=environment, **pipes)
    deadline = time.monotonic() + 300
    while len(list(run.glob("checkpoints/[0-9]*0"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[1]), number)
    out, err = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, err
    assert "puna: process 1 on" in err and how in err and "starting again, 1 of 1" in err
    assert f"process 0 ended with status {LOST}" in err or "process 1 ended with signal 9" in err
    starts = [line for line in out.splitlines() if "compiling" in line]
    assert len(starts) == 2 and not starts[1].startswith("step 0 ")
    assert len(losses(run)) == 160
