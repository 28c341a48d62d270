"""The JSON bodies of HTTP as msgspec models, one module for each type of request; validation, the document at
/openapi.json and docs/openai.md are made from them."""
