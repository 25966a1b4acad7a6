"""accelerate #1133: without `--config_file` the launcher takes the YAML that was once written, and does not say so.

The right answer is in the record of the run: which YAML it was. The launcher passes on no name, so it is read from the
command line of the launcher, which this test gives (tests/backend has a real launch).
"""

from accelerate.commands.launch import launch_command_parser

from accel_llm.backend import launch_settings


def test_the_yaml_of_a_launch_is_known_also_if_nobody_named_it(monkeypatch, tmp_path):
    (tmp_path / "default_config.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 3\n")
    monkeypatch.delenv("RANK", raising=False)

    def launched(*words: str) -> None:
        arguments = launch_command_parser().parse_args([*words, "train.py"])
        arguments.config_file = str(tmp_path / (arguments.config_file or "default_config.yaml"))
        monkeypatch.setattr(launch_settings, "_launcher_arguments", lambda: arguments)

    launched()
    assert launch_settings.launch_yaml() == str(tmp_path / "default_config.yaml")
    (problem,) = launch_settings.launch_problems()
    assert problem.startswith("num_processes: 3 processes were asked for, but default_config.yaml starts one")
    launched("--config_file", "none.yaml")
    assert launch_settings.launch_yaml() is None
