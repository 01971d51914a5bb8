# tinygpt on CPUs, to train and to serve. docs/docker.md says how it is used and what of it was tried.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/tinygpt/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tinygpt
WORKDIR /build
COPY constraints.txt requirements.lock ./
# torch alone comes from its own index, as the CPU build; all else by its hash.
RUN pip install --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch \
    && pip install --require-hashes -r requirements.lock

FROM python:${PYTHON}
RUN useradd --uid 1000 --create-home tinygpt \
    && mkdir -p /app/outputs /app/data \
    && chown 1000:1000 /app/outputs /app/data
WORKDIR /app
COPY --from=build /opt/tinygpt /opt/tinygpt
COPY conf conf
COPY tinygpt tinygpt
COPY *.py LICENSE ./
ENV PATH=/opt/tinygpt/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib \
    TINYGPT_DATA_DIR=/app/data TINYGPT_CACHE_DIR=/app/data/cache HF_HOME=/app/data/huggingface
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["python", "serve.py", "ckpt=latest", "host=0.0.0.0", "port=8000"]
