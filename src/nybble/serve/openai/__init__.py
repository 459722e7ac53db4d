"""OpenAI's API: routes, schemas, tool calls."""
