"""What an option can be made of: the base of all option groups, and the types that take a value as people write it."""

import re
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from typing_extensions import Self

MOST_YAML = 1 << 16  # characters of a recipe, as it stands and with all that its aliases stand for


def _listed(value: Any) -> Any:
    """One value where a list is expected is a list of one; `none` and `false` are the empty list."""
    if value is None or value is False or value in ("none", ["none"]):
        return []
    return [value] if isinstance(value, str | int | float) else value


def _also(**names: str) -> BeforeValidator:
    """Takes other names for the same values, those that torch and Transformers use."""
    return BeforeValidator(lambda value: names.get(value, value) if isinstance(value, str) else value)


def _pairs(value: Any) -> Any:
    """`name=value name=value`, or the same as a YAML mapping in one text; values are YAML, so `false` is no text."""
    texts = [value] if isinstance(value, str) else value
    if value is None or value is False or texts in (["none"], ["null"]):
        return {}
    if not isinstance(texts, list):
        return value
    pairs: dict[Any, Any] = {}
    for text in texts:
        name, equals, written = str(text).partition("=")
        part = _yaml(str(text)) if str(text).lstrip().startswith("{") else {name.strip(): _yaml(written)}
        if not (isinstance(part, dict) and (equals or str(text).lstrip().startswith("{"))):
            raise ValueError(f"{text!r} is no pair; give name=value, or a mapping")
        pairs |= part
    return pairs


def read_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The node and the value of a YAML text that holds plain values; any other tag is an error of YAML.

    Raises:
        yaml.YAMLError: it is none, or is out of all proportion for options.
    """
    too_long = yaml.YAMLError(f"it is more than {MOST_YAML:,} characters long")
    if len(text) > MOST_YAML:
        raise too_long
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # One anchor that stands in another, and so on, makes gigabytes of a few lines.
        if node and _size(node, {}) > MOST_YAML:
            raise too_long
        return node, yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deep") from None
    except ValueError as error:  # of a date or a whole number that is none
        raise yaml.YAMLError(str(error)) from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of a node with all that its aliases stand for; one that holds itself has too many."""
    if id(node) not in known:
        known[id(node)] = MOST_YAML
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = len(parts) if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in parts)
        known[id(node)] = 1 + inside
    return known[id(node)]


def _yaml(text: str) -> Any:
    try:
        return read_yaml(text)[1]
    except yaml.YAMLError:
        raise ValueError(f"{text[:200]!r} is not YAML") from None


def _sources(value: Any) -> Any:
    """Places as texts or mappings; a mapping may come as text from the command line."""
    places = _listed([value] if isinstance(value, dict) else value)
    if not isinstance(places, list):
        return places
    places = [_yaml(place) if isinstance(place, str) and place.startswith("{") else place for place in places]
    return [_source(place) if isinstance(place, dict) else place for place in places]


def _source(fields: dict[str, Any]) -> "Source":
    try:
        return Source(**fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0]) if wrong["loc"] else "path"
        known = ", ".join(Source.model_fields)
        if name not in Source.model_fields:
            raise ValueError(f"a source has no {name!r}; it takes {known}") from None
        if wrong["type"] == "missing":
            raise ValueError(f"a source without path, found {fields!r}; it takes {known}") from None
        raise ValueError(f"{name} of a source: {fields[name]!r} is not allowed: {wrong['msg']}") from None


def _packing(value: Any) -> Any:
    """true is `per_epoch`, false is none."""
    return {"true": "per_epoch", "false": None, "none": None}.get(str(value).lower(), value)


def _resume(value: Any) -> Any:
    """Transformers also takes a truth value: true is `auto`, false is `none`."""
    text = str(value).lower()
    return {"true": "auto", "false": "none", "none": "none"}.get(text, value)


def _target_modules(value: Any) -> Any:
    """Plain module names are a list, also when one string holds them; anything else in a string is a pattern.

    PEFT matches a string against the whole dotted name of a module, so a bare `q_proj` would match nothing.
    """
    if isinstance(value, list) and len(value) == 1 and not re.fullmatch(r"[\w.]+", str(value[0])):
        value = value[0]  # a flag gives a list; one dotted name stays a list of names
    if not isinstance(value, str) or value == "all-linear":
        return value
    names = [name.strip() for name in value.split(",")]
    if all(name.isidentifier() for name in names):
        return names
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is neither a list of module names nor a regular expression ({error})") from None
    return value


def _bytes(value: Any) -> Any:
    """Bytes, or a number with a unit as Transformers takes it: 500MB, 5GB, 2GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(value).strip(), re.IGNORECASE)
    if found is None:
        return value
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


DataFormat = Literal[
    "messages", "alpaca", "prompt_completion", "query_response", "question_answer", "text", "tokenized"
]


class Source(BaseModel):
    """A place that rows come from, with what is said about it alone; see the options of the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    path: str = Field(min_length=1)
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # of a hub dataset or a saved one
    revision: str | None = None  # of a hub dataset
    data_format: DataFormat | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    weight: float | None = Field(None, gt=0)
    limit_rows: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """How the ledger names it."""
        parts = (self.path, self.name, None if self.split == "train" else self.split)
        return ":".join(part for part in parts if part)


Sources = Annotated[list[str | Source], BeforeValidator(_sources, json_schema_input_type=str | list[str | Source])]
Columns = Annotated[dict[str, str], BeforeValidator(_pairs, json_schema_input_type=dict[str, str])]
Variables = Annotated[dict[str, Any], BeforeValidator(_pairs, json_schema_input_type=dict[str, Any])]
Packing = Annotated[
    Literal["per_epoch", "static"] | None,
    BeforeValidator(_packing, json_schema_input_type=bool | Literal["per_epoch", "static"] | None),
]
Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Size = Annotated[int, Field(ge=1), BeforeValidator(_bytes, json_schema_input_type=int | str)]
Numbers = Annotated[list[float], BeforeValidator(_listed, json_schema_input_type=float | list[float])]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio", "swanlab"]],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    _also(bfloat16="bf16", float16="fp16", half="fp16", float32="fp32", float="fp32"),
]
Optimizer = Annotated[
    Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd", "muon"],
    _also(
        adamw_torch="adamw",
        adamw_torch_fused="adamw",
        adamw_bnb_8bit="adamw_8bit",
        paged_adamw_32bit="paged_adamw",
        lion_32bit="lion",
    ),
]


Resume = Annotated[str, BeforeValidator(_resume)]
TargetModules = Annotated[list[str] | str, BeforeValidator(_target_modules, json_schema_input_type=str | list[str])]


class Options(BaseModel):
    """What all groups share: nothing unknown, nothing changed later, no NaN, rules that are asked for their problems."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """`none` and `null` in text are nothing where nothing is allowed, and a truth value is not a number."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(annotation) or (annotation,)
        if type(None) in kinds and value in ("none", "null"):
            return None
        # pydantic reads true as 1; as a word it is no number.
        numeric = (int in kinds or float in kinds) and bool not in kinds
        return str(value).lower() if isinstance(value, bool) and numeric else value

    def problems(self) -> list[str]:
        """One sentence for each rule between fields that does not hold; a group adds its own to those above it."""
        return []

    def with_defaults(self, values: dict[str, Any]) -> Self:
        """A copy with `values` in place of everything that the person has not set."""
        unset = {name: value for name, value in values.items() if name not in self.model_fields_set}
        return self.model_copy(update=unset)

    def _misplaced(self, uses: dict[str, tuple[str, ...]], choice: str) -> list[str]:
        """Options set by the person that the value of `choice` leaves without effect."""
        chosen = getattr(self, choice)
        set_here = [name for name in uses if name in self.model_fields_set and getattr(self, name) not in (None, False)]
        return [
            f"{name}: only {choice} {' or '.join(uses[name])} uses it, {choice} is {chosen}"
            for name in set_here
            if chosen not in uses[name]
        ]
