"""Upload the export of a run, or a merged model, to the model hub.

python launch/push.py --model output --hub_model_id me/my-model
"""

from pathlib import Path

import accel_llm.config.early

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.hub_options import PushOptions as Options
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.report.sharing import describe_failed_upload, find_export, share_export
from accel_llm.system.exit import run_script
from accel_llm.system.upload import upload_problems


def main() -> None:
    options = parse_options(Options)
    quiet_libraries()
    folder, name, private = find_export(Path(options.model)), options.hub_model_id, options.hub_private_repo
    if folder is None:
        raise ConfigError(f"model: {options.model} holds no adapter and no model; name the output_dir of a run.")
    raise_problems(upload_problems(name, private))
    try:
        address = share_export(folder, name, private)
    except Exception as error:  # of the hub, of its library or of the disk
        raise ConfigError(describe_failed_upload(folder, name, private, error)) from error
    print(f"uploaded {folder} to {address}{' (private)' * private}")


if __name__ == "__main__":
    run_script(main)
