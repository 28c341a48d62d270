"""The document at /openapi.json: made from the models, and true of the server."""

import httpx
import jsonschema
import pytest

from serving.api.http.bodies.anthropic import MessagesBody
from serving.api.http.bodies.chat import ChatBody
from serving.api.http.bodies.completion import CompletionBody
from serving.api.http.bodies.responses import ResponsesBody
from serving.api.http.bodies.rules import field_rules
from serving.api.http.bodies.tokenize import TokenizeBody
from serving.api.http.openapi import openapi_document
from serving.api.http.server import application

pytestmark = pytest.mark.anyio
BODIES = (CompletionBody, ChatBody, MessagesBody, ResponsesBody, TokenizeBody)
METHODS = ("get", "post", "delete")


def operations(document):
    return [methods[name] for methods in document["paths"].values() for name in METHODS if name in methods]


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_operation_has_an_id_of_its_own_and_every_reference_a_component():
    document = openapi_document()
    names = [operation["operationId"] for operation in operations(document)]
    assert len(set(names)) == len(names) > 8
    components = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) == components


def test_every_parameter_says_what_it_is():
    parameters = [parameter for operation in operations(openapi_document()) for parameter in operation["parameters"]]
    assert {parameter["in"] for parameter in parameters} == {"path", "query", "header"}
    assert all(parameter["description"].endswith(".") for parameter in parameters)


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
def test_a_body_is_a_component_with_every_field_and_what_happens_to_it(model):
    properties = openapi_document()["components"]["schemas"][model.__name__]["properties"]
    assert properties.keys() == field_rules(model).keys()
    assert all(field["description"] for field in properties.values())


def schemas(value):
    """All objects inside a document."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from schemas(each)


def test_generators_of_clients_understand_every_schema():
    """openapi-python-client leaves out each operation whose body has an array without items, or an enum of other
    values than texts."""
    for schema in schemas(openapi_document()["components"]):
        assert schema.get("type") != "array" or "items" in schema or "prefixItems" in schema, schema
        assert all(isinstance(value, str) for value in schema.get("enum", ())), schema


@pytest.mark.parametrize("body", BODIES)
def test_the_schema_of_an_accepted_field_has_its_neutral_values_and_no_others(body):
    properties = openapi_document()["components"]["schemas"][body.__name__]["properties"]
    for name, rule in field_rules(body).items():
        if rule.treatment == "accepted":
            validator = jsonschema.Draft202012Validator(properties[name])
            assert all(map(validator.is_valid, (None, *rule.neutral))), name
            others = [True, False, 0, 7, "other", ["other"], [[]], {"other": 1}]
            assert not any(validator.is_valid(value) for value in others if not rule.is_neutral(value)), name


async def test_every_route_of_the_document_is_there(processor):
    transport = httpx.ASGITransport(application(processor))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        document = (await client.get("/openapi.json")).json()
        for path, methods in document["paths"].items():
            answer = await client.request(next(iter(methods)), path.replace("{name}", "fake"), json={})
            if "{id}" in path:
                continue  # there is no response yet
            plain = "get" in methods and path != "/v1/resume"  # which needs the position to resume at
            assert answer.status_code in ((200,) if plain else (200, 400)), path
