# The command `vsod` in a container:
#   docker build -t vsod .
#   docker run --rm -v "$PWD:/data" vsod predict clip.mp4 -o tinted.mp4
# With the CUDA kernels, on a base that has nvcc:
#   docker build -t vsod:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#     --build-arg VSOD_OPS_BUILD=cuda .
#   docker run --rm --gpus all -v "$PWD:/data" vsod:cuda predict clip.mp4 -o tinted.mp4
ARG BASE=debian:bookworm
FROM ${BASE}
ARG VSOD_OPS_BUILD=cpu
# The compiler stays: Triton compiles on the machine that has the GPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/vsod \
    && VSOD_OPS_BUILD=${VSOD_OPS_BUILD} /opt/vsod/bin/pip install --no-cache-dir "/src[models,serve,onnx]" \
    && rm -rf /src/build
WORKDIR /data
ENTRYPOINT ["/opt/vsod/bin/vsod"]
