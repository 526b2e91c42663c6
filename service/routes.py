"""What can be called: the gRPC services by name, and the REST paths with their methods."""

from __future__ import annotations

SERVICE = "tokenwire.v1.TextGenerationService"

# The files of Swagger UI that its page asks for.
DOCS_ASSETS = (
    "swagger-ui.css",
    "swagger-ui-bundle.js",
    "favicon-32x32.png",
)

# Every REST path with its methods; the protos bind them to RPCs. A POST needs a JSON body and has
# no time limit; a GET has no body and a limit of 5 s. A field with `**` is any further text.
REST_ROUTES: dict[str, tuple[str, ...]] = {
    "/": ("GET", "POST"),
    "/generate": ("POST",),
    "/generate_stream": ("POST",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/responses": ("POST",),
    "/invocations": ("POST",),
    "/tokenize": ("POST",),
    "/chat_tokenize": ("POST",),
    "/v1/load_lora_adapter": ("POST",),
    "/v1/unload_lora_adapter": ("POST",),
    "/v1/models": ("GET",),
    "/v1/models/{id=**}": ("GET",),
    "/health": ("GET",),
    "/ping": ("GET",),
    "/info": ("GET",),
    "/metrics": ("GET",),
    "/openapi.json": ("GET",),
    "/api-doc/openapi.json": ("GET",),
    "/docs": ("GET",),
    **{f"/docs/{name}": ("GET",) for name in DOCS_ASSETS},
}

# What probes and scrapers ask every few seconds: they leave no log lines and begin no traces.
QUIET_PATHS = ("/health", "/ping", "/metrics", "/grpc.health.v1.Health/Check")

# What operators ask also while no engine gets on: how things are, and that a call ends.
OPERATOR_PATHS = ("/metrics",)
OPERATOR_METHODS = tuple(f"/{SERVICE}/{name}" for name in ("Metrics", "Abort"))

# What only callers with an admin key may call.
ADMIN_METHODS = tuple(
    f"/{SERVICE}/{name}" for name in ("LoadAdapter", "UnloadAdapter", "ListAdapters")
)

# The services that the gateway passes native gRPC calls to; to it all others are unknown.
GRPC_SERVICES = (
    SERVICE,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
