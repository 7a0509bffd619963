# Serving image: one model per container. Written for review: this project's machines have no container engine, so it has
# not been built here. From the repository root:  docker build -f docker/serve.Dockerfile -t ingot-serve .
FROM python:3.11-slim-bookworm

WORKDIR /opt/ingot
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
RUN pip install --no-cache-dir --constraint constraints.txt .

# Not root: the endpoint answers strangers.
RUN useradd --create-home ingot
USER ingot
EXPOSE 8000
# An address other than loopback needs a key:
# docker run -p 8000:8000 -e INGOT_API_KEY -v "$PWD/runs/NAME:/model:ro" ingot-serve
ENTRYPOINT ["ingot", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
