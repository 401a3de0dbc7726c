# zipper serve as a container: docker build -t zipper . && docker run -p 8000:8000 -e ZIPPER_API_KEY=... zipper
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
WORKDIR /app

# torch's build for processors: the default one brings several GB of CUDA
RUN python -m pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip install ".[serve,speech]" -c constraints.txt
RUN python -m zipper serve --check

RUN useradd --create-home zipper
USER zipper
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "zipper", "serve", "--host", "0.0.0.0"]
