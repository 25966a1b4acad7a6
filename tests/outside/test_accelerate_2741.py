"""accelerate #2741: `accelerate launch --num_processes 2 --cpu train.py` starts a single process and does not say so.

The right number of processes is the one that was asked for. The launcher has one way to start several processes, and
`--cpu` (or `use_cpu: true`) takes another one. So we refuse, and name the YAML that starts two.
"""

from accelerate.commands.launch import launch_command_parser

from accel_llm.backend.launch_settings import _dropped_processes


def problems(*flags: str, **settings: object) -> list[str]:
    arguments = launch_command_parser().parse_args([*flags, "train.py"])
    return _dropped_processes(settings, arguments, "cpu.yaml")


def test_two_processes_on_a_cpu_are_not_silently_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for asked in (problems("--num_processes", "2", "--cpu"), problems(num_processes=2, use_cpu=True)):
        assert asked[0].startswith("num_processes: 2 processes were asked for, but cpu.yaml starts one")
        assert "use ddp.yaml" in asked[0]
    assert not problems("--num_processes", "1", "--cpu") and not problems(num_processes="auto")


def test_a_process_of_several_asked_for_no_more(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert not problems("--num_processes", "2")
