# Two images from one file: `--target api` (API, keeper, migrations; no torch) and `--target worker` (engines).

FROM python:3.12-slim AS source
WORKDIR /app
RUN useradd --create-home --uid 10001 imagefarm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY migrations migrations
COPY models/catalogue.toml models/catalogue.toml
COPY imagefarm imagefarm
COPY api api
COPY worker worker

FROM source AS api
RUN pip install --no-cache-dir -c constraints.txt -e .
USER imagefarm
ENV IMAGEFARM_LISTEN=0.0.0.0:8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["imagefarm", "api"]

FROM source AS worker
RUN pip install --no-cache-dir -c constraints.txt -e '.[worker]'
COPY models models
USER imagefarm
# the parent answers while the child renders; a stop signal lets the running pass end (IMAGEFARM_GRACE_SECONDS)
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import sys; sys.exit(b'celery' not in open('/proc/1/cmdline', 'rb').read())"]
CMD ["imagefarm", "worker"]
