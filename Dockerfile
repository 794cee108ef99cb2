# Lethe as the compose file runs it: every service from one image, none of them as root.
#
#   docker build -t lethe .
#   docker build -t lethe:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/lethe
COPY . .
RUN /opt/lethe/bin/pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" '.[minilm]'

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --home-dir /tmp lethe \
    # Compose lends these places to volumes, and runs as whoever owns the site's keys.
    && install -d -m 1777 /runs /site/home /site/superlink/state \
        /site/nodes/node-1/state /site/nodes/node-2/state /site/nodes/node-3/state
COPY --from=build /opt/lethe /opt/lethe
ENV PATH=/opt/lethe/bin:$PATH \
    HOME=/tmp USER=lethe LOGNAME=lethe \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLWR_HOME=/tmp/flower \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
USER 10001:10001
WORKDIR /tmp
CMD ["lethe", "--help"]
