# Training image for NVIDIA GPUs. Written for review: this project's machines have no container engine, so it has not
# been built here. From the repository root:  docker build -f docker/train.Dockerfile -t ingot-train .
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev git \
    && rm -rf /var/lib/apt/lists/*
# gcc: Triton compiles its launchers at run time. PyTorch's Linux wheel brings CUDA's libraries; the host gives the driver.

WORKDIR /opt/ingot
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt .

# NCCL wants shared memory: docker run --gpus all --ipc=host -v "$PWD:/work" ingot-train finetune recipe.yaml
WORKDIR /work
ENTRYPOINT ["ingot"]
