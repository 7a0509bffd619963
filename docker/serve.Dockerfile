# Serving image: one model per container; arguments go on behind it. Written for review: this project's machines have no
# container engine, so it has not been built here. From the repository root:  docker build -f docker/serve.Dockerfile -t ingot-serve .
FROM python:3.11-slim-bookworm

WORKDIR /opt/ingot
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
# structured: answers that follow a JSON Schema. quantization: packages of the form `quantized`.
RUN pip install --no-cache-dir --constraint constraints.txt '.[structured,quantization]'

# Not root: the endpoint answers strangers.
RUN useradd --create-home --uid 1000 ingot
USER ingot
EXPOSE 8000
# /ready needs no key, and is 503 while the model loads and while a dead serving process is started again.
HEALTHCHECK --start-period=120s --interval=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# An address other than loopback needs a key: INGOT_API_KEY, or a file of `ingot keys add` that user 1000 can read:
# docker run -p 127.0.0.1:8000:8000 -e INGOT_API_KEY -v "$PWD/runs/NAME/package:/model:ro" ingot-serve
# docker run ... -v "$PWD/keys.json:/keys.json:ro" ingot-serve --keys /keys.json --log-format json
# docker stop -t 40: running requests have 30 seconds (--drain).
ENTRYPOINT ["ingot", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
