# Three stages: what we depend on, our code, and a slim image of both that runs as a number, not as root.
#
#   docker build -t tombola:0.1.0 --build-arg TORCH_INDEX_URL=INDEX .     INDEX: PyTorch's index of CPU wheels
#   docker build -t tombola:0.1.0-cuda .                                  the default wheels bring CUDA (several GB)
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges -p 8000:8000 tombola:0.1.0
#
# Also: EXTRAS for optional dependencies ("grpc"; or "grpc tracing"), VERSION, COMMIT and CREATED for the labels,
# PYTHON_IMAGE for a base pinned by digest.
# tools/container/prove.py builds and runs this file without a container engine and checks what is promised here.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tombola/bin:$PATH
RUN python -m venv /opt/tombola
WORKDIR /src
# Writes the bill of materials below, and stays behind in this stage.
RUN python -m venv /sbom && /sbom/bin/pip install cyclonedx-bom==7.5.0
COPY pyproject.toml ./
# torchvision reads training data; the image only serves.
ARG EXTRAS=grpc
RUN python -c 'import os, tomllib; told = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [told["optional-dependencies"][name] for name in os.environ.get("EXTRAS", "").split()]; \
print(*told["dependencies"], *sum(extras, []), sep="\n")' \
    | grep -v '^torchvision' > all.txt
# Where pip finds torch. Empty: where it finds everything else, which on x86 means the CUDA build.
ARG TORCH_INDEX_URL=
RUN grep '^torch' all.txt > torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt
# The second step must not trade the chosen torch for another. A server has no use for headers, compilers, tests,
# examples, OpenVINO's plugins for devices that we run with torch, its readers of other formats, and pip. Licences stay where
# each package keeps them; packages.json lists every package with its version and licence, and sbom.json is the same as
# CycloneDX. The base image's own packages are not in it.
RUN pip freeze > held.txt \
    && pip install --constraint held.txt -r all.txt \
    && cd /opt/tombola/lib/python*/site-packages \
    && rm -rf torch/include torch/test openvino/include openvino/libs/libopenvino_intel_gpu_plugin.so \
        openvino/libs/libopenvino_intel_npu_plugin.so openvino/libs/cache.json \
        openvino/libs/libopenvino_onnx_frontend.so* openvino/libs/libopenvino_tensorflow*_frontend.so* \
        openvino/libs/libopenvino_paddle_frontend.so* openvino/libs/libopenvino_gguf_frontend.so* \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && rm -rf pyautoattack/examples sklearn/datasets/data sklearn/datasets/images \
    && find numpy matplotlib sympy scipy sklearn -type d -name tests -prune -exec rm -r {} + \
    && pip inspect --local > /opt/tombola/packages.json \
    && pip uninstall --yes pip \
    && /sbom/bin/cyclonedx-py environment --pyproject /src/pyproject.toml --mc-type application --spec-version 1.6 \
        --output-reproducible --output-file /opt/tombola/sbom.json /opt/tombola

FROM ${PYTHON_IMAGE} AS code
WORKDIR /src
COPY pyproject.toml README.md ./
# Code only: a new library must not make a new layer of code.
COPY model_store/*.py model_store/*.md model_store/
COPY training training
COPY service service
COPY tombola tombola
RUN python -m venv /build \
    && /build/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --target /opt/code .

FROM ${PYTHON_IMAGE}
# From what changes least to what changes most: a new version of the code is a layer of about a megabyte, a new
# library a layer of its own.
COPY --from=dependencies /opt/tombola /opt/tombola
COPY model_store/library /opt/library
COPY --from=code /opt/code /opt/code
ARG VERSION=0.1.0
ARG COMMIT=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Tombola" \
      org.opencontainers.image.description="A moving-target image classifier: a fresh random ensemble of lottery tickets for every image" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.created="${CREATED}"
# The admin plane stays on the container's own loopback until TOMBOLA_ADMIN_HOST and a token say otherwise.
# NVIDIA_*: what NVIDIA's container runtime gives to the CUDA variant; without it they mean nothing.
ENV PATH=/opt/tombola/bin:$PATH PYTHONPATH=/opt/code PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    TOMBOLA_HOST=0.0.0.0 TOMBOLA_LIBRARY=/opt/library TOMBOLA_STATE_DIR=/tmp/tombola TOMBOLA_COMMIT=${COMMIT} \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 8002
STOPSIGNAL SIGTERM
# http.client, since urllib and most tools would ask a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; get = os.environ.get; host, port = get('TOMBOLA_HOST', '').strip('[]'), get('TOMBOLA_PORT', ''); c = http.client.HTTPConnection({'': '127.0.0.1', '0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), int(port) if port.isdigit() else 8000, timeout=2); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
# No shell in between: the server is process 1 and gets the signals.
ENTRYPOINT ["python", "-m", "tombola"]
CMD ["serve"]
