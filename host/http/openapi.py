"""The table of routes as an OpenAPI 3.1 document, for tools that make clients or look for faults.

`python -m custom_diffusion.host.http.openapi > docs/openapi.json` writes the one that is shipped.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .api import ENDPOINTS
from .endpoint import JSON_TYPE, PICTURE, PICTURE_TYPES, PREFIX, Endpoint, Parameter
from .schemas import SCHEMAS, Schema


def description() -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        operations = paths.setdefault(PREFIX + endpoint.path, {})
        operations[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Training jobs and concepts of the Custom Diffusion pack",
            "version": "1",
            "description": "Explained in http-api.md. The same paths are also below /api.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "http://127.0.0.1:8188"}],
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def text() -> str:
    return json.dumps(description(), indent=1, ensure_ascii=False) + "\n"


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.operation,
        "summary": endpoint.summary,
        "parameters": [_parameter(each) for each in endpoint.parameters if each.place != "body"],
        "responses": {
            str(status): _response(endpoint, status, when)
            for status, when in endpoint.statuses().items()
        },
    }
    if endpoint.method == "POST":
        operation["requestBody"] = _body(endpoint)
    return operation


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "required": parameter.default is None,
        "schema": _schema(parameter),
    }


def _schema(parameter: Parameter) -> Schema:
    schema: Schema
    if parameter.most is not None:
        schema = {"type": "integer", "minimum": 0, "maximum": parameter.most}
    elif parameter.choices:
        schema = {"type": "string", "enum": list(parameter.choices)}
    else:
        schema = {"type": "string", **({"minLength": 1} if parameter.default is None else {})}
    return schema if parameter.default is None else {**schema, "default": parameter.default}


def _body(endpoint: Endpoint) -> dict[str, Any]:
    """Also of those that take nothing: only JSON is let in, and a browser does not let a foreign
    page send that.
    """
    sent = [parameter for parameter in endpoint.parameters if parameter.place == "body"]
    schema = {
        "type": "object" if sent else ["object", "null"],
        "properties": {
            each.name: {**_schema(each), "description": each.description} for each in sent
        },
        "required": [each.name for each in sent if each.default is None],
        "additionalProperties": False,
    }
    return {"required": True, "content": {JSON_TYPE: {"schema": schema}}}


def _response(endpoint: Endpoint, status: int, when: str) -> dict[str, Any]:
    if status == 304:
        return {"description": when}
    if status != 200:
        content = {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/Error"}}}
    elif endpoint.answer == PICTURE:
        content = {kind: {"schema": {}} for kind in PICTURE_TYPES}
    else:
        reference = {"$ref": f"#/components/schemas/{endpoint.answer}"}
        content = {JSON_TYPE: {"schema": reference}}
    return {"description": when, "content": content}


if __name__ == "__main__":
    sys.stdout.write(text())
