"""The start of the ranks: variables of torchrun and of Slurm, right, half-set and malformed."""

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, only_error, run_script, start_ranks

from common.data.loaders import default_workers
from common.distributed import ranks_on_this_machine
from common.errors import UserError, command
from common.run import ranks
from common.run.run import check_name

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_NODELIST": "gpu[3-4]"}


@pytest.fixture
def variables(monkeypatch):
    """Sets these variables of ranks and no other."""
    for name in [*os.environ]:
        if name in TWO or name == "LOCAL_WORLD_SIZE" or name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def set_(values):
        for name, value in values.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_


WRONG = [  # variables, and those that the line names
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "RANK"),
    ({"LOCAL_RANK": "1"}, "RANK"),
    ({"LOCAL_WORLD_SIZE": "1"}, "RANK"),
    *(({**TWO, "RANK": bad}, "RANK") for bad in ("abc", "", "-1", "1.0", "2", "9" * 5000)),
    *(({**TWO, "WORLD_SIZE": bad}, "WORLD_SIZE") for bad in ("abc", "", "0", "-2")),
    *(({**TWO, "LOCAL_RANK": bad}, "LOCAL_RANK") for bad in ("x", "", "2")),
    *(({**TWO, "LOCAL_WORLD_SIZE": bad}, "LOCAL_WORLD_SIZE") for bad in ("x", "0", "3")),
    ({**TWO, "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK"),
    *(({**TWO, "MASTER_ADDR": bad}, "MASTER_ADDR") for bad in (None, "", " ")),
    *(({**TWO, "MASTER_PORT": bad}, "MASTER_PORT") for bad in (None, "", "x", "0", "70000")),
    *(({**STEP, "SLURM_PROCID": bad}, "SLURM_PROCID") for bad in (None, "x", "2")),
    *(({**STEP, "SLURM_LOCALID": bad}, "SLURM_LOCALID") for bad in (None, "x", "2")),
    *(({**STEP, "SLURM_STEP_NUM_TASKS": bad}, "SLURM_STEP_NUM_TASKS") for bad in (None, "x", "0")),
    ({**STEP, "WORLD_SIZE": "4"}, "WORLD_SIZE"),
    ({**STEP, "WORLD_SIZE": "x"}, "WORLD_SIZE"),
    ({**STEP, "SLURM_STEP_NODELIST": None}, "MASTER_ADDR"),
    *(({**STEP, "SLURM_STEP_NODELIST": bad}, "MASTER_ADDR") for bad in ("a[1-", "[", "a b", ",")),
    ({**STEP, "MASTER_ADDR": ""}, "MASTER_ADDR"),
    ({**STEP, "MASTER_PORT": "x"}, "MASTER_PORT"),
]


@pytest.mark.parametrize(("values", "named"), WRONG)
def test_variables_that_cannot_be_meant_are_one_line_that_names_them(
    values, named, variables, capfd
):
    variables(values)
    assert command(ranks.start) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line
    assert not dist.is_initialized()


def test_the_line_is_a_scripts_too():
    """A script says it before the ranks start: a rank without a number does not fail silently."""
    flags = ["--dataset", "photos", "--epochs", "x"]
    assert "--epochs" in only_error(run_script("recipes/nnclr.py", *flags, RANK="abc"))


def test_only_the_first_task_of_a_slurm_step_says_what_all_meet(variables, capfd):
    def fails():
        raise UserError("a flag is wrong")

    for task, lines in (("0", 1), ("1", 0)):
        variables({"SLURM_PROCID": task})
        assert command(fails) == 2
        assert len(capfd.readouterr().err.splitlines()) == lines


def test_numbers_of_one_machine_that_are_none_are_one_line(variables):
    variables({"LOCAL_WORLD_SIZE": "x", "SLURM_CPUS_PER_TASK": "many"})
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE=x"):
        ranks_on_this_machine()
    with pytest.raises(UserError, match="SLURM_CPUS_PER_TASK=many"):
        default_workers(1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1, None)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (1, None)),
        ({**TWO, "LOCAL_WORLD_SIZE": "2"}, (2, 0)),
        ({**TWO, "LOCAL_RANK": None}, (2, None)),
        (MEET, (1, None)),  # they are another program's, and no rank's
        (STEP, (2, 1)),
        ({**STEP, "WORLD_SIZE": "2", **MEET}, (2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (1, None)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (1, None)),  # a shell inside an allocation
    ],
)
def test_variables_that_are_right(values, expected, variables):
    variables(values)
    ranks.ranks_from_slurm()
    assert ranks.ranks_and_local_rank() == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("node-a.site.org,b", "node-a.site.org"),
        ("gpu[01-04,07],big1", "gpu01"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[2-3]n[08-09]-ib,x", "rack2n08-ib"),
    ],
)
def test_the_first_host_of_a_node_list_needs_no_scontrol(nodes, first, variables, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    variables({**STEP, "SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": nodes})
    ranks.ranks_from_slurm()
    assert os.environ["MASTER_ADDR"] == first
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


# -- the rendezvous -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_never_come_end_the_wait_at_the_stated_time(rank, variables, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "WAIT", datetime.timedelta(seconds=2))
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables({**TWO, "RANK": rank, "MASTER_PORT": port})
    assert command(ranks.start) == 2
    said = capfd.readouterr()
    assert f"rank {rank} of 2 waits for the others at MASTER_ADDR=127.0.0.1" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "has not met the others" in line and "at most 0.0333333 min" in line and port in line
    assert "Traceback" not in said.err and not dist.is_initialized()


# -- GPUs -----------------------------------------------------------------------------------------

SHARES = """
import os, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from common.errors import command
from common.run import ranks
from common.run.run import check_name

real = dist.init_process_group
dist.init_process_group = lambda backend, **more: real("gloo", **more)  # NCCL wants a GPU
torch.cuda.is_available, torch.cuda.set_device = (lambda: True), (lambda device: None)
torch.cuda.device_count = lambda: 1
gpu = sys.argv[1] if len(sys.argv) == 2 else sys.argv[1 + int(os.environ["RANK"])]
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=gpu)
sys.exit(command(lambda: print("started on", ranks.start())))
"""


@pytest.mark.parametrize(("gpus", "code"), [(["a"], 2), (["a", "b"], 0)])
def test_two_ranks_of_one_gpu_are_one_line_and_a_gpu_each_is_right(gpus, code, tmp_path):
    """Each sees one GPU: its own, as Slurm shows each task, or the same."""
    (tmp_path / "shares.py").write_text(SHARES)
    processes = start_ranks(2, str(tmp_path / "shares.py"), *gpus)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * 2, outputs
    if code:
        lines = [line for o in outputs for line in o.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "ranks 0 and 1 have the same GPU: 2 ranks on" in lines[0]
        assert "--nproc_per_node 1" in lines[0]
    else:
        assert all("started on cuda:0" in output for output in outputs)


def test_a_rank_that_does_not_say_which_of_several_gpus_is_its_own(variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    variables({**TWO, "LOCAL_RANK": None})
    with pytest.raises(UserError, match="LOCAL_RANK is not set"):
        ranks.start()


def test_a_script_that_runs_under_anothers_name_is_refused():
    with pytest.raises(UserError, match=r'yours.py runs as simclr: write Run\("yours", config\)'):
        check_name("simclr", Path("recipes/yours.py"))
    check_name("yours", Path("recipes/yours.py"))
    check_name("supervised", Path("eval/supervised.py"))
    check_name("simclr", Path("pytest"))


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
def stop(*_):
    time.sleep(0.6)
    open(sys.argv[1], "w").close()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def interrupted(child, path):
    line = [sys.executable, "-c", child, str(path)]
    code = f"import sys; from common.run.signals import run_child; sys.exit(run_child({line}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    return process


def test_ctrl_c_asks_a_child_to_stop_and_waits_until_it_has_saved(tmp_path):
    assert interrupted(CHILD, tmp_path / "saved").wait(30) == 75
    assert (tmp_path / "saved").exists()


def test_a_second_ctrl_c_ends_a_child_at_once(tmp_path):
    process = interrupted(CHILD.replace("0.6", "40"), tmp_path / "saved")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) != 0 and not (tmp_path / "saved").exists()
