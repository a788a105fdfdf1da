# The gateway: no torch, no compiler, not root.
FROM python:3.12-slim AS build
WORKDIR /src
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml hatch_build.py constraints.txt README.md ./
COPY app app
COPY migrations migrations
RUN python -m venv /opt/loragate \
 && LORAGATE_COMPILE=1 /opt/loragate/bin/pip install --no-cache-dir --constraint constraints.txt '.[postgres]'

FROM python:3.12-slim
COPY --from=build /opt/loragate /opt/loragate
RUN useradd --system --uid 10001 --home-dir /var/lib/loragate --create-home loragate
USER loragate
ENV PATH=/opt/loragate/bin:$PATH \
    LORAGATE_HOST=0.0.0.0 \
    LORAGATE_EMBEDDED=off \
    LORAGATE_DATA_DIR=/var/lib/loragate
VOLUME /var/lib/loragate
EXPOSE 8080
ENTRYPOINT ["loragate"]
CMD ["serve"]
