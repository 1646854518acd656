# docker build -f docker/cuda.Dockerfile -t lit-rlhf:cuda . && docker run --gpus all -v "$PWD/runs:/data/runs" lit-rlhf:cuda trainer=gpu
FROM python:3.12-slim
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[ui,lora,quantization]"
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["lit-rlhf"]
