"""Routes of the gateway but inference: the door, models, health, admin, captures, metrics and the OpenAPI document."""
