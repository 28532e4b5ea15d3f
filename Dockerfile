# archrepair on processors: docker build -t archrepair . && docker run --rm -v "$PWD/outputs:/archrepair/outputs" archrepair
FROM python:3.12-slim AS build
# Empty: the builds of requirements-torch.lock, by hash. PyTorch's own index for CPUs (its installation page has the address) has smaller ones,
# without the libraries for GPUs: docker build --build-arg TORCH_INDEX=ADDRESS -t archrepair .
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY requirements.lock requirements-torch.lock ./
RUN pip install --require-hashes -r requirements.lock
RUN if [ -z "$TORCH_INDEX" ]; then pip install --require-hashes -r requirements-torch.lock; \
    else pip install --no-deps --index-url "$TORCH_INDEX" $(grep -oE '^torch(vision)?==[0-9.]+' requirements-torch.lock); fi
COPY pyproject.toml setup.py settings.ini README.md LICENSE ./
COPY archrepair archrepair
RUN pip install --no-deps .

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 archrepair && install -d -o archrepair /archrepair /archrepair/data /archrepair/outputs
WORKDIR /archrepair
COPY --chown=archrepair settings.ini ./
COPY --chown=archrepair nbs nbs
COPY --chown=archrepair data/published.csv data/claims.toml data/bench-v1.toml data/bench-v1.npz data/bench-v1-digits.safetensors data/
COPY --chown=archrepair outputs/lite outputs/lite
COPY --chown=archrepair outputs/entries outputs/entries
USER archrepair
ENV PATH=/opt/venv/bin:$PATH ARCHREPAIR_HOME=/archrepair MPLBACKEND=agg PYTHONUNBUFFERED=1
ENTRYPOINT ["archrepair"]
CMD ["repair", "--tier", "smoke", "--dataset", "digits:fog:3", "--out", "outputs/repair", "--force"]
