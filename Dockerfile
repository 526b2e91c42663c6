# One image for all processes: engine, service and Envoy. docker-compose.yml puts them together, and
# `docker run -p 8080:8080 tokenwire:cpu` runs them all in one container.
#
#   docker build --build-arg DEVICE=cpu --build-arg PIP_EXTRA_INDEX_URL=… -t tokenwire:cpu .
#   docker build --build-arg DEVICE=cuda -t tokenwire:cuda .
#
# The first needs the index that PyTorch's installation page names for CPUs; the second needs none.
ARG DEVICE=cpu


FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY engine engine
COPY service service
COPY protos protos
COPY envoy envoy
COPY models models
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .


FROM python:3.11-slim AS packages
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tokenwire
ENV PATH=/opt/tokenwire/bin:$PATH
ARG DEVICE
# pip reads it from here; other variables of pip's can be given in the same way.
ARG PIP_EXTRA_INDEX_URL=""
COPY requirements-runtime-${DEVICE}.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements-runtime-${DEVICE}.lock \
 || { echo "For DEVICE=cpu, PIP_EXTRA_INDEX_URL must be PyTorch's index for CPUs." >&2; exit 1; }
COPY --from=wheel /wheel /wheel
# The CPU kernels, one library for each level of processors: the server takes the best for its own.
RUN pip install --no-cache-dir --no-deps /wheel/*.whl \
 && python -m tokenwire.engine.kernels.prebuild \
 && pip uninstall --yes pip


FROM python:3.11-slim AS cpu


FROM python:3.11-slim AS cuda
# Triton compiles what calls its kernels, in C, when they are used first.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility


FROM ${DEVICE} AS server
COPY --from=packages /opt/tokenwire /opt/tokenwire
# Directories that volumes are mounted on: a new volume takes over their owner. That of the socket is
# private to the user that all processes run as.
RUN useradd --create-home --uid 1000 tokenwire \
 && install --directory --owner tokenwire --group tokenwire --mode 700 \
      /run/tokenwire /home/tokenwire/.cache
ENV PATH=/opt/tokenwire/bin:$PATH \
    HOME=/home/tokenwire \
    HF_HOME=/home/tokenwire/.cache/huggingface \
    TRITON_CACHE_DIR=/home/tokenwire/.cache/triton
# What /info says of the build: docker build --build-arg BUILD_SHA=$(git rev-parse HEAD) …
ARG BUILD_SHA=""
ARG BUILD_LABEL=""
ENV TOKENWIRE_BUILD_SHA=$BUILD_SHA TOKENWIRE_BUILD_LABEL=$BUILD_LABEL
USER 1000:1000
WORKDIR /home/tokenwire
VOLUME ["/run/tokenwire", "/home/tokenwire/.cache"]
EXPOSE 8080 50051
# Asks the service by grpc.health.v1 whether all is well; engine and gateway have checks of their own
# in docker-compose.yml. With TLS on the gRPC port it needs --gateway-port.
HEALTHCHECK --interval=5s --timeout=6s --start-period=10m CMD ["tokenwire", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenwire"]
CMD ["serve", "--hostname=0.0.0.0", "--grpc-host=0.0.0.0"]
