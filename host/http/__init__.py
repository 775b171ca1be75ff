"""The routes over HTTP as data: the table, the answers, the OpenAPI document."""
