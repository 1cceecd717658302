"""The base of all API models, and the scalar types that Kubernetes conventions ask for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

_ACRONYMS = {"uri": "URI", "uid": "UID", "kl": "KL", "gpu": "GPU"}


def camel_case(name: str) -> str:
    """`work_uri` becomes `workURI`: Kubernetes writes an acronym in one case."""
    first, *rest = name.split("_")
    return first + "".join(_ACRONYMS.get(word, word.capitalize()) for word in rest)


def cel(rule: str, message: str) -> dict[str, list[dict[str, str]]]:
    """Schema extras of a field: a CEL rule with the message that a user sees when it is broken."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


#: Kubernetes API conventions forbid floats: decimals travel as strings.
_DECIMAL = cel(
    "self.matches('^[0-9]+([.][0-9]+)?([eE][-+]?[0-9]{1,2})?$')", 'write a decimal number in quotes, such as "2e-4"'
)
_POSITIVE = cel("self.matches('^[0.]*[1-9]')", 'write a number above 0 in quotes, such as "0.1"')
Decimal = Annotated[str, StringConstraints(min_length=1, max_length=24), Field(json_schema_extra=_DECIMAL)]
PositiveDecimal = Annotated[
    str,
    StringConstraints(min_length=1, max_length=24),
    Field(json_schema_extra={name: [*rules, *_POSITIVE[name]] for name, rules in _DECIMAL.items()}),
]
Fraction = Annotated[
    str,
    StringConstraints(min_length=1, max_length=12),
    Field(
        json_schema_extra=cel("self.matches('^0([.][0-9]+)?$')", 'write a fraction below 1 in quotes, such as "0.05"')
    ),
]
#: A Kubernetes resource quantity such as "4", "500m" or "16Gi".
Quantity = Annotated[
    str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$", min_length=1, max_length=24)
]
#: Name of another object in the job's own namespace.
ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)
]


class ApiModel(BaseModel):
    """camelCase outside, snake_case inside, frozen.

    Unknown fields are ignored: they are a newer version's, whose schema has checked them already. A typing error never
    comes here, the API server and `finetune validate` refuse it by the schema.

    The docstring under each attribute is the field's description in the CRD (`kubectl explain`).
    """

    model_config = ConfigDict(
        alias_generator=camel_case,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_json_dict(self) -> dict[str, Any]:
        """The object as Kubernetes stores it: camelCase, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def validations(*rules: tuple[str, str]) -> ConfigDict:
    """Attach CEL rules to a model: pairs of (rule, message shown to the user)."""
    return ConfigDict(
        json_schema_extra={"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}
    )
