"""Options of uploading to the model hub. A token is none of them: it would be in recipes, logs and lists of processes."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from accel_llm.config.fields import Options, Place


def _refuse_name(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        raise ValueError(f"{value!r} is not a truth value; give push_to_hub without a value, and hub_model_id {value}")
    return value


class HubOptions(Options):
    """Sharing"""

    push_to_hub: Annotated[bool, BeforeValidator(_refuse_name, json_schema_input_type=bool)] = Field(
        False, description="At the end, upload the exported folder to the model hub, and nothing else"
    )
    hub_model_id: str | None = Field(None, description="Repository to upload to, as owner/name; it is created")
    hub_private_repo: bool = Field(True, description="Only the owner may see the repository")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.push_to_hub and not self.hub_model_id:
            problems.append("push_to_hub: it needs the name of a repository; set hub_model_id too, as owner/name.")
        return problems + [
            f"{name}: nothing is uploaded without push_to_hub; set it too, or remove {name}."
            for name in ("hub_model_id", "hub_private_repo")
            if name in self.model_fields_set and not self.push_to_hub
        ]


class PushOptions(Options):
    """Push"""

    model: Place = Field(description="Folder of a run, of its export, or of a merged model")
    hub_model_id: str = Field(description="Repository to upload to, as owner/name; it is created")
    hub_private_repo: bool = Field(True, description="Only the owner may see the repository")
