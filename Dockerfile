# The HTTP server of an export on CPUs; docs/server.md says how it is built and run.
FROM python:3.13-slim
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fame_jax fame_jax
COPY experiments experiments
RUN pip install --no-cache-dir '.[serve]' && rm -rf /source/*
RUN useradd --create-home server && mkdir /exports
USER server
WORKDIR /home/server
# Programs that were compiled once are read again by the next version of the same model.
ENV JAX_PLATFORMS=cpu \
    JAX_COMPILATION_CACHE_DIR=/home/server/cache \
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
VOLUME /exports
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=2m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# Other containers reach it: set the variable FAME_JAX_TOKEN.
ENTRYPOINT ["fame_jax", "serve", "--export=/exports", "--host=0.0.0.0", "--port=8000"]
