"""The base class of all option groups, and the types of options. The types accept values as people write them."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from typing_extensions import Self

from accel_llm.system.places import expand_home

MAX_YAML_CHARACTERS = 1 << 16  # of a recipe, before and after its YAML aliases are expanded
_NEXT_PAIR = re.compile(r",(?=\s*[A-Za-z_][\w.]*\s*=)")


def _as_list(value: Any) -> Any:
    """Wrap a single value in a list; `none` and `false` mean the empty list."""
    if value is None or value is False or value in ("none", ["none"]):
        return []
    return [value] if isinstance(value, str | int | float) else value


def _accept_names(**names: str) -> BeforeValidator:
    """Accept other names of the same values, such as those of torch and Transformers."""
    return BeforeValidator(lambda value: names.get(value, value) if isinstance(value, str) else value)


def _parse_pairs(value: Any) -> Any:
    """Read `name=value name=value`, or a YAML mapping in one text. Values are YAML: `false` is a truth value."""
    texts = [value] if isinstance(value, str) else value
    if value is None or value is False or texts in (["none"], ["null"]):
        return {}
    if not isinstance(texts, list):
        return value

    # Each text is one pair, or a whole mapping.
    pairs: dict[Any, Any] = {}
    for text in texts:
        name, equals, value_text = str(text).partition("=")
        part = _parse_yaml(str(text)) if str(text).lstrip().startswith("{") else {name.strip(): _parse_yaml(value_text)}
        if not (isinstance(part, dict) and (equals or str(text).lstrip().startswith("{"))):
            raise ValueError(f"{text!r} is not a pair; give name=value, or a mapping")
        pairs |= part
    return pairs


def _parse_overrides(value: Any) -> Any:
    """Read fields and their values as `_parse_pairs` does, also as Transformers writes them: `n_embd=64,n_layer=2`."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list):
        # A comma separates two fields only if a name and an equals sign follow it.
        parts = [part for text in texts for part in _NEXT_PAIR.split(text if isinstance(text, str) else str(text))]
        texts = parts if not any(str(text).lstrip().startswith("{") for text in texts) else texts
    return _parse_pairs(texts)


def read_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Parse a YAML text of plain values; return its node and its value. Tags of Python objects are refused.

    Raises:
        yaml.YAMLError: the text is not YAML, or far too long or too deep for options.
    """
    too_long = yaml.YAMLError(f"it is more than {MAX_YAML_CHARACTERS:,} characters long")
    if len(text) > MAX_YAML_CHARACTERS:
        raise too_long
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # Anchors within anchors can turn a few lines into gigabytes.
        if node and _node_size(node, {}) > MAX_YAML_CHARACTERS:
            raise too_long
        return node, yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deep") from None
    except ValueError as error:  # an invalid date or integer
        raise yaml.YAMLError(str(error)) from None


def _node_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the approximate number of characters of a node with its aliases expanded; `sizes` caches them by node."""
    if id(node) not in sizes:
        # A node that contains itself meets this number, which is too large.
        sizes[id(node)] = MAX_YAML_CHARACTERS
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = len(parts) if isinstance(node, yaml.ScalarNode) else sum(_node_size(part, sizes) for part in parts)
        sizes[id(node)] = 1 + inside
    return sizes[id(node)]


def _parse_yaml(text: str) -> Any:
    try:
        return read_yaml(text)[1]
    except yaml.YAMLError:
        raise ValueError(f"{text[:200]!r} is not YAML") from None


def _parse_sources(value: Any) -> Any:
    """Read sources: paths, or mappings with the fields of `Source` (on the command line a text: {path: ...})."""
    places = _as_list([value] if isinstance(value, dict) else value)
    if not isinstance(places, list):
        return places
    places = [_parse_yaml(place) if isinstance(place, str) and place.startswith("{") else place for place in places]
    return [_build_source(place) if isinstance(place, dict) else _parse_place(place) for place in places]


def _build_source(fields: dict[str, Any]) -> "Source":
    try:
        return Source(**fields)
    except ValidationError as error:
        # One sentence for the first problem: pydantic's own text would name classes of this module.
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "path"
        names = ", ".join(Source.model_fields)
        if name not in Source.model_fields:
            raise ValueError(f"a source has no field {name!r}; give any of {names}") from None
        if first["type"] == "missing":
            raise ValueError(f"the source {fields!r} has no path; give path, and any of {names}") from None
        raise ValueError(f"{name} of a source: {fields[name]!r} is not allowed ({first['msg']})") from None


def _parse_place(value: Any) -> Any:
    """Expand a leading `~`, so that nobody behind the options has to."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{value!r} cannot be the name of a file")
    return expand_home(value) if isinstance(value, str) else value


def _parse_packing(value: Any) -> Any:
    """Read a truth value: true means `per_epoch`, false means none."""
    return {"true": "per_epoch", "false": None, "none": None}.get(str(value).lower(), value)


def _parse_resume(value: Any) -> Any:
    """Read a truth value as Transformers does: true means `auto`, false means `none`."""
    text = str(value).lower()
    return {"true": "auto", "false": "none", "none": "none"}.get(text, _parse_place(value))


def _parse_target_modules(value: Any) -> Any:
    """Read plain module names as a list, also from one string; any other string is a regular expression.

    PEFT matches a string against the whole dotted name of a module, so the string `q_proj` would match nothing.
    """
    if isinstance(value, list) and len(value) == 1 and not re.fullmatch(r"[\w.]+", str(value[0])):
        value = value[0]  # a flag gives a list; a single dotted name stays a list
    if not isinstance(value, str) or value == "all-linear":
        return value

    # A string: names with commas between them, or a regular expression.
    names = [name.strip() for name in value.split(",")]
    if all(name.isidentifier() for name in names):
        return names
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is neither a list of module names nor a regular expression ({error})") from None
    return value


def parse_method(value: Any) -> Any:
    """Read a method's name in any case, and PEFT's names of methods that have a shorter one here."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().replace("-", "_").strip("()").replace(")", "")
    return {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}.get(name, name)


def _parse_rates(value: Any) -> Any:
    """Read `pattern=rate pattern=rate`, or a mapping; each pattern is a regular expression, each rate a number above 0.

    YAML reads 5e-5, which has no dot, as a text.
    """
    pairs = _parse_pairs(value)
    if not isinstance(pairs, dict):
        return pairs
    rates: dict[str, float] = {}
    for pattern, rate in pairs.items():
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        try:
            rates[str(pattern)] = float(rate)
        except (TypeError, ValueError):
            raise ValueError(f"{rate!r} is not a learning rate; give a number above 0 for {pattern!r}") from None
        if isinstance(rate, bool) or not 0 < rates[str(pattern)] < math.inf:
            raise ValueError(f"{rate!r} is not a learning rate; give a number above 0 for {pattern!r}")
    return rates


def _parse_formats(value: Any) -> Any:
    """Read names of number formats in any case, as other programs write them: Q4_K_M."""
    names = _as_list(value)
    return [name.lower() if isinstance(name, str) else name for name in names] if isinstance(names, list) else names


def _parse_size(value: Any) -> Any:
    """Read a number of bytes, or a number with a unit as Transformers writes it: 500MB, 5GB, 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", str(value).strip(), re.IGNORECASE)
    if match is None:
        return value
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


DataFormat = Literal[
    "messages", "alpaca", "prompt_completion", "query_response", "question_answer", "text", "tokenized"
]


# A file or folder, or also the name of a model on the hub.
Place = Annotated[str, Field(min_length=1), BeforeValidator(_parse_place)]


# What a row of a .txt file is: a line, lines up to an empty one, or the whole file.
SampleBy = Literal["line", "paragraph", "document"]


class Source(BaseModel):
    """One source of rows and its own settings, which mean the same as the options of the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    path: Place
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # of a hub dataset or a saved one
    revision: str | None = None  # of a hub dataset
    data_format: DataFormat | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    sample_by: SampleBy | None = None
    weight: float | None = Field(None, gt=0)
    limit_rows: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """The name of the source in the ledger."""
        parts = (self.path, self.name, None if self.split == "train" else self.split)
        return ":".join(part for part in parts if part)


# Types of options that accept more than one spelling of a value.
Sources = Annotated[
    list[str | Source], BeforeValidator(_parse_sources, json_schema_input_type=str | list[str | Source])
]
Columns = Annotated[dict[str, str], BeforeValidator(_parse_pairs, json_schema_input_type=dict[str, str])]
Variables = Annotated[dict[str, Any], BeforeValidator(_parse_pairs, json_schema_input_type=dict[str, Any])]
Overrides = Annotated[dict[str, Any], BeforeValidator(_parse_overrides, json_schema_input_type=dict[str, Any])]
Rates = Annotated[dict[str, float], BeforeValidator(_parse_rates, json_schema_input_type=dict[str, float])]
Packing = Annotated[
    Literal["per_epoch", "static"] | None,
    BeforeValidator(_parse_packing, json_schema_input_type=bool | Literal["per_epoch", "static"] | None),
]
Texts = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Places = Annotated[list[Place], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Size = Annotated[int, Field(ge=1), BeforeValidator(_parse_size, json_schema_input_type=int | str)]
Numbers = Annotated[list[float], BeforeValidator(_as_list, json_schema_input_type=float | list[float])]
GgufFormats = Annotated[
    list[Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]],
    Field(min_length=1),
    BeforeValidator(_parse_formats, json_schema_input_type=str | list[str]),
]
Trackers = Annotated[
    list[Literal["tensorboard", "wandb", "trackio", "swanlab"]],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
PairLosses = Annotated[
    list[
        Literal[
            "sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down", "simpo", "orpo", "cpo", "sft"
        ]
    ],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    _accept_names(bfloat16="bf16", float16="fp16", half="fp16", float32="fp32", float="fp32"),
]
Optimizer = Annotated[
    Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd", "muon"],
    _accept_names(
        adamw_torch="adamw",
        adamw_torch_fused="adamw",
        adamw_bnb_8bit="adamw_8bit",
        paged_adamw_32bit="paged_adamw",
        lion_32bit="lion",
    ),
]
MethodName = Annotated[str, Field(min_length=1), BeforeValidator(parse_method)]
Resume = Annotated[str, Field(min_length=1), BeforeValidator(_parse_resume)]
TargetModules = Annotated[
    list[str] | str, BeforeValidator(_parse_target_modules, json_schema_input_type=str | list[str])
]


class Options(BaseModel):
    """Base of all option groups: unknown names and NaN are refused, and values cannot be changed later."""

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
    unused: ClassVar[tuple[str, ...]] = ()  # inherited options that have no meaning, and that --help leaves out
    script_defaults: ClassVar[dict[str, Any]] = {}  # where they differ from those of the groups, by field name
    before_names: ClassVar[str | None] = None  # the option of the words before the first --name; None: there are none

    @property
    def gives_scores(self) -> bool:
        """Whether the model gives scores of whole texts, and not probabilities of tokens."""
        return False

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Read the words `none` and `null` where an option may be none; refuse a truth value for a number."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(annotation) or (annotation,)
        if type(None) in kinds and value in ("none", "null"):
            return None
        # pydantic would read true as the number 1, but it refuses the word "true".
        numeric = (int in kinds or float in kinds) and bool not in kinds
        return str(value).lower() if isinstance(value, bool) and numeric else value

    def problems(self) -> list[str]:
        """Check the rules between options; return one sentence for each problem. Each group adds its own rules."""
        return []

    def with_defaults(self, values: dict[str, Any]) -> Self:
        """Return a copy in which `values` replace those options that the user did not set; they do not count as set."""
        unset = {name: value for name, value in values.items() if name not in self.model_fields_set}
        copy = self.model_copy(update=unset)
        copy.model_fields_set.difference_update(unset)
        return copy

    def changed_names(self) -> list[str]:
        """Return the names of the options that differ from the defaults of their script, whoever has set them."""
        values, own = self.model_dump(), type(self).script_defaults
        defaults = {
            name: own.get(name, field.get_default(call_default_factory=True, validated_data=values))
            for name, field in type(self).model_fields.items()
        }
        return [
            field.alias or name for name, field in type(self).model_fields.items() if values[name] != defaults[name]
        ]

    def _without_effect(self, uses: dict[str, tuple[str, ...]], choice: str) -> list[str]:
        """Return a problem for each option that the user set, but that the value of the option `choice` does not use.

        `uses` lists for each option the values of `choice` that use it.
        """
        value = getattr(self, choice)
        set_names = [
            name for name in uses if name in self.model_fields_set and getattr(self, name) not in (None, False)
        ]
        return [
            f"{name}: only {choice} {' or '.join(uses[name])} uses it, but {choice} is {value}; remove it."
            for name in set_names
            if value not in uses[name]
        ]
