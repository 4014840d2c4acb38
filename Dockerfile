# Two stages: a virtual environment is built in the first, and copied into a slim image that runs as a number, not root.
#   docker build -t tombola .
#   docker build -t tombola --build-arg TORCH_INDEX_URL=<the index of PyTorch's CPU or CUDA wheels> .
#   docker run --read-only --tmpfs /tmp --cap-drop=ALL --security-opt no-new-privileges -p 8000:8000 tombola
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
# Where pip finds torch. Empty: where it finds everything else, which on Linux means the CUDA build (several GB).
ARG TORCH_INDEX_URL=
RUN python -m venv /opt/tombola
ENV PATH=/opt/tombola/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md ./
# torch alone, so that a change of our code does not fetch it again.
RUN python -c 'import tomllib; print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch>")))' > torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt
COPY model_store model_store
COPY training training
COPY service service
RUN pip install . && rm -rf /opt/tombola/lib/python*/site-packages/model_store/library

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="Tombola" \
      org.opencontainers.image.description="A moving-target image classifier: a fresh random ensemble of lottery tickets for every image"
COPY --from=build /opt/tombola /opt/tombola
# The model library is a layer of its own: a new library is a small download, new code leaves it where it is.
COPY model_store/library /opt/library
ENV PATH=/opt/tombola/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TOMBOLA_HOST=0.0.0.0 TOMBOLA_LIBRARY=/opt/library TOMBOLA_STATE_DIR=/tmp/tombola HOME=/tmp
# The admin plane stays on the container's own loopback until TOMBOLA_ADMIN_HOST and a token say otherwise.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('TOMBOLA_PORT', '8000') + '/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]
